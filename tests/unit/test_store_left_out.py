"""Ranks that are left out of a save and live: what they do when they wake up harms nobody."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import CheckpointError, CheckpointFencedError, StaleEpochError
from recovery import CheckpointStore, Disk, Level, level, saving
from recovery.group import Group
from tests.fake_comm import FakeComm, World, run

SIZE = 2
WEIGHTS = np.arange(20_000.0)


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made) / "store"


def state_of(step: int) -> dict[str, Any]:
    """Two arrays, so that with ``writers="rank"`` each rank writes one."""
    return {"weights": WEIGHTS + step, "more": WEIGHTS - step, "step": step}


def check(path: Path, step: int) -> None:
    """The newest commit is that of the step, every file that counts is whole, and work goes on."""
    with CheckpointStore(path, readonly=True) as store:
        found = store.restore()
        assert not list(store.verify())
    assert found.step == found.state["step"] == step
    assert np.array_equal(found.state["weights"], WEIGHTS + step)
    assert np.array_equal(found.state["more"], WEIGHTS - step)
    with CheckpointStore(path) as store:
        store.save_sync(step + 7, state_of(step + 7))
        store.wait()
        assert not list(store.verify())
        assert store.steps() == [step, step + 7]


class SlowDisk(Disk):
    """Waits ahead of the link of a slot, once, until it is let go."""

    def __init__(self) -> None:
        self.armed = False
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def link(self, source: Path, target: Path) -> None:
        if self.armed and target.parent.name == "slots":
            self.armed = False
            self.reached.set()
            assert self.go_on.wait(60)
        super().link(source, target)


class FullDisk(Disk):
    """Has no room for so many new slots."""

    refused = 0

    def create(self, path: Path) -> int:
        if self.refused and path.parent.name == "tmp":
            self.refused -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().create(path)


def store(where: Any, comm: FakeComm, disk: Disk, **more: Any) -> CheckpointStore:
    return CheckpointStore(where, comm, disk=disk, writers="rank", timeout_s=30.0, **more)


def good(ended: list[Any]) -> list[Any]:
    for one in ended:
        if isinstance(one, BaseException):
            raise one
    return ended


def test_who_is_left_out_while_another_commits_removes_nothing(path: Path) -> None:
    world, disk = World(SIZE), SlowDisk()

    def program(comm: FakeComm) -> None:
        made = store(path, comm, disk if comm.rank == 0 else Disk())
        made.save_sync(1, state_of(1))
        disk.armed = True
        ticket = made.save(2, state_of(2))
        if comm.rank == 0:
            ticket.wait()
            made.close()
            return
        assert disk.reached.wait(60)
        world.await_waiting(1)  # or it might not know yet which files are new
        world.leave_out(1)
        with pytest.raises(StaleEpochError):
            ticket.wait()
        disk.go_on.set()

    good(run(SIZE, program, world))
    check(path, 2)


def left_out_committer(path: Path, refused: int) -> tuple[str, str]:
    """Rank 0 is stopped ahead of its link; rank 1 goes on alone, and its disk is full.

    Returns what became of step 2 for the one and for the other.
    """
    world, slow, full = World(SIZE), SlowDisk(), FullDisk()

    def program(comm: FakeComm) -> str:
        made = store(path, comm, slow if comm.rank == 0 else full)
        made.save_sync(1, state_of(1))
        made.wait()
        slow.armed = comm.rank == 0 or slow.armed
        if comm.rank == 0:
            ticket = made.save(2, state_of(2))
            with pytest.raises(StaleEpochError):
                ticket.wait()
            return "left out"
        ticket = made.save(2, state_of(2))
        assert slow.reached.wait(60)
        full.refused = refused
        world.leave_out(0)
        try:
            with pytest.raises(CheckpointError) as caught:
                ticket.wait()
            full.refused = 0
        finally:
            slow.go_on.set()
        return str(caught.value)

    ended = good(run(SIZE, program, world))
    return ended[0], ended[1]


def test_a_committer_that_was_left_out_finds_its_number_closed(path: Path) -> None:
    """The next one cannot commit either, and closes it: "not committed" stays true."""
    _, told = left_out_committer(path, refused=1)
    assert "No space left" in told
    assert "not known" not in told
    check(path, 1)


def test_where_the_number_cannot_be_closed_the_step_may_be_committed_and_is_whole(
    path: Path,
) -> None:
    _, told = left_out_committer(path, refused=2)
    assert "whether step 2 is committed is not known" in told
    assert "No space left" in told
    check(path, 2)


def test_a_save_is_given_up_or_committed(path: Path) -> None:
    directory = level.Level(path, Disk(), "00000001" + "0" * 16)
    directory.take()
    manifest: dict[str, Any] = {"tree": None, "arrays": [], "shards": {}}
    keep_all = level.retention(9, None)
    directory.commit(1, 1, None, manifest, keep_all)
    assert not directory.abort(1)
    assert directory.abort(2)
    with pytest.raises(CheckpointError, match="save 2 comes after save 2"):
        directory.commit(2, 2, None, manifest, keep_all)
    record = directory.commit(3, 3, 2, manifest, keep_all)
    assert [commit.step for commit in record.alive] == [1, 3]
    level.Level(path, Disk(), "00000002" + "0" * 16).take()
    with pytest.raises(CheckpointFencedError):
        directory.abort(4)


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("step", [5, 4, -1, "six"])
def test_a_wrong_step_of_one_rank_is_an_error_at_all(path: Path, step: Any, staged: bool) -> None:
    """At once: each rank has only as long as a call of the others may take."""

    def program(comm: FakeComm) -> list[int]:
        with store(path, comm, Disk()) as made:
            made.save_sync(5, state_of(5))
            save = made.save if staged else made.save_sync
            if comm.rank == 1:
                with pytest.raises((TypeError, ValueError), match="^step must be"):
                    save(step, state_of(6))
            elif staged:
                save(6, state_of(6))
            else:
                with pytest.raises(CheckpointError, match="rank 1: .*step must be"):
                    save(6, state_of(6))
            if staged:
                with pytest.raises(CheckpointError, match="rank 1: .*step must be"):
                    made.wait()
            made.save_sync(6, state_of(6))
            return made.steps()

    assert good(run(SIZE, program)) == [[5, 6]] * SIZE


def test_a_wrong_step_where_no_level_takes_every_step(path: Path) -> None:
    """The others were not in a save; or they are, and hear of it when the next one is due."""
    levels = [Level(path, every=3)]

    def program(comm: FakeComm) -> list[int]:
        with store(levels, comm, Disk()) as made:
            made.save(1, state_of(1)).wait()
            if comm.rank == 1:
                with pytest.raises(ValueError, match="^step must be higher than 1"):
                    made.save(1, state_of(2))
            else:
                assert made.save(2, state_of(2)).done
            made.save(3, state_of(3))
            made.save(4, state_of(4)).wait()
            return made.steps()

    assert good(run(SIZE, program)) == [[1, 4]] * SIZE


BROKEN = {
    "who lost the others removes files": (
        (Group, "broken", property(lambda self: False)),
        test_who_is_left_out_while_another_commits_removes_nothing,
    ),
    "numbers are not closed": (
        (level.Level, "abort", lambda self, save: True),
        test_a_committer_that_was_left_out_finds_its_number_closed,
    ),
    "nothing is uncertain": (
        (saving._Save, "_take_back", lambda self, told, committers: True),
        test_where_the_number_cannot_be_closed_the_step_may_be_committed_and_is_whole,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_tests_are_awake(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (where, attribute, broken), test = BROKEN[name]
    monkeypatch.setattr(where, attribute, broken)
    with pytest.raises((AssertionError, CheckpointError, pytest.fail.Exception)):
        test(path)
