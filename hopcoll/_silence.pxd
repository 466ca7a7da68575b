# cython: language_level=3
"""Silence; see _silence.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *

cdef Mask living(const Engine* engine) noexcept nogil
cdef bint leads(const Engine* engine) noexcept nogil
cdef void watch(Engine* engine, int64_t before_us) noexcept nogil
