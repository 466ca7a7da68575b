# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The engine on real MPI, as Python sees it: its making, its calls, its end."""
import os
import socket

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cython_kernels.doorbell cimport Doorbell
from cython_kernels.mpi_transport cimport MpiTransport, transport_error
from cython_kernels.reduction cimport itemsize_of
from hopcoll._state cimport *
from hopcoll._state cimport Engine as EngineState
from hopcoll._engine cimport (
    control_bytes_of, engine_new, engine_free, engine_leave, engine_quiet, engine_ready,
    engine_awaited, engine_may_go)
from hopcoll._contexts cimport ContextHead, STORE_SLOT, hub_open_store, hub_store
from hopcoll._crank cimport (
    WAIT_DONE, clock_us, lock, nap_after, pthread_mutex_init, sleep_us, start_crank, stop_crank,
    turn, unlock, wait_for, wake_clock)
from hopcoll._fence cimport Fence, fence_rank
from hopcoll._late cimport awaited_of
from hopcoll._lookout cimport close_lookout, flight_of, give_stack, late_report, look_out
from hopcoll._operation cimport start_operation
from hopcoll._store cimport store_free, store_leave
from hopcoll._store_state cimport META_MAX, Letter, StoreSettings
from hopcoll._texts cimport kind_name, mismatch_text, ranks_of
from hopcoll._faults cimport plant_faults
from hopcoll._trace cimport (
    REC_LEAVE, REC_READY, close_trace, open_trace, trace_attach, trace_mark, trace_start,
    trace_started)

import numpy

from cython_kernels import reduction
from hopcoll import _report
from hopcoll.errors import (
    ClosedError, MinorityError, MpiError, ProtocolError, StaleEpochError, TransferTimeoutError)


# ---- operations of the user ----------------------------------------------------------------

cdef object array_over(const void* memory, int64_t count, dtype, bint writable):
    cdef unsigned char[::1] view = <unsigned char[:count * dtype.itemsize]><unsigned char*>memory
    array = numpy.asarray(view).view(dtype)
    array.flags.writeable = writable
    return array


cdef int call_function(void* context, const Operation* op, void* dest, const void* left,
                       const void* right, int64_t count) noexcept with gil:
    """dest = left op right.  Whoever holds the lock of the engine and waits here for the GIL waits
    for a thread that never asks for the lock while it has the GIL."""
    cdef Engine_ engine = <Engine_>context
    try:
        function, dtype = engine.functions[op.seq]
        out = array_over(dest, count, dtype, True)
        a, b = array_over(left, count, dtype, False), array_over(right, count, dtype, False)
        if isinstance(function, numpy.ufunc):
            function(a, b, out=out)
        else:
            out[...] = function(a, b)
        return 0
    except BaseException as error:
        if engine.failure is None:
            engine.failure = error
        return -1


_faults_planted = False

cdef enum:
    ENDED_MAX = 1024          # deleted and lost objects that an owner remembers


# ---- Python -------------------------------------------------------------------------------

cdef const int64_t* numbers(array) except? NULL:
    """The items of an int64 array, as long as it lives; NULL for None."""
    cdef const int64_t[::1] view
    if array is None:
        return NULL
    view = array
    return &view[0]


@cython.no_gc_clear
cdef class Operation_:
    """One started operation: what `Engine.start` returns."""
    def __dealloc__(self):
        if self.result != NULL:
            self.owner.drop(self.result)

    @property
    def status(self):
        return self.result.status if self.result.complete else STATUS_CLOSED

    @property
    def epoch(self):
        return self.result.epoch

    @property
    def contributors(self):
        return ranks_of(&self.result.contributors, self.owner.size)

    @property
    def failed(self):
        return ranks_of(&self.result.failed, self.owner.size)

    @property
    def message(self):
        return self.owner.mismatch_message()

    def stable(self):
        """Whether no rerun can change the result any more."""
        return self.owner.is_stable(self.result.seq)


