# cython: language_level=3
"""What the owner of a key is told by those who have to do with it; see _asks.pyx."""
from libc.stdint cimport int64_t
from hopcoll._store_state cimport *

cdef void tell_owner(Store* store, Item* item, int type, int64_t stamp, int rank) noexcept nogil
cdef void tell_orphan(Store* store, Item* item, int source) noexcept nogil
cdef void tell_put(Store* store, Item* item) noexcept nogil
cdef void tell_hold(Store* store, Item* item) noexcept nogil
cdef bint is_whole(const Item* item) noexcept nogil
cdef void register(Store* store, Item* item) noexcept nogil
cdef void delete_at_owner(Store* store, Item* item) noexcept nogil
cdef void on_deleted(Store* store, Item* item) noexcept nogil
cdef void wait_anew(Store* store, Item* item) noexcept nogil
cdef void wait_again(Store* store, Item* item) noexcept nogil
cdef void copy_arrived(Store* store, Item* item) noexcept nogil
