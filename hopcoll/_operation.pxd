# cython: language_level=3
"""The state machine of one operation; see _operation.pyx."""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint8_t
from cython_kernels.transport cimport Event
from hopcoll._state cimport *

cdef Operation* claim(Engine* engine, int64_t seq) noexcept nogil
cdef int start_operation(Engine* engine, const Signature* sig, int64_t item_bytes,
                         const unsigned char* send, unsigned char* recv, int flags,
                         Result* result) noexcept nogil
cdef void send_message(Engine* engine, int dest, int type, int64_t seq, const Signature* sig,
                       const void* body, int64_t nbytes) noexcept nogil
cdef void merge_watermarks(Engine* engine, int peer, const Head* head) noexcept nogil
cdef void on_operation_message(Engine* engine, int peer, const Head* head,
                               const unsigned char* body, int64_t nbytes) noexcept nogil
cdef void on_data_event(Engine* engine, const Event* event) noexcept nogil
cdef void settle(Engine* engine) noexcept nogil
cdef void enter_epoch(Engine* engine, int previous) noexcept nogil
cdef void flush_watermark(Engine* engine) noexcept nogil
cdef void announce_stuck(Engine* engine) noexcept nogil
cdef void check_chunk_faults(Engine* engine, Operation* op) noexcept nogil
cdef void complain(Engine* engine, Operation* op) noexcept nogil
