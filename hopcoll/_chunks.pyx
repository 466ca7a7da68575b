# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The streams of a large operation: what each block asks of its neighbours, and gives them.

Every block of an operation is a relay of its own: a sink for partial sums, a sink for finals, and
an outlet for each stream that another rank was granted.  Streams live for one epoch; a decision
ends them all, and `open_block` begins anew once nothing of the earlier epoch is under way.
"""
from libc.stdint cimport int64_t, int32_t, uint8_t
from libc.string cimport memcpy, memset
from cython_kernels.transport cimport Event, EVENT_RECEIVED
from cython_kernels.stream cimport (
    Sink, CHUNK_NONE, CHUNK_PARTIAL, CHUNK_FINAL, make_grid, chunk_length, sink_open, sink_post,
    sink_arrived, sink_credit_due, sink_idle, spring_push, send_voids)
from cython_kernels.reduction cimport reduce_into, divide
from hopcoll._state cimport *
from hopcoll._plan cimport (
    block_count, block_start, chain_prefix, partial_source, final_source, is_finalizer)
from hopcoll._records cimport attempt_members, claim, compare_signature, send_message

cdef enum:
    AVG = 10
    TOKEN_SINK = 1
    TOKEN_SPRING = 2
    TOKEN_SPRING_RETAINED = 3


cdef inline int64_t token_of(int kind, int64_t index, int64_t part) noexcept nogil:
    return (<int64_t>kind << 60) | (index << 8) | part


cdef int prepare_blocks(Engine* engine, Operation* op) noexcept nogil:
    cdef int b, blocks = block_count(op.sig.kind, engine.size)
    cdef int64_t begin, end, states = 0, chunk_bytes = engine.settings.chunk_bytes
    cdef Block* block
    for b in range(blocks):
        begin = (b * op.sig.count // blocks) * op.item_bytes
        end = ((b + 1) * op.sig.count // blocks) * op.item_bytes
        block = &op.block[b]
        block.grid = make_grid(end - begin, chunk_bytes)
        block.offset = begin
        block.state = states
        block.start = block_start(op.sig.kind, engine.size, op.sig.root, b, blocks)
        states += block.grid.chunks
    op.blocks = blocks
    op.chunks = states
    op.states = <uint8_t*>engine.transport.allocate(engine.transport.self, states + 1)
    if op.states == NULL:
        return START_NO_MEMORY
    memset(op.states, CHUNK_NONE, states + 1)
    if op.sig.kind == BCAST and op.sig.root == engine.rank:
        memset(op.states, CHUNK_FINAL, states)
        op.block[0].finals = states
    return START_OK


# ---- chunks -------------------------------------------------------------------------------

cdef void check_chunk_faults(Engine* engine, Operation* op) noexcept nogil:
    cdef int i
    for i in range(engine.faults):
        if (engine.fault[i].ballot == 0 and engine.fault[i].time_us < 0
                and engine.fault[i].seq == op.seq and op.moved_chunks >= engine.fault[i].chunk
                and op.called):
            engine.fire(engine.fault_context, engine, &engine.fault[i], i)


cdef inline void moved(Engine* engine, Operation* op, int64_t chunks,
                       int64_t nbytes) noexcept nogil:
    op.moved_chunks += chunks
    op.moved_bytes += nbytes
    if engine.faults:
        check_chunk_faults(engine, op)


cdef inline unsigned char* block_base(Operation* op, Block* block) noexcept nogil:
    return op.base + block.offset


cdef void finalize_chunk(Engine* engine, Operation* op, Block* block, int64_t chunk) noexcept nogil:
    cdef Mask members
    if op.sig.redop == AVG:
        members = attempt_members(engine, op)
        divide(op.sig.dtype, block_base(op, block) + chunk * block.grid.chunk_bytes,
               chunk_length(&block.grid, chunk) // op.item_bytes, mask_count(&members))
    op.states[block.state + chunk] = CHUNK_FINAL
    block.finals += 1


cdef bint block_idle(const Block* block) noexcept nogil:
    return (sink_idle(&block.sink[0]) and sink_idle(&block.sink[1]) and block.in_flight == 0)


cdef void open_block(Engine* engine, Operation* op, int b) noexcept nogil:
    """Nothing of an earlier epoch is under way in this block any more: begin anew in this one."""
    cdef Block* block = &op.block[b]
    cdef int64_t c
    cdef int before = partial_source(engine, op, b)
    block.epoch = engine.epoch
    block.sink[0].open = 0
    block.sink[1].open = 0
    block.sink[0].broken = 0
    block.sink[1].broken = 0
    if op.sig.kind == BCAST or op.standing or not is_finalizer(engine, op, b):
        return
    for c in range(block.grid.chunks):
        if before < 0 and op.states[block.state + c] == CHUNK_NONE:
            memcpy(block_base(op, block) + c * block.grid.chunk_bytes,
                   op.send + block.offset + c * block.grid.chunk_bytes,
                   chunk_length(&block.grid, c))
            op.states[block.state + c] = CHUNK_PARTIAL
        if op.states[block.state + c] == CHUNK_PARTIAL:
            finalize_chunk(engine, op, block, c)


cdef void tell_credit(Engine* engine, Operation* op, int b, int phase, bint opening) noexcept nogil:
    cdef Sink* sink = &op.block[b].sink[phase]
    cdef GrantBody grant
    cdef CreditBody credit
    if opening:
        memset(&grant, 0, sizeof(grant))
        grant.block = b
        grant.phase = phase
        grant.tag = sink.tag
        grant.first = sink.first
        grant.end = sink.end
        grant.limit = sink.posted
        send_message(engine, sink.source, MSG_GRANT, op.seq, &op.sig, &grant, sizeof(grant))
    else:
        memset(&credit, 0, sizeof(credit))
        credit.block = b
        credit.phase = phase
        credit.tag = sink.tag
        credit.told = sink.told
        credit.limit = sink.posted
        send_message(engine, sink.source, MSG_CREDIT, op.seq, &op.sig, &credit, sizeof(credit))
    sink.told = sink.posted


cdef void close_sink(Engine* engine, Operation* op, int b, int phase) noexcept nogil:
    """Gives a stream up.  The sender learns of every receive that still waits: it owes voids."""
    cdef Sink* sink = &op.block[b].sink[phase]
    if sink.open:
        sink.open = 0
        if sink.posted > sink.told:
            tell_credit(engine, op, b, phase, False)


cdef void pump_sink(Engine* engine, Operation* op, int b, int phase) noexcept nogil:
    """Asks for the next missing chunks of one phase, and posts receives ahead."""
    cdef Block* block = &op.block[b]
    cdef Sink* sink = &block.sink[phase]
    cdef uint8_t* states = op.states + block.state
    cdef int64_t first, end, gate, chunks = block.grid.chunks
    cdef int source
    cdef bint opening = False, gated
    if sink.broken or (sink.open == 0 and block.finals == chunks):
        return
    gated = phase == FINAL_PHASE and partial_source(engine, op, b) >= 0
    if not sink.open:
        if not sink_idle(sink):
            return
        source = (partial_source(engine, op, b) if phase == PARTIAL_PHASE
                  else final_source(engine, op, b))
        if source < 0 or mask_has(&engine.dead, source) or mask_has(&engine.left, source):
            return             # nobody would answer: a ballot will name another source
        first = 0
        if phase == PARTIAL_PHASE:
            while first < chunks and states[first] != CHUNK_NONE:
                first += 1
            end = first
            while end < chunks and states[end] == CHUNK_NONE:
                end += 1
        else:
            while first < chunks and states[first] == CHUNK_FINAL:
                first += 1
            end = first
            while end < chunks and states[end] != CHUNK_FINAL:
                end += 1
        if first == end or (gated and states[first] != CHUNK_PARTIAL):
            return
        engine.next_tag = engine.next_tag + 1 if engine.next_tag < 0x3fffffff else 1
        sink_open(sink, source, engine.next_tag, first, end)
        block.sink_attempt[phase] = op.attempt
        opening = True
    gate = sink.end
    if gated:
        # The final of a chunk lands where its partial sum is made: not before that was made.
        gate = sink.posted
        while gate < sink.end and states[gate] == CHUNK_PARTIAL:
            gate += 1
    sink_post(sink, engine.transport, &block.grid, block_base(op, block),
              engine.settings.window, gate,
              token_of(TOKEN_SINK, op.seq % engine.settings.ring, b * 2 + phase))
    if opening:
        tell_credit(engine, op, b, phase, True)
    elif sink_credit_due(sink, engine.settings.window):
        tell_credit(engine, op, b, phase, False)


cdef void pump_outlets(Engine* engine, Operation* op, int b, int phase) noexcept nogil:
    cdef Block* block = &op.block[b]
    cdef int32_t index = block.outlets[phase], next
    cdef Outlet* outlet
    cdef const unsigned char* base
    cdef const uint8_t* states
    cdef bint retained = op.done and op.retained != NULL and not op.small
    cdef int kind = TOKEN_SPRING
    cdef int64_t count, before, c
    if index < 0 or not op.called or op.small or op.status != STATUS_OK:
        return
    if not op.complete and block.epoch != engine.epoch:
        return
    if phase == PARTIAL_PHASE and op.send != NULL and not op.standing \
            and partial_source(engine, op, b) < 0:
        base = op.send + block.offset
        states = NULL
    else:
        base = op.retained if retained else op.base
        if base == NULL:
            return
        base += block.offset
        states = op.states + block.state
        if retained:
            kind = TOKEN_SPRING_RETAINED
    while index >= 0:
        outlet = &engine.outlets[index]
        next = outlet.next
        # What was asked for by another call is not given; the mismatch will be decided.
        if not outlet.early and signature_equal(&outlet.sig, &op.sig):
            before = outlet.spring.next
            count = spring_push(&outlet.spring, engine.transport, &block.grid, base, states,
                                CHUNK_FINAL if phase == FINAL_PHASE else CHUNK_PARTIAL,
                                token_of(kind, index, 0))
            if count:
                if retained:
                    op.in_flight_retained += <int32_t>count
                else:
                    op.in_flight += <int32_t>count
                    block.in_flight += <int32_t>count
                engine.counters.chunks_sent += count
                for c in range(before, before + count):
                    engine.counters.bytes_sent += chunk_length(&block.grid, c)
                    moved(engine, op, 1, chunk_length(&block.grid, c))
            retire_outlet(engine, op, index)
        index = next


cdef bint is_active(const Engine* engine, const Operation* op) noexcept nogil:
    return op.seq < engine.done + engine.settings.active


cdef void pump_chunks(Engine* engine, Operation* op) noexcept nogil:
    """Moves whatever of an operation can be moved now."""
    cdef int b, phase
    cdef int64_t finals = 0
    cdef Block* block
    if op.small or not op.called:
        return
    if not op.complete and is_active(engine, op):
        for b in range(op.blocks):
            block = &op.block[b]
            if block.epoch != engine.epoch and block_idle(block):
                open_block(engine, op, b)
            if block.epoch == engine.epoch:
                pump_sink(engine, op, b, PARTIAL_PHASE)
                pump_sink(engine, op, b, FINAL_PHASE)
        for b in range(op.blocks):
            finals += op.block[b].finals
        if finals == op.chunks and not needs_watermark(engine, op):
            op.complete = 1       # blocks that were not opened in this epoch may serve now
    for b in range(op.blocks):
        for phase in range(2):
            if op.block[b].outlets[phase] >= 0:
                pump_outlets(engine, op, b, phase)


cdef bint needs_watermark(const Engine* engine, const Operation* op) noexcept nogil:
    """A large Reduce is over for a rank that is not its root when the root says so."""
    return op.sig.kind == REDUCE and op.sig.root != engine.rank


cdef void chunk_received(Engine* engine, Operation* op, int b, int phase, int64_t chunk,
                         int64_t nbytes) noexcept nogil:
    cdef Block* block = &op.block[b]
    cdef Sink* sink = &block.sink[phase]
    cdef uint8_t* state = op.states + block.state + chunk
    cdef unsigned char* data
    if not sink.open:
        # Late, on a stream that was given up.  A final of this same attempt is still the final;
        # anything else only tells that what was in its place is gone.
        if phase == FINAL_PHASE:
            if block.sink_attempt[phase] == op.attempt and not op.complete:
                if state[0] != CHUNK_FINAL:
                    block.finals += 1
                state[0] = CHUNK_FINAL
            elif state[0] != CHUNK_FINAL:
                state[0] = CHUNK_NONE
        return
    engine.counters.chunks_received += 1
    engine.counters.bytes_received += nbytes
    if phase == PARTIAL_PHASE:
        data = block_base(op, block) + chunk * block.grid.chunk_bytes
        reduce_into(op.sig.dtype, op.sig.redop, data, data,
                    op.send + block.offset + chunk * block.grid.chunk_bytes,
                    nbytes // op.item_bytes)
        state[0] = CHUNK_PARTIAL
        if is_finalizer(engine, op, b):
            finalize_chunk(engine, op, block, chunk)
    else:
        state[0] = CHUNK_FINAL
        block.finals += 1
    moved(engine, op, 1, nbytes)


cdef void on_data_event(Engine* engine, const Event* event) noexcept nogil:
    cdef int kind = <int>(event.token >> 60)
    cdef int64_t index = (event.token >> 8) & 0x7fffffff
    cdef int part = event.token & 0xff
    cdef Operation* op
    cdef Block* block
    cdef Sink* sink
    cdef Outlet* outlet
    cdef int64_t chunk
    if kind == TOKEN_SINK:
        op = &engine.ring[index]
        block = &op.block[part >> 1]
        sink = &block.sink[part & 1]
        chunk = sink_arrived(sink)
        if event.kind == EVENT_RECEIVED and event.nbytes > 0:
            chunk_received(engine, op, part >> 1, part & 1, chunk, event.nbytes)
        else:
            sink.broken = 1
            close_sink(engine, op, part >> 1, part & 1)
        if sink.open and sink.arrived == sink.end:
            sink.open = 0
        pump_chunks(engine, op)
    elif kind == TOKEN_SPRING or kind == TOKEN_SPRING_RETAINED:
        outlet = &engine.outlets[index]
        outlet.spring.in_flight -= 1
        op = find_operation(engine, outlet.seq)
        if kind == TOKEN_SPRING_RETAINED:
            op.in_flight_retained -= 1
        else:
            op.in_flight -= 1
            op.block[outlet.block].in_flight -= 1
        retire_outlet(engine, op, <int32_t>index)
        if not op.complete and op.block[outlet.block].epoch != engine.epoch:
            pump_chunks(engine, op)      # the block may be idle now


# ---- outlets: the streams that others asked us for ----------------------------------------

cdef void retire_outlet(Engine* engine, Operation* op, int32_t index) noexcept nogil:
    """Takes a stream off the books once it has nothing left to send and nothing in flight."""
    cdef Outlet* outlet = &engine.outlets[index]
    cdef int32_t* link
    if outlet.spring.in_flight or outlet.spring.next < outlet.spring.end or not outlet.used:
        return
    link = &op.block[outlet.block].outlets[outlet.phase]
    while link[0] != index:
        link = &engine.outlets[link[0]].next
    link[0] = outlet.next
    outlet.used = 0
    outlet.next = engine.outlet_free
    engine.outlet_free = index
    engine.outlets_used -= 1


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


cdef void on_grant(Engine* engine, int peer, const Head* head,
                   const GrantBody* body) noexcept nogil:
    cdef Operation* op
    cdef Outlet* outlet
    cdef int32_t index
    cdef Mask members = members_of(engine, engine.epoch)
    if (head.epoch < engine.epoch or mask_has(&engine.dead, peer) or engine.leaving
            or not mask_has(&members, peer)):
        void_stream(engine, peer, body.tag, body.limit - body.first)
        return
    op = claim(engine, head.seq)
    if op == NULL:
        if head.seq >= engine.freed:
            engine.broken = 1
        void_stream(engine, peer, body.tag, body.limit - body.first)
        return
    compare_signature(engine, op, peer, &head.sig)
    if engine.outlet_free < 0:
        engine.broken = 1
        return
    index = engine.outlet_free
    outlet = &engine.outlets[index]
    engine.outlet_free = outlet.next
    engine.outlets_used += 1
    memset(outlet, 0, sizeof(Outlet))
    outlet.used = 1
    outlet.seq = head.seq
    outlet.epoch = head.epoch
    outlet.early = head.epoch > engine.epoch
    outlet.block = body.block
    outlet.phase = body.phase
    outlet.sig = head.sig
    outlet.spring.dest = peer
    outlet.spring.tag = body.tag
    outlet.spring.next = body.first
    outlet.spring.end = body.end
    outlet.spring.limit = body.limit
    outlet.next = op.block[body.block].outlets[body.phase]
    op.block[body.block].outlets[body.phase] = index
    pump_chunks(engine, op)


cdef void on_credit(Engine* engine, int peer, const Head* head,
                    const CreditBody* body) noexcept nogil:
    cdef Operation* op = find_operation(engine, head.seq)
    cdef Outlet* outlet
    cdef int32_t index
    if op != NULL:
        index = op.block[body.block].outlets[body.phase]
        while index >= 0:
            outlet = &engine.outlets[index]
            if (outlet.spring.dest == peer and outlet.spring.tag == body.tag
                    and outlet.spring.end >= body.limit):
                outlet.spring.limit = body.limit
                pump_outlets(engine, op, body.block, body.phase)
                return
            index = outlet.next
    void_stream(engine, peer, body.tag, body.limit - body.told)


# ---- a new epoch --------------------------------------------------------------------------

cdef void end_streams(Engine* engine) noexcept nogil:
    """Ends all streams of earlier epochs; every receive that still waits is answered."""
    cdef int64_t seq
    cdef int32_t index
    cdef int b
    cdef Operation* op
    cdef Outlet* outlet
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op == NULL:
            continue
        for b in range(BLOCKS_MAX):
            close_sink(engine, op, b, PARTIAL_PHASE)
            close_sink(engine, op, b, FINAL_PHASE)
    for index in range(engine.settings.outlets_max):
        outlet = &engine.outlets[index]
        if not outlet.used:
            continue
        if outlet.epoch < engine.epoch:
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
            for phase in range(2):
                if peer < 0 or op.block[b].sink[phase].source == peer:
                    if op.block[b].sink[phase].open:
                        op.block[b].sink[phase].broken = 1
                    close_sink(engine, op, b, phase)
    for index in range(engine.settings.outlets_max):
        if engine.outlets[index].used and (peer < 0 or engine.outlets[index].spring.dest == peer):
            close_outlet(engine, find_operation(engine, engine.outlets[index].seq), index)


cdef void rerun_chunks(Engine* engine, Operation* op, int previous) noexcept nogil:
    """The result starts anew without the dead; partial sums that none of them is part of stay."""
    cdef int b
    cdef int64_t c
    cdef Block* block
    cdef Mask lost, before, tainted
    cdef Mask old = members_of(engine, previous)
    cdef Mask new = attempt_members(engine, op)
    cdef uint8_t* state
    if op.small or op.sig.kind == BCAST or op.states == NULL:
        return
    lost = mask_without(&old, &new)
    for b in range(op.blocks):
        block = &op.block[b]
        before = chain_prefix(engine.size, block.start, engine.rank)
        tainted = mask_and(&before, &lost)
        block.finals = 0
        for c in range(block.grid.chunks):
            state = op.states + block.state + c
            if state[0] == CHUNK_PARTIAL and (mask_empty(&tainted)
                                              or engine.settings.sabotage & BREAK_TAINT):
                engine.counters.kept_chunks += 1
            elif state[0] != CHUNK_NONE:
                engine.counters.dropped_chunks += 1
                state[0] = CHUNK_NONE
