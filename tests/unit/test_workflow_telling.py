"""What a workflow tells the launcher of how far it came."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hopcoll.errors import TaskFailedError
from hopcoll.restarts import PROGRESS_VARIABLE, read_facts, read_progress
from recovery.workflows import telling
from tests import workflow_tasks as tasks

Run = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("fresh_tasks")


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "told"))
    return tmp_path / "told"


def test_it_tells_what_is_durable_and_only_grows(run: Run, told: Path) -> None:
    node = tasks.join.bind(tasks.one.options(checkpoint="sync").bind(), tasks.fails.bind(1))
    with pytest.raises(TaskFailedError):
        run(node)
    first = read_progress(told)
    assert first is not None and first > 0
    facts = read_facts(told)
    assert (facts["ranks"], facts["began"], facts["restart"]) == (1, 1, 0)
    assert facts["time"] > 0
    run(node)
    assert (read_progress(told) or 0) > first


def test_a_start_that_gets_nowhere_tells_nothing(run: Run, told: Path) -> None:
    """Though its journal has grown: it was taken over, and something was tried."""
    node = tasks.join.bind(tasks.one.options(checkpoint="sync").bind(), tasks.fails.bind(9))
    with pytest.raises(TaskFailedError):
        run(node)
    told.unlink()
    for _ in range(2):
        with pytest.raises(TaskFailedError):
            run(node)
    assert read_progress(told) is None


def test_a_value_that_is_not_kept_is_no_progress(run: Run, told: Path) -> None:
    node = tasks.join.bind(tasks.one.options(checkpoint="none").bind(), tasks.fails.bind(9))
    with pytest.raises(TaskFailedError):
        run(node)
    assert read_progress(told) is None


def test_nobody_is_told_who_does_not_ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROGRESS_VARIABLE, raising=False)
    monkeypatch.setattr(telling, "tell_progress", lambda *_, **__: pytest.fail("told"))
    assert run(tasks.one.bind()) == 1
