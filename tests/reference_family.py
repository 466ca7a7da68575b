"""What Gather, Allgather, Scatter, Alltoall, Reduce_scatter, Scan and Exscan must compute.

Plain NumPy, as in `tests.reference`, and the authority: a result must have the same bits. Inputs
are given for all ranks, `contributors` says whose count; all ranks are numbered as at the start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tests.reference import left_fold

#: As the engine numbers them.
GATHER, ALLGATHER, SCATTER, ALLTOALL, REDUCE_SCATTER, SCAN, EXSCAN = range(4, 11)


def gather_twin(
    blocks: Mapping[int, np.ndarray], contributors: Collection[int]
) -> list[np.ndarray]:
    """Return the blocks that Gather and Allgather put together, by rank.

    Parameters
    ----------
    blocks : mapping of int to ndarray
        The block of each rank, of any lengths. Who is no contributor leaves zero bytes.
    contributors : collection of int
    """
    return [
        blocks[rank] if rank in contributors else np.zeros_like(blocks[rank])
        for rank in sorted(blocks)
    ]


def alltoall_twin(
    sent: Mapping[int, Sequence[np.ndarray]], contributors: Collection[int], rank: int
) -> list[np.ndarray]:
    """Return the blocks that a rank receives in an Alltoall, by source.

    Parameters
    ----------
    sent : mapping of int to sequence of ndarray
        ``sent[source][dest]``, of any lengths. Who is no contributor leaves zero bytes.
    contributors : collection of int
    rank : int
        The receiver.
    """
    return gather_twin({source: sent[source][rank] for source in sent}, contributors)


def reduce_scatter_twin(
    inputs: Mapping[int, np.ndarray],
    contributors: Collection[int],
    counts: Sequence[int],
    rank: int,
    *,
    eager_bytes: int,
    redop: int,
) -> np.ndarray:
    """Return a rank's part of the result of Reduce_scatter.

    A left fold in the order of the ranks. It starts at rank 0 for inputs of at most `eager_bytes`;
    in larger ones part b starts behind its owner, at rank ``b + 1``, and ends there.

    Parameters
    ----------
    inputs : mapping of int to ndarray
        The whole input of each rank.
    contributors : collection of int
    counts : sequence of int
        The number of items of each part.
    rank : int
        Whose part.
    eager_bytes : int
        The engine's bound between small and large.
    redop : int
        The code of the operation.
    """
    size = len(counts)
    first = sum(counts[:rank])
    start = 0 if inputs[rank].nbytes <= eager_bytes else rank + 1
    order = [(start + place) % size for place in range(size)]
    part = slice(first, first + counts[rank])
    return left_fold([inputs[one][part] for one in order if one in contributors], redop)


def scan_twin(
    inputs: Mapping[int, np.ndarray],
    contributors: Collection[int],
    rank: int,
    *,
    redop: int,
    exclusive: bool,
) -> np.ndarray | None:
    """Return a rank's result of Scan or Exscan, a left fold from rank 0; None: it is undefined.

    Parameters
    ----------
    inputs : mapping of int to ndarray
    contributors : collection of int
    rank : int
        Whose result: that of the contributors up to it.
    redop : int
        The code of the operation.
    exclusive : bool
        Exscan: without the rank itself. The first contributor has no result.
    """
    before = [one for one in sorted(contributors) if one < rank + (not exclusive)]
    return left_fold([inputs[one] for one in before], redop) if before else None
