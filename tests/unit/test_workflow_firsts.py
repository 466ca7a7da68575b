"""Reductions in tasks: which inputs they took, and what is made again; attempts that are over."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import ObjectLostError, ReductionError
from hopcoll.objects import ObjectRef
from recovery.workflows.context import TaskContext
from recovery.workflows.gang import Gang, run_task
from recovery.workflows.graph import Task, task
from recovery.workflows.post import RankGoneError
from recovery.workflows.references import References, key_of
from recovery.workflows.stored import dump_call
from tests.crash import workflow_memory
from tests.crash.workflow_memory import Memory


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    monkeypatch.setattr(workflow_memory, "_LOSS", 0.0)
    return Memory(random.Random(1))


class Attempt(References):
    """With inputs that rank 1 has, and that are put again when they are lost."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.rebuilt: list[str] = []
        self.inputs = [ObjectRef() for _ in range(4)]
        self._put_inputs([key_of(ref) for ref in self.inputs])

        def rebuild(keys: list[str], era: int) -> int:
            self.rebuilt += keys
            self._put_inputs(keys)
            return era + 1

        super().__init__(memory, 0, "name", rebuild, memory.delete)  # type: ignore[arg-type]

    def _put_inputs(self, keys: list[str]) -> None:
        workflow_memory._HERE.rank = 1
        for number, ref in enumerate(self.inputs):
            if key_of(ref) in keys:
                self.inputs[number] = self.memory.put(np.full(4, float(number)), ref)
        workflow_memory._HERE.rank = 0

    def keys(self, *numbers: int) -> list[str]:
        return [key_of(self.inputs[number]) for number in numbers]


# Which inputs were taken


@pytest.mark.parametrize("inner_count", [1, None])
@pytest.mark.parametrize("outer_count", [1, None])
@pytest.mark.parametrize("got", [True, False])
def test_what_a_reduction_within_another_took_counts(
    memory: Memory, inner_count: int | None, outer_count: int | None, got: bool
) -> None:
    attempt = Attempt(memory)
    inner = attempt.reduce(attempt.inputs[:2], count=inner_count)
    middle = attempt.reduce([inner, attempt.inputs[2]])
    outer = attempt.reduce([attempt.inputs[3], middle], count=outer_count)
    value: Any = float(attempt.get(outer).sum()) if got else outer
    _, found = attempt.finish(value)
    taken = memory.things[outer].taken
    if got:
        assert found.new == (inner_count is not None or outer_count is not None)
    whole = [(attempt.keys(0, 1), 2 if inner_count is None else 1)]
    whole.append(([key_of(inner), *attempt.keys(2)], 2))
    whole.append(([*attempt.keys(3), key_of(middle)], 2 if outer_count is None else 1))
    seen = [(given, len(one)) for given, one in found.firsts]
    assert sorted(seen) == sorted(whole if middle in taken else whole[2:])


def test_what_a_reduction_took_that_is_lost_since_counts_and_is_not_made_again(
    memory: Memory,
) -> None:
    attempt = Attempt(memory)
    inner = attempt.reduce(attempt.inputs[:2], count=1)
    outer = attempt.reduce([inner, attempt.inputs[2]])
    total = float(attempt.get(outer).sum())
    memory.lose(0)
    memory.lose(1)
    _, found = attempt.finish(total)
    assert found.new and not attempt.rebuilt
    assert found.firsts == [([key_of(inner), *attempt.keys(2)],) * 2]


def test_an_input_that_is_a_reduction_can_be_asked_for(memory: Memory) -> None:
    attempt = Attempt(memory)
    outer = attempt.reduce([attempt.reduce(attempt.inputs[:2]), attempt.inputs[2]])
    (inner, _) = attempt.contributors(outer)
    assert attempt.get(inner).tolist() == [1.0] * 4
    assert attempt.contributors(inner) == tuple(attempt.inputs[:2])


@pytest.mark.parametrize("count", [2, None])
@pytest.mark.parametrize("lost", [False, True])
def test_who_was_told_the_contributors_is_another_next_time(
    memory: Memory, count: int | None, lost: bool
) -> None:
    attempt = Attempt(memory)
    reduction = attempt.reduce(attempt.inputs, count=count)
    taken = [key_of(one) for one in attempt.contributors(reduction)]
    if lost:
        memory.lose(0)
        memory.lose(1)
    _, found = attempt.finish(taken)
    assert found.new == (count is not None)
    assert found.firsts == [(attempt.keys(0, 1, 2, 3), taken)] and not attempt.rebuilt


# What is made again


@pytest.mark.parametrize("ask", [References.get, References.contributors])
def test_a_reduction_within_others_that_failed_for_a_loss_is_made_again(
    memory: Memory, ask: Any
) -> None:
    attempt = Attempt(memory)
    memory.lose(1)
    inner = attempt.reduce(attempt.inputs[:2])
    middle = attempt.reduce([inner, attempt.inputs[2]])
    outer = attempt.reduce([middle, attempt.inputs[3]])
    with pytest.raises(ObjectLostError):
        memory.get(outer)
    memory.put(np.full(4, 3.0), attempt.inputs[3])
    outer = attempt.reduce([middle, attempt.inputs[3]])
    with pytest.raises(ReductionError, match="cannot be made either"):
        memory.get(outer)
    ask(attempt, outer)
    assert attempt.get(outer).tolist() == [6.0] * 4
    assert set(attempt.rebuilt) == set(attempt.keys(0, 1, 2)) and attempt.void is None


