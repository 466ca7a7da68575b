"""Workflows and what happens to them, told beforehand (`tests.crash.workflow_cases`): one thread
runs the tasks, nobody dies but who is told to, of what was not synced a power cut leaves nothing.

Random workflows (`tests.crash.workflow_corpus`) come to much of this seldom, and some of what goes
wrong they hide: what is lost is made again, and only who looks at what ran sees that it need not
have been.
"""

from __future__ import annotations

import collections
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from hopcoll.errors import EffectUnknownError
from hopcoll.objects import ObjectRef
from recovery.journal import Journal
from recovery.workflows import Node, TaskContext, Workflow, actors
from recovery.workflows import engine as engines
from recovery.workflows.attempts import Attempts
from recovery.workflows.ledger import Ledger
from recovery.workflows.references import Found, References, refs_in
from tests.crash.workflow_corpus import Counts, Trial, WrongError, try_it
from tests.crash.workflow_memory import Memory, OneRank
from tests.powercut import Choice, Killed, Medium, RecordingDisk

_NOTHING = Choice("nothing unsynced is kept", {"name": False, "data": False, "size": False})
#: Before a task: its life ends when the call has come back, and not in it.
AFTER = "after "
#: A life that ends where what happens in it says.
AGAIN = "again"


@dataclass
class Calm(Memory):
    """A memory whose ranks die when they are told to.

    Attributes
    ----------
    takes_last : bool
        Whether a reduction of the first of many takes the last.
    dying : set of int
        Ranks whose call does not come back.
    """

    takes_last: bool = False
    dying: set[int] = field(default_factory=set)

    def _lose_some(self) -> None:
        pass

    def _first(self, there: list[ObjectRef], count: int) -> list[ObjectRef]:
        return there[-count:] if self.takes_last else there[:count]

    def is_dying(self, rank: int) -> bool:
        return rank in self.dying

    def forget_actors(self, rank: int) -> None:
        """What a rank keeps of actors is gone."""
        self.live._of[rank] = actors._Live()


@dataclass(frozen=True)
class Case:
    """A workflow, and what happens to it.

    Parameters
    ----------
    node : callable
        Returns the graph, of a `Directed`.
    lives : sequence of str
        The tasks that its lives end in, one after the other; with `AFTER` before it, when a call
        has come back from its rank.
    happens : mapping of (int, str) to callable
        What happens to a `Directed` as a task begins in a life (from 1 on), or with another word
        before its name.
    another_session : bool
        Whether the next life is another job; else rank 0 is dead, and another leads.
    runs : mapping of str to int, optional
        How often tasks run, in all lives.
    unwritten : (int, str)
        The task whose value is still to be written when a life ends.
    is_unknown : bool
        Whether an effect may end as one that nobody knows of.
    begins_anew : bool
        Whether tasks may run twice in a life in which nothing is lost.
    rank : callable
        Where a task that may run anywhere runs, in a life.
    """

    node: Callable[[Directed], Node]
    lives: Sequence[str] = ()
    happens: Mapping[tuple[int, str], Callable[[Directed], None]] = field(default_factory=dict)
    another_session: bool = True
    runs: Mapping[str, int] = field(default_factory=dict)
    unwritten: tuple[int, str] = (0, "")
    is_unknown: bool = False
    begins_anew: bool = False
    rank: Callable[[int, str], int] = lambda life, name: 1


class Ranks(OneRank):
    """The ranks of a case."""

    def __init__(self, workflow: Workflow, trial: Directed) -> None:
        super().__init__(workflow, trial.memory)
        self._unsent = []
        self._trial = trial

    def place(self, wanted: int | str) -> int:
        return wanted if isinstance(wanted, int) else -1

    def call(self, task_: Any, arguments: Any, keywords: Any, context: TaskContext) -> Any:
        value = task_.function(*arguments, **keywords, ctx=context)
        return (value, Found()), (0,), self._trial.incarnation == 1

    def dispatch(
        self, rank: int, call: bytes, context: TaskContext, fixed: bool,
        answered: Callable[..., Any],
    ) -> None:  # fmt: skip
        trial, name = self._trial, context.task_id
        world = trial.world
        assert world is not None
        rank = trial.case.rank(trial.incarnation, name) if rank < 0 else rank
        trial.calls[name] = context
        world.happens.pop(f"send {name}", lambda: None)()

        def told(value: Any, error: BaseException | None) -> None:
            if world.dies_in == AFTER + name and world.disk is not None:
                with world.disk.log.lock:
                    world.disk.left = 0
                error = Killed()
            answered(value, error)

        super().dispatch(rank, call, context, fixed, told)


