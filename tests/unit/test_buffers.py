"""Buffers: which memory a caller's argument names, and what is refused."""

from __future__ import annotations

import array
import ctypes
import re

import ml_dtypes
import numpy as np
import pytest

from cython_kernels import reduction
from hopcoll import buffers, ops
from hopcoll.buffers import parse


def address_of(a):
    return a.__array_interface__["data"][0]


# ---- what is taken --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in reduction.DTYPE_NAMES if n != "bytes"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)])
def test_numpy_arrays_of_every_dtype_and_shape(name, shape):
    a = np.zeros(shape, ml_dtypes.bfloat16 if name == "bfloat16" else name)
    buffer = parse(a, "buf", writable=True)
    assert buffer.array is a
    assert buffer.address == address_of(a)
    assert buffer.items == a.size
    assert buffer.nbytes == a.nbytes
    assert reduction.DTYPE_NAMES[buffer.code] == name
    assert buffer.dtype == a.dtype


def test_fortran_order_is_taken_as_it_lies_in_memory():
    a = np.zeros((2, 3), order="F")
    assert parse(a, "buf", writable=True).address == address_of(a)


@pytest.mark.parametrize("char", "bBhHiIlLqQefdFD?")
def test_the_c_types_behind_the_dtypes(char):
    a = np.zeros(2, char)
    assert reduction.DTYPE_NAMES[parse(a, "buf", writable=True).code] == a.dtype.name


@pytest.mark.parametrize(
    ("buf", "name", "count"),
    [
        (bytearray(b"abc"), "uint8", 3),
        (bytearray(), "uint8", 0),
        (memoryview(bytearray(4)).cast("i"), "int32", 1),
        (array.array("d", [1, 2]), "float64", 2),
        ((ctypes.c_float * 3)(), "float32", 3),
    ],
)
def test_writable_buffers(buf, name, count):
    buffer = parse(buf, "buf", writable=True)
    assert (reduction.DTYPE_NAMES[buffer.code], buffer.items) == (name, count)
    if buffer.nbytes:
        assert ctypes.string_at(buffer.address, buffer.nbytes) == bytes(memoryview(buf).cast("B"))


@pytest.mark.parametrize("buf", [b"abc", np.float32(2), memoryview(b"abc"), np.broadcast_to(1, ())])
def test_read_only_buffers_can_be_sent_but_not_received_into(buf):
    assert parse(buf, "sendbuf", writable=False).nbytes == memoryview(buf).nbytes
    with pytest.raises(BufferError, match="^recvbuf is read-only"):
        parse(buf, "recvbuf", writable=True)


def test_the_buffer_stays_exported_as_long_as_it_is_kept():
    source = bytearray(8)
    buffer = parse(source, "buf", writable=True)
    with pytest.raises(BufferError):
        source.extend(b"more")
    del buffer
    source.extend(b"more")


@pytest.mark.parametrize(
    "dtype", [">f4", "M8[s]", "S5", "U2", "V3", [("a", "i4"), ("b", "f8")], np.longdouble]
)
def test_other_dtypes_of_fixed_size_are_opaque_bytes(dtype):
    a = np.zeros(3, dtype)
    buffer = parse(a, "buf", writable=True)
    assert (buffer.code, buffer.items, buffer.nbytes) == (reduction.BYTES, a.nbytes, a.nbytes)


# ---- specifications ---------------------------------------------------------------------------

TEN = np.arange(10.0)


