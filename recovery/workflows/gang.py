"""Tasks that many ranks run together.

All ranks are in `Workflow.run`. One of them, the lowest that lives, leads: it has the journal and
runs everything; the others wait for orders. An order is a small Bcast on a communicator of the
workflow's own, so waiting survives the leader: when it dies, all learn the same, and the next one
takes the journal over and goes on. Orders are given at least every `_BEAT_S`, so that nobody is
taken for late.

A gang's function runs on a communicator of its own (a Split). What a rank's death does to it is
hopcoll's business; the value is the leader's. A rank whose function raises leaves that
communicator, so that the others, who may wait for it, go on without it; then the attempt has
failed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hopcoll.errors import HopcollError, RankFailedError, WorkflowError
from recovery.lease import describe_owner
from recovery.workflows.attempts import GangError
from recovery.workflows.context import TaskContext
from recovery.workflows.graph import Task
from recovery.workflows.stored import dump_call, load_call

if TYPE_CHECKING:
    from hopcoll import Communicator

__all__ = ["Gang"]

_BEAT_S = 2.0
_CALL, _BEAT, _END, _RAISE = range(4)


class Gang:
    """The ranks of a workflow. Collective, but for `call`, `idle` and `is_lost`.

    Parameters
    ----------
    comm : Communicator
        Is duplicated.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm.Dup()
        processes = self._comm.allgather(describe_owner())
        self._ranks = {
            _process(one): rank for rank, one in enumerate(processes) if one is not None
        }
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
                        self._take_part(argument, None)
            except RankFailedError as error:
                if leader in self._comm.alive:
                    raise  # it is the leader's own, told to all
                del error  # the leader is dead, and there is another

    def is_lost(self, owner: dict[str, Any]) -> bool:
        """Whether a process was a rank of this job and is no more. Local."""
        rank = self._ranks.get(_process(owner))
        return rank is not None and rank not in self._comm.alive

    def _lead(self, lead: Callable[[], Any]) -> Any:
        try:
            value = lead()
        except BaseException as error:
            told = error
            if not isinstance(error, HopcollError):
                told = WorkflowError(f"rank {self._comm.rank}, which leads: {error!r}")
            with contextlib.suppress(HopcollError):
                self._order(_RAISE, told)
            raise
        self._order(_END, value)
        return value

    def _order(self, order: int, argument: Any = None) -> None:
        self._comm.bcast((order, argument), root=self._comm.rank)
        self._told_s = time.monotonic()

    def idle(self) -> None:
        """Tell the others that this rank is there; to be called every now and then."""
        if time.monotonic() - self._told_s > _BEAT_S:
            self._order(_BEAT)

    def call(
        self, task: Task, arguments: list[Any], keywords: dict[str, Any], context: TaskContext
    ) -> tuple[Any, tuple[int, ...], bool]:
        """Run a task on the ranks; returns its value, who contributed, and whether it is whole:
        nobody was lost, and nobody left out by a quorum or a deadline.

        Raises
        ------
        GangError
            A rank raised, or too few are left.
        """
        wanted = task.annotations.ranks
        members = tuple(sorted(self._comm.alive))
        if isinstance(wanted, int):
            if len(members) < wanted:
                text = f"{task.name} wants {wanted} ranks, and {len(members)} are left"
                raise GangError(RankFailedError(text))
            members = members[:wanted]
        call = dump_call((task, arguments, keywords), f"the arguments of {task.name}")
        order = (members, call, context.bare())
        self._order(_CALL, order)
        answer = self._take_part(order, context)
        assert answer is not None
        value, contributors, whole = answer
        return value, contributors, whole and (wanted != "all" or len(members) == self._comm.size)

    def _take_part(
        self, order: tuple[tuple[int, ...], bytes, Any], leading: TaskContext | None
    ) -> tuple[Any, tuple[int, ...], bool] | None:
        members, call, bare = order
        rank = self._comm.rank
        comm = self._comm.Split(0 if rank in members else None, rank)
        value: Any = None
        failure: Exception | None = None
        partial = False
        if comm is not None:
            try:
                task, arguments, keywords = load_call(call)
                context = TaskContext.from_bare(bare, leading, comm)
                extra = {"ctx": context} if task.wants_context else {}
                value = task.function(*arguments, **keywords, **extra)
                partial = comm.partial_count > 0
            except Exception as error:
                failure = error
                comm.close(0.0)
        told = None if comm is None else (repr(failure) if failure else "", partial)
        answers = self._comm.allgather(told)
        contributors = tuple(r for r in members if answers[r] is not None)
        if comm is not None and failure is None:
            comm.close()
        if leading is None:
            return None
        failed = [r for r in contributors if answers[r][0]]
        if failure is not None:
            raise GangError(failure)
        if failed:
            raise GangError(RuntimeError(f"rank {failed[0]} raised {answers[failed[0]][0]}"))
        whole = contributors == members and not any(answers[r][1] for r in contributors)
        return value, contributors, whole


def _process(owner: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(owner.get(name) for name in ("host", "boot", "pid", "start"))
