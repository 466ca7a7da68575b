# cython: language_level=3
"""Partial operations: rolls, results for late ranks, carries; see _partial.pyx."""
from libc.stdint cimport int32_t, int64_t
from hopcoll._state cimport Engine, Mask, Operation, PlaceBody, RollBody

cdef int keeper_of(const Engine* engine) noexcept nogil
cdef void set_roll(Engine* engine, Operation* op, const Mask* roll, int attempt) noexcept nogil
cdef void forget_roll(Engine* engine, Operation* op) noexcept nogil
cdef void arrive(Engine* engine, Operation* op) noexcept nogil
cdef void note_arrival(Engine* engine, Operation* op, int rank, int attempt) noexcept nogil
cdef bint on_place(Engine* engine, Operation* op, int type, const PlaceBody* body) noexcept nogil
cdef bint check_roll(Engine* engine, Operation* op) noexcept nogil
cdef bint on_roll(Engine* engine, Operation* op, const RollBody* body) noexcept nogil
cdef bint is_late_for(const Engine* engine, const Operation* op) noexcept nogil
cdef bint has_late(const Engine* engine, const Operation* op) noexcept nogil
cdef void refuse_outlets(Engine* engine, Operation* op) noexcept nogil
cdef void keep_for_late(Engine* engine, Operation* op) noexcept nogil
cdef bint is_lost_to_us(const Engine* engine, const Operation* op) noexcept nogil
cdef void miss(Engine* engine, Operation* op) noexcept nogil
cdef bint prepare_carry(Engine* engine, Operation* op, int64_t nbytes) noexcept nogil
cdef const unsigned char* take_carry(Engine* engine, Operation* op, const unsigned char* input,
                                     int64_t nbytes) noexcept nogil
cdef void return_carry(Engine* engine, Operation* op) noexcept nogil
cdef void settle_carry(Engine* engine, Operation* op, const unsigned char* input,
                       int64_t nbytes) noexcept nogil
cdef void free_carries(Engine* engine) noexcept nogil
