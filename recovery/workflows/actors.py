"""Actors: objects that live on a rank, as a chain of versions.

A version is a value like any other: what `checkpoint` returned, or an older checkpoint and the
calls since. So a call is a task, from one version to a result and the next one, and all that holds
of tasks holds of it. That the object itself stays on a rank, and is called where it is, saves
making it anew; it counts for nothing. A rank finds the object of a version, or makes one.
"""

from __future__ import annotations

import collections
import copy
import copyreg
import inspect
import itertools
import pickle
import reprlib
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hopcoll.errors import WorkflowError
from hopcoll.objects import ObjectRef
from recovery.workflows import values
from recovery.workflows.context import TaskContext
from recovery.workflows.graph import Node, Options, Task, takes_context
from recovery.workflows.names import Named, find_function, reference_to

__all__ = ["Actor", "ActorClass", "Called", "actor", "actor_of"]

#: Objects that a rank keeps, of all workflows; the oldest goes.
_LIVE_MAX = 256
#: So many parts of a value are looked at, so deep, for the one that cannot be copied.
_PARTS_MAX = 100_000
_DEPTH_MAX = 100
#: Of a path, or of another's error, in a message.
_TEXT_MAX = 200
#: `deepcopy` takes them as they are.
_ATOMS = frozenset(
    {types.FunctionType, types.BuiltinFunctionType, types.CodeType, property, weakref.ref}
    | {bool, int, float, complex, str, bytes, type(None), pickle.PickleBuffer}
)


@dataclass(frozen=True)
class Actor:
    """A version of an actor, as a value.

    Attributes
    ----------
    kind : tuple
        Its class, by name.
    version : int
        How many calls it has seen.
    name : str
        Of this version: the attempt that made it.
    every : int
    state : object
        What `checkpoint` returned, at this version or an earlier one.
    calls : tuple of (str, tuple, dict)
        The calls since.
    """

    kind: tuple[str, str, str | None]
    version: int
    name: str
    every: int
    state: Any
    calls: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = ()


class Called(NamedTuple):
    """What a call of an actor gives: what the method returned, and the actor as it was then."""

    value: Any
    actor: Actor


def actor_of(value: Any) -> Actor | None:
    """The actor of a value: one itself, or of a call."""
    one = value.actor if isinstance(value, Called) else value
    return one if isinstance(one, Actor) else None


