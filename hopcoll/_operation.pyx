# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The state machine of one operation: its start, its completion, and what epochs do to it.

An operation is *complete* here when our part of the result is there, *done* when every earlier one
is done too and no ballot holds us frozen (a promise to everyone: a done operation always stands),
*stable* when it is done at every living rank, and *finished* when the caller has it back.
"""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memcpy, memset
from hopcoll._state cimport *
from hopcoll._plan cimport ends_at_root, final_giver, is_fold, is_from_root, is_private
from hopcoll._records cimport (
    ask_again, claim, combine, complain, compare_signature, dispute, fate_of, free_records,
    refresh_attempt, release_memory, send_message, sinks_idle)
from hopcoll._flow cimport flow_anew, flush_due, know_others, update_stable
from hopcoll._partial cimport (
    arrive, check_roll, forget_roll, has_late, is_late_for, is_lost_to_us, keep_for_late, keeper_of,
    miss, note_arrival, on_place, on_roll, prepare_carry, refuse_outlets, return_carry,
    settle_carry, take_carry)
from hopcoll._seal cimport check_whole, note_whole
from hopcoll._tree cimport is_flat
from hopcoll._fan cimport (
    answer_neighbour, ask_neighbours, fan_anew, fans, has_landed, is_early, is_fanned, keep_message,
    land, on_fan, pass_down, store_own, take_fan, try_fan)
from hopcoll._small cimport (
    answer_fetch, fetch, land_small, on_contribution, store_contribution, try_small)
from hopcoll._streams cimport attach_early, check_lengths
from hopcoll._chunks cimport (
    awaits_root, cancel_sinks, check_chunk_faults, check_complete, on_away, on_credit, on_grant,
    pump_chunks)
from hopcoll._renewal cimport abandon_streams, end_streams, rerun_chunks
from hopcoll._layout cimport count_awaited, prepare_blocks

# ---- starting -----------------------------------------------------------------------------

cdef int64_t contribution_bytes(const Engine* engine, const Signature* sig,
                                int64_t item_bytes) noexcept nogil:
    """What a rank that contributes sends, all blocks together."""
    if (sig.kind == SCATTER or sig.kind == ALLTOALL
            or (sig.kind == REDUCE_SCATTER and not sig.flags & FLAG_VECTOR)):
        return engine.size * sig.count * item_bytes
    return sig.count * item_bytes


cdef bint goes_small(const Engine* engine, const Signature* sig, int64_t nbytes) noexcept nogil:
    """All ranks must come to the same answer: where each knows only its own lengths, never."""
    return nbytes <= engine.settings.eager_bytes and (not sig.flags & FLAG_VECTOR
                                                      or is_fold(sig.kind))


cdef bint contributes(const Engine* engine, const Signature* sig) noexcept nogil:
    return not is_from_root(sig.kind) or sig.root == engine.rank


cdef void forget_start(Engine* engine, Operation* op) noexcept nogil:
    """Out of memory before anything was sent: the record is again that of an operation that we
    have not called."""
    return_carry(engine, op)
    release_memory(engine, op.undo)
    release_memory(engine, op.scratch)
    release_memory(engine, op.states)
    release_memory(engine, op.block)
    op.undo = op.scratch = op.base = NULL
    op.states = NULL
    op.block = NULL
    op.send = NULL
    op.result = NULL
    op.blocks = 0
    mask_drop(&op.have, engine.rank)


cdef bint make_room(Engine* engine, Operation* op, int flags) noexcept nogil:
    """Copies and scratch of a large operation; False when memory is short."""
    cdef int64_t nbytes = contribution_bytes(engine, &op.sig, op.item_bytes)
    cdef int kind = op.sig.kind
    cdef bint scratch = (kind == REDUCE and op.base == NULL) or kind == REDUCE_SCATTER \
        or kind == EXSCAN
    if flags & FLAG_IN_PLACE and (is_fold(kind) or kind == ALLTOALL):
        op.undo = <unsigned char*>engine.transport.allocate(engine.transport.self, op.undo_bytes)
        if op.undo == NULL:
            return False
        memcpy(op.undo, op.base, op.undo_bytes)
        op.send = op.undo
    if scratch:
        op.scratch = <unsigned char*>engine.transport.allocate(engine.transport.self, nbytes)
        if op.scratch == NULL:
            return False
    if op.carry != NULL:
        op.send = take_carry(engine, op, op.send, nbytes)
    return True


cdef int64_t alltoall_span(const Engine* engine, const Signature* sig, int64_t item_bytes,
                           const Layout* layout) noexcept nogil:
    """How far the blocks of an Alltoall in place reach."""
    cdef int64_t end = 0, one
    cdef int r
    if not sig.flags & FLAG_VECTOR:
        return contribution_bytes(engine, sig, item_bytes)
    for r in range(engine.size):
        one = layout.recv_at[r] + layout.recv_bytes[r]
        if layout.recv_bytes[r] and one > end:
            end = one
    return end


cdef int start_operation(Engine* engine, const Signature* called, int64_t item_bytes,
                         const unsigned char* send, unsigned char* recv, int flags,
                         const Layout* layout, Result* result) noexcept nogil:
    """Enters the next operation of the communicator; START_AGAIN when too many are open.

    `send` is our input, `recv` the place of our result, each NULL where a rank has none.  A Bcast
    has its data in `recv`; with FLAG_IN_PLACE the input is in `recv` too (in a Gather or Allgather
    our block alone, which is at its place there)."""
    cdef int64_t seq = engine.next_seq
    cdef int64_t nbytes = contribution_bytes(engine, called, item_bytes)
    cdef Signature sig = called[0]
    cdef Operation* op
    cdef Mask out
    cdef int r, other_from, failed = START_OK
    cdef bint mismatch
    cdef Signature other
    cdef const unsigned char* input = send
    if engine.stopped:
        return START_STOPPED
    if seq >= engine.freed + engine.settings.ring // 2:
        return START_AGAIN
    op = claim(engine, seq)
    if op == NULL:
        return START_AGAIN
    if sig.flags & FLAG_RAISE:
        sig.raised = raised_of(engine.last_raise)
    mismatch = op.sig_from >= 0 and not signature_equal(&op.sig, &sig)
    other = op.sig
    other_from = op.sig_from
    if mismatch:                           # what came was laid out for the other signature
        release_memory(engine, op.inbox)
        op.inbox = NULL
        op.have = op.arrived = mask_none()
        op.up_attempt = op.landed_attempt = -1
        op.rolled = 0
    op.small = goes_small(engine, &sig, nbytes)
    op.sig = sig
    op.sig_from = engine.rank
    op.item_bytes = item_bytes
    op.base = recv
    op.send = send
    op.undo_bytes = alltoall_span(engine, &sig, item_bytes, layout) if sig.kind == ALLTOALL \
        else nbytes
    op.previous_raise = engine.last_raise
    op.called_us = engine.now_us
    op.asked_us = 0
    op.result = result
    # Everything that can fail comes before the first message.
    if sig.flags & FLAG_PARTIAL and not know_others(engine):
        failed = START_NO_MEMORY
    elif flags & FLAG_CARRY and nbytes and not prepare_carry(engine, op, nbytes):
        failed = START_NO_MEMORY
    elif op.small:
        op.nbytes = nbytes
        if sig.kind == REDUCE_SCATTER and sig.flags & FLAG_VECTOR:
            op.share_at = layout.send_at[engine.rank]
            op.share_bytes = layout.send_bytes[engine.rank]
        if sig.kind == BCAST:
            input = recv
        elif flags & FLAG_IN_PLACE:
            input = recv
            if sig.kind == GATHER or sig.kind == ALLGATHER:
                input += engine.rank * nbytes
        if op.carry != NULL:
            input = take_carry(engine, op, input, nbytes)
        if is_fanned(engine, &sig):
            if not store_own(engine, op, input, nbytes):
                failed = START_NO_MEMORY
        elif contributes(engine, &sig) and not store_contribution(engine, op, engine.rank, input,
                                                                  nbytes):
            failed = START_NO_MEMORY
    else:
        op.nbytes = nbytes * engine.size if sig.kind == ALLGATHER else nbytes
        if not make_room(engine, op, flags):
            failed = START_NO_MEMORY
        else:
            failed = prepare_blocks(engine, op, layout, recv)
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
    count_awaited(engine, op)
    if mismatch and other_from == NOBODY:
        complain(engine, op)
    elif mismatch:
        dispute(engine, op, &op.sig, other_from, &other)
    # Whatever the status: a later epoch may take an error back.
    if op.small and contributes(engine, &sig) and not fans(engine, op):
        out = gone(engine)
        for r in range(engine.size):
            if r != engine.rank and not mask_has(&out, r):
                send_message(engine, r, MSG_EAGER, seq, &op.sig, input, nbytes)
    if mismatch and op.small:
        ask_for_more(engine, op)
    if sig.flags & FLAG_ARRIVAL:
        arrive(engine, op)
    if sig.flags & FLAG_PARTIAL:
        engine.counters.late += is_late_for(engine, op)
        if not op.small or keeper_of(engine) == engine.rank:
            arrive(engine, op)     # else our input tells the keeper
        if is_lost_to_us(engine, op):
            miss(engine, op)
    attach_early(engine, op)
    check_lengths(engine, op)
    check_chunk_faults(engine, op)
    pump(engine, op)
    settle(engine)
    return START_OK


# ---- moving on ----------------------------------------------------------------------------

cdef void ask_for_more(Engine* engine, Operation* op) noexcept nogil:
    if fans(engine, op):
        ask_neighbours(engine, op)
    else:
        ask_again(engine, op)


cdef void pump(Engine* engine, Operation* op) noexcept nogil:
    """Moves whatever of an operation can be moved now."""
    if fans(engine, op):
        try_fan(engine, op)
    elif op.small:
        try_small(engine, op)
    else:
        pump_chunks(engine, op)


cdef void check_root_done(Engine* engine, Operation* op) noexcept nogil:
    if op.called and not op.complete and not op.small and awaits_root(engine, op):
        if op.root_done or has_landed(engine, op):
            op.complete = 1
        elif is_flat(engine):
            fetch(engine, op)


# ---- messages -----------------------------------------------------------------------------

cdef void on_operation_message(Engine* engine, int peer, const Head* head,
                               const unsigned char* body, int64_t nbytes) noexcept nogil:
    cdef Operation* op
    cdef int caller = peer
    if head.type == MSG_GRANT:
        on_grant(engine, peer, head, <const GrantBody*>body)
        return
    if head.type == MSG_CREDIT:
        on_credit(engine, peer, head, <const CreditBody*>body)
        return
    if head.type == MSG_AWAY:
        on_away(engine, peer, head, <const AwayBody*>body)
        return
    if head.type == MSG_FETCH:
        op = find_operation(engine, head.seq)
        if op != NULL and op.called and compare_signature(engine, op, peer, &head.sig):
            if fans(engine, op):
                answer_neighbour(engine, op, peer)
            else:
                answer_fetch(engine, op, peer, <const FetchBody*>body)
        return
    if is_early(engine, head, <const FanBody*>body):
        engine.broken |= not keep_message(engine, peer, head, nbytes)
        return
    if head.seq < engine.freed:
        return
    op = claim(engine, head.seq)
    if op == NULL:
        engine.broken = 1
        return
    if head.type == MSG_ROLL or head.type == MSG_PLACE or head.type == MSG_NEXT:
        caller = NOBODY            # a keeper speaks of what others called
    elif head.type == MSG_DOWN and head.sig.kind == BCAST:
        caller = head.sig.root     # whoever passed it on
    elif head.type == MSG_DOWN and not (<const FanBody*>body).called:
        caller = NOBODY
    if not compare_signature(engine, op, caller, &head.sig):
        return
    if head.type == MSG_ANNOUNCE:
        engine.complaint = 1      # a ballot compares what everyone called
    elif head.type == MSG_ARRIVED:
        note_arrival(engine, op, peer, (<const PlaceBody*>body).attempt)
    elif head.type == MSG_PLACE or head.type == MSG_NEXT:
        if on_place(engine, op, head.type, <const PlaceBody*>body):
            pump(engine, op)
    elif head.type == MSG_ROLL:
        if on_roll(engine, op, <const RollBody*>body) and op.called:
            pump(engine, op)
    elif head.type == MSG_GONE:
        if op.rolled:
            miss(engine, op)
            cancel_sinks(engine, op)
    elif head.type == MSG_ROOT_DONE:
        op.root_done = 1
    elif head.type == MSG_CALLED:
        mask_add(&op.asked, peer)
        if op.called and not op.small:
            check_complete(engine, op)
    elif head.type == MSG_WHOLE:
        note_whole(op, peer, head.epoch)
        engine.wholes_due = 1
    elif head.type == MSG_SEAL:
        if op.whole and head.epoch == engine.epoch:
            op.complete = 1
    elif head.type == MSG_UP or head.type == MSG_DOWN:
        on_fan(engine, op, peer, head, <const FanBody*>body, nbytes)
    elif head.type == MSG_EAGER:
        if op.sig.flags & FLAG_PARTIAL:
            note_arrival(engine, op, peer, 0)
        on_contribution(engine, op, peer, body, nbytes)
    elif head.type == MSG_RELAY:
        on_contribution(engine, op, (<const RelayBody*>body).rank, body + sizeof(RelayBody),
                        nbytes - <int64_t>sizeof(RelayBody))


# ---- completion ---------------------------------------------------------------------------

cdef void record_flight(Engine* engine, const Operation* op) noexcept nogil:
    cdef Flight* flight = &engine.flight[op.seq % FLIGHTS]
    flight.seq = op.seq
    flight.sig = op.sig
    flight.called_us = op.called_us
    flight.done_us = engine.now_us
    flight.moved_bytes = op.moved_bytes
    flight.attempt = op.attempt
    flight.status = op.status


cdef void tell_root_done(Engine* engine, Operation* op) noexcept nogil:
    cdef Mask out = gone(engine)
    cdef int r
    if not is_flat(engine):
        land(engine, op)
        pass_down(engine, op)
        return
    for r in range(engine.size):
        if r != engine.rank and not mask_has(&out, r):
            send_message(engine, r, MSG_ROOT_DONE, op.seq, &op.sig, NULL, 0)


cdef void tell_all_done(Engine* engine) noexcept nogil:
    cdef Mask out = gone(engine)
    cdef int r
    for r in range(engine.size):
        if r != engine.rank and not mask_has(&out, r):
            send_message(engine, r, MSG_WATERMARK, engine.done, NULL, NULL, 0)


cdef void mark_done(Engine* engine, Operation* op) noexcept nogil:
    cdef Mask out
    cdef int r
    op.done = 1
    op.done_us = engine.now_us
    record_flight(engine, op)
    if op.status != STATUS_OK:
        op.keeps_nothing = 1
    elif fans(engine, op):
        take_fan(engine, op)
    elif op.small:
        land_small(engine, op)
    elif ends_at_root(&op.sig) or is_private(op.sig.kind):
        op.keeps_nothing = 1
    elif has_late(engine, op):
        keep_for_late(engine, op)
    elif (op.base != NULL and not op.sig.flags & FLAG_VECTOR
            and op.nbytes <= engine.settings.retain_bytes_max
            and engine.retained_bytes + op.nbytes <= engine.settings.retain_budget_bytes):
        op.retained = <unsigned char*>engine.transport.allocate(engine.transport.self, op.nbytes)
        if op.retained != NULL:
            memcpy(op.retained, op.base, op.nbytes)
            engine.retained_bytes += op.nbytes
    engine.done = op.seq + 1
    if engine.peer_done != NULL:
        engine.peer_done[engine.rank] = engine.done
    if op.status == STATUS_MISMATCH:
        # Others may have it, and wait until nobody needs it any more.
        tell_all_done(engine)
    if op.sig.flags & FLAG_PARTIAL and not is_flat(engine):
        tell_all_done(engine)     # whose result others keep until we have it
    if not op.small:
        engine.watermark_due = 1
        engine.last_large = engine.done
        if ends_at_root(&op.sig) and op.sig.root == engine.rank and op.status == STATUS_OK:
            tell_root_done(engine, op)


cdef bint may_finish(const Engine* engine, const Operation* op) noexcept nogil:
    cdef int b
    if op.in_flight:
        return False
    for b in range(op.blocks):
        if not sinks_idle(&op.block[b]):
            return False
    # Once stopped nobody asks us for anything any more.
    return (op.keeps_nothing or op.small or op.retained != NULL or op.seq < engine.stable
            or engine.stopped
            or (engine.settings.sabotage & BREAK_RETENTION) != 0)


cdef enum:
    COPY_BYTES_A_US = 256     # how long nobody is late who may just be about to begin


cdef void copy_for_late(Engine* engine) noexcept nogil:
    """Somebody takes much longer than we did: a copy of the result is kept for it instead of the
    caller's buffer, so that the call can return."""
    cdef Operation* op = find_operation(engine, engine.finished)
    cdef int64_t patience, since
    if (op == NULL or not op.done or op.keeps_nothing or op.small or op.retained != NULL
            or op.sig.flags & FLAG_VECTOR or op.seq < engine.stable):
        return
    # Nobody is late as long as chunks move: a root is done when it calls, and sends all the same.
    since = op.moved_us if op.moved_us > op.done_us else op.done_us
    patience = 2 * (since - op.called_us)
    if patience < op.nbytes // COPY_BYTES_A_US:
        patience = op.nbytes // COPY_BYTES_A_US      # a copy that is not needed costs the others
    if patience < engine.settings.patience_us:
        patience = engine.settings.patience_us
    if engine.now_us - since < patience:
        return
    keep_for_late(engine, op)
    if op.retained != NULL:
        engine.counters.copies += 1
        settle(engine)


