# cython: language_level=3
"""The small path of an operation; see _small.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport Engine, FetchBody, Operation

cdef bint store_contribution(Engine* engine, Operation* op, int rank, const unsigned char* data,
                             int64_t nbytes) noexcept nogil
cdef void try_small(Engine* engine, Operation* op) noexcept nogil
cdef void land_small(Engine* engine, Operation* op) noexcept nogil
cdef void fetch(Engine* engine, Operation* op) noexcept nogil
cdef void answer_fetch(Engine* engine, const Operation* op, int peer,
                       const FetchBody* body) noexcept nogil
cdef void on_contribution(Engine* engine, Operation* op, int rank, const unsigned char* data,
                          int64_t nbytes) noexcept nogil
