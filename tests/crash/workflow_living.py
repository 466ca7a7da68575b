"""Random workflows over living things: objects in the ranks' memory, sums of them, actors.

What an object holds says which run of its task it is of, and so does the state of an actor: whoever
uses one sees whether it is what the value says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from typing import Any

import numpy as np

from hopcoll.errors import WorkflowError
from recovery.workflows import Node, Stop, TaskContext, actor, loop, task
from recovery.workflows.checks import check_graph
from recovery.workflows.graph import Graph
from tests.crash import workflow_graphs as graphs
from tests.crash.workflow_graphs import (
    begin, begin_turn, do_keyed, keyed, merge, token_of, value_of,
)  # fmt: skip
from tests.powercut import Killed

#: Of 100 graphs of the corpus, those from here on have living things in them.
FIRST = 60


def _array(tokens: dict[str, str]) -> np.ndarray:
    """What an object holds of a task with these tokens."""
    text = json.dumps(sorted(tokens.items()))
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32).astype(np.int64)


def _refs(inputs: Iterable[Any]) -> list[dict[str, Any]]:
    return [one for value in inputs if isinstance(value, dict) for one in value.get("refs", ())]


def _look(ctx: TaskContext, inputs: Iterable[Any]) -> None:
    """See that all objects that came with the inputs are those of these values."""
    for one in _refs(inputs):
        if not (ctx.get(one["ref"]) == np.array(one["holds"])).all():
            raise Killed(f"mixed: {ctx.task_id} has an object of another run")


@task
def put(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Puts an object; passes on what came."""
    begin(ctx, inputs)
    graphs.WORLD.moment()
    value = value_of(ctx, inputs, token_of(ctx, inputs, how["fixed"]))
    holds = _array(value["tokens"])
    mine = {"ref": ctx.put(holds), "holds": holds.tolist(), "by": ctx.task_id}
    value["refs"] = [mine, *(_refs(inputs) if how["passes"] else ())]
    if "loop" in how:
        value["how"] = how["loop"]
    return value


