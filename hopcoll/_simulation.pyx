# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The simulated network: the same engines, over channels whose every delivery is a choice.

A world holds the engines of all ranks, the messages under way and the memory of the "callers" in
one piece of memory, so that exploring all orders is a matter of copying it back and forth.
Choices: which message arrives next (first in, first out only per pair, and per tag for data), when
each observer learns of each death (what the dead rank had sent and not yet delivered to it is lost:
any suffix), which rank calls its next operation, who dies, and after how many sends of a step.

Inputs are made so that a result shows what went into it: item i of rank r's input is bit r, rotated
by i, and a sum of such items is the set of its contributors; an input counted twice carries.
"""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint32_t, uint8_t, intptr_t
from libc.stdlib cimport malloc, calloc, realloc, free
from libc.string cimport memcpy, memmove, memset
from cython_kernels.transport cimport (
    Transport, Event, EVENT_CONTROL, EVENT_SENT, EVENT_RECEIVED, EVENT_LOST, EVENT_DEAD)
from hopcoll._state cimport *
from hopcoll._engine cimport engine_new, engine_event, engine_tick, control_bytes_of

cdef enum:
    UINT64 = 7
    SUM = 0
    NONE = 11
    OPERATIONS_MAX = 16
    FREED_MAX = 64
    TRACE_MAX = 1 << 16

cdef enum Action:
    ACT_CALL = 1
    ACT_CONTROL = 2
    ACT_DATA = 3
    ACT_DETECT = 4
    ACT_KILL = 5
    ACT_TICK = 6
    ACT_SENT = 7

cdef enum Violation:
    FINE = 0
    HANG = 1
    DIFFERENT_RESULTS = 2
    WRONG_VALUE = 3
    DIFFERENT_CONTRIBUTORS = 4
    CONTRIBUTORS_GREW = 5
    LIVING_LEFT_OUT = 6
    INPUT_CHANGED = 7
    UNEXPECTED_DATA = 8
    STABLE_TOO_EARLY = 9
    ENGINE_BROKEN = 10
    WRONG_STATUS = 11
    OUT_OF_ROOM = 12
    LEAK = 13

VIOLATIONS = {
    FINE: None, HANG: "hang", DIFFERENT_RESULTS: "two ranks hold different bytes of one result",
    WRONG_VALUE: "a result is not that of its contributors",
    DIFFERENT_CONTRIBUTORS: "two ranks name different contributors, epochs or statuses",
    CONTRIBUTORS_GREW: "contributors grew from one operation to the next",
    LIVING_LEFT_OUT: "a living rank was left out of a result",
    INPUT_CHANGED: "an input was changed", UNEXPECTED_DATA: "data came that no receive waited for",
    STABLE_TOO_EARLY: "an operation was called stable while a living rank had not done it",
    ENGINE_BROKEN: "an engine gave up (protocol error or out of memory)",
    WRONG_STATUS: "a status does not fit the fate of the root",
    OUT_OF_ROOM: "the world is too small for this script",
    LEAK: "a record was never freed",
}

cdef struct Posted:
    int32_t peer
    int32_t tag
    int64_t nbytes
    int64_t token
    unsigned char* data

cdef struct DataMessage:
    int32_t tag
    int32_t eager             # copied at once: SENT was given already
    int64_t nbytes
    int64_t token
    const unsigned char* data

cdef struct Channel:          # one ordered pair
    unsigned char* bytes      # [int64 length][message]...
    int64_t used
    int64_t room
    DataMessage* data
    int32_t data_count
    int32_t data_room

cdef struct Region:           # the memory of one rank
    unsigned char* base
    int64_t used
    int64_t room
    int32_t freed
    int32_t pad
    unsigned char* free_block[FREED_MAX]
    int64_t free_bytes[FREED_MAX]

cdef struct Step:             # one operation of the script
    int32_t kind
    int32_t root
    int32_t flags
    int32_t pad
    int64_t count

cdef struct Port:
    World* world
    int32_t rank
    int32_t dead
    Transport table
    Engine* engine
    Region region
    Posted* posted
    int32_t posted_count
    int32_t posted_room
    Event* local              # events that came about during a step
    int32_t local_count
    int32_t local_room
    Mask detected
    int32_t called
    int32_t checked
    uint64_t* send[OPERATIONS_MAX]
    uint64_t* recv[OPERATIONS_MAX]
    Result results[OPERATIONS_MAX]

cdef struct World:
    int32_t size
    int32_t steps_count
    int32_t depth
    int32_t violation
    int32_t fixed             # channels must not grow: the world is one piece of memory
    int32_t send_budget       # sends left in this step before its rank dies; -1: no limit
    int32_t sends             # of this step
    int32_t dying
    int32_t deaths_left
    int32_t alive
    int64_t now_us
    uint64_t random
    int32_t eager_percent
    int32_t ticked
    Settings settings
    Step script[OPERATIONS_MAX]
    Port* ports
    Channel* channels


# ---- memory -------------------------------------------------------------------------------

cdef void* region_allocate(Region* region, int64_t nbytes) noexcept nogil:
    cdef int i, best = -1
    cdef unsigned char* memory
    nbytes = (nbytes + 15) & ~15
    if nbytes == 0:
        nbytes = 16
    for i in range(region.freed):
        if region.free_bytes[i] == nbytes and (best < 0 or region.free_block[i]
                                               < region.free_block[best]):
            best = i
    if best >= 0:
        memory = region.free_block[best]
        region.freed -= 1
        region.free_block[best] = region.free_block[region.freed]
        region.free_bytes[best] = region.free_bytes[region.freed]
        region.free_block[region.freed] = NULL
        region.free_bytes[region.freed] = 0
        return memory + 16
    if region.used + nbytes + 16 > region.room:
        return NULL
    memory = region.base + region.used
    (<int64_t*>memory)[0] = nbytes
    region.used += nbytes + 16
    return memory + 16


cdef void* port_allocate(void* self, int64_t nbytes) noexcept nogil:
    return region_allocate(&(<Port*>self).region, nbytes)


cdef void port_release(void* self, void* memory) noexcept nogil:
    cdef Region* region = &(<Port*>self).region
    cdef unsigned char* block = <unsigned char*>memory - 16
    cdef int64_t nbytes = (<int64_t*>block)[0]
    memset(memory, 0, nbytes)
    if region.freed < FREED_MAX:
        region.free_block[region.freed] = block
        region.free_bytes[region.freed] = nbytes
        region.freed += 1


# ---- the transport ------------------------------------------------------------------------

cdef inline Channel* channel_of(World* world, int source, int dest) noexcept nogil:
    return &world.channels[source * world.size + dest]


cdef inline uint64_t next_random(World* world) noexcept nogil:
    cdef uint64_t z
    world.random += 0x9E3779B97F4A7C15ULL
    z = world.random
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL
    return z ^ (z >> 31)


cdef bint may_send(World* world) noexcept nogil:
    """False when the rank of this step dies before this send."""
    world.sends += 1
    if world.send_budget < 0:
        return True
    if world.send_budget == 0:
        world.dying = 1
        return False
    world.send_budget -= 1
    return True


cdef void push_local(Port* port, int kind, int peer, int64_t token, int64_t nbytes) noexcept nogil:
    cdef Event* event
    if port.local_count == port.local_room:
        if port.world.fixed:
            port.world.violation = OUT_OF_ROOM
            return
        port.local_room *= 2
        port.local = <Event*>realloc(port.local, port.local_room * sizeof(Event))
    event = &port.local[port.local_count]
    memset(event, 0, sizeof(Event))
    event.kind = kind
    event.peer = peer
    event.token = token
    event.nbytes = nbytes
    port.local_count += 1


cdef void port_send_control(void* self, int dest, const void* head, int64_t head_bytes,
                            const void* body, int64_t body_bytes) noexcept nogil:
    cdef Port* port = <Port*>self
    cdef World* world = port.world
    cdef Channel* channel = channel_of(world, port.rank, dest)
    cdef int64_t total = head_bytes + body_bytes
    cdef int64_t padded = (total + 7) & ~7
    if not may_send(world) or mask_has(&port.detected, dest):
        return
    if channel.used + padded + 8 > channel.room:
        if world.fixed:
            world.violation = OUT_OF_ROOM
            return
        channel.room = 2 * (channel.used + padded + 8)
        channel.bytes = <unsigned char*>realloc(channel.bytes, channel.room)
    (<int64_t*>(channel.bytes + channel.used))[0] = total
    memcpy(channel.bytes + channel.used + 8, head, head_bytes)
    if body_bytes:
        memcpy(channel.bytes + channel.used + 8 + head_bytes, body, body_bytes)
    if padded > total:
        memset(channel.bytes + channel.used + 8 + total, 0, padded - total)
    channel.used += padded + 8


cdef void port_send_data(void* self, int dest, int tag, const void* data, int64_t nbytes,
                         int64_t token) noexcept nogil:
    cdef Port* port = <Port*>self
    cdef World* world = port.world
    cdef Channel* channel = channel_of(world, port.rank, dest)
    cdef DataMessage* message
    cdef unsigned char* copy
    if not may_send(world):
        return
    if mask_has(&port.detected, dest):
        push_local(port, EVENT_LOST, dest, token, 0)
        return
    if channel.data_count == channel.data_room:
        if world.fixed:
            world.violation = OUT_OF_ROOM
            return
        channel.data_room = 2 * channel.data_room + 4
        channel.data = <DataMessage*>realloc(channel.data,
                                             channel.data_room * sizeof(DataMessage))
    message = &channel.data[channel.data_count]
    memset(message, 0, sizeof(DataMessage))
    message.tag = tag
    message.nbytes = nbytes
    message.token = token
    message.data = <const unsigned char*>data
    if world.eager_percent and nbytes and <int>(next_random(world) % 100) < world.eager_percent:
        copy = <unsigned char*>malloc(nbytes)
        memcpy(copy, data, nbytes)
        message.data = copy
        message.eager = 1
        push_local(port, EVENT_SENT, dest, token, 0)
    channel.data_count += 1


cdef void port_recv_data(void* self, int source, int tag, void* data, int64_t nbytes,
                         int64_t token) noexcept nogil:
    cdef Port* port = <Port*>self
    cdef Posted* posted
    if mask_has(&port.detected, source):
        push_local(port, EVENT_LOST, source, token, 0)
        return
    if port.posted_count == port.posted_room:
        if port.world.fixed:
            port.world.violation = OUT_OF_ROOM
            return
        port.posted_room = 2 * port.posted_room + 4
        port.posted = <Posted*>realloc(port.posted, port.posted_room * sizeof(Posted))
    posted = &port.posted[port.posted_count]
    posted.peer = source
    posted.tag = tag
    posted.nbytes = nbytes
    posted.token = token
    posted.data = <unsigned char*>data
    port.posted_count += 1


cdef int port_poll(void* self, Event* event) noexcept nogil:
    return 0                      # the world hands events over itself


# ---- steps --------------------------------------------------------------------------------

cdef void run_event(Port* port, const Event* event) noexcept nogil:
    """Gives one event to a rank, and then what came about on the spot."""
    cdef World* world = port.world
    cdef Event local
    cdef int i
    engine_event(port.engine, event)
    while port.local_count and not world.dying:
        local = port.local[0]
        port.local_count -= 1
        memmove(port.local, port.local + 1, port.local_count * sizeof(Event))
        memset(&port.local[port.local_count], 0, sizeof(Event))
        engine_event(port.engine, &local)
    end_step(port)


cdef void end_step(Port* port) noexcept nogil:
    if port.world.dying:
        port.world.dying = 0
        die(port)
    else:
        check_rank(port)


cdef void die(Port* port) noexcept nogil:
    port.dead = 1
    port.world.alive -= 1
    port.world.deaths_left -= 1
    port.posted_count = 0
    port.local_count = 0


cdef void deliver_control(World* world, int source, int dest) noexcept nogil:
    cdef Channel* channel = channel_of(world, source, dest)
    cdef int64_t total = (<int64_t*>channel.bytes)[0]
    cdef int64_t padded = (total + 7) & ~7
    cdef Event event
    cdef unsigned char* copy = <unsigned char*>malloc(padded + 1)
    memset(&event, 0, sizeof(Event))
    memcpy(copy, channel.bytes + 8, total)
    channel.used -= padded + 8
    memmove(channel.bytes, channel.bytes + padded + 8, channel.used)
    memset(channel.bytes + channel.used, 0, padded + 8)
    event.kind = EVENT_CONTROL
    event.peer = source
    event.nbytes = total
    event.payload = copy
    run_event(&world.ports[dest], &event)
    free(copy)


cdef int find_posted(Port* port, int peer, int tag) noexcept nogil:
    cdef int i
    for i in range(port.posted_count):
        if port.posted[i].peer == peer and port.posted[i].tag == tag:
            return i
    return -1


cdef void drop_posted(Port* port, int i) noexcept nogil:
    port.posted_count -= 1
    memmove(port.posted + i, port.posted + i + 1, (port.posted_count - i) * sizeof(Posted))
    memset(port.posted + port.posted_count, 0, sizeof(Posted))


cdef void drop_data(Channel* channel, int i) noexcept nogil:
    if channel.data[i].eager:
        free(<void*>channel.data[i].data)
    channel.data_count -= 1
    memmove(channel.data + i, channel.data + i + 1, (channel.data_count - i) * sizeof(DataMessage))
    memset(channel.data + channel.data_count, 0, sizeof(DataMessage))


cdef bint first_of_tag(Channel* channel, int i) noexcept nogil:
    cdef int j
    for j in range(i):
        if channel.data[j].tag == channel.data[i].tag:
            return False
    return True


cdef void deliver_data(World* world, int source, int dest, int i) noexcept nogil:
    cdef Channel* channel = channel_of(world, source, dest)
    cdef DataMessage message = channel.data[i]
    cdef Port* port = &world.ports[dest]
    cdef Port* sender = &world.ports[source]
    cdef int k = find_posted(port, source, message.tag)
    cdef Event event
    cdef int64_t token
    memset(&event, 0, sizeof(Event))
    if k < 0:
        world.violation = UNEXPECTED_DATA
        return
    if message.nbytes:
        if message.nbytes > port.posted[k].nbytes:
            world.violation = UNEXPECTED_DATA
            return
        memcpy(port.posted[k].data, message.data, message.nbytes)
    token = port.posted[k].token
    drop_posted(port, k)
    drop_data(channel, i)
    event.kind = EVENT_RECEIVED
    event.peer = source
    event.token = token
    event.nbytes = message.nbytes
    run_event(port, &event)
    if not message.eager and not sender.dead and world.violation == FINE:
        world.send_budget = -1
        event.kind = EVENT_SENT
        event.peer = dest
        event.token = message.token
        event.nbytes = 0
        run_event(sender, &event)


cdef void detect(World* world, int observer, int peer) noexcept nogil:
    """The observer learns of a death; what it had not received by now is lost."""
    cdef Port* port = &world.ports[observer]
    cdef Channel* incoming = channel_of(world, peer, observer)
    cdef Channel* outgoing = channel_of(world, observer, peer)
    cdef Event event
    cdef int i
    memset(incoming.bytes, 0, incoming.used)
    incoming.used = 0
    while incoming.data_count:
        drop_data(incoming, incoming.data_count - 1)
    mask_add(&port.detected, peer)
    while True:
        for i in range(port.posted_count):
            if port.posted[i].peer == peer:
                push_local(port, EVENT_LOST, peer, port.posted[i].token, 0)
                drop_posted(port, i)
                break
        else:
            break
    for i in range(outgoing.data_count):
        if not outgoing.data[i].eager:
            push_local(port, EVENT_LOST, peer, outgoing.data[i].token, 0)
    while outgoing.data_count:
        drop_data(outgoing, outgoing.data_count - 1)
    memset(outgoing.bytes, 0, outgoing.used)
    outgoing.used = 0
    memset(&event, 0, sizeof(Event))
    event.kind = EVENT_DEAD
    event.peer = peer
    run_event(port, &event)


cdef inline uint64_t rotate(uint64_t x, int64_t by) noexcept nogil:
    by &= 63
    return (x << by) | (x >> (64 - by)) if by else x


cdef uint64_t bcast_item(int seq, int root, int64_t i) noexcept nogil:
    return (<uint64_t>(seq + 1) * 0x9E3779B97F4A7C15ULL) ^ (<uint64_t>root << 48) ^ <uint64_t>i


from hopcoll._operation cimport start_operation


cdef bint can_call(World* world, Port* port) noexcept nogil:
    return (port.called < world.steps_count and not port.dead
            and port.called - port.engine.finished < world.depth
            and port.called < port.engine.freed + world.settings.ring // 2)


cdef void call_next(World* world, int rank) noexcept nogil:
    cdef Port* port = &world.ports[rank]
    cdef int k = port.called
    cdef Step* step = &world.script[k]
    cdef Signature sig
    cdef Event nothing
    cdef int code
    cdef unsigned char* send = <unsigned char*>port.send[k]
    cdef unsigned char* recv = <unsigned char*>port.recv[k]
    memset(&sig, 0, sizeof(Signature))
    sig.kind = step.kind
    sig.dtype = UINT64
    sig.redop = NONE if step.kind == BCAST or step.kind == BARRIER else SUM
    sig.root = step.root
    sig.flags = step.flags & FLAG_RAISE
    sig.count = step.count
    if step.kind == BCAST:
        send = NULL
    elif step.flags & FLAG_IN_PLACE:
        send = NULL
    if step.kind == REDUCE and rank != step.root:
        recv = NULL
        send = <unsigned char*>port.send[k]
    code = start_operation(port.engine, &sig, 8, send, recv,
                           step.flags & FLAG_IN_PLACE if recv != NULL else 0, &port.results[k])
    if code != START_OK:
        world.violation = OUT_OF_ROOM
        return
    port.called += 1
    memset(&nothing, 0, sizeof(Event))
    while port.local_count and not world.dying:
        nothing = port.local[0]
        port.local_count -= 1
        memmove(port.local, port.local + 1, port.local_count * sizeof(Event))
        memset(&port.local[port.local_count], 0, sizeof(Event))
        engine_event(port.engine, &nothing)
    end_step(port)


cdef void tick_all(World* world) noexcept nogil:
    cdef int r
    world.now_us += 300000
    for r in range(world.size):
        if not world.ports[r].dead:
            engine_tick(world.ports[r].engine, world.now_us)
            check_rank(&world.ports[r])


# ---- the checkers -------------------------------------------------------------------------

cdef void check_rank(Port* port) noexcept nogil:
    cdef World* world = port.world
    cdef Result* result
    cdef Step* step
    cdef Port* other
    cdef int64_t i
    cdef int r, k
    cdef uint64_t value, expected
    if port.engine.broken:
        world.violation = ENGINE_BROKEN
    while port.checked < port.called and port.results[port.checked].complete:
        k = port.checked
        result = &port.results[k]
        step = &world.script[k]
        if result.status == STATUS_OK and step.kind != BARRIER and not (
                step.kind == REDUCE and step.root != port.rank):
            for i in range(step.count):
                value = port.recv[k][i]
                if step.kind == BCAST:
                    expected = bcast_item(k, step.root, i)
                else:
                    expected = rotate(result.contributors.word[0], i)
                if value != expected:
                    world.violation = WRONG_VALUE
        if step.kind != BCAST and step.kind != BARRIER and not (
                step.flags & FLAG_IN_PLACE and (step.kind == ALLREDUCE or step.root == port.rank)):
            for i in range(step.count):
                if port.send[k][i] != rotate((<uint64_t>1) << port.rank, i):
                    world.violation = INPUT_CHANGED
        if result.status == STATUS_RANK_FAILED and not step.flags & FLAG_RAISE and (
                step.kind != BCAST or not world.ports[step.root].dead):
            world.violation = WRONG_STATUS
        if result.status == STATUS_ROOT_LOST and (
                step.kind != REDUCE or not world.ports[step.root].dead):
            world.violation = WRONG_STATUS
        if result.status == STATUS_MISMATCH:
            world.violation = WRONG_STATUS
        for r in range(world.size):
            other = &world.ports[r]
            # A rank that died may have taken with it a result that nobody else had.
            if other.dead or other.checked <= k:
                continue
            if (other.results[k].status != result.status or other.results[k].epoch != result.epoch
                    or not mask_equal(&other.results[k].contributors, &result.contributors)):
                world.violation = DIFFERENT_CONTRIBUTORS
        if k and not mask_within(&result.contributors, &port.results[k - 1].contributors):
            world.violation = CONTRIBUTORS_GREW
        port.checked += 1
    for r in range(world.size):
        if not world.ports[r].dead and world.ports[r].engine.done < port.engine.stable:
            world.violation = STABLE_TOO_EARLY


cdef void check_end(World* world) noexcept nogil:
    """Nothing can happen any more: everyone alive must have everything."""
    cdef int r, k
    cdef Port* port
    for r in range(world.size):
        port = &world.ports[r]
        if port.dead:
            continue
        if port.checked < world.steps_count:
            world.violation = HANG
            return
        for k in range(world.steps_count):
            if not mask_has(&port.results[k].contributors, r):
                world.violation = LIVING_LEFT_OUT
        if port.engine.stable < world.steps_count:
            world.violation = HANG
        elif port.engine.freed < world.steps_count or port.engine.outlets_used:
            world.violation = LEAK


# ---- making a world -----------------------------------------------------------------------

cdef int64_t world_bytes(World* plan, int64_t region_bytes, int64_t channel_bytes,
                         int data_room, int posted_room, int local_room) noexcept nogil:
    cdef int64_t n = plan.size
    return (sizeof(World) + n * (sizeof(Port) + region_bytes + posted_room * sizeof(Posted)
                                 + local_room * sizeof(Event))
            + n * n * (sizeof(Channel) + channel_bytes + data_room * sizeof(DataMessage)) + 4096)


cdef World* make_world(World* plan, void** arena, int64_t* total) noexcept nogil:
    cdef int n = plan.size
    cdef int64_t items = 0, region_bytes, channel_bytes = 0, at
    cdef int data_room = 0, posted_room = 16, local_room = 16
    cdef int r, k, i
    cdef World* world
    cdef unsigned char* memory
    cdef Port* port
    cdef Channel* channel
    for k in range(plan.steps_count):
        items += plan.script[k].count
    region_bytes = (sizeof(Engine) + 32 + control_bytes_of(&plan.settings, n) * (n + 1) + 1024
                    + (n + 4) * (sizeof(Entry) + 64)
                    + plan.settings.ring * (sizeof(Operation) + 64)
                    + plan.settings.outlets_max * sizeof(Outlet)
                    + items * 8 * 6 + plan.settings.ring * n * (plan.settings.eager_bytes + 32)
                    + plan.steps_count * 512)
    if plan.fixed:
        channel_bytes = 4096
        data_room = 16
        posted_room = 32
        local_room = 48
    total[0] = world_bytes(plan, region_bytes, channel_bytes, data_room, posted_room, local_room)
    memory = <unsigned char*>calloc(1, total[0])
    if memory == NULL:
        return NULL
    arena[0] = memory
    world = <World*>memory
    memcpy(world, plan, sizeof(World))
    at = (sizeof(World) + 15) & ~15
    world.ports = <Port*>(memory + at)
    at += n * sizeof(Port)
    world.channels = <Channel*>(memory + at)
    at += n * n * sizeof(Channel)
    at = (at + 15) & ~15
    world.alive = n
    world.send_budget = -1
    for i in range(n * n):
        channel = &world.channels[i]
        if world.fixed:
            channel.bytes = memory + at
            channel.room = channel_bytes
            at += channel_bytes
            channel.data = <DataMessage*>(memory + at)
            channel.data_room = data_room
            at += data_room * sizeof(DataMessage)
    for r in range(n):
        port = &world.ports[r]
        port.world = world
        port.rank = r
        if world.fixed:
            port.posted = <Posted*>(memory + at)
            port.posted_room = posted_room
            at += posted_room * sizeof(Posted)
            port.local = <Event*>(memory + at)
            port.local_room = local_room
            at += local_room * sizeof(Event)
        else:
            port.local = <Event*>calloc(local_room, sizeof(Event))
            port.local_room = local_room
        at = (at + 15) & ~15
        port.region.base = memory + at
        port.region.room = region_bytes
        at += region_bytes
        port.table.self = port
        port.table.rank = r
        port.table.size = n
        port.table.control_bytes_max = control_bytes_of(&plan.settings, n)
        port.table.send_control = port_send_control
        port.table.send_data = port_send_data
        port.table.recv_data = port_recv_data
        port.table.poll = port_poll
        port.table.allocate = port_allocate
        port.table.release = port_release
        port.engine = engine_new(&port.table, &world.settings)
        for k in range(world.steps_count):
            port.send[k] = <uint64_t*>region_allocate(&port.region, world.script[k].count * 8)
            port.recv[k] = <uint64_t*>region_allocate(&port.region, world.script[k].count * 8)
            for i in range(world.script[k].count):
                port.send[k][i] = rotate((<uint64_t>1) << r, i)
                port.recv[k][i] = 0
                if world.script[k].kind == BCAST and world.script[k].root == r:
                    port.recv[k][i] = bcast_item(k, r, i)
                elif world.script[k].flags & FLAG_IN_PLACE:
                    port.recv[k][i] = rotate((<uint64_t>1) << r, i)
        if port.engine == NULL:
            world.violation = OUT_OF_ROOM
    return world


cdef void free_world(World* world) noexcept nogil:
    cdef int i, k
    if not world.fixed:
        for i in range(world.size * world.size):
            while world.channels[i].data_count:
                drop_data(&world.channels[i], world.channels[i].data_count - 1)
            free(world.channels[i].bytes)
            free(world.channels[i].data)
        for i in range(world.size):
            free(world.ports[i].posted)
            free(world.ports[i].local)
    free(world)


# ---- choices ------------------------------------------------------------------------------

cdef struct Choice:
    int32_t action
    int32_t a
    int32_t b
    int32_t c
    int32_t budget            # sends before the rank dies; -1: it lives

cdef void perform(World* world, const Choice* choice) noexcept nogil:
    world.sends = 0
    world.send_budget = choice.budget
    world.dying = 0
    if choice.action == ACT_CALL:
        call_next(world, choice.a)
    elif choice.action == ACT_CONTROL:
        deliver_control(world, choice.a, choice.b)
    elif choice.action == ACT_DATA:
        deliver_data(world, choice.a, choice.b, choice.c)
    elif choice.action == ACT_DETECT:
        detect(world, choice.a, choice.b)
    elif choice.action == ACT_KILL:
        die(&world.ports[choice.a])
    elif choice.action == ACT_TICK:
        tick_all(world)
    world.send_budget = -1


cdef void put_choice(Choice* out, int* count, int action, int a, int b, int c) noexcept nogil:
    out[count[0]].action = action
    out[count[0]].a = a
    out[count[0]].b = b
    out[count[0]].c = c
    out[count[0]].budget = -1
    count[0] += 1


cdef int list_choices(World* world, Choice* out, int room, bint canonical) noexcept nogil:
    """All that can happen next.  Canonical: of the deliveries and calls only the first one."""
    cdef int count = 0
    cdef int i, j, k
    cdef Channel* channel
    cdef int first
    for i in range(world.size):
        if can_call(world, &world.ports[i]):
            put_choice(out, &count, ACT_CALL, i, 0, 0)
    for i in range(world.size):
        for j in range(world.size):
            if world.ports[j].dead or count + 64 > room:
                continue
            channel = channel_of(world, i, j)
            if channel.used:
                put_choice(out, &count, ACT_CONTROL, i, j, 0)
            for k in range(channel.data_count):
                if first_of_tag(channel, k) and count + 8 < room:
                    put_choice(out, &count, ACT_DATA, i, j, k)
    if canonical and count > 1:
        count = 1
    first = count
    for i in range(world.size):
        if world.ports[i].dead:
            continue
        for j in range(world.size):
            if world.ports[j].dead and not mask_has(&world.ports[i].detected, j):
                put_choice(out, &count, ACT_DETECT, i, j, 0)
    if count == 0 and not world.ticked:
        put_choice(out, &count, ACT_TICK, 0, 0, 0)
    if world.deaths_left > 0 and world.alive > 1:
        for i in range(world.size):
            if not world.ports[i].dead:
                put_choice(out, &count, ACT_KILL, i, 0, 0)
    return count


cdef uint64_t hash_bytes(uint64_t h, const void* data, int64_t nbytes) noexcept nogil:
    cdef const uint64_t* words = <const uint64_t*>data
    cdef int64_t i
    for i in range(nbytes >> 3):
        h = (h ^ words[i]) * 0xff51afd7ed558ccdULL
        h ^= h >> 32
    return h


cdef struct Explorer:
    World* world
    unsigned char* arena
    int64_t bytes
    uint64_t* seen
    int64_t seen_room
    int64_t states
    int64_t ends
    int64_t states_max
    int32_t canonical
    int32_t stopped
    int32_t trace_count
    Choice* trace
    unsigned char* stack      # saved worlds, by depth
    int32_t stack_room
    Choice* choices           # CHOICES_MAX per depth

cdef enum:
    CHOICES_MAX = 160


cdef bint visit(Explorer* x) noexcept nogil:
    """Whether this world is new."""
    cdef int r
    cdef uint64_t h, slot
    for r in range(x.world.size):
        memset(&x.world.ports[r].engine.counters, 0, sizeof(Counters))
    x.world.sends = 0
    h = hash_bytes(0x51ED270B, x.arena, x.bytes & ~7)
    if h == 0:
        h = 1
    slot = h & (x.seen_room - 1)
    while x.seen[slot]:
        if x.seen[slot] == h:
            return False
        slot = (slot + 1) & (x.seen_room - 1)
    x.seen[slot] = h
    x.states += 1
    if x.states * 2 > x.seen_room or x.states >= x.states_max:
        x.stopped = 1
    return True


cdef void explore(Explorer* x, int depth) noexcept nogil:
    cdef World* world = x.world
    cdef Choice* choices
    cdef unsigned char* saved
    cdef int count, i, sends, budget
    cdef bint may_die, stepped = False
    cdef Choice choice
    if world.violation != FINE:
        return
    if depth >= x.stack_room:
        x.stopped = 2
        return
    if not visit(x) or x.stopped:
        return
    choices = x.choices + depth * CHOICES_MAX
    saved = x.stack + depth * x.bytes
    count = list_choices(world, choices, CHOICES_MAX, x.canonical)
    for i in range(count):
        if choices[i].action != ACT_KILL:
            stepped = True
    if not stepped:
        x.ends += 1
        x.trace_count = depth
        check_end(world)
        if world.violation != FINE:
            return
    memcpy(saved, x.arena, x.bytes)
    may_die = world.deaths_left > 0 and world.alive > 1
    for i in range(count):
        choice = choices[i]
        sends = 0
        budget = -1
        while True:
            choice.budget = budget
            x.trace[depth] = choice
            x.trace_count = depth + 1
            perform(world, &choice)
            if budget < 0:
                sends = world.sends
            world.ticked = choice.action == ACT_TICK
            explore(x, depth + 1)
            if world.violation != FINE or x.stopped:
                return
            memcpy(x.arena, saved, x.bytes)
            budget += 1 if budget >= 0 else 2      # dying before the first send is ACT_KILL
            if not may_die or budget >= sends or choice.action == ACT_KILL \
                    or choice.action == ACT_TICK:
                break


cdef int random_run(World* world, Choice* trace, int* trace_count, int kill_every) noexcept nogil:
    """One run by the world's own random numbers; returns the number of steps."""
    cdef int steps = 0, i, j, n = world.size, tries, count, start, pairs = n * n, r
    cdef Choice choice
    cdef Channel* channel
    cdef bint found
    cdef uint64_t dice
    cdef int quiet = 0
    while world.violation == FINE and steps < 4000000:
        memset(&choice, 0, sizeof(Choice))
        choice.budget = -1
        dice = next_random(world) % 100
        found = False
        if world.deaths_left > 0 and world.alive > 1 and next_random(world) % kill_every == 0:
            choice.action = ACT_KILL
            choice.a = next_random(world) % n
            found = not world.ports[choice.a].dead
        if not found and dice < 12:
            choice.a = next_random(world) % n
            choice.action = ACT_CALL
            found = can_call(world, &world.ports[choice.a])
        if not found and dice < 20:
            i = next_random(world) % n
            j = next_random(world) % n
            choice.action = ACT_DETECT
            choice.a = i
            choice.b = j
            found = (not world.ports[i].dead and world.ports[j].dead
                     and not mask_has(&world.ports[i].detected, j))
        if not found:
            start = next_random(world) % pairs
            for tries in range(pairs):
                i = (start + tries) % pairs
                channel = &world.channels[i]
                if (channel.used == 0 and channel.data_count == 0) or world.ports[i % n].dead:
                    continue
                choice.a = i // n
                choice.b = i % n
                if channel.data_count and (channel.used == 0 or next_random(world) & 1):
                    choice.action = ACT_DATA
                    choice.c = next_random(world) % channel.data_count
                    while not first_of_tag(channel, choice.c):
                        choice.c -= 1
                else:
                    choice.action = ACT_CONTROL
                found = True
                break
        if not found:
            start = next_random(world) % n
            for tries in range(n):
                i = (start + tries) % n
                if can_call(world, &world.ports[i]):
                    choice.action = ACT_CALL
                    choice.a = i
                    found = True
                    break
        if not found:
            start = next_random(world) % n
            for tries in range(n):
                i = (start + tries) % n
                if world.ports[i].dead:
                    continue
                for j in range(n):
                    if world.ports[j].dead and not mask_has(&world.ports[i].detected, j):
                        choice.action = ACT_DETECT
                        choice.a = i
                        choice.b = j
                        found = True
                        break
                if found:
                    break
        if not found:
            if quiet >= 3:
                break
            quiet += 1
            choice.action = ACT_TICK
        else:
            quiet = 0
        if (choice.action != ACT_KILL and choice.action != ACT_TICK and world.deaths_left > 0
                and world.alive > 1 and next_random(world) % (4 * kill_every) == 0):
            choice.budget = next_random(world) % 4
        if trace_count[0] < TRACE_MAX:
            trace[trace_count[0]] = choice
            trace_count[0] += 1
        perform(world, &choice)
        steps += 1
    if world.violation == FINE:
        check_end(world)
    return steps


