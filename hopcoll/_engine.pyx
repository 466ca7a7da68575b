# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One rank's engine: its making, its events, its clock tick, its leaving."""
from libc.stdint cimport int64_t, int32_t, int16_t
from libc.string cimport memcpy, memset
from cython_kernels.transport cimport (
    Transport, Event, EVENT_CONTROL, EVENT_SENT, EVENT_RECEIVED, EVENT_LOST, EVENT_DEAD)
from hopcoll._state cimport *
from hopcoll._membership cimport (
    answer_lost, coordinate, end_stopped, on_bye, on_dead, on_membership_message)
from hopcoll._late cimport check_late, note_stuck, on_late_message
from hopcoll._silence cimport watch
from hopcoll._chunks cimport lose_patience, on_data_event
from hopcoll._renewal cimport part_streams
from hopcoll._operation cimport (
    abandon_former, copy_for_late, on_operation_message, settle)
from hopcoll._fan cimport free_early
from hopcoll._flow cimport flow_anew, flush_watermark
from hopcoll._merge cimport items_max_of
from hopcoll._tree cimport is_flat
from hopcoll._partial cimport free_carries
from hopcoll._records cimport announce_stuck, merge_watermarks, send_message


cdef int epochs_of(const Settings* settings, int size) noexcept nogil:
    return settings.epochs_max if settings.epochs_max else size + 4


