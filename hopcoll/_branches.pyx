# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The engine of a communicator that was split off another: a context over the root's transport.

A branch shares its root's lock, clock, transport and progress thread.  So it is cheap, it needs no
first contact, and any call of any of them turns the crank for all.
"""
from libc.stdint cimport int64_t, int16_t, uintptr_t
from libc.stdlib cimport free
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from hopcoll._state cimport (
    Mask, RANKS_MAX, Result, Settings, mask_add, mask_none)
from hopcoll._contexts cimport (
    CONTEXTS_MAX, Context, context_at, context_detach, context_handle, context_open,
    context_reserve, context_tell)
from hopcoll._engine cimport (
    engine_free, engine_leave, engine_may_go, engine_new, engine_quiet)
from hopcoll._crank cimport clock_us, lock, sleep_us, turn, unlock, wait_for
from hopcoll._runtime cimport Engine_, call_function

cdef enum:
    GOODBYE_US = 5000000      # how long a good-bye waits until all have heard it

#: How many branches a process may have at a time.
OPEN_MAX = CONTEXTS_MAX


@cython.no_gc_clear
cdef class Branch_(Engine_):
    """One rank's engine of a communicator that was split off; see `hopcoll._groups`."""
    cdef readonly Engine_ root

    def __dealloc__(self):
        cdef Context* context = self.rt.context
        if self.ended:
            if self.rt.engine != NULL:
                engine_free(self.rt.engine)
            self.rt.engine = NULL
            free(context)

    def tell(self, gone):
        """Every rank has made its end, but for those that are `gone`: from now on it hears of
        deaths."""
        cdef Mask mask = mask_none()
        for rank in gone:
            mask_add(&mask, rank)
        with nogil:
            lock(&self.rt)
            context_tell(self.rt.context, &mask)
            unlock(&self.rt)

    def discard(self):
        """Nobody has used it, and nobody will: as if it had never been."""
        with nogil:
            lock(&self.rt)
            context_detach(self.rt.context)
            unlock(&self.rt)
        self.closed = True
        self.ended = True
        self.root.branches.remove(self)

    def finalize(self, timeout_s, waits=True):
        """Leaves, as `Engine.finalize` does; the root's thread goes on.  Where the others have not
        heard the good-bye in time, or at once if it `waits` not, the engine stays and answers them,
        until they have."""
        cdef int64_t until = clock_us() + <int64_t>(min(timeout_s, 1e9) * 1e6)
        cdef bint quiet = False
        if self.closed or self.abandoned:
            return True
        interrupt = None
        while not self.rt.engine.broken:
            with nogil:
                lock(&self.rt)
                turn(&self.rt)
                quiet = engine_quiet(self.rt.engine)
                unlock(&self.rt)
            if quiet or clock_us() >= until:
                break
            with nogil:
                wait_for(&self.rt, NULL, clock_us() + 100)
            try:
                PyErr_CheckSignals()
            except BaseException as error:
                interrupt = error
                break
        with nogil:
            lock(&self.rt)
            engine_leave(self.rt.engine)
            unlock(&self.rt)
        self.closed = True
        self.lingers = True
        until = max(clock_us() if interrupt is not None else until, clock_us() + GOODBYE_US)
        while not self.linger() and waits and clock_us() < until:
            with nogil:
                sleep_us(20)
            try:
                PyErr_CheckSignals()
            except BaseException as error:
                if interrupt is not None:
                    until = clock_us()      # the second time it is meant
                interrupt = error
        if interrupt is not None:
            raise interrupt
        return bool(quiet)

    def linger(self):
        """Once everyone has heard the good-bye, and MPI has let go of all memory, ends it; returns
        whether it has ended."""
        cdef bint over, mine = False
        if not self.lingers:
            return self.closed
        with nogil:
            lock(&self.rt)
            turn(&self.rt)
            over = self.rt.context.requests == 0 and (
                engine_may_go(self.rt.engine) or self.rt.engine.broken)
            if over:
                mine = context_detach(self.rt.context)
            unlock(&self.rt)
        if mine:
            self.part(True)
        return over

    def part(self, ended):
        """Nothing of it will run any more.  Without `ended`, MPI may still write to its memory."""
        self.closed = True
        self.lingers = False
        self.ended = ended
        if ended:
            self.kept.clear()
        self.functions.clear()
        for address in self.orphans:
            free(<Result*><uintptr_t>address)
        self.orphans = []
        self.root.branches.remove(self)