# ---- Python -------------------------------------------------------------------------------

ACTIONS = {ACT_CALL: "call", ACT_CONTROL: "control", ACT_DATA: "data", ACT_DETECT: "detect",
           ACT_KILL: "kill", ACT_TICK: "tick"}
KINDS = {"bcast": BCAST, "reduce": REDUCE, "allreduce": ALLREDUCE, "barrier": BARRIER}
SABOTAGES = {"freeze": BREAK_FREEZE, "ballot_order": BREAK_BALLOT_ORDER,
             "ordered_cut": BREAK_ORDERED_CUT, "taint": BREAK_TAINT, "voids": BREAK_VOIDS,
             "retention": BREAK_RETENTION}
IN_PLACE = FLAG_IN_PLACE
RAISE = FLAG_RAISE


cdef void fill_plan(World* plan, int size, script, int deaths, int depth, sabotage, settings) except *:
    memset(plan, 0, sizeof(World))
    if not 1 <= size <= 64:
        raise ValueError(f"size: {size} is not in 1..64")
    if len(script) > OPERATIONS_MAX:
        raise ValueError(f"script: {len(script)} operations, at most {OPERATIONS_MAX}")
    plan.size = size
    plan.deaths_left = deaths
    plan.depth = depth
    plan.steps_count = len(script)
    for k, (kind, count, root, flags) in enumerate(script):
        plan.script[k].kind = KINDS[kind]
        plan.script[k].count = count
        plan.script[k].root = root
        plan.script[k].flags = flags
    plan.settings.chunk_bytes = settings.get("chunk_bytes", 16)
    plan.settings.eager_bytes = settings.get("eager_bytes", 8)
    plan.settings.retain_bytes_max = settings.get("retain_bytes_max", 48)
    plan.settings.retain_budget_bytes = settings.get("retain_budget_bytes", 96)
    plan.settings.window = settings.get("window", 2)
    plan.settings.ring = settings.get("ring", 8)
    plan.settings.active = settings.get("active", 2)
    plan.settings.outlets_max = settings.get("outlets_max", 4 * size + 64)
    plan.settings.announce_us = 250000
    plan.settings.flush_us = 1000
    for name in sabotage:
        plan.settings.sabotage |= SABOTAGES[name]


