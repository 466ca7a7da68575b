"""In the place of the ranks of a workflow, and of their memory: one process, which loses things."""

from __future__ import annotations

import collections
import itertools
import random
import secrets
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hopcoll.errors import (
    ObjectDeletedError,
    ObjectExistsError,
    ObjectLostError,
    ReductionError,
)
from hopcoll.objects import ObjectRef
from recovery.workflows import TaskContext, Workflow, actors
from recovery.workflows.gang import Gang, run_task
from recovery.workflows.post import RankGoneError
from recovery.workflows.references import Found
from recovery.workflows.stored import load_call

_RANKS = 3
#: Of each key, so many events are sent.
EVENTS = 12
#: At each use of an object: that a rank dies with all that only it has.
_LOSS = 0.04

_HERE = threading.local()


def here() -> int:
    """The rank that this thread is of."""
    return int(getattr(_HERE, "rank", 0))


@dataclass
class _Thing:
    """An object: who has it, and what it is made of."""

    array: np.ndarray | None
    ranks: set[int]
    taken: tuple[ObjectRef, ...] = ()
    error: Exception | None = None


def _sealed(value: Any) -> np.ndarray:
    array = np.array(value)
    array.flags.writeable = False
    return array


@dataclass
class Memory:
    """The objects of a few ranks, with the interface of `hopcoll.objects.Objects`."""

    draw: random.Random
    session: str = field(default_factory=lambda: secrets.token_hex(4))
    things: dict[ObjectRef, _Thing] = field(default_factory=dict)
    deleted: set[ObjectRef] = field(default_factory=set)
    lost_count: int = 0
    generation: int = 0  # of the ranks: how many have died
    live: Any = field(default_factory=lambda: LiveByRank())
    lock: threading.RLock = field(default_factory=threading.RLock)
    stamps: Any = field(default_factory=lambda: itertools.count(1))

    def lose(self, rank: int) -> None:
        """A rank dies."""
        with self.lock:
            self.generation += 1
            for thing in self.things.values():
                if thing.array is not None:
                    thing.ranks.discard(rank)
                    if not thing.ranks:
                        thing.array = None
                        self.lost_count += 1

    def _lose_some(self) -> None:
        if self.draw.random() < _LOSS:
            self.lose(self.draw.randrange(1, _RANKS))

    def put(self, value: Any, ref: ObjectRef | None = None) -> ObjectRef:
        with self.lock:
            self._lose_some()
            ref = ref or ObjectRef()
            thing = self.things.get(ref)
            if thing is not None and thing.array is not None:
                raise ObjectExistsError(f"{ref!r} exists", ref)
            self.things[ref] = _Thing(_sealed(value), {here()})
            self.deleted.discard(ref)
            return ref._put(next(self.stamps))

    def get(self, ref: ObjectRef, timeout_s: float | None = None) -> np.ndarray:
        with self.lock:
            self._lose_some()
            thing = self.things.get(ref)
            if thing is None:
                if ref in self.deleted:
                    raise ObjectDeletedError(f"{ref!r} was deleted", ref)
                raise ObjectLostError(f"{ref!r} is lost", ref=ref)
            if thing.error is not None:
                raise thing.error
            if thing.array is None:
                raise ObjectLostError(f"{ref!r} is lost", ref=ref)
            thing.ranks.add(here())
            return thing.array

    def reduce(
        self, refs: Iterable[ObjectRef], op: Any = None, count: int | None = None
    ) -> ObjectRef:
        with self.lock:
            self._lose_some()
            inputs = tuple(one._put(one._stamp) for one in refs)
            ref = ObjectRef()
            there = [
                one for one in inputs
                if one in self.things and self.things[one].array is not None
            ]  # fmt: skip
            count = len(inputs) if count is None else count
            if len(there) < count:
                lost = [one for one in inputs if one not in there][-1]
                self.things[ref] = _Thing(None, set(), (), self._failure(ref, lost))
            else:
                taken = sorted(self._first(there, count), key=inputs.index)
                total = sum(self.things[one].array for one in taken)  # type: ignore[misc]
                self.things[ref] = _Thing(_sealed(total), {here()}, tuple(taken))
            return ref._put(next(self.stamps), inputs)

    def _first(self, there: list[ObjectRef], count: int) -> list[ObjectRef]:
        """Those of the inputs that are in a result."""
        return self.draw.sample(there, count)

    def is_dying(self, rank: int) -> bool:
        """Whether a rank that ran a call while another died was that one."""
        return self.draw.random() < 0.5

    def _failure(self, ref: ObjectRef, lost: ObjectRef) -> Exception:
        """As `hopcoll.objects.Objects` raises it."""
        text = f"{ref!r} cannot be made: its input {lost!r}"
        if lost in self.deleted:
            text = f"{text} was deleted, and too few others are left"
            return ObjectDeletedError(text, ref)
        if lost in self.things and self.things[lost].error is not None:
            return ReductionError(f"{text} cannot be made either", ref, (lost,))
        return ObjectLostError(f"{text} is lost, and too few others are left", ref=ref)

    def contributors(
        self, ref: ObjectRef, timeout_s: float | None = None
    ) -> tuple[ObjectRef, ...]:
        if not ref.inputs:
            raise ValueError(f"ref must be one that reduce returned, not {ref!r}")
        with self.lock:
            self.get(ref)
            return self.things[ref].taken

    def delete(self, ref: ObjectRef, timeout_s: float | None = None) -> None:
        with self.lock:
            if self.things.pop(ref, None) is not None:
                self.deleted.add(ref)


