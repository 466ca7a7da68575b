# cython: language_level=3
"""Who waits for memory, which copies may go to files, and the jobs for these; see _room.pyx."""
from libc.stdint cimport int64_t
from hopcoll._store_state cimport *

cdef bint has_room(const Store* store, int64_t nbytes) noexcept nogil
cdef void want_room(Store* store, Want* want, int kind, void* whose, int64_t nbytes) noexcept nogil
cdef void unwant(Store* store, Want* want) noexcept nogil
cdef void need_back(Store* store, Item* item) noexcept nogil
cdef void touch(Store* store, Item* item) noexcept nogil
cdef void unlist(Store* store, Item* item) noexcept nogil
cdef void queue_job(Store* store, Job* job) noexcept nogil
cdef Job* add_job(Store* store, int kind, const Item* item, int64_t file) noexcept nogil
cdef void remove_file(Store* store, const Item* item, int64_t file, int64_t nbytes) noexcept nogil
cdef void forget_file(Store* store, Item* item) noexcept nogil
