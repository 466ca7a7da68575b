# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The records of operations, and what the history of memberships makes of each.

Below the streams and the small path: messages, records, signatures, attempts and fates.
"""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memset
from cython_kernels.reduction cimport reduce_into
from cython_kernels.stream cimport sink_idle
from hopcoll._state cimport *
from hopcoll._plan cimport is_for_root, is_from_root


# ---- messages -----------------------------------------------------------------------------

cdef void send_message(Engine* engine, int dest, int type, int64_t seq, const Signature* sig,
                       const void* body, int64_t nbytes) noexcept nogil:
    send_more(engine, dest, type, MORE_NONE, seq, sig, body, nbytes)


cdef void send_more(Engine* engine, int dest, int type, int more, int64_t seq,
                    const Signature* sig, const void* body, int64_t nbytes) noexcept nogil:
    cdef Head head
    memset(&head, 0, sizeof(Head))
    head.type = type
    head.more = more
    head.epoch = engine.epoch
    head.seq = seq
    if not engine.stopped:     # what fails with us is done nowhere else
        head.done = engine.done
        head.stable = engine.stable
    if sig != NULL:
        head.sig = sig[0]
    engine.counters.controls_sent += 1
    engine.transport.send_control(engine.transport.self, dest, &head, sizeof(Head), body, nbytes)


cdef void merge_watermarks(Engine* engine, int peer, const Head* head) noexcept nogil:
    cdef int i
    if engine.peer_done != NULL:
        if engine.settings.sabotage & BREAK_STABLE and head.seq > engine.peer_done[peer]:
            engine.peer_done[peer] = head.seq
        if head.done > engine.peer_done[peer]:
            engine.peer_done[peer] = head.done
    if head.stable > engine.stable:
        engine.stable = head.stable
    if head.more == MORE_BELOW and head.epoch == engine.epoch:
        for i in range(engine.flow.children):
            if engine.flow.child[i] == peer and head.seq > engine.below_done[i]:
                engine.below_done[i] = head.seq
    elif head.more == MORE_AGAIN and head.epoch == engine.epoch and peer == engine.flow.parent:
        engine.told_done = -1
        engine.watermark_due = 1


# ---- records ------------------------------------------------------------------------------

cdef Operation* claim(Engine* engine, int64_t seq) noexcept nogil:
    """The record of operation `seq`, made when it is new; NULL when its slot is taken."""
    cdef Operation* op = slot_of(engine, seq)
    cdef int i
    if op.seq == seq:
        return op
    if op.seq >= 0 or seq < engine.freed or seq >= engine.freed + engine.settings.ring:
        return NULL
    memset(op, 0, sizeof(Operation))
    op.seq = seq
    op.sig_from = -1
    op.attempt = -1
    op.early = -1
    op.whole_told = -1
    op.place_attempt = -1
    op.up_attempt = op.landed_attempt = -1
    op.before = op.after = op.tail = -1
    for i in range(BLOCKS_MAX):
        op.holder[i] = NOBODY
    return op


cdef void release_memory(Engine* engine, void* memory) noexcept nogil:
    if memory != NULL:
        engine.transport.release(engine.transport.self, memory)


cdef bint sinks_idle(const Block* block) noexcept nogil:
    """Whether nothing is to come of a block that was asked for."""
    cdef int phase
    for phase in range(PHASES):
        if not sink_idle(&block.sink[phase]):
            return False
    return True


cdef bint record_quiet(const Operation* op) noexcept nogil:
    cdef int b
    if op.in_flight or op.in_flight_retained or op.early >= 0:
        return False
    for b in range(op.blocks):
        if (op.block[b].outlets[0] >= 0 or op.block[b].outlets[1] >= 0
                or not sinks_idle(&op.block[b])):
            return False
    return True


cdef void free_records(Engine* engine) noexcept nogil:
    cdef Operation* op
    while engine.freed < engine.finished and engine.freed < engine.stable:
        op = find_operation(engine, engine.freed)
        if op != NULL:
            if not record_quiet(op):
                return
            if op.retained != NULL and op.late_kept:
                engine.late_bytes -= op.nbytes
            elif op.retained != NULL:
                engine.retained_bytes -= op.nbytes
            if not op.strays:         # else a send to a lost rank may read it, for ever
                release_memory(engine, op.scratch)
                release_memory(engine, op.undo)
                release_memory(engine, op.retained)
                release_memory(engine, op.input)
            release_memory(engine, op.inbox)
            release_memory(engine, op.states)
            release_memory(engine, op.block)
            memset(op, 0, sizeof(Operation))
            op.seq = -1
        engine.freed += 1


# ---- what membership means for an operation -----------------------------------------------

cdef int fate_of(const Engine* engine, const Operation* op, Mask* failed) noexcept nogil:
    """The status that the history of memberships gives to an operation: alike at all ranks."""
    cdef int i, epoch
    cdef Mask before, members = members_of(engine, op.attempt)
    failed[0] = mask_none()
    for i in range(op.attempt):
        if engine.history[i].kind == ENTRY_MISMATCH and engine.history[i].cut <= op.seq:
            return STATUS_MISMATCH
    if op.sig.flags & FLAG_RAISE:
        # It raises when ranks were lost since the last operation that could have raised.
        epoch = op.attempt if op.previous_raise >= 0 else 0
        while epoch > 0 and engine.history[epoch - 1].cut > op.previous_raise:
            epoch -= 1
        before = members_of(engine, epoch)
        failed[0] = mask_without(&before, &members)
        if not mask_empty(failed):
            return STATUS_RANK_FAILED
    if is_from_root(op.sig.kind) and not mask_has(&members, op.sig.root):
        mask_add(failed, op.sig.root)
        return STATUS_RANK_FAILED
    if is_for_root(op.sig.kind) and not mask_has(&members, op.sig.root):
        return STATUS_ROOT_LOST
    return STATUS_OK


cdef void refresh_attempt(Engine* engine, Operation* op) noexcept nogil:
    cdef Mask failed
    op.attempt = attempt_of(engine, op.seq)
    op.status = fate_of(engine, op, &failed)
    if op.status != STATUS_OK:
        op.complete = 1


cdef bint combine(Engine* engine, const Operation* op, void* dest, const void* left,
                  const void* right, int64_t nbytes) noexcept nogil:
    """dest = left op right; False when the caller's own operation failed."""
    cdef int64_t count = nbytes // op.item_bytes
    if op.sig.redop == USER_OP:
        return engine.user(engine.user_context, op, dest, left, right, count) == 0
    reduce_into(op.sig.dtype, op.sig.redop, dest, left, right, count)
    return True


