"""The training session, at one rank whose companions are made up (real ones: tests/mpi)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import recovery
from hopcoll.errors import CheckpointError, CheckpointMismatchError, TooFewRanksError
from recovery import History, TrainingSession, live
from recovery import training as module
from recovery.history import Era
from recovery.metrics import Metrics

SEED = 7


class Companions:
    """Rank 1 of 4. The others have what this one has, and die when they are told to."""

    rank, size, epoch = 1, 4, 0

    def __init__(self) -> None:
        self.alive: tuple[int, ...] = (0, 1, 2, 3)

    def lose(self, *ranks: int) -> None:
        self.alive = tuple(rank for rank in self.alive if rank not in ranks)

    def allgather(self, answer: Any, on_failure: str) -> list[Any]:
        return [answer if rank == self.rank else None for rank in range(self.size)]

    def Barrier(self, on_failure: str) -> Any:
        assert on_failure == "survivors"
        return SimpleNamespace(contributors=self.alive)

    def Allreduce(self, send: Any, recv: Any, op: Any, **more: Any) -> Any:
        assert more.get("order", "rank") == "rank"
        np.copyto(recv, send)
        return self.Barrier(more["on_failure"])


@pytest.fixture
def comm() -> Companions:
    return Companions()


def train(
    session: TrainingSession, state: dict[str, Any], last: int, between: Callable[[int], Any] = id
) -> None:
    """A walk that depends on the random numbers, the data order and all steps before."""
    send, mean = np.empty((2, 1))
    for step in session.steps(last):
        mine = session.batch(10, 4)
        send[0] = session.rng.normal() + mine.sum() * state["w"][0] / 100
        between(step)
        session.Allreduce(send, mean)
        state["w"] += mean
        state["g"].normal()
        session.log(w=float(state["w"][0]))
        session.commit(step)


def fresh() -> dict[str, Any]:
    return {"w": np.zeros(1), "g": np.random.default_rng(3)}


class Killed(BaseException):
    pass


def killed_at(step: int) -> Callable[[int], None]:
    def kill(now: int) -> None:
        if now == step:
            raise Killed

    return kill


def logged(path: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["step"], line["w"]) for line in lines]


@pytest.fixture
def undisturbed(comm: Companions) -> dict[str, Any]:
    state = fresh()
    with TrainingSession(comm, state, seed=SEED) as session:
        train(session, state, 12)
    return state


@pytest.mark.parametrize("interval", [1, 3, 5, "auto"])
def test_resumed_is_bit_for_bit_the_same(
    tmp_path: Path, comm: Companions, undisturbed: dict[str, Any], interval: Any
) -> None:
    comm.lose(0)  # so that this one reports
    log = tmp_path / "log.jsonl"
    firsts = []
    for kill in (4, 5, 11, 0):
        state = fresh()
        with recovery.CheckpointStore(tmp_path / "store") as store:
            try:
                with TrainingSession(
                    comm, state, store, interval=interval, seed=SEED, log=log
                ) as session:
                    firsts.append(session.first)
                    train(session, state, 12, killed_at(kill))
            except Killed:
                store.wait()
    expected = fresh()
    with TrainingSession(comm, expected, seed=SEED) as session:
        train(session, expected, 12)
    assert state["w"].tobytes() == expected["w"].tobytes()
    assert state["g"].normal() == expected["g"].normal()
    assert [step for step, _ in logged(log)] == list(range(1, 13))
    assert logged(log)[-1][1] == state["w"][0]
    if interval == 1:
        assert firsts == [1, 4, 5, 11]
    if interval == 3:
        assert firsts == [1, 4, 4, 10]
    # Nothing is left to do, and nothing changes.
    with recovery.CheckpointStore(tmp_path / "store") as store:
        with TrainingSession(comm, fresh(), store, seed=SEED, log=log) as session:
            assert list(session.steps(12)) == []
        assert store.steps()[-1] == 12
    assert len(logged(log)) == 12


def broken_random(session: TrainingSession, *key: int) -> np.random.Generator:
    return np.random.default_rng(abs(hash((id(session), key))))


#: What goes wrong, and how a session is made to do it.
BROKEN: dict[str, tuple[Any, str, Any]] = {
    "the state is not put back": (live, "put_back", lambda node, saved: node),
    "the log is not cut": (Metrics, "_copy_durable", lambda self, file: os.write(
        file, self.path.read_bytes() if self.path.exists() else b"")),
    "the log is cut to nothing": (Metrics, "_copy_durable", lambda self, file: None),
    "random numbers are of the process": (TrainingSession, "_random", broken_random),
    "the next step is made twice": (History, "begin", lambda self, first, size, ranks: (
        self.eras.append(Era(first, size, ranks)), setattr(self, "last", max(first - 2, 0)))),
}  # fmt: skip


@pytest.mark.parametrize("broken", [None, *BROKEN])
def test_the_checks_of_a_resumed_job_are_awake(
    tmp_path: Path,
    comm: Companions,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    broken: str | None,
) -> None:
    if broken is not None:
        monkeypatch.setattr(*BROKEN[broken])
    comm.rank = 0
    log = tmp_path / "log.jsonl"
    for kill in (10, 0):
        state = fresh()
        with recovery.CheckpointStore(tmp_path / "store", keep_last=9) as store:
            try:
                with TrainingSession(comm, state, store, interval=2, seed=SEED, log=log) as session:
                    train(session, state, 12, killed_at(kill))
            except Killed:
                store.wait()
            except ValueError as error:
                assert broken == "the next step is made twice"
                assert "step must be higher than 8" in str(error)
    comm.rank = 0
    expected = fresh()
    with TrainingSession(comm, expected, seed=SEED) as session:
        train(session, expected, 12)
    right = (
        state["w"].tobytes() == expected["w"].tobytes()
        and [step for step, _ in logged(log)] == list(range(1, 13))
    )
    assert right is (broken is None)


def test_a_batch_is_cut_among_those_who_are_left(comm: Companions) -> None:
    seen: list[tuple[tuple[int, ...], list[int]]] = []
    with TrainingSession(comm, {}, seed=SEED) as session:
        for step in session.steps(6):
            ranks = session.contributors
            if step == 3:
                comm.lose(0)
            before = session.batch(10, 8).tolist()
            session.Allreduce(np.zeros(1), np.zeros(1))
            # The part of this step stays what it was; what rank 0 had is in nobody's gradient.
            assert session.batch(10, 8).tolist() == before
            seen.append((ranks, before))
            session.commit(step)
    everyone, survivors = (0, 1, 2, 3), (1, 2, 3)
    assert [ranks for ranks, _ in seen] == [everyone] * 3 + [survivors] * 3
    assert [len(mine) for _, mine in seen] == [2, 2, 2, 2, 2, 2]
    # Whoever lives, the batches are the same: parts of the parts of one order of the samples.
    orders = [
        np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=(1, epoch))).permutation(10)
        for epoch in range(5)
    ]
    places = np.concatenate(orders)
    for step, (ranks, mine) in enumerate(seen, 1):
        batch = places[(step - 1) * 8 : step * 8]
        place = ranks.index(1)
        expected = batch[place * 8 // len(ranks) : (place + 1) * 8 // len(ranks)]
        assert mine == expected.tolist()


@pytest.mark.parametrize("count", [0, 1, 3, 7, 64])
def test_shares_have_everything_once(comm: Companions, count: int) -> None:
    taken = []
    for rank in (1, 2, 3):
        comm.rank = rank
        comm.alive = (1, 2, 3)
        with TrainingSession(comm, {}) as session:
            taken += list(range(count))[session.share(count)]
    assert taken == list(range(count))


def test_the_random_numbers_are_of_the_step(comm: Companions) -> None:
    def draws() -> Iterator[tuple[float, float]]:
        with TrainingSession(comm, {}, seed=SEED) as session:
            for step in session.steps(4):
                yield session.rng.normal(), session.rng.normal()
                session.commit(step)

    first = list(draws())
    comm.rank = 2
    comm.lose(0)
    assert list(draws()) == first
    assert len({number for pair in first for number in pair}) == 8


def test_history_says_who_contributed(tmp_path: Path, comm: Companions) -> None:
    state = fresh()
    with recovery.CheckpointStore(tmp_path) as store, TrainingSession(comm, state, store) as one:
        train(one, state, 6, lambda step: comm.lose(3) if step == 2 else None)
    comm.alive = (0, 1, 2, 3)
    state = fresh()
    with recovery.CheckpointStore(tmp_path) as store, TrainingSession(comm, state, store) as one:
        train(one, state, 9, lambda step: comm.lose(0, 2) if step == 8 else None)
    history = History.read(tmp_path)
    assert history.last == 9
    assert [history.contributors(step) for step in (1, 2, 6, 7, 8)] == [
        (0, 1, 2, 3),
        (0, 1, 2),
        (0, 1, 2),
        (0, 1, 2, 3),
        (1, 3),
    ]


def test_too_few_ranks_stop_the_job(tmp_path: Path, comm: Companions) -> None:
    state = fresh()
    deaths = {5: 0, 7: 3}
    with recovery.CheckpointStore(tmp_path) as store:
        with pytest.raises(TooFewRanksError) as caught:
            with TrainingSession(comm, state, store, min_ranks=3, interval=1) as session:
                train(session, state, 20, lambda step: comm.lose(deaths.get(step, 9)))
        store.wait()
        assert store.durable_step == 6
    assert caught.value.ranks == (3,)
    assert str(caught.value).startswith(
        "2 of 4 ranks are left, and min_ranks is 3; lost: rank 0 in step 5; rank 3 in step 7."
    )
    with pytest.raises(TooFewRanksError, match="2 of 4 ranks"):
        TrainingSession(comm, fresh(), min_ranks=3)


def test_other_settings_are_refused(tmp_path: Path, comm: Companions) -> None:
    state = fresh()
    with TrainingSession(comm, state, store_at(tmp_path), settings={"rate": 0.5}) as session:
        train(session, state, 2)
    for more, message in [
        ({"settings": {"rate": 0.25}}, "setting 'rate' was 0.5, and is 0.25 now"),
        ({"settings": {"rate": 0.5, "depth": 1}}, "setting 'depth' was None, and is 1 now"),
        ({"settings": {"rate": 0.5}, "seed": 1}, "setting 'seed' was 0, and is 1 now"),
    ]:
        with store_at(tmp_path) as store, pytest.raises(CheckpointMismatchError, match=message):
            TrainingSession(comm, fresh(), store, **more)
    other = {"w": np.zeros(2), "g": np.random.default_rng(3)}
    with store_at(tmp_path) as store, pytest.raises(CheckpointMismatchError, match="state/w has"):
        TrainingSession(comm, other, store, settings={"rate": 0.5})


def store_at(path: Path) -> recovery.CheckpointStore:
    return recovery.CheckpointStore(path)


def test_the_launcher_hears_of_what_is_durable(
    tmp_path: Path, comm: Companions, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "progress"
    monkeypatch.setenv("HOPCOLL_PROGRESS_FILE", str(told))
    state = fresh()
    with store_at(tmp_path / "store") as store:
        with TrainingSession(comm, state, store) as session:
            train(session, state, 3)
        assert not told.exists()  # that is rank 0's to do
        comm.lose(0)
        with TrainingSession(comm, state, store, interval=2) as session:
            train(session, state, 7)
    number, facts = told.read_text().split("\n")
    assert number == "7" and json.loads(facts).items() >= {"ranks": 3, "began": 4}.items()


def test_the_interval_follows_what_was_measured(
    tmp_path: Path, comm: Companions, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []

    def choose(seen: Any, last: int) -> int:
        measured.append(seen)
        return 2 * last

    monkeypatch.setattr(module, "next_interval", choose)
    saved: list[int] = []
    state = fresh()
    with store_at(tmp_path) as store:
        store.on_durable(saved.append)
        with TrainingSession(comm, state, store) as session:
            train(session, state, 20)
    assert saved == [1, 3, 7, 15, 20]
    assert len(measured) == 4
    assert all(one.step_s > 0 and one.stall_s > 0 and one.failures == 0 for one in measured)
    assert math.isclose(measured[-1].running_s, sum_of_work(measured), rel_tol=0.5)
    comm.lose(3)
    state = fresh()
    with store_at(tmp_path) as store, pytest.raises(Killed):
        with TrainingSession(comm, state, store) as session:
            train(session, state, 40, killed_at(25))
    assert measured[-1].failures == 0  # the first job had come to its end
    with store_at(tmp_path) as store:
        with TrainingSession(comm, state, store) as session:
            train(session, state, 40)
    assert measured[-1].failures == 1
    assert measured[-1].running_s > measured[3].running_s


def sum_of_work(measured: list[Any]) -> float:
    steps = [1, 2, 4, 8]
    return sum(n * one.step_s + one.stall_s for n, one in zip(steps, measured, strict=True))


def test_a_save_that_failed_is_told_and_tried_again(tmp_path: Path, comm: Companions) -> None:
    class Full(recovery.Disk):
        full = False

        def write(self, descriptor: int, data: Any, offset: int) -> None:
            if self.full:
                raise OSError(28, "No space left on device")
            super().write(descriptor, data, offset)

    disk = Full()
    state = fresh()
    failures = []
    with recovery.CheckpointStore(tmp_path, disk=disk) as store:
        with TrainingSession(comm, state, store, interval=2) as session:
            for step in session.steps(9):
                disk.full = step == 4
                try:
                    session.commit(step)
                    store.wait()
                except CheckpointError as error:
                    failures.append((step, str(error)))
        assert store.steps()[-1] == 9
    assert [step for step, _ in failures] == [4]
    assert "No space left" in failures[0][1]


def test_a_log_that_cannot_be_written_is_an_error_at_the_start(
    tmp_path: Path, comm: Companions
) -> None:
    comm.lose(0)
    with pytest.raises(CheckpointError, match="cannot be written"):
        TrainingSession(comm, {}, log=tmp_path)


def test_a_second_loop_goes_on(comm: Companions) -> None:
    with TrainingSession(comm, {}) as session:
        made = []
        for last in (3, 5):
            for step in session.steps(last):
                session.commit(step)
                made.append(step)
    assert made == [1, 2, 3, 4, 5]


def test_leaving_the_loop_early_saves_what_was_committed(tmp_path: Path, comm: Companions) -> None:
    with store_at(tmp_path) as store:
        with TrainingSession(comm, {}, store, interval=100) as session:
            for step in session.steps(50):
                session.commit(step)
                if step == 7:
                    break
        assert store.durable_step == 7


def test_wrong_use(comm: Companions, tmp_path: Path) -> None:
    for arguments, error, message in [
        ({"state": []}, TypeError, "state must be a dict"),
        ({"min_ranks": 5}, ValueError, "min_ranks must be from 1 to 4, not 5"),
        ({"interval": "often"}, ValueError, "interval must be 'auto' or 1 or more"),
        ({"interval": 0}, ValueError, "interval must be 'auto' or 1 or more"),
        ({"replay": History(), "store": tmp_path}, ValueError, "store must be None"),
        ({"replay": History()}, ValueError, "history is empty"),
    ]:
        with pytest.raises(error, match=message):
            TrainingSession(comm, **{"state": {}, **arguments})
    with TrainingSession(comm, {}) as session:
        with pytest.raises(ValueError, match="step: none is under way"):
            session.Allreduce(np.zeros(1), np.zeros(1))
        with pytest.raises(ValueError, match="step: none is under way"):
            session.log(a=1)
        with pytest.raises(ValueError, match="samples and size"):
            session.batch(0, 1)
        steps = session.steps(3)
        assert next(steps) == 1
        with pytest.raises(ValueError, match="step 2 is not under way: the step is 1"):
            session.commit(2)
        with pytest.raises(ValueError, match="step 1 was not committed"):
            next(steps)
