# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The state machine of one operation: its streams, its small-message path, its completion.

An operation is *complete* here when our part of the result is there, *done* when every earlier one
is done too and no ballot holds us frozen (a promise to everyone: a done operation always stands),
*stable* when it is done at every living rank, and *finished* when the caller has it back.
"""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memcpy
from cython_kernels.stream cimport sink_idle
from cython_kernels.reduction cimport reduce_into, divide
from hopcoll._state cimport *
from hopcoll._records cimport (
    ask_again, attempt_members, claim, compare_signature, complain, fate_of, free_records,
    refresh_attempt, release_memory, send_message)
from hopcoll._chunks cimport (
    check_chunk_faults, end_streams, needs_watermark, on_credit, on_grant, prepare_blocks,
    pump_chunks, rerun_chunks)

cdef enum:
    AVG = 10


# ---- starting -----------------------------------------------------------------------------


cdef int64_t inbox_slots(const Engine* engine, const Signature* sig) noexcept nogil:
    return 1 if sig.kind == BCAST else engine.size


cdef bint store_contribution(Engine* engine, Operation* op, int rank, const unsigned char* data,
                             int64_t nbytes) noexcept nogil:
    cdef int64_t slot = 0 if op.sig.kind == BCAST else rank
    if op.inbox != NULL and nbytes != op.nbytes:
        return True                     # a wrong call: its signature tells the coordinator
    if nbytes > 0:
        if op.inbox == NULL:
            op.nbytes = nbytes
            op.inbox = <unsigned char*>engine.transport.allocate(
                engine.transport.self, inbox_slots(engine, &op.sig) * nbytes)
            if op.inbox == NULL:
                return False
        memcpy(op.inbox + slot * op.nbytes, data, nbytes)
    mask_add(&op.have, rank)
    return True


cdef void forget_start(Engine* engine, Operation* op) noexcept nogil:
    """Out of memory before anything was sent: the record is again that of an operation that we
    have not called."""
    release_memory(engine, op.undo)
    release_memory(engine, op.scratch)
    release_memory(engine, op.states)
    if op.small:
        release_memory(engine, op.retained)
    op.undo = op.scratch = op.retained = op.base = NULL
    op.states = NULL
    op.send = NULL
    op.result = NULL
    op.blocks = 0
    mask_drop(&op.have, engine.rank)


cdef int start_operation(Engine* engine, const Signature* called, int64_t item_bytes,
                         const unsigned char* send, unsigned char* recv, int flags,
                         Result* result) noexcept nogil:
    """Enters the next operation of the communicator; START_AGAIN when too many are open."""
    cdef int64_t seq = engine.next_seq
    cdef int64_t nbytes = called.count * item_bytes
    cdef Signature sig = called[0]
    cdef Operation* op
    cdef Mask out
    cdef int r, failed = START_OK
    cdef bint mismatch
    if seq >= engine.freed + engine.settings.ring // 2:
        return START_AGAIN
    op = claim(engine, seq)
    if op == NULL:
        return START_AGAIN
    if sig.flags & FLAG_RAISE:
        sig.raised = raised_of(engine.last_raise)
    mismatch = op.sig_from >= 0 and not signature_equal(&op.sig, &sig)
    if mismatch:                           # what came was laid out for the other signature
        release_memory(engine, op.inbox)
        op.inbox = NULL
        op.have = mask_none()
    op.small = nbytes <= engine.settings.eager_bytes
    op.sig = sig
    op.sig_from = engine.rank
    op.nbytes = nbytes
    op.item_bytes = item_bytes
    op.base = recv
    op.send = send
    op.previous_raise = engine.last_raise
    op.called_us = engine.now_us
    op.result = result
    # Everything that can fail comes before the first message.
    if flags & FLAG_IN_PLACE and not op.small:
        op.undo = <unsigned char*>engine.transport.allocate(engine.transport.self, nbytes)
        if op.undo == NULL:
            failed = START_NO_MEMORY
        else:
            memcpy(op.undo, recv, nbytes)
            op.send = op.undo
    elif flags & FLAG_IN_PLACE:
        op.send = recv
    if not op.small and failed == START_OK:
        failed = prepare_blocks(engine, op)
        if failed == START_OK and op.base == NULL:
            op.scratch = <unsigned char*>engine.transport.allocate(engine.transport.self, nbytes)
            if op.scratch == NULL:
                failed = START_NO_MEMORY
            op.base = op.scratch
    elif op.small:
        if op.retained == NULL:
            op.retained = <unsigned char*>engine.transport.allocate(engine.transport.self,
                                                                    nbytes + 1)
        if op.retained == NULL:
            failed = START_NO_MEMORY
        elif op.sig.kind == BCAST:
            if sig.root == engine.rank and not store_contribution(engine, op, engine.rank, recv,
                                                                  nbytes):
                failed = START_NO_MEMORY
        elif not store_contribution(engine, op, engine.rank, op.send, nbytes):
            failed = START_NO_MEMORY
        if failed == START_OK:
            engine.retained_bytes += nbytes
    if failed != START_OK:
        forget_start(engine, op)
        return failed
    op.called = 1
    op.born = engine.epoch
    engine.next_seq = seq + 1
    result.seq = seq
    if sig.flags & FLAG_RAISE:
        engine.last_raise = seq
    refresh_attempt(engine, op)
    if mismatch:
        complain(engine, op)
    # Whatever the status: a later epoch may take an error back.
    if op.small and (op.sig.kind != BCAST or op.sig.root == engine.rank):
        out = gone(engine)
        for r in range(engine.size):
            if r != engine.rank and not mask_has(&out, r):
                send_message(engine, r, MSG_EAGER, seq, &op.sig,
                             <const unsigned char*>recv if op.sig.kind == BCAST else op.send,
                             nbytes)
    if mismatch and op.small:
        ask_again(engine, op)
    check_chunk_faults(engine, op)
    pump(engine, op)
    settle(engine)
    return START_OK


# ---- the small path -----------------------------------------------------------------------

cdef void try_small(Engine* engine, Operation* op) noexcept nogil:
    """Completes a small operation once all contributions are here: every rank folds them in rank
    order, so that all have the same bits."""
    cdef Mask members
    cdef int r, folded = 0
    if not op.called or op.complete:
        return
    members = attempt_members(engine, op)
    if op.sig.kind == BCAST:
        if not mask_has(&op.have, op.sig.root):
            fetch(engine, op)
            return
        if op.nbytes:
            memcpy(op.retained, op.inbox, op.nbytes)
        op.complete = 1
        return
    if not mask_within(&members, &op.have):
        fetch(engine, op)
        return
    if op.nbytes and op.sig.kind != BARRIER:
        for r in range(engine.size):
            if mask_has(&members, r):
                if not folded:
                    memcpy(op.retained, op.inbox + r * op.nbytes, op.nbytes)
                else:
                    reduce_into(op.sig.dtype, op.sig.redop, op.retained, op.retained,
                                op.inbox + r * op.nbytes, op.sig.count)
                folded += 1
        if op.sig.redop == AVG:
            divide(op.sig.dtype, op.retained, op.sig.count, folded)
    op.complete = 1


cdef void fetch(Engine* engine, Operation* op) noexcept nogil:
    """A STAND without us: what the dead had sent to others is asked for, once an epoch."""
    if (op.standing and op.fetched != engine.epoch + 1 and op.holder[0] != NOBODY
            and op.holder[0] != engine.rank):
        op.fetched = engine.epoch + 1
        send_message(engine, op.holder[0], MSG_FETCH, op.seq, &op.sig, NULL, 0)


cdef void pump(Engine* engine, Operation* op) noexcept nogil:
    """Moves whatever of an operation can be moved now."""
    if op.small:
        try_small(engine, op)
    else:
        pump_chunks(engine, op)


cdef void check_root_done(Engine* engine, Operation* op) noexcept nogil:
    if op.called and not op.complete and not op.small and needs_watermark(engine, op):
        if op.root_done:
            op.complete = 1
        else:
            fetch(engine, op)


# ---- messages -----------------------------------------------------------------------------

cdef void answer_fetch(Engine* engine, const Operation* op, int peer) noexcept nogil:
    """The result, where we have it; until it is done also our own contribution once more: who asks
    may be in an epoch of which we have not heard, and cannot use a result of this one."""
    cdef ResultBody* body = <ResultBody*>engine.outbox
    if not op.small:
        if op.sig.kind == REDUCE and op.complete and op.status == STATUS_OK:
            send_message(engine, peer, MSG_ROOT_DONE, op.seq, &op.sig, NULL, 0)
        return
    if op.complete and op.status == STATUS_OK and op.retained != NULL:
        body.attempt = op.attempt
        body.pad = 0
        if op.nbytes:
            memcpy(engine.outbox + sizeof(ResultBody), op.retained, op.nbytes)
        send_message(engine, peer, MSG_RESULT, op.seq, &op.sig, body,
                     sizeof(ResultBody) + op.nbytes)
    if not op.done and (op.sig.kind != BCAST or op.sig.root == engine.rank):
        send_message(engine, peer, MSG_EAGER, op.seq, &op.sig,
                     <const unsigned char*>op.base if op.sig.kind == BCAST else op.send,
                     op.nbytes)


cdef void on_operation_message(Engine* engine, int peer, const Head* head,
                               const unsigned char* body, int64_t nbytes) noexcept nogil:
    cdef Operation* op
    cdef const ResultBody* result
    if head.type == MSG_GRANT:
        on_grant(engine, peer, head, <const GrantBody*>body)
        return
    if head.type == MSG_CREDIT:
        on_credit(engine, peer, head, <const CreditBody*>body)
        return
    if head.type == MSG_FETCH:
        op = find_operation(engine, head.seq)
        if op != NULL and op.called and compare_signature(engine, op, peer, &head.sig):
            answer_fetch(engine, op, peer)
        return
    if head.seq < engine.freed:
        return
    op = claim(engine, head.seq)
    if op == NULL:
        engine.broken = 1
        return
    if not compare_signature(engine, op, peer, &head.sig):
        return
    if head.type == MSG_ANNOUNCE:
        engine.complaint = 1      # a ballot compares what everyone called
    elif head.type == MSG_RESULT:
        result = <const ResultBody*>body
        if (op.called and op.small and not op.complete and result.attempt == op.attempt
                and nbytes == op.nbytes + <int64_t>sizeof(ResultBody)):
            if op.nbytes:
                memcpy(op.retained, body + sizeof(ResultBody), op.nbytes)
            op.complete = 1
    elif head.type == MSG_ROOT_DONE:
        op.root_done = 1
    elif head.type == MSG_EAGER:
        if not mask_has(&op.have, peer) and not op.done:
            if op.called and nbytes != op.nbytes:
                return
            if not store_contribution(engine, op, peer, body, nbytes):
                engine.broken = 1
        if op.called:
            try_small(engine, op)


# ---- completion ---------------------------------------------------------------------------

cdef void mark_done(Engine* engine, Operation* op) noexcept nogil:
    cdef Mask out
    cdef int r
    op.done = 1
    if op.status != STATUS_OK:
        op.keeps_nothing = 1
    elif op.small:
        if op.base != NULL and op.nbytes:
            memcpy(op.base, op.retained, op.nbytes)
    elif op.sig.kind == REDUCE:
        op.keeps_nothing = 1
    elif (op.nbytes <= engine.settings.retain_bytes_max and engine.retained_bytes + op.nbytes
            <= engine.settings.retain_budget_bytes):
        op.retained = <unsigned char*>engine.transport.allocate(engine.transport.self, op.nbytes)
        if op.retained != NULL:
            memcpy(op.retained, op.base, op.nbytes)
            engine.retained_bytes += op.nbytes
    engine.done = op.seq + 1
    engine.peer_done[engine.rank] = engine.done
    if op.status == STATUS_MISMATCH:
        # Others may have it, and wait until nobody needs it any more.
        out = gone(engine)
        for r in range(engine.size):
            if r != engine.rank and not mask_has(&out, r):
                send_message(engine, r, MSG_WATERMARK, engine.done, NULL, NULL, 0)
    if not op.small:
        engine.watermark_due = 1
        engine.last_large = engine.done
        if op.sig.kind == REDUCE and op.sig.root == engine.rank and op.status == STATUS_OK:
            out = gone(engine)
            for r in range(engine.size):
                if r != engine.rank and not mask_has(&out, r):
                    send_message(engine, r, MSG_ROOT_DONE, op.seq, &op.sig, NULL, 0)


cdef bint may_finish(const Engine* engine, const Operation* op) noexcept nogil:
    cdef int b
    if op.in_flight:
        return False
    for b in range(op.blocks):
        if not (sink_idle(&op.block[b].sink[0]) and sink_idle(&op.block[b].sink[1])):
            return False
    return (op.keeps_nothing or op.small or op.retained != NULL or op.seq < engine.stable
            or (engine.settings.sabotage & BREAK_RETENTION) != 0)


cdef void finish(Engine* engine, Operation* op) noexcept nogil:
    cdef Result* result = op.result
    op.finished = 1
    op.result = NULL
    if op.undo != NULL and op.status != STATUS_OK:
        memcpy(op.base, op.undo, op.nbytes)      # a failed IN_PLACE gives the input back
    op.base = NULL
    op.send = NULL
    if result == NULL:
        return
    result.status = fate_of(engine, op, &result.failed)
    result.epoch = op.attempt
    result.contributors = attempt_members(engine, op)
    result.complete = 1


cdef void update_stable(Engine* engine) noexcept nogil:
    cdef Mask members = members_of(engine, engine.epoch)
    cdef int64_t low = engine.done
    cdef int r
    for r in range(engine.size):
        if mask_has(&members, r) and not mask_has(&engine.left, r) and engine.peer_done[r] < low:
            low = engine.peer_done[r]
            if low <= engine.stable:
                return
    if low > engine.stable:
        engine.stable = low


cdef void flush_watermark(Engine* engine) noexcept nogil:
    """Tells the coordinator how far we are; the coordinator tells all what is stable."""
    cdef int coordinator = coordinator_of(engine)
    cdef Mask out
    cdef int r
    engine.watermark_due = 0
    engine.watermark_us = engine.now_us
    if coordinator != engine.rank:
        if engine.told_done < engine.done:
            engine.told_done = engine.done
            send_message(engine, coordinator, MSG_WATERMARK, engine.done, NULL, NULL, 0)
    elif engine.told_stable < engine.stable:
        engine.told_stable = engine.stable
        out = gone(engine)
        for r in range(engine.size):
            if r != engine.rank and not mask_has(&out, r):
                send_message(engine, r, MSG_WATERMARK, engine.stable, NULL, NULL, 0)


cdef void settle(Engine* engine) noexcept nogil:
    """Completes, in order, what is complete; finishes and frees what may be."""
    cdef Operation* op
    cdef int64_t seq, stable = engine.stable
    cdef int64_t until
    cdef int quarter = engine.settings.ring // 4
    while True:
        op = find_operation(engine, engine.done)
        if op == NULL or not op.called:
            break
        if not op.complete:
            check_root_done(engine, op)
        if not op.complete or (engine.frozen and not engine.settings.sabotage & BREAK_FREEZE):
            break
        if engine.suspecting and op.seq >= engine.suspect:
            break
        mark_done(engine, op)
        until = engine.done + engine.settings.active
        for seq in range(engine.done, until if until < engine.next_seq else engine.next_seq):
            op = find_operation(engine, seq)      # one more may move chunks now
            if op != NULL and op.called and not op.small and not op.complete:
                pump(engine, op)
    update_stable(engine)
    while engine.finished < engine.done:
        op = find_operation(engine, engine.finished)
        if not may_finish(engine, op):
            break
        finish(engine, op)
        engine.finished += 1
    free_records(engine)
    if coordinator_of(engine) == engine.rank:
        if engine.told_stable < engine.stable and (
                engine.told_stable < engine.last_large
                or engine.stable - engine.told_stable >= quarter):
            flush_watermark(engine)
    elif engine.watermark_due or engine.done - engine.told_done >= quarter:
        flush_watermark(engine)


# ---- a new epoch --------------------------------------------------------------------------

cdef void enter_epoch(Engine* engine, int previous) noexcept nogil:
    """After a decision: all streams end, answered by voids, and begin again where they stood."""
    cdef int64_t seq
    cdef int old
    cdef Operation* op
    end_streams(engine)
    for seq in range(engine.done, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op == NULL or not op.called or op.done:
            continue
        old = op.attempt
        if op.status != STATUS_OK:
            op.complete = 0
        if attempt_of(engine, seq) != old and not (
                engine.settings.sabotage & BREAK_ORDERED_CUT and op.complete):
            op.complete = 0
            refresh_attempt(engine, op)
            engine.counters.reruns += 1
            rerun_chunks(engine, op, old)      # also where it fails now: it may not later
        elif not op.complete:
            refresh_attempt(engine, op)
        if op.complained and op.small and not op.complete:
            ask_again(engine, op)
    engine.told_done = -1
    engine.told_stable = -1
    engine.watermark_due = 1
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op != NULL and op.called:
            pump(engine, op)
    settle(engine)
