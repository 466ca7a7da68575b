"""Every verb of the pipeline over MPI: against its twin, wrongly used, given up, and killed.

argv: ``twins``, ``wrong``, ``given-up``, or ``kill VERB VICTIM``.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import pytest
from mpi4py import MPI

from cython_kernels import reduction
from cython_kernels.mpi_transport import MpiTransport
from cython_kernels.pipeline import PeerDiedError, PeerGaveUpError, Pipeline, TransferTimeout
from tests import reference_pipeline as twins
from tests.mpi.programs import ctrl_c

CHUNK_BYTES = 16_384
SIZES_BYTES = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 8 << 20)
LIMIT_S = 60.0
WINDOW = 8

comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size


def block_of(nbytes: int, salt: int) -> np.ndarray:
    return np.random.default_rng(salt).integers(0, 256, nbytes, np.uint8)


def chain(pipeline: Pipeline, block: np.ndarray, order: list[int], tag: int) -> None:
    """Pass a block along the ranks in `order`."""
    place = order.index(rank)
    if place == 0:
        pipeline.send(block, order[1], tag, LIMIT_S)
    elif place < len(order) - 1:
        pipeline.relay(block, order[place - 1], order[place + 1], tag, LIMIT_S)
    else:
        pipeline.receive(block, order[place - 1], tag, LIMIT_S)


def fold(
    pipeline: Pipeline, own: np.ndarray, result: np.ndarray, dtype: int, op: int, tag: int
) -> None:
    """Fold a block of every rank along the ranks, into `result` of the last."""
    if rank == 0:
        pipeline.send(own, 1, tag, LIMIT_S)
    else:
        dest = rank + 1 if rank + 1 < size else None
        pipeline.reduce(own, result, rank - 1, dest, dtype, op, tag, LIMIT_S)


# ---- against the twins --------------------------------------------------------------------


def check_chain(pipeline: Pipeline, nbytes: int) -> None:
    mine = block_of(nbytes, rank)
    twin = mine.copy()
    order = [*range(1, size), 0]
    place = order.index(rank)
    if place == 0:
        twins.send_twin(comm, twin, order[1], 1, CHUNK_BYTES)
    elif place < size - 1:
        twins.relay_twin(comm, twin, order[place - 1], [order[place + 1]], 1, CHUNK_BYTES)
    else:
        twins.receive_twin(comm, twin, order[place - 1], 1, CHUNK_BYTES)
    chain(pipeline, mine, order, 1)
    np.testing.assert_array_equal(mine, twin)
    np.testing.assert_array_equal(mine, block_of(nbytes, 1))


def check_tree(pipeline: Pipeline, nbytes: int) -> None:
    """A binary tree over the ranks: an inner rank has one or two children."""
    mine = block_of(nbytes, rank)
    twin = mine.copy()
    parent = (rank - 1) // 2
    children = [child for child in (2 * rank + 1, 2 * rank + 2) if child < size]
    if rank == 0:
        for child in children:
            twins.send_twin(comm, twin, child, 2, CHUNK_BYTES)
            pipeline.send(mine, child, 2, LIMIT_S)
    else:
        twins.relay_twin(comm, twin, parent, children, 2, CHUNK_BYTES)
        pipeline.relay(mine, parent, children, 2, LIMIT_S)
    np.testing.assert_array_equal(mine, twin)


def check_fold(pipeline: Pipeline, nbytes: int, dtype: int, op: int) -> None:
    nbytes -= nbytes % reduction.itemsize_of(dtype)
    own = block_of(nbytes, rank)
    if dtype == reduction.FLOAT32:
        own = (own.view(np.uint32) % 1000 / np.float32(7)).astype(np.float32)
    before = own.tobytes()
    result, twin = np.zeros_like(own), np.zeros_like(own)
    if rank == 0:
        twins.send_twin(comm, own, 1, 3, CHUNK_BYTES)
    else:
        dest = rank + 1 if rank + 1 < size else None
        twins.reduce_twin_over(comm, own, twin, rank - 1, dest, dtype, op, 3, CHUNK_BYTES)
    fold(pipeline, own, result, dtype, op, 3)
    assert result.tobytes() == twin.tobytes()
    assert own.tobytes() == before


def check_twins(pipeline: Pipeline) -> None:
    for nbytes in SIZES_BYTES:
        check_chain(pipeline, nbytes)
        check_tree(pipeline, nbytes)
        check_fold(pipeline, nbytes, reduction.INT8, reduction.SUM)
        check_fold(pipeline, nbytes, reduction.FLOAT32, reduction.SUM)
        check_fold(pipeline, nbytes, reduction.UINT64, reduction.MAX)
    # Both ways between neighbours, under one tag and under two.
    for nbytes in SIZES_BYTES:
        if rank < 2:
            mine, theirs = block_of(nbytes, rank), np.zeros(nbytes, np.uint8)
            if rank == 0:
                pipeline.send(mine, 1, 7, LIMIT_S)
                pipeline.receive(theirs, 1, 7, LIMIT_S)
            else:
                pipeline.receive(theirs, 0, 7, LIMIT_S)
                pipeline.send(mine, 0, 7, LIMIT_S)
            np.testing.assert_array_equal(theirs, block_of(nbytes, 1 - rank))


# ---- wrong use ----------------------------------------------------------------------------


def check_wrong_use(pipeline: Pipeline) -> None:
    block, other = np.zeros(64, np.uint8), 1 - rank
    for wrong in (-1, 2, rank):
        with pytest.raises(ValueError, match="dest"):
            pipeline.send(block, wrong)
    with pytest.raises(ValueError, match="not all different"):
        pipeline.relay(block, other, [other])
    with pytest.raises(ValueError, match="tag"):
        pipeline.send(block, other, -1)
    with pytest.raises(TypeError, match="buffer"):
        pipeline.send(None, other)
    with pytest.raises(BufferError):
        pipeline.receive(b"read-only", other)
    with pytest.raises((BufferError, ValueError)):
        pipeline.send(np.zeros((4, 4))[:, ::2], other)
    for result, match in ((block, "overlaps"), (np.zeros(32, np.uint8), "own has 64")):
        with pytest.raises(ValueError, match=match):
            pipeline.reduce(block, result, other, None, reduction.INT8, reduction.SUM)
    with pytest.raises(ValueError, match="supported"):
        result = np.zeros_like(block)
        pipeline.reduce(block, result, other, None, reduction.COMPLEX64, reduction.MAX)
    for chunk_bytes, window in ((0, 1), (24, 1), (16, 0)):
        with pytest.raises(ValueError):
            Pipeline(pipeline.transport, chunk_bytes, window)

    # Lengths that differ: the sender is told how, the receiver that it ended.
    many = CHUNK_BYTES * 20
    for sent, expected in ((100, 200), (200, 100), (many, many + 1), (many, 5), (5, 0), (0, 5)):
        if rank == 0:
            with pytest.raises(ValueError, match=f"{sent} bytes .* expects {expected}"):
                pipeline.send(bytes(sent), 1, 1, LIMIT_S)
        elif expected:
            with pytest.raises(PeerGaveUpError) as caught:
                pipeline.receive(bytearray(expected), 0, 1, LIMIT_S)
            assert (caught.value.peer, caught.value.watermark_bytes) == (0, 0)
        else:
            pipeline.receive(bytearray(), 0, 1, LIMIT_S)
    go_on(pipeline)


def go_on(pipeline: Pipeline) -> None:
    """After all that: two ranks still exchange every size, under the same tag."""
    for nbytes in SIZES_BYTES:
        block = block_of(nbytes, 5)
        if rank == 0:
            pipeline.send(block, 1, 1, LIMIT_S)
        else:
            received = np.zeros(nbytes, np.uint8)
            pipeline.receive(received, 0, 1, LIMIT_S)
            np.testing.assert_array_equal(received, block)


# ---- giving up ----------------------------------------------------------------------------


def check_given_up(pipeline: Pipeline) -> None:
    for nbytes in (1, CHUNK_BYTES * 3, 4 << 20):
        # The receiver has no sender, and gives up; the sender that comes late hears of it.
        if rank == 1:
            for how in ("timeout", "interrupt"):
                received = bytearray(nbytes)

                def receive(into: bytearray = received) -> None:
                    pipeline.receive(into, 0, 1, LIMIT_S)

                if how == "timeout":
                    with pytest.raises(TransferTimeout, match=f"0 of {nbytes} .* rank 0") as caught:
                        pipeline.receive(received, 0, 1, 0.05)
                    assert (caught.value.peer, caught.value.watermark_bytes) == (0, 0)
                else:
                    with pytest.raises(KeyboardInterrupt):
                        ctrl_c.comes_inside(receive)
                        receive()
                assert pipeline.open_count
            comm.send(None, 0, 9)
            assert pipeline.settle(LIMIT_S)
            assert pipeline.open_count == 0
            assert received == bytes(nbytes), "a void writes nothing"
        else:
            comm.recv(source=1, tag=9)
            for _ in range(2):
                with pytest.raises(PeerGaveUpError) as caught:
                    pipeline.send(bytes([1]) * nbytes, 1, 1, LIMIT_S)
                assert (caught.value.peer, caught.value.watermark_bytes) == (1, 0)
        go_on(pipeline)
        # The sender has no receiver, and gives up; the receiver hears of it at the next send.
        if rank == 0:
            with pytest.raises(TransferTimeout, match=f"0 of {nbytes} .* rank 1"):
                pipeline.send(bytes([2]) * nbytes, 1, 1, 0.05)
            comm.send(None, 1, 9)
        else:
            comm.recv(source=0, tag=9)
            with pytest.raises(PeerGaveUpError):
                pipeline.receive(bytearray(nbytes), 0, 1, LIMIT_S)
        go_on(pipeline)
        assert pipeline.settle(LIMIT_S)


# ---- deaths -------------------------------------------------------------------------------


def check_death(verb: str, victim: int) -> None:
    """A chain loses a rank in the middle of 8 MiB; its neighbours say who, and how far."""
    nbytes = 8 << 20
    chunks = nbytes // CHUNK_BYTES
    # Received and sent together: no relay has received more than that many.
    after = chunks // 2
    with_fault = {"kill_after_chunks": after} if rank == victim else {}
    transport = MpiTransport(comm, 4096, LIMIT_S, b"")
    pipeline = Pipeline(transport, CHUNK_BYTES, WINDOW, **with_fault)
    own = np.full(nbytes, rank + 1, np.uint8)
    result = np.zeros(nbytes, np.uint8)
    if verb == "relay":
        result[:] = own
        expected = np.full(nbytes, 1, np.uint8)
    else:
        expected = np.full(nbytes, sum(range(1, rank + 2)), np.uint8)
    error: PeerDiedError | None = None
    try:
        if verb == "relay":
            chain(pipeline, result, list(range(size)), 1)
        else:
            fold(pipeline, own, result, reduction.UINT8, reduction.SUM, 1)
    except PeerDiedError as caught:
        error = caught
    assert rank != victim, "the fault did not fire"
    if rank == victim - 1:
        assert type(error) is PeerDiedError and error.peer == victim
        assert 0 < error.watermark_bytes <= (after + WINDOW) * CHUNK_BYTES
    elif rank == victim + 1:
        assert type(error) is PeerDiedError and error.peer == victim
        assert error.watermark_bytes < nbytes
    elif rank < victim:
        assert error is None
    else:
        assert type(error) is PeerGaveUpError and error.peer == rank - 1
        assert error.watermark_bytes < nbytes
    if rank:
        arrived = nbytes if rank < victim else error.watermark_bytes
        np.testing.assert_array_equal(result[:arrived], expected[:arrived])
    # The dead is known now; the living exchange all sizes, and nothing is left behind.
    if error is not None and error.peer == victim:
        for attempt in (pipeline.send, pipeline.receive):
            with pytest.raises(PeerDiedError) as again:
                attempt(bytearray(100), victim, 1, LIMIT_S)
            assert again.value.watermark_bytes == 0
    survivors = [peer for peer in range(size) if peer != victim]
    for number, n in enumerate(SIZES_BYTES if len(survivors) > 1 else ()):
        block = block_of(n, number) if rank == survivors[0] else np.zeros(n, np.uint8)
        chain(pipeline, block, survivors, 1)
        np.testing.assert_array_equal(block, block_of(n, number))
    assert pipeline.settle(LIMIT_S)
    assert pipeline.open_count == 0
    assert transport.error_class == 0
    assert transport.close(LIMIT_S)


def main(how: str, *words: str) -> None:
    if how == "kill":
        check_death(words[0], int(words[1]))
    else:
        transport = MpiTransport(comm, 4096, LIMIT_S, b"")
        pipeline = Pipeline(transport, CHUNK_BYTES, WINDOW)
        check = {"twins": check_twins, "wrong": check_wrong_use, "given-up": check_given_up}[how]
        check(pipeline)
        assert pipeline.open_count == 0
        assert transport.error_class == 0
        # Whoever leaves first must not leave a peer without answers.
        until_s = time.monotonic() + LIMIT_S
        done = comm.Ibarrier()
        while not done.Test():
            assert time.monotonic() < until_s
            pipeline.settle(0.001)
        assert transport.close(LIMIT_S)
    os.write(1, f"rank {rank} is done\n".encode())


main(*sys.argv[1:])
