"""Objects on real ranks; one scene a job.

    mpirun -n 5 python -m tests.mpi.programs.shared_objects SCENE

Each rank that gets to the end prints a line of JSON with what it saw. A rank that is to die ends
itself by SIGKILL when its own store has sent so much.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import signal
import sys
from collections.abc import Callable

import numpy as np

import hopcoll
from hopcoll import errors
from hopcoll.objects import ObjectRef

LARGE = 4_000_003
LIMIT_S = 30.0
SCENES: dict[str, Callable[[hopcoll.Communicator], dict[str, object]]] = {}


def scene(function):
    SCENES[function.__name__] = function
    return function


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pattern(seed: int, count: int = LARGE) -> np.ndarray:
    return np.arange(seed, seed + count, dtype=np.float64)


def is_right(array: np.ndarray, seed: int, count: int = LARGE) -> bool:
    return array.dtype == np.float64 and bool((array == pattern(seed, count)).all())


def among(comm: hopcoll.Communicator, *dead: int) -> list[int]:
    """Goes on until all know that these ranks are dead."""
    others = tuple(rank for rank in range(comm.size) if rank not in dead)
    while comm.Barrier().contributors != others:
        pass
    return list(others)


def settle(comm: hopcoll.Communicator, names: list[str]) -> dict[str, int]:
    """The lowest rank alive deletes all; what is left here then."""
    comm.Barrier()
    if comm.rank == min(comm.alive):
        for name in names:
            comm.objects.delete(name, timeout_s=LIMIT_S)
    comm.Barrier()
    while comm.objects.stats()["streams"]:  # the last voids are still under way
        comm.objects._keeper.turn()
    left = comm.objects.stats()
    return {name: left[name] for name in ("used_bytes", "streams")}


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        assert getattr(error, "ref", None) is None or isinstance(error.ref, ObjectRef)
        return type(error).__name__
    return "none"


@scene
def broadcast(comm: hopcoll.Communicator) -> dict[str, object]:
    """Everyone waits before it is put."""
    comm.Barrier()
    if comm.rank == 0:
        comm.objects.put(pattern(7), "weights")
    array = comm.objects.get("weights", timeout_s=LIMIT_S)
    again = comm.objects.get("weights")
    seen = {
        "right": is_right(array, 7),
        "sealed": not array.flags.writeable,
        "shared": bool(np.shares_memory(array, again)),
        "pulls": comm.objects.stats()["pulls"],
    }
    del again
    left = settle(comm, ["weights"])
    seen["kept"] = left["used_bytes"] == array.nbytes and is_right(array, 7)
    del array
    seen["left"] = comm.objects.stats()["used_bytes"]
    return seen


@scene
def small(comm: hopcoll.Communicator) -> dict[str, object]:
    """Objects of a few sizes, from rank 0 to all; how many of them were pulled."""
    sizes = [512, 513, 16384, 16385, 65536, 65537]
    if comm.rank == 0:
        for nbytes in sizes:
            comm.objects.put(np.full(nbytes, nbytes % 251, np.uint8), id=str(nbytes))
    got = [comm.objects.get(str(nbytes), timeout_s=LIMIT_S) for nbytes in sizes]
    right = all(
        len(array) == nbytes and (array == nbytes % 251).all()
        for array, nbytes in zip(got, sizes, strict=True)
    )
    return {"right": bool(right), "pulls": comm.objects.stats()["pulls"]}


@scene
def sender_killed(comm: hopcoll.Communicator) -> dict[str, object]:
    """Rank 0 put it and dies in the middle of giving it away; rank 1 has all of it."""
    if comm.rank == 0:
        comm.objects.put(pattern(3), "weights")
    if comm.rank == 1:
        comm.objects.get("weights", timeout_s=LIMIT_S)
    comm.Barrier()
    before = comm.objects.stats()["chunks_sent"]
    comm.Barrier()
    if comm.rank == 0:
        while comm.objects.stats()["chunks_sent"] < before + 50:
            comm.objects._keeper.turn()
        die()
    array = comm.objects.get("weights", timeout_s=LIMIT_S)
    right = is_right(array, 3)
    del array
    return {
        "right": right,
        "alive": among(comm, 0),
        "resumed": comm.objects.stats()["resumed"],
        "left": settle(comm, ["weights"]),
    }


@scene
def lost(comm: hopcoll.Communicator) -> dict[str, object]:
    """Whoever had it is dead: who has the ref of the put is told so, and so is who waits."""
    ref = comm.objects.put(pattern(1)) if comm.rank == 1 else None
    ref = comm.bcast(ref, root=1)
    comm.Barrier()
    if comm.rank == 1:
        die()
    among(comm, 1)
    seen = error_of(lambda: comm.objects.get(ref, timeout_s=LIMIT_S))
    comm.Barrier()
    if comm.rank == 0:
        comm.objects.put(pattern(2), ref)
    comm.Barrier()
    again = comm.objects.get(ref, timeout_s=LIMIT_S)
    return {"error": seen, "again": is_right(again, 2)}


@scene
def errors_of_all_kinds(comm: hopcoll.Communicator) -> dict[str, object]:
    """HOPCOLL_OBJECT_BYTES is 100,000 here."""
    objects = comm.objects
    first = objects.put(pattern(0, 4000), f"mine {comm.rank}")
    seen = {
        "exists": error_of(lambda: objects.put(1.0, first)),
        "full": error_of(lambda: objects.put(np.zeros(20_000))),
        "time": error_of(lambda: objects.get("never", timeout_s=0.05)),
        "dtype": error_of(lambda: objects.put(np.array([object()]))),
        "fields": error_of(lambda: objects.put(np.zeros(2, "i4,f8"))),
        "ref": error_of(lambda: objects.get(3)),
        "out": error_of(lambda: objects.get(first, np.zeros(3))),
        "count": error_of(lambda: objects.wait([first], 2)),
    }
    objects.delete(first)
    seen["deleted"] = error_of(lambda: objects.get(first))
    second = objects.put(pattern(5, 4000), first)
    out = np.zeros(4000)
    seen["again"] = objects.get(second, out) is out and is_right(out, 5, 4000)
    comm.Barrier()
    # What is too long for those who get it disturbs nobody else.
    if comm.rank == 0:
        objects.delete(first)
        objects.put(pattern(0, 11_250), "long")
    comm.Barrier()
    if comm.rank:
        seen["full"] += " " + error_of(lambda: objects.get("long", timeout_s=LIMIT_S))
    comm.Barrier()
    if comm.rank == 0:
        objects.delete("long", timeout_s=LIMIT_S)
    other = objects.get("mine 1", timeout_s=LIMIT_S)
    seen["other"] = is_right(other, 5, 4000)
    return seen


@scene
def values(comm: hopcoll.Communicator) -> dict[str, object]:
    """What may be an object, from one rank to the others."""
    given = [
        np.float32(3),
        np.zeros((0, 4), np.int8),
        np.arange(12).reshape(3, 4)[:, ::2],
        np.array(["a", "bcd"]),
        np.array(["2020-02-20"], "M8[D]"),
        b"bytes",
        [[True], [False]],
        np.ones((20, 30, 40), np.complex64),
    ]
    refs = [ObjectRef() for _ in given] if comm.rank == 0 else None
    refs = pickle.loads(pickle.dumps(comm.bcast(refs, root=0)))
    if comm.rank == 0:
        for ref, value in zip(refs, given, strict=True):
            comm.objects.put(value, ref)
    ready, pending = comm.objects.wait(refs, timeout_s=LIMIT_S)
    alike = []
    for ref, value in zip(refs, given, strict=True):
        want = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value)
        array = comm.objects.get(ref, timeout_s=LIMIT_S)
        alike.append(
            array.dtype == want.dtype and array.shape == want.shape and bool((array == want).all())
        )
    few = comm.objects.wait([*refs, "never"], 3, timeout_s=LIMIT_S)
    none = comm.objects.wait(["never"], timeout_s=0.05)
    same = comm.Dup().objects is comm.objects
    return {
        "alike": alike,
        "ready": len(ready) == len(refs) and not pending,
        "few": len(few[0]) >= 3 and len(few[1]) >= 1,
        "none": len(none[0]) == 0 and none[1] == [ObjectRef("never")],
        "same": same,
    }


@scene
def many_deletions(comm: hopcoll.Communicator) -> dict[str, object]:
    """One rank is the owner of all: it remembers the last that were deleted, and no more."""
    objects = comm.objects
    refs = [objects.put(np.ones(3), f"object {number}") for number in range(2500)]
    for ref in refs[::2] + refs[1::2]:
        objects.delete(ref)
    again = ObjectRef(refs[0].name)
    objects.put(np.zeros(3), again)
    objects.delete(again)
    return {
        "remembered": [
            error_of(lambda ref=ref: objects.get(ObjectRef(ref.name), timeout_s=0.05))
            for ref in (refs[0], refs[2], refs[1], refs[-3], refs[-1])
        ],
        "used_bytes": objects.stats()["used_bytes"],
    }


@scene
def tasks(comm: hopcoll.Communicator) -> dict[str, object]:
    """Many tasks of one loop wait for what all ranks put later."""
    objects = comm.objects

    async def fetch(name: str) -> float:
        return float((await objects.get_async(name)).sum())

    async def main() -> list[float]:
        names = [f"{rank} {i}" for rank in range(comm.size) for i in range(8)]
        waiting = [asyncio.create_task(fetch(name)) for name in names]
        gives_up = asyncio.create_task(fetch("never"))
        await asyncio.wait(waiting, timeout=0)
        for i in range(8):
            objects.put(np.full(1 + 1000 * i * i, comm.rank + 1.0), f"{comm.rank} {i}")
        sums = await asyncio.gather(*waiting)
        gives_up.cancel()
        await asyncio.gather(gives_up, return_exceptions=True)
        return sums

    sums = asyncio.run(main())
    want = [(rank + 1.0) * (1 + 1000 * i * i) for rank in range(comm.size) for i in range(8)]
    return {"right": sums == want}


@scene
def storm(comm: hopcoll.Communicator) -> dict[str, object]:
    """Random puts, gets, waits and deletions of a few names, while two ranks die."""
    chance = random.Random(int(sys.argv[2]) * 100 + comm.rank)
    objects, names = comm.objects, [f"name {i}" for i in range(6)]
    ends = {1: 60, 2: 90}.get(comm.rank)
    counts: dict[str, int] = {}
    wrong = 0
    for step in range(150):
        if step == ends:
            objects.put(pattern(1, 100_000), f"last of {comm.rank}")
            die()
        name, what = chance.choice(names), chance.random()
        try:
            if what < 0.3:
                count = chance.choice([1, 100, 5000, 100_000, 400_000])
                objects.put(pattern(count % 97, count), name, timeout_s=LIMIT_S)
            elif what < 0.8:
                array = objects.get(name, timeout_s=0.05)
                wrong += not is_right(array, array.size % 97, array.size)
            elif what < 0.9:
                objects.wait(names, 1, timeout_s=0.05)
            else:
                objects.delete(name, timeout_s=LIMIT_S)
            end = "ok"
        except errors.HopcollError as error:
            end = type(error).__name__
        counts[end] = counts.get(end, 0) + 1
    array = None
    among(comm, 1, 2)
    left = settle(comm, [*names, "last of 1", "last of 2"])
    return {"wrong": wrong, "counts": counts, "left": left}


def main() -> None:
    """Play the scene that the command line names."""
    world = hopcoll.init()
    said = SCENES[sys.argv[1]](world)
    world.Barrier()  # who leaves takes along what it has
    # One write, so that the lines of two ranks do not mix.
    os.write(1, (json.dumps({"rank": world.rank, **said}) + "\n").encode())


if __name__ == "__main__":
    main()
