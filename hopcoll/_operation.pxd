# cython: language_level=3
"""The life of an operation; see _operation.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *

cdef int start_operation(Engine* engine, const Signature* called, int64_t item_bytes,
                         const unsigned char* send, unsigned char* recv, int flags,
                         const Layout* layout, Result* result) noexcept nogil
cdef void on_operation_message(Engine* engine, int peer, const Head* head,
                               const unsigned char* body, int64_t nbytes) noexcept nogil
cdef void copy_for_late(Engine* engine) noexcept nogil
cdef void settle(Engine* engine) noexcept nogil
cdef void abandon_former(Engine* engine) noexcept nogil
cdef void enter_epoch(Engine* engine, int previous) noexcept nogil
cdef void stop_operations(Engine* engine) noexcept nogil
