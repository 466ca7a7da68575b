# cython: language_level=3
"""The streams of a large operation; see _chunks.pyx."""
from libc.stdint cimport int64_t
from cython_kernels.transport cimport Event
from hopcoll._state cimport *

cdef void pump_chunks(Engine* engine, Operation* op) noexcept nogil
cdef void check_complete(Engine* engine, Operation* op) noexcept nogil
cdef void cancel_sinks(Engine* engine, Operation* op) noexcept nogil
cdef void close_sink(Engine* engine, Operation* op, int b, int phase) noexcept nogil
cdef void close_sinks(Engine* engine, Operation* op) noexcept nogil
cdef void on_away(Engine* engine, int peer, const Head* head, const AwayBody* body) noexcept nogil
cdef void lose_patience(Engine* engine) noexcept nogil
cdef bint awaits_root(const Engine* engine, const Operation* op) noexcept nogil
cdef void on_data_event(Engine* engine, const Event* event) noexcept nogil
cdef void on_grant(Engine* engine, int peer, const Head* head, const GrantBody* body) noexcept nogil
cdef void on_credit(Engine* engine, int peer, const Head* head,
                    const CreditBody* body) noexcept nogil
cdef void check_chunk_faults(Engine* engine, Operation* op) noexcept nogil
