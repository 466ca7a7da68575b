# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Epochs and ballots: how the living agree on what a death did to the open operations.

A ballot has three steps, as in single-decree consensus (Lamport, Paxos made simple, 2001), one
decree after the other.  PREPARE asks every member for its status; answering is a promise to
complete nothing (*frozen*) until this ballot or a higher one is decided, and to refuse lower ones.
With the answers the leader takes the history of epochs that the highest ballot proposed, finds the
*cut* (the first operation that is not done anywhere and whose finals those who answered do not hold
together), appends the epoch, and sends PROPOSE.  When enough have ACCEPTED, it sends DECIDE.
Operations before the cut STAND as they were; those from the cut on RERUN under the new members.

*Enough* are all members that are not known to be dead, or more than half of the last epoch.  Two
such sets have a living rank in common, or all of one are dead and nobody is left to disagree.  So
what was decided is found again by every later ballot, whoever leads it.  Where the answers show an
epoch that was proposed and perhaps never decided, a ballot goes on from it, and needs enough of
the epoch before it as well.

All this goes along a tree (`hopcoll._tree`) over those who may be alive: PREPARE, PROPOSE and
DECIDE down, the answers up, put together on the way.  No rank hears of more than its parent and
its children.  A rank of the tree that is gone, or silent, cuts off those behind it: the leader
opens the ballot anew, along a tree that does not lead through it.

