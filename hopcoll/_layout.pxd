# cython: language_level=3
"""Where the blocks of a large operation lie; see _layout.pyx."""
from hopcoll._state cimport *

cdef int prepare_blocks(Engine* engine, Operation* op, const Layout* layout,
                        unsigned char* recv) noexcept nogil
cdef void count_awaited(Engine* engine, Operation* op) noexcept nogil
