# cython: language_level=3
"""Who gets memory, and which copies make room in files; see _spills.pyx."""
from libc.stdint cimport int64_t
from hopcoll._store_state cimport *

cdef void begin_pull(Store* store, Item* item, int source) noexcept nogil
cdef void no_room(Store* store, Item* item, int64_t stamp) noexcept nogil
cdef bint room_due(const Store* store) noexcept nogil
cdef bint room_step(Store* store) noexcept nogil
cdef bint may_hope(Store* store, int64_t nbytes) noexcept nogil
cdef bint may_go(const Store* store, const Item* item) noexcept nogil
cdef bint spill(Store* store, Item* item) noexcept nogil
cdef void job_ended(Store* store, Job* job) noexcept nogil
cdef void wants_end(Store* store) noexcept nogil
cdef void jobs_free(Store* store) noexcept nogil
