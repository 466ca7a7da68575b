"""The values of tasks: written and read, hashed by what they are, and kept from being changed.

A value goes through pickle (protocol 5); its arrays go beside it, not through it. Small ones are in
the journal itself; large ones are an HDF5 file of their own, written and checked as the shards of a
checkpoint are (`recovery.shards`): each array a dataset of bytes, and the pickled rest.
"""

from __future__ import annotations

import copyreg
import pickle
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import xxhash

from hopcoll.errors import CheckpointError, WorkflowError
from recovery import shards
from recovery.disk import Disk

__all__ = [
    "INLINE_BYTES_MAX", "Fingerprinter", "Packed", "Spares", "dumps", "fingerprint", "freeze",
    "pack", "read", "read_bytes", "unpack", "with_objects", "without_objects", "write",
]  # fmt: skip

#: Larger values have a file of their own.
INLINE_BYTES_MAX = 64 << 10
_DEPTH_MAX = 100
_SIMPLE = frozenset({bool, int, float, complex, str, type(None)})


@dataclass
class Packed:
    """A value on its way to the disk: nothing of it is shared with the task that made it."""

    data: bytes
    buffers: list[bytes | np.ndarray]
    refs: list[Any] = field(default_factory=list)  # whose objects are to be written with it

    @property
    def nbytes(self) -> int:
        return len(self.data) + sum(len(buffer) for buffer in self.buffers)

    @property
    def is_small(self) -> bool:
        return not self.buffers and len(self.data) <= INLINE_BYTES_MAX


class Spares:
    """Memory of values that were written, for the next ones. Thread-safe.

    The pages of new memory may cost ten times what the copy into them does, and the loop that saves
    its state would wait for them.
    """

    def __init__(self, nbytes_max: int = 256 << 20) -> None:
        self._nbytes_max = nbytes_max
        self._lock = threading.Lock()
        self._arrays: list[np.ndarray] = []

    def copy(self, data: np.ndarray) -> np.ndarray:
        """Return a copy of some bytes."""
        with self._lock:
            for place, array in enumerate(self._arrays):
                if len(array) == len(data):
                    del self._arrays[place]
                    break
            else:
                array = np.empty_like(data)
        np.copyto(array, data)  # without the GIL
        return array

    def give(self, packed: Packed) -> None:
        """Take the memory of a value that nobody will look at any more."""
        with self._lock:
            self._arrays += [one for one in packed.buffers if isinstance(one, np.ndarray)]
            while sum(map(len, self._arrays)) > self._nbytes_max:
                del self._arrays[0]


def pack(value: Any, what: str, spares: Spares | None = None) -> Packed:
    """Take a copy of a value, as bytes; into the memory of `spares`, where it has some.

    Raises
    ------
    WorkflowError
        It cannot be stored.
    """
    buffers: list[pickle.PickleBuffer] = []
    try:
        data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        nbytes = len(data) + sum(memoryview(buffer).nbytes for buffer in buffers)
        if nbytes <= INLINE_BYTES_MAX:
            return Packed(pickle.dumps(value, protocol=5) if buffers else data, [])
    except Exception as error:
        raise WorkflowError(
            f"{what} cannot be stored: {type(error).__name__}: {error}; return something that "
            'pickle can write, or annotate the task with checkpoint="none"'
        ) from error
    spares = spares or Spares(0)
    return Packed(data, [spares.copy(np.frombuffer(one.raw(), np.uint8)) for one in buffers])


def with_objects(packed: Packed, arrays: list[np.ndarray]) -> Packed:
    """Return a packed value with the arrays behind its refs, which nobody changes."""
    parts = [np.frombuffer(one, np.uint8) for one in packed.buffers]
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(
        (packed.data, parts, packed.refs, arrays), protocol=5, buffer_callback=buffers.append
    )
    return Packed(data, [np.frombuffer(one.raw(), np.uint8) for one in buffers])


def without_objects(value: Any) -> tuple[Any, list[tuple[Any, np.ndarray]]]:
    """Return the value, and its refs with their arrays, of what `with_objects` made."""
    data, parts, refs, arrays = value
    return pickle.loads(data, buffers=parts), list(zip(refs, arrays, strict=True))


def write(disk: Disk, path: Path, packed: Packed) -> dict[str, Any]:
    """Write a large value to a file of its own, durable but for its name; returns its record."""
    parts = [("pickle", packed.data), *((f"buffer{i}", b) for i, b in enumerate(packed.buffers))]
    datasets = [(name, np.frombuffer(part, np.uint8)) for name, part in parts]
    return shards.write_shard(
        disk, path, datasets, attributes={"hopcoll": "value of a task of a workflow"}
    )


def dumps(value: Any, what: str) -> bytes:
    """Return a value as bytes that `unpack` reads, whatever its size.

    Raises
    ------
    WorkflowError
        It cannot be stored.
    """
    try:
        return pickle.dumps(value, protocol=5)
    except Exception as error:
        raise WorkflowError(f"{what} cannot be stored: {type(error).__name__}: {error}") from error


def unpack(data: bytes) -> Any:
    """Return a small value."""
    return pickle.loads(data)


