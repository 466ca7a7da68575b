# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Elementwise reduction kernels; the C interface is in reduction.pxd, the loops in C.

=========== ================================================================================
dtypes      operations
=========== ================================================================================
integers    SUM PROD (wrapping) MIN MAX LAND LOR LXOR BAND BOR BXOR
floats      SUM PROD MIN MAX (a NaN stays) LAND LOR LXOR AVG; 16-bit floats are computed in
            float32 and rounded to nearest even at every step
complex     SUM PROD AVG
bool        SUM = MAX = LOR = BOR, PROD = MIN = LAND = BAND, LXOR = BXOR; any byte but 0 is true
=========== ================================================================================

LAND, LOR and LXOR answer 0 or 1 in the dtype itself. MIN and MAX copy one of the operands, a NaN
before all others. A NaN that a sum, a product or a division gives is always the same one, so that
equal inputs give equal bits on every machine. A complex product is the plain formula, without the
recovery of infinities of C99.
"""
cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer)
from libc.stdint cimport int64_t

cdef extern from "reduction_kernels.h" nogil:
    ctypedef void (*reduce_kernel)(void*, const void*, const void*, int64_t) noexcept nogil
    ctypedef void (*divide_kernel)(void*, int64_t, int64_t) noexcept nogil
    ctypedef struct kernel_table:
        pass
    int kernel_variant_best()
    const kernel_table* kernel_table_of(int variant)
    reduce_kernel reduce_kernel_of(const kernel_table* table, int dtype, int op)
    divide_kernel divide_kernel_of(const kernel_table* table, int dtype)

cdef int[16] ITEMSIZES = [1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 8, 16, 1, 1]

# Chosen once, at import, so that the kernels themselves ask nothing.
cdef const kernel_table* best_table = kernel_table_of(kernel_variant_best())

_VARIANTS = ("baseline", "avx2")

#: Names of the dtypes, by code.
DTYPE_NAMES = (
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool", "bytes",
)

#: Names of the operations, by code.
OP_NAMES = (
    "SUM", "PROD", "MIN", "MAX", "LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR", "AVG", "NONE",
)

#: Instruction sets that this processor runs, the one in use last.
VARIANTS = _VARIANTS[:kernel_variant_best() + 1]


cdef inline reduce_kernel kernel_for(const kernel_table* table, int dtype, int op) noexcept nogil:
    if op == AVG:
        return reduce_kernel_of(table, dtype, SUM) if divide_kernel_of(table, dtype) else NULL
    return reduce_kernel_of(table, dtype, op)


cdef int reduce_into(int dtype, int op, void* dest, const void* left, const void* right,
                     int64_t count) noexcept nogil:
    cdef reduce_kernel kernel = kernel_for(best_table, dtype, op)
    if kernel == NULL:
        return -1
    kernel(dest, left, right, count)
    return 0


cdef inline int divide_with(const kernel_table* table, int dtype, void* dest, int64_t count,
                            int64_t divisor) noexcept nogil:
    cdef divide_kernel kernel = divide_kernel_of(table, dtype)
    if kernel == NULL or divisor < 1:
        return -1
    if dtype == COMPLEX64 or dtype == COMPLEX128:
        count *= 2
    kernel(dest, count, divisor)
    return 0


cdef int divide(int dtype, void* dest, int64_t count, int64_t divisor) noexcept nogil:
    return divide_with(best_table, dtype, dest, count, divisor)


cpdef int itemsize_of(int dtype) noexcept nogil:
    """Return the bytes of one item of a dtype code; -1 for an unknown code.

    Parameters
    ----------
    dtype : int
        A dtype code.

    Returns
    -------
    int
    """
    return ITEMSIZES[dtype] if 0 <= dtype <= BYTES else -1


cpdef bint supported(int dtype, int op) noexcept nogil:
    """Return whether there is a kernel for this dtype code and this operation code.

    AVG counts as supported where both its sum and its division are; NONE and unknown codes never.

    Parameters
    ----------
    dtype, op : int
        Codes of a dtype and of an operation.

    Returns
    -------
    bool
    """
    return kernel_for(best_table, dtype, op) != NULL


@cython.auto_pickle(False)
cdef class _View:
    """A contiguous buffer, held as long as this object lives."""
    cdef Py_buffer buffer
    cdef bint held

    def __cinit__(self, name, exporter, bint writable):
        if not PyObject_CheckBuffer(exporter):
            raise TypeError(
                f"{name} must offer the buffer protocol, which {type(exporter).__name__} does not")
        # No format is asked for: NumPy refuses to name one for the dtypes of ml_dtypes.
        try:
            PyObject_GetBuffer(exporter, &self.buffer, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        except (BufferError, ValueError) as error:   # NumPy raises ValueError
            raise BufferError(
                f"{name} must be contiguous{' and writable' if writable else ''}: {error}"
            ) from None
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.buffer)


cdef const kernel_table* table_named(variant) except NULL:
    if variant is None:
        return best_table
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
    return kernel_table_of(_VARIANTS.index(variant))


cdef int check_dtype(int dtype) except -1:
    cdef int itemsize = itemsize_of(dtype)
    if itemsize < 0:
        raise ValueError(f"dtype code must be 0 to {BYTES}, not {dtype}")
    return itemsize


cdef int64_t count_items(int dtype, str name, Py_ssize_t nbytes) except -1:
    cdef int itemsize = check_dtype(dtype)
    if nbytes % itemsize:
        raise ValueError(f"{name} has {nbytes} bytes, not a whole number of {DTYPE_NAMES[dtype]} "
                         f"items of {itemsize}")
    return nbytes // itemsize


cdef bint overlap_in_part(_View one, _View other):
    cdef char* first = <char*>one.buffer.buf
    cdef char* second = <char*>other.buffer.buf
    return (first != second and first < second + other.buffer.len
            and second < first + one.buffer.len)


def reduce(int dtype, int op, left, right, dest, *, variant=None):
    """Compute ``dest[i] = left[i] op right[i]``.

    Local, without the GIL in the loop. AVG adds, as SUM; see `divide_array`.

    Parameters
    ----------
    dtype, op : int
        Codes of the dtype and of the operation.
    left, right : buffer
        Contiguous memory of the same number of bytes, seen as items of ``dtype``.
    dest : buffer
        Contiguous writable memory of as many bytes: ``left``, ``right``, or apart from both.
    variant : str, optional
        One of `VARIANTS`, for tests and measurements; the best one when left out.

    Raises
    ------
    TypeError
        An argument does not offer the buffer protocol, or a code is not an integer.
    BufferError
        A buffer is not contiguous, or ``dest`` is read-only.
    ValueError
        A code is unknown, the pair of codes is not supported, the sizes differ or are no whole
        number of items, or ``dest`` overlaps an input in part. Whatever is raised, ``dest`` is as
        it was.
    """
    cdef const kernel_table* table = table_named(variant)
    check_dtype(dtype)
    if not 0 <= op < len(OP_NAMES):
        raise ValueError(f"op code must be 0 to {len(OP_NAMES) - 1}, not {op}")
    cdef reduce_kernel kernel = kernel_for(table, dtype, op)
    if kernel == NULL:
        raise ValueError(f"op {OP_NAMES[op]} is not supported for {DTYPE_NAMES[dtype]}")
    cdef _View left_view = _View("left", left, False)
    cdef _View right_view = _View("right", right, False)
    cdef _View dest_view = _View("dest", dest, True)
    if not left_view.buffer.len == right_view.buffer.len == dest_view.buffer.len:
        raise ValueError(
            f"left, right and dest must have the same size, not {left_view.buffer.len}, "
            f"{right_view.buffer.len} and {dest_view.buffer.len} bytes")
    cdef int64_t count = count_items(dtype, "dest", dest_view.buffer.len)
    if overlap_in_part(dest_view, left_view) or overlap_in_part(dest_view, right_view):
        raise ValueError("dest must be left, right, or apart from both; it overlaps in part")
    with nogil:
        kernel(dest_view.buffer.buf, left_view.buffer.buf, right_view.buffer.buf, count)


def divide_array(int dtype, dest, int64_t divisor, *, variant=None):
    """Divide every item by ``divisor``, in place: the second half of AVG.

    Local, without the GIL in the loop. float16 and bfloat16 are divided in float32 and rounded; a
    complex number has both parts divided.

    Parameters
    ----------
    dtype : int
        The code of a float or complex dtype.
    dest : buffer
        Contiguous writable memory, seen as items of ``dtype``.
    divisor : int
        At least 1.
    variant : str, optional
        As in `reduce`.

    Raises
    ------
    TypeError, BufferError
        As in `reduce`.
    ValueError
        The dtype is unknown or cannot be divided, the size is no whole number of items, or the
        divisor is below 1. Whatever is raised, ``dest`` is as it was.
    """
    cdef const kernel_table* table = table_named(variant)
    check_dtype(dtype)
    if divide_kernel_of(table, dtype) == NULL:
        raise ValueError(f"op AVG is not supported for {DTYPE_NAMES[dtype]}")
    if divisor < 1:
        raise ValueError(f"divisor must be at least 1, not {divisor}")
    cdef _View view = _View("dest", dest, True)
    cdef int64_t count = count_items(dtype, "dest", view.buffer.len)
    with nogil:
        divide_with(table, dtype, view.buffer.buf, count, divisor)
