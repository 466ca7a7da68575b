# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Partial operations: the first so many that arrive, or those that come in time.

The *keeper* of an epoch, its lowest member, notes who has called an operation (ARRIVED, or the
small input itself) and closes its **roll**: the quorum is there, the deadline is over (counted by
its clock from the first arrival), or no living rank is missing.  ROLL tells all whose input the
operation is of.  From then on it is an operation among those, and everyone else is given the
result: a rank that calls it later finds its roll closed.

One keeper closes one roll in one attempt, so a roll needs no agreement.  An operation that stands
keeps its roll (the ballot tells it to all), one that is run again gets a new one.

Results are kept for ranks that are late, as many as a budget allows; beyond that the oldest are
forgotten, and who asks for one hears so (GONE) and has missed it.

An operation in the *order of arrival* goes along the chain of those who called it, as they come:
the keeper gives each a place (PLACE, NEXT).  Those who are early have put their inputs together by
the time that the last one arrives.

A **carry** is input that came too late: it goes into the next operation of its layout that this
rank calls, and is consumed when that one has come back to the caller with this rank's input in it.
"""
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset
from hopcoll._state cimport *
from hopcoll._records cimport combine, release_memory, send_message
from hopcoll._streams cimport close_outlet


# ---- the roll -----------------------------------------------------------------------------

cdef int keeper_of(const Engine* engine) noexcept nogil:
    cdef Mask members = members_of(engine, engine.epoch)
    cdef int r
    for r in range(engine.size):
        if mask_has(&members, r):
            return r
    return engine.rank


cdef bint may_decide(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether the keeper is that of the attempt: no membership lies between."""
    cdef Mask now = members_of(engine, engine.epoch)
    cdef Mask then = members_of(engine, attempt_of(engine, op.seq))
    return mask_equal(&now, &then)


cdef void tell_roll(Engine* engine, const Operation* op, int dest) noexcept nogil:
    cdef RollBody body
    body.roll = op.roll
    body.attempt = op.roll_attempt
    body.pad = 0
    send_message(engine, dest, MSG_ROLL, op.seq, &op.sig, &body, sizeof(body))


cdef void set_roll(Engine* engine, Operation* op, const Mask* roll, int attempt) noexcept nogil:
    op.rolled = 1
    op.roll = roll[0]
    op.roll_attempt = attempt


cdef void forget_roll(Engine* engine, Operation* op) noexcept nogil:
    """The attempt is over: who is there takes part in the next one."""
    if op.rolled and op.roll_attempt != attempt_of(engine, op.seq) \
            and not engine.settings.sabotage & BREAK_ROLL:
        op.rolled = 0
        op.roll = mask_none()


cdef void arrive(Engine* engine, Operation* op) noexcept nogil:
    """We have called it: the keeper hears of it."""
    cdef int keeper = keeper_of(engine)
    cdef PlaceBody body
    if not op.called or op.done or (not awaits_roll(op) and not awaits_place(op)):
        return
    if keeper == engine.rank:
        note_arrival(engine, op, engine.rank, op.attempt)
    else:
        memset(&body, 0, sizeof(body))
        body.attempt = op.attempt
        send_message(engine, keeper, MSG_ARRIVED, op.seq, &op.sig, &body, sizeof(body))


cdef void note_arrival(Engine* engine, Operation* op, int rank, int attempt) noexcept nogil:
    if op.sig.flags & FLAG_ARRIVAL:
        if attempt > op.arrived_attempt:   # what we say of an earlier one, it would not hear
            op.arrived_attempt = attempt
            op.arrived = op.placed = mask_none()
            op.tail = -1
        if attempt == op.arrived_attempt:
            mask_add(&op.arrived, rank)
            engine.rolls_due = 1
        return
    if not op.sig.flags & FLAG_PARTIAL:
        return
    if op.rolled:
        if rank != engine.rank and op.roll_attempt == attempt_of(engine, op.seq):
            tell_roll(engine, op, rank)
        return
    if mask_empty(&op.arrived):
        op.arrived_us = engine.now_us
    mask_add(&op.arrived, rank)
    engine.rolls_due = 1


