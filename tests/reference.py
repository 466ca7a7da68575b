"""What the native code must compute, written in plain NumPy: slow, short, and the authority.

`reduce_twin` and `divide_twin` are the twins of the kernels in cython_kernels.reduction;
`value_tree` is the documented order in which a collective puts the inputs of its contributors
together. All are exact: a result must have the same bits, whatever the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import ml_dtypes
import numpy as np

from cython_kernels import reduction

BCAST, REDUCE, ALLREDUCE, BARRIER = range(4)
BLOCKS_MAX = 8

# By dtype code, as in reduction.pxd; BYTES is last.
DTYPES = tuple(
    np.dtype(dtype)
    for dtype in (
        np.int8,
        np.int16,
        np.int32,
        np.int64,
        np.uint8,
        np.uint16,
        np.uint32,
        np.uint64,
        np.float16,
        ml_dtypes.bfloat16,
        np.float32,
        np.float64,
        np.complex64,
        np.complex128,
        np.bool_,
        np.void(1).dtype,
    )
)
_INTEGERS = tuple(range(reduction.INT8, reduction.UINT64 + 1))
_FLOATS = (reduction.FLOAT16, reduction.BFLOAT16, reduction.FLOAT32, reduction.FLOAT64)
_COMPLEX = (reduction.COMPLEX64, reduction.COMPLEX128)


def _truth(array: np.ndarray) -> np.ndarray:
    return array != array.dtype.type(0)


def _one_nan(array: np.ndarray) -> np.ndarray:
    """Give every NaN the same bits; which bits NumPy gives it depends on the machine."""
    if array.dtype.kind == "c":
        real = array.real.dtype
        return _one_nan(array.view(real)).view(array.dtype)
    if array.dtype.kind not in "iub":
        array = np.where(array != array, array.dtype.type(np.nan), array)
    return array


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply; complex by the plain formula.

    NumPy multiplies complex numbers with a fused multiply-add where the processor has one, so that
    its bits differ from host to host.
    """
    if left.dtype.kind != "c":
        return left * right
    out = np.empty_like(left)
    out.real = left.real * right.real - left.imag * right.imag
    out.imag = left.real * right.imag + left.imag * right.real
    return out


# MIN and MAX copy an operand: the left one of two NaNs, the right one of two equal numbers (zeros).
# np.minimum agrees, but for the bits of a NaN and the sign of a zero, which it does not define.
_NUMBERS: dict[int, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    reduction.SUM: lambda left, right: _one_nan(left + right),
    reduction.PROD: lambda left, right: _one_nan(_product(left, right)),
    reduction.MIN: lambda left, right: np.where((left < right) | (left != left), left, right),
    reduction.MAX: lambda left, right: np.where((left > right) | (left != left), left, right),
}
_LOGICAL: dict[int, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    reduction.LAND: lambda left, right: _truth(left) & _truth(right),
    reduction.LOR: lambda left, right: _truth(left) | _truth(right),
    reduction.LXOR: lambda left, right: _truth(left) ^ _truth(right),
}
_BITWISE: dict[int, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    reduction.BAND: lambda left, right: left & right,
    reduction.BOR: lambda left, right: left | right,
    reduction.BXOR: lambda left, right: left ^ right,
}
_OF_BOOL = {
    reduction.SUM: reduction.LOR,
    reduction.PROD: reduction.LAND,
    reduction.MIN: reduction.LAND,
    reduction.MAX: reduction.LOR,
    reduction.BAND: reduction.LAND,
    reduction.BOR: reduction.LOR,
    reduction.BXOR: reduction.LXOR,
}


def supported_twin(dtype: int, op: int) -> bool:
    """Return whether the dtype takes the operation."""
    if dtype in _INTEGERS:
        return op in _NUMBERS or op in _LOGICAL or op in _BITWISE
    if dtype in _FLOATS:
        return op in _NUMBERS or op in _LOGICAL or op == reduction.AVG
    if dtype in _COMPLEX:
        return op in (reduction.SUM, reduction.PROD, reduction.AVG)
    return dtype == reduction.BOOL and (op in _LOGICAL or op in _OF_BOOL)


