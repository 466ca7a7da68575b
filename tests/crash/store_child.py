"""The child of test_store.py: ``store_child.py FOLDER HOW``.

For k = 1, 2, ... a process is forked that works on the store FOLDER/k/store, as HOW says, and gets
SIGKILL at its k-th call that changes the disk, until one comes through. FOLDER/k/killed then names
the call, and FOLDER/k/acknowledged has the steps of which it was told that they are durable.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

from recovery import CheckpointStore
from tests.store_faults import FatalDisk, state

STEPS = (1, 2, 3)


def work(folder: Path, how: str, disk: FatalDisk) -> None:
    """Save the state of each step, and note each that was acknowledged."""
    path = folder / "store"
    with open(folder / "acknowledged", "ab", buffering=0) as acknowledged:
        if how == "prune":
            with CheckpointStore(path, keep_last=9) as store:
                for step in STEPS:
                    store.save_sync(step, state(step))
            acknowledged.write(b"%d\n" % STEPS[-1])
            CheckpointStore(path, readonly=True, disk=disk).prune(keep_last=1)
            return
        with CheckpointStore(path, keep_last=1, disk=disk) as store:
            for step in STEPS:
                if how == "save":
                    store.save_sync(step, state(step))
                else:
                    changing = state(step)
                    ticket = store.save(step, changing)
                    changing["weights"][:] = -1
                    ticket.wait()
                acknowledged.write(b"%d\n" % step)


def main() -> None:
    """Fork one process for each k."""
    base, how = Path(sys.argv[1]), sys.argv[2]
    for k in itertools.count(1):
        folder = base / str(k)
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            work(folder, how, FatalDisk(k, folder))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            continue
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
