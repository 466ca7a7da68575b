# cython: language_level=3
"""The digest of a world; see _digest.pyx."""
from libc.stdint cimport int64_t, uint64_t
from hopcoll._explorer cimport Explorer
from hopcoll._state cimport Engine
from hopcoll._world cimport World

cdef int64_t head_bytes(World* world) noexcept nogil
cdef bint keeps_answers(const Engine* engine) noexcept nogil
cdef uint64_t mix(uint64_t h, uint64_t word) noexcept nogil
cdef uint64_t digest(Explorer* x) noexcept nogil
cdef uint64_t raw_digest(Explorer* x) noexcept nogil
