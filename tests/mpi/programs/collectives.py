"""Compare every kind of collective with its twin; one job runs all the cases of one size.

    mpirun -n 3 python -m tests.mpi.programs.collectives

Every rank makes the inputs of all ranks from the number of the case, so each of them checks its own
result against the twin. A rank that finds a difference goes on, or the others would stop with it;
it lists what it found at the end, and its exit code is 1.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

import hopcoll
from cython_kernels import reduction
from hopcoll import ops
from tests.reference import (
    ALLREDUCE,
    BCAST,
    DTYPES,
    REDUCE,
    same_bits,
    supported_twin,
    value_tree,
)

# Small ones, so that little data makes many chunks and windows.
CHUNK_BYTES, WINDOW_CHUNKS, EAGER_BYTES = 1024, 4, 2048
MARGIN = 5
CANARY = 0x5A

Finish = Callable[[], None]

OPS = [getattr(ops, name) for name in reduction.OP_NAMES if name != "NONE"]
ALL_CODES = range(reduction.BYTES)
# One of each width and family: what depends on the root or the count does so for all alike.
SOME_CODES = (reduction.INT8, reduction.FLOAT32, reduction.COMPLEX128)


def counts_of(code: int) -> list[int]:
    """None, few, both sides of the short path's end, whole chunks, windows and a rest."""
    items = DTYPES[code].itemsize
    chunk = CHUNK_BYTES // items
    eager = EAGER_BYTES // items
    return [0, 1, 7, eager, eager + 1, 4 * chunk, (3 * WINDOW_CHUNKS + 2) * chunk * 2 + 3]


def random_array(rng: np.random.Generator, code: int, count: int) -> np.ndarray:
    dtype = DTYPES[code]
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, count, dtype, endpoint=True)
    if dtype.kind == "b":
        return rng.integers(0, 2, count).astype(bool)
    array = rng.normal(1.0, 0.5, count)
    if dtype.kind == "c":
        return (array + 1j * rng.normal(0.0, 0.5, count)).astype(dtype)
    array[rng.random(count) < 0.01] = 0.0
    array[rng.random(count) < 0.002] = np.inf
    array[rng.random(count) < 0.002] = np.nan
    return array.astype(np.float32).astype(dtype)


class Guarded:
    """An array inside a larger piece of memory whose margins must stay as they are."""

    def __init__(self, dtype: np.dtype, count: int) -> None:
        margin = MARGIN * dtype.itemsize
        self.memory = np.full(count * dtype.itemsize + 2 * margin, CANARY, np.uint8)
        self.margin = margin
        self.array = self.memory[margin : len(self.memory) - margin].view(dtype)

    def intact(self) -> bool:
        margin = self.margin
        edges = np.concatenate([self.memory[:margin], self.memory[len(self.memory) - margin :]])
        return bool((edges == CANARY).all())


