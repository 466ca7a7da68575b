"""What is checked of a graph before it runs, and what it is recognised by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hopcoll.errors import WorkflowError
from recovery.segments import HEAD_BYTES_MAX
from recovery.workflows.graph import Event, Graph, Loop, Node, Options, Task, Vertex
from recovery.workflows.ledger import INLINE, NOWHERE, Done, Settled, exposed
from recovery.workflows.values import Fingerprinter

__all__ = ["check_graph", "describe"]

#: Of a record's head in the journal; the rest is for what else is said there.
_INPUTS_BYTES_MAX = HEAD_BYTES_MAX - (64 << 10)
#: So many fit in any case.
_FEW_INPUTS = 1000
#: What is beside a name: colon, comma, the number of an attempt.
_NUMBER_BYTES = 10


def check_graph(graph: Graph) -> None:
    """Raise where an effect could never be released, or a task's inputs could not be recorded.

    Raises
    ------
    WorkflowError
        It is made from a value that nothing can make durable, and that would be another one if it
        were computed again; or there are too many inputs.
    """
    vertices = graph.vertices
    for vertex in vertices.values():
        if len(vertex.inputs) > _FEW_INPUTS and _bytes_of(vertex.inputs) > _INPUTS_BYTES_MAX:
            raise WorkflowError(
                f"{vertex.id} has {len(vertex.inputs)} inputs: their names, with a number each, are"
                f" more than the {_INPUTS_BYTES_MAX} bytes that a record of the journal has for "
                "them; gather them by several tasks, each with a part"
            )
    names = {vertex.id: vertex.node.task.annotations for vertex in vertices.values()}
    waiting = [name for name, options in names.items() if options.external]
    if not waiting or not any(map(_is_loose, names.values())):
        return
    users: dict[str, list[str]] = {name: [] for name in vertices}
    for vertex in vertices.values():
        for name in vertex.needs:
            users[name].append(vertex.id)
    ended: dict[str, Done] = {}

    def put(name: str) -> None:
        if all(one in ended for one in vertices[name].inputs):
            options = names[name]
            kept = options.checkpoint != "none" or name == graph.output
            # A gang that is said to give the same again is kept, whatever else is said of it.
            kept = kept or (options.ranks is not None and options.deterministic)
            place = INLINE if kept else NOWHERE
            lasting = options.deterministic and options.rollback is None
            ended[name] = Done(1, {}, None, lasting, place, 0, {}, b"")

    # As it would go: what needs no effect has ended, then the effects that can be released, and
    # so on.
    settled = Settled()
    while waiting:
        for name, options in names.items():  # inputs come first
            if name not in ended and not options.external:
                put(name)
        found: dict[str, set[str]] = {
            name: exposed(
                name, lambda one: vertices[one].inputs, users.__getitem__, ended.get, settled,
                graph.output,
            )
            for name in waiting
            if all(one in ended for one in vertices[name].inputs)
        }  # fmt: skip
        released = [name for name, exposures in found.items() if not exposures]
        if not released:
            effect = next(iter(found))
            name = min(found[effect])
            raise WorkflowError(
                f"{effect} has an effect that could never be released: {name} is made again, with "
                f'another value, after a crash (checkpoint="none", and it is not deterministic or '
                f'can be rolled back), and {effect} depends on it; annotate {name} with '
                'checkpoint="async"'
            )
        for name in released:
            put(name)
        waiting = [name for name in waiting if name not in ended]


def _bytes_of(names: Sequence[str]) -> int:
    return sum(len(json.dumps(name)) + _NUMBER_BYTES for name in names)


def _is_loose(options: Options) -> bool:
    return options.checkpoint == "none" and not (
        options.deterministic and options.rollback is None
    )


def describe(graph: Graph) -> str:
    """Return a hash of what a graph does: its tasks, by name, with their arguments.

    Raises
    ------
    WorkflowError
        An argument cannot be hashed.
    """
    vertex: Vertex

    def name_of(value: Any) -> str | None:
        if isinstance(value, Node):
            if id(value) not in vertex.references:
                raise WorkflowError(
                    f"an argument of {vertex.id} has {value!r} inside something that is no "
                    "list, tuple or dict (as a value): nobody looks for nodes there"
                )
            return f"node {vertex.references[id(value)]}"
        if isinstance(value, Task):
            return f"task {value.__module__}.{value.function.__qualname__}"
        return None

    printer = Fingerprinter(name_of)
    printer.add(graph.output)
    for vertex in graph.vertices.values():
        node = vertex.node
        kind: Any = node.task
        if isinstance(kind, Event):
            kind = ("event", kind.key)
        elif isinstance(kind, Loop):
            kind = ("loop", kind.body, kind.times)
        printer.add((vertex.id, kind, node.arguments, node.keywords, vertex.inputs))
    return printer.hexdigest()
