"""Tasks that do not run in the leader's threads: gangs, and those that run on another rank."""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hopcoll.errors import WorkflowError
from recovery.workflows.actors import actor_of
from recovery.workflows.attempts import Attempts, GangError, VoidError
from recovery.workflows.board import Slot
from recovery.workflows.graph import Task, Vertex
from recovery.workflows.stored import dump_call

if TYPE_CHECKING:
    from recovery.workflows.context import TaskContext
    from recovery.workflows.engine import Engine

__all__ = ["Elsewhere"]


class Elsewhere:
    """Gives tasks to the ranks, and takes what becomes of them.

    Parameters
    ----------
    engine : Engine
    attempts : Attempts

    Attributes
    ----------
    answers : deque
        Of calls at other ranks, for the engine's threads: what `Attempts.answered` takes.
    """

    def __init__(self, engine: Engine, attempts: Attempts) -> None:
        self._engine = engine
        self._attempts = attempts
        self._gang = engine.gang
        # No SimpleQueue: where it is let sleep for longer than the timeout of its `get`, that may
        # wait for ever (CPython, at least up to 3.13).
        self._gangs: queue.Queue[Any] = queue.Queue()
        self.answers: deque[tuple[Any, ...]] = deque()
        self._homes: dict[str, int] = {}  # where versions of actors are, as a hint
        if self._gang is not None:
            self._gang.rebuild = engine.lineage.rebuild
            self._gang.note = attempts.note

    def check(self, vertices: Iterable[Vertex]) -> None:
        """Raise where there are gangs and no ranks."""
        if self._gang is None:
            for vertex in vertices:
                if vertex.node.task.annotations.ranks is not None:
                    raise WorkflowError(
                        f"{vertex.id} runs on ranks, and the workflow has none: give Workflow a "
                        "communicator (comm=)"
                    )

    def send(self, slot: Slot, task: Task, arguments: Any, keywords: Any) -> bool:
        """Have a task run on the rank that it is for; False where that is this one."""
        gang, wanted = self._gang, task.annotations.on
        if gang is None or wanted is None:
            return False
        if wanted == "actor":
            version = actor_of(arguments[0])
            wanted = "any" if version is None else self._homes.pop(version.name, "any")
        rank = gang.place(wanted)
        if rank == gang.rank:
            return False
        call = dump_call((task, arguments, keywords), f"the arguments of {slot.id}")

        def answered(value: Any, error: BaseException | None) -> None:
            version = actor_of(value[0]) if error is None else None
            with self._engine.lock:
                if version is not None:
                    self._homes[version.name] = rank
                self.answers.append((slot, task, arguments, keywords, rank, value, error))
                self._engine.employ()

        with self._engine.lock:
            self._engine.started()
        context = self._attempts.context(slot, task)
        try:
            gang.dispatch(rank, call, context, task.annotations.deterministic, answered)
        except BaseException:
            with self._engine.lock:
                self._engine.ended()
            raise
        return True

    @contextlib.contextmanager
    def here(self, task: Task) -> Iterator[None]:
        """While a task that may run anywhere runs at this rank."""
        if self._gang is None or task.annotations.on is None:
            yield
        else:
            with self._gang.loaded():
                yield

    def ran_here(self, value: Any) -> None:
        """Note where the actor of a value is."""
        version = actor_of(value)
        if version is not None and self._gang is not None:
            with self._engine.lock:
                self._homes[version.name] = self._gang.rank

    def hand_over(
        self, slot: Slot, arguments: Any, keywords: Any, context: TaskContext
    ) -> None:
        """Give a gang's task to the thread that has the communicator."""
        with self._engine.lock:
            self._engine.started()
        self._gangs.put((slot, arguments, keywords, context))

    def run_gang(self, wait_s: float) -> bool:
        """Run the next gang, if one comes within so many seconds; in the thread of `Engine.run`."""
        entry = self._next_gang(wait_s)
        if entry is not None:
            self._run(*entry)
        return entry is not None

    def _next_gang(self, wait_s: float) -> Any:
        try:
            return self._gangs.get(timeout=wait_s)
        except queue.Empty:
            return None

    def wake(self) -> None:
        """Let nobody wait for a gang any more."""
        self._gangs.put(None)

    def _run(self, slot: Slot, arguments: Any, keywords: Any, context: TaskContext) -> None:
        task = slot.vertex.node.task
        assert isinstance(task, Task) and self._gang is not None
        start_s = time.perf_counter()
        try:
            (value, found), contributors, whole = self._gang.call(
                task, arguments, keywords, context
            )
        except VoidError as error:
            self._attempts.failed(slot, task, error, arguments, keywords, context)
        except GangError as error:
            self._attempts.failed(slot, task, error.cause, arguments, keywords, context)
        else:
            took_s = time.perf_counter() - start_s
            extra = {"w": list(contributors)}
            self._attempts.succeeded(
                slot, task, value, took_s, extra=extra, whole=whole, found=found
            )
        finally:
            with self._engine.lock:
                self._engine.ended()
