"""Communicator, Outcome and Request over a fake engine: what is handed down, what comes back."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest

import hopcoll
from cython_kernels import reduction
from hopcoll import _life, communicator, errors
from hopcoll.config import Config
from tests.fake_engine import IN_PLACE, address_of, engine_of

OK, ROOT_LOST, RANK_FAILED, MISMATCH, CLOSED, MPI_ERROR = range(6)
BCAST, REDUCE, ALLREDUCE, BARRIER = range(4)
FLOAT64 = reduction.FLOAT64


# ---- what is handed to the engine -------------------------------------------------------------


def test_making_one_collects_the_settings(make, monkeypatch):
    monkeypatch.setenv("HOPCOLL_WINDOW", "3")
    comm = make(timeout_s=4, chunk_bytes=128)
    engine = engine_of(comm)
    assert engine.comm == "a communicator of MPI"
    assert engine.config is comm.config
    assert comm.config == Config(timeout_s=4, chunk_bytes=128, window_chunks=3)
    assert (comm.rank, comm.size, comm.Get_rank(), comm.Get_size()) == (1, 4, 1, 4)
    assert (comm.alive, comm.epoch, comm.fault_tolerant) == ((0, 1, 2, 3), 0, True)


def test_wrong_settings_are_raised_before_there_is_an_engine(make, monkeypatch):
    monkeypatch.setattr(communicator, "_make_engine", lambda comm, config: pytest.fail("made"))
    with pytest.raises(ValueError, match="^on_failure must be 'survivors' or 'raise', not 'die'"):
        make(on_failure="die")
    with pytest.raises(ValueError, match="^chunk_bytes"):
        make(chunk_bytes=1)


def test_allreduce(comm):
    send, recv = np.ones((2, 3)), np.zeros(6)
    comm.Allreduce(send, recv, op=hopcoll.MAX)
    assert engine_of(comm).started == [
        (ALLREDUCE, FLOAT64, reduction.MAX, 0, 6, address_of(send), address_of(recv), 0,
         (send, recv))
    ]  # fmt: skip


@pytest.mark.parametrize("in_place", [IN_PLACE, None])
def test_allreduce_in_place(comm, in_place):
    recv = np.zeros(6, "i2")
    comm.Allreduce(in_place, [recv, (2, 3)])
    assert engine_of(comm).started == [
        (ALLREDUCE, reduction.INT16, reduction.SUM, 0, 2, 0, address_of(recv) + 6, 1, (None, recv))
    ]


def test_reduce_looks_at_recvbuf_only_at_the_root(comm):
    send, recv = np.ones(3), np.zeros(3)
    comm.Reduce(send, recv, root=1)
    comm.Reduce(send, "not looked at", root=0)
    comm.Reduce(send, None, hopcoll.PROD, 2)
    started = engine_of(comm).started
    assert [s[3] for s in started] == [1, 0, 2]
    assert [s[5] for s in started] == [address_of(send)] * 3
    assert [s[6] for s in started] == [address_of(recv), 0, 0]
    assert [s[2] for s in started] == [reduction.SUM, reduction.SUM, reduction.PROD]


def test_reduce_in_place_at_the_root(comm):
    recv = np.ones(3)
    comm.Reduce(IN_PLACE, recv, root=1)
    assert engine_of(comm).started[0][5:8] == (0, address_of(recv), 1)
    with pytest.raises(ValueError, match="^sendbuf is IN_PLACE, which only the root"):
        comm.Reduce(IN_PLACE, recv, root=0)


def test_bcast(comm):
    a = np.zeros(3, [("a", "i4"), ("b", "f8")])
    comm.Bcast(a, root=2)
    assert engine_of(comm).started == [
        (BCAST, reduction.BYTES, reduction.NONE, 2, 36, 0, address_of(a), 0, (None, a))
    ]


def test_only_the_root_may_broadcast_what_is_read_only(comm):
    comm.Bcast(b"abc", root=1)
    with pytest.raises(BufferError, match="^buf is read-only"):
        comm.Bcast(b"abc", root=0)
    assert len(engine_of(comm).started) == 1


def test_barrier(comm):
    comm.Barrier()
    assert engine_of(comm).started[0][:8] == (
        BARRIER, reduction.BYTES, reduction.NONE, 0, 0, 0, 0, 0
    )  # fmt: skip


def test_on_failure_of_a_call_wins_over_the_communicators(make):
    for of_comm, of_call, raises in [
        ("survivors", None, False),
        ("survivors", "raise", True),
        ("raise", None, True),
        ("raise", "survivors", False),
    ]:
        comm = make(on_failure=of_comm)
        comm.Barrier(on_failure=of_call)
        comm.Bcast(np.zeros(1), on_failure=of_call)
        comm.Reduce(np.zeros(1), None, on_failure=of_call)
        comm.Allreduce(None, np.zeros(1), on_failure=of_call)
        assert [s[7] for s in engine_of(comm).started] == [2 * raises] * 3 + [1 + 2 * raises]


def test_timeouts(make):
    comm = make(timeout_s=5)
    comm.Barrier()
    comm.Barrier(timeout_s=2)
    comm.Barrier(timeout_s=math.inf)
    comm.Ibarrier(timeout_s=7).wait()
    comm.Ibarrier(timeout_s=7).wait(timeout_s=0)
    assert engine_of(comm).waits == [5, 2, None, 7, 0]


# ---- what is refused before anything is started -----------------------------------------------

A, B, I = np.ones(3), np.zeros(3), np.ones(3, "i4")  # noqa: E741


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda c: c.Bcast(A, root=4), ValueError, "root must be from 0 to 3, not 4"),
        (lambda c: c.Bcast(A, root=-1), ValueError, "root must be"),
        (lambda c: c.Reduce(A, B, root=9), ValueError, "root must be"),
        (lambda c: c.Bcast(A, root=1.0), TypeError, "root must be an integer"),
        (lambda c: c.Bcast([1, 2]), TypeError, "buf must be a NumPy array"),
        (lambda c: c.Bcast(np.zeros(2, object)), TypeError, "buf has dtype object"),
        (lambda c: c.Allreduce(A[::2], B), BufferError, "sendbuf is not contiguous"),
        (lambda c: c.Allreduce(A, np.ones(6)[::2]), BufferError, "recvbuf is not contiguous"),
        (lambda c: c.Allreduce(A, A), ValueError, "recvbuf overlaps sendbuf"),
        (lambda c: c.Allreduce(A, I), ValueError, "recvbuf has dtype int32"),
        (lambda c: c.Allreduce(A, np.ones(4)), ValueError, "recvbuf has 4 items"),
        (lambda c: c.Allreduce(A, None), TypeError, "recvbuf must be a buffer"),
        (lambda c: c.Allreduce(A, IN_PLACE), TypeError, "recvbuf must be a buffer"),
        (lambda c: c.Reduce(A, None, root=1), TypeError, "recvbuf must be a buffer"),
        (lambda c: c.Allreduce(A, B, op="SUM"), TypeError, "op must be one of"),
        (lambda c: c.Allreduce(I, I.copy(), op=hopcoll.AVG), TypeError, "sendbuf has dtype int32"),
        (lambda c: c.Allreduce(None, I, op=hopcoll.AVG), TypeError, "recvbuf has dtype int32"),
        (lambda c: c.Allreduce(A, B, on_failure="x"), ValueError, "on_failure must be"),
        (lambda c: c.Barrier(on_failure=[]), ValueError, "on_failure must be"),
        (lambda c: c.Barrier(timeout_s=-1), ValueError, "timeout_s must be 0 or more"),
        (lambda c: c.Barrier(timeout_s="1"), TypeError, "timeout_s must be a number"),
    ],
)
def test_wrong_use_starts_nothing(comm, call, kind, text):
    with pytest.raises(kind, match="^" + text):
        call(comm)
    assert engine_of(comm).started == []


# ---- what comes back ------------------------------------------------------------------------


def test_outcome(comm):
    engine_of(comm).status = {"contributors": (0, 3), "epoch": 2}
    outcome = comm.Allreduce(A, B)
    assert (outcome.contributors, outcome.epoch, outcome.root_lost) == ((0, 3), 2, False)
    assert repr(outcome) == "Outcome(contributors=(0, 3), epoch=2)"
    assert outcome.stable() is False
    outcome._operation.is_stable = True
    assert outcome.stable() is True
    with pytest.raises(AttributeError, match="^Outcome is immutable"):
        outcome.epoch = 3
    with pytest.raises(AttributeError, match="^Outcome is immutable"):
        del outcome.epoch


def test_root_lost(make):
    comm = make()
    engine_of(comm).status = {"status": ROOT_LOST, "failed": (2,), "epoch": 1}
    outcome = comm.Reduce(A, None, root=2)
    assert outcome.root_lost
    assert "root_lost=True" in repr(outcome)
    with pytest.raises(errors.RankFailedError, match="lost rank 2 with its root") as caught:
        comm.Bcast(B, root=2)
    assert (caught.value.ranks, caught.value.epoch) == ((2,), 1)
    with pytest.raises(errors.RankFailedError):
        comm.Reduce(A, None, root=2, on_failure="raise")


def test_rank_failed(comm):
    engine_of(comm).status = {"status": RANK_FAILED, "failed": (0, 3), "epoch": 1}
    with pytest.raises(errors.RankFailedError, match="lost ranks 0, 3; .* in epoch 1") as caught:
        comm.Allreduce(A, B, on_failure="raise")
    assert (caught.value.ranks, caught.value.epoch) == ((0, 3), 1)


@pytest.mark.parametrize(
    ("status", "message", "kind", "text"),
    [
        (MISMATCH, "count differs: 3 at ranks 0, 1; 4 at rank 2", ValueError, "count differs"),
        (CLOSED, "", errors.ClosedError, "Barrier .* was under way when its communicator closed"),
        (MPI_ERROR, "MPI_Isend: truncated", errors.MpiError, "MPI_Isend: truncated"),
        (MPI_ERROR, "", errors.MpiError, "Barrier .* failed inside MPI"),
    ],
)
def test_errors_are_raised_again_at_each_look(comm, status, message, kind, text):
    engine_of(comm).status = {"status": status, "message": message}
    request = comm.Ibarrier()
    for look in (request.wait, request.test, request.wait):
        with pytest.raises(kind, match="^" + text):
            look()
    assert request.outcome is None
    assert "failed" in repr(request)


def test_a_request_is_complete_once_and_for_all(comm):
    engine = engine_of(comm)
    engine.complete = False
    request = comm.Iallreduce(A, B)
    assert request.test() == (False, None)
    assert request.outcome is None
    assert "under way" in repr(request)
    engine.complete = True
    complete, outcome = request.test()
    assert complete
    engine.complete = False
    assert request.test() == (True, outcome)
    assert request.wait() is outcome
    assert request.outcome is outcome
    assert engine.waits == []
    assert "contributors" in repr(request)


def test_after_a_timeout_one_can_wait_again(comm):
    engine = engine_of(comm)
    engine.complete = False
    request = comm.Iallreduce(A, B)
    with pytest.raises(errors.TransferTimeoutError, match=r"^Allreduce .* within 0.5 s.*pinned"):
        request.wait(timeout_s=0.5)
    with pytest.raises(TimeoutError):
        request.wait(timeout_s=0.5)
    engine.complete = True
    assert request.wait().contributors == (0, 1, 2, 3)


def test_after_ctrl_c_one_can_wait_again(comm):
    engine = engine_of(comm)
    engine.complete = KeyboardInterrupt()
    request = comm.Ibarrier()
    with pytest.raises(KeyboardInterrupt):
        request.wait()
    engine.complete = True
    assert request.wait() is request.outcome


def test_a_request_that_nobody_keeps_leaves_its_buffers_with_the_engine(comm):
    a = np.ones(3)
    buffer_lives, request = weakref.ref(a), comm.Ibcast(a)
    request_lives = weakref.ref(request)
    del a, request
    gc.collect()
    assert request_lives() is None
    assert buffer_lives() is not None


# ---- the end ----------------------------------------------------------------------------------


def assert_refuses_everything(comm, text):
    for call in (
        lambda: comm.Bcast(A),
        lambda: comm.Reduce(A, B),
        lambda: comm.Allreduce(A, B),
        lambda: comm.Barrier(),
        lambda: comm.counters(),
        lambda: comm.alive,
        lambda: comm.epoch,
    ):
        with pytest.raises(errors.ClosedError, match=text):
            call()


def test_close_once(comm):
    assert comm.counters() == {"ballots": 2}
    assert comm.close(timeout_s=3)
    assert comm.close()
    engine = engine_of(comm)
    assert engine.finalized == [3]
    assert "closed" in repr(comm)
    assert_refuses_everything(comm, "^the communicator is closed")
    assert engine.started == []


def test_close_tells_when_the_time_was_short(comm):
    engine_of(comm).complete = False
    assert comm.close() is False
    assert engine_of(comm).finalized == [_life.LEAVE_TIMEOUT_S]


def test_a_wrong_time_leaves_it_open(comm):
    with pytest.raises(ValueError, match="^timeout_s"):
        comm.close(timeout_s=-1)
    comm.Barrier()


def test_with_closes(make):
    with make() as comm:
        comm.Barrier()
    assert engine_of(comm).finalized == [_life.LEAVE_TIMEOUT_S]


def test_with_waits_for_nothing_when_an_error_is_on_its_way_out(make):
    with pytest.raises(KeyError), make() as comm:
        raise KeyError
    assert engine_of(comm).finalized == [0.0]


def test_in_the_child_of_a_fork(comm):
    request = comm.Ibarrier()
    comm._orphan()
    assert_refuses_everything(comm, "forked process")
    for look in (request.wait, request.test):
        with pytest.raises(errors.ClosedError, match="forked process"):
            look()
    assert comm.close()
    assert engine_of(comm).abandoned
    assert engine_of(comm).finalized == []
