"""An owner that is stopped between its last look and its link, while its successor commits:
``python -m tests.crash.store_stops [TURNS] [FOLDER]``.

No slot may be lost, or filled twice, and nothing that the successor committed be touched.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from recovery import CheckpointStore
from tests import launch
from tests.store_faults import assert_is_state, state

STOPPED = """
import signal, sys, threading
from hopcoll.errors import CheckpointFencedError
from recovery import CheckpointStore, Disk
from tests.store_faults import state

class Stopping(Disk):
    armed = False
    def link(self, source, target):
        if self.armed:
            Stopping.armed = False
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        super().link(source, target)

for path in sys.stdin:
    store = CheckpointStore(path.strip(), disk=Stopping())
    store.save_sync(1, state(1))
    Stopping.armed = True
    try:
        store.save_sync(2, state(2))
    except CheckpointFencedError:
        print("fenced", flush=True)
    else:
        print("saved", flush=True)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a program of Python's in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=launch.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def stop_and_wake(folder: Path, turns: int) -> dict[str, int]:
    """Do it, with a successor that commits little (the number of the stopped one is taken) and one
    that commits so much that the number is long forgotten; count both."""
    child = start(STOPPED)
    assert child.stdin is not None
    assert child.stdout is not None
    counts = {"stops": 0, "number_taken": 0, "number_forgotten": 0}
    try:
        for turn in range(turns):
            path = folder / str(turn)
            child.stdin.write(f"{path}\n")
            child.stdin.flush()
            _, status = os.waitpid(child.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            counts["stops"] += 1
            with CheckpointStore(path, keep_last=2) as successor:
                assert_is_state(successor.restore().state, 1)
                wanted = sorted(os.listdir(path / "slots"))[-1]
                last = 40 if turn % 2 else 2
                for step in range(2, last + 1):
                    successor.save_sync(step, {"by": "successor", "step": step})
                successor.wait()
                before = sorted(os.listdir(path / "slots"))
                counts["number_taken" if wanted in before else "number_forgotten"] += 1
                os.kill(child.pid, signal.SIGCONT)
                assert child.stdout.readline() == "fenced\n"
                assert sorted(os.listdir(path / "slots")) == before
                assert successor.restore() == (last, {"by": "successor", "step": last})
                successor.save_sync(last + 1, state(last + 1))
                assert successor.steps() == [last, last + 1]
                assert not list(successor.verify())
    finally:
        child.kill()
        child.communicate()
    return counts


if __name__ == "__main__":
    turns, where = (*sys.argv[1:], *("100", None)[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        print(json.dumps(stop_and_wake(Path(scratch), int(turns))))
