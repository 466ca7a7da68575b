from __future__ import annotations

import pytest

from hopcoll import _life, communicator
from hopcoll.communicator import Communicator
from recovery import journal
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
