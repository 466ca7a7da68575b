# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Ranks that are late but alive: who has not called an operation that others wait in.

An operation that does not get on is announced to the coordinator (`announce_stuck`).  Once it has
waited for `report_us`, and again after twice the time, the coordinator asks all ranks where they
are (ASK).  Each answers from its progress thread, whatever its program does (WHERE); one that has
not called the operation also gives its Python stack, if it can (STACK).  What came within a second
is reported.  Nothing is decided by this: a late rank is waited for.
"""
from libc.stdint cimport int64_t
from libc.string cimport memset
from hopcoll._state cimport *
from cython_kernels.stream cimport sink_idle
from hopcoll._fan cimport fans, place_of
from hopcoll._records cimport send_message

cdef enum:
    REPLIES_US = 1000000
    TIMES_MAX = 16


cdef void fill_where(Engine* engine, int64_t seq, WhereBody* out) noexcept nogil:
    memset(out, 0, sizeof(WhereBody))
    out.seq = seq
    out.called = engine.next_seq
    out.done = engine.done
    if engine.where != NULL:
        engine.where(engine.where_context, out)
        out.since_us = engine.now_us - out.since_us


cdef void note_stuck(Engine* engine, int64_t seq) noexcept nogil:
    """At the coordinator: somebody has waited for a while in this operation."""
    cdef Late* late = &engine.late
    if late.since_us and late.seq <= seq and engine.done <= late.seq:
        return
    memset(late, 0, sizeof(Late))
    late.seq = seq
    late.since_us = engine.now_us


cdef void ask(Engine* engine) noexcept nogil:
    cdef Late* late = &engine.late
    cdef Mask out = gone(engine)
    cdef BallotBody body
    cdef int r
    if engine.wheres == NULL:
        engine.wheres = <WhereBody*>engine.transport.allocate(
            engine.transport.self, engine.size * sizeof(WhereBody))
        if engine.wheres == NULL:
            return
        memset(engine.wheres, 0, engine.size * sizeof(WhereBody))
    late.asked_us = engine.now_us
    late.replied = mask_none()
    fill_where(engine, late.seq, &engine.wheres[engine.rank])
    mask_add(&late.replied, engine.rank)
    if engine.next_seq <= late.seq and engine.want_stack != NULL:
        engine.want_stack(engine.where_context, engine.rank)
    body.ballot = late.seq
    for r in range(engine.size):
        if r != engine.rank and not mask_has(&out, r):
            send_message(engine, r, MSG_ASK, engine.done, NULL, &body, sizeof(body))


cdef void check_late(Engine* engine) noexcept nogil:
    """With the clock: asks, and reports."""
    cdef Late* late = &engine.late
    if not late.since_us:
        return
    if engine.stable > late.seq or coordinator_of(engine) != engine.rank:
        late.since_us = 0
    elif late.asked_us:
        if engine.now_us - late.asked_us >= REPLIES_US:
            late.asked_us = 0
            late.since_us = engine.now_us
            if late.times < TIMES_MAX:
                late.times += 1
            if engine.report != NULL:
                engine.report(engine.where_context)
    elif engine.now_us - late.since_us >= engine.settings.report_us << late.times:
        ask(engine)


cdef void on_late_message(Engine* engine, int peer, const Head* head, const unsigned char* body,
                          int64_t nbytes) noexcept nogil:
    cdef WhereBody where
    cdef int64_t seq
    if head.type == MSG_ASK:
        seq = (<const BallotBody*>body).ballot
        fill_where(engine, seq, &where)
        send_message(engine, peer, MSG_WHERE, engine.done, NULL, &where, sizeof(where))
        if engine.next_seq <= seq and engine.want_stack != NULL:
            engine.want_stack(engine.where_context, peer)
    elif head.type == MSG_WHERE and engine.wheres != NULL:
        engine.wheres[peer] = (<const WhereBody*>body)[0]
        mask_add(&engine.late.replied, peer)
    elif head.type == MSG_STACK and engine.keep_stack != NULL:
        engine.keep_stack(engine.where_context, peer, body, nbytes)


cdef Mask awaited_of(Engine* engine, int64_t seq) noexcept nogil:
    """The ranks whose contribution, or chunks, an operation lacks here; none where that is not
    what it waits for."""
    cdef const Operation* op = find_operation(engine, seq)
    cdef Mask out = mask_none(), members
    cdef Passing place
    cdef int b, phase
    if op == NULL or not op.called or op.complete:
        return out
    if fans(engine, op):
        place = place_of(engine, op)
        for b in range(place.children):
            if not mask_has(&op.have, place.child[b]):
                mask_add(&out, place.child[b])
        if mask_empty(&out) and place.parent >= 0:
            mask_add(&out, place.parent)
        return out
    if op.small:
        members = attempt_members(engine, op)
        return mask_without(&members, &op.have)
    for b in range(op.blocks):
        for phase in range(PHASES):
            if not sink_idle(&op.block[b].sink[phase]):
                mask_add(&out, op.block[b].sink[phase].source)
    return out
