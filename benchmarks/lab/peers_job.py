"""What runs in the ranks of `benchmarks.lab.peers`: one system, all its cases.

The ranks of every system meet, and agree on when a call starts, in the same way: over files of a
folder that all hosts share, asleep in between. So no system is helped or held up by how another one
waits, and nothing of it crosses the wires.

Ray's part is in `benchmarks.lab.peers_ray`, since it has actors in the place of ranks.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["OPERATIONS", "WARM_BYTES", "Case", "Plan", "is_right", "make_input", "sleep_until"]

OPERATIONS = ("bcast", "gather", "reduce", "allreduce")
#: How far ahead the start of a call is agreed on: until then every rank knows it.
_HEADSTART_S = 0.03
_MEETING_S = 60.0
_POLL_S = 0.001
#: Each call is made once before it is timed, with so many bytes at the most.
WARM_BYTES = 1 << 25
#: Inputs repeat: rank r has r, r + 1, ... in each piece; whole numbers, so that every order of
#: summation gives the same float32.
_PIECE = (np.arange(1 << 16) % 1024).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """What is called, and how often; rank r calls it r times `step_s` after rank 0."""

    operation: str
    nbytes: int
    calls: int
    step_s: float = 0.0

    @property
    def key(self) -> str:
        """What its times are written under."""
        return f"{'staggered ' if self.step_s else ''}{self.operation} {self.nbytes}"


@dataclass(frozen=True)
class Plan:
    """What the ranks of a job do, and where; `address` is that of the first host."""

    folder: str
    ranks: int
    address: str
    cases: tuple[Case, ...]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what `write` wrote."""
        words = json.loads(path.read_text())
        return cls(**{**words, "cases": tuple(Case(**case) for case in words["cases"])})