@pytest.mark.parametrize(
    ("spec", "name", "first", "count"),
    [
        ([TEN], "float64", 0, 10),
        ([TEN, 3], "float64", 0, 3),
        ((TEN, 3), "float64", 0, 3),
        ([TEN, np.int64(3)], "float64", 0, 3),
        ([TEN, 0], "float64", 0, 0),
        ([TEN, (3, 2)], "float64", 2, 3),
        ([TEN, (None, 4)], "float64", 4, 6),
        ([TEN, (0, 10)], "float64", 10, 0),
        ([TEN, "f8"], "float64", 0, 10),
        ([TEN, None, "f8"], "float64", 0, 10),
        ([TEN, 4, "d"], "float64", 0, 4),
        ([TEN, (4, 1), "d"], "float64", 1, 4),
        ([TEN, (4, None)], "float64", 0, 4),
        ([TEN, (4, None), "d"], "float64", 0, 4),
        ([TEN, 4, 1, "d"], "float64", 1, 4),
        ([TEN, 4, 1, None], "float64", 1, 4),
        ([TEN, 4, None, "d"], "float64", 0, 4),
        ([TEN, None, 4, "d"], "float64", 4, 6),
        ([TEN, None, 3, "B"], "uint8", 3, 77),
        ([bytearray(83), 4, 6, "f8"], "float64", 6, 4),
        ([bytearray(80), 4, "f8"], "float64", 0, 4),
        ([TEN, "B"], "uint8", 0, 80),
    ],
)
def test_specifications(spec, name, first, count):
    buffer = parse(spec, "buf", writable=True)
    base = parse(spec[0], "buf", writable=True).address
    assert reduction.DTYPE_NAMES[buffer.code] == name
    assert buffer.address == base + first * buffer.dtype.itemsize
    assert buffer.items == count
    assert buffer.nbytes == count * buffer.dtype.itemsize


def test_specification_of_bfloat16():
    a = np.zeros(6, ml_dtypes.bfloat16)
    buffer = parse([a, (2, 3)], "buf", writable=True)
    assert buffer.code == reduction.BFLOAT16
    assert (buffer.address, buffer.items) == (address_of(a) + 6, 2)


@pytest.mark.parametrize(
    ("spec", "kind", "text"),
    [
        ([], ValueError, "not 0 items"),
        ([TEN, 1, 0, "d", 0], ValueError, "not 5 items"),
        ([TEN, 1, "d", 0], TypeError, "where a datatype of MPI is expected"),
        ([TEN, 1, "d", None], TypeError, "a displacement that is no integer but str"),
        ([TEN, (1, 2), 0, "d"], TypeError, "a count that is no integer but tuple"),
        ([TEN, 3, 8, "d"], ValueError, "too few for 3 items of float64 at displacement 8"),
        ([TEN, 11], ValueError, "too few for 11 items"),
        ([TEN, (3, 8)], ValueError, "too few for 3 items of float64 at displacement 8"),
        ([TEN, (None, 11)], ValueError, "too few"),
        ([TEN, -1], ValueError, "negative count"),
        ([TEN, (1, -1)], ValueError, "negative displacement"),
        ([TEN, (1, 2, 3)], ValueError, "not 3 numbers"),
        ([TEN, 2.0], TypeError, "a count that is no integer but float"),
        ([TEN, (1, "x")], TypeError, "a displacement that is no integer but str"),
        ([TEN, 1, 7], TypeError, "where a datatype of MPI is expected"),
        ([TEN, "no such type"], TypeError, "no predefined basic one"),
        ([bytearray(7), "f8"], ValueError, "no multiple of the 8 bytes"),
        ([[TEN], 1], TypeError, "must start with a buffer"),
        ([1.0, 2.0], TypeError, "must be a NumPy array or offer the buffer protocol"),
    ],
)
def test_wrong_specifications(spec, kind, text):
    with pytest.raises(kind, match="^sendbuf .*" + re.escape(text)):
        parse(spec, "sendbuf", writable=False)


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("buf", [None, "text", 3, 3.5, object(), {}])
def test_no_buffer_at_all(buf):
    with pytest.raises(TypeError, match=f"^buf must be .* which {type(buf).__name__} does not"):
        parse(buf, "buf", writable=False)


@pytest.mark.parametrize(
    "view", [np.zeros(6)[::2], np.zeros((3, 3))[:, 1], np.zeros((3, 3))[:2, :2], np.zeros(4)[::-1]]
)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v, 1], memoryview])
def test_not_contiguous(view, wrap):
    text = re.escape(f"strides {view.strides} bytes")
    with pytest.raises(BufferError, match=f"^sendbuf is not contiguous.*{text}.*ascontiguousarray"):
        parse(wrap(view), "sendbuf", writable=False)
    with pytest.raises(BufferError, match="^recvbuf .*np.ascontiguousarray.*copy back"):
        parse(wrap(view), "recvbuf", writable=True)


