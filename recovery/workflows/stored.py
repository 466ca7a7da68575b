"""Graphs and calls as bytes."""

from __future__ import annotations

import inspect
import io
import pickle
from typing import Any

from hopcoll.errors import WorkflowError
from recovery.workflows.graph import Graph, Node, Task
from recovery.workflows.names import find_function, reference_to

__all__ = ["dump_call", "dump_graph", "load_call", "load_graph"]


class _Pickler(pickle.Pickler):
    """Writes nodes one after the other, not one inside the other: chains may be long."""

    def __init__(self, file: io.BytesIO, numbers: dict[int, int]) -> None:
        super().__init__(file, protocol=5)
        self._numbers = numbers

    def persistent_id(self, value: Any) -> int | None:
        return self._numbers[id(value)] if isinstance(value, Node) else None

    def reducer_override(self, value: Any) -> Any:
        # Functions of the program's own file by that file, not as those of `__main__`.
        if inspect.isfunction(value) and value.__module__ == "__main__":
            return find_function, (reference_to(value),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.nodes: list[Node] = []

    def persistent_load(self, number: int) -> Node:
        return self.nodes[number]


def dump_graph(graph: Graph) -> bytes:
    """Return a graph as bytes.

    Raises
    ------
    WorkflowError
        A task or an argument cannot be written.
    """
    buffer = io.BytesIO()
    numbers: dict[int, int] = {}
    pickler = _Pickler(buffer, numbers)
    pickler.dump(len(graph.vertices))
    for vertex in graph.vertices.values():
        node = vertex.node
        try:
            pickler.dump((node.task, node.arguments, node.keywords, node.before, node.name))
        except WorkflowError:
            raise
        except Exception as error:
            raise WorkflowError(
                f"{vertex.id} cannot be stored, with its arguments: {error}"
            ) from error
        numbers[id(node)] = len(numbers)
    return buffer.getvalue()


def load_graph(data: bytes) -> Node:
    """Return the output of the graph that `dump_graph` wrote.

    Imports, and so runs, the modules of its tasks.
    """
    unpickler = _Unpickler(io.BytesIO(data))
    for _ in range(unpickler.load()):
        unpickler.nodes.append(Node(*unpickler.load()))
    return unpickler.nodes[-1]


def dump_call(call: tuple[Task, Any, Any], what: str) -> bytes:
    """Return a task with its arguments as bytes.

    Raises
    ------
    WorkflowError
        They cannot be written.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, {}).dump(call)
    except WorkflowError:
        raise
    except Exception as error:
        raise WorkflowError(f"{what} cannot be stored: {error}") from error
    return buffer.getvalue()


def load_call(data: bytes) -> tuple[Task, Any, Any]:
    """Return what `dump_call` wrote."""
    return pickle.loads(data)  # type: ignore[no-any-return]
