"""Runs of a workflow's journal on a disk that is recorded, and the look at what a cut leaves of it.

What is recorded are tags, each once; a record's body follows from its tag. What is noted:
("state", tags) when the journal comes to have these, which a cut may leave from then on; and
("durable", tags) when that was reported, so a cut may leave nothing older.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from hopcoll.errors import WorkflowFencedError
from recovery import journal as journal_module
from recovery.disk import Disk
from recovery.journal import Journal
from recovery.segments import Record
from tests.powercut import Examiner, Killed, Log, RecordingDisk, cuts

Tags = tuple[int, ...]


def body_of(tag: int) -> bytes:
    """Every third record is longer than two sectors."""
    return random.Random(tag).randbytes(1300 if tag % 3 == 0 else tag % 3 * 40)


def tags_of(records: Sequence[Record]) -> Tags:
    """Return the tags; raise AssertionError where a record is not what was appended."""
    for record in records:
        assert record.kind == "tag" and record.body == body_of(record.head["tag"])
    seqs = [record.seq for record in records]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs))) if seqs else True
    return tuple(record.head["tag"] for record in records)


@contextlib.contextmanager
def small_and_same_every_time(first: int = 1) -> Iterator[None]:
    """Let segments be small, and what is random counted: the same run leaves the same bytes."""
    count = itertools.count(first)
    with (
        mock.patch.object(journal_module, "_GROW_BYTES", 6144),
        mock.patch(
            "recovery.journal.secrets.token_bytes",
            lambda n: random.Random(next(count)).randbytes(n),
        ),
        mock.patch("recovery.journal.secrets.token_hex", lambda n: f"{next(count):0{2 * n}x}"),
    ):
        yield


class Notes(Protocol):
    """Where a session works, and tells what it does."""

    root: Path

    def note(self, what: tuple[str, Tags]) -> None: ...


class Session:
    """A process that has the journal, and notes what it does.

    Parameters
    ----------
    log : Notes
        Where the folder is, and where the notes go.
    disk : Disk
    """

    def __init__(self, log: Notes, disk: Disk) -> None:
        self.log = log
        self.journal = Journal(log.root / "journal", disk, {"is": "a test"})
        self.tags = tags_of(self.journal.open())
        if isinstance(log, Log):
            notes = [call.note for call in log.calls if call.kind == "note"]
            assert self.tags in allowed(notes)
        log.note(("state", self.tags))
        log.note(("durable", self.tags))

    def append(self, count: int = 1) -> None:
        """Append records; each may be there without the next."""
        for _ in range(count):
            tag = max(self.tags, default=0) + 1
            self.journal.append("tag", {"tag": tag}, body_of(tag))
            self.tags += (tag,)
            self.log.note(("state", self.tags))

    def flush(self) -> None:
        """Flush, and note that it came back."""
        self.journal.flush()
        self.log.note(("durable", self.tags))

    def compact(self) -> None:
        """Keep every second record."""
        self.tags = self.tags[::2]
        self.log.note(("state", self.tags))
        self.journal.compact([("tag", {"tag": tag}, body_of(tag)) for tag in self.tags])
        self.log.note(("durable", self.tags))


def allowed(notes: Sequence[Any]) -> Collection[Tags]:
    """Return what may be found: what was durable last, and what came after it."""
    states: list[Tags] = [()]
    begin = 0
    for kind, tags in notes:
        if kind == "state":
            states.append(tags)
        else:
            begin = max(index for index, state in enumerate(states) if state == tags)
    return set(states[begin:])


# The runs


def plain(log: Log, disk: Disk) -> None:
    """Groups of one and of several records, some longer than what the segment had left."""
    session = Session(log, disk)
    for count in (1, 3, 1, 2):
        session.append(count)
        session.flush()
    session.append()
    session.journal.close()
    log.note(("durable", session.tags))


def one_after_the_other(log: Log, disk: Disk) -> None:
    """Three owners; each dies with records that it did not flush."""
    for count in (2, 1, 0, 2):
        session = Session(log, disk)
        for _ in range(count):
            session.append(2)
            session.flush()
        session.append()


def compacted(log: Log, disk: Disk) -> None:
    """Two compactions, the second in another process; the first with records that wait."""
    session = Session(log, disk)
    session.append(3)
    session.flush()
    session.append(2)
    session.compact()
    session.append(2)
    session.flush()
    session = Session(log, disk)
    session.compact()
    session.append()
    session.flush()


def woken(log: Log, disk: Disk) -> None:
    """An owner that was stopped writes on while its successor works and compacts."""
    first = Session(log, disk)
    first.append(2)
    first.flush()
    second = Session(log, RecordingDisk(log))
    for step in (second.append, second.flush, second.compact, second.append, second.flush):
        with contextlib.suppress(WorkflowFencedError):
            first.journal.append("tag", {"tag": -1})
            first.journal.flush()
        step()


RUNS: dict[str, Callable[[Log, Disk], None]] = {
    run.__name__: run for run in (plain, one_after_the_other, compacted, woken)
}


def one_more(log: Log, disk: Disk) -> None:
    """A successor, which takes what it finds and goes on."""
    session = Session(log, disk)
    session.append(2)
    session.flush()
    session.compact()


def look(folder: Path) -> Tags:
    """Return the tags in a journal after a cut; check that work goes on, with no file too many."""
    path = folder / "journal"
    seen: Tags = ()
    if path.exists():
        seen = tags_of(Journal.read(path).records)
    journal = Journal(path, Disk(), {"is": "the look"})
    assert tags_of(journal.open()) == seen
    tag = 1000
    journal.append("tag", {"tag": tag}, body_of(tag))
    journal.flush()
    journal.close()
    reading = Journal.read(path)
    assert tags_of(reading.records) == (*seen, tag)
    assert reading.closed and not reading.torn
    assert sorted(os.listdir(path)) == [f"{number:010d}.seg" for number in reading.segments]
    assert {record.segment for record in reading.records} <= set(reading.segments)
    return seen


class Campaign:
    """Looks at the states of many runs.

    Parameters
    ----------
    scratch : Path
        A folder of its own, in memory.
    randoms : int
        Random subsets for each cut.
    """

    def __init__(self, scratch: Path, randoms: int = 2) -> None:
        self.scratch = scratch
        self.how: dict[str, Any] = {"randoms": randoms, "seed": 0}
        self.examiner = Examiner(look, scratch, allowed)
        self.sites: set[str] = set()
        self.needed: set[str] = set()

    @contextlib.contextmanager
    def log(self, first: int = 1) -> Iterator[Log]:
        """A folder to run in."""
        root = self.scratch / "disk"
        root.mkdir()
        try:
            with small_and_same_every_time(first), Log(root) as made:
                yield made
        finally:
            shutil.rmtree(root)

    def cut(self, name: str) -> None:
        """Cut the power at each call of a run."""
        with self.log() as log:
            RUNS[name](log, RecordingDisk(log))
            self._examine(log)

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

    def cut_and_cut(self, name: str, count: int) -> None:
        """Cut the power of a run, and again at each call of its successor; for so many states."""
        with self.log() as log:
            RUNS[name](log, RecordingDisk(log))
            states = {cut.state.fingerprint: cut.state for cut in cuts(log, **self.how)}
        for state in random.Random(0).sample(list(states.values()), count):
            found = self.examiner.found(state)
            state.make(self.scratch / "disk")
            try:
                with small_and_same_every_time(1000), Log(self.scratch / "disk") as log:
                    log.note(("state", found))
                    log.note(("durable", found))
                    one_more(log, RecordingDisk(log))
                    self._examine(log, first=2)
            finally:
                shutil.rmtree(self.scratch / "disk")

    def _examine(self, log: Log, first: int = 0) -> None:
        with small_and_same_every_time(1 << 20):
            self.examiner.examine(log, first=first, **self.how)
            self.sites |= set(log.syncs())
            self.needed |= self.examiner.needed_syncs(log, self.needed, first=first, randoms=0)
