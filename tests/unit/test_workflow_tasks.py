"""Tasks and graphs, before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import WorkflowError
from recovery.workflows import Node, Task, Workflow, event, loop, task
from recovery.workflows.checks import check_graph, describe
from recovery.workflows.graph import Graph
from recovery.workflows.stored import dump_call, dump_graph, load_call, load_graph
from tests import launch
from tests import workflow_tasks as tasks

add, give, one, step = tasks.add, tasks.give, tasks.one, tasks.step


def identity(value: Any, other: Any = None) -> Any:
    return value


def ids(node: Node) -> list[str]:
    return list(Graph.of(node).vertices)


# Annotations


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"colour": 1}, TypeError, "task has no option 'colour'; there are backoff_s, catch_exc"),
        ({"name": "a/b"}, ValueError, "name must be a text of 1 to 100 characters without / ~"),
        ({"name": ""}, ValueError, "name must be a text"),
        ({"name": "x" * 101}, ValueError, "name must be a text"),
        ({"checkpoint": "often"}, ValueError, "checkpoint of task must be one of sync, async"),
        ({"deterministic": "yes"}, TypeError, "deterministic of task must be True or False"),
        ({"external": 1}, TypeError, "external of task must be True or False, not 1"),
        ({"catch_exceptions": None}, TypeError, "catch_exceptions of task must be"),
        ({"rollback": "drop"}, TypeError, "rollback of task must be a function, not 'drop'"),
        ({"verify": 3, "external": True}, TypeError, "verify of task must be a function"),
        ({"ranks": 0}, ValueError, "ranks of task must be 'all' or at least 1, not 0"),
        ({"ranks": True}, ValueError, "ranks of task must be"),
        ({"ranks": "some"}, ValueError, "ranks of task must be"),
        ({"retries": -1}, ValueError, "retries of task must be 0 or more, not -1"),
        ({"retries": True}, ValueError, "retries of task must be"),
        ({"retries": 1.5}, ValueError, "retries of task must be"),
        ({"backoff_s": -1}, ValueError, "backoff_s of task must be 0 or more, not -1"),
        ({"backoff_s": "1"}, ValueError, "backoff_s of task must be"),
        ({"timeout_s": 0}, ValueError, "timeout_s of task must be more than 0, not 0"),
        ({"timeout_s": float("inf")}, ValueError, "timeout_s of task must be"),
        ({"idempotency_key": ""}, ValueError, "idempotency_key of task must be True or a text"),
        ({"idempotency_key": "k"}, ValueError, "idempotency_key is about an effect"),
        ({"verify": identity}, ValueError, "verify is about an effect, so external=True"),
        ({"external": True, "rollback": identity}, ValueError, "give one of them"),
        ({"external": True, "checkpoint": "none"}, ValueError, "'none' contradicts external=True"),
        ({"external": True, "checkpoint": "async"}, ValueError, "'async' contradicts"),
        ({"external": True, "ranks": 2}, ValueError, "ranks contradicts external=True"),
        ({"timeout_s": 1, "rollback": identity}, ValueError, "timeout_s contradicts rollback"),
    ],
)
def test_wrong_annotations(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        task(**options)(identity)


def test_an_error_names_the_task() -> None:
    with pytest.raises(ValueError, match="retries of task 'load' must be"):
        task(name="load", retries=-1)(identity)
    with pytest.raises(TypeError, match="task must be given a function, not 3"):
        task(3)  # type: ignore[arg-type]


def test_a_task_is_its_function() -> None:
    made = task(checkpoint="sync", retries=2)(identity)
    assert isinstance(made, Task) and made(3) == 3 and made.__name__ == made.name == "identity"
    assert made.annotations.checkpoint == "sync" and made.annotations.retries == 2
    other = made.options(retries=0, name="same")
    assert other.annotations.retries == 0 and other.annotations.checkpoint == "sync"
    assert other.name == "same" and repr(other) == "<task same>"
    with pytest.raises(TypeError):
        made.options(colour=1)


def test_arguments_are_checked_when_they_are_bound() -> None:
    with pytest.raises(TypeError, match="give: missing a required argument: 'value'"):
        give.bind()
    with pytest.raises(TypeError, match="give: got an unexpected keyword argument 'colour'"):
        give.bind(1, colour=2)
    with pytest.raises(TypeError, match="context: ctx is given by the workflow"):
        tasks.context.bind(ctx=1)
    assert tasks.context.bind().name == "context"
    assert task(max).bind(1, 2).name == "max"  # written in C, with no signature


def test_nodes() -> None:
    node = one.bind()
    assert repr(node.named("first")) == "<node first>"
    with pytest.raises(ValueError, match="name must be a text"):
        node.named("a~b")
    with pytest.raises(TypeError, match="after takes nodes, not 3"):
        node.after(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a workflow runs a node \(task.bind"):
        Graph.of(one)  # type: ignore[arg-type]


def test_loops_and_events_are_checked() -> None:
    with pytest.raises(TypeError, match="body of a loop must be a task"):
        loop(identity, 0, 3)  # type: ignore[arg-type]
    for times in (-1, True, 1.5):
        with pytest.raises(ValueError, match="times of a loop must be 0 or more"):
            loop(step, 0, times)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every of a loop must be 1 or more, not 0"):
        loop(step, 0, 3, every=0)
    with pytest.raises(ValueError, match="the body of a loop cannot have catch_exceptions"):
        loop(step.options(catch_exceptions=True), 0, 3)
    with pytest.raises(ValueError, match="key of an event must be a text, not ''"):
        event("")
    assert event("orders/17").name == "event:orders_17"
    assert event("x", name="other").name == "other"


# Identifiers


def test_identifiers_come_from_the_walk() -> None:
    a, b = give.bind(1), give.bind(2)
    node = add.bind(a, [b, {"k": (a,)}], tasks.join.bind(give.bind(b)))
    assert ids(node) == ["give", "give~2", "give~3", "join", "add"]
    assert ids(add.bind(b.named("two"), a)) == ["two", "give", "add"]
    graph = Graph.of(add.bind(a).after(b))
    assert graph.vertices["add"].inputs == ("give", "give~2")
    assert graph.vertices["add"].needs == ("give",)
    assert list(Graph.of(a, "t/~2/").vertices) == ["t/~2/give"]


def test_a_chain_may_be_longer_than_the_stack() -> None:
    node = give.bind(0)
    for _ in range(5000):
        node = add.bind(node, 1)
    graph = Graph.of(node)
    assert len(graph.vertices) == 5001
    assert len(ids(load_graph(dump_graph(graph)))) == 5001
    describe(graph)
    check_graph(graph)


def test_a_cycle_is_named() -> None:
    values: list[Any] = []
    inner = add.bind(values)
    values.append(give.bind(inner))
    with pytest.raises(WorkflowError, match="cycle: add waits for itself .*add <- give <- add"):
        Graph.of(inner)
    values[:] = [values]
    with pytest.raises(WorkflowError, match="nested too deeply, or contain themselves"):
        Graph.of(inner)


def test_nodes_where_nobody_looks_for_them(tmp_path: Path) -> None:
    for hidden in (SimpleNamespace(node=one.bind()), {one.bind()}, {one.bind(): 1}):
        with pytest.raises(WorkflowError, match="<node one> inside something that is no list"):
            Workflow("w", tmp_path / "store").run(give.bind(hidden))
    assert not (tmp_path / "store").exists()


def test_the_fingerprint_is_of_names_and_arguments() -> None:
    def of(node: Node) -> str:
        return describe(Graph.of(node))

    assert of(add.bind(1, one.bind())) == of(add.bind(1, one.bind()))
    assert of(add.options(retries=3).bind(1)) == of(add.bind(1))
    different = [
        add.bind(1), add.bind(2), add.bind(1.0), add.bind(one.bind()), give.bind(1),
        add.bind(one.bind(), 1), add.bind(1).after(one.bind()), event("a"), event("b"),
        loop(step, 0, 3), loop(step, 0, 4), loop(step, 1, 3), give.bind(np.ones(3)),
        give.bind(np.ones(3, "f4")), give.bind({"a": 1}), give.bind({"a": 1, "b": 2}),
        give.bind(one),
    ]  # fmt: skip
    assert len({of(node) for node in different}) == len(different)
    assert of(loop(step, 0, 3, every=2)) == of(loop(step, 0, 3))  # the price may change


# Stored


def test_what_cannot_be_found_again_is_refused(tmp_path: Path) -> None:
    def local() -> None:
        pass

    for function in (lambda: 1, local):
        with pytest.raises(WorkflowError, match="cannot be found by its name .* not a lambda or"):
            Workflow("w", tmp_path).run(task(function).bind())
    with pytest.raises(WorkflowError, match="effect cannot be stored, with its arguments"):
        Workflow("w", tmp_path).run(
            task(external=True, verify=lambda: 1, name="effect")(identity).bind(1)
        )
    with open(os.devnull) as file, pytest.raises(WorkflowError, match="cannot be hashed"):
        Workflow("w", tmp_path).run(give.bind(file))
    assert Workflow.list(tmp_path) == []


def test_a_name_that_means_something_else_now_is_refused() -> None:
    def other() -> None:
        pass

    other.__module__, other.__qualname__ = __name__, "identity"
    with pytest.raises(WorkflowError, match="is another function than the one that the task has"):
        dump_call((task(other), [], {}), "it")


def test_a_task_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dump_call((give.options(retries=2), [np.ones(2)], {"x": 1}), "it")
    call, arguments, keywords = load_call(data)
    assert call.function is give.function and call.annotations.retries == 2
    assert arguments[0].sum() == 2 and keywords == {"x": 1}
    monkeypatch.delattr(tasks, "give")
    with pytest.raises(WorkflowError, match="the task give of tests.workflow_tasks is not there"):
        load_call(data)


PROGRAM = """
import sys
from recovery.workflows import Workflow, task

