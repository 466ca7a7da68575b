"""From what a caller passes as a buffer to an address, a count and a dtype code.

The conventions are those of mpi4py's upper-case methods. A buffer is one of

- a contiguous NumPy array (C or Fortran order; it is taken in the order of its memory);
- anything with the buffer protocol: ``bytearray``, ``memoryview``, ``array.array``, a NumPy
  scalar (read-only), ...;
- a list or tuple ``[buf, count]``, ``[buf, datatype]`` or ``[buf, count, datatype]``, where `buf`
  is one of the above, `datatype` a predefined basic datatype of MPI or a type string such as
  ``"f8"``, and `count` a number of items or a pair ``(count, displacement)``, both in items.

bfloat16 is known by the name of its dtype (``ml_dtypes`` defines it, and its arrays do not offer
the buffer protocol), so this package does not need ``ml_dtypes``.
"""

from __future__ import annotations

import ctypes
import operator
from typing import Any, NamedTuple

import numpy as np

from cython_kernels import reduction
from hopcoll.ops import Op

__all__ = ["Buffer", "check_disjoint", "check_matching", "check_reducible", "parse"]


class Buffer(NamedTuple):
    """A contiguous piece of memory, as the engine wants it.

    Attributes
    ----------
    array : numpy.ndarray
        The array that the memory belongs to; as long as it lives, the address is valid.
    address : int
        The address of the first item.
    items : int
        How many items; for dtypes that the kernels do not know (code ``BYTES``), how many bytes.
    code : int
        The dtype code of `cython_kernels.reduction`.
    dtype : numpy.dtype
        The dtype of the items.
    nbytes : int
        The length in bytes.
    """

    array: np.ndarray
    address: int
    items: int
    code: int
    dtype: np.dtype
    nbytes: int


#: What NumPy itself defines; bfloat16 joins when it is first met.
_CODES: dict[np.dtype, int] = {
    np.dtype(name): code
    for code, name in enumerate(reduction.DTYPE_NAMES)
    if name not in ("bfloat16", "bytes")
}


def parse(spec: Any, noun: str, *, writable: bool) -> Buffer:
    """Find the memory that `spec` names.

    Local; copies nothing.

    Parameters
    ----------
    spec : buffer, or list or tuple that names one
        As the module's documentation says.
    noun : str
        What the buffer is called in errors: ``"sendbuf"``, ``"recvbuf"``, ``"buf"``.
    writable : bool
        Whether it must be possible to write to it.

    Returns
    -------
    Buffer

    Raises
    ------
    TypeError
        It is no buffer, its items are Python objects, or its datatype is no basic one.
    BufferError
        It is not contiguous, or read-only where it must be written to.
    ValueError
        The count or the displacement is negative or reaches beyond the end.
    """
    if type(spec) is np.ndarray:
        return _whole(spec, noun, writable)
    if isinstance(spec, (list, tuple)):
        return _part(spec, noun, writable)
    return _whole(_as_array(spec, noun), noun, writable)


def check_reducible(buffer: Buffer, op: Op, noun: str) -> None:
    """Raise a TypeError if `op` is not defined for the dtype of `buffer`.

    Local.

    Parameters
    ----------
    buffer : Buffer
        What shall be reduced.
    op : Op
        The operation.
    noun : str
        What the buffer is called in the error.

    Raises
    ------
    TypeError
        The operation does not take this dtype; the message says why where there is more to say.
    """
    if (buffer.code, op.code) in _SUPPORTED:
        return
    dtype = buffer.dtype
    why = ""
    if not dtype.isnative:
        why = f" in a foreign byte order; pass {noun}.astype({noun}.dtype.newbyteorder('='))"
    elif op.name == "AVG" and dtype.kind in "iub":
        why = ": a mean of integers would be cut off; convert them to a floating-point dtype"
    elif op.name in ("MIN", "MAX") and dtype.kind == "c":
        why = ": complex numbers have no order"
    raise TypeError(f"{noun} has dtype {dtype}, which {op.name} does not take{why}")


def check_matching(send: Buffer, recv: Buffer) -> None:
    """Raise a ValueError unless both buffers have the same dtype and count.

    Local.

    Parameters
    ----------
    send, recv : Buffer
        The input and the place of the result.

    Raises
    ------
    ValueError
        They differ.
    """
    if send.code != recv.code:
        raise ValueError(f"recvbuf has dtype {recv.dtype}, but sendbuf has {send.dtype}")
    if send.items != recv.items:
        raise ValueError(f"recvbuf has {recv.items} items, but sendbuf has {send.items}")


def check_disjoint(send: Buffer, recv: Buffer) -> None:
    """Raise a ValueError if the two buffers share a byte.

    Local.

    Parameters
    ----------
    send, recv : Buffer
        The input and the place of the result.

    Raises
    ------
    ValueError
        They overlap.
    """
    send_end, recv_end = send.address + send.nbytes, recv.address + recv.nbytes
    if send.address < recv_end and recv.address < send_end:
        raise ValueError("recvbuf overlaps sendbuf; pass IN_PLACE as sendbuf to reduce in place")


def _supported() -> frozenset[tuple[int, int]]:
    ops = range(reduction.SUM, reduction.AVG + 1)
    codes = range(reduction.INT8, reduction.BYTES + 1)
    return frozenset((code, op) for code in codes for op in ops if reduction.supported(code, op))


_SUPPORTED = _supported()


