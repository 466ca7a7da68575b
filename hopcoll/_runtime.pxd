# cython: language_level=3
"""The engine on real MPI, and what a communicator shares that was split off; see _runtime.pyx."""
from libc.stdint cimport int64_t, int32_t
from cython_kernels.doorbell cimport Bell, Doorbell
from cython_kernels.transport cimport Transport
from cython_kernels.mpi_transport cimport MpiTransport
from hopcoll._state cimport Engine, Operation, Result, Settings
from hopcoll._contexts cimport Context, Hub
from hopcoll._faults cimport Faults
from hopcoll._fence cimport Fence
from hopcoll._lookout cimport Lookout

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef unsigned long pthread_t
    int pthread_mutex_init(pthread_mutex_t*, const void*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_trylock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)
    int pthread_create(pthread_t*, const void*, void* (*)(void*) noexcept nogil, void*)
    int pthread_join(pthread_t, void**)

cdef enum Wait:
    WAIT_OVER = 0
    WAIT_DONE = 1
    WAIT_BROKEN = 2


cdef struct Runtime:
    Runtime* home             # whose lock, transport and thread it is: the root's, or its own
    Context* context          # of a communicator that was split off; NULL: the root
    Engine* engine
    Transport* transport
    Bell* bell                # NULL: nobody rings
    pthread_mutex_t mutex
    pthread_t thread
    int32_t threaded
    int32_t stop
    int32_t callers           # threads of the caller inside a wait
    int64_t last_event_us
    Faults faults
    Lookout lookout
    Hub hub                   # the contexts over this one


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
    cdef int meet(self) except -1
    cdef void stop_thread(self) noexcept
    cdef void drop(self, Result* result) noexcept
    cdef bint is_stable(self, int64_t seq)
    cdef int check(self) except -1
    cdef bint wait_until(self, Operation_ operation, int64_t limit) except -1
    cdef int check_transport(self) except -1
    cdef int reap(self) except -1
    cdef void let_go(self, const Result* result)

cdef int64_t clock_us() noexcept nogil
cdef void sleep_us(int64_t us) noexcept nogil
cdef void lock(Runtime* rt) noexcept nogil
cdef void unlock(Runtime* rt) noexcept nogil
cdef int turn(Runtime* caller) noexcept nogil
cdef int wait_for(Runtime* rt, const Result* result, int64_t until_us) noexcept nogil
cdef int call_function(void* context, const Operation* op, void* dest, const void* left,
                       const void* right, int64_t count) noexcept with gil