@task
def double(x):
    if sys.argv[2:] == ["fail"]:
        raise ArithmeticError("not today")
    return 2 * x

def undo(x):
    pass

@task(rollback=undo)
def put(x):
    return x

if __name__ == "__main__":
    print(Workflow("w", sys.argv[1]).run(double.bind(put.bind(21))))
"""


def test_tasks_of_the_programs_own_file_are_found_by_others(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    words = [sys.executable, str(program), str(tmp_path / "store"), "fail"]
    ended = subprocess.run(words, env=launch.environment(), capture_output=True, text=True)
    assert "TaskFailedError: double failed: ArithmeticError: not today" in ended.stderr
    # Another program, which this one is not the main file of.
    assert Workflow("w", tmp_path / "store").resume() == 42
    typed = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "other")],
        env=launch.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert "was typed in, and is not there when the workflow is resumed" in typed.stderr


def test_more_inputs_than_a_record_has_room_for() -> None:
    named = add.options(name="x" * 100)
    many = [named.bind(0, i) for i in range(9_000)]
    with pytest.raises(WorkflowError, match="total has 9000 inputs: .* gather them by several"):
        check_graph(Graph.of(tasks.total.bind(many)))


# Effects that could never be released


def test_an_effect_that_could_never_be_released_is_named() -> None:
    loose = tasks.token.options(checkpoint="none")
    with pytest.raises(WorkflowError, match='token is made again.*annotate token with .*"async"'):
        check_graph(Graph.of(tasks.effect.bind(loose.bind())))
    check_graph(Graph.of(tasks.effect.bind(loose.options(deterministic=True).bind())))
    check_graph(Graph.of(tasks.effect.bind(loose.options(checkpoint="auto").bind())))
    # What was made from it is durable, and nobody else needs it.
    check_graph(Graph.of(tasks.effect.bind(give.options(checkpoint="sync").bind(loose.bind()))))
    # Who only waits for it does not need its value; but what comes after it would be void.
    with pytest.raises(WorkflowError, match="token is made again"):
        node = loose.bind()
        check_graph(Graph.of(add.bind(tasks.effect.bind().after(node), node)))
    # What can be rolled back is another one when it runs again.
    with pytest.raises(WorkflowError, match="put is made again"):
        loose = tasks.put.options(checkpoint="none", deterministic=True)
        check_graph(Graph.of(tasks.effect.bind(loose.bind("x"))))


def test_effects_may_wait_for_each_other_but_not_in_a_circle() -> None:
    loose = tasks.token.options(checkpoint="none").bind()
    kept = give.options(checkpoint="sync")
    first = tasks.effect.bind(kept.bind(loose))
    # Who uses the lost value runs after the effect: it may be needed again for ever.
    with pytest.raises(WorkflowError, match="token is made again"):
        check_graph(Graph.of(kept.bind((first, loose))))
    # Each has to wait for what comes after the other.
    a, b = (tasks.token.options(checkpoint="none", name=name).bind() for name in "ab")
    one_, two = tasks.effect.bind(kept.bind(a)), tasks.effect.bind(kept.bind(b))
    check_graph(Graph.of(add.bind(one_, kept.bind((two, 1)))))
    with pytest.raises(WorkflowError, match="effect has an effect that could never be released"):
        check_graph(Graph.of(add.bind(kept.bind((one_, b)), kept.bind((two, a)))))
