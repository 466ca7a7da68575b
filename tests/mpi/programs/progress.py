"""Ranks that hold the GIL while others need them: argv[1] says which scene, argv[2] a file.

The file is shared memory: a rank in a loop sees in it what the others have reached, without a call
that would release the GIL.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time

import numpy as np

import hopcoll

LARGE = 1 << 22
BOUNDED_S = 0.5


def loop_until(shared: mmap.mmap, flags: list[int], for_s: float = float("inf")) -> bool:
    """Loop in Python, without a call into hopcoll, until all of these flags are set."""
    end_s = time.perf_counter() + for_s
    while time.perf_counter() < end_s:
        if all(shared[flag] for flag in flags):
            return True
    return False


def relay(comm: hopcoll.Communicator, shared: mmap.mmap) -> dict[str, object]:
    """Rank 1 passes a broadcast on; it leaves its loop when rank 2 has it."""
    array = np.full(LARGE, 7 if comm.rank == 0 else 0, np.uint8)
    if comm.rank == 1:
        request = comm.Ibcast(array, root=0)
        seen = loop_until(shared, [2])
        request.wait()
    else:
        comm.Bcast(array, root=0)
        seen = None
        shared[comm.rank] = 1
    return {"seen": seen, "right": bool((array == 7).all())}


def answer(comm: hopcoll.Communicator, shared: mmap.mmap) -> dict[str, object]:
    """Rank 1 has what the others, who come later, ask it for."""
    array = np.full(1 << 14, 7 if comm.rank == 1 else 0, np.uint8)
    if comm.rank != 1:
        loop_until(shared, [1])
    request = comm.Ibcast(array, root=1)
    if comm.rank != 1:
        request.wait()
    shared[comm.rank] = 1
    seen = loop_until(shared, [0, 2]) if comm.rank == 1 else None
    request.wait()
    return {"seen": seen, "right": bool((array == 7).all())}


def repair(comm: hopcoll.Communicator, shared: mmap.mmap) -> dict[str, object]:
    """Rank 0 dies; the others decide it and finish while rank 1 is in its loop."""
    total = np.empty(LARGE // 8)
    if comm.rank == 0:
        loop_until(shared, [3])
        os.kill(os.getpid(), signal.SIGKILL)
    if comm.rank == 1:
        request = comm.Iallreduce(np.ones(LARGE // 8), total)
        shared[3] = 1
        seen = loop_until(shared, [2])
        outcome = request.wait()
    else:
        outcome = comm.Allreduce(np.ones(LARGE // 8), total)
        shared[2] = 1
        seen = None
    return {"seen": seen, "right": bool((total == 2).all()), "who": outcome.contributors}


def nothing_without_the_thread(comm: hopcoll.Communicator, shared: mmap.mmap) -> dict[str, object]:
    """What `relay` shows does not happen without the thread; the call itself does the work."""
    array = np.full(LARGE, 7 if comm.rank == 0 else 0, np.uint8)
    if comm.rank == 1:
        request = comm.Ibcast(array, root=0)
        shared[comm.rank] = 1
        seen = loop_until(shared, [2], BOUNDED_S)
        request.wait()
    else:
        # Who has not called yet is gone around: rank 1 comes first.
        loop_until(shared, [1], 10 * BOUNDED_S)
        comm.Bcast(array, root=0)
        shared[comm.rank] = 1
        seen = None
    return {"seen": seen, "right": bool((array == 7).all())}


def main() -> None:
    sys.setswitchinterval(1000)  # whoever holds the GIL keeps it
    scene, path = sys.argv[1:]
    with open(path, "r+b") as file:
        shared = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    comm = hopcoll.init()
    found = globals()[scene](comm, shared)
    print(json.dumps({"rank": comm.rank, **found}), flush=True)


main()
