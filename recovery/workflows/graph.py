"""What a workflow is made of: tasks, and the nodes that `bind` makes.

A graph is immutable: `bind` makes a node of a task and its arguments, and arguments that are nodes
(also inside lists, tuples and dicts) are what has to be there first. Identifiers are given when a
graph runs: the task's name, and a number where a name occurs again, in the order of a walk from the
output that visits arguments first. The same program gives the same graph the same identifiers.

A graph is written into the journal by `pickle`, in which a task is the name of its function; so a
task is a function of a module (the program's own file counts as one), and no lambda.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hopcoll.errors import WorkflowError
from recovery.workflows.names import Named, code_hash, find_function, reference_to

__all__ = [
    "Event",
    "Graph",
    "Loop",
    "Node",
    "Options",
    "Stop",
    "Task",
    "Vertex",
    "event",
    "loop",
    "takes_context",
    "task",
]

CHECKPOINTS = ("sync", "async", "none", "auto")
_NAME_LENGTH_MAX = 100
#: In names of tasks; what is made of them.
_RESERVED = "/~[]"
#: Deeper arguments are a mistake.
_DEPTH_MAX = 100


@dataclass(frozen=True)
class Options:
    """The annotations of a task; see `task` for what they mean."""

    name: str | None = None
    deterministic: bool = False
    checkpoint: str = "auto"
    rollback: Callable[..., Any] | None = None
    external: bool = False
    idempotency_key: bool | str = False
    verify: Callable[..., Any] | None = None
    ranks: int | str | None = None
    on: int | str | None = None
    retries: int = 0
    backoff_s: float = 1.0
    timeout_s: float | None = None
    catch_exceptions: bool = False

    def __post_init__(self) -> None:
        where = f"task {self.name!r}" if self.name else "task"
        if self.name is not None:
            _check_name(self.name)
        if self.checkpoint not in CHECKPOINTS:
            raise ValueError(
                f"checkpoint of {where} must be one of {', '.join(CHECKPOINTS)}, "
                f"not {self.checkpoint!r}"
            )
        for option in ("deterministic", "external", "catch_exceptions"):
            value = getattr(self, option)
            if not isinstance(value, bool):
                raise TypeError(f"{option} of {where} must be True or False, not {value!r}")
        for option in ("rollback", "verify"):
            value = getattr(self, option)
            if value is not None and not callable(value):
                raise TypeError(f"{option} of {where} must be a function, not {value!r}")
        if isinstance(self.ranks, bool) or not (
            self.ranks is None
            or self.ranks == "all"
            or (isinstance(self.ranks, int) and self.ranks > 0)
        ):
            raise ValueError(f"ranks of {where} must be 'all' or at least 1, not {self.ranks!r}")
        if isinstance(self.on, bool) or not (
            self.on in (None, "any", "actor") or (isinstance(self.on, int) and self.on >= 0)
        ):
            raise ValueError(f"on of {where} must be 'any' or a rank, not {self.on!r}")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise ValueError(f"retries of {where} must be 0 or more, not {self.retries!r}")
        if not _is_number(self.backoff_s) or not 0 <= self.backoff_s < math.inf:
            raise ValueError(f"backoff_s of {where} must be 0 or more, not {self.backoff_s!r}")
        if self.timeout_s is not None and not (
            _is_number(self.timeout_s) and 0 < self.timeout_s < math.inf
        ):
            raise ValueError(f"timeout_s of {where} must be more than 0, not {self.timeout_s!r}")
        if not isinstance(self.idempotency_key, (bool, str)) or self.idempotency_key == "":
            raise ValueError(
                f"idempotency_key of {where} must be True or a text, not {self.idempotency_key!r}"
            )
        if self.external and self.rollback is not None:
            raise ValueError(
                f"{where}: external=True says that the effect cannot be undone, and rollback= how "
                "it is: give one of them"
            )
        if not self.external:
            for option in ("verify", "idempotency_key"):
                if getattr(self, option):
                    raise ValueError(f"{where}: {option} is about an effect, so external=True")
        if self.external and self.checkpoint in ("none", "async"):
            raise ValueError(
                f"{where}: what an external effect returned is always durable before anyone uses "
                f"it, so checkpoint={self.checkpoint!r} contradicts external=True; leave it out"
            )
        if self.rollback is not None and self.timeout_s is not None:
            raise ValueError(
                f"{where}: a call that took too long goes on in its thread and cannot be undone: "
                "timeout_s contradicts rollback"
            )
        if self.external and self.ranks is not None:
            raise ValueError(
                f"{where}: an external effect is of one process, so ranks contradicts external=True"
            )


        if self.on is not None:
            for option, why in (
                ("ranks", "a gang has ranks of its own"),
                ("timeout_s", "what is called elsewhere cannot be left alone"),
                ("external", "whether an effect was done its own process has to know"),
                ("rollback", "what is undone has to be over, also where it ran"),
            ):
                if getattr(self, option):
                    raise ValueError(f"{where}: {why}, so {option} contradicts on={self.on!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def task(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Make a function a task: ``@task`` or ``@task(checkpoint="sync", ...)``.

    Parameters
    ----------
    function : callable
        Of a module, not a lambda. A parameter named ``ctx`` is given a `TaskContext`. What it
        returns is the task's value; where that is a node, the workflow goes on with its graph
        instead (a *continuation*). The graph may have refs in it that came with the arguments; one
        that goes on from it must have none (in a `loop` each turn may). It must not change its
        arguments: others may use them.
    name : str, optional
        The function's own where it is None.
    deterministic : bool, default False
        The same arguments give the same value. A lost value is then computed anew, and must have
        the hash that was recorded; one of a task that is not deterministic is another value, and
        what was made from the lost one is undone and made anew.
    checkpoint : {"auto", "sync", "async", "none"}
        "sync": the value is durable before anyone uses it. "async": it is written meanwhile.
        "none": it is not. "auto": by what it costs to compute it again and to write it, and
        wherever an effect or a continuation needs it to be durable.
    rollback : callable, optional
        Undoes what the task did to the world; called with the task's arguments (and ``ctx``)
        before the task runs again, or when it was cut off, and so may have done nothing yet; what
        was made from it is undone before. It may be called again where it was cut off itself. A
        process that was taken for silent, not dead, and wakes up may do after it what it was about
        to do. Such a task runs where the journal is, at the rank that leads.
    external : bool, default False
        The task has an effect that cannot be undone. It is released only when its intent and all
        that it depends on can no longer become another. It runs where the journal is as well.
    idempotency_key : bool or str, default False
        Whether the outside does nothing for a key that it has seen (``ctx.idempotency_key``, made
        from the workflow and the task, or this text); then the effect is called again after a
        crash.
    verify : callable, optional
        Asks the outside whether the effect was done; called with the task's arguments (and
        ``ctx``). Returns True, `Done(value)` or False.
    ranks : int or "all", optional
        A *gang*: that many ranks run the function together, on ``ctx.comm``.
    on : int or "any", optional
        Where it runs: on this rank, or on one that has little to do; on another where that is dead.
        Without it, where the journal is. Without ranks it is in vain. ("actor": where that lives.)
    retries : int, default 0
        How often it is called again after an exception.
    backoff_s : float, default 1.0
        The wait before the first of them, in seconds; twice as long before each next one.
    timeout_s : float, optional
        How long one call may take, in seconds. The call itself goes on in its thread, unheard. Of
        a gang, what each collective of ``ctx.comm`` may wait; who has not returned by then, and a
        little later, cannot be called back, so the workflow ends.
    catch_exceptions : bool, default False
        The value is ``(value, None)`` or ``(None, exception)``; the workflow does not fail.

    Raises
    ------
    TypeError, ValueError
        An annotation is wrong, or contradicts another.
    """
    known = {one.name for one in fields(Options)}
    if unknown := sorted(set(options) - known):
        raise TypeError(f"task has no option {unknown[0]!r}; there are {', '.join(sorted(known))}")
    if function is None:
        return functools.partial(_make_task, options=Options(**options))
    return _make_task(function, Options(**options))


