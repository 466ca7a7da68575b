"""Arrays as objects: what their bytes are, in a few bytes of their own.

A *meta* is the code of the dtype for the kernels, its own length, and the dtype and shape as text.
Behind it the result of a reduction has a bit for each input that was taken.
"""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

from hopcoll.buffers import code_of

__all__ = ["array_of", "bits_of", "into", "meta_of", "view_of"]

#: Kinds of dtypes whose bytes mean the same in every process.
_KINDS = "?biufcSUmM"
_TEXT_BYTES_MAX = 126


def array_of(value: Any) -> np.ndarray:
    """A contiguous array, in C order."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = np.frombuffer(value, np.uint8)
    array = np.asarray(value, order="C")
    if array.dtype.kind not in _KINDS and not _is_named(array.dtype):
        raise TypeError(f"value has dtype {array.dtype}, which cannot be an object")
    return array


def _is_named(dtype: np.dtype) -> bool:
    """One that a package defines, and that NumPy then knows by its name, as bfloat16."""
    try:
        return dtype.kind == "V" and dtype.names is None and np.dtype(dtype.name) == dtype
    except TypeError:
        return False


def meta_of(array: np.ndarray) -> bytes:
    dtype = array.dtype
    text = repr((dtype.name if dtype.kind == "V" else dtype.str, array.shape)).encode()
    if len(text) > _TEXT_BYTES_MAX:
        raise ValueError(f"value has too many dimensions: {array.ndim}")
    return bytes([code_of(dtype), 2 + len(text)]) + text


def bits_of(meta: bytes, count: int) -> list[bool]:
    """Which inputs of a reduction were taken."""
    bits = np.unpackbits(np.frombuffer(meta[meta[1] :], np.uint8), bitorder="little")
    return [bool(bit) for bit in bits[:count]]


def view_of(meta: bytes, sealed: Any) -> np.ndarray:
    name, shape = ast.literal_eval(meta[2 : meta[1]].decode())
    try:
        dtype = np.dtype(name)
    except TypeError:
        import ml_dtypes  # noqa: F401  # which makes its names known

        dtype = np.dtype(name)
    if len(sealed) == 0:
        array = np.empty(shape, dtype)
    else:
        array = np.frombuffer(sealed, np.uint8).view(dtype).reshape(shape)
    array.flags.writeable = False
    return array


def into(array: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return array
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an array, not {type(out).__name__}")
    if out.dtype != array.dtype or out.shape != array.shape:
        raise ValueError(
            f"out has dtype {out.dtype} and shape {out.shape}, but the object has {array.dtype} "
            f"and {array.shape}"
        )
    out[...] = array
    return out
