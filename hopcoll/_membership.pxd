# cython: language_level=3
"""Epochs and ballots; see _membership.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *

cdef void on_dead(Engine* engine, int peer) noexcept nogil
cdef void on_bye(Engine* engine, int peer) noexcept nogil
cdef void on_membership_message(Engine* engine, int peer, const Head* head,
                                const unsigned char* body, int64_t nbytes) noexcept nogil
cdef void coordinate(Engine* engine) noexcept nogil
cdef void answer_lost(Engine* engine, int peer, int type) noexcept nogil
cdef void end_stopped(Engine* engine) noexcept nogil
cdef void lose(Engine* engine, int rank) noexcept nogil
cdef void stop(Engine* engine, int why, const Mask* by) noexcept nogil
