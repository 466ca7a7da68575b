# cython: language_level=3
"""The streams by which objects move; see _pulls.pyx."""
from cython_kernels.transport cimport Event
from hopcoll._store_state cimport *

cdef enum Moved:
    MOVED_ON = 0
    MOVED_ALL = 1             # the copy of the item is complete
    MOVED_NO_MORE = 2         # its pull has ended before that

cdef Stream* stream_at(Store* store, int64_t token) noexcept nogil
cdef bint pull_start(Store* store, Item* item, int source) noexcept nogil
cdef Moved pull_event(Store* store, Stream* stream, const Event* event) noexcept nogil
cdef void pull_cut(Store* store, Item* item) noexcept nogil
cdef void pull_abandon(Store* store, Item* item) noexcept nogil
cdef void serve_start(Store* store, Item* item, int dest, const Letter* letter) noexcept nogil
cdef void serve_event(Store* store, Stream* stream, const Event* event) noexcept nogil
cdef void serve_credit(Store* store, int dest, const Letter* letter) noexcept nogil
cdef void serve_end(Store* store, int dest, const Letter* letter) noexcept nogil
cdef void serves_push(Store* store, Item* item) noexcept nogil
cdef void serves_feed(Store* store, Item* item) noexcept nogil
cdef void serves_close(Store* store, Item* item, bint fed) noexcept nogil
cdef bint serves_wait(const Item* item) noexcept nogil
cdef void serves_of_gone(Store* store, int dest) noexcept nogil
cdef Stream* stream_new(Store* store, Item* item, int64_t stamp, bint is_pull) noexcept nogil
cdef void stream_free(Store* store, Stream* stream) noexcept nogil
cdef void answer_voids(Store* store, int dest, int tag, int64_t count) noexcept nogil
