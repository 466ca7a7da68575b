"""The journal of a workflow: records, groups, disks that fail; all of it against a model.

Power cuts and real kills are in tests/crash/test_journal.py.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hopcoll.errors import (
    WorkflowError,
)
from recovery import journal as journal_module
from recovery import segments
from recovery.disk import Disk
from recovery.journal import Journal
from tests.crash.store_runs import scratch_folder
from tests.journals import OWNER, heads, opened, put
from tests.powercut import Killed
from tests.store_faults import CALLS, FailingDisk

# What it keeps


def test_records_come_back_as_they_were(folder: Path) -> None:
    journal = Journal(folder, Disk(), OWNER)
    assert journal.open() == []
    written = [
        ("intent", {"task": "ä", "n": [1, 2.5, None]}, b""),
        ("", {}, b"\0\1\2"),
        ("adopt", {"nested": {"a": True}}, bytes(100_000)),
        ("large", {}, random.Random(1).randbytes(3 << 20)),
    ]
    for number, (kind, head, body) in enumerate(written, 1):
        assert journal.append(kind, head, body) == number
        assert journal.durable == number - 1
        if number != 2:
            journal.flush()
            assert journal.durable == number
        else:
            journal.flush(1)
            assert journal.durable == 1
            journal.flush()
    journal.flush()
    journal.close()
    journal.close()
    reading = Journal.read(folder)
    assert [(one.kind, one.head, one.body) for one in reading.records] == written
    assert [one.seq for one in reading.records] == [1, 2, 3, 4]
    assert {one.segment for one in reading.records} == {1}
    assert reading.owner == OWNER
    assert reading.segments == [1]
    assert not reading.torn
    assert reading.closed
    (path,) = folder.iterdir()
    assert not path.read_bytes().endswith(bytes(16)), "what was not needed is given back"
    assert Journal(folder, Disk(), {}).open() == reading.records


def test_body_may_be_anything_with_bytes(folder: Path) -> None:
    journal = opened(folder)
    journal.append("k", {}, bytearray(b"ab"))
    journal.append("k", {}, memoryview(b"abcd")[1:3])
    journal.close()
    assert [record.body for record in Journal.read(folder).records] == [b"ab", b"bc"]


def test_a_reader_disturbs_nobody(folder: Path) -> None:
    journal = opened(folder)
    put(journal, 1)
    journal.append("number", {"at": 2})
    assert heads(folder) == [1]
    assert not Journal.read(folder).closed
    put(journal, 3)
    assert heads(folder) == [1, 2, 3]


def test_incarnations_follow_on_each_other(folder: Path) -> None:
    """Numbers go on, and what a successor finds at the end it has in its own segment."""
    for turn in range(12):
        journal = Journal(folder, Disk(), {"turn": turn})
        found = journal.open()
        assert [record.head["at"] for record in found] == list(range(turn * 2))
        assert journal.append("number", {"at": turn * 2}) == turn * 2 + 1
        journal.flush()
        put(journal, turn * 2 + 1)
        if turn % 2:
            journal.close()
    reading = Journal.read(folder)
    assert [record.seq for record in reading.records] == list(range(1, 25))
    assert reading.owner == {"turn": 11}


def test_an_incarnation_that_writes_little_leaves_no_file(folder: Path) -> None:
    put(opened(folder), 1, 2)
    for _ in range(5):
        opened(folder)
    assert heads(folder) == [1, 2]
    assert os.listdir(folder) == ["0000000006.seg"]


def test_a_hundred_thousand_records(folder: Path) -> None:
    journal = opened(folder)
    for number in range(100_000):
        journal.append("number", {"at": number}, b"body")
    journal.close()
    assert heads(folder) == list(range(100_000))


def test_what_waits_is_cut_into_groups(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_GROUP_BYTES_MAX", 100)
    disk = FailingDisk(0, 0)
    journal = opened(folder, disk)
    begin = len(disk.names)
    for number in range(10):
        journal.append("number", {"at": number}, bytes(40 if number % 5 else 400))
    journal.flush()
    assert disk.names[begin:].count("fdatasync") > 4
    assert heads(folder) == list(range(10))


def test_a_body_that_is_a_journal_is_a_body(folder: Path) -> None:
    """Also where its end is torn off, so that one might look for frames in it."""
    first = opened(folder)
    for number in range(6):
        put(first, number)
    content = segments.path_of(folder, 1).read_bytes()
    journal = opened(folder)
    put(journal, 6)
    content += segments.path_of(folder, 2).read_bytes()
    journal.append("copy", {"at": 7}, content + b"end")
    journal.flush()
    assert Journal.read(folder).records[-1].body == content + b"end"
    path = segments.path_of(folder, 2)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"end")])
    assert heads(folder) == list(range(7))
    assert Journal.read(folder).torn


# Compaction


def test_compaction_replaces_all(folder: Path) -> None:
    journal = opened(folder)
    put(journal, 1, 2, 3)
    kept = Journal.read(folder).records[1]
    last = journal.append("number", {"at": 4})
    journal.compact([kept, ("number", {"at": 30}, b"x")])
    assert journal.durable == last + 2
    journal.flush(last)
    put(journal, 5)
    assert heads(folder) == [2, 30, 5]
    assert os.listdir(folder) == ["0000000002.seg"]
    journal.compact([])
    assert heads(folder) == []
    assert journal.append("number", {"at": 6}) == 8
    journal.close()
    assert [record.seq for record in Journal.read(folder).records] == [8]
    assert [record.seq for record in Journal(folder, Disk(), OWNER).open()] == [8]


def test_appends_beside_a_compaction_come_after_it(folder: Path) -> None:
    class Busy(Disk):
        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            if target.name == "0000000002.seg":
                journal.append("number", {"at": 9})

    journal = opened(folder, Busy())
    put(journal, 1, 2)
    journal.compact([("number", {"at": 12}, b"")])
    assert heads(folder) == [12]
    journal.flush()
    assert heads(folder) == [12, 9]


def test_a_record_that_cannot_be_kept_changes_nothing(folder: Path) -> None:
    journal = opened(folder)
    put(journal, 1)
    with pytest.raises(TypeError, match="head"):
        journal.compact([("number", {"at": 1}, b""), ("number", {"at": {1}}, b"")])
    put(journal, 2)
    assert heads(folder) == [1, 2]


# Group commit


def test_threads_share_groups(folder: Path) -> None:
    """Each thread's records are durable when its flush returns, and one fsync serves many."""

    class Slow(Disk):
        syncs = -1000

        def fdatasync(self, descriptor: int) -> None:
            if Slow.syncs == 0:  # the first holds until every thread waits with a record
                assert all_wait.wait(60.0)
            Slow.syncs += 1
            super().fdatasync(descriptor)

    all_wait = threading.Event()
    begun: set[int] = set()
    journal = opened(folder, Slow())
    Slow.syncs = 0

    def work(thread: int) -> None:
        for number in range(40):
            seq = journal.append("number", {"at": [thread, number]})
            begun.add(thread)
            if len(begun) == 8:
                all_wait.set()
            journal.flush(seq)
            assert journal.durable >= seq

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    found = heads(folder)
    for thread in range(8):
        assert [number for by, number in found if by == thread] == list(range(40))
    assert Slow.syncs < 320


