"""Objects that were there before the workflow: passed on, never deleted, never made again."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import ObjectLostError, TaskFailedError
from recovery.workflows import TaskContext, Workflow, loop, task
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
