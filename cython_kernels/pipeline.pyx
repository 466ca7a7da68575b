# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Send, receive, relay and reduce in chunks: one call, one block, without the GIL.

transfer.pyx is the machine, this its Python side: arguments, memory, signals, errors.  Memory that
a request may still touch stays referenced until the request has ended; see `Pipeline.settle`.
"""
cimport cython
from libc.stdint cimport int64_t, intptr_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer)
from cpython.exc cimport PyErr_CheckSignals
from cython_kernels.mpi_channels cimport clock_s
from cython_kernels.mpi_transport cimport MpiTransport, transport_error
from cython_kernels.reduction cimport itemsize_of, supported
from cython_kernels.stream cimport Grid, make_grid, sink_open
from cython_kernels.transfer cimport (
    ACTIVE, CLOSED, Counter, End, GRANT, Line, Note, STOP, Transfer, add_end, answer_with_voids,
    complete, counter_of, find_spring, fits, forget, over, quiet, run, send_note, take_events)

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef enum:
    SLICE_MS = 5               # how long a verb goes without looking for signals
    CHUNK_ALIGNMENT = 16       # the largest item: no chunk ends inside one
    CHUNK_BYTES_MAX = 0x40000000


cdef class _Memory:
    """A contiguous buffer, held."""

    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, str name, memory, bint writable):
        if not PyObject_CheckBuffer(memory):
            raise TypeError(f"{name}: a buffer is needed, not {type(memory).__name__}")
        PyObject_GetBuffer(memory, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    cdef bint overlaps(self, _Memory other):
        cdef char* mine = <char*>self.view.buf
        cdef char* theirs = <char*>other.view.buf
        return mine < theirs + other.view.len and theirs < mine + self.view.len


class PeerDiedError(ConnectionError):
    """The peer of a transfer is dead.

    Attributes
    ----------
    peer : int
        Its rank.
    watermark_bytes : int
        How much of the block had arrived from it, or had been handed over to it.
    """

    def __init__(self, str message, int peer, watermark_bytes):
        super().__init__(message)
        self.peer = peer
        self.watermark_bytes = watermark_bytes


class PeerGaveUpError(PeerDiedError):
    """The peer of a transfer lives, but gave the transfer up; attributes as `PeerDiedError`'s."""


class TransferTimeout(TimeoutError):
    """A transfer did not finish in time; attributes as `PeerDiedError`'s."""

    def __init__(self, str message, int peer, watermark_bytes):
        super().__init__(message)
        self.peer = peer
        self.watermark_bytes = watermark_bytes


#: What requests may still touch after their pipeline is gone.
_left_open = []