cdef list trace_of(const Choice* trace, int count):
    return [(ACTIONS[trace[i].action], trace[i].a, trace[i].b, trace[i].c, trace[i].budget)
            for i in range(count)]


cdef list describe(World* world):
    """What each rank is at, for the reader of a violation."""
    cdef int r, b, k
    cdef int64_t seq
    cdef Engine* e
    cdef Operation* op
    out = []
    for r in range(world.size):
        e = world.ports[r].engine
        out.append(f"rank {r}: {'dead ' if world.ports[r].dead else ''}epoch {e.epoch} promised "
                   f"{e.promised >> 32}.{e.promised & 0xffff} frozen {e.frozen} balloting "
                   f"{e.balloting} called {e.next_seq} done {e.done} finished {e.finished} stable "
                   f"{e.stable} freed {e.freed} outlets {e.outlets_used} peers "
                   f"{[e.peer_done[k] for k in range(world.size)]} posted "
                   f"{world.ports[r].posted_count}")
        for k in range(e.settings.outlets_max):
            if e.outlets[k].used:
                out.append(f"    outlet {k}: operation {e.outlets[k].seq} block {e.outlets[k].block} "
                           f"phase {e.outlets[k].phase} epoch {e.outlets[k].epoch} early "
                           f"{e.outlets[k].early} to {e.outlets[k].spring.dest} tag "
                           f"{e.outlets[k].spring.tag} next {e.outlets[k].spring.next} limit "
                           f"{e.outlets[k].spring.limit} end {e.outlets[k].spring.end} in flight "
                           f"{e.outlets[k].spring.in_flight}")
        for seq in range(e.freed, e.freed + e.settings.ring):
            op = find_operation(e, seq)
            if op == NULL:
                continue
            out.append(f"    operation {seq}: called {op.called} attempt {op.attempt} status "
                       f"{op.status} complete {op.complete} standing {op.standing} in flight "
                       f"{op.in_flight} {op.in_flight_retained} have {op.have.word[0]:b}")
            for b in range(op.blocks):
                out.append(f"        block {b}: epoch {op.block[b].epoch} finals "
                           f"{op.block[b].finals}/{op.block[b].grid.chunks} in flight "
                           f"{op.block[b].in_flight} holder {op.holder[b]} states "
                           f"{[op.states[op.block[b].state + k] for k in range(op.block[b].grid.chunks)]}")
                for k in range(2):
                    out.append(f"            sink {k}: source {op.block[b].sink[k].source} open "
                               f"{op.block[b].sink[k].open} broken {op.block[b].sink[k].broken} "
                               f"{op.block[b].sink[k].first}..{op.block[b].sink[k].end} arrived "
                               f"{op.block[b].sink[k].arrived} posted {op.block[b].sink[k].posted} "
                               f"told {op.block[b].sink[k].told}")
    return out


