"""A workflow with gangs, on all ranks: ``-m tests.mpi.programs.workflow STORE [--die ...]``.

Each rank prints a line of JSON at its end. `--die task:rank` is the rank that kills itself in that
task, when it runs for the first time in this store.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

import hopcoll
from recovery.workflows import TaskContext, Workflow, loop, task

STEPS = 6


def _die_once(ctx: TaskContext, name: str, rank: int) -> None:
    """Die here, once in the life of the store."""
    arguments = parse()
    if f"{name}:{rank}" in arguments.die:
        marker = Path(arguments.store).parent / f"died-{name}-{rank}"
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


@task(checkpoint="sync")
def load(ctx: TaskContext) -> Any:
    _die_once(ctx, "load", 0)
    return np.arange(1000.0)


@task(ranks="all", deterministic=True, checkpoint="none")
def total(data: Any, ctx: TaskContext) -> Any:
    """Each rank adds up its share; the sum is that of those who contributed."""
    assert ctx.comm is not None
    result = np.zeros(1)
    share = np.array([data[ctx.comm.rank :: ctx.comm.size].sum()])
    _die_once(ctx, "total", ctx.comm.rank)
    ctx.comm.Allreduce(share, result)
    return float(result[0]), ctx.now()


@task(ranks="all", checkpoint="async")
def step(state: Any, i: int, ctx: TaskContext) -> Any:
    assert ctx.comm is not None
    mean = np.zeros(4096)
    if i == 3:
        _die_once(ctx, "step", ctx.comm.rank)
    ctx.comm.Allreduce(np.full(4096, float(i)), mean, op=hopcoll.AVG)
    return state + mean


@task(ranks=2)
def two(ctx: TaskContext) -> Any:
    assert ctx.comm is not None
    return ctx.comm.size


@task(ranks="all", retries=3, backoff_s=0.0)
def fails_once(ctx: TaskContext) -> Any:
    """One rank raises while the others wait for it."""
    assert ctx.comm is not None
    if ctx.attempt == 1 and ctx.comm.rank == ctx.comm.size - 1:
        raise ArithmeticError("once")
    out = np.zeros(1)
    ctx.comm.Allreduce(np.ones(1), out)
    return float(out[0])


@task(external=True, idempotency_key=True)
def publish(*values: Any, ctx: TaskContext) -> Any:
    with sqlite3.connect(Path(parse().store).parent / "world.db") as database:
        database.execute("create table if not exists published (key text, what text)")
        found = database.execute(
            "select what from published where key = ?", (ctx.idempotency_key,)
        ).fetchall()
        what = json.dumps([np.asarray(v).ravel()[:1].tolist() for v in values])
        if not found:
            database.execute("insert into published values (?, ?)", (ctx.idempotency_key, what))
    _die_once(ctx, "publish", 0)
    return found[0][0] if found else what


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("--die", action="append", default=[])
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    comm = hopcoll.init()
    data = load.bind()
    node = publish.bind(
        total.bind(data), loop(step, np.zeros(4096), STEPS, every=2), two.bind(), fails_once.bind()
    )
    with Workflow("gangs", arguments.store, comm=comm) as workflow:
        value = workflow.run(node)
    print(
        json.dumps({"rank": comm.rank, "value": value, "ran": [name for name, _ in workflow.ran]}),
        flush=True,
    )
    comm.close()


if __name__ == "__main__":
    main()
