# cython: language_level=3
"""The end of streams, and what is kept; see _renewal.pyx."""
from hopcoll._state cimport *

cdef void end_streams(Engine* engine) noexcept nogil
cdef void part_streams(Engine* engine, int peer) noexcept nogil
cdef void abandon_streams(Engine* engine, int peer) noexcept nogil
cdef void rerun_chunks(Engine* engine, Operation* op, int previous) noexcept nogil
