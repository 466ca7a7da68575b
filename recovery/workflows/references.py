"""Refs in values: objects in the ranks' memory that a task puts, gets and adds up.

`References` is one attempt's view of the objects. It knows which of them the attempt made, and asks
the leader for what is lost: `recovery.workflows.lineage` says what becomes of that.
"""

from __future__ import annotations

import io
import itertools
import pickle
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from hopcoll.errors import (
    ObjectDeletedError,
    ObjectExistsError,
    ObjectLostError,
    TransferTimeoutError,
    WorkflowError,
)
from hopcoll.objects import ObjectRef

if TYPE_CHECKING:
    from hopcoll.objects import Objects

__all__ = ["UNKNOWN", "Found", "References", "arrays_for", "key_of", "refs_in"]

#: In the place of an era: nobody knows of the object, so it is no workflow's to make it again.
UNKNOWN = -1
#: After so long a get is called anew: its rank may have lost what it was told meanwhile.
_GET_S = 20.0


@dataclass
class Found:
    """What the leader has to know of the refs of a value.

    Attributes
    ----------
    refs : list of ObjectRef
        All that are in it.
    made : dict of str to (int, int, str)
        Of those that the attempt made, by key: the rank, the bytes, and their hash ("" if nobody
        asks for it).
    new : bool
        Whether one of them would be another ref if the task ran again.
    firsts : list of (list of str, list of str)
        Of each reduction that it made: the keys of the inputs that were given and were taken.
    """

    refs: list[ObjectRef] = field(default_factory=list)
    made: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    new: bool = False
    firsts: list[tuple[list[str], list[str]]] = field(default_factory=list)

    def text_of(self, value: Any) -> str | None:
        """By what a ref in a value counts, in a hash of that."""
        if not isinstance(value, ObjectRef):
            return None
        key = key_of(value)
        return f"ref {key} {self.made[key][2] if key in self.made else ''}"


def key_of(ref: ObjectRef) -> str:
    """The name of an object in a journal."""
    return ref._key.hex()


class _Finder(pickle.Pickler):
    """Goes through a value as pickle does; what it writes nobody reads."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=5, buffer_callback=lambda buffer: None)
        self.found: dict[ObjectRef, None] = {}

    def persistent_id(self, value: Any) -> None:
        if isinstance(value, ObjectRef):
            self.found[value] = None


def refs_in(value: Any) -> list[ObjectRef]:
    """Return all refs in a value, each once; of one that pickle cannot write, none."""
    if isinstance(value, ObjectRef):
        return [value]
    finder = _Finder()
    try:
        finder.dump(value)
    except Exception:
        return []
    return list(finder.found)


def arrays_for(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return a value with arrays in the place of its refs, for where there are no ranks."""
    if isinstance(value, ObjectRef):
        return arrays.get(key_of(value), value)
    if isinstance(value, (list, tuple)):
        parts = [arrays_for(one, arrays) for one in value]
        if hasattr(value, "_fields"):
            return type(value)(*parts)
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {key: arrays_for(one, arrays) for key, one in value.items()}
    return value


