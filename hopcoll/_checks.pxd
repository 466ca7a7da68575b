# cython: language_level=3
"""The checkers of a simulated world; see _checks.pyx."""
from hopcoll._world cimport World

cdef void check_rank(World* world, int rank) noexcept nogil
cdef void check_end(World* world) noexcept nogil
