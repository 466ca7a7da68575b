# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The ends of streams: outlets, by which others are given what they asked for, and landings, the
slots in which chunks from other hosts arrive.

What comes from another host lands in slots first: a rank there may be left out without being known
to be dead, and nothing that it still sends may reach a buffer that the caller has back.  A rank of
this host is killed instead, so that its chunks may land where they belong.
"""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memset
from cython_kernels.stream cimport send_voids
from hopcoll._state cimport *
from hopcoll._plan cimport block_at, is_fold, is_wanted
from hopcoll._records cimport complain, send_message


# ---- slots for what comes from other hosts ------------------------------------------------

cdef bint make_landings(Engine* engine) noexcept nogil:
    cdef int i, count = engine.settings.outlets_max
    engine.landings = <Landing*>engine.transport.allocate(engine.transport.self,
                                                          count * sizeof(Landing))
    if engine.landings == NULL:
        return False
    memset(engine.landings, 0, count * sizeof(Landing))
    for i in range(count):
        engine.landings[i].next = i + 1 if i + 1 < count else -1
    engine.landing_free = 0
    return True


cdef bint take_landing(Engine* engine, Operation* op, int b, int phase) noexcept nogil:
    """Slots for a stream that is being opened; False when memory is short."""
    cdef Block* block = &op.block[b]
    cdef Landing* landing
    cdef int64_t count = block.grid.chunks
    leave_landing(engine, block, phase)
    if (engine.landings == NULL and not make_landings(engine)) or engine.landing_free < 0:
        return False
    if count > engine.settings.window:
        count = engine.settings.window
    landing = &engine.landings[engine.landing_free]
    landing.slots = <unsigned char*>engine.transport.allocate(
        engine.transport.self, count * block.grid.chunk_bytes)
    if landing.slots == NULL:
        return False
    block.landing[phase] = engine.landing_free
    engine.landing_free = landing.next
    engine.landings_used += 1
    landing.seq = op.seq
    landing.part = b << 2 | phase
    landing.in_flight = 0
    landing.stray = 0
    return True


cdef void free_landing(Engine* engine, int32_t index) noexcept nogil:
    cdef Landing* landing = &engine.landings[index]
    engine.transport.release(engine.transport.self, landing.slots)
    landing.slots = NULL
    landing.next = engine.landing_free
    engine.landing_free = index
    engine.landings_used -= 1


cdef void leave_landing(Engine* engine, Block* block, int phase) noexcept nogil:
    if block.landing[phase] >= 0:
        free_landing(engine, block.landing[phase])
        block.landing[phase] = -1


# ---- outlets: the streams that others asked us for ----------------------------------------

cdef void unlink_outlet(Engine* engine, Operation* op, int32_t index) noexcept nogil:
    cdef Outlet* outlet = &engine.outlets[index]
    cdef int32_t* link = &op.block[outlet.block].outlets[outlet.phase] if outlet.attached \
        else &op.early
    while link[0] != index:
        link = &engine.outlets[link[0]].next
    link[0] = outlet.next
    engine.outlets_used -= 1


cdef void free_outlet(Engine* engine, int32_t index) noexcept nogil:
    cdef Outlet* outlet = &engine.outlets[index]
    outlet.used = 0
    outlet.next = engine.outlet_free
    engine.outlet_free = index


cdef void retire_outlet(Engine* engine, Operation* op, int32_t index) noexcept nogil:
    """Takes a stream off the books once it has nothing left to send and nothing in flight."""
    cdef Outlet* outlet = &engine.outlets[index]
    if outlet.spring.in_flight or outlet.spring.next < outlet.spring.end or not outlet.used:
        return
    unlink_outlet(engine, op, index)
    free_outlet(engine, index)


cdef void void_stream(Engine* engine, int dest, int tag, int64_t count) noexcept nogil:
    if count > 0 and not engine.settings.sabotage & BREAK_VOIDS:
        engine.counters.voids += count
        send_voids(engine.transport, dest, tag, count, TOKEN_IGNORED)


cdef void close_outlet(Engine* engine, Operation* op, int32_t index) noexcept nogil:
    cdef Outlet* outlet = &engine.outlets[index]
    void_stream(engine, outlet.spring.dest, outlet.spring.tag,
                outlet.spring.limit - outlet.spring.next)
    outlet.spring.next = outlet.spring.limit
    outlet.spring.end = outlet.spring.limit
    retire_outlet(engine, op, index)


cdef int64_t length_of(const Operation* op, int b) noexcept nogil:
    """How long a block is that others ask us for."""
    cdef const Block* block = &op.block[b]
    return block.out.nbytes if block.send != NULL and not is_fold(op.sig.kind) \
        else block.grid.nbytes


cdef bint belongs(const Operation* op, const Outlet* outlet) noexcept nogil:
    """Whether a stream was asked for by what we have called as well."""
    return (op.called and not op.small and signature_equal(&outlet.sig, &op.sig)
            and outlet.block < op.blocks)


cdef bint attach(Engine* engine, Operation* op, int32_t index) noexcept nogil:
    """Puts a stream that was asked for beside its block, if we have called what it belongs to.
    What was asked for by another call, or in another length, is not given: the mismatch will be
    decided."""
    cdef Outlet* outlet = &engine.outlets[index]
    cdef Block* block
    if not belongs(op, outlet):
        return False
    if length_of(op, outlet.block) != outlet.nbytes:
        complain(engine, op)
        return False
    block = &op.block[outlet.block]
    mask_add(&op.asked, outlet.spring.dest)
    outlet.attached = 1
    outlet.next = block.outlets[outlet.phase]
    block.outlets[outlet.phase] = index
    return True


cdef Quarrel find_quarrel(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether someone asked us for a block in another length."""
    cdef Quarrel quarrel
    cdef int32_t index = op.early
    cdef const Outlet* outlet
    memset(&quarrel, 0, sizeof(quarrel))
    quarrel.source = -1
    while index >= 0:
        outlet = &engine.outlets[index]
        if belongs(op, outlet):
            quarrel.source = engine.rank
            quarrel.dest = outlet.spring.dest
            quarrel.sent_bytes = length_of(op, outlet.block)
            quarrel.expected_bytes = outlet.nbytes
        index = outlet.next
    return quarrel


