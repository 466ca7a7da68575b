# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The replay of a trace: an engine is told what another one was told, and has to do the same.

The engine calls a transport that sends nothing: each thing that it does is compared with the next
record of the trace.  It has no bytes of the user's; nothing that it does depends on them.
"""
from libc.stdint cimport int64_t, int32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset
from cython_kernels.transport cimport EVENT_CONTROL, Event, Transport
from hopcoll._state cimport *
from hopcoll._state cimport Engine as EngineState
from hopcoll._engine cimport (
    engine_event, engine_free, engine_leave, engine_new, engine_ready, engine_tick)
from hopcoll._operation cimport start_operation
from hopcoll._records cimport send_message
from hopcoll._texts cimport ranks_of, signature_text
from hopcoll._trace cimport *


# ---- records ------------------------------------------------------------------------------

cdef struct Message:          # of the protocol, as one of the two ranks saw it
    int64_t nbytes
    uint64_t digest

cdef struct Messages:
    Message* item
    int64_t count
    int64_t room

cdef struct Call:             # an operation of the program, and its buffers
    Signature sig
    Result result
    unsigned char* send
    unsigned char* recv
    int64_t* layout
    int32_t freed
    Call* next

cdef struct Reading:
    const unsigned char* begin_at
    const unsigned char* at
    const unsigned char* end
    EngineState* engine
    Messages* sent            # by dest
    Messages* got             # by source
    Call* calls
    Call** last_call
    int64_t records
    int64_t differs_at
    int32_t differs
    int32_t expected
    int32_t did
    int32_t size


cdef bint keep_message(Messages* all, int64_t nbytes, uint64_t digest) noexcept nogil:
    cdef Message* more
    if all.count == all.room:
        more = <Message*>malloc((2 * all.room + 16) * sizeof(Message))
        if more == NULL:
            return False
        memcpy(more, all.item, all.count * sizeof(Message))
        free(all.item)
        all.item = more
        all.room = 2 * all.room + 16
    all.item[all.count].nbytes = nbytes
    all.item[all.count].digest = digest
    all.count += 1
    return True


cdef void free_buffers(Call* call) noexcept nogil:
    free(call.send)
    free(call.recv)
    free(call.layout)
    call.send = call.recv = NULL
    call.layout = NULL
    call.freed = 1


cdef void stop(Reading* r, int did) noexcept nogil:
    """The engine did something else than the trace has, or the trace makes no sense."""
    if not r.differs:
        r.differs = 1
        r.differs_at = r.at - r.begin_at
        r.expected = r.at[0] if r.at < r.end else 0
        r.did = did


cdef uint64_t take_number(Reading* r) noexcept nogil:
    cdef uint64_t value = 0
    cdef int shift = 0, last
    while r.at < r.end and shift < 64:
        last = r.at[0]
        value |= <uint64_t>(last & 127) << shift
        shift += 7
        r.at += 1
        if last < 128:
            return value
    stop(r, 0)
    return 0


cdef const unsigned char* take_bytes(Reading* r, int64_t nbytes) noexcept nogil:
    cdef const unsigned char* out = r.at
    if nbytes < 0 or nbytes > r.end - r.at:
        stop(r, 0)
        return NULL
    r.at += nbytes
    return out


cdef bint expect(Reading* r, int kind) noexcept nogil:
    """The engine does something: whether the trace has that as its next record."""
    if r.differs:
        return False
    if r.at == r.end:
        # Killed while this was being written; the engine is told nothing more.
        return False
    if r.at[0] != kind:
        stop(r, kind)
        return False
    r.at += 1
    r.records += 1
    return True


cdef void expect_request(Reading* r, int kind, int peer, int tag, int64_t nbytes,
                         int64_t token) noexcept nogil:
    cdef const unsigned char* start = r.at
    if expect(r, kind) and (
            <int64_t>take_number(r) != peer or <int64_t>take_number(r) != tag
            or <int64_t>take_number(r) != nbytes
            or <int64_t>take_number(r) != token):
        r.at = start
        stop(r, kind)


cdef void start(Reading* r) noexcept nogil:
    cdef Call* call = <Call*>calloc(1, sizeof(Call))
    cdef const unsigned char* bytes = take_bytes(r, sizeof(Signature))
    cdef int64_t item_bytes = take_number(r), flags = take_number(r)
    cdef int64_t there = take_number(r), span, i
    cdef int n = r.size, code
    cdef Layout layout
    memset(&layout, 0, sizeof(layout))
    if call == NULL or bytes == NULL or not 0 <= item_bytes <= 16:
        free(call)
        stop(r, 0)
        return
    memcpy(&call.sig, bytes, sizeof(Signature))
    # No call has more than this in either of its buffers.
    span = call.sig.count * item_bytes * n
    if there & THERE_LAYOUT:
        bytes = take_bytes(r, 4 * n * sizeof(int64_t))
        call.layout = <int64_t*>malloc(4 * n * sizeof(int64_t))
        if bytes == NULL or call.layout == NULL:
            free_buffers(call)
            free(call)
            stop(r, 0)
            return
        memcpy(call.layout, bytes, 4 * n * sizeof(int64_t))
        layout.send_bytes, layout.send_at = call.layout, call.layout + n
        layout.recv_bytes, layout.recv_at = call.layout + 2 * n, call.layout + 3 * n
        for i in range(n):
            span = max(span, layout.send_bytes[i] + layout.send_at[i],
                       layout.recv_bytes[i] + layout.recv_at[i])
    if not 0 <= span < <int64_t>1 << 40:
        free_buffers(call)
        free(call)
        stop(r, 0)
        return
    call.send = <unsigned char*>calloc(1, span + 16) if there & THERE_SEND else NULL
    call.recv = <unsigned char*>calloc(1, span + 16) if there & THERE_RECV else NULL
    code = start_operation(r.engine, &call.sig, item_bytes, call.send, call.recv,
                           <int>flags, &layout, &call.result)
    if code != START_OK:
        free_buffers(call)
        free(call)
    else:
        r.last_call[0] = call
        r.last_call = &call.next
    if expect(r, REC_STARTED) and <int>take_number(r) != code:
        stop(r, REC_STARTED)


cdef bint tell(Reading* r) noexcept nogil:
    """One record of what it was told; False when there is none, or when it does not fit."""
    cdef int kind
    cdef Event event
    cdef int64_t rank, nbytes
    if r.differs or r.at == r.end:
        return False
    kind = r.at[0]
    if kind >= REC_CONTROL or kind == 0:
        stop(r, 0)                  # the engine did less than the trace has
        return False
    r.at += 1
    r.records += 1
    if kind == REC_TICK:
        engine_tick(r.engine, r.engine.now_us + <int64_t>take_number(r))
    elif kind == REC_EVENT:
        memset(&event, 0, sizeof(event))
        event.kind = <int>take_number(r)
        rank = take_number(r)
        event.token = take_number(r)
        event.nbytes = take_number(r)
        event.peer = <int>rank
        if not 0 <= rank < r.size:
            stop(r, 0)
            return False
        if event.kind == EVENT_CONTROL:
            event.payload = take_bytes(r, event.nbytes)
            if event.payload == NULL or event.nbytes < <int64_t>sizeof(Head):
                stop(r, 0)
                return False
            if not keep_message(&r.got[rank], event.nbytes, digest_of(
                    event.payload, event.payload + sizeof(Head),
                    event.nbytes - <int64_t>sizeof(Head))):
                return False
        engine_event(r.engine, &event)
    elif kind == REC_READY:
        engine_ready(r.engine)
    elif kind == REC_LEAVE:
        engine_leave(r.engine)
    elif kind == REC_TAG:
        r.engine.tags[0] = <int32_t>take_number(r)
    elif kind == REC_STACK:
        rank = take_number(r)
        nbytes = take_number(r)
        if not 0 <= rank < r.size:
            stop(r, 0)
            return False
        send_message(r.engine, <int>rank, MSG_STACK, r.engine.done, NULL, NULL, nbytes)
    elif kind == REC_START:
        start(r)
    else:
        stop(r, 0)
    return not r.differs


# ---- what the engine does -----------------------------------------------------------------

cdef void replayed_control(void* self, int dest, const void* head, int64_t head_bytes,
                           const void* body, int64_t body_bytes) noexcept nogil:
    cdef Reading* r = <Reading*>self
    cdef const unsigned char* start = r.at
    cdef const unsigned char* text
    cdef uint64_t digest = digest_of(<const unsigned char*>head, <const unsigned char*>body,
                                     body_bytes)
    if not expect(r, REC_CONTROL):
        return
    if (<int64_t>take_number(r) != dest
            or <int64_t>take_number(r) != head_bytes + body_bytes):
        r.at = start
        stop(r, REC_CONTROL)
        return
    text = take_bytes(r, sizeof(digest))
    if text == NULL or memcmp(text, &digest, sizeof(digest)) != 0:
        r.at = start
        stop(r, REC_CONTROL)
        return
    keep_message(&r.sent[dest], head_bytes + body_bytes, digest)


cdef void replayed_send(void* self, int dest, int tag, const void* data, int64_t nbytes,
                        int64_t token) noexcept nogil:
    expect_request(<Reading*>self, REC_SEND, dest, tag, nbytes, token)


cdef void replayed_recv(void* self, int source, int tag, void* data, int64_t nbytes,
                        int64_t token) noexcept nogil:
    expect_request(<Reading*>self, REC_RECV, source, tag, nbytes, token)


cdef int replayed_poll(void* self, Event* event) noexcept nogil:
    return 0


cdef void* replayed_allocate(void* self, int64_t nbytes) noexcept nogil:
    return malloc(nbytes if nbytes else 1)


cdef void replayed_release(void* self, void* memory) noexcept nogil:
    free(memory)


cdef int replayed_user(void* context, const Operation* op, void* dest, const void* left,
                       const void* right, int64_t count) noexcept nogil:
    cdef Reading* r = <Reading*>context
    if expect(r, REC_USER):
        return -1 if take_number(r) else 0
    return 0


cdef void replayed_fence(void* context, int rank) noexcept nogil:
    cdef Reading* r = <Reading*>context
    if expect(r, REC_FENCE) and <int64_t>take_number(r) != rank:
        stop(r, REC_FENCE)


cdef void replayed_where(void* context, WhereBody* out) noexcept nogil:
    cdef Reading* r = <Reading*>context
    if expect(r, REC_WHERE):
        out.inside = <int32_t>take_number(r)
        out.since_us = take_number(r)


cdef void ignore_stack(void* context, int asker) noexcept nogil:
    pass


cdef void ignore_text(void* context, int rank, const unsigned char* text,
                      int64_t nbytes) noexcept nogil:
    pass


cdef void ignore_report(void* context) noexcept nogil:
    pass


cdef class TraceReader:
    """The trace of one rank.

    Parameters
    ----------
    data : buffer
        A file's content.
    name : str
        Where it is from; errors start with it.

    Attributes
    ----------
    rank, size : int
    full : bool
        The rank went on after the file was full.
    records : int
        How many there are; known after `replay`.

    Raises
    ------
    ValueError
        No trace, or of another build.
    """
    cdef const unsigned char[::1] data
    cdef Transport table
    cdef Reading r
    cdef readonly str name
    cdef readonly int rank
    cdef readonly int size
    cdef readonly bint full
    cdef readonly dict counts

    def __cinit__(self, const unsigned char[::1] data, str name):
        cdef const unsigned char* content
        cdef TraceHead head
        cdef int64_t used
        self.data = data
        self.name = name
        self.r.last_call = &self.r.calls
        self.counts = {}
        if len(data) < preamble_bytes():
            raise ValueError(f"{name}: this is no trace of a rank")
        content = &data[0]
        if memcmp(content, TRACE_MARK, 8) != 0:
            raise ValueError(f"{name}: this is no trace of a rank")
        memcpy(&head, content, sizeof(head))
        if (head.version != TRACE_VERSION or head.engine_bytes != sizeof(EngineState)
                or head.settings_bytes != sizeof(Settings)):
            raise ValueError(f"{name}: written by another build of hopcoll; replay it with that "
                             "one")
        used = head.used[head.turn & 1]
        if not 0 <= used <= len(data) - preamble_bytes() or digest_bytes(
                preamble_digest(content), content + preamble_bytes(),
                used) != head.digest[head.turn & 1]:
            raise ValueError(f"{name}: damaged; it is not as it was written")
        self.rank, self.size, self.full = head.rank, head.size, head.full != 0
        self.r.size = self.size
        self.r.begin_at = content + preamble_bytes()
        self.r.end = self.r.begin_at + used
        self.r.sent = <Messages*>calloc(self.size, sizeof(Messages))
        self.r.got = <Messages*>calloc(self.size, sizeof(Messages))
        if self.r.sent == NULL or self.r.got == NULL:
            raise MemoryError("trace: no memory")

    def __dealloc__(self):
        cdef Call* call
        cdef int r
        if self.r.engine != NULL:
            engine_free(self.r.engine)
        while self.r.calls != NULL:
            call = self.r.calls
            self.r.calls = call.next
            free_buffers(call)
            free(call)
        for r in range(self.size):
            if self.r.sent != NULL:
                free(self.r.sent[r].item)
            if self.r.got != NULL:
                free(self.r.got[r].item)
        free(self.r.sent)
        free(self.r.got)

    def replay(self, sabotage=0):
        """Tell an engine what this rank's was told, and compare what it does.

        Returns
        -------
        str or None
            Where it did something else; None when it never did.
        """
        cdef TraceHead head
        cdef const unsigned char* content = &self.data[0]
        cdef Settings settings
        cdef Call* call
        cdef int64_t turns = 0
        memcpy(&head, content, sizeof(head))
        memcpy(&settings, content + sizeof(TraceHead), sizeof(settings))
        settings.sabotage = sabotage
        self.table.self = &self.r
        self.table.rank, self.table.size = self.rank, self.size
        self.table.control_bytes_max = head.control_bytes_max
        self.table.send_control = replayed_control
        self.table.send_data = replayed_send
        self.table.recv_data = replayed_recv
        self.table.poll = replayed_poll
        self.table.allocate = replayed_allocate
        self.table.release = replayed_release
        self.r.engine = engine_new(&self.table, &settings)
        if self.r.engine == NULL:
            raise MemoryError("trace: no memory for an engine")
        memcpy(self.r.engine.host, content + sizeof(TraceHead) + sizeof(Settings),
               sizeof(self.r.engine.host))
        self.r.engine.now_us = head.now_us
        self.r.engine.user, self.r.engine.user_context = replayed_user, &self.r
        self.r.engine.fence, self.r.engine.fence_context = replayed_fence, &self.r
        self.r.engine.where, self.r.engine.where_context = replayed_where, &self.r
        self.r.engine.want_stack = ignore_stack
        self.r.engine.keep_stack = ignore_text
        self.r.engine.report = ignore_report
        self.r.at = self.r.begin_at
        with nogil:
            while tell(&self.r):
                turns += 1
                if turns % 64 == 0:
                    call = self.r.calls
                    while call != NULL:
                        # What is complete and never touched again gives its memory back.
                        if call.result.complete and not call.freed and not call.result.strays:
                            free_buffers(call)
                        call = call.next
        self.counts = dict(self.r.engine.counters)
        self.counts["epoch"] = self.r.engine.epoch
        if self.r.differs:
            return (f"{self.name}: at byte {self.r.differs_at}, after {self.r.records} records, "
                    f"the trace has {RECORDS.get(self.r.expected, 'nonsense')}, the engine did "
                    f"{RECORDS.get(self.r.did, 'nothing more')}")
        return None

    @property
    def records(self):
        return self.r.records

    @property
    def outcomes(self):
        """Of each operation that was started: a dict with the words of its signature, whether it
        is complete, its status (and whether that says something of this rank alone) and epoch, and
        the ranks that contributed and failed."""
        cdef Call* call = self.r.calls
        out = []
        while call != NULL:
            out.append({"what": signature_text(&call.sig, call.result.seq),
                        "kind": call.sig.kind,
                        "partial": bool(call.sig.flags & FLAG_PARTIAL),
                        "complete": bool(call.result.complete), "status": call.result.status,
                        "own": call.result.status in (STATUS_MISMATCH, STATUS_STOPPED,
                                                      STATUS_MISSED),
                        "epoch": call.result.epoch,
                        "contributors": ranks_of(&call.result.contributors, self.size),
                        "failed": ranks_of(&call.result.failed, self.size)})
            call = call.next
        return out

    @property
    def stable(self):
        """Operations below this number are done at every rank that had a part in them."""
        return self.r.engine.stable if self.r.engine != NULL else 0

    @property
    def in_force(self):
        """Whether the rank was a member to the end, as far as it knew."""
        return self.r.engine != NULL and not self.r.engine.stopped

    @property
    def dead(self):
        """The ranks that MPI said are dead."""
        return ranks_of(&self.r.engine.dead, self.size) if self.r.engine != NULL else []

    def compare_messages(self, TraceReader sender):
        """Whether what came from another rank is what that one sent, in its order.

        Returns
        -------
        str or None
            What is wrong.
        """
        cdef const Messages* sent = &sender.r.sent[self.rank]
        cdef const Messages* got = &self.r.got[sender.rank]
        cdef int64_t i
        # Of a rank that was killed while it sent, the last message may not be in its trace.
        for i in range(min(sent.count, got.count)):
            if (sent.item[i].nbytes != got.item[i].nbytes
                    or sent.item[i].digest != got.item[i].digest):
                return (f"{self.name}: message {i} from rank {sender.rank} is not the one that "
                        f"{sender.name} has at that place")
        if got.count > sent.count + 1 and not sender.full:
            return (f"{self.name}: {got.count} messages came from rank {sender.rank}, and it "
                    f"sent {sent.count}")
        return None


RECORDS = {REC_TICK: "a tick", REC_EVENT: "an event", REC_READY: "the start", REC_LEAVE: "the end",
           REC_START: "a call", REC_STACK: "a stack", REC_TAG: "tags of others",
           REC_CONTROL: "a message", REC_SEND: "a send", REC_RECV: "a receive",
           REC_FENCE: "an order to kill", REC_WHERE: "a look at the program",
           REC_USER: "a user's operation", REC_STARTED: "the end of a call"}