def _make_task(function: Callable[..., Any], options: Options) -> Task:
    if isinstance(function, Task):
        return function.options(**{f.name: getattr(options, f.name) for f in fields(options)})
    if not callable(function):
        raise TypeError(f"task must be given a function, not {function!r}")
    return Task(function, options)


class Task(Named):
    """A function with its annotations; made by `task`. Calling it calls the function.

    Attributes
    ----------
    function : callable
    annotations : Options
    name : str
    """

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.annotations = options
        self.name = options.name or str(getattr(function, "__name__", type(function).__name__))
        try:
            self.signature: inspect.Signature | None = inspect.signature(function)
        except (TypeError, ValueError):  # some of those that are written in C
            self.signature = None
        self.wants_context = takes_context(function)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.function(*arguments, **keywords)

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    def options(self, **changes: Any) -> Task:
        """Return the same task with other annotations."""
        return Task(self.function, replace(self.annotations, **changes))

    def bind(self, *arguments: Any, **keywords: Any) -> Node:
        """Make a node: a call of the task, once its arguments are there.

        Raises
        ------
        TypeError
            The function does not take these arguments.
        """
        if self.signature is not None:
            given = dict(keywords)
            if self.wants_context:
                if "ctx" in given:
                    raise TypeError(f"{self.name}: ctx is given by the workflow")
                given["ctx"] = None
            try:
                self.signature.bind(*arguments, **given)
            except TypeError as error:
                raise TypeError(f"{self.name}: {error}") from None
        return Node(self, arguments, keywords)

    @functools.cached_property
    def code(self) -> str:
        """A hash of what the function does, as far as it stands in its own code."""
        return code_hash(self.function)

    def __reduce__(self) -> Any:
        reference = reference_to(self.function)
        return _load_task, (reference, self.annotations)


