"""Communicators that are split off others; one scene a job.

    hopcoll run -n 5 -m tests.mpi.programs.groups SCENE [VICTIM]

Each rank that gets so far prints a line of JSON with what it saw.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

import hopcoll
from hopcoll import errors
from tests.mpi.programs import ctrl_c
from tests.mpi.programs.collectives import CHUNK_BYTES, EAGER_BYTES, WINDOW_CHUNKS
from tests.mpi.programs.family import Family, any_case

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
ALL = tuple(range(SIZE))
VICTIM = int(sys.argv[2]) if len(sys.argv) > 2 else 1
OTHERS = tuple(rank for rank in ALL if rank != VICTIM)
LARGE = 200_001
TIMEOUT_S = 40

SCENES: dict[str, Callable[[], None]] = {}


def scene(function: Callable[[], None]) -> Callable[[], None]:
    SCENES[function.__name__] = function
    return function


def report(**seen: object) -> None:
    # One write, so that the lines of two ranks do not mix.
    os.write(1, (json.dumps({"rank": RANK, **seen}) + "\n").encode())


def init(**settings: Any) -> hopcoll.Communicator:
    return hopcoll.init(timeout_s=TIMEOUT_S, **settings)


def small_chunks() -> hopcoll.Communicator:
    """Little data makes many chunks."""
    return init(chunk_bytes=CHUNK_BYTES, window_chunks=WINDOW_CHUNKS, eager_bytes=EAGER_BYTES)


def split(comm: hopcoll.Communicator, color: int, key: int = 0) -> hopcoll.Communicator:
    made = comm.Split(color, key)
    assert made is not None
    return made


def world_ranks(*line: hopcoll.Communicator) -> tuple[int, ...]:
    """What the ranks of the last are in the first, where each was split off the one before."""
    ranks = line[-1].parent_ranks
    for one in reversed(line[1:-1]):
        ranks = tuple(one.parent_ranks[rank] for rank in ranks)
    return ranks


def total(comm: hopcoll.Communicator, count: int = 1000) -> tuple[int, ...]:
    """Add up bits, one for each rank of the world, and check that they are the contributors'."""
    result = np.zeros(count)
    outcome = comm.Allreduce(np.full(count, 2.0**comm.rank), result)
    assert (result == sum(2**rank for rank in outcome.contributors)).all(), (result, outcome)
    return outcome.contributors


def begin_total(comm: hopcoll.Communicator) -> None:
    """What a rank leaves behind that goes in the middle of `total`: all of it may have arrived."""
    comm.Iallreduce(np.full(LARGE, 2.0**comm.rank), np.zeros(LARGE))


def until_among(comm: hopcoll.Communicator, living: tuple[int, ...], count: int = 1000) -> None:
    """Work until the others are gone, then some more."""
    steps = 0
    while total(comm, count) != living:
        steps += 1
        assert steps < 1_000_000
    for _ in range(3):
        assert total(comm, LARGE) == living
    comm.Barrier()
    assert comm.alive == living


# ---- nobody dies ----------------------------------------------------------------------------


