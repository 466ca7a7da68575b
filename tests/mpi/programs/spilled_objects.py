"""Objects that do not fit into memory; one scene a job, as in `shared_objects`.

    mpirun -n 4 python -m tests.mpi.programs.spilled_objects SCENE

The settings say how little memory there is: room for a few objects of `COUNT` numbers.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np

import hopcoll
from hopcoll import _scratch, errors
from tests.mpi.programs.shared_objects import (
    LIMIT_S,
    among,
    die,
    error_of,
    is_right,
    main,
    pattern,
    scene,
    settle,
)

COUNT = 100_000
NBYTES = 8 * COUNT


def files_of(comm: hopcoll.Communicator) -> list[Path]:
    return sorted(comm.objects._keeper.scratch.path.glob("*.object"))


def until_files(comm: hopcoll.Communicator, count: int) -> int:
    """Turns the crank until the disk's thread has left so many."""
    while len(files_of(comm)) != count:
        comm.objects._keeper.turn()
    return len(files_of(comm))


@scene
def more_than_memory(comm: hopcoll.Communicator) -> dict[str, object]:
    """Each rank puts three times as much as it has room for; all get all, twice."""
    objects, room = comm.objects, comm.objects.stats()["limit_bytes"] // NBYTES
    names = [f"{rank} {i}" for rank in range(comm.size) for i in range(3 * room)]
    for i in range(3 * room):
        objects.put(pattern(1000 * comm.rank + i, COUNT), f"{comm.rank} {i}")
    used = objects.stats()["used_bytes"]
    right = 0
    for _ in range(2):
        for name in names[comm.rank :] + names[: comm.rank]:
            rank, i = map(int, name.split())
            right += is_right(objects.get(name, timeout_s=LIMIT_S), 1000 * rank + i, COUNT)
    stats = objects.stats()
    seen = {
        "right": right == 2 * len(names),
        "within": used <= room * NBYTES and stats["used_bytes"] <= (room + 1) * NBYTES,
        "spilled": stats["spilled"] > 0,
        "restored": stats["restored"] > 0,
    }
    seen["left"] = settle(comm, names)
    return {**seen, "files": until_files(comm, 0)}


@scene
def reduced(comm: hopcoll.Communicator) -> dict[str, object]:
    """The inputs are in files when they are added."""
    objects, room = comm.objects, comm.objects.stats()["limit_bytes"] // NBYTES
    inputs = [f"input {rank}" for rank in range(comm.size)]
    others = [f"other {rank} {i}" for rank in range(comm.size) for i in range(room)]
    objects.put(pattern(comm.rank, COUNT), inputs[comm.rank])
    for i in range(room):
        objects.put(pattern(i, COUNT), f"other {comm.rank} {i}")
    before = objects.stats()["restored"]
    comm.Barrier()
    ref = comm.bcast(objects.reduce(inputs) if comm.rank == 0 else None)
    got = objects.get(ref, timeout_s=LIMIT_S)
    want = sum(pattern(rank, COUNT) for rank in range(comm.size))
    right = bool((got == want).all())
    del got
    comm.Barrier()
    restored = objects.stats()["restored"] - before
    left = settle(comm, [*inputs, *others, ref])
    return {"right": right, "restored": restored > 0, "left": left, "files": until_files(comm, 0)}


