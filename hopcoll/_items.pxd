# cython: language_level=3
"""Items: what this rank has to do with each key; see _items.pyx."""
from libc.stdint cimport int64_t
from hopcoll._store_state cimport *

cdef Item* find_item(Store* store, const Key* key) noexcept nogil
cdef Item* make_item(Store* store, const Key* key) noexcept nogil
cdef void settle_item(Store* store, Item* item) noexcept nogil
cdef void fill_item(Store* store, Item* item, int state, int64_t stamp, Copy* copy,
                    int64_t nbytes, const unsigned char* meta, int meta_bytes) noexcept nogil
cdef void drop_copy(Store* store, Item* item) noexcept nogil
cdef void finish(Store* store, Item* item, Ask* ask, int status, int64_t stamp) noexcept nogil
cdef void finish_kind(Store* store, Item* item, int kind, int status,
                      int64_t stamp) noexcept nogil
cdef void finish_scouts(Store* store, Item* item, int rank, int64_t stamp) noexcept nogil
cdef void finish_answered(Store* store, Item* item, int status, int64_t stamp,
                          int64_t serial) noexcept nogil
cdef void finish_complete(Store* store, Item* item) noexcept nogil
cdef bint has_ask(const Item* item, int kind) noexcept nogil
cdef bint has_unsent(const Item* item, int kind) noexcept nogil
cdef void unsay_after(Item* item, int64_t serial) noexcept nogil
