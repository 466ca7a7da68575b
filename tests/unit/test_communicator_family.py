"""Gather, Allgather, Scatter, Alltoall, Reduce_scatter and the scans over a fake engine, at rank 1
of 4: what is handed down, what is refused, and what a request calls itself."""

from __future__ import annotations

import numpy as np
import pytest

import hopcoll
from cython_kernels import reduction
from hopcoll import errors
from tests.fake_engine import IN_PLACE, address_of, engine_of
from tests.reference_family import (
    ALLGATHER,
    ALLTOALL,
    EXSCAN,
    GATHER,
    REDUCE_SCATTER,
    SCAN,
    SCATTER,
)

ROOT_LOST = 1
IN_PLACE_FLAG, RAISE_FLAG, VECTOR_FLAG = 1, 2, 4
FLOAT64, NONE = reduction.FLOAT64, reduction.NONE
A, B, I = np.ones(3), np.zeros(3), np.ones(3, "i4")  # noqa: E741
W = np.ones(12)  # a block of three for each of the four ranks


# ---- what is handed to the engine ---------------------------------------------------------------


def only(comm):
    """What was started, once; its lengths as lists."""
    engine = engine_of(comm)
    (started,), (lengths,) = engine.started, engine.lengths
    return started, lengths and [part.tolist() for part in lengths[:4]]


def layout_of(comm):
    return engine_of(comm).lengths[-1][4]


def test_gather(comm):
    send, recv = np.ones((2, 3)), np.zeros(24)
    comm.Gather(send, recv, root=1)
    assert only(comm) == (
        (GATHER, FLOAT64, NONE, 1, 6, address_of(send), address_of(recv), 0, (send, recv)), None
    )  # fmt: skip


def test_gather_looks_at_recvbuf_only_at_the_root(comm):
    send = np.ones(3, "i2")
    comm.Gather(send, "not looked at", 2)
    comm.Gatherv(send, None)
    started = engine_of(comm).started
    assert started[0] == (
        GATHER, reduction.INT16, NONE, 2, 3, address_of(send), 0, 0, (send, None)
    )  # fmt: skip
    assert started[1][:8] == (
        GATHER, reduction.INT16, NONE, 0, 0, address_of(send), 0, VECTOR_FLAG
    )  # fmt: skip
    sent, _, received, _, layout = engine_of(comm).lengths[1]
    assert (sent.tolist(), received.tolist(), layout) == ([0, 6, 0, 0], [0] * 4, 0)


@pytest.mark.parametrize("in_place", [IN_PLACE, None])
def test_gather_in_place(comm, in_place):
    recv = np.zeros(12)
    comm.Gather(in_place, [recv, 2, 3, "f8"], 1)
    started, _ = only(comm)
    assert started[:8] == (GATHER, FLOAT64, NONE, 1, 2, 0, address_of(recv) + 24, IN_PLACE_FLAG)


def test_gatherv_at_the_root(comm):
    send, recv = np.ones(2, "f4"), np.zeros(20, "f4")
    comm.Gatherv(send, [recv, ([1, 2, 0, 3], [8, 4, 0, 12])], root=1)
    started, lengths = only(comm)
    assert started == (
        GATHER, reduction.FLOAT32, NONE, 1, 0, address_of(send), address_of(recv), VECTOR_FLAG,
        (send, recv)
    )  # fmt: skip
    assert lengths == [[0, 8, 0, 0], [0] * 4, [4, 8, 0, 12], [32, 16, 0, 48]]
    assert layout_of(comm) == 0


@pytest.mark.parametrize("in_place", [False, True])
def test_allgather(comm, in_place):
    send, recv = np.ones(2, "i4"), np.zeros((4, 2), "i4")
    comm.Allgather(IN_PLACE if in_place else send, recv)
    started, lengths = only(comm)
    assert started[:5] == (ALLGATHER, reduction.INT32, NONE, 0, 2)
    assert started[5:8] == (0 if in_place else address_of(send), address_of(recv), int(in_place))
    assert lengths is None


def test_allgather_of_records_counts_bytes(comm):
    dtype = [("a", "i4"), ("b", "f8")]
    comm.Allgather(np.zeros(3, dtype), np.zeros(12, dtype))
    assert only(comm)[0][:5] == (ALLGATHER, reduction.BYTES, NONE, 0, 36)


