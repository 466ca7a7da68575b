# cython: language_level=3
"""Two binary trees for the large operations of many ranks; see _twins.pyx."""
from hopcoll._state cimport *

cdef bint is_twinned(const Engine* engine, const Signature* sig) noexcept nogil
cdef int twin_levels(int size) noexcept nogil
cdef Twin twin_at(const Mask* members, int outer, int shift, int rank) noexcept nogil
cdef const Twin* twin_of(const Engine* engine, const Operation* op, int b) noexcept nogil
cdef int twin_source(const Engine* engine, const Operation* op, int b) noexcept nogil
cdef bint keeps_run(const Engine* engine, const Operation* op, int b, int previous) noexcept nogil
