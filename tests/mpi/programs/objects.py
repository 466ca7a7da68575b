"""The lower-case methods: objects with arrays and without, short and long; then a rank dies.

    hopcoll run -n 4 -m tests.mpi.programs.objects

Each rank that gets so far prints a line of JSON. With three ranks or more, the last but one kills
itself in the middle, between two calls.
"""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
from mpi4py import MPI

import hopcoll
from hopcoll import errors


def short(rank: int) -> dict[str, object]:
    return {"rank": rank, "text": "x" * rank, "none": None, "few": np.arange(rank)}


def long(rank: int) -> dict[str, object]:
    """Arrays of several dtypes, orders and shapes; one is empty, one is not contiguous."""
    return {
        "steps": np.arange(50_000.0) + rank,
        "bits": np.arange(3 * rank) % 2 == 0,
        "square": np.asfortranarray(np.arange(12, dtype="i2").reshape(3, 4) * rank),
        "cut": np.arange(100)[::7],
        "text": "y" * 5000,
        "bytes": bytearray(b"z" * rank),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def without_deaths(comm: hopcoll.Communicator) -> None:
    rank, size = comm.rank, comm.size
    everyone = tuple(range(size))
    for make in (short, long):
        mine, all_ = make(rank), [make(r) for r in everyone]
        for root in everyone:
            at_root = rank == root
            assert same(comm.bcast(mine if at_root else None, root), make(root))
            assert comm.outcome.contributors == everyone
            gathered = comm.gather(mine, root)
            assert same(gathered, all_) if at_root else gathered is None
            assert same(comm.scatter(iter(all_) if at_root else None, root), mine)
        assert same(comm.allgather(mine), all_)
        assert same(comm.alltoall([make(10 * rank + r) for r in everyone]),
                    [make(10 * r + rank) for r in everyone])  # fmt: skip
    comm.barrier()
    received = comm.bcast(long(0), 0)
    received["steps"][:] = 0  # what arrives can be written to
    # Folds: in the order of the ranks.
    words = [str(r) for r in everyone]
    assert comm.allreduce(words[rank]) == "".join(words)
    assert comm.allreduce(rank, hopcoll.MAX) == size - 1
    assert comm.allreduce(rank + 0.0, hopcoll.AVG) == (size - 1) / 2
    assert comm.allreduce(rank > 0, hopcoll.LOR) is (size > 1)
    assert comm.allreduce((rank, -rank), MPI.MAXLOC) == (size - 1, 1 - size)
    assert comm.scan([rank], lambda a, b: a + b) == list(range(rank + 1))
    assert comm.exscan(words[rank]) == ("".join(words[:rank]) or None)
    for root in everyone:
        product = comm.reduce(rank + 1, hopcoll.PROD, root)
        assert product == (np.prod(np.arange(size) + 1) if rank == root else None)


def wrong_use(comm: hopcoll.Communicator) -> None:
    """Nothing is sent, so the order of calls stays what it was."""
    with pytest.raises(ValueError, match="^sendobj has 0 objects"):
        comm.scatter([], comm.rank)
    with pytest.raises(TypeError, match="^sendobj must be a sequence"):
        comm.alltoall(None)
    with pytest.raises(TypeError, match="^op must be an operation or a callable"):
        comm.allreduce(1, "SUM")
    with pytest.raises(ValueError, match="^root must be from 0 to"):
        comm.bcast(1, comm.size)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        comm.allgather(lambda: None)
    comm.barrier()


def with_a_death(comm: hopcoll.Communicator) -> None:
    victim = comm.size - 2
    if comm.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    left = tuple(r for r in range(comm.size) if r != victim)
    for make in (short, long):
        want = [make(r) if r != victim else None for r in range(comm.size)]
        while True:  # until the death is known, an operation of before may still stand
            got = comm.allgather(make(comm.rank))
            if comm.outcome.contributors == left:
                break
        assert same(got, want)
        got = comm.alltoall([make(r) for r in range(comm.size)])
        assert same(got, [make(comm.rank) if r != victim else None for r in range(comm.size)])
        got = comm.gather(make(comm.rank), left[-1])
        assert same(got, want) if comm.rank == left[-1] else got is None
    assert comm.allreduce([comm.rank]) == list(left)
    with pytest.raises(errors.RankFailedError):
        comm.bcast(None, victim)
    with pytest.raises(errors.RankFailedError):
        comm.scatter(None, victim)
    assert comm.gather(1, victim) is None
    assert comm.outcome.contributors == left


def main() -> None:
    comm = hopcoll.init(timeout_s=30)
    without_deaths(comm)
    wrong_use(comm)
    if comm.size > 2:
        with_a_death(comm)
    comm.barrier()
    os.write(1, (json.dumps({"rank": comm.rank, "alive": comm.alive}) + "\n").encode())


if __name__ == "__main__":
    main()