cdef void keep_early(Engine* engine, Operation* op, int32_t index) noexcept nogil:
    engine.outlets[index].next = op.early
    op.early = index


cdef void drop_told(Engine* engine, Operation* op, int32_t index) noexcept nogil:
    """A stream of an empty block only told its length."""
    cdef Outlet* outlet = &engine.outlets[index]
    if op.called and outlet.spring.end == 0 and (outlet.attached or not belongs(op, outlet)):
        retire_outlet(engine, op, index)
        outlet.attached = 0


cdef void attach_early(Engine* engine, Operation* op) noexcept nogil:
    """Once we have called an operation: what others have already asked for."""
    cdef int32_t index = op.early, next
    op.early = -1
    while index >= 0:
        next = engine.outlets[index].next
        if not attach(engine, op, index):
            keep_early(engine, op, index)
        drop_told(engine, op, index)
        index = next


cdef void check_lengths(Engine* engine, Operation* op) noexcept nogil:
    """An empty block is asked for as well, so that its owner sees what we expect."""
    cdef int b, source
    cdef GrantBody grant
    if (not op.sig.flags & FLAG_VECTOR or op.small or is_fold(op.sig.kind)
            or op.status != STATUS_OK):
        return
    for b in range(op.blocks):
        source = op.block[b].start
        if (op.block[b].grid.nbytes or source == engine.rank or not is_wanted(engine, op, b)
                or is_gone(engine, source)):
            continue
        memset(&grant, 0, sizeof(grant))
        grant.block = block_at(engine, op, b)
        grant.phase = FINAL_PHASE
        send_message(engine, source, MSG_GRANT, op.seq, &op.sig, &grant, sizeof(grant))
