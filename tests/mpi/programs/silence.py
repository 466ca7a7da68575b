"""Ranks that fall silent: Allreduces until the file FOLDER/over is there; each rank says how they went.

``silence.py FOLDER [RANK...]``: these ranks stop themselves (SIGSTOP) after some operations, and
write their process numbers to FOLDER/stopped.RANK first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

import hopcoll

folder, stopped = Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]
comm = hopcoll.init()
said: dict[str, object] = {"rank": comm.rank, "wrong": 0, "error": ""}
given = np.ones(100_000, np.float32)
result = np.empty_like(given)
seen: list[tuple[int, ...]] = []
try:
    for step in range(1_000_000):
        if step == 20 and comm.rank in stopped:
            (folder / f"stopping.{comm.rank}").write_text(str(os.getpid()))
            (folder / f"stopping.{comm.rank}").rename(folder / f"stopped.{comm.rank}")
            os.kill(os.getpid(), signal.SIGSTOP)
        given[0] = 1000.0 if (folder / "over").exists() else 1.0
        outcome = comm.Allreduce(given, result)
        if not seen or seen[-1] != outcome.contributors:
            seen.append(outcome.contributors)
            (folder / f"seen.{comm.rank}.{len(seen)}").touch()
        said["wrong"] += int(np.any(result[1:] != len(outcome.contributors)))
        if result[0] >= 1000.0:
            break
except hopcoll.errors.HopcollError as error:
    said["error"] = type(error).__name__
    said["ranks"] = list(getattr(error, "ranks", ()))
    (folder / f"failed.{comm.rank}").touch()
counters = comm.counters()
said["seen"] = seen
said |= {name: counters[name] for name in ("fenced", "lost", "minorities", "pauses", "epoch")}
comm.close(2)
os.write(1, json.dumps(said).encode() + b"\n")