class Runner:
    def __init__(self, comm: hopcoll.Communicator) -> None:
        self.comm = comm
        self.everybody = tuple(range(comm.size))
        self.failures: list[str] = []
        self.number = 0

    def inputs(self, code: int, count: int) -> dict[int, np.ndarray]:
        self.number += 1
        return {
            rank: random_array(np.random.default_rng([self.number, rank]), code, count)
            for rank in self.everybody
        }

    def expect(self, holds: bool, *what: object) -> None:
        if not holds:
            self.failures.append(" ".join(str(part) for part in (self.number, *what)))

    def expect_outcome(self, outcome: hopcoll.Outcome, *what: object) -> None:
        self.expect(outcome.contributors == self.everybody, *what, outcome)
        self.expect(outcome.epoch == 0 and not outcome.root_lost, *what, outcome)

    def expect_bits(self, got: np.ndarray, want: np.ndarray, *what: object) -> None:
        if not same_bits(got, want):
            differ = np.flatnonzero(got.view(np.uint8) != want.view(np.uint8))
            self.expect(False, *what, "differs at bytes", differ[:4], "of", got.nbytes)

    def reduction(
        self, kind: int, code: int, op: hopcoll.Op, count: int, root: int, in_place: bool
    ) -> Finish:
        """Start a reduction; the function that comes back waits for it and checks everything."""
        what = (
            *("Reduce" if kind == REDUCE else "Allreduce", DTYPES[code].name, op, "count", count),
            *("root", root, "in place" if in_place else ""),
        )
        comm = self.comm
        inputs = self.inputs(code, count)
        mine = inputs[comm.rank].copy()
        has_result = kind == ALLREDUCE or comm.rank == root
        result = Guarded(DTYPES[code], count)
        sendbuf: object = mine
        if in_place and has_result:
            result.array[:] = mine
            sendbuf = MPI.IN_PLACE
        if kind == ALLREDUCE:
            request = comm.Iallreduce(sendbuf, result.array, op)
        else:
            request = comm.Ireduce(sendbuf, result.array if has_result else None, op, root)

        def finish() -> None:
            self.expect_outcome(request.wait(), *what)
            want = value_tree(
                inputs,
                self.everybody,
                kind=kind,
                size=comm.size,
                eager_bytes=EAGER_BYTES,
                redop=op.code,
                root=root,
            )
            if has_result:
                self.expect_bits(result.array, want, *what)
            else:
                self.expect(bool((result.memory == CANARY).all()), *what, "was written to")
            self.expect(result.intact(), *what, "was written past its ends")
            self.expect(same_bits(mine, inputs[comm.rank]), *what, "changed its input")

        return finish

    def broadcast(self, code: int, count: int, root: int) -> Finish:
        what = ("Bcast", DTYPES[code].name, "count", count, "root", root)
        inputs = self.inputs(code, count)
        result = Guarded(DTYPES[code], count)
        if self.comm.rank == root:
            result.array[:] = inputs[root]
        request = self.comm.Ibcast(result.array, root)

        def finish() -> None:
            self.expect_outcome(request.wait(), *what)
            want = value_tree(
                inputs,
                self.everybody,
                kind=BCAST,
                size=self.comm.size,
                eager_bytes=EAGER_BYTES,
                root=root,
            )
            self.expect_bits(result.array, want, *what)
            self.expect(result.intact(), *what, "was written past its ends")

        return finish

    def barrier(self) -> Finish:
        request = self.comm.Ibarrier()
        return lambda: self.expect_outcome(request.wait(), "Barrier")


def every_dtype_and_op(run: Runner) -> None:
    """Each dtype with each operation that takes it, at changing roots."""
    roots = itertools.cycle(run.everybody)
    for code, op in itertools.product(ALL_CODES, OPS):
        if not supported_twin(code, op.code):
            continue
        _, _, few, _, _, chunks, _ = counts_of(code)
        for count in (few, chunks + 1):
            run.reduction(ALLREDUCE, code, op, count, 0, False)()
            run.reduction(REDUCE, code, op, count, next(roots), False)()


def every_count_and_root(run: Runner) -> None:
    for code in SOME_CODES:
        for count, in_place in itertools.product(counts_of(code), (False, True)):
            run.reduction(ALLREDUCE, code, ops.SUM, count, 0, in_place)()
            for root in run.everybody:
                run.reduction(REDUCE, code, ops.SUM, count, root, in_place)()


def every_broadcast(run: Runner) -> None:
    roots = itertools.cycle(run.everybody)
    for code in ALL_CODES:
        for count in counts_of(code):
            run.broadcast(code, count, next(roots))()
    for count, root in itertools.product(counts_of(reduction.FLOAT64), run.everybody):
        run.broadcast(reduction.FLOAT64, count, root)()


