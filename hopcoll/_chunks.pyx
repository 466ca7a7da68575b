# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The streams of a large operation: what each block asks of its neighbours, and gives them.

Every block of an operation is a relay of its own: a sink for partial sums (two, where they come up
a tree), a sink for finals, and an outlet for each stream that another rank was granted.  Streams
live for one epoch; a decision ends them all, and `open_block` begins anew once nothing of the
earlier epoch is under way.
"""
from libc.stdint cimport int64_t, int32_t, uint8_t
from libc.string cimport memcpy, memset
from cython_kernels.transport cimport Event, EVENT_LOST, EVENT_RECEIVED
from cython_kernels.stream cimport (
    Grid, Sink, CHUNK_NONE, CHUNK_PARTIAL, CHUNK_FINAL, CHUNK_LEFT, chunk_length, sink_open,
    sink_post, sink_arrived, sink_credit_due, sink_idle, slot_of_chunk, spring_push)
from cython_kernels.reduction cimport divide
from hopcoll._state cimport *
from hopcoll._plan cimport (
    adds, block_at, ends_at_root, final_source, final_takers, is_finalizer, is_private, is_scan,
    is_wanted, partial_source)
from hopcoll._detours cimport (
    awaits_us, is_asked, is_over, send_around, send_behind, wait_patiently)
from hopcoll._partial cimport refuse_outlets
from hopcoll._records cimport (
    claim, combine, compare_signature, send_message, sinks_idle)
from hopcoll._streams cimport (
    attach, close_outlet, drop_told, free_landing, free_outlet, keep_early, leave_landing,
    retire_outlet, take_landing, void_stream)

cdef enum:
    AVG = 10
    TOKEN_SINK = 1
    TOKEN_SPRING = 2
    TOKEN_SPRING_RETAINED = 3
    TOKEN_LANDING = 4
    # Of a window, each of which is granted by a message.  In a tree streams share each link four
    # ways, and half windows that come one after the other would leave some without work.
    CHAIN_PARTS = 2
    TREE_PARTS = 4


cdef inline int64_t token_of(int kind, int64_t index, int64_t part) noexcept nogil:
    return (<int64_t>kind << 60) | (index << 12) | part


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
    op.moved_us = engine.now_us
    op.moved_chunks += chunks
    op.moved_bytes += nbytes
    if engine.faults:
        check_chunk_faults(engine, op)


cdef inline void make_final(Operation* op, Block* block, int64_t chunk) noexcept nogil:
    if op.states[block.state + chunk] != CHUNK_FINAL:
        op.states[block.state + chunk] = CHUNK_FINAL
        block.finals += 1
        op.awaited -= 1


cdef void finalize_chunk(Engine* engine, Operation* op, Block* block, int64_t chunk) noexcept nogil:
    cdef Mask members
    if op.sig.redop == AVG:
        members = attempt_members(engine, op)
        divide(op.sig.dtype, block.recv + chunk * block.grid.chunk_bytes,
               chunk_length(&block.grid, chunk) // op.item_bytes, mask_count(&members))
    make_final(op, block, chunk)


cdef bint block_idle(const Block* block) noexcept nogil:
    return sinks_idle(block) and block.in_flight == 0


cdef void open_block(Engine* engine, Operation* op, int b) noexcept nogil:
    """Nothing of an earlier epoch is under way in this block any more: begin anew in this one."""
    cdef Block* block = &op.block[b]
    cdef int64_t c
    cdef int phase
    cdef bint alone = not adds(engine, op, b)
    block.epoch = engine.epoch
    for phase in range(PHASES):
        block.sink[phase].open = 0
        block.sink[phase].broken = 0
    if not is_finalizer(engine, op, b):
        return
    for c in range(block.grid.chunks):
        if alone and op.states[block.state + c] == CHUNK_NONE:
            # An Exscan has nothing for the first of its ranks.
            if op.sig.kind != EXSCAN:
                memcpy(block.recv + c * block.grid.chunk_bytes,
                       block.send + c * block.grid.chunk_bytes, chunk_length(&block.grid, c))
            op.states[block.state + c] = CHUNK_PARTIAL
        if op.states[block.state + c] == CHUNK_PARTIAL:
            finalize_chunk(engine, op, block, c)


cdef inline int wire_phase(int phase) noexcept nogil:
    """What is asked for: to a rank that gives partial sums all who take them are alike."""
    return PARTIAL_PHASE if phase == RIGHT_PHASE else phase


cdef void tell_credit(Engine* engine, Operation* op, int b, int phase, bint opening) noexcept nogil:
    cdef Sink* sink = &op.block[b].sink[phase]
    cdef GrantBody grant
    cdef CreditBody credit
    if opening:
        memset(&grant, 0, sizeof(grant))
        grant.block = block_at(engine, op, b)
        grant.phase = wire_phase(phase)
        grant.tag = sink.tag
        grant.first = sink.first
        grant.end = sink.end
        grant.limit = sink.posted
        grant.nbytes = op.block[b].grid.nbytes
        send_message(engine, sink.source, MSG_GRANT, op.seq, &op.sig, &grant, sizeof(grant))
    else:
        memset(&credit, 0, sizeof(credit))
        credit.block = block_at(engine, op, b)
        credit.phase = wire_phase(phase)
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
    if sink_idle(sink):
        leave_landing(engine, &op.block[b], phase)


cdef void close_sinks(Engine* engine, Operation* op) noexcept nogil:
    cdef int b, phase
    for b in range(op.blocks):
        for phase in range(PHASES):
            close_sink(engine, op, b, phase)


cdef void cancel_sinks(Engine* engine, Operation* op) noexcept nogil:
    """Wants nothing more of an operation: whoever gives us something of it may let go of it."""
    cdef CreditBody credit
    cdef Sink* sink
    cdef int b, phase
    for b in range(op.blocks):
        for phase in range(PHASES):
            sink = &op.block[b].sink[phase]
            if not sink.open:
                continue
            close_sink(engine, op, b, phase)
            if sink.posted < sink.end:
                memset(&credit, 0, sizeof(credit))
                credit.block = block_at(engine, op, b)
                credit.phase = wire_phase(phase)
                credit.tag = sink.tag
                credit.limit = -1
                send_message(engine, sink.source, MSG_CREDIT, op.seq, &op.sig, &credit,
                             sizeof(credit))


cdef inline bint uses_slots(const Engine* engine, int phase) noexcept nogil:
    """Whether what comes to a landing stays in its slots until it is looked at."""
    return phase == RIGHT_PHASE or not engine.settings.sabotage & BREAK_DRAIN


cdef inline bint is_summed(uint8_t state) noexcept nogil:
    """Whether all that comes from below is in a chunk."""
    return state == CHUNK_PARTIAL or state == CHUNK_FINAL


cdef int64_t wanted_until(const Engine* engine, const Operation* op,
                          const Block* block) noexcept nogil:
    """How far partial sums may come to us in a tree."""
    cdef int64_t until = block.grid.chunks, window = engine.settings.window
    cdef int32_t index = block.outlets[<int>PARTIAL_PHASE]
    cdef const Outlet* outlet
    if engine.settings.sabotage & BREAK_SLOTS:
        return until
    if block.sink[<int>RIGHT_PHASE].open:
        # The other slots are not empty; and what comes from both sides comes equally fast.
        until = block.taken + window
    while index >= 0:
        outlet = &engine.outlets[index]
        # Not before those above us can take it: the links have other things to carry.
        if (outlet.epoch == engine.epoch and outlet.spring.next < outlet.spring.end
                and outlet.spring.next + window < until):
            until = outlet.spring.next + window
        index = outlet.next
    return until


cdef void pump_sink(Engine* engine, Operation* op, int b, int phase) noexcept nogil:
    """Asks for the next missing chunks of one phase, and posts receives ahead."""
    cdef Block* block = &op.block[b]
    cdef Sink* sink = &block.sink[phase]
    cdef uint8_t* states = op.states + block.state
    cdef int64_t first, end, gate, chunks = block.grid.chunks
    cdef int source
    cdef bint opening = False, gated
    cdef Landing* landing
    if sink.broken or (sink.open == 0 and block.finals == chunks):
        return
    gated = phase == FINAL_PHASE and adds(engine, op, b)
    if not sink.open:
        if not sink_idle(sink) or (phase == FINAL_PHASE and not is_wanted(engine, op, b)):
            return
        source = (final_source(engine, op, b) if phase == FINAL_PHASE
                  else partial_source(engine, op, b, phase))
        if source < 0 or is_gone(engine, source):
            return             # nobody would answer: a ballot will name another source
        first = 0
        if phase == PARTIAL_PHASE:
            while first < chunks and states[first] != CHUNK_NONE:
                first += 1
            end = first
            while end < chunks and states[end] == CHUNK_NONE:
                end += 1
        elif phase == RIGHT_PHASE:
            while first < chunks and is_summed(states[first]):
                first += 1
            end = first
            while end < chunks and not is_summed(states[end]):
                end += 1
        else:
            while first < chunks and states[first] == CHUNK_FINAL:
                first += 1
            end = first
            while end < chunks and states[end] != CHUNK_FINAL:
                end += 1
        if first == end or (gated and states[first] != CHUNK_PARTIAL):
            return
        if ((engine.host[source] != engine.host[engine.rank] or phase == RIGHT_PHASE
             or engine.settings.sabotage & BREAK_DRAIN)
                and not take_landing(engine, op, b, phase)):
            engine.broken = 1
            return
        engine.tags[0] = engine.tags[0] + 1 if engine.tags[0] < 0x3fffffff else 1
        sink_open(sink, source, engine.tags[0], first, end)
        block.sink_attempt[phase] = op.attempt
        if phase == RIGHT_PHASE:
            block.taken = first
        opening = True
    gate = sink.end
    if gated:
        # The final of a chunk lands where its partial sum is made: not before that was made.
        gate = sink.posted
        while gate < sink.end and states[gate] == CHUNK_PARTIAL:
            gate += 1
    elif op.twins and gate > wanted_until(engine, op, block):
        gate = wanted_until(engine, op, block)
    if block.landing[phase] >= 0:
        landing = &engine.landings[block.landing[phase]]
        landing.in_flight += <int32_t>sink_post(
            sink, engine.transport, &block.grid, block.recv,
            landing.slots if uses_slots(engine, phase) else NULL,
            engine.settings.window, gate, token_of(TOKEN_LANDING, block.landing[phase], 0))
    else:
        sink_post(sink, engine.transport, &block.grid, block.recv, NULL, engine.settings.window,
                  gate, token_of(TOKEN_SINK, op.seq % engine.settings.ring, b << 2 | phase))
    if opening:
        tell_credit(engine, op, b, phase, True)
    elif sink_credit_due(sink, engine.settings.window, TREE_PARTS if op.twins else CHAIN_PARTS):
        tell_credit(engine, op, b, phase, False)


cdef void pump_outlets(Engine* engine, Operation* op, int b, int phase) noexcept nogil:
    cdef Block* block = &op.block[b]
    cdef int32_t index = block.outlets[phase], next
    cdef Outlet* outlet
    cdef const unsigned char* base = block.recv
    cdef const uint8_t* states = op.states + block.state
    cdef const Grid* grid = &block.grid
    cdef int kind = TOKEN_SPRING
    cdef int wanted = CHUNK_FINAL if phase == FINAL_PHASE or is_scan(op.sig.kind) \
        else CHUNK_PARTIAL
    cdef int64_t count, before, c
    if index < 0 or op.status != STATUS_OK or (not op.complete and block.epoch != engine.epoch):
        return
    if op.done and op.retained != NULL:
        base = op.retained + block.offset
        kind = TOKEN_SPRING_RETAINED
    elif op.finished:
        return
    elif phase == PARTIAL_PHASE and not op.standing and not adds(engine, op, b):
        base = block.send
        states = NULL
    elif phase == PARTIAL_PHASE and op.sig.kind == EXSCAN:
        base = op.scratch
    elif block.out.nbytes:
        base = block.send
        states = NULL
        grid = &block.out
    while index >= 0:
        outlet = &engine.outlets[index]
        next = outlet.next
        if not outlet.early:
            before = outlet.spring.next
            count = spring_push(&outlet.spring, engine.transport, grid, base, states, wanted,
                                token_of(kind, index, 0))
            if count:
                if kind == TOKEN_SPRING_RETAINED:
                    op.in_flight_retained += <int32_t>count
                    outlet.retained += <int32_t>count
                else:
                    op.in_flight += <int32_t>count
                    block.in_flight += <int32_t>count
                engine.counters.chunks_sent += count
                for c in range(before, before + count):
                    engine.counters.bytes_sent += chunk_length(grid, c)
                    moved(engine, op, 1, chunk_length(grid, c))
            retire_outlet(engine, op, index)
        index = next


cdef bint is_active(const Engine* engine, const Operation* op) noexcept nogil:
    return op.seq < engine.done + engine.settings.active


cdef void pump_block(Engine* engine, Operation* op, int b) noexcept nogil:
    """Moves whatever of one block can be moved now."""
    cdef Block* block = &op.block[b]
    if not op.complete and is_active(engine, op) and not awaits_roll(op) \
            and not awaits_place(op):
        if block.epoch != engine.epoch and block_idle(block):
            open_block(engine, op, b)
        if block.epoch == engine.epoch:
            if op.twins:           # what was given away says how much is wanted
                pump_outlets(engine, op, b, PARTIAL_PHASE)
            pump_sink(engine, op, b, PARTIAL_PHASE)
            if op.twins:
                pump_sink(engine, op, b, RIGHT_PHASE)
            pump_sink(engine, op, b, FINAL_PHASE)
    pump_outlets(engine, op, b, PARTIAL_PHASE)
    pump_outlets(engine, op, b, FINAL_PHASE)


cdef void on_away(Engine* engine, int peer, const Head* head, const AwayBody* body) noexcept nogil:
    """The rank that we asked for a Bcast is late for it, and who comes before it has the bytes as
    well; or we are, and it has given them to another, who gives them to us."""
    cdef Operation* op = find_operation(engine, head.seq)
    cdef Sink* sink
    cdef int b
    if (op == NULL or not op.called or op.small or op.complete or head.epoch != engine.epoch
            or op.sig.kind != BCAST):
        return
    for b in range(op.blocks):
        sink = &op.block[b].sink[<int>FINAL_PHASE]
        if sink.source != peer or sink.tag != body.tag:
            continue
        engine.counters.detours += 1
        op.block[b].behind = body.behind
        if body.behind < 0:
            mask_add(&op.away, peer)
        sink.broken = 0
        close_sink(engine, op, b, FINAL_PHASE)
        pump_block(engine, op, b)


cdef void lose_patience(Engine* engine) noexcept nogil:
    """Goes around those who are late, and has others go around us."""
    cdef Operation* op
    cdef int64_t seq
    cdef int takers[2]
    cdef int i
    engine.patience_us = 0
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op == NULL or op.complete:
            continue
        if awaits_us(engine, op):
            if is_over(engine, op):
                send_around(engine, op)
            elif op.asked_us:
                wait_patiently(engine, op)
        elif op.called and op.sig.kind == BCAST and not op.small and op.awaited == 0:
            for i in range(final_takers(engine, op, op.blocks - 1, takers)
                           if is_over(engine, op) else 0):
                if mask_has(&op.asked, takers[i]) or is_gone(engine, takers[i]):
                    continue
                mask_add(&op.told, takers[i])
                send_message(engine, takers[i], MSG_CALLED, op.seq, &op.sig, NULL, 0)
            check_complete(engine, op)


cdef void check_complete(Engine* engine, Operation* op) noexcept nogil:
    """Once all that we need is there."""
    cdef int b
    if (op.complete or op.awaited or awaits_root(engine, op) or not is_active(engine, op)
            or awaits_roll(op) or awaits_place(op)):
        return
    if (op.sig.kind == BCAST and not is_asked(engine, op)
            and not engine.settings.sabotage & BREAK_ASKED):
        wait_patiently(engine, op)
        return
    if is_private(op.sig.kind) and not engine.settings.sabotage & BREAK_SEAL:
        engine.wholes_due |= not op.whole
        op.whole = 1              # complete when everyone is
        return
    op.complete = 1
    for b in range(op.blocks):    # those that were not opened in this epoch may serve now
        pump_outlets(engine, op, b, PARTIAL_PHASE)
        pump_outlets(engine, op, b, FINAL_PHASE)


cdef void pump_chunks(Engine* engine, Operation* op) noexcept nogil:
    """Moves whatever of an operation can be moved now."""
    cdef int i
    if op.small or not op.called:
        return
    for i in range(op.blocks):    # ranks begin with different ones
        pump_block(engine, op, (engine.rank + i) % op.blocks)
    check_complete(engine, op)


cdef bint awaits_root(const Engine* engine, const Operation* op) noexcept nogil:
    """What is only for the root is over for another rank when the root says so."""
    return ends_at_root(&op.sig) and op.sig.root != engine.rank


cdef void add_right(Engine* engine, Operation* op, int b) noexcept nogil:
    """Adds what came from behind us in the order of a tree to chunks in which all before us is."""
    cdef Block* block = &op.block[b]
    cdef Sink* sink = &block.sink[<int>RIGHT_PHASE]
    cdef bint only = partial_source(engine, op, b, PARTIAL_PHASE) < 0
    cdef bint makes_final = is_finalizer(engine, op, b)
    cdef uint8_t* states = op.states + block.state
    cdef unsigned char* slots
    cdef unsigned char* here
    cdef const unsigned char* left
    cdef const unsigned char* right
    cdef int64_t c
    if not sink.open:
        return
    slots = engine.landings[block.landing[<int>RIGHT_PHASE]].slots
    while block.taken < sink.arrived:
        c = block.taken
        if not only and states[c] != CHUNK_LEFT:
            break
        here = block.recv + c * block.grid.chunk_bytes
        left = block.send + c * block.grid.chunk_bytes if only else here
        right = slot_of_chunk(&block.grid, slots, engine.settings.window, c)
        if engine.settings.sabotage & BREAK_SIDES:
            left, right = right, left
        if not combine(engine, op, here, left, right, chunk_length(&block.grid, c)):
            return             # it is never complete here: its caller leaves
        states[c] = CHUNK_PARTIAL
        block.taken += 1
        if makes_final:
            finalize_chunk(engine, op, block, c)
    if block.taken == sink.end:
        sink.open = 0
        leave_landing(engine, block, RIGHT_PHASE)


cdef void chunk_received(Engine* engine, Operation* op, int b, int phase, int64_t chunk,
                         int64_t nbytes, const unsigned char* slot) noexcept nogil:
    """A chunk is here: in its place, or in a slot."""
    cdef Block* block = &op.block[b]
    cdef Sink* sink = &block.sink[phase]
    cdef uint8_t* state = op.states + block.state + chunk
    cdef int64_t at = chunk * block.grid.chunk_bytes
    cdef const unsigned char* left = block.recv + at
    cdef bint more
    if not sink.open:
        # Late, on a stream that was given up.  A final of this same attempt is still the final;
        # anything else only tells that what was in its place is gone.
        if phase == FINAL_PHASE:
            if block.sink_attempt[phase] == op.attempt and not op.complete:
                if slot != NULL:
                    memcpy(block.recv + at, slot, nbytes)
                make_final(op, block, chunk)
            elif state[0] != CHUNK_FINAL and slot == NULL:
                state[0] = CHUNK_NONE
        return
    engine.counters.chunks_received += 1
    engine.counters.bytes_received += nbytes
    if phase == RIGHT_PHASE:
        moved(engine, op, 1, nbytes)
        add_right(engine, op, b)
        return
    if slot != NULL:
        if phase == FINAL_PHASE or op.sig.kind == EXSCAN:
            memcpy(block.recv + at, slot, nbytes)
        else:
            left = slot
    if phase == FINAL_PHASE:
        make_final(op, block, chunk)
    else:
        if not combine(engine, op, op.scratch + at if op.sig.kind == EXSCAN else block.recv + at,
                       left, block.send + at, nbytes):
            return             # as there
        more = partial_source(engine, op, b, RIGHT_PHASE) >= 0
        state[0] = CHUNK_LEFT if more else CHUNK_PARTIAL
        if more:
            add_right(engine, op, b)
        elif is_finalizer(engine, op, b):
            finalize_chunk(engine, op, block, chunk)
    moved(engine, op, 1, nbytes)


cdef void on_arrival(Engine* engine, const Event* event, Operation* op, int part,
                     Landing* landing) noexcept nogil:
    """A receive of a sink has ended."""
    cdef int b = part >> 2, phase = part & 3
    cdef Block* block = &op.block[b]
    cdef Sink* sink = &block.sink[phase]
    cdef int64_t chunk = sink_arrived(sink)
    cdef uint8_t* state = op.states + block.state + chunk
    if event.kind == EVENT_RECEIVED and event.nbytes > 0:
        chunk_received(engine, op, b, phase, chunk, event.nbytes,
                       NULL if landing == NULL
                       or not uses_slots(engine, phase) else slot_of_chunk(
                           &block.grid, landing.slots, engine.settings.window, chunk))
    else:
        if (event.kind == EVENT_LOST and landing == NULL and state[0] != CHUNK_FINAL
                and not engine.settings.sabotage & BREAK_LOST):
            state[0] = CHUNK_NONE      # where it was to land, anything may have been written
        # Asked again it would say the same; another, to whom it sent us, is asked.
        sink.broken = op.sig.kind != BCAST or final_source(engine, op, b) == sink.source
        close_sink(engine, op, b, phase)
    if sink.open and sink.arrived == sink.end and phase != RIGHT_PHASE:
        sink.open = 0
    if not sink.open and sink_idle(sink):
        leave_landing(engine, block, phase)
    if op.called:
        pump_block(engine, op, b)
        check_complete(engine, op)


cdef void on_sent(Engine* engine, int32_t index, bint retained) noexcept nogil:
    """A send of an outlet has ended."""
    cdef Outlet* outlet = &engine.outlets[index]
    cdef int b = outlet.block
    cdef Operation* op
    outlet.spring.in_flight -= 1
    if outlet.stray:
        if outlet.spring.in_flight == 0:
            free_outlet(engine, index)
        return
    op = find_operation(engine, outlet.seq)
    if retained:
        op.in_flight_retained -= 1
        outlet.retained -= 1
    else:
        op.in_flight -= 1
        op.block[b].in_flight -= 1
    retire_outlet(engine, op, index)
    if not op.complete and op.block[b].epoch != engine.epoch:
        pump_block(engine, op, b)      # it may be idle now
        check_complete(engine, op)


cdef void on_data_event(Engine* engine, const Event* event) noexcept nogil:
    cdef int kind = <int>(event.token >> 60)
    cdef int64_t index = (event.token >> 12) & 0x7fffffff
    cdef Landing* landing
    if kind == TOKEN_SINK:
        on_arrival(engine, event, &engine.ring[index], event.token & 0xfff, NULL)
    elif kind == TOKEN_LANDING:
        landing = &engine.landings[index]
        landing.in_flight -= 1
        if not landing.stray:
            on_arrival(engine, event, find_operation(engine, landing.seq), landing.part, landing)
        elif landing.in_flight == 0:
            free_landing(engine, <int32_t>index)
    else:
        on_sent(engine, <int32_t>index, kind == TOKEN_SPRING_RETAINED)


# ---- what others ask us for ----------------------------------------------------------------

cdef void on_grant(Engine* engine, int peer, const Head* head,
                   const GrantBody* body) noexcept nogil:
    cdef Operation* op
    cdef Outlet* outlet
    cdef int32_t index
    cdef Mask members = members_of(engine, engine.epoch)
    if (head.epoch < engine.epoch or mask_has(&engine.dead, peer) or engine.leaving
            or engine.stopped or not mask_has(&members, peer)):
        void_stream(engine, peer, body.tag, body.limit - body.first)
        return
    op = claim(engine, head.seq)
    if op == NULL:
        if head.seq >= engine.freed:
            engine.broken = 1
        void_stream(engine, peer, body.tag, body.limit - body.first)
        return
    compare_signature(engine, op, peer, &head.sig)
    index = engine.outlet_free
    if index >= 0:
        engine.outlet_free = engine.outlets[index].next
    elif engine.outlets_made < engine.settings.outlets_max:
        index = engine.outlets_made
        engine.outlets_made += 1
    else:
        engine.broken = 1
        return
    outlet = &engine.outlets[index]
    engine.outlets_used += 1
    memset(outlet, 0, sizeof(Outlet))
    outlet.used = 1
    outlet.seq = head.seq
    outlet.nbytes = body.nbytes
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
    if not attach(engine, op, index):
        keep_early(engine, op, index)
    drop_told(engine, op, index)
    if awaits_us(engine, op):
        wait_patiently(engine, op)
        if is_over(engine, op):
            send_around(engine, op)
        return
    if send_behind(engine, op, index):
        check_complete(engine, op)
        return
    if engine.outlets[index].attached:
        if op.forgotten and op.finished:
            refuse_outlets(engine, op)
            return
        pump_block(engine, op, body.block)
        check_complete(engine, op)


cdef void on_credit(Engine* engine, int peer, const Head* head,
                    const CreditBody* body) noexcept nogil:
    cdef Operation* op = find_operation(engine, head.seq)
    cdef Outlet* outlet
    cdef int32_t index
    cdef int pass_
    if op != NULL:
        for pass_ in range(2):
            index = op.early
            if pass_ == 0:
                index = op.block[body.block].outlets[body.phase] if body.block < op.blocks else -1
            while index >= 0:
                outlet = &engine.outlets[index]
                if (outlet.spring.dest == peer and outlet.spring.tag == body.tag
                        and outlet.spring.end >= body.limit):
                    if body.limit < 0:          # it wants nothing more
                        outlet.spring.end = outlet.spring.limit
                        retire_outlet(engine, op, index)
                        return
                    outlet.spring.limit = body.limit
                    if outlet.attached and op.twins:
                        pump_block(engine, op, body.block)
                    elif outlet.attached:
                        pump_outlets(engine, op, body.block, body.phase)
                    return
                index = outlet.next
    void_stream(engine, peer, body.tag, body.limit - body.told)
