# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The store of objects on real MPI, as Python sees it; see `hopcoll.objects`.

It runs under the lock, and by the thread, of its root engine.  Python lets go of copies and of
what it waits for when it likes, also where it may not wait for the lock: both are then put aside,
and the next call gives them back; so are objects to which no ref is left.  Its files are the
business of a thread of their own (`hopcoll._scratch`), which has the lock only while it takes a job
and tells its end.
"""
import os

from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
cimport cython
from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE, PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_FromMemory
from hopcoll._contexts cimport hub_store
from hopcoll._crank cimport WAIT_DONE, clock_us, lock, turn, unlock, wait_for
from hopcoll._runtime cimport Engine_
from hopcoll._recipes cimport inputs_max
from hopcoll._store cimport (
    store_ask, store_end_job, store_let_go, store_look, store_ping, store_put, store_reduce,
    store_reserve, store_take_job, store_withdraw)
from hopcoll._state cimport Result
from hopcoll._store_state cimport *

from hopcoll import _scratch

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int, const void*, size_t)

cdef enum:
    BELLS_MAX = 16
    PINGS = 8                 # of each size, at first
    PING_US = 20000           # later ones are so far apart, at calls of the program
    LARGE_MIN = 1 << 20       # a get of less says little about the bandwidth
    RATES = 16
    RATES_MIN = 3
    ENDING_S = 5              # how long the end waits for the disk
    STARTING_NS = 200000      # what a busy start may make of the latency, at most
    UNKNOWN_NS = 50000        # before anything is measured: 50 us, and
    UNKNOWN_BYTES_PER_MS = 1250000    # ... 10 Gbit/s

#: What an ask may be about, and how it may have ended.
PUT, GET, LOOK, DELETE = ASK_PUT, ASK_GET, ASK_LOOK, ASK_DELETE
OK, EXISTS, LOST, DELETED, FULL, CLOSED, FAILED = (
    ASK_OK, ASK_EXISTS, ASK_LOST, ASK_DELETED, ASK_FULL, ASK_CLOSED, ASK_FAILED)
#: Why a reduction failed.
REASONS = {
    WHY_LOST: "lost", WHY_DELETED: "deleted", WHY_FAILED: "failed", WHY_DIFFERENT: "different",
    WHY_UNSUPPORTED: "unsupported", WHY_FULL: "full"}
META_BYTES_MAX = META_MAX


cdef struct Bells:
    int fds[BELLS_MAX]        # -1: free
    int disk                  # wakes who does jobs; -1: nobody
    Store* store              # whose network is measured
    int peer
    int away                  # a ping is
    int later                 # pings that came back since the first ones
    int64_t sent_us
    int64_t small_us          # the best round trips
    int64_t large_us
    int64_t rates[RATES]      # of the last large objects that were got, in bytes a millisecond
    int64_t rated


cdef void on_pong(void* context, int64_t serial) noexcept nogil:
    """A message has gone to the peer and back: short ones first, then some that fill one.  What
    these take longer is their bytes, twice."""
    cdef Bells* bells = <Bells*>context
    cdef Store* store = bells.store
    cdef int64_t now_us = clock_us(), took_us = now_us - bells.sent_us
    cdef int64_t* best = (&bells.large_us if PINGS < serial <= 2 * PINGS else &bells.small_us)
    if best[0] == 0 or took_us < best[0]:
        best[0] = took_us if took_us else 1
    if serial < 2 * PINGS:
        bells.sent_us = now_us
        store_ping(store, bells.peer, serial + 1,
                   0 if serial < PINGS else store.settings.inline_bytes)
        return
    bells.away = 0
    bells.later += serial > 2 * PINGS
    store.settings.latency_ns = bells.small_us * 500
    if bells.later < PINGS and store.settings.latency_ns > STARTING_NS:
        store.settings.latency_ns = STARTING_NS
    if bells.rated < RATES_MIN and bells.large_us > bells.small_us:
        store.settings.bytes_per_ms = (2 * store.settings.inline_bytes * 1000
                                       // (bells.large_us - bells.small_us))


cdef void ring(void* context) noexcept nogil:
    """An ask was answered: the loops that wait for one wake up."""
    cdef Bells* bells = <Bells*>context
    cdef uint64_t one = 1
    cdef int i
    for i in range(BELLS_MAX):
        if bells.fds[i] >= 0:
            write(bells.fds[i], &one, sizeof(one))


cdef void on_job(void* context) noexcept nogil:
    """There is something to do with a file.  If the pipe is full, it was rung often enough."""
    write((<Bells*>context).disk, b"j", 1)


@cython.final
@cython.no_gc_clear
cdef class Sealed:
    """The bytes of a copy, read-only: as long as a view of them lives, they stay."""
    cdef Keeper keeper
    cdef Copy* copy

    def __dealloc__(self):
        if self.copy != NULL:
            self.keeper.copies_left.append(<uintptr_t>self.copy)

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.copy.data, self.copy.nbytes, 1, flags)

    def __len__(self):
        return self.copy.nbytes


@cython.final
@cython.no_gc_clear
cdef class Waiting:
    """What was asked of the store: a put, a get, a wait or a deletion."""
    cdef Keeper keeper
    cdef Ask* ask

    def __dealloc__(self):
        if self.ask != NULL:
            self.keeper.asks_left.append(<uintptr_t>self.ask)

    @property
    def complete(self):
        return bool(self.ask.result.complete)

    @property
    def status(self):
        return self.ask.status if self.ask.result.complete else ASK_CLOSED

    @property
    def stamp(self):
        return self.ask.stamp

    @property
    def meta(self):
        """What the bytes are, of an object that is there."""
        return self.ask.meta[:self.ask.meta_bytes]

    @property
    def why(self):
        """Of a reduction that failed: (reason, key of an input, key of another or zeros)."""
        cdef const Why* why = <const Why*>self.ask.meta
        cdef const unsigned char* input = <const unsigned char*>&why.input
        cdef const unsigned char* other = <const unsigned char*>&why.other
        return REASONS[why.reason], input[:sizeof(Key)], other[:sizeof(Key)]

    def take(self):
        """Of a get that succeeded: (meta, bytes); the bytes stay as long as something has them."""
        cdef Sealed sealed = Sealed.__new__(Sealed)
        sealed.keeper = self.keeper
        sealed.copy = self.ask.copy
        self.ask.copy = NULL
        return self.ask.meta[:self.ask.meta_bytes], sealed


@cython.final
@cython.no_gc_clear
cdef class Keeper:
    """The store of one rank.

    Parameters
    ----------
    engine : hopcoll._runtime.Engine
        The root's.
    scratch : hopcoll._scratch.Scratch or None
        Where what has no room in memory goes; None: nowhere.
    """
    cdef object __weakref__
    cdef readonly object scratch
    cdef object worker
    cdef Engine_ engine
    cdef Store* store
    cdef list copies_left
    cdef list asks_left
    cdef readonly list refs_left      # keys
    cdef Bells* bells

    def __cinit__(self, Engine_ engine not None, scratch):
        cdef int i
        self.engine = engine
        self.scratch = scratch
        self.copies_left = []
        self.asks_left = []
        self.refs_left = []
        self.store = hub_store(&engine.rt.hub)
        self.bells = <Bells*>calloc(1, sizeof(Bells))
        if self.bells == NULL:
            raise MemoryError("objects: out of memory")
        for i in range(BELLS_MAX):
            self.bells.fds[i] = -1
        self.bells.disk = -1
        if scratch is not None:
            self.worker, self.bells.disk = _scratch.start(self, scratch)
        with nogil:
            lock(&engine.rt)
            engine.rt.hub.store_used = 1       # now it follows the root
            self.store.notify_context = self.bells
            self.store.notify = ring
            if self.bells.disk >= 0:
                self.store.disk = on_job
            self.store.settings.latency_ns = UNKNOWN_NS
            self.store.settings.bytes_per_ms = UNKNOWN_BYTES_PER_MS
            self.measure()
            unlock(&engine.rt)

    cdef void measure(self) noexcept nogil:
        """Pings the next rank, of another host if there is one."""
        cdef Store* store = self.store
        cdef int i, r
        self.bells.store = store
        self.bells.peer = store.rank
        for i in range(1, store.size):
            r = (store.rank + i) % store.size
            if self.bells.peer == store.rank or store.host[r] != store.host[store.rank]:
                self.bells.peer = r
            if store.host[r] != store.host[store.rank]:
                break
        if self.bells.peer != store.rank:
            store.pong = on_pong
            self.ping(1)

    cdef void ping(self, int64_t serial) noexcept nogil:
        self.bells.away = 1
        self.bells.sent_us = clock_us()
        store_ping(self.store, self.bells.peer, serial, 0)

    cdef void ping_again(self) noexcept nogil:
        """Of many pings the best is the latency: when the first were under way, all ranks may have
        been busy with their start."""
        if (self.store.pong != NULL and not self.bells.away
                and clock_us() - self.bells.sent_us > PING_US):
            self.ping(2 * PINGS + 1)

    def __dealloc__(self):
        if self.engine is not None and self.store != NULL and not self.engine.abandoned:
            with nogil:
                lock(&self.engine.rt)
                self.store.notify = NULL
                self.store.disk = NULL
                self.store.pong = NULL
                unlock(&self.engine.rt)
            self.refs_left.clear()             # what would ask for them needs us alive
            self.reap()
        if self.bells != NULL and self.bells.disk >= 0:
            os.close(self.bells.disk)
        free(self.bells)

    def close(self):
        """After the store has left: ends the thread, if the disk does not hang, and removes the
        files."""
        if self.worker is None:
            return
        with nogil:
            lock(&self.engine.rt)
            self.store.disk = NULL
            unlock(&self.engine.rt)
        os.close(self.bells.disk)
        self.bells.disk = -1
        self.worker.join(ENDING_S)
        if not self.worker.is_alive():
            self.worker = None
            with nogil:
                lock(&self.engine.rt)
                store_look(self.store)
                unlock(&self.engine.rt)
            self.scratch.close()

    def take_job(self):
        """The next job of the thread for files: (which, kind, number, memory, checksum)."""
        cdef Job* job
        if self.engine.abandoned or self.bells.disk < 0:
            return None
        with nogil:
            lock(&self.engine.rt)
            job = store_take_job(self.store)
            unlock(&self.engine.rt)
        if job == NULL:
            return None
        if job.kind == JOB_REMOVE:
            return <uintptr_t>job, "remove", job.file, None, 0
        data = PyMemoryView_FromMemory(<char*>job.copy.data, job.nbytes,
                                       PyBUF_READ if job.kind == JOB_WRITE else PyBUF_WRITE)
        return (<uintptr_t>job, "write" if job.kind == JOB_WRITE else "read", job.file, data,
                job.checksum)

    def end_job(self, uintptr_t which, uint64_t checksum, bint failed):
        """Its end.  What follows, who turns the crank next sees to: this thread may not send."""
        cdef Job* job = <Job*>which
        job.failed = failed
        job.checksum = checksum
        with nogil:
            lock(&self.engine.rt)
            store_end_job(self.store, job)
            unlock(&self.engine.rt)

    cdef int reap(self) except -1:
        """Gives back what Python let go of."""
        cdef Ask* ask
        cdef Copy* copy
        while self.copies_left:
            copy = <Copy*><uintptr_t>self.copies_left.pop()
            with nogil:
                lock(&self.engine.rt)
                store_let_go(self.store, copy)
                unlock(&self.engine.rt)
        while self.asks_left:
            ask = <Ask*><uintptr_t>self.asks_left.pop()
            with nogil:
                lock(&self.engine.rt)
                store_withdraw(self.store, ask)
                store_let_go(self.store, ask.copy)
                unlock(&self.engine.rt)
            free(ask)
        while self.refs_left:
            self.begin(self.new_ask(ASK_DELETE, self.refs_left.pop()))
        return 0

    cdef int begin(self, Waiting waiting) except -1:
        """Of a deletion nobody has to wait for the end."""
        with nogil:
            lock(&self.engine.rt)
            self.ping_again()
            store_ask(self.store, waiting.ask)
            unlock(&self.engine.rt)
        return 0

    cdef int check(self) except -1:
        self.engine.check()
        if self.engine.rt.engine.stopped:
            raise self.engine.stopped_error("objects")
        if self.store.broken:
            raise MemoryError("objects: no memory left for what the store has to know")
        return self.reap()

    cdef Waiting new_ask(self, int kind, bytes key):
        cdef Waiting waiting = Waiting.__new__(Waiting)
        cdef const unsigned char* raw = key
        if len(key) != sizeof(Key):
            raise ValueError(f"key must have {sizeof(Key)} bytes, not {len(key)}")
        waiting.keeper = self
        waiting.ask = <Ask*>calloc(1, sizeof(Ask))
        if waiting.ask == NULL:
            raise MemoryError("objects: out of memory")
        waiting.ask.kind = kind
        memcpy(&waiting.ask.key, raw, sizeof(Key))
        return waiting

    def put(self, bytes key, const unsigned char[::1] data, bytes meta, timeout_s):
        """Starts a put, when there is room for it.  It is answered by FULL when there will be
        none, and by nothing when the time is over."""
        cdef Waiting waiting
        cdef Copy* copy
        cdef int64_t nbytes = data.shape[0]
        cdef const unsigned char* raw = meta
        self.check()
        if len(meta) > META_MAX:
            raise ValueError(f"meta has {len(meta)} bytes, more than {META_MAX}")
        waiting = self.new_ask(ASK_PUT, key)
        waiting.ask.meta_bytes = len(meta)
        memcpy(waiting.ask.meta, raw, len(meta))
        with nogil:
            lock(&self.engine.rt)
            store_reserve(self.store, waiting.ask, nbytes)
            unlock(&self.engine.rt)
        if not self.turn_until(&waiting.ask.want.result, timeout_s):
            return waiting
        copy = waiting.ask.copy
        if copy == NULL:
            waiting.ask.status = ASK_FULL
            waiting.ask.result.complete = 1
        with nogil:
            if copy != NULL and nbytes:
                memcpy(copy.data, &data[0], nbytes)
            if copy != NULL:
                lock(&self.engine.rt)
                self.ping_again()
                store_put(self.store, waiting.ask)
                unlock(&self.engine.rt)
        return waiting

    @property
    def inputs_max(self):
        """Of how many objects a reduction may be made."""
        return inputs_max(self.store)

    def reduce(self, bytes key, inputs, int count, int op):
        """Starts a reduction of the first `count` of these, (key, what is known) each."""
        cdef Waiting waiting
        cdef int n = len(inputs), i
        cdef const unsigned char* raw
        cdef Ask* asks
        self.check()
        waiting = self.new_ask(ASK_REDUCE, key)
        asks = <Ask*>calloc(n, sizeof(Ask))
        if asks == NULL:
            raise MemoryError("objects: out of memory")
        for i, (one, known) in enumerate(inputs):
            raw = one
            memcpy(&asks[i].key, raw, sizeof(Key))
            asks[i].stamp = known
        with nogil:
            lock(&self.engine.rt)
            store_reduce(self.store, waiting.ask, asks, n, count, op)
            unlock(&self.engine.rt)
        free(asks)
        return waiting

    def ask(self, int kind, bytes key, int64_t known):
        """Starts a get, a wait or a deletion; `known` is the stamp that the ref has, or 0."""
        cdef Waiting waiting
        self.check()
        waiting = self.new_ask(kind, key)
        waiting.ask.stamp = known
        self.begin(waiting)
        return waiting

    def wait(self, Waiting waiting not None, timeout_s):
        """Turns the crank until it is answered; False when the time is over."""
        cdef int64_t begin = clock_us(), before = self.store.counters.bytes_received
        if not self.turn_until(&waiting.ask.result, timeout_s):
            return False
        self.learn(waiting.ask, self.store.counters.bytes_received - before, clock_us() - begin)
        return True

    cdef int turn_until(self, const Result* result, timeout_s) except -1:
        cdef int64_t limit = -1, until
        cdef int code
        if timeout_s is not None:
            limit = clock_us() + <int64_t>(min(timeout_s, 1e9) * 1e6)
        while not result.complete:
            self.check()
            until = clock_us() + 20000
            if limit >= 0 and until > limit:
                until = limit
            with nogil:
                code = wait_for(&self.engine.rt, result, until)
            if code == WAIT_DONE:
                break
            self.engine.check_transport()
            if limit >= 0 and clock_us() >= limit:
                return result.complete != 0
            PyErr_CheckSignals()
        return True

    cdef void learn(self, const Ask* ask, int64_t came, int64_t took_us) noexcept:
        """Of the last large objects that came here, the fastest says what a link carries: the
        others waited for something, too.  Pings are too short for that, where a link lets a
        burst pass."""
        cdef Bells* bells = self.bells
        cdef int64_t best = 0
        cdef int i
        if (ask.kind != ASK_GET or ask.status != ASK_OK or ask.nbytes < LARGE_MIN
                or came < ask.nbytes or took_us <= 0):
            return
        bells.rates[bells.rated % RATES] = ask.nbytes * 1000 // took_us
        bells.rated += 1
        for i in range(RATES):
            best = max(best, bells.rates[i])
        if bells.rated >= RATES_MIN and best:
            self.store.settings.bytes_per_ms = best

    def network(self):
        """(latency in seconds, bandwidth in bytes a second)"""
        self.check()
        return (self.store.settings.latency_ns * 1e-9,
                float(self.store.settings.bytes_per_ms) * 1e3)

    def wait_some(self, asked, int count, timeout_s):
        """Turns the crank until so many are answered, or the time is over."""
        cdef int64_t limit = -1, until
        if timeout_s is not None:
            limit = clock_us() + <int64_t>(min(timeout_s, 1e9) * 1e6)
        while sum(one.complete for one in asked) < count:
            self.check()
            if limit >= 0 and clock_us() >= limit:
                return
            until = clock_us() + 200
            with nogil:
                wait_for(&self.engine.rt, NULL, until)
            self.engine.check_transport()
            PyErr_CheckSignals()

    def turn(self):
        """Turns the crank once."""
        self.check()
        with nogil:
            lock(&self.engine.rt)
            turn(&self.engine.rt)
            unlock(&self.engine.rt)

    @property
    def threaded(self):
        """Whether a thread turns the crank while nobody calls."""
        return bool(self.engine.rt.threaded)

    def add_bell(self):
        """A file descriptor that becomes readable when something is answered."""
        cdef int i
        for i in range(BELLS_MAX):
            if self.bells.fds[i] < 0:
                self.bells.fds[i] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                return self.bells.fds[i]
        raise RuntimeError(f"objects: at most {BELLS_MAX} event loops wait at a time")

    def drop_bell(self, int fd):
        """Gives back what `add_bell` gave."""
        cdef int i
        with nogil:
            lock(&self.engine.rt)
            for i in range(BELLS_MAX):
                if self.bells.fds[i] == fd:
                    self.bells.fds[i] = -1
            unlock(&self.engine.rt)
        os.close(fd)

    def stats(self):
        """What the store has, and has counted."""
        self.check()
        out = dict(self.store.counters)
        out["used_bytes"] = self.store.used_bytes
        out["limit_bytes"] = self.store.settings.limit_bytes
        out["scratch_bytes"] = self.store.filed_bytes
        out["scratch_limit_bytes"] = self.store.settings.scratch_bytes
        out["inline_bytes"] = self.store.settings.inline_bytes
        out["objects"] = self.store.items_count
        out["streams"] = self.store.streams_used
        return out
