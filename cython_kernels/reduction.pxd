# cython: language_level=3
"""Elementwise reduction kernels: the codes of dtypes and operations, and the C interface.

Pointers need no alignment.  ``dest`` may be ``left`` or ``right`` itself, or lie apart from them;
an overlap in part is an error of the caller.
"""
from libc.stdint cimport int64_t

cpdef enum:
    INT8 = 0
    INT16 = 1
    INT32 = 2
    INT64 = 3
    UINT8 = 4
    UINT16 = 5
    UINT32 = 6
    UINT64 = 7
    FLOAT16 = 8
    BFLOAT16 = 9
    FLOAT32 = 10
    FLOAT64 = 11
    COMPLEX64 = 12
    COMPLEX128 = 13
    BOOL = 14
    BYTES = 15        # opaque: it can be broadcast, not reduced

cpdef enum:
    SUM = 0
    PROD = 1
    MIN = 2
    MAX = 3
    LAND = 4
    LOR = 5
    LXOR = 6
    BAND = 7
    BOR = 8
    BXOR = 9
    AVG = 10          # reduce_into adds; divide comes once, after the last contributor
    NONE = 11         # Bcast and Barrier reduce nothing

# dest[i] = left[i] op right[i]; 0, or -1 and nothing written when the pair is not supported.
cdef int reduce_into(int dtype, int op, void* dest, const void* left, const void* right,
                     int64_t count) noexcept nogil

# dest[i] = dest[i] / divisor; 0, or -1 and nothing written for integers, bool, bytes and a divisor
# below 1.
cdef int divide(int dtype, void* dest, int64_t count, int64_t divisor) noexcept nogil

cpdef int itemsize_of(int dtype) noexcept nogil           # -1 for an unknown code
cpdef bint supported(int dtype, int op) noexcept nogil    # whether reduce_into takes the pair
