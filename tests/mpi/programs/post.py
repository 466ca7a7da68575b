"""Letters between real ranks; one scene a job, as in `shared_objects`.

    mpirun -n 2 python -m tests.mpi.programs.post SCENE FOLDER

The settings say how little memory there is: room for a few letters of `NBYTES`.
"""

from __future__ import annotations

import queue
import sys
from typing import Any

import numpy as np

import hopcoll
from hopcoll.errors import ObjectStoreFullError
from hopcoll.objects import ObjectRef
from recovery.workflows import Node, Workflow, post as posts, task
from recovery.workflows.post import Post
from tests.mpi.programs.shared_objects import LIMIT_S, die, main, scene

NBYTES = 200_000


class Crowded:
    """A rank's objects, of which it fills the memory; who was refused often enough gets room."""

    REFUSALS = 3

    def __init__(self, objects: hopcoll.objects.Objects) -> None:
        self._objects = objects
        self._held: list[tuple[ObjectRef, np.ndarray]] = []
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def fill(self) -> None:
        """Leave room for nothing."""
        nbytes = NBYTES
        while nbytes:
            try:
                ref = self._objects.put(np.ones(nbytes, np.uint8))
                self._held.append((ref, self._objects.get(ref)))
            except ObjectStoreFullError:
                nbytes //= 2

    def put(self, value: Any, ref: ObjectRef) -> ObjectRef:
        try:
            return self._objects.put(value, ref)
        except ObjectStoreFullError:
            self.refused += 1
            if self.refused == self.REFUSALS:
                self.empty()
            raise

    def empty(self) -> None:
        refs = [ref for ref, _ in self._held]
        self._held.clear()
        for ref in refs:
            self._objects.delete(ref)


def ask(post: Post, rank: int, what: Any) -> str:
    """What a rank answers, or the error that it is instead."""
    box: queue.SimpleQueue[str] = queue.SimpleQueue()
    post.call(
        rank, what, lambda value, error: box.put(str(value) if error is None else repr(error))
    )
    return box.get(timeout=LIMIT_S)


@scene
def full(comm: hopcoll.Communicator) -> dict[str, object]:
    """Rank 1 has no room to answer, but for what is small."""
    crowded = Crowded(comm.objects)

    def handle(source: int, what: str) -> str:
        if what == "fill":
            crowded.fill()
        return what * (NBYTES // 5) if what == "large" else what

    post = Post(comm, "session", handle)
    post.objects = crowded  # type: ignore[assignment]
    comm.Barrier()
    said = []
    if comm.rank == 0:
        said = [ask(post, 1, what) for what in ("before", "fill", "after", "large")]
    comm.Barrier()
    post.close()
    return {"said": said, "refused": crowded.refused}


CROWDED: list[Crowded] = []


@task(checkpoint="none")
def fill() -> None:
    CROWDED[0].fill()


@task(checkpoint="none")
def empty(*before: Any) -> None:
    CROWDED[0].empty()


@task(checkpoint="none", on=1)
def length(value: bytes, *before: Any) -> int:
    return len(value)


@task
def told(failed: tuple[Any, Exception], *others: int) -> list[Any]:
    return [str(failed[1]), *others]


def crowded(rank: int) -> Node:
    """At a rank there is no room for what is large, then there is."""
    full = fill.options(on=rank).bind()
    large = length.options(catch_exceptions=True).bind(bytes(NBYTES)).after(full)
    small = length.bind(b"small").after(large)
    again = length.bind(bytes(NBYTES)).after(empty.options(on=rank).bind().after(small))
    return told.bind(large, small, again)


def run(comm: hopcoll.Communicator, rank: int) -> dict[str, object]:
    posts.ROOM_S = 0.3
    CROWDED.append(Crowded(comm.objects))
    with Workflow("crowded", sys.argv[2], comm=comm) as workflow:
        return {"value": workflow.run(crowded(rank))}


@scene
def leading(comm: hopcoll.Communicator) -> dict[str, object]:
    """Who leads has no room for the calls."""
    return run(comm, 0)


@scene
def called(comm: hopcoll.Communicator) -> dict[str, object]:
    """Rank 1 has no room for its calls."""
    return run(comm, 1)


@scene
def damaged(comm: hopcoll.Communicator) -> dict[str, object]:
    """A letter goes to a file before rank 1 reads it, and the file is damaged."""
    post, box = None, queue.SimpleQueue()  # type: ignore[var-annotated]
    if comm.rank == 0:
        post = Post(comm, "session", lambda source, what: what)
        post.call(1, "x" * NBYTES, lambda value, error: box.put(repr(error)))
        more = [ObjectRef() for _ in range(comm.objects.stats()["limit_bytes"] // NBYTES)]
        for ref in more:
            comm.objects.put(np.ones(NBYTES, np.uint8), ref)
        (file, *_) = sorted(comm.objects._keeper.scratch.path.glob("*.object"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    comm.Barrier()
    said = []
    if post is None:
        post = Post(comm, "session", lambda source, what: what)
    else:
        said = [box.get(timeout=LIMIT_S), ask(post, 1, "after")]
    comm.Barrier()
    post.close()
    return {"said": said}


@scene
def unread(comm: hopcoll.Communicator) -> dict[str, object]:
    """Rank 1 dies with letters that it has not read."""
    box: queue.SimpleQueue[str] = queue.SimpleQueue()
    if comm.rank == 0:
        post = Post(comm, "session", lambda source, what: what)
        for _ in range(3):
            post.call(1, "x" * NBYTES, lambda value, error: box.put(repr(error)))
    comm.Barrier()
    if comm.rank == 1:
        die()
    said = [box.get(timeout=LIMIT_S) for _ in range(3)]
    post.close()  # and what was to be deleted is
    return {"said": said, "used_bytes": comm.objects.stats()["used_bytes"]}


if __name__ == "__main__":
    main()
