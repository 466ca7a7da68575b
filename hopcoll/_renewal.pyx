# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What ends the streams of large operations, and what is kept for those that follow: a new epoch, a
rank that leaves, or one that is lost.

Streams live for one epoch.  A decision ends them all, voids answer what was granted, and each block
begins again where it stood, without what the dead have a part in.
"""
from libc.stdint cimport int64_t, int32_t, uint8_t
from cython_kernels.stream cimport CHUNK_FINAL, CHUNK_LEFT, CHUNK_NONE, CHUNK_PARTIAL, sink_idle
from hopcoll._state cimport *
from hopcoll._plan cimport chain_prefix, is_fold, is_scan
from hopcoll._chunks cimport close_sink, close_sinks
from hopcoll._streams cimport close_outlet, unlink_outlet
from hopcoll._twins cimport keeps_run


cdef void end_streams(Engine* engine) noexcept nogil:
    """Ends all streams of earlier epochs; every receive that still waits is answered."""
    cdef int64_t seq
    cdef int32_t index
    cdef int b, phase
    cdef Operation* op
    cdef Outlet* outlet
    cdef Mask members = members_of(engine, engine.epoch)
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op == NULL:
            continue
        close_sinks(engine, op)
        for b in range(op.blocks if engine.settings.sabotage & BREAK_DRAIN else 0):
            for phase in range(PHASES):
                stray_sink(engine, &op.block[b], phase)
    for index in range(engine.outlets_made):
        outlet = &engine.outlets[index]
        if not outlet.used or outlet.stray:
            continue
        # Who asked ahead of us and is no member was in another epoch of this number, of ranks that
        # are all dead.
        if outlet.epoch < engine.epoch or not mask_has(&members, outlet.spring.dest):
            close_outlet(engine, find_operation(engine, outlet.seq), index)
        elif outlet.epoch == engine.epoch:
            outlet.early = 0


cdef void part_streams(Engine* engine, int peer) noexcept nogil:
    """Ends the streams between us and one rank (all of them: peer -1) that leaves."""
    cdef int64_t seq
    cdef int32_t index
    cdef int b, phase
    cdef Operation* op
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op == NULL:
            continue
        for b in range(op.blocks):
            for phase in range(PHASES):
                if peer < 0 or op.block[b].sink[phase].source == peer:
                    if op.block[b].sink[phase].open:
                        op.block[b].sink[phase].broken = 1
                    close_sink(engine, op, b, phase)
    for index in range(engine.outlets_made):
        if (engine.outlets[index].used and not engine.outlets[index].stray
                and (peer < 0 or engine.outlets[index].spring.dest == peer)):
            close_outlet(engine, find_operation(engine, engine.outlets[index].seq), index)


cdef void stray_sink(Engine* engine, Block* block, int phase) noexcept nogil:
    """What may still land from a lost rank lands in slots that nobody looks at any more."""
    cdef Sink* sink = &block.sink[phase]
    if block.landing[phase] >= 0 and not sink_idle(sink):
        engine.counters.strays += 1
        engine.landings[block.landing[phase]].stray = 1
        block.landing[phase] = -1
        sink.posted = sink.arrived


cdef void stray_outlet(Engine* engine, int32_t index) noexcept nogil:
    """Our sends to a lost rank may never end: their memory stays, and nothing waits for them."""
    cdef Outlet* outlet = &engine.outlets[index]
    cdef Operation* op = find_operation(engine, outlet.seq)
    engine.counters.strays += 1
    op.in_flight_retained -= outlet.retained
    op.in_flight -= outlet.spring.in_flight - outlet.retained
    op.block[outlet.block].in_flight -= outlet.spring.in_flight - outlet.retained
    op.strays += outlet.spring.in_flight
    unlink_outlet(engine, op, index)
    outlet.stray = 1


cdef void abandon_streams(Engine* engine, int peer) noexcept nogil:
    """Ends the streams between us and a rank that is lost, and waits for nothing of them."""
    cdef int64_t seq
    cdef int32_t index
    cdef int b, phase
    cdef Operation* op
    mask_add(&engine.abandoned, peer)
    part_streams(engine, peer)
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op == NULL:
            continue
        for b in range(op.blocks):
            for phase in range(PHASES):
                if op.block[b].sink[phase].source == peer:
                    stray_sink(engine, &op.block[b], phase)
    for index in range(engine.outlets_made):
        if (engine.outlets[index].used and not engine.outlets[index].stray
                and engine.outlets[index].spring.dest == peer):
            stray_outlet(engine, index)


cdef bint keeps_sums(const Engine* engine, const Operation* op, int b, int previous,
                     const Mask* lost) noexcept nogil:
    """Whether our partial sums of a block are part of what will be."""
    cdef Mask tainted
    if op.sig.flags & (FLAG_PARTIAL | FLAG_ARRIVAL):
        return False              # there is a new roll, or order
    if engine.settings.sabotage & BREAK_TAINT:
        return True
    if op.twins:
        return keeps_run(engine, op, b, previous)
    tainted = chain_prefix(engine.size, op.block[b].start, engine.rank)
    tainted = mask_and(&tainted, lost)
    return mask_empty(&tainted)


cdef void rerun_chunks(Engine* engine, Operation* op, int previous) noexcept nogil:
    """The result starts anew without the dead; partial sums that none of them is part of stay."""
    cdef int b
    cdef int64_t c
    cdef Block* block
    cdef Mask lost
    cdef Mask old = members_of(engine, previous)
    cdef Mask new = attempt_members(engine, op)
    cdef uint8_t* state
    cdef bint keeps
    if op.small or not is_fold(op.sig.kind) or op.states == NULL:
        return
    lost = mask_without(&old, &new)
    for b in range(op.blocks):
        block = &op.block[b]
        keeps = keeps_sums(engine, op, b, previous, &lost)
        block.finals = 0
        for c in range(block.grid.chunks):
            state = op.states + block.state + c
            if keeps and (state[0] == CHUNK_PARTIAL or state[0] == CHUNK_LEFT
                          or (state[0] == CHUNK_FINAL and is_scan(op.sig.kind))):
                engine.counters.kept_chunks += 1
                block.finals += state[0] == CHUNK_FINAL
            elif state[0] != CHUNK_NONE:
                engine.counters.dropped_chunks += 1
                state[0] = CHUNK_NONE
