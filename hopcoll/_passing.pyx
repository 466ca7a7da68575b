# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A ballot on its way along its tree: promises, what is passed on, what is said of those below."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *
from hopcoll._decisions cimport keep_status
from hopcoll._merge cimport status_at, status_length
from hopcoll._records cimport send_message
from hopcoll._tree cimport children_in, is_cut, is_interior, parent_in, subtree_in


cdef void send_ballot(Engine* engine, int dest, int type, const void* body,
                      int64_t nbytes) noexcept nogil:
    cdef int i
    for i in range(engine.faults):
        if (engine.fault[i].ballot and engine.ballots_seen >= engine.fault[i].ballot
                and engine.ballot_sends >= engine.fault[i].send):
            engine.fire(engine.fault_context, engine, &engine.fault[i], i)
    engine.ballot_sends += 1
    send_message(engine, dest, type, engine.done, NULL, body, nbytes)


cdef void refuse(Engine* engine, int64_t ballot) noexcept nogil:
    """A lower ballot than one that we have promised: its leader should know."""
    cdef BallotBody body
    body.ballot = engine.promised
    send_ballot(engine, ballot_rank(ballot), MSG_REFUSED, &body, sizeof(body))


cdef void promise(Engine* engine, int64_t ballot) noexcept nogil:
    if engine.stage != STAGE_NONE and ballot != engine.ballot:
        engine.stage = STAGE_NONE
        engine.counters.superseded += 1
    engine.promised = ballot
    engine.promised_us = engine.now_us
    engine.frozen = 1


cdef void take_place(Engine* engine, const PrepareBody* body) noexcept nogil:
    """Our place in the tree of a ballot."""
    cdef Tree* tree = &engine.tree
    engine.tree_ballot = body.ballot
    tree.ranks, tree.doubtful = body.ranks, body.doubtful
    tree.root = ballot_rank(body.ballot)
    tree.degree = engine.settings.degree
    tree.count = mask_count(&tree.ranks)
    engine.passing.parent = parent_in(tree, engine.rank)
    engine.passing.children = children_in(tree, engine.rank, engine.passing.child)
    engine.below = subtree_in(tree, engine.rank)
    engine.answered = mask_none()
    engine.acceptors = mask_none()
    engine.below_us = engine.now_us
    engine.said = 0
    engine.accepting = 0
    engine.cut_told = 0


cdef void pass_on(Engine* engine, const Mask* to, int type, const void* body,
                  int64_t nbytes) noexcept nogil:
    """Down the tree."""
    cdef int i, r
    for i in range(engine.passing.children):
        r = engine.passing.child[i]
        if mask_has(to, r) and not is_gone(engine, r):
            send_ballot(engine, r, type, body, nbytes)


cdef bint has_all_below(const Engine* engine, const Mask* who) noexcept nogil:
    """Whether all have spoken who are reached through us and not gone; or time is up, so that the
    leader hears of those who do in time."""
    cdef Mask out = gone(engine)
    out = mask_without(&engine.below, &out)
    mask_drop(&out, engine.rank)
    return mask_within(&out, who) or (
        engine.settings.detect_us > 0
        and engine.now_us - engine.below_us >= engine.settings.detect_us // 2)


cdef void say(Engine* engine) noexcept nogil:
    """Up the tree: what those below us answered, or that they have accepted, once all have."""
    cdef AcceptedBody body
    cdef const Mask* who = &engine.acceptors if engine.accepting else &engine.answered
    if engine.said or engine.rank == engine.tree.root or not engine.frozen:
        return
    if not has_all_below(engine, who) and not engine.settings.sabotage & BREAK_SPEAK:
        return
    engine.said = 1
    if engine.accepting:
        body.ballot = engine.accepted
        body.who = engine.acceptors
        if engine.settings.sabotage & BREAK_SPEAK:
            body.who = engine.below
        send_ballot(engine, engine.passing.parent, MSG_ACCEPTED, &body, sizeof(body))
    else:
        if engine.settings.sabotage & BREAK_SPEAK:
            status_at(engine, 0).who = engine.below
        send_ballot(engine, engine.passing.parent, MSG_STATUS, status_at(engine, 0),
                    status_length(status_at(engine, 0)))


cdef void on_answer(Engine* engine, int peer, const unsigned char* body,
                    int64_t nbytes) noexcept nogil:
    """From a child: of those who are reached through it."""
    cdef int64_t ballot = (<const BallotBody*>body).ballot
    cdef int i
    if engine.rank == engine.tree.root:
        if engine.stage != STAGE_ASKING or ballot != engine.ballot:
            return
    elif not engine.frozen or ballot != engine.promised or engine.accepting:
        return
    if engine.said:            # it came late: by itself
        send_ballot(engine, engine.passing.parent, MSG_STATUS, body, nbytes)
        return
    for i in range(engine.passing.children):
        if engine.passing.child[i] == peer:
            keep_status(engine, i + 1 if engine.rank == engine.tree.root else 0, body, nbytes)
    say(engine)


cdef void on_accepted(Engine* engine, const AcceptedBody* body) noexcept nogil:
    if engine.rank == engine.tree.root:
        if engine.stage != STAGE_PROPOSING or body.ballot != engine.ballot:
            return
    elif not engine.frozen or body.ballot != engine.accepted:
        return
    if engine.said:
        send_ballot(engine, engine.passing.parent, MSG_ACCEPTED, body, sizeof(AcceptedBody))
        return
    engine.acceptors = mask_or(&engine.acceptors, &body.who)
    engine.answer_us = engine.now_us
    say(engine)


cdef void tell_cut(Engine* engine) noexcept nogil:
    """A rank is gone through which the leader reaches us, or we reach others: whether it knows that
    or not, it should go around it."""
    cdef CutBody body
    cdef int i, cut = -1, leader = ballot_rank(engine.promised)
    if not engine.frozen or engine.cut_told or engine.rank == engine.tree.root:
        return
    if engine.passing.parent != leader and is_gone(engine, engine.passing.parent):
        cut = engine.passing.parent
    for i in range(engine.passing.children):
        if is_gone(engine, engine.passing.child[i]) and is_interior(&engine.tree,
                                                                    engine.passing.child[i]):
            cut = engine.passing.child[i]
    if cut < 0 or is_gone(engine, leader):
        return
    engine.cut_told = CUT_NEW
    body.ballot = engine.promised
    body.rank = cut
    body.pad = 0
    send_ballot(engine, leader, MSG_CUT, &body, sizeof(body))


cdef void on_cut(Engine* engine, const CutBody* body) noexcept nogil:
    """At the leader.  Where the rank is at the end of the tree already, no other tree is better:
    then we have to hear of it ourselves."""
    if body.ballot == engine.ballot and body.ballot == engine.promised and not engine.cut_told:
        engine.cut_told = CUT_KNOWN if mask_has(&engine.tree.doubtful, body.rank) else CUT_NEW
        mask_add(&engine.doubtful, body.rank)


cdef bint is_told_cut(const Engine* engine) noexcept nogil:
    """Whether somebody told us that our tree is cut, and another one would help."""
    cdef Mask out
    if engine.cut_told == CUT_KNOWN:
        out = gone(engine)
        return is_cut(&engine.tree, &out)
    return engine.cut_told == CUT_NEW
