"""One case of `benchmarks.references` on ranks: ``-m benchmarks.references_job CASE FOLDER [K=V]``.

The first rank prints what it measured, a line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hopcoll
from recovery.workflows import Node, TaskContext, Workflow, task

_TURNS = 5
CASES: dict[str, Callable[[Any, Path, dict[str, str]], Any]] = {}


def case(run: Callable[[Any, Path, dict[str, str]], Any]) -> Callable[..., Any]:
    CASES[run.__name__] = run
    return run


@task(checkpoint="none", on=1)
def make(number: int, nbytes: int, ctx: TaskContext) -> Any:
    return ctx.put(np.full(nbytes, number, np.uint8)), time.time()


@task(checkpoint="none", on=0)
def take(made: Any, ctx: TaskContext) -> Any:
    """How long it took from the end of `make` to here, and to fetch what it made."""
    ref, ended_s = made
    begin_s, now_s = time.perf_counter(), time.time()
    array = ctx.get(ref)
    took_s = time.perf_counter() - begin_s
    assert array[-1] == array[0]
    return now_s - ended_s, took_s


@task(checkpoint="none", on="any")
def consume(made: Any, number: int, ctx: TaskContext) -> float:
    return float(ctx.get(made[0])[number :: 1 << 12].sum())


@task(checkpoint="none", on="any")
def nothing(number: int) -> int:
    return number


@task
def gather(*values: Any) -> list[Any]:
    return list(values)


def _run(comm: Any, folder: Path, node: Node, name: str = "w") -> tuple[Any, float]:
    with Workflow(name, folder, comm=comm, workers=2) as workflow:
        begin_s = time.perf_counter()
        value = workflow.run(node)
        return value, time.perf_counter() - begin_s


@case
def passing(comm: Any, folder: Path, words: dict[str, str]) -> Any:
    """Between two tasks on two ranks, one after the other; and a send of the same bytes."""
    from mpi4py import MPI

    nbytes = int(words["nbytes"])
    nodes: list[Node] = []
    for number in range(_TURNS):
        made = make.bind(number, nbytes)
        nodes.append(take.bind(made.after(nodes[-1]) if nodes else made))
    times, _ = _run(comm, folder, gather.bind(*nodes))
    world, sent, sends = MPI.COMM_WORLD, np.ones(nbytes, np.uint8), []
    for _ in range(_TURNS):
        comm.barrier()
        if comm.rank == 1:
            world.Send(sent, 0)
        elif comm.rank == 0:
            begin_s = time.perf_counter()
            world.Recv(np.empty(nbytes, np.uint8), 1)  # new memory, as a get has
            sends.append(time.perf_counter() - begin_s)
    comm.barrier()
    written = sum(p.stat().st_blocks * 512 for p in folder.rglob("*.h5"))
    return {
        "trigger_s": sorted(one[0] for one in times), "get_s": sorted(one[1] for one in times),
        "send_s": sorted(sends), "file_bytes": written,
    }  # fmt: skip


@case
def sharing(comm: Any, folder: Path, words: dict[str, str]) -> Any:
    """One data set, and many tasks that read it, on all ranks."""
    made = make.bind(1, int(words["nbytes"]))
    nodes = [consume.bind(made, number) for number in range(int(words["consumers"]))]
    return {"seconds": _run(comm, folder, gather.bind(*nodes))[1]}


@case
def rate(comm: Any, folder: Path, words: dict[str, str]) -> Any:
    """Tasks that do nothing, side by side."""
    count = int(words["tasks"])
    nodes = [nothing.bind(number) for number in range(count)]
    return {"tasks_per_s": count / _run(comm, folder, gather.bind(*nodes))[1]}


# ETL and training, by how values are kept


def _dies(words: dict[str, Any], name: str) -> None:
    """Where a rank, or all, are to die, once."""
    rank, kill = os.environ.get("OMPI_COMM_WORLD_RANK", "0"), words.get("kill")
    everybody = kill == "job" and name == "trainer"
    if not everybody and (kill != name or rank == "0" or (name == "trainer" and rank != "1")):
        return
    try:
        marker = Path(words["folder"]) / (f"died-{rank}" if everybody else "died")
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@task(deterministic=True, on=1)
def ingest(words: dict[str, Any], ctx: TaskContext) -> Any:
    data = np.random.default_rng(0).normal(size=(int(words["rows"]), 64)).astype(np.float32)
    _dies(words, "ingest")
    return ctx.put(data)


@task(on="any")
def augment(words: dict[str, Any], data: Any, number: int, ctx: TaskContext) -> Any:
    part = ctx.get(data)[number::4]
    noise = np.random.default_rng().normal(0, 0.1, part.shape).astype(np.float32)
    _dies(words, "augment")
    return ctx.put(part + noise)


@task(ranks="all")
def train(words: dict[str, Any], model: Any, parts: list[Any], ctx: TaskContext) -> Any:
    comm: Any = ctx.comm
    data = np.concatenate([ctx.get(part) for part in parts[comm.rank % 4 :: comm.size]])
    mean = np.empty_like(model)
    comm.Allreduce((data.T @ np.tanh(data @ model)) / len(data), mean, op=hopcoll.AVG)
    _dies(words, "trainer")
    return model - 0.01 * mean


@task(deterministic=True)
def begin(width: int) -> Any:
    return np.eye(64, width, dtype=np.float32)


@case
def pipeline(comm: Any, folder: Path, words: dict[str, str]) -> Any:
    """Ingest, four augmentations, epochs of a gang."""
    told = {**words, "folder": str(folder)}
    kept = {"checkpoint": words["checkpoint"]}
    data = ingest.options(**kept).bind(told)
    parts = [augment.options(**kept).bind(told, data, number) for number in range(4)]
    model = begin.bind(64)
    for _ in range(int(words["epochs"])):
        model = train.options(**kept).bind(told, model, parts)
    return {"seconds": _run(comm, folder / "store", model)[1]}


def main() -> None:
    name, folder, *rest = sys.argv[1:]
    words = dict(word.split("=", 1) for word in rest)
    comm = hopcoll.init()
    result = CASES[name](comm, Path(folder), words)
    if comm.rank == min(comm.alive):
        print(json.dumps(result), flush=True)
    comm.close()


if __name__ == "__main__":
    main()
