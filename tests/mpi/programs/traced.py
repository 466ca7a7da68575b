"""Operations of all sorts, a split, and a death in the middle: ``traced.py DEAD``."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np

import hopcoll


def main(dead: int) -> None:
    comm = hopcoll.init()
    added = hopcoll.Op.Create(lambda left, right: left + right)
    half = comm.Split(comm.rank % 2, comm.rank)
    for k in range(8):
        given = np.full(100_000 + k, comm.rank + 1.0, np.float32)
        result = np.zeros_like(given)
        if k == 4 and comm.rank == dead:
            comm.Iallreduce(given, result)
            os.kill(os.getpid(), signal.SIGKILL)
        comm.Allreduce(given, result)
        comm.Allreduce(given, result, quorum=2)
        comm.Allreduce(given, result, op=added)
        half.Allreduce(given, result)
        comm.Bcast(result, root=3)
        comm.allgather({"rank": comm.rank, "k": k})
    print(f"rank {comm.rank} is at its end", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