@cython.final
cdef class Pipeline:
    """Chunked transfers between the ranks of a transport.

    Calls block, release the GIL, and are for one thread at a time.  All take `timeout_s`, a bound
    in seconds or None.  A sender waits until the receiver has said what it expects, also for no
    bytes.  After an error the pipeline goes on working with every other peer, and, unless it died,
    with the same one.

    Faults tolerated: the death of any rank.  Cost of a block of n chunks: n + 1 chunk times for
    each hop that it takes.

    Parameters
    ----------
    transport : MpiTransport
        Carries nothing but this pipeline.
    chunk_bytes : int
        The same on all ranks; a multiple of 16, below the eager limit of MPI's wire.
    window : int
        How many receives stay posted ahead.
    kill_after_chunks : int
        A fault for tests: the rank sends itself SIGKILL when it has moved that many chunks
        (received and sent, counted together).

    Raises
    ------
    ValueError
        A parameter is out of its range.

    See Also
    --------
    cython_kernels.stream : the windows that this is made of.
    """

    cdef Line line
    cdef readonly MpiTransport transport
    cdef dict kept                       # address of an End -> memory that it may still touch

    def __init__(self, MpiTransport transport not None, chunk_bytes, window,
                 *, kill_after_chunks=0):
        if not 0 < chunk_bytes <= CHUNK_BYTES_MAX or chunk_bytes % CHUNK_ALIGNMENT:
            raise ValueError(f"chunk_bytes: a positive multiple of 16 to 1 GiB, not {chunk_bytes}")
        if not 0 < window <= 65536:
            raise ValueError(f"window: 1 to 65536 chunks, not {window}")
        if transport.table.control_bytes_max < <int64_t>sizeof(Note):
            raise ValueError(f"transport: control messages of {sizeof(Note)} bytes are needed, "
                             f"not of {transport.table.control_bytes_max}")
        if self.transport is not None:
            raise RuntimeError("Pipeline is initialised already")
        self.line.dead = <uint8_t*>calloc(transport.table.size, 1)
        if self.line.dead == NULL:
            raise MemoryError("Pipeline: no memory for the ranks")
        self.transport = transport
        self.kept = {}
        self.line.table = &transport.table
        self.line.chunk_bytes = chunk_bytes
        self.line.window = window
        self.line.wire_tag_max = transport.tag_max
        self.line.kill_after_chunks = kill_after_chunks

    def __del__(self):
        if self.kept:
            _left_open.append((self.transport, self.kept))

    def __dealloc__(self):
        cdef End* end = self.line.ends
        cdef End* next_end
        cdef Counter* counter
        while end != NULL:
            next_end = end.next
            if quiet(end):
                free(end)
            end = next_end
        while self.line.counters != NULL:
            counter = self.line.counters
            self.line.counters = counter.next
            free(counter)
        free(self.line.dead)

    @property
    def moved_chunks(self):
        """Chunks received and sent since the beginning. Local."""
        return self.line.moved_chunks

    @property
    def open_count(self):
        """Transfers given up whose requests have not ended; see `settle`. Local."""
        return len(self.kept)

    def send(self, buffer, int dest, int tag=0, timeout_s=None):
        """Send a block.

        Blocking.  The k-th send to `dest` under `tag` goes to the k-th receive there.

        Parameters
        ----------
        buffer : buffer
            Contiguous memory, of as many bytes as the receiver expects.
        dest, tag : int
            A rank, and a number that both sides use.
        timeout_s : float, optional
            The longest time that this may take, in seconds.

        Raises
        ------
        PeerDiedError, PeerGaveUpError, TransferTimeout
            `buffer` may still be read until `settle` has returned True.
        ValueError
            The receiver expects another number of bytes, or has other chunks.
        RuntimeError
            MPI failed.
        """
        memory = _Memory("buffer", buffer, False)
        self.transfer(memory, None, -1, (dest,), tag, timeout_s, -1, -1)

    def receive(self, buffer, int source, int tag=0, timeout_s=None):
        """Receive a block.

        Blocking.  Parameters and errors as `send`'s.  After an error, what precedes the
        `watermark_bytes` of the exception has arrived; what follows is undefined, and may change
        until `settle` has returned True.
        """
        memory = _Memory("buffer", buffer, True)
        self.transfer(memory, None, source, (), tag, timeout_s, -1, -1)

    def relay(self, buffer, int source, dests, int tag=0, timeout_s=None):
        """Receive a block and send every chunk on while the next one arrives.

        Blocking.  `dests` is a rank or a sequence of ranks.  Errors as `receive`'s.  When one of
        `dests` fails, the block still arrives here and at the others before the error is raised;
        when `source` fails, `dests` get what had arrived and then `PeerGaveUpError`.
        """
        memory = _Memory("buffer", buffer, True)
        dests = tuple(dests) if hasattr(dests, "__iter__") else (dests,)
        self.transfer(memory, None, source, dests, tag, timeout_s, -1, -1)

    def reduce(self, own, result, int source, dest, int dtype, int op, int tag=0, timeout_s=None):
        """Add a block to the one that comes in, chunk by chunk while the next one arrives.

        Blocking.  ``result[i] = incoming[i] op own[i]``; every chunk of it goes on to `dest` as
        soon as it is there, unless `dest` is None.

        Parameters
        ----------
        own : buffer
            This rank's items; it is never changed.
        result : buffer
            Apart from `own`, of the same size: takes the incoming chunks and is folded in place.
        source, dest : int
            Ranks; `dest` may be None.
        dtype, op : int
            Codes of `cython_kernels.reduction`.  AVG adds.
        tag, timeout_s
            As in `send`.

        Raises
        ------
        PeerDiedError, PeerGaveUpError, TransferTimeout, RuntimeError
            As in `relay`.
        ValueError
            The codes are not supported, the sizes differ or are no whole number of items, or the
            buffers overlap.
        """
        mine = _Memory("own", own, False)
        memory = _Memory("result", result, True)
        if not supported(dtype, op):
            raise ValueError(f"op: {op} is not supported for dtype {dtype}")
        if mine.view.len != memory.view.len or memory.view.len % itemsize_of(dtype):
            raise ValueError(
                f"result: {memory.view.len} bytes; own has {mine.view.len}, and an item "
                f"{itemsize_of(dtype)}")
        if mine.overlaps(memory):
            raise ValueError("result: overlaps own")
        dests = () if dest is None else (dest,)
        self.transfer(memory, mine, source, dests, tag, timeout_s, dtype, op)

    def settle(self, timeout_s):
        """Wait for the requests of transfers that were given up.

        Blocking, for `timeout_s` seconds at most.  A living peer ends them when it next calls a
        verb or `settle`.

        Returns
        -------
        bool
            Whether all have ended, so that no memory of the caller is touched any more.
        """
        cdef double until = clock_s() + timeout_s
        cdef double slice_end
        while True:
            slice_end = min(until, clock_s() + 1e-3 * SLICE_MS)
            with nogil:
                while True:
                    take_events(&self.line)
                    if clock_s() >= slice_end:
                        break
                    if not self.line.events:
                        sched_yield()
            PyErr_CheckSignals()
            self.sweep()
            if not self.kept or clock_s() >= until:
                return not self.kept

    cdef sweep(self):
        """Lets go of the memory and the ends that nothing can touch any more."""
        cdef End* end = self.line.ends
        cdef End* next_end
        while end != NULL:
            next_end = end.next
            if end.transfer == NULL and quiet(end):
                self.kept.pop(<intptr_t>end, None)
                if over(&self.line, end):
                    forget(&self.line, end)
            end = next_end

    cdef check_peers(self, int source, tuple dests, int tag):
        cdef int size = self.line.table.size
        cdef int rank = self.line.table.rank
        if tag < 0 or tag > self.line.wire_tag_max:
            raise ValueError(f"tag: 0 to {self.line.wire_tag_max}, not {tag}")
        for name, peers in (("source", () if source == -1 else (source,)), ("dest", dests)):
            for peer in peers:
                if not 0 <= peer < size or peer == rank:
                    raise ValueError(f"{name}: another rank than {rank}, below {size}, not {peer}")
        if len(set(dests)) < len(dests) or source in dests:
            raise ValueError(f"dest: {dests} and source {source} are not all different")

    cdef transfer(self, _Memory memory, _Memory own, int source, tuple dests, int tag, timeout_s,
                  int dtype, int op):
        cdef Transfer transfer
        cdef End* end
        cdef End** springs
        cdef int count = len(dests)
        cdef int i
        cdef int status = 0
        cdef Grid grid = make_grid(memory.view.len, self.line.chunk_bytes)
        cdef double until, slice_end
        self.check_peers(source, dests, tag)
        self.sweep()
        memset(&transfer, 0, sizeof(Transfer))
        springs = <End**>calloc(count + 1, sizeof(End*))
        if source >= 0 and count:
            transfer.states = <uint8_t*>calloc(grid.chunks + 1, 1)
        if springs == NULL or (source >= 0 and count and transfer.states == NULL):
            free(springs)
            free(transfer.states)
            raise MemoryError("Pipeline: no memory for the transfer")
        transfer.dtype = dtype
        transfer.op = op
        if own is not None:
            transfer.own = <const unsigned char*>own.view.buf
            transfer.itemsize = itemsize_of(dtype)
        try:
            if source >= 0:
                transfer.sink = self.open_sink(source, tag, grid, memory, &transfer)
            for i in range(count):
                springs[i] = self.open_spring(dests[i], tag, grid, memory, &transfer)
            until = float("inf") if timeout_s is None else clock_s() + timeout_s
            while not status:
                slice_end = min(until, clock_s() + 1e-3 * SLICE_MS)
                with nogil:
                    status = run(&self.line, &transfer, springs, count, slice_end)
                PyErr_CheckSignals()
                if not status and clock_s() >= until:
                    break
            self.raise_for(&transfer, springs, count, status, timeout_s)
        finally:
            if transfer.sink != NULL:
                self.leave(transfer.sink, (memory, own))
            for i in range(count):
                if springs[i] != NULL:
                    self.leave(springs[i], (memory, own))
            free(springs)
            free(transfer.states)

    cdef End* open_sink(self, int source, int tag, Grid grid, _Memory memory,
                        Transfer* transfer) except NULL:
        cdef Counter* counter = counter_of(&self.line, source, tag)
        cdef End* end
        end = add_end(&self.line, 1, source, tag, counter.receives) if counter != NULL else NULL
        if end == NULL:
            raise MemoryError("Pipeline: no memory for the transfer")
        counter.receives += 1
        self.line.wire_tag = self.line.wire_tag % self.line.wire_tag_max + 1
        end.wire_tag = self.line.wire_tag
        end.state = ACTIVE
        end.grid = grid
        end.base = <unsigned char*>memory.view.buf
        end.transfer = transfer
        sink_open(&end.sink, source, end.wire_tag, 0, grid.chunks)
        if grid.chunks == 0:
            send_note(&self.line, end, GRANT, 0)     # a sender of more should know
        return end

    cdef End* open_spring(self, int dest, int tag, Grid grid, _Memory memory,
                          Transfer* transfer) except NULL:
        cdef Counter* counter = counter_of(&self.line, dest, tag)
        cdef End* end = NULL
        if counter != NULL:
            end = find_spring(&self.line, dest, tag, counter.sends)
            if end == NULL:
                end = add_end(&self.line, 0, dest, tag, counter.sends)
        if end == NULL:
            raise MemoryError("Pipeline: no memory for the transfer")
        counter.sends += 1
        end.state = CLOSED if end.cut else ACTIVE
        end.grid = grid
        end.spring.end = grid.chunks
        end.base = <unsigned char*>memory.view.buf
        end.transfer = transfer
        return end

    cdef leave(self, End* end, memory):
        """A verb ends: the end is forgotten when it is complete, otherwise given up."""
        end.transfer = NULL
        if end.inbound:
            if end.sink.arrived < end.grid.chunks or end.sink.broken:
                end.sink.open = 0
                send_note(&self.line, end, STOP, end.sink.posted)
        elif not complete(end):
            end.state = CLOSED
            answer_with_voids(&self.line, end)
        else:
            forget(&self.line, end)
            return
        if not quiet(end):
            self.kept[<intptr_t>end] = memory
        elif over(&self.line, end):
            forget(&self.line, end)

    cdef raise_for(self, Transfer* transfer, End** springs, int count, int status, timeout_s):
        """Names the end that failed, if one did: the source before the others."""
        cdef int i
        cdef int peer = -1
        if status < 0:
            error_class = transport_error(self.line.table, &peer)
            raise RuntimeError(f"MPI failed with error class {error_class} at rank {peer}")
        if transfer.sink != NULL:
            self.raise_for_end(transfer.sink, status, timeout_s)
        for i in range(count):
            self.raise_for_end(springs[i], status, timeout_s)

    cdef raise_for_end(self, End* end, int status, timeout_s):
        cdef int64_t watermark = min(end.whole * end.grid.chunk_bytes, end.grid.nbytes)
        what = "from" if end.inbound else "to"
        where = f"{watermark} of {end.grid.nbytes} bytes {what} rank {end.peer}"
        if complete(end):
            return
        if self.line.dead[end.peer]:
            raise PeerDiedError(f"rank {end.peer} died after {where}", end.peer, watermark)
        if not end.inbound and end.peer_chunk_bytes and not fits(end):
            raise ValueError(
                f"buffer: {end.grid.nbytes} bytes in chunks of {end.grid.chunk_bytes} for rank "
                f"{end.peer}, which expects {end.peer_nbytes} in chunks of {end.peer_chunk_bytes}")
        if end.cut or end.sink.broken:
            raise PeerGaveUpError(f"rank {end.peer} gave up after {where}", end.peer, watermark)
        if not status:
            raise TransferTimeout(f"{where} in {timeout_s} s", end.peer, watermark)
