# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The state machine of one operation: its streams, its small-message path, its completion.

An operation is *complete* here when our part of the result is there, *done* when every earlier one
is done too and no ballot holds us frozen (a promise to everyone: a done operation always stands),
*stable* when it is done at every living rank, and *finished* when the caller has it back.
"""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memset
from cython_kernels.transport cimport Event, Transport, EVENT_SENT, EVENT_RECEIVED, EVENT_LOST
from cython_kernels.stream cimport (
    Grid, Sink, Spring, CHUNK_NONE, CHUNK_PARTIAL, CHUNK_FINAL, make_grid, chunk_length, sink_open,
    sink_post, sink_arrived, sink_credit_due, sink_idle, spring_push, spring_close, send_voids)
from cython_kernels.reduction cimport reduce_into, divide
from hopcoll._state cimport *
from hopcoll._plan cimport (
    block_count, block_start, chain_prefix, partial_source, final_source, is_finalizer)

cdef enum:
    AVG = 10
    TOKEN_SINK = 1
    TOKEN_SPRING = 2
    TOKEN_SPRING_RETAINED = 3


# ---- tokens and messages ------------------------------------------------------------------

cdef inline int64_t token_of(int kind, int64_t index, int64_t part) noexcept nogil:
    return (<int64_t>kind << 60) | (index << 8) | part


cdef void send_message(Engine* engine, int dest, int type, int64_t seq, const Signature* sig,
                       const void* body, int64_t nbytes) noexcept nogil:
    cdef Head head
    memset(&head, 0, sizeof(Head))
    head.type = type
    head.epoch = engine.epoch
    head.seq = seq
    head.done = engine.done
    head.stable = engine.stable
    if sig != NULL:
        head.sig = sig[0]
    engine.counters.controls_sent += 1
    engine.transport.send_control(engine.transport.self, dest, &head, sizeof(Head), body, nbytes)


cdef void merge_watermarks(Engine* engine, int peer, const Head* head) noexcept nogil:
    if head.done > engine.peer_done[peer]:
        engine.peer_done[peer] = head.done
    if head.stable > engine.stable:
        engine.stable = head.stable


# ---- records ------------------------------------------------------------------------------

cdef Operation* claim(Engine* engine, int64_t seq) noexcept nogil:
    """The record of operation `seq`, made when it is new; NULL when its slot is taken."""
    cdef Operation* op = slot_of(engine, seq)
    cdef int b
    if op.seq == seq:
        return op
    if op.seq >= 0 or seq < engine.freed or seq >= engine.freed + engine.settings.ring:
        return NULL
    memset(op, 0, sizeof(Operation))
    op.seq = seq
    op.sig_from = -1
    op.attempt = -1
    for b in range(BLOCKS_MAX):
        op.holder[b] = NOBODY
        op.block[b].epoch = -1
        op.block[b].outlets[0] = -1
        op.block[b].outlets[1] = -1
    return op


cdef void release_memory(Engine* engine, void* memory) noexcept nogil:
    if memory != NULL:
        engine.transport.release(engine.transport.self, memory)


cdef bint record_quiet(const Operation* op) noexcept nogil:
    cdef int b
    if op.in_flight or op.in_flight_retained:
        return False
    for b in range(BLOCKS_MAX):
        if (op.block[b].outlets[0] >= 0 or op.block[b].outlets[1] >= 0
                or not sink_idle(&op.block[b].sink[0]) or not sink_idle(&op.block[b].sink[1])):
            return False
    return True


cdef void free_records(Engine* engine) noexcept nogil:
    cdef Operation* op
    while engine.freed < engine.finished and engine.freed < engine.stable:
        op = find_operation(engine, engine.freed)
        if op != NULL:
            if not record_quiet(op):
                return
            if op.retained != NULL:
                engine.retained_bytes -= op.nbytes
            release_memory(engine, op.scratch)
            release_memory(engine, op.undo)
            release_memory(engine, op.retained)
            release_memory(engine, op.inbox)
            release_memory(engine, op.states)
            memset(op, 0, sizeof(Operation))
            op.seq = -1
        engine.freed += 1


# ---- what membership means for an operation -----------------------------------------------

cdef Mask attempt_members(const Engine* engine, const Operation* op) noexcept nogil:
    return members_of(engine, op.attempt)


cdef int fate_of(const Engine* engine, const Operation* op, Mask* failed) noexcept nogil:
    """The status that the history of memberships gives to an operation: alike at all ranks."""
    cdef int i
    cdef Mask before, lost, members = attempt_members(engine, op)
    cdef int status = STATUS_OK
    failed[0] = mask_none()
    for i in range(op.attempt):
        if engine.history[i].kind == ENTRY_MISMATCH and engine.history[i].cut <= op.seq:
            return STATUS_MISMATCH
    if op.sig.flags & FLAG_RAISE:
        for i in range(op.attempt):
            if (engine.history[i].kind == ENTRY_DEATH and engine.history[i].cut <= op.seq
                    and engine.history[i].cut > op.previous_raise):
                before = members_of(engine, i)
                lost = mask_without(&before, &engine.history[i].members)
                failed[0] = mask_or(failed, &lost)
                status = STATUS_RANK_FAILED
        if status != STATUS_OK:
            return status
    if op.sig.kind == BCAST and not mask_has(&members, op.sig.root):
        mask_add(failed, op.sig.root)
        return STATUS_RANK_FAILED
    if op.sig.kind == REDUCE and not mask_has(&members, op.sig.root):
        return STATUS_ROOT_LOST
    return STATUS_OK


cdef void refresh_attempt(Engine* engine, Operation* op) noexcept nogil:
    cdef Mask failed
    op.attempt = attempt_of(engine, op.seq)
    op.status = fate_of(engine, op, &failed)
    if op.status != STATUS_OK:
        op.complete = 1


# ---- starting -----------------------------------------------------------------------------

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


cdef int64_t inbox_slots(const Engine* engine, const Signature* sig) noexcept nogil:
    return 1 if sig.kind == BCAST else engine.size


cdef bint store_contribution(Engine* engine, Operation* op, int rank, const unsigned char* data,
                             int64_t nbytes) noexcept nogil:
    cdef int64_t slot = 0 if op.sig.kind == BCAST else rank
    if op.inbox != NULL and nbytes != op.nbytes:
        return True                     # a wrong call: its signature tells the coordinator
    if nbytes > 0:
        if op.inbox == NULL:
            op.nbytes = nbytes
            op.inbox = <unsigned char*>engine.transport.allocate(
                engine.transport.self, inbox_slots(engine, &op.sig) * nbytes)
            if op.inbox == NULL:
                return False
        memcpy(op.inbox + slot * op.nbytes, data, nbytes)
    mask_add(&op.have, rank)
    return True


cdef void forget_start(Engine* engine, Operation* op) noexcept nogil:
    """Out of memory before anything was sent: the record is again that of an operation that we
    have not called."""
    release_memory(engine, op.undo)
    release_memory(engine, op.scratch)
    release_memory(engine, op.states)
    if op.small:
        release_memory(engine, op.retained)
    op.undo = op.scratch = op.retained = op.base = NULL
    op.states = NULL
    op.send = NULL
    op.result = NULL
    op.blocks = 0
    mask_drop(&op.have, engine.rank)


cdef int start_operation(Engine* engine, const Signature* sig, int64_t item_bytes,
                         const unsigned char* send, unsigned char* recv, int flags,
                         Result* result) noexcept nogil:
    """Enters the next operation of the communicator; START_AGAIN when too many are open."""
    cdef int64_t seq = engine.next_seq
    cdef int64_t nbytes = sig.count * item_bytes
    cdef Operation* op
    cdef Mask out
    cdef int r, failed = START_OK
    cdef bint mismatch
    if seq >= engine.freed + engine.settings.ring // 2:
        return START_AGAIN
    op = claim(engine, seq)
    if op == NULL:
        return START_AGAIN
    mismatch = op.sig_from >= 0 and not signature_equal(&op.sig, sig)
    if mismatch and op.inbox != NULL:      # it was laid out for the other signature
        release_memory(engine, op.inbox)
        op.inbox = NULL
        op.have = mask_none()
    op.small = nbytes <= engine.settings.eager_bytes
    op.sig = sig[0]
    op.sig_from = engine.rank
    op.nbytes = nbytes
    op.item_bytes = item_bytes
    op.base = recv
    op.send = send
    op.previous_raise = engine.last_raise
    op.called_us = engine.now_us
    op.result = result
    # Everything that can fail comes before the first message.
    if flags & FLAG_IN_PLACE and not op.small:
        op.undo = <unsigned char*>engine.transport.allocate(engine.transport.self, nbytes)
        if op.undo == NULL:
            failed = START_NO_MEMORY
        else:
            memcpy(op.undo, recv, nbytes)
            op.send = op.undo
    elif flags & FLAG_IN_PLACE:
        op.send = recv
    if not op.small and failed == START_OK:
        failed = prepare_blocks(engine, op)
        if failed == START_OK and op.base == NULL:
            op.scratch = <unsigned char*>engine.transport.allocate(engine.transport.self, nbytes)
            if op.scratch == NULL:
                failed = START_NO_MEMORY
            op.base = op.scratch
    elif op.small:
        if op.retained == NULL:
            op.retained = <unsigned char*>engine.transport.allocate(engine.transport.self,
                                                                    nbytes + 1)
        if op.retained == NULL:
            failed = START_NO_MEMORY
        elif op.sig.kind == BCAST:
            if sig.root == engine.rank and not store_contribution(engine, op, engine.rank, recv,
                                                                  nbytes):
                failed = START_NO_MEMORY
        elif not store_contribution(engine, op, engine.rank, op.send, nbytes):
            failed = START_NO_MEMORY
        if failed == START_OK:
            engine.retained_bytes += nbytes
    if failed != START_OK:
        forget_start(engine, op)
        return failed
    op.called = 1
    op.born = engine.epoch
    engine.next_seq = seq + 1
    result.seq = seq
    if sig.flags & FLAG_RAISE:
        engine.last_raise = seq
    refresh_attempt(engine, op)
    if mismatch:
        complain(engine, op)
    if op.small and op.status == STATUS_OK and (op.sig.kind != BCAST
                                                or op.sig.root == engine.rank):
        out = gone(engine)
        for r in range(engine.size):
            if r != engine.rank and not mask_has(&out, r):
                send_message(engine, r, MSG_EAGER, seq, &op.sig,
                             recv if op.sig.kind == BCAST else op.send, nbytes)
    check_chunk_faults(engine, op)
    pump(engine, op)
    settle(engine)
    return START_OK


# ---- the small path -----------------------------------------------------------------------

cdef void try_small(Engine* engine, Operation* op) noexcept nogil:
    """Completes a small operation once all contributions are here: every rank folds them in rank
    order, so that all have the same bits."""
    cdef Mask members
    cdef int r, folded = 0
    if not op.called or op.complete:
        return
    members = attempt_members(engine, op)
    if op.sig.kind == BCAST:
        if not mask_has(&op.have, op.sig.root):
            fetch(engine, op)
            return
        if op.nbytes:
            memcpy(op.retained, op.inbox, op.nbytes)
        op.complete = 1
        return
    if not mask_within(&members, &op.have):
        fetch(engine, op)
        return
    if op.nbytes and op.sig.kind != BARRIER:
        for r in range(engine.size):
            if mask_has(&members, r):
                if not folded:
                    memcpy(op.retained, op.inbox + r * op.nbytes, op.nbytes)
                else:
                    reduce_into(op.sig.dtype, op.sig.redop, op.retained, op.retained,
                                op.inbox + r * op.nbytes, op.sig.count)
                folded += 1
        if op.sig.redop == AVG:
            divide(op.sig.dtype, op.retained, op.sig.count, folded)
    op.complete = 1


cdef void fetch(Engine* engine, Operation* op) noexcept nogil:
    """A STAND without us: what the dead had sent to others is asked for, once an epoch."""
    if (op.standing and op.fetched != engine.epoch + 1 and op.holder[0] != NOBODY
            and op.holder[0] != engine.rank):
        op.fetched = engine.epoch + 1
        send_message(engine, op.holder[0], MSG_FETCH, op.seq, &op.sig, NULL, 0)


# ---- chunks -------------------------------------------------------------------------------

cdef void check_chunk_faults(Engine* engine, Operation* op) noexcept nogil:
    cdef int i
    for i in range(engine.faults):
        if (engine.fault[i].ballot == 0 and engine.fault[i].time_us < 0
                and engine.fault[i].seq == op.seq and op.moved_chunks >= engine.fault[i].chunk
                and op.called):
            engine.fire(engine.fault_context, engine, &engine.fault[i], i)


cdef inline void moved(Engine* engine, Operation* op, int64_t chunks, int64_t nbytes) noexcept nogil:
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
        source = partial_source(engine, op, b) if phase == PARTIAL_PHASE else final_source(engine, op, b)
        if source < 0:
            return
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
        if not outlet.early:
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


cdef void pump(Engine* engine, Operation* op) noexcept nogil:
    """Moves whatever of an operation can be moved now."""
    cdef int b, phase
    cdef int64_t finals = 0
    cdef Block* block
    if op.small:
        if not op.complete:
            try_small(engine, op)
        return
    if not op.called:
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


cdef void check_root_done(Engine* engine, Operation* op) noexcept nogil:
    if op.called and not op.complete and not op.small and needs_watermark(engine, op):
        if op.standing or engine.peer_done[op.sig.root] > op.seq:
            op.complete = 1


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
        pump(engine, op)
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
            pump(engine, op)      # the block may be idle now


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


cdef void on_grant(Engine* engine, int peer, const Head* head, const GrantBody* body) noexcept nogil:
    cdef Operation* op
    cdef Outlet* outlet
    cdef int32_t index
    if head.epoch < engine.epoch or mask_has(&engine.dead, peer):
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
    outlet.spring.dest = peer
    outlet.spring.tag = body.tag
    outlet.spring.next = body.first
    outlet.spring.end = body.end
    outlet.spring.limit = body.limit
    outlet.next = op.block[body.block].outlets[body.phase]
    op.block[body.block].outlets[body.phase] = index
    pump(engine, op)


cdef void on_credit(Engine* engine, int peer, const Head* head, const CreditBody* body) noexcept nogil:
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


# ---- signatures ---------------------------------------------------------------------------

cdef void complain(Engine* engine, Operation* op) noexcept nogil:
    cdef int coordinator = coordinator_of(engine)
    if op.complained == engine.epoch + 1 or engine.poisoned:
        return
    op.complained = engine.epoch + 1
    if coordinator == engine.rank:
        engine.complaint = 1
    else:
        send_message(engine, coordinator, MSG_COMPLAIN, op.seq, &op.sig, NULL, 0)


cdef bint compare_signature(Engine* engine, Operation* op, int peer, const Signature* sig) noexcept nogil:
    if op.sig_from < 0:
        op.sig = sig[0]
        op.sig_from = peer
        return True
    if signature_equal(&op.sig, sig):
        return True
    complain(engine, op)
    return False


cdef void announce_stuck(Engine* engine) noexcept nogil:
    """An operation that does not get on tells the coordinator what we called it for: ranks that
    wait for each other in different operations learn of it that way."""
    cdef Operation* op = find_operation(engine, engine.done)
    cdef int coordinator = coordinator_of(engine)
    if (op == NULL or not op.called or op.complete or op.announced == engine.epoch + 1
            or engine.now_us - op.called_us < engine.settings.announce_us):
        return
    op.announced = engine.epoch + 1
    if coordinator != engine.rank:
        send_message(engine, coordinator, MSG_ANNOUNCE, op.seq, &op.sig, NULL, 0)


# ---- messages -----------------------------------------------------------------------------

cdef void on_operation_message(Engine* engine, int peer, const Head* head,
                               const unsigned char* body, int64_t nbytes) noexcept nogil:
    cdef Operation* op
    cdef ResultBody* answer
    if head.type == MSG_GRANT:
        on_grant(engine, peer, head, <const GrantBody*>body)
        return
    if head.type == MSG_CREDIT:
        on_credit(engine, peer, head, <const CreditBody*>body)
        return
    if head.type == MSG_FETCH:
        op = find_operation(engine, head.seq)
        if op != NULL and op.called and op.complete and op.small and op.status == STATUS_OK \
                and op.retained != NULL:
            answer = <ResultBody*>engine.outbox
            answer.attempt = op.attempt
            answer.pad = 0
            if op.nbytes:
                memcpy(engine.outbox + sizeof(ResultBody), op.retained, op.nbytes)
            send_message(engine, peer, MSG_RESULT, op.seq, &op.sig, answer,
                         sizeof(ResultBody) + op.nbytes)
        return
    if head.seq < engine.freed:
        return
    op = claim(engine, head.seq)
    if op == NULL:
        engine.broken = 1
        return
    if head.type == MSG_RESULT:
        answer = <ResultBody*>body
        if (op.called and op.small and not op.complete and answer.attempt == op.attempt
                and nbytes == op.nbytes + <int64_t>sizeof(ResultBody)):
            if op.nbytes:
                memcpy(op.retained, body + sizeof(ResultBody), op.nbytes)
            op.complete = 1
        return
    if not compare_signature(engine, op, peer, &head.sig):
        return
    if head.type == MSG_EAGER:
        if not mask_has(&op.have, peer) and not op.done:
            if op.called and nbytes != op.nbytes:
                return
            if not store_contribution(engine, op, peer, body, nbytes):
                engine.broken = 1
        if op.called:
            try_small(engine, op)


# ---- completion ---------------------------------------------------------------------------

cdef void mark_done(Engine* engine, Operation* op) noexcept nogil:
    cdef Mask out
    cdef int r
    op.done = 1
    if op.status != STATUS_OK:
        op.keeps_nothing = 1
    elif op.small:
        if op.base != NULL and op.nbytes:
            memcpy(op.base, op.retained, op.nbytes)
    elif op.sig.kind == REDUCE:
        op.keeps_nothing = 1
    elif (op.nbytes <= engine.settings.retain_bytes_max and engine.retained_bytes + op.nbytes
            <= engine.settings.retain_budget_bytes):
        op.retained = <unsigned char*>engine.transport.allocate(engine.transport.self, op.nbytes)
        if op.retained != NULL:
            memcpy(op.retained, op.base, op.nbytes)
            engine.retained_bytes += op.nbytes
    engine.done = op.seq + 1
    engine.peer_done[engine.rank] = engine.done
    if not op.small:
        engine.watermark_due = 1
        if op.sig.kind == REDUCE and op.sig.root == engine.rank and op.status == STATUS_OK:
            out = gone(engine)
            for r in range(engine.size):
                if r != engine.rank and not mask_has(&out, r):
                    send_message(engine, r, MSG_WATERMARK, op.seq, NULL, NULL, 0)


cdef bint may_finish(const Engine* engine, const Operation* op) noexcept nogil:
    cdef int b
    if op.in_flight:
        return False
    for b in range(op.blocks):
        if not (sink_idle(&op.block[b].sink[0]) and sink_idle(&op.block[b].sink[1])):
            return False
    return (op.keeps_nothing or op.small or op.retained != NULL or op.seq < engine.stable
            or (engine.settings.sabotage & BREAK_RETENTION) != 0)


cdef void finish(Engine* engine, Operation* op) noexcept nogil:
    cdef Result* result = op.result
    op.finished = 1
    op.result = NULL
    if op.undo != NULL and op.status != STATUS_OK:
        memcpy(op.base, op.undo, op.nbytes)      # a failed IN_PLACE gives the input back
    op.base = NULL
    op.send = NULL
    if result == NULL:
        return
    result.status = fate_of(engine, op, &result.failed)
    result.epoch = op.attempt
    result.contributors = attempt_members(engine, op)
    result.complete = 1


cdef void update_stable(Engine* engine) noexcept nogil:
    cdef Mask members = members_of(engine, engine.epoch)
    cdef int64_t low = engine.done
    cdef int r
    for r in range(engine.size):
        if mask_has(&members, r) and not mask_has(&engine.left, r) and engine.peer_done[r] < low:
            low = engine.peer_done[r]
            if low <= engine.stable:
                return
    if low > engine.stable:
        engine.stable = low


cdef void flush_watermark(Engine* engine) noexcept nogil:
    """Tells the coordinator how far we are; the coordinator tells all what is stable."""
    cdef int coordinator = coordinator_of(engine)
    cdef Mask out
    cdef int r
    engine.watermark_due = 0
    engine.watermark_us = engine.now_us
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


cdef void settle(Engine* engine) noexcept nogil:
    """Completes, in order, what is complete; finishes and frees what may be."""
    cdef Operation* op
    cdef int64_t seq, stable = engine.stable
    cdef int64_t until
    cdef int quarter = engine.settings.ring // 4
    while True:
        op = find_operation(engine, engine.done)
        if op == NULL or not op.called:
            break
        if not op.complete:
            check_root_done(engine, op)
        if not op.complete or (engine.frozen and not engine.settings.sabotage & BREAK_FREEZE):
            break
        mark_done(engine, op)
        until = engine.done + engine.settings.active
        for seq in range(engine.done, until if until < engine.next_seq else engine.next_seq):
            op = find_operation(engine, seq)      # one more may move chunks now
            if op != NULL and op.called and not op.small and not op.complete:
                pump(engine, op)
    update_stable(engine)
    while engine.finished < engine.done:
        op = find_operation(engine, engine.finished)
        if not may_finish(engine, op):
            break
        finish(engine, op)
        engine.finished += 1
    free_records(engine)
    if coordinator_of(engine) == engine.rank:
        if engine.watermark_due and engine.told_stable < engine.stable:
            flush_watermark(engine)
        elif engine.stable - engine.told_stable >= quarter:
            flush_watermark(engine)
    elif engine.watermark_due or engine.done - engine.told_done >= quarter:
        flush_watermark(engine)


# ---- a new epoch --------------------------------------------------------------------------

cdef void rerun(Engine* engine, Operation* op, int previous) noexcept nogil:
    """The result starts anew without the dead; partial sums that none of them is part of stay."""
    cdef int b
    cdef int64_t c
    cdef Block* block
    cdef Mask lost, before, tainted
    cdef Mask old = members_of(engine, previous)
    cdef Mask new = attempt_members(engine, op)
    cdef uint8_t* state
    engine.counters.reruns += 1
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


cdef void enter_epoch(Engine* engine, int previous) noexcept nogil:
    """After a decision: all streams end, answered by voids, and begin again where they stood."""
    cdef int64_t seq
    cdef int32_t index
    cdef int b, old
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
    for seq in range(engine.done, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op == NULL or not op.called or op.done:
            continue
        old = op.attempt
        if op.status != STATUS_OK:
            op.complete = 0
        if attempt_of(engine, seq) != old and not (
                engine.settings.sabotage & BREAK_ORDERED_CUT and op.complete):
            op.complete = 0
            refresh_attempt(engine, op)
            if op.status == STATUS_OK:
                rerun(engine, op, old)
            else:
                engine.counters.reruns += 1
        elif not op.complete:
            refresh_attempt(engine, op)
    engine.told_done = -1
    engine.told_stable = -1
    engine.watermark_due = 1
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        op = find_operation(engine, seq)
        if op != NULL and op.called:
            pump(engine, op)
    settle(engine)
