"""Small workflows with living things, and what happens to them, told beforehand: one thread runs
the tasks, nobody dies but who is told to, of what was not synced a power cut leaves nothing.

For each rule there is a `Case` in which nothing else helps. Random workflows
(`tests.crash.workflow_corpus`) come to most of these seldom, and some of what goes wrong they hide:
what is lost is made again, and only who looks at what ran sees that it need not have been.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import random
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from hopcoll.errors import EffectUnknownError
from hopcoll.objects import ObjectRef
from recovery.journal import Journal
from recovery.workflows import Node, TaskContext, Workflow, actor, actors, loop, task
from recovery.workflows import engine as engines
from recovery.workflows.attempts import Attempts
from recovery.workflows.ledger import Ledger
from recovery.workflows.post import RankGoneError
from recovery.workflows.references import References, key_of, refs_in
from tests.crash import workflow_graphs as graphs
from tests.crash import workflow_living as living
from tests.crash.workflow_corpus import Counts, Trial, WrongError, try_it
from tests.crash.workflow_graphs import begin, begin_turn, token_of, value_of
from tests.crash.workflow_living import Counter, Steady, onward, put, use, whirl
from tests.crash.workflow_memory import Memory, OneRank
from tests.powercut import Choice, Killed, Medium, RecordingDisk

_NOTHING = Choice("nothing unsynced is kept", {"name": False, "data": False, "size": False})
#: A task of a life that ends when the call has come back, and not in it.
AFTER = "after "


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


class _Ranks(OneRank):
    """The ranks of a case."""

    def __init__(self, workflow: Workflow, trial: Directed) -> None:
        super().__init__(workflow, trial.memory)
        self._unsent = []
        self._trial = trial

    def place(self, wanted: int | str) -> int:
        return wanted if isinstance(wanted, int) else -1

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
    foreign : dict of ObjectRef to ndarray
        What was there before the workflow.
    took : dict of str to (list of str, list of str)
        Of tasks with a reduction, which they were last given, and which were taken.
    calls : dict of str to TaskContext
        Of tasks that ran at another rank, the last.
    late : References
        Of an attempt whose leader may be gone, which is `is_over`.
    """

    late: References
    ranks: _Ranks

    def __init__(self, case: Case, scratch: Path, counts: Counts) -> None:
        self.case = case
        self.memory: Calm = Calm(random.Random(0))
        self.foreign: dict[ObjectRef, np.ndarray] = {}
        memory = self.memory
        super().__init__(0, scratch, counts, case.node(self))
        self.memory = memory
        self.took: dict[str, tuple[list[str], list[str]]] = {}
        self.calls: dict[str, TaskContext] = {}
        self.is_over = False
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
        self.ranks = _Ranks(workflow, self)
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
        if missing := self.foreign.keys() - things:
            raise WrongError(f"{missing} were deleted, and were there before")
        if left := things - {*self.foreign, *refs_in(value)}:
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


# Tasks


