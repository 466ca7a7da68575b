"""Objects that go with the last ref to them; one scene a job, as in `shared_objects`.

    mpirun -n 3 python -m tests.mpi.programs.counted_objects SCENE
"""

from __future__ import annotations

import numpy as np

import hopcoll
from hopcoll import errors
from hopcoll.objects import ObjectRef
from tests.mpi.programs.shared_objects import LIMIT_S, error_of, main, scene

COUNT = 20_000
SUM = 8 * COUNT


def used(comm: hopcoll.Communicator) -> int:
    return comm.objects.stats()["used_bytes"]


def until_used(comm: hopcoll.Communicator, nbytes: int) -> int:
    while used(comm) != nbytes:
        comm.objects._keeper.turn()
    return nbytes


@scene
def counted(comm: hopcoll.Communicator) -> dict[str, object]:
    """Each rank for itself: what was put, and what is made of it."""
    objects, seen = comm.objects, {}
    ref = objects.put(np.ones(COUNT))
    same = ref._put(ref._stamp)
    del ref
    seen["held"] = used(comm) == SUM
    array = objects.get(same, timeout_s=LIMIT_S)
    del same
    seen["view"] = until_used(comm, SUM) == SUM and float(array.sum()) == COUNT
    del array
    seen["gone"] = until_used(comm, 0) == 0
    result = objects.reduce([objects.put(np.ones(COUNT)), objects.put(np.full(COUNT, 2.0))])
    seen["sum"] = float(objects.get(result, timeout_s=LIMIT_S).sum()) == 3 * COUNT
    seen["inputs"] = used(comm) >= 3 * SUM and len(objects.contributors(result)) == 2
    del result
    seen["after"] = until_used(comm, 0) == 0
    try:
        objects.put(np.ones(COUNT), timeout_s=0.0)
    except errors.TransferTimeoutError:
        pass
    seen["late"] = until_used(comm, 0) == 0
    ref = ObjectRef()
    objects.put(np.ones(COUNT), ref)
    objects.delete(ref, timeout_s=LIMIT_S)
    objects.put(np.full(COUNT, 5.0), ref)
    seen["again"] = float(objects.get(ref, timeout_s=LIMIT_S)[0]) == 5
    del ref
    seen["then"] = until_used(comm, 0) == 0
    comm.Barrier()  # small ones are at their owners, too
    for _ in range(300):
        objects.put(np.ones(10))
    seen["many"] = until_used(comm, 0) == 0 and objects.stats()["objects"] < 10
    comm.Barrier()
    return seen


@scene
def shared(comm: hopcoll.Communicator) -> dict[str, object]:
    """What was sent to others, or has a name, stays until it is deleted."""
    objects = comm.objects
    refs = None
    if comm.rank == 0:
        refs = [objects.put(np.full(COUNT, 3.0)), objects.put(np.ones(COUNT), "name")]
        refs.append(objects.reduce([refs[0], objects.put(np.full(COUNT, 4.0))]))
    theirs = comm.bcast(refs)
    comm.Barrier()
    del refs
    objects.stats()
    comm.Barrier()
    first = [float(objects.get(ref, timeout_s=LIMIT_S)[0]) for ref in theirs]
    inputs = [float(objects.get(ref, timeout_s=LIMIT_S)[0]) for ref in theirs[2].inputs]
    comm.Barrier()
    everything = [*theirs, *theirs[2].inputs]
    if comm.rank == 1:
        for ref in everything:
            objects.delete(ref, timeout_s=LIMIT_S)
    comm.Barrier()
    gone = {error_of(lambda ref=ref: objects.get(ref, timeout_s=LIMIT_S)) for ref in everything}
    return {"first": first, "inputs": inputs, "gone": sorted(gone), "used": until_used(comm, 0)}


@scene
def called_off(comm: hopcoll.Communicator) -> dict[str, object]:
    """A get that ran out of time before its object existed brings no copy later."""
    objects = comm.objects
    late = error_of(lambda: objects.get("later", timeout_s=0.01)) if comm.rank else ""
    objects.stats()
    comm.Barrier()
    if comm.rank == 0:
        objects.put(np.ones(COUNT), "later")
    comm.Barrier()
    seen = {"late": late, "used": 0 if comm.rank == 0 else used(comm)}
    comm.Barrier()
    seen["right"] = float(objects.get("later", timeout_s=LIMIT_S).sum()) == COUNT
    return seen


@scene
def at_exit(comm: hopcoll.Communicator) -> dict[str, object]:
    """Refs live longer than the communicator, and some as long as the interpreter."""
    globals()["held"] = [comm.objects.put(np.ones(COUNT)) for _ in range(3)]
    other = comm.objects.put(np.ones(COUNT))
    seen = {"used": used(comm) == 4 * SUM}
    if comm.rank == 1:
        comm.Barrier()
        comm.close()
        del other
        globals()["held"].pop()
        raise SystemExit(0)
    return seen


if __name__ == "__main__":
    main()
