"""What is checked of a graph before it runs, and what it is recognised by."""

from __future__ import annotations

from typing import Any

from hopcoll.errors import WorkflowError
from recovery.workflows.graph import Event, Graph, Loop, Node, Task, Vertex
from recovery.workflows.ledger import INLINE, NOWHERE, Done, exposed
from recovery.workflows.values import fingerprint

__all__ = ["check_graph", "describe"]


def check_graph(graph: Graph) -> None:
    """Raise where an effect could never be released.

    Raises
    ------
    WorkflowError
        It is made from a value that nothing can make durable, and that would be another one if it
        were computed again.
    """
    vertices = graph.vertices
    users: dict[str, list[str]] = {name: [] for name in vertices}
    for vertex in vertices.values():
        for name in vertex.inputs:
            users[name].append(vertex.id)
    for vertex in vertices.values():
        if not vertex.node.task.annotations.external:
            continue
        later = {vertex.id}  # it, and what can only run after it
        stack = [vertex.id]
        while stack:
            for user in users[stack.pop()]:
                if user not in later:
                    later.add(user)
                    stack.append(user)

        def expected(name: str, later: set[str] = later) -> Done | None:
            options = vertices[name].node.task.annotations
            if name in later:
                return None
            place = NOWHERE if options.checkpoint == "none" and name != graph.output else INLINE
            return Done(1, {}, None, options.deterministic, place, 0, {}, b"")

        found = exposed(
            vertex.id,
            lambda name: vertices[name].inputs,
            users.__getitem__,
            expected,
            set(),
            graph.output,
        )
        if found:
            name = min(found)
            raise WorkflowError(
                f"{vertex.id} has an effect that could never be released: {name} is made again, "
                f'with another value, after a crash (it is not deterministic, checkpoint="none"), '
                f'and {vertex.id} depends on it; annotate {name} with checkpoint="async"'
            )


def describe(graph: Graph) -> str:
    """Return a hash of what a graph does: its tasks, by name, with their arguments.

    Raises
    ------
    WorkflowError
        An argument cannot be hashed.
    """
    rows = []
    for vertex in graph.vertices.values():
        node = vertex.node

        def name_of(value: Any, vertex: Vertex = vertex) -> str | None:
            if isinstance(value, Node):
                return f"node {vertex.references[id(value)]}"
            if isinstance(value, Task):
                return f"task {value.__module__}.{value.__qualname__}"
            return None

        kind: Any = node.task
        if isinstance(kind, Event):
            kind = ("event", kind.key)
        elif isinstance(kind, Loop):
            kind = ("loop", kind.body, kind.times)
        rows.append(
            (vertex.id, fingerprint((kind, node.arguments, node.keywords), name_of), vertex.inputs)
        )
    return fingerprint((graph.output, rows))