cdef void clear_absent(Engine* engine, Operation* op) noexcept nogil:
    """The blocks of ranks that did not contribute: alike, whatever had come of them."""
    cdef Mask members = attempt_members(engine, op)
    cdef int b
    if op.sig.kind == GATHER or op.sig.kind == ALLGATHER or op.sig.kind == ALLTOALL:
        for b in range(op.blocks):
            if op.block[b].grid.nbytes and not mask_has(&members, op.block[b].start):
                memset(op.block[b].recv, 0, op.block[b].grid.nbytes)


cdef void finish(Engine* engine, Operation* op) noexcept nogil:
    cdef Result* result = op.result
    cdef const unsigned char* input
    op.finished = 1
    op.result = NULL
    if op.carry != NULL:
        input = op.send
        if op.small:
            input = op.inbox + engine.rank * op.nbytes
        settle_carry(engine, op, input, op.nbytes)
    if op.undo != NULL and op.status != STATUS_OK:
        memcpy(op.base, op.undo, op.undo_bytes)  # a failed IN_PLACE gives the input back
    elif op.status == STATUS_OK and not op.small:
        clear_absent(engine, op)
    op.base = NULL
    op.send = NULL
    if op.forgotten:
        refuse_outlets(engine, op)
    if result == NULL:
        return
    result.status = fate_of(engine, op, &result.failed)
    if (op.status == STATUS_STOPPED or op.status == STATUS_MISSED
            or engine.settings.sabotage & BREAK_OWN_RAISE):
        result.status = op.status
    result.strays = op.strays
    result.epoch = op.attempt
    result.contributors = attempt_members(engine, op)
    result.complete = 1


