"""From what a caller passes as a buffer to an address, a count and a dtype code.

The conventions are those of mpi4py's upper-case methods. A buffer is one of

- a contiguous NumPy array (C or Fortran order; it is taken in the order of its memory);
- anything with the buffer protocol: ``bytearray``, ``memoryview``, ``array.array``, a NumPy
  scalar (read-only), ...;
- a list or tuple ``[buf, count]``, ``[buf, datatype]``, ``[buf, count, datatype]`` or
  ``[buf, count, displacement, datatype]``, where `buf` is one of the above, `datatype` a predefined
  basic datatype of MPI or a type string such as ``"f8"`` (None: that of `buf`), and `count` and
  `displacement` are in items; in the first and the third form `count` may also be a pair
  ``(count, displacement)``.

A buffer that has one block for each rank (`parse_blocks`) is one of

- for blocks of equal length, the same; `count` is that of one block, and the blocks lie one behind
  the other from `displacement` on;
- for the vector forms, a buffer, which is divided as evenly as possible, or a list or tuple
  ``[buf, counts]``, ``[buf, (counts, displs)]``, ``[buf, datatype]``, ``[buf, counts, datatype]``,
  ``[buf, (counts, displs), datatype]`` or ``[buf, counts, displs, datatype]``. `counts` has one
  number a rank, or is one number for all, or None: the buffer is divided as evenly as possible.
  `displs` has one number a rank, counted from the start of `buf`, or is None: one block behind the
  other, or one number: so many items from the start of each block to that of the next. Only a
  tuple is taken as ``(counts, displs)``; counts alone go into a list or an array.

bfloat16 is known by the name of its dtype (``ml_dtypes`` defines it, and its arrays do not offer
the buffer protocol), so this package does not need ``ml_dtypes``.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import zlib
from typing import Any, NamedTuple

import numpy as np

from cython_kernels import reduction
from hopcoll.ops import Op

__all__ = [
    "Blocks",
    "Buffer",
    "check_disjoint",
    "check_matching",
    "check_reducible",
    "code_of",
    "hash_of",
    "parse",
    "parse_blocks",
]


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


class Blocks(NamedTuple):
    """A buffer that is cut into one block for each rank.

    Attributes
    ----------
    buffer : Buffer
        All the memory of the array that the caller named, in items of the datatype that was asked
        for, whether the blocks cover it or leave gaps and a rest.
    at : numpy.ndarray
        int64[ranks], read-only: where each rank's block starts, in bytes from ``buffer.address``.
        It never lies outside of the buffer, wherever the displacement of an empty block points.
    nbytes : numpy.ndarray
        int64[ranks], read-only: the length of each rank's block in bytes.
    item_bytes : int
        The length of an item as ``buffer.items`` counts them: 1 if ``buffer.code`` is ``BYTES``.
    """

    buffer: Buffer
    at: np.ndarray
    nbytes: np.ndarray
    item_bytes: int


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


def parse_blocks(spec: Any, noun: str, ranks: int, *, writable: bool, equal: bool) -> Blocks:
    """Find the memory that `spec` names, and the block of each rank in it.

    Local; copies nothing. A bare array in equal blocks costs hardly more than `parse` does, counts
    and displacements some 20 microseconds and 0.1 microseconds a rank.

    Parameters
    ----------
    spec : buffer, or list or tuple that names one
        As the module's documentation says.
    noun : str
        What the buffer is called in errors.
    ranks : int
        How many blocks; at least 1.
    writable : bool
        Whether it must be possible to write to it. Then no two blocks may share a byte.
    equal : bool
        Whether all blocks have the same length and lie one behind the other (Gather, Allgather,
        Scatter, Alltoall, Reduce_scatter_block); otherwise `spec` is read as one of the vector
        forms (Gatherv, Allgatherv, Scatterv, Alltoallv).

    Returns
    -------
    Blocks

    Raises
    ------
    TypeError
        As from `parse`, or a count or displacement is no integer.
    BufferError
        As from `parse`.
    ValueError
        It cannot be divided into equal blocks; there are more or fewer counts or displacements than
        ranks; a count is negative; a block reaches beyond the buffer; blocks that are written to
        overlap.
    """
    if isinstance(spec, (list, tuple)):
        if equal:
            return _equal_blocks(spec, noun, ranks, writable)
        return _vector_blocks(spec, noun, ranks, writable)
    whole = _whole(spec if type(spec) is np.ndarray else _as_array(spec, noun), noun, writable)
    dtype = whole.dtype
    item_bytes = dtype.itemsize
    if whole.code != reduction.BYTES:
        items = whole.items
    else:
        items = whole.nbytes // item_bytes if item_bytes else 0
    if equal and items % ranks:
        raise _indivisible(noun, items, dtype, ranks)
    at, nbytes = _evenly(items, ranks, item_bytes, 0)
    return Blocks(whole, at, nbytes, 1 if whole.code == reduction.BYTES else item_bytes)


def hash_of(spec: Any) -> int:
    """Return a hash (CRC-32) of the bytes that a buffer argument names. Local."""
    buffer = parse(spec, "buf", writable=False)
    memory = (ctypes.c_ubyte * buffer.nbytes).from_address(buffer.address) if buffer.nbytes else b""
    return zlib.crc32(memory)


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
    if op.function is not None and buffer.code != reduction.BYTES:
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


def check_disjoint(send: Buffer | Blocks, recv: Buffer | Blocks) -> None:
    """Raise a ValueError if the two share a byte.

    Local. Of blocks it is the bytes of the blocks that count: they may lie in the same array as the
    other buffer, or in between its blocks.

    Parameters
    ----------
    send, recv : Buffer or Blocks
        The input and the place of the result.

    Raises
    ------
    ValueError
        They overlap.
    """
    sent = send.buffer if isinstance(send, Blocks) else send
    received = recv.buffer if isinstance(recv, Blocks) else recv
    sent_end, received_end = sent.address + sent.nbytes, received.address + received.nbytes
    if sent.address >= received_end or received.address >= sent_end:
        return
    if not (sent.nbytes and received.nbytes):
        return
    if sent is send and received is recv:
        raise ValueError("recvbuf overlaps sendbuf; pass IN_PLACE as sendbuf to reduce in place")
    _check_blocks_disjoint(send, recv)


def _supported() -> frozenset[tuple[int, int]]:
    ops = range(reduction.SUM, reduction.AVG + 1)
    codes = range(reduction.INT8, reduction.BYTES + 1)
    return frozenset((code, op) for code in codes for op in ops if reduction.supported(code, op))


_SUPPORTED = _supported()

_INT64_MAX = 2**63 - 1
#: Those that become int64 without a loss.
_SAFE_INTEGERS = frozenset(np.dtype(char) for char in "bBhHiIlq")


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
    """The piece of a buffer that ``[buf, count, displacement, datatype]`` or less names."""
    whole, count, displacement = _unpack(spec, noun, writable, vector=False)
    first_bytes, items = _range(whole, count, displacement, 1, noun)
    nbytes = items * whole.dtype.itemsize
    if whole.code == reduction.BYTES:
        items = nbytes
    return Buffer(whole.array, whole.address + first_bytes, items, whole.code, whole.dtype, nbytes)


def _equal_blocks(
    spec: list[Any] | tuple[Any, ...], noun: str, ranks: int, writable: bool
) -> Blocks:
    whole, count, displacement = _unpack(spec, noun, writable, vector=False)
    first_bytes, items = _range(whole, count, displacement, ranks, noun)
    at, nbytes = _evenly(items * ranks, ranks, whole.dtype.itemsize, first_bytes)
    return Blocks(whole, at, nbytes, _counted_bytes(whole))


def _vector_blocks(
    spec: list[Any] | tuple[Any, ...], noun: str, ranks: int, writable: bool
) -> Blocks:
    whole, given_counts, given_displs = _unpack(spec, noun, writable, vector=True)
    item_bytes = whole.dtype.itemsize
    room = whole.nbytes // item_bytes if item_bytes else _INT64_MAX
    counts = _one_or_each(given_counts, noun, "count", ranks)
    displs = _one_or_each(given_displs, noun, "displacement", ranks)
    if not isinstance(counts, np.ndarray):
        if counts is None:  # wherever the blocks are put, it is the whole buffer that is divided
            items = _divided(whole.nbytes, whole.dtype, noun)
        else:
            items = counts * ranks
            if displs is None and items > room:
                rank = room // counts
                raise _beyond(whole, noun, rank, counts, rank * counts)
        if displs is None:
            at, nbytes = _evenly(items, ranks, item_bytes, 0)
            return Blocks(whole, at, nbytes, _counted_bytes(whole))
        counts = _evenly(items, ranks, 1, 0)[1]
    if displs is None:
        displs = _packed(whole, counts, room, noun)
    else:
        if not isinstance(displs, np.ndarray):
            displs = np.arange(ranks, dtype=np.int64) * displs
        # Differences of what is not negative do not wrap around, as sums would.
        outside = (counts > 0) & ((displs < 0) | (displs > room - counts))
        if outside.any():
            rank = int(outside.argmax())
            raise _beyond(whole, noun, rank, counts[rank], displs[rank])
        displs = displs.clip(0, room)
    at, nbytes = displs * item_bytes, counts * item_bytes
    if writable and given_displs is not None:
        _check_apart(at, nbytes, noun)
    at.flags.writeable = nbytes.flags.writeable = False
    return Blocks(whole, at, nbytes, _counted_bytes(whole))


def _unpack(
    spec: list[Any] | tuple[Any, ...], noun: str, writable: bool, *, vector: bool
) -> tuple[Buffer, Any, Any]:
    """The buffer in items of the datatype that was asked for, and what else the list has.

    Count and displacement are returned as they were passed. For the vector forms only a tuple is
    taken for both together: a list has the counts.
    """
    count: Any = None
    displacement: Any = None
    datatype: Any = None
    if len(spec) == 2:
        if _is_datatype(spec[1]):
            datatype = spec[1]
        else:
            count = spec[1]
    elif len(spec) == 3:
        count, datatype = spec[1:]
    elif len(spec) == 4:
        count, displacement, datatype = spec[1:]
    elif len(spec) != 1:
        raise ValueError(
            f"{noun} must be [buf, count, displacement, datatype] or shorter, not {len(spec)} items"
        )
    if len(spec) < 4 and isinstance(count, tuple if vector else (list, tuple)):
        if len(count) != 2:
            cure = "; pass a list if these are the counts" if vector else ""
            raise ValueError(
                f"{noun} must have (count, displacement), not {len(count)} numbers{cure}"
            )
        count, displacement = count
    if isinstance(spec[0], (list, tuple)):
        raise TypeError(f"{noun} must start with a buffer, not with a {type(spec[0]).__name__}")
    whole = _whole(_as_array(spec[0], noun), noun, writable)
    if datatype is not None:
        dtype = _dtype_of(datatype, noun)
        code = _CODES.get(dtype, -1)
        if code < 0:
            code = _other_code(dtype, noun)
        nbytes = whole.nbytes
        items = nbytes if code == reduction.BYTES else nbytes // dtype.itemsize
        whole = Buffer(whole.array, whole.address, items, code, dtype, nbytes)
    return whole, count, displacement


def _range(whole: Buffer, count: Any, displacement: Any, ranks: int, noun: str) -> tuple[int, int]:
    """Where the first of equal blocks starts, in bytes, and how many items each of them has."""
    dtype = whole.dtype
    displacement = 0 if displacement is None else _index(displacement, noun, "displacement")
    first_bytes = displacement * dtype.itemsize
    rest_bytes = whole.nbytes - first_bytes
    if rest_bytes < 0:
        raise ValueError(
            f"{noun} has {whole.nbytes} bytes, too few for displacement {displacement} "
            f"in items of {dtype}"
        )
    if count is None:
        items = _divided(rest_bytes, dtype, noun)
        if items % ranks:
            raise _indivisible(noun, items, dtype, ranks)
        return first_bytes, items // ranks
    items = _index(count, noun, "count")
    if items * ranks * dtype.itemsize > rest_bytes:
        blocks = "" if ranks == 1 else f"{ranks} blocks of "
        raise ValueError(
            f"{noun} has {whole.nbytes} bytes, too few for {blocks}{items} items of {dtype} "
            f"at displacement {displacement}"
        )
    return first_bytes, items if dtype.itemsize else 0


def _divided(nbytes: int, dtype: np.dtype, noun: str) -> int:
    """How many items so many bytes are."""
    if not dtype.itemsize:
        return 0
    if nbytes % dtype.itemsize:
        raise ValueError(
            f"{noun} has {nbytes} bytes, which is no multiple of "
            f"the {dtype.itemsize} bytes of {dtype}"
        )
    return nbytes // dtype.itemsize


def _counted_bytes(buffer: Buffer) -> int:
    return 1 if buffer.code == reduction.BYTES else buffer.dtype.itemsize


@functools.lru_cache(maxsize=128)
def _evenly(
    items: int, ranks: int, item_bytes: int, first_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks one behind the other, whose lengths differ by one item at most; the longer ones first.

    A program passes buffers of the same few lengths again and again.
    """
    share, longer = divmod(items, ranks)
    counts = np.full(ranks, share, np.int64)
    counts[:longer] += 1
    nbytes = counts * item_bytes
    at = first_bytes + nbytes.cumsum() - nbytes
    at.flags.writeable = nbytes.flags.writeable = False
    return at, nbytes