cdef int64_t status_bytes_of(const Settings* settings, int size) noexcept nogil:
    """The longest answer, and the longest proposal."""
    cdef int64_t entries = epochs_of(settings, size) * sizeof(Entry)
    cdef int64_t answer = (sizeof(StatusBody)
                           + items_max_of(settings, size) * sizeof(OperationStatus))
    cdef int64_t proposal = (sizeof(ProposeBody) + (settings.ring // 2 + 1) * sizeof(Stand)
                             + GROUPS_MAX * sizeof(Group))
    return entries + (answer if answer > proposal else proposal)


cdef int rows_of(const Settings* settings, int size) noexcept nogil:
    """From how many ranks one has answers: itself, and its children."""
    return size if size <= settings.degree else settings.degree + 1


cdef int64_t control_bytes_of(const Settings* settings, int size) noexcept nogil:
    """The longest control message."""
    cdef int64_t ballot = status_bytes_of(settings, size)
    cdef int64_t eager = settings.eager_bytes + sizeof(RelayBody)
    return sizeof(Head) + (ballot if ballot > eager else eager)


cdef void* zeroed(Transport* transport, int64_t nbytes) noexcept nogil:
    cdef void* memory = transport.allocate(transport.self, nbytes)
    if memory != NULL:
        memset(memory, 0, nbytes)
    return memory


cdef Engine* engine_new(Transport* transport, const Settings* settings) noexcept nogil:
    """A new engine over `transport`, or NULL when memory is short."""
    cdef Engine* engine = <Engine*>zeroed(transport, sizeof(Engine))
    cdef int size = transport.size, rows = rows_of(settings, size)
    cdef int i
    if engine == NULL:
        return NULL
    engine.transport = transport
    engine.settings = settings[0]
    engine.rank = transport.rank
    engine.size = size
    engine.history_max = epochs_of(settings, size)
    engine.status_bytes = status_bytes_of(settings, size)
    engine.last_raise = -1
    engine.watched = -1
    engine.landing_free = -1
    engine.quarrel.source = -1
    engine.dispute.seq = -1
    engine.told_done = 0
    engine.history = <Entry*>zeroed(transport, engine.history_max * sizeof(Entry))
    engine.ring = <Operation*>zeroed(transport, settings.ring * sizeof(Operation))
    if is_flat(engine):
        engine.peer_done = <int64_t*>zeroed(transport, size * sizeof(int64_t))
    # Written before they are read: an engine that needs few of these pages has few.  The explorer
    # counts on the order of the last three, and on what is behind them.
    engine.proposal = <unsigned char*>transport.allocate(transport.self,
                                                         control_bytes_of(settings, size))
    engine.outlets = <Outlet*>transport.allocate(transport.self,
                                                 settings.outlets_max * sizeof(Outlet))
    engine.statuses = <unsigned char*>transport.allocate(transport.self,
                                                         rows * engine.status_bytes)
    engine.outbox = <unsigned char*>transport.allocate(transport.self,
                                                       control_bytes_of(settings, size))
    engine.flight = <Flight*>zeroed(transport, FLIGHTS * sizeof(Flight))
    if (engine.history == NULL or engine.statuses == NULL or engine.outbox == NULL
            or engine.proposal == NULL or engine.ring == NULL or engine.outlets == NULL
            or engine.flight == NULL or (is_flat(engine) and engine.peer_done == NULL)):
        engine_free(engine)
        return NULL
    if settings.sabotage:         # a broken variant may look at answers that never came
        memset(engine.statuses, 0, rows * engine.status_bytes)
    for i in range(settings.ring):
        engine.ring[i].seq = -1
    engine.fence = no_fence
    engine.outlet_free = -1
    engine.tags = &engine.next_tag
    flow_anew(engine)
    engine.again = 0
    return engine


cdef int engine_rows(const Engine* engine) noexcept nogil:
    """What is kept here for other ranks one by one, besides sets of ranks."""
    cdef int rows = rows_of(&engine.settings, engine.size) + engine.flow.children
    cdef const Early* early = engine.early
    rows += engine.size if engine.peer_done != NULL else 0
    rows += engine.size if engine.wheres != NULL else 0
    while early != NULL:
        rows += 1
        early = early.next
    return rows


cdef void no_fence(void* context, int rank) noexcept nogil:
    pass


cdef void release(Transport* transport, void* memory) noexcept nogil:
    if memory != NULL:
        transport.release(transport.self, memory)


cdef void engine_free(Engine* engine) noexcept nogil:
    cdef Transport* t = engine.transport
    cdef int i
    cdef Operation* op
    if engine.ring != NULL:
        for i in range(engine.settings.ring):
            op = &engine.ring[i]
            if op.seq >= 0:
                release(t, op.scratch)
                release(t, op.undo)
                release(t, op.retained)
                release(t, op.inbox)
                release(t, op.input)
                release(t, op.states)
                release(t, op.block)
    free_carries(engine)
    free_early(engine)
    release(t, engine.history)
    release(t, engine.statuses)
    release(t, engine.outbox)
    release(t, engine.proposal)
    release(t, engine.landings)
    release(t, engine.ring)
    release(t, engine.peer_done)
    release(t, engine.wheres)
    release(t, engine.outlets)
    release(t, engine.flight)
    release(t, engine)


cdef bint is_membership_message(int type) noexcept nogil:
    return (type == MSG_PREPARE or type == MSG_STATUS or type == MSG_DECIDE
            or type == MSG_COMPLAIN or type == MSG_PROPOSE or type == MSG_ACCEPTED
            or type == MSG_REFUSED or type == MSG_SILENT or type == MSG_FENCE
            or type == MSG_OUT or type == MSG_STOP or type == MSG_CUT)


cdef void on_foreign_message(Engine* engine, int peer, const Head* head,
                             const unsigned char* body, int64_t nbytes) noexcept nogil:
    """From a rank with which we share no membership: it asks for nothing in vain, and no more."""
    if head.type == MSG_BYE:
        on_bye(engine, peer)
    elif head.type == MSG_BYE_HEARD:
        mask_add(&engine.heard, peer)
    elif head.type == MSG_GRANT or head.type == MSG_CREDIT:
        on_operation_message(engine, peer, head, body, nbytes)      # answered by voids
    if not engine.stopped:
        answer_lost(engine, peer, head.type)


cdef void engine_event(Engine* engine, const Event* event) noexcept nogil:
    cdef const Head* head
    cdef const unsigned char* body
    cdef int64_t nbytes
    if engine.broken:
        return
    if event.kind == EVENT_CONTROL:
        head = <const Head*>event.payload
        body = event.payload + sizeof(Head)
        nbytes = event.nbytes - <int64_t>sizeof(Head)
        if mask_has(&engine.lost, event.peer) or engine.stopped:
            on_foreign_message(engine, event.peer, head, body, nbytes)
            settle(engine)
            return
        if engine.settings.detect_us:
            mask_drop(&engine.silent, event.peer)
            mask_add(&engine.replied, event.peer)
            if event.peer == engine.watched:
                engine.heard_us = engine.now_us
        merge_watermarks(engine, event.peer, head)
        if head.type == MSG_BYE:
            on_bye(engine, event.peer)
        elif head.type == MSG_READY:
            mask_add(&engine.ready, event.peer)
        elif head.type == MSG_BYE_HEARD:
            mask_add(&engine.heard, event.peer)
        elif head.type >= MSG_ASK:
            on_late_message(engine, event.peer, head, body, nbytes)
        elif is_membership_message(head.type):
            on_membership_message(engine, event.peer, head, body, nbytes)
        elif head.type != MSG_WATERMARK and head.type != MSG_BEAT:
            on_operation_message(engine, event.peer, head, body, nbytes)
            if head.type == MSG_ANNOUNCE:
                note_stuck(engine, head.seq)
            if engine.complaint:
                coordinate(engine)
    elif event.kind == EVENT_DEAD:
        on_dead(engine, event.peer)
    elif event.token != TOKEN_IGNORED:
        on_data_event(engine, event)
    settle(engine)


cdef void engine_tick(Engine* engine, int64_t now_us) noexcept nogil:
    """The clock is handed in: late watermarks, stuck operations, ballots that became due."""
    cdef int64_t before_us = engine.now_us
    engine.now_us = now_us
    if engine.broken:
        return
    if engine.stopped:
        end_stopped(engine)
        return
    if engine.settings.detect_us:
        watch(engine, before_us)
    if now_us - engine.watermark_us >= engine.settings.flush_us:
        flush_watermark(engine)
    if engine.done < engine.next_seq and announce_stuck(engine):
        note_stuck(engine, engine.done)
    check_late(engine)
    if (engine.parted_us and engine.settings.detect_us
            and not engine.settings.sabotage & BREAK_FORMER
            and now_us - engine.parted_us >= engine.settings.detect_us):
        abandon_former(engine)
    if engine.patience_us and now_us >= engine.patience_us:
        lose_patience(engine)
        settle(engine)
    if engine.finished < engine.done:
        copy_for_late(engine)
    if engine.roll_us and now_us >= engine.roll_us:
        engine.rolls_due = 1
        settle(engine)
    # What is done is stable only when the tree of the members says so, and one of it may have left.
    if (engine.done < engine.next_seq or engine.settings.detect_us
            or (engine.stable < engine.next_seq and not is_flat(engine))):
        coordinate(engine)


cdef void engine_ready(Engine* engine) noexcept nogil:
    """Tells everyone that we have heard from everyone: a rank that has all of these knows that any
    two ranks have met, so that from now on a death is survived."""
    cdef int r
    for r in range(engine.size):
        if r != engine.rank:
            send_message(engine, r, MSG_READY, 0, NULL, NULL, 0)
    mask_add(&engine.ready, engine.rank)


cdef Mask engine_awaited(const Engine* engine) noexcept nogil:
    """The living ranks that are not known to be ready."""
    cdef Mask everyone = mask_full(engine.size)
    cdef Mask known = mask_or(&engine.ready, &engine.dead)
    return mask_without(&everyone, &known)


cdef bint engine_quiet(const Engine* engine) noexcept nogil:
    """Whether nobody can need anything of this rank any more, of what it has called."""
    cdef int32_t index
    if engine.stopped:
        return engine.finished == engine.next_seq
    if (engine.stable < engine.next_seq or engine.finished < engine.next_seq
            or engine.frozen or engine.stage != STAGE_NONE):
        return False
    if engine.outlets_used:
        for index in range(engine.outlets_made):
            if (engine.outlets[index].used and not engine.outlets[index].stray
                    and engine.outlets[index].seq < engine.next_seq):
                return False
    return True


cdef void engine_leave(Engine* engine) noexcept nogil:
    """Says good-bye, also to those who said it before us: they wait for ours."""
    cdef int r
    engine.leaving = 1
    part_streams(engine, -1)
    for r in range(engine.size):
        if r != engine.rank and not mask_has(&engine.dead, r) and not mask_has(&engine.lost, r):
            send_message(engine, r, MSG_BYE, engine.done, NULL, NULL, 0)


cdef bint engine_may_go(const Engine* engine) noexcept nogil:
    """Whether all who are still there have heard our good-bye: nobody waits for us.  Where we have
    stopped, those of our host: they count on the voids for what they asked us before they heard,
    and others count on nothing."""
    cdef Mask out = gone(engine)
    cdef Mask known = mask_or(&engine.heard, &out)
    cdef int r
    mask_add(&known, engine.rank)
    for r in range(engine.size):
        if not mask_has(&known, r) and (not engine.stopped
                                        or engine.host[r] == engine.host[engine.rank]):
            return False
    return True