# ---- signatures ---------------------------------------------------------------------------

cdef void complain(Engine* engine, Operation* op) noexcept nogil:
    cdef int coordinator = coordinator_of(engine)
    op.complained = 1
    if engine.poisoned or (engine.suspecting == SUSPICION_NEW and op.seq >= engine.suspect):
        return
    if not engine.suspecting or op.seq < engine.suspect:
        engine.suspect = op.seq
    engine.suspecting = SUSPICION_NEW
    if coordinator == engine.rank:
        engine.complaint = 1
    else:
        send_message(engine, coordinator, MSG_COMPLAIN, op.seq, &op.sig, NULL, 0)


cdef void dispute(Engine* engine, Operation* op, const Signature* ours, int peer,
                  const Signature* theirs) noexcept nogil:
    """Complains of what a peer called, and remembers it: where both were done at once, by the time
    of the ballot neither may have a record of it."""
    if engine.dispute.seq < 0 or op.seq < engine.dispute.seq:
        engine.dispute.seq = op.seq
        engine.dispute.peer = peer
        engine.dispute.source = engine.rank
        engine.dispute.ours = ours[0]
        engine.dispute.theirs = theirs[0]
    complain(engine, op)


cdef bint compare_signature(Engine* engine, Operation* op, int peer,
                            const Signature* sig) noexcept nogil:
    """Whether it is what we called, or the first that we hear of this operation.  `peer` NOBODY:
    whoever says so need not have called it."""
    if op.sig_from < 0:
        op.sig = sig[0]
        op.sig_from = peer
        return True
    if signature_equal(&op.sig, sig):
        return True
    if op.called and peer != NOBODY:
        dispute(engine, op, &op.sig, peer, sig)
    else:
        complain(engine, op)
    return False


cdef void ask_again(Engine* engine, Operation* op) noexcept nogil:
    """What had come beside another signature was refused; whoever sent that one may be dead."""
    cdef Mask members = attempt_members(engine, op)
    cdef FetchBody body
    cdef int r
    for r in range(engine.size):
        if r != engine.rank and mask_has(&members, r) and not mask_has(&op.have, r):
            body.have = mask_full(engine.size)      # nobody's but its own
            mask_drop(&body.have, r)
            send_message(engine, r, MSG_FETCH, op.seq, &op.sig, &body, sizeof(body))


cdef bint announce_stuck(Engine* engine) noexcept nogil:
    """An operation that does not get on tells the coordinator what we called it for: ranks that
    wait for each other in different operations learn of it that way.  Whether that is ourselves."""
    cdef Operation* op = find_operation(engine, engine.done)
    cdef int coordinator = coordinator_of(engine)
    # A complaint that holds us up may have gone to a coordinator that died.
    if (op == NULL or not op.called or (op.complete and not engine.suspecting)
            or engine.now_us - op.called_us < engine.settings.announce_us << op.announced):
        return False
    if op.announced < 20:        # again after twice the time: others may not have called it yet
        op.announced += 1
    if coordinator != engine.rank:
        send_message(engine, coordinator, MSG_ANNOUNCE, op.seq, &op.sig, NULL, 0)
        return False
    engine.complaint = 1
    return True
