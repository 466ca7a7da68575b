"""What one rank may do to itself in the middle of a job; one scene a job.

    mpirun -n 3 python -m tests.mpi.programs.life SCENE

Each rank that gets so far prints a line of JSON with what it saw. Where ranks have to come in some
order they wait for each other with messages of mpi4py, never for time to pass.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

import hopcoll
from hopcoll import errors
from tests.mpi.programs import ctrl_c

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
ALL = list(range(SIZE))
ODD_ONE = 1  # the rank to which things happen
LARGE = 200_001

SCENES: dict[str, Callable[[], None]] = {}


def scene(function: Callable[[], None]) -> Callable[[], None]:
    SCENES[function.__name__] = function
    return function


def report(**seen: object) -> None:
    # One write, so that the lines of two ranks do not mix.
    os.write(1, (json.dumps({"rank": RANK, **seen}) + "\n").encode())


def allreduce(comm: hopcoll.Communicator, count: int = 1000) -> hopcoll.Outcome:
    """Sum ones, and check that each contributor was counted once."""
    result = np.zeros(count)
    outcome = comm.Allreduce(np.ones(count), result)
    assert (result == len(outcome.contributors)).all(), (result, outcome)
    return outcome


def go_on(comm: hopcoll.Communicator) -> None:
    """What the others do when the odd one is gone: work until they are among themselves."""
    others = tuple(rank for rank in ALL if rank != ODD_ONE)
    steps = 0
    while allreduce(comm).contributors != others:
        steps += 1
        assert steps < 1_000_000
    for _ in range(5):
        assert allreduce(comm, LARGE).contributors == others
    comm.Barrier()
    report(alive=comm.alive, epoch=comm.epoch)


# ---- leaving --------------------------------------------------------------------------------


@scene
def exception() -> None:
    comm = hopcoll.init()
    allreduce(comm)
    if RANK == ODD_ONE:
        raise RuntimeError("this rank has had enough")
    go_on(comm)


@scene
def exception_with_requests() -> None:
    """The error comes while operations are under way."""
    comm = hopcoll.init()
    if RANK == ODD_ONE:
        comm.Iallreduce(np.ones(LARGE), np.zeros(LARGE))
        comm.Ibarrier()
        raise RuntimeError("this rank has had enough")
    allreduce(comm, LARGE)
    comm.Barrier()
    go_on(comm)


@scene
def exception_inside_with() -> None:
    caught = False
    try:
        with hopcoll.init() as comm:
            allreduce(comm)
            if RANK == ODD_ONE:
                raise RuntimeError("this rank has had enough")
            go_on(comm)
    except RuntimeError:
        caught = True
    assert caught == (RANK == ODD_ONE)


@scene
def interrupt_uncaught() -> None:
    comm = hopcoll.init()
    allreduce(comm)
    if RANK == ODD_ONE:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        while True:
            pass
    go_on(comm)


@scene
def sys_exit() -> None:
    comm = hopcoll.init()
    allreduce(comm)
    if RANK == ODD_ONE:
        sys.exit(3)
    go_on(comm)


@scene
def sys_exit_everywhere() -> None:
    comm = hopcoll.init()
    allreduce(comm)
    report()
    raise SystemExit(7)


@scene
def close_early() -> None:
    """One rank leaves the communicator, but not the job."""
    comm = hopcoll.init()
    allreduce(comm)
    if RANK == ODD_ONE:
        assert comm.close()
        try:
            comm.Barrier()
        except errors.ClosedError as error:
            report(closed=str(error))
    else:
        go_on(comm)
    WORLD.Barrier()


@scene
def killed_then_exit_code() -> None:
    comm = hopcoll.init()
    allreduce(comm)
    if RANK == ODD_ONE:
        os.kill(os.getpid(), signal.SIGKILL)
    go_on(comm)
    sys.exit(5 if RANK == 0 else 0)


@scene
def killed() -> None:
    comm = hopcoll.init()
    allreduce(comm)
    if RANK == ODD_ONE:
        os.kill(os.getpid(), signal.SIGKILL)
    go_on(comm)


@scene
def forked_then_killed() -> None:
    """What a rank had forked outlives it, and has its output open."""
    comm = hopcoll.init()
    allreduce(comm)
    if RANK == ODD_ONE:
        if os.fork() == 0:
            signal.pause()
        os.kill(os.getpid(), signal.SIGKILL)
    go_on(comm)


@scene
def os_exit() -> None:
    comm = hopcoll.init()
    allreduce(comm)
    if RANK == ODD_ONE:
        os._exit(1)
    go_on(comm)


@scene
def os_exit_everywhere() -> None:
    comm = hopcoll.init()
    allreduce(comm)
    comm.close()
    report()
    os._exit(0)


@scene
def pending_at_exit() -> None:
    """All leave with requests that nobody waits for; each one's data reaches the others."""
    comm = hopcoll.init()
    result = np.zeros(LARGE)
    requests = [comm.Ibarrier(), comm.Iallreduce(np.ones(LARGE), result)]
    if RANK != ODD_ONE:
        outcomes = [request.wait() for request in requests]
        report(
            contributors=[outcome.contributors for outcome in outcomes],
            correct=bool((result == SIZE).all()),
        )


