"""Operations of the user's: ufuncs and functions, that commute and that do not; one that raises.

    hopcoll run -n 3 -m tests.mpi.programs.user_ops [raise]

Each rank that gets so far prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest
from mpi4py import MPI

import hopcoll
from hopcoll import Op

COUNTS = (0, 1, 300, 20_001)
RANK = MPI.COMM_WORLD.rank
ODD_ONE = 1


def then(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """First x -> a.real * x + a.imag, then the same with b: associative, but not commutative."""
    return a.real * b.real + 1j * (b.real * a.imag + b.imag)


def raises_at_one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if RANK == ODD_ONE:
        raise ZeroDivisionError("at rank 1")
    return a + b


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What no operation may be: it depends on who computes it."""
    return a + b + RANK


def replicas_are_compared(comm: hopcoll.Communicator) -> None:
    small, result = np.ones(3), np.empty(3)
    for count in (0, 3, 30_000):
        data, place = np.ones(count), np.empty(count)
        assert comm.Allreduce(data, place, check="hash").contributors == tuple(range(comm.size))
        comm.Bcast(place, root=comm.size - 1, check="hash")
    # What is small each rank folds for itself.
    with pytest.raises(hopcoll.errors.DivergedError, match="^Allreduce: results differ") as caught:
        comm.Allreduce(small, result, Op.Create(differs, commute=True), check="hash")
    assert caught.value.groups == tuple((rank,) for rank in range(comm.size))
    with pytest.raises(ValueError, match="^check must be 'hash' or None"):
        comm.Bcast(result, check="crc")
    comm.Allreduce(small, result, check="hash")      # it goes on
    assert (result == comm.size).all()


def close(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.allclose(got, want, rtol=1e-12))


def without_faults(comm: hopcoll.Communicator) -> None:
    rank, size = comm.rank, comm.size
    logs, chain = Op.Create(np.logaddexp, commute=True), Op.Create(then)
    for count in COUNTS:
        numbers = [np.random.default_rng([count, r]).random(count) for r in range(size)]
        steps = [x + 1j * x[::-1] for x in numbers]
        result = np.empty(count)
        comm.Allreduce(numbers[rank], result, logs)
        assert close(result, reduce(np.logaddexp, numbers))
        result[:] = numbers[rank]
        comm.Allreduce(hopcoll.IN_PLACE, result, logs)
        assert close(result, reduce(np.logaddexp, numbers))
        comm.Scan(numbers[rank], result, logs)
        assert close(result, reduce(np.logaddexp, numbers[: rank + 1]))
        together = np.concatenate([numbers[rank]] * size)
        comm.Reduce_scatter_block(together, result, logs)
        assert close(result, reduce(np.logaddexp, numbers))
        # The order of the ranks, to the bit.
        ordered = np.empty(count, complex)
        comm.Allreduce(steps[rank], ordered, chain)
        assert (ordered == reduce(then, steps)).all()
        comm.Iexscan(steps[rank], ordered, chain).Wait()
        assert rank == 0 or (ordered == reduce(then, steps[:rank])).all()
        for root in range(size):
            comm.Reduce(steps[rank], ordered if rank == root else None, chain, root)
            assert rank != root or (ordered == reduce(then, steps)).all()
        with pytest.raises(TypeError, match="^op then does not commute"):
            comm.Reduce_scatter_block(np.concatenate([steps[rank]] * size), ordered, chain)
    with pytest.raises(TypeError, match="^sendbuf has dtype"):
        comm.Allreduce(np.zeros(3, "M8[s]"), np.zeros(3, "M8[s]"), logs)


def one_raises(comm: hopcoll.Communicator, count: int) -> None:
    op = Op.Create(raises_at_one, commute=True)
    result = np.zeros(count)
    if RANK == ODD_ONE:
        with pytest.raises(ZeroDivisionError, match="^at rank 1"):
            comm.Allreduce(np.ones(count), result, op)
        with pytest.raises(hopcoll.errors.ClosedError):
            comm.Barrier()
        return
    outcome = comm.Allreduce(np.ones(count), result, op)
    assert (result == len(outcome.contributors)).all()
    while ODD_ONE in outcome.contributors:
        outcome = comm.Allreduce(np.ones(count), result)
    assert (result == comm.size - 1).all()


def main() -> None:
    comm = hopcoll.init(timeout_s=30, chunk_bytes=4096, eager_bytes=1024)
    if sys.argv[1:] == ["raise"]:
        for count in (20_001, 3):
            with hopcoll.Communicator(MPI.COMM_WORLD, timeout_s=30) as one:
                one_raises(one, count)
    else:
        without_faults(comm)
    if comm.size > 1:
        replicas_are_compared(comm)
    comm.Barrier()
    os.write(1, (json.dumps({"rank": comm.rank}) + "\n").encode())


if __name__ == "__main__":
    main()
