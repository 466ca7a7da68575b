"""Ray's part of `benchmarks.lab.peers`: an actor a host, and a driver on the first one.

An actor gives its array as what a method returns, which Ray puts into the store of its host; so
others can ask for it before it is there, as with hopcoll's objects. A sum is made at one actor, of
what it gets, in the order in which it comes: Ray has no reduce. The driver calls the methods of a
whole batch at once; an actor runs its methods one after the other.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.lab.jobs import sleep_until
from benchmarks.lab.peers_job import Case, Plan, Result, check, make_input, measure, note

#: How far ahead a batch starts; until then every actor is in its first method.
_HEADSTART_S = 0.15
_JOIN_S = 120.0
_TRIES = 5


class Participant:
    """What an actor does. The first method of a batch waits for a moment, the last tells when."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.send = np.empty(0, np.float32)

    def make(self, nbytes: int) -> None:
        """Make the array that this one gives."""
        if self.send.nbytes != nbytes:
            self.send = make_input(nbytes, self.rank)

    def begin(self, begin_s: float) -> None:
        """Begin a batch at a moment."""
        self.is_late = time.monotonic() > begin_s
        sleep_until(begin_s)
        self.begun_s = time.monotonic()
        self.results: list[Result] = []

    def give(self) -> np.ndarray:
        """Return the array, into the store."""
        return self.send

    def take(self, root: int, refs: list[Any]) -> None:
        """Get one object of the root's."""
        self.results.append([(root, ray.get(refs[0]))])

    def collect(self, refs: list[Any]) -> None:
        """Get the blocks of a Gather, with the one that this actor puts itself."""
        own = ray.put(self.send)
        self.results.append(list(enumerate(ray.get([own if ref is None else ref for ref in refs]))))

    def add(self, refs: list[Any]) -> np.ndarray:
        """Return the sum of what all have given, in the order in which it comes."""
        total = self.send.copy()
        while refs:
            ready, refs = ray.wait(refs, num_returns=1)
            total += ray.get(ready[0])
        self.results.append([(self.rank, total)])
        return total

    def end(self, operation: str) -> tuple[float, float, bool]:
        """Return when this one began and ended its calls, and whether it began too late."""
        end_s = time.monotonic()
        check(operation, self.results, self.ranks)
        self.results = []
        return self.begun_s, end_s, self.is_late


def _batch(actors: list[Any], case: Case, count: int) -> float:
    """How long a batch took, from when the last actor began; once more if one came late."""
    ray.get([actor.make.remote(case.nbytes) for actor in actors])
    for _ in range(_TRIES):
        begin_s = time.monotonic() + _HEADSTART_S
        for rank, actor in enumerate(actors):
            actor.begin.remote(begin_s + rank * case.step_s)
        kept = [_call(actors, case.operation, turn % len(actors)) for turn in range(count)]
        moments = ray.get([actor.end.remote(case.operation) for actor in actors])
        del kept  # until now: nothing is freed within the time
        if not any(is_late for *_, is_late in moments):
            return max(end_s for _, end_s, _ in moments) - max(begun_s for begun_s, *_ in moments)
    raise AssertionError(f"actors came late {_TRIES} times: {case}")


def _call(actors: list[Any], operation: str, root: int) -> list[Any]:
    """Have the actors make one call; return its refs."""
    if operation == "bcast":
        ref = actors[root].give.remote()
        return [ref, *(one.take.remote(root, [ref]) for one in actors if one is not actors[root])]
    refs = [None if rank == root else one.give.remote() for rank, one in enumerate(actors)]
    if operation == "gather":
        return [*refs, actors[root].collect.remote(refs)]
    total = actors[root].add.remote([ref for ref in refs if ref is not None])
    if operation == "reduce":
        return [*refs, total]
    takers = [one for one in actors if one is not actors[root]]
    return [*refs, total, *(one.take.remote(root, [total]) for one in takers)]


def _nodes(count: int) -> dict[str, str]:
    """The id of each host's node, by its address, when all have joined."""
    deadline_s = time.monotonic() + _JOIN_S
    while True:
        alive = {one["NodeManagerAddress"]: one["NodeID"] for one in ray.nodes() if one["Alive"]}
        if len(alive) >= count:
            return alive
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{len(alive)} of {count} nodes joined")
        time.sleep(0.2)


def _main(path: str) -> None:
    plan = Plan.read(Path(path))
    ray.init(
        address=f"{plan.address}:6379", _node_ip_address=plan.address,
        logging_level="ERROR", log_to_driver=False,
    )  # fmt: skip
    nodes = _nodes(plan.ranks)
    subnet = plan.address.rpartition(".")[0]
    actors = []
    for rank in range(plan.ranks):
        where = NodeAffinitySchedulingStrategy(nodes[f"{subnet}.{rank + 1}"], soft=False)
        kind = ray.remote(Participant).options(num_cpus=1, scheduling_strategy=where)
        actors.append(kind.remote(rank, plan.ranks))
    ray.get([actor.make.remote(4) for actor in actors])  # they have started

    def batch(case: Case, count: int) -> float:
        return _batch(actors, case, count)

    warm = set()
    for case in plan.cases:
        note(plan, case)
        if case.first() not in warm:
            warm.add(case.first())
            batch(case.first(), 1)
        note(plan, case, measure(case, batch))
    ray.shutdown()


if __name__ == "__main__":
    _main(sys.argv[1])
