"""A communicator whose ranks are threads of this process, for what needs many of them and no MPI.

It has what a store uses. A rank dies by an exception that nothing catches; an operation then goes
on without it, and says so to all alike. A rank that is left out is dead to the others, and lives:
its operations raise `StaleEpochError`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hopcoll.errors import RankFailedError, StaleEpochError, TransferTimeoutError

__all__ = ["FakeComm", "Killed", "World", "run"]


class Killed(BaseException):
    """Ends a rank where it is."""


@dataclass
class _Operation:
    inputs: dict[int, Any] = field(default_factory=dict)
    contributors: tuple[int, ...] | None = None


class World:
    """What the ranks share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.dead: set[int] = set()
        self.left_out: set[int] = set()
        self.operations: dict[Any, _Operation] = {}

    def kill(self, rank: int) -> None:
        with self.changed:
            self.dead.add(rank)
            for operation in self.operations.values():
                self._look(operation)
            self.changed.notify_all()

    def await_waiting(self, rank: int, timeout_s: float = 60.0) -> None:
        """Return when a rank has come as far as it can without others: it waits in an operation."""
        with self.changed:
            assert self.changed.wait_for(
                lambda: any(
                    rank in one.inputs and one.contributors is None
                    for one in self.operations.values()
                ),
                timeout_s,
            )

    def leave_out(self, rank: int) -> None:
        self.left_out.add(rank)
        self.kill(rank)

    def _check(self, rank: int) -> None:
        if rank in self.left_out:
            raise StaleEpochError(f"rank {rank} was taken for dead")
        if rank in self.dead:
            raise Killed

    def join(self, key: Any, rank: int, value: Any, timeout_s: float) -> _Operation:
        with self.changed:
            self._check(rank)
            operation = self.operations.setdefault(key, _Operation())
            operation.inputs[rank] = value
            self._look(operation)
            self.changed.notify_all()

            def over() -> bool:
                return operation.contributors is not None or rank in self.dead

            if not self.changed.wait_for(over, timeout_s):
                raise TransferTimeoutError(f"{key} did not complete")
            self._check(rank)
            return operation

    def _look(self, operation: _Operation) -> None:
        living = set(range(self.size)) - self.dead
        if operation.contributors is None and living <= set(operation.inputs):
            operation.contributors = tuple(sorted(living))


@dataclass
class _Outcome:
    contributors: tuple[int, ...]

    def stable(self) -> bool:
        return True


class FakeComm:
    """One rank's end."""

    def __init__(self, world: World, rank: int, name: tuple[int, ...] = ()) -> None:
        self.world, self.rank, self.size = world, rank, world.size
        self.outcome: _Outcome | None = None
        self._name = name
        self._calls = 0
        self._dups = 0

    def Dup(self, timeout_s: float | None = None) -> FakeComm:
        self._dups += 1
        return FakeComm(self.world, self.rank, (*self._name, self._dups))

    def allgather(self, value: Any, *, timeout_s: float, on_failure: str = "survivors") -> list:
        done = self._join(value, timeout_s)
        return [done.inputs[r] if r in done.contributors else None for r in range(self.size)]

    def alltoall(self, values: list, *, timeout_s: float, on_failure: str = "survivors") -> list:
        assert len(values) == self.size
        done = self._join(values, timeout_s)
        return [
            done.inputs[r][self.rank] if r in done.contributors else None
            for r in range(self.size)
        ]

    def Bcast(self, array: np.ndarray, root: int, timeout_s: float) -> _Outcome:
        done = self._join(array.copy() if self.rank == root else None, timeout_s)
        if root not in done.contributors:
            raise RankFailedError("Bcast lost its root", (root,), 1)
        array[...] = done.inputs[root]
        return self.outcome

    def close(self, timeout_s: float) -> bool:
        return True

    def _join(self, value: Any, timeout_s: float) -> _Operation:
        self._calls += 1
        done = self.world.join((self._name, self._calls), self.rank, value, timeout_s)
        self.outcome = _Outcome(done.contributors)
        return done


def run(size: int, program: Callable[[FakeComm], Any], world: World | None = None) -> list[Any]:
    """Run `program(comm)` on each rank; returns what each returned, or what it raised.

    A rank that ends in any way is dead to the others.
    """
    world = world or World(size)
    ended: list[Any] = [None] * size

    def rank_of(rank: int) -> None:
        try:
            ended[rank] = program(FakeComm(world, rank))
        except BaseException as error:
            ended[rank] = error
        finally:
            world.kill(rank)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a rank hangs"
    return ended
