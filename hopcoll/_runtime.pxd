# cython: language_level=3
"""The engine on real MPI, and what a communicator shares that was split off; see _runtime.pyx."""
from libc.stdint cimport int64_t, int32_t
from cython_kernels.doorbell cimport Doorbell
from cython_kernels.mpi_transport cimport MpiTransport
from hopcoll._state cimport Engine, Operation, Result, Settings
from hopcoll._crank cimport Runtime
from hopcoll._fence cimport Fence


cdef class Operation_:
    cdef Engine_ owner
    cdef Result* result
    cdef readonly object seq
    cdef bint closed


cdef class Engine_:
    cdef Runtime rt
    cdef MpiTransport transport
    cdef Doorbell doorbell
    cdef Fence fence
    cdef list names           # of each rank: its host and process, for people
    cdef object config
    cdef dict kept
    cdef dict functions
    cdef object failure       # what a user's operation raised
    cdef list orphans
    cdef bint closed
    cdef bint abandoned
    cdef bint ended           # no request points into the engine's memory any more
    cdef bint lingers         # closed, but its engine still runs: others have not heard of it yet
    cdef readonly list branches      # the engines that were split off, until they are over
    cdef readonly int rank
    cdef readonly int size
    cdef readonly bint fault_tolerant
    cdef readonly str mpi_thread
    cdef object __weakref__
    cdef int open_store(self) except -1
    cdef int meet(self) except -1
    cdef void stop_thread(self) noexcept
    cdef void drop(self, Result* result) noexcept
    cdef bint is_stable(self, int64_t seq)
    cdef int check(self) except -1
    cdef bint wait_until(self, Operation_ operation, int64_t limit) except -1
    cdef int check_transport(self) except -1
    cdef int reap(self) except -1
    cdef void let_go(self, const Result* result)

cdef int call_function(void* context, const Operation* op, void* dest, const void* left,
                       const void* right, int64_t count) noexcept with gil
