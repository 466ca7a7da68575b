# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Traces: what an engine was told and what it did, so that it can be told the same again.

An engine is pure: it knows what its transport delivers, the time that it is handed, and the calls
of its program.  A trace has all of these in order, and a digest of what it sent, each message
without the user's bytes.  `hopcoll._retrace` tells an engine of its own the same, and compares.

The trace is a file that is mapped into memory: what was written is in it also when the process is
killed, and nobody waits for a disk.  A file that is full stays as it is; the job goes on.
"""
import os

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.unistd cimport close, ftruncate
from cython_kernels.transport cimport EVENT_CONTROL, EVENT_LOST, EVENT_RECEIVED, EVENT_SENT
from hopcoll._state cimport *
from hopcoll._state cimport Engine as EngineState

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void*, size_t, int, int, int, long)
    int munmap(void*, size_t)
    int PROT_READ
    int PROT_WRITE
    int MAP_SHARED
    void* MAP_FAILED

cdef enum:
    FIXED_BYTES_MAX = 128     # of a record, beside what it says that it has

# ---- digests ------------------------------------------------------------------------------

cdef uint64_t digest_bytes(uint64_t h, const unsigned char* bytes, int64_t nbytes) noexcept nogil:
    cdef int64_t i
    for i in range(nbytes):
        h = (h ^ bytes[i]) * <uint64_t>0x100000001b3
    return h


cdef int64_t own_bytes(const Head* head, int64_t nbytes) noexcept nogil:
    """How much of a message's body is the protocol's and not its user's."""
    if head.type == MSG_EAGER or head.type == MSG_STACK:
        return 0
    if head.type == MSG_RELAY and nbytes > <int64_t>sizeof(RelayBody):
        return sizeof(RelayBody)
    return nbytes


cdef uint64_t digest_of(const unsigned char* head, const unsigned char* body,
                        int64_t nbytes) noexcept nogil:
    cdef uint64_t h = digest_bytes(<uint64_t>0xcbf29ce484222325, head, sizeof(Head))
    return digest_bytes(h, body, own_bytes(<const Head*>head, nbytes))


# ---- writing ------------------------------------------------------------------------------

cdef bint begin(Trace* trace, int kind, int64_t nbytes) noexcept nogil:
    """Whether there is room for a record with so many bytes of its own."""
    if trace.memory == NULL or trace.head.full:
        return False
    if trace.used + FIXED_BYTES_MAX + nbytes > trace.room:
        trace.head.full = 1
        return False
    trace.at = trace.used
    trace.records[trace.at] = <uint8_t>kind
    trace.at += 1
    return True


cdef void number(Trace* trace, uint64_t value) noexcept nogil:
    while value >= 128:
        trace.records[trace.at] = <uint8_t>(value & 127 | 128)
        trace.at += 1
        value >>= 7
    trace.records[trace.at] = <uint8_t>value
    trace.at += 1


cdef void piece(Trace* trace, const void* bytes, int64_t nbytes) noexcept nogil:
    memcpy(trace.records + trace.at, bytes, nbytes)
    trace.at += nbytes


cdef void commit(Trace* trace) noexcept nogil:
    cdef int64_t turn = 1 - trace.head.turn
    trace.digest = digest_bytes(trace.digest, trace.records + trace.used, trace.at - trace.used)
    trace.used = trace.at
    trace.head.used[turn] = trace.used
    trace.head.digest[turn] = trace.digest
    trace.head.turn = turn


cdef void note_tag(Trace* trace) noexcept nogil:
    """Before the engine is told anything: a communicator that was split off takes tags as well."""
    if trace.engine.tags[0] != trace.tag and begin(trace, REC_TAG, 0):
        number(trace, trace.engine.tags[0])
        commit(trace)
    trace.tag = trace.engine.tags[0]


cdef void trace_tick(Trace* trace, int64_t now_us) noexcept nogil:
    note_tag(trace)
    if begin(trace, REC_TICK, 0):
        number(trace, now_us - trace.engine.now_us)
        commit(trace)


cdef void trace_event(Trace* trace, const Event* event) noexcept nogil:
    cdef int64_t nbytes = event.nbytes if event.kind == EVENT_CONTROL else 0
    note_tag(trace)
    if begin(trace, REC_EVENT, nbytes):
        number(trace, event.kind)
        number(trace, event.peer)
        number(trace, event.token if event.kind in (EVENT_SENT, EVENT_RECEIVED, EVENT_LOST) else 0)
        number(trace, event.nbytes if event.kind in (EVENT_CONTROL, EVENT_RECEIVED) else 0)
        piece(trace, event.payload, nbytes)
        commit(trace)


cdef void trace_mark(Trace* trace, int kind) noexcept nogil:
    note_tag(trace)
    if begin(trace, kind, 0):
        commit(trace)


cdef void trace_stack(Trace* trace, int rank, int64_t nbytes) noexcept nogil:
    note_tag(trace)
    if begin(trace, REC_STACK, 0):
        number(trace, rank)
        number(trace, nbytes)
        commit(trace)


cdef void trace_start(Trace* trace, const Signature* sig, int64_t item_bytes, const void* send,
                      const void* recv, int flags, const Layout* layout) noexcept nogil:
    cdef int there = ((THERE_SEND if send != NULL else 0) | (THERE_RECV if recv != NULL else 0)
                      | (THERE_LAYOUT if layout.send_bytes != NULL else 0))
    cdef int64_t lengths = trace.engine.size * sizeof(int64_t) if there & THERE_LAYOUT else 0
    note_tag(trace)
    if begin(trace, REC_START, sizeof(Signature) + 4 * lengths):
        piece(trace, sig, sizeof(Signature))
        number(trace, item_bytes)
        number(trace, flags)
        number(trace, there)
        if there & THERE_LAYOUT:
            piece(trace, layout.send_bytes, lengths)
            piece(trace, layout.send_at, lengths)
            piece(trace, layout.recv_bytes, lengths)
            piece(trace, layout.recv_at, lengths)
        commit(trace)


cdef void trace_started(Trace* trace, int code) noexcept nogil:
    if begin(trace, REC_STARTED, 0):
        number(trace, code)
        commit(trace)


# ---- between the engine and what it calls -------------------------------------------------

cdef void traced_control(void* self, int dest, const void* head, int64_t head_bytes,
                         const void* body, int64_t body_bytes) noexcept nogil:
    cdef Trace* trace = <Trace*>self
    cdef uint64_t digest
    if begin(trace, REC_CONTROL, 0):
        digest = digest_of(<const unsigned char*>head, <const unsigned char*>body, body_bytes)
        number(trace, dest)
        number(trace, head_bytes + body_bytes)
        piece(trace, &digest, sizeof(digest))
        commit(trace)
    trace.below.send_control(trace.below.self, dest, head, head_bytes, body, body_bytes)


cdef void traced_request(Trace* trace, int kind, int peer, int tag, int64_t nbytes,
                         int64_t token) noexcept nogil:
    if begin(trace, kind, 0):
        number(trace, peer)
        number(trace, tag)
        number(trace, nbytes)
        number(trace, token)
        commit(trace)


cdef void traced_send(void* self, int dest, int tag, const void* data, int64_t nbytes,
                      int64_t token) noexcept nogil:
    cdef Trace* trace = <Trace*>self
    traced_request(trace, REC_SEND, dest, tag, nbytes, token)
    trace.below.send_data(trace.below.self, dest, tag, data, nbytes, token)


cdef void traced_recv(void* self, int source, int tag, void* data, int64_t nbytes,
                      int64_t token) noexcept nogil:
    cdef Trace* trace = <Trace*>self
    traced_request(trace, REC_RECV, source, tag, nbytes, token)
    trace.below.recv_data(trace.below.self, source, tag, data, nbytes, token)


cdef int traced_poll(void* self, Event* event) noexcept nogil:
    cdef Trace* trace = <Trace*>self
    return trace.below.poll(trace.below.self, event)


cdef void* traced_allocate(void* self, int64_t nbytes) noexcept nogil:
    cdef Trace* trace = <Trace*>self
    return trace.below.allocate(trace.below.self, nbytes)


cdef void traced_release(void* self, void* memory) noexcept nogil:
    cdef Trace* trace = <Trace*>self
    trace.below.release(trace.below.self, memory)


cdef void traced_where(void* context, WhereBody* out) noexcept nogil:
    cdef Trace* trace = <Trace*>context
    if trace.where != NULL:
        trace.where(trace.where_context, out)
    else:
        out.since_us = trace.engine.now_us     # as without us: for no time
    if begin(trace, REC_WHERE, 0):
        number(trace, out.inside)
        number(trace, out.since_us)
        commit(trace)


cdef void passed_want(void* context, int asker) noexcept nogil:
    cdef Trace* trace = <Trace*>context
    trace.want_stack(trace.where_context, asker)


cdef void passed_stack(void* context, int rank, const unsigned char* text,
                       int64_t nbytes) noexcept nogil:
    cdef Trace* trace = <Trace*>context
    trace.keep_stack(trace.where_context, rank, text, nbytes)


cdef void passed_report(void* context) noexcept nogil:
    cdef Trace* trace = <Trace*>context
    trace.report(trace.where_context)


cdef int traced_user(void* context, const Operation* op, void* dest, const void* left,
                     const void* right, int64_t count) noexcept nogil:
    cdef Trace* trace = <Trace*>context
    cdef int code = trace.user(trace.user_context, op, dest, left, right, count)
    if begin(trace, REC_USER, 0):
        number(trace, code != 0)
        commit(trace)
    return code


cdef void traced_fence(void* context, int rank) noexcept nogil:
    cdef Trace* trace = <Trace*>context
    if begin(trace, REC_FENCE, 0):
        number(trace, rank)
        commit(trace)
    trace.fence(trace.fence_context, rank)


cdef void trace_attach(Trace* trace) noexcept nogil:
    """Comes between the engine and whom it calls; again, when there are more of these."""
    cdef EngineState* engine = trace.engine
    if engine.transport != &trace.table:
        trace.below = engine.transport
        trace.table = engine.transport[0]
        trace.table.self = trace
        trace.table.send_control = traced_control
        trace.table.send_data = traced_send
        trace.table.recv_data = traced_recv
        trace.table.poll = traced_poll
        trace.table.allocate = traced_allocate
        trace.table.release = traced_release
        engine.transport = &trace.table
    if engine.where_context != trace:
        # A replay always asks: also where nobody looks out, as in the start or without a thread.
        trace.where, trace.where_context = engine.where, engine.where_context
        engine.where, engine.where_context = traced_where, trace
        if trace.where != NULL:
            trace.want_stack, trace.keep_stack = engine.want_stack, engine.keep_stack
            trace.report = engine.report
            engine.want_stack, engine.keep_stack = passed_want, passed_stack
            engine.report = passed_report
    if engine.user != NULL and engine.user_context != trace:
        trace.user, trace.user_context = engine.user, engine.user_context
        engine.user, engine.user_context = traced_user, trace
    if engine.fence_context != trace:
        trace.fence, trace.fence_context = engine.fence, engine.fence_context
        engine.fence, engine.fence_context = traced_fence, trace


# ---- the file -----------------------------------------------------------------------------

cdef int64_t preamble_bytes() noexcept nogil:
    return sizeof(TraceHead) + sizeof(Settings) + RANKS_MAX * sizeof(uint16_t)


cdef uint64_t preamble_digest(const unsigned char* content) noexcept nogil:
    """Of all before the records that never changes."""
    cdef int64_t fixed = <const unsigned char*>&(<const TraceHead*>content).full - content
    cdef uint64_t h = digest_bytes(<uint64_t>0xcbf29ce484222325, content, fixed)
    return digest_bytes(h, content + sizeof(TraceHead), preamble_bytes() - sizeof(TraceHead))


cdef Trace* open_trace(EngineState* engine, object path, int64_t bytes_max) except NULL:
    """A trace of an engine to which nothing was said yet.

    Raises OSError (FileExistsError where a trace is at `path` already)."""
    cdef Trace* trace = <Trace*>calloc(1, sizeof(Trace))
    cdef int64_t total = max(bytes_max, preamble_bytes() + 4096)
    cdef void* memory
    if trace == NULL:
        raise MemoryError("trace: no memory")
    try:
        trace.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except BaseException:
        free(trace)
        raise
    if ftruncate(trace.fd, total) != 0:
        close(trace.fd)
        free(trace)
        raise OSError(f"{path}: no room for {total} bytes")
    memory = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED, trace.fd, 0)
    if memory == MAP_FAILED:
        close(trace.fd)
        free(trace)
        raise OSError(f"{path}: a file of this file system cannot be mapped into memory")
    trace.memory = <unsigned char*>memory
    trace.mapped_bytes = total
    trace.engine = engine
    trace.tag = engine.tags[0]
    trace.head = <TraceHead*>memory
    trace.records = trace.memory + preamble_bytes()
    trace.room = total - preamble_bytes()
    memcpy(trace.memory + sizeof(TraceHead), &engine.settings, sizeof(Settings))
    memcpy(trace.memory + sizeof(TraceHead) + sizeof(Settings), engine.host, sizeof(engine.host))
    trace.head.version = TRACE_VERSION
    trace.head.engine_bytes = sizeof(EngineState)
    trace.head.settings_bytes = sizeof(Settings)
    trace.head.rank = engine.rank
    trace.head.size = engine.size
    trace.head.control_bytes_max = engine.transport.control_bytes_max
    trace.head.now_us = engine.now_us
    memcpy(trace.head.mark, TRACE_MARK, 8)
    trace.digest = preamble_digest(trace.memory)
    trace.head.digest[0] = trace.digest
    trace_attach(trace)
    return trace


cdef void close_trace(Trace* trace) noexcept nogil:
    """The file gets its length; the engine may go on, untraced, as long as `trace` is there."""
    cdef int64_t length
    if trace == NULL or trace.memory == NULL:
        return
    length = preamble_bytes() + trace.used
    munmap(trace.memory, trace.mapped_bytes)
    trace.memory = NULL
    ftruncate(trace.fd, length)
    close(trace.fd)
