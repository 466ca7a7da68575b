# cython: language_level=3
"""The owner's side of the directory; see _directory.pyx."""
from libc.stdint cimport int64_t
from hopcoll._store_state cimport *

cdef void decide(Store* store, Entry* entry) noexcept nogil
cdef void retry(Store* store, Entry* entry) noexcept nogil
cdef void on_note(Store* store, int peer, const Letter* letter) noexcept nogil
cdef void on_owner_letter(Store* store, int peer, const Letter* letter,
                          const unsigned char* meta) noexcept nogil
cdef void forget_gone(Store* store, int rank) noexcept nogil
cdef void settle_directory(Store* store) noexcept nogil