def test_flush_waits_for_no_more_than_asked(folder: Path) -> None:
    journal = opened(folder)
    assert journal.flush() is None
    first = journal.append("number", {"at": 1})
    journal.flush(0)
    assert journal.durable == 0
    with pytest.raises(ValueError, match=r"upto is 2, and 1 records"):
        journal.flush(first + 1)
    with pytest.raises(ValueError, match="upto"):
        journal.flush(-1)


def test_waiting_threads_are_told_of_a_failure(folder: Path) -> None:
    class Failing(Disk):
        def fdatasync(self, descriptor: int) -> None:
            if journal.durable or not armed.is_set():
                return
            reached.set()
            go_on.wait()
            raise OSError(errno.EIO, "broken")

    armed, reached, go_on = threading.Event(), threading.Event(), threading.Event()
    journal = Journal(folder, Failing(), OWNER)
    journal.open()
    armed.set()

    def flush() -> Exception | None:
        journal.append("number", {"at": 1})
        try:
            journal.flush()
        except OSError as error:
            return error
        return None

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(flush)
        reached.wait()
        others = [pool.submit(flush) for _ in range(2)]
        go_on.set()
        assert all(one.result().errno == errno.EIO for one in (first, *others))


# Failures


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("for_good", [False, True])
def test_a_disk_that_fails_at_any_call(folder: Path, code: int, for_good: bool) -> None:
    """Nothing reported is lost; after a failure every call says so; another process goes on."""

    def work(disk: Disk) -> list[int]:
        journal = Journal(folder, disk, OWNER)
        journal.open()
        reported: list[int] = []
        try:
            for number in range(6):
                journal.append("number", {"at": number}, bytes(number * 700))
                journal.flush()
                reported.append(number)
                if number == 3:
                    journal.compact(Journal.read(folder).records)
        except OSError as error:
            assert error.errno == code
            for call in (journal.flush, lambda: journal.append("number", {}), journal.flush):
                with pytest.raises(OSError) as again:
                    call()
                assert again.value.args == error.args
            with pytest.raises(OSError):
                journal.compact([])
        journal.close()
        return reported

    failed = set()
    for k in itertools.count(1):
        disk = FailingDisk(k, code, for_good=for_good)
        reported: list[int] = []
        try:
            reported = work(disk)
        except OSError as error:
            assert error.errno == code
        if not disk.failed:
            assert reported == list(range(6))
            break
        failed.add(disk.failed[0])
        journal = Journal(folder, Disk(), OWNER)
        found = [record.head["at"] for record in journal.open()]
        assert found[: len(reported)] == reported and len(found) - len(reported) in (0, 1)
        put(journal, 100)
        assert heads(folder) == [*found, 100]
        assert len(os.listdir(folder)) <= 2
        journal.close()
        shutil.rmtree(folder)
    assert failed == set(CALLS) - {"close", "rmdir"}


