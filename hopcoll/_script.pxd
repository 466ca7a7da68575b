# cython: language_level=3
"""What the ranks of a simulated world call, and with what; see _script.pyx."""
from libc.stdint cimport int64_t, uint64_t
from hopcoll._state cimport Mask, Operation
from hopcoll._world cimport Rank, Step, World

cdef uint64_t bcast_item(int seq, int root, int64_t i) noexcept nogil
cdef uint64_t copy_item(int seq, int source, int dest, int64_t i) noexcept nogil
cdef const Step* step_of(const World* world, int rank, int k) noexcept nogil
cdef int64_t pair_count(const Step* step, int source, int dest) noexcept nogil
cdef int64_t send_items(const Step* step, int size, int rank) noexcept nogil
cdef int64_t recv_items(const Step* step, int size, int rank) noexcept nogil
cdef int64_t items_before(const Step* step, int rank, int dest) noexcept nogil
cdef uint64_t input_item(const Step* step, int size, int rank, int k, int64_t j) noexcept nogil
cdef bint is_here(const World* world, int rank) noexcept nogil
cdef bint acts(const World* world, int rank) noexcept nogil
cdef bint is_cut(const World* world, int a, int b) noexcept nogil
cdef bint is_disturbed(const World* world, int rank) noexcept nogil
cdef bint in_force(const World* world, int rank) noexcept nogil
cdef bint is_settled(const World* world) noexcept nogil
cdef bint has_result(const World* world, int rank, const Step* step) noexcept nogil

cdef inline uint64_t rotate(uint64_t x, int64_t by) noexcept nogil:
    by &= 63
    return (x << by) | (x >> (64 - by)) if by else x

cdef inline uint64_t mixed(uint64_t left, uint64_t right) noexcept nogil:
    return left * 0x9E3779B97F4A7C15ULL + (right ^ right >> 29) * 0xBF58476D1CE4E5B9ULL + 1

cdef int mix_items(void* context, const Operation* op, void* dest, const void* left,
                   const void* right, int64_t count) noexcept nogil
cdef bint has_brackets(const World* world, const Step* step) noexcept nogil
cdef uint64_t mixed_item(const World* world, const Step* step, int k, const Mask* members,
                         int64_t i) noexcept nogil
cdef uint64_t carried_sum(const World* world, int rank, int k, int64_t j) noexcept nogil
cdef void note_call(World* world, int rank, int k) noexcept nogil
cdef void note_return(World* world, int rank, int k) noexcept nogil
