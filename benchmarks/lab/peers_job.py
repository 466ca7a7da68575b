"""What runs in the ranks of `benchmarks.lab.peers`: one system, all its cases.

The ranks of every system meet, and agree on when a batch starts, in the same way: over files of a
folder that all hosts share, asleep in between. So no system is helped or held up by how another one
waits, and nothing of it crosses the wires.

Ray's part is in `benchmarks.lab.peers_ray`, since it has actors in the place of ranks.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.jobs import sleep_until

__all__ = [
    "BATCH_S",
    "CALLS_MAX",
    "OPERATIONS",
    "Case",
    "Plan",
    "Result",
    "check",
    "key_of",
    "make_input",
    "next_count",
    "note",
]

OPERATIONS = ("bcast", "gather", "reduce", "allreduce")
#: What is timed takes so long at the least; so what the clock is off by does not matter.
BATCH_S = 0.05
CALLS_MAX = 1000
_CALLS_BYTES_MAX = 1 << 26
#: Each call is made once before it is timed, with so many bytes at the most.
_WARM_BYTES = 1 << 23
#: How far ahead the start of a batch is agreed on: until then every rank knows it.
_HEADSTART_S = 0.03
_MEETING_S = 120.0
_POLL_S = 0.001
#: Inputs repeat: rank r has r, r + 1, ... in each piece; whole numbers, so that every order of
#: summation gives the same float32.
_PIECE = (np.arange(1 << 16) % 1024).astype(np.float32)

#: Of a call at one rank: what it has then, and whose input that is.
Result = list[tuple[int, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """What is called; rank r calls it r times `step_s` after rank 0.

    Without `is_batch` a batch is one call. `batches` of the same length are timed.
    """

    operation: str
    nbytes: int
    batches: int = 1
    is_batch: bool = False
    step_s: float = 0.0

    @property
    def key(self) -> str:
        """What its times are written under."""
        return key_of(self.operation, self.nbytes, self.step_s > 0)

    def first(self) -> Case:
        """Return the call that warms it up: not staggered, and not too large."""
        return Case(self.operation, min(self.nbytes, _WARM_BYTES))


def key_of(operation: str, nbytes: int, is_staggered: bool) -> str:
    """Return what a case is called."""
    return f"{'staggered ' if is_staggered else ''}{operation} {nbytes}"


@dataclass(frozen=True)
class Plan:
    """What the ranks of a job do, and where; `address` is that of the first host."""

    folder: str
    ranks: int
    address: str
    cases: tuple[Case, ...]

    @property
    def notes(self) -> Path:
        """The file into which the job writes what it does, line by line."""
        return Path(self.folder, "notes")

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what `write` wrote."""
        words = json.loads(path.read_text())
        return cls(**{**words, "cases": tuple(Case(**case) for case in words["cases"])})


def note(plan: Plan, case: Case, run: dict[str, Any] | None = None) -> None:
    """Write that a case begins, or what came of it."""
    with plan.notes.open("a") as file:
        file.write(json.dumps({"key": case.key, "run": run}) + "\n")


