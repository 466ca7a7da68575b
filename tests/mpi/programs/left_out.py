"""A store whose committer stops itself ahead of its link, alone on its host: `left_out.py FOLDER`.

The others leave it out and go on. What happens is said in lines of JSON: "stopping", "saved" (a
step is durable), "ended".
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

import hopcoll
from hopcoll.errors import HopcollError
from recovery import CheckpointStore, Disk

comm = hopcoll.init()


def say(event: str, **more: object) -> None:
    line = {"rank": comm.rank, "event": event, "pid": os.getpid(), **more}
    os.write(1, (json.dumps(line) + "\n").encode())


class Stopping(Disk):
    """Stops its process ahead of the link of a slot, once it is armed."""

    armed = False

    def link(self, source: Path, target: Path) -> None:
        if self.armed and target.parent.name == "slots":
            self.armed = False
            say("stopping")
            os.kill(os.getpid(), signal.SIGSTOP)
        super().link(source, target)


def state_of(step: int) -> dict[str, np.ndarray]:
    return {f"array{i}": np.full(50_000, 10.0 * step + i) for i in range(4)}


disk = Stopping()
store = CheckpointStore(Path(sys.argv[1], "store"), comm, disk=disk, writers="rank", timeout_s=60.0)
error = ""
try:
    for step in (1, 2, 3):
        disk.armed = step == 2 and comm.rank == 0
        store.save_sync(step, state_of(step))
        say("saved", step=step)
    store.close()
except HopcollError as raised:
    error = type(raised).__name__
# The others stay until the one that was left out has heard of it from them.
over = Path(sys.argv[1], "over")
if comm.rank == 0:
    over.touch()
while not error and not any(comm.allgather(over.exists(), timeout_s=60)):
    pass
say("ended", error=error)
comm.close(2)