@scene
def kinds() -> None:
    """The whole family in communicators of all sorts, one after the other."""
    world = small_chunks()
    failures: list[str] = []
    sorts = {
        "parity": (RANK % 2, RANK),
        "reversed": (0, -RANK),
        "reversed parts": (RANK * 2 // SIZE, SIZE - RANK),
        "alone": (RANK, 0),
        "equal keys": (1 << 60, 5),
        "rotated": (3, (RANK + 1) % SIZE - (1 << 62)),
        "all but one": (0 if RANK else None, 0),
    }
    for number, (name, (color, key)) in enumerate(sorts.items()):
        comm = world.Split(color, key)
        table = world.allgather((color, key))
        wanted = sorted(
            (rank for rank in ALL if table[rank][0] == color),
            key=lambda rank: (table[rank][1], rank),
        )
        if color is None:
            assert comm is None
            continue
        assert comm is not None
        assert comm.parent_ranks == tuple(wanted), (name, comm.parent_ranks, wanted)
        assert (comm.size, comm.parent_ranks[comm.rank]) == (len(wanted), RANK)
        assert comm.config == world.config
        run = Family(comm)
        rng = np.random.default_rng(number)
        for _ in range(6):
            for finish in [any_case(run, rng) for _ in range(6)]:
                finish()
        failures += run.failures
        assert comm.allgather(RANK) == wanted
        assert comm.bcast({"root": RANK}, comm.size - 1) == {"root": wanted[-1]}
        comm.Free()
    assert world.Split(MPI.UNDEFINED) is None
    report(failures=failures)


@scene
def overlapping() -> None:
    """Communicators that overlap, used at once, each rank in an order of its own."""
    world = small_chunks()
    comms: list[hopcoll.Communicator | None] = [
        world,
        world.Dup(),
        world.Split(RANK % 2, -RANK),
        world.Split(0 if RANK < SIZE - 1 else None),
        world.Split(0 if RANK > 0 else None, -RANK),
    ]
    assert comms[2] is not None
    comms.append(comms[2].Split(0, -comms[2].rank))
    runs = [(Family(comm), np.random.default_rng(i)) for i, comm in enumerate(comms) if comm]
    for batch in range(10):
        order = np.random.default_rng([batch, RANK])
        finish: list[Callable[[], None]] = []
        for index in order.permutation(np.repeat(np.arange(len(runs)), 4)):
            finish.append(any_case(*runs[index]))
        for index in order.permutation(len(finish)):
            finish[index]()
    report(failures=[failure for run, _ in runs for failure in run.failures])


@scene
def nested() -> None:
    """Halves of halves, down to one rank; those above go on."""
    line = [init()]
    for _ in range(4):
        parent = line[-1]
        line.append(split(parent, parent.rank * 2 // parent.size, -parent.rank))
        assert world_ranks(*line)[line[-1].rank] == RANK
        for one in line:
            assert total(one) == tuple(range(one.size))
    assert line[-1].size == 1
    down = line[-1].Dup()
    assert world_ranks(*line, down) == (RANK,)
    for one in line[1:]:
        one.close()
    assert total(down) == (0,)
    report(depth=len(line), alive=line[0].alive)


@scene
def many() -> None:
    """One after the other, without end; nothing is left of those that were closed."""
    world = init()
    rounds, seen = 400, []
    for number in range(rounds):
        comm = world.Split(RANK % 2 if number % 3 else 0, -RANK)
        assert comm is not None
        total(comm, 10_000 if number % 10 == 0 else 1)
        assert comm.close()
        del comm
        if number % 100 == 99:
            gc.collect()
            seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    report(grown_kib=seen[-1] - seen[0], alive=world.alive)


@scene
def too_many() -> None:
    """Where one rank has no place, all are told, and everything goes on."""
    world = init()
    odd = RANK == SIZE - 1
    comms = [world.Split(0 if odd or i == 0 else None) for i in range(64)]
    messages = []
    for color in (0, 0 if odd else None, None if odd else 0):
        try:
            comms.append(world.Split(color))
        except ValueError as error:
            messages.append(str(error))
    made = [comm for comm in comms if comm is not None]
    for comm in made[1:]:
        assert comm.size == (1 if odd else SIZE - 1)
    assert total(made[0]) == ALL
    made[0].close()
    assert total(world.Dup()) == ALL
    report(messages=messages, made=len(made))


@scene
def user_operations() -> None:
    """What is the caller's own runs with the right arrays in each communicator."""
    world = init()
    halves = split(world, RANK % 2)
    lower = hopcoll.Op.Create(lambda a, b: np.minimum(a, b))
    left = hopcoll.Op.Create(lambda a, b: a, commute=False)
    requests, results = [], []
    for comm, op in ((world, lower), (halves, left), (halves, lower), (world, left)):
        results.append(np.zeros(LARGE, np.int64 if comm is world else np.float32))
        mine = np.full_like(results[-1], 10 + RANK)
        requests.append(comm.Iallreduce(mine, results[-1], op))
    for request in requests:
        request.wait()
    first = halves.parent_ranks[0]
    report(
        failures=[
            i
            for i, want in enumerate((10, 10 + first, 10 + first, 10))
            if not (results[i] == want).all()
        ]
    )


@scene
def two_threads() -> None:
    """Each thread has a communicator."""
    world = init()
    comms = [world.Dup(), world.Split(0, -RANK), world]
    ended = []

    def work(comm: hopcoll.Communicator) -> None:
        for i in range(60):
            total(comm, 5 if i % 6 else LARGE)
        ended.append(comm.size)

    threads = [threading.Thread(target=work, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report(ended=ended)


@scene
def arguments_differ() -> None:
    """Breaks the one in which it happens, and no other."""
    world = init()
    comm = world.Dup()
    messages = []
    for _ in range(2):
        try:
            comm.Allreduce(np.ones(10 if RANK else 20), np.zeros(10 if RANK else 20))
        except ValueError as error:
            messages.append(str(error))
    assert total(world) == ALL
    try:
        world.Split() if RANK else world.allgather(None)
    except ValueError as error:
        messages.append(str(error))
    report(messages=messages)


# ---- closing --------------------------------------------------------------------------------


@scene
def close_order() -> None:
    """Parents and children in any order; the first of all closes all."""
    world = init()
    child = world.Dup()
    grandchild = child.Dup()
    child.close()
    assert total(grandchild) == ALL
    with world.Dup() as within:
        total(within)
    other = split(world, RANK % 2)
    pending = np.zeros(LARGE)
    request = grandchild.Iallreduce(np.ones(LARGE), pending)
    assert world.close()
    refused = []
    for comm in (child, grandchild, within, other, world):
        try:
            comm.Barrier()
        except errors.ClosedError as error:
            refused.append(str(error))
        assert comm.close()
    report(
        refused=len(refused), pending=bool((pending == SIZE).all()), outcome=request.wait().epoch
    )


@scene
def left_open() -> None:
    """The end of the program closes them, after what is under way."""
    world = init()
    comms = [world.Dup(), split(world, RANK % 2), world]
    comms.append(comms[0].Dup())
    results = [np.zeros(LARGE) for _ in comms]
    requests = [
        comm.Iallreduce(np.ones(LARGE), result) for comm, result in zip(comms, results, strict=True)
    ]
    if RANK != VICTIM:
        for request in requests:
            request.wait()
        report(correct=[bool((r == c.size).all()) for c, r in zip(comms, results, strict=True)])


@scene
def leave_one() -> None:
    """A rank leaves one communicator, and works on in the others."""
    world = init()
    comm = world.Dup()
    total(comm)
    if RANK == VICTIM:
        assert comm.close()
    else:
        until_among(comm, OTHERS)
    assert total(world) == ALL
    again = split(world, 0)
    assert total(again) == ALL
    report(alive=world.alive, epoch=world.epoch)


@scene
def leave_with_an_error() -> None:
    """An exception leaves the communicator of a with block at once, and no other."""
    world = init()
    caught = False
    try:
        with world.Dup() as comm:
            total(comm)
            if RANK == VICTIM:
                begin_total(comm)
                raise RuntimeError("this rank has had enough")
            until_among(comm, OTHERS, LARGE)
    except RuntimeError:
        caught = True
    assert total(world) == ALL
    report(caught=caught == (RANK == VICTIM), epoch=world.epoch)


@scene
def exception() -> None:
    """An uncaught exception leaves all of them."""
    world = init()
    comms = [world.Dup(), split(world, 0, -RANK)]
    for comm in comms:
        total(comm)
    if RANK == VICTIM:
        begin_total(comms[1])
        raise RuntimeError("this rank has had enough")
    until_among(comms[0], OTHERS)
    until_among(comms[1], tuple(sorted(SIZE - 1 - rank for rank in OTHERS)), LARGE)
    until_among(world, OTHERS)
    report(alive=world.alive)


@scene
def interrupt() -> None:
    """Ctrl-C in a wait of one of them; then it goes on."""
    world = init()
    comm = world.Dup()
    interrupted = False
    if RANK == VICTIM:
        request = comm.Ibarrier()
        try:
            ctrl_c.comes_inside(hopcoll.Request.wait)
            request.wait()
        except KeyboardInterrupt:
            interrupted = True
        WORLD.Barrier()
        request.wait()
    else:
        WORLD.Barrier()
        comm.Barrier()
        interrupted = True
    report(interrupted=interrupted, contributors=total(comm))


@scene
def fork() -> None:
    """A child is refused in all of them."""
    world = init()
    comm = world.Dup()
    total(comm)
    child = os.fork()
    if child == 0:
        refused = 0
        for one in (comm, world):
            try:
                one.Barrier()
            except errors.ClosedError:
                refused += 1
            one.close()
        os._exit(40 + refused)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    report(child=code, contributors=total(comm))


@scene
def timeout() -> None:
    """A split that takes too long at one rank: the others get one, and go on without that rank."""
    world = init()
    late = world.Dup()
    if RANK == VICTIM:
        WORLD.Barrier()
    else:
        try:
            late.Split(0, timeout_s=0.05)
        except errors.TransferTimeoutError as error:
            said = str(error)
        WORLD.Barrier()
        assert "Allgather" in said
    late.close()
    assert total(world.Dup()) == ALL
    report(alive=world.alive)


if __name__ == "__main__":
    SCENES[sys.argv[1]]()
