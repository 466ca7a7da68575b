# cython: language_level=3
"""Going around ranks that are late for a Bcast; see _detours.pyx."""
from libc.stdint cimport int32_t
from hopcoll._state cimport Engine, Operation

cdef void wait_patiently(Engine* engine, Operation* op) noexcept nogil
cdef bint is_over(const Engine* engine, const Operation* op) noexcept nogil
cdef bint is_asked(const Engine* engine, const Operation* op) noexcept nogil
cdef bint awaits_us(const Engine* engine, const Operation* op) noexcept nogil
cdef bint send_behind(Engine* engine, Operation* op, int32_t index) noexcept nogil
cdef void send_around(Engine* engine, Operation* op) noexcept nogil
