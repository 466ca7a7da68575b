"""Random workflows, and a world outside in which they have effects.

The world (a SQLite database and a text file) survives every crash, as the real one does. A value
carries the *tokens* of all tasks that it was made from: a task that is not deterministic draws a
new one whenever it runs. So the last value tells which run of each task counts, and whatever was
done to the world must agree with it: each effect once, with a value made from those tokens and no
others.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import random
import sqlite3
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np

from hopcoll.errors import WorkflowError
from recovery.workflows import (
    Actor, Called, Done, Node, Stop, TaskContext, event, loop, task,
)  # fmt: skip
from recovery.workflows.checks import check_graph
from recovery.workflows.graph import Graph
from tests.powercut import Killed, RecordingDisk

_PAD_BYTES = 100_000
#: Kinds of tasks with an effect that is released once.
EFFECTS = ("keyed", "asked", "blind")

Act = Callable[[sqlite3.Connection], None]


class World:
    """What is outside of a workflow, and what it saw.

    Attributes
    ----------
    executed : list of (str, list of str)
        The calls of this life: the task, and who made the values that it was called with.
    asked : list of (str, list of str)
        The calls of `look_up`, alike.
    undone : list of (str, dict, bool)
        The rollbacks of this life: the task, the tokens that it was called with, and whether it was
        before anything ran.
    zombies : list of callable
        What processes that were taken for silent will do when they wake up.
    dies_in : str or None
        The task that this life ends in, as it begins.
    happens : dict of str to callable
        What happens as a task begins, once.
    ranks_are_lost_at_will : bool
        Whether a gang that is to lose a rank does. Real ones lose a rank when that dies: such a
        gang, with all ranks alive, would give random values and say that it does not.
    """

    dies_in: str | None = None
    ranks_are_lost_at_will = True

    def __init__(self, path: Path) -> None:
        self.database = sqlite3.connect(path / "world.db", check_same_thread=False)
        self.database.executescript(
            "pragma synchronous = off; pragma journal_mode = memory;"
            "create table keyed (key text primary key, task text, tokens text);"
            "create table plain (task text, tokens text);"
            "create table things (task text, token text, tokens text);"
        )
        self.file = path / "world.txt"
        self.file.touch()
        self.disk: RecordingDisk | None = None
        self.executed: list[tuple[str, list[str]]] = []
        self.asked: list[tuple[str, list[str]]] = []
        self.undone: list[tuple[str, dict[str, str], bool]] = []
        self.tries: collections.Counter[str] = collections.Counter()
        self.zombies: list[Act] = []
        self.happens: dict[str, Callable[[], None]] = {}
        self.elsewhere = False  # nobody can prove that this life is over
        self.moments_to_wake = 0

    def begin(self, name: str, makers: list[str]) -> None:
        """A task is called."""
        self.executed.append((name, makers))
        self.happens.pop(name, lambda: None)()
        if name == self.dies_in and self.disk is not None:
            with self.disk.log.lock:
                self.disk.left = 0
            raise Killed

    def moment(self) -> None:
        """A moment in which the process may die, or a zombie wake up."""
        if self.disk is None:
            return
        with self.disk._call():
            self.moments_to_wake -= 1
            if self.moments_to_wake == 0:
                self.wake()

    def wake(self) -> None:
        """Let the zombies do what they were about to do."""
        while self.zombies:
            with self.database:
                self.zombies.pop()(self.database)

    def do(self, act: Act, may_wake: bool = True) -> None:
        """Change the world, between two moments. Nobody who is dead can, but those who only seem to
        be will."""
        assert self.disk is not None
        try:
            self.moment()
        except Killed:
            if self.elsewhere and may_wake:
                self.zombies.append(act)
            raise
        with self.disk.log.lock:
            if self.disk.left == 0:
                raise Killed
            with self.database:
                act(self.database)
        self.moment()

    def rows(self, query: str, *values: Any) -> list[Any]:
        assert self.disk is not None
        with self.disk.log.lock:
            return self.database.execute(query, values).fetchall()

    def lines(self) -> list[tuple[str, str]]:
        """The task and the tokens of each line of the file."""
        found = []
        for text in self.file.read_text().splitlines():
            name, tokens = text.split(" ", 1)
            found.append((name, tokens))
        return found


#: Set by who runs workflows.
WORLD: World = cast(World, None)


def kind_of(name: str) -> str:
    """What kind of task an identifier is of."""
    return name.rpartition("/")[2].split("~")[0].split("[")[0]


# Values


def merge(inputs: Iterable[Any]) -> dict[str, str]:
    """The tokens of all inputs; no task may be there with two."""
    tokens: dict[str, str] = {}
    for value in inputs:
        for name, token in tokens_of(value).items():
            if tokens.setdefault(name, token) != token:
                raise Killed(f"mixed: two values of {name}")  # no try is worth a second one
    return tokens


def begin(ctx: TaskContext, inputs: Iterable[Any]) -> None:
    WORLD.begin(ctx.task_id, makers_of(inputs))


def makers_of(inputs: Iterable[Any]) -> list[str]:
    """Who made values, and the objects that they refer to."""
    found = []
    for value in inputs:
        if isinstance(value, Actor):
            found.append(value.name.split("/", 1)[1].rpartition("/")[0])
            continue
        if isinstance(value, Called):
            found.append(value.actor.name.split("/", 1)[1].rpartition("/")[0])
            continue
        found += [value["by"]] if "by" in value else []
        found += [one["by"] for one in value.get("refs", ())]
    return found


def tokens_of(value: Any) -> dict[str, str]:
    """The tokens of a value: of a task, of an actor, or of a call of one."""
    if isinstance(value, Called):
        value = value.value
    if isinstance(value, Actor):
        value = value.state
    return value["tokens"]  # type: ignore[no-any-return]


def value_of(ctx: TaskContext, inputs: Iterable[Any], token: str) -> dict[str, Any]:
    return {"tokens": {**merge(inputs), ctx.task_id: token}, "by": ctx.task_id}


def token_of(ctx: TaskContext, inputs: Iterable[Any], fixed: bool, clock: bool = False) -> str:
    if not fixed:
        return uuid.uuid4().hex[:12]
    parts: list[Any] = [ctx.task_id, sorted(merge(inputs).items())]
    parts.append(int(ctx.rng.integers(1 << 30)))
    if clock:
        parts.append(ctx.now())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


# Tasks


@task
def plain(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Gives a value; or a graph that goes on; or fails at first."""
    begin(ctx, inputs)
    WORLD.moment()
    WORLD.tries[ctx.task_id] += 1
    if how.get("fails", 0) >= WORLD.tries[ctx.task_id]:
        raise ArithmeticError("not yet")
    value = value_of(ctx, inputs, token_of(ctx, inputs, how["fixed"], how.get("clock", False)))
    if how.get("pad"):
        value["pad"] = np.full(_PAD_BYTES, 7, np.uint8)
    if "loop" in how:
        value["how"] = how["loop"]
    if (depth := how.get("goes_on", 0)) > 0:
        rest = {**how, "goes_on": depth - 1}
        one = plain.options(**how["options"]).bind({**rest, "goes_on": 0}, value)
        if how.get("effect"):
            one = keyed.bind({}, one)
        if how.get("waits"):
            one = plain.options(**how["options"]).bind(
                {**rest, "goes_on": 0}, one, event(how["waits"])
            )
        return plain.options(**how["options"]).bind(rest, one, value)
    return value


