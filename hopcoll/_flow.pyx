# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Watermarks: how far everyone is done, and so what is stable.

Where all ranks are children of one, each keeps how far every other is (each message says so), and
the coordinator tells everyone what is stable.  Where there are more, the tree of the members adds
up: a rank tells its parent what is done at all who are reached through it, and the root, which so
knows what is stable, has it passed on the same way back.  A tree is of one epoch: who enters a new
one knows nothing of what is below it, and asks its children to tell it again.
"""
from libc.stdint cimport int64_t
from hopcoll._state cimport *
from hopcoll._records cimport send_message, send_more
from hopcoll._tree cimport children_in, is_flat, is_interior, members_tree, parent_in


cdef void flow_anew(Engine* engine) noexcept nogil:
    """Our place in the tree of a new epoch."""
    cdef Tree tree
    cdef int i
    if is_flat(engine):
        return
    tree = members_tree(engine)
    engine.flow.parent = parent_in(&tree, engine.rank)
    engine.flow.children = children_in(&tree, engine.rank, engine.flow.child)
    engine.flow.leaves = 0
    for i in range(engine.flow.children):
        if not is_interior(&tree, engine.flow.child[i]):
            engine.flow.leaves |= 1 << i
        engine.below_done[i] = 0
    engine.again = 1


cdef bint know_others(Engine* engine) noexcept nogil:
    """From now on how far each other rank is done is kept here; False when memory is short.
    Results of partial operations are kept for ranks that are late: each of them counts."""
    cdef int r
    if engine.peer_done == NULL:
        engine.peer_done = <int64_t*>engine.transport.allocate(engine.transport.self,
                                                               engine.size * sizeof(int64_t))
        for r in range(engine.size if engine.peer_done != NULL else 0):
            engine.peer_done[r] = engine.stable
    return engine.peer_done != NULL


cdef int64_t done_below(const Engine* engine) noexcept nogil:
    """What is done here and at all who are reached through us, as far as we know."""
    cdef int64_t low = engine.done
    cdef int i
    if engine.settings.sabotage & BREAK_COVER and engine.flow.parent >= 0:
        return low
    for i in range(engine.flow.children):
        # Nobody is missed who has left; those behind it are, until a ballot has led around it.
        if engine.below_done[i] < low and not (
                engine.flow.leaves >> i & 1 and mask_has(&engine.left, engine.flow.child[i])):
            low = engine.below_done[i]
    return low


cdef void update_stable(Engine* engine) noexcept nogil:
    cdef Mask members
    cdef int64_t low = engine.done
    cdef int r
    if not is_flat(engine):
        low = done_below(engine)
        if engine.flow.parent < 0 and low > engine.stable:
            engine.stable = low
        return
    members = members_of(engine, engine.epoch)
    for r in range(engine.size):
        if mask_has(&members, r) and not mask_has(&engine.left, r) and engine.peer_done[r] < low:
            low = engine.peer_done[r]
            if low <= engine.stable:
                return
    if low > engine.stable:
        engine.stable = low


cdef void tell_parent(Engine* engine) noexcept nogil:
    cdef int64_t low = done_below(engine)
    if engine.told_done < low and engine.flow.parent >= 0 and not engine.stopped:
        engine.told_done = low
        send_more(engine, engine.flow.parent, MSG_WATERMARK, MORE_BELOW, low, NULL, NULL, 0)


cdef void tell_children(Engine* engine) noexcept nogil:
    cdef int i, more = MORE_AGAIN if engine.again else MORE_NONE
    if engine.told_stable < engine.stable or engine.again:
        engine.told_stable = engine.stable
        engine.again = 0
        for i in range(engine.flow.children):
            if not is_gone(engine, engine.flow.child[i]):
                send_more(engine, engine.flow.child[i], MSG_WATERMARK, more, engine.stable, NULL,
                          NULL, 0)


cdef void flush_watermark(Engine* engine) noexcept nogil:
    """Tells the coordinator how far we are; the coordinator tells all what is stable."""
    cdef int coordinator
    cdef Mask out
    cdef int r
    engine.watermark_due = 0
    engine.watermark_us = engine.now_us
    if not is_flat(engine):
        tell_parent(engine)
        tell_children(engine)
        return
    coordinator = coordinator_of(engine)
    if coordinator != engine.rank:
        if engine.told_done < engine.done:
            engine.told_done = engine.done
            send_message(engine, coordinator, MSG_WATERMARK, engine.done, NULL, NULL, 0)
    elif engine.told_stable < engine.stable:
        engine.told_stable = engine.stable
        out = gone(engine)
        for r in range(engine.size):
            if r != engine.rank and not mask_has(&out, r):
                send_message(engine, r, MSG_WATERMARK, engine.stable, NULL, NULL, 0)


cdef bint is_due(const Engine* engine, int64_t told, int64_t now) noexcept nogil:
    """Whether others should hear of this at once: they wait for what is large, and for room."""
    return told < now and (told < engine.last_large or now - told >= engine.settings.ring // 4)


cdef void flush_due(Engine* engine) noexcept nogil:
    if not is_flat(engine):
        if engine.watermark_due or is_due(engine, engine.told_done, done_below(engine)):
            engine.watermark_due = 0
            tell_parent(engine)
        if engine.again or is_due(engine, engine.told_stable, engine.stable):
            tell_children(engine)
    elif coordinator_of(engine) == engine.rank:
        if is_due(engine, engine.told_stable, engine.stable):
            flush_watermark(engine)
    elif engine.watermark_due or engine.done - engine.told_done >= engine.settings.ring // 4:
        flush_watermark(engine)
