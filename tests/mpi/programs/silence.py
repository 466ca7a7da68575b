"""Ranks that fall silent: Allreduces until FOLDER/over is there; each rank says how they go.

``silence.py FOLDER [RANK...]``: these ranks stop themselves (SIGSTOP) after some operations. What
happens is said in lines of JSON: "stopping", "seen" (other contributors than before), "ended".
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

import hopcoll

comm = hopcoll.init()
over, stopped = Path(sys.argv[1], "over"), [int(word) for word in sys.argv[2:]]


def say(event: str, **more: Any) -> None:
    line = {"rank": comm.rank, "event": event, "pid": os.getpid(), **more}
    text = json.dumps(line) + "\n"
    # Standard output passes through the launcher's own network, which may be cut as well.
    written = Path(sys.argv[1], f"{event}.{comm.rank}")
    part = Path(sys.argv[1], f"part.{comm.rank}")
    part.write_text(text)
    part.rename(written)
    os.write(1, text.encode())


given = np.ones(100_000, np.float32)
result = np.empty_like(given)
seen: list[tuple[int, ...]] = []
wrong, error, away = 0, "", ()
try:
    for step in range(1_000_000):
        if step == 20 and comm.rank in stopped:
            say("stopping")
            os.kill(os.getpid(), signal.SIGSTOP)
        given[0] = 1000.0 if over.exists() else 1.0
        outcome = comm.Allreduce(given, result)
        wrong += int(np.any(result[1:] != len(outcome.contributors)))
        if not seen or seen[-1] != outcome.contributors:
            seen.append(outcome.contributors)
            say("seen", times=len(seen))
        if result[0] >= 1000.0:
            break
except hopcoll.errors.HopcollError as raised:
    error, away = type(raised).__name__, getattr(raised, "ranks", ())
counters = comm.counters()
told = {name: counters[name] for name in ("fenced", "lost", "pauses", "epoch")}
if not error:
    comm.Barrier()  # whoever leaves earlier may be an epoch for those who have yet to count
say("ended", seen=seen, wrong=wrong, error=error, away=away, **told)
comm.close(2)
