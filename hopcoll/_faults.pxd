# cython: language_level=3
"""Planted faults; see _faults.pyx."""
from libc.stdint cimport int32_t, int64_t
from hopcoll._state cimport Engine

cdef enum:
    RECORD_PATH_MAX = 4096

cdef struct Faults:           # all zero: none
    int32_t timed             # some of them wait for a time
    int64_t started_us        # from which it counts
    char record_path[RECORD_PATH_MAX]

cdef void check_timed_faults(Faults* faults, Engine* engine, int64_t now) noexcept nogil
cdef int plant_faults(Faults* faults, Engine* engine) except -1
