"""Reductions of objects on real ranks; one scene a job, as in `shared_objects`.

    mpirun -n 5 python -m tests.mpi.programs.object_reductions SCENE
"""

from __future__ import annotations

import pickle
import random
import sys

import numpy as np

import hopcoll
from hopcoll import _keeper, errors
from hopcoll.objects import ObjectRef, Objects
from tests.mpi.programs import ctrl_c
from tests.mpi.programs.shared_objects import (
    LARGE,
    LIMIT_S,
    among,
    die,
    error_of,
    main,
    scene,
    settle,
)

OPS = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "LOR": np.logical_or,
    "BXOR": np.bitwise_xor,
}


def given(number: int, count: int, dtype: str = "i8") -> np.ndarray:
    return (np.arange(count) % 251 + number).astype(dtype)


def taken(comm: hopcoll.Communicator, ref: ObjectRef) -> list[int]:
    """The numbers behind the last blank of the names of the inputs."""
    inputs = comm.objects.contributors(ref, timeout_s=LIMIT_S)
    return [int(one.name.rpartition(" ")[2]) for one in inputs]


@scene
def all_of_them(comm: hopcoll.Communicator) -> dict[str, object]:
    """Two inputs a rank; operations, dtypes, lengths; results of results, before they exist."""
    objects, seen, names = comm.objects, {}, []
    for dtype in ("i4", "u1", "f8", "c16", "?"):
        for count in (0, 1, 40_001):
            inputs = [f"{dtype} {count} {number}" for number in range(2 * comm.size)]
            names += inputs
            refs = None
            ops = [op for op in OPS if op in ("SUM", "PROD") or dtype not in ("c16",)]
            ops = [op for op in ops if op != "BXOR" or dtype not in ("f8", "c16")]
            if comm.rank == 0:
                refs = [objects.reduce(inputs, getattr(hopcoll, op)) for op in ops]
                half = [objects.reduce(inputs[i::2], hopcoll.SUM) for i in range(2)]
                refs += [objects.reduce(half, hopcoll.SUM), *half]
                names += refs
            refs = pickle.loads(pickle.dumps(comm.bcast(refs, root=0)))
            for number in range(2 * comm.rank, 2 * comm.rank + 2):
                objects.put(given(number, count, dtype), inputs[number])
            arrays = [given(number, count, dtype) for number in range(2 * comm.size)]
            for op, ref in zip([*ops, "SUM"], refs, strict=False):
                want = arrays[0]
                for array in arrays[1:]:
                    want = OPS[op](want, array).astype(dtype)
                got = objects.get(ref, timeout_s=LIMIT_S)
                same = np.allclose(got, want) if dtype in ("f8", "c16") else (got == want).all()
                seen[f"{op} {dtype} {count}"] = bool(same) and got.dtype == want.dtype
            all_in = taken(comm, refs[0]) == list(range(2 * comm.size))
            seen[f"contributors {dtype} {count}"] = all_in
    average = [f"average {number}" for number in range(comm.size)]
    objects.put(np.full(5, comm.rank, "f4"), average[comm.rank])
    ref = comm.bcast(objects.reduce(average, hopcoll.AVG) if comm.rank == 0 else None)
    got = objects.get(ref, timeout_s=LIMIT_S)
    seen["AVG"] = got.dtype == np.float32 and bool((got == (comm.size - 1) / 2).all())
    del got
    return {"wrong": [name for name, right in seen.items() if not right],
            "left": settle(comm, [*names, ref, *average])}  # fmt: skip


@scene
def first_of_many(comm: hopcoll.Communicator) -> dict[str, object]:
    """Three of five, of which two come late: everyone reads the same ones."""
    objects = comm.objects
    names = [f"input {number}" for number in range(comm.size)]
    ref = comm.bcast(objects.reduce(names, count=3) if comm.rank == 0 else None)
    pending = objects.wait([ref], timeout_s=0.05)[1]
    comm.Barrier()
    if comm.rank not in (1, 3):
        objects.put(given(1 << comm.rank, 1000), names[comm.rank])
    got = objects.get(ref, timeout_s=LIMIT_S)
    seen = {"pending": pending == [ref], "taken": taken(comm, ref), "first": int(got[0])}
    comm.Barrier()
    if comm.rank in (1, 3):
        objects.put(given(1 << comm.rank, 1000), names[comm.rank])
    return seen


def reduce_and_die(comm: hopcoll.Communicator, victim: int, spares: int) -> dict[str, object]:
    """A rank with an input dies in the middle; another has further ones, and calls."""
    objects, caller = comm.objects, int(victim == 0)
    names = [f"input {number}" for number in range(comm.size + spares)]
    objects.put(given(1 << comm.rank, LARGE), names[comm.rank])
    if comm.rank == caller:
        for number in range(comm.size, comm.size + spares):
            objects.put(given(1 << number, LARGE), names[number])
    stats = objects.stats
    before = stats()["chunks_sent"] + stats()["chunks_received"]
    comm.Barrier()
    ref = objects.reduce(names, count=comm.size) if comm.rank == caller else None
    ref = comm.bcast(ref, root=caller)
    if comm.rank == victim:
        # It wants the result as well, so that chunks pass also when its input is the spare one.
        waiting = objects._keeper.ask(_keeper.GET, ref._key, ref._stamp)
        while stats()["chunks_sent"] + stats()["chunks_received"] < before + 60:
            objects._keeper.turn()
        die()
        del waiting
    got = objects.get(ref, timeout_s=LIMIT_S)
    who = taken(comm, ref)
    right = bool((got == sum(given(1 << number, LARGE) for number in who)).all())
    del got
    among(comm, victim)
    return {"right": right, "taken": who, "left": settle(comm, [*names, ref])}


