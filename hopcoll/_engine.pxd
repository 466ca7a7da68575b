# cython: language_level=3
"""One rank's engine: what the runtime and the simulation call."""
from libc.stdint cimport int64_t
from cython_kernels.transport cimport Transport, Event
from hopcoll._state cimport *

cdef int64_t control_bytes_of(const Settings* settings, int size) noexcept nogil
cdef Engine* engine_new(Transport* transport, const Settings* settings) noexcept nogil
cdef void engine_free(Engine* engine) noexcept nogil
cdef void engine_event(Engine* engine, const Event* event) noexcept nogil
cdef void engine_tick(Engine* engine, int64_t now_us) noexcept nogil
cdef void engine_leave(Engine* engine) noexcept nogil
cdef bint engine_may_go(const Engine* engine) noexcept nogil
cdef void engine_ready(Engine* engine) noexcept nogil
cdef Mask engine_awaited(const Engine* engine) noexcept nogil
cdef bint engine_quiet(const Engine* engine) noexcept nogil
cdef int engine_rows(const Engine* engine) noexcept nogil