def test_allgatherv_agrees_on_the_lengths_but_not_on_the_places(comm):
    send, recv = np.ones(2), np.zeros(20)
    comm.Allgatherv(send, [recv, [1, 2, 0, 3]])
    comm.Allgatherv(IN_PLACE, [recv, ([1, 2, 0, 3], [8, 4, 0, 12])])
    comm.Allgatherv(send, [recv, [2, 2, 0, 2]])
    engine = engine_of(comm)
    assert [s[4] for s in engine.started] == [6, 6, 6]
    assert [s[7] for s in engine.started] == [4, 5, 4]
    assert [given[2].tolist() for given in engine.lengths] == [[8, 16, 0, 24]] * 2 + [
        [16, 16, 0, 16]
    ]
    assert [given[3].tolist() for given in engine.lengths[:2]] == [[0, 8, 24, 24], [64, 32, 0, 96]]
    layouts = [given[4] for given in engine.lengths]
    assert layouts[0] == layouts[1] != layouts[2]
    assert 0 not in layouts


def test_scatter(comm):
    send, recv = np.ones(10), np.zeros(2)
    comm.Scatter([send, (2, 1)], recv, root=1)
    assert only(comm)[0] == (
        SCATTER, FLOAT64, NONE, 1, 2, address_of(send) + 8, address_of(recv), 0, (send, recv)
    )  # fmt: skip


def test_scatter_looks_at_sendbuf_only_at_the_root(comm):
    recv = np.zeros(2)
    comm.Scatter("not looked at", recv)
    comm.Scatterv(None, recv, 3)
    started, lengths = engine_of(comm).started, engine_of(comm).lengths
    assert started[0] == (SCATTER, FLOAT64, NONE, 0, 2, 0, address_of(recv), 0, (None, recv))
    assert started[1][3:8] == (3, 0, 0, address_of(recv), VECTOR_FLAG)
    assert [part.tolist() for part in lengths[1][:4]] == [[0] * 4, [0] * 4, [0, 16, 0, 0], [0] * 4]


def test_scatter_in_place_at_the_root(comm):
    """The place is what `recv` says, not a flag: the input is elsewhere."""
    send = np.ones(8)
    comm.Scatter(send, IN_PLACE, root=1)
    assert only(comm)[0][3:] == (1, 2, address_of(send), 0, 0, (send, None))


def test_scatterv_at_the_root(comm):
    send, recv = np.ones(9, "i2"), np.zeros(3, "i2")
    comm.Scatterv([send, (4, 3, 0, 2), [5, 0, 9, 3], None], recv, 1)
    started, lengths = only(comm)
    assert started[:8] == (
        SCATTER, reduction.INT16, NONE, 1, 0, address_of(send), address_of(recv), VECTOR_FLAG
    )  # fmt: skip
    assert lengths == [[8, 6, 0, 4], [10, 0, 18, 6], [0, 6, 0, 0], [0] * 4]
    assert layout_of(comm) == 0


def test_alltoall(comm):
    send, recv = np.ones(12), np.zeros(12)
    comm.Alltoall(send, recv)
    assert only(comm) == (
        (ALLTOALL, FLOAT64, NONE, 0, 3, address_of(send), address_of(recv), 0, (send, recv)), None
    )  # fmt: skip


def test_alltoall_in_place(comm):
    recv = np.zeros(12)
    comm.Alltoall(IN_PLACE, recv)
    assert only(comm)[0][4:] == (3, 0, address_of(recv), IN_PLACE_FLAG, (None, recv))


def test_alltoallv(comm):
    send, recv = np.ones(8), np.zeros(9)
    comm.Alltoallv([send, [1, 2, 3, 0]], [recv, ([4, 2, 0, 1], [5, 3, 0, 0])])
    started, lengths = only(comm)
    assert started[:8] == (
        ALLTOALL, FLOAT64, NONE, 0, 0, address_of(send), address_of(recv), VECTOR_FLAG
    )  # fmt: skip
    assert lengths == [[8, 16, 24, 0], [0, 8, 24, 48], [32, 16, 0, 8], [40, 24, 0, 0]]
    assert layout_of(comm) == 0


