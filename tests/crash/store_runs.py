"""Runs of a checkpoint store on a disk that is recorded, and the look at what a cut leaves of it.

``python -m tests.crash.store_runs --randoms 100 --json FILE`` looks at many more states than the
tests do.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from tqdm import tqdm

from hopcoll.errors import CheckpointNotFoundError
from recovery import CheckpointStore, Disk
from recovery.level import Level, retention
from recovery.log import Record
from tests.powercut import Examiner, Killed, Log, RecordingDisk, cuts

MEMORY = Path("/dev/shm")
WRITERS = 4
_FIXED = np.random.default_rng(0).integers(0, 256, 24_000, dtype=np.uint8)


def state_of(step: int) -> dict[str, Any]:
    """A state with an array that every step changes, and a larger one that stays."""
    changing = np.random.default_rng(step).integers(0, 256, 1500, dtype=np.uint8)
    return {"step": step, "changing": changing, "fixed": _FIXED}


def check_state(step: int, state: dict[str, Any]) -> None:
    """Raise AssertionError where a state is not that of its step, in any byte."""
    expected = state_of(step)
    assert state["step"] == step
    for name in ("changing", "fixed"):
        np.testing.assert_array_equal(state[name], expected[name])


@contextlib.contextmanager
def scratch_folder(prefix: str = "hopcoll-powercut-") -> Iterator[Path]:
    """A folder in memory where there is such a thing: there an fsync costs nothing."""
    where = MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def same_every_time() -> Iterator[None]:
    """Let incarnations be counted, and the clock stand: the same run leaves the same bytes."""
    count = itertools.count(1)
    with (
        mock.patch("recovery.log.secrets.token_hex", lambda n: f"{next(count):0{2 * n}x}"),
        mock.patch("recovery.log.time.strftime", lambda *_: "2001-01-01T00:00:00Z"),
    ):
        yield


# The look


def look(folder: Path) -> int | None:
    """Return the step that a store gives after a cut, None for none; check that work goes on.

    Restored for reading only and as an owner, it is the same and whole; nothing that counts is
    corrupt; a next save works, is restored, and leaves no file that nobody needs.
    """
    path = next(folder.glob("**/store"), folder / "store")
    seen = None
    with contextlib.suppress(CheckpointNotFoundError), CheckpointStore(path, readonly=True) as store:
        seen = store.restore().step
    with CheckpointStore(path) as store:
        assert store.durable_step == seen
        assert list(store.verify()) == []
        step = None
        try:
            step, state = store.restore()
        except CheckpointNotFoundError:
            assert store.steps() == []
        else:
            check_state(step, state)
        assert step == seen
        for following in itertools.islice(itertools.count((step or 0) + 1), 2):
            store.save_sync(following, state_of(following))
        store.wait()
        check_state(*store.restore())
        assert store.durable_step == (step or 0) + 2
        assert list(store.verify()) == []
    check_files(path)
    return step


def check_files(path: Path) -> None:
    """Raise AssertionError where a store that is at rest has files that nobody needs."""
    level = Level(path, Disk())
    record = level.look()
    assert record is not None
    used: set[str] = set()
    for commit in record.alive:
        used |= set(level.read_commit(commit).body["shards"])
    assert set(os.listdir(path / "shards")) == used
    assert os.listdir(path / "tmp") == []


# The runs


@contextlib.contextmanager
def opened(log: Log, disk: Disk, path: str = "store", **how: Any) -> Iterator[CheckpointStore]:
    """Open a store whose durable saves are noted at once; a killed process closes nothing."""
    store = CheckpointStore(log.root / path, disk=disk, **how)
    store.on_durable(lambda step: log.note(("durable", step)))
    if store.durable_step is not None:
        log.note(("durable", store.durable_step))
    try:
        yield store
    finally:
        with contextlib.suppress(Killed):  # the thread ends
            store.close()


def next_step(store: CheckpointStore) -> int:
    return max(store.steps(), default=0) + 1


def sync(log: Log, disk: Disk, path: str = "store") -> None:
    """Four saves, each waited for; the first two are pruned."""
    with opened(log, disk, path) as store:
        for step in range(next_step(store), 5):
            log.note(("begin", step))
            store.save_sync(step, state_of(step))
            log.note(("durable", step))


def below_missing_folders(log: Log, disk: Disk) -> None:
    """The folders above the store have to be made as well."""
    sync(log, disk, "one/two/store")


def asynchronous(log: Log, disk: Disk) -> None:
    """Saves that go on while the next one is begun."""
    with opened(log, disk) as store:
        for step in range(next_step(store), 5):
            log.note(("begin", step))
            ticket = store.save(step, state_of(step))
        ticket.wait()
        log.note(("durable", step))


def pruned(log: Log, disk: Disk) -> None:
    """A prune by the owner between two saves."""
    with opened(log, disk, keep_last=9) as store:
        for step in (1, 2, 3, 4):
            if step == 4:
                store.prune(keep_last=1)
            log.note(("begin", step))
            store.save_sync(step, state_of(step))


def pruned_from_outside(log: Log, disk: Disk) -> None:
    """A prune by another process; the owner hears of it when it loses its number."""
    with opened(log, disk, keep_last=9) as store:
        for step in (1, 2, 3, 4):
            log.note(("begin", step))
            if step == 4:
                with CheckpointStore(store.path, readonly=True, disk=RecordingDisk(log)) as other:
                    other.prune(keep_last=1)
            store.save_sync(step, state_of(step))


def gone_back(log: Log, disk: Disk) -> None:
    """An older step is restored, and a save goes on from that."""
    with opened(log, disk, keep_last=3) as store:
        for step in (1, 2, 3):
            log.note(("begin", step))
            store.save_sync(step, state_of(step))
        store.restore(1)
        log.note(("begin", 7))
        store.save_sync(7, state_of(7))


class _Turns:
    """Lets threads make their calls by turns, so that these come in the same order every time."""

    def __init__(self, count: int) -> None:
        self.changed = threading.Condition()
        self.present = list(range(count))
        self.turn = 0

    @contextlib.contextmanager
    def take(self, one: int, last: bool = False) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.present[self.turn] == one)
            try:
                yield
            finally:
                if last:
                    del self.present[self.turn]
                else:
                    self.turn += 1
                self.turn %= max(len(self.present), 1)
                self.changed.notify_all()


class _TurnDisk(RecordingDisk):
    """The disk of one of several writers, whose calls take turns."""

    def __init__(self, log: Log, turns: _Turns, one: int) -> None:
        super().__init__(log)
        self.turns, self.one = turns, one

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        with self.turns.take(self.one), super()._call():
            yield


def four_writers(log: Log, disk: Disk) -> None:
    """Four processes write a shard each, the first commits them; twice."""
    path = log.root / "store"
    committer = Level(path, disk)
    record = committer.take()
    for save, step in enumerate((1, 2, 3), 1):
        log.note(("begin", step))
        tree, leaves = encode(state_of(step))
        names = name_datasets([leaf.path for leaf in leaves])
        datasets = [
            (name, np.asarray(leaf.array, order="C"))
            for name, leaf in zip(names, leaves, strict=True)
        ]
        # The last two have nothing of the state to write, and write something of their own.
        extra = [("extra", np.full(700, writer, np.uint8)) for writer in range(WRITERS)]
        shares = [[part] for part in (*datasets, *extra)][:WRITERS]
        turns = _Turns(WRITERS)
        base = record if record.kind == "commit" else None

        def write(writer: int) -> Written:
            its = Level(path, _TurnDisk(log, turns, writer), committer.log.incarnation)
            try:
                return its.write(save, str(writer), shares[writer], base=base, step=step)
            finally:
                with turns.take(writer, last=True):
                    pass

        with ThreadPoolExecutor(WRITERS) as pool:
            done = list(pool.map(write, range(WRITERS)))
        manifest = {
            "tree": tree,
            "arrays": [
                described(name, leaf, written.pieces[0])
                for name, leaf, written in zip(names, leaves, done, strict=False)
            ],
            "shards": {name: its for written in done for name, its in written.shards.items()},
        }
        fresh = [name for written in done for name in written.fresh]
        parent = record.newest.slot if record.newest else None
        record = committer.commit(step, save, parent, manifest, retention(2, None), fresh)
        log.note(("durable", step))
        committer.clean(record)


RUNS: dict[str, Callable[[Log, Disk], None]] = {
    run.__name__: run
    for run in (
        sync,
        below_missing_folders,
        asynchronous,
        pruned,
        pruned_from_outside,
        gone_back,
        four_writers,
    )
}
