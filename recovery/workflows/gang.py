"""Tasks that many ranks run together.

All ranks are in `Workflow.run`. One of them, the lowest that lives, leads: it has the journal and
runs everything; the others wait for orders. An order is a small Bcast on a communicator of the
workflow's own, so waiting survives the leader: when it dies, all learn the same, and the next one
takes the journal over and goes on. Orders are given at least every `_BEAT_S`, so that nobody is
taken for late.

The wait for orders has no limit, nor that for the end of a gang, but its own ``timeout_s``:
then all who wait raise. A rank that is stuck in a function cannot follow any order.

A gang's function runs on a communicator of its own (a Split). What a rank's death does to it is
hopcoll's business; the value is the leader's. A rank whose function raises leaves that
communicator, so that the others, who may wait for it, go on without it; then the attempt has
failed.

A task that runs on one other rank (``on=``) needs none of that: the leader sends it there by letter
(`recovery.workflows.post`), while all others do what they do.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hopcoll.errors import (
    HopcollError,
    ObjectExistsError,
    RankFailedError,
    TaskFailedError,
    TransferTimeoutError,
    WorkflowError,
)
from recovery.lease import describe_owner
from recovery.workflows.attempts import GangError, VoidError
from recovery.workflows.context import TaskContext
from recovery.workflows.graph import Task
from recovery.workflows.post import Post, RankGoneError
from recovery.workflows.references import Found, References
from recovery.workflows.stored import dump_call, load_call

if TYPE_CHECKING:
    import numpy as np

    from hopcoll import Communicator
    from hopcoll.objects import ObjectRef, Objects

__all__ = ["Gang"]

#: What `Gang.dispatch` is told in the end: a value, its refs and the seconds; or an error.
Answered = Callable[[Any, "BaseException | None"], None]

_BEAT_S = 2.0
#: For the ranks of a gang whose time is over: who has waited for one that did not come returns.
_LATE_S = 5.0
_CALL, _BEAT, _END, _RAISE = range(4)


class Gang:
    """The ranks of a workflow. Collective: making one, `run` and `close`.

    Parameters
    ----------
    comm : Communicator
        Is duplicated.

    Attributes
    ----------
    session : str
        Whose memory refs are in: of these processes, as long as this is open.
    objects : Objects
    rank : int
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm.Dup()
        told = self._comm.allgather((describe_owner(), secrets.token_hex(8)))
        self._ranks = {
            _process(one[0]): rank for rank, one in enumerate(told) if one is not None
        }
        self._members: set[int] = set()
        self._note_members()
        self._told_s = time.monotonic()
        self._stuck = False  # a rank is, and nobody can be told anything any more
        self.session = next(one[1] for one in told if one is not None)
        self.rank = self._comm.rank
        self.objects: Objects = comm.objects
        self._lock = threading.Lock()
        self._load: collections.Counter[int] = collections.Counter()
        #: Of who leads: what other ranks ask it.
        self.rebuild: Callable[[list[str], int], int | None] = lambda keys, era: None
        self.note: Callable[..., Any] = lambda *what: None
        self._post = Post(self._comm, self.session, self._handle)

    def close(self) -> None:
        self._post.close()
        self._comm.close(0.0 if self._stuck else None)

    def delete(self, ref: ObjectRef) -> None:
        """Delete an object meanwhile."""
        self._post.delete(ref)

    def put_again(self, ref: ObjectRef, array: np.ndarray) -> bool:
        """Put the bytes of a stored ref into this rank's memory, where they are not in any."""
        try:
            self.objects.put(array, ref)
        except ObjectExistsError:
            return False
        return True

    # Tasks on one rank

    def place(self, wanted: int | str) -> int:
        """The rank that a task is to run on."""
        alive = self._comm.alive
        if isinstance(wanted, int):
            return wanted if wanted in alive else alive[wanted % len(alive)]
        with self._lock:
            return min(alive, key=lambda rank: (self._load[rank], rank == self.rank, rank))

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """While this rank runs such a task itself."""
        with self._lock:
            self._load[self.rank] += 1
        try:
            yield
        finally:
            with self._lock:
                self._load[self.rank] -= 1

    def dispatch(
        self, rank: int, call: bytes, context: TaskContext, fixed: bool, answered: Answered
    ) -> None:
        """Have a task run at another rank; `answered` must not wait."""
        with self._lock:
            self._load[rank] += 1

        def end(value: Any, error: BaseException | None) -> None:
            with self._lock:
                self._load[rank] -= 1
            answered(value, error)

        try:
            self._post.call(rank, ("run", call, context.bare(), fixed), end)
        except BaseException:
            with self._lock:
                self._load[rank] -= 1
            raise

    def references(
        self, context: tuple[Any, ...], fixed: bool, leader: int | None, part: str = "",
        *, carries: bool = False,
    ) -> References:  # fmt: skip
        """The objects as an attempt has them that runs at this rank."""
        _, task, attempt, uuid, _, given, era = context
        ask = self.rebuild
        is_over: Callable[[], bool] = lambda: False
        if leader is not None and leader != self.rank:
            ask = functools.partial(self._ask_leader, leader)
            is_over = functools.partial(self._post.is_gone, leader)
        name = f"{uuid}/{task}/{attempt}{part}" if fixed else None
        return References(
            self.objects, self.rank, name, ask, self.delete, carries=carries or given, era=era,
            is_over=is_over,
        )  # fmt: skip

    def _ask_leader(self, leader: int, keys: list[str], era: int) -> int | None:
        while True:
            try:
                return self._post.ask(leader, ("rebuild", keys, era))  # type: ignore[no-any-return]
            except RankGoneError:
                if self._post.is_gone(leader):
                    return None  # and nobody hears of this attempt any more

    def _handle(self, source: int, what: Any) -> Any:
        """What another rank asks; in a thread of its own."""
        if what[0] == "rebuild":
            return self.rebuild(*what[1:])
        if what[0] == "note":
            return self.note(*what[1:])
        _, call, bare, fixed = what
        task, arguments, keywords = load_call(call)
        references = self.references(bare, fixed, source)

        def recall(number: int, ask: Callable[[], Any]) -> Any:
            told = self._post.ask(source, ("note", bare[1], number))
            if told is None:
                told = self._post.ask(source, ("note", bare[1], number, ask()))
            return told[0]

        context = TaskContext.at(bare, recall, references)
        return run_task(task, arguments, keywords, context)

    # Leading and following

    def run(self, lead: Callable[[], Any]) -> Any:
        """Lead, or follow until the leader is done; all return, or raise, the same."""
        while True:
            # By the last operation, which all know alike; of who is alive some hear earlier.
            leader = min(self._members)
            if leader == self._comm.rank:
                return self._lead(lead)
            try:
                order, argument = self._comm.bcast(None, root=leader, timeout_s=math.inf)
            except RankFailedError:
                self._members -= {leader}  # it is dead, and there is another
                continue
            self._note_members()
            if order == _END:
                return argument
            if order == _RAISE:
                raise argument
            if order == _CALL:
                self._take_part(argument, None)

    def _note_members(self) -> None:
        outcome = self._comm.outcome
        if outcome is not None:
            self._members = set(outcome.contributors)

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
            if not self._stuck:
                with contextlib.suppress(HopcollError):
                    self._order(_RAISE, told)
            raise
        self._order(_END, value)
        return value

    def _order(self, order: int, argument: Any = None) -> None:
        self._comm.bcast((order, argument), root=self._comm.rank, timeout_s=math.inf)
        self._note_members()
        self._told_s = time.monotonic()

    def idle(self) -> None:
        """Tell the others that this rank is there; to be called every now and then."""
        if time.monotonic() - self._told_s > _BEAT_S:
            self._order(_BEAT)

    def call(
        self, task: Task, arguments: list[Any], keywords: dict[str, Any], context: TaskContext
    ) -> tuple[tuple[Any, Found], tuple[int, ...], bool]:
        """Run a task on the ranks; returns its value with its refs, who contributed, and whether it
        is whole: nobody was lost, and nobody left out by a quorum or a deadline.

        Raises
        ------
        GangError
            A rank raised, or too few are left.
        VoidError
            What it was called with is lost, and will be another.
        TaskFailedError
            A rank did not return in time (``timeout_s``); the others raise it as well.
        """
        wanted = task.annotations.ranks
        members = tuple(sorted(self._comm.alive))
        if isinstance(wanted, int):
            if len(members) < wanted:
                text = f"{task.name} wants {wanted} ranks, and {len(members)} are left"
                raise GangError(RankFailedError(text))
            members = members[:wanted]
        call = dump_call((task, arguments, keywords), f"the arguments of {task.name}")
        order = (members, call, context.bare(), self.rank, task.annotations.timeout_s)
        self._order(_CALL, order)
        answer = self._take_part(order, context)
        assert answer is not None
        value, contributors, whole = answer
        return value, contributors, whole and (wanted != "all" or len(members) == self._comm.size)

    def _take_part(
        self,
        order: tuple[tuple[int, ...], bytes, Any, int, float | None],
        leading: TaskContext | None,
    ) -> tuple[tuple[Any, Found], tuple[int, ...], bool] | None:
        members, call, bare, leader, limit_s = order
        begin_s = time.monotonic()
        rank = self._comm.rank
        comm = self._comm.Split(0 if rank in members else None, rank)
        value: Any = None
        failure: Exception | None = None
        partial, void = False, False
        found = Found()
        if comm is not None:
            if limit_s is not None:
                # Else who waits for the one that is stuck would be stuck as well.
                least_s = min(limit_s, comm.config.timeout_s or math.inf)
                comm.config = dataclasses.replace(comm.config, timeout_s=least_s)
            try:
                task, arguments, keywords = load_call(call)
                fixed = task.annotations.deterministic
                # The value may have refs that other ranks have put.
                references = self.references(
                    bare, fixed, leader, f" {comm.rank}", carries=True
                )
                context = TaskContext.from_bare(bare, leading, comm, references)
                extra = {"ctx": context} if task.wants_context else {}
                try:
                    value = task.function(*arguments, **keywords, **extra)
                    value, found = references.finish(value)
                finally:
                    void = references.void is not None
                partial = comm.partial_count > 0
            except Exception as error:
                failure = error
                comm.close(0.0)
        text = repr(failure) if failure else ""
        told = None if comm is None else (text, partial, void, found.new)
        if limit_s is None:
            answers = self._comm.allgather(told, timeout_s=math.inf)
        else:
            answers = self._answers_within(limit_s, begin_s, told, members, bare[1])
        contributors = tuple(r for r in members if answers[r] is not None)
        if comm is not None and failure is None:
            comm.close()
        if leading is None:
            return None
        failed = [r for r in contributors if answers[r][0]]
        if any(answers[r][2] for r in contributors):
            raise VoidError(f"{task.name} lost what it was called with")
        if failure is not None:
            raise GangError(failure)
        if failed:
            raise GangError(RuntimeError(f"rank {failed[0]} raised {answers[failed[0]][0]}"))
        whole = contributors == members and not any(answers[r][1] for r in contributors)
        # What another rank has found may be in the value: they talk.
        found.new |= any(answers[r][3] for r in contributors)
        return (value, found), contributors, whole

    def _answers_within(
        self, limit_s: float, begin_s: float, told: Any, members: tuple[int, ...], task: str
    ) -> list[Any]:
        """What all ranks say of a gang that has ended in time, or a little later.

        Raises
        ------
        TaskFailedError
            It has not, and all raise this. Their clocks began at about the same time, but nobody
            may go on alone that others have given up: so who comes near to the end of their
            patience says so, and who misses somebody at that time takes it for given up.
        """
        end_s = begin_s + limit_s + _LATE_S
        near_s = end_s - _LATE_S / 2
        try:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                raise TransferTimeoutError(f"rank {self.rank} was late")
            is_late = time.monotonic() > near_s
            said = self._comm.allgather((told, is_late), timeout_s=left_s)
            for rank in range(len(said)):
                if said[rank] is not None and said[rank][1]:
                    raise TransferTimeoutError(f"rank {rank} was late")
                if said[rank] is None and rank in members and time.monotonic() > near_s:
                    raise TransferTimeoutError(f"rank {rank} gave up, or died")
        except TransferTimeoutError as error:
            self._stuck = True
            raise TaskFailedError(
                f"{task} did not end at all ranks within {limit_s:g} s: {error}; a rank that is "
                "stuck in a gang cannot be called back: end the job, and start it again",
                task,
            ) from error
        return [None if one is None else one[0] for one in said]


def run_task(
    task: Task, arguments: list[Any], keywords: dict[str, Any], context: TaskContext
) -> tuple[Any, Found, float]:
    """Call a task; returns its value, the refs in it, and the seconds that it took.

    Raises
    ------
    VoidError
        What it was called with is lost, and will be another.
    """
    references = context.references
    extra = {"ctx": context} if task.wants_context else {}
    start_s = time.perf_counter()
    found = None
    try:
        value = task.function(*arguments, **keywords, **extra)
        found = Found()
        if references is not None:
            value, found = references.finish(value)
    except Exception as error:
        if references is not None and references.void is not None:
            raise VoidError(str(references.void)) from error
        raise
    finally:
        if references is not None:
            references.drop(found)
    return value, found, time.perf_counter() - start_s


def _process(owner: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(owner.get(name) for name in ("host", "boot", "pid", "start"))
