"""Ray's part of `benchmarks.lab.peers`: an actor a host, and a driver on the first one.

An actor gives its array as what a method returns, which Ray puts into the store of its host; so
others can ask for it before it is there, as with hopcoll's objects. A sum is made at one actor, of
what it gets, in the order in which it comes: Ray has no reduce.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.lab.peers_job import (
    WARM_BYTES,
    Case,
    Plan,
    is_right,
    make_input,
    sleep_until,
)

#: How far ahead a call starts; until then every actor is in its method.
_HEADSTART_S = 0.15
_JOIN_S = 90.0
_TRIES = 5


class Participant:
    """What an actor does. Methods wait for a moment, and note when they began."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.begun_s, self.is_late = 0.0, False

    def make(self, nbytes: int) -> None:
        """Make the array that this one gives."""
        self.send = make_input(nbytes, self.rank)

    def give(self, begin_s: float) -> np.ndarray:
        """Return the array, into the store."""
        self._wait(begin_s)
        return self.send

    def take(self, operation: str, refs: list[Any], begin_s: float) -> float:
        """Get one object, or all blocks of a Gather; return when they were here."""
        if operation != "allreduce":  # there, it waited when it gave
            self._wait(begin_s)
        if operation == "gather":
            refs = [ray.put(self.send), *refs]
        results = ray.get(refs)
        end_s = time.monotonic()
        self._check(operation, results)
        return end_s

    def add(self, refs: list[Any], begin_s: float) -> tuple[np.ndarray, float]:
        """Return the sum of what all have given, and when it was here."""
        self._wait(begin_s)
        total = self.send.copy()
        while refs:
            ready, refs = ray.wait(refs, num_returns=1)
            total += ray.get(ready[0])
        end_s = time.monotonic()
        self._check("reduce", [total])
        return total, end_s

    def begun(self) -> tuple[float, bool]:
        """Return when it began the last time, and whether it was called too late for that."""
        return self.begun_s, self.is_late

    def _wait(self, begin_s: float) -> None:
        self.is_late = time.monotonic() > begin_s
        sleep_until(begin_s)
        self.begun_s = time.monotonic()

    def _check(self, operation: str, results: list[np.ndarray]) -> None:
        for source, result in enumerate(results):
            if not is_right(operation, result, self.ranks, source):
                raise AssertionError(f"wrong result of a {operation} at actor {self.rank}")


def _call(actors: list[Any], case: Case) -> float:
    """How long a call took, from when the last actor began; once more if one came late."""
    for _ in range(_TRIES):
        begin_s = time.monotonic() + _HEADSTART_S
        at_s = [begin_s + rank * case.step_s for rank in range(len(actors))]
        end_s = max(_ends(actors, case.operation, at_s))
        begun = ray.get([actor.begun.remote() for actor in actors])
        if not any(is_late for _, is_late in begun):
            return end_s - max(begun_s for begun_s, _ in begun)
    raise AssertionError(f"actors came late {_TRIES} times: {case}")


def _ends(actors: list[Any], operation: str, at_s: list[float]) -> list[float]:
    root, *others = actors
    if operation == "bcast":
        ref = root.give.remote(at_s[0])
        ends = [
            actor.take.remote(operation, [ref], moment_s)
            for actor, moment_s in zip(others, at_s[1:], strict=True)
        ]
        return list(ray.get(ends))
    refs = [
        actor.give.remote(moment_s) for actor, moment_s in zip(others, at_s[1:], strict=True)
    ]
    if operation == "gather":
        return [ray.get(root.take.remote(operation, refs, at_s[0]))]
    total, end = root.add.options(num_returns=2).remote(refs, at_s[0])
    if operation == "reduce":
        return [ray.get(end)]
    return list(ray.get([actor.take.remote(operation, [total], 0.0) for actor in others]))


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
    times = {}
    for case in plan.cases:
        if not case.step_s:
            warm_bytes = min(case.nbytes, WARM_BYTES)
            ray.get([actor.make.remote(warm_bytes) for actor in actors])
            _call(actors, Case(case.operation, warm_bytes, 1))
            ray.get([actor.make.remote(case.nbytes) for actor in actors])
        times[case.key] = [_call(actors, case) for _ in range(case.calls)]
    Path(plan.folder, "times.json").write_text(json.dumps(times))
    ray.shutdown()


if __name__ == "__main__":
    _main(sys.argv[1])
