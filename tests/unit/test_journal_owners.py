"""The journal of a workflow: owners that are stopped anywhere and succeeded."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hopcoll.errors import (
    WorkflowFencedError,
)
from recovery import segments
from recovery.disk import Disk
from recovery.journal import Journal
from tests.journals import OWNER, heads, opened, put
from tests.store_faults import CALLS


class Hooked(Disk):
    """Calls `hook` before its k-th call, or after it."""

    def __init__(self, k: int, after: bool, hook: Callable[[], object]) -> None:
        self.calls = 0
        self.k, self.after, self.hook = k, after, hook

    def step(self, name: str, arguments: tuple[Any, ...]) -> Any:
        self.calls += 1
        here = self.calls == self.k
        if here and not self.after:
            self.hook()
        result = getattr(Disk, name)(self, *arguments)
        if here and self.after:
            self.hook()
        return result


for _name in CALLS:
    setattr(Hooked, _name, lambda self, *arguments, _name=_name: self.step(_name, arguments))


def test_an_older_start_of_the_same_batch_job_does_not_take_it_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = Journal(folder, Disk(), {**OWNER, "slurm_job": "123", "slurm_restarts": 2})
    newer.open()
    put(newer, 1)
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for _ in range(2):
        with pytest.raises(WorkflowFencedError, match=r"start 2 of job 123.* of start 1"):
            opened(folder)
        put(newer, 2)  # it was not fenced
    newer.close()
    with pytest.raises(WorkflowFencedError, match=r"start 2 of job 123"):
        opened(folder)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    opened(folder).close()
    assert heads(folder) == [1, 2, 2]


class World:
    """Processes that stop at some call, while another takes over and works, and go on then.

    Tags are given in the order in which they are appended; whoever compacts keeps all it knows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = 0
        self.reported: set[int] = set()

    def work(self, disk: Disk) -> bool:
        """Take over, flush, compact, flush; return whether it was fenced."""
        journal = Journal(self.folder, disk, OWNER)
        before = set(self.reported)
        try:
            known = [record.head["at"] for record in journal.open()]
            assert before <= set(known), "a take-over has lost what was reported"
            for count in (1, 2, 0, 1):
                for _ in range(count):
                    self.tag += 1
                    known.append(self.tag)
                    journal.append("number", {"at": self.tag})
                if count:
                    journal.flush()
                else:
                    journal.compact([("number", {"at": tag}, b"") for tag in known])
                self.reported |= set(known)
        except WorkflowFencedError:
            for call in (journal.flush, lambda: journal.append("number", {})):
                with pytest.raises((WorkflowFencedError, ValueError)):
                    call()
            return True
        finally:
            journal.close()
        return False

    def check(self) -> None:
        found = heads(self.folder)
        assert len(set(found)) == len(found)
        assert self.reported <= set(found), "what was reported does not count"


def explore(folder: Path, depth: int, step: int = 1) -> int:
    """Stop a process at each of its calls; a second works meanwhile, which with a depth of 2 is
    itself stopped at each `step`-th of its calls while a third works. Return how many worlds."""
    worlds = 0
    for k, after in ((k, after) for k in itertools.count(1) for after in (False, True)):
        for j, later in ((j, later) for j in itertools.count(1, step) for later in (False, True)):
            world = World(folder)
            inner = Hooked(j if depth == 2 else 0, later, partial(check_free, world, Disk()))
            outer = Hooked(k, after, partial(world.work, inner))
            fenced = world.work(outer)
            world.check()
            worlds += 1
            shutil.rmtree(folder)
            if outer.calls < k:
                assert not fenced
                return worlds
            if inner.calls < j or depth == 1:
                break
    raise AssertionError


def check_free(world: World, disk: Disk) -> None:
    assert not world.work(disk)


def test_an_owner_is_stopped_at_each_call_and_succeeded(folder: Path) -> None:
    assert explore(folder, depth=1) > 40


def test_a_successor_is_stopped_as_well_and_succeeded(folder: Path) -> None:
    assert explore(folder, depth=2, step=3) > 300


def test_no_look_after_the_fsync_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "_write", lambda self, own, entries: own.put(entries))
    with pytest.raises(AssertionError, match="what was reported does not count"):
        explore(folder, depth=1)


def test_a_look_before_the_fsync_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(self: Journal, own: Any, entries: Any) -> None:
        self._look(own)
        own.put(entries)

    monkeypatch.setattr(Journal, "_write", hasty)
    with pytest.raises(AssertionError, match="what was reported does not count"):
        explore(folder, depth=1)


