# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Small operations of many ranks: inputs go up a tree, the result comes down.

Where not everyone is a child of one rank, a small Bcast, Reduce, Allreduce or Barrier goes along a
tree over the members of its attempt.  A rank comes first, and behind it, in the order of the ranks,
its subtrees: so what goes UP from a rank is the fold of a run of ranks, and the result a fold in
their order, the same for equal contributors.  The first rank of all makes the one final value, and
sends it DOWN; a Bcast only comes down, and a Reduce tells the others only that the root has it.

Both are of one attempt.  In a new epoch an operation runs again from the start, or it stands: then
its result goes out anew from one that has it, down a tree over the new members that begins there,
through those as well who have had it for long.
"""
from libc.stdint cimport int64_t, int16_t, int32_t
from libc.string cimport memcpy
from cython_kernels.reduction cimport divide
from hopcoll._state cimport *
from hopcoll._plan cimport ends_at_root
from hopcoll._records cimport combine, release_memory, send_message
from hopcoll._tree cimport is_flat

cdef enum:
    AVG = 10


# ---- the tree -----------------------------------------------------------------------------

cdef int rank_in_turn(const Mask* members, int first, int count, int position) noexcept nogil:
    """The rank at a position of the members, counted from `first` on, around."""
    position += mask_below(members, first)
    return mask_nth(members, position if position < count else position - count)


cdef Passing place_in(const Mask* members, int first, int degree, int rank) noexcept nogil:
    """The place of a rank: subtrees are runs of ranks, as long as one another but for one."""
    cdef Passing out
    cdef int count = mask_count(members), low = 0, high = count, parent = -1
    cdef int position = mask_below(members, rank) - mask_below(members, first)
    cdef int i, at, rest, length = 0
    out.parent, out.children, out.leaves = -1, 0, 0
    if not mask_has(members, rank):
        return out
    if position < 0:
        position += count
    while low != position:
        rest = high - low - 1
        at = low + 1
        parent = low
        for i in range(degree):
            length = rest // degree + (i < rest % degree)
            if position < at + length:
                break
            at += length
        low = at
        high = at + length
    if parent >= 0:
        out.parent = rank_in_turn(members, first, count, parent)
    rest = high - low - 1
    at = low + 1
    for i in range(degree if rest > degree else rest):
        out.child[i] = rank_in_turn(members, first, count, at)
        out.children += 1
        at += rest // degree + (i < rest % degree)
    return out


cdef bint is_fanned(const Engine* engine, const Signature* sig) noexcept nogil:
    """Whether a small operation goes along a tree."""
    return (not is_flat(engine) and not sig.flags & (FLAG_PARTIAL | FLAG_CARRY)
            and (sig.kind == BCAST or sig.kind == REDUCE or sig.kind == ALLREDUCE
                 or sig.kind == BARRIER))


cdef bint fans(const Engine* engine, const Operation* op) noexcept nogil:
    return op.small and is_fanned(engine, &op.sig)


cdef bint comes_down(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether there is something of it that a parent passes on to us."""
    return fans(engine, op) or (not op.small and not is_flat(engine) and ends_at_root(&op.sig))


cdef int attempt_here(const Engine* engine, const Operation* op) noexcept nogil:
    return op.attempt if op.called else attempt_of(engine, op.seq)


cdef Passing place_of(const Engine* engine, const Operation* op) noexcept nogil:
    """Our place in the tree of an operation: over its contributors, from the rank that makes or
    has the result; where it stands, over the members, from one that has it."""
    cdef Mask members
    cdef int first
    if op.spread_epoch == engine.epoch + 1:
        members = members_of(engine, engine.epoch)
        first = op.spread_from
    else:
        members = members_of(engine, attempt_here(engine, op))
        first = op.sig.root
        if op.sig.kind == ALLREDUCE or op.sig.kind == BARRIER or op.sig.flags & FLAG_ORDERED \
                or not mask_has(&members, first):
            first = mask_nth(&members, 0)
    return place_in(&members, first, engine.settings.degree, engine.rank)


# ---- what is here -------------------------------------------------------------------------