def test_read_only_array():
    a = np.zeros(3)
    a.flags.writeable = False
    with pytest.raises(BufferError, match="^recvbuf is read-only"):
        parse(a, "recvbuf", writable=True)
    with pytest.raises(BufferError, match="^recvbuf is read-only"):
        parse([a, 2], "recvbuf", writable=True)


@pytest.mark.parametrize("dtype", [object, [("a", "i4"), ("b", object)]])
def test_references_to_python_objects(dtype):
    with pytest.raises(TypeError, match="^buf has dtype .* references"):
        parse(np.zeros(2, dtype), "buf", writable=True)


@pytest.mark.parametrize(
    ("dtype", "op", "why"),
    [
        ("int32", ops.AVG, "a mean of integers would be cut off"),
        ("bool", ops.AVG, "a mean of integers would be cut off"),
        ("complex64", ops.MIN, "complex numbers have no order"),
        ("complex128", ops.MAX, "complex numbers have no order"),
        ("float64", ops.BAND, "which BAND does not take"),
        ("complex64", ops.LAND, "which LAND does not take"),
        (">f4", ops.SUM, "in a foreign byte order; pass sendbuf.astype"),
        ("M8[s]", ops.MAX, "which MAX does not take"),
        (np.longdouble, ops.SUM, "which SUM does not take"),
    ],
)
def test_dtypes_that_an_operation_does_not_take(dtype, op, why):
    buffer = parse(np.zeros(2, dtype), "sendbuf", writable=False)
    with pytest.raises(TypeError, match="^sendbuf has dtype .*" + re.escape(why)):
        buffers.check_reducible(buffer, op, "sendbuf")


@pytest.mark.parametrize("name", [n for n in reduction.DTYPE_NAMES if n != "bytes"])
@pytest.mark.parametrize("op_name", [n for n in reduction.OP_NAMES if n != "NONE"])
def test_refused_exactly_where_there_is_no_kernel(name, op_name):
    op = getattr(ops, op_name)
    a = np.zeros(2, ml_dtypes.bfloat16 if name == "bfloat16" else name)
    buffer = parse(a, "sendbuf", writable=False)
    if reduction.supported(buffer.code, op.code):
        buffers.check_reducible(buffer, op, "sendbuf")
    else:
        with pytest.raises(TypeError):
            buffers.check_reducible(buffer, op, "sendbuf")


def test_send_and_receive_have_to_match():
    send = parse(np.zeros(3), "sendbuf", writable=False)
    buffers.check_matching(send, parse(np.zeros((3, 1)), "recvbuf", writable=True))
    with pytest.raises(ValueError, match="^recvbuf has 4 items, but sendbuf has 3"):
        buffers.check_matching(send, parse(np.zeros(4), "recvbuf", writable=True))
    with pytest.raises(ValueError, match="^recvbuf has dtype float32, but sendbuf has float64"):
        buffers.check_matching(send, parse(np.zeros(3, "f4"), "recvbuf", writable=True))


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
def test_send_and_receive_must_not_overlap(shift):
    a = np.zeros(12)
    send = parse(a[4:7], "sendbuf", writable=False)
    recv = parse(a[4 + shift : 7 + shift], "recvbuf", writable=True)
    with pytest.raises(ValueError, match="^recvbuf overlaps sendbuf; pass IN_PLACE"):
        buffers.check_disjoint(send, recv)


@pytest.mark.parametrize("shift", [-4, -3, 3, 4])
def test_neighbours_do_not_overlap(shift):
    a = np.zeros(12)
    send = parse(a[4:7], "sendbuf", writable=False)
    buffers.check_disjoint(send, parse(a[4 + shift : 7 + shift], "recvbuf", writable=True))


def test_nothing_overlaps_with_nothing():
    a = np.zeros(12)
    empty = parse(a[4:4], "sendbuf", writable=False)
    buffers.check_disjoint(empty, parse(a[4:4], "recvbuf", writable=True))
