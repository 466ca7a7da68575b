"""The state of a program as a tree that JSON carries, and its arrays apart.

`encode` walks nested dicts, lists and tuples. What it finds becomes a node of the tree:

=====================================  =====================================================
None, bool, str, int, float            itself, where JSON gives back the same
list                                   a list of nodes
dict with keys of type str             ``{"dict": {key: node}}``
other dict                             ``{"items": [[node, node], ...]}``
anything else                          ``{tag: ...}``, the tags below in `_DECODERS`
=====================================  =====================================================

An array, and whatever is large enough to be stored as one, is the node ``{"array": i}`` with the
i-th of the *leaves*. `decode` turns the tree back; it runs no code of the state's unless
`allow_pickle` says so. torch is never imported to save; a tensor in the state means that it is.
"""

from __future__ import annotations

import base64
import math
import pickle
import random
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hopcoll.errors import CheckpointError, CheckpointMismatchError
from recovery.cuts import Cut

__all__ = ["Leaf", "decode", "dtype_from_json", "dtype_to_json", "encode"]

#: Deeper trees are a mistake (or a linked list), and end Python's own JSON.
_DEPTH_MAX = 150
#: Text and bytes beyond it go with the arrays.
_INLINE_BYTES_MAX = 4096
#: What every JSON reader keeps exactly.
_INTEGER_MAX = 2**53
_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


@dataclass(frozen=True)
class Leaf:
    """An array of the state.

    Attributes
    ----------
    path : tuple of str
        The keys and indices that lead to it, for people.
    array : ndarray
        Of any shape, dtype and order; not a copy.
    dtype : str or list
        Its dtype as the manifest has it, which knows more types than NumPy does.
    cut : Cut or None
        How it is a piece of a larger one.
    """

    path: tuple[str, ...]
    array: np.ndarray
    dtype: Any
    cut: Cut | None = None


def encode(state: Any, *, allow_pickle: bool = False) -> tuple[Any, list[Leaf]]:
    """Take a state apart.

    Local; copies no array, so the leaves change when the state does.

    Parameters
    ----------
    state : object
        Nested dicts, lists and tuples of arrays, tensors, scalars, text, bytes, None and random
        generators.
    allow_pickle : bool, default False
        Whether other objects are pickled.

    Returns
    -------
    tree : object
        What JSON carries.
    leaves : list of Leaf

    Raises
    ------
    TypeError
        Something in the state has a type that is not known; the message says where.
    ValueError
        The state contains itself, or is nested too deeply.
    """
    encoder = _Encoder(allow_pickle)
    return encoder.node(state, ()), encoder.leaves


def decode(
    tree: Any, load: Callable[[int], np.ndarray], *, allow_pickle: bool = False, path: Any = None
) -> Any:
    """Put a state together again.

    Parameters
    ----------
    tree : object
        What `encode` made, after a way through JSON.
    load : callable
        Returns the array of the leaf with this index; each index is asked for once a node.
    allow_pickle : bool, default False
        Whether pickled objects are loaded. They can run any code: only from your own store.
    path : path, optional
        The file that the tree comes from, for errors.

    Raises
    ------
    CheckpointMismatchError
        A node is of a newer kind, or a package that it needs is missing.
    CheckpointError
        It holds pickled objects, and `allow_pickle` is False.
    """
    return _Decoder(load, allow_pickle, path).value(tree)


def dtype_to_json(dtype: np.dtype) -> Any:
    """Return a dtype as text or, where it is structured, as a list."""
    if dtype.type.__module__.split(".")[0] == "ml_dtypes":
        return dtype.name
    return np.lib.format.dtype_to_descr(dtype)


def dtype_from_json(value: Any, path: Any = None) -> np.dtype:
    """Return the dtype that `dtype_to_json` wrote."""
    if isinstance(value, str) and value[:1].isalpha():
        try:
            import ml_dtypes
        except ImportError:
            raise CheckpointMismatchError(
                f"{path} holds an array of {value}: pip install ml_dtypes", path
            ) from None
        return np.dtype(getattr(ml_dtypes, value))
    return np.lib.format.descr_to_dtype(_tuples(value))