@cython.no_gc_clear
cdef class Engine_:
    """One rank's engine over an MPI communicator; see `hopcoll.communicator`."""
    def __cinit__(self, comm, config):
        global _faults_planted
        cdef Settings settings
        from mpi4py import MPI
        memset(&self.rt, 0, sizeof(Runtime))
        self.rt.lookout.fd = -1
        self.kept = {}
        self.functions = {}
        self.orphans = []
        self.branches = []
        self.config = config
        if comm is None:
            return              # a branch is given the rest by its root
        self.rt.home = &self.rt
        memset(&settings, 0, sizeof(settings))
        size = comm.Get_size()
        if size > RANKS_MAX:
            raise ValueError(f"comm has {size} ranks; at most {RANKS_MAX} are supported: "
                             "all pairs make their first contact at the start")
        settings.chunk_bytes = config.chunk_bytes
        settings.eager_bytes = config.eager_bytes
        settings.window = config.window_chunks
        settings.retain_bytes_max = 32768
        settings.retain_budget_bytes = 4 << 20
        settings.late_budget_bytes = config.late_bytes
        settings.ring = 128
        settings.degree = DEGREE_MAX
        settings.active = 4
        settings.outlets_max = 128 * size
        settings.announce_us = 250000
        settings.flush_us = 1000
        settings.patience_us = 2000
        self.mpi_thread = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled",
                           MPI.THREAD_SERIALIZED: "serialized",
                           MPI.THREAD_MULTIPLE: "multiple"}[MPI.Query_thread()]
        threaded = config.progress == "thread" and self.mpi_thread == "multiple" and size > 1
        try:
            self.doorbell = Doorbell()
        except OSError:         # no such sockets here: everyone looks by itself then
            self.doorbell = None
        self.fence = Fence()
        ours = repr(config.agreed()).encode()
        bell = b"" if self.doorbell is None else self.doorbell.host
        name = self.doorbell.name if threaded and bell else b""
        self.transport = MpiTransport(
            comm, max(control_bytes_of(&settings, size),
                      <int64_t>sizeof(Letter) + META_MAX + config.inline_bytes
                      ) + sizeof(ContextHead),
            config.connect_timeout_s,
            b"\n".join([ours, bell, name, self.fence.hello, b"beats" if threaded else b"",
                         socket.gethostname().encode()]))
        hellos = [hello.split(b"\n") for hello in self.transport.hellos]
        differ = [(rank, hello[0]) for rank, hello in enumerate(hellos) if hello[0] != ours]
        if differ:
            raise ValueError("settings differ between ranks: (chunk_bytes, window_chunks, "
                             f"eager_bytes, inline_bytes, detect_s) is {ours.decode()} at rank "
                             f"{comm.Get_rank()} but "
                             f"{differ[0][1].decode()} at rank {differ[0][0]}")
        if bell and all(hello[1] == bell for hello in hellos):
            self.doorbell.connect([hello[2] for hello in hellos])
            self.rt.bell = &self.doorbell.bell
            self.transport.world.bell = &self.doorbell.bell
        self.rt.transport = &self.transport.table
        self.rt.engine = engine_new(&self.transport.table, &settings)
        if self.rt.engine == NULL:
            raise MemoryError("engine: out of memory")
        self.fence.connect([hello[3] for hello in hellos])
        for rank, host in enumerate(self.fence.numbers([hello[3] for hello in hellos])):
            self.rt.engine.host[rank] = host
        self.rt.engine.fence = fence_rank
        self.rt.engine.fence_context = &self.fence.targets
        # Without its thread a rank gives no sign of life between its calls.
        if config.detect_s is not None and all(hello[4] for hello in hellos):
            self.rt.engine.settings.detect_us = <int64_t>(min(config.detect_s, 1e9) * 1e6)
        self.names = [f"{hello[5].decode()}, process {int(hello[3].rpartition(b' ')[2])}"
                      for hello in hellos]
        self.rt.hub.transport = &self.transport.table
        self.rt.hub.tags = self.rt.engine.tags
        self.rank = comm.Get_rank()
        self.size = size
        self.open_store()
        self.fault_tolerant = self.transport.fault_tolerant
        self.rt.engine.user_context = <void*>self
        self.rt.engine.user = call_function
        pthread_mutex_init(&self.rt.mutex, NULL)
        self.rt.engine.now_us = clock_us()
        self.rt.engine.settings.report_us = self.rt.engine.settings.detect_us // 3 \
            if self.rt.engine.settings.detect_us else 10000000
        if config.trace is not None:
            self.rt.trace = open_trace(self.rt.engine, _report.trace_path(config.trace, self.rank),
                                       config.trace_bytes)
        self.meet()
        if not _faults_planted and "HOPCOLL_FAULT" in os.environ:
            _faults_planted = True
            plant_faults(&self.rt.faults, self.rt.engine)
        if threaded:
            self.rt.lookout.changed_us = self.rt.engine.now_us
            self.rt.lookout.fd = _report.start(self)
            look_out(&self.rt.lookout, self.rt.engine)
            if self.rt.trace != NULL:
                trace_attach(self.rt.trace)
            start_crank(&self.rt)

    cdef int open_store(self) except -1:
        """The store of objects, before anybody can send it something."""
        cdef StoreSettings settings
        memset(&settings, 0, sizeof(settings))
        settings.chunk_bytes = self.config.chunk_bytes
        settings.window = self.config.window_chunks
        settings.inline_bytes = self.config.inline_bytes
        settings.limit_bytes = self.config.object_bytes
        settings.scratch_bytes = self.config.object_scratch_bytes
        settings.ended_max = ENDED_MAX
        if hub_open_store(&self.rt.hub, &settings, self.rt.engine.host) == NULL:
            raise MemoryError("objects: out of memory")
        return 0

    cdef int meet(self) except -1:
        """Second round of the start: when it is over, everyone has heard from everyone."""
        cdef Mask awaited
        cdef int64_t begin = clock_us()
        cdef int64_t until = begin + <int64_t>(self.config.connect_timeout_s * 1e6)
        with nogil:
            if self.rt.trace != NULL:
                trace_mark(self.rt.trace, REC_READY)
            engine_ready(self.rt.engine)
        while True:
            with nogil:
                wait_for(&self.rt, NULL, clock_us())
            awaited = engine_awaited(self.rt.engine)
            if mask_empty(&awaited):
                self.rt.faults.started_us = clock_us()
                return 0
            if clock_us() > until:
                raise TransferTimeoutError(
                    f"ranks {ranks_of(&awaited, self.size)} were not ready within "
                    f"{self.config.connect_timeout_s:g} s")
            PyErr_CheckSignals()
            with nogil:
                sleep_us(nap_after(clock_us() - begin))

    def __dealloc__(self):
        if not self.abandoned:
            self.stop_thread()
        close_lookout(&self.rt.lookout)
        if not self.abandoned:
            close_trace(self.rt.trace)
        if self.ended and self.rt.engine != NULL:
            if hub_store(&self.rt.hub) != NULL:
                store_free(hub_store(&self.rt.hub))
                free(self.rt.hub.slots[STORE_SLOT])
            engine_free(self.rt.engine)
            free(self.rt.hub.room)
            free(self.rt.trace)

    cdef void stop_thread(self) noexcept:
        with nogil:
            stop_crank(&self.rt)

    cdef void drop(self, Result* result) noexcept:
        if (self.closed and not self.lingers) or self.abandoned or result.complete:
            self.let_go(result)
            free(result)
        else:
            self.orphans.append(<uintptr_t>result)

    cdef bint is_stable(self, int64_t seq):
        if self.closed or self.abandoned:
            return seq < self.rt.engine.stable
        with nogil:
            lock(&self.rt)
            turn(&self.rt)
            unlock(&self.rt)
        return seq < self.rt.engine.stable

    @property
    def alive(self):
        """The ranks that are members and not known to be dead."""
        cdef Mask members = members_of(self.rt.engine, self.rt.engine.epoch)
        cdef Mask out = mask_without(&members, &self.rt.engine.dead)
        return ranks_of(&out, self.size)

    @property
    def epoch(self):
        return self.rt.engine.epoch

    def mismatch_message(self):
        return mismatch_text(self.rt.engine)

    def counters(self):
        """What the engine counted since its start, by name."""
        out = dict(self.rt.engine.counters)
        out["epoch"] = self.rt.engine.epoch
        out["transport_error"] = transport_error(self.rt.transport, NULL)
        return out

    def describe(self):
        """Where this rank stands, in one line: for the reader of a hang."""
        cdef EngineState* e = self.rt.engine
        return (f"rank {self.rank}: epoch {e.epoch} promised {ballot_round(e.promised)}."
                f"{ballot_rank(e.promised)} frozen {e.frozen} stage {e.stage} called "
                f"{e.next_seq} done {e.done} finished {e.finished} stable {e.stable} freed "
                f"{e.freed} outlets {e.outlets_used} dead {ranks_of(&e.dead, self.size)} left "
                f"{ranks_of(&e.left, self.size)} answered {ranks_of(&e.answered, self.size)} "
                f"stable {e.stable} broken {e.broken}")

    def give_stack(self, bytes text):
        """What the program is at, for those who asked."""
        if not (self.closed or self.abandoned):
            with nogil:
                lock(&self.rt)
            give_stack(&self.rt.lookout, self.rt.engine, self.rt.trace, text)
            unlock(&self.rt)

    def late_report(self):
        """What the ranks answered that were asked about an operation that does not get on."""
        with nogil:
            lock(&self.rt)
        report = late_report(&self.rt.lookout, self.rt.engine)
        unlock(&self.rt)
        for rank, one in report["ranks"].items():
            one["name"] = self.names[rank]
        return report

    def awaited(self, Operation_ operation):
        """The ranks that an operation waits for, as far as this one can tell."""
        cdef Mask ranks
        with nogil:
            lock(&self.rt)
            ranks = awaited_of(self.rt.engine, operation.result.seq)
            unlock(&self.rt)
        return ranks_of(&ranks, self.size)

    def flight(self):
        """The last operations, as the flight recorder has them."""
        with nogil:
            lock(&self.rt)
        out = flight_of(self.rt.engine)
        unlock(&self.rt)
        return out

    cdef int check(self) except -1:
        if self.abandoned or self.closed:
            raise ClosedError("the communicator is closed")
        if self.failure is not None:
            self.finalize(0.0)          # others may wait for what it cannot give them
            error, self.failure = self.failure, None
            raise error
        if self.rt.engine.broken:
            raise ProtocolError("the engine of this rank gave up: a message that cannot be, or no "
                                "memory left; please report it" + _report.flight_text(self))
        return 0

    cdef int check_transport(self) except -1:
        cdef int peer = -1, error_class = transport_error(self.rt.transport, &peer)
        if error_class:
            raise MpiError(f"MPI failed with error class {error_class}, and no rank's death "
                           f"explains it (peer {peer}){_report.flight_text(self)}",
                           error_class, peer)
        return 0

    def start(self, int kind, int dtype, int redop, int root, int64_t count,
              uintptr_t send_address, uintptr_t recv_address, int flags, keep, lengths=None,
              function=None, agreed=0, timeout_s=None, deadline_s=None):
        """Enters the next operation.  May block until an earlier one is stable, when 64 are not.

        `lengths`, with FLAG_VECTOR: int64 arrays by rank of the bytes sent to it, where they start,
        the bytes received from it, and where they go.  `function`, with USER_OP: what combines two
        arrays of the dtype that `keep[1]` or `keep[0]` has.  All must agree on the number
        `agreed`.  With FLAG_PARTIAL the root is the quorum, or 0."""
        cdef Signature sig
        cdef Layout layout
        cdef Operation_ operation
        cdef Result* result
        cdef int code = START_AGAIN
        cdef int64_t item_bytes = itemsize_of(dtype), until, limit = -1
        self.check()
        if self.orphans:
            self.reap()
        memset(&sig, 0, sizeof(sig))
        sig.kind = kind
        sig.dtype = dtype
        sig.redop = redop
        sig.root = root
        sig.flags = flags & (FLAG_RAISE | FLAG_VECTOR | FLAG_ORDERED | FLAG_PARTIAL | FLAG_CARRY
                             | FLAG_ARRIVAL)
        sig.count = count
        sig.layout = agreed
        if deadline_s is not None:
            sig.deadline_us = max(1, <int64_t>(min(deadline_s, 1e9) * 1e6))
        memset(&layout, 0, sizeof(layout))
        if lengths is not None:
            layout.send_bytes, layout.send_at = numbers(lengths[0]), numbers(lengths[1])
            layout.recv_bytes, layout.recv_at = numbers(lengths[2]), numbers(lengths[3])
        if kind == BARRIER:
            item_bytes = 0
        result = <Result*>calloc(1, sizeof(Result))
        if result == NULL:
            raise MemoryError("operation: out of memory")
        if timeout_s is not None:
            limit = clock_us() + <int64_t>(min(timeout_s, 1e9) * 1e6)
        seq = self.rt.engine.next_seq
        if function is not None:
            self.functions[seq] = function
        while True:
            with nogil:
                lock(&self.rt)
                if not self.rt.home.threaded:
                    turn(&self.rt)      # a good-bye may be waiting: nothing is asked of who is gone
                wake_clock(&self.rt)
                if self.rt.trace != NULL:
                    trace_start(self.rt.trace, &sig, item_bytes, <const void*>send_address,
                                <const void*>recv_address, flags, &layout)
                code = start_operation(self.rt.engine, &sig, item_bytes,
                                       <const unsigned char*>send_address,
                                       <unsigned char*>recv_address, flags, &layout, result)
                if self.rt.trace != NULL:
                    trace_started(self.rt.trace, code)
                unlock(&self.rt)
            if code != START_AGAIN:
                break
            with nogil:
                wait_for(&self.rt, NULL, clock_us() + 200)
            try:
                PyErr_CheckSignals()
                self.check()
                if limit >= 0 and clock_us() > limit:
                    raise TransferTimeoutError(
                        "too many operations are under way, and none became stable within "
                        f"{timeout_s:g} s; nothing was started")
                self.check_transport()
            except BaseException:
                self.functions.pop(seq, None)
                free(result)
                raise
        if code == START_STOPPED:
            self.functions.pop(seq, None)
            free(result)
            raise self.stopped_error()
        if code == START_NO_MEMORY:
            self.functions.pop(seq, None)
            free(result)
            raise MemoryError(f"{kind_name(&sig)}: no memory for the copy that it needs "
                              f"({count * item_bytes} bytes); nothing was started")
        operation = Operation_.__new__(Operation_)
        operation.owner = self
        operation.result = result
        operation.seq = result.seq
        if result.complete:
            self.functions.pop(seq, None)
        elif keep is not None:
            self.kept[seq] = keep
        return operation

    cdef int reap(self) except -1:
        """Lets go of the buffers of operations that nobody waits for any more."""
        cdef list left = []
        for address in self.orphans:
            if (<Result*><uintptr_t>address).complete:
                self.let_go(<Result*><uintptr_t>address)
                free(<Result*><uintptr_t>address)
            else:
                left.append(address)
        self.orphans = left
        return 0

    cdef void let_go(self, const Result* result):
        """The operation is over: nothing of the caller's is needed any more, unless a lost rank may
        still read it."""
        if not result.strays:
            self.kept.pop(result.seq, None)
        self.functions.pop(result.seq, None)

    def stopped_error(self, name=""):
        """Why this rank goes on no further."""
        cdef EngineState* e = self.rt.engine
        what = f"{name} " if name else ""
        if e.stopped == STOP_MINORITY:
            away = ranks_of(&e.stopped_by, self.size)
            return MinorityError(
                f"{what}cannot go on: ranks {', '.join(map(str, away))} are out of reach, and not "
                f"known to be dead; the others are too few to decide without them"
                f"{_report.flight_text(self)}", away, e.epoch)
        return StaleEpochError(
            f"{what}failed: rank {self.rank} was silent for too long, and the others went on "
            f"without it after epoch {e.epoch}{_report.flight_text(self)}", e.epoch)

    def wait(self, Operation_ operation, timeout_s):
        """Waits for an operation; False when the time is over."""
        cdef int64_t limit = -1
        if self.failure is not None:
            self.check()
        if operation.result.complete:
            self.rt.home.lookout.changed_us = self.rt.engine.now_us
            self.let_go(operation.result)
            return True
        if self.closed or self.abandoned:
            return True        # its status says so
        if timeout_s is not None:
            limit = clock_us() + <int64_t>(min(timeout_s, 1e9) * 1e6)
        self.rt.home.lookout.changed_us = clock_us()
        self.rt.home.lookout.inside += 1
        try:
            return self.wait_until(operation, limit)
        finally:
            self.rt.home.lookout.inside -= 1
            self.rt.home.lookout.changed_us = self.rt.home.engine.now_us

    cdef bint wait_until(self, Operation_ operation, int64_t limit) except -1:
        cdef int64_t until
        cdef int code
        while True:
            until = clock_us() + 20000
            if limit >= 0 and until > limit:
                until = limit
            with nogil:
                code = wait_for(&self.rt, operation.result, until)
            if self.failure is not None:
                self.check()
            if code == WAIT_DONE:
                self.let_go(operation.result)
                return True
            if self.closed or self.abandoned:
                return True
            self.check()
            self.check_transport()
            if limit >= 0 and clock_us() >= limit:
                return False
            PyErr_CheckSignals()

    def test(self, Operation_ operation):
        """Looks whether an operation is complete, and turns the crank once."""
        if not operation.result.complete and not (self.closed or self.abandoned):
            self.check()
            with nogil:
                lock(&self.rt)
                turn(&self.rt)
                unlock(&self.rt)
        if self.failure is not None:
            self.check()
        if operation.result.complete:
            self.let_go(operation.result)
            return True
        return self.closed or self.abandoned

    def finalize(self, timeout_s):
        """Leaves: waits, bounded, until nobody needs this rank, says good-bye, and stays until the
        others have heard it.  False when the time was too short.  An exception from a signal, as
        of Ctrl-C, ends the waiting, but not the leaving: the others count on it."""
        cdef int64_t until = clock_us() + <int64_t>(min(timeout_s, 1e9) * 1e6), begin
        cdef bint quiet = False, heard = False
        if self.closed or self.abandoned:
            return True
        interrupt = None
        if self.branches:
            from hopcoll._branches import end_branches
            interrupt = end_branches(self.branches, timeout_s)
        while not self.rt.engine.broken:
            with nogil:
                lock(&self.rt)
                turn(&self.rt)
                quiet = engine_quiet(self.rt.engine)
                unlock(&self.rt)
            if quiet or clock_us() >= until or interrupt is not None:
                break
            with nogil:
                wait_for(&self.rt, NULL, clock_us() + 100)
            try:
                PyErr_CheckSignals()
            except BaseException as error:
                interrupt = error
                break
        self.stop_thread()
        with nogil:
            store_leave(hub_store(&self.rt.hub))
            if self.rt.trace != NULL:
                trace_mark(self.rt.trace, REC_LEAVE)
            engine_leave(self.rt.engine)
        # Others may wait for something of ours: they are given voids until they have heard.
        begin = clock_us()
        until = max(begin if interrupt is not None else until, begin + 5000000)
        while not self.rt.engine.broken and clock_us() < until:
            with nogil:
                turn(&self.rt)
                heard = engine_may_go(self.rt.engine)
            if heard:
                break
            with nogil:
                sleep_us(nap_after(clock_us() - begin))
            try:
                PyErr_CheckSignals()
            except BaseException as error:
                if interrupt is not None:
                    until = clock_us()      # the second time it is meant
                interrupt = error
        self.closed = True
        close_lookout(&self.rt.lookout)
        self.ended = self.transport.close(1.0)
        close_trace(self.rt.trace)
        for branch in self.branches[:]:
            branch.part(self.ended)
        self.kept.clear()
        self.functions.clear()
        self.reap()
        if interrupt is not None:
            raise interrupt
        return bool(quiet)

    def abandon(self):
        """After a fork, in the child: MPI and the lock belong to the parent."""
        self.abandoned = True
        self.rt.threaded = 0
        close_lookout(&self.rt.lookout)


# The C structs have these names already.
globals()["Engine"] = Engine_
globals()["Operation"] = Operation_
