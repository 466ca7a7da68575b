# cython: language_level=3
"""What the engine says of operations and ranks, in words; see _texts.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *

cdef str signature_text(const Signature* sig, int64_t seq)
cdef str kind_name(const Signature* sig)
cdef tuple ranks_of(const Mask* mask, int size)
cdef str mismatch_text(const Engine* engine)
