"""Partial operations: of the first to arrive, of those in time; one scene a job.

    hopcoll run -n 4 -m tests.mpi.programs.partial SCENE [VICTIM]

Each rank that gets so far prints a line of JSON with what it saw.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

import hopcoll
from hopcoll import errors

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
VICTIM = int(sys.argv[2]) if len(sys.argv) > 2 else SIZE - 1
ENOUGH = max(1, SIZE - 1)
OTHERS = [rank for rank in range(SIZE) if rank != VICTIM]
COUNTS = (1, 500, 30_001, 200_001)
TIMEOUT_S = 40
BREAK_S = 0.4

SCENES: dict[str, Callable[[], None]] = {}


def scene(function: Callable[[], None]) -> Callable[[], None]:
    SCENES[function.__name__] = function
    return function


def report(**seen: object) -> None:
    # One write, so that the lines of two ranks do not mix.
    os.write(1, (json.dumps({"rank": RANK, **seen}) + "\n").encode())


def init(**settings: Any) -> hopcoll.Communicator:
    return hopcoll.init(timeout_s=TIMEOUT_S, **settings)


def bits(comm: hopcoll.Communicator, count: int, **how: Any) -> tuple[int, ...]:
    """Add up bits, one for each rank, and check that they are the contributors'."""
    result = np.zeros(count)
    outcome = comm.Allreduce(np.full(count, 2.0**comm.rank), result, **how)
    assert (result == sum(2**rank for rank in outcome.contributors)).all(), (result[0], outcome)
    return outcome.contributors