def reduce_twin(dtype: int, op: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return ``left op right``, in the dtype; AVG adds.

    Parameters
    ----------
    dtype, op : int
        Codes of cython_kernels.reduction.
    left, right : ndarray
        Arrays of the same shape and of ``DTYPES[dtype]``.
    """
    if not supported_twin(dtype, op):
        raise ValueError(f"op {op} is not supported for dtype {dtype}")
    if op == reduction.AVG:
        op = reduction.SUM
    if dtype == reduction.BOOL:
        op = _OF_BOOL.get(op, op)
    function = (_NUMBERS | _LOGICAL | _BITWISE)[op]
    with np.errstate(all="ignore"):
        return np.asarray(function(left, right)).astype(DTYPES[dtype], copy=False)


def divide_twin(dtype: int, array: np.ndarray, divisor: int) -> np.ndarray:
    """Return ``array / divisor``: the second half of AVG.

    16-bit floats are divided in float32 and rounded; complex numbers part by part.
    """
    if not supported_twin(dtype, reduction.AVG):
        raise ValueError(f"op AVG is not supported for dtype {dtype}")
    with np.errstate(all="ignore"):
        if dtype in _COMPLEX:
            real = array.real.dtype.type
            out = (array.view(real) / real(divisor)).view(array.dtype)
        elif array.dtype.itemsize == 2:
            out = (array.astype(np.float32) / np.float32(divisor)).astype(array.dtype)
        else:
            out = array / array.dtype.type(divisor)
        return _one_nan(out)


def left_fold(pieces: Sequence[np.ndarray], redop: int) -> np.ndarray:
    """Return ``((pieces[0] op pieces[1]) op pieces[2]) ...``; AVG divides by their number.

    Parameters
    ----------
    pieces : sequence of ndarray
        At least one; all of one dtype and length.
    redop : int
        The code of the operation.
    """
    code = DTYPES.index(pieces[0].dtype)
    total = pieces[0].copy()
    for piece in pieces[1:]:
        total = reduce_twin(code, redop, total, piece)
    return divide_twin(code, total, len(pieces)) if redop == reduction.AVG else total


def value_tree(
    inputs: Mapping[int, np.ndarray],
    contributors: Collection[int],
    *,
    kind: int,
    size: int,
    eager_bytes: int,
    redop: int = reduction.NONE,
    root: int = 0,
) -> np.ndarray:
    """Return the result of a collective, bit for bit.

    A left fold over the contributors in the order of their ranks at the start, which begins with
    rank s and wraps around: s is 0 for at most ``eager_bytes``, ``root + 1`` for a larger Reduce.
    A larger Allreduce is cut into ``min(size, 8)`` blocks, each of which begins with a rank of its
    own. A broadcast is the input of its root.

    Parameters
    ----------
    inputs : mapping of int to ndarray
        The input of each rank, one-dimensional, all of one dtype and length. More ranks than the
        contributors may be there.
    contributors : collection of int
        Ranks, numbered as at the start, in any order.
    kind : int
        `BCAST`, `REDUCE` or `ALLREDUCE`.
    size : int
        The number of ranks at the start.
    eager_bytes : int
        The engine's bound between small and large reductions.
    redop : int
        The code of the operation.
    root : int
    """
    if kind == BCAST:
        return inputs[root].copy()
    if not contributors:
        raise ValueError("contributors must not be empty")
    like = inputs[next(iter(contributors))]
    count = len(like)

    def fold(start: int, first: int, end: int) -> np.ndarray:
        rotated = [(start + place) % size for place in range(size)]
        return left_fold(
            [inputs[rank][first:end] for rank in rotated if rank in contributors], redop
        )

    if like.nbytes <= eager_bytes:
        return fold(0, 0, count)
    if kind == REDUCE:
        return fold((root + 1) % size, 0, count)
    blocks = min(size, BLOCKS_MAX)
    return np.concatenate(
        [
            fold(block * size // blocks, block * count // blocks, (block + 1) * count // blocks)
            for block in range(blocks)
        ]
    )


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two arrays have the same dtype, shape and bits."""
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )
