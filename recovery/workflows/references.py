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
    ReductionError,
    TransferTimeoutError,
    WorkflowError,
)
from hopcoll.objects import ObjectRef
from recovery.workflows.post import RankGoneError

if TYPE_CHECKING:
    from hopcoll.objects import Objects

__all__ = ["GET_S", "UNKNOWN", "Found", "References", "arrays_for", "key_of", "refs_in"]

#: In the place of an era: nobody knows of the object, so it is no workflow's to make it again.
UNKNOWN = -1
#: After so long a get is called anew: its rank may have lost what it was told meanwhile.
GET_S = 20.0
#: In the text of a `ReductionError`: its input is a reduction that failed. All others are as wrong
#: the next time.
_OF_INPUT = "cannot be made either"


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
        Whether one of them would be another ref if the task ran again, or the value would come of
        other inputs: of a reduction of the first of many, or of one that has such a one in it.
    firsts : list of (list of str, list of str)
        Of each reduction that it made: the keys of the inputs that were given and were taken. Of
        one that is only in others, where that is still known.
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
    is_over : callable
        ``is_over()``: whether nobody hears of this attempt any more, and another one may have begun
        that puts under the same names.

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
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._objects = objects
        self._rank = rank
        self._name = name
        self._rebuild = rebuild
        self._delete = delete
        self._carries = carries
        self._era = era
        self._is_over = is_over
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._made: dict[ObjectRef, tuple[int, int, str]] = {}
        self._reductions: dict[ObjectRef, tuple[Sequence[ObjectRef], Any, int | None]] = {}
        #: Their refs as `reduce` gave them: among the inputs of another, they do not have theirs.
        self._full: dict[ObjectRef, ObjectRef] = {}
        self._redone: dict[ObjectRef, ObjectRef] = {}
        self._results: dict[ObjectRef, tuple[np.ndarray, tuple[ObjectRef, ...]]] = {}
        self._told: dict[ObjectRef, tuple[ObjectRef, ...]] = {}  # contributors, of reductions
        self.void: Exception | None = None

    def put(self, value: Any) -> ObjectRef:
        """Put an array into this rank's memory."""
        name = None if self._name is None else ObjectRef(f"{self._name} {next(self._count)}")
        ref = None
        while ref is None:
            if self._is_over():
                raise RankGoneError("who wanted this is gone, and may have it made elsewhere")
            try:
                ref = self._objects.put(value, name)
            except ObjectExistsError:
                # It ran before, and this one was not lost. A ref that says that it existed is what
                # tells a loss from an object that is still to come: only `put` gives one.
                assert name is not None
                self._objects.delete(name)
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
                found = self._objects.get(ref, timeout_s=GET_S)
                if ref in self._reductions:
                    # Of this result, whatever becomes of it: another might have other inputs.
                    taken = self._objects.contributors(ref, timeout_s=GET_S)
                    self._results[ref] = found, taken
                return found
            except TransferTimeoutError:
                continue
            except (ObjectLostError, ObjectDeletedError, ReductionError) as error:
                self._recover(ref, error)

    def reduce(
        self, refs: Iterable[ObjectRef], op: Any = None, count: int | None = None
    ) -> ObjectRef:
        """Have an object made of others, in the tree of ranks that have them."""
        given = [self._final(ref) for ref in refs]
        ref = self._reduce(given, op, count)
        with self._lock:
            self._reductions[ref] = (given, op, count)
            self._full[ref] = ref
        return ref

    def _reduce(self, refs: Sequence[ObjectRef], op: Any, count: int | None) -> ObjectRef:
        if op is None:
            return self._objects.reduce(refs, count=count)
        return self._objects.reduce(refs, op, count)

    def contributors(self, ref: ObjectRef) -> tuple[ObjectRef, ...]:
        """Return which inputs a reduction has taken, when that is final."""
        taken = self._contributors(ref)
        with self._lock:
            self._told[self._final(ref)] = taken
        return taken

    def _contributors(self, ref: ObjectRef) -> tuple[ObjectRef, ...]:
        while True:
            ref = self._final(ref)
            if ref in self._results:
                return self._results[ref][1]
            try:
                return self._objects.contributors(ref, timeout_s=GET_S)
            except TransferTimeoutError:
                continue
            except (ObjectLostError, ObjectDeletedError, ReductionError) as error:
                self._recover(ref, error)

    def _recover(self, ref: ObjectRef, error: Exception) -> None:
        """Have what is lost made again, or raise."""
        made = self._reductions.get(ref)
        if made is None:
            lost = [ref]
        else:
            # The error names one input; where it is the result itself, all inputs may be there.
            lost = [one for one in made[0] if f"its input {one!r} " in str(error)]
        ours = [one for one in lost if one in self._reductions]
        if isinstance(error, ReductionError) and not (ours and _OF_INPUT in str(error)):
            raise error
        if {ref, *ours} & self._made.keys():
            self.void = error
            raise error
        for one in ours:
            if one not in self._redone:
                self._reduce_again(one)
            self._contributors(one)  # of its own inputs some may be lost as well
        era = self._again([one for one in lost if one not in self._reductions])
        if era is None:
            self.void = error
            raise error
        if era == UNKNOWN:
            raise error
        self._era = max(self._era, era)
        if made is not None:
            self._reduce_again(ref)

    def _reduce_again(self, ref: ObjectRef) -> None:
        refs, op, count = self._reductions[ref]
        given = [self._final(one) for one in refs]
        new = self._reduce(given, op, count)
        with self._lock:
            self._reductions[new] = (given, op, count)
            self._full[new] = new
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
        self._find_firsts(value, found)
        if self._redone and any(one in self._redone for one in refs_in(value)):
            value = self._replaced(value)
        found.refs = refs_in(value)
        for ref in found.refs:
            if ref in self._made:
                found.made[key_of(ref)] = self._made[ref]
                found.new |= self._name is None or ref.name is None
        return value, found

    def _find_firsts(self, value: Any, found: Found) -> None:
        """See which inputs the reductions took that a value comes of."""
        wanted = {self._final(one) for one in [*refs_in(value), *self._results]}
        took: dict[ObjectRef, Sequence[ObjectRef]] = {}
        for ref in [one for one in self._reductions if one in wanted]:
            taken = self._contributors(ref)
            took[self._final(ref)] = taken
            self._made.setdefault(self._final(ref), (self._rank, 0, ""))
        for ref, taken in self._told.items():  # whatever became of it
            if ref in self._reductions:
                took.setdefault(ref, taken)
        todo = list(took)
        for ref in todo:  # it grows by those that others took
            given, _, count = self._reductions[ref]
            found.new |= count is not None and count < len(given)
            known = took[ref] if ref in took else self._taken_by(ref)
            if known is not None:
                found.firsts.append(
                    ([key_of(one) for one in given], [key_of(one) for one in known])
                )
            inner = (self._full.get(one) for one in (given if known is None else known))
            todo += [one for one in inner if one is not None and one not in todo]

    def _taken_by(self, ref: ObjectRef) -> Sequence[ObjectRef] | None:
        """The same, where the result itself is used up, and may be lost since."""
        try:
            return self._objects.contributors(ref, timeout_s=GET_S)
        except (ObjectLostError, ObjectDeletedError, ReductionError, TransferTimeoutError):
            return None

    def _final(self, ref: ObjectRef) -> ObjectRef:
        while ref in self._redone:
            ref = self._redone[ref]
        return self._full.get(ref, ref)

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
        if self._is_over():  # what has names may be another attempt's by now
            keep = {ref for ref in self._made if ref.name is not None}
        for ref in [*self._made, *self._reductions]:
            if ref not in keep:
                self._delete(ref)