cdef bint closes(const Engine* engine, const Operation* op, const Mask* here,
                 const Mask* alive) noexcept nogil:
    cdef int count = mask_count(here)
    return count > 0 and (
        mask_within(alive, here)
        or (op.sig.root > 0 and count >= op.sig.root)
        or (op.sig.deadline_us > 0 and engine.now_us - op.arrived_us >= op.sig.deadline_us))


cdef bint check_roll(Engine* engine, Operation* op) noexcept nogil:
    """At the keeper: closes the roll when it is time; whether it did."""
    cdef Mask alive = members_of(engine, engine.epoch), out = gone(engine), here
    cdef int64_t until
    cdef int r
    if op.sig.flags & FLAG_ARRIVAL:
        return check_places(engine, op)
    if (not awaits_roll(op) or op.sig_from < 0 or mask_empty(&op.arrived)
            or not may_decide(engine, op)):
        return False
    alive = mask_without(&alive, &out)
    here = mask_and(&op.arrived, &alive)
    if closes(engine, op, &here, &alive):
        engine.counters.rolls += 1
        set_roll(engine, op, &here, attempt_of(engine, op.seq))
        for r in range(engine.size):
            if r != engine.rank and mask_has(&alive, r):
                tell_roll(engine, op, r)
        return True
    if op.sig.deadline_us:
        until = op.arrived_us + op.sig.deadline_us
        if engine.roll_us == 0 or until < engine.roll_us:
            engine.roll_us = until
    return False


# ---- the order of arrival -------------------------------------------------------------------

cdef void tell_place(Engine* engine, Operation* op, int dest, int type, int rank,
                     bint last) noexcept nogil:
    cdef PlaceBody body
    body.attempt = op.arrived_attempt
    body.rank = rank
    body.last = last
    body.pad = 0
    if dest == engine.rank:
        on_place(engine, op, type, &body)
    else:
        send_message(engine, dest, type, op.seq, &op.sig, &body, sizeof(body))


cdef void put_place(Engine* engine, Operation* op, int rank, bint last) noexcept nogil:
    mask_add(&op.placed, rank)
    tell_place(engine, op, rank, MSG_PLACE, op.tail, last)
    if op.tail >= 0:
        tell_place(engine, op, op.tail, MSG_NEXT, rank, False)
    op.tail = rank


cdef bint check_places(Engine* engine, Operation* op) noexcept nogil:
    """At the keeper: a place for each who has arrived.  The root of a Reduce is the last.  Whether
    anything changed here."""
    cdef Mask members = members_of(engine, engine.epoch), out = gone(engine), waiting
    cdef int r, root = op.sig.root if op.sig.kind == REDUCE else -1, left
    cdef int before = op.place_attempt, after = op.after
    if (op.sig_from < 0 or op.arrived_attempt != attempt_of(engine, op.seq)
            or not may_decide(engine, op)):
        return False
    # Who is gone and has no place is missed: a ballot will begin another attempt without it.
    waiting = mask_and(&op.arrived, &members)
    waiting = mask_without(&waiting, &out)
    waiting = mask_without(&waiting, &op.placed)
    left = mask_count(&members) - mask_count(&op.placed)
    for r in range(engine.size):
        if mask_has(&waiting, r) and r != root:
            left -= 1
            put_place(engine, op, r, left == 0)
    if root >= 0 and mask_has(&waiting, root) and left == 1:
        put_place(engine, op, root, True)
    return op.place_attempt != before or op.after != after


cdef bint on_place(Engine* engine, Operation* op, int type,
                   const PlaceBody* body) noexcept nogil:
    """Whether it is of the attempt that we are in."""
    if body.attempt != attempt_of(engine, op.seq) or not op.called:
        return False
    if type == MSG_NEXT:
        op.after = body.rank
    else:
        op.place_attempt = body.attempt
        op.before = body.rank
        op.after = -1
        op.last = body.last
    return True