# ---- requests -------------------------------------------------------------------------------


@scene
def collected() -> None:
    """A request that nobody holds any more goes on, and its buffers stay valid."""
    comm = hopcoll.init()
    result = np.zeros(LARGE)
    comm.Iallreduce(np.ones(LARGE), result)  # the input too is held by nobody else
    gc.collect()
    junk = [np.full(LARGE, np.nan) for _ in range(5)]
    del junk
    # Operations complete in their order, so behind this one the dropped one is complete.
    outcome = allreduce(comm, LARGE)
    report(contributors=outcome.contributors, correct=bool((result == SIZE).all()))


@scene
def interrupt() -> None:
    """Ctrl-C inside a wait: the operation goes on, and can be waited for again."""
    comm = hopcoll.init()
    result = np.zeros(LARGE)
    if RANK == ODD_ONE:
        request = comm.Iallreduce(np.ones(LARGE), result)
        try:
            ctrl_c.comes_inside(hopcoll.Request.wait)
            request.wait()
        except KeyboardInterrupt:
            interrupted = request.outcome is None
        for other in ALL:
            if other != ODD_ONE:
                WORLD.send("go", other)
    else:
        WORLD.recv(source=ODD_ONE)
        request = comm.Iallreduce(np.ones(LARGE), result)
        interrupted = True
    outcome = request.wait()
    correct = bool((result == SIZE).all())
    # The same in a blocking call, whose request nobody has: when it waits it has begun.
    if RANK == ODD_ONE:
        try:
            ctrl_c.comes_inside(hopcoll.Request.wait)
            comm.Allreduce(np.ones(LARGE), result, op=hopcoll.PROD)
        except KeyboardInterrupt:
            for other in ALL:
                if other != ODD_ONE:
                    WORLD.send("go", other)
    else:
        WORLD.recv(source=ODD_ONE)
        comm.Allreduce(np.ones(LARGE), result, op=hopcoll.PROD)
    again = allreduce(comm).contributors
    report(
        interrupted=interrupted,
        contributors=[outcome.contributors, again],
        correct=correct and bool((result == 1).all()),
    )


@scene
def interrupt_while_closing() -> None:
    """Ctrl-C while a rank waits in close for the others: it leaves all the same, and they go on."""
    comm = hopcoll.init()
    allreduce(comm)
    if RANK == ODD_ONE:
        comm.Iallreduce(np.ones(LARGE), np.zeros(LARGE))  # what it would wait for
        try:
            ctrl_c.comes_inside(hopcoll.Communicator._leave)
            comm.close()
        except KeyboardInterrupt:
            report(closed=True)
        for other in ALL:
            if other != ODD_ONE:
                WORLD.send("go", other)
        return
    WORLD.recv(source=ODD_ONE)
    go_on(comm)


