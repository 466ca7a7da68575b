"""Workflows over objects in the ranks' memory: ``-m tests.mpi.programs.workflow_refs SCENE STORE``.

Each rank prints a line of JSON at its end. ``--die task:rank`` is the rank that kills itself in
that task, when it runs for the first time in this store.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hopcoll
from recovery.workflows import Called, Node, TaskContext, Workflow, actor, task

COUNT = 4_000_000
WORDS = argparse.ArgumentParser()
WORDS.add_argument("scene")
WORDS.add_argument("store", type=Path)
WORDS.add_argument("--die", action="append", default=[])
SCENES: dict[str, Callable[[], Node]] = {}
RANK = [-1]


def scene(make: Callable[[], Node]) -> Callable[[], Node]:
    SCENES[make.__name__] = make
    return make


def once(name: str) -> bool:
    """Whether nothing of this name has happened in this store."""
    try:
        (WORDS.parse_args().store.parent / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die_once(name: str) -> None:
    if f"{name}:{RANK[0]}" in WORDS.parse_args().die and once(f"died-{name}-{RANK[0]}"):
        os.kill(os.getpid(), signal.SIGKILL)


def note(what: str) -> None:
    """Write down, for the test, that something ran, and where."""
    with (WORDS.parse_args().store.parent / "ran.txt").open("a") as file:
        file.write(f"{what} {RANK[0]}\n")


def _made(number: int) -> np.ndarray:
    return np.arange(COUNT, dtype=np.float64) + number


@task(deterministic=True, checkpoint="none")
def make(number: int, ctx: TaskContext) -> Any:
    note(f"make {number}")
    die_once(f"make {number}")
    return ctx.put(_made(number))


@task(checkpoint="none", name="make")
def draw(number: int, ctx: TaskContext) -> Any:
    """As `make`, but never the same again."""
    note(f"draw {number}")
    return ctx.put(_made(number) + 1000 * ctx.attempt)


@task(deterministic=True, checkpoint="none")
def passes(ref: Any, ctx: TaskContext) -> Any:
    note("passes")
    return {"ref": ref}


@task(deterministic=True, checkpoint="none")
def adds(*refs: Any, ctx: TaskContext) -> Any:
    """A reduction of all, during which a rank that has an input may die."""
    note("adds")
    folder = WORDS.parse_args().store.parent
    (folder / "adding").touch()
    while "giving" in str(WORDS.parse_args().die) and not (folder / "watching").exists():
        threading.Event().wait(0.001)
    ref = ctx.reduce(refs)
    return float(ctx.get(ref).sum())


@task(deterministic=True, checkpoint="none")
def adds_parts(*refs: Any, ctx: TaskContext) -> Any:
    """A reduction of a reduction, when a rank that has an input of that is dead."""
    note("adds")
    folder = WORDS.parse_args().store.parent
    (folder / "adding").touch()
    while not list(folder.glob("died-*")):
        threading.Event().wait(0.001)
    part = ctx.reduce(refs[1:])
    return float(ctx.get(ctx.reduce([refs[0], part])).sum())


def all_are_late(folder: Path) -> bool:
    """Whether the journal has all that was made, and all that waits for a death has begun."""
    with contextlib.suppress(hopcoll.errors.HopcollError, OSError):
        states = Workflow("refs", WORDS.parse_args().store)._folder.look()[0].states
        done = [name for name, state in states.items() if state.done is not None]
        late = (folder / "ran.txt").read_text().count("late ")
        return late == 3 and sum(name.startswith("make") for name in done) == 3
    return False


def die_when_it_gives(objects: hopcoll.objects.Objects) -> None:
    """Die when the reduction has taken the first chunk from here."""
    folder = WORDS.parse_args().store.parent
    while not (folder / "adding").exists():
        threading.Event().wait(0.001)
    die_once("at once")
    if f"later:{RANK[0]}" in WORDS.parse_args().die:
        while not all_are_late(folder):
            threading.Event().wait(0.02)
        die_once("later")
    before = objects.stats()["bytes_sent"]
    (folder / "watching").touch()
    while objects.stats()["bytes_sent"] == before:
        pass
    die_once("giving")


@task(deterministic=True, checkpoint="none")
def total(value: Any, ctx: TaskContext) -> Any:
    note("total")
    return float(ctx.get(value["ref"]).sum())


@task(checkpoint="none")
def firsts(*refs: Any, ctx: TaskContext) -> Any:
    note("firsts")
    return ctx.reduce(refs, count=2)


@task(checkpoint="none")
def look(ref: Any, ctx: TaskContext) -> Any:
    note("look")
    return float(ctx.get(ref).sum())


@task(checkpoint="none", on=1)
def late(ref: Any, *before: Any, ctx: TaskContext) -> Any:
    """Comes when the rank that has the object is dead."""
    note("late")
    folder = WORDS.parse_args().store.parent
    (folder / "adding").touch()
    while not list(folder.glob("died-*")):
        threading.Event().wait(0.001)
    return float(ctx.get(ref).sum())


@task(ranks="all", checkpoint="none")
def gang(number: int, ctx: TaskContext) -> Any:
    """Of all ranks only rank 1 puts something."""
    assert ctx.comm is not None
    ref = ctx.put(_made(number)) if ctx.comm.rank == 1 else None
    return {"ref": ctx.comm.bcast(ref, root=1)}


@task(deterministic=True)
def both(*values: Any) -> Any:
    return list(values)


@scene
def passing() -> Node:
    """Made on rank 1, used on rank 2 and at the leader."""
    ref = make.options(on=1).bind(1)
    value = passes.options(on=2).bind(ref)
    return both.bind(total.options(on=2).bind(value), total.bind(value))


@scene
def reduction() -> Node:
    """Inputs on all ranks; one dies while they are added up."""
    refs = [make.options(on=rank).bind(rank) for rank in range(1, 4)]
    return both.bind(adds.options(on=1).bind(*refs))


@scene
def parts() -> Node:
    """As `reduction`, but one of these is within another."""
    refs = [make.options(on=rank).bind(rank) for rank in range(1, 4)]
    return both.bind(adds_parts.options(on=1).bind(*refs))


@scene
def first_k() -> Node:
    refs = [make.options(on=rank).bind(rank) for rank in range(1, 4)]
    return both.bind(look.bind(firsts.options(on=1).bind(*refs)))


@scene
def of_a_gang() -> Node:
    return both.bind(total.options(on=2).bind(gang.bind(4)))


@scene
def void() -> Node:
    """An object that is never the same again, used before and after its rank dies."""
    ref = draw.options(on=3).bind(1)
    other = make.options(on=2).bind(5)
    early = look.options(on=3).bind(ref)  # else another rank has a copy
    return both.bind(early, late.bind(ref, early), look.bind(other))


@scene
def succession() -> Node:
    """Objects of all ranks, used when the one that led is dead."""
    refs = [make.options(on=rank).bind(rank) for rank in range(1, 4)]
    return both.bind(*(late.bind(ref) for ref in refs))


@actor(checkpoint="sync", on=3)
class Keeper:
    """Adds up the first numbers of arrays."""

    def __init__(self, total: float) -> None:
        self.total = total

    def checkpoint(self) -> float:
        return self.total

    def restore(self, state: float) -> None:
        note("restore")
        self.total = state

    def add(self, array: np.ndarray) -> float:
        note("add")
        self.total += float(array[0])
        return self.total


@task(deterministic=True, checkpoint="none")
def stops(*before: Any) -> None:
    """Ends the first job."""
    if once("stopped"):
        raise ArithmeticError("the job ends")


@task(deterministic=True)
def told(called: Called) -> float:
    return called.value


@scene
def resized() -> Node:
    """An actor, and objects, on the last ranks of a job that ends half-way."""
    ref = make.options(on=3).bind(1)
    first = Keeper.call(Keeper.bind(10.0), "add", ref)
    value = passes.options(on=2).bind(ref)
    end = stops.bind(first, value)
    second = Keeper.call(first, "add", make.options(on=2).bind(2).after(end))
    return both.bind(told.bind(second), total.options(on=3).bind(value).after(end))


@task(external=True, idempotency_key=True)
def effect(what: str, *before: Any) -> None:
    note(f"effect {what}")


@task(deterministic=True, on=1)
def held(ref: Any, ctx: TaskContext) -> float:
    """Does not return in the first job."""
    note("held")
    found = float(ctx.get(ref).sum())
    if once("held"):
        print("called", flush=True)
        threading.Event().wait()
    return found


@scene
def interrupted() -> Node:
    """The first job ends while rank 1 is called."""
    value = held.bind(make.bind(1)).after(effect.bind("before"))
    return both.bind(value, effect.bind("after", value))


SHAPES = [(0,), (0, 3), (2, 0, 4)]


@task(deterministic=True, checkpoint="none")
def put_nothing(sign: str, ctx: TaskContext) -> Any:
    note("put nothing")
    return [ctx.put(np.zeros(shape, dtype)) for shape in SHAPES for dtype in ("f8", "i2")]


@task(checkpoint="none")
def add_nothing(*parts: Any, ctx: TaskContext) -> Any:
    note("add nothing")
    return [ctx.reduce(refs) for refs in zip(*parts, strict=True)]


@task(deterministic=True, checkpoint="none")
def see_nothing(refs: Any, ctx: TaskContext) -> Any:
    note("see nothing")
    return [(str(one.dtype), one.shape) for one in map(ctx.get, refs)]


@scene
def nothing() -> Node:
    """Arrays without elements: passed, got, added up, written, and read back by another job."""
    parts = [put_nothing.options(on=rank, checkpoint="sync").bind(f"{rank}") for rank in (0, 1)]
    total = add_nothing.options(on=1, checkpoint="sync").bind(*parts)
    seen = [see_nothing.options(on=rank).bind(parts[1 - rank]) for rank in (0, 1)]
    end = stops.bind(*seen, total)
    again = [see_nothing.bind(one).after(end) for one in (*parts, total)]
    keep = passes.bind(total).after(end)
    return both.options(checkpoint="none").bind(*seen, *again, keep)


@scene
def stored() -> Node:
    """The output refers to objects."""
    return both.options(checkpoint="none").bind(make.options(on=1).bind(1), draw.bind(2))


def main() -> None:
    words = WORDS.parse_args()
    comm = hopcoll.init()
    RANK[0] = comm.rank
    if {f"{when}:{comm.rank}" for when in ("at once", "later", "giving")} & set(words.die):
        threading.Thread(target=die_when_it_gives, args=(comm.objects,), daemon=True).start()
    if words.scene == "interrupted":
        print(os.getpid(), flush=True)
    with Workflow("refs", words.store, comm=comm) as workflow:
        value = workflow.run(SCENES[words.scene]())
        if words.scene == "stored":
            value = [float(comm.objects.get(ref, timeout_s=20).sum()) for ref in value]
        if words.scene == "nothing":
            refs = value.pop()["ref"]
            value.append([(str(one.dtype), one.shape) for one in map(comm.objects.get, refs)])
        comm.barrier()
        told = {"rank": comm.rank, "value": value, "ran": workflow.ran}
        print(json.dumps(told), flush=True)
    comm.close()


if __name__ == "__main__":
    main()
