# cython: language_level=3
"""The places of reductions that this rank fills; see _places.pyx."""
from cython_kernels.transport cimport Event
from hopcoll._store_state cimport *

cdef void on_place_letter(Store* store, const Letter* letter,
                          const unsigned char* body) noexcept nogil
cdef Item* item_of_place(Store* store, const Letter* letter) noexcept nogil
cdef void feed_event(Store* store, Stream* stream, const Event* event) noexcept nogil
cdef void places_advance(Store* store) noexcept nogil
cdef void places_of_gone(Store* store, int rank, bint lost) noexcept nogil
cdef void places_sweep(Store* store) noexcept nogil
cdef void places_release(Store* store) noexcept nogil
cdef void place_roomed(Store* store, Place* place) noexcept nogil
cdef void place_refused(Store* store, Place* place) noexcept nogil
cdef void places_refused(Store* store, const Item* item) noexcept nogil
cdef bint place_waits_for(Store* store, const Item* item) noexcept nogil
cdef void places_free(Store* store) noexcept nogil
