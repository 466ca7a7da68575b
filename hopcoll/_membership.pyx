# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Epochs and ballots: how the living agree on what a death did to the open operations.

The coordinator is the lowest rank that is alive.  Deaths are never suspected wrongly, so a rank
that believes itself coordinator knows that all lower ones are dead, and a ballot number
(coordinator, round) of a later coordinator is always higher.

PREPARE asks every living member for its status; answering is a promise to complete nothing
(*frozen*) until this ballot or a higher one is decided, and to refuse lower ones.  When all
living members have answered, the coordinator takes the longest history of epochs among the
answers (histories of living ranks are prefixes of one another), finds the *cut* (the first
operation that is not done anywhere and whose finals the living do not hold together), appends the
epoch, and sends DECIDE.  Operations before the cut STAND as they were; those from the cut on RERUN
under the new members.  A coordinator that dies in the middle leaves members frozen: the next one
opens a higher ballot, and takes over what any living member has adopted.
"""
from libc.stdint cimport int64_t, int32_t, int16_t, uint32_t
from libc.string cimport memcpy, memmove, memset
from hopcoll._state cimport *
from hopcoll._operation cimport enter_epoch, settle
from hopcoll._plan cimport block_count, is_private
from hopcoll._records cimport claim, send_message
from hopcoll._chunks cimport find_quarrel, part_streams


cdef void send_ballot(Engine* engine, int dest, int type, const void* body,
                      int64_t nbytes) noexcept nogil:
    cdef int i
    for i in range(engine.faults):
        if (engine.fault[i].ballot and engine.ballots_seen >= engine.fault[i].ballot
                and engine.ballot_sends >= engine.fault[i].send):
            engine.fire(engine.fault_context, engine, &engine.fault[i], i)
    engine.ballot_sends += 1
    send_message(engine, dest, type, engine.done, NULL, body, nbytes)


# ---- answering ----------------------------------------------------------------------------

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
    status.next_seq = engine.next_seq
    status.entries = engine.epoch
    status.dispute = engine.dispute
    memcpy(entries, engine.history, engine.epoch * sizeof(Entry))
    item = <OperationStatus*>(entries + engine.epoch)
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op == NULL or not op.called:
            continue
        memset(item, 0, sizeof(OperationStatus))
        item.seq = seq
        item.sig = op.sig
        item.attempt = op.attempt
        item.small = op.small
        item.complete = op.complete and op.status == STATUS_OK
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


cdef void answer(Engine* engine, int64_t ballot) noexcept nogil:
    cdef int64_t nbytes
    cdef int coordinator = <int>(ballot >> 32)
    if ballot <= engine.promised and not (engine.settings.sabotage & BREAK_BALLOT_ORDER):
        return
    engine.promised = ballot
    engine.frozen = 1
    if engine.suspecting:
        engine.suspecting = SUSPICION_TOLD
    nbytes = write_status(engine, ballot)
    if coordinator == engine.rank:
        keep_status(engine, engine.rank, engine.outbox, nbytes)
    else:
        engine.ballots_seen += 1
        send_ballot(engine, coordinator, MSG_STATUS, engine.outbox, nbytes)


# ---- coordinating -------------------------------------------------------------------------

cdef void keep_status(Engine* engine, int peer, const unsigned char* body,
                      int64_t nbytes) noexcept nogil:
    memcpy(engine.statuses + peer * engine.status_bytes, body, nbytes)
    mask_add(&engine.answered, peer)


cdef Mask living(const Engine* engine) noexcept nogil:
    cdef Mask out = gone(engine), everyone = mask_full(engine.size)
    return mask_without(&everyone, &out)


cdef bint ballot_due(Engine* engine) noexcept nogil:
    cdef Mask members = members_of(engine, engine.epoch)
    cdef Mask lost = mask_and(&members, &engine.dead)
    if engine.complaint and not engine.poisoned:
        return True
    if not mask_empty(&lost):
        return True
    if engine.frozen and <int>(engine.promised >> 32) != engine.rank:
        return True            # the coordinator that froze us is gone
    lost = mask_and(&members, &engine.left)
    # Ranks that left are missed only where something is unfinished.
    return not mask_empty(&lost) and engine.stable < engine.next_seq


cdef void coordinate(Engine* engine) noexcept nogil:
    """Opens a ballot when we coordinate and one is due; decides it when all have answered."""
    cdef Mask alive
    cdef int r
    cdef PrepareBody prepare
    if coordinator_of(engine) != engine.rank:
        engine.balloting = 0
        return
    while not engine.broken:
        if not engine.balloting:
            if not ballot_due(engine):
                return
            engine.complaint = 0
            engine.balloting = 1
            engine.round += 1
            engine.ballots_seen += 1
            engine.counters.ballots += 1
            engine.ballot = (<int64_t>engine.rank << 32) | engine.round
            engine.answered = mask_none()
            answer(engine, engine.ballot)
            prepare.ballot = engine.ballot
            alive = living(engine)
            for r in range(engine.size):
                if r != engine.rank and mask_has(&alive, r):
                    send_ballot(engine, r, MSG_PREPARE, &prepare, sizeof(prepare))
        alive = living(engine)
        if not mask_within(&alive, &engine.answered):
            return
        engine.balloting = 0
        decide(engine, &alive)


cdef StatusBody* status_of(Engine* engine, int rank) noexcept nogil:
    return <StatusBody*>(engine.statuses + rank * engine.status_bytes)


cdef Entry* entries_of(StatusBody* status) noexcept nogil:
    return <Entry*>(<unsigned char*>status + sizeof(StatusBody))


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
                       const Mask* members, int16_t* holder) noexcept nogil:
    """Whether the living together hold all that an attempt was for, and who of them holds what
    others may lack."""
    cdef OperationStatus* item
    cdef OperationStatus* any = NULL
    cdef Mask held = mask_none(), all, lost = mask_without(members, alive)
    cdef int r, b, root, whole = 0, keepers = 0, keeper = NOBODY, complete = NOBODY
    for b in range(BLOCKS_MAX):
        holder[b] = NOBODY
    for r in range(engine.size):
        item = answer_of(engine, alive, r, seq, attempt)
        if item == NULL:
            continue
        any = item
        if item.complete:
            complete = r
            item.held = mask_full(engine.size)
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


cdef void decide(Engine* engine, const Mask* alive) noexcept nogil:
    cdef int r, longest = engine.rank, entries, count
    cdef int64_t low = -1, high = 0, oldest = -1, cut, seq, wrong = -1
    cdef int64_t reported             # the first operation of which anyone still has a record
    cdef StatusBody* status
    cdef OperationStatus* item
    cdef Head* head
    cdef Entry* history
    cdef DecideBody* out = <DecideBody*>engine.outbox
    cdef int16_t* holders
    cdef Mask members, remaining, before
    cdef int attempt
    cdef int64_t done, nbytes
    # The answers carry done in their operations' order; done ranks were told with each header.
    for r in range(engine.size):
        if not mask_has(alive, r):
            continue
        status = status_of(engine, r)
        if status.entries > status_of(engine, longest).entries:
            longest = r
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
    memset(out, 0, sizeof(DecideBody))
    out.ballot = engine.ballot
    history = <Entry*>(engine.outbox + sizeof(DecideBody))
    entries = status_of(engine, longest).entries
    memcpy(history, entries_of(status_of(engine, longest)), entries * sizeof(Entry))
    members = history[entries - 1].members if entries else mask_full(engine.size)
    # The cut: done operations stand; after them, as long as the living hold all finals.
    cut = oldest
    count = 0
    holders = <int16_t*>(engine.outbox + sizeof(DecideBody)
                         + (entries + 2) * sizeof(Entry))
    for seq in range(oldest, high):
        attempt = entries
        while attempt > 0 and history[attempt - 1].cut > seq:
            attempt -= 1
        before = history[attempt - 1].members if attempt else mask_full(engine.size)
        if not find_holders(engine, alive, seq, attempt, &before,
                            holders + count * BLOCKS_MAX) and seq >= low:
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
    memmove(history + entries, holders, count * BLOCKS_MAX * sizeof(int16_t))
    nbytes = sizeof(DecideBody) + entries * sizeof(Entry) + count * BLOCKS_MAX * sizeof(int16_t)
    if out.groups:
        memcpy(engine.outbox + nbytes, engine.groups, engine.size * sizeof(Signature))
        nbytes += engine.size * sizeof(Signature)
    engine.counters.decisions += 1
    for r in range(engine.size):
        if r != engine.rank and mask_has(alive, r):
            send_ballot(engine, r, MSG_DECIDE, engine.outbox, nbytes)
    # Adopting writes control messages of its own: not from the same room.
    memcpy(engine.statuses, engine.outbox, nbytes)
    adopt(engine, <DecideBody*>engine.statuses)


# ---- adopting -----------------------------------------------------------------------------

cdef void adopt(Engine* engine, const DecideBody* body) noexcept nogil:
    cdef const Entry* history = <const Entry*>(<const unsigned char*>body + sizeof(DecideBody))
    cdef const int16_t* holders
    cdef const Signature* groups
    cdef int64_t seq
    cdef Operation* op
    cdef int b, i, previous = engine.epoch
    if body.ballot != engine.promised and not (engine.settings.sabotage & BREAK_BALLOT_ORDER
                                               and body.ballot < engine.promised):
        return
    engine.frozen = 0
    if engine.suspecting == SUSPICION_TOLD:
        engine.suspecting = SUSPICION_NONE
        engine.dispute.seq = -1
    if body.entries <= engine.epoch:
        engine.wholes_due = 1
        settle(engine)         # nothing had changed
        return
    holders = <const int16_t*>(history + body.entries)
    memcpy(engine.history, history, body.entries * sizeof(Entry))
    engine.epoch = body.entries
    for i in range(previous, engine.epoch):
        if engine.history[i].kind == ENTRY_MISMATCH and not engine.poisoned:
            engine.poisoned = 1
            engine.suspecting = SUSPICION_NONE
            engine.poison_cut = engine.history[i].cut
    if body.groups:
        groups = <const Signature*>(holders + body.holders * BLOCKS_MAX)
        memcpy(engine.groups, groups, body.groups * sizeof(Signature))
        engine.grouped = body.grouped
        engine.quarrel = body.quarrel
    for seq in range(engine.done, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op != NULL:
            op.standing = 0
    for i in range(body.holders):
        seq = body.first_held + i
        if seq < engine.done:
            continue
        op = claim(engine, seq)
        if op == NULL:
            engine.broken = 1
            return
        if op.done:
            continue
        op.standing = 1
        engine.counters.stands += 1
        for b in range(BLOCKS_MAX):
            op.holder[b] = holders[i * BLOCKS_MAX + b]
    enter_epoch(engine, previous)


# ---- events -------------------------------------------------------------------------------

cdef void on_dead(Engine* engine, int peer) noexcept nogil:
    if mask_has(&engine.left, peer):
        return                 # it had said good-bye: nobody misses it
    mask_add(&engine.dead, peer)
    part_streams(engine, peer)
    engine.told_done = -1      # there may be a new coordinator
    engine.told_stable = -1
    engine.watermark_due = 1
    engine.wholes_due = 1
    coordinate(engine)


cdef void on_bye(Engine* engine, int peer) noexcept nogil:
    mask_add(&engine.left, peer)
    engine.told_done = -1
    engine.told_stable = -1
    engine.watermark_due = 1
    engine.wholes_due = 1
    part_streams(engine, peer)
    send_message(engine, peer, MSG_BYE_HEARD, engine.done, NULL, NULL, 0)
    coordinate(engine)


cdef void on_membership_message(Engine* engine, int peer, const Head* head,
                                const unsigned char* body, int64_t nbytes) noexcept nogil:
    if head.type == MSG_PREPARE:
        answer(engine, (<const PrepareBody*>body).ballot)
    elif head.type == MSG_STATUS:
        if engine.balloting and (<const StatusBody*>body).ballot == engine.ballot:
            keep_status(engine, peer, body, nbytes)
    elif head.type == MSG_DECIDE:
        adopt(engine, <const DecideBody*>body)
    elif head.type == MSG_COMPLAIN:
        engine.complaint = 1
    coordinate(engine)
