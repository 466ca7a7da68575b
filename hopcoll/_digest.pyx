# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The digest of a world, by which an exploration knows it again.

Two worlds with one digest behave alike from here on, because what is left out is never read again
or read only by comparing:

- addresses: the memory behind them is hashed by its contents;
- counters, and faults, which are off;
- tags of streams: only compared, and unique per receiver: renamed in the order in which they are
  met; outlets: named by their place in their lists instead of by their slot;
- clocks: only differences count, up to the longest delay that a rank waits for;
- the statuses of a ballot that is not open, the outbox, what a closed stream had been;
- everything about a dead rank but what it sent, in its channels.
"""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memset
from cython_kernels.stream cimport Sink, chunk_length, slot_of_chunk
from hopcoll._state cimport *
from hopcoll._fan cimport fans
from hopcoll._merge cimport status_at, status_length
from hopcoll._plan cimport is_from_root
from hopcoll._network cimport Channel, DataMessage, Late, Port, Posted, channel_of
from hopcoll._world cimport *
from hopcoll._script cimport *
from hopcoll._explorer cimport IN_TURNS, TAGS_MAX, Explorer

cdef enum:
    TOKEN_KIND_SINK = 1
    TOKEN_KIND_LANDING = 4


cdef int64_t head_bytes(World* world) noexcept nogil:
    cdef Channel* end = world.network.channels + world.size * world.size
    return <unsigned char*>end - <unsigned char*>world


cdef bint keeps_answers(const Engine* engine) noexcept nogil:
    return engine.stage != STAGE_NONE or (engine.frozen and engine.passing.children)


cdef uint64_t mix(uint64_t h, uint64_t word) noexcept nogil:
    h = (h ^ word) * 0xff51afd7ed558ccdULL
    return h ^ (h >> 32)


cdef uint64_t mix_bytes(uint64_t h, const void* data, int64_t nbytes) noexcept nogil:
    cdef const uint64_t* words = <const uint64_t*>data
    cdef const uint8_t* tail = <const uint8_t*>data
    cdef uint64_t last = 0, b = 0x9E3779B97F4A7C15ULL, c = 0xBF58476D1CE4E5B9ULL
    cdef uint64_t d = 0x94D049BB133111EBULL
    cdef int64_t i
    for i in range(nbytes >> 5):          # four chains, so that none need wait for another
        h = (h ^ words[4 * i]) * 0xff51afd7ed558ccdULL
        b = (b ^ words[4 * i + 1]) * 0xc4ceb9fe1a85ec53ULL
        c = (c ^ words[4 * i + 2]) * 0xff51afd7ed558ccdULL
        d = (d ^ words[4 * i + 3]) * 0xc4ceb9fe1a85ec53ULL
        h ^= h >> 32
        b ^= b >> 32
        c ^= c >> 32
        d ^= d >> 32
    for i in range((nbytes >> 5) << 2, nbytes >> 3):
        h = mix(h, words[i])
    h = mix(mix(mix(h, b), c), d)
    for i in range(nbytes & ~7, nbytes):
        last = last << 8 | tail[i]
    return mix(h, last ^ <uint64_t>nbytes << 32)


cdef uint64_t tag_name(Explorer* x, int receiver, int tag) noexcept nogil:
    cdef int i
    for i in range(x.tag_count[receiver]):
        if x.tags[receiver][i] == tag:
            return i
    if x.tag_count[receiver] == TAGS_MAX:
        x.stopped = 3
        return 0
    x.tags[receiver][x.tag_count[receiver]] = tag
    x.tag_count[receiver] += 1
    return x.tag_count[receiver] - 1


cdef uint64_t token_name(Explorer* x, int rank, int64_t token) noexcept nogil:
    cdef int kind = <int>(token >> 60)
    cdef const Landing* landing
    if kind <= TOKEN_KIND_SINK:
        return token
    if kind == TOKEN_KIND_LANDING:
        landing = &x.world.ranks[rank].engine.landings[(token >> 12) & 0x7fffffff]
        return (<uint64_t>kind << 60 | <uint64_t>landing.seq << 12 | <uint64_t>landing.part
                | <uint64_t>landing.stray << 48)
    return <uint64_t>kind << 60 | x.outlet_name[rank][(token >> 12) & 0x7fffffff]


cdef int64_t waited(int64_t since, int64_t now, int64_t limit) noexcept nogil:
    return now - since if now - since < limit else limit


cdef inline bint is_over(const Sink* sink) noexcept nogil:
    return not sink.open and sink.arrived == sink.posted


cdef uint64_t mix_block(const Engine* engine, uint64_t h, const Block* block) noexcept nogil:
    cdef const Sink* sink
    cdef int phase
    cdef int64_t c
    h = mix(h, block.finals)
    h = mix(h, <uint64_t>block.epoch << 32 | block.in_flight)
    h = mix(h, <uint64_t>block.behind << 32 ^ <uint64_t>block.taken)
    for phase in range(PHASES):
        sink = &block.sink[phase]
        if is_over(sink):
            h = mix(h, 0xC105ED ^ <uint64_t>sink.broken)
            continue
        h = mix(h, <uint64_t>sink.source << 32 | <uint64_t>sink.open << 8 | <uint64_t>sink.broken)
        h = mix(h, <uint64_t>sink.first << 32 | <uint64_t>sink.end)
        h = mix(h, <uint64_t>sink.posted << 32 | <uint64_t>sink.arrived)
        h = mix(h, <uint64_t>sink.told << 32 | <uint64_t>block.sink_attempt[phase])
        for c in range(block.taken if phase == RIGHT_PHASE and sink.open else sink.arrived,
                       sink.arrived):
            h = mix_bytes(h, slot_of_chunk(&block.grid, engine.landings[
                block.landing[phase]].slots, engine.settings.window, c),
                          chunk_length(&block.grid, c))
    return h


cdef uint64_t mix_outlets(Explorer* x, uint64_t h, int rank, const Engine* engine,
                          int32_t index) noexcept nogil:
    cdef const Outlet* outlet
    while index >= 0:
        outlet = &engine.outlets[index]
        if not outlet.attached:
            h = mix(h, <uint64_t>outlet.block << 32 | <uint64_t>outlet.phase)
            h = mix(h, <uint64_t>outlet.sig.kind << 32 ^ <uint64_t>outlet.sig.count)
            h = mix(h, outlet.nbytes)
        x.outlet_name[rank][index] = x.outlet_count[rank]
        x.outlet_count[rank] += 1
        h = mix(h, 0x0071E7 ^ <uint64_t>outlet.epoch << 32 ^ <uint64_t>outlet.early << 60)
        h = mix(h, <uint64_t>outlet.spring.dest << 32
                | tag_name(x, outlet.spring.dest, outlet.spring.tag))
        h = mix(h, <uint64_t>outlet.spring.next << 32 | <uint64_t>outlet.spring.end)
        h = mix(h, <uint64_t>outlet.spring.limit << 32 | <uint64_t>outlet.spring.in_flight)
        index = outlet.next
    return mix(h, 0xE0D)


cdef uint64_t mix_names(Explorer* x, uint64_t h, int rank, const Engine* engine,
                        const Operation* op) noexcept nogil:
    """What an operation has that is named by the order in which it is met in the whole world."""
    cdef const Block* block
    cdef int b, phase
    for b in range(op.blocks):
        block = &op.block[b]
        for phase in range(PHASES):
            if not is_over(&block.sink[phase]):
                h = mix(h, tag_name(x, rank, block.sink[phase].tag))
        if block.outlets[0] >= 0 or block.outlets[1] >= 0:
            h = mix_outlets(x, h + b, rank, engine, block.outlets[0])
            h = mix_outlets(x, h, rank, engine, block.outlets[1])
    return mix_outlets(x, h, rank, engine, op.early)


cdef uint64_t mix_operation(uint64_t h, const Engine* engine,
                            const Operation* op) noexcept nogil:
    cdef Operation copy
    cdef int64_t whole = <const unsigned char*>&op.block - <const unsigned char*>op
    cdef const Block* block
    cdef int b
    memcpy(&copy, op, whole)
    copy.called_us = waited(op.called_us, engine.now_us, engine.settings.announce_us) \
        if op.called else 0
    copy.moved_chunks = copy.moved_bytes = 0
    copy.send = NULL
    copy.base = copy.scratch = copy.undo = copy.retained = copy.inbox = NULL
    copy.states = copy.input = NULL
    copy.carry = NULL
    copy.result = NULL
    copy.asked_us = waited(op.asked_us, engine.now_us, engine.settings.patience_us) \
        if op.asked_us else -1
    copy.done_us = waited(op.done_us, engine.now_us, engine.settings.patience_us) \
        if op.done and not op.finished else 0
    copy.moved_us = waited(op.moved_us, engine.now_us, engine.settings.patience_us) \
        if op.done and not op.finished else 0
    copy.arrived_us = waited(op.arrived_us, engine.now_us, op.sig.deadline_us) \
        if op.sig.deadline_us and awaits_roll(op) else 0
    if not op.standing:
        memset(copy.holder, 0, sizeof(copy.holder))
    h = mix_bytes(h, &copy, whole)
    h = mix(h, (op.send != NULL) | (op.base != NULL) << 1 | (op.scratch != NULL) << 2
            | (op.undo != NULL) << 3 | (op.retained != NULL) << 4 | (op.inbox != NULL) << 5
            | (op.result != NULL) << 6 | (op.carry != NULL) << 7)
    if op.nbytes:
        if op.undo != NULL:
            h = mix_bytes(h, op.undo, op.undo_bytes)
        if op.retained != NULL:
            h = mix_bytes(h, op.retained, op.nbytes)
        if op.inbox != NULL and fans(engine, op):
            for b in range(engine.settings.degree + 2):
                h = mix_bytes(h, op.inbox + b * op.nbytes, op.nbytes)
        elif op.inbox != NULL:
            h = mix_bytes(h, op.inbox, op.nbytes * (
                1 if is_from_root(op.sig.kind) else engine.size))
    if op.states != NULL:
        h = mix_bytes(h, op.states, op.chunks)
    for b in range(op.blocks):
        block = &op.block[b]
        h = mix_block(engine, h, block)
        if not op.finished:
            if block.recv != NULL:
                h = mix_bytes(h, block.recv, block.grid.nbytes)
            if block.send != NULL:
                h = mix_bytes(h, block.send, block.out.nbytes if block.out.nbytes
                              else block.grid.nbytes)
    if op.sig.kind == EXSCAN and op.scratch != NULL:
        h = mix_bytes(h, op.scratch, op.nbytes)
    return h


cdef uint64_t mix_engine(const Engine* engine) noexcept nogil:
    """All of an engine but the names that `mix_names` gives."""
    cdef uint64_t h = 0xE16
    cdef Engine copy
    cdef int64_t whole = <const unsigned char*>&engine.faults - <const unsigned char*>engine
    cdef const ProposeBody* proposal
    cdef const Carry* carry
    cdef const Early* early
    cdef int64_t seq
    cdef int r
    memcpy(&copy, engine, whole)
    copy.transport = NULL
    memset(&copy.settings, 0, sizeof(Settings))
    copy.history = NULL
    copy.statuses = copy.outbox = copy.proposal = NULL
    copy.landings = NULL
    copy.landing_free = copy.landings_used = 0
    copy.wheres = NULL
    memset(&copy.late, 0, sizeof(copy.late))
    copy.promised_us = copy.ballot_us = copy.heard_us = copy.beat_us = 0
    copy.calling_us = copy.answer_us = 0
    copy.ring = NULL
    copy.peer_done = NULL
    copy.outlets = NULL
    copy.outlet_free = copy.next_tag = 0
    copy.carries = NULL
    copy.early = NULL
    copy.roll_us = copy.patience_us = copy.parted_us = 0
    copy.watermark_us = waited(engine.watermark_us, engine.now_us, engine.settings.flush_us)
    copy.now_us = 0
    copy.below_us = 0
    if not engine.stage and not engine.frozen:
        memset(&copy.tree, 0, sizeof(Tree))
        memset(&copy.passing, 0, sizeof(Passing))
        copy.below = mask_none()
        copy.tree_ballot = copy.rows = copy.said = copy.accepting = 0
    if not engine.stage:
        copy.ballot = 0
        if not engine.frozen or not engine.passing.children:
            copy.answered = copy.acceptors = mask_none()
    if not engine.poisoned:
        copy.groups_count = 0
        memset(copy.groups, 0, sizeof(copy.groups))
    h = mix_bytes(h, &copy, whole)
    h = mix_bytes(h, engine.history, engine.epoch * sizeof(Entry))
    if engine.peer_done != NULL:
        h = mix_bytes(h, engine.peer_done, engine.size * sizeof(int64_t))
    if engine.accepted > engine.promised or engine.frozen:
        proposal = <const ProposeBody*>engine.proposal
        h = mix_bytes(h, proposal, sizeof(ProposeBody) + proposal.entries * sizeof(Entry)
                      + proposal.holders * sizeof(Stand))
    early = engine.early
    while early != NULL:
        h = mix(h, early.peer)
        h = mix_bytes(h, early + 1, sizeof(Head) + early.nbytes)
        early = early.next
    carry = engine.carries
    while carry != NULL:
        h = mix(h, <uint64_t>carry.seq << 2 | (carry.data != NULL) << 1 | (carry.more != NULL))
        if carry.data != NULL:
            h = mix_bytes(h, carry.data, carry.sig.count * 8)
        if carry.more != NULL:
            h = mix_bytes(h, carry.more, carry.sig.count * 8)
        carry = carry.next
    if keeps_answers(engine):
        for r in range(engine.passing.children + 1):
            if engine.rows >> r & 1:
                h = mix_bytes(h, status_at(engine, r), status_length(status_at(engine, r)))
    for seq in range(engine.freed, engine.freed + engine.settings.ring):
        if engine.ring[seq % engine.settings.ring].seq == seq:
            h = mix_operation(h, engine, &engine.ring[seq % engine.settings.ring])
    return h if h else 1


cdef uint64_t mix_rank(Explorer* x, uint64_t h, int rank) noexcept nogil:
    cdef World* world = x.world
    cdef Port* port = &world.network.ports[rank]
    cdef Rank* one = &world.ranks[rank]
    cdef const Operation* op
    cdef int i
    if port.dead:
        return mix(h, 0xDEAD)
    h = mix(h, port.left | <uint64_t>one.leaving << 4 | <uint64_t>one.called << 8
            | <uint64_t>one.checked << 16)
    for i in range(one.checked):
        h = mix(h, <uint64_t>one.results[i].status << 32 | <uint64_t>one.results[i].epoch)
        h = mix(h, one.results[i].contributors.word[0])
        h = mix(h, one.results[i].failed.word[0])
    if port.left:
        return h
    h = mix(h, port.detected.word[0])
    if x.engine[rank] == 0:
        x.engine[rank] = mix_engine(one.engine)
    h = mix(h, x.engine[rank])
    for i in range(one.engine.settings.ring):
        op = &one.engine.ring[(one.engine.freed + i) % one.engine.settings.ring]
        if op.seq == one.engine.freed + i:
            h = mix_names(x, h, rank, one.engine, op)
    for i in range(port.posted_count):
        h = mix(h, <uint64_t>port.posted[i].peer << 32
                | tag_name(x, rank, port.posted[i].tag))
        h = mix(h, port.posted[i].token)
    h = mix(h, port.posted_count)
    for i in range(port.late_count):
        h = mix(h, <uint64_t>port.late[i].event.kind << 32 | <uint64_t>port.late[i].event.peer)
        h = mix(h, token_name(x, rank, port.late[i].event.token))
        if port.late[i].dest != NULL:
            h = mix_bytes(h, port.late[i].copy, port.late[i].event.nbytes)
    return mix(h, port.late_count)


cdef uint64_t mix_channel(Explorer* x, uint64_t h, int source, int dest) noexcept nogil:
    cdef Channel* channel = channel_of(&x.world.network, source, dest)
    cdef const unsigned char* at = channel.bytes
    cdef const unsigned char* end = channel.bytes + channel.used
    cdef const Head* head
    cdef DataMessage* message
    cdef int64_t total
    cdef GrantBody grant
    cdef CreditBody credit
    cdef int i
    while at < end:
        total = (<const int64_t*>at)[0]
        at += 8
        head = <const Head*>at
        h = mix_bytes(h, head, sizeof(Head))
        if head.type == MSG_GRANT:
            grant = (<const GrantBody*>(at + sizeof(Head)))[0]
            grant.tag = <int32_t>tag_name(x, source, grant.tag)
            h = mix_bytes(h, &grant, sizeof(grant))
        elif head.type == MSG_CREDIT:
            credit = (<const CreditBody*>(at + sizeof(Head)))[0]
            credit.tag = <int32_t>tag_name(x, source, credit.tag)
            h = mix_bytes(h, &credit, sizeof(credit))
        elif head.type == MSG_AWAY:
            h = mix(h, tag_name(x, dest, (<const AwayBody*>(at + sizeof(Head))).tag))
        else:
            h = mix_bytes(h, at + sizeof(Head), total - <int64_t>sizeof(Head))
        at += (total + 7) & ~7
    h = mix(h, channel.data_count)
    for i in range(channel.data_count):
        message = &channel.data[i]
        h = mix(h, tag_name(x, dest, message.tag) << 32 | <uint64_t>message.eager << 24
                | <uint64_t>message.nbytes)
        # A dead sender, or one that has its SENT, has no use for the token any more.
        if not message.eager and not x.world.network.ports[source].dead:
            h = mix(h, token_name(x, source, message.token))
        h = mix_bytes(h, message.copy, message.nbytes)
    return h


cdef uint64_t digest(Explorer* x) noexcept nogil:
    cdef World* world = x.world
    cdef int i, j
    cdef uint64_t h
    for i in range(world.size):
        x.tag_count[i] = 0
        x.outlet_count[i] = 0
    h = mix(0x51ED270B, <uint64_t>world.deaths_left << 32 | <uint64_t>world.ticked << 8
            | <uint64_t>(world.turn if x.order == IN_TURNS else 0))
    for i in range(world.size):
        h = mix_rank(x, h, i)
    for i in range(world.size):
        for j in range(world.size):
            h = mix_channel(x, h + j, i, j)
    return h if h else 1


cdef uint64_t raw_digest(Explorer* x) noexcept nogil:
    """Without any renaming: equal bytes only (addresses are fixed in one exploration)."""
    cdef World* world = x.world
    cdef uint64_t h = 0x51ED270B
    cdef int i
    cdef int64_t controls = world.network.controls
    for i in range(world.size):
        memset(&world.ranks[i].engine.counters, 0, sizeof(Counters))
    world.network.sends = 0
    world.network.controls = 0
    h = mix_bytes(h, world, head_bytes(world))
    world.network.controls = controls
    for i in range(world.size):
        h = mix_bytes(h, world.network.ports[i].region.base, world.network.ports[i].region.used)
        h = mix_bytes(h, world.network.ports[i].posted,
                      world.network.ports[i].posted_count * sizeof(Posted))
        h = mix_bytes(h, world.network.ports[i].late,
                      world.network.ports[i].late_count * sizeof(Late))
    for i in range(world.size * world.size):
        h = mix_bytes(h, world.network.channels[i].bytes, world.network.channels[i].used)
        h = mix_bytes(h, world.network.channels[i].data,
                      world.network.channels[i].data_count * sizeof(DataMessage))
    return h if h else 1
