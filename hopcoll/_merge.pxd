# cython: language_level=3
"""Answers of many ranks in one; see _merge.pyx."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *

cdef StatusBody* status_at(const Engine* engine, int row) noexcept nogil
cdef Entry* entries_of(StatusBody* status) noexcept nogil
cdef OperationStatus* first_operation(StatusBody* status) noexcept nogil
cdef int64_t status_length(StatusBody* status) noexcept nogil
cdef int items_max_of(const Settings* settings, int size) noexcept nogil
cdef void merge_status(Engine* engine, StatusBody* into, const StatusBody* more) noexcept nogil
cdef void merge_operation(OperationStatus* into, const OperationStatus* more) noexcept nogil