def _packed(whole: Buffer, counts: np.ndarray, room: int, noun: str) -> np.ndarray:
    """The displacements of blocks that lie one behind the other."""
    # A sum of numbers that fit one by one can only wrap around where items take no room at all.
    if counts.max() > room or counts.sum() > room:
        totals = list(itertools.accumulate(counts.tolist()))
        rank = next(rank for rank, total in enumerate(totals) if total > room)
        count = int(counts[rank])
        raise _beyond(whole, noun, rank, count, totals[rank] - count)
    displs: np.ndarray = counts.cumsum() - counts
    return displs


def _check_apart(at: np.ndarray, nbytes: np.ndarray, noun: str) -> None:
    """Raise a ValueError if two of the blocks share a byte."""
    ends = at + nbytes
    if (at[1:] >= ends[:-1]).all():
        return
    full = nbytes.nonzero()[0]
    order = full[at[full].argsort(kind="stable")]
    clashes = (at[order[1:]] < ends[order[:-1]]).nonzero()[0]
    if not clashes.size:
        return
    first, second = sorted(order[clashes[0] : clashes[0] + 2].tolist())
    raise ValueError(
        f"{noun} has blocks that overlap: that of rank {first} has the bytes from {at[first]} to "
        f"{ends[first]}, that of rank {second} those from {at[second]} to {ends[second]}, and what "
        "would be received there is undefined; pass other displacements"
    )


