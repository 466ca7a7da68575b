"""Objects that were there before the workflow: passed on, never deleted, never made again. And
those that come out of files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import ObjectLostError, TaskFailedError
from recovery.workflows import TaskContext, Workflow, loop, task
from recovery.workflows.lineage import Lineage
from tests.crash import workflow_memory
from tests.crash.workflow_memory import Memory, OneRank


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    monkeypatch.setattr(workflow_memory, "_LOSS", 0.0)
    return Memory(random.Random(1))


def workflow_over(memory: Memory, store: Path, name: str) -> Workflow:
    workflow = Workflow(name, store)
    workflow._gang = OneRank(workflow, memory)
    workflow._gang._unsent = []
    return workflow


@task
def put(ctx: TaskContext) -> Any:
    return ctx.put(np.full(4, 7.0))


@task
def pair(ref: Any, ctx: TaskContext) -> Any:
    return ref, ctx.put(np.ones(3))


@task
def total(refs: Any, ctx: TaskContext) -> float:
    return float(sum(ctx.get(ref).sum() for ref in refs))


@task
def goes_on(*refs: Any) -> Any:
    return total.bind(refs)


@task(checkpoint="sync")
def stores(ref: Any) -> Any:
    return [ref]


def before(memory: Memory, store: Path) -> Any:
    """An object of the program: the output of another workflow."""
    with workflow_over(memory, store, "before") as workflow:
        return workflow.run(put.bind())


def test_they_stay_when_the_workflow_ends(memory: Memory, tmp_path: Path) -> None:
    ref = before(memory, tmp_path)
    with workflow_over(memory, tmp_path, "w") as workflow:
        assert workflow.run(total.bind(pair.bind(ref))) == 31.0
    assert memory.get(ref).sum() == 28.0
    assert list(memory.things) == [ref]


@task
def turn(refs: Any, i: int, ctx: TaskContext) -> Any:
    return [*refs, ctx.put(np.ones(1))]


def test_they_go_through_a_loop(memory: Memory, tmp_path: Path) -> None:
    ref = before(memory, tmp_path)
    with workflow_over(memory, tmp_path, "w") as workflow:
        assert workflow.run(total.bind(loop(turn, [ref], 3))) == 31.0
    assert list(memory.things) == [ref]


def test_where_they_are_lost_whoever_needs_them_fails(memory: Memory, tmp_path: Path) -> None:
    """And does so again in a job that goes on, though a graph has the ref."""
    ref = before(memory, tmp_path)
    memory.lose(0)
    with workflow_over(memory, tmp_path, "w") as workflow:
        with pytest.raises(TaskFailedError, match="goes_on/total failed: .*is lost") as caught:
            workflow.run(goes_on.bind(ref, put.bind()))
        assert isinstance(caught.value.__cause__, ObjectLostError)
    with workflow_over(memory, tmp_path, "w") as workflow:
        with pytest.raises(TaskFailedError, match="goes_on/total failed: .*is lost"):
            workflow.resume()


def test_where_a_value_was_stored_with_them_they_come_from_its_file(
    memory: Memory, tmp_path: Path
) -> None:
    ref = before(memory, tmp_path)
    stored = stores.bind(ref)
    loses = task(_loses).bind(stored, 0)
    _LOSE.append(lambda: memory.lose(0))
    with workflow_over(memory, tmp_path, "w") as workflow:
        assert workflow.run(total.bind(loses)) == 28.0
    assert not _LOSE


_LOSE: list[Any] = []


def _loses(refs: Any, number: int) -> Any:
    while _LOSE:
        _LOSE.pop()()
    return refs


@task(checkpoint="async")
def carries(*refs: Any) -> Any:
    _loses(None, 0)
    return refs


def lose_before_the_first_write(
    monkeypatch: pytest.MonkeyPatch, memory: Memory, rank: int
) -> list[Any]:
    """Its rank dies before the first value is written; returns what is called with each."""
    written: list[Any] = []
    with_objects = Lineage.with_objects

    def write(self: Lineage, packed: Any) -> Any:
        if not written:
            memory.lose(rank)
        written.append(packed)
        return with_objects(self, packed)

    monkeypatch.setattr(Lineage, "with_objects", write)
    return written


def test_a_value_that_cannot_be_written_for_them_ends_the_workflow(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = before(memory, tmp_path)
    written = lose_before_the_first_write(monkeypatch, memory, 0)
    with workflow_over(memory, tmp_path, "w") as workflow:
        with pytest.raises(TaskFailedError, match=r"carries returned a ref .*nobody can make"):
            workflow.run(carries.bind(ref))
    assert len(written) == 1


@task(checkpoint="sync")
def stored(ctx: TaskContext) -> Any:
    return [ctx.put(np.full(4, 7.0))]


@task(deterministic=True, checkpoint="none", on=1)
def doubled(refs: Any, ctx: TaskContext) -> Any:
    return [ctx.put(2 * ctx.get(refs[0]))]


@task(checkpoint="none")
def first(refs: Any, ctx: TaskContext) -> float:
    _loses(None, 0)
    return float(ctx.get(refs[0])[0])


_MEMORY: list[Memory] = []
_SEEN: list[int] = []


@task
def last(value: float) -> float:
    _SEEN.append(len(_MEMORY[0].things))
    return value


def stop() -> None:
    raise ArithmeticError("the job ends")


def test_what_was_read_back_is_deleted_when_it_was_used(memory: Memory, tmp_path: Path) -> None:
    node = last.bind(first.bind(stored.bind()))
    _LOSE.append(stop)
    with workflow_over(memory, tmp_path, "w") as workflow:
        with pytest.raises(TaskFailedError, match="the job ends"):
            workflow.run(node)
    _MEMORY[:] = [Memory(random.Random(2))]
    _SEEN.clear()
    with workflow_over(_MEMORY[0], tmp_path, "w") as workflow:
        assert workflow.run(node) == 7.0
    assert _SEEN == [0]


def test_what_was_read_back_beside_others_is_deleted_at_the_end(
    memory: Memory, tmp_path: Path
) -> None:
    """It was deleted before, when all had used it, and is read for one who runs again."""
    _LOSE.append(lambda: memory.lose(1))
    with workflow_over(memory, tmp_path, "w") as workflow:
        value = workflow.run(first.bind(doubled.bind(stored.bind())))
    assert value == 14.0 and not memory.things


def test_a_value_with_what_was_read_back_is_written_when_the_rest_is_there_again(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = stored.bind()
    node = carries.bind(refs, doubled.bind(refs))
    _LOSE.append(stop)
    with workflow_over(memory, tmp_path, "w") as workflow:
        with pytest.raises(TaskFailedError, match="the job ends"):
            workflow.run(node)
    memory = Memory(random.Random(2))
    written = lose_before_the_first_write(monkeypatch, memory, 1)
    with workflow_over(memory, tmp_path, "w") as workflow:
        ((one,), (two,)) = workflow.run(node)
        assert memory.get(one)[0] == 7.0 and memory.get(two)[0] == 14.0
    assert len(written) >= 2