def test_an_interrupted_flush_ends_the_journal(folder: Path) -> None:
    class Interrupted(Disk):
        armed = False

        def fdatasync(self, descriptor: int) -> None:
            if self.armed:
                raise KeyboardInterrupt
            super().fdatasync(descriptor)

    disk = Interrupted()
    journal = opened(folder, disk)
    disk.armed = True
    journal.append("number", {"at": 1})
    with pytest.raises(KeyboardInterrupt):
        journal.flush()
    disk.armed = False
    for _ in range(2):
        with pytest.raises(WorkflowError, match="interrupted"):
            journal.flush()
    journal.close()


def test_what_was_appended_and_not_flushed_is_not_lost_without_a_word(folder: Path) -> None:
    disk = FailingDisk(0, 0)
    journal = opened(folder, disk)
    disk._k, disk._code = disk.calls + 1, errno.EIO
    journal.append("number", {"at": 1})
    with pytest.raises(OSError):
        journal.close()
    journal.close()


def test_a_forked_child_writes_nothing(folder: Path) -> None:
    journal = opened(folder)
    pid = os.fork()
    if pid == 0:
        try:
            journal.append("number", {"at": 1})
        except WorkflowError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    put(journal, 2)
    assert heads(folder) == [2]


# All of it, against a model


class Torn(Disk):
    """Dies in the middle of the next write, once it is told to."""

    share: float | None = None

    def write(self, descriptor: int, data: Any, offset: int) -> None:
        if self.share is not None:
            super().write(descriptor, data[: int(len(data) * self.share)], offset)
            raise Killed
        super().write(descriptor, data, offset)


RECORDS = st.tuples(
    st.text(max_size=8),
    st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=9), max_size=3),
    st.binary(max_size=600) | st.integers(0, 9000).map(bytes),
)


class Life(RuleBasedStateMachine):
    """Appends, flushes, compactions, ends of all kinds; a list is the model."""

    @initialize()
    def begin(self) -> None:
        self.scratch = scratch_folder("hopcoll-journal-")
        self.folder = self.scratch.__enter__() / "journal"
        self.written: list[Any] = []
        self.waiting: list[Any] = []
        self.last = 0
        self.reopen()

    def reopen(self) -> None:
        self.disk = Torn()
        self.journal = Journal(self.folder, self.disk, OWNER)
        found = self.journal.open()
        values = [(one.kind, one.head, one.body) for one in found]
        count = len(values) - len(self.written)
        assert values == self.written + self.waiting[:count]
        if found:
            assert found[-1].seq == self.last + count
        self.last += count
        self.written, self.waiting = values, []
        assert self.journal.durable == self.last

    @rule(record=RECORDS)
    def append(self, record: Any) -> None:
        assert self.journal.append(*record) == self.last + len(self.waiting) + 1
        self.waiting.append(record)

    @rule()
    def flush(self) -> None:
        self.journal.flush()
        self.settle()

    def settle(self) -> None:
        self.written += self.waiting
        self.last += len(self.waiting)
        self.waiting = []
        assert self.journal.durable == self.last

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        every = self.written + self.waiting
        kept = [one for one in every if data.draw(st.booleans())]
        self.journal.compact(kept)
        self.last += len(self.waiting) + len(kept)
        self.written, self.waiting = kept, []
        assert self.journal.durable == self.last

    @rule()
    def close(self) -> None:
        self.journal.close()
        self.settle()
        assert Journal.read(self.folder).closed
        self.reopen()

    @rule()
    def die(self) -> None:
        self.waiting = []
        self.reopen()

    @rule(share=st.floats(0, 1))
    def die_in_a_write(self, share: float) -> None:
        if self.waiting:
            self.disk.share = share
            with pytest.raises(Killed):
                self.journal.flush()
            self.reopen()

    @invariant()
    def readers_see_it(self) -> None:
        if hasattr(self, "journal"):
            records = Journal.read(self.folder).records
            assert [(one.kind, one.head, one.body) for one in records] == self.written

    def teardown(self) -> None:
        if hasattr(self, "scratch"):
            self.journal.close()
            self.scratch.__exit__(None, None, None)


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
