# cython: language_level=3
"""What stores tell each other, and their memory; see _letters.pyx."""
from libc.stdint cimport int64_t
from hopcoll._store_state cimport *

cdef void* take_memory(Store* store, int64_t nbytes) noexcept nogil
cdef void give_memory(Store* store, void* memory) noexcept nogil
cdef Copy* copy_new(Store* store, int64_t nbytes) noexcept nogil
cdef Copy* copy_force(Store* store, int64_t nbytes) noexcept nogil
cdef void copy_let_go(Store* store, Copy* copy) noexcept nogil
cdef Letter letter_of(int type, const Key* key, int64_t stamp) noexcept nogil
cdef void post(Store* store, int dest, const void* head, int64_t head_bytes, const void* body,
               int64_t body_bytes) noexcept nogil
cdef void send_letter(Store* store, int dest, const Letter* letter) noexcept nogil
cdef void send_object(Store* store, int dest, Letter* letter, const unsigned char* meta,
                      int meta_bytes, const Copy* copy) noexcept nogil
cdef Parcel* parcel_of(Store* store, int peer, const void* bytes, int64_t nbytes) noexcept nogil
cdef void send_sync(Store* store) noexcept nogil
