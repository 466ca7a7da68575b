# cython: language_level=3
"""The control tree; see _tree.pyx."""
from hopcoll._state cimport *

cdef int rank_at(const Tree* tree, int position) noexcept nogil
cdef int position_of(const Tree* tree, int rank) noexcept nogil
cdef int parent_in(const Tree* tree, int rank) noexcept nogil
cdef bint is_interior(const Tree* tree, int rank) noexcept nogil
cdef int children_in(const Tree* tree, int rank, int16_t* out) noexcept nogil
cdef Mask subtree_in(const Tree* tree, int rank) noexcept nogil
cdef bint is_cut(const Tree* tree, const Mask* out) noexcept nogil
cdef Mask hidden_in(const Tree* tree, const Mask* missing) noexcept nogil
cdef bint is_flat(const Engine* engine) noexcept nogil
cdef Tree members_tree(const Engine* engine) noexcept nogil
