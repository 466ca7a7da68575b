# cython: language_level=3
"""One rank's store of objects: what the runtime and the simulation call; see _store.pyx."""
from libc.stdint cimport int64_t, uint16_t
from cython_kernels.transport cimport Event, Transport
from hopcoll._store_state cimport *

cdef enum Going:
    GOING_DEAD = 0
    GOING_LOST = 1            # left out; perhaps alive
    GOING_LEFT = 2            # it said good-bye

cdef Store* store_new(Transport* transport, const StoreSettings* settings, int32_t* tags,
                      const uint16_t* host) noexcept nogil
cdef void store_free(Store* store) noexcept nogil
cdef void store_event(Store* store, const Event* event) noexcept nogil
cdef void store_gone(Store* store, int rank, int going) noexcept nogil
cdef void store_leave(Store* store) noexcept nogil
cdef bint store_moves(const Store* store) noexcept nogil
cdef void store_reserve(Store* store, Ask* ask, int64_t nbytes) noexcept nogil
cdef void store_put(Store* store, Ask* ask) noexcept nogil
cdef Job* store_take_job(Store* store) noexcept nogil
cdef void store_end_job(Store* store, Job* job) noexcept nogil
cdef void store_look(Store* store) noexcept nogil
cdef void store_reduce(Store* store, Ask* ask, const Ask* inputs, int inputs_count, int count,
                       int op) noexcept nogil
cdef void store_ask(Store* store, Ask* ask) noexcept nogil
cdef void store_withdraw(Store* store, Ask* ask) noexcept nogil
cdef void store_ping(Store* store, int peer, int64_t serial, int64_t nbytes) noexcept nogil
cdef void store_let_go(Store* store, Copy* copy) noexcept nogil