def _as_array(buf: Any, noun: str) -> np.ndarray:
    """View anything with the buffer protocol as an array, which then keeps it exported."""
    if isinstance(buf, np.ndarray):
        return buf
    try:
        view = memoryview(buf)
    except TypeError:
        raise TypeError(
            f"{noun} must be a NumPy array or offer the buffer protocol, "
            f"which {type(buf).__name__} does not"
        ) from None
    try:
        return np.asarray(view)
    except (TypeError, ValueError):
        raise TypeError(f"{noun} has items of format {view.format!r}, which is no dtype") from None


def _whole(array: np.ndarray, noun: str, writable: bool) -> Buffer:
    flags = array.flags
    if not flags.forc:
        cure = (
            f"receive into np.ascontiguousarray({noun}) and copy back from there"
            if writable
            else f"pass np.ascontiguousarray({noun})"
        )
        raise BufferError(
            f"{noun} is not contiguous: shape {array.shape}, strides {array.strides} bytes; {cure}"
        )
    if writable and not flags.writeable:
        raise BufferError(f"{noun} is read-only, but the result has to be written to it")
    dtype = array.dtype
    code = _CODES.get(dtype, -1)
    nbytes = array.nbytes
    items = array.size
    if code < 0:
        code = _other_code(dtype, noun)
        if code == reduction.BYTES:
            items = nbytes
    return Buffer(array, _address(array), items, code, dtype, nbytes)


def _part(spec: list[Any] | tuple[Any, ...], noun: str, writable: bool) -> Buffer:
    """Take apart ``[buf, count]``, ``[buf, datatype]`` or ``[buf, count, datatype]``."""
    count: Any = None
    datatype: Any = None
    if len(spec) == 2:
        if _is_datatype(spec[1]):
            datatype = spec[1]
        else:
            count = spec[1]
    elif len(spec) == 3:
        count, datatype = spec[1:]
    elif len(spec) != 1:
        raise ValueError(f"{noun} must be [buf, count, datatype] or shorter, not {len(spec)} items")
    if isinstance(spec[0], (list, tuple)):
        raise TypeError(f"{noun} must start with a buffer, not with a {type(spec[0]).__name__}")
    whole = _whole(_as_array(spec[0], noun), noun, writable)
    dtype = whole.dtype if datatype is None else _dtype_of(datatype, noun)
    code = _CODES.get(dtype, -1)
    if code < 0:
        code = _other_code(dtype, noun)
    displacement = 0
    if isinstance(count, (list, tuple)):
        if len(count) != 2:
            raise ValueError(f"{noun} must have (count, displacement), not {len(count)} numbers")
        count, displacement = count[0], _index(count[1], noun, "displacement")
    offset_bytes = displacement * dtype.itemsize
    if count is None:
        rest_bytes = whole.nbytes - offset_bytes
        if dtype.itemsize and rest_bytes % dtype.itemsize:
            raise ValueError(
                f"{noun} has {rest_bytes} bytes, which is no multiple of "
                f"the {dtype.itemsize} bytes of {dtype}"
            )
        items = rest_bytes // dtype.itemsize if dtype.itemsize else 0
    else:
        items = _index(count, noun, "count")
    nbytes = items * dtype.itemsize
    if nbytes < 0 or offset_bytes + nbytes > whole.nbytes:
        raise ValueError(
            f"{noun} has {whole.nbytes} bytes, too few for {items} items of {dtype} "
            f"at displacement {displacement}"
        )
    if code == reduction.BYTES:
        items = nbytes
    return Buffer(whole.array, whole.address + offset_bytes, items, code, dtype, nbytes)


def _index(value: Any, noun: str, what: str) -> int:
    try:
        number: int = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{noun} has a {what} that is no integer but {type(value).__name__}"
        ) from None
    if number < 0:
        raise ValueError(f"{noun} has a negative {what}: {number}")
    return number


def _is_datatype(item: Any) -> bool:
    # An MPI datatype can only be here if mpi4py.MPI is loaded, so there is no need to import it.
    return isinstance(item, str) or (
        type(item).__name__ == "Datatype" and type(item).__module__ == "mpi4py.MPI"
    )


def _dtype_of(datatype: Any, noun: str) -> np.dtype:
    if not _is_datatype(datatype):
        raise TypeError(f"{noun} has {datatype!r} where a datatype of MPI is expected")
    if not isinstance(datatype, str) and not datatype.is_predefined:
        raise TypeError(f"{noun} has a derived MPI datatype; only predefined basic ones are taken")
    try:
        return np.dtype(datatype if isinstance(datatype, str) else datatype.typestr)
    except (TypeError, ValueError):
        raise TypeError(
            f"{noun} has a datatype that is no predefined basic one: {datatype!r}"
        ) from None


def _other_code(dtype: np.dtype, noun: str) -> int:
    """The code of a dtype that is not in the table: bfloat16, or opaque bytes."""
    if dtype.hasobject:
        raise TypeError(
            f"{noun} has dtype {dtype}, whose items are references that mean nothing elsewhere"
        )
    if dtype.name == "bfloat16" and dtype.itemsize == 2 and dtype.isnative:
        return _CODES.setdefault(dtype, reduction.BFLOAT16)
    return reduction.BYTES


def _address(array: np.ndarray) -> int:
    # The first way takes a third of the time of the second, but refuses what is empty, read-only,
    # in Fortran order or without the buffer protocol.
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (BufferError, TypeError, ValueError):
        address: int = array.__array_interface__["data"][0]
        return address
