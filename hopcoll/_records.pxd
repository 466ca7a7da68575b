# cython: language_level=3
"""Records, messages, signatures and fates of operations; see _records.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *

cdef void send_message(Engine* engine, int dest, int type, int64_t seq, const Signature* sig,
                       const void* body, int64_t nbytes) noexcept nogil
cdef void send_more(Engine* engine, int dest, int type, int more, int64_t seq,
                    const Signature* sig, const void* body, int64_t nbytes) noexcept nogil
cdef void merge_watermarks(Engine* engine, int peer, const Head* head) noexcept nogil
cdef Operation* claim(Engine* engine, int64_t seq) noexcept nogil
cdef void release_memory(Engine* engine, void* memory) noexcept nogil
cdef bint sinks_idle(const Block* block) noexcept nogil
cdef void free_records(Engine* engine) noexcept nogil
cdef int fate_of(const Engine* engine, const Operation* op, Mask* failed) noexcept nogil
cdef void refresh_attempt(Engine* engine, Operation* op) noexcept nogil
cdef bint combine(Engine* engine, const Operation* op, void* dest, const void* left,
                  const void* right, int64_t nbytes) noexcept nogil
cdef void dispute(Engine* engine, Operation* op, const Signature* ours, int peer,
                  const Signature* theirs) noexcept nogil
cdef void complain(Engine* engine, Operation* op) noexcept nogil
cdef bint compare_signature(Engine* engine, Operation* op, int peer,
                            const Signature* sig) noexcept nogil
cdef void ask_again(Engine* engine, Operation* op) noexcept nogil
cdef bint announce_stuck(Engine* engine) noexcept nogil