def _check_blocks_disjoint(send: Buffer | Blocks, recv: Buffer | Blocks) -> None:
    send_starts, send_ends, send_ranks = _spans(send)
    recv_starts, recv_ends, recv_ranks = _spans(recv)
    # Of all that start before a block ends, those that ended before it starts do not touch it.
    before = recv_ends.copy()
    before.sort()
    begun = recv_starts.copy()
    begun.sort()
    touched = begun.searchsorted(send_ends, "left") > before.searchsorted(send_starts, "right")
    if not touched.any():
        return
    i = touched.argmax()
    j = ((recv_starts < send_ends[i]) & (recv_ends > send_starts[i])).argmax()
    which_send = f" (block of rank {send_ranks[i]})" if isinstance(send, Blocks) else ""
    which_recv = f" (block of rank {recv_ranks[j]})" if isinstance(recv, Blocks) else ""
    raise ValueError(
        f"recvbuf{which_recv} overlaps sendbuf{which_send}; pass IN_PLACE for the one whose data "
        "lies where it belongs, or another buffer"
    )


def _spans(memory: Buffer | Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each piece starts and ends that is not empty, and whose block it is."""
    if isinstance(memory, Blocks):
        ranks = memory.nbytes.nonzero()[0]
        starts = memory.at[ranks] + memory.buffer.address
        return starts, starts + memory.nbytes[ranks], ranks
    starts = np.array([memory.address] if memory.nbytes else [], np.int64)
    return starts, starts + memory.nbytes, np.zeros(starts.size, np.int64)


def _indivisible(noun: str, items: int, dtype: np.dtype, ranks: int) -> ValueError:
    return ValueError(
        f"{noun} has {items} items of {dtype}, which cannot be divided into {ranks} equal blocks; "
        f"pass a multiple of {ranks} items, or [{noun}, count] with the count of one block"
    )


def _beyond(whole: Buffer, noun: str, rank: int, count: int, displacement: int) -> ValueError:
    return ValueError(
        f"{noun} has {whole.nbytes} bytes, and the block of rank {rank} does not lie in them: "
        f"{count} items of {whole.dtype} at displacement {displacement}"
    )


def _one_or_each(values: Any, noun: str, what: str, ranks: int) -> np.ndarray | int | None:
    """None, one number for all ranks, or a new array of one for each of them.

    Negative counts are refused, and negative strides; where an empty block lies does not matter.
    """
    if values is None:
        return None
    try:
        length = len(values)
    except TypeError:
        number = _index(values, noun, what)
        if number * ranks > _INT64_MAX:
            raise ValueError(f"{noun} has a {what} that is too large: {number}") from None
        return number
    if length != ranks:
        raise ValueError(f"{noun} has {length} {what}s for {ranks} ranks; pass one for each rank")
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype in _SAFE_INTEGERS:
        numbers = values.astype(np.int64)
    else:
        numbers = _integers(values, noun, what)
    if what == "count" and numbers.min() < 0:
        rank = int(numbers.argmin())
        raise ValueError(f"{noun} has a negative count for rank {rank}: {numbers[rank]}")
    return numbers


def _integers(values: Any, noun: str, what: str) -> np.ndarray:
    if not isinstance(values, (list, tuple)):
        try:
            values = [values[rank] for rank in range(len(values))]
        except (TypeError, LookupError):  # a set has no order
            raise TypeError(
                f"{noun} has {what}s in a {type(values).__name__}, which is no sequence"
            ) from None
    found: list[int] = []
    try:
        for value in values:
            found.append(operator.index(value))
    except TypeError:
        rank = len(found)
        raise TypeError(
            f"{noun} has a {what} for rank {rank} that is no integer "
            f"but {type(values[rank]).__name__}"
        ) from None
    try:
        return np.array(found, np.int64)
    except OverflowError:
        rank = next(i for i, number in enumerate(found) if not -_INT64_MAX <= number <= _INT64_MAX)
        raise ValueError(
            f"{noun} has a {what} for rank {rank} that is too large: {found[rank]}"
        ) from None


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


def code_of(dtype: np.dtype) -> int:
    """The code of a dtype in `cython_kernels.reduction`; local."""
    code = _CODES.get(dtype, -1)
    return _other_code(dtype, "value") if code < 0 else code


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