def test_alltoallv_in_place_sends_what_it_receives(comm):
    recv = np.zeros(9)
    comm.Alltoallv(None, [recv, ([4, 2, 0, 1], [5, 3, 0, 0])])
    started, lengths = only(comm)
    assert started[5:8] == (0, address_of(recv), VECTOR_FLAG | IN_PLACE_FLAG)
    assert lengths[:2] == lengths[2:] == [[32, 16, 0, 8], [40, 24, 0, 0]]


def test_reduce_scatter_block(comm):
    send, recv = np.ones(12), np.zeros(3)
    comm.Reduce_scatter_block(send, recv, hopcoll.MAX)
    assert only(comm) == (
        (REDUCE_SCATTER, FLOAT64, reduction.MAX, 0, 3, address_of(send), address_of(recv), 0,
         (send, recv)), None
    )  # fmt: skip


def test_reduce_scatter_block_in_place(comm):
    recv = np.zeros(12)
    comm.Reduce_scatter_block(IN_PLACE, recv)
    assert only(comm)[0][4:] == (3, 0, address_of(recv), IN_PLACE_FLAG, (None, recv))


@pytest.mark.parametrize("in_place", [False, True])
def test_reduce_scatter(comm, in_place):
    send, recv = np.ones(7), np.zeros(7 if in_place else 4)
    comm.Reduce_scatter(None if in_place else send, recv, [1, 4, 0, 2], hopcoll.AVG)
    started, lengths = only(comm)
    assert started[:5] == (REDUCE_SCATTER, FLOAT64, reduction.AVG, 0, 7)
    assert started[5:7] == (0 if in_place else address_of(send), address_of(recv))
    assert started[7] == VECTOR_FLAG + in_place
    assert lengths[:2] == lengths[2:] == [[8, 32, 0, 16], [0, 8, 40, 40]]
    comm.Reduce_scatter(np.ones(7), np.zeros(4), np.array([2, 4, 0, 1]))
    assert 0 != engine_of(comm).lengths[0][4] != layout_of(comm) != 0


def test_reduce_scatter_without_counts_asks_for_them(comm, monkeypatch):
    """By an Allgather that blocks, whose result is the fake's: it tells of no counts but ours."""
    engine, start = engine_of(comm), engine_of(comm).start

    def fill(kind, *rest):
        operation = start(kind, *rest)
        if kind == ALLGATHER:
            sent, counts = rest[7]
            assert sent.tolist() == [3]
            counts[:] = [2, 3, 0, 1]
        return operation

    monkeypatch.setattr(engine, "start", fill)
    comm.Reduce_scatter(np.ones(6), np.zeros(3), timeout_s=4)
    assert [s[0] for s in engine.started] == [ALLGATHER, REDUCE_SCATTER]
    assert engine.started[0][1:5] == (reduction.INT64, NONE, 0, 1)
    assert engine.lengths[1][0].tolist() == [16, 24, 0, 8]
    assert engine.waits == [4, 4]


def test_reduce_scatter_cannot_ask_who_is_lost(comm):
    engine_of(comm).status = {"contributors": (1, 3), "epoch": 2}
    with pytest.raises(
        errors.RankFailedError, match=r"^recvcounts must be given .*: 0, 2"
    ) as caught:
        comm.Reduce_scatter(np.ones(6), np.zeros(3))
    assert (caught.value.ranks, caught.value.epoch) == ((0, 2), 2)
    assert [s[0] for s in engine_of(comm).started] == [ALLGATHER]


@pytest.mark.parametrize(("name", "kind"), [("Scan", SCAN), ("Exscan", EXSCAN)])
def test_scans(comm, name, kind):
    send, recv = np.ones(3), np.zeros(3)
    getattr(comm, name)(send, recv)
    getattr(comm, name)(IN_PLACE, recv, op=hopcoll.PROD)
    assert engine_of(comm).started == [
        (kind, FLOAT64, reduction.SUM, 0, 3, address_of(send), address_of(recv), 0, (send, recv)),
        (kind, FLOAT64, reduction.PROD, 0, 3, 0, address_of(recv), IN_PLACE_FLAG, (None, recv)),
    ]


