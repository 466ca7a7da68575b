"""Tasks that many ranks run together.

All ranks are in `Workflow.run`. One of them, the lowest that lives, leads: it has the journal and runs
everything; the others wait for orders, which are small Bcasts on a communicator of the workflow's
own, so that waiting survives the leader: when it dies, all learn the same, and the next one takes the
journal over and goes on. Orders are given at least every `_BEAT_S`, so that nobody is taken for late.

A gang's function runs on a context of its own (`comm.Split`). What a rank's death does to it is
hopcoll's business; the value is that of the lowest rank that is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hopcoll.errors import HopcollError, RankFailedError
from recovery.workflows.attempts import GangError
from recovery.workflows.graph import Task, dump_call, load_call

if TYPE_CHECKING:
    from hopcoll import Communicator
    from recovery.workflows.context import TaskContext

__all__ = ["Gang"]

_BEAT_S = 2.0
_CALL, _BEAT, _END, _RAISE = range(4)


class Gang:
    """The ranks of a workflow. Its methods are collective, but for `call` and `idle`.

    Parameters
    ----------
    comm : Communicator
        Is duplicated.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm.Dup()
        self._told_s = time.monotonic()

    def close(self) -> None:
        self._comm.close()

    def run(self, lead: Callable[[], Any]) -> Any:
        """Lead, or follow until the leader is done; all return, or raise, the same."""
        while True:
            leader = min(self._comm.alive)
            if leader == self._comm.rank:
                return self._lead(lead)
            try:
                while True:
                    order, argument = self._comm.bcast(None, root=leader)
                    if order == _END:
                        return argument
                    if order == _RAISE:
                        raise argument
                    if order == _CALL:
                        self._take_part(argument)
            except RankFailedError:
                continue  # the leader is dead, and there is another

    def _lead(self, lead: Callable[[], Any]) -> Any:
        try:
            value = lead()
        except BaseException as error:
            told = error if isinstance(error, HopcollError) else HopcollError(repr(error))
            self._order(_RAISE, told)
            raise
        self._order(_END, value)
        return value

    def _order(self, order: int, argument: Any = None) -> None:
        self._comm.bcast((order, argument), root=self._comm.rank)
        self._told_s = time.monotonic()

    def idle(self) -> None:
        """Tell the others that this rank is there. Called every now and then."""
        if time.monotonic() - self._told_s > _BEAT_S:
            self._order(_BEAT)

    def call(
        self, task: Task, arguments: list[Any], keywords: dict[str, Any], context: TaskContext
    ) -> tuple[Any, tuple[int, ...], bool]:
        """Run a task on the ranks; returns its value, who contributed, and whether nobody was lost.

        Raises
        ------
        GangError
            A rank raised, or too few ranks are left.
        """
        wanted = task.annotations.ranks
        alive = tuple(sorted(self._comm.alive))
        members = alive if wanted == "all" else alive[: int(wanted or 0)]
        if wanted != "all" and len(members) < int(wanted or 0):
            raise GangError(
                RankFailedError(f"{task.name} wants {wanted} ranks, and {len(alive)} are left")
            )
        call = dump_call((task, arguments, keywords), f"the arguments of {task.name}")
        order = (members, call, _Bare(context))
        self._order(_CALL, order)
        return self._take_part(order, context)

    def _take_part(
        self, order: tuple[tuple[int, ...], bytes, _Bare], context: TaskContext | None = None
    ) -> Any:
        members, call, bare = order
        mine = self._comm.rank in members
        comm = self._comm.Split(0 if mine else None, self._comm.rank)
        if comm is None:
            return None
        try:
            task, arguments, keywords = load_call(call)
            own = bare.context(comm)
            if context is not None:
                own._recall = context._recall
            error: Exception | None = None
            value: Any = None
            try:
                extra = {"ctx": own} if task.wants_context else {}
                value = task.function(*arguments, **keywords, **extra)
            except Exception as raised:
                error = raised
            # Ranks that are inside a collective when another raises would wait for it.
            answers = comm.allgather((comm.rank, None if error is None else repr(error)))
            contributors = comm.outcome.contributors
            failures = [answers[r] for r in contributors if answers[r][1] is not None]
            if failures:
                cause = error or RuntimeError(f"rank {failures[0][0]} raised {failures[0][1]}")
                raise GangError(cause)
            whole = len(contributors) == len(members)
            return value, tuple(members[r] for r in contributors), whole
        except GangError:
            if context is not None:
                raise
            return None
        finally:
            comm.close()


class _Bare:
    """What the other ranks need to know of a task's context."""

    def __init__(self, context: TaskContext) -> None:
        self._what = (
            context.workflow_id, context.task_id, context.attempt, context._uuid, context._key,
        )  # fmt: skip

    def context(self, comm: Communicator) -> TaskContext:
        from recovery.workflows.context import TaskContext

        workflow_id, task_id, attempt, uuid, key = self._what
        return TaskContext(
            workflow_id, task_id, attempt, uuid, lambda number, ask: ask(), None, key, comm
        )
