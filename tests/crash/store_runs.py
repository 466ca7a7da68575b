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
from recovery.level import Level, Written, retention
from recovery.shards import name_datasets
from recovery.state import encode
from tests.powercut import Examiner, Killed, Log, RecordingDisk, cuts

MEMORY = Path("/dev/shm")
WRITERS = 4
_SUCCESSORS = 1000
_FIXED = np.random.default_rng(0).integers(0, 256, 24_000, dtype=np.uint8)


def state_of(step: int) -> dict[str, Any]:
    """A state of arrays that every step changes, and of larger ones that stay."""
    changing = np.random.default_rng(step).integers(0, 256, 1500, dtype=np.uint8)
    return {
        "step": step,
        "arrays": {
            "changing": changing,
            "fixed": _FIXED,
            "small": np.full((3, 5), step, np.float32),
            "also fixed": _FIXED[:9000].view(np.float64),
        },
    }


def check_state(step: int, state: dict[str, Any]) -> None:
    """Raise AssertionError where a state is not that of its step, in any byte."""
    expected = state_of(step)
    assert state["step"] == step
    assert list(state["arrays"]) == list(expected["arrays"])
    for name, array in expected["arrays"].items():
        assert state["arrays"][name].dtype == array.dtype
        np.testing.assert_array_equal(state["arrays"][name], array)


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
def same_every_time(first: int = 1) -> Iterator[None]:
    """Let incarnations be counted, and the clock stand: the same run leaves the same bytes."""
    count = itertools.count(first)
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
    with contextlib.suppress(CheckpointNotFoundError):
        with CheckpointStore(path, readonly=True) as store:
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
        following = (step or 0) + 1
        store.save_sync(following, state_of(following))
        restored = store.restore()
        assert restored.step == following
        check_state(*restored)
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
    except Killed:
        with contextlib.suppress(Killed):  # so that its thread ends
            store.close()
        raise
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
    """Four processes write a shard each, at once, and one of them commits all."""
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
        turns = _Turns(WRITERS)
        base = record if record.kind == "commit" else None

        def write(writer: int) -> Written:
            its = Level(path, _TurnDisk(log, turns, writer), committer.log.incarnation)
            try:
                return its.write(save, str(writer), [datasets[writer]], base=base, step=step)
            finally:
                with turns.take(writer, last=True):
                    pass

        with ThreadPoolExecutor(WRITERS) as pool:
            done = list(pool.map(write, range(WRITERS)))
        manifest = {
            "tree": tree,
            "arrays": [
                {
                    "name": name,
                    "dtype": leaf.dtype,
                    "shape": list(leaf.array.shape),
                    "piece": written.pieces[0],
                }
                for name, leaf, written in zip(names, leaves, done, strict=True)
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


def one_more(log: Log, disk: Disk) -> None:
    """A successor, which finds what others left, and saves the next step."""
    path = next(log.root.glob("**/store"), log.root / "store")
    with opened(log, disk, str(path.relative_to(log.root))) as store:
        step = next_step(store)
        log.note(("begin", step))
        store.save_sync(step, state_of(step))


# What is looked at


class Campaign:
    """Looks at the states of many runs, and keeps count.

    Parameters
    ----------
    scratch : Path
        A folder of its own, in memory.
    randoms : int
        Random subsets for each cut.
    seed : int
    """

    def __init__(self, scratch: Path, randoms: int = 4, seed: int = 0) -> None:
        self.scratch = scratch
        self.how = {"randoms": randoms, "seed": seed}
        self.examiner = Examiner(look, scratch)
        #: Of the program as it is; and new states, those with fsyncs taken out aside.
        self.cuts = self.states = 0
        self.sites: set[str] = set()
        self.needed: set[str] = set()

    @contextlib.contextmanager
    def log(self) -> Iterator[Log]:
        """A folder to run in."""
        root = self.scratch / "disk"
        root.mkdir()
        try:
            with same_every_time(), Log(root) as made:
                yield made
        finally:
            shutil.rmtree(root)

    def cut(self, name: str) -> set[Any]:
        """Cut the power at each call of a run; return what was found."""
        with self.log() as log:
            RUNS[name](log, RecordingDisk(log))
            self._examine(log)
            # All of it is known by now.
            return {self.examiner.seen[cut.state.fingerprint] for cut in cuts(log, **self.how)}

    def single_syncs(self, name: str) -> dict[bool, list[str]]:
        """Return the single fsyncs of a run's saves: under True those that are needed."""
        found: dict[bool, list[str]] = {True: [], False: []}
        with self.log() as log:
            RUNS[name](log, RecordingDisk(log))
            begin = next(at for at, call in enumerate(log.calls) if call.note == ("begin", 1))
            for at in sorted(at for its in log.syncs().values() for at in its if at > begin):
                needed = self.examiner.needs(log, [at], randoms=0)
                found[needed].append(f"{at}: {log.calls[at]} by {log.calls[at].site}")
        return found

    def calls_that_name(self, name: str) -> list[int]:
        """Return after how many calls of a run there is a new name that is not synced yet."""
        with self.log() as log:
            RUNS[name](log, RecordingDisk(log))
            calls = [call for call in log.calls if call.kind != "note"]
        return [at for at, call in enumerate(calls, 1) if call.kind in ("link", "mkdir")]

    def kill_and_cut(self, name: str, lives: int) -> bool:
        """Kill a run after so many calls, and cut the power at each call of its successor, which
        sees what was never synced; return whether the run was killed."""
        with self.log() as log:
            try:
                RUNS[name](log, RecordingDisk(log, lives_for=lives))
            except Killed:
                first = len(log.calls)
                one_more(log, RecordingDisk(log))
                self._examine(log, first=first)
                return True
            return False

    def cut_and_cut(self, name: str, count: int) -> int:
        """Cut the power of a run, and again at each call of its successor; for so many states,
        which are drawn. Return how many successors there were."""
        with self.log() as log:
            RUNS[name](log, RecordingDisk(log))
            states = {cut.state.fingerprint: cut.state for cut in cuts(log, **self.how)}
        drawn = random.Random(self.how["seed"]).sample(list(states.values()), count)
        for state in drawn:
            state.make(self.scratch / "disk")
            # No incarnation comes twice.
            with same_every_time(_SUCCESSORS), Log(self.scratch / "disk") as log:
                if (found := self.examiner.found(state)) is not None:
                    log.note(("durable", found))
                one_more(log, RecordingDisk(log))
                self._examine(log, first=1)
            shutil.rmtree(self.scratch / "disk")
        return len(drawn)

    def _examine(self, log: Log, first: int = 0) -> None:
        cuts_before, states_before = self.examiner.cuts, len(self.examiner.seen)
        self.examiner.examine(log, first=first, **self.how)
        self.cuts += self.examiner.cuts - cuts_before
        self.states += len(self.examiner.seen) - states_before
        self.sites |= set(log.syncs())
        self.needed |= self.examiner.needed_syncs(log, self.needed, first=first, randoms=0)


@click.command()
@click.option("--randoms", default=50, show_default=True, help="Random subsets for each cut.")
@click.option("--seed", default=0, show_default=True)
@click.option("--successors", default=200, show_default=True, help="That lose the power again.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the report here.")
def main(randoms: int, seed: int, successors: int, path: Path | None) -> None:
    """Look at what power cuts leave of checkpoint stores, for longer than the tests do."""
    begin_s = time.monotonic()
    report: dict[str, Any] = {"randoms": randoms, "seed": seed, "runs": {}}
    with scratch_folder() as scratch:
        campaign = Campaign(scratch, randoms, seed)
        for name in RUNS:
            cuts_before, states_before = campaign.cuts, campaign.states
            campaign.cut(name)
            kills = 0
            with tqdm(desc=name, unit="kill") as bar:
                while campaign.kill_and_cut(name, kills):
                    kills += 1
                    bar.update()
            twice = campaign.cut_and_cut(name, successors)
            report["runs"][name] = {
                "kills": kills,
                "second_cuts": twice,
                "cuts": campaign.cuts - cuts_before,
                "new_states": campaign.states - states_before,
            }
        report["cuts"], report["states"] = campaign.cuts, campaign.states
        report["fsyncs"] = sorted(campaign.sites)
        report["fsyncs_not_needed"] = sorted(campaign.sites - campaign.needed)
    report["seconds"] = round(time.monotonic() - begin_s, 1)
    click.echo(json.dumps(report, indent=1))
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