cdef void check_rolls(Engine* engine) noexcept nogil:
    """At the keeper: whose roll is to be closed?"""
    cdef Operation* op
    cdef int64_t seq
    engine.rolls_due = 0
    engine.roll_us = 0
    if engine.frozen or engine.stopped or engine.leaving or keeper_of(engine) != engine.rank:
        return
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op != NULL and check_roll(engine, op) and op.called:
            pump(engine, op)


cdef void settle(Engine* engine) noexcept nogil:
    """Completes, in order, what is complete; finishes and frees what may be."""
    cdef Operation* op
    cdef int64_t seq, stable = engine.stable
    cdef int64_t until
    if engine.rolls_due:
        check_rolls(engine)
    while True:
        check_whole(engine)
        op = find_operation(engine, engine.done)
        if op == NULL or not op.called:
            break
        if not op.complete:
            check_root_done(engine, op)
        if not op.complete or ((engine.frozen or engine.unsure)
                               and not engine.settings.sabotage & BREAK_FREEZE):
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
    flush_due(engine)


# ---- the end of our part ------------------------------------------------------------------

cdef void stop_operations(Engine* engine) noexcept nogil:
    """Nothing that is not done comes to anything here."""
    cdef Operation* op
    cdef int64_t seq
    engine.suspecting = SUSPICION_NONE
    for seq in range(engine.done, engine.next_seq):
        op = find_operation(engine, seq)
        if op != NULL and op.called:
            op.status = STATUS_STOPPED
            op.complete = 1


