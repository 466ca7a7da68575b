"""What is wrong with the arguments of a Split, and what it asks of the runtime."""

from __future__ import annotations

import pytest

from hopcoll import communicator, errors
from tests.fake_engine import FakeEngine, engine_of


@pytest.fixture
def comm(monkeypatch):
    monkeypatch.setattr(communicator, "_make_engine", FakeEngine)
    made = communicator.Communicator(None)
    yield made
    made.close()


@pytest.mark.parametrize("color", [-1, -32766 + 1, 1 << 63, -(1 << 70)])
def test_colors_that_are_refused(comm, color):
    with pytest.raises(ValueError, match="^color must "):
        comm.Split(color)
    assert engine_of(comm).started == []


@pytest.mark.parametrize("wrong", ["red", 1.0, [1]])
def test_what_is_no_integer(comm, wrong):
    with pytest.raises(TypeError, match="^color must be an integer, not "):
        comm.Split(wrong)
    with pytest.raises(TypeError, match="^key must be an integer, not "):
        comm.Split(0, wrong)
    with pytest.raises(TypeError, match="^key must be an integer, not NoneType"):
        comm.Split(0, None)
    assert engine_of(comm).started == []


def test_keys_that_do_not_fit(comm):
    with pytest.raises(ValueError, match="^key must fit into 64 bits"):
        comm.Split(0, 1 << 63)
    assert engine_of(comm).started == []


@pytest.mark.parametrize("call", ["Split", "Dup"])
def test_the_settings_of_a_call(comm, call):
    with pytest.raises(ValueError, match="^on_failure must be "):
        getattr(comm, call)(on_failure="ignore")
    with pytest.raises(ValueError, match="^timeout_s must be "):
        getattr(comm, call)(timeout_s=-1)
    assert engine_of(comm).started == []


@pytest.mark.parametrize("call", ["Split", "Dup"])
def test_of_one_that_is_closed(comm, call):
    comm.close()
    with pytest.raises(errors.ClosedError):
        getattr(comm, call)()


def test_the_first_of_all_has_the_numbers_of_mpi(comm):
    assert comm.parent_ranks == (0, 1, 2, 3)


def test_free_is_close(comm):
    assert comm.Free() is None
    assert len(engine_of(comm).finalized) == 1
    with pytest.raises(errors.ClosedError):
        comm.Barrier()
