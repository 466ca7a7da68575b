# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Silence: who has not been heard for too long, ourselves included, and who leads meanwhile.

Each rank sends a beat to the next one in the ring of the living and listens to the one before.  One
that misses the beats calls out to all: whoever does not answer is silent too, and the lowest rank
that is neither gone nor silent leads a ballot.  The ballot decides; a belief removes nobody.

A rank whose own clock has jumped was stopped itself.  It completes nothing until a ballot has shown
that it is still a member.
"""
from libc.stdint cimport int64_t
from hopcoll._state cimport *
from hopcoll._records cimport send_message


cdef Mask living(const Engine* engine) noexcept nogil:
    cdef Mask out = gone(engine), everyone = mask_full(engine.size)
    return mask_without(&everyone, &out)


cdef bint leads(const Engine* engine) noexcept nogil:
    """Whether we are the lowest rank that is neither gone nor silent."""
    cdef Mask out = gone(engine)
    cdef int r
    out = mask_or(&out, &engine.silent)
    if engine.leaving or engine.stopped:
        return False
    for r in range(engine.rank):
        if not mask_has(&out, r):
            return False
    return True


cdef int neighbour(const Engine* engine, int step) noexcept nogil:
    """The next rank in the ring, up or down, that is neither gone nor silent; -1: we are alone."""
    cdef Mask out = gone(engine)
    cdef int r = engine.rank
    out = mask_or(&out, &engine.silent)
    while True:
        r = (r + step + engine.size) % engine.size
        if r == engine.rank:
            return -1
        if not mask_has(&out, r):
            return r


cdef void call_out(Engine* engine, int rank) noexcept nogil:
    """Asks everyone who is there, on account of one rank (or of ourselves, who were away).  The
    leader answers with a ballot, and all with a beat; who does not is silent too."""
    cdef Mask out = gone(engine)
    cdef RankBody body
    cdef int r
    engine.calling_us = engine.now_us
    engine.replied = mask_none()
    if leads(engine):
        engine.complaint = 1
    body.rank = rank
    body.pad = 0
    for r in range(engine.size):
        if r != engine.rank and not mask_has(&out, r):
            send_message(engine, r, MSG_SILENT, engine.done, NULL, &body, sizeof(body))


cdef void end_call(Engine* engine) noexcept nogil:
    """The time for replies is over."""
    cdef Mask alive = living(engine)
    cdef Mask quiet = mask_without(&alive, &engine.replied)
    engine.calling_us = 0
    mask_drop(&quiet, engine.rank)
    if mask_empty(&quiet) and not engine.unsure:
        return
    engine.silent = mask_or(&engine.silent, &quiet)
    if leads(engine):
        engine.complaint = 1
    elif engine.unsure or engine.frozen:
        call_out(engine, engine.rank)     # somebody has to lead us out of this


cdef void watch(Engine* engine, int64_t before_us) noexcept nogil:
    """Beats to the next rank, listens to the one before, and notices that we were away."""
    cdef int64_t limit = engine.settings.detect_us, now = engine.now_us
    cdef int next = neighbour(engine, 1), last = neighbour(engine, -1)
    if engine.leaving:
        return
    if now - before_us > limit // 2 and before_us > 0 and engine.size > 1:
        # What others said meanwhile may be that we are out.
        engine.counters.pauses += 1
        engine.heard_us = engine.promised_us = engine.ballot_us = now
        engine.silent = mask_none()
        next, last = neighbour(engine, 1), neighbour(engine, -1)
        if next >= 0:
            engine.unsure = 1
            call_out(engine, engine.rank)
    if engine.calling_us and now - engine.calling_us >= limit:
        end_call(engine)
        next, last = neighbour(engine, 1), neighbour(engine, -1)
    if next >= 0 and now - engine.beat_us >= limit // 10:
        engine.beat_us = now
        send_message(engine, next, MSG_BEAT, engine.done, NULL, NULL, 0)
    if last != engine.watched:
        engine.watched = last
        engine.heard_us = now
    elif last >= 0 and now - engine.heard_us >= limit:
        engine.heard_us = now
        engine.counters.silences += 1
        mask_add(&engine.silent, last)
        call_out(engine, last)
