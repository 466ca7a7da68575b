from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hopcoll import _life, communicator
from hopcoll.communicator import Communicator
from recovery import journal
from recovery.workflows import Node, Workflow
from tests import workflow_tasks
from tests.crash.store_runs import scratch_folder
from tests.fake_engine import FakeEngine


@pytest.fixture
def make(monkeypatch):
    """Make communicators over fake engines, without the hooks of a real process."""
    for name in ("HOPCOLL_TIMEOUT_S", "HOPCOLL_WINDOW", "HOPCOLL_PROGRESS", "HOPCOLL_CHUNK_BYTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(communicator, "_make_engine", FakeEngine)
    monkeypatch.setattr(_life, "watch", lambda comm: None)
    return lambda **settings: Communicator("a communicator of MPI", **settings)


@pytest.fixture
def comm(make):
    return make()


@pytest.fixture
def folder(monkeypatch):
    """A folder for a journal, in memory, whose segments are small."""
    monkeypatch.setattr(journal, "_GROW_BYTES", 8192)
    with scratch_folder("hopcoll-journal-") as made:
        yield made / "journal"


# Workflows


@pytest.fixture
def fresh_tasks() -> Iterator[None]:
    """Let the tasks of `tests.workflow_tasks` know of no other test; threads of theirs end."""
    for what in (workflow_tasks.CALLS, workflow_tasks.DONE, workflow_tasks.SET):
        what.clear()
    waits = threading.Event()
    workflow_tasks.SET.update(waits=waits, begun=threading.Event())
    yield
    waits.set()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where the workflows of a test are."""
    return tmp_path / "store"


@pytest.fixture
def run(store: Path) -> Callable[..., Any]:
    """Run a node as the workflow ``w``, or resume that, as another process would."""

    def call(node: Node | None, name: str = "w", **settings: Any) -> Any:
        with Workflow(name, store, **settings) as workflow:
            workflow_tasks.SET["workflow"] = workflow
            return workflow.resume() if node is None else workflow.run(node)

    return call
