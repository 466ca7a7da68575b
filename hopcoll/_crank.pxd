# cython: language_level=3
"""Who turns the crank, and what they share; see _crank.pyx."""
from libc.stdint cimport int64_t, int32_t
from cython_kernels.doorbell cimport Bell
from cython_kernels.transport cimport Transport
from hopcoll._state cimport Engine, Result
from hopcoll._contexts cimport Context, Hub
from hopcoll._faults cimport Faults
from hopcoll._lookout cimport Lookout
from hopcoll._trace cimport Trace

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
    Trace* trace              # NULL: nothing is written down

cdef int64_t clock_us() noexcept nogil
cdef void sleep_us(int64_t us) noexcept nogil
cdef int64_t nap_after(int64_t waited_us) noexcept nogil
cdef void lock(Runtime* rt) noexcept nogil
cdef void unlock(Runtime* rt) noexcept nogil
cdef void wake_clock(Runtime* caller) noexcept nogil
cdef int turn(Runtime* caller) noexcept nogil
cdef int wait_for(Runtime* rt, const Result* result, int64_t until_us) noexcept nogil
cdef bint start_crank(Runtime* rt) noexcept nogil
cdef void stop_crank(Runtime* rt) noexcept nogil