class _Live:
    """The objects of this rank, by the version at which they are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[Any, str | None]] = {}

    def take(self, version: Actor) -> Any:
        """Return the object of a version, which it has from now on to be kept under another; None
        where it is not here, or was made by an attempt of which nothing counts."""
        with self._lock:
            thing, known = self._objects.pop(version.name, (None, None))
        return thing if known is not None and known == _digest(version) else None

    def keep(self, version: Actor, thing: Any) -> None:
        with self._lock:
            self._objects[version.name] = thing, _digest(version)
            while len(self._objects) > _LIVE_MAX:
                del self._objects[next(iter(self._objects))]


_LIVE = _Live()


def _digest(version: Actor) -> str | None:
    try:
        return values.fingerprint((version.state, version.calls))
    except Exception:
        return None  # then it is made anew each time


def _find(kind: tuple[str, str, str | None]) -> Any:
    return find_function(kind)


def _bring(version: Actor, ctx: TaskContext) -> Any:
    """Return an object at a version."""
    thing = _LIVE.take(version)
    if thing is None:
        kind = _find(version.kind)
        thing = kind.__new__(kind)
        # Copies: others may begin at this version as well.
        what = f"the state of actor {version.kind[1]}"
        state, calls = _copied((version.state, version.calls), what)
        thing.restore(state)
        for method, arguments, keywords in calls:
            _call_method(thing, method, arguments, keywords, ctx)
    return thing


def _call_method(
    thing: Any, method: str, arguments: Sequence[Any], keywords: Mapping[str, Any], ctx: TaskContext
) -> Any:
    """Call a method, with arrays in the place of references."""
    function = getattr(thing, method)
    extra = {"ctx": ctx} if takes_context(function) else {}
    given = [ctx.get(one) if isinstance(one, ObjectRef) else one for one in arguments]
    named = {k: ctx.get(v) if isinstance(v, ObjectRef) else v for k, v in keywords.items()}
    return function(*given, **named, **extra)


def _name(ctx: TaskContext) -> str:
    return f"{ctx.uuid}/{ctx.task_id}/{ctx.attempt}"


def _spawn(
    kind: tuple[str, str, str | None],
    every: int,
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
    ctx: TaskContext,
) -> Actor:
    """Make an actor."""
    thing = _call_method(_Maker(_find(kind)), "make", arguments, keywords, ctx)
    version = Actor(kind, 0, _name(ctx), every, _state_of(thing, kind))
    _LIVE.keep(version, thing)
    return version


def _state_of(thing: Any, kind: tuple[str, str, str | None]) -> Any:
    """What `checkpoint` returns, and nothing that the object goes on to change."""
    return _copied(thing.checkpoint(), f"the state of actor {kind[1]}")


def _copied(value: Any, what: str) -> Any:
    """Return a copy of a value.

    Raises
    ------
    WorkflowError
        It can neither be copied nor be written.
    """
    try:
        return _copy(value)
    except Exception as error:
        found = _culprit(value)
        if found is None:
            why = f"{_short(str(error))} (which part of it that is could not be found)"
        else:
            path, part, own = found
            kind = f"{type(part).__module__}.{type(part).__qualname__}"
            why = f"{_short(path) or 'it'} is a {kind}: {_short(str(own))}"
        raise WorkflowError(
            f"{what} cannot be copied: {why}; leave that out, or give it what pickle wants "
            "(__reduce__)"
        ) from error


def _copy(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:
        # As it will be stored: what pickle can write need not be what deepcopy can (tensors that
        # have a history).
        return pickle.loads(pickle.dumps(value, protocol=5))


def _short(text: str) -> str:
    half = _TEXT_MAX // 2
    return text if len(text) <= _TEXT_MAX else f"{text[:half]}...{text[-half:]}"


def _culprit(value: Any) -> tuple[str, Any, Exception] | None:
    """Which part of a value it is that cannot be copied, where it is, and its own error.

    The nearest one: parts are asked one by one how they are made, each once, and none is copied.
    So it takes no longer where parts refer to each other. Not found is what is very deep, or
    behind very much else.
    """
    second: tuple[str, Any, Exception] | None = None
    seen: dict[int, Any] = {}  # what is kept has its number for itself
    ahead: collections.deque[tuple[str, Any, int]] = collections.deque([("", value, 0)])
    left = _PARTS_MAX
    while ahead:
        path, part, depth = ahead.popleft()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        try:
            parts = list(itertools.islice(_parts(part), left if depth < _DEPTH_MAX else 0))
        except Exception as error:
            if not hasattr(type(part), "__deepcopy__"):
                return path, part, error
            second = second or (path, part, error)
            continue
        left -= len(parts)
        ahead.extend((path + name, one, depth + 1) for name, one in parts if not _is_atom(one))
    return second


def _is_atom(value: Any) -> bool:
    return type(value) in _ATOMS or isinstance(value, type)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value, as those see them who copy it, and what each is called.

    Raises
    ------
    Exception
        It cannot be copied, whatever is in it.
    """
    if type(value) in (list, tuple, set, frozenset):
        yield from ((f"[{index}]", one) for index, one in enumerate(value))
        return
    if type(value) is dict:
        yield from _entries(value.items())
        return
    reduce = copyreg.dispatch_table.get(type(value))
    made = value.__reduce_ex__(5) if reduce is None else reduce(value)
    if isinstance(made, str):
        return
    _, arguments, state, items, entries = (*made, None, None, None)[:5]
    for attributes in state if isinstance(state, tuple) else (state,):
        if isinstance(attributes, dict):
            yield from ((f".{_short(str(name))}", one) for name, one in attributes.items())
        else:
            yield "", attributes
    yield from ((f"[{index}]", one) for index, one in enumerate(items or ()))
    yield from _entries(entries or ())
    yield from (("", one) for one in arguments)