#: A right call of each kind.
FAMILY = {
    "Gather": lambda c, **more: c.Gather(A, np.zeros(12), 1, **more),
    "Gatherv": lambda c, **more: c.Gatherv(A, np.zeros(12), 1, **more),
    "Allgather": lambda c, **more: c.Allgather(A, np.zeros(12), **more),
    "Allgatherv": lambda c, **more: c.Allgatherv(A, np.zeros(12), **more),
    "Scatter": lambda c, **more: c.Scatter(np.zeros(12), B, 1, **more),
    "Scatterv": lambda c, **more: c.Scatterv(np.zeros(12), B, 1, **more),
    "Alltoall": lambda c, **more: c.Alltoall(np.ones(4), np.zeros(4), **more),
    "Alltoallv": lambda c, **more: c.Alltoallv(np.ones(4), np.zeros(4), **more),
    "Reduce_scatter_block": lambda c, **more: c.Reduce_scatter_block(np.ones(12), B, **more),
    "Reduce_scatter": lambda c, **more: c.Reduce_scatter(np.ones(12), B, [3] * 4, **more),
    "Scan": lambda c, **more: c.Scan(A, B, **more),
    "Exscan": lambda c, **more: c.Exscan(A, B, **more),
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_name_of_a_request(comm, name):
    """Also that on_failure and timeout_s reach it, and that an I-form of each is there."""
    engine = engine_of(comm)
    engine.complete = False
    with pytest.raises(errors.TransferTimeoutError, match=rf"^{name} \(operation 0 .* within 3 s"):
        FAMILY[name](comm, timeout_s=3, on_failure="raise")
    assert engine.waits == [3]
    assert engine.started[0][7] & RAISE_FLAG
    assert callable(getattr(comm, "I" + name.lower()))


@pytest.mark.parametrize("name", FAMILY)
def test_where_blocks_are_given_and_who_loses_the_root(comm, name):
    """A Gather without its root has an outcome; a Scatter has none, like a Bcast."""
    engine_of(comm).status = {"status": ROOT_LOST, "failed": (1,), "epoch": 1}
    if name.startswith("Gather"):
        assert FAMILY[name](comm).root_lost
    else:
        with pytest.raises(errors.RankFailedError, match=rf"^{name} \(operation 0 .* lost rank 1"):
            FAMILY[name](comm)
    with_root = " with its root" if name.startswith(("Gather", "Scatter")) else ";"
    with pytest.raises(errors.RankFailedError, match=f"lost rank 1{with_root}"):
        FAMILY[name](comm, on_failure="raise")


@pytest.mark.parametrize("name", FAMILY)
def test_a_closed_communicator_starts_nothing_of_the_family(comm, name):
    comm.close()
    with pytest.raises(errors.ClosedError, match="^the communicator is closed"):
        FAMILY[name](comm)
    assert engine_of(comm).started == []


# ---- what is refused before anything is started -------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        # Gather and Gatherv
        (lambda c: c.Gather(A, np.ones(12), 4), ValueError, "root must be from 0 to 3, not 4"),
        (lambda c: c.Gather(A, None, 1), TypeError, "recvbuf must be a buffer; IN_PLACE goes"),
        (lambda c: c.Gather(A, IN_PLACE, 1), TypeError, "recvbuf must be a buffer; IN_PLACE goes"),
        (
            lambda c: c.Gather(IN_PLACE, W, 0),
            ValueError,
            r"sendbuf is IN_PLACE, which only the root \(rank 0\) may pass",
        ),
        (lambda c: c.Gatherv(None, W, 2), ValueError, "sendbuf is IN_PLACE, which only the root"),
        (
            lambda c: c.Gather(A, np.ones(13), 1),
            ValueError,
            "recvbuf has 13 items of float64, which cannot be divided into 4 equal blocks",
        ),
        (
            lambda c: c.Gather(A, np.ones(16), 1),
            ValueError,
            "recvbuf and sendbuf do not match: the block of rank 1 has 24 bytes in one and 32 in",
        ),
        (
            lambda c: c.Gatherv(A, [W, [3, 2, 3, 3]], 1),
            ValueError,
            "recvbuf and sendbuf do not match: the block of rank 1 has 24 bytes in one and 16 in",
        ),
        (
            lambda c: c.Gather(A, np.ones(12, "f4"), 1),
            ValueError,
            "recvbuf and sendbuf have different dtypes: float64 and float32",
        ),
        (lambda c: c.Gather(W[:3], W, 1), ValueError, r"recvbuf \(block of rank 0\) overlaps send"),
        (lambda c: c.Gather(A, bytes(96), 1), BufferError, "recvbuf is read-only"),
        (
            lambda c: c.Gatherv(A, [W, [3] * 3], 1),
            ValueError,
            "recvbuf has 3 counts for 4 ranks; pass one for each rank",
        ),
        (
            lambda c: c.Gatherv(A, [W, ([3] * 4, [0, 2, 6, 9])], 1),
            ValueError,
            "recvbuf has blocks that overlap: that of rank 0",
        ),
        (
            lambda c: c.Gatherv(A, [W, ([3] * 4, [0, 3, 6, 10])], 1),
            ValueError,
            "recvbuf has 96 bytes, and the block of rank 3 does not lie in them",
        ),
        # Allgather and Allgatherv
        (lambda c: c.Allgather(A, IN_PLACE), TypeError, "recvbuf must be a buffer; IN_PLACE goes"),
        (lambda c: c.Allgather(A, np.ones(11)), ValueError, "recvbuf has 11 items of float64"),
        (lambda c: c.Allgather(A, np.ones(8)), ValueError, "recvbuf and sendbuf do not match"),
        (lambda c: c.Allgather(I, W), ValueError, "recvbuf and sendbuf have different dtypes"),
        (
            lambda c: c.Allgather(W[3:6], W),
            ValueError,
            "recvbuf .* overlaps sendbuf; pass IN_PLACE",
        ),
        (lambda c: c.Allgather(A[::2], np.ones(8)), BufferError, "sendbuf is not contiguous"),
        (lambda c: c.Allgather(A, np.ones(24)[::2]), BufferError, "recvbuf is not contiguous"),
        (
            lambda c: c.Allgatherv(A, [W, [3, -1, 3, 3]]),
            ValueError,
            "recvbuf has a negative count for rank 1: -1",
        ),
        (
            lambda c: c.Allgatherv(A, [W, [3, 3, 3, 4]]),
            ValueError,
            "recvbuf has 96 bytes, and the block of rank 3 does not lie in them",
        ),
        # Scatter and Scatterv
        (
            lambda c: c.Scatter(W, IN_PLACE, 0),
            ValueError,
            r"recvbuf is IN_PLACE, which only the root \(rank 0\) may pass",
        ),
        (lambda c: c.Scatterv(W, None, 3), ValueError, "recvbuf is IN_PLACE, which only the root"),
        (lambda c: c.Scatter(None, B, 1), TypeError, "sendbuf must be a NumPy array"),
        (lambda c: c.Scatter(np.ones(11), B, 1), ValueError, "sendbuf has 11 items of float64"),
        (lambda c: c.Scatter(W, np.ones(4), 1), ValueError, "recvbuf and sendbuf do not match"),
        (
            lambda c: c.Scatterv([W, [3, 4, 3, 2]], B, 1),
            ValueError,
            "recvbuf and sendbuf do not match: the block of rank 1 has 24 bytes in one and 32 in",
        ),
        (lambda c: c.Scatter(W, I, 1), ValueError, "recvbuf and sendbuf have different dtypes"),
        (lambda c: c.Scatter(W, W[:3], 1), ValueError, "recvbuf.* overlaps sendbuf"),
        (lambda c: c.Scatter(None, b"12345678", 0), BufferError, "recvbuf is read-only"),
        # Alltoall and Alltoallv
        (lambda c: c.Alltoall(W, IN_PLACE), TypeError, "recvbuf must be a buffer; IN_PLACE goes"),
        (lambda c: c.Alltoall(np.ones(7), W), ValueError, "sendbuf has 7 items of float64"),
        (
            lambda c: c.Alltoall(np.ones(8), W),
            ValueError,
            "recvbuf has 24 bytes for rank 1 itself, but sendbuf has 16",
        ),
        (
            lambda c: c.Alltoallv([np.ones(8), [1, 5, 1, 1]], [W, [1, 4, 1, 1]]),
            ValueError,
            "recvbuf has 32 bytes for rank 1 itself, but sendbuf has 40",
        ),
        (
            lambda c: c.Alltoall(np.ones(12, "i8"), W),
            ValueError,
            "recvbuf has dtype float64, but sendbuf has int64",
        ),
        (lambda c: c.Alltoall(W, W), ValueError, "recvbuf .* overlaps sendbuf .*pass IN_PLACE"),
        (lambda c: c.Alltoall(W, bytes(96)), BufferError, "recvbuf is read-only"),
        # Reduce_scatter_block and Reduce_scatter
        (
            lambda c: c.Reduce_scatter_block(np.ones(11), B),
            ValueError,
            "sendbuf has 11 items, which do not make 4 equal blocks",
        ),
        (
            lambda c: c.Reduce_scatter_block(None, np.ones(11)),
            ValueError,
            "recvbuf has 11 items, which do not make 4 equal blocks",
        ),
        (
            lambda c: c.Reduce_scatter_block(W, np.ones(4)),
            ValueError,
            "recvbuf has 4 items, but the blocks of sendbuf have 3",
        ),
        (
            lambda c: c.Reduce_scatter_block(W, I),
            ValueError,
            "recvbuf has dtype int32, but sendbuf has float64",
        ),
        (
            lambda c: c.Reduce_scatter_block(W, IN_PLACE),
            TypeError,
            "recvbuf must be a buffer; IN_PLACE goes into sendbuf",
        ),
        (lambda c: c.Reduce_scatter_block(W, W[:3]), ValueError, "recvbuf overlaps sendbuf"),
        (lambda c: c.Reduce_scatter_block(W, bytes(24)), BufferError, "recvbuf is read-only"),
        (
            lambda c: c.Reduce_scatter_block(None, np.ones(4, "i4"), hopcoll.AVG),
            TypeError,
            "recvbuf has dtype int32, which AVG does not take",
        ),
        (
            lambda c: c.Reduce_scatter(W, B, [3, 3, 3]),
            ValueError,
            r"recvcounts must be 4 integers, not \[3, 3, 3\]",
        ),
        (lambda c: c.Reduce_scatter(W, B, 3), ValueError, "recvcounts must be 4 integers, not 3"),
        (
            lambda c: c.Reduce_scatter(W, B, [3.0] * 4),
            ValueError,
            "recvcounts must be 4 integers, not",
        ),
        (
            lambda c: c.Reduce_scatter(W, B, [3, 3, -1, 7]),
            ValueError,
            r"recvcounts must not be negative: \[3, 3, -1, 7\]",
        ),
        (
            lambda c: c.Reduce_scatter(W, B, [3, 3, 3, 4]),
            ValueError,
            "sendbuf has 12 items, but recvcounts add up to 13",
        ),
        (
            lambda c: c.Reduce_scatter(IN_PLACE, B, [3] * 4),
            ValueError,
            "recvbuf has 3 items, but recvcounts add up to 12",
        ),
        (
            lambda c: c.Reduce_scatter(W, B, [4, 2, 3, 3]),
            ValueError,
            r"recvbuf has 3 items, but recvcounts\[1\] is 2",
        ),
        (
            lambda c: c.Reduce_scatter(IN_PLACE, W),
            ValueError,
            "recvcounts must be given where sendbuf is IN_PLACE",
        ),
        # Scan and Exscan
        (lambda c: c.Scan(A, B, hopcoll.AVG), TypeError, "op AVG is not defined for a scan"),
        (lambda c: c.Exscan(A, B, hopcoll.AVG), TypeError, "op AVG is not defined for a scan"),
        (lambda c: c.Scan(A, np.ones(4)), ValueError, "recvbuf has 4 items, but sendbuf has 3"),
        (lambda c: c.Exscan(A, I), ValueError, "recvbuf has dtype int32, but sendbuf has float64"),
        (lambda c: c.Scan(A, IN_PLACE), TypeError, "recvbuf must be a buffer; IN_PLACE goes"),
        (lambda c: c.Exscan(A, A), ValueError, "recvbuf overlaps sendbuf; pass IN_PLACE"),
        (lambda c: c.Scan(A, bytes(24)), BufferError, "recvbuf is read-only"),
        (
            lambda c: c.Exscan(A * 1j, B * 1j, hopcoll.MAX),
            TypeError,
            "sendbuf has dtype complex128",
        ),
        (lambda c: c.Scan(A, B, on_failure="x"), ValueError, "on_failure must be"),
        (
            lambda c: c.Alltoall(W, W.copy(), timeout_s=-1),
            ValueError,
            "timeout_s must be 0 or more",
        ),
    ],
)
def test_wrong_use_starts_nothing(comm, call, kind, text):
    with pytest.raises(kind, match="^" + text):
        call(comm)
    assert engine_of(comm).started == []
