"""Partial operations over a fake engine, at rank 1 of 4: what is handed down, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import hopcoll
from hopcoll import errors
from tests.fake_engine import engine_of

PARTIAL, CARRY = 16, 32
A, B = np.ones(3), np.zeros(3)


def started(comm):
    """Quorum, flags, and what the engine has to be told of the deadline; the number agreed on."""
    engine = engine_of(comm)
    root, flags = engine.started[-1][3], engine.started[-1][7]
    return root, flags, engine.deadlines[-1], engine.agreed[-1]


def test_a_quorum(comm):
    comm.Allreduce(A, B, quorum=3)
    assert started(comm) == (3, PARTIAL, None, 0)
    comm.Allreduce(A, B, quorum=np.int16(4), late="drop")
    assert started(comm) == (4, PARTIAL, None, 0)


def test_a_deadline(comm):
    comm.Iallreduce(A, B, hopcoll.MAX, deadline_s=0.5, on_failure="raise").wait()
    assert started(comm) == (0, PARTIAL | 2, 0.5, 0)
    comm.Allreduce(A, B, deadline_s=0, quorum=1)
    assert started(comm) == (1, PARTIAL, 0.0, 0)
    comm.Allreduce(A, B, deadline_s=float("inf"))
    assert started(comm) == (0, 0, None, 0)


def test_a_carry(comm):
    comm.Allreduce(A, B, quorum=2, late="carry")
    *rest, first = started(comm)
    assert rest == [2, PARTIAL | CARRY, None]
    comm.Allreduce(A, B, late="carry", name="other")
    *rest, second = started(comm)
    assert rest == [0, CARRY, None]
    assert len({0, first, second}) == 3


def test_flush_sends_zeros(comm):
    place = np.ones((2, 3), "f4")
    comm.Flush(place, name="x")
    send, recv = engine_of(comm).started[-1][8]
    assert recv is place
    assert send.dtype == "f4" and send.size == 6 and not send.any()
    assert started(comm)[1] == CARRY


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quorum": 0}, "quorum must be from 1 to 4, not 0"),
        ({"quorum": 5}, "quorum must be from 1 to 4, not 5"),
        ({"deadline_s": -1}, "deadline_s must be 0 or more seconds"),
        ({"late": "later", "quorum": 2}, "late must be 'drop' or 'carry', not 'later'"),
        ({"late": "drop"}, "late is for operations with a quorum or a deadline_s"),
        ({"name": "x", "quorum": 2}, "name is for late='carry' alone"),
        ({"late": "carry", "op": hopcoll.MAX}, "late='carry' adds inputs up: op must be SUM"),
        ({"late": "carry", "op": hopcoll.AVG}, "late='carry' adds inputs up: op must be SUM"),
        ({"quorum": 2, "check": "hash"}, "check waits for all ranks"),
    ],
)
def test_what_cannot_be(comm, how, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        comm.Allreduce(A, B, **how)
    assert engine_of(comm).started == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quorum": 2.0}, "quorum must be an integer, not float"),
        ({"deadline_s": "1"}, "deadline_s must be a number of seconds, not str"),
        ({"late": "carry", "name": b"x"}, "name must be a string, not bytes"),
    ],
)
def test_wrong_types(comm, how, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        comm.Allreduce(A, B, **how)
    assert engine_of(comm).started == []


def test_a_result_that_is_gone(comm):
    engine_of(comm).status = {"status": 7, "seq": 12}
    request = comm.Iallreduce(A, B, quorum=1)
    for _ in range(2):
        with pytest.raises(errors.MissedError, match=r"^Allreduce \(operation 12 .* is over"):
            request.wait()
    with pytest.raises(errors.MissedError) as caught:
        request.test()
    assert caught.value.seq == 12


def test_an_order(comm):
    comm.Allreduce(A, B, order="arrival")
    assert started(comm)[:2] == (0, 64)
    comm.Reduce(A, B, hopcoll.MAX, 1, order="arrival")
    assert started(comm)[:2] == (1, 64)
    comm.Reduce(A, B, order="rank", root=1)
    assert started(comm)[:2] == (1, 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"order": "random"}, "order must be 'rank' or 'arrival', not 'random'"),
        ({"order": "arrival", "quorum": 2}, "order='arrival' is for operations of all ranks"),
        (
            {"order": "arrival", "op": hopcoll.Op.Create(np.subtract)},
            "order='arrival' needs an op that commutes",
        ),
    ],
)
def test_no_such_order(comm, how, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        comm.Allreduce(A, B, **how)
    assert engine_of(comm).started == []
