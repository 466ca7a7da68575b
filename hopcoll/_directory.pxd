# cython: language_level=3
"""The owner's side of the directory; see _directory.pyx."""
from libc.stdint cimport int64_t
from hopcoll._store_state cimport *

cdef Entry* find_entry(Store* store, const Key* key) noexcept nogil
cdef void on_owner_letter(Store* store, int peer, const Letter* letter,
                          const unsigned char* meta) noexcept nogil
cdef void forget_gone(Store* store, int rank) noexcept nogil
cdef void settle_directory(Store* store) noexcept nogil
cdef void forget_oldest(Store* store) noexcept nogil
cdef void free_entries(Store* store) noexcept nogil
