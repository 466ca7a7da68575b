"""Tasks of the tests of workflows: functions of a module, as tasks have to be."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from recovery.workflows import Node, Stop, TaskContext, event, loop, task

#: What was called, in order.
CALLS: list[str] = []
#: What the tests tell the tasks.
SET: dict[str, Any] = {}


def called(name: str) -> int:
    """Note a call; returns how many there were."""
    CALLS.append(name)
    return CALLS.count(name)


@task
def one() -> int:
    called("one")
    return 1


@task
def add(*numbers: float) -> float:
    called("add")
    return sum(numbers)


@task
def give(value: Any) -> Any:
    called("give")
    return value


@task
def token() -> str:
    """Another value each time."""
    called("token")
    return os.urandom(8).hex()


@task
def join(*values: Any, ctx: TaskContext) -> Any:
    called(ctx.task_id)
    return values


@task
def fails(times: int) -> str:
    """Fails so many times."""
    if called("fails") <= times:
        raise ArithmeticError(f"call {CALLS.count('fails')}")
    return "well"


@task
def file_is_there(path: str) -> str:
    """Fails as long as there is no such file: across processes."""
    called("file_is_there")
    return Path(path).read_text()


@task
def waits() -> str:
    """Waits until the test says so."""
    called("waits")
    SET["begun"].set()
    SET["waits"].wait(30)
    return "waited"


@task
def stubborn(ctx: TaskContext) -> str:
    """Waits until the workflow is cancelled."""
    called("stubborn")
    SET["begun"].set()
    while not ctx.cancelled:
        threading.Event().wait(0.01)
    return "stopped"


@task
def array(count: int) -> Any:
    called("array")
    return {"ones": np.ones(count), "text": "x"}


@task
def total(value: Any) -> float:
    called("total")
    return float(value["ones"].sum())


@task
def changes_argument(value: Any) -> Any:
    value["ones"][0] = 7
    return value


@task
def unstorable() -> Any:
    called("unstorable")
    return threading.Lock()


@task
def context(ctx: TaskContext) -> Any:
    called("context")
    assert ctx.comm is None
    return ctx.workflow_id, ctx.task_id, ctx.attempt


@task(deterministic=True, checkpoint="none")
def random_and_time(ctx: TaskContext) -> Any:
    called("random_and_time")
    told = ctx.recall(lambda: called("asked"))
    return float(ctx.rng.random()), ctx.now(), told


# Continuations and loops


@task
def count_down(n: int, total: int = 0) -> Any:
    """Goes on to itself."""
    called("count_down")
    return count_down.bind(n - 1, total + n) if n else total


@task
def in_parts(depth: int) -> Any:
    """Goes on to two that go on."""
    called("in_parts")
    if depth == 0:
        return 1
    return add.bind(in_parts.bind(depth - 1), in_parts.bind(depth - 1))


@task
def listens(n: int, heard: tuple[Any, ...] = ()) -> Any:
    """Waits for an event, and goes on to itself."""
    called("listens")
    if "begun" in SET:
        SET["begun"].set()
    return hears.bind(n, heard, event("word")) if n else heard


@task
def hears(n: int, heard: tuple[Any, ...], word: Any) -> Any:
    return listens.bind(n - 1, (*heard, word))


@task
def step(state: float, i: int) -> float:
    called("step")
    return state + i


@task
def step_of_arrays(state: Any, i: int) -> Any:
    called("step_of_arrays")
    if SET.get("fails at") == i:
        raise ArithmeticError(f"at {i}")
    return state + 1


@task
def step_until(state: float, i: int) -> Any:
    called("step_until")
    return Stop(state) if state >= 10 else state + i


@task
def step_in_parts(state: float, i: int) -> Any:
    called("step_in_parts")
    return add.bind(state, i)


@task
def returns_stop() -> Any:
    return Stop(1)


@task(catch_exceptions=True)
def catches_a_graph() -> Any:
    return one.bind()


# Effects

DONE: list[str] = []


@task(external=True)
def effect(value: Any = None) -> Any:
    """Nobody can be asked about it."""
    called("effect")
    DONE.append("effect")
    if SET.get("effect"):
        raise SET["effect"]
    return value


@task(external=True, idempotency_key=True, retries=2, backoff_s=0.0)
def keyed(ctx: TaskContext) -> str:
    if called("keyed") < 3:
        raise ConnectionError("no answer")
    SET.setdefault("keys", []).append(ctx.idempotency_key)
    return ctx.idempotency_key


def ask(value: Any = None) -> Any:
    called("ask")
    answer = SET["answer"]
    if isinstance(answer, Exception):
        raise answer
    return answer


@task(external=True, verify=ask, retries=1, backoff_s=0.0)
def asked(value: Any = None) -> Any:
    DONE.append("asked")
    if called("asked") <= SET.get("fails", 0):
        raise SET.get("error", ConnectionError("no answer"))
    return value


def put_back(name: str, *values: Any, ctx: TaskContext) -> None:
    if SET.get("rollback"):
        raise SET["rollback"]
    called(f"undo {name}")
    if name in DONE:  # an attempt that was cut off may not have come so far
        DONE.remove(name)


@task(rollback=put_back)
def put(name: str, *values: Any) -> str:
    called(f"put {name}")
    DONE.append(name)
    if SET.get("put") == name:
        raise ArithmeticError(f"no {name}")
    return name


@task(external=True, timeout_s=0.05)
def slow_effect() -> None:
    called("slow_effect")
    SET["waits"].wait(30)
    DONE.append("slow_effect")


# More tries than one, as a busy machine may keep also a fast one from its end in time.
@task(timeout_s=0.3, retries=5, backoff_s=0.0)
def slow() -> str:
    if called("slow") == 1:
        SET["waits"].wait(30)
    return "fast"


@task(deterministic=True)
def dear() -> str:
    """Takes a second, by the clock of the test."""
    SET["now_s"] += 1.0
    return "dear"


@task(external=True, idempotency_key=True)
def runs_another(node_of: str, ctx: TaskContext) -> Any:
    """A sub-workflow."""
    called("runs_another")
    with ctx.workflow("sub") as workflow:
        return workflow.run(NODES[node_of]())


@task
def runs_another_unannotated(ctx: TaskContext) -> Any:
    return ctx.workflow("sub")


def _failing() -> Node:
    return fails.bind(1)


NODES = {"one": one.bind, "failing": _failing}


@task
def goes_on_to_a_gang() -> Any:
    return give.options(ranks="all").bind(1)


@task
def chain_of(n: int) -> Any:
    """A loop inside a continuation."""
    return loop(step, 0, n)

