"""What the verbs of cython_kernels.pipeline must do, in plain Python over blocking MPI calls.

One chunk at a time, no window, no deaths: slow, short, and the authority on the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from mpi4py import MPI

from tests.reference import DTYPES, reduce_twin


def chunks(nbytes: int, chunk_bytes: int) -> Iterator[slice]:
    for start in range(0, nbytes, chunk_bytes):
        yield slice(start, min(start + chunk_bytes, nbytes))


def send_twin(comm: MPI.Comm, block: np.ndarray, dest: int, tag: int, chunk_bytes: int) -> None:
    for chunk in chunks(block.nbytes, chunk_bytes):
        comm.Send(block.view(np.uint8)[chunk], dest, tag)


def receive_twin(
    comm: MPI.Comm, block: np.ndarray, source: int, tag: int, chunk_bytes: int
) -> None:
    for chunk in chunks(block.nbytes, chunk_bytes):
        comm.Recv(block.view(np.uint8)[chunk], source, tag)


def relay_twin(
    comm: MPI.Comm,
    block: np.ndarray,
    source: int,
    dests: Sequence[int],
    tag: int,
    chunk_bytes: int,
) -> None:
    for chunk in chunks(block.nbytes, chunk_bytes):
        comm.Recv(block.view(np.uint8)[chunk], source, tag)
        for dest in dests:
            comm.Send(block.view(np.uint8)[chunk], dest, tag)


def reduce_twin_over(
    comm: MPI.Comm,
    own: np.ndarray,
    result: np.ndarray,
    source: int,
    dest: int | None,
    dtype: int,
    op: int,
    tag: int,
    chunk_bytes: int,
) -> None:
    for chunk in chunks(own.nbytes, chunk_bytes):
        mine = own.view(np.uint8)[chunk]
        incoming = np.empty_like(mine)
        comm.Recv(incoming, source, tag)
        folded = reduce_twin(dtype, op, incoming.view(DTYPES[dtype]), mine.view(DTYPES[dtype]))
        result.view(np.uint8)[chunk] = folded.view(np.uint8)
        if dest is not None:
            comm.Send(result.view(np.uint8)[chunk], dest, tag)