class Directed(Trial):
    """A trial of a case.

    Attributes
    ----------
    foreign : dict of ObjectRef to Calm
        What was there before the workflow, and where.
    took : dict of str to (list of str, list of str)
        Of tasks with a reduction, which they were last given, and which were taken.
    calls : dict of str to TaskContext
        Of tasks that ran at another rank, the last.
    late : References
        Of an attempt whose leader may be gone, which is `is_over`.
    """

    late: References
    ranks: Ranks

    def __init__(self, case: Case, scratch: Path, counts: Counts) -> None:
        self.case = case
        self.memory: Calm = Calm(random.Random(0))
        self.foreign: dict[ObjectRef, Calm] = {}
        memory = self.memory
        super().__init__(0, scratch, counts, case.node(self))
        self.memory = memory
        self.took: dict[str, tuple[list[str], list[str]]] = {}
        self.calls: dict[str, TaskContext] = {}
        self.is_over = False
        self.is_used, self.pause = threading.Event(), threading.Event()
        self._ran: collections.Counter[str] = collections.Counter()
        self._generation = 0

    def run(self, lives: Sequence[int | str]) -> None:
        global TRIAL
        TRIAL = self
        write = Attempts.write

        def late(attempts: Attempts, name: str, *what: Any) -> None:
            if (self.incarnation, name) != self.case.unwritten:
                assert self.world is not None
                self.world.happens.pop(f"write {name}", lambda: None)()
                write(attempts, name, *what)

        with (
            mock.patch.object(engines, "_GROUP_S", -1.0),  # each flush at once
            mock.patch.object(Attempts, "write", late),
        ):
            super().run(lives)

    def wait_for_the_disk(self) -> None:
        """Until all that is in the journal by now is durable; not in a thread of the engine's."""
        engine = self.ranks.rebuild.__self__._engine  # type: ignore[attr-defined]
        seq = engine._appended
        while engine._journal.durable < seq:
            self.pause.wait(0.001)

    def _begin_life(self) -> int:
        world = self.world
        assert world is not None
        if self.incarnation > 1 and not self.case.another_session:
            self.memory.lose(0)
            self.memory.forget_actors(0)
        elif self.incarnation > 1:
            self.memory = Calm(self.draw)
        self.memory.takes_last = self.incarnation > 1
        self._generation = self.memory.generation
        world.happens = {
            name: lambda act=act: act(self)  # type: ignore[misc]
            for (life, name), act in self.case.happens.items()
            if life == self.incarnation
        }
        return 1

    def _ranks(self, workflow: Workflow) -> OneRank:
        self.ranks = Ranks(workflow, self)
        return self.ranks

    def _left(self, medium: Medium) -> Any:
        return medium.state(_NOTHING)

    def _settle(self, path: Path, error: EffectUnknownError, disk: RecordingDisk) -> None:
        if not self.case.is_unknown:
            raise WrongError(f"{error.task} is unknown, though no life ended in it") from error
        super()._settle(path, error, disk)

    def _judge(self, before: Ledger, now: Ledger, workflow: Workflow, completed: bool) -> None:
        world = self.world
        assert world is not None
        super()._judge(before, now, workflow, completed)
        names = [name for name, _ in world.executed]
        self._ran.update(names)
        if self.case.begins_anew or self.memory.generation != self._generation:
            return
        for i, (name, makers) in enumerate(world.executed):
            if names.count(name) > 1 and not world.tries[name]:
                raise WrongError(f"{name} ran twice, though nothing was lost")
            if late := [one for one in makers if one in names[i:]]:
                raise WrongError(f"{name} was called before {late[0]}, whose value it was given")

    def check(self, path: Path) -> None:
        super().check(path)
        value = self.value
        for name, count in self.case.runs.items():
            if self._ran[name] != count:
                raise WrongError(f"{name} ran {self._ran[name]} times, not {count}")
        things = {ref for ref, one in self.memory.things.items() if one.array is not None}
        foreign = {ref for ref, memory in self.foreign.items() if memory is self.memory}
        if missing := foreign - things:
            raise WrongError(f"{missing} were deleted, and were there before")
        if left := things - {*foreign, *refs_in(value)}:
            raise WrongError(f"{left} are left in memory")
        stored = Workflow("w", path).run(self.node)
        for one in stored.get("refs", ()):
            if not np.array_equal(one["ref"], one["holds"]):
                raise WrongError(f"the output was stored without the object that {one['by']} made")
        for record in Journal.read(path / "w" / "journal").records:
            if record.kind == "done" and (name := record.head["t"]) in self.took:
                recorded = record.head.get("k")
        if self.took and recorded != [[*map(list, self.took[next(iter(self.took))])]]:
            raise WrongError(f"the journal says of a reduction {recorded}, and it was {self.took}")


TRIAL: Directed


def try_case(case: Case, counts: Counts | None = None) -> None:
    """Run one case; raises `WrongError`."""
    counts = Counts() if counts is None else counts
    try_it(lambda scratch: Directed(case, scratch, counts).run(case.lives), "a case")
    if counts.points < len(case.lives):
        raise AssertionError(f"only {counts.points} of {case.lives} lives ended")
