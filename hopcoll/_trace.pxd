# cython: language_level=3
"""What an engine was told and what it did, written as it happens; see _trace.pyx."""
from libc.stdint cimport int64_t, int32_t, uint64_t
from cython_kernels.transport cimport Transport, Event
from hopcoll._state cimport Engine, Layout, Operation, Signature, WhereBody

cdef enum:
    TRACE_VERSION = 1

cdef extern from *:
    """
    #define TRACE_MARK "HOPTRACE"
    """
    const char* TRACE_MARK

cdef enum Record:
    # What the engine was told,
    REC_TICK = 1              # microseconds since the last time that it knew
    REC_EVENT = 2             # kind, peer, token, nbytes; the message
    REC_READY = 3
    REC_LEAVE = 4
    REC_START = 5             # signature, item bytes, flags, what is there; lengths
    REC_STACK = 6             # to whom its Python stack goes, and how long it is
    REC_TAG = 7               # others over this transport took tags: the last one
    # and what it did, or asked for, in answer.
    REC_CONTROL = 32          # dest, nbytes, digest
    REC_SEND = 33             # dest, tag, nbytes, token
    REC_RECV = 34             # source, tag, nbytes, token
    REC_FENCE = 35            # rank
    REC_WHERE = 36            # the answer
    REC_USER = 37             # the answer
    REC_STARTED = 38          # code

cdef enum There:
    THERE_SEND = 1
    THERE_RECV = 2
    THERE_LAYOUT = 4

cdef struct TraceHead:
    char mark[8]
    int64_t version
    int64_t engine_bytes      # traces are for the build that wrote them
    int64_t settings_bytes
    int64_t rank
    int64_t size
    int64_t control_bytes_max
    int64_t now_us
    int64_t full              # nothing was written any more: there was no room
    int64_t turn              # which of the pairs below holds: a process may die between two writes
    int64_t used[2]           # bytes of records; written after each
    uint64_t digest[2]        # of the head up to here, of what is behind it, and of these records

cdef struct Trace:
    Transport table           # what the engine calls, in the place of ...
    Transport* below
    Engine* engine
    unsigned char* memory     # the file; NULL: nothing is written
    TraceHead* head
    unsigned char* records
    int64_t room              # of records
    int64_t used              # ... of which so many are written
    uint64_t digest
    int64_t at                # where the record under way ends so far
    int64_t mapped_bytes
    int32_t tag               # the last one that the engine had when it was told something
    int32_t fd
    void* where_context
    void (*where)(void* context, WhereBody* out) noexcept nogil
    void (*want_stack)(void* context, int asker) noexcept nogil
    void (*keep_stack)(void* context, int rank, const unsigned char* text,
                       int64_t nbytes) noexcept nogil
    void (*report)(void* context) noexcept nogil
    void* user_context
    int (*user)(void* context, const Operation* op, void* dest, const void* left,
                const void* right, int64_t count) noexcept nogil
    void* fence_context
    void (*fence)(void* context, int rank) noexcept nogil

# Each is told before the engine is; NULL: nothing is traced.
cdef void trace_tick(Trace* trace, int64_t now_us) noexcept nogil
cdef void trace_event(Trace* trace, const Event* event) noexcept nogil
cdef void trace_mark(Trace* trace, int kind) noexcept nogil
cdef void trace_stack(Trace* trace, int rank, int64_t nbytes) noexcept nogil
cdef void trace_start(Trace* trace, const Signature* sig, int64_t item_bytes, const void* send,
                      const void* recv, int flags, const Layout* layout) noexcept nogil
cdef void trace_started(Trace* trace, int code) noexcept nogil
cdef void trace_attach(Trace* trace) noexcept nogil
cdef Trace* open_trace(Engine* engine, object path, int64_t bytes_max) except NULL
cdef void close_trace(Trace* trace) noexcept nogil

cdef int64_t preamble_bytes() noexcept nogil
cdef uint64_t digest_bytes(uint64_t h, const unsigned char* bytes, int64_t nbytes) noexcept nogil
cdef uint64_t preamble_digest(const unsigned char* content) noexcept nogil
cdef uint64_t digest_of(const unsigned char* head, const unsigned char* body,
                        int64_t nbytes) noexcept nogil
