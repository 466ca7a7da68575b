"""Workflows that run, fail and go on, in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recovery
from hopcoll.errors import (
    CheckpointCorruptError,
    EffectUnknownError,
    TaskFailedError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowMismatchError,
    WorkflowNotFoundError,
    WorkflowRunningError,
)
from recovery.disk import Disk
from recovery.log import publish
from recovery.workflows import Done, NotDoneError, Workflow, loop
from tests import workflow_tasks as tasks
from tests.workflow_tasks import CALLS, DONE, SET, add, give, one, token

Run = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("fresh_tasks")


# The same name


def test_a_workflow_that_is_done_gives_what_is_stored(run: Run, store: Path) -> None:
    node = add.bind(one.bind(), one.bind(), 40)
    assert run(node) == 42
    assert run(add.bind(one.bind(), one.bind(), 40)) == 42
    assert CALLS == ["one", "one", "add"]
    workflow = Workflow("w", store)
    assert workflow.output() == workflow.resume() == 42
    status = workflow.status()
    assert (status.id, status.state, status.error, status.done) == ("w", "done", None, 3)
    assert Workflow.list(store) == [status]


def test_one_that_failed_goes_on(run: Run, store: Path) -> None:
    node = tasks.join.bind(one.options(checkpoint="sync").bind(), tasks.fails.bind(1))
    with pytest.raises(TaskFailedError, match="fails failed: ArithmeticError: call 1") as caught:
        run(node)
    assert caught.value.task == "fails" and isinstance(caught.value.__cause__, ArithmeticError)
    status = Workflow("w", store).status()
    assert status.state == "failed" and status.error is not None
    assert "TaskFailedError: fails failed: ArithmeticError: call 1" in status.error
    with pytest.raises(WorkflowError, match="workflow w is not done, but failed"):
        Workflow("w", store).output()
    assert run(node) == (1, "well")
    assert CALLS == ["one", "fails", "fails", "join"]
    assert SET["workflow"].ran == [("fails", "it failed"), ("join", "it has not run yet")]


def test_another_graph_of_the_same_name_is_refused(run: Run, store: Path) -> None:
    run(add.bind(1))
    with pytest.raises(WorkflowMismatchError, match="another graph or other arguments"):
        run(add.bind(2))
    assert Workflow("w", store).output() == 1
    Workflow("w", store).delete()
    assert run(add.bind(2)) == 2


def test_one_that_runs_is_refused(store: Path) -> None:
    workflow = Workflow("w", store)
    future = workflow.run_async(tasks.waits.bind())
    assert SET["begun"].wait(30)
    for call in ("resume", "delete"):
        with pytest.raises(WorkflowRunningError, match=r"w runs in process \d+ of .*since"):
            getattr(Workflow("w", store), call)()
    with pytest.raises(WorkflowError, match="workflow w runs in this process already"):
        workflow.run(tasks.waits.bind())
    assert Workflow("w", store).status().state == "running"
    assert workflow.resume_all(store) == {}
    SET["waits"].set()
    assert future.result(30) == "waited"
    workflow.close()
    with pytest.raises(WorkflowError, match="workflow w is closed"):
        workflow.run(tasks.waits.bind())
    with pytest.raises(WorkflowError, match="workflow w is closed"):
        workflow.run_async(tasks.waits.bind())


def test_run_async_tells_what_went_wrong(store: Path) -> None:
    with Workflow("w", store) as workflow:
        future = workflow.run_async(tasks.fails.bind(9))
        with pytest.raises(TaskFailedError):
            future.result(30)


def test_two_at_once_in_one_store(store: Path) -> None:
    with Workflow("a", store) as a, Workflow("b", store) as b:
        futures = [a.run_async(add.bind(1)), b.run_async(add.bind(2))]
        assert [future.result(30) for future in futures] == [1, 2]
    assert [status.id for status in Workflow.list(store)] == ["a", "b"]


def test_resume_all(run: Run, store: Path) -> None:
    for name, node in (("a", tasks.fails.bind(2)), ("b", tasks.fails.bind(9)), ("c", one.bind())):
        try:
            run(node, name)
        except TaskFailedError:
            CALLS.remove("fails") if name == "b" else None
    found = Workflow.resume_all(store)
    assert found["a"] == "well" or isinstance(found["a"], TaskFailedError)
    assert isinstance(found["b"], TaskFailedError) and set(found) == {"a", "b"}


# The store


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(WorkflowNotFoundError, match="holds no workflows"):
        Workflow.list(tmp_path / "nothing")
    with pytest.raises(WorkflowNotFoundError, match="holds no workflows"):
        Workflow("w", tmp_path / "nothing").resume()
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").touch()
    with pytest.raises(WorkflowMismatchError, match=r"holds something else \(notes.txt\)"):
        Workflow("w", tmp_path / "data").run(one.bind())
    (tmp_path / "file").touch()
    with pytest.raises(WorkflowError, match="cannot be used for workflows: .*Not a directory"):
        Workflow("w", tmp_path / "file" / "store").run(one.bind())
    with recovery.CheckpointStore(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"x": np.ones(3)}).wait()
    with pytest.raises(WorkflowMismatchError, match="holds something else|is a .*no store of work"):
        Workflow("w", tmp_path / "checkpoints").run(one.bind())
    assert CALLS == []


def test_a_newer_store_and_a_foreign_one(tmp_path: Path) -> None:
    for name, document in (
        ("newer", {"format": "hopcoll workflow store", "workflows": 2}),
        ("other", {"format": "something", "workflows": 1}),
    ):
        (tmp_path / name).mkdir()
        publish(Disk(), document, tmp_path / name / ".mark-x", tmp_path / name / "STORE.json")
    with pytest.raises(WorkflowMismatchError, match="of version 2, .*knows up to 1: install a new"):
        Workflow("w", tmp_path / "newer").run(one.bind())
    with pytest.raises(WorkflowMismatchError, match="is a something, and no store of workflows"):
        Workflow("w", tmp_path / "other").run(one.bind())


def test_what_is_in_the_way(run: Run, store: Path) -> None:
    run(one.bind(), "other")
    (store / "w").touch()
    with pytest.raises(WorkflowMismatchError, match="is no folder"):
        run(one.bind())
    with pytest.raises(WorkflowNotFoundError, match="has no workflow nobody"):
        Workflow("nobody", store).resume()
    for call in ("status", "output", "cancel", "unlock", "delete", "graph"):
        with pytest.raises(WorkflowNotFoundError):
            getattr(Workflow("nobody", store), call)()
    with pytest.raises(WorkflowNotFoundError):
        Workflow("nobody", store).send("key")


def test_wrong_settings(store: Path) -> None:
    for name in ("", "a/b", ".hidden", "x" * 101, 3):
        with pytest.raises(ValueError, match="id of a workflow must be 1 to 100 letters"):
            Workflow(name, store)  # type: ignore[arg-type]
    for workers in (0, True, 1.5):
        with pytest.raises(ValueError, match="workers must be 1 or more"):
            Workflow("w", store, workers=workers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patience_s must be 0 or more, not -1"):
        Workflow("w", store, patience_s=-1)
    assert not store.exists()


def test_a_damaged_journal_is_an_error(run: Run, store: Path) -> None:
    with pytest.raises(TaskFailedError):
        run(add.bind(one.bind(), tasks.fails.bind(9)))
    for segment in (store / "w" / "journal").glob("*.seg"):
        data = bytearray(segment.read_bytes())
        data[4200] ^= 1
        segment.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match="is corrupt at byte"):
        run(add.bind(one.bind(), tasks.fails.bind(9)))


def test_a_failed_open_does_not_lock_it(run: Run, store: Path, monkeypatch: Any) -> None:
    with pytest.raises(TaskFailedError):
        run(tasks.fails.bind(1))

    def refuse(self: Disk, path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "put", refuse)
        with pytest.raises(OSError, match="No space left"):
            run(tasks.fails.bind(1))
    assert run(tasks.fails.bind(1)) == "well"


# Failures


def test_retries_wait_twice_as_long_each_time(run: Run) -> None:
    node = tasks.fails.options(retries=3, backoff_s=0.01).bind(3)
    assert run(node) == "well"
    assert [reason for _, reason in SET["workflow"].ran] == [
        "it has not run yet", *(f"it failed (try {i})" for i in (2, 3, 4)),
    ]  # fmt: skip
    with pytest.raises(TaskFailedError, match="call 6"):
        run(tasks.fails.options(retries=1, backoff_s=0).bind(9), "other")


def test_a_call_that_takes_too_long(run: Run) -> None:
    assert run(tasks.slow.bind()) == "fast"
    with pytest.raises(TaskFailedError, match="did not return within 0.01 s"):
        run(tasks.waits.options(timeout_s=0.01).bind(), "other")
    assert run(tasks.fails.options(timeout_s=9, retries=1, backoff_s=0).bind(1), "third") == "well"


def test_exceptions_as_values(run: Run) -> None:
    caught = tasks.fails.options(catch_exceptions=True)
    value, error = run(caught.bind(9))
    assert value is None and isinstance(error, ArithmeticError) and str(error) == "call 1"
    again = run(caught.bind(9))
    assert again[0] is None and repr(again[1]) == repr(error) and CALLS == ["fails"]
    assert run(caught.bind(0), "other") == ("well", None)
    with pytest.raises(WorkflowError, match="catches_a_graph returned a graph, whose exceptions"):
        run(tasks.catches_a_graph.bind(), "third")


def test_a_long_message_does_not_hide_the_error(run: Run, store: Path) -> None:
    SET["put"] = "x" * 2_000_000
    with pytest.raises(TaskFailedError, match="put failed: ArithmeticError: no xxx"):
        run(tasks.put.bind(SET["put"]))
    assert len(Workflow("w", store).status().error or "") <= 4000


def test_what_cannot_be_stored(run: Run) -> None:
    with pytest.raises(WorkflowError, match="the value of unstorable cannot be stored: TypeError"):
        run(tasks.unstorable.options(checkpoint="sync").bind())
    kept = tasks.unstorable.options(checkpoint="none")
    assert run(give.bind([kept.bind().named("lock")][0:0]), "other") == []
    with pytest.raises(WorkflowError, match="returns_stop returned Stop, and is not the body of"):
        run(tasks.returns_stop.bind(), "third")


def test_code_that_changed_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tasks.join.bind(give.options(checkpoint="sync").bind(3), tasks.fails.bind(1))
    with pytest.raises(TaskFailedError):
        run(node)

    def changed(value: Any) -> Any:
        return value + 1

    monkeypatch.setattr(give.function, "__code__", changed.__code__)
    monkeypatch.delitem(give.__dict__, "code", raising=False)
    with pytest.warns(RuntimeWarning, match="the code of give has changed since it ran; what it"):
        assert run(node) == (3, "well")


def test_annotations_that_changed_are_noticed(run: Run) -> None:
    with pytest.raises(TaskFailedError):
        run(add.bind(one.bind(), tasks.fails.bind(1)))
    node = add.bind(one.options(checkpoint="sync").bind(), tasks.fails.options(retries=2).bind(1))
    CALLS.remove("fails")
    with (
        pytest.warns(RuntimeWarning, match="the annotations of one, fails have changed since it"),
        pytest.raises(TaskFailedError, match="fails failed: ArithmeticError: call 1"),
    ):
        run(node)


def test_a_deterministic_task_that_is_not(run: Run) -> None:
    lost = token.options(deterministic=True, checkpoint="none").bind()
    node = tasks.join.bind(give.options(checkpoint="sync").bind(lost), lost, tasks.fails.bind(1))
    with pytest.raises(TaskFailedError, match="fails failed"):
        run(node)
    with pytest.raises(TaskFailedError, match="token is annotated as deterministic, but gave ano"):
        run(node)


def test_what_is_asked_of_the_context(run: Run) -> None:
    assert run(tasks.context.bind(), "other") == ("other", "context", 1)
    lost = tasks.random_and_time.bind()
    node = tasks.join.bind(give.options(checkpoint="sync").bind(lost), lost, tasks.fails.bind(1))
    with pytest.raises(TaskFailedError):
        run(node)
    first, again, _ = run(node)
    assert first == again
    assert CALLS.count("random_and_time") == 2 and CALLS.count("asked") == 1
    assert run(tasks.random_and_time.options(checkpoint="sync").bind(), "third")[0] != first[0]


# What is undone


def test_a_failed_attempt_is_undone_before_the_next(run: Run) -> None:
    SET["put"] = "x"
    with pytest.raises(TaskFailedError):
        run(tasks.put.options(retries=1, backoff_s=0).bind("x"))
    assert CALLS == ["put x", "undo x", "put x", "undo x"] and DONE == []
    SET.pop("put")
    assert run(tasks.put.options(retries=1, backoff_s=0).bind("x")) == "x" and DONE == ["x"]


def test_what_was_made_from_a_lost_value_is_undone_newest_first(run: Run, store: Path) -> None:
    lost = token.options(checkpoint="none").bind()
    put = tasks.put.options(checkpoint="sync")
    a = put.bind("a", lost).named("a")
    b = put.bind("b", a).named("b")
    node = tasks.join.bind(b, lost, tasks.fails.bind(1).after(b))
    with pytest.raises(TaskFailedError):
        run(node)
    assert DONE == ["a", "b"]
    CALLS[:] = ["fails"]
    assert run(node)[0] == "b"
    CALLS.remove("fails")
    assert CALLS[:2] == ["undo b", "undo a"] and DONE == ["a", "b"]
    assert SET["workflow"].undone == ["b", "a"]
    void = "what it was made from has become another value"
    assert {("a", void), ("b", void)} <= set(SET["workflow"].ran)


def test_a_loop_whose_turns_were_undone_begins_with_the_first(run: Run) -> None:
    lost = token.options(checkpoint="none").bind()
    turns = loop(tasks.put.options(checkpoint="sync"), lost, 3, every=3)
    node = tasks.join.bind(turns, lost, tasks.fails.bind(1).after(turns))
    with pytest.raises(TaskFailedError):
        run(node)
    (before,) = set(DONE)
    last, now, _ = run(node)
    assert last == now != before and DONE == [now] * 3
    assert SET["workflow"].undone == ["put[2]", "put[1]", "put[0]"]


def test_a_rollback_that_fails(run: Run) -> None:
    SET.update(put="x", rollback=OSError("no"))
    with pytest.raises(TaskFailedError, match="the rollback of put failed: OSError: no; nothing"):
        run(tasks.put.bind("x"))
    with pytest.raises(TaskFailedError, match="the rollback of put failed"):
        run(tasks.put.bind("x"))
    SET.clear()
    assert run(tasks.put.bind("x")) == "x" and DONE == ["x"]


# Effects


def test_an_effect_that_raised_is_unknown_and_a_person_settles_it(run: Run, store: Path) -> None:
    SET["effect"] = ConnectionError("lost")
    node = add.bind(tasks.effect.bind(7), one.bind())
    with pytest.raises(EffectUnknownError, match="effect raised ConnectionError: lost, and") as e:
        run(node)
    assert e.value.task == "effect"
    assert f"hopcoll wf resolve {store / 'w'} effect --done (or --not-done)" in str(e.value)
    with pytest.raises(EffectUnknownError, match="effect was cut off and may have had its effect"):
        run(node)
    workflow = Workflow("w", store)
    for name in ("one", "nobody"):
        with pytest.raises(WorkflowError, match=f"{name} of workflow w has no effect of which"):
            workflow.resolve(name, done=True)
    workflow.resolve("effect", done=True, value=41)
    SET.clear()
    assert run(node) == 42 and DONE == ["effect"]
    with pytest.raises(WorkflowError, match="effect of workflow w has no effect"):
        workflow.resolve("effect", done=False)


def test_a_value_by_hand_where_exceptions_are_caught(run: Run, store: Path) -> None:
    effect = tasks.effect.options(catch_exceptions=True)
    SET["effect"] = ConnectionError("lost")
    with pytest.raises(EffectUnknownError):
        run(effect.bind(7))
    Workflow("w", store).resolve("effect", done=True, value=41)
    assert run(effect.bind(7)) == (41, None)


def test_one_that_was_not_done_is_done(run: Run, store: Path) -> None:
    SET["effect"] = ConnectionError("lost")
    with pytest.raises(EffectUnknownError):
        run(tasks.effect.bind(7))
    Workflow("w", store).resolve("effect", done=False)
    SET.clear()
    assert run(tasks.effect.bind(7)) == 7 and DONE == ["effect"] * 2


def test_a_large_value_by_hand(run: Run, store: Path) -> None:
    SET["effect"] = ConnectionError("lost")
    with pytest.raises(EffectUnknownError):
        run(tasks.total.bind(tasks.effect.bind()))
    Workflow("w", store).resolve("effect", done=True, value={"ones": np.ones(3_000_000)})
    assert run(tasks.total.bind(tasks.effect.bind())) == 3e6


def test_an_exception_that_says_that_nothing_was_done(run: Run) -> None:
    SET["effect"] = NotDoneError("refused")
    with pytest.raises(TaskFailedError, match="effect failed: .*NotDoneError: refused"):
        run(tasks.effect.bind(7))
    SET.clear()
    assert run(tasks.effect.bind(7)) == 7


def test_a_key_is_the_same_in_each_try(run: Run) -> None:
    key = run(tasks.keyed.bind())
    assert key.endswith("/keyed") and CALLS == ["keyed"] * 3
    assert run(tasks.keyed.options(idempotency_key="invoice 7").bind(), "other") == "invoice 7"
    assert run(tasks.keyed.bind(), "third") != key


def test_the_outside_is_asked(run: Run) -> None:
    SET.update(fails=1, answer=Done("it was"))
    assert run(tasks.asked.bind("x")) == "it was" and DONE == ["asked"]
    CALLS.clear()
    SET.update(fails=1, answer=False)
    assert run(tasks.asked.bind("x"), "second") == "x" and CALLS == ["asked", "ask", "asked"]
    CALLS.clear()
    SET.update(fails=1, answer=True)
    assert run(tasks.asked.bind("x"), "third") is None
    CALLS.clear()
    SET.update(fails=1, answer="maybe")
    with pytest.raises(WorkflowError, match="verify of asked must return True, False or Done"):
        run(tasks.asked.bind("x"), "fourth")
    CALLS.clear()
    SET.update(fails=1, answer=OSError("down"))
    with pytest.raises(EffectUnknownError, match="verify could not tell .*: down; resume when"):
        run(tasks.asked.bind("x"), "fifth")
    SET.update(fails=0, answer=False)
    assert run(tasks.asked.bind("x"), "fifth") == "x"


def test_an_effect_that_takes_too_long_may_be_done_later(run: Run, store: Path) -> None:
    with pytest.raises(EffectUnknownError, match="did not return within 0.05 s, and may have had"):
        run(tasks.slow_effect.bind())
    # It goes on in this very process: that it was not done so far says nothing.
    SET["answer"] = False
    node = tasks.slow_effect.options(verify=tasks.ask).bind()
    with pytest.raises(EffectUnknownError):
        run(node, "other")
    with pytest.raises(EffectUnknownError, match="was cut off"):
        run(node, "other")
    SET["waits"].set()
    assert Workflow("other", store).status().state == "failed"


def test_sub_workflows(run: Run, store: Path) -> None:
    assert run(tasks.runs_another.bind("one")) == 1
    assert [status.id for status in Workflow.list(store)] == ["w", "w.sub"]
    CALLS.clear()
    node = tasks.runs_another.options(retries=1, backoff_s=0).bind("failing")
    assert run(node, "second") == "well"  # the second attempt goes on with it
    assert CALLS == ["runs_another", "fails", "runs_another", "fails"]
    with pytest.raises(TaskFailedError, match="runs a workflow of its own, which may have effects"):
        run(tasks.runs_another_unannotated.bind(), "third")


# Control edges, cancelling, progress


def test_control_edges(run: Run) -> None:
    first = tasks.put.bind("first")
    node = tasks.join.bind(tasks.put.bind("second").after(first), tasks.put.bind("third")).after(
        first
    )
    assert run(node) == ("second", "third")
    assert CALLS.index("put first") < CALLS.index("put second")


def test_what_only_waits_does_not_need_the_value(run: Run) -> None:
    lost = token.options(checkpoint="none").bind()
    node = tasks.join.bind(tasks.fails.bind(1).after(lost), give.bind(1).after(lost))
    with pytest.raises(TaskFailedError):
        run(node)
    assert run(node) == ("well", 1) and CALLS.count("token") == 1


def test_a_workflow_is_cancelled_and_resumed(store: Path) -> None:
    workflow = Workflow("w", store)
    future = workflow.run_async(tasks.join.bind(tasks.stubborn.bind()))
    assert SET["begun"].wait(30)
    Workflow("w", store).cancel()
    with pytest.raises(WorkflowCancelledError, match="workflow w was cancelled"):
        future.result(30)
    workflow.close()
    assert Workflow("w", store).status().state == "cancelled"
    assert CALLS == ["stubborn"]
    assert Workflow("w", store).resume() == ("stopped",)
    assert CALLS == ["stubborn", "join"]


def test_progress_is_told(store: Path) -> None:
    told: list[tuple[str, str, int]] = []
    with Workflow("w", store, progress=lambda *what: told.append(what)) as workflow:
        workflow.run(add.bind(one.bind(), one.bind()))
    assert [name for name, _, _ in told][-1] == "add" and told[-1][2] == 0 and len(told) == 3
    with Workflow("v", store, progress=True) as workflow:
        assert workflow.run(add.bind(one.bind())) == 1


def test_delete_and_unlock(run: Run, store: Path) -> None:
    run(one.bind())
    Workflow("w", store).unlock()
    assert Workflow("w", store).output() == 1
    graph = Workflow("w", store).graph()
    assert graph.name == "one"
    Workflow("w", store).delete()
    assert Workflow.list(store) == [] and not (store / "w").exists()


def test_a_delete_that_was_cut_off_is_gone_on_with(
    run: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tasks.listens.bind(0))
    Workflow("w", store).send("word", "old")
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "rmdir", lambda self, path: (_ for _ in ()).throw(OSError(5, "I/O")))
        with pytest.raises(OSError, match="I/O"):
            Workflow("w", store).delete()
    assert Workflow.list(store) == []
    with pytest.raises(WorkflowNotFoundError):
        Workflow("w", store).status()
    SET["begun"].clear()
    with Workflow("w", store) as workflow:  # a new one of this name has none of the old events
        future = workflow.run_async(tasks.listens.bind(1))
        assert SET["begun"].wait(30)
        Workflow("w", store).send("word", "new")
        assert future.result(30) == ("new",)
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "rmdir", lambda self, path: (_ for _ in ()).throw(OSError(5, "I/O")))
        with pytest.raises(OSError, match="I/O"):
            Workflow("w", store).delete()
    Workflow("w", store).delete()
    assert not (store / "w").exists()


def test_loops_are_tasks_too(run: Run) -> None:
    assert run(loop(tasks.step, one.bind(), 4)) == 1 + 0 + 1 + 2 + 3


# Gangs without ranks


def test_gangs_want_ranks(run: Run, store: Path) -> None:
    gang = give.options(ranks=2)
    with pytest.raises(WorkflowError, match=r"give runs on ranks, and the workflow has none: give"):
        run(add.bind(one.bind(), gang.bind(1)))
    assert Workflow.list(store) == [] and CALLS == []
    with pytest.raises(WorkflowError, match=r"goes_on_to_a_gang/give runs on ranks"):
        run(tasks.goes_on_to_a_gang.bind())