def reserve(Engine_ engine not None):
    """A place for one more communicator: its handle, above 0, which the others need; -1 when there
    is no place any more, -2 when there is no memory.  Local."""
    cdef Context* context
    cdef int count
    for branch in root_of(engine).branches[:]:
        branch.linger()
    with nogil:
        lock(&engine.rt)
        context = context_reserve(&engine.rt.home.hub)
        count = engine.rt.home.hub.count
        unlock(&engine.rt)
    if context == NULL:
        return -1 if count == CONTEXTS_MAX else -2
    return context_handle(context)


def cancel(Engine_ engine not None, int64_t handle):
    """Gives back what `reserve` gave; without effect after `grow`.  Local."""
    cdef Context* context
    with nogil:
        lock(&engine.rt)
        context = context_at(&engine.rt.home.hub, handle)
        if context != NULL and context.engine == NULL:
            context_detach(context)
            free(context)
        unlock(&engine.rt)


def grow(Engine_ engine not None, int64_t handle, members, handles):
    """The engine of a new communicator, or None when memory is short.  Local.

    `members` are ranks of `engine` in their new order, `handles` what each of them has reserved;
    ours is `handle`.  The caller makes sure that nothing is called on it before all have it."""
    cdef Engine_ root = root_of(engine)
    cdef Context* context = context_at(&root.rt.hub, handle)
    cdef int16_t roots[RANKS_MAX]
    cdef int64_t ends[RANKS_MAX]
    cdef int i, size = len(members), rank = members.index(engine.rank)
    cdef Settings settings = root.rt.engine.settings
    cdef Branch_ branch
    for i in range(size):
        roots[i] = members[i] if engine.rt.context == NULL \
            else engine.rt.context.roots[<int>members[i]]
        ends[i] = handles[i]
    settings.outlets_max = settings.outlets_max // root.size * size
    settings.detect_us = 0              # silence is the root's business
    branch = Branch_.__new__(Branch_, None, engine.config)
    branch.root = root
    branch.rt.home = &root.rt
    branch.rt.context = context
    branch.rt.transport = root.rt.transport
    branch.rank = rank
    branch.size = size
    branch.fault_tolerant = root.fault_tolerant
    branch.mpi_thread = root.mpi_thread
    with nogil:
        lock(&root.rt)
        # Its ranks last: what comes is dropped as long as it has none.
        context.table.size = size
        context.table.rank = rank
        branch.rt.engine = engine_new(&context.table, &settings)
        if branch.rt.engine != NULL:
            branch.rt.engine.tags = root.rt.hub.tags
            branch.rt.engine.user_context = <void*>branch
            branch.rt.engine.user = call_function
            branch.rt.engine.now_us = root.rt.hub.now_us
            for i in range(size):
                branch.rt.engine.host[i] = root.rt.engine.host[roots[i]]
            context.engine = branch.rt.engine
            context_open(context, size, rank, roots, ends)
        unlock(&root.rt)
    if branch.rt.engine == NULL:
        branch.rt.context = NULL        # whoever reserved it gives it back
        return None
    root.branches.append(branch)
    return branch


def end_branches(branches, timeout_s):
    """Ends the branches of a root that ends: the last one split off is the first to go, all within
    the time.  Returns what interrupted it, or None."""
    cdef int64_t until = clock_us() + <int64_t>(min(timeout_s, 1e9) * 1e6)
    interrupt = None
    for branch in reversed(branches[:]):
        try:
            # Whoever hears the root's good-bye afterwards has heard this one.
            branch.finalize(max(until - clock_us(), 0) * 1e-6, False)
        except BaseException as error:
            interrupt = error
            until = 0
    return interrupt


cdef Engine_ root_of(Engine_ engine):
    return (<Branch_>engine).root if isinstance(engine, Branch_) else engine
