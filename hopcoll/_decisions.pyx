# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What a ballot decides: the statuses that members give, and the proposal that follows from them.

Nothing here sends or waits.  From the answers follow the history to go on from, the *cut* in the
order of operations, who of those that answered holds what, and whether ranks called different
things.
"""
from libc.stdint cimport int64_t, int32_t, int16_t
from libc.string cimport memcpy, memmove, memset
from hopcoll._state cimport *
from hopcoll._merge cimport (
    entries_of, first_operation, merge_operation, merge_status, status_at, status_length)
from hopcoll._plan cimport blocks_of, is_private
from hopcoll._streams cimport find_quarrel


# ---- answers ------------------------------------------------------------------------------

cdef int64_t write_status(Engine* engine, int64_t ballot) noexcept nogil:
    """Our status, written into the outbox; returns its length."""
    cdef StatusBody* status = <StatusBody*>engine.outbox
    cdef Entry* entries = <Entry*>(engine.outbox + sizeof(StatusBody))
    cdef OperationStatus* item
    cdef Operation* op
    cdef int64_t seq
    memset(status, 0, sizeof(StatusBody))
    status.ballot = ballot
    status.accepted = engine.accepted
    status.next_seq = status.next_low = engine.next_seq
    status.done = status.done_low = engine.done
    status.entries = engine.epoch
    status.decided = engine.epoch
    status.dispute = engine.dispute
    mask_add(&status.who, engine.rank)
    memcpy(entries, engine.history, engine.epoch * sizeof(Entry))
    if engine.accepted:        # it goes on from our history, decided or not
        status.entries = (<ProposeBody*>engine.proposal).entries
        memcpy(entries, engine.proposal + sizeof(ProposeBody), status.entries * sizeof(Entry))
    item = first_operation(status)
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op == NULL or not op.called:
            continue
        describe_operation(engine, op, item)
        item += 1
        status.operations += 1
    return status_length(status)


cdef void describe_operation(Engine* engine, Operation* op, OperationStatus* item) noexcept nogil:
    cdef bint complete = op.complete and op.status == STATUS_OK
    cdef int b
    memset(item, 0, sizeof(OperationStatus))
    item.seq = op.seq
    item.sig = op.sig
    item.attempt = op.attempt
    item.small = op.small
    item.complete = engine.rank if complete else -1
    item.whole = complete or (not op.small and op.awaited == 0)
    item.keeper = engine.rank
    mask_add(&item.who, engine.rank)
    if op.rolled and op.roll_attempt == op.attempt:
        item.roll = op.roll
    item.quarrel = find_quarrel(engine, op)
    if complete and not op.forgotten:
        item.held = mask_full(engine.size)
    elif not complete and not op.small:
        for b in range(op.blocks):
            if holds(engine, op, b):
                mask_add(&item.held, b)
    item.common = item.kept = item.held
    for b in range(BLOCKS_MAX):
        item.holder[b] = engine.rank if mask_has(&item.held, b) else NOBODY


cdef bint holds(const Engine* engine, const Operation* op, int b) noexcept nogil:
    """Whether we have all of this block: to give it, or because it is for us."""
    cdef const Block* block = &op.block[b]
    if block.dest >= 0 and block.dest != engine.rank:
        return op.sig.kind == GATHER and b == engine.rank
    return block.finals == block.grid.chunks


cdef void keep_status(Engine* engine, int row, const unsigned char* body,
                      int64_t nbytes) noexcept nogil:
    """Keeps what came from a child, or puts it to what came from it before."""
    cdef StatusBody* status = status_at(engine, row)
    cdef const StatusBody* more = <const StatusBody*>body
    engine.answer_us = engine.now_us
    if engine.rows >> row & 1:
        merge_status(engine, status, more)
    else:
        memcpy(status, body, nbytes)
        engine.rows |= 1 << row
    engine.answered = mask_or(&engine.answered, &more.who)


cdef bint counts(Engine* engine, int row, const Mask* alive) noexcept nogil:
    """Whether there is an answer, and all who gave it are alive."""
    return engine.rows >> row & 1 and mask_within(&status_at(engine, row).who, alive)


cdef bint is_mixed(Engine* engine, const Mask* alive) noexcept nogil:
    """Whether the dead have a part in what others said: what is left without it cannot be told."""
    cdef int row
    cdef Mask who
    for row in range(engine.passing.children + 1):
        if not engine.rows >> row & 1:
            continue
        who = mask_and(&status_at(engine, row).who, alive)
        if not mask_empty(&who) and not mask_within(&status_at(engine, row).who, alive):
            return True
    return False


cdef StatusBody* base_of(Engine* engine) noexcept nogil:
    """The answer whose history the next epoch goes on from: the one of the highest ballot."""
    cdef StatusBody* base = status_at(engine, 0)
    cdef int row
    for row in range(1, engine.passing.children + 1):
        if (counts(engine, row, &engine.answered)
                and status_at(engine, row).accepted > base.accepted):
            base = status_at(engine, row)
    return base


cdef bint is_enough(Engine* engine, const Mask* who) noexcept nogil:
    """Whether these can decide: of the last membership that is decided, and of each one that was
    proposed since, all that may be alive or more than half of them all.  One that was proposed and
    never decided is no membership: its majority alone would decide beside that of the real one."""
    cdef StatusBody* base = base_of(engine)
    cdef Mask ended = gone(engine), members, want, with_us
    cdef int first = engine.epoch, row, k
    if engine.settings.sabotage & BREAK_MINORITY:
        return True
    for row in range(1, engine.passing.children + 1):
        if counts(engine, row, &engine.answered) and status_at(engine, row).decided > first:
            first = status_at(engine, row).decided
    if first > base.entries or engine.settings.sabotage & BREAK_CHAIN:
        first = base.entries
    for k in range(first, base.entries + 1):
        members = entries_of(base)[k - 1].members if k else mask_full(engine.size)
        want = mask_without(&members, &ended)
        with_us = mask_and(&members, who)
        if not mask_within(&want, who) and 2 * mask_count(&with_us) <= mask_count(&members):
            return False
    return True


# ---- what they lead to --------------------------------------------------------------------

cdef void add_to_group(Engine* engine, const Signature* sig, const Mask* who) noexcept nogil:
    """These called this.  Where there are too many groups the last ones stay unnamed."""
    cdef int i
    for i in range(engine.groups_count):
        if signature_equal(&engine.groups[i].sig, sig):
            engine.groups[i].who = mask_or(&engine.groups[i].who, who)
            return
    if engine.groups_count < GROUPS_MAX:
        engine.groups[engine.groups_count].sig = sig[0]
        engine.groups[engine.groups_count].who = who[0]
        engine.groups_count += 1


cdef bint group_calls(Engine* engine, const Mask* alive, int64_t seq) noexcept nogil:
    """Fills the groups with who called what; whether they differ."""
    cdef OperationStatus* item
    cdef int row, i
    cdef bint differs = False
    engine.groups_count = 0
    engine.quarrel.source = -1
    for row in range(engine.passing.children + 1):
        if not counts(engine, row, alive):
            continue
        item = first_operation(status_at(engine, row))
        for i in range(status_at(engine, row).operations):
            if item[i].seq != seq:
                continue
            add_to_group(engine, &item[i].sig, &item[i].who)
            if item[i].quarrel.source >= 0 and mask_has(alive, item[i].quarrel.dest):
                engine.quarrel = item[i].quarrel
                differs = True
    return differs or engine.groups_count > 1


cdef bint has_called(Engine* engine, const Mask* alive, int rank, int64_t seq) noexcept nogil:
    """Whether a living rank had called an operation when it answered."""
    cdef OperationStatus* item
    cdef int row, i
    for row in range(engine.passing.children + 1):
        if not counts(engine, row, alive) or not mask_has(&status_at(engine, row).who, rank):
            continue
        if status_at(engine, row).next_low > seq:
            return True
        item = first_operation(status_at(engine, row))
        for i in range(status_at(engine, row).operations):
            if item[i].seq >= seq and mask_has(&item[i].who, rank):
                return True
    return False


cdef int64_t first_dispute(Engine* engine, const Mask* alive, int64_t wrong) noexcept nogil:
    """An earlier operation than `wrong` of which a living rank has seen what another living one
    called otherwise; -1: none.  Fills the groups."""
    cdef const Dispute* one
    cdef const Dispute* first = NULL
    cdef Mask other
    cdef int row
    for row in range(engine.passing.children + 1):
        if not counts(engine, row, alive):
            continue
        one = &status_at(engine, row).dispute
        if (one.seq < 0 or not mask_has(alive, one.peer) or not mask_has(alive, one.source)
                or (wrong >= 0 and one.seq >= wrong) or (first != NULL and one.seq >= first.seq)):
            continue
        # Else it called that after its answer, and perhaps something earlier that differs as well:
        # the next ballot will tell.
        if has_called(engine, alive, one.peer, one.seq):
            first = one
    if first == NULL:
        return wrong
    group_calls(engine, alive, first.seq)
    engine.quarrel.source = -1
    other = mask_none()
    mask_add(&other, first.source)
    add_to_group(engine, &first.ours, &other)
    other = mask_none()
    mask_add(&other, first.peer)
    add_to_group(engine, &first.theirs, &other)
    return first.seq


cdef bint find_holders(Engine* engine, const Mask* alive, int64_t seq, int attempt,
                       const Mask* members, Stand* stand) noexcept nogil:
    """Whether the living together hold all that an attempt was for, and who of them holds what
    others may lack."""
    cdef OperationStatus found
    cdef OperationStatus* item
    cdef Mask all, lost = mask_without(members, alive), everyone = mask_full(engine.size)
    cdef int16_t* holder = stand.holder
    cdef int row, i, b, keeper = NOBODY
    cdef bint any = False
    memset(stand, 0, sizeof(Stand))
    memset(&found, 0, sizeof(found))
    for row in range(engine.passing.children + 1):
        if not counts(engine, row, alive):
            continue
        item = first_operation(status_at(engine, row))
        for i in range(status_at(engine, row).operations):
            if item[i].seq != seq or item[i].attempt != attempt:
                continue
            if mask_within(&lost, &item[i].kept):
                keeper = item[i].keeper
            if any:
                merge_operation(&found, &item[i])
            else:
                found = item[i]
            any = True
    for b in range(BLOCKS_MAX):
        holder[b] = found.holder[b] if any else NOBODY
    if not any:
        return False
    stand.sig = found.sig
    stand.known = 1
    stand.roll = found.roll
    if found.sig.kind == ALLGATHER and not found.small:
        holder[0] = keeper                # of all blocks of the dead
    if found.sig.kind == GATHER:          # who knows that the root had it
        holder[0] = found.complete if found.complete >= 0 else NOBODY
    if found.complete >= 0:
        return True
    if found.small:
        return False
    if found.sig.kind == ALLTOALL:
        return mask_within(&lost, &found.common) and mask_equal(&found.who, alive)
    if found.sig.kind == GATHER:
        return mask_has(alive, found.sig.root) and mask_within(members, &found.held)
    if found.sig.kind == ALLGATHER:
        return keeper != NOBODY and mask_within(members, &found.held)
    if found.sig.kind == SCATTER and mask_has(&found.who, found.sig.root):
        return True
    if is_private(found.sig.kind):
        return found.whole == mask_count(alive)
    all = mask_full(blocks_of(engine, &found.sig))
    return mask_within(&all, &found.held)


cdef int64_t write_proposal(Engine* engine, const Mask* alive) noexcept nogil:
    """What these answers lead to, written into the outbox; returns its length."""
    cdef int row, entries, count
    cdef int64_t low = -1, high = 0, oldest = -1, cut, seq, wrong = -1
    cdef int64_t reported             # the first operation of which anyone still has a record
    cdef StatusBody* status
    cdef Entry* history
    cdef ProposeBody* out = <ProposeBody*>engine.outbox
    cdef StatusBody* base = base_of(engine)
    cdef Stand* stands
    cdef Mask members, remaining, before
    cdef int attempt, i
    cdef int64_t nbytes
    for row in range(engine.passing.children + 1):
        if not counts(engine, row, alive):
            continue
        status = status_at(engine, row)
        if status.done > low:
            low = status.done               # done somewhere: stands
        if oldest < 0 or status.done_low < oldest:
            oldest = status.done_low
        if status.next_seq > high:
            high = status.next_seq
    reported = oldest
    for row in range(engine.passing.children + 1):
        if not counts(engine, row, alive):
            continue
        status = status_at(engine, row)
        for i in range(status.operations):
            if first_operation(status)[i].seq < reported:
                reported = first_operation(status)[i].seq
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
        for seq in range(reported, high):
            if group_calls(engine, alive, seq):
                wrong = seq
                break
        wrong = first_dispute(engine, alive, wrong)
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
        out.groups = engine.groups_count
        out.quarrel = engine.quarrel
    out.entries = entries
    out.first_held = oldest
    out.holders = count
    memmove(history + entries, stands, count * sizeof(Stand))
    nbytes = sizeof(ProposeBody) + entries * sizeof(Entry) + count * sizeof(Stand)
    if out.groups:
        memcpy(engine.outbox + nbytes, engine.groups, out.groups * sizeof(Group))
        nbytes += out.groups * sizeof(Group)
    return nbytes
