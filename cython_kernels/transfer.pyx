# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Chunked transfers: sinks and springs that find each other, and that can be given up.

The receiver pulls.  It posts receives for the next `window` chunks, ahead of the chunk that it
waits for, and tells the sender with a GRANT how far they reach; the sender never sends beyond.  So
every chunk finds its receive, and a slow receiver needs no memory for what is on its way.

The k-th send to a rank under a tag belongs to the k-th receive there from this rank under that tag.
Both sides count, so a transfer that one side gave up cannot be taken for the next one.  The
receiver chooses a new wire tag for every transfer, so neither can its chunks.

Giving up: a receiver sends STOP with the number of receives that it has posted, a sender answers
them with voids (messages of no bytes), and whoever waits learns it from these.  An end stays until
nothing can come for it any more, also after the verb that made it has returned.
"""
from libc.stdint cimport int64_t, intptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from cython_kernels.mpi_channels cimport clock_s
from cython_kernels.mpi_transport cimport transport_error
from cython_kernels.reduction cimport reduce_into
from cython_kernels.stream cimport (
    CHUNK_FINAL, chunk_length, make_grid, sink_arrived, sink_credit_due, sink_idle, sink_post,
    spring_close, spring_push)
from cython_kernels.transport cimport (
    Event, EVENT_CONTROL, EVENT_DEAD, EVENT_LOST, EVENT_SENT)

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "signal.h" nogil:
    int raise_signal "raise"(int)
    const int SIGKILL


# ---- the ends of transfers ----------------------------------------------------------------

cdef Counter* counter_of(Line* line, int peer, int tag) noexcept nogil:
    """NULL without memory."""
    cdef Counter* counter = line.counters
    while counter != NULL:
        if counter.peer == peer and counter.tag == tag:
            return counter
        counter = counter.next
    counter = <Counter*>calloc(1, sizeof(Counter))
    if counter != NULL:
        counter.peer = peer
        counter.tag = tag
        counter.next = line.counters
        line.counters = counter
    return counter


cdef End* find_spring(Line* line, int peer, int tag, int64_t ordinal) noexcept nogil:
    cdef End* end = line.ends
    while end != NULL:
        if (not end.inbound and end.peer == peer and end.tag == tag
                and end.ordinal == ordinal):
            return end
        end = end.next
    return NULL


cdef End* add_end(Line* line, int inbound, int peer, int tag, int64_t ordinal) noexcept nogil:
    cdef End* end = <End*>calloc(1, sizeof(End))
    if end != NULL:
        end.inbound = inbound
        end.peer = peer
        end.tag = tag
        end.ordinal = ordinal
        end.spring.dest = peer
        end.next = line.ends
        line.ends = end
    return end


cdef bint quiet(const End* end) noexcept nogil:
    """Whether no request of this end can touch memory any more."""
    if end.inbound:
        return sink_idle(&end.sink)
    return end.spring.in_flight == 0


cdef bint over(Line* line, const End* end) noexcept nogil:
    """Whether nothing can come for this end any more, so that it can be forgotten."""
    if end.transfer != NULL or not quiet(end):
        return False
    if end.inbound or line.dead[end.peer]:
        return True
    if end.state != CLOSED:
        return False                     # a receiver waits for a send that is still to be called
    # The receiver will grant more, or stop, unless this many were answered.
    return end.cut or (end.peer_chunk_bytes > 0 and end.spring.limit
                       >= make_grid(end.peer_nbytes, end.peer_chunk_bytes).chunks)


cdef void forget(Line* line, End* end) noexcept nogil:
    cdef End** link = &line.ends
    while link[0] != end:
        link = &link[0].next
    link[0] = end.next
    free(end)


cdef void send_note(Line* line, const End* end, int kind, int64_t limit) noexcept nogil:
    cdef Note note
    note.kind = kind
    note.tag = end.tag
    note.wire_tag = end.wire_tag
    note.unused = 0
    note.ordinal = end.ordinal
    note.limit = limit
    note.nbytes = end.grid.nbytes
    note.chunk_bytes = end.grid.chunk_bytes
    line.table.send_control(line.table.self, end.peer, &note, sizeof(Note), NULL, 0)


cdef void answer_with_voids(Line* line, End* end) noexcept nogil:
    """Ends every receive that still waits for this spring."""
    end.spring.in_flight += <int>spring_close(&end.spring, line.table, <int64_t><intptr_t>end)


cdef bint fits(const End* end) noexcept nogil:
    return end.peer_nbytes == end.grid.nbytes and end.peer_chunk_bytes == end.grid.chunk_bytes


cdef bint complete(const End* end) noexcept nogil:
    return end.whole == end.grid.chunks and (end.inbound or fits(end))


# ---- events -------------------------------------------------------------------------------

cdef void take_note(Line* line, int peer, const Note* note) noexcept nogil:
    """A receiver has told something about its end."""
    cdef End* end = find_spring(line, peer, note.tag, note.ordinal)
    cdef Counter* counter
    if end == NULL:
        counter = counter_of(line, peer, note.tag)
        if counter == NULL or (note.kind == STOP and note.ordinal < counter.sends):
            return                       # everything had been sent
        end = add_end(line, 0, peer, note.tag, note.ordinal)
        if end == NULL:
            return                       # no memory: the receiver will time out
        # A send of this number that was called already, and is not there, was given up.
        end.state = CLOSED if note.ordinal < counter.sends else WAITING
    end.wire_tag = note.wire_tag
    end.spring.tag = note.wire_tag
    end.peer_nbytes = note.nbytes
    end.peer_chunk_bytes = note.chunk_bytes
    if note.limit > end.spring.limit:
        end.spring.limit = note.limit
    if note.kind == STOP:
        end.cut = 1
    if note.kind == STOP or end.state == CLOSED or (end.state == ACTIVE and not fits(end)):
        answer_with_voids(line, end)


cdef void take_chunk(Line* line, End* end, int64_t nbytes, bint lost) noexcept nogil:
    """The oldest receive of a sink has ended."""
    cdef int64_t chunk = sink_arrived(&end.sink)
    cdef int64_t length = chunk_length(&end.grid, chunk)
    cdef Transfer* transfer = end.transfer
    cdef unsigned char* place = end.base + chunk * end.grid.chunk_bytes
    if lost or nbytes != length:
        end.sink.broken = 1
    if end.sink.broken or transfer == NULL:
        return
    if transfer.own != NULL:
        # In place: what came is the left operand.
        reduce_into(transfer.dtype, transfer.op, place, place,
                    transfer.own + chunk * end.grid.chunk_bytes, length // transfer.itemsize)
    if transfer.states != NULL:
        transfer.states[chunk] = CHUNK_FINAL
    end.whole += 1
    count_chunk(line)


cdef void count_chunk(Line* line) noexcept nogil:
    line.moved_chunks += 1
    if line.moved_chunks == line.kill_after_chunks:
        raise_signal(SIGKILL)


cdef void take_event(Line* line, const Event* event) noexcept nogil:
    cdef End* end
    cdef Note note
    if event.kind == EVENT_CONTROL:
        if event.nbytes == sizeof(Note):
            memcpy(&note, event.payload, sizeof(Note))
            take_note(line, event.peer, &note)
        return
    if event.kind == EVENT_DEAD:
        line.dead[event.peer] = 1
        return
    end = <End*><intptr_t>event.token
    if event.kind == EVENT_LOST:
        line.dead[event.peer] = 1        # DEAD may come later
    if end.inbound:
        take_chunk(line, end, event.nbytes, event.kind == EVENT_LOST)
        return
    end.spring.in_flight -= 1
    if event.kind == EVENT_SENT and end.state == ACTIVE and not end.cut:
        end.whole += 1
        count_chunk(line)


cdef void take_events(Line* line) noexcept nogil:
    cdef Event event
    line.events = 0
    while line.table.poll(line.table.self, &event):
        take_event(line, &event)
        line.events += 1


# ---- a verb -------------------------------------------------------------------------------

cdef bint sink_settled(Line* line, End* end) noexcept nogil:
    """Whether a sink is complete, or will get no further."""
    if end.sink.arrived == end.grid.chunks:
        return True
    return (end.sink.broken or line.dead[end.peer]) and sink_idle(&end.sink)


cdef void pull(Line* line, End* end) noexcept nogil:
    """Posts receives ahead and tells the sender."""
    if end.sink.broken or line.dead[end.peer]:
        end.sink.open = 0
        # A sender that was told of too little must be told of the rest to answer it.
        if end.sink.told < end.sink.posted and not line.dead[end.peer]:
            end.sink.told = end.sink.posted
            send_note(line, end, GRANT, end.sink.posted)
        return
    sink_post(&end.sink, line.table, &end.grid, end.base, NULL, line.window, end.grid.chunks,
              <int64_t><intptr_t>end)
    if sink_credit_due(&end.sink, line.window, 2):
        end.sink.told = end.sink.posted
        send_note(line, end, GRANT, end.sink.posted)


cdef bint spring_settled(Line* line, const End* end) noexcept nogil:
    if end.spring.in_flight:
        return False
    if end.cut or end.state == CLOSED or line.dead[end.peer]:
        return True
    if end.peer_chunk_bytes == 0:
        return False                     # the receiver has not said what it expects
    return not fits(end) or end.spring.next == end.grid.chunks


cdef bint push(Line* line, Transfer* transfer, End* end) noexcept nogil:
    """Sends what may be sent; whether this end is settled."""
    cdef End* source = transfer.sink
    if end.state == ACTIVE and not end.cut and not line.dead[end.peer] and (
            end.peer_chunk_bytes == 0 or fits(end)):
        spring_push(&end.spring, line.table, &end.grid, end.base, transfer.states, CHUNK_FINAL,
                    <int64_t><intptr_t>end)
        if source != NULL and sink_settled(line, source) and end.spring.next == source.whole \
                and source.whole < source.grid.chunks:
            # What is missing will never come.
            end.state = CLOSED
            answer_with_voids(line, end)
    return spring_settled(line, end)


cdef int run(Line* line, Transfer* transfer, End** springs, int count,
             double until) noexcept nogil:
    """Goes on with a transfer until all of its ends are settled (1) or the time has come (0);
    -1 when MPI has failed."""
    cdef int i
    cdef bint settled
    while True:
        settled = True
        if transfer.sink != NULL and not sink_settled(line, transfer.sink):
            pull(line, transfer.sink)
            settled = sink_settled(line, transfer.sink)
        for i in range(count):
            if not push(line, transfer, springs[i]):
                settled = False
        if settled:
            return 1
        take_events(line)
        if transport_error(line.table, NULL):
            return -1
        if clock_s() >= until:
            return 0
        if not line.events:
            sched_yield()
