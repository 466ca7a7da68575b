"""Wrong use of every kind: a clear error on every rank concerned, and never a hang.

    mpirun -n 4 python -m tests.mpi.programs.wrong_use

A mismatch breaks a communicator, so each case has its own. A rank that sees anything but what it
should lists it at the end, and its exit code is 1.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

import hopcoll

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
ALL = tuple(range(SIZE))
ODD_ONE = SIZE - 2
LARGE = 100_000
BLOCK = 5_000  # one of SIZE
TIMEOUT_S = 20

FAILURES: list[str] = []


def expect(holds: bool, *what: object) -> None:
    if not holds:
        FAILURES.append(" ".join(str(part) for part in what))


def new() -> hopcoll.Communicator:
    return hopcoll.Communicator(WORLD, timeout_s=TIMEOUT_S, chunk_bytes=1024, window_chunks=4)


def allreduce(comm: hopcoll.Communicator, count: int = 10, **more: object) -> hopcoll.Outcome:
    result = np.zeros(count)
    outcome = comm.Allreduce(np.ones(count), result, **more)
    expect(bool((result == SIZE).all()), "a sum is wrong")
    return outcome


# ---- arguments that differ between ranks ------------------------------------------------------

Call = Callable[[hopcoll.Communicator], object]


def send(dtype: str = "f8", count: int = 10, op: hopcoll.Op = hopcoll.SUM) -> Call:
    return lambda comm: comm.Allreduce(np.ones(count, dtype), np.zeros(count, dtype), op)


def reduce_to(root: int, count: int = 10) -> Call:
    return lambda comm: comm.Reduce(np.ones(count), np.zeros(count), root=root)


def bcast(root: int = 0, count: int = 10, dtype: str = "f8") -> Call:
    return lambda comm: comm.Bcast(np.ones(count, dtype), root=root)


def barrier(**more: str) -> Call:
    return lambda comm: comm.Barrier(**more)


def everyone(function: Callable[[np.ndarray, np.ndarray], object], count: int) -> object:
    """Call with a block, and room for one from each rank."""
    return function(np.ones(count), np.zeros(SIZE * count))


def gather(root: int = 0, count: int = 10, dtype: str = "f8") -> Call:
    return lambda comm: comm.Gather(np.ones(count, dtype), np.zeros(SIZE * count, dtype), root)


def gatherv(count: int = 10, root: int = 0) -> Call:
    return lambda comm: comm.Gatherv(np.ones(count), [np.zeros(SIZE * count), count], root)


def allgather(count: int = 10) -> Call:
    return lambda comm: everyone(comm.Allgather, count)


def allgatherv(counts: list[int]) -> Call:
    return lambda comm: comm.Allgatherv(np.ones(counts[RANK]), [np.zeros(sum(counts)), counts])


def scatter(root: int = 0, count: int = 10) -> Call:
    return lambda comm: comm.Scatter(np.ones(SIZE * count), np.zeros(count), root)


def scatterv(count: int = 10, root: int = 0) -> Call:
    return lambda comm: comm.Scatterv([np.ones(SIZE * count), count], np.zeros(count), root)


def alltoall(count: int = 10) -> Call:
    return lambda comm: comm.Alltoall(np.ones(SIZE * count), np.zeros(SIZE * count))


def alltoallv(sent: int, expected: int) -> Call:
    """The same to each other rank, the same from each; nothing to itself."""
    to, of = ([0 if rank == RANK else n for rank in ALL] for n in (sent, expected))
    return lambda comm: comm.Alltoallv([np.ones(sum(to)), to], [np.zeros(sum(of)), of])


def reduce_scatter(counts: list[int], op: hopcoll.Op = hopcoll.SUM) -> Call:
    return lambda comm: comm.Reduce_scatter(
        np.ones(sum(counts)), np.zeros(counts[RANK]), counts, op
    )


def reduce_scatter_block(count: int = 10) -> Call:
    return lambda comm: comm.Reduce_scatter_block(np.ones(SIZE * count), np.zeros(count))


def scan(count: int = 10, op: hopcoll.Op = hopcoll.SUM) -> Call:
    return lambda comm: comm.Scan(np.ones(count), np.zeros(count), op)


def exscan(count: int = 10) -> Call:
    return lambda comm: comm.Exscan(np.ones(count), np.zeros(count))


def counts_of(first: int, last: int) -> list[int]:
    """Counts that add up to the same, whichever of the ranks has more."""
    return [first, *[20] * (SIZE - 2), last]


# What most ranks call, and what the odd one calls.
MISMATCHES: dict[str, tuple[Call, Call]] = {
    "count": (send(count=10), send(count=11)),
    "count, one chunk more": (send(count=LARGE), send(count=LARGE + 128)),
    "count, short and long path": (send(count=10), send(count=LARGE)),
    "count, none": (send(count=LARGE), send(count=0)),
    "dtype": (send("f8"), send("i8")),
    "dtype, large": (send("f8", LARGE), send("f4", LARGE)),
    "op": (send(), send(op=hopcoll.MAX)),
    "op, large": (send(count=LARGE), send(count=LARGE, op=hopcoll.PROD)),
    "root of Bcast": (bcast(0), bcast(1)),
    "root of Bcast, large": (bcast(0, LARGE), bcast(1, LARGE)),
    "root of Bcast, the odd one": (bcast(0, LARGE), bcast(ODD_ONE, LARGE)),
    "count of Bcast": (bcast(count=10), bcast(count=9)),
    "count of Bcast, large": (bcast(count=LARGE), bcast(count=LARGE - 1)),
    "count of Bcast, none": (bcast(count=LARGE), bcast(count=0)),
    "dtype of Bcast": (bcast(dtype="f4"), bcast(dtype="i4")),
    "root of Reduce": (reduce_to(0), reduce_to(1)),
    "root of Reduce, large": (reduce_to(0, LARGE), reduce_to(1, LARGE)),
    "count of Reduce, large": (reduce_to(0, LARGE), reduce_to(0, LARGE + 1)),
    "Bcast and Barrier": (bcast(), barrier()),
    "Allreduce and Barrier": (send(), barrier()),
    "Allreduce and Reduce": (send(), reduce_to(0)),
    "Allreduce and Reduce, large": (send(count=LARGE), reduce_to(0, LARGE)),
    "Bcast and Allreduce, large": (bcast(count=LARGE), send(count=LARGE)),
    "Bcast and Reduce, large": (bcast(count=LARGE), reduce_to(0, LARGE)),
    "on_failure": (barrier(on_failure="survivors"), barrier(on_failure="raise")),
    "Gather and Gatherv": (gather(), gatherv()),
    "Gather and Gatherv, large": (gather(count=BLOCK), gatherv(BLOCK)),
    "Gather and Allgather": (gather(), allgather()),
    "Gather and Reduce, large": (gather(count=BLOCK), reduce_to(0, BLOCK)),
    "Gather and Barrier": (gather(), barrier()),
    "root of Gather": (gather(0), gather(1)),
    "root of Gather, large": (gather(0, BLOCK), gather(1, BLOCK)),
    "root of Gatherv": (gatherv(root=0), gatherv(root=1)),
    "count of Gather": (gather(count=10), gather(count=11)),
    "count of Gather, short and long path": (gather(count=10), gather(count=BLOCK)),
    "dtype of Gather": (gather(dtype="f8"), gather(dtype="i8")),
    "Allgather and Alltoall, large": (allgather(BLOCK), alltoall(BLOCK)),
    "Allgather and Allgatherv": (allgather(20), allgatherv(counts_of(20, 20))),
    "counts of Allgatherv": (allgatherv(counts_of(5, 15)), allgatherv(counts_of(15, 5))),
    "counts of Allgatherv, sum": (allgatherv(counts_of(5, 15)), allgatherv(counts_of(5, 16))),
    "counts of Allgatherv, large": (
        allgatherv(counts_of(BLOCK, 0)),
        allgatherv(counts_of(0, BLOCK)),
    ),
    "Scatter and Bcast": (scatter(), bcast()),
    "Scatter and Scatterv, large": (scatter(count=BLOCK), scatterv(BLOCK)),
    "root of Scatter, large": (scatter(0, BLOCK), scatter(1, BLOCK)),
    "root of Scatterv, large": (scatterv(BLOCK, 0), scatterv(BLOCK, 1)),
    "count of Scatter": (scatter(count=10), scatter(count=9)),
    "count of Scatter, large": (scatter(count=BLOCK), scatter(count=BLOCK - 1)),
    "count of Alltoall": (alltoall(10), alltoall(11)),
    "count of Alltoall, none": (alltoall(BLOCK), alltoall(0)),
    "count of Alltoall, large": (alltoall(BLOCK), alltoall(BLOCK + 1)),
    "Alltoall and Alltoallv": (alltoall(10), alltoallv(10, 10)),
    "recvcounts": (reduce_scatter(counts_of(5, 15)), reduce_scatter(counts_of(15, 5))),
    "recvcounts, large": (
        reduce_scatter(counts_of(BLOCK, 0)),
        reduce_scatter(counts_of(0, BLOCK)),
    ),
    "recvcounts, short and long path": (
        reduce_scatter(counts_of(5, 15)),
        reduce_scatter(counts_of(5, BLOCK)),
    ),
    "op of Reduce_scatter": (
        reduce_scatter(counts_of(5, 5)),
        reduce_scatter(counts_of(5, 5), hopcoll.MAX),
    ),
    "Reduce_scatter and Reduce_scatter_block": (
        reduce_scatter(counts_of(20, 20)),
        reduce_scatter_block(20),
    ),
    "count of Reduce_scatter_block": (reduce_scatter_block(BLOCK), reduce_scatter_block(BLOCK - 1)),
    "Scan and Exscan": (scan(), exscan()),
    "Scan and Allreduce, large": (scan(BLOCK), send(count=BLOCK)),
    "Scan and Exscan, large": (scan(BLOCK), exscan(BLOCK)),
    "count of Scan": (scan(10), scan(11)),
    "op of Scan, large": (scan(BLOCK), scan(BLOCK, hopcoll.PROD)),
    "count of Exscan, large": (exscan(BLOCK), exscan(BLOCK + 1)),
}

# What the odd one and the others take the same block to be, in items.
LENGTHS = ((10, 11), (10, 9), (10, 0), (0, 10), (BLOCK, BLOCK + 1), (BLOCK, 0), (0, BLOCK))

# In each the odd one disagrees with one other rank or with all of them.
QUARRELS: dict[str, Callable[[int, int], tuple[Call, Call]]] = {
    "Gatherv": lambda usual, odd: (gatherv(usual), gatherv(odd)),
    "Scatterv": lambda usual, odd: (scatterv(usual), scatterv(odd)),
    "Alltoallv, sent": lambda usual, odd: (alltoallv(usual, usual), alltoallv(odd, usual)),
    "Alltoallv, expected": lambda usual, odd: (alltoallv(usual, usual), alltoallv(usual, odd)),
}


def mismatch_text(call: Callable[[], object], name: str = "") -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    except TimeoutError as error:
        print(f"rank {RANK}: {name}: {error}", file=sys.stderr, flush=True)
        WORLD.Abort(1)  # the job cannot go on from here
    return None


#: Looks at the name of a case, what was said, and who was odd.
Check = Callable[[str, str, int], None]


def names_groups(name: str, text: str, odd_one: int) -> None:
    # Whoever had not called yet when it was decided is in no group.
    expect(text.count(" called ") >= 2, name, "does not name two groups:", text)
    expect(str(odd_one) in text, name, "does not name rank", odd_one, "in:", text)


def mismatch(
    name: str,
    usual: Call,
    odd: Call,
    odd_one: int,
    check: Check = names_groups,
) -> None:
    comm = new()
    allreduce(comm)
    mine = odd if odd_one == RANK else usual
    text = mismatch_text(lambda: mine(comm), name)
    # Who was served already when the others disagreed gets the error at the next call.
    again = mismatch_text(comm.Barrier, name)
    third = mismatch_text(lambda: allreduce(comm), name)
    expect(again is not None, name, "was not refused at the next call")
    expect(again == third, name, "says something else the second time:", again, third)
    expect(text is None or text == again, name, "says something else later:", text, again)
    if again is not None:
        check(name, again, odd_one)
    # First out of hopcoll: without its progress thread, a rank that waits in a collective of MPI
    # answers nobody.
    comm.close()
    seen = WORLD.allgather(again)
    expect(len(set(seen)) == 1, name, "is told in different words:", seen)


def mismatches() -> None:
    for name, (usual, odd) in MISMATCHES.items():
        for odd_one in (ODD_ONE, 0):
            mismatch(name, usual, odd, odd_one)


QUARREL = re.compile(
    r"lengths differ between ranks in operation 1 of this communicator \((\w+)\): "
    r"rank (\d+) has (\d+) bytes for rank (\d+), which expects (\d+)\. It cannot be used any more"
)


def names_lengths(kind: str, usual_bytes: int, odd_bytes: int) -> Check:
    """A check of what is said where two ranks take a block to be of different lengths."""

    def check(name: str, text: str, odd_one: int) -> None:
        found = QUARREL.fullmatch(text)
        if found is None:
            expect(False, name, "says:", text)
            return
        source, sent, dest, expected = map(int, found.groups()[1:])
        expect(found[1] == kind.partition(",")[0], name, text)
        expect(odd_one in (source, dest) and source != dest, name, odd_one, text)
        lengths = (sent, expected) if source == odd_one else (expected, sent)
        expect(lengths == (odd_bytes, usual_bytes), name, odd_one, text)
        expect(not kind.endswith("sent") or source == odd_one, name, odd_one, text)
        expect(not kind.endswith("expected") or dest == odd_one, name, odd_one, text)

    return check


def quarrels() -> None:
    """Two ranks take a block to be of different lengths: both are named, and what they have."""
    for (name, calls), (usual, odd) in itertools.product(QUARRELS.items(), LENGTHS):
        for odd_one in (ODD_ONE, 0):
            check = names_lengths(name, 8 * usual, 8 * odd)
            mismatch(f"{name}, {usual} and {odd}", *calls(usual, odd), odd_one, check)


def three_groups() -> None:
    comm = new()
    counts = [5, 6, LARGE]
    text = mismatch_text(lambda: send(count=counts[RANK % 3])(comm))
    named = [count for count in counts if f"count={count}," in (text or "")]
    # Two are enough to refuse it: the third may not have called yet.
    expect(len(named) >= 2, "three groups:", text)
    comm.close()


def outstanding() -> None:
    """Operations before the one that differs complete; it and those after it are refused."""
    comm = new()
    results = [np.zeros(LARGE) for _ in range(4)]
    requests = []
    for index, result in enumerate(results):
        count = LARGE - (index == 2 and RANK == ODD_ONE)
        requests.append(comm.Iallreduce(np.ones(count), result[:count]))
    for index in (0, 1):
        expect(requests[index].wait().contributors == ALL, "outstanding", index)
        expect(bool((results[index] == SIZE).all()), "outstanding", index, "is wrong")
    for index in (3, 2):
        text = mismatch_text(requests[index].wait)
        expect(text is not None, "outstanding", index, "was not refused")
    comm.close()


def another_communicator() -> None:
    """A broken communicator leaves the others alone."""
    broken, sound = new(), new()
    mismatch_text(lambda: send(count=LARGE + RANK)(broken))
    expect(allreduce(sound, LARGE).contributors == ALL, "the sound communicator")
    expect(mismatch_text(broken.Barrier) is not None, "the broken communicator")
    broken.close()
    sound.close()


# ---- one rank's own mistake --------------------------------------------------------------------

ONES, ROOM, INTEGERS = np.ones(10), np.zeros(10), np.ones(10, "i4")

LOCAL: dict[str, tuple[Call, type[Exception]]] = {
    "root": (lambda comm: comm.Bcast(ROOM, root=SIZE), ValueError),
    "root of Reduce": (lambda comm: comm.Reduce(ONES, ROOM, root=-1), ValueError),
    "not contiguous": (lambda comm: comm.Allreduce(np.ones(20)[::2], ROOM), BufferError),
    "not contiguous result": (lambda comm: comm.Allreduce(ONES, np.ones(20)[::2]), BufferError),
    "read-only": (lambda comm: comm.Allreduce(ONES, b"0123456789"), BufferError),
    "no buffer": (lambda comm: comm.Allreduce(ONES, None), TypeError),
    "count": (lambda comm: comm.Allreduce(ONES, ROOM[:9]), ValueError),
    "dtype": (lambda comm: comm.Allreduce(ONES, INTEGERS), ValueError),
    "overlap": (lambda comm: comm.Allreduce(ROOM, ROOM), ValueError),
    "AVG": (lambda comm: comm.Allreduce(MPI.IN_PLACE, INTEGERS, hopcoll.AVG), TypeError),
    "MINLOC": (lambda comm: comm.Allreduce(ONES, ROOM, MPI.MINLOC), TypeError),
    "complex MIN": (lambda comm: comm.Allreduce(ONES * 1j, ROOM * 1j, MPI.MIN), TypeError),
    "derived datatype": (
        lambda comm: comm.Bcast([ROOM, 1, MPI.DOUBLE.Create_contiguous(2)]),
        TypeError,
    ),
    "pair datatype": (
        lambda comm: comm.Allreduce(MPI.IN_PLACE, [ROOM, 1, MPI.DOUBLE_INT]),
        TypeError,
    ),
    "objects": (lambda comm: comm.Bcast(np.zeros(2, object)), TypeError),
    "on_failure": (lambda comm: comm.Barrier(on_failure="ignore"), ValueError),
    "IN_PLACE": (lambda comm: comm.Reduce(MPI.IN_PLACE, ROOM, root=(RANK + 1) % SIZE), ValueError),
    "IN_PLACE of Gather": (
        lambda comm: comm.Gather(MPI.IN_PLACE, ROOM, (RANK + 1) % SIZE),
        ValueError,
    ),
    "recvbuf of Allgather": (lambda comm: comm.Allgather(ONES, ROOM), ValueError),
    "counts of Alltoallv": (
        lambda comm: comm.Alltoallv([ONES, [1] * SIZE], [ROOM, [2] * (SIZE - 1)]),
        ValueError,
    ),
    "recvcounts": (
        lambda comm: comm.Reduce_scatter(ONES, ROOM[:1], [1] * (SIZE + 1)),
        ValueError,
    ),
    "AVG of Scan": (lambda comm: comm.Scan(ONES, ROOM, hopcoll.AVG), TypeError),
}


def local_mistakes() -> None:
    """The others wait; the rank that erred calls again, rightly, and all complete."""
    comm = new()
    for name, (call, kind) in LOCAL.items():
        if RANK == ODD_ONE:
            try:
                call(comm)
                expect(False, name, "was not refused")
            except kind:
                expect(bool((ROOM == 0).all()), name, "wrote to a buffer")
        expect(allreduce(comm).contributors == ALL, name)
    comm.close()


PARTS = (
    local_mistakes,
    mismatches,
    quarrels,
    three_groups,
    outstanding,
    another_communicator,
)


def main() -> int:
    for part in PARTS:
        part()
    for failure in FAILURES[:20]:
        print(f"rank {RANK}: {failure}", file=sys.stderr)
    WORLD.Barrier()
    print(f"rank {RANK}: {len(FAILURES)} failures")
    return 1 if FAILURES else 0


if __name__ == "__main__":
    sys.exit(main())