The leader is the lowest rank that is neither gone nor silent.  Two ranks may believe that they
are: the higher ballot wins, and the other learns of it (REFUSED).  Who does not answer within
`detect_us` is killed by a rank of its own host, if one is within reach; else it is left out of the
next epoch.  Left out, and perhaps alive, it is *lost*: nothing that it says counts, and it is
told so.
"""
from libc.stdint cimport int64_t, int32_t, int16_t
from libc.string cimport memcpy, memset
from cython_kernels.stream cimport sink_idle
from hopcoll._state cimport *
from hopcoll._operation cimport enter_epoch, settle, stop_operations
from hopcoll._partial cimport set_roll
from hopcoll._fan cimport free_early, spread
from hopcoll._plan cimport is_for_root, is_from_root
from hopcoll._records cimport claim, compare_signature, send_message
from hopcoll._renewal cimport abandon_streams, part_streams
from hopcoll._decisions cimport is_enough, is_mixed, keep_status, write_proposal, write_status
from hopcoll._passing cimport (
    is_told_cut, on_accepted, on_answer, on_cut, pass_on, promise, refuse, say, send_ballot,
    take_place, tell_cut)
from hopcoll._tree cimport hidden_in, is_cut, is_flat
from hopcoll._silence cimport leads, living


# ---- answering ----------------------------------------------------------------------------

cdef void answer(Engine* engine, const PrepareBody* body) noexcept nogil:
    cdef int64_t nbytes
    if body.ballot <= engine.promised and not (engine.settings.sabotage & BREAK_BALLOT_ORDER):
        refuse(engine, body.ballot)
        return
    promise(engine, body.ballot)
    take_place(engine, body)
    pass_on(engine, &body.ranks, MSG_PREPARE, body, sizeof(PrepareBody))
    if engine.suspecting:
        engine.suspecting = SUSPICION_TOLD
    nbytes = write_status(engine, body.ballot)
    engine.rows = 0
    keep_status(engine, 0, engine.outbox, nbytes)
    if engine.rank != engine.tree.root:
        engine.ballots_seen += 1
        say(engine)


# ---- coordinating -------------------------------------------------------------------------

cdef bint waits_for_another(const Engine* engine, int64_t ballot) noexcept nogil:
    """Whether a ballot is another rank's business, which may still bring it to an end.  A leader
    that is there gives up after three times `detect_us`: who does not let it get so far, and is in
    its place not let either, would go on for ever."""
    cdef Mask out = gone(engine)
    cdef int leader = ballot_rank(ballot)
    cdef int times = 2 if mask_has(&engine.silent, leader) else 4
    return (leader != engine.rank and not mask_has(&out, leader)
            and (engine.settings.detect_us == 0
                 or engine.now_us - engine.promised_us < times * engine.settings.detect_us))


cdef bint ballot_due(const Engine* engine) noexcept nogil:
    cdef Mask members = members_of(engine, engine.epoch)
    cdef Mask lost = mask_or(&engine.dead, &engine.lost)
    lost = mask_and(&members, &lost)
    if engine.rival > engine.promised and waits_for_another(engine, engine.rival):
        return False
    if engine.frozen:
        return not waits_for_another(engine, engine.promised)
    if engine.ballot == engine.promised and is_told_cut(engine):
        return True            # a decision of ours has not reached everyone
    if engine.complaint and (not engine.poisoned or engine.settings.detect_us):
        return True
    if not mask_empty(&lost):
        return True
    lost = mask_and(&members, &engine.left)
    # Ranks that left are missed only where something is unfinished.
    return not mask_empty(&lost) and engine.stable < engine.next_seq


cdef void to_all(Engine* engine, const Mask* ranks, int type, const void* body,
                 int64_t nbytes) noexcept nogil:
    cdef int r
    for r in range(engine.size):
        if r != engine.rank and mask_has(ranks, r):
            send_ballot(engine, r, type, body, nbytes)


cdef void open_ballot(Engine* engine) noexcept nogil:
    cdef PrepareBody body
    engine.complaint = 0
    engine.stage = STAGE_ASKING
    engine.ballot_us = engine.now_us
    engine.fenced = mask_none()
    engine.fenced_us = 0
    if engine.round < ballot_round(engine.promised):
        engine.round = ballot_round(engine.promised)
    engine.round += 1
    engine.ballots_seen += 1
    engine.counters.ballots += 1
    engine.ballot = ballot_of(engine.round, engine.rank)
    memset(&body, 0, sizeof(body))
    body.ballot = engine.ballot
    body.ranks = living(engine)
    body.doubtful = mask_and(&engine.doubtful, &body.ranks)
    answer(engine, &body)


cdef bint is_late(const Engine* engine, int times) noexcept nogil:
    # Not while answers still come: a link that was cut may just have healed.
    return (engine.settings.detect_us > 0
            and engine.now_us - engine.ballot_us >= times * engine.settings.detect_us
            and engine.now_us - engine.answer_us >= engine.settings.detect_us // 4)


cdef bint fence(Engine* engine, const Mask* missing) noexcept nogil:
    """Has those who do not answer (any more) killed, each by a rank of its host that did; whether
    there is one more of these.  MPI then tells of their deaths, which is worth more than our
    belief."""
    cdef int r, p
    cdef bint any = False
    cdef RankBody body
    for p in range(engine.size):
        if not mask_has(missing, p) or mask_has(&engine.fenced, p):
            continue
        if engine.host[p] == engine.host[engine.rank]:     # we do what we do ourselves for certain
            any = True
            mask_add(&engine.fenced, p)
            engine.counters.fenced += 1
            engine.fence(engine.fence_context, p)
            continue
        for r in range(engine.size):
            if (mask_has(&engine.answered, r) and not mask_has(missing, r)
                    and engine.host[r] == engine.host[p] and not mask_has(&engine.dead, r)):
                any = True
                mask_add(&engine.fenced, p)
                engine.counters.fenced += 1
                body.rank = p
                body.pad = 0
                send_ballot(engine, r, MSG_FENCE, &body, sizeof(body))
                break
    return any


cdef void give_up(Engine* engine, const Mask* missing) noexcept nogil:
    """Too few are within reach: all of them stop, with the same error."""
    cdef Mask with_us = mask_without(&engine.answered, missing)
    engine.counters.minorities += 1
    to_all(engine, &with_us, MSG_STOP, missing, sizeof(Mask))
    stop(engine, STOP_MINORITY, missing)


cdef bint leads_astray(Engine* engine, const Mask* missing) noexcept nogil:
    """Whether the tree does not lead to all of the missing: it goes through somebody who is gone,
    or who does not answer, so that nobody can tell whether those behind it would."""
    cdef Mask out = gone(engine), hidden, to_blame
    if is_told_cut(engine) or (not mask_empty(missing) and is_cut(&engine.tree, &out)):
        return True
    if mask_empty(missing) or not is_late(engine, 1):
        return False
    hidden = hidden_in(&engine.tree, missing)
    to_blame = mask_without(missing, &hidden)
    if mask_empty(&hidden) or mask_within(&to_blame, &engine.tree.doubtful):
        return False
    engine.doubtful = mask_or(&engine.doubtful, &to_blame)
    return True


cdef bint awaits_fence(Engine* engine, const Mask* missing) noexcept nogil:
    """Has the missing killed, and says whether MPI may still tell of it."""
    if fence(engine, missing):             # again, when a rank of their host answers late
        engine.fenced_us = engine.now_us
    return (engine.fenced_us > 0 and engine.settings.detect_us > 0
            and engine.now_us - engine.fenced_us < engine.settings.detect_us)


cdef bint has_answers(Engine* engine) noexcept nogil:
    """Whether the ballot can go on to a proposal; gives it up when it never will."""
    cdef Mask alive = living(engine)
    cdef Mask missing = mask_without(&alive, &engine.answered)
    if leads_astray(engine, &missing) or is_mixed(engine, &alive):
        open_ballot(engine)
        return False
    if not mask_empty(&missing):
        if not is_late(engine, 1) or awaits_fence(engine, &missing):
            return False
    if is_enough(engine, &engine.answered):
        return True
    if is_late(engine, 3):
        give_up(engine, &missing)
    return False


cdef bint has_acceptors(Engine* engine) noexcept nogil:
    cdef Mask alive = living(engine), missing
    alive = mask_and(&alive, &engine.answered)
    missing = mask_without(&alive, &engine.acceptors)
    if engine.settings.sabotage & (BREAK_ACCEPT | BREAK_BALLOT):
        return True
    if leads_astray(engine, &missing):
        open_ballot(engine)
        return False
    if not mask_empty(&missing) and not is_late(engine, 1):
        return False
    if is_enough(engine, &engine.acceptors):
        return True
    # Who answered and then fell silent stands in the way like who did not answer.
    if not mask_empty(&missing) and awaits_fence(engine, &missing):
        return False
    if is_late(engine, 3):
        alive = living(engine)
        missing = mask_without(&alive, &engine.acceptors)
        give_up(engine, &missing)
    return False


cdef void coordinate(Engine* engine) noexcept nogil:
    """Opens a ballot when we lead and one is due, and brings it forward as answers come."""
    cdef Mask alive
    cdef BallotBody body
    cdef int64_t ballot
    while not engine.broken and not engine.stopped:
        if engine.leaving:
            engine.stage = STAGE_NONE
        tell_cut(engine)
        say(engine)
        if engine.stage == STAGE_NONE:
            if not leads(engine) or not ballot_due(engine):
                return
            open_ballot(engine)
        if engine.stage == STAGE_ASKING:
            ballot = engine.ballot
            if not engine.settings.sabotage & BREAK_BALLOT and not has_answers(engine):
                if engine.stage == STAGE_NONE or ballot == engine.ballot:
                    return
                continue
            alive = living(engine)
            if not engine.settings.sabotage & BREAK_BALLOT:
                alive = mask_and(&alive, &engine.answered)
            propose(engine, &alive)
        if engine.stage == STAGE_PROPOSING:
            ballot = engine.ballot
            if not has_acceptors(engine):
                if engine.stage == STAGE_NONE or ballot == engine.ballot:
                    return
                continue
            engine.stage = STAGE_NONE
            engine.counters.decisions += 1
            alive = living(engine)
            if not engine.settings.sabotage & BREAK_BALLOT:
                alive = mask_and(&alive, &engine.answered)
            body.ballot = engine.ballot
            pass_on(engine, &alive, MSG_DECIDE, &body, sizeof(body))
            adopt(engine, engine.ballot)


cdef void propose(Engine* engine, const Mask* alive) noexcept nogil:
    cdef int64_t nbytes = write_proposal(engine, alive)
    engine.stage = STAGE_PROPOSING
    engine.ballot_us = engine.now_us
    accept(engine, alive, engine.outbox, nbytes)


# ---- accepting ----------------------------------------------------------------------------

cdef void accept(Engine* engine, const Mask* to, const unsigned char* proposal,
                 int64_t nbytes) noexcept nogil:
    """Keeps a proposal, so that every later ballot finds it, and passes it on to its members."""
    cdef int64_t ballot = (<const ProposeBody*>proposal).ballot
    cdef PrepareBody alone
    if ballot < engine.promised and not (engine.settings.sabotage & BREAK_BALLOT_ORDER):
        refuse(engine, ballot)
        return
    if ballot != engine.tree_ballot:       # we were not asked before: nobody is behind us
        memset(&alone, 0, sizeof(alone))
        alone.ballot = ballot
        mask_add(&alone.ranks, ballot_rank(ballot))
        mask_add(&alone.ranks, engine.rank)
        take_place(engine, &alone)
    if ballot > engine.promised:
        promise(engine, ballot)
    engine.accepted = ballot
    memcpy(engine.proposal, proposal, nbytes)
    pass_on(engine, to, MSG_PROPOSE, proposal, nbytes)
    engine.acceptors = mask_none()
    mask_add(&engine.acceptors, engine.rank)
    engine.below_us = engine.now_us
    engine.said = 0
    engine.accepting = 1
    say(engine)


cdef Mask members_proposed(const Engine* engine, const unsigned char* proposal) noexcept nogil:
    cdef int entries = (<const ProposeBody*>proposal).entries
    return (<const Entry*>(proposal + sizeof(ProposeBody)))[entries - 1].members if entries \
        else mask_full(engine.size)


# ---- adopting -----------------------------------------------------------------------------

cdef void lose(Engine* engine, int rank) noexcept nogil:
    """A rank is out by a decision: of ours, or of the communicator that this one was split from."""
    if is_gone(engine, rank) or rank == engine.rank:
        return
    mask_add(&engine.lost, rank)
    engine.counters.lost += 1
    abandon_streams(engine, rank)
    engine.told_done = -1
    engine.told_stable = -1
    engine.watermark_due = 1
    engine.wholes_due = 1


cdef void leave_out(Engine* engine, const Mask* lost) noexcept nogil:
    """Whom a decision left out without knowing them to be dead: no stream waits for them, but those
    of our host write where we can read.  We kill them ourselves: whoever was ordered to may have
    been stopped as well."""
    cdef int r
    for r in range(engine.size):
        if mask_has(lost, r):
            lose(engine, r)
            if engine.host[r] == engine.host[engine.rank] and not mask_has(&engine.dead, r):
                engine.fence(engine.fence_context, r)


cdef void complain_again(Engine* engine) noexcept nogil:
    """The ballot knew what we had seen of another rank's calls.  Where it decided nothing, that
    rank is gone, or had answered before it called that: then the next one will know both."""
    cdef int coordinator = coordinator_of(engine)
    cdef Mask members = members_of(engine, engine.epoch)
    if engine.suspecting != SUSPICION_TOLD:
        return
    engine.suspecting = SUSPICION_NONE
    if (engine.dispute.seq < 0 or engine.poisoned or is_gone(engine, engine.dispute.peer)
            or not mask_has(&members, engine.dispute.peer)):
        engine.dispute.seq = -1
        return
    engine.suspecting = SUSPICION_NEW
    if coordinator == engine.rank:
        engine.complaint = 1
    else:
        send_message(engine, coordinator, MSG_COMPLAIN, engine.dispute.seq, NULL, NULL, 0)


cdef int spreader(const Stand* stand) noexcept nogil:
    """From whom what stands can go out to all: else a root has it, or soon will."""
    if stand.holder[0] == NOBODY and stand.known and is_for_root(stand.sig.kind):
        return stand.sig.root
    return stand.holder[0]


cdef void spread_stands(Engine* engine, const ProposeBody* body,
                        const Stand* stands) noexcept nogil:
    """What stands goes out from its holders: through all who adopt this ballot, also those who have
    had it for long, or have adopted the same epoch in an earlier ballot."""
    cdef int64_t seq
    cdef Operation* op
    cdef int i
    if is_flat(engine):
        return
    for i in range(body.holders):
        seq = body.first_held + i
        op = find_operation(engine, seq) if seq < engine.done else claim(engine, seq)
        if op != NULL:
            spread(engine, op, spreader(&stands[i]))


cdef void adopt(Engine* engine, int64_t ballot) noexcept nogil:
    """What was decided becomes our history."""
    cdef const ProposeBody* body = <const ProposeBody*>engine.proposal
    cdef const Entry* history = <const Entry*>(engine.proposal + sizeof(ProposeBody))
    cdef const Stand* stands
    cdef Mask members
    cdef int64_t seq
    cdef Operation* op
    cdef int b, i, previous = engine.epoch
    if (ballot != engine.promised and not (engine.settings.sabotage & BREAK_BALLOT_ORDER
                                           and ballot < engine.promised)) \
            or ballot != engine.accepted:
        return
    engine.frozen = 0
    engine.unsure = 0
    engine.silent = mask_none()
    engine.doubtful = mask_none()
    engine.calling_us = 0
    engine.watched = -1
    stands = <const Stand*>(history + body.entries)
    if body.entries <= engine.epoch:
        complain_again(engine)
        engine.wholes_due = 1
        engine.rolls_due = 1
        if body.entries == engine.epoch:
            spread_stands(engine, body, stands)
        settle(engine)         # nothing had changed
        return
    memcpy(engine.history, history, body.entries * sizeof(Entry))
    engine.epoch = body.entries
    members = members_of(engine, engine.epoch)
    if not mask_has(&members, engine.rank):
        stop(engine, STOP_OUT, &members)
        return
    for i in range(previous, engine.epoch):
        leave_out(engine, &engine.history[i].lost)
        # Whose good-bye others have heard: ours may have been lost with it.
        engine.left = mask_or(&engine.left, &engine.history[i].left)
        if engine.history[i].kind == ENTRY_MISMATCH and not engine.poisoned:
            engine.poisoned = 1
            engine.suspecting = SUSPICION_NONE
            engine.poison_cut = engine.history[i].cut
    complain_again(engine)
    if body.groups:
        memcpy(engine.groups, stands + body.holders, body.groups * sizeof(Group))
        engine.groups_count = body.groups
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
        if stands[i].known:
            compare_signature(engine, op, NOBODY, &stands[i].sig)
        op.standing = 1
        engine.counters.stands += 1
        for b in range(BLOCKS_MAX):
            op.holder[b] = stands[i].holder[b]
        if not mask_empty(&stands[i].roll):
            set_roll(engine, op, &stands[i].roll, attempt_of(engine, seq))
    spread_stands(engine, body, stands)
    enter_epoch(engine, previous)


# ---- stopping -----------------------------------------------------------------------------

cdef void stop(Engine* engine, int why, const Mask* by) noexcept nogil:
    """This rank has no part in what is to come: its operations fail, its streams end."""
    cdef int r
    if engine.stopped:
        return
    engine.stopped = why
    engine.stopped_by = by[0]
    engine.stopped_us = engine.now_us
    engine.stage = STAGE_NONE
    engine.frozen = 0
    engine.unsure = 0
    part_streams(engine, -1)
    for r in range(engine.size):
        if engine.host[r] != engine.host[engine.rank] or mask_has(&engine.lost, r):
            abandon_streams(engine, r)
    stop_operations(engine)
    free_early(engine)
    settle(engine)


cdef void end_stopped(Engine* engine) noexcept nogil:
    """We have stopped, and wait for the streams of a rank of our host.  Its part is over too, as it
    shares our fate; if it does not end them it is stopped in another sense."""
    cdef Operation* op
    cdef int64_t seq
    cdef int b, phase, i
    if (engine.settings.detect_us == 0 or engine.finished == engine.next_seq
            or engine.now_us - engine.stopped_us < 2 * engine.settings.detect_us):
        return
    engine.stopped_us = engine.now_us
    for seq in range(engine.finished, engine.next_seq):
        op = find_operation(engine, seq)
        for b in range(op.blocks if op != NULL else 0):
            for phase in range(PHASES):
                if not sink_idle(&op.block[b].sink[phase]):
                    engine.fence(engine.fence_context, op.block[b].sink[phase].source)
    for i in range(engine.outlets_made):
        if engine.outlets[i].used and not engine.outlets[i].stray:
            engine.fence(engine.fence_context, engine.outlets[i].spring.dest)


cdef void answer_lost(Engine* engine, int peer, int type) noexcept nogil:
    """A rank that was left out and is still there, or is back: it learns that it is out."""
    cdef Mask members = members_of(engine, engine.epoch)
    if type != MSG_OUT and type != MSG_STOP and type != MSG_WATERMARK:
        engine.counters.zombies += 1
        send_message(engine, peer, MSG_OUT, engine.done, NULL, &members, sizeof(Mask))


# ---- events -------------------------------------------------------------------------------

cdef void on_dead(Engine* engine, int peer) noexcept nogil:
    if mask_has(&engine.left, peer):
        return                 # it had said good-bye: nobody misses it
    mask_add(&engine.dead, peer)
    part_streams(engine, peer)
    if engine.settings.sabotage & BREAK_OWN_RAISE:
        raise_alone(engine, peer)
    engine.told_done = -1      # there may be a new coordinator
    engine.told_stable = -1
    engine.watermark_due = 1
    engine.wholes_due = 1
    engine.rolls_due = 1
    coordinate(engine)


cdef void raise_alone(Engine* engine, int peer) noexcept nogil:
    """What no rank may do: fail an operation by its own knowledge of a death."""
    cdef Operation* op
    cdef int64_t seq
    for seq in range(engine.done, engine.next_seq):
        op = find_operation(engine, seq)
        if op != NULL and op.called and is_from_root(op.sig.kind) and op.sig.root == peer:
            op.status = STATUS_RANK_FAILED
            op.complete = 1


cdef void on_bye(Engine* engine, int peer) noexcept nogil:
    mask_add(&engine.left, peer)
    engine.told_done = -1
    engine.told_stable = -1
    engine.watermark_due = 1
    engine.wholes_due = 1
    engine.rolls_due = 1
    part_streams(engine, peer)
    send_message(engine, peer, MSG_BYE_HEARD, engine.done, NULL, NULL, 0)
    coordinate(engine)


cdef void on_membership_message(Engine* engine, int peer, const Head* head,
                                const unsigned char* body, int64_t nbytes) noexcept nogil:
    cdef int64_t ballot = (<const BallotBody*>body).ballot \
        if nbytes >= <int64_t>sizeof(BallotBody) else 0
    cdef Mask members = members_of(engine, engine.epoch)
    cdef Mask to
    if head.type == MSG_PREPARE:
        answer(engine, <const PrepareBody*>body)
    elif head.type == MSG_STATUS:
        on_answer(engine, peer, body, nbytes)
    elif head.type == MSG_PROPOSE:
        to = members_proposed(engine, body)
        accept(engine, &to, body, nbytes)
    elif head.type == MSG_ACCEPTED:
        on_accepted(engine, <const AcceptedBody*>body)
    elif head.type == MSG_DECIDE:
        if ballot == engine.promised:
            to = engine.tree.ranks
            pass_on(engine, &to, MSG_DECIDE, body, nbytes)
        adopt(engine, ballot)
    elif head.type == MSG_CUT:
        on_cut(engine, <const CutBody*>body)
    elif head.type == MSG_REFUSED:
        if ballot > engine.rival:
            engine.rival = ballot
        if engine.round < ballot_round(ballot):
            engine.round = ballot_round(ballot)
        if engine.stage != STAGE_NONE and ballot > engine.ballot:
            engine.stage = STAGE_NONE
            engine.promised_us = engine.now_us
            engine.counters.superseded += 1
    elif head.type == MSG_SILENT:
        engine.complaint = 1
        if (<const RankBody*>body).rank != peer and (<const RankBody*>body).rank != engine.rank:
            mask_add(&engine.silent, (<const RankBody*>body).rank)
        send_message(engine, peer, MSG_BEAT, engine.done, NULL, NULL, 0)
    elif head.type == MSG_FENCE:
        if ballot_rank(engine.promised) == peer and engine.frozen:
            engine.fence(engine.fence_context, (<const RankBody*>body).rank)
    elif head.type == MSG_OUT:
        if head.epoch > engine.epoch and mask_has(&members, peer):
            stop(engine, STOP_OUT, <const Mask*>body)
    elif head.type == MSG_STOP:
        if ballot_rank(engine.promised) == peer and engine.frozen:
            stop(engine, STOP_MINORITY, <const Mask*>body)
    elif head.type == MSG_COMPLAIN:
        engine.complaint = 1
    coordinate(engine)
