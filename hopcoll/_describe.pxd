# cython: language_level=3
"""A simulated world in words; see _describe.pyx."""
from hopcoll._world cimport World

cdef list describe(World* world)