@task(external=True, name="blind")
def tell(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """An effect that gets objects, before it is done or after, and that nobody can ask about."""
    begin(ctx, inputs)
    if how["looks"] == "first":
        living._look(ctx, inputs)
    value = value_of(ctx, inputs, token_of(ctx, inputs, False))
    row = (ctx.task_id, json.dumps(value["tokens"]))

    def act(database: sqlite3.Connection) -> None:
        database.execute("insert into plain values (?, ?)", row)

    graphs.WORLD.do(act)
    if how["looks"] == "last":
        living._look(ctx, inputs)
    return value


@task(deterministic=True, checkpoint="sync", name="turn")
def late_turn(state: Any, i: int, ctx: TaskContext) -> Any:
    """The body of a loop: goes on to who gets the objects of the state, and comes late."""
    begin_turn(ctx, state, i)
    value = value_of(ctx, [state], token_of(ctx, [state], True))
    value["refs"] = living._refs([state])
    return _use("late_user", value).after(graphs._late(8))


@task(deterministic=True, checkpoint="none")
def late_onward(*inputs: Any, ctx: TaskContext) -> Any:
    """Goes on to who gets the objects, and comes late."""
    begin(ctx, inputs)
    value = value_of(ctx, inputs, token_of(ctx, inputs, True))
    value["refs"] = living._refs(inputs)
    return _use("late_user", value).after(graphs._late(2))


@task(deterministic=True, checkpoint="none", name="first")
def takes_first(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Gives what comes of the first of many, in some way."""
    begin(ctx, inputs)
    given = {one["ref"]: one for one in living._refs(inputs)}
    ref = ctx.reduce(given, count=1)
    if how["way"] == "within another":
        ref = ctx.reduce([ref, *given])
    if how["way"] == "its contributors":
        found: Any = [given[one]["by"] for one in ctx.contributors(ref)]
    else:
        found = ctx.get(ref).tolist()
    if how["way"] == "its value":
        makers = [one["by"] for one in given.values()]
        taken = [one["by"] for one in given.values() if one["holds"] == found]
        TRIAL.took[ctx.task_id] = makers, taken
        graphs.WORLD.happens.pop(f"got {ctx.task_id}", lambda: None)()
        if [given[one]["by"] for one in ctx.contributors(ref)] != taken:
            raise Killed(f"mixed: {ctx.task_id} had another result than it was told of")
    return value_of(ctx, inputs, hashlib.sha256(repr(found).encode()).hexdigest()[:12])


@task(deterministic=True, checkpoint="none")
def liar(ctx: TaskContext) -> Any:
    """Puts another object each time."""
    begin(ctx, [])
    value = value_of(ctx, [], "fixed")
    value["ref"] = ctx.put(np.full(3, random.random()))
    return value


@actor(retries=1, backoff_s=0.0)
class Sharer:
    """Gives away what it goes on to change."""

    def __init__(self, ctx: TaskContext) -> None:
        begin(ctx, [])
        self.state = value_of(ctx, [], token_of(ctx, [], False))

    def checkpoint(self) -> Any:
        return self.state

    def restore(self, state: Any) -> None:
        self.state = state

    def count(self, how: dict[str, Any], ctx: TaskContext) -> Any:
        """A call that may fail when it has changed the state; it knows whose it must not see."""
        begin(ctx, [])
        if seen := {ctx.task_id, *how["others"]} & self.state["tokens"].keys():
            raise Killed(f"mixed: {ctx.task_id} goes on from what {seen} left")
        self.state["tokens"][ctx.task_id] = token_of(ctx, [], False)
        graphs.WORLD.tries[ctx.task_id] += 1
        if how["fails"] >= graphs.WORLD.tries[ctx.task_id]:
            raise ArithmeticError("not yet")
        return {"tokens": dict(self.state["tokens"]), "by": ctx.task_id}


# Graphs


_HOW = {"fixed": True, "passes": False}
_USE = use.options(checkpoint="sync")


def _put(name: str, *inputs: Any, on: Any = None, **options: Any) -> Node:
    options = {"deterministic": True, "checkpoint": "none", **options}
    how = {**_HOW, "fixed": options["deterministic"]}
    return put.options(**options, name=name, on=on).bind(how, *inputs)


def _use(name: str, *inputs: Any) -> Node:
    return _USE.options(name=name).bind({**_HOW, "fixed": False}, *inputs)


def _kept(*inputs: Node) -> Node:
    return graphs._KEPT.bind(graphs._HOW, *inputs)


def _late_user(*inputs: Node, after: Node, kind: Any = _USE) -> Node:
    """It begins when another has ended, and all that the journal says by then is durable."""
    late = graphs._KEPT.bind(graphs._HOW).after(after)
    how = {**_HOW, "fixed": kind.annotations.deterministic}
    return kind.options(name="late_user").bind(how, *inputs).after(late)


def used_in_a_turn(trial: Directed) -> Node:
    """What the effect was made from is lost. An object made from it is used late: by a ref in the
    graph that a turn went on to."""
    lost = graphs._LOST.bind(graphs._HOW)
    effect = graphs.blind.bind({}, _kept(lost))
    return graphs._out(effect, _kept(loop(late_turn, _put("made", lost), 1)))


def _spun() -> Node:
    """The state of a loop, in an object: whoever makes it again is no simple task."""
    around = {**_HOW, "stop": None, "may_stop": False, "goes_on": False}
    first = put.options(deterministic=True, checkpoint="none", name="made")
    body = whirl.options(deterministic=True, checkpoint="none")
    return loop(body, first.bind({**_HOW, "loop": around}), 1)


def told_of_a_loop(looks: str) -> Callable[[Directed], Node]:
    """An effect that gets what a loop put."""

    def node(trial: Directed) -> Node:
        spun = _spun()
        gate = _late_user(after=spun)
        return graphs._out(tell.bind({"looks": looks}, spun).after(gate))

    return node


def used_late(trial: Directed) -> Node:
    made = _put("made", on=1)
    return graphs._out(_late_user(made, after=made))


def used_by_what_goes_on(trial: Directed) -> Node:
    """An object that is used by its ref in a graph alone, when a task went on to that."""
    how = {**_HOW, "options": {"checkpoint": "sync"}}
    goes_on = onward.options(deterministic=True, checkpoint="sync").bind(how, _put("made"))
    return graphs._out(goes_on)


def used_by_what_went_on(trial: Directed) -> Node:
    return graphs._out(late_onward.bind(_put("made")))


def of_others(trial: Directed) -> Node:
    """Its object may become another, which somebody has used before."""
    made = _put("made", deterministic=False, on=1)
    user = _kept(made)
    return graphs._out(user, _late_user(made, after=user))


def carried_to_an_effect(trial: Directed) -> Node:
    """The effect waits for the file of a value that has another task's object."""
    carrier = use.options(checkpoint="async", name="carrier")
    carried = carrier.bind({"fixed": False, "passes": True}, _put("made", on=1))
    return graphs._out(graphs.blind.bind({}, carried))


def still_to_be_written(trial: Directed) -> Node:
    """The effect waits for the file of a value that nobody else needs, as long as what was made
    from it is at another rank."""
    drawn = _put("drawn", deterministic=False, checkpoint="async")
    made = _put("made", drawn, on=1)
    kind = use.options(deterministic=True, checkpoint="none")
    late = _late_user(made, after=made, kind=kind)
    return graphs._out(late, graphs.blind.bind({}, _kept(drawn)).after(late))


def used_from_a_file(trial: Directed) -> Node:
    made = _put("made", deterministic=False, checkpoint="sync")
    return graphs._out(_late_user(made, after=made))


def given_to_the_world(trial: Directed) -> Node:
    """The output has a ref."""
    return _put("output", _put("made"))


def of_before(trial: Directed) -> Node:
    """An object that the program had is passed on, and used."""
    array = np.arange(4)
    ref = trial.memory.put(array)
    trial.foreign[ref] = array
    given = {"tokens": {}, "refs": [{"ref": ref, "holds": array.tolist(), "by": ""}]}
    carrier = use.options(deterministic=True, checkpoint="none", name="carrier")
    return graphs._out(_use("user", carrier.bind({**_HOW, "passes": True}, given)))


def of_the_first(way: str) -> Callable[[Directed], Node]:
    """What came of the first of many is used, and used again when it is lost."""

    def node(trial: Directed) -> Node:
        first = takes_first.bind({"way": way}, _put("one"), _put("two"))
        user = _kept(first)
        return graphs._out(user, _late_user(first, after=user))

    return node


def of_a_liar(trial: Directed) -> Node:
    lies = liar.bind()
    late = graphs._KEPT.bind(graphs._HOW).after(lies)
    return graphs._out(graphs._KEPT.options(name="late_user").bind(graphs._HOW, lies).after(late))


def called_in_a_row(trial: Directed) -> Node:
    kind = Counter.options(checkpoint="sync")
    how = {"fixed": False}
    first = kind.call(kind.bind(how), "count", how)
    return graphs._out(first, kind.call(first, "count", how))


def called_twice(trial: Directed) -> Node:
    """Two calls of one version."""
    made = Sharer.bind()
    how = {"fails": 0, "others": ["Sharer.count", "Sharer.count~2"]}
    return graphs._out(Sharer.call(made, "count", how), Sharer.call(made, "count", how))


def called_again(trial: Directed) -> Node:
    """A call that fails when it has changed the state, and is tried again."""
    return graphs._out(Sharer.call(Sharer.bind(), "count", {"fails": 1, "others": []}))


def called_since(trial: Directed) -> Node:
    """Calls between two checkpoints."""
    kind = Steady.options(checkpoint="sync")
    first = kind.call(kind.bind("steady"), "step")
    return graphs._out(first, kind.call(first, "step", _kept()))


# What happens


def lose(*ranks: int) -> Callable[[Directed], None]:
    def act(trial: Directed) -> None:
        for rank in ranks:
            trial.memory.lose(rank)
            trial.memory.forget_actors(rank)

    return act


def die(rank: int) -> Callable[[Directed], None]:
    """A rank dies, and the call that it is in does not come back."""

    def act(trial: Directed) -> None:
        lose(rank)(trial)
        trial.memory.dying.add(rank)

    return act


def lose_and_take_others(trial: Directed) -> None:
    lose(0, 1)(trial)
    trial.memory.takes_last = not trial.memory.takes_last


def lose_and_report_twice(trial: Directed) -> None:
    """Two found it lost at the same time; one of them says so when it is there again."""
    (ref,) = trial.memory.things
    trial.memory.lose(1)
    trial.ranks.rebuild([key_of(ref)], 0)
    trial.ranks.rebuild([key_of(ref)], 0)


def begin_late(trial: Directed) -> None:
    """An attempt puts an object, and is stopped; its leader dies."""
    ranks = _Ranks(trial.ranks._workflow, trial)
    ranks.rank = 1
    ranks._post = SimpleNamespace(is_gone=lambda leader: trial.is_over)  # type: ignore[assignment]
    trial.late = ranks.references(trial.calls["made"].bare(), True, 0)
    trial.late.put(np.zeros(3))


def go_on_late(trial: Directed) -> None:
    """That attempt goes on, puts another one, and fails."""
    trial.is_over = True
    with contextlib.suppress(RankGoneError):
        trial.late.put(np.zeros(3))
    trial.late.drop(None)


CASES: dict[str, Case] = {
    "used in a turn": Case(used_in_a_turn, ["turn[0]/late_user"]),
    "told of a loop": Case(told_of_a_loop("first"), ["late_user"], runs={"blind": 1}),
    "told, and then lost": Case(
        told_of_a_loop("last"), happens={(1, "blind"): lose(0, 1)}, is_unknown=True
    ),
    "used in another session": Case(used_late, ["late_user"], runs={"made": 2, "late_user": 2}),
    "used by another leader": Case(
        used_late, ["late_user"], another_session=False, runs={"made": 1, "late_user": 2}
    ),
    "used by what goes on": Case(used_by_what_goes_on, runs={"made": 1}),
    "used by what went on": Case(
        used_by_what_went_on, ["late_onward/late_user"], runs={"made": 2, "late_onward": 1}
    ),
    "lost, and made another": Case(
        of_others, happens={(1, "late_user"): lose(1)},
        runs={"made": 2, "kept": 2, "late_user": 2},
    ),
    "lost before it is written": Case(
        carried_to_an_effect, happens={(1, "write carrier"): lose(0, 1)},
        runs={"made": 2, "carrier": 1, "blind": 1},
    ),
    "still to be written": Case(
        still_to_be_written, ["late_user"], another_session=False, unwritten=(1, "drawn"),
        runs={"drawn": 2, "blind": 1}, begins_anew=True,
    ),
    "used from a file": Case(used_from_a_file, ["late_user"], runs={"made": 1}),
    "given to the world": Case(given_to_the_world, runs={"made": 1}),
    "of before": Case(of_before),
    "lost beside its user": Case(
        used_late, happens={(1, "late_user"): lose(1)}, runs={"made": 2, "late_user": 1}
    ),
    "reported twice": Case(
        used_late, happens={(1, "late_user"): lose_and_report_twice},
        runs={"made": 2, "late_user": 1},
    ),
    "an attempt goes on late": Case(
        used_late, ["made"], {(1, "made"): begin_late, (2, "late_user"): go_on_late},
        another_session=False,
    ),
    **{
        f"of the first: {way}": Case(of_the_first(way), ["late_user"], runs={"first": 2})
        for way in ("its value", "its contributors", "within another")
    },
    "of a liar": Case(of_a_liar, ["late_user"]),
    "called, and nobody heard of it": Case(
        called_in_a_row, [f"{AFTER}Counter.count"], another_session=False,
        rank=lambda life, name: 2 if life == 2 and name == "Counter.count" else 1,
    ),
    "called, and its rank dies": Case(
        called_in_a_row, happens={(1, "Counter.count"): die(1)}, runs={"Counter.count": 2},
        rank=lambda life, name: 2 if TRIAL.memory.dying else 1,
    ),
    "got, and then lost": Case(
        of_the_first("its value"), happens={(1, "got first"): lose_and_take_others}
    ),
    "called twice": Case(called_twice),
    "called again": Case(called_again),
    "called since": Case(called_since, happens={(1, "send Steady.step~2"): lose(1)}),
}  # fmt: skip
