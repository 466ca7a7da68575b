# cython: language_level=3
"""The ends of streams; see _streams.pyx."""
from libc.stdint cimport int64_t, int32_t
from hopcoll._state cimport *

cdef bint make_landings(Engine* engine) noexcept nogil
cdef bint take_landing(Engine* engine, Operation* op, int b, int phase) noexcept nogil
cdef void free_landing(Engine* engine, int32_t index) noexcept nogil
cdef void leave_landing(Engine* engine, Block* block, int phase) noexcept nogil
cdef void unlink_outlet(Engine* engine, Operation* op, int32_t index) noexcept nogil
cdef void free_outlet(Engine* engine, int32_t index) noexcept nogil
cdef void retire_outlet(Engine* engine, Operation* op, int32_t index) noexcept nogil
cdef void void_stream(Engine* engine, int dest, int tag, int64_t count) noexcept nogil
cdef void close_outlet(Engine* engine, Operation* op, int32_t index) noexcept nogil
cdef int64_t length_of(const Operation* op, int b) noexcept nogil
cdef bint belongs(const Operation* op, const Outlet* outlet) noexcept nogil
cdef bint attach(Engine* engine, Operation* op, int32_t index) noexcept nogil
cdef Quarrel find_quarrel(const Engine* engine, const Operation* op) noexcept nogil
cdef void keep_early(Engine* engine, Operation* op, int32_t index) noexcept nogil
cdef void drop_told(Engine* engine, Operation* op, int32_t index) noexcept nogil
cdef void attach_early(Engine* engine, Operation* op) noexcept nogil
cdef void check_lengths(Engine* engine, Operation* op) noexcept nogil