def _tuples(value: Any) -> Any:
    """Return a dtype's description with the tuples that JSON turned into lists."""
    if isinstance(value, str):
        return value
    if value and isinstance(value[0], str) and len(value) == 2 and not isinstance(value[1], str):
        return value[0], tuple(value[1])  # a subarray: (base, shape)
    return [_field(field) for field in value]


def _field(field: list[Any]) -> tuple[Any, ...]:
    name, kind, *shape = field
    name = name if isinstance(name, str) else tuple(name)
    return (name, _tuples(kind), *(tuple(extent) for extent in shape))


class _Encoder:
    def __init__(self, allow_pickle: bool) -> None:
        self.allow_pickle = allow_pickle
        self.leaves: list[Leaf] = []
        self._open: set[int] = set()
        self._known: dict[int, int] = {}
        self._alive: list[Any] = []  # so that an id stays the id of one object

    def node(self, value: Any, path: tuple[str, ...]) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return self._text(value, path)
        if kind is int:
            return value if abs(value) <= _INTEGER_MAX else {"int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind in (dict, OrderedDict, list, tuple):
            return self._container(value, path)
        if kind in (np.ndarray, np.memmap):
            return self._array(value, path)
        if kind is Cut:
            if value.array.dtype.hasobject:
                raise TypeError(f"state has a Cut of Python objects at {_shown(path)}")
            return {"cut": self._leaf(value.array, path, value)["array"]}
        if kind is complex:
            return {"complex": [self.node(value.real, path), self.node(value.imag, path)]}
        if kind in (bytes, bytearray):
            return {kind.__name__: self._bytes(bytes(value), path)}
        if isinstance(value, np.generic) and value.dtype.kind != "O":
            scalar = np.array(value)
            data = base64.b64encode(scalar.tobytes()).decode()
            return {"scalar": [dtype_to_json(scalar.dtype), data]}
        if kind is np.random.Generator:
            state = value.bit_generator.state
            if state["bit_generator"] in _BIT_GENERATORS:
                return {"generator": self.node(state, path)}
        if kind is np.random.RandomState:
            return {"random_state": self.node(value.get_state(legacy=False), path)}
        if kind is random.Random:
            return {"random": self.node(value.getstate(), path)}
        node = self._torch(value, path)
        if node is not None:
            return node
        return self._pickle(value, path)

    def _container(self, value: Any, path: tuple[str, ...]) -> Any:
        if id(value) in self._open:
            raise ValueError(f"state contains itself at {_shown(path)}")
        if len(path) >= _DEPTH_MAX:
            raise ValueError(f"state is nested more than {_DEPTH_MAX} deep at {_shown(path[:5])}")
        self._open.add(id(value))
        try:
            if isinstance(value, dict):
                return self._mapping(value, path)
            nodes = [self.node(item, (*path, str(i))) for i, item in enumerate(value)]
            return nodes if type(value) is list else {"tuple": nodes}
        finally:
            self._open.discard(id(value))

    def _mapping(self, value: dict[Any, Any], path: tuple[str, ...]) -> Any:
        items = [(key, self.node(item, (*path, str(key)))) for key, item in value.items()]
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": dict(items)}
        tag = "items" if type(value) is dict else "ordered"
        return {tag: [[self._key(key, path), node] for key, node in items]}

    def _key(self, key: Any, path: tuple[str, ...]) -> Any:
        plain = (str, int, float, bool, bytes, type(None), tuple)
        if type(key) not in plain and not isinstance(key, np.generic):
            raise TypeError(
                f"state has a key of type {type(key).__name__} in {_shown(path)}; keys are text, "
                "numbers, bytes, None and tuples of these"
            )
        return self.node(key, path)

    def _text(self, value: str, path: tuple[str, ...]) -> Any:
        if len(value) <= _INLINE_BYTES_MAX:
            return value
        return {"text": self._raw(value.encode("utf-8", "surrogatepass"), path)}

    def _bytes(self, value: bytes, path: tuple[str, ...]) -> Any:
        if len(value) <= _INLINE_BYTES_MAX:
            return base64.b64encode(value).decode()
        return self._raw(value, path)

    def _raw(self, value: bytes, path: tuple[str, ...]) -> dict[str, int]:
        return self._leaf(np.frombuffer(value, np.uint8), path)

    def _leaf(
        self, array: np.ndarray, path: tuple[str, ...], cut: Cut | None = None
    ) -> dict[str, int]:
        if dtype_from_json(described := dtype_to_json(array.dtype)) != array.dtype:
            raise TypeError(f"state has an array of unknown dtype {array.dtype} at {_shown(path)}")
        self.leaves.append(Leaf(path or ("state",), array, described, cut))
        return {"array": len(self.leaves) - 1}

    def _array(self, value: np.ndarray, path: tuple[str, ...]) -> Any:
        if value.dtype.hasobject:
            if value.dtype == object and self.allow_pickle:
                return self._pickle(value, path)
            raise TypeError(
                f"state has an array of Python objects at {_shown(path)} (dtype {value.dtype}); "
                "use numbers, or allow_pickle=True for plain object arrays"
            )
        if id(value) not in self._known:
            self._alive.append(value)
            self._known[id(value)] = self._leaf(np.asarray(value), path)["array"]
        return {"array": self._known[id(value)]}

    def _torch(self, value: Any, path: tuple[str, ...]) -> Any:
        torch = sys.modules.get("torch")
        if torch is None:
            return None
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            if value.layout is not torch.strided or value.is_quantized:
                raise TypeError(f"state has a sparse or quantized tensor at {_shown(path)}")
            dtype = str(value.dtype).removeprefix("torch.")
            data = value.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
            try:
                array = data.numpy()
            except TypeError:  # NumPy has no such type
                array = data.reshape(-1).view(torch.uint8).numpy()
            leaf = self._leaf(array, path)["array"]
            tag = "tensor" if type(value) is torch.Tensor else "parameter"
            return {tag: [leaf, dtype, list(value.shape), bool(value.requires_grad)]}
        if type(value) is torch.Generator:
            if value.device.type != "cpu":
                raise TypeError(f"state has a generator on {value.device} at {_shown(path)}")
            return {"torch_generator": self._raw(value.get_state().numpy().tobytes(), path)}
        return None

    def _pickle(self, value: Any, path: tuple[str, ...]) -> Any:
        if not self.allow_pickle:
            raise TypeError(
                f"state has a {type(value).__module__}.{type(value).__qualname__} at "
                f"{_shown(path)}, which can only be saved with allow_pickle=True"
            )
        try:
            data = pickle.dumps(value, protocol=4)
        except Exception as error:
            raise TypeError(
                f"state has a {type(value).__qualname__} at {_shown(path)} that cannot be "
                f"pickled: {error}"
            ) from error
        return {"pickle": self._raw(data, path)}


class _Decoder:
    def __init__(self, load: Callable[[int], np.ndarray], allow_pickle: bool, path: Any) -> None:
        self._load = load
        self._allow_pickle = allow_pickle
        self._path = path

    def value(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if not isinstance(node, dict):
            return node
        ((tag, payload),) = node.items()
        decoder = self._DECODERS.get(tag)
        if decoder is None:
            raise CheckpointMismatchError(
                f"{self._path} holds a {tag!r}, which this version of hopcoll does not know",
                self._path,
            )
        return decoder(self, payload)

    def _raw(self, payload: dict[str, int]) -> bytes:
        return self._load(payload["array"]).tobytes()

    def _bytes(self, payload: Any) -> bytes:
        return base64.b64decode(payload) if isinstance(payload, str) else self._raw(payload)

    def _items(self, payload: list[Any]) -> list[tuple[Any, Any]]:
        return [(self.value(key), self.value(item)) for key, item in payload]

    def _scalar(self, payload: list[Any]) -> Any:
        dtype = dtype_from_json(payload[0], self._path)
        data = base64.b64decode(payload[1])
        return np.frombuffer(data, dtype, count=1)[0] if data else np.zeros((), dtype)[()]

    def _generator(self, payload: Any) -> np.random.Generator:
        state = self.value(payload)
        if state["bit_generator"] not in _BIT_GENERATORS:
            raise CheckpointMismatchError(
                f"{self._path} holds a generator of the unknown kind {state['bit_generator']!r}",
                self._path,
            )
        bits = getattr(np.random, state["bit_generator"])()
        bits.state = state
        return np.random.Generator(bits)

    def _random_state(self, payload: Any) -> np.random.RandomState:
        made = np.random.RandomState()
        made.set_state(self.value(payload))
        return made

    def _random(self, payload: Any) -> random.Random:
        made = random.Random()
        made.setstate(self.value(payload))
        return made

    def _torch(self) -> Any:
        try:
            import torch
        except ImportError:
            raise CheckpointMismatchError(
                f"{self._path} holds torch tensors: pip install torch", self._path
            ) from None
        return torch

    def _tensor(self, payload: list[Any]) -> Any:
        torch = self._torch()
        leaf, dtype, shape, requires_grad = payload
        tensor = torch.from_numpy(self._load(leaf))
        kind = getattr(torch, dtype)
        tensor = (tensor if tensor.dtype == kind else tensor.view(kind)).reshape(shape)
        return tensor.requires_grad_(requires_grad) if requires_grad else tensor

    def _parameter(self, payload: list[Any]) -> Any:
        tensor = self._tensor([*payload[:3], False])
        return self._torch().nn.Parameter(tensor, requires_grad=payload[3])

    def _torch_generator(self, payload: Any) -> Any:
        torch = self._torch()
        made = torch.Generator()
        made.set_state(torch.frombuffer(bytearray(self._raw(payload)), dtype=torch.uint8))
        return made

    def _pickle(self, payload: Any) -> Any:
        if not self._allow_pickle:
            raise CheckpointError(
                f"{self._path} holds pickled objects, which can run any code when they are "
                "loaded; if you trust the store, open it with allow_pickle=True",
                self._path,
            )
        return pickle.loads(self._raw(payload))

    _DECODERS: dict[str, Callable[[_Decoder, Any], Any]] = {
        "array": lambda self, payload: self._load(payload),
        "bytearray": lambda self, payload: bytearray(self._bytes(payload)),
        "bytes": lambda self, payload: self._bytes(payload),
        "cut": lambda self, payload: self._load(payload),
        "complex": lambda self, payload: complex(*map(self.value, payload)),
        "dict": lambda self, payload: {key: self.value(item) for key, item in payload.items()},
        "float": lambda self, payload: float(payload),
        "generator": lambda self, payload: self._generator(payload),
        "int": lambda self, payload: int(payload, 16),
        "items": lambda self, payload: dict(self._items(payload)),
        "ordered": lambda self, payload: OrderedDict(self._items(payload)),
        "parameter": lambda self, payload: self._parameter(payload),
        "pickle": lambda self, payload: self._pickle(payload),
        "random": lambda self, payload: self._random(payload),
        "random_state": lambda self, payload: self._random_state(payload),
        "scalar": lambda self, payload: self._scalar(payload),
        "tensor": lambda self, payload: self._tensor(payload),
        "text": lambda self, payload: self._raw(payload).decode("utf-8", "surrogatepass"),
        "torch_generator": lambda self, payload: self._torch_generator(payload),
        "tuple": lambda self, payload: tuple(self.value(item) for item in payload),
    }


def _shown(path: tuple[str, ...]) -> str:
    return "/".join(path) if path else "its top"