def test_a_reduction_that_is_wrong_is_not_made_again(memory: Memory) -> None:
    attempt = Attempt(memory)
    inner = attempt.reduce(attempt.inputs[:2])
    outer = attempt.reduce([inner, attempt.inputs[2]])
    text = f"its input {inner!r} has a dtype that the operation is not for"
    memory.things[outer].error = ReductionError(text, outer, (inner,))
    for ask in (attempt.get, attempt.contributors):
        with pytest.raises(ReductionError, match="has a dtype"):
            ask(outer)
    assert len(memory.things) == len(attempt.inputs) + 2


# Attempts that are over


class Leaderless(Gang):
    """A rank, as an attempt has it that a leader has begun who is gone at times."""

    def __init__(self, memory: Memory, rank: int) -> None:
        self.memory = memory
        self.objects = memory  # type: ignore[assignment]
        self.rank = rank
        self.rebuild = lambda keys, era: None
        self.gone: set[int] = set()
        post: Any = SimpleNamespace(is_gone=self.gone.__contains__, ask=self._ask)
        self._post = post

    def _ask(self, rank: int, what: Any) -> Any:
        raise RankGoneError(f"rank {rank} is gone")

    def delete(self, ref: ObjectRef) -> None:
        self.memory.delete(ref)

    def begin(self, leader: int) -> References:
        return self.references(("w", "T", 1, "uuid", False, False, 0), True, leader)


def call(references: References, function: Any) -> Any:
    """Run a function as a deterministic task."""
    wrapped: Any = task(deterministic=True)(function)
    assert isinstance(wrapped, Task)
    context = TaskContext("w", "T", 1, "uuid", lambda number, ask: ask(), references=references)
    return run_task(wrapped, [], {}, context)


def test_an_attempt_of_a_dead_leader_leaves_alone_what_the_next_one_made(memory: Memory) -> None:
    ranks = [Leaderless(memory, rank) for rank in range(4)]
    made: list[ObjectRef] = []

    def fails(ctx: TaskContext) -> Any:
        ctx.put(np.zeros(3))
        unnamed = ctx.reduce([ctx.put(np.ones(3))])
        # Its leader dies, and the next one has the same done at rank 2.
        ranks[1].gone.add(0)
        made[:] = [*call(ranks[2].begin(3), lambda ctx: [ctx.put(np.zeros(3))])[0], unnamed]
        with pytest.raises(RankGoneError):
            ctx.put(np.ones(3))
        raise ArithmeticError("what it looked for is lost")

    with pytest.raises(ArithmeticError):
        call(ranks[1].begin(0), fails)
    assert memory.get(made[0]).tolist() == [0.0] * 3
    assert made[1] in memory.deleted


def test_an_attempt_whose_leader_is_there_deletes_what_nobody_was_given(memory: Memory) -> None:
    made: list[ObjectRef] = []

    def fails(ctx: TaskContext) -> Any:
        made.append(ctx.put(np.zeros(3)))
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        call(Leaderless(memory, 1).begin(0), fails)
    assert made[0] in memory.deleted


def test_two_attempts_that_put_under_the_same_name_both_get_there(memory: Memory) -> None:
    one, other = Leaderless(memory, 1).begin(0), Leaderless(memory, 2).begin(0)
    first = one.put(np.zeros(3))
    delete = memory.delete

    def slow(ref: ObjectRef, timeout_s: float | None = None) -> None:
        """While it is deleted, a third one puts it again."""
        delete(ref)
        memory.delete = delete  # type: ignore[method-assign]
        memory.put(np.zeros(3), ref)

    memory.delete = slow  # type: ignore[method-assign]
    assert other.put(np.zeros(3)) == first


def test_who_leads_and_lives_is_asked_again_where_a_letter_was_lost(memory: Memory) -> None:
    rank = Leaderless(memory, 1)
    answers: list[Any] = [RankGoneError("a letter is lost"), 7]

    def ask(leader: int, what: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    rank._post.ask = ask  # type: ignore[method-assign]
    assert rank._ask_leader(0, ["key"], 1) == 7


# Gangs


@task(ranks="all", deterministic=True)
def of_firsts(ctx: TaskContext) -> Any:
    return 7


class Talks:
    """Two ranks, of which this process is the first: the other says what it is told to."""

    rank, size, alive, partial_count = 0, 2, (0, 1), 0
    parent_ranks = (0, 1)

    def __init__(self, other: Any) -> None:
        self.other = other

    def Split(self, color: Any, key: int) -> Talks:
        return self

    def allgather(self, told: Any, timeout_s: float) -> list[Any]:
        assert len(told) == len(self.other)
        return [told, self.other]

    def bcast(self, what: Any, root: int) -> Any:
        return what

    def close(self) -> None:
        pass


@pytest.mark.parametrize("new", [False, True])
def test_what_another_rank_of_a_gang_took_counts(memory: Memory, new: bool) -> None:
    gang = Leaderless(memory, 0)
    comm: Any = Talks(("", False, False, new))
    gang._comm = comm
    context = TaskContext("w", "T", 1, "uuid", lambda number, ask: ask())
    order = ((0, 1), dump_call((of_firsts, [], {}), "a call"), context.bare(), 0, None)
    answer = gang._take_part(order, context)
    assert answer is not None
    (value, found), contributors, whole = answer
    assert value == 7 and contributors == (0, 1) and whole and found.new == new
