# cython: language_level=3
"""What a ballot decides; see _decisions.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *

cdef int64_t write_status(Engine* engine, int64_t ballot) noexcept nogil
cdef void keep_status(Engine* engine, int row, const unsigned char* body,
                      int64_t nbytes) noexcept nogil
cdef bint is_mixed(Engine* engine, const Mask* alive) noexcept nogil
cdef bint is_enough(Engine* engine, const Mask* who) noexcept nogil
cdef int64_t write_proposal(Engine* engine, const Mask* alive) noexcept nogil
