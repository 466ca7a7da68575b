"""Time broadcasts of objects over rate-limited hosts, against what the wire allows.

``python -m benchmarks.lab.objects --hosts 8 --rate 1gbit --sizes 1MiB,32MiB`` makes a lab of its
own with a rank a host. Rank 0 has put an object of S bytes; all others get it, in three ways:

together
    All at the same moment, on the clock that all hosts share; the time is that of the last.
one by one
    One every S/B seconds; the time is the longest that one took from its own call on.
killed
    Together, and one of them, which the others may be pulling from, is killed when half of the
    time of the calls before has passed; the time is that of the last survivor.

Figures are multiples of S/B, where B is the bytes a second that a link carries behind its headers;
those of "killed" of the median of "together" in the same job.
"""

from __future__ import annotations

from statistics import median

import numpy as np

from benchmarks.lab.jobs import agreed_start
from benchmarks.lab.object_jobs import GET_S, Benchmark, Job

__all__ = ["BENCHMARK"]


def _rank(job: Job) -> dict[str, list[float]]:
    comm, objects = job.comm, job.objects

    def get(name: str) -> np.ndarray:
        return objects.get(name, timeout_s=GET_S)

    def put(name: str) -> None:
        if comm.rank == 0:
            objects.put(job.given, id=name)

    def broadcast(name: str, step_s: float) -> float:
        """How long the slowest took to get a new object from its call on."""
        put(name)
        begin_s = agreed_start(comm) + comm.rank * step_s
        slowest_s = job.slowest_s(begin_s, range(1, comm.size), lambda: get(name), job.given)
        job.delete([name])
        return slowest_s

    broadcast("warm", 0.0)
    times = {"together": [broadcast(f"together{turn}", 0.0) for turn in range(job.turns)]}
    if job.victim:
        put("last")
        usual_s = median(times["together"])
        job.with_death(usual_s, range(1, comm.size), lambda: get("last"), job.given)
    else:
        turns = range(job.turns)
        times["one by one"] = [broadcast(f"step{turn}", job.least_s) for turn in turns]
    return times


BENCHMARK = Benchmark(
    module="benchmarks.lab.objects",
    lab="hopobj",
    calls="broadcasts of objects",
    kinds=("together", "one by one"),
    # One in the middle, the first, the last.
    victims=lambda ranks: [ranks // 2, 1, ranks - 1],
    getters=lambda ranks: range(1, ranks),
    head=("together", "one by one"),
    figures=lambda over: list(over.values()),
    rank=_rank,
)

if __name__ == "__main__":
    BENCHMARK.run()