@scene
def member_killed(comm: hopcoll.Communicator) -> dict[str, object]:
    """With one input more than are taken."""
    return reduce_and_die(comm, int(sys.argv[2]), 1)


@scene
def interrupted(comm: hopcoll.Communicator) -> dict[str, object]:
    """Ctrl-C in a get of a result that is not there yet; the next get has it."""
    objects, seen = comm.objects, {"interrupted": False}
    names = [f"input {number}" for number in range(comm.size)]
    ref = comm.bcast(objects.reduce(names) if comm.rank == 0 else None)
    if comm.rank == 1:
        try:
            ctrl_c.comes_inside(Objects._wait)
            objects.get(ref, timeout_s=LIMIT_S)
        except KeyboardInterrupt:
            seen["interrupted"] = True
    comm.Barrier()
    objects.put(given(comm.rank, 1000), names[comm.rank])
    got = objects.get(ref, timeout_s=LIMIT_S)
    seen["right"] = bool((got == sum(given(rank, 1000) for rank in range(comm.size))).all())
    del got
    return {**seen, "left": settle(comm, [*names, ref])}


@scene
def caller_killed(comm: hopcoll.Communicator) -> dict[str, object]:
    """Its reductions are called before their inputs exist, and go on without it."""
    objects = comm.objects
    names = [f"input {number}" for number in range(comm.size)]
    refs = [objects.reduce(names, count=2) for _ in range(6)] if comm.rank == 1 else None
    refs = comm.bcast(refs, root=1)
    if comm.rank == 1:
        die()
    among(comm, 1)
    objects.put(given(1 << comm.rank, 1000), names[comm.rank])
    ends = {}
    for ref in refs:
        try:
            first = int(objects.get(ref, timeout_s=LIMIT_S)[0])
            ends[refs.index(ref)] = first == sum(1 << number for number in taken(comm, ref))
        except errors.ObjectLostError:
            ends[refs.index(ref)] = "lost"
    return {"ends": list(ends.values()), "left": settle(comm, [*names, *refs])}


@scene
def errors_of_reductions(comm: hopcoll.Communicator) -> dict[str, object]:
    """At the caller and at whoever waits."""
    objects = comm.objects
    mine = objects.put(np.full(3 + comm.rank, 1.0), f"of {comm.rank}")
    same = [f"same {rank}" for rank in range(comm.size)]
    objects.put(np.full(3, 1.0), same[comm.rank])
    seen = {
        "twice": error_of(lambda: objects.reduce([mine, mine])),
        "none": error_of(lambda: objects.reduce([])),
        "count": error_of(lambda: objects.reduce([mine], count=2)),
        "op": error_of(lambda: objects.reduce([mine], "SUM")),
        "user": error_of(lambda: objects.reduce([mine], hopcoll.Op.Create(np.add))),
        "many": error_of(lambda: objects.reduce([ObjectRef() for _ in range(5000)])),
        "not one": error_of(lambda: objects.contributors(mine)),
    }
    comm.Barrier()
    refs = None
    if comm.rank == 0:
        refs = {
            "shape": objects.reduce(["of 0", "of 1"]),
            "dtype": objects.reduce(same, hopcoll.BAND),
            "deleted": objects.reduce([*same, "gone"]),
            "fine": objects.reduce(same),
        }
        refs["of that"] = objects.reduce([refs["shape"], "same 0"])
        objects.delete("gone")
    for name, ref in comm.bcast(refs).items():
        seen[name] = error_of(lambda ref=ref: objects.get(ref, timeout_s=LIMIT_S))
        if name != "fine":
            seen[name] += " " + error_of(lambda ref=ref: objects.contributors(ref))
    return seen


@scene
def storm(comm: hopcoll.Communicator) -> dict[str, object]:
    """Ranks add up random inputs of theirs and of others, while two ranks die, which only put:
    of a reduction that a dead rank has called nobody has the ref, to delete it."""
    chance = random.Random(int(sys.argv[2]) * 100 + comm.rank)
    objects, ends = comm.objects, {1: 9, 2: 14}.get(comm.rank)
    counts: dict[str, int] = {}
    names, wrong = [], 0
    for step in range(20):
        if step == ends:
            die()
        inputs = [f"{step} {rank}" for rank in range(comm.size)]
        count = (1, 3000, 60_000)[step % 3]
        names.append(inputs[comm.rank])
        objects.put(given(1 << comm.rank, count), inputs[comm.rank])
        if ends:
            continue
        try:
            ref = objects.reduce(inputs, count=chance.randint(1, 3))
            names.append(ref)
            got = objects.get(ref, timeout_s=LIMIT_S)
            want = sum(given(1 << number, count) for number in taken(comm, ref))
            wrong += not (got == want).all()
            end = "ok"
            del got
        except errors.HopcollError as error:
            end = type(error).__name__
        counts[end] = counts.get(end, 0) + 1
    among(comm, 1, 2)
    every = sorted({name for some in comm.allgather(names) for name in some or ()}, key=repr)
    every += [f"{step} {rank}" for step in range(20) for rank in (1, 2)]
    return {"wrong": wrong, "counts": counts, "left": settle(comm, every)}


if __name__ == "__main__":
    main()
