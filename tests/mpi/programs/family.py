"""Compare Gather, Allgather, Scatter, Alltoall, Reduce_scatter and the scans with their twins.

    mpirun -n 3 python -m tests.mpi.programs.family

As `tests.mpi.programs.collectives` does for the others, with which these are mixed at the end.
Every rank makes the inputs of all ranks from the number of the case. What is received goes into
the middle of a larger piece of memory; margins and gaps must stay as they are.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI

import hopcoll
from cython_kernels import reduction
from hopcoll import ops
from tests.mpi.programs.collectives import (
    ALL_CODES,
    CANARY,
    CHUNK_BYTES,
    EAGER_BYTES,
    OPS,
    SOME_CODES,
    WINDOW_CHUNKS,
    Finish,
    Guarded,
    Runner,
    counts_of,
    random_array,
)
from tests.reference import ALLREDUCE, DTYPES, REDUCE, same_bits, supported_twin
from tests.reference_family import (
    EXSCAN,
    SCAN,
    alltoall_twin,
    gather_twin,
    reduce_scatter_twin,
    scan_twin,
)

RECORD = np.dtype([("when", "M8[s]"), ("name", "S7"), ("value", ">f8")])
#: How the blocks of one buffer lie: one behind the other; with gaps; in any order with gaps; and,
#: where they are only read, on top of each other.
PACKED, GAPS, PERMUTED, SHARED = "packed", "gaps", "permuted", "shared"
GAP = 3


def random_items(rng: np.random.Generator, dtype: np.dtype, count: int) -> np.ndarray:
    if dtype in DTYPES:
        return random_array(rng, DTYPES.index(dtype), count)
    return rng.integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype)


def block_counts_of(dtype: np.dtype, size: int) -> list[int]:
    """None, few, both sides of the short path's end for a block and for all, chunks and a rest."""
    item = dtype.itemsize
    eager = EAGER_BYTES // item
    chunk = CHUNK_BYTES // item
    counts = {0, 1, 7, eager // size, eager // size + 1, eager, eager + 1, 4 * chunk}
    return [*sorted(counts), (WINDOW_CHUNKS + 2) * chunk + 3]


def vectors_of(dtype: np.dtype, size: int) -> list[list[int]]:
    """Counts by rank: equal, rising, with none at some, at all but one, at all."""
    few, large = 7, (WINDOW_CHUNKS + 1) * CHUNK_BYTES // dtype.itemsize + 1
    return [
        [few] * size,
        [large * (rank + 1) // size for rank in range(size)],
        [few if rank % 2 else 0 for rank in range(size)],
        [0 if rank % 3 else large for rank in range(size)],
        [large if rank == size - 1 else 0 for rank in range(size)],
        [large if rank == 0 else 0 for rank in range(size)],
        [0] * size,
    ]


class Place:
    """A block for each rank in one guarded piece of memory."""

    def __init__(
        self, dtype: np.dtype, counts: Sequence[int], how: str, rng: np.random.Generator
    ) -> None:
        self.counts = list(counts)
        self.how = how
        gap = 0 if how == PACKED else GAP
        order = rng.permutation(len(counts)) if how == PERMUTED else range(len(counts))
        self.displs = [0] * len(counts)
        at = gap
        for rank in order:
            self.displs[rank] = 0 if how == SHARED else at
            at += self.counts[rank] + gap
        self.guarded = Guarded(dtype, max(at, *counts))
        self.expected = self.guarded.memory.copy()

    def block(self, rank: int) -> np.ndarray:
        first = self.displs[rank]
        return self.guarded.array[first : first + self.counts[rank]]

    def fill(self, blocks: Sequence[np.ndarray]) -> Place:
        """Put blocks in, which must be there in the end as well."""
        for rank in range(len(self.counts)):
            self.block(rank)[...] = blocks[rank]
        self.expected = self.guarded.memory.copy()
        return self

    def unchanged(self) -> bool:
        return bool((self.guarded.memory == self.expected).all())

    def wrong(self, wanted: Sequence[np.ndarray]) -> str:
        """What differs from the blocks that should be there; gaps and margins from what was."""
        for rank, block in enumerate(wanted):
            mine = self.block(rank)
            if not same_bits(mine, block):
                differ = np.flatnonzero(mine.view(np.uint8) != block.view(np.uint8))
                return f"block {rank} differs at bytes {differ[:4]} of {mine.nbytes}"
            mine[...] = np.frombuffer(bytes([CANARY]) * mine.nbytes, mine.dtype)
        return "" if bool((self.guarded.memory == CANARY).all()) else "a gap or margin was changed"

    def equal_spec(self, spelling: int) -> object:
        """As the forms with equal blocks take it."""
        array = self.guarded.array
        return (array, [array, self.counts[0]], [array, (self.counts[0], 0)])[spelling % 3]

    def vector_spec(self, spelling: int) -> object:
        """As the vector forms take it: as many spellings as there are."""
        array, counts, displs = self.guarded.array, self.counts, self.displs
        datatype = MPI.DOUBLE if array.dtype == np.float64 else None
        specs: list[object] = [
            [array, (counts, displs)],
            [array, counts, displs, datatype],
            (array, (np.array(counts, "i4"), np.array(displs)), datatype),
        ]
        if self.how == PACKED:
            specs += [[array, counts], [array, (counts, None)], (array, np.array(counts), datatype)]
        return specs[spelling % len(specs)]


class Family(Runner):
    """Each method starts a case; the function that comes back waits for it and checks it."""

    @property
    def me(self) -> int:
        return self.comm.rank

    def contributors(self, request: hopcoll.Request, *what: object) -> tuple[int, ...] | None:
        """Wait, and tell whose inputs are in the result; None: there is no result."""
        outcome = request.wait()
        self.expect_outcome(outcome, *what)
        return outcome.contributors

    def expect_given_back(self, got: np.ndarray, mine: np.ndarray, *what: object) -> None:
        """What had its input in the place of its result has it there again when it fails."""
        self.expect(same_bits(got, mine), *what, "did not give its input back")

    def items(self, dtype: np.dtype, counts: Sequence[int]) -> dict[int, np.ndarray]:
        """The block of each rank."""
        self.number += 1
        return {
            rank: random_items(np.random.default_rng([self.number, rank]), dtype, counts[rank])
            for rank in self.everybody
        }

    def place(self, dtype: np.dtype, counts: Sequence[int], how: str) -> Place:
        # The displacements differ from rank to rank.
        return Place(dtype, counts, how, np.random.default_rng([self.number, self.me, 1]))

    def gather(
        self,
        dtype: np.dtype,
        counts: Sequence[int],
        root: int | None,
        in_place: bool,
        how: str = "",
    ) -> Finish:
        """Gather and Gatherv; Allgather and Allgatherv if there is no root."""
        name = ("Gather" if root is not None else "Allgather") + "v" * bool(how)
        what = (name, dtype, counts, "root", root, how, "in place" if in_place else "")
        comm, spelling = self.comm, self.number
        blocks = self.items(dtype, counts)
        mine = blocks[self.me].copy()
        at_root = root in (None, self.me)
        place = self.place(dtype, counts, how or PACKED)
        sendbuf: object = mine
        if in_place and at_root:
            place.block(self.me)[...] = mine
            sendbuf = MPI.IN_PLACE
        recvbuf = place.vector_spec(spelling) if how else place.equal_spec(spelling)
        start = getattr(comm, "I" + name.lower())
        if root is None:
            request = start(sendbuf, recvbuf)
        else:
            request = start(sendbuf, recvbuf if at_root else None, root)

        def finish() -> None:
            contributors = self.contributors(request, *what)
            if not at_root:
                self.expect(place.unchanged(), *what, "was written to")
            elif contributors is not None:
                wrong = place.wrong(gather_twin(blocks, contributors))
                self.expect(not wrong, *what, wrong)
            elif in_place:
                self.expect_given_back(place.block(self.me), mine, *what)
            self.expect(same_bits(mine, blocks[self.me]), *what, "changed its input")

        return finish

    def scatter(
        self, dtype: np.dtype, counts: Sequence[int], root: int, in_place: bool, how: str = ""
    ) -> Finish:
        name = "Scatter" + "v" * bool(how)
        what = (name, dtype, counts, "root", root, how, "in place" if in_place else "")
        comm, spelling = self.comm, self.number
        blocks = self.items(dtype, counts)
        place = self.place(dtype, counts, how or PACKED)
        if how == SHARED:
            longest = random_items(np.random.default_rng(self.number), dtype, max(counts))
            blocks = {rank: longest[: counts[rank]] for rank in self.everybody}
        sendbuf: object = None
        if self.me == root:
            place.fill([blocks[rank] for rank in self.everybody])
            sendbuf = place.vector_spec(spelling) if how else place.equal_spec(spelling)
        result = Guarded(dtype, counts[self.me])
        stays = in_place and self.me == root
        recvbuf: object = MPI.IN_PLACE if stays else result.array
        request = (comm.Iscatterv if how else comm.Iscatter)(sendbuf, recvbuf, root)

        def finish() -> None:
            contributors = self.contributors(request, *what)
            if not stays and contributors is not None:
                self.expect_bits(result.array, blocks[self.me], *what)
            self.expect(result.intact(), *what, "was written past its ends")
            self.expect(place.unchanged(), *what, "changed its input")

        return finish

    def alltoall(
        self, dtype: np.dtype, counts: Sequence[Sequence[int]], in_place: bool, how: str = ""
    ) -> Finish:
        """``counts[source][dest]``; in place it must be the same both ways."""
        name = "Alltoall" + "v" * bool(how)
        what = (name, dtype, counts, how, "in place" if in_place else "")
        comm, spelling = self.comm, self.number
        self.number += 1
        sent = {
            source: [
                random_items(np.random.default_rng([self.number, source, dest]), dtype, count)
                for dest, count in enumerate(counts[source])
            ]
            for source in self.everybody
        }
        send = self.place(dtype, counts[self.me], PACKED if how == PERMUTED else how or PACKED)
        send.fill(sent[self.me])
        recv = self.place(dtype, [counts[source][self.me] for source in self.everybody],
                          how or PACKED)  # fmt: skip
        sendbuf = send.vector_spec(spelling) if how else send.equal_spec(spelling)
        if in_place:
            sendbuf = MPI.IN_PLACE
            for dest in self.everybody:
                recv.block(dest)[...] = sent[self.me][dest]
        recvbuf = recv.vector_spec(spelling + 1) if how else recv.equal_spec(spelling)
        request = (comm.Ialltoallv if how else comm.Ialltoall)(sendbuf, recvbuf)

        def finish() -> None:
            contributors = self.contributors(request, *what)
            if contributors is not None:
                wrong = recv.wrong(alltoall_twin(sent, contributors, self.me))
                self.expect(not wrong, *what, wrong)
            elif in_place:
                wrong = recv.wrong(sent[self.me])
                self.expect(not wrong, *what, "did not give its input back:", wrong)
            self.expect(send.unchanged(), *what, "changed its input")

        return finish

    def reduce_scatter(
        self,
        code: int,
        op: hopcoll.Op,
        counts: Sequence[int],
        in_place: bool,
        form: str = "block",
    ) -> Finish:
        """`form`: "block" for Reduce_scatter_block, or Reduce_scatter with its counts "given" or
        "asked" for."""
        dtype, comm = DTYPES[code], self.comm
        what = ("Reduce_scatter", form, dtype, op, counts, "in place" if in_place else "")
        inputs = self.items(dtype, [sum(counts)] * comm.size)
        mine = inputs[self.me].copy()
        result = Guarded(dtype, sum(counts) if in_place else counts[self.me])
        sendbuf: object = mine
        if in_place:
            result.array[...] = mine
            sendbuf = MPI.IN_PLACE
        if form == "block":
            request = comm.Ireduce_scatter_block(sendbuf, result.array, op)
        else:
            given = None if form == "asked" else counts
            request = comm.Ireduce_scatter(sendbuf, result.array, given, op)

        def finish() -> None:
            contributors = self.contributors(request, *what)
            if contributors is not None:
                want = reduce_scatter_twin(
                    inputs, contributors, counts, self.me, eager_bytes=EAGER_BYTES, redop=op.code
                )
                self.expect_bits(result.array[: counts[self.me]], want, *what)
            elif in_place:
                self.expect_given_back(result.array, mine, *what)
            self.expect(result.intact(), *what, "was written past its ends")
            self.expect(same_bits(mine, inputs[self.me]), *what, "changed its input")

        return finish

    def scan(self, kind: int, code: int, op: hopcoll.Op, count: int, in_place: bool) -> Finish:
        dtype, comm = DTYPES[code], self.comm
        what = ("Scan" if kind == SCAN else "Exscan", dtype, op, "count", count, in_place)
        inputs = self.items(dtype, [count] * comm.size)
        mine = inputs[self.me].copy()
        result = Guarded(dtype, count)
        sendbuf: object = mine
        if in_place:
            result.array[...] = mine
            sendbuf = MPI.IN_PLACE
        request = (comm.Iscan if kind == SCAN else comm.Iexscan)(sendbuf, result.array, op)

        def finish() -> None:
            contributors = self.contributors(request, *what)
            if contributors is not None:
                want = scan_twin(
                    inputs, contributors, self.me, redop=op.code, exclusive=kind == EXSCAN
                )
                if want is not None:
                    self.expect_bits(result.array, want, *what)
            elif in_place:
                self.expect_given_back(result.array, mine, *what)
            self.expect(result.intact(), *what, "was written past its ends")
            self.expect(same_bits(mine, inputs[self.me]), *what, "changed its input")

        return finish


def exchange(counts: Sequence[int], *, symmetric: bool) -> list[list[int]]:
    """Counts for an Alltoallv from counts by rank."""
    size = len(counts)
    if symmetric:
        return [[counts[(a + b) % size] for b in range(size)] for a in range(size)]
    return [[counts[(2 * a + b) % size] for b in range(size)] for a in range(size)]


def every_dtype(run: Family) -> None:
    """Each dtype and a structured one, on the short path and on the long one."""
    size = run.comm.size
    roots = itertools.cycle(run.everybody)
    for dtype in [*(DTYPES[code] for code in ALL_CODES), RECORD]:
        large = 2 * CHUNK_BYTES // dtype.itemsize + EAGER_BYTES // dtype.itemsize + 5
        for count in (3, large):
            run.gather(dtype, [count] * size, next(roots), False)()
            run.gather(dtype, [count] * size, None, False)()
            run.scatter(dtype, [count] * size, next(roots), False)()
            run.alltoall(dtype, [[count] * size] * size, False)()
        vector = [large, 5, 0, 1][:size] + [7] * (size - 4)
        run.gather(dtype, vector, next(roots), False, GAPS)()
        run.gather(dtype, vector, None, False, PERMUTED)()
        run.scatter(dtype, vector, next(roots), False, GAPS)()
        run.alltoall(dtype, exchange(vector, symmetric=False), False, PERMUTED)()


def every_dtype_and_op(run: Family) -> None:
    """Each dtype with each operation that takes it."""
    size = run.comm.size
    for code, op in itertools.product(ALL_CODES, OPS):
        if not supported_twin(code, op.code):
            continue
        small = EAGER_BYTES // DTYPES[code].itemsize // size
        for count in (min(7, small), small + 9):
            run.reduce_scatter(code, op, [count] * size, False)()
            if op is not ops.AVG:
                run.scan(SCAN, code, op, count * size, False)()
                run.scan(EXSCAN, code, op, count * size, False)()
        parts = [small + 9] + [0] * (size - 2) + [small] * (size > 1)
        run.reduce_scatter(code, op, parts, False, "given")()


def every_count_and_root(run: Family) -> None:
    """Blocks of one length, in place and not."""
    size = run.comm.size
    for dtype in (DTYPES[reduction.INT8], DTYPES[reduction.FLOAT64]):
        for count, in_place in itertools.product(block_counts_of(dtype, size), (False, True)):
            counts = [count] * size
            run.gather(dtype, counts, None, in_place)()
            run.alltoall(dtype, [counts] * size, in_place)()
            for root in run.everybody:
                run.gather(dtype, counts, root, in_place)()
                run.scatter(dtype, counts, root, in_place)()


def every_vector(run: Family) -> None:
    """Blocks of many lengths, wherever they lie, in place and not."""
    dtype = DTYPES[reduction.FLOAT64]
    roots = itertools.cycle(run.everybody)
    for counts, how in itertools.product(
        vectors_of(dtype, run.comm.size), (PACKED, GAPS, PERMUTED)
    ):
        for in_place in (False, True):
            run.gather(dtype, counts, None, in_place, how)()
            run.alltoall(dtype, exchange(counts, symmetric=True), in_place, how)()
            root = next(roots)
            run.gather(dtype, counts, root, in_place, how)()
            run.scatter(dtype, counts, root, in_place, how)()
        run.alltoall(dtype, exchange(counts, symmetric=False), False, how)()
    for counts in vectors_of(dtype, run.comm.size):
        run.scatter(dtype, counts, next(roots), False, SHARED)()


def every_fold(run: Family) -> None:
    """Counts of all lengths for what reduces, in place and not."""
    size = run.comm.size
    for code, in_place in itertools.product(SOME_CODES, (False, True)):
        for count in block_counts_of(DTYPES[code], size):
            run.reduce_scatter(code, ops.SUM, [count] * size, in_place)()
        for count in counts_of(code):
            run.scan(SCAN, code, ops.SUM, count, in_place)()
            run.scan(EXSCAN, code, ops.SUM, count, in_place)()
    for counts, in_place in itertools.product(
        vectors_of(DTYPES[reduction.FLOAT64], size), (False, True)
    ):
        run.reduce_scatter(reduction.FLOAT64, ops.SUM, counts, in_place, "given")()
        if not in_place:
            run.reduce_scatter(reduction.FLOAT64, ops.AVG, counts, False, "asked")()


def many_outstanding(run: Family) -> None:
    """All kinds, new and old, under way at once, not waited for in the order of the calls."""
    rng = np.random.default_rng(11)
    for batch in range(12):
        started = [any_case(run, rng) for _ in range(12)]
        order = np.random.default_rng([batch, run.me]).permutation(len(started))
        for index in order:
            started[index]()


def any_case(run: Family, rng: np.random.Generator) -> Finish:
    """Start a case of any kind, the same at all ranks."""
    size = run.comm.size
    code = int(rng.choice(SOME_CODES))
    dtype = DTYPES[code]
    count = int(rng.choice(block_counts_of(dtype, size)))
    vectors = vectors_of(dtype, size)
    vector = vectors[int(rng.integers(len(vectors)))]
    how = str(rng.choice([PACKED, GAPS, PERMUTED]))
    root = int(rng.integers(size))
    in_place = bool(rng.integers(2))
    equal = [count] * size
    starts: list[Callable[[], Finish]] = [
        lambda: run.gather(dtype, equal, root, in_place),
        lambda: run.gather(dtype, equal, None, in_place),
        lambda: run.scatter(dtype, equal, root, in_place),
        lambda: run.alltoall(dtype, [equal] * size, in_place),
        lambda: run.gather(dtype, vector, root, in_place, how),
        lambda: run.gather(dtype, vector, None, in_place, how),
        lambda: run.scatter(dtype, vector, root, in_place, how),
        lambda: run.alltoall(dtype, exchange(vector, symmetric=True), in_place, how),
        lambda: run.reduce_scatter(code, ops.SUM, equal, in_place),
        lambda: run.reduce_scatter(code, ops.SUM, vector, in_place, "given"),
        lambda: run.scan(SCAN, code, ops.SUM, count, in_place),
        lambda: run.scan(EXSCAN, code, ops.SUM, count, in_place),
        lambda: run.reduction(ALLREDUCE, code, ops.SUM, count, 0, in_place),
        lambda: run.reduction(REDUCE, code, ops.SUM, count, root, in_place),
        lambda: run.broadcast(code, count, root),
        run.barrier,
    ]
    return starts[int(rng.integers(len(starts)))]()


def spellings(run: Family) -> None:
    """The blocking calls, MPI's own operations and datatypes, other buffers than arrays."""
    comm, n, me = run.comm, run.comm.size, run.me
    total = n * (n - 1) // 2
    ranks = np.arange(n, dtype="u1")

    everyone = bytearray(n)
    comm.Allgather([np.array([9, me], "u1"), (1, 1)], [everyone, 1, MPI.BYTE])
    run.expect(everyone == ranks.tobytes(), "Allgather into a bytearray", everyone)

    room = np.full(n + 2, 7.0)
    comm.Gather(np.float64(me), [room, 1, 2, MPI.DOUBLE] if me == n - 1 else None, root=n - 1)
    want = [7, 7, *range(n)] if me == n - 1 else [7] * (n + 2)
    run.expect(room.tolist() == want, "Gather with a displacement", room)

    block = np.zeros((2, 2), "i2")
    comm.Scatter(np.repeat(ranks.astype("i2"), 4) if me == 0 else None, block)
    run.expect(bool((block == me).all()), "Scatter", block)

    received = np.zeros(n, "u1")
    comm.Alltoall(bytes((me + dest) % 256 for dest in range(n)), received)
    run.expect(bool((received == ranks + me).all()), "Alltoall of bytes", received)

    # A bare buffer is divided as evenly as possible.
    mine = np.full(2 + (me == 0), me, "i4")
    whole = np.zeros(2 * n + 1, "i4")
    comm.Gatherv(mine, whole if me == 0 else None)
    again = np.zeros_like(mine)
    comm.Scatterv(whole if me == 0 else None, again)
    everywhere = np.zeros_like(whole)
    comm.Allgatherv([mine, MPI.INT], everywhere)
    run.expect_bits(again, mine, "Scatterv of what Gatherv gathered")
    run.expect(everywhere.tolist() == sorted([*range(n)] * 2 + [0]), "Allgatherv", everywhere)

    back = np.zeros(n, "i4")
    comm.Alltoallv([np.arange(n, dtype="i4"), 1], [back, ([1] * n, list(range(n))[::-1])])
    run.expect(bool((back == me).all()), "Alltoallv with one count for all", back)

    share = np.zeros(1)
    comm.Reduce_scatter_block(np.arange(n, dtype=float), share, MPI.MAX)
    run.expect(share[0] == me, "Reduce_scatter_block", share)
    comm.Reduce_scatter(np.full(n, float(me)), share, op=hopcoll.AVG)
    run.expect(share[0] == total / n, "Reduce_scatter", share)
    comm.Reduce_scatter(np.full(n, float(me)), share, [1] * n, MPI.SUM)
    run.expect(share[0] == total, "Reduce_scatter", share)

    below = np.full(1, -1)
    comm.Scan(np.full(1, me), below)
    run.expect(below[0] == me * (me + 1) // 2, "Scan", below)
    comm.Exscan(np.full(1, me), below, MPI.SUM)
    run.expect(me == 0 or below[0] == me * (me - 1) // 2, "Exscan", below)


def default_settings(world: hopcoll.Communicator) -> list[str]:
    """Some MiB in chunks of the usual length, all ranks to all."""
    count = 2**20 // 8 + 1
    n, me = world.size, world.rank
    mine = np.repeat(np.arange(n, dtype=float) + n * me, count)
    theirs = np.empty_like(mine)
    world.Alltoall(mine, theirs)
    failures = []
    if not (theirs == np.repeat(np.arange(n) * n + me, count)).all():
        failures.append("Alltoall with the default settings")
    world.Allgather(mine[:count], theirs)
    if not (theirs == np.repeat(np.arange(n) * n, count)).all():
        failures.append("Allgather with the default settings")
    world.Scan(mine, theirs)
    if not (theirs == _scanned(n, me, count)).all():
        failures.append("Scan with the default settings")
    return failures


def _scanned(n: int, me: int, count: int) -> np.ndarray:
    below = me + 1
    return np.repeat(np.arange(n, dtype=float) * below + n * me * below // 2, count)


PARTS = (
    every_dtype,
    every_dtype_and_op,
    every_count_and_root,
    every_vector,
    every_fold,
    many_outstanding,
    spellings,
)


def main() -> int:
    world = hopcoll.init()
    failures = default_settings(world)
    with hopcoll.Communicator(
        MPI.COMM_WORLD,
        chunk_bytes=CHUNK_BYTES,
        window_chunks=WINDOW_CHUNKS,
        eager_bytes=EAGER_BYTES,
    ) as comm:
        run = Family(comm)
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