@scene
def mpi_finalize() -> None:
    """The program ends MPI itself, with communicators open: they are closed first."""
    comm = hopcoll.init()
    with hopcoll.Communicator(WORLD) as second:
        allreduce(second)
    third = hopcoll.Communicator(WORLD)
    allreduce(third)
    outcome = allreduce(comm, LARGE)
    MPI.Finalize()
    try:
        third.Barrier()
    except errors.ClosedError:
        report(contributors=outcome.contributors)


@scene
def mpi_finalize_by_one() -> None:
    comm = hopcoll.init()
    allreduce(comm)
    if RANK == ODD_ONE:
        MPI.Finalize()
        return
    go_on(comm)


@scene
def too_many_open() -> None:
    """A start that has to wait keeps to the limit of its call."""
    comm = hopcoll.init()
    if RANK == ODD_ONE:
        for other in ALL:
            if other != ODD_ONE:
                WORLD.recv(source=other)
        for _ in range(64):
            comm.Barrier()
        report(refused=True)
        return
    requests = []
    refused = False
    try:
        while len(requests) < 200:
            requests.append(comm.Ibarrier(timeout_s=0.1))
    except errors.TransferTimeoutError as error:
        refused = error.request is None and len(requests) == 64
    WORLD.send("go", ODD_ONE)
    for request in requests:
        request.wait(timeout_s=60)
    report(refused=refused)


@scene
def dropped_when_complete() -> None:
    """A request that nobody waits for lets go of its buffers once its operation is over."""
    comm = hopcoll.init()
    result = np.zeros(LARGE)
    request = comm.Iallreduce(np.ones(LARGE), result)
    lives = weakref.ref(result)
    comm.Barrier()
    del request, result
    for _ in range(3):
        comm.Barrier()
    gc.collect()
    report(lives=lives() is not None)


@scene
def timeout() -> None:
    """One rank comes late: the others see a timeout, and the same operation completes later."""
    comm = hopcoll.init(timeout_s=0.1)
    result = np.zeros(LARGE)
    timeouts = 0
    if RANK == ODD_ONE:
        for other in ALL:
            if other != ODD_ONE:
                WORLD.recv(source=other)
        request = comm.Iallreduce(np.ones(LARGE), result)
    else:
        request = comm.Iallreduce(np.ones(LARGE), result)
        for limit_s in (None, 0.02, 0):
            try:
                request.wait(limit_s)
            except TimeoutError as error:
                timeouts += 1
                assert isinstance(error, errors.TransferTimeoutError)
        WORLD.send("late", ODD_ONE)
    outcome = request.wait(timeout_s=60)
    report(
        timeouts=timeouts,
        contributors=outcome.contributors,
        correct=bool((result == SIZE).all()),
    )


@scene
def stable() -> None:
    """An outcome becomes stable without further calls, and stays so."""
    comm = hopcoll.init(timeout_s=60)
    outcomes = [allreduce(comm, count) for count in (1, 10_000, LARGE)]
    outcomes.append(comm.Bcast(np.zeros(10)))
    comm.Barrier()
    while not all(outcome.stable() for outcome in outcomes):
        pass
    comm.Barrier()
    report(stable=all(outcome.stable() for outcome in outcomes))


# ---- fork -----------------------------------------------------------------------------------


def square(number: int) -> int:
    return number * number


@scene
def fork() -> None:
    """A child is refused, ends like any process, and its parent goes on."""
    comm = hopcoll.init()
    request = comm.Ibarrier()
    pid = os.fork()
    if pid == 0:
        refused = 0
        for call in (
            lambda: allreduce(comm),
            comm.Barrier,
            request.wait,
            request.test,
            lambda: comm.alive,
            hopcoll.init,
        ):
            try:
                call()
            except errors.ClosedError as error:
                refused += "fork" in str(error)
        comm.close()
        sys.exit(40 + refused)  # through the interpreter: every exit hook runs
    _, status = os.waitpid(pid, 0)
    request.wait()
    outcome = allreduce(comm, LARGE)
    report(child=os.waitstatus_to_exitcode(status), contributors=outcome.contributors)