def takes_context(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter named ``ctx``."""
    try:
        return "ctx" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


class Node:
    """A call of a task, or an event, or a loop, in a graph. Immutable.

    Attributes
    ----------
    task : Task or Event or Loop
    arguments, keywords
        Of the call; may have nodes in them.
    before : tuple of Node
        What has to be done first, though its value is not used.
    name : str
        Of the task, if not another was given.
    """

    __slots__ = ("arguments", "before", "keywords", "name", "task")

    def __init__(
        self,
        task: Task | Event | Loop,
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
        before: Sequence[Node] = (),
        name: str | None = None,
    ) -> None:
        self.task = task
        self.arguments = tuple(arguments)
        self.keywords = dict(keywords or {})
        self.before = tuple(before)
        self.name = name or task.name

    def after(self, *nodes: Node) -> Node:
        """Return the same node, which also waits for others to be done (a control edge)."""
        for node in nodes:
            if not isinstance(node, Node):
                raise TypeError(f"after takes nodes, not {node!r}")
        return Node(
            self.task, self.arguments, self.keywords, (*self.before, *nodes), self.name
        )

    def named(self, name: str) -> Node:
        """Return the same node under another name."""
        _check_name(name)
        return Node(self.task, self.arguments, self.keywords, self.before, name)

    def __repr__(self) -> str:
        return f"<node {self.name}>"


@dataclass(frozen=True)
class Event:
    """What a node waits for that comes from outside; made by `event`."""

    key: str
    name: str
    annotations: Options = Options(checkpoint="sync")
    wants_context: bool = False

    @property
    def code(self) -> str:
        return ""


def event(key: str, name: str | None = None) -> Node:
    """Make a node that waits for an event; its value is what was sent with it.

    Parameters
    ----------
    key : str
        Which; see `Workflow.send`. Events of one key are given out in the order in which they
        came, one to each node that waits for it.
    """
    if not isinstance(key, str) or not key:
        raise ValueError(f"key of an event must be a text, not {key!r}")
    if name is None:
        text = "".join(c if c.isprintable() and c not in _RESERVED else "_" for c in key)
        name = f"event:{text}"[:_NAME_LENGTH_MAX]
    return Node(Event(key, _check_name(name)))


@dataclass(frozen=True)
class Loop:
    """A task that is called again and again on its own value; made by `loop`."""

    body: Task
    times: int
    every: int
    name: str

    @property
    def annotations(self) -> Options:
        return self.body.annotations

    @property
    def wants_context(self) -> bool:
        return self.body.wants_context

    @property
    def code(self) -> str:
        return self.body.code


@dataclass(frozen=True)
class Stop:
    """What the body of a `loop` returns to end it early, with this value."""

    value: Any = None


def loop(body: Task, state: Any, times: int, every: int = 1, name: str | None = None) -> Node:
    """Make a node that calls ``body(state, i)`` for i = 0, 1, ...; its value is the last state.

    Only the newest states are kept, in memory and on disk, however long it is.

    Parameters
    ----------
    body : Task
        Returns the next state, `Stop(state)`, or a node whose value is the next state.
    state : object or Node
        The first one.
    times : int
        How often, at the most.
    every : int, default 1
        Each so many states are checkpointed, as the body's annotation says; the last one always.
    """
    if not isinstance(body, Task):
        raise TypeError(f"body of a loop must be a task, not {body!r}")
    if isinstance(times, bool) or not isinstance(times, int) or times < 0:
        raise ValueError(f"times of a loop must be 0 or more, not {times!r}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every of a loop must be 1 or more, not {every!r}")
    if body.annotations.catch_exceptions:
        raise ValueError(f"{body.name}: the body of a loop cannot have catch_exceptions")
    return Node(Loop(body, times, every, _check_name(name or body.name)), (state,))


def _check_name(name: str) -> str:
    if (
        not isinstance(name, str)
        or not name
        or len(name) > _NAME_LENGTH_MAX
        or not name.isprintable()
        or any(c in _RESERVED for c in name)
    ):
        raise ValueError(
            f"name must be a text of 1 to {_NAME_LENGTH_MAX} characters without / ~ [ ], "
            f"not {name!r}"
        )
    return name


# A graph with identifiers


@dataclass
class Vertex:
    """A node of a graph that runs.

    Attributes
    ----------
    id : str
        Unique in the workflow, and the same whenever it runs.
    node : Node
    inputs : tuple of str
        The identifiers of what it waits for, each once: arguments first.
    needs : tuple of str
        Those of them whose values it uses.
    """

    id: str
    node: Node
    inputs: tuple[str, ...]
    needs: tuple[str, ...] = ()
    references: dict[int, str] = field(default_factory=dict, repr=False)

    def call(self, value_of: Callable[[str], Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments with values in the place of nodes."""
        if not self.inputs:
            return list(self.node.arguments), dict(self.node.keywords)

        def put(one: Any) -> Any:
            if isinstance(one, Node):
                return value_of(self.references[id(one)])
            if isinstance(one, (list, tuple)) and any(_has_nodes(part) for part in one):
                parts = [put(part) for part in one]
                if hasattr(one, "_fields"):
                    return type(one)(*parts)
                return parts if isinstance(one, list) else tuple(parts)
            if isinstance(one, dict) and any(_has_nodes(part) for part in one.values()):
                return {key: put(part) for key, part in one.items()}
            return one

        return (
            [put(one) for one in self.node.arguments],
            {key: put(one) for key, one in self.node.keywords.items()},
        )


@dataclass
class Graph:
    """All nodes that an output needs, with identifiers, in an order in which they can run."""

    output: str
    vertices: dict[str, Vertex]

    @classmethod
    def of(cls, node: Node, prefix: str = "") -> Graph:
        """Walk a graph.

        Raises
        ------
        TypeError
            It is no node.
        WorkflowError
            It has a cycle, or is nested too deeply.
        """
        if not isinstance(node, Node):
            raise TypeError(f"a workflow runs a node (task.bind(...)), not {node!r}")
        names: dict[str, int] = {}
        done: dict[int, str] = {}
        vertices: dict[str, Vertex] = {}
        # Without recursion: a chain of tasks may be longer than Python's stack.
        open_nodes: dict[int, None] = {}
        stack: list[tuple[Node, list[Node], Iterator[Node]]] = []

        def enter(one: Node) -> None:
            open_nodes[id(one)] = None
            needs = _arguments_of(one)
            stack.append((one, needs, iter([*needs, *one.before] if one.before else needs)))

        enter(node)
        while stack:
            one, needs, rest = stack[-1]
            for child in rest:
                if id(child) in open_nodes:
                    raise WorkflowError(
                        f"the graph has a cycle: {child.name} waits for itself "
                        f"({' <- '.join(entry[0].name for entry in stack)} <- {child.name})"
                    )
                if id(child) not in done:
                    enter(child)
                    break
            else:
                stack.pop()
                del open_nodes[id(one)]
                count = names[one.name] = names.get(one.name, 0) + 1
                identifier = prefix + (one.name if count == 1 else f"{one.name}~{count}")
                done[id(one)] = identifier
                references = {id(child): done[id(child)] for child in needs}
                uses = tuple(dict.fromkeys(references.values()))
                inputs = uses
                if one.before:
                    references.update((id(child), done[id(child)]) for child in one.before)
                    inputs = tuple(dict.fromkeys(references.values()))
                vertices[identifier] = Vertex(identifier, one, inputs, uses, references)
        return cls(done[id(node)], vertices)


def _has_nodes(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Node):
        return True
    if depth > _DEPTH_MAX:
        raise WorkflowError("arguments are nested too deeply, or contain themselves")
    if isinstance(value, (list, tuple)):
        return any(_has_nodes(one, depth + 1) for one in value)
    if isinstance(value, dict):
        return any(_has_nodes(one, depth + 1) for one in value.values())
    return False


def _arguments_of(node: Node) -> list[Node]:
    found: list[Node] = []
    _look(node.arguments, 0, found, node)
    if node.keywords:
        _look(node.keywords.values(), 0, found, node)
    return found


def _look(values: Iterable[Any], depth: int, found: list[Node], node: Node) -> None:
    """Find the nodes among values, and in those."""
    for value in values:
        if isinstance(value, Node):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            if depth >= _DEPTH_MAX:
                raise WorkflowError(
                    f"the arguments of {node.name} are nested too deeply, or contain themselves"
                )
            _look(value.values() if isinstance(value, dict) else value, depth + 1, found, node)


def _load_task(reference: tuple[str, str, str | None], options: Options) -> Task:
    return Task(find_function(reference), options)
