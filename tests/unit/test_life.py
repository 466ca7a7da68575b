"""The hooks for fork, uncaught exceptions and the end of the process, without MPI."""

from __future__ import annotations

import ctypes
import sys

import pytest

from hopcoll import _life


class FakeCommunicator:
    def __init__(self, log, name, size=4, fault_tolerant=True):
        self.log = log
        self.name = name
        self.size = size
        self.fault_tolerant = fault_tolerant
        self.error = None

    def _leave(self, timeout_s):
        self.log.append((self.name, timeout_s))
        if self.error is not None:
            raise self.error

    def _orphan(self):
        self.log.append((self.name, "orphan"))


@pytest.fixture
def process(monkeypatch):
    """The hooks, registered nowhere."""
    monkeypatch.setattr(sys, "excepthook", lambda *error: None)
    monkeypatch.setattr(_life.atexit, "register", lambda hook: None)
    monkeypatch.setattr(_life.atexit, "unregister", lambda hook: None)
    monkeypatch.setattr(_life.os, "register_at_fork", lambda after_in_child: None)
    process = _life._Process()
    monkeypatch.setattr(_life, "_process", process)
    return process


@pytest.fixture
def log(process):
    log = []
    _life.watch(FakeCommunicator(log, "first"))
    _life.watch(FakeCommunicator(log, "second"))
    return log


def fail(error):
    sys.excepthook(type(error), error, None)


def test_the_end_closes_the_last_one_first(process, log):
    process.on_exit()
    assert log == [("second", _life.LEAVE_TIMEOUT_S), ("first", _life.LEAVE_TIMEOUT_S)]


def test_a_closed_one_is_left_alone(process, log):
    _life.forget(process.open[1])
    process.on_exit()
    assert [name for name, _ in log] == ["first"]


def test_after_an_uncaught_exception_nothing_is_waited_for(process, log):
    fail(KeyError("x"))
    process.on_exit()
    assert log == [("second", 0.0), ("first", 0.0)]


def test_the_hook_before_ours_is_still_called(monkeypatch, process):
    seen = []
    process.previous_hook = lambda *error: seen.append(error)
    error = KeyboardInterrupt()
    fail(error)
    assert seen == [(KeyboardInterrupt, error, None)]


def test_an_error_at_an_interactive_prompt_is_not_the_end(monkeypatch, process, log):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    fail(KeyError("x"))
    process.on_exit()
    assert [timeout_s for _, timeout_s in log] == [_life.LEAVE_TIMEOUT_S] * 2


def test_one_that_cannot_say_goodbye_does_not_keep_the_next(process, log, capsys):
    process.open[1].error = OSError("no more")
    process.on_exit()
    assert [name for name, _ in log] == ["second", "first"]
    assert "no more" in capsys.readouterr().err


def test_the_child_of_a_fork_lets_go_of_all(process, log):
    process.mpi_state = ctypes.c_int32(2)
    process.on_fork()
    assert log == [("first", "orphan"), ("second", "orphan")]
    assert process.open == []
    # Open MPI looks finalized there, so that nobody finalizes it.
    assert process.mpi_state.value == 5
    process.on_exit()
    assert len(log) == 2


@pytest.mark.parametrize("state", [0, 1, 4, 5])
def test_a_state_of_mpi_that_is_not_understood_is_left_alone(process, state):
    process.mpi_state = ctypes.c_int32(state)
    process.on_fork()
    assert process.mpi_state.value == state


class FakeMPI:
    def __init__(self):
        self.abort_status = 0

    def _set_abort_status(self, status):
        self.abort_status = status


@pytest.mark.parametrize(
    ("size", "fault_tolerant", "aborts"), [(4, True, 0), (4, False, 1), (1, False, 0)]
)
def test_without_fault_tolerance_an_uncaught_exception_ends_the_job(
    monkeypatch, process, size, fault_tolerant, aborts
):
    mpi, log = FakeMPI(), []
    monkeypatch.setattr("mpi4py.MPI", mpi, raising=False)
    process.open.append(FakeCommunicator(log, "only", size, fault_tolerant))
    fail(KeyError("x"))
    process.on_exit()
    assert mpi.abort_status == aborts
    assert len(log) == 1 - aborts
