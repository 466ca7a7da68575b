"""Time reductions of objects over rate-limited hosts, against what the wire allows.

``python -m benchmarks.lab.object_reduces --hosts 8 --rate 1gbit --sizes 1MiB,32MiB`` makes a lab
of its own with a rank a host. Each rank puts an object of S bytes; rank 0 has them added up:

reduce
    All inputs are there; until rank 0 has the result.
one by one
    An input appears every S/B/2 seconds; from the last one on until rank 0 has the result.
broadcast, allreduce
    An object that is there, to all; and a reduction of which all ranks get the result.
killed
    As reduce, and a rank with an input, of one more than are taken, is killed when half of the
    time of the reductions before has passed.

Figures are multiples of S/B, where B is the bytes a second that a link carries behind its headers;
allreduce also of reduce and broadcast one after the other, killed of the median of "reduce".
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks.lab.jobs import agreed_start, sleep_until
from benchmarks.lab.object_jobs import GET_S, Benchmark, Job

__all__ = ["BENCHMARK"]


def _rank(job: Job) -> dict[str, list[float]]:
    comm, objects = job.comm, job.objects
    expected = job.given * comm.size
    everybody = range(comm.size)

    def get(ref: Any) -> np.ndarray:
        return objects.get(ref, timeout_s=GET_S)

    def called(names: list[str]) -> Any:
        """The ref of a reduction that rank 0 has called, at all."""
        return comm.bcast(objects.reduce(names, count=comm.size) if comm.rank == 0 else None)

    def reduced(name: str, getters: Sequence[int], step_s: float = 0.0) -> float:
        names = [f"{name}-{rank}" for rank in everybody]
        if not step_s:
            objects.put(job.given, id=names[comm.rank])
            comm.Barrier()
            begin_s = agreed_start(comm)
            ref = called(names)
        else:
            ref = called(names)
            sleep_until(agreed_start(comm) + comm.rank * step_s)
            objects.put(job.given, id=names[comm.rank])
            begin_s = comm.bcast(time.monotonic(), root=comm.size - 1)
        slowest_s = job.slowest_s(begin_s, getters, lambda: get(ref), expected)
        job.delete([ref, *names])
        return slowest_s

    def broadcast(name: str) -> float:
        if comm.rank == 0:
            objects.put(expected, id=name)
        begin_s = agreed_start(comm)
        slowest_s = job.slowest_s(begin_s, range(1, comm.size), lambda: get(name), expected)
        job.delete([name])
        return slowest_s

    turns = range(job.turns)
    reduced("warm", everybody)
    times = {"reduce": [reduced(f"r{turn}", [0]) for turn in turns]}
    if not job.victim:
        times["one by one"] = [reduced(f"s{turn}", [0], job.least_s / 2) for turn in turns]
        times["broadcast"] = [broadcast(f"b{turn}") for turn in turns]
        times["allreduce"] = [reduced(f"a{turn}", everybody) for turn in turns]
        return times
    # One input more than is taken, at rank 0, which lives.
    names = [f"last-{rank}" for rank in everybody]
    objects.put(job.given, id=names[comm.rank])
    if comm.rank == 0:
        objects.put(job.given, id="spare")
    job.with_death(
        median(times["reduce"]),
        [0],
        lambda: get(objects.reduce([*names, "spare"], count=comm.size)),
        expected,
    )
    return times


def _figures(over: dict[str, float]) -> list[float]:
    both = over["allreduce"] / (over["reduce"] + over["broadcast"])
    return [*over.values(), both]


_KINDS = ("reduce", "one by one", "broadcast", "allreduce")

BENCHMARK = Benchmark(
    module="benchmarks.lab.object_reduces",
    lab="hopred",
    calls="reductions of objects",
    kinds=_KINDS,
    # One in the middle, the last, the next to rank 0.
    victims=lambda ranks: [ranks // 2, ranks - 1, 1],
    getters=lambda ranks: [0],
    head=(*_KINDS, "allreduce, over both"),
    figures=_figures,
    rank=_rank,
)

if __name__ == "__main__":
    BENCHMARK.run()