def many_outstanding(run: Runner) -> None:
    """Different operations under way at once, not waited for in the order of the calls."""
    rng = np.random.default_rng(7)
    for batch in range(12):
        started = []
        for _ in range(10):
            kind = int(rng.integers(4))
            code = int(rng.choice(SOME_CODES))
            count = int(rng.choice(counts_of(code)))
            root = int(rng.integers(run.comm.size))
            if kind == BCAST:
                started.append(run.broadcast(code, count, root))
            elif kind in (REDUCE, ALLREDUCE):
                in_place = bool(rng.integers(2))
                started.append(run.reduction(kind, code, ops.SUM, count, root, in_place))
            else:
                started.append(run.barrier())
        order = np.random.default_rng([batch, run.comm.rank]).permutation(len(started))
        for index in order:
            started[index]()


def spellings(run: Runner) -> None:
    """MPI's own operations and datatypes, other buffers than arrays, items that are no numbers."""
    comm, n = run.comm, run.comm.size
    total = n * (n - 1) // 2

    source, result = bytearray([comm.rank] * 3), bytearray(5)
    comm.Allreduce(source, [result, (3, 1)], MPI.SUM)
    run.expect(result == bytearray([0, total, total, total, 0]), "bytearray", result)

    numbers = np.arange(6.0)
    comm.Allreduce([numbers * comm.rank, 4, MPI.DOUBLE], [numbers, (4, 2), MPI.DOUBLE], op=MPI.MAX)
    want = np.array([0, 1, *np.arange(4.0) * (n - 1)])
    run.expect_bits(numbers, want, "[buf, count, datatype]")

    means = np.full(3, comm.rank, "f4")
    comm.Allreduce(MPI.IN_PLACE, means, hopcoll.AVG)
    run.expect_bits(means, np.full(3, total / n, "f4"), "AVG in place")

    one = np.float64(comm.rank)
    scalar = np.zeros(())
    comm.Reduce(one, scalar, MPI.PROD, root=n - 1)
    run.expect(comm.rank != n - 1 or scalar == (comm.rank if n == 1 else 0), "scalar", scalar)

    records = np.zeros(700, [("when", "M8[s]"), ("name", "S7"), ("value", ">f8")])
    if comm.rank == n - 1:
        records["when"] = np.arange(700)
        records["name"] = b"seven"
        records["value"] = np.arange(700) / 3
    comm.Bcast(records, root=n - 1)
    run.expect(records["when"][5] == np.datetime64(5, "s"), "Bcast of records", records[5])
    run.expect(records["name"][699] == b"seven" and records["value"][3] == 1.0, "Bcast of records")

    square = np.asfortranarray(np.arange(9.0).reshape(3, 3)) if comm.rank == 0 else np.empty((3, 3))
    comm.Bcast(square if comm.rank else square.T)
    run.expect(bool((square.T if comm.rank == 0 else square).ravel()[1] == 3), "Fortran", square)


def default_settings(world: hopcoll.Communicator) -> list[str]:
    """Some MiB in chunks of the usual length, with every rank in the chain."""
    count = 3 * 2**20 // 8 + 1
    mine = np.full(count, float(world.rank))
    result = np.empty(count)
    world.Allreduce(mine, result)
    expected = float(sum(range(world.size)))
    return [] if (result == expected).all() else ["Allreduce of 3 MiB with the default settings"]


PARTS = (every_dtype_and_op, every_count_and_root, every_broadcast, many_outstanding, spellings)


def main() -> int:
    world = hopcoll.init()
    failures = default_settings(world)
    with hopcoll.Communicator(
        MPI.COMM_WORLD,
        chunk_bytes=CHUNK_BYTES,
        window_chunks=WINDOW_CHUNKS,
        eager_bytes=EAGER_BYTES,
    ) as comm:
        run = Runner(comm)
        for part in PARTS:
            part(run)
        failures += run.failures
    for failure in failures[:20]:
        print(f"rank {world.rank}: {failure}", file=sys.stderr)
    world.Barrier()
    print(f"rank {world.rank}: {run.number} cases, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
