# cython: language_level=3
"""Reductions at the owner of the result, and at the caller; see _recipes.pyx."""
from hopcoll._store_state cimport *

cdef void recipe_call(Store* store, Ask* ask, const Ask* inputs, int inputs_count, int count,
                      int op) noexcept nogil
cdef int inputs_max(const Store* store) noexcept nogil
cdef void recipe_taken(Store* store, const Letter* letter) noexcept nogil
cdef void recipe_made(Store* store, const Letter* letter) noexcept nogil
cdef void recipes_register(Store* store, int rank, const Mask* before) noexcept nogil
cdef void on_recipe_letter(Store* store, int peer, const Letter* letter,
                           const unsigned char* body) noexcept nogil
cdef void on_scouted(Store* store, Item* item, const Letter* letter,
                     const unsigned char* meta) noexcept nogil
cdef void recipes_step(Store* store) noexcept nogil
cdef void recipes_free(Store* store) noexcept nogil
