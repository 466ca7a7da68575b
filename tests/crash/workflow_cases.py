"""Small workflows with living things, and what happens to them: for each rule one in which nothing
else helps. `tests.crash.workflow_directed` runs them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import sqlite3
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from recovery.workflows import Node, TaskContext, actor, loop, task
from recovery.workflows.post import RankGoneError
from recovery.workflows.references import key_of
from tests.crash import workflow_directed as directed
from tests.crash import workflow_graphs as graphs
from tests.crash import workflow_living as living
from tests.crash.workflow_directed import AFTER, AGAIN, Case, Directed, Ranks
from tests.crash.workflow_graphs import begin, begin_turn, token_of, value_of
from tests.crash.workflow_living import Counter, Steady, onward, put, use, whirl
from tests.powercut import Killed

_PATIENCE_S = 20.0

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
        directed.TRIAL.took[ctx.task_id] = makers, taken
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


@task(ranks="all", deterministic=True, checkpoint="none")
def fewer(ctx: TaskContext) -> Any:
    """A gang, and in a second life one that has lost a rank."""
    begin(ctx, [])
    value = value_of(ctx, [], token_of(ctx, [], directed.TRIAL.incarnation == 1))
    value["pad"] = np.full(graphs._PAD_BYTES, 7, np.uint8)  # too large for the journal
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


def used_in_what_goes_on(kind: str) -> Callable[[Directed], Node]:
    """Alike, by a ref in the graph that a turn, or a task, went on to. Who uses its value has to
    wait for the effect."""

    def node(trial: Directed) -> Node:
        lost = graphs._LOST.bind(graphs._HOW)
        effect, made = graphs.blind.bind({}, _kept(lost)), _put("made", lost)
        if kind == "turn":
            return graphs._out(effect, loop(late_turn, made, 1))
        how = {**_HOW, "options": {"checkpoint": "sync"}}
        goes_on = onward.options(deterministic=True, checkpoint="sync").bind(how, made)
        return graphs._out(effect, goes_on)

    return node


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


def used_before_it_is_stored(trial: Directed) -> Node:
    """An object is in a value whose file comes when all who use it have ended. The effect waits for
    the file: somebody who used the value is not durable."""
    carrier = use.options(checkpoint="async", name="carrier")
    carried = carrier.bind({"fixed": False, "passes": True}, _put("made"))
    used = use.options(deterministic=True, checkpoint="none", name="used").bind(_HOW, carried)
    late = graphs._KEPT.options(name="late_user").bind(graphs._HOW, used)
    return graphs._out(late, graphs.blind.bind({}, used))


def used_from_a_file(trial: Directed) -> Node:
    made = _put("made", deterministic=False, checkpoint="sync")
    return graphs._out(_late_user(made, after=made))


def given_to_the_world(trial: Directed) -> Node:
    """The output has a ref."""
    return _put("output", _put("made"))


def _foreign(trial: Directed) -> dict[str, Any]:
    array = np.arange(4)
    ref = trial.memory.put(array)
    trial.foreign[ref] = trial.memory
    return {"tokens": {}, "refs": [{"ref": ref, "holds": array.tolist(), "by": ""}]}


def of_before(trial: Directed) -> Node:
    """An object that the program had is passed on, and used."""
    given = _foreign(trial)
    carrier = use.options(deterministic=True, checkpoint="none", name="carrier")
    return graphs._out(_use("user", carrier.bind({**_HOW, "passes": True}, given)))


def of_before_from_a_file(trial: Directed) -> Node:
    """Alike; it is stored with who passes it on."""
    given = _foreign(trial)
    carrier = use.options(checkpoint="sync", name="carrier")
    carried = carrier.bind({"fixed": False, "passes": True}, given)
    return graphs._out(_late_user(carried, after=carried))


def of_a_gang(trial: Directed) -> Node:
    """An effect of what a gang gave, which is used again."""
    gave = fewer.bind()
    late = _kept().after(gave)
    for _ in range(6):
        late = _kept(late)
    late = graphs._KEPT.options(name="late_user").bind(graphs._HOW, gave, late)
    return graphs._out(late, graphs.blind.bind({}, _kept(gave)))


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
    """Two calls of one version, one after the other."""
    made = Sharer.bind()
    how = {"fails": 0, "others": ["Sharer.count", "Sharer.count~2"]}
    first = Sharer.call(made, "count", how)
    return graphs._out(first, Sharer.call(made, "count", how).after(first))


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


def lose_and_die_as_it_is_made_again(trial: Directed) -> None:
    """That it was lost is in the journal by then."""
    trial.memory.lose(1)
    assert trial.world is not None
    trial.world.happens["made"] = trial.wait_for_the_disk
    trial.world.dies_in = "made"


def begin_late(trial: Directed) -> None:
    """An attempt puts an object, and is stopped; its leader dies."""
    ranks = Ranks(trial.ranks._workflow, trial)
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
    "used before it is stored": Case(
        used_before_it_is_stored,
        happens={
            (1, "late_user"): lambda trial: trial.is_used.set(),
            (1, "write carrier"): lambda trial: trial.is_used.wait(_PATIENCE_S) and None,
        },
        runs={"made": 1},
    ),
    "lost as its leader dies": Case(
        used_late, [AGAIN], {(1, "late_user"): lose_and_die_as_it_is_made_again},
        another_session=False, runs={"made": 3, "late_user": 2},
    ),
    "used from a file": Case(used_from_a_file, ["late_user"], runs={"made": 1}),
    "given to the world": Case(given_to_the_world, runs={"made": 1}),
    "of before": Case(of_before),
    "of before, from a file": Case(of_before_from_a_file, ["late_user"]),
    "of a gang": Case(of_a_gang, ["late_user"], runs={"fewer": 2}, unwritten=(1, "fewer")),
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
        rank=lambda life, name: 2 if directed.TRIAL.memory.dying else 1,
    ),
    "got, and then lost": Case(
        of_the_first("its value"), happens={(1, "got first"): lose_and_take_others}
    ),
    "called twice": Case(called_twice),
    "called again": Case(called_again),
    "called since": Case(called_since, happens={(1, "send Steady.step~2"): lose(1)}),
}  # fmt: skip