@scene
def killed(comm: hopcoll.Communicator) -> dict[str, object]:
    """A rank dies while it writes a file: what only it had is lost, and nothing else."""
    objects, room = comm.objects, comm.objects.stats()["limit_bytes"] // NBYTES
    objects.put(pattern(comm.rank, COUNT), f"mine {comm.rank}")
    if comm.rank == 1:
        write = os.write

        def write_and_die(file: int, data: bytes) -> int:
            if threading.current_thread().name == "hopcoll-disk":
                write(file, data[: len(data) // 2])
                die()
            return write(file, data)

        os.write = write_and_die
        for i in range(room):
            objects.put(pattern(i, COUNT), f"more {i}")
    for i in range(room):
        objects.put(pattern(i, COUNT), f"of {comm.rank} {i}")
    among(comm, 1)
    others = [rank for rank in range(comm.size) if rank != 1]
    right = all(
        is_right(objects.get(f"mine {rank}", timeout_s=LIMIT_S), rank, COUNT) for rank in others
    )
    return {
        "right": right,
        "folder": str(objects._keeper.scratch.path.parent),
        "files": len(files_of(comm)) > 0,
    }


@scene
def damaged(comm: hopcoll.Communicator) -> dict[str, object]:
    """Files that are short, other than they were, or gone: the copy is lost, another is found."""
    objects, room = comm.objects, comm.objects.stats()["limit_bytes"] // NBYTES
    names = [f"name {i}" for i in range(3)]
    refs = None
    if comm.rank == 0:
        refs = [objects.put(pattern(i, COUNT), name) for i, name in enumerate(names)]
    refs = comm.bcast(refs)
    if comm.rank == 1:
        right = is_right(objects.get(names[0], timeout_s=LIMIT_S), 0, COUNT)
    comm.Barrier()
    if comm.rank == 0:
        for i in range(room):
            objects.put(pattern(i, COUNT), f"more {i}")
        files = files_of(comm)
        files[0].write_bytes(files[0].read_bytes()[:-1])
        files[1].write_bytes(files[1].read_bytes()[:-1] + b"x")
        files[2].unlink()
        seen = {
            "other": is_right(objects.get(refs[0], timeout_s=LIMIT_S), 0, COUNT),
            "ends": [error_of(lambda ref=ref: objects.get(ref, timeout_s=LIMIT_S))
                     for ref in refs[1:]],
            "error": "name" not in objects._keeper.scratch.error,
            "unread": objects.stats()["unread"],
        }  # fmt: skip
    comm.Barrier()
    return seen if comm.rank == 0 else {"right": right} if comm.rank == 1 else {}


def text_of(call) -> str:
    try:
        call()
    except errors.ObjectStoreFullError as error:
        return str(error)
    return ""


@scene
def full(comm: hopcoll.Communicator) -> dict[str, object]:
    """What is in the way is said: views, the limit of files, the disk."""
    objects, room = comm.objects, comm.objects.stats()["limit_bytes"] // NBYTES
    refs = [objects.put(pattern(i, COUNT)) for i in range(room)]
    views = [objects.get(ref) for ref in refs]
    seen = {"views": text_of(lambda: objects.put(pattern(9, COUNT)))}
    views.clear()
    refs += [objects.put(pattern(i, COUNT)) for i in range(room)]
    seen["files"] = text_of(lambda: refs.extend(objects.put(pattern(9, COUNT)) for _ in range(99)))
    for ref in refs:
        objects.delete(ref)
    until_files(comm, 0)
    write = os.write

    def write_nothing(file: int, data: bytes) -> int:
        if threading.current_thread().name == "hopcoll-disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    os.write = write_nothing
    refs = [objects.put(pattern(i, COUNT)) for i in range(room)]
    seen["disk"] = text_of(lambda: objects.put(pattern(9, COUNT)))
    seen["kept"] = all(is_right(objects.get(ref), i, COUNT) for i, ref in enumerate(refs))
    os.write = write
    objects.put(pattern(9, COUNT))
    seen["again"] = len(files_of(comm))
    return seen


@scene
def unwritable(comm: hopcoll.Communicator) -> dict[str, object]:
    """The directory for files is none."""
    objects, room = comm.objects, comm.objects.stats()["limit_bytes"] // NBYTES
    for i in range(room):
        objects.put(pattern(i, COUNT), f"{comm.rank} {i}")
    seen = text_of(lambda: objects.put(pattern(9, COUNT)))
    return {"text": seen, "right": is_right(objects.get(f"{comm.rank} 0"), 0, COUNT)}


@scene
def hung(comm: hopcoll.Communicator) -> dict[str, object]:
    """The disk of rank 0 hangs: its puts run out of time, and everything else goes on."""
    objects, room = comm.objects, comm.objects.stats()["limit_bytes"] // NBYTES
    begun, end = threading.Event(), threading.Event()
    if comm.rank == 0:
        write = _scratch.Scratch.write

        def write_late(self: _scratch.Scratch, number: int, data: memoryview) -> int:
            begun.set()
            end.wait()
            return write(self, number, data)

        _scratch.Scratch.write = write_late
        for i in range(room):
            objects.put(pattern(i, COUNT), f"name {i}")
        late = error_of(lambda: objects.put(pattern(9, COUNT), "late", timeout_s=0.2))
        begun.wait()
    comm.Barrier()
    right = [
        is_right(objects.get(f"name {i}", timeout_s=LIMIT_S), i, COUNT) for i in range(room)
    ] if comm.rank else []  # fmt: skip
    total = comm.allreduce(comm.rank)
    end.set()
    comm.Barrier()
    seen = {"right": all(right), "total": total}
    if comm.rank == 0:
        seen |= {"late": late, "then": error_of(lambda: objects.put(pattern(9, COUNT), "late"))}
    return seen


@scene
def left_open(comm: hopcoll.Communicator) -> dict[str, object]:
    """Nothing is deleted, and views are held to the end."""
    objects, room = comm.objects, comm.objects.stats()["limit_bytes"] // NBYTES
    refs = [objects.put(pattern(i, COUNT)) for i in range(3 * room)]
    globals()["held"] = objects.get(refs[0])
    return {"folder": str(objects._keeper.scratch.path.parent), "files": len(files_of(comm)) > 0}



if __name__ == "__main__":
    main()
