# cython: language_level=3
"""What the owner of keys has written down; see _entries.pyx."""
from libc.stdint cimport int64_t
from hopcoll._store_state cimport *

cdef Entry* find_entry(Store* store, const Key* key) noexcept nogil
cdef Entry* make_entry(Store* store, const Key* key) noexcept nogil
cdef void free_entry(Store* store, Entry* entry) noexcept nogil
cdef void free_entries(Store* store) noexcept nogil
cdef bint has_ended(const Entry* entry) noexcept nogil
cdef void end_recipe(Store* store, Entry* entry, int state) noexcept nogil
cdef void enter_state(Store* store, Entry* entry, int state) noexcept nogil
cdef void forget_oldest(Store* store) noexcept nogil
cdef Holder* find_holder(const Entry* entry, int rank) noexcept nogil
cdef Holder* make_holder(Store* store, Entry* entry, int rank, int64_t stamp) noexcept nogil
cdef void leave_source(Entry* entry, Holder* holder) noexcept nogil
cdef void drop_holder(Store* store, Entry* entry, Holder* holder) noexcept nogil
cdef Waiter* find_waiter(const Entry* entry, int rank, int kind) noexcept nogil
cdef void drop_waiter(Store* store, Waiter** link) noexcept nogil
cdef void make_waiter(Store* store, Entry* entry, int rank, int kind, const Letter* letter,
                      const unsigned char* meta) noexcept nogil
cdef void tell(Store* store, const Entry* entry, int rank, int type, int64_t stamp) noexcept nogil
cdef void tell_waiters(Store* store, Entry* entry, int type, int64_t stamp) noexcept nogil
cdef void drop_waiters_of(Store* store, Entry* entry, int rank, int kind) noexcept nogil