def begin_turn(ctx: TaskContext, state: Any, i: int) -> None:
    """The body of a loop is called: with what it returned before, which was not the end."""
    begin(ctx, [state])
    before = f"{ctx.task_id.rpartition('[')[0]}[{i - 1}]"
    if i and before not in state["tokens"]:
        raise Killed(f"mixed: {ctx.task_id} does not go on from {before}")
    if state.get("ended"):
        raise Killed(f"mixed: {ctx.task_id} runs after the end")


def _turned(state: Any, i: int, ctx: TaskContext, value: Any) -> Any:
    """What the body of a loop returns."""
    how = value["how"] = state["how"]
    ends = value["ended"] = (
        i == how["stop"]
        or (how["may_stop"] and random.random() < 0.25)
        or (how.get("stops_again", False) and ctx.attempt > 1)
    )
    if how["goes_on"] and not ends:
        options = how["options"]
        return plain.options(**options).bind({"fixed": how["fixed"], "loop": how}, value)
    return Stop(value) if ends else value


@task
def turn(state: Any, i: int, ctx: TaskContext) -> Any:
    """The body of a loop."""
    begin_turn(ctx, state, i)
    WORLD.moment()
    value = value_of(ctx, [state], token_of(ctx, [state], state["how"]["fixed"]))
    return _turned(state, i, ctx, value)


