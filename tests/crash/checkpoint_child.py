"""The child of test_checkpoint.py: ``checkpoint_child.py FOLDER HOW MOMENT``.

For k = 1, 2, ... a process is forked that saves the states of some steps to FOLDER/k/store and gets
SIGKILL at its k-th call that changes the disk, until one comes through. FOLDER/k/killed then names
the call, and FOLDER/k/acknowledged has the steps of which it was told that they are durable.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recovery import AsyncWriter, save
from recovery.checkpoint import Disk

STEPS = (1, 2, 3, 4)


def state(step: int) -> dict[str, np.ndarray]:
    """Return the arrays of a step."""
    return {"weights": np.arange(1000.0) + step, "step": np.array(step)}


class FatalDisk(Disk):
    """Kills its process at the k-th call: before it, or after it and in the middle of a write."""

    def __init__(self, fatal_call: int, moment: str, folder: Path) -> None:
        super().__init__(piece_bytes=4096)
        self.calls_left = fatal_call
        self.moment = moment
        self.folder = folder

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.calls_left -= 1
        if self.calls_left == 0:
            (self.folder / "killed").write_text(function.__name__)
            if self.moment == "after":
                if function.__name__ == "write":
                    descriptor, data = arguments
                    arguments = descriptor, data[: len(data) // 2]
                function(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    def write(self, descriptor: int, data: bytes) -> int:
        return self._call(super().write, descriptor, data)

    def fsync(self, descriptor: int) -> None:
        self._call(super().fsync, descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._call(super().rename, source, target)

    def unlink(self, path: Path) -> None:
        self._call(super().unlink, path)


def save_all(folder: Path, how: str, disk: Disk) -> None:
    """Save the state of each step, and note each that was acknowledged."""
    with open(folder / "acknowledged", "ab", buffering=0) as acknowledged:
        if how == "save":
            for step in STEPS:
                save(folder / "store", step, state(step), {"step": step}, disk=disk)
                acknowledged.write(b"%d\n" % step)
            return
        with AsyncWriter(folder / "store", disk=disk) as writer:
            for step in STEPS:
                writer.submit(step, state(step), {"step": step})
                writer.wait()
                acknowledged.write(b"%d\n" % step)


def main() -> None:
    """Fork one process for each k."""
    base, how, moment = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    for k in itertools.count(1):
        folder = base / str(k)
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            save_all(folder, how, FatalDisk(k, moment, folder))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            continue
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