def read_bytes(folder: Path, name: str, shard: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file that was written from nothing else."""
    entry = shard["ranges"][-1]
    out = np.empty(entry["nbytes"], np.uint8)
    shards.read_range(folder / name, entry, out)
    return out.tobytes()


def read(folder: Path, name: str, shard: Mapping[str, Any], what: str) -> Any:
    """Read a large value back, and check every byte.

    Raises
    ------
    CheckpointCorruptError
        The file is not what was written.
    WorkflowError
        It cannot be read.
    """
    try:
        parts = []
        for entry in shard["ranges"]:
            out = np.empty(entry["nbytes"], np.uint8)
            if out.nbytes:
                shards.read_range(folder / name, entry, out)
            parts.append(out)
        return pickle.loads(parts[0].tobytes(), buffers=[part.data for part in parts[1:]])
    except CheckpointError:
        raise
    except Exception as error:
        raise WorkflowError(
            f"{what} cannot be read back: {type(error).__name__}: {error}"
        ) from error


def freeze(value: Any, depth: int = 0) -> Any:
    """Return a value whose arrays cannot be written to (views; the caller's stay as they are)."""
    kind = type(value)
    if kind in _SIMPLE:
        return value
    if kind is np.ndarray:
        if value.flags.writeable:
            value = value.view()
            value.flags.writeable = False
        return value
    if depth < _DEPTH_MAX:
        if kind is list or kind is tuple:
            parts = [freeze(one, depth + 1) for one in value]
            if all(map(_is, parts, value)):
                return value
            return parts if kind is list else tuple(parts)
        if kind is dict:
            changed = {key: freeze(one, depth + 1) for key, one in value.items()}
            return value if all(map(_is, changed.values(), value.values())) else changed
    return value


def _is(one: Any, other: Any) -> bool:
    return one is other


# Hashes


def fingerprint(value: Any, name: Callable[[Any], str | None] | None = None) -> str:
    """Return a hash of what a value is: equal for equal values, whoever made them and when.

    Pickled bytes will not do: they depend on which parts of a value are one and the same object,
    and on the order of sets.

    Parameters
    ----------
    value : object
    name : callable, optional
        Returns a text for what is hashed by it instead (nodes, functions), None for all else.

    Raises
    ------
    WorkflowError
        It has something in it that cannot be hashed.
    """
    if type(value) in _SIMPLE:
        return xxhash.xxh3_64_hexdigest(_simple(value))
    printer = Fingerprinter(name)
    printer.add(value)
    return printer.hexdigest()


def _simple(value: Any) -> bytes:
    return f"{type(value).__name__}:{value!r};".encode("utf-8", "surrogatepass")


class Fingerprinter:
    """The fingerprint of many values, one after the other; see `fingerprint`."""

    def __init__(self, name: Callable[[Any], str | None] | None = None) -> None:
        self._hasher = xxhash.xxh3_128()
        self._update = self._hasher.update
        self._name = name

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()

    def add(self, value: Any, depth: int = 0) -> None:
        kind = type(value)
        if kind in _SIMPLE:
            self._update(_simple(value))
            return
        if self._name is not None and (text := self._name(value)) is not None:
            self._update(_simple(("name", text)))
            return
        if depth > _DEPTH_MAX:
            raise WorkflowError(
                f"a value of {kind.__name__} is nested too deeply to be hashed, or contains itself"
            )
        if kind is list or kind is tuple:
            self._update(f"{kind.__name__}{len(value)}(".encode())
            for one in value:
                self.add(one, depth + 1)
        elif kind is dict:
            # In an order of its own: how the keys came does not matter.
            self._update(f"dict{len(value)}(".encode())
            texts = {fingerprint(key, self._name): key for key in value}
            for text in sorted(texts):
                self._update(text.encode())
                self.add(value[texts[text]], depth + 1)
        elif kind is set or kind is frozenset:
            self._update(f"{kind.__name__}(".encode())
            for text in sorted(fingerprint(one, self._name) for one in value):
                self._update(text.encode())
        elif kind is bytes or kind is bytearray or kind is memoryview:
            self._update(f"{kind.__name__}{len(value)}:".encode())
            self._update(bytes(value) if kind is memoryview else value)
        elif kind is np.ndarray and not value.dtype.hasobject:
            self._update(f"array{value.dtype.str if value.dtype.names is None else value.dtype}"
                         f"{value.shape}:".encode())
            flat = np.ascontiguousarray(value)
            self._update(flat.reshape(-1).view(np.uint8).data if flat.nbytes else b"")
        else:
            self._reduced(value, kind, depth)

    def _reduced(self, value: Any, kind: type, depth: int) -> None:
        """By what pickle would write of it."""
        owner = getattr(value, "__self__", None)
        if isinstance(value, type) or (
            isinstance(value, (FunctionType, BuiltinFunctionType))
            and (owner is None or isinstance(owner, ModuleType))
        ):
            self._update(f"name:{value.__module__}.{value.__qualname__};".encode())
            return
        try:
            reduce = copyreg.dispatch_table.get(kind)
            parts = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:
            raise WorkflowError(
                f"a value of type {kind.__module__}.{kind.__qualname__} cannot be hashed: {error}"
            ) from error
        self._update(f"object:{kind.__module__}.{kind.__qualname__}(".encode())
        if isinstance(parts, str):
            self._update(parts.encode())
            return
        function, *rest = parts
        self._update(getattr(function, "__qualname__", "?").encode())
        for part in rest:
            if part is not None and hasattr(part, "__next__"):
                part = list(part)
            self.add(part, depth + 1)