def do_keyed(ctx: TaskContext, inputs: Iterable[Any]) -> dict[str, Any]:
    value = value_of(ctx, inputs, token_of(ctx, inputs, False))
    row = (ctx.idempotency_key, ctx.task_id, json.dumps(value["tokens"]))
    WORLD.do(
        lambda database: database.execute("insert or ignore into keyed values (?, ?, ?)", row)
        and None
    )
    found = WORLD.rows("select tokens from keyed where key = ?", ctx.idempotency_key)
    return {"tokens": json.loads(found[0][0]), "by": ctx.task_id}


@task(external=True, idempotency_key=True)
def keyed(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """An effect that the outside does once for a key."""
    begin(ctx, inputs)
    return do_keyed(ctx, inputs)


@task(external=True, idempotency_key=True, name="keyed")
def turn_keyed(state: Any, i: int, ctx: TaskContext) -> Any:
    """The body of a loop with such an effect."""
    begin_turn(ctx, state, i)
    return _turned(state, i, ctx, do_keyed(ctx, [state]))


def look_up(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Whether `asked` was done."""
    WORLD.asked.append((ctx.task_id, makers_of(inputs)))
    found = WORLD.rows("select task, tokens from plain")
    if how.get("file"):
        found = WORLD.lines()
    for name, tokens in found:
        if name == ctx.task_id:
            return Done({"tokens": json.loads(tokens), "by": ctx.task_id})
    WORLD.moment()
    return False


@task(external=True, verify=look_up)
def asked(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """An effect that the outside would do twice, and can be asked about."""
    begin(ctx, inputs)
    value = value_of(ctx, inputs, token_of(ctx, inputs, False))
    text, name, world = json.dumps(value["tokens"]), ctx.task_id, WORLD

    def act(database: sqlite3.Connection) -> None:
        if how.get("file"):
            with world.file.open("a") as file:
                file.write(f"{name} {text}\n")
        else:
            database.execute("insert into plain values (?, ?)", (name, text))

    WORLD.do(act)
    return value


@task(external=True)
def blind(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """An effect that nobody can be asked about."""
    begin(ctx, inputs)
    value = value_of(ctx, inputs, token_of(ctx, inputs, False))
    row = (ctx.task_id, json.dumps(value["tokens"]))
    WORLD.do(lambda database: database.execute("insert into plain values (?, ?)", row) and None)
    return value


def _take_away(ctx: TaskContext, inputs: Iterable[Any]) -> None:
    WORLD.undone.append((ctx.task_id, merge(inputs), not WORLD.executed))
    name = ctx.task_id
    WORLD.do(
        lambda database: database.execute("delete from things where task = ?", (name,)) and None,
        may_wake=False,
    )


def _put_thing(ctx: TaskContext, inputs: Iterable[Any], fixed: bool) -> Any:
    value = value_of(ctx, inputs, token_of(ctx, inputs, fixed))
    for name, tokens in WORLD.rows("select task, tokens from things"):
        if ctx.task_id in json.loads(tokens):
            raise Killed(f"mixed: {ctx.task_id} runs while {name} is not undone")
    row = (ctx.task_id, value["tokens"][ctx.task_id], json.dumps(value["tokens"]))
    WORLD.do(
        lambda database: database.execute("insert into things values (?, ?, ?)", row) and None,
        may_wake=False,
    )
    return value


def take_away(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> None:
    """Undo `thing`."""
    _take_away(ctx, inputs)


@task(rollback=take_away)
def thing(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """An effect that can be undone."""
    begin(ctx, inputs)
    value = _put_thing(ctx, inputs, how["fixed"])
    WORLD.tries[ctx.task_id] += 1
    if how.get("fails", 0) >= WORLD.tries[ctx.task_id]:
        raise ArithmeticError("not yet")
    return value


def take_turn_away(state: Any, i: int, ctx: TaskContext) -> None:
    """Undo `turn_thing`."""
    _take_away(ctx, [state])


@task(rollback=take_turn_away, name="thing")
def turn_thing(state: Any, i: int, ctx: TaskContext) -> Any:
    """The body of a loop with such an effect."""
    begin_turn(ctx, state, i)
    return _turned(state, i, ctx, _put_thing(ctx, [state], state["how"]["fixed"]))


@task(ranks="all")
def gang(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Runs on ranks; may lose one, and is another value then."""
    begin(ctx, inputs)
    WORLD.moment()
    loses = how["loses"] and WORLD.ranks_are_lost_at_will
    return value_of(ctx, inputs, token_of(ctx, inputs, not loses))


# Graphs


def corpus(seed: int) -> Node:
    """Return a random graph that can run."""
    for attempt in itertools.count():
        try:
            # What goes on to an effect is checked as if it had it itself: only when it runs would
            # it be found to be one that cannot be released.
            node = _random_graph(random.Random(f"{seed} {attempt}"), as_effects=True)
            check_graph(Graph.of(node))
            return _random_graph(random.Random(f"{seed} {attempt}"))
        except WorkflowError:
            continue
    raise AssertionError


def _random_graph(draw: random.Random, as_effects: bool = False) -> Node:
    nodes: list[Node] = []
    used: set[int] = set()
    for _ in range(draw.randint(3, 12)):
        count = min(len(nodes), draw.choice((0, 1, 1, 2, 2, 3)))
        picks = draw.sample(range(len(nodes)), count)
        used.update(picks)
        inputs = [nodes[i] for i in picks]
        kind = draw.choice(
            ("plain",) * 6 + ("thing",) * 3 + ("keyed", "asked", "line", "blind")
            + ("gang", "loop", "loop", "event", "fails", "goes_on", "goes_on", "pinch", "pinch")
        )  # fmt: skip
        if kind == "pinch":
            nodes += _pinch(draw, inputs)
            continue
        node = _random_node(draw, kind, inputs, as_effects)
        if nodes and draw.random() < 0.15:
            i = draw.randrange(len(nodes))
            used.add(i)
            node = node.after(nodes[i])
        nodes.append(node)
    rest = [node for i, node in enumerate(nodes) if i not in used]
    last = {"fixed": True, "pad": False}
    return plain.options(deterministic=True, checkpoint="none", name="output").bind(last, *rest)


def _random_node(draw: random.Random, kind: str, inputs: list[Node], as_effects: bool) -> Node:
    fixed = draw.random() < 0.5
    checkpoint = draw.choice(("sync", "async", "none", "none", "auto"))
    options = {"deterministic": fixed, "checkpoint": checkpoint}
    how: dict[str, Any] = {"fixed": fixed, "pad": draw.random() < 0.15}
    if kind == "plain":
        how["clock"] = draw.random() < 0.3
        return plain.options(**options).bind(how, *inputs)
    if kind == "thing":
        if draw.random() < 0.2:
            how["fails"] = 1
            return thing.options(**options, retries=1, backoff_s=0.0).bind(how, *inputs)
        return thing.options(**options).bind(how, *inputs)
    if kind == "keyed":
        return keyed.bind({}, *inputs)
    if kind in ("asked", "line"):
        return asked.bind({"file": kind == "line"}, *inputs)
    if kind == "blind":
        return blind.bind({}, *inputs)
    if kind == "gang":
        options["deterministic"] = True
        return gang.options(**options).bind({"loses": draw.random() < 0.5}, *inputs)
    if kind == "loop":
        return _random_loop(draw, inputs, how, options)
    if kind == "event":
        return event(draw.choice(("a", "b"))).after(*inputs[:1])
    if kind == "fails":
        how["fails"] = draw.randint(1, 2)
        return plain.options(**options, retries=2, backoff_s=0.0).bind(how, *inputs)
    how.update(goes_on=draw.randint(1, 3), options=options, effect=draw.random() < 0.3)
    if draw.random() < 0.3:
        how["waits"] = draw.choice(("a", "b"))
    if checkpoint == "none" and not fixed:
        how["effect"] = False
    if as_effects and how["effect"]:
        return keyed.bind({}, *inputs)
    return plain.options(**options).bind(how, *inputs)


def _pinch(draw: random.Random, inputs: list[Node]) -> list[Node]:
    """An effect of something that is kept, made from something that is not, and that others use as
    well: when may it be released?"""
    how = {"fixed": False}
    lost = plain.options(checkpoint="none")
    kept = plain.options(checkpoint=draw.choice(("sync", "async")))
    one, two = lost.bind(how, *inputs), lost.bind(how, *inputs)
    kind, more = draw.choice(((keyed, {}), (asked, {}), (asked, {"file": True}), (blind, {})))
    effect = kind.bind(more, kept.bind(how, one))
    late: list[Node] = []
    for _ in range(draw.randint(0, 4)):
        late = [plain.options(checkpoint="sync").bind(how, *late)]
    if draw.random() < 0.5:
        return [effect, kept.bind(how, one, *late)]
    return [effect, kept.bind(how, one, two), kept.bind(how, two, *late)]


def _random_loop(
    draw: random.Random, inputs: list[Node], how: dict[str, Any], options: dict[str, Any]
) -> Node:
    may_stop = draw.random() < 0.3
    fixed = how["fixed"] and not may_stop
    around = {
        "fixed": fixed, "stop": draw.choice((None, None, 2, 4)), "may_stop": may_stop,
        "goes_on": draw.random() < 0.3,
        "options": {**options, "deterministic": fixed},
    }  # fmt: skip
    first = plain.options(**options).bind({**how, "loop": around}, *inputs)
    times, every = draw.randint(0, 6), draw.randint(1, 3)
    kind = draw.choice(("turn", "turn", "turn", "thing", "keyed"))
    if kind == "keyed":
        around["goes_on"] = False
        return loop(turn_keyed, first, times, every=every)
    body = turn if kind == "turn" else turn_thing
    return loop(body.options(**{**options, "deterministic": fixed}), first, times, every=every)


# Graphs in which one rule is all that helps


def _late(count: int, *inputs: Node) -> Node:
    """The end of a chain whose every value is waited for."""
    node = plain.options(checkpoint="sync").bind({"fixed": False}, *inputs)
    for _ in range(count - 1):
        node = plain.options(checkpoint="sync").bind({"fixed": False}, node)
    return node


def _out(*inputs: Node) -> Node:
    return plain.options(name="output").bind({"fixed": False}, *inputs)


_LOST = plain.options(checkpoint="none", name="lost")
_KEPT = plain.options(checkpoint="sync", name="kept")
_HOW = {"fixed": False}


def used_later() -> Node:
    """What the effect was made from is lost, and used by somebody who comes later."""
    lost = _LOST.bind(_HOW)
    effect = blind.bind({}, _KEPT.bind(_HOW, lost))
    return _out(effect, _KEPT.bind(_HOW, lost, _late(6)))


def used_again() -> Node:
    """What the effect was made from is lost, and used by somebody who may have to run again."""
    one, two = _LOST.bind(_HOW), _LOST.bind(_HOW)
    effect = blind.bind({}, _KEPT.bind(_HOW, one))
    return _out(effect, _KEPT.bind(_HOW, one, two), _KEPT.bind(_HOW, two, _late(6)))


def of_a_stranger() -> Node:
    """Only an effect that can be asked about."""
    return _out(asked.bind({}), _late(2))


# With crashes in two tasks, or in one. The first is mostly in one that comes late, and needs again
# what is lost by then.


def _late_user(count: int, *inputs: Node) -> Node:
    return _KEPT.options(name="late_user").bind(_HOW, *inputs, _late(count))


def used_by_one_that_is_void() -> Node:
    """What the effect was made from is lost, and used by somebody who has to run again, later."""
    one, two = _LOST.bind(_HOW), _LOST.bind(_HOW)
    effect = blind.bind({}, _KEPT.bind(_HOW, one))
    chain = two
    for _ in range(5):
        chain = _KEPT.bind(_HOW, chain)
    user = _KEPT.options(name="user").bind(_HOW, one, chain)
    return _out(effect, user, _late_user(12, two))


def _going_on(*inputs: Node, **how: Any) -> Node:
    """A task that goes on to others, `goes_on` times."""
    how = {**_HOW, **how, "options": {"checkpoint": "sync"}}
    return _KEPT.options(name="goes_on").bind(how, *inputs)


def used_after_it_went_on() -> Node:
    """What a task went on to is void, and begins anew; its user did not run again yet."""
    lost = _LOST.bind(_HOW)
    user = _KEPT.options(name="user").bind(_HOW, _going_on(lost, goes_on=2))
    return _out(user, _late_user(12, lost))


def a_thing_of_a_thing() -> Node:
    """What can be undone is lost, and made from it is what can be undone as well."""
    lost = thing.options(deterministic=True, checkpoint="none").bind({"fixed": True})
    return _out(thing.options(checkpoint="sync").bind(_HOW, lost), _late_user(8, lost))


def a_loop_that_ends_earlier() -> Node:
    """A loop whose states are lost; where it goes round again, it ends at once."""
    around = {
        "fixed": False, "stop": None, "may_stop": False, "goes_on": False, "stops_again": True,
    }  # fmt: skip
    first = _KEPT.bind({**_HOW, "loop": around})
    return _out(_late_user(8, loop(turn.options(checkpoint="none"), first, 3)))


def of_an_event(count: int = 1) -> Node:
    """What a task went on to was given an event, and begins anew."""
    lost = _LOST.bind(_HOW)
    goes_on = _going_on(lost, goes_on=count, waits="a")
    return _out(_KEPT.options(name="late_user").bind(_HOW, lost, goes_on))


def of_events() -> Node:
    """What a task went on to went on itself, more than once: who had its events is no more."""
    return of_an_event(3)