def make_input(nbytes: int, rank: int) -> np.ndarray:
    """Return the array that a rank gives."""
    return np.resize(_PIECE, nbytes // 4) + np.float32(rank)


def is_right(operation: str, result: np.ndarray, ranks: int, source: int = 0) -> bool:
    """Whether a result is what it must be; of a Gather, one block and the rank that it is of."""
    if operation in ("bcast", "gather"):
        must = _PIECE + np.float32(source)
    else:
        must = _PIECE * np.float32(ranks) + np.float32(ranks * (ranks - 1) // 2)
    return all(
        np.array_equal(result[at : at + len(must)], must[: len(result) - at])
        for at in range(0, len(result), len(must))
    )


def sleep_until(moment_s: float) -> None:
    """Return at a moment of the clock that all hosts share."""
    while (left_s := moment_s - time.monotonic()) > 0:
        time.sleep(left_s)


class Meeting:
    """All ranks tell each other a number, over files; who waits sleeps, and calls `poke`.

    MPI sends what is left of a call only when it is called again: `poke` does that.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, poke: Callable[[], object]) -> None:
        self.folder, self.rank, self.ranks, self.poke = folder, rank, ranks, poke
        self.count = 0

    def all(self, value: float) -> list[float]:
        """Return what each rank brought; blocks until all have come."""
        self.count += 1
        mine = self._path(self.count, self.rank)
        new = mine.with_name(f"{mine.name}.new")
        new.write_text(repr(value))
        new.rename(mine)
        deadline_s = time.monotonic() + _MEETING_S
        brought = []
        while len(brought) < self.ranks:
            try:
                brought.append(float(self._path(self.count, len(brought)).read_text()))
            except FileNotFoundError:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"rank {len(brought)} did not come") from None
                self.poke()
                time.sleep(_POLL_S)
        # All have come, so all have read what was brought the time before.
        self._path(self.count - 1, self.rank).unlink(missing_ok=True)
        return brought

    def start_s(self) -> float:
        """Return the moment, some time ahead, at which the next call starts."""
        return max(self.all(time.monotonic())) + _HEADSTART_S

    def _path(self, count: int, rank: int) -> Path:
        return self.folder / f"meeting.{count}.{rank}"


class Arrays:
    """What has MPI's calls on arrays: mpi4py's communicator, and hopcoll's."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.ranks = comm, comm.rank, comm.size

    def make(self, nbytes: int) -> None:
        """Make, and touch, the arrays of calls of this size."""
        self.send = make_input(nbytes, self.rank)
        self.receive = np.full_like(self.send, -1)
        self.blocks = np.full((self.ranks if self.rank == 0 else 0, len(self.send)), -1, np.float32)

    def prepare(self, operation: str) -> None:
        """Bring the arrays into the state before a call."""
        self.receive.fill(-1)
        self.blocks.fill(-1)
        if operation == "bcast" and self.rank == 0:
            self.receive[:] = self.send

    def call(self, operation: str, _: str) -> Sequence[np.ndarray]:
        """What is timed; returns the results that this rank has."""
        if operation == "bcast":
            self.comm.Bcast(self.receive)
            return [self.receive]
        if operation == "gather":
            self.comm.Gather(self.send, self.blocks if self.rank == 0 else None)
            return list(self.blocks)
        if operation == "reduce":
            self.comm.Reduce(self.send, self.receive if self.rank == 0 else None)
            return [self.receive] if self.rank == 0 else []
        self.comm.Allreduce(self.send, self.receive)
        return [self.receive]

    def poke(self) -> None:
        """What who waits calls again and again."""

    def clean(self, operation: str, label: str) -> None:
        """What comes after a call, when all ranks have ended theirs."""

    def leave(self) -> None:
        """End, together with the others."""


class Mpi(Arrays):
    """mpi4py's communicator: MPI as it comes."""

    def __init__(self) -> None:
        from mpi4py import MPI

        super().__init__(MPI.COMM_WORLD)

    def poke(self) -> None:
        self.comm.Iprobe()


class Collectives(Arrays):
    """hopcoll's collectives."""

    def __init__(self) -> None:
        import hopcoll

        super().__init__(hopcoll.init())

    def leave(self) -> None:
        self.comm.Barrier()


class Gloo(Arrays):
    """torch.distributed over Gloo, on the memory of the same arrays."""

    def __init__(self, plan: Plan, rank: int) -> None:
        import torch
        from torch import distributed

        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo", init_method=f"tcp://{plan.address}:29500", rank=rank, world_size=plan.ranks
        )
        self.tensor, self.distributed = torch.from_numpy, distributed
        self.rank, self.ranks = rank, plan.ranks

    def prepare(self, operation: str) -> None:
        super().prepare(operation)
        if operation in ("reduce", "allreduce"):
            self.receive[:] = self.send  # it works in place

    def call(self, operation: str, _: str) -> Sequence[np.ndarray]:
        mine = self.tensor(self.receive)
        if operation == "bcast":
            self.distributed.broadcast(mine, 0)
            return [self.receive]
        if operation == "gather":
            blocks = [self.tensor(block) for block in self.blocks]
            self.distributed.gather(self.tensor(self.send), blocks or None)
            return list(self.blocks)
        if operation == "reduce":
            self.distributed.reduce(mine, 0)
            return [self.receive] if self.rank == 0 else []
        self.distributed.all_reduce(mine)
        return [self.receive]

    def leave(self) -> None:
        self.distributed.destroy_process_group()


class Objects(Collectives):
    """hopcoll's objects: puts and gets, from an array to an array."""

    def __init__(self) -> None:
        super().__init__()
        self.objects = self.comm.objects
        self.total: Any = None

    def make(self, nbytes: int) -> None:
        self.send = make_input(nbytes, self.rank)

    def prepare(self, operation: str) -> None:
        self.total = None

    def has(self, operation: str) -> bool:
        """Whether there is such a call."""
        return "reduce" not in operation or hasattr(self.objects, "reduce")

    def call(self, operation: str, label: str) -> Sequence[np.ndarray]:
        if operation == "bcast":
            if self.rank == 0:
                self.objects.put(self.send, id=label)
                return []
            return [self.objects.get(label)]
        self.objects.put(self.send, id=f"{label}.{self.rank}")
        if operation == "gather":
            return [self.objects.get(name) for name in self._names(label) if self.rank == 0]
        if self.rank == 0:
            from hopcoll import SUM

            self.total = self.objects.reduce(self._names(label), SUM, count=self.ranks)
            if operation == "allreduce":
                # The others cannot know the ref of the sum before it is made.
                self.objects.put(pickle.dumps(self.total), id=f"{label}.total")
        elif operation == "allreduce":
            self.total = pickle.loads(self.objects.get(f"{label}.total").tobytes())
        else:
            return []
        return [self.objects.get(self.total)]

    def _names(self, label: str) -> list[str]:
        return [f"{label}.{rank}" for rank in range(self.ranks)]

    def clean(self, operation: str, label: str) -> None:
        if operation == "bcast":
            if self.rank == 0:
                self.objects.delete(label)
            return
        self.objects.delete(f"{label}.{self.rank}")
        if self.rank == 0 and operation in ("reduce", "allreduce"):
            self.objects.delete(self.total)
            self.objects.delete(f"{label}.total")


def _run(system: Any, plan: Plan) -> dict[str, list[float]]:
    meeting = Meeting(Path(plan.folder), system.rank, plan.ranks, system.poke)
    number = 0

    def call(case: Case) -> float:
        """How long it took, from when the last rank began until the last one had its result."""
        nonlocal number
        number += 1
        system.prepare(case.operation)
        begin_s = meeting.start_s()
        sleep_until(begin_s + system.rank * case.step_s)
        begun_s = time.monotonic()
        results = system.call(case.operation, f"call{number}")
        end_s = max(meeting.all(time.monotonic()))
        begun_s = max(meeting.all(begun_s))
        for source, result in enumerate(results):
            if not is_right(case.operation, result, plan.ranks, source):
                raise AssertionError(f"wrong result at rank {system.rank}: {case}")
        del results
        meeting.all(0.0)
        system.clean(case.operation, f"call{number}")
        return end_s - begun_s

    times = {}
    for case in plan.cases:
        if isinstance(system, Objects) and not system.has(case.operation):
            continue
        if not case.step_s:
            warm_bytes = min(case.nbytes, WARM_BYTES)
            system.make(warm_bytes)
            call(Case(case.operation, warm_bytes, 1))
            if case.nbytes > warm_bytes:
                system.make(case.nbytes)
        times[case.key] = [call(case) for _ in range(case.calls)]
    system.leave()
    return times


def _main(kind: str, path: str, rank: str = "") -> None:
    plan = Plan.read(Path(path))
    system: Any
    if kind == "gloo":
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        system = Gloo(plan, int(rank))
    else:
        system = {"mpi": Mpi, "collectives": Collectives, "objects": Objects}[kind]()
    times = _run(system, plan)
    if system.rank == 0:
        Path(plan.folder, "times.json").write_text(json.dumps(times))


if __name__ == "__main__":
    _main(*sys.argv[2:])  # behind --rank
