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
from tests.crash.store_stops import start, stop_and_wake
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


def test_a_stopped_owner_wakes_up_after_its_successor_has_committed(tmp_path: Path) -> None:
    """`python -m tests.crash.store_stops` does it a hundred times."""
    assert stop_and_wake(tmp_path, 20) == {"stops": 20, "number_taken": 10, "number_forgotten": 10}


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
    while another process prunes all it can. Once that one is stopped, wherever it is: there is
    something to go back to then."""
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
                if prunes == 10:
                    os.kill(child.pid, signal.SIGSTOP)
                    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
                    for _ in range(2):
                        step += 1
                        store.save_sync(step, state(step))
                oldest = store.steps()[0]
                try:
                    found = store.restore(oldest)
                except CheckpointNotFoundError:
                    assert prunes != 10
                    continue  # pruned in between
                assert_is_state(found.state, oldest)
                gone_back += oldest < step
                assert prunes != 10 or gone_back
                step = oldest
                os.kill(child.pid, signal.SIGCONT)
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