class References:
    """The objects, as one attempt of a task has them. Any thread of that attempt.

    Parameters
    ----------
    objects : Objects
    rank : int
    name : str or None
        Of the attempt, where its refs are to be the same whenever it runs.
    rebuild : callable
        ``rebuild(keys, era)`` has lost objects made again and returns the new era; None where they
        never will be what they were, and so this attempt is void; `UNKNOWN`.
    delete : callable
    carries : bool
        Whether there are refs in what it was called with.

    Attributes
    ----------
    void : ObjectLostError or ObjectDeletedError or None
        Why it comes to nothing.
    """

    def __init__(
        self,
        objects: Objects,
        rank: int,
        name: str | None,
        rebuild: Callable[[list[str], int], int | None],
        delete: Callable[[ObjectRef], None],
        *,
        carries: bool = False,
        era: int = 0,
    ) -> None:
        self._objects = objects
        self._rank = rank
        self._name = name
        self._rebuild = rebuild
        self._delete = delete
        self._carries = carries
        self._era = era
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._made: dict[ObjectRef, tuple[int, int, str]] = {}
        self._reductions: dict[ObjectRef, tuple[Sequence[ObjectRef], Any, int | None]] = {}
        self._redone: dict[ObjectRef, ObjectRef] = {}
        self._results: dict[ObjectRef, tuple[np.ndarray, tuple[ObjectRef, ...]]] = {}
        self.void: Exception | None = None

    def put(self, value: Any) -> ObjectRef:
        """Put an array into this rank's memory."""
        name = None if self._name is None else ObjectRef(f"{self._name} {next(self._count)}")
        try:
            ref = self._objects.put(value, name)
        except ObjectExistsError:
            # It ran before, and this one was not lost. A ref that says that it existed is what
            # tells a loss from an object that is still to come: only `put` gives one.
            assert name is not None
            self._objects.delete(name)
            ref = self._objects.put(value, name)
        digest = ""
        data = np.asarray(value)
        if name is not None:
            flat = np.ascontiguousarray(data).reshape(-1)
            hasher = xxhash.xxh3_64(f"{data.dtype.str}{data.shape}:".encode())
            hasher.update(flat.view(np.uint8).data if flat.nbytes else b"")
            digest = hasher.hexdigest()
        with self._lock:
            self._made[ref] = (self._rank, int(data.nbytes), digest)
        return ref

    def get(self, ref: ObjectRef | str) -> np.ndarray:
        """Return an object, which is made again where it is lost."""
        if isinstance(ref, str):
            ref = ObjectRef(ref)
        while True:
            ref = self._final(ref)
            if ref in self._results:
                return self._results[ref][0]
            try:
                found = self._objects.get(ref, timeout_s=_GET_S)
                if ref in self._reductions:
                    # Of this result, whatever becomes of it: another might have other inputs.
                    taken = self._objects.contributors(ref, timeout_s=_GET_S)
                    self._results[ref] = found, taken
                return found
            except TransferTimeoutError:
                continue
            except (ObjectLostError, ObjectDeletedError) as error:
                self._recover(ref, error)

    def reduce(
        self, refs: Iterable[ObjectRef], op: Any = None, count: int | None = None
    ) -> ObjectRef:
        """Have an object made of others, in the tree of ranks that have them."""
        given = [self._final(ref) for ref in refs]
        ref = self._reduce(given, op, count)
        with self._lock:
            self._reductions[ref] = (given, op, count)
        return ref

    def _reduce(self, refs: Sequence[ObjectRef], op: Any, count: int | None) -> ObjectRef:
        if op is None:
            return self._objects.reduce(refs, count=count)
        return self._objects.reduce(refs, op, count)

    def contributors(self, ref: ObjectRef) -> tuple[ObjectRef, ...]:
        """Return which inputs a reduction has taken, when that is final."""
        while True:
            ref = self._final(ref)
            if ref in self._results:
                return self._results[ref][1]
            try:
                return self._objects.contributors(ref, timeout_s=_GET_S)
            except TransferTimeoutError:
                continue
            except (ObjectLostError, ObjectDeletedError) as error:
                self._recover(ref, error)

    def _recover(self, ref: ObjectRef, error: Exception) -> None:
        """Have what is lost made again, or raise."""
        made = self._reductions.get(ref)
        if made is None:
            lost = [ref]
        else:
            # The error names one input; where it is the result itself, all inputs may be there.
            lost = [one for one in made[0] if f"its input {one!r} " in str(error)]
        if ref in self._made or (era := self._again(lost)) is None:
            self.void = error
            raise error
        if era == UNKNOWN:
            raise error
        self._era = max(self._era, era)
        if made is not None:
            new = self._reduce(*made)
            with self._lock:
                self._reductions[new] = made
                self._redone[ref] = new

    def _again(self, lost: Sequence[ObjectRef]) -> int | None:
        return self._rebuild([key_of(one) for one in lost], self._era) if lost else self._era

    def finish(self, value: Any) -> tuple[Any, Found]:
        """What the attempt returned: with the refs that count in the end, and what the leader has
        to know of them."""
        found = Found()
        with self._lock:
            idle = not (self._made or self._reductions)
        if idle and not self._carries:
            return value, found
        wanted = {self._final(one) for one in [*refs_in(value), *self._results]}
        for ref in [one for one in self._reductions if one in wanted]:
            taken = self.contributors(ref)
            last = self._final(ref)
            found.firsts.append(
                ([key_of(one) for one in last.inputs], [key_of(one) for one in taken])
            )
            self._made.setdefault(last, (self._rank, 0, ""))
        if self._redone and any(one in self._redone for one in refs_in(value)):
            value = self._replaced(value)
        found.refs = refs_in(value)
        for ref in found.refs:
            if ref in self._made:
                found.made[key_of(ref)] = self._made[ref]
                found.new |= self._name is None or ref.name is None
        return value, found

    def _final(self, ref: ObjectRef) -> ObjectRef:
        while ref in self._redone:
            ref = self._redone[ref]
        return ref

    def _replaced(self, value: Any) -> Any:
        named: list[ObjectRef] = []

        class Pickler(pickle.Pickler):
            def persistent_id(_, one: Any) -> int | None:
                if not isinstance(one, ObjectRef):
                    return None
                named.append(self._final(one))
                return len(named) - 1

        class Unpickler(pickle.Unpickler):
            def persistent_load(_, number: int) -> ObjectRef:
                return named[number]

        file = io.BytesIO()
        try:
            Pickler(file, protocol=5).dump(value)
        except Exception as error:
            raise WorkflowError(
                f"a value with refs must be one that pickle can write: {error}"
            ) from error
        file.seek(0)
        return Unpickler(file).load()

    def drop(self, kept: Found | None) -> None:
        """Delete what the attempt made and nobody was given."""
        keep = set() if kept is None else set(kept.refs)
        for ref in [*self._made, *self._reductions]:
            if ref not in keep:
                self._delete(ref)