class LiveByRank:
    """The objects of actors that each rank keeps."""

    def __init__(self) -> None:
        self._of = [actors._Live() for _ in range(_RANKS)]

    def take(self, version: Any) -> Any:
        return self._of[here()].take(version)

    def keep(self, version: Any, thing: Any) -> None:
        self._of[here()].keep(version, thing)


class OneRank(Gang):
    """In the place of the ranks; `tests/mpi/test_workflows.py` and others have real ones.

    It is also who sends events: all of them, until it was told that each was heard.
    """

    def __init__(self, workflow: Workflow, memory: Memory) -> None:
        self._workflow = workflow
        self._unsent = [(key, number) for key in "ab" for number in range(EVENTS)]
        self._lock = threading.Lock()
        self._load: collections.Counter[int] = collections.Counter()
        self._threads: list[threading.Thread] = []
        self.memory = memory
        self.objects = memory  # type: ignore[assignment]
        self.session = memory.session
        self.rank = 0
        self.rebuild = lambda keys, era: None
        self.note = lambda *what: None

    def run(self, lead: Any) -> Any:
        try:
            return lead()
        finally:
            for thread in self._threads:
                thread.join()

    def is_lost(self, owner: Any) -> bool:
        return False

    def idle(self) -> None:
        if self._unsent:
            key, number = self._unsent[0]
            payload = {"tokens": {f"sent {key} {number}": "once"}}
            self._workflow.send(key, payload, str(number))
            self._unsent.pop(0)

    def close(self) -> None:
        pass

    def delete(self, ref: ObjectRef) -> None:
        self.memory.delete(ref)

    def place(self, wanted: int | str) -> int:
        with self.memory.lock:
            return wanted if isinstance(wanted, int) else self.memory.draw.randrange(_RANKS)

    def dispatch(
        self, rank: int, call: bytes, context: TaskContext, fixed: bool,
        answered: Callable[..., Any],
    ) -> None:  # fmt: skip
        def run() -> None:
            _HERE.rank = rank
            before = self.memory.generation
            value: Any = None
            error: BaseException | None = None
            try:
                task, arguments, keywords = load_call(call)
                references = self.references(context.bare(), fixed, None)
                there = TaskContext.at(context.bare(), context._recall, references)
                value = run_task(task, arguments, keywords, there)
            except BaseException as raised:
                error = raised
            if isinstance(error, (Exception, type(None))) and self.memory.generation != before:
                with self.memory.lock:
                    if self.memory.is_dying(rank):
                        self.memory.lose(rank)
                        error = RankGoneError(f"rank {rank} is gone")
            answered(value, error)

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()

    def call(self, task_: Any, arguments: Any, keywords: Any, context: TaskContext) -> Any:
        value = task_.function(*arguments, **keywords, ctx=context)
        return (value, Found()), (0,), not arguments[0]["loses"]
