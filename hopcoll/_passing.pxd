# cython: language_level=3
"""A ballot on its way; see _passing.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *

cdef void send_ballot(Engine* engine, int dest, int type, const void* body,
                      int64_t nbytes) noexcept nogil
cdef void refuse(Engine* engine, int64_t ballot) noexcept nogil
cdef void promise(Engine* engine, int64_t ballot) noexcept nogil
cdef void take_place(Engine* engine, const PrepareBody* body) noexcept nogil
cdef void pass_on(Engine* engine, const Mask* to, int type, const void* body,
                  int64_t nbytes) noexcept nogil
cdef void say(Engine* engine) noexcept nogil
cdef void on_answer(Engine* engine, int peer, const unsigned char* body,
                    int64_t nbytes) noexcept nogil
cdef void on_accepted(Engine* engine, const AcceptedBody* body) noexcept nogil
cdef void tell_cut(Engine* engine) noexcept nogil
cdef void on_cut(Engine* engine, const CutBody* body) noexcept nogil
cdef bint is_told_cut(const Engine* engine) noexcept nogil