def next_count(count: int, batch_s: float, nbytes: int) -> int:
    """Return how many calls to try in a batch after one of `count` took `batch_s`.

    The same number: it took long enough, or no more calls are allowed.
    """
    most = max(1, min(CALLS_MAX, _CALLS_BYTES_MAX // nbytes))
    if batch_s >= BATCH_S or count >= most:
        return count
    enough = math.ceil(1.3 * count * BATCH_S / max(batch_s, 1e-9))
    return min(most, max(2 * count, enough))


def measure(case: Case, batch: Callable[[Case, int], float]) -> dict[str, Any]:
    """Return the times of a case, a call, and how many calls were timed together.

    Parameters
    ----------
    case : Case
    batch : callable
        Makes so many calls, one after the other, and returns how long all of them took.
    """
    if not case.is_batch:
        return {"calls": 1, "seconds": [batch(case, 1) for _ in range(case.batches)]}
    count, seconds = 1, []
    while len(seconds) <= case.batches:
        batch_s = batch(case, count)
        more = next_count(count, batch_s, case.nbytes)
        if more == count:
            seconds.append(batch_s / count)
        else:  # also when a disturbance made a shorter one long enough before
            count, seconds = more, []
    # The first one was chosen for being long.
    return {"calls": count, "seconds": seconds[1:]}


def make_input(nbytes: int, rank: int) -> np.ndarray:
    """Return the array that a rank gives."""
    return np.resize(_PIECE, nbytes // 4) + np.float32(rank)


def check(operation: str, results: Sequence[Result], ranks: int) -> None:
    """Compare what calls gave with what they must give.

    Raises
    ------
    AssertionError
        One is wrong.
    """
    for turn, result in enumerate(results):
        for source, array in result:
            if operation in ("bcast", "gather"):
                must = _PIECE + np.float32(source)
            else:
                must = _PIECE * np.float32(ranks) + np.float32(ranks * (ranks - 1) // 2)
            for at in range(0, len(array), len(must)):
                if not np.array_equal(array[at : at + len(must)], must[: len(array) - at]):
                    raise AssertionError(f"call {turn}, {operation}: wrong from item {at} on")


class Meeting:
    """All ranks tell each other numbers, over files; who waits sleeps, and calls `poke`.

    MPI sends what is left of a call only when it is called again: `poke` does that.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, poke: Callable[[], object]) -> None:
        self.folder, self.rank, self.ranks, self.poke = folder, rank, ranks, poke
        self.count = 0

    def all(self, *values: float) -> list[list[float]]:
        """Return what each rank brought; blocks until all have come."""
        self.count += 1
        mine = self._path(self.count, self.rank)
        new = mine.with_name(f"{mine.name}.new")
        new.write_text(json.dumps(values))
        new.rename(mine)
        deadline_s = time.monotonic() + _MEETING_S
        brought: list[list[float]] = []
        while len(brought) < self.ranks:
            try:
                brought.append(json.loads(self._path(self.count, len(brought)).read_text()))
            except FileNotFoundError:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"rank {len(brought)} did not come") from None
                self.poke()
                time.sleep(_POLL_S)
        # All have come, so all have read what was brought the time before.
        self._path(self.count - 1, self.rank).unlink(missing_ok=True)
        return brought

    def start_s(self) -> float:
        """Return the moment, some time ahead, at which the next batch starts."""
        return max(moment_s for (moment_s,) in self.all(time.monotonic())) + _HEADSTART_S

    def _path(self, count: int, rank: int) -> Path:
        return self.folder / f"meeting.{count}.{rank}"


class Arrays:
    """What has MPI's calls on arrays: mpi4py's communicator, and hopcoll's.

    Each call of a batch has result arrays of its own, made and touched before it is timed.
    """

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.ranks = comm, comm.rank, comm.size
        self.send = np.empty(0, np.float32)

    def make(self, nbytes: int) -> None:
        """Make the array that this rank gives."""
        if self.send.nbytes != nbytes:
            self.send = make_input(nbytes, self.rank)

    def prepare(self, operation: str, count: int) -> None:
        """Make what the calls of a batch need."""
        self.receives: list[Any] = [
            self.room(operation, turn % self.ranks) for turn in range(count)
        ]

    def room(self, operation: str, root: int) -> Any:
        """The array in which this rank has the result of a call, if it has one."""
        if operation == "gather":
            shape = (self.ranks, len(self.send))
            return np.full(shape, -1, np.float32) if self.rank == root else None
        if operation == "bcast" and self.rank == root:
            return self.send
        if operation == "reduce" and self.rank != root:
            return None
        return np.full_like(self.send, -1)

    def call(self, operation: str, turn: int) -> Result:
        """Make a call, which is timed; return the results that this rank has."""
        root, receive = turn % self.ranks, self.receives[turn]
        if operation == "bcast":
            self.comm.Bcast(receive, root)
        elif operation == "gather":
            self.comm.Gather(self.send, receive, root)
        elif operation == "reduce":
            self.comm.Reduce(self.send, receive, root=root)
        else:
            self.comm.Allreduce(self.send, receive)
        return self.results(operation, root, receive)

    def results(self, operation: str, root: int, receive: Any) -> Result:
        """What of the arrays is a result."""
        if operation == "gather":
            return list(enumerate(receive)) if self.rank == root else []
        if operation == "reduce" and self.rank != root:
            return []
        return [(root, receive)]

    def poke(self) -> None:
        """What who waits calls again and again."""

    def clean(self, operation: str) -> None:
        """What comes after a batch, when all ranks have ended theirs."""
        self.receives = []

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
        self.send = np.empty(0, np.float32)

    def room(self, operation: str, root: int) -> Any:
        # It reduces in place, on every rank.
        return self.send.copy() if "reduce" in operation else super().room(operation, root)

    def call(self, operation: str, turn: int) -> Result:
        root, receive = turn % self.ranks, self.receives[turn]
        if operation == "bcast":
            self.distributed.broadcast(self.tensor(receive), root)
        elif operation == "gather":
            blocks = None if receive is None else [self.tensor(block) for block in receive]
            self.distributed.gather(self.tensor(self.send), blocks, root)
        elif operation == "reduce":
            self.distributed.reduce(self.tensor(receive), root)
        else:
            self.distributed.all_reduce(self.tensor(receive))
        return self.results(operation, root, receive)

    def leave(self) -> None:
        self.distributed.destroy_process_group()


class Objects(Collectives):
    """hopcoll's objects: puts and gets, from an array to an array.

    A batch has names of its own, which are deleted after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.objects = self.comm.objects
        self.loop = asyncio.new_event_loop()
        self.batch = 0
        self.mine: list[Any] = []

    def prepare(self, operation: str, count: int) -> None:
        self.batch += 1

    def call(self, operation: str, turn: int) -> Result:
        root, name = turn % self.ranks, f"{self.batch}.{turn}"
        is_root = self.rank == root
        if operation == "bcast":
            if not is_root:
                return [(root, self.objects.get(name))]
            self._put(self.send, name)
            return []
        names = [f"{name}.{rank}" for rank in range(self.ranks)]
        if operation == "gather":
            self._put(self.send, names[self.rank])
            got = self.loop.run_until_complete(self._all(names)) if is_root else []
            return list(enumerate(got))
        if is_root:
            # Before any input is there: the others need the ref of the sum, and it needs nothing.
            total = self.objects.reduce(names)
            self.mine.append(total)
            if operation == "allreduce":
                self._put(np.frombuffer(pickle.dumps(total), np.uint8), name)
        self._put(self.send, names[self.rank])
        if operation == "reduce" and not is_root:
            return []
        if not is_root:
            total = pickle.loads(self.objects.get(name).tobytes())
        return [(root, self.objects.get(total))]

    async def _all(self, names: Sequence[str]) -> list[np.ndarray]:
        return await asyncio.gather(*map(self.objects.get_async, names))

    def _put(self, array: np.ndarray, name: str) -> None:
        self.mine.append(self.objects.put(array, id=name))

    def clean(self, operation: str) -> None:
        for ref in self.mine:
            self.objects.delete(ref)
        self.mine = []

    def leave(self) -> None:
        self.loop.close()
        super().leave()


def _run(system: Any, plan: Plan) -> None:
    meeting = Meeting(Path(plan.folder), system.rank, plan.ranks, system.poke)

    def batch(case: Case, count: int) -> float:
        """How long it took, from when the last rank began until the last one had its results."""
        system.make(case.nbytes)
        system.prepare(case.operation, count)
        begin_s = meeting.start_s()
        sleep_until(begin_s + system.rank * case.step_s)
        begun_s = time.monotonic()
        results = [system.call(case.operation, turn) for turn in range(count)]
        moments = meeting.all(begun_s, time.monotonic())
        check(case.operation, results, plan.ranks)
        del results
        meeting.all()
        system.clean(case.operation)
        return max(end_s for _, end_s in moments) - max(begun_s for begun_s, _ in moments)

    warm = set()
    for case in plan.cases:
        if system.rank == 0:
            note(plan, case)
        if case.first() not in warm:
            warm.add(case.first())
            batch(case.first(), 1)
        run = measure(case, batch)
        if system.rank == 0:
            note(plan, case, run)
    system.leave()


def _main(kind: str, path: str, rank: str = "") -> None:
    plan = Plan.read(Path(path))
    system: Any
    if kind == "gloo":
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        system = Gloo(plan, int(rank))
    else:
        system = {"mpi": Mpi, "collectives": Collectives, "objects": Objects}[kind]()
    _run(system, plan)


if __name__ == "__main__":
    _main(*sys.argv[2:])  # behind --rank
