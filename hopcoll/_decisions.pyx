# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What a ballot decides: the statuses that members give, and the proposal that follows from them.

Nothing here sends or waits.  From the answers follow the history to go on from, the *cut* in the
order of operations, who of those that answered holds what, and whether ranks called different
things.
"""
from libc.stdint cimport int64_t, int32_t, int16_t
from libc.string cimport memcpy, memmove, memset
from hopcoll._state cimport *
from hopcoll._plan cimport block_count, is_private
from hopcoll._streams cimport find_quarrel


# ---- answers ------------------------------------------------------------------------------

cdef int64_t write_status(Engine* engine, int64_t ballot) noexcept nogil:
    """Our status, written into the outbox; returns its length."""
    cdef StatusBody* status = <StatusBody*>engine.outbox
    cdef Entry* entries = <Entry*>(engine.outbox + sizeof(StatusBody))
    cdef OperationStatus* item
    cdef Operation* op
    cdef int64_t seq
    cdef int b
    memset(status, 0, sizeof(StatusBody))
    status.ballot = ballot
    status.accepted = engine.accepted
    status.next_seq = engine.next_seq
    status.entries = engine.epoch
    status.decided = engine.epoch
    status.dispute = engine.dispute
    memcpy(entries, engine.history, engine.epoch * sizeof(Entry))
    if engine.accepted:        # it goes on from our history, decided or not
        status.entries = (<ProposeBody*>engine.proposal).entries
        memcpy(entries, engine.proposal + sizeof(ProposeBody), status.entries * sizeof(Entry))
    item = <OperationStatus*>(entries + status.entries)
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op == NULL or not op.called:
            continue
        memset(item, 0, sizeof(OperationStatus))
        item.seq = seq
        item.sig = op.sig
        item.attempt = op.attempt
        item.small = op.small
        item.complete = 0 if not op.complete or op.status != STATUS_OK \
            else 2 if op.forgotten else 1
        if op.rolled and op.roll_attempt == op.attempt:
            item.roll = op.roll
        item.whole = not op.small and op.awaited == 0
        item.quarrel = find_quarrel(engine, op)
        if not op.small:
            for b in range(op.blocks):
                if holds(engine, op, b):
                    mask_add(&item.held, b)
        item += 1
        status.operations += 1
    return <unsigned char*>item - engine.outbox


cdef bint holds(const Engine* engine, const Operation* op, int b) noexcept nogil:
    """Whether we have all of this block: to give it, or because it is for us."""
    cdef const Block* block = &op.block[b]
    if block.dest >= 0 and block.dest != engine.rank:
        return op.sig.kind == GATHER and b == engine.rank
    return block.finals == block.grid.chunks


cdef void keep_status(Engine* engine, int peer, const unsigned char* body,
                      int64_t nbytes) noexcept nogil:
    engine.answer_us = engine.now_us
    memcpy(engine.statuses + peer * engine.status_bytes, body, nbytes)
    mask_add(&engine.answered, peer)


cdef StatusBody* status_of(Engine* engine, int rank) noexcept nogil:
    return <StatusBody*>(engine.statuses + rank * engine.status_bytes)


cdef Entry* entries_of(StatusBody* status) noexcept nogil:
    return <Entry*>(<unsigned char*>status + sizeof(StatusBody))


cdef StatusBody* base_of(Engine* engine) noexcept nogil:
    """The answer whose history the next epoch goes on from: the one of the highest ballot."""
    cdef StatusBody* base = status_of(engine, engine.rank)
    cdef int r
    for r in range(engine.size):
        if mask_has(&engine.answered, r) and status_of(engine, r).accepted > base.accepted:
            base = status_of(engine, r)
    return base


cdef bint is_enough(Engine* engine, const Mask* who) noexcept nogil:
    """Whether these can decide: of the last membership that is decided, and of each one that was
    proposed since, all that may be alive or more than half of them all.  One that was proposed and
    never decided is no membership: its majority alone would decide beside that of the real one."""
    cdef StatusBody* base = base_of(engine)
    cdef Mask ended = gone(engine), members, want, with_us
    cdef int first = engine.epoch, r, k
    if engine.settings.sabotage & BREAK_MINORITY:
        return True
    for r in range(engine.size):
        if mask_has(&engine.answered, r) and status_of(engine, r).decided > first:
            first = status_of(engine, r).decided
    if first > base.entries or engine.settings.sabotage & BREAK_CHAIN:
        first = base.entries
    for k in range(first, base.entries + 1):
        members = entries_of(base)[k - 1].members if k else mask_full(engine.size)
        want = mask_without(&members, &ended)
        with_us = mask_and(&members, who)
        if not mask_within(&want, who) and 2 * mask_count(&with_us) <= mask_count(&members):
            return False
    return True


cdef OperationStatus* first_operation(StatusBody* status) noexcept nogil:
    return <OperationStatus*>(entries_of(status) + status.entries)


cdef OperationStatus* operation_in(StatusBody* status, int64_t seq) noexcept nogil:
    cdef OperationStatus* item = first_operation(status)
    cdef int i
    for i in range(status.operations):
        if item[i].seq == seq:
            return &item[i]
    return NULL


cdef int64_t first_mismatch(Engine* engine, const Mask* alive, int64_t low,
                            int64_t high) noexcept nogil:
    """The first operation that living ranks called differently; -1: none.  Fills the groups."""
    cdef int64_t seq
    cdef int r
    cdef OperationStatus* item
    cdef Signature* first
    cdef bint differs
    for seq in range(low, high):
        first = NULL
        differs = False
        engine.grouped = mask_none()
        engine.quarrel.source = -1
        for r in range(engine.size):
            if not mask_has(alive, r):
                continue
            item = operation_in(status_of(engine, r), seq)
            if item == NULL:
                continue
            engine.groups[r] = item.sig
            mask_add(&engine.grouped, r)
            if first == NULL:
                first = &engine.groups[r]
            elif not signature_equal(first, &item.sig):
                differs = True
            if item.quarrel.source >= 0 and mask_has(alive, item.quarrel.dest):
                engine.quarrel = item.quarrel
                differs = True
        if differs:
            return seq
    return -1


cdef int64_t first_dispute(Engine* engine, const Mask* alive, int64_t wrong) noexcept nogil:
    """An earlier operation than `wrong` of which a living rank has seen what another living one
    called otherwise; -1: none.  Fills the groups."""
    cdef const Dispute* one
    cdef int64_t first = -1
    cdef int r, i
    for r in range(engine.size):
        if not mask_has(alive, r):
            continue
        one = &status_of(engine, r).dispute
        if (one.seq < 0 or not mask_has(alive, one.peer) or (wrong >= 0 and one.seq >= wrong)
                or (first >= 0 and one.seq >= first)):
            continue
        # It called that after its answer, and perhaps something earlier that differs as well: the
        # next ballot will tell.
        if status_of(engine, one.peer).next_seq <= one.seq:
            continue
        first = one.seq
        engine.grouped = mask_none()
        engine.quarrel.source = -1
        for i in range(engine.size):
            if mask_has(alive, i) and operation_in(status_of(engine, i), first) != NULL:
                engine.groups[i] = operation_in(status_of(engine, i), first).sig
                mask_add(&engine.grouped, i)
        engine.groups[r] = one.ours
        engine.groups[one.peer] = one.theirs
        mask_add(&engine.grouped, r)
        mask_add(&engine.grouped, one.peer)
    return first if first >= 0 else wrong


cdef OperationStatus* answer_of(Engine* engine, const Mask* alive, int rank, int64_t seq,
                                int attempt) noexcept nogil:
    """What a living rank reported of an attempt at an operation, or NULL."""
    cdef OperationStatus* item
    if not mask_has(alive, rank):
        return NULL
    item = operation_in(status_of(engine, rank), seq)
    return item if item != NULL and item.attempt == attempt else NULL


cdef bint find_holders(Engine* engine, const Mask* alive, int64_t seq, int attempt,
                       const Mask* members, Stand* stand) noexcept nogil:
    """Whether the living together hold all that an attempt was for, and who of them holds what
    others may lack."""
    cdef OperationStatus* item
    cdef OperationStatus* any = NULL
    cdef Mask held = mask_none(), all, lost = mask_without(members, alive)
    cdef int16_t* holder = stand.holder
    cdef int r, b, root, whole = 0, keepers = 0, keeper = NOBODY, complete = NOBODY
    memset(stand, 0, sizeof(Stand))
    for b in range(BLOCKS_MAX):
        holder[b] = NOBODY
    for r in range(engine.size):
        item = answer_of(engine, alive, r, seq, attempt)
        if item == NULL:
            continue
        any = item
        stand.sig = item.sig
        stand.known = 1
        if item.complete:
            complete = r
            item.held = mask_full(engine.size) if item.complete == 1 else mask_none()
        if not mask_empty(&item.roll):
            stand.roll = item.roll
        held = mask_or(&held, &item.held)
        whole += item.whole or item.complete
        if mask_within(&lost, &item.held):
            keepers += 1
            keeper = r
        for b in range(BLOCKS_MAX):
            if mask_has(&item.held, b) and (holder[b] == NOBODY or (
                    item.sig.kind == BCAST and item.sig.root == r)):
                holder[b] = r
    if any == NULL:
        return False
    if any.sig.kind == ALLGATHER and not any.small:
        holder[0] = keeper                # of all blocks of the dead
    if any.sig.kind == GATHER:
        holder[0] = complete              # who knows that the root had it
    if complete != NOBODY:
        return True
    root = any.sig.root
    if any.small:
        return False
    if any.sig.kind == ALLTOALL:
        return keepers == mask_count(alive)
    if any.sig.kind == GATHER:
        return mask_has(alive, root) and mask_within(members, &held)
    if any.sig.kind == ALLGATHER:
        return keepers > 0 and mask_within(members, &held)
    if any.sig.kind == SCATTER and answer_of(engine, alive, root, seq, attempt) != NULL:
        return True
    if is_private(any.sig.kind):
        return whole == mask_count(alive)
    all = mask_full(block_count(any.sig.kind, engine.size))
    return mask_within(&all, &held)


cdef int64_t write_proposal(Engine* engine, const Mask* alive) noexcept nogil:
    """What these answers lead to, written into the outbox; returns its length."""
    cdef int r, entries, count
    cdef int64_t low = -1, high = 0, oldest = -1, cut, seq, wrong = -1
    cdef int64_t reported             # the first operation of which anyone still has a record
    cdef StatusBody* status
    cdef OperationStatus* item
    cdef Head* head
    cdef Entry* history
    cdef ProposeBody* out = <ProposeBody*>engine.outbox
    cdef StatusBody* base = base_of(engine)
    cdef Stand* stands
    cdef Mask members, remaining, before
    cdef int attempt
    cdef int64_t done, nbytes
    # The answers carry done in their operations' order; done ranks were told with each header.
    for r in range(engine.size):
        if not mask_has(alive, r):
            continue
        status = status_of(engine, r)
        done = engine.done if r == engine.rank else engine.peer_done[r]
        if done > low:
            low = done                      # done somewhere: stands
        if oldest < 0 or done < oldest:
            oldest = done
        if status.next_seq > high:
            high = status.next_seq
    reported = oldest
    for r in range(engine.size):
        if mask_has(alive, r) and status_of(engine, r).operations:
            item = first_operation(status_of(engine, r))
            if item.seq < reported:
                reported = item.seq
    memset(out, 0, sizeof(ProposeBody))
    out.ballot = engine.ballot
    history = <Entry*>(engine.outbox + sizeof(ProposeBody))
    entries = base.entries
    memcpy(history, entries_of(base), entries * sizeof(Entry))
    members = history[entries - 1].members if entries else mask_full(engine.size)
    # The cut: done operations stand; after them, as long as the living hold all finals.
    cut = oldest
    count = 0
    stands = <Stand*>(engine.outbox + sizeof(ProposeBody) + (entries + 2) * sizeof(Entry))
    for seq in range(oldest, high):
        attempt = entries
        while attempt > 0 and history[attempt - 1].cut > seq:
            attempt -= 1
        before = history[attempt - 1].members if attempt else mask_full(engine.size)
        if (not find_holders(engine, alive, seq, attempt, &before, &stands[count])
                and seq >= low and not (engine.settings.sabotage & BREAK_STAND and entries
                                        and seq < history[entries - 1].cut)):
            break
        count += 1
        cut = seq + 1
    if not engine.poisoned:
        wrong = first_dispute(engine, alive, first_mismatch(engine, alive, reported, high))
    remaining = mask_and(&members, alive)      # a membership never grows again
    if not mask_equal(&members, &remaining):
        memset(&history[entries], 0, sizeof(Entry))
        history[entries].cut = cut
        history[entries].kind = ENTRY_DEATH
        history[entries].members = remaining
        history[entries].lost = mask_without(&members, &remaining)
        history[entries].left = mask_and(&history[entries].lost, &engine.left)
        history[entries].left = mask_without(&history[entries].left, &engine.dead)
        before = gone(engine)
        history[entries].lost = mask_without(&history[entries].lost, &before)
        entries += 1
    if wrong >= 0:
        memset(&history[entries], 0, sizeof(Entry))
        # Where it is done already it stands; who called it otherwise is refused at once.
        history[entries].cut = wrong
        history[entries].kind = ENTRY_MISMATCH
        history[entries].members = remaining
        entries += 1
        out.groups = engine.size
        out.grouped = engine.grouped
        out.quarrel = engine.quarrel
    out.entries = entries
    out.first_held = oldest
    out.holders = count
    memmove(history + entries, stands, count * sizeof(Stand))
    nbytes = sizeof(ProposeBody) + entries * sizeof(Entry) + count * sizeof(Stand)
    if out.groups:
        memcpy(engine.outbox + nbytes, engine.groups, engine.size * sizeof(Signature))
        nbytes += engine.size * sizeof(Signature)
    return nbytes