# ---- a new epoch --------------------------------------------------------------------------

cdef void tell_called(Engine* engine, const Operation* op) noexcept nogil:
    """Who has all of a Bcast asks nobody for it any more: its new neighbour hears of it so."""
    cdef int before, last = op.blocks - 1
    if (op.small or op.sig.kind != BCAST or last < 0
            or (op.awaited and op.block[last].finals < op.block[last].grid.chunks)):
        return
    before = final_giver(engine, op, last)
    if before >= 0 and not is_gone(engine, before):
        send_message(engine, before, MSG_CALLED, op.seq, &op.sig, NULL, 0)


cdef void abandon_former(Engine* engine) noexcept nogil:
    """A rank of another host that left may never send the voids that it owes us: its link may have
    been cut, and MPI does not call it dead."""
    cdef Mask former = engine.left, members = members_of(engine, engine.epoch)
    cdef int64_t seq
    cdef Operation* op
    cdef int r
    for r in range(engine.epoch):
        former = mask_or(&former, &engine.history[r].left)
        former = mask_or(&former, &engine.history[r].lost)
    former = mask_without(&former, &members)
    former = mask_without(&former, &engine.dead)
    former = mask_without(&former, &engine.abandoned)
    engine.parted_us = 0
    for r in range(engine.size):
        if mask_has(&former, r) and engine.host[r] != engine.host[engine.rank]:
            abandon_streams(engine, r)
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op != NULL and op.called:
            pump(engine, op)
    settle(engine)


