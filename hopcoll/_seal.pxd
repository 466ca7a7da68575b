# cython: language_level=3
"""The seal; see _seal.pyx."""
from hopcoll._state cimport *

cdef void note_whole(Operation* op, int peer, int epoch) noexcept nogil
cdef void check_whole(Engine* engine) noexcept nogil