def explore_take_over(folder: Path) -> int:
    """An owner flushes or compacts while its successor stands at some call of its take-over, and
    again when that has opened. Return how often the owner was told that it is durable."""
    told = 0
    for k in itertools.count(1):
        for after, compacts in itertools.product((False, True), repeat=2):
            owner = opened(folder)
            put(owner, 1, 2)
            reported = [1, 2]

            def work(number: int, owner: Journal, reported: list[int], compacts: bool) -> None:
                try:
                    if compacts:
                        kept = [("number", {"at": one}, b"") for one in (*reported, number)]
                        owner.compact(kept)
                    else:
                        put(owner, number)
                    reported.append(number)
                except WorkflowFencedError:
                    pass

            disk = Hooked(k, after, partial(work, 3, owner, reported, compacts))
            successor = Journal(folder, disk, OWNER)
            try:
                found = [record.head["at"] for record in successor.open()]
            except WorkflowFencedError:
                pass  # the owner compacted between its look for a number and its link
            else:
                work(4, owner, reported, compacts)
                assert found[: len(reported)] == reported, "a take-over has lost what was reported"
                assert heads(folder) == found
            told += len(reported) - 2
            successor.close()
            owner.close()
            assert set(reported) <= set(heads(folder))
            shutil.rmtree(folder)
            if disk.calls < k:
                return told
    raise AssertionError


def test_an_owner_goes_on_while_it_is_succeeded(folder: Path) -> None:
    assert explore_take_over(folder) > 10


def test_a_successor_that_reads_before_it_has_its_number_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, load = Journal._take, segments.load
    chains: list[segments.Chain] = []

    def early(self: Journal, number: int) -> Any:
        chains.append(load(self.folder))
        return take(self, number)

    def loaded(folder: Path, below: int | None = None) -> segments.Chain:
        return chains[-1] if below else load(folder)

    monkeypatch.setattr(Journal, "_take", early)
    monkeypatch.setattr(segments, "load", loaded)
    with pytest.raises(AssertionError, match="a take-over has lost what was reported"):
        explore_take_over(folder)


def test_a_reader_beside_a_busy_owner(folder: Path) -> None:
    """Who reads sees all that was reported before it began, through compactions as well."""
    journal = opened(folder)
    reported = [0]
    ended = threading.Event()

    def work() -> None:
        try:
            for number in range(1, 1200):
                put(journal, number)
                reported.append(number)
                if number % 100 == 0:
                    journal.compact([("number", {"at": one}, b"") for one in reported[1:]])
        finally:
            ended.set()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        looks = 0
        while not ended.is_set():
            before = reported[-1]
            found = heads(folder)
            assert found == list(range(1, len(found) + 1)) and len(found) >= before
            looks += 1
        done.result()
    assert looks > 3


def test_a_zombie_whose_segment_is_gone_is_fenced(folder: Path) -> None:
    first, second = opened(folder), opened(folder)
    put(second, 1)
    second.compact([])
    second.compact([])
    with pytest.raises(WorkflowFencedError, match=r"0000000004\.seg.*resume the workflow"):
        put(first, 2)
    with pytest.raises(WorkflowFencedError):
        first.compact([])
    first.close()
    put(second, 3)
    assert heads(folder) == [3]


def test_the_folder_is_removed_or_made_anew(folder: Path) -> None:
    first = opened(folder)
    shutil.rmtree(folder)
    with pytest.raises(WorkflowFencedError, match="was removed"):
        put(first, 1)
    second = opened(folder)
    shutil.rmtree(folder)
    third = opened(folder)
    with pytest.raises(WorkflowFencedError, match="was removed"):
        put(second, 2)
    put(third, 3)
    assert heads(folder) == [3]


def test_a_temporary_that_a_successor_removes(folder: Path) -> None:
    """It is taken for one of the dead; its process makes another one."""

    class Late(Disk):
        def link(self, source: Path, target: Path) -> None:
            if target.name == "0000000001.seg":
                opened(folder).close()
                assert not source.exists()
            super().link(source, target)

    put(opened(folder, Late()), 1)
    assert os.listdir(folder) == ["0000000002.seg"]
    assert heads(folder) == [1]


def test_a_failed_write_of_a_fenced_owner_says_that_it_is_fenced(folder: Path) -> None:
    class Stale(Disk):
        def write(self, descriptor: int, data: Any, offset: int) -> None:
            if offset:
                raise OSError(errno.ESTALE, "stale")
            super().write(descriptor, data, offset)

    first = Journal(folder, Stale(), OWNER)
    with pytest.raises(OSError, match="stale"):
        first.open()
    journal = opened(folder)
    journal._own._disk = Stale()
    opened(folder)
    with pytest.raises(WorkflowFencedError) as caught:
        put(journal, 1)
    assert isinstance(caught.value.__cause__, OSError)
