"""Who gives how much to whom in the operations of a chaos run, and what that makes of each result.

Written down a second time, from the documentation: nothing of the engine is used, or imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hopcoll.chaos.plan import Operation

__all__ = [
    "FOLDS",
    "contribution_bytes",
    "digest_of",
    "expected_share",
    "lengths",
    "pairs",
    "received_items",
    "sent_items",
    "whole_bytes",
]

#: Kinds whose inputs are combined.
FOLDS = ("allreduce", "reduce", "reduce_scatter", "scan", "exscan")


def lengths(operation: Operation, size: int) -> list[int]:
    """Return the items of the block of each rank; of each pair, in an Alltoall, by their sum."""
    if not operation.vector:
        return [operation.count] * size
    return [(operation.count + 37 * which) % (operation.count + 3) for which in range(size)]


def _pair(operation: Operation, size: int, source: int, dest: int) -> int:
    """Items from one rank to another in an Alltoall; the same both ways."""
    return lengths(operation, size)[(source + dest) % size]


def sent_items(operation: Operation, size: int, rank: int) -> int:
    """Return how many items a rank puts in."""
    kind = operation.kind
    if kind in ("gather", "allgather"):
        return lengths(operation, size)[rank]
    if kind == "reduce_scatter" or (kind == "scatter" and rank == operation.root):
        return sum(lengths(operation, size))
    if kind == "alltoall":
        return sum(_pair(operation, size, rank, dest) for dest in range(size))
    return 0 if kind == "scatter" else operation.count


def received_items(operation: Operation, size: int, rank: int) -> int:
    """Return how many items a rank's result has."""
    kind = operation.kind
    if kind == "allgather" or (kind == "gather" and rank == operation.root):
        return sum(lengths(operation, size))
    if kind in ("scatter", "reduce_scatter"):
        return lengths(operation, size)[rank]
    if kind == "alltoall":
        return sum(_pair(operation, size, source, rank) for source in range(size))
    return 0 if kind in ("gather", "barrier") else operation.count


def pairs(operation: Operation, size: int, rank: int) -> list[int]:
    """Return the items that a rank of an Alltoall exchanges with each."""
    return [_pair(operation, size, rank, other) for other in range(size)]


def contribution_bytes(operation: Operation, size: int) -> int:
    """Return the bytes that a rank, or the root, puts in: what decides between the two paths."""
    blocks = size if operation.kind in ("scatter", "alltoall", "reduce_scatter") else 1
    if operation.vector and operation.kind == "reduce_scatter":
        return sum(lengths(operation, size)) * np.dtype(operation.dtype).itemsize
    return blocks * operation.nbytes


def whole_bytes(operation: Operation, size: int) -> int:
    """Return the bytes of an operation: of one rank's buffer, or of all blocks together."""
    blocks = operation.kind in ("gather", "allgather", "scatter", "alltoall", "reduce_scatter")
    return operation.nbytes * (size if blocks else 1)


def digest_of(array: np.ndarray) -> str:
    """Return 128 bits of the SHA-256 of an array's bytes, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()[:32]


def expected_share(
    operation: Operation,
    size: int,
    rank: int,
    small: bool,
    inputs: Mapping[int, np.ndarray],
    fold: Callable[[list[np.ndarray]], np.ndarray],
) -> np.ndarray | None:
    """Return what a rank must have, of an operation in which ranks own different blocks.

    Parameters
    ----------
    operation : Operation
        Not a Bcast, Reduce, Allreduce or Barrier.
    size, rank : int
    small : bool
        Whether it takes the short path, whose folds all start at rank 0.
    inputs : mapping of int to numpy.ndarray
        Of the contributors (in a Scatter of the root alone).
    fold : callable
        Reduces a list from left to right.

    Returns
    -------
    numpy.ndarray or None
        None where the result is undefined: at the first contributor of an Exscan.
    """
    kind, dtype = operation.kind, operation.dtype
    if kind in ("scan", "exscan"):
        last = rank + 1 if kind == "scan" else rank
        pieces = [inputs[other] for other in range(last) if other in inputs]
        return fold(pieces) if pieces else None
    if kind == "reduce_scatter":
        counts = lengths(operation, size)
        begin = sum(counts[:rank])
        start = 0 if small else rank + 1
        order = [(start + place) % size for place in range(size)]
        items = slice(begin, begin + counts[rank])
        return fold([inputs[other][items] for other in order if other in inputs])
    if kind == "scatter":
        counts = lengths(operation, size)
        begin = sum(counts[:rank])
        return inputs[operation.root][begin : begin + counts[rank]]
    blocks = []
    for source in range(size):
        if kind == "alltoall":
            begin = sum(_pair(operation, size, source, dest) for dest in range(rank))
            count = _pair(operation, size, source, rank)
        else:
            begin, count = 0, lengths(operation, size)[source]
        # The block of who did not contribute is zero bytes.
        block = np.zeros(count, dtype)
        if source in inputs:
            block = inputs[source][begin : begin + count]
        blocks.append(block)
    return np.concatenate(blocks)