@scene
def data_loader() -> None:
    """Processes that compute for a rank while it communicates."""
    comm = hopcoll.init()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pending = pool.map_async(square, range(100))
        for _ in range(20):
            allreduce(comm, LARGE)
        squares = pending.get()
    listing = subprocess.run([sys.executable, "-c", "print('out')"], capture_output=True, text=True)
    outcome = allreduce(comm)
    report(squares=sum(squares), out=listing.stdout.strip(), contributors=outcome.contributors)


# ---- communicators --------------------------------------------------------------------------


@scene
def split() -> None:
    """Communicators over parts of the world, with ranks of their own, used in turn."""
    world = hopcoll.init()
    part = WORLD.Split(RANK % 2, key=-RANK)  # reversed order
    comm = hopcoll.Communicator(part, chunk_bytes=1024)
    total = np.zeros(LARGE)
    for _ in range(3):
        outcome = comm.Allreduce(np.full(LARGE, float(RANK)), total)
        assert outcome.contributors == tuple(range(part.size))
        assert (total == sum(range(RANK % 2, SIZE, 2))).all()
        allreduce(world, LARGE)
    data = np.full(10, RANK)
    comm.Bcast(data, root=0)
    highest = max(range(RANK % 2, SIZE, 2))
    first = [comm.rank, comm.size, int(data[0]) == highest]
    comm.close()
    part.Free()
    again = hopcoll.Communicator(WORLD)
    allreduce(again)
    report(part=first, epoch=again.epoch)


@scene
def init() -> None:
    comm = hopcoll.init(timeout_s=30)
    assert hopcoll.init() is comm
    assert hopcoll.init(timeout_s=30) is comm
    try:
        hopcoll.init(timeout_s=31)
    except ValueError as error:
        refused = str(error)
    comm.close()
    second = hopcoll.init(timeout_s=31)
    assert second is not comm
    report(refused=refused, contributors=allreduce(second).contributors)


@scene
def settings_differ() -> None:
    """All ranks learn of it, and can make one with the right settings then."""
    chunk_bytes = 2048 if RANK == ODD_ONE else 1024
    try:
        hopcoll.Communicator(WORLD, chunk_bytes=chunk_bytes)
    except ValueError as error:
        message = str(error)
    comm = hopcoll.Communicator(WORLD, chunk_bytes=1024)
    report(message=message, contributors=allreduce(comm).contributors)


@scene
def no_communicator() -> None:
    """What is no communicator is refused before anything is sent."""
    messages = []
    for wrong in (None, "world", MPI.COMM_NULL, hopcoll.init()):
        try:
            hopcoll.Communicator(wrong)
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    inter = WORLD.Split(RANK == 0).Create_intercomm(0, WORLD, 1 if RANK == 0 else 0)
    try:
        hopcoll.Communicator(inter)
    except TypeError as error:
        messages.append(str(error))
    report(messages=messages)


@scene
def counters() -> None:
    comm = hopcoll.init()
    before = comm.counters()
    before["ballots"] = -1
    allreduce(comm, LARGE)
    after = comm.counters()
    comm.Barrier()  # nobody leaves before all have counted
    report(ballots=after["ballots"], sent=after["bytes_sent"] > 8 * LARGE // SIZE)


@scene
def over_two_gib() -> None:
    """More bytes than 31 bits can count."""
    comm = hopcoll.init()
    count = 2**31 + 3
    data = np.zeros(count, np.int8)
    if RANK == 0:
        data[::1_000_003] = 7
        data[-1] = 9
    comm.Bcast(data)
    report(
        marks=int(np.count_nonzero(data)),
        last=int(data[-1]),
        right=bool((data[::1_000_003] == 7).all()),
    )


if __name__ == "__main__":
    SCENES[sys.argv[1]]()
