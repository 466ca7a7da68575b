# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Who turns the crank: the lock, the clock, the waiting caller and the progress thread.

One thread at a time turns the crank: the caller's while it waits in a call, else the native thread,
which never takes the GIL.  It looks again at once while messages come, after 20 to 50 us while an
operation is open, and later where nothing has come for long: a hundredth of that.  With none open
it sleeps: on a bell that the others ring where all ranks are on one host, else for 1.8 ms at a
time.

A communicator that was split off (`hopcoll._branches`) has an engine of its own, and the lock, the
transport and the thread of its root: whoever turns the crank turns it for all of them.
"""
from libc.stdint cimport int64_t, int32_t
from cython_kernels.doorbell cimport bell_ring, bell_wait
from cython_kernels.transport cimport Event
from hopcoll._engine cimport engine_event, engine_tick
from hopcoll._contexts cimport context_wake, hub_event, hub_follow, hub_store, hub_tick
from hopcoll._faults cimport check_timed_faults
from hopcoll._store cimport store_look, store_moves
from hopcoll._trace cimport trace_event, trace_tick

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigfillset(sigset_t*)
    int pthread_sigmask(int, const sigset_t*, sigset_t*)
    int SIG_BLOCK
    int SIG_SETMASK


cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int, timespec*)
    int nanosleep(const timespec*, timespec*)
    int CLOCK_MONOTONIC

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int, unsigned long, unsigned long, unsigned long, unsigned long)
    int PR_SET_TIMERSLACK

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    EVENTS_A_TURN = 64
    NAP_US = 1800             # an answer takes no longer than 2 ms
    SLEEP_US = 20000          # when whoever needs us rings
    SPINS_BEFORE_YIELD = 200
    NAP_MIN_US = 50
    NAP_MAX_US = 1000
    STALE_US = 100            # an older clock would take what just came for long overdue


cdef int64_t clock_us() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000 + t.tv_nsec // 1000


cdef void sleep_us(int64_t us) noexcept nogil:
    cdef timespec t
    t.tv_sec = us // 1000000
    t.tv_nsec = (us % 1000000) * 1000
    nanosleep(&t, NULL)


cdef int64_t nap_after(int64_t waited_us) noexcept nogil:
    """How long to sleep for whom it has taken so long already: a hundredth of it, so that naps cost
    no more than that, and who waits for long leaves the processor to those that it waits for."""
    return min(max(waited_us // 100, NAP_MIN_US), NAP_MAX_US)


# ---- the crank ----------------------------------------------------------------------------

cdef void lock(Runtime* rt) noexcept nogil:
    pthread_mutex_lock(&rt.home.mutex)
    if rt.context != NULL:
        context_wake(rt.context)


cdef void unlock(Runtime* rt) noexcept nogil:
    pthread_mutex_unlock(&rt.home.mutex)


cdef void tick(Runtime* rt, int64_t now) noexcept nogil:
    if now == rt.engine.now_us:
        return
    rt.hub.now_us = now
    if rt.trace != NULL:
        trace_tick(rt.trace, now)
    engine_tick(rt.engine, now)
    if rt.hub.count or rt.hub.store_used:
        hub_follow(&rt.hub, rt.engine)
        hub_tick(&rt.hub, now)


cdef void wake_clock(Runtime* caller) noexcept nogil:
    """After a nap: the time, before what has come meanwhile, or is called now, is dated by it; and
    that we were away, before anything completes.  The lock is held."""
    cdef int64_t now = clock_us()
    if now - caller.home.engine.now_us > STALE_US:
        tick(caller.home, now)


cdef int turn(Runtime* caller) noexcept nogil:
    """Handles what has come, for whomever; the lock is held.  Returns the number of events."""
    cdef Runtime* rt = caller.home
    cdef Event event
    cdef int count = 0
    cdef int64_t now
    wake_clock(rt)
    while count < EVENTS_A_TURN and rt.transport.poll(rt.transport.self, &event):
        if not hub_event(&rt.hub, &event):
            if rt.trace != NULL:
                trace_event(rt.trace, &event)
            engine_event(rt.engine, &event)
        count += 1
    if rt.hub.store_used:
        store_look(hub_store(&rt.hub))
    now = clock_us()
    if count:
        rt.last_event_us = now
    tick(rt, now)
    if rt.faults.timed:
        check_timed_faults(&rt.faults, rt.engine, now)
    return count


cdef int wait_for(Runtime* rt, const Result* result, int64_t until_us) noexcept nogil:
    """Turns the crank until the result is complete or the time is over."""
    cdef int count, complete = 0, broken = 0
    cdef int64_t idle = 0, waited
    __atomic_add_fetch(&rt.home.callers, 1, __ATOMIC_SEQ_CST)
    while True:
        lock(rt)
        count = turn(rt)
        complete = result != NULL and result.complete
        broken = rt.engine.broken
        unlock(rt)
        if complete or broken or rt.engine.now_us >= until_us:
            break
        if count:
            idle = 0
            continue
        # Spinning is the enemy where ranks outnumber cores: yield soon, sleep later.
        idle += 1
        if idle > SPINS_BEFORE_YIELD:
            waited = rt.engine.now_us - max(rt.home.last_event_us, rt.home.lookout.changed_us)
            if waited > 2000:
                sleep_us(nap_after(waited))
            else:
                sched_yield()
    __atomic_sub_fetch(&rt.home.callers, 1, __ATOMIC_SEQ_CST)
    return WAIT_DONE if complete else WAIT_BROKEN if broken else WAIT_OVER


cdef extern from * nogil:
    int __ATOMIC_SEQ_CST
    int __atomic_add_fetch(int32_t*, int32_t, int)
    int __atomic_sub_fetch(int32_t*, int32_t, int)
    int __atomic_load_n(int32_t*, int)
    void __atomic_store_n(int32_t*, int32_t, int)


cdef void* progress(void* argument) noexcept nogil:
    """The native thread."""
    cdef Runtime* rt = <Runtime*>argument
    cdef int64_t now, rung_us = 0, quiet_us
    cdef int count
    cdef bint is_open
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)      # sleep as short as told
    while not __atomic_load_n(&rt.stop, __ATOMIC_SEQ_CST):
        if __atomic_load_n(&rt.callers, __ATOMIC_SEQ_CST):
            sleep_us(1000)
            continue
        if pthread_mutex_trylock(&rt.mutex) == 0:
            count = turn(rt)
            now = rt.engine.now_us
            is_open = (rt.engine.finished < rt.engine.next_seq or rt.engine.frozen
                       or rt.engine.outlets_used > 0 or rt.engine.roll_us
                       or rt.engine.patience_us or rt.hub.awake
                       or (rt.hub.store_used and store_moves(hub_store(&rt.hub))))
            pthread_mutex_unlock(&rt.mutex)
            # A short sleep, not a yield: who slept is preferred to the caller's busy thread.
            if count:
                continue
            quiet_us = now - (rung_us if rung_us > rt.last_event_us else rt.last_event_us)
            if is_open or quiet_us < 3000:
                sleep_us(20 if quiet_us < 300 else nap_after(quiet_us))
            elif rt.bell != NULL:
                if bell_wait(rt.bell, SLEEP_US):
                    rung_us = clock_us()        # what it rang for may still be on its way
            else:
                sleep_us(NAP_US)
        else:
            sleep_us(50)
    return NULL


cdef bint start_crank(Runtime* rt) noexcept nogil:
    """Starts the native thread.  Signals are for Python's."""
    cdef sigset_t all_signals, previous
    sigfillset(&all_signals)
    pthread_sigmask(SIG_BLOCK, &all_signals, &previous)
    if pthread_create(&rt.thread, NULL, progress, rt) == 0:
        rt.threaded = 1
    pthread_sigmask(SIG_SETMASK, &previous, NULL)
    return rt.threaded


cdef void stop_crank(Runtime* rt) noexcept nogil:
    if rt.threaded:
        __atomic_store_n(&rt.stop, 1, __ATOMIC_SEQ_CST)
        if rt.bell != NULL:
            bell_ring(rt.bell, rt.engine.rank)
        pthread_join(rt.thread, NULL)
        rt.threaded = 0
