"""SIGKILL at every call by which the store changes the disk; and processes that are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hopcoll.errors import CheckpointNotFoundError
from recovery import CheckpointStore
from tests import launch
from tests.store_faults import assert_is_state, state

CHILD = Path(__file__).with_name("store_child.py")
STEPS = (1, 2, 3)


@pytest.mark.parametrize("how", ["save", "async", "prune"])
def test_killed_at_every_call(tmp_path: Path, how: str) -> None:
    subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path), how],
        check=True,
        timeout=120,
        env=launch.environment(),  # one thread, as the child forks
    )
    folders = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    *killed, unharmed = folders
    assert not (unharmed / "killed").exists()
    with CheckpointStore(unharmed / "store", readonly=True) as store:
        assert store.steps() == [3]
    calls = [(folder / "killed").read_text() for folder in killed]
    assert {"create", "write", "fsync", "close", "link", "fsync_folder", "unlink"} <= set(calls)
    for folder in killed:
        check_store(folder, how)


def check_store(folder: Path, how: str) -> None:
    """The newest acknowledged state is there, or the one after it; and work can go on."""
    acknowledged = [int(line) for line in (folder / "acknowledged").read_text().split()]
    newest = acknowledged[-1] if acknowledged else 0
    path = folder / "store"
    try:
        with CheckpointStore(path, readonly=True) as store:
            found = store.restore()
    except CheckpointNotFoundError:
        assert newest == 0
    else:
        assert found.step in ((newest,) if how == "prune" else (newest, newest + 1))
        assert_is_state(found.state, found.step)
        newest = found.step
    with CheckpointStore(path, keep_last=1) as store:
        if newest:
            assert store.restore().step == newest
        store.save_sync(newest + 1, state(newest + 1))
        store.wait()
        assert_is_state(store.restore().state, newest + 1)
        assert not list(store.verify())
    assert not list((path / "tmp").iterdir())
    assert len(list((path / "shards").iterdir())) <= 2  # of this save, and of what did not change


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=launch.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


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


def test_a_stopped_owner_wakes_up_after_its_successor_has_committed(tmp_path: Path) -> None:
    """Stopped between its last look and its link: 20 times, with a successor that commits little
    (the number is taken) and one that commits so much that the number is long forgotten."""
    child = start(STOPPED)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        for turn in range(20):
            path = tmp_path / str(turn)
            child.stdin.write(f"{path}\n")
            child.stdin.flush()
            _, status = os.waitpid(child.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            with CheckpointStore(path, keep_last=2) as successor:
                assert_is_state(successor.restore().state, 1)
                last = 40 if turn % 2 else 2
                for step in range(2, last + 1):
                    successor.save_sync(step, {"by": "successor", "step": step})
                before = sorted(os.listdir(path / "slots"))
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


PRUNING = """
import sys
from recovery import CheckpointStore

with CheckpointStore(sys.argv[1], readonly=True) as store:
    while True:
        store.prune(keep_last=1)
        print(len(store.steps()), flush=True)
"""


def test_prunes_from_elsewhere_beside_commits(tmp_path: Path) -> None:
    """Commits that refer to older shards, going on from the one before the last again and again,
    while another process prunes all it can."""
    path = tmp_path / "store"
    store = CheckpointStore(path, keep_last=5)
    store.save_sync(1, state(1))
    child = start(PRUNING, path)
    assert child.stdout is not None
    prunes = gone_back = 0
    try:
        step = 1
        for _ in range(60):
            step += 1
            store.save_sync(step, state(step))
            if step % 3 == 0:
                assert child.stdout.readline()  # so that there is one in between
                prunes += 1
                oldest = store.steps()[0]
                try:
                    found = store.restore(oldest)
                except CheckpointNotFoundError:
                    continue  # pruned in between
                assert_is_state(found.state, oldest)
                gone_back += oldest < step
                step = oldest
    finally:
        child.kill()
        child.communicate()
    assert prunes
    assert gone_back
    assert not list(store.verify())
    # The newest, also where the last turn went back to an older one and saved nothing since.
    step, found = store.restore()
    assert_is_state(found, step)
    store.save_sync(step + 1, state(step + 1))
    store.prune(keep_last=1)
    assert len(list((path / "shards").iterdir())) <= 2
    store.close()