def _entries(entries: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    for key, one in entries:
        name = f"[{reprlib.repr(key)}]"
        yield name, one
        yield name, key


class _Maker:
    def __init__(self, kind: Any) -> None:
        self.make = kind


def _call(
    who: Any, method: str, arguments: Sequence[Any], keywords: Mapping[str, Any], ctx: TaskContext
) -> Called:
    """Call a method of an actor."""
    before = actor_of(who)
    if before is None:
        raise TypeError(f"{method} is called on {who!r}, which is no actor, and no call of one")
    number = before.version + 1
    after = replace(before, version=number, name=_name(ctx))
    is_due = number % before.every == 0
    if not is_due:  # what it is given it may change
        given = (method, tuple(arguments), dict(keywords))
        call = _copied(given, f"what {before.kind[1]}.{method} is called with")
        after = replace(after, calls=(*before.calls, call))
    thing = _bring(before, ctx)
    value = _call_method(thing, method, arguments, keywords, ctx)
    if is_due:
        after = replace(after, state=_state_of(thing, before.kind), calls=())
    _LIVE.keep(after, thing)
    return Called(value, after)


def actor(kind: Any = None, *, every: int = 1, **options: Any) -> Any:
    """Make a class one of actors: ``@actor`` or ``@actor(deterministic=True, every=10)``.

    Parameters
    ----------
    kind : type
        Of a module. It has `checkpoint()`, which returns what `restore(state)` makes of an object
        without `__init__` what this one is. References that a method is given come as arrays; a
        parameter named ``ctx`` is given a `TaskContext`.
    every : int, default 1
        Each so many calls a checkpoint; where the object is lost, the calls since are made again.
        More than 1 wants ``deterministic=True``, and methods without ``ctx``.
    **options
        Of its tasks, as for `task`: ``deterministic`` (all methods), ``checkpoint``, ``retries``
        and others. It lives on any rank (``on="any"``), and moves where that is dead.

    Raises
    ------
    TypeError, ValueError
        An option is wrong, or the class lacks a method.
    """
    if kind is None:
        return lambda one: actor(one, every=every, **options)
    return ActorClass(kind, every, Options(**{"on": "any", **options}))


class ActorClass(Named):
    """A class of actors; made by `actor`."""

    def __init__(self, kind: Any, every: int, options: Options) -> None:
        if not isinstance(kind, type):
            raise TypeError(f"actor must be given a class, not {kind!r}")
        for method in ("checkpoint", "restore"):
            if not callable(getattr(kind, method, None)):
                raise TypeError(f"actor {kind.__name__} has no method {method}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every of actor {kind.__name__} must be 1 or more, not {every!r}")
        if every > 1 and not options.deterministic:
            raise ValueError(
                f"actor {kind.__name__}: every={every} makes lost calls again, which must give the "
                "same then: annotate it with deterministic=True"
            )
        if every > 1:
            for name, method in inspect.getmembers(kind, inspect.isfunction):
                if not name.startswith("__") and takes_context(method):
                    raise ValueError(
                        f"actor {kind.__name__}: every={every} makes lost calls again, in the "
                        f"context of another task, and {name} has a parameter ctx: take every=1, "
                        "or give it as arguments what it needs"
                    )
        self.function = kind
        self.every = every
        self.annotations = options

    def options(self, *, every: int | None = None, **changes: Any) -> ActorClass:
        """Return the same class with other annotations, for calls of one kind as well."""
        return ActorClass(
            self.function, self.every if every is None else every,
            replace(self.annotations, **changes),
        )  # fmt: skip

    def bind(self, *arguments: Any, **keywords: Any) -> Node:
        """Make a node whose value is a new actor, an `Actor`."""
        kind = self.function
        task = Task(_spawn, replace(self.annotations, name=kind.__name__))
        return task.bind(reference_to(kind), self.every, arguments, keywords)

    def call(self, who: Any, method: str, *arguments: Any, **keywords: Any) -> Node:
        """Make a node that calls a method; its value is `Called`.

        Parameters
        ----------
        who : Actor or Called or Node
            The version that is called: a value, or a node of one, or of a call before.
        method : str

        Raises
        ------
        TypeError
            The class has no such method, or `who` is none.
        """
        kind = self.function
        if not callable(getattr(kind, method, None)):
            raise TypeError(f"actor {kind.__name__} has no method {method!r}")
        if not isinstance(who, Node) and actor_of(who) is None:
            raise TypeError(f"{kind.__name__}.{method} is called on {who!r}, which is no actor")
        options = replace(self.annotations, name=f"{kind.__name__}.{method}")
        if options.on == "any" and not options.external:
            options = replace(options, on="actor")
        return Task(_call, options).bind(who, method, arguments, keywords)
