# cython: language_level=3
"""Small operations of many ranks; see _fan.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *

cdef Passing place_in(const Mask* members, int first, int degree, int rank) noexcept nogil
cdef bint is_fanned(const Engine* engine, const Signature* sig) noexcept nogil
cdef bint fans(const Engine* engine, const Operation* op) noexcept nogil
cdef Passing place_of(const Engine* engine, const Operation* op) noexcept nogil
cdef bint has_landed(const Engine* engine, const Operation* op) noexcept nogil
cdef bint store_own(Engine* engine, Operation* op, const unsigned char* input,
                    int64_t nbytes) noexcept nogil
cdef void land(Engine* engine, Operation* op) noexcept nogil
cdef void try_fan(Engine* engine, Operation* op) noexcept nogil
cdef void pass_down(Engine* engine, Operation* op) noexcept nogil
cdef void take_fan(Engine* engine, Operation* op) noexcept nogil
cdef void on_fan(Engine* engine, Operation* op, int peer, const Head* head, const FanBody* body,
                 int64_t nbytes) noexcept nogil
cdef bint is_early(const Engine* engine, const Head* head, const FanBody* body) noexcept nogil
cdef bint keep_message(Engine* engine, int peer, const Head* head,
                       int64_t nbytes) noexcept nogil
cdef void spread(Engine* engine, Operation* op, int holder) noexcept nogil
cdef void fan_anew(Engine* engine, Operation* op) noexcept nogil
cdef void answer_neighbour(Engine* engine, Operation* op, int peer) noexcept nogil
cdef void ask_neighbours(Engine* engine, Operation* op) noexcept nogil
cdef void free_early(Engine* engine) noexcept nogil
