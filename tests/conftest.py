"""What every test stands on: no setting of the caller's shell changes what a test means."""

from __future__ import annotations

import os
import signal

import pytest

from tests.launch import SETTINGS_PREFIX

#: Tests with jobs that take their time and look at no clock.
BUSY = {
    f"test_{name}"
    for name in (
        *("chaos", "family_faults", "training", "collectives", "family", "mpi4py_suite"),
        *("objects", "pipeline", "sgd", "trace", "transport", "user_ops", "wrong_use"),
        *("shared_objects", "objects_chaos", "store", "workflows"),
    )
}
#: What starts no ranks goes wherever there is time.
ANYWHERE = {f"test_{name}" for name in ("powercut", "store_powercut", "ranks_powercut", "journal")}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Jobs of real ranks go one after the other: those that watch the clock at one worker, those
    that are only busy at another, so that two of a kind are never under way (pytest -n 2)."""
    for item in items:
        if {"mpi", "crash", "slurm"} & set(item.path.parts) and item.path.stem not in ANYWHERE:
            group = "busy jobs" if item.path.stem in BUSY else "jobs"
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the caller's `HOPCOLL_*` away, for the test and for the jobs that it starts."""
    for name in list(os.environ):
        if name.startswith(SETTINGS_PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True, scope="session")
def plain_signals() -> None:
    """A shell that starts a job in the background has it ignore Ctrl-C; `nohup` does so with
    hang-ups. Both are inherited, and a launcher keeps to them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