cdef bint has_landed(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether the result is here, or the news that the root has it."""
    return op.landed_attempt >= 0 and (op.sig.kind == BCAST
                                       or op.landed_attempt == attempt_here(engine, op))


cdef unsigned char* slot_in(const Engine* engine, const Operation* op, int slot) noexcept nogil:
    """Of the inbox: what came from child `slot`; behind those our input, and the result."""
    return op.inbox + slot * op.nbytes


cdef unsigned char* own_in(const Engine* engine, const Operation* op) noexcept nogil:
    return slot_in(engine, op, engine.settings.degree)


cdef unsigned char* result_in(const Engine* engine, const Operation* op) noexcept nogil:
    return slot_in(engine, op, engine.settings.degree + 1)


cdef bint make_inbox(Engine* engine, Operation* op, int64_t nbytes) noexcept nogil:
    """Room for what comes; False when there is none, or of another length."""
    if nbytes == 0:
        return True
    if op.inbox != NULL:
        return nbytes == op.nbytes
    op.nbytes = nbytes
    op.inbox = <unsigned char*>engine.transport.allocate(
        engine.transport.self, (engine.settings.degree + 2) * nbytes)
    return op.inbox != NULL


cdef bint store_own(Engine* engine, Operation* op, const unsigned char* input,
                    int64_t nbytes) noexcept nogil:
    """Keeps our input: the call may return before everyone has what is made of it."""
    if not make_inbox(engine, op, nbytes):
        return False
    if op.sig.kind == BCAST:
        if op.sig.root == engine.rank:
            if nbytes:
                memcpy(result_in(engine, op), input, nbytes)
            land(engine, op)
    elif nbytes:
        memcpy(own_in(engine, op), input, nbytes)
    return True


cdef void land(Engine* engine, Operation* op) noexcept nogil:
    """The result is here.  Who has not called it yet is in no attempt of its own."""
    op.landed_attempt = attempt_here(engine, op)


# ---- moving -------------------------------------------------------------------------------

cdef bint has_children(const Engine* engine, const Operation* op,
                       const Passing* place) noexcept nogil:
    """Whether what is below us has come."""
    cdef int i
    if op.have_attempt != op.attempt and place.children \
            and not engine.settings.sabotage & BREAK_ATTEMPT:
        return False
    for i in range(place.children):
        if not mask_has(&op.have, place.child[i]):
            return False
    return True


cdef void fold(Engine* engine, Operation* op, const Passing* place) noexcept nogil:
    """Our input and what came from below, in the order of the ranks, into the place of the
    result."""
    cdef unsigned char* out = result_in(engine, op)
    cdef int i
    if op.nbytes == 0:
        return
    memcpy(out, own_in(engine, op), op.nbytes)
    for i in range(place.children):
        combine(engine, op, out, out, slot_in(engine, op, i), op.nbytes)


cdef void send_fan(Engine* engine, const Operation* op, int dest, int type) noexcept nogil:
    cdef FanBody* body = <FanBody*>engine.outbox
    cdef int64_t nbytes = op.nbytes if op.small and (type == MSG_UP or op.sig.kind != REDUCE
                                                     or op.sig.flags & FLAG_ORDERED) else 0
    body.attempt = attempt_here(engine, op)
    body.small = op.small
    body.called = op.called
    body.pad = 0
    if nbytes:
        memcpy(engine.outbox + sizeof(FanBody), result_in(engine, op), nbytes)
    send_message(engine, dest, type, op.seq, &op.sig, body, sizeof(FanBody) + nbytes)


cdef void pass_down(Engine* engine, Operation* op) noexcept nogil:
    """Passes on what has landed, once in an epoch."""
    cdef Passing place
    cdef int i
    if (op.down_epoch == engine.epoch + 1 or not has_landed(engine, op)
            or not comes_down(engine, op)):
        return
    op.down_epoch = engine.epoch + 1
    place = place_of(engine, op)
    for i in range(place.children):
        if not is_gone(engine, place.child[i]):
            send_fan(engine, op, place.child[i], MSG_DOWN)


cdef void try_fan(Engine* engine, Operation* op) noexcept nogil:
    """Sends our part up when all below is here, makes the result, passes it on."""
    cdef Passing place
    cdef Mask members
    if (fans(engine, op) and op.sig.kind != BCAST and op.called and not op.complete
            and not has_landed(engine, op) and op.spread_epoch != engine.epoch + 1
            and op.up_attempt != op.attempt):
        place = place_of(engine, op)
        if has_children(engine, op, &place):
            op.up_attempt = op.attempt
            fold(engine, op, &place)
            if place.parent >= 0:
                if not is_gone(engine, place.parent):
                    send_fan(engine, op, place.parent, MSG_UP)
            else:
                members = members_of(engine, op.attempt)
                if op.sig.redop == AVG and op.nbytes:
                    divide(op.sig.dtype, result_in(engine, op), op.nbytes // op.item_bytes,
                           mask_count(&members))
                land(engine, op)
    if op.called and has_landed(engine, op):
        op.complete = 1
    pass_down(engine, op)


cdef void take_fan(Engine* engine, Operation* op) noexcept nogil:
    """The result, into the caller's buffer."""
    if op.nbytes == 0 or op.base == NULL or op.inbox == NULL:
        return
    if op.sig.kind == BCAST and op.sig.root == engine.rank:
        return                          # it is there
    if ends_at_root(&op.sig) and op.sig.root != engine.rank:
        return                          # it is at the root
    memcpy(op.base, result_in(engine, op), op.nbytes)


# ---- messages -----------------------------------------------------------------------------

cdef void on_fan(Engine* engine, Operation* op, int peer, const Head* head, const FanBody* body,
                 int64_t nbytes) noexcept nogil:
    """Something from below, or from above, of the attempt that we are in."""
    cdef const unsigned char* data = <const unsigned char*>body + sizeof(FanBody)
    cdef Passing place
    cdef int i
    nbytes -= sizeof(FanBody)
    if not op.called:
        op.small = body.small
    if op.small != body.small or body.attempt != attempt_here(engine, op):
        return
    if not make_inbox(engine, op, nbytes):
        engine.broken |= op.inbox == NULL
        return
    if head.type == MSG_UP:
        if op.have_attempt != body.attempt and not engine.settings.sabotage & BREAK_ATTEMPT:
            # What came in an earlier one, before we called it.
            op.have_attempt = body.attempt
            op.have = mask_none()
        place = place_of(engine, op)
        for i in range(place.children):
            if place.child[i] == peer and not mask_has(&op.have, peer):
                mask_add(&op.have, peer)
                if nbytes:
                    memcpy(slot_in(engine, op, i), data, nbytes)
    elif not has_landed(engine, op):
        if nbytes:
            memcpy(result_in(engine, op), data, nbytes)
        land(engine, op)
    try_fan(engine, op)


cdef bint is_early(const Engine* engine, const Head* head, const FanBody* body) noexcept nogil:
    """Whether a message is of an epoch that we have not entered."""
    return (head.type == MSG_UP or head.type == MSG_DOWN) and body.attempt > engine.epoch


cdef bint keep_message(Engine* engine, int peer, const Head* head,
                       int64_t nbytes) noexcept nogil:
    """Keeps a whole message until we are there; False when memory is short."""
    cdef Early** last = &engine.early
    cdef Early* one = <Early*>engine.transport.allocate(
        engine.transport.self, sizeof(Early) + sizeof(Head) + nbytes)
    if one == NULL:
        return False
    while last[0] != NULL:
        last = &last[0].next
    last[0] = one
    one.next = NULL
    one.nbytes = nbytes
    one.peer = peer
    one.pad = 0
    memcpy(one + 1, head, sizeof(Head) + nbytes)
    return True


cdef void free_early(Engine* engine) noexcept nogil:
    cdef Early* one
    while engine.early != NULL:
        one = engine.early
        engine.early = one.next
        release_memory(engine, one)


# ---- epochs -------------------------------------------------------------------------------

cdef void spread(Engine* engine, Operation* op, int holder) noexcept nogil:
    """It stands: what some may lack goes out from a holder, through all."""
    if holder != NOBODY:
        op.spread_epoch = engine.epoch + 1
        op.spread_from = holder
        op.down_epoch = 0
        pass_down(engine, op)


cdef void fan_anew(Engine* engine, Operation* op) noexcept nogil:
    """It runs again: what came is of other contributors."""
    if not comes_down(engine, op):
        return
    op.have = mask_none()
    op.up_attempt = -1
    if op.sig.kind != BCAST:
        op.landed_attempt = -1


# ---- calls that differ --------------------------------------------------------------------

cdef void answer_neighbour(Engine* engine, Operation* op, int peer) noexcept nogil:
    """A rank that had refused what we sent it, or may have, asks for it again."""
    cdef Passing place = place_of(engine, op)
    if has_landed(engine, op):
        send_fan(engine, op, peer, MSG_DOWN)
    elif op.up_attempt == op.attempt and place.parent == peer:
        send_fan(engine, op, peer, MSG_UP)


cdef void ask_neighbours(Engine* engine, Operation* op) noexcept nogil:
    """What had come beside another signature was refused; whoever sent that one may be dead."""
    cdef Passing place = place_of(engine, op)
    cdef FetchBody body
    cdef int i
    body.have = op.have
    for i in range(place.children):
        if not mask_has(&op.have, place.child[i]):
            send_message(engine, place.child[i], MSG_FETCH, op.seq, &op.sig, &body, sizeof(body))
    if place.parent >= 0:
        send_message(engine, place.parent, MSG_FETCH, op.seq, &op.sig, &body, sizeof(body))