def simulate(int size, script, seed, *, int deaths=1, int depth=2, sabotage=(), int kill_every=60,
             int eager_percent=30, want_trace=False, **settings):
    """Runs one random order of everything, chosen by `seed`.

    Parameters
    ----------
    size : int
        Number of ranks, at most 64.
    script : list of (kind, count, root, flags)
        The operations that every rank calls: items of 8 bytes; kind is one of `KINDS`.
    seed : int
        Decides everything; the same seed gives the same run.
    deaths : int
        At most so many ranks die.
    depth : int
        A rank calls its next operation while fewer than `depth` are not finished.
    sabotage : iterable of str
        Rules to switch off (`SABOTAGES`), to prove the checkers awake.

    Returns
    -------
    dict
        violation (None or what was broken), steps, deaths, epochs, counters, and the trace.
    """
    cdef World plan
    cdef World* world
    cdef void* arena = NULL
    cdef int64_t total = 0
    cdef int trace_count = 0, steps, violation, r
    cdef Choice* trace
    fill_plan(&plan, size, script, deaths, depth, sabotage, settings)
    plan.random = <uint64_t>(seed & 0xffffffffffffffff)
    plan.eager_percent = eager_percent
    world = make_world(&plan, &arena, &total)
    trace = <Choice*>malloc(TRACE_MAX * sizeof(Choice))
    if world == NULL or trace == NULL:
        free(trace)
        raise MemoryError("simulation: no memory for the world")
    with nogil:
        steps = random_run(world, trace, &trace_count, kill_every)
    counters = {"ballots": 0, "decisions": 0, "stands": 0, "reruns": 0, "voids": 0,
                "kept_chunks": 0, "dropped_chunks": 0}
    epochs = 0
    for r in range(size):
        c = <dict>world.ports[r].engine.counters      # Cython turns the struct into a dict
        for name in counters:
            counters[name] += c[name]
        epochs = max(epochs, world.ports[r].engine.epoch)
    out = {"violation": VIOLATIONS[world.violation], "steps": steps,
           "deaths": size - world.alive, "epochs": epochs, "counters": counters}
    if want_trace or world.violation != FINE:
        out["trace"] = trace_of(trace, trace_count)
        out["ranks"] = describe(world)
    free_world(world)
    free(trace)
    return out