def compute(seconds: float) -> None:
    """What keeps a rank busy elsewhere."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def held_up(comm: hopcoll.Communicator) -> None:
    """What makes one rank late."""
    comm.Barrier()
    if RANK == VICTIM:
        compute(BREAK_S)


def last(work: Callable[[], None]) -> None:
    """Do it at one rank only when all others have done it: they must not need that rank."""
    if RANK == VICTIM:
        for rank in OTHERS:
            WORLD.recv(source=rank)
    work()
    if RANK != VICTIM < SIZE:
        WORLD.send("done", VICTIM)


@scene
def quorum() -> None:
    """The others do not wait for one rank, which gets their results later."""
    comm = init()
    seen: list[tuple[int, ...]] = []

    def work(count: int) -> None:
        seen.append(bits(comm, count, quorum=ENOUGH))
        data = np.full(count, 2.0**comm.rank)
        outcome = comm.Allreduce(hopcoll.IN_PLACE, data, quorum=ENOUGH)
        assert (data == sum(2**rank for rank in outcome.contributors)).all()
        seen.append(outcome.contributors)

    for count in COUNTS:
        last(partial(work, count))
        comm.Barrier()
    report(seen=seen, late=comm.counters()["late"])


@scene
def deadline() -> None:
    """Whoever comes in time takes part; the clock starts with the first."""
    comm = init()
    seen: list[tuple[int, ...]] = []

    def work(count: int) -> None:
        seen.append(bits(comm, count, deadline_s=BREAK_S / 4))

    for count in COUNTS:
        last(partial(work, count))
        comm.Barrier()
        seen.append(bits(comm, count, deadline_s=TIMEOUT_S))
        seen.append(bits(comm, count, deadline_s=TIMEOUT_S, quorum=SIZE))
    report(seen=seen)


@scene
def alone_in_time() -> None:
    """Nobody else comes in time: the first rank is its own contributor."""
    comm = init()
    if RANK != VICTIM:
        WORLD.recv(source=VICTIM)
    seen = [bits(comm, COUNTS[0], deadline_s=0.0)]
    if RANK == VICTIM:
        for rank in OTHERS:
            WORLD.send("done", rank)
    comm.Barrier()
    report(seen=seen)


@scene
def carry() -> None:
    """Every input counts once, in time or later; the end of the job takes what is left."""
    comm = init()
    sums: dict[int, float] = dict.fromkeys(COUNTS, 0.0)
    for step in range(30):
        for count in COUNTS:
            if step % 10 == 0:
                held_up(comm)
            result = np.zeros(count)
            comm.Allreduce(
                np.full(count, (RANK + 1.0) * (step + 1)), result, quorum=ENOUGH, late="carry",
                name=f"of {count}",
            )  # fmt: skip
            assert (result == result[0]).all()
            sums[count] += result[0]
    for count in COUNTS:
        result = np.zeros(count)
        outcome = comm.Flush(result, name=f"of {count}")
        assert outcome.contributors == tuple(range(SIZE))
        sums[count] += result[0]
        again = np.ones(count)
        comm.Flush(again, name=f"of {count}")
        assert (again == 0).all()
    wanted = sum(rank * (step + 1.0) for rank in range(1, SIZE + 1) for step in range(30))
    right = all(total == wanted for total in sums.values())
    report(right=right)


@scene
def missed() -> None:
    """Little is kept: a late rank misses the first results, and has the last; its input counts."""
    count = 20_000
    comm = init(late_bytes=3 * 8 * count)
    given, numbers, had = 0, [], []
    comm.Barrier()
    if RANK == VICTIM:
        for rank in OTHERS:
            WORLD.recv(source=rank)      # they have all results by now
    total = 0.0
    for step in range(10):
        result = np.zeros(count)
        given += 1
        try:
            data = np.full(count, 2.0**RANK)
            comm.Allreduce(data, result, quorum=ENOUGH, late="carry")
            had.append(step)
            total += result[0]
            assert (result == result[0]).all()
        except errors.MissedError as error:
            numbers.append(error.seq)
            assert str(error).startswith(f"Allreduce (operation {step + 1} of this communicator)")
    if RANK != VICTIM:
        WORLD.send("done", VICTIM)
    result = np.zeros(count)
    comm.Flush(result)
    total += result[0]
    report(missed=numbers, had=had, total=total, given=given)


@scene
def bound() -> None:
    """The others run ahead so far, and no farther."""
    comm = init()
    if RANK == VICTIM:
        for rank in OTHERS:
            WORLD.recv(source=rank)      # they have 64 results by now
    begin_s, end_s = time.monotonic(), []
    for number in range(200):
        bits(comm, 1, quorum=1)
        end_s.append(time.monotonic())
        if number == 63 and RANK != VICTIM:
            WORLD.send("64", VICTIM)
    comm.Barrier()
    report(begin_s=begin_s, next_s=end_s[64])


@scene
def few() -> None:
    """Fewer are alive than the quorum: those are enough."""
    comm = init()
    if RANK == VICTIM:
        os.kill(os.getpid(), 9)
    while bits(comm, 10, quorum=SIZE) != tuple(OTHERS):
        pass
    seen = [bits(comm, count, quorum=SIZE) for count in COUNTS]
    comm.Barrier()
    report(seen=seen)


@scene
def death() -> None:
    """A rank dies by a planted fault while partial operations run; another is late at times."""
    comm = init()
    slow = (VICTIM + 1) % SIZE
    sums, given = np.zeros(1), 0.0
    steps = 60
    for step in range(steps):
        if RANK == slow and step % 20 == 5:
            compute(0.05)
        for count in (7, 50_000):
            result = np.zeros(count)
            outcome = comm.Allreduce(
                np.full(count, 1.0), result, quorum=ENOUGH, late="carry", name=str(count)
            )
            assert (result == result[0]).all() and result[0] >= len(outcome.contributors)
            sums += result[0]
            given += 1
    for count in (7, 50_000):
        result = np.zeros(count)
        outcome = comm.Flush(result, name=str(count))
        sums += result[0]
    # Of each survivor every input counts once; of the dead one at most what it had given.
    survivors = (SIZE - 1) * given
    assert survivors <= sums[0] <= SIZE * given, (survivors, sums, given)
    report(total=sums[0], alive=comm.alive)


@scene
def differ() -> None:
    """Ranks that ask for different quorums, or carry under different names, are told: at the latest
    when nobody may run ahead any farther (see `bound`)."""
    comm = init()
    sub = comm.Dup()
    messages = []
    for one, how in (
        (comm, {"quorum": 1 + (RANK == VICTIM)}),
        (sub, {"late": "carry", "name": "b" if RANK == VICTIM else "a"}),
    ):
        try:
            for _ in range(200):
                one.Allreduce(np.ones(10), np.zeros(10), **how)
        except ValueError as error:
            messages.append(str(error))
    report(messages=messages)


@scene
def detour() -> None:
    """A Bcast goes around a rank that is late, also where it is the last; it gets the bytes too."""
    comm = init()
    seen: list[tuple[int, ...]] = []

    def work(count: int, root: int) -> None:
        data = np.full(count, float(root) if RANK == root else -1.0)
        seen.append(comm.Bcast(data, root).contributors)
        assert (data == root).all()
        data[:] = -2.0

    for count in COUNTS[1:]:
        for root in OTHERS:
            last(partial(work, count, root))
    comm.Barrier()
    report(seen=seen, detours=comm.counters()["detours"])


@scene
def arrival() -> None:
    """In the order in which the ranks call, whoever is late; the result is of all."""
    comm = init()
    seen = []
    for number, count in enumerate(COUNTS):
        for late in range(SIZE):
            if RANK == late:
                compute(0.02)
            seen.append(bits(comm, count, order="arrival"))
            result = np.zeros(count)
            root = (late + number) % SIZE
            outcome = comm.Reduce(
                np.full(count, 2.0**RANK), result, hopcoll.SUM, root, order="arrival"
            )
            assert RANK != root or (result == 2**SIZE - 1).all()
            seen.append(outcome.contributors)
    report(seen=seen)


@scene
def arrival_death() -> None:
    """A rank dies in the middle of that, by a planted fault."""
    comm = init()
    seen = []
    slow = (VICTIM + 1) % SIZE
    for step in range(30):
        if RANK == slow and step % 10 == 5:
            compute(0.02)
        seen.append(bits(comm, 200_001, order="arrival"))
        result = np.zeros(50_001)
        outcome = comm.Reduce(np.full(50_001, 2.0**RANK), result, root=slow, order="arrival")
        if RANK == slow:
            assert (result == sum(2**rank for rank in outcome.contributors)).all()
        seen.append(outcome.contributors)
    report(seen=seen, alive=comm.alive)


@scene
def in_a_branch() -> None:
    """In a communicator that was split off, with numbers of its own."""
    comm = init()
    sub = comm.Split(0, -RANK)
    assert sub is not None
    seen: list[tuple[int, ...]] = []

    def work(count: int) -> None:
        seen.append(bits(sub, count, quorum=SIZE - 1))
        seen.append(bits(sub, count, deadline_s=BREAK_S / 4))

    for count in COUNTS:
        last(partial(work, count))
        sub.Barrier()
    report(seen=seen)


if __name__ == "__main__":
    SCENES[sys.argv[1]]()
