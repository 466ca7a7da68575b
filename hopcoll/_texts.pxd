# cython: language_level=3
"""What the engine says of operations and ranks, in words; see _texts.pyx."""
from hopcoll._state cimport *

cdef str kind_name(const Signature* sig)
cdef tuple ranks_of(const Mask* mask, int size)
cdef str mismatch_text(const Engine* engine)