def explore_all(int size, script, *, int deaths=2, int depth=2, canonical=False, sabotage=(),
                int64_t states_max=1 << 22, int depth_max=600, **settings):
    """Visits every order of everything (canonical: every death and detection in one order).

    Returns
    -------
    dict
        violation, states, ends (worlds in which nothing more can happen), complete (False when
        `states_max` stopped it), and the trace of the violation.
    """
    cdef World plan
    cdef Explorer x
    cdef void* arena = NULL
    cdef int64_t total = 0
    fill_plan(&plan, size, script, deaths, depth, sabotage, settings)
    plan.fixed = 1
    memset(&x, 0, sizeof(Explorer))
    x.world = make_world(&plan, &arena, &total)
    x.arena = <unsigned char*>arena
    x.bytes = total
    x.seen_room = 1024
    while x.seen_room < 2 * states_max + 2:
        x.seen_room *= 2
    x.states_max = states_max
    x.canonical = canonical
    x.stack_room = depth_max
    x.seen = <uint64_t*>calloc(x.seen_room, sizeof(uint64_t))
    x.stack = <unsigned char*>malloc(total * depth_max)
    x.trace = <Choice*>calloc(depth_max + 1, sizeof(Choice))
    x.choices = <Choice*>calloc(depth_max * CHOICES_MAX, sizeof(Choice))
    try:
        if x.world == NULL or x.seen == NULL or x.stack == NULL or x.choices == NULL:
            raise MemoryError("exploration: no memory for the worlds")
        with nogil:
            explore(&x, 0)
        out = {"violation": VIOLATIONS[x.world.violation], "states": x.states, "ends": x.ends,
               "complete": x.stopped == 0 and x.world.violation == FINE, "world_bytes": total}
        if x.world.violation != FINE or x.stopped == 2:
            out["trace"] = trace_of(x.trace, x.trace_count)
            out["ranks"] = describe(x.world)
        return out
    finally:
        free(x.seen)
        free(x.stack)
        free(x.trace)
        free(x.choices)
        free(x.world)
