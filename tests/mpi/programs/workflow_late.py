"""Gangs of which a rank comes late, or never: ``-m tests.mpi.programs.workflow_late SCENE STORE``.

Each rank prints a line of JSON at its end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hopcoll
from hopcoll.errors import HopcollError
from recovery.workflows import Node, TaskContext, Workflow, gang, task

FOLDER = Path(sys.argv[2]).parent
SCENES: dict[str, Callable[[], Node]] = {}


def scene(make: Callable[[], Node]) -> Callable[[], Node]:
    SCENES[make.__name__] = make
    return make


def wait_for(name: str) -> None:
    while not (FOLDER / name).exists():
        threading.Event().wait(0.01)


@task(on=1, checkpoint="none")
def waits() -> str:
    wait_for("met")
    return "waited"


@task(ranks="all", checkpoint="none")
def meets(ctx: TaskContext) -> list[Any]:
    assert ctx.comm is not None
    found = ctx.comm.allgather(ctx.comm.rank)
    (FOLDER / "met").touch()
    return found


@task(ranks="all", checkpoint="none")
def stops(ctx: TaskContext) -> list[Any]:
    """Rank 1 is stopped ahead of its collective."""
    assert ctx.comm is not None
    if ctx.comm.rank == 1:
        (FOLDER / "stopped").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return ctx.comm.allgather(ctx.comm.rank)


@task(ranks="all", checkpoint="none")
def sticks(ctx: TaskContext) -> list[Any]:
    """Rank 1 does not come before the others, who wait for it, have given it up."""
    assert ctx.comm is not None
    if ctx.comm.rank == 1 and not (FOLDER / "given up").exists():
        wait_for("given up")
        return []
    return ctx.comm.allgather(ctx.comm.rank)


@task(ranks="all", checkpoint="none", timeout_s=0.2)
def nears(ctx: TaskContext) -> int:
    """Rank 1 comes back when the others' patience ends, and rank 2 has the most of that."""
    assert ctx.comm is not None
    if ctx.comm.rank == 1:
        threading.Event().wait(0.2 + gang._LATE_S)
    return ctx.comm.rank


@task(ranks=1, checkpoint="none")
def slow() -> list[Any]:
    """Takes longer than any call may wait (HOPCOLL_TIMEOUT_S)."""
    threading.Event().wait(3.0)
    return [0]


@task
def both(*values: Any) -> list[Any]:
    return list(values)


@scene
def earlier() -> Node:
    """Rank 1 is in a task that ends only after the gang."""
    return both.bind(waits.bind(), meets.bind())


@scene
def stopped() -> Node:
    return both.bind(stops.bind())


@scene
def stuck() -> Node:
    # The next job has more time, on however busy a machine.
    timeout_s = 60.0 if (FOLDER / "given up").exists() else 0.2
    return both.bind(sticks.options(timeout_s=timeout_s).bind())


@scene
def near() -> Node:
    return both.bind(nears.bind())


@scene
def long() -> Node:
    return both.bind(slow.bind())


def main() -> None:
    comm = hopcoll.init()
    # A rank whose clock begins later sees the others leave.
    gang._LATE_S = 1.2 if (sys.argv[1], comm.rank) == ("near", 2) else 1.0
    try:
        with Workflow("late", sys.argv[2], comm=comm) as workflow:
            value = workflow.run(SCENES[sys.argv[1]]())
    except HopcollError:
        (FOLDER / "given up").touch()
        raise
    print(json.dumps({"rank": comm.rank, "value": value}), flush=True)
    comm.close()


if __name__ == "__main__":
    main()
