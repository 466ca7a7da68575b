# cython: language_level=3
"""Kills ranks of this host that no longer answer; see _fence.pyx."""
from libc.stdint cimport int32_t

cdef struct Targets:
    int32_t size
    int32_t* pidfds           # by rank; -1: not of this host, or not known

cdef void fence_rank(void* context, int rank) noexcept nogil

cdef class Fence:
    cdef Targets targets
    cdef readonly bytes host
    cdef readonly bytes hello
