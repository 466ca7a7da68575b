# cython: language_level=3
"""Ranks that are late but alive; see _late.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *

cdef void note_stuck(Engine* engine, int64_t seq) noexcept nogil
cdef void check_late(Engine* engine) noexcept nogil
cdef void on_late_message(Engine* engine, int peer, const Head* head, const unsigned char* body,
                          int64_t nbytes) noexcept nogil
cdef Mask awaited_of(Engine* engine, int64_t seq) noexcept nogil