cdef bint on_roll(Engine* engine, Operation* op, const RollBody* body) noexcept nogil:
    """Whether this is news.  One of another attempt is not for us: the ballot between them says
    what stands, and for the rest we have told the new keeper that we are there."""
    if op.rolled or body.attempt != attempt_of(engine, op.seq):
        return False
    set_roll(engine, op, &body.roll, body.attempt)
    return True


cdef bint is_late_for(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether its roll was closed without us."""
    return op.rolled and not mask_has(&op.roll, engine.rank)


# ---- results for those who are late -------------------------------------------------------

cdef bint has_late(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether the result is still to be asked for by a rank that nobody has waited for."""
    cdef Mask members = members_of(engine, engine.epoch), out = gone(engine)
    cdef int r
    if not op.rolled:
        return False
    members = mask_without(&members, &out)
    members = mask_without(&members, &op.roll)
    for r in range(engine.size):
        if mask_has(&members, r) and r != engine.rank and engine.peer_done[r] <= op.seq:
            return True
    return False


cdef void tell_gone(Engine* engine, Operation* op, int32_t index) noexcept nogil:
    send_message(engine, engine.outlets[index].spring.dest, MSG_GONE, op.seq, &op.sig, NULL, 0)
    close_outlet(engine, op, index)


cdef void refuse_outlets(Engine* engine, Operation* op) noexcept nogil:
    """Who still wants something of a result that is gone hears so."""
    cdef int32_t index, next
    cdef int b
    for b in range(op.blocks):
        index = op.block[b].outlets[<int>FINAL_PHASE]
        while index >= 0:
            next = engine.outlets[index].next
            tell_gone(engine, op, index)
            index = next


cdef void forget_result(Engine* engine, Operation* op) noexcept nogil:
    if op.late_kept:
        engine.late_bytes -= op.nbytes
        release_memory(engine, op.retained)
        op.retained = NULL
        op.late_kept = 0
    engine.counters.forgotten += 1
    op.forgotten = 1
    op.keeps_nothing = 1
    if op.finished:
        refuse_outlets(engine, op)


cdef bint may_forget(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether only ranks that came too late for it could still ask for it."""
    cdef Mask out = gone(engine)
    cdef Mask roll = mask_without(&op.roll, &out)
    cdef int r
    if not op.rolled or not op.late_kept or not op.finished or op.in_flight_retained or op.strays:
        return False
    for r in range(engine.size):
        if mask_has(&roll, r) and engine.peer_done[r] <= op.seq:
            return False
    return True


cdef void keep_for_late(Engine* engine, Operation* op) noexcept nogil:
    """Keeps a copy of the result, and forgets older ones when that is too much.  One that is too
    large by itself is not copied: its call returns when everyone has it."""
    cdef int64_t seq = engine.freed, budget = engine.settings.late_budget_bytes
    cdef Operation* old
    if op.nbytes > budget or op.base == NULL:
        return
    while engine.late_bytes + op.nbytes > budget and seq < op.seq:
        old = find_operation(engine, seq)
        seq += 1
        if old != NULL and may_forget(engine, old):
            forget_result(engine, old)
    if engine.late_bytes + op.nbytes > budget:
        return                     # what is under way to somebody cannot go: we wait for it
    op.retained = <unsigned char*>engine.transport.allocate(engine.transport.self, op.nbytes)
    if op.retained == NULL:
        return
    memcpy(op.retained, op.base, op.nbytes)
    op.late_kept = 1
    engine.late_bytes += op.nbytes


cdef bint is_lost_to_us(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether it stands, without anybody who still has its bytes."""
    cdef int b
    if not op.rolled or not op.standing or op.complete:
        return False
    for b in range(op.blocks):
        if op.holder[b] == NOBODY and op.block[b].finals < op.block[b].grid.chunks:
            return True
    return False


cdef void miss(Engine* engine, Operation* op) noexcept nogil:
    if op.called and not op.complete and not op.done:
        op.status = STATUS_MISSED
        op.forgotten = 1
        op.complete = 1


# ---- what came too late -------------------------------------------------------------------

cdef bint same_carry(const Signature* a, const Signature* b) noexcept nogil:
    return (a.kind == b.kind and a.dtype == b.dtype and a.redop == b.redop
            and a.count == b.count and a.layout == b.layout)


cdef bint prepare_carry(Engine* engine, Operation* op, int64_t nbytes) noexcept nogil:
    """Room for what may have to be carried, before anything is sent; False: memory is short."""
    cdef Carry* one = engine.carries
    while one != NULL and not same_carry(&one.sig, &op.sig):
        one = one.next
    if one == NULL:
        one = <Carry*>engine.transport.allocate(engine.transport.self, sizeof(Carry))
        if one == NULL:
            return False
        memset(one, 0, sizeof(Carry))
        one.sig = op.sig
        one.seq = -1
        one.next = engine.carries
        engine.carries = one
    op.carry = one
    op.input = <unsigned char*>engine.transport.allocate(engine.transport.self, nbytes)
    return op.input != NULL


cdef const unsigned char* take_carry(Engine* engine, Operation* op, const unsigned char* input,
                                     int64_t nbytes) noexcept nogil:
    """Our input together with what came too late before."""
    cdef Carry* carry = op.carry
    if carry.data == NULL or carry.seq >= 0:
        return input               # nothing, or an operation under way has it along
    combine(engine, op, op.input, carry.data, input, nbytes)
    carry.seq = op.seq
    op.takes_carry = 1
    return op.input


cdef void return_carry(Engine* engine, Operation* op) noexcept nogil:
    """Nothing was started after all."""
    if op.takes_carry:
        op.carry.seq = -1
        op.takes_carry = 0
    release_memory(engine, op.input)
    op.input = NULL
    op.carry = NULL


cdef void drop_carry(Engine* engine, Carry* carry) noexcept nogil:
    release_memory(engine, carry.data)
    carry.data = carry.more
    carry.more = NULL
    carry.seq = -1


cdef void add_late(Engine* engine, Operation* op, unsigned char** place, const unsigned char* input,
                   int64_t nbytes) noexcept nogil:
    if place[0] != NULL:
        combine(engine, op, place[0], place[0], input, nbytes)
    elif op.input != NULL and not op.takes_carry:
        place[0] = op.input        # nothing was ever sent from there
        op.input = NULL
        memcpy(place[0], input, nbytes)


cdef void settle_carry(Engine* engine, Operation* op, const unsigned char* input,
                       int64_t nbytes) noexcept nogil:
    """The operation goes back to its caller: its carry is consumed, or goes on.  `input` is what we
    had for it, with what it took along."""
    cdef Carry* carry = op.carry
    cdef Mask members = attempt_members(engine, op)
    cdef bint ended = op.status == STATUS_OK or op.status == STATUS_MISSED
    cdef bint counted = ended and mask_has(&members, engine.rank)
    if carry == NULL:
        return
    op.carry = NULL
    if op.takes_carry:
        if counted or engine.settings.sabotage & BREAK_CARRY:
            engine.counters.carried += 1
            drop_carry(engine, carry)
        else:
            if ended:
                memcpy(carry.data, input, nbytes)
            carry.seq = -1
            if carry.more != NULL:
                combine(engine, op, carry.data, carry.data, carry.more, nbytes)
                release_memory(engine, carry.more)
                carry.more = NULL
    elif ended and not counted:
        add_late(engine, op, &carry.more if carry.seq >= 0 else &carry.data, input, nbytes)


cdef void free_carries(Engine* engine) noexcept nogil:
    cdef Carry* one
    while engine.carries != NULL:
        one = engine.carries
        engine.carries = one.next
        release_memory(engine, one.data)
        release_memory(engine, one.more)
        release_memory(engine, one)
