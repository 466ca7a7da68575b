"""One kind of the family, three times at once, in a job that loses ranks in the middle of it.

    HOPCOLL_FAULT=rank=2,op=1,chunk=40 \\
        hopcoll run -n 4 -m tests.mpi.programs.family_faults scatterv ROOT IN_PLACE ON_FAILURE

Who survives compares its results with the twins over the contributors that the outcomes name, and
prints a line of JSON with all that must be alike at all survivors.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
from mpi4py import MPI

import hopcoll
from cython_kernels import reduction
from hopcoll import errors, ops
from tests.mpi.programs.collectives import EAGER_BYTES, Finish
from tests.mpi.programs.family import PERMUTED, Family, exchange
from tests.reference import DTYPES
from tests.reference_family import EXSCAN, SCAN

CHUNK_BYTES = 1 << 14
#: One MiB, and what the ranks have in the vector forms: one of them nothing.
COUNT = (1 << 17) + 3
VECTOR = [COUNT, 0, COUNT + 5, 3 * COUNT // 4]
TIMEOUT_S = 30


class Hurt(Family):
    """Takes outcomes as they come, and notes them."""

    def __init__(self, comm: hopcoll.Communicator) -> None:
        super().__init__(comm)
        self.seen: list[dict[str, Any]] = []

    def contributors(self, request: hopcoll.Request, *what: object) -> tuple[int, ...] | None:
        try:
            outcome = request.wait()
        except errors.RankFailedError as error:
            self.seen.append({"failed": error.ranks, "epoch": error.epoch})
            return None
        if outcome.root_lost:
            self.seen.append({"root_lost": True, "epoch": outcome.epoch})
            return None
        self.seen.append({"contributors": outcome.contributors, "epoch": outcome.epoch})
        self.expect(self.me in outcome.contributors, *what, "is not with", outcome)
        return outcome.contributors


def start(run: Hurt, form: str, root: int, in_place: bool) -> Finish:
    dtype, code, size = DTYPES[reduction.FLOAT64], reduction.FLOAT64, run.comm.size
    equal = [COUNT] * size
    matrix = exchange(VECTOR, symmetric=True)
    if form == "gather":
        return run.gather(dtype, equal, root, in_place)
    if form == "gatherv":
        return run.gather(dtype, VECTOR, root, in_place, PERMUTED)
    if form == "allgather":
        return run.gather(dtype, equal, None, in_place)
    if form == "allgatherv":
        return run.gather(dtype, VECTOR, None, in_place, PERMUTED)
    if form == "scatter":
        return run.scatter(dtype, equal, root, in_place)
    if form == "scatterv":
        return run.scatter(dtype, VECTOR, root, in_place, PERMUTED)
    if form == "alltoall":
        return run.alltoall(dtype, [equal] * size, in_place)
    if form == "alltoallv":
        return run.alltoall(dtype, matrix, in_place, PERMUTED)
    if form == "reduce_scatter_block":
        return run.reduce_scatter(code, ops.SUM, equal, in_place)
    if form == "reduce_scatter":
        return run.reduce_scatter(code, ops.AVG, VECTOR, in_place, "given")
    return run.scan(SCAN if form == "scan" else EXSCAN, code, ops.SUM, 2 * COUNT, in_place)


def main(form: str, root: str, in_place: str, on_failure: str) -> None:
    comm = hopcoll.Communicator(
        MPI.COMM_WORLD,
        chunk_bytes=CHUNK_BYTES,
        eager_bytes=EAGER_BYTES,
        on_failure=on_failure,
        timeout_s=TIMEOUT_S,
    )
    run = Hurt(comm)
    comm.Barrier(on_failure="survivors")  # operation 0: the first that moves chunks is 1
    for finish in [start(run, form, int(root), bool(int(in_place))) for _ in range(3)]:
        finish()
    total = np.empty(COUNT)
    after = comm.Allreduce(np.full(COUNT, 2.0**comm.rank), total, on_failure="survivors")
    want = sum(2.0**rank for rank in after.contributors)
    run.expect(bool((total == want).all()), "Allreduce after it", after)
    small = comm.Barrier(on_failure="survivors")
    line = {
        "rank": comm.rank,
        "wrong": run.failures,
        "seen": run.seen,
        "after": after.contributors,
        "last": small.contributors,
        "alive": comm.alive,
        "epoch": comm.epoch,
    }
    # One write, so that the lines of two ranks do not mix.
    os.write(1, (json.dumps(line) + "\n").encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
