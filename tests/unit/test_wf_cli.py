"""`hopcoll wf`: what it prints, what it changes, and its exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hopcoll.cli import main
from hopcoll.errors import EffectUnknownError, TaskFailedError
from recovery.workflows import Workflow, event, loop
from recovery.workflows.cli import wf
from tests import workflow_tasks as tasks
from tests.workflow_tasks import CALLS, SET, add, give, one, token

pytestmark = pytest.mark.usefixtures("fresh_tasks")

Run = Callable[..., Any]


def call(*words: Any, code: int = 0, **how: Any) -> Result:
    result = CliRunner().invoke(wf, [str(word) for word in words], **how)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def failed(run: Run, store: Path) -> Path:
    """A workflow that failed, with a task of each fate."""
    lost = token.options(checkpoint="none").bind()
    put = tasks.put.options(checkpoint="sync").bind("x", lost)
    node = tasks.join.bind(
        put, lost, tasks.fails.bind(2).after(put), loop(tasks.step, 0, 3), tasks.count_down.bind(2)
    )
    for _ in range(2):
        with pytest.raises(TaskFailedError):
            run(node, workers=1)
    return store / "w"


@pytest.fixture
def unknown(run: Run, store: Path) -> Path:
    SET["effect"] = ConnectionError("lost")
    with pytest.raises(EffectUnknownError):
        run(add.bind(tasks.effect.bind(7), one.bind()))
    del SET["effect"]
    return store / "w"


def test_it_is_a_command_of_hopcoll() -> None:
    result = CliRunner().invoke(main, ["wf", "--help"])
    assert result.exit_code == 0
    for name in ("ls", "show", "graph", "resume", "cancel", "resolve", "unlock", "send", "delete"):
        assert f"\n  {name} " in result.output


def test_ls(run: Run, store: Path, failed: Path) -> None:
    run(one.bind(), "another")
    lines = call("ls", store).output.splitlines()
    assert lines[0].split() == ["id", "state", "tasks", "done", "by", "since"]
    assert lines[1].split()[:3] == ["another", "done", "1"]
    assert lines[2].startswith("w") and "TaskFailedError: fails failed: Arithm" in lines[2]
    assert call("ls", env={"HOPCOLL_STORE": str(store)}).output.splitlines() == lines
    rows = json.loads(call("ls", store, "--json").output)
    assert [(row["id"], row["state"]) for row in rows] == [("another", "done"), ("w", "failed")]
    assert rows[0]["owner"]["pid"] and rows[1]["error"]


def test_show(failed: Path, store: Path) -> None:
    text = call("show", failed).output
    assert text.startswith("w: failed, ") and "1 times resumed" in text
    assert "ArithmeticError: call 2" in text and "rolled back 1 times" in text
    assert "what it was made from has become another value" in text
    assert "went on" in text and "not kept" in text and "in the journal" in text
    assert call("show", "w", "--store", store).output == text
    assert call("show", "w", env={"HOPCOLL_STORE": str(store)}).output == text
    told = json.loads(call("show", failed, "--json").output)
    tasks_ = {row["task"]: row for row in told["tasks"]}
    assert told["state"] == "failed"
    assert tasks_["fails"]["state"] == "failed" and len(tasks_["fails"]["failures"]) == 2
    assert tasks_["put"]["runs"] == 2 and tasks_["put"]["rolled_back"] == 1
    assert tasks_["token"]["value"] == "not kept"
    CALLS[:] = ["fails"] * 2
    assert Workflow("w", store).resume()[2] == "well"
    assert "w: done" in call("show", failed, "--follow").output


def test_show_of_what_is_read_back(run: Run, store: Path) -> None:
    with pytest.raises(TaskFailedError):
        run(add.bind(give.options(checkpoint="sync").bind(1), tasks.fails.bind(1)), workers=1)
    with pytest.raises(TaskFailedError):  # "well" is no number
        run(None)
    assert "in the journal, read back" in call("show", store / "w").output


def test_graph(failed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("graph", failed, tmp_path / "g.dot").output == f"wrote {tmp_path / 'g.dot'}\n"
    text = (tmp_path / "g.dot").read_text()
    assert text.startswith('digraph "w" {') and text.endswith("}\n")
    assert '"token" -> "put";' in text and '"count_down" -> "count_down/count_down";' in text
    assert '"put" [fillcolor="#CC79A7", tooltip="rolled back"];' in text
    assert '"fails" [fillcolor="#D55E00", tooltip="failed"];' in text
    assert '"join" [fillcolor="#DDDDDD", tooltip="waiting"];' in text
    assert '"step[2]"' in text
    result = call("graph", failed, tmp_path / "g.png")
    assert result.output and (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    assert "cannot be drawn" in call("graph", failed, tmp_path / "g.xyz", code=1).output
    monkeypatch.setattr("recovery.workflows.picture._TASKS_MAX", 2)
    assert "too many for a picture" in call("graph", failed, tmp_path / "h.png", code=1).output


def test_graph_without_matplotlib(
    failed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call("graph", failed, tmp_path / "g.png", code=1)
    assert "pictures need matplotlib: pip install hopcoll[bench]" in result.output


def test_resume(failed: Path, store: Path) -> None:
    CALLS[:] = ["fails"]
    assert "fails failed: ArithmeticError: call 2" in call("resume", failed, code=1).output
    assert call("resume", failed).output.startswith("('x', ")
    assert call("resume", failed).output.startswith("('x', ")  # it is stored


def test_resume_all(run: Run, store: Path) -> None:
    for name in "ab":
        with pytest.raises(TaskFailedError):
            run(tasks.fails.bind(9), name)
    CALLS[:] = ["fails"] * 8
    result = call("resume", "--all", store, code=1)
    assert "a: fails failed: ArithmeticError: call 9" in result.output
    assert "b: done" in result.output
    CALLS[:] = ["fails"] * 9
    assert "a: done" in call("resume", "--all", store).output
    assert call("resume", "--all", store).output == ""


def test_cancel_and_send(store: Path) -> None:
    with Workflow("w", store) as workflow:
        future = workflow.run_async(tasks.join.bind(tasks.waits.bind(), event("word")))
        assert SET["begun"].wait(30)
        where = store / "w"
        assert call("send", where, "word", '{"x": [1]}', "--id", "1").output == "sent\n"
        assert call("send", where, "word", "2", "--id", "1").output == "was sent before\n"
        assert "PAYLOAD must be JSON" in call("send", where, "word", "{", code=2).output
        SET["waits"].set()
        assert future.result(30) == ("waited", {"x": [1]})
    with Workflow("v", store) as workflow:
        SET["begun"].clear()
        future = workflow.run_async(tasks.join.bind(tasks.stubborn.bind()))
        assert SET["begun"].wait(30)
        assert call("cancel", "v", "--store", store).output == ""
        assert "was cancelled" in str(future.exception(30))
    assert "cancelled" in call("ls", store).output


def test_resolve(unknown: Path, store: Path) -> None:
    assert "effect" in call("show", unknown).output
    assert "begun, end unknown" in call("show", unknown).output
    assert "say --done or --not-done" in call("resolve", unknown, "effect", code=2).output
    wrong = call("resolve", unknown, "effect", "--not-done", "--value", "1", code=2)
    assert "--value goes with --done" in wrong.output
    wrong = call("resolve", unknown, "effect", "--done", "--value", "{", code=2)
    assert "--value must be JSON" in wrong.output
    assert "one of workflow w has no" in call("resolve", unknown, "one", "--done", code=1).output
    call("resolve", unknown, "effect", "--done", "--value", "41")
    assert call("resume", unknown).output == "42\n"


def test_resolve_not_done(unknown: Path) -> None:
    call("resolve", unknown, "effect", "--not-done")
    assert call("resume", unknown).output == "8\n"


def test_unlock_and_delete(store: Path) -> None:
    where = store / "w"
    with Workflow("w", store) as workflow:
        future = workflow.run_async(tasks.join.bind(tasks.waits.bind()))
        assert SET["begun"].wait(30)
        assert "runs in process" in call("resume", where, code=1).output
        assert "runs in process" in call("delete", where, "--yes", code=1).output
        assert "Aborted!" in call("unlock", where, input="n\n", code=1).output
        call("unlock", where, "--yes")
        SET["waits"].set()
        assert "was taken over by another process" in str(future.exception(30))
    assert call("resume", where).output == "('waited',)\n"
    assert "Aborted!" in call("delete", where, input="n\n", code=1).output
    call("delete", where, "--yes")
    assert "has no workflow w" in call("show", where, code=2).output
    assert call("ls", store).output.splitlines()[1:] == []


@pytest.mark.parametrize(
    "words",
    [
        ("show",), ("graph", "x.dot"), ("resume",), ("cancel",), ("resolve", "t", "--done"),
        ("unlock", "--yes"), ("send", "key"), ("delete", "--yes"),
    ],
)  # fmt: skip
def test_what_is_not_there(run: Run, store: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    command, *rest = words
    run(one.bind(), "other")
    assert "has no workflow w" in call(command, store / "w", *rest, code=2).output
    assert "holds no workflows" in call(command, tmp_path / "x" / "w", *rest, code=2).output
    wrong = call(command, "w", *rest, code=2)
    assert "w is no folder of a workflow: give its path, or the store with" in wrong.output
    wrong = call(command, "a b", "--store", store, *rest, code=2)
    assert "id of a workflow must be 1 to 100 letters" in wrong.output


def test_ls_of_what_is_no_store(tmp_path: Path) -> None:
    assert "holds no workflows" in call("ls", tmp_path, code=2).output
    assert "Missing argument 'STORE'" in call("ls", code=2).output


def test_a_damaged_journal(failed: Path, store: Path) -> None:
    for segment in (failed / "journal").glob("*.seg"):
        data = bytearray(segment.read_bytes())
        data[4200] ^= 1
        segment.write_bytes(data)
    assert "is corrupt at byte" in call("show", failed, code=1).output
