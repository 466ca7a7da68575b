# cython: language_level=3
"""Where a block's data comes from: pure functions of membership and rank."""
from libc.stdint cimport int64_t
from hopcoll._state cimport Mask, Engine, Operation, Signature

cdef int chain_before(const Mask* members, int size, int start, int rank) noexcept nogil
cdef int chain_after(const Mask* members, int size, int start, int rank) noexcept nogil
cdef Mask chain_prefix(int size, int start, int rank) noexcept nogil
cdef bint is_fold(int kind) noexcept nogil
cdef bint is_scan(int kind) noexcept nogil
cdef bint is_private(int kind) noexcept nogil
cdef bint is_for_root(int kind) noexcept nogil
cdef bint ends_at_root(const Signature* sig) noexcept nogil
cdef bint is_from_root(int kind) noexcept nogil
cdef int blocks_of(const Engine* engine, const Signature* sig) noexcept nogil
cdef int block_count(int kind, int size) noexcept nogil
cdef int block_start(int kind, int size, int root, int block, int blocks) noexcept nogil
cdef int block_dest(int kind, int rank, int root, int block) noexcept nogil
cdef int block_at(const Engine* engine, const Operation* op, int block) noexcept nogil
cdef bint is_wanted(const Engine* engine, const Operation* op, int block) noexcept nogil
cdef int partial_source(const Engine* engine, const Operation* op, int block,
                        int phase) noexcept nogil
cdef bint adds(const Engine* engine, const Operation* op, int block) noexcept nogil
cdef int final_source(const Engine* engine, const Operation* op, int block) noexcept nogil
cdef int final_takers(const Engine* engine, const Operation* op, int block,
                      int* takers) noexcept nogil
cdef bint is_finalizer(const Engine* engine, const Operation* op, int block) noexcept nogil
cdef int final_giver(const Engine* engine, const Operation* op, int block) noexcept nogil