@task
def use(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Gets all objects."""
    begin(ctx, inputs)
    graphs.WORLD.moment()
    _look(ctx, inputs)
    value = value_of(ctx, inputs, token_of(ctx, inputs, how["fixed"]))
    if how["passes"]:
        value["refs"] = _refs(inputs)
    return value


@task
def add(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Adds up objects, all or some of them."""
    begin(ctx, inputs)
    value = value_of(ctx, inputs, token_of(ctx, inputs, how["fixed"]))
    given = {one["ref"]: one for one in _refs(inputs)}
    if given:
        count = len(given) if how["fixed"] else max(1, len(given) - 1)
        ref = ctx.reduce(given, count=count)
        graphs.WORLD.moment()
        found = ctx.get(ref)
        holds = sum(np.array(given[one]["holds"]) for one in ctx.contributors(ref))
        if not (found == holds).all():
            raise Killed(f"mixed: {ctx.task_id} added up objects of another run")
        if not how["fixed"]:
            value["refs"] = [{"ref": ref, "holds": found.tolist(), "by": ctx.task_id}]
    return value


def _graph(how: dict[str, Any], value: dict[str, Any]) -> Node:
    """What a task goes on to: somebody looks at the objects of others that came with its value."""
    fixed, options = how["fixed"], how["options"]
    looks = use.options(**options).bind({"fixed": fixed, "passes": how["passes"]}, value)
    if how.get("effect"):
        looks = keyed.bind({}, looks)
    more = {"loop": how} if "stop" in how else {}
    return put.options(**options).bind({"fixed": fixed, "passes": how["passes"], **more}, looks)


@task
def onward(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Goes on to a graph with the refs that came."""
    begin(ctx, inputs)
    graphs.WORLD.moment()
    value = value_of(ctx, inputs, token_of(ctx, inputs, how["fixed"]))
    value["refs"] = _refs(inputs)
    return _graph(how, value)


@task
def whirl(state: Any, i: int, ctx: TaskContext) -> Any:
    """The body of a loop whose state has objects: it puts the next, or goes on to who does."""
    begin_turn(ctx, state, i)
    graphs.WORLD.moment()
    how = state["how"]
    value = value_of(ctx, [state], token_of(ctx, [state], how["fixed"]))
    value["refs"] = _refs([state])
    ends = i == how["stop"] or (how["may_stop"] and random.random() < 0.25)
    if how["goes_on"] and not ends:
        return _graph(how, value)
    _look(ctx, [state])
    holds = _array(value["tokens"])
    mine = {"ref": ctx.put(holds), "holds": holds.tolist(), "by": ctx.task_id}
    value.update(refs=[mine, *(value["refs"] if how["passes"] else ())], how=how, ended=ends)
    return Stop(value) if ends else value


@actor
class Counter:
    """Its state has the tokens of all that it was called with."""

    def __init__(self, how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> None:
        begin(ctx, inputs)
        graphs.WORLD.moment()
        self.tokens = value_of(ctx, inputs, token_of(ctx, inputs, how["fixed"]))["tokens"]
        self.by = ctx.task_id

    def checkpoint(self) -> Any:
        return {"tokens": dict(self.tokens), "by": self.by}

    def restore(self, state: Any) -> None:
        self.tokens, self.by = dict(state["tokens"]), state["by"]

    def count(self, how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
        """A call that may be cut off before it has changed the state, or after."""
        mine = {"tokens": dict(self.tokens), "by": self.by}
        begin(ctx, [*inputs, mine])
        graphs.WORLD.moment()
        _look(ctx, inputs)
        if how.get("effect"):
            value = do_keyed(ctx, [*inputs, mine])
        else:
            token = token_of(ctx, [*inputs, mine], how["fixed"])
            value = value_of(ctx, [*inputs, mine], token)
        self.tokens, self.by = dict(value["tokens"]), ctx.task_id
        graphs.WORLD.moment()
        return value


@actor(deterministic=True, every=3)
class Steady:
    """One whose lost calls are made again. It knows nothing of the tasks that it is called by."""

    def __init__(self, label: str, *inputs: Any) -> None:
        self.label, self.number, self.tokens = label, 0, merge(inputs)

    def checkpoint(self) -> Any:
        return {"label": self.label, "number": self.number, "tokens": dict(self.tokens)}

    def restore(self, state: Any) -> None:
        self.label, self.number = state["label"], state["number"]
        self.tokens = dict(state["tokens"])

    def step(self, *inputs: Any) -> Any:
        self.number += 1
        self.tokens = merge([*inputs, {"tokens": self.tokens}])
        text = json.dumps([self.label, self.number, sorted(self.tokens.items())])
        self.tokens[f"{self.label} {self.number}"] = hashlib.sha256(text.encode()).hexdigest()[:12]
        return {"tokens": dict(self.tokens)}


def corpus(seed: int) -> Node:
    """Return a random graph that can run: of the old kinds alone, or with living things."""
    if seed < FIRST:
        return graphs.corpus(seed)
    for attempt in itertools.count():
        try:
            # As in `graphs.corpus`: what goes on to an effect is checked as if it had it itself.
            node = _random_graph(random.Random(f"living {seed} {attempt}"), as_effects=True)
            check_graph(Graph.of(node))
        except WorkflowError:
            continue
        return _random_graph(random.Random(f"living {seed} {attempt}"))
    raise AssertionError


def _random_graph(draw: random.Random, as_effects: bool = False) -> Node:
    nodes: list[Node] = []
    used: set[int] = set()
    for number in range(draw.randint(4, 12)):
        count = min(len(nodes), draw.choice((0, 1, 1, 2, 2, 3)))
        picks = draw.sample(range(len(nodes)), count)
        used.update(picks)
        inputs = [nodes[i] for i in picks]
        kind = draw.choice(
            ("put",) * 5 + ("use",) * 3 + ("add",) * 3 + ("counter", "counter", "steady")
            + ("onward", "onward", "whirl", "whirl")
            + ("plain", "plain", "thing", "keyed", "asked", "line", "gang", "loop", "event")
        )  # fmt: skip
        nodes += _random_nodes(draw, kind, inputs, number, as_effects)
    rest = [node for i, node in enumerate(nodes) if i not in used]
    last = use.options(deterministic=True, checkpoint="none", name="output")
    return last.bind({"fixed": True, "passes": False}, *rest)


def _random_nodes(
    draw: random.Random, kind: str, inputs: list[Node], number: int, as_effects: bool
) -> list[Node]:
    fixed = draw.random() < 0.5
    options = {
        "deterministic": fixed,
        "checkpoint": draw.choice(("sync", "async", "none", "none", "auto")),
    }
    how = {"fixed": fixed, "passes": draw.random() < 0.5}
    kinds = {"put": put, "use": use, "add": add}
    if kind in kinds:
        on = draw.choice((None, "any", "any", 1))
        return [kinds[kind].options(**options, on=on).bind(how, *inputs)]
    if kind == "counter":
        return _calls(draw, inputs, how, options)
    if kind == "steady":
        checkpoint = {"checkpoint": options["checkpoint"]}
        kept = Steady.options(**checkpoint)
        found = [kept.bind(f"steady {number}", *inputs)]
        for _ in range(draw.randint(1, 5)):
            found.append(kept.call(found[-1], "step", *draw.sample(inputs, len(inputs) // 2)))
        return found[-1:]
    if kind in ("onward", "whirl"):
        inside = draw.choice(("sync", "async", "async", "none", "auto"))
        how["options"] = {
            "deterministic": fixed, "checkpoint": inside, "on": draw.choice((None, "any"))
        }  # fmt: skip
    if kind == "onward":
        how["effect"] = fixed and draw.random() < 0.5
        if as_effects and how["effect"]:
            return [keyed.bind({}, *inputs)]
        return [onward.options(**options).bind(how, *inputs)]
    if kind == "whirl":
        return [_random_loop(draw, inputs, how, options)]
    return [graphs._random_node(draw, kind, inputs, as_effects=True)]


def _random_loop(
    draw: random.Random, inputs: list[Node], how: dict[str, Any], options: dict[str, Any]
) -> Node:
    """One whose state has objects, and whose body mostly goes on to a graph with their refs."""
    around = {
        **how, "stop": draw.choice((None, None, 2, 4)), "may_stop": draw.random() < 0.2,
        "goes_on": draw.random() < 0.7,
    }  # fmt: skip
    fixed = how["fixed"] and not around["may_stop"]
    first = put.options(**options).bind({**how, "loop": around}, *inputs)
    body = whirl.options(**{**options, "deterministic": fixed})
    return loop(body, first, draw.randint(1, 5), every=draw.randint(1, 3))


def _calls(
    draw: random.Random, inputs: list[Node], how: dict[str, Any], options: dict[str, Any]
) -> list[Node]:
    """An actor, and a few calls of it."""
    kept = Counter.options(**options)
    found = [kept.bind(how, *inputs)]
    for _ in range(draw.randint(1, 4)):
        more = draw.sample(inputs, len(inputs) // 2)
        if draw.random() < 0.2:
            effect = Counter.options(external=True, idempotency_key=True, on=None)
            call = effect.call(found[-1], "count", {**how, "effect": True}, *more).named("keyed")
        else:
            call = kept.call(found[-1], "count", how, *more)
        found.append(call)
    return found[1:] if draw.random() < 0.3 else found[-1:]