cdef void enter_epoch(Engine* engine, int previous) noexcept nogil:
    """After a decision: all streams end, answered by voids, and begin again where they stood."""
    cdef int64_t seq
    cdef int old, b
    cdef Operation* op
    flow_anew(engine)
    end_streams(engine)
    for seq in range(engine.done, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op != NULL and not op.done:
            forget_roll(engine, op)
        if op == NULL or not op.called or op.done:
            continue
        old = op.attempt
        op.away = mask_none()
        for b in range(op.blocks):
            op.block[b].behind = -1
        op.asked_us = 0
        if op.status != STATUS_OK:
            op.complete = 0
        if attempt_of(engine, seq) != old and not (
                engine.settings.sabotage & BREAK_ORDERED_CUT and op.complete):
            op.complete = 0
            op.whole = 0
            refresh_attempt(engine, op)
            engine.counters.reruns += 1
            fan_anew(engine, op)
            rerun_chunks(engine, op, old)      # also where it fails now: it may not later
            count_awaited(engine, op)
        elif not op.complete:
            refresh_attempt(engine, op)
        if op.complained and op.small and not op.complete:
            ask_for_more(engine, op)
        if not op.complete:
            check_lengths(engine, op)
        arrive(engine, op)
    engine.told_done = -1
    engine.told_stable = -1
    engine.watermark_due = 1
    engine.wholes_due = 1
    engine.rolls_due = 1
    engine.patience_us = engine.now_us
    engine.parted_us = engine.now_us
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op != NULL and op.called:
            if is_lost_to_us(engine, op):
                miss(engine, op)
            tell_called(engine, op)
            pump(engine, op)
        if op != NULL:
            pass_down(engine, op)
    hear_early(engine)
    settle(engine)


cdef void hear_early(Engine* engine) noexcept nogil:
    """What came before its epoch."""
    cdef Early* all = engine.early
    cdef Early* one
    cdef const Head* head
    engine.early = NULL
    while all != NULL:
        one = all
        all = one.next
        head = <const Head*>(one + 1)
        on_operation_message(engine, one.peer, head, <const unsigned char*>(head + 1), one.nbytes)
        release_memory(engine, one)
