# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The simulated network: a transport whose every delivery is somebody's choice.

It keeps the contract of `cython_kernels.transport` and is as unkind as that allows: control
messages of one pair arrive in order, data in order per tag only, nothing else is ordered; a send
ends before, with or long after its delivery; what a dead rank had sent arrives late or, from the
moment that an observer learns of the death, never; open requests with it end in any order.

It also watches the borrowing: memory that a request still holds must neither be released nor, when
a send reads it, be changed.  All memory of a fixed network is one piece, so that an explorer can
copy it back and forth.
"""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint8_t
from libc.stdlib cimport malloc, calloc, realloc, free
from libc.string cimport memcpy, memmove, memset, memcmp
from cython_kernels.transport cimport (
    Transport, Event, EVENT_CONTROL, EVENT_SENT, EVENT_RECEIVED, EVENT_LOST, EVENT_DEAD)
from hopcoll._state cimport Mask, mask_has, mask_add, mask_none

cdef enum:
    BLOCK_HEAD = 16
    FRESH = 0xCD
    SCRIBBLE = 0xEE


cdef uint64_t next_random(Network* network) noexcept nogil:
    cdef uint64_t z
    network.random += 0x9E3779B97F4A7C15ULL      # SplitMix64
    z = network.random
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL
    return z ^ (z >> 31)


# ---- memory -------------------------------------------------------------------------------

cdef void* region_allocate(Region* region, int64_t nbytes) noexcept nogil:
    """Memory of one rank; a block that was released serves again for the same length."""
    cdef unsigned char* block = region.free_list
    cdef unsigned char* before = NULL
    nbytes = (nbytes + 15) & ~15
    if nbytes == 0:
        nbytes = 16
    while block != NULL and (<int64_t*>block)[0] != nbytes:
        before = block
        block = (<unsigned char**>block)[1]
    if block == NULL:
        if region.used + nbytes + BLOCK_HEAD > region.room:
            return NULL
        block = region.base + region.used
        (<int64_t*>block)[0] = nbytes
        region.used += nbytes + BLOCK_HEAD
    elif before == NULL:
        region.free_list = (<unsigned char**>block)[1]
    else:
        (<unsigned char**>before)[1] = (<unsigned char**>block)[1]
    (<unsigned char**>block)[1] = NULL
    region.live_bytes += nbytes
    return block + BLOCK_HEAD


cdef void* port_allocate(void* self, int64_t nbytes) noexcept nogil:
    cdef void* memory = region_allocate(&(<Port*>self).region, nbytes)
    if memory != NULL:
        memset(memory, FRESH, nbytes)        # nobody may count on zeros
    return memory


cdef void port_release(void* self, void* memory) noexcept nogil:
    cdef Port* port = <Port*>self
    cdef Region* region = &port.region
    cdef unsigned char* block = <unsigned char*>memory - BLOCK_HEAD
    cdef int64_t nbytes = (<int64_t*>block)[0]
    if is_borrowed(port, <unsigned char*>memory, nbytes):
        port.network.error = BORROWED_FREED
    memset(memory, 0, nbytes)
    (<unsigned char**>block)[1] = region.free_list
    region.free_list = block
    region.live_bytes -= nbytes


cdef bint is_borrowed(Port* port, const unsigned char* memory, int64_t nbytes) noexcept nogil:
    cdef int i, dest
    cdef Channel* channel
    for i in range(port.posted_count):
        if memory <= port.posted[i].data < memory + nbytes:
            return True
    for i in range(port.late_count):
        if memory <= port.late[i].dest < memory + nbytes:
            return True
    for dest in range(port.network.size):
        channel = channel_of(port.network, port.rank, dest)
        for i in range(channel.data_count):
            if not channel.data[i].eager and memory <= channel.data[i].data < memory + nbytes:
                return True
    return False


cdef void check_borrowed(Network* network, int rank) noexcept nogil:
    """After a step of `rank`: what its open sends read must be as it was."""
    cdef int i, dest
    cdef Channel* channel
    cdef DataMessage* message
    for dest in range(network.size):
        channel = channel_of(network, rank, dest)
        if mask_has(&network.ports[rank].given_up, dest):
            continue               # whatever it gets, it has no part in
        for i in range(channel.data_count):
            message = &channel.data[i]
            if (not message.eager and 0 < message.nbytes <= COPY_MAX
                    and memcmp(message.copy, message.data, message.nbytes) != 0):
                network.error = BORROWED_CHANGED


# ---- making -------------------------------------------------------------------------------

cdef inline int64_t aligned(int64_t nbytes) noexcept nogil:
    return (nbytes + 15) & ~15


cdef int64_t network_bytes(int size, const Rooms* rooms) noexcept nogil:
    """How much memory `network_init` lays out."""
    return (size * (aligned(sizeof(Port)) + aligned(rooms.region_bytes)
                    + aligned(rooms.posted * sizeof(Posted))
                    + aligned(rooms.events * sizeof(Event)) + aligned(rooms.late * sizeof(Late)))
            + size * size * (aligned(sizeof(Channel)) + aligned(rooms.channel_bytes)
                             + aligned(rooms.data * sizeof(DataMessage))) + 64)


cdef void network_init(Network* network, int size, const Rooms* rooms, int64_t control_bytes_max,
                       unsigned char* memory) noexcept nogil:
    """Lays a network out in zeroed `memory`; rooms of 0 grow when they are needed."""
    cdef int i
    cdef Port* port
    cdef Channel* channel
    memory = <unsigned char*>aligned(<int64_t>memory)
    network.size = size
    network.send_budget = -1
    network.ports = <Port*>memory
    memory += aligned(size * sizeof(Port))
    network.channels = <Channel*>memory
    memory += aligned(size * size * sizeof(Channel))
    for i in range(size * size):
        channel = &network.channels[i]
        if rooms.channel_bytes:
            channel.bytes = memory
            channel.room = rooms.channel_bytes
            memory += aligned(rooms.channel_bytes)
        if rooms.data:
            channel.data = <DataMessage*>memory
            channel.data_room = rooms.data
            memory += aligned(rooms.data * sizeof(DataMessage))
    for i in range(size):
        port = &network.ports[i]
        port.network = network
        port.rank = i
        if rooms.posted:
            port.posted = <Posted*>memory
            port.posted_room = rooms.posted
            memory += aligned(rooms.posted * sizeof(Posted))
        if rooms.events:
            port.events = <Event*>memory
            port.events_room = rooms.events
            memory += aligned(rooms.events * sizeof(Event))
        if rooms.late:
            port.late = <Late*>memory
            port.late_room = rooms.late
            memory += aligned(rooms.late * sizeof(Late))
        port.region.base = memory
        port.region.room = rooms.region_bytes
        memory += aligned(rooms.region_bytes)
        port.table.self = port
        port.table.rank = i
        port.table.size = size
        port.table.control_bytes_max = control_bytes_max
        port.table.send_control = port_send_control
        port.table.send_data = port_send_data
        port.table.recv_data = port_recv_data
        port.table.poll = port_poll
        port.table.allocate = port_allocate
        port.table.release = port_release


cdef void network_clear(Network* network) noexcept nogil:
    """Gives back what grew; the laid-out memory is the caller's."""
    cdef int i
    for i in range(network.size):
        drop_events(&network.ports[i])
        if not network.fixed:
            free(network.ports[i].posted)
            free(network.ports[i].events)
            free(network.ports[i].late)
    if not network.fixed:
        for i in range(network.size * network.size):
            free(network.channels[i].bytes)
            free(network.channels[i].data)


cdef void* grown(Network* network, void* items, int count, int32_t* room,
                 int64_t item_bytes) noexcept nogil:
    """Room for one more item behind `count`; NULL when a fixed network is full."""
    if count < room[0]:
        return items
    if network.fixed:
        network.error = NO_ROOM
        return NULL
    room[0] = 2 * room[0] + 4
    return realloc(items, room[0] * item_bytes)


# ---- what a rank calls --------------------------------------------------------------------

cdef bint may_send(Network* network) noexcept nogil:
    """False when the rank of this step dies before this send."""
    if network.send_budget >= 0 and network.sends >= network.send_budget:
        network.dying = 1
        return False
    network.sends += 1
    return True


cdef void push_event(Port* port, int kind, int peer, int64_t token, int64_t nbytes,
                     const unsigned char* payload) noexcept nogil:
    cdef Event* event
    cdef void* room = grown(port.network, port.events, port.events_count, &port.events_room,
                            sizeof(Event))
    if room == NULL:
        free(<void*>payload)
        return
    port.events = <Event*>room
    event = &port.events[port.events_count]
    memset(event, 0, sizeof(Event))
    event.kind = kind
    event.peer = peer
    event.token = token
    event.nbytes = nbytes
    event.payload = payload
    port.events_count += 1


cdef void push_late(Port* port, int kind, int peer, int64_t token, int64_t nbytes,
                    unsigned char* dest, const unsigned char* copy) noexcept nogil:
    cdef Late* late
    cdef void* room = grown(port.network, port.late, port.late_count, &port.late_room,
                            sizeof(Late))
    if room == NULL:
        return
    port.late = <Late*>room
    late = &port.late[port.late_count]
    memset(late, 0, sizeof(Late))
    late.event.kind = kind
    late.event.peer = peer
    late.event.token = token
    late.event.nbytes = nbytes
    late.dest = dest
    if copy != NULL:
        memcpy(late.copy, copy, nbytes)
    port.late_count += 1


cdef void push_lost(Port* port, int peer, int64_t token) noexcept nogil:
    cdef int delay = port.network.lost_delay
    cdef int i
    if delay == DELAY_ANY:
        delay = DELAY_LATE if next_random(port.network) & 1 else DELAY_NONE
        for i in range(port.late_count):
            if port.late[i].event.token == token:
                delay = DELAY_LATE            # one stream's receives end in their order
    if delay == DELAY_LATE:
        push_late(port, EVENT_LOST, peer, token, 0, NULL, NULL)
    else:
        push_event(port, EVENT_LOST, peer, token, 0, NULL)


cdef void port_send_control(void* self, int dest, const void* head, int64_t head_bytes,
                            const void* body, int64_t body_bytes) noexcept nogil:
    cdef Port* port = <Port*>self
    cdef Network* network = port.network
    cdef Channel* channel = channel_of(network, port.rank, dest)
    cdef int64_t total = head_bytes + body_bytes
    cdef int64_t padded = (total + 7) & ~7
    cdef unsigned char* at
    if not may_send(network):
        return
    network.controls += 1
    if mask_has(&port.detected, dest) or network.ports[dest].dead or network.ports[dest].left:
        return
    if channel.used + padded + 8 > channel.room:
        if network.fixed:
            network.error = NO_ROOM
            return
        channel.room = 2 * (channel.used + padded + 8)
        channel.bytes = <unsigned char*>realloc(channel.bytes, channel.room)
    at = channel.bytes + channel.used
    (<int64_t*>at)[0] = total
    memcpy(at + 8, head, head_bytes)
    if body_bytes:
        memcpy(at + 8 + head_bytes, body, body_bytes)
    memset(at + 8 + total, 0, padded - total)
    channel.used += padded + 8


cdef void port_send_data(void* self, int dest, int tag, const void* data, int64_t nbytes,
                         int64_t token) noexcept nogil:
    cdef Port* port = <Port*>self
    cdef Network* network = port.network
    cdef Channel* channel = channel_of(network, port.rank, dest)
    cdef DataMessage* message
    cdef void* room
    cdef int delay = network.sent_delay
    if not may_send(network):
        return
    if mask_has(&port.detected, dest):
        push_lost(port, dest, token)
        return
    room = grown(network, channel.data, channel.data_count, &channel.data_room,
                 sizeof(DataMessage))
    if room == NULL:
        return
    channel.data = <DataMessage*>room
    message = &channel.data[channel.data_count]
    memset(message, 0, sizeof(DataMessage))
    message.tag = tag
    message.nbytes = nbytes
    message.token = token
    message.data = <const unsigned char*>data
    if nbytes <= COPY_MAX and nbytes > 0:
        memcpy(message.copy, data, nbytes)
    if nbytes == 0:
        delay = DELAY_EAGER
    elif delay == DELAY_ANY:
        delay = DELAY_EAGER if next_random(network) & 1 else DELAY_NONE
    channel.data_count += 1
    if delay == DELAY_EAGER and nbytes <= COPY_MAX:
        message.eager = 1
        push_event(port, EVENT_SENT, dest, token, 0, NULL)
        if network.ports[dest].dead:
            drop_data(channel, channel.data_count - 1)


cdef void port_recv_data(void* self, int source, int tag, void* data, int64_t nbytes,
                         int64_t token) noexcept nogil:
    cdef Port* port = <Port*>self
    cdef Posted* posted
    cdef void* room
    if mask_has(&port.detected, source):
        push_lost(port, source, token)
        return
    room = grown(port.network, port.posted, port.posted_count, &port.posted_room, sizeof(Posted))
    if room == NULL:
        return
    port.posted = <Posted*>room
    posted = &port.posted[port.posted_count]
    posted.peer = source
    posted.tag = tag
    posted.nbytes = nbytes
    posted.token = token
    posted.data = <unsigned char*>data
    port.posted_count += 1


cdef int port_poll(void* self, Event* event) noexcept nogil:
    cdef Port* port = <Port*>self
    free(port.payload)
    port.payload = NULL
    if port.events_count == 0:
        return 0
    event[0] = port.events[0]
    port.payload = <unsigned char*>event.payload
    port.events_count -= 1
    memmove(port.events, port.events + 1, port.events_count * sizeof(Event))
    return 1


# ---- what the one who chooses calls -------------------------------------------------------

cdef void deliver_control(Network* network, int source, int dest) noexcept nogil:
    """The oldest control message of a pair arrives."""
    cdef Channel* channel = channel_of(network, source, dest)
    cdef int64_t total = (<int64_t*>channel.bytes)[0]
    cdef int64_t padded = (total + 7) & ~7
    cdef unsigned char* copy = <unsigned char*>malloc(padded + 1)
    memcpy(copy, channel.bytes + 8, total)
    channel.used -= padded + 8
    memmove(channel.bytes, channel.bytes + padded + 8, channel.used)
    push_event(&network.ports[dest], EVENT_CONTROL, source, 0, total, copy)


cdef int find_posted(const Port* port, int peer, int tag) noexcept nogil:
    cdef int i
    for i in range(port.posted_count):
        if port.posted[i].peer == peer and port.posted[i].tag == tag:
            return i
    return -1


cdef void drop_posted(Port* port, int i) noexcept nogil:
    port.posted_count -= 1
    memmove(port.posted + i, port.posted + i + 1, (port.posted_count - i) * sizeof(Posted))


cdef void drop_data(Channel* channel, int i) noexcept nogil:
    channel.data_count -= 1
    memmove(channel.data + i, channel.data + i + 1, (channel.data_count - i) * sizeof(DataMessage))


cdef void drop_events(Port* port) noexcept nogil:
    cdef int i
    for i in range(port.events_count):
        free(<void*>port.events[i].payload)
    port.events_count = 0
    free(port.payload)
    port.payload = NULL


cdef bint first_of_tag(const Channel* channel, int i) noexcept nogil:
    """Whether data message `i` may be the next: no older one of its tag waits."""
    cdef int j
    for j in range(i):
        if channel.data[j].tag == channel.data[i].tag:
            return False
    return True


cdef bint first_of_token(const Port* port, int i) noexcept nogil:
    """Whether late event `i` may come now: one stream's requests end in their order."""
    cdef int j
    for j in range(i):
        if port.late[j].event.token == port.late[i].event.token:
            return False
    return True


cdef void deliver_data(Network* network, int source, int dest, int i) noexcept nogil:
    """Data message `i` of a pair arrives, and its sender learns of it, or will."""
    cdef Channel* channel = channel_of(network, source, dest)
    cdef DataMessage message = channel.data[i]
    cdef Port* port = &network.ports[dest]
    cdef Port* sender = &network.ports[source]
    cdef int k = find_posted(port, source, message.tag)
    cdef int delay = network.sent_delay
    if k < 0 or message.nbytes > port.posted[k].nbytes:
        network.error = UNEXPECTED_DATA
        return
    if message.nbytes:
        if message.nbytes <= COPY_MAX:
            memcpy(port.posted[k].data, message.copy, message.nbytes)
        else:
            memcpy(port.posted[k].data, message.data, message.nbytes)
    push_event(port, EVENT_RECEIVED, source, port.posted[k].token, message.nbytes, NULL)
    drop_posted(port, k)
    drop_data(channel, i)
    if message.eager or sender.dead:
        return
    if delay == DELAY_ANY:
        delay = DELAY_LATE if next_random(network) & 1 else DELAY_NONE
    if delay == DELAY_LATE:
        push_late(sender, EVENT_SENT, dest, message.token, 0, NULL, NULL)
    else:
        push_event(sender, EVENT_SENT, dest, message.token, 0, NULL)


cdef void deliver_late(Network* network, int rank, int i) noexcept nogil:
    """A request that had ended on the network ends for its rank."""
    cdef Port* port = &network.ports[rank]
    cdef Late* late = &port.late[i]
    if late.dest != NULL:
        memcpy(late.dest, late.copy, late.event.nbytes)
    push_event(port, late.event.kind, late.event.peer, late.event.token, late.event.nbytes, NULL)
    port.late_count -= 1
    memmove(late, late + 1, (port.late_count - i) * sizeof(Late))


cdef void forget_port(Network* network, int rank) noexcept nogil:
    """Nothing reaches this rank any more.  Its own messages are still under way, and sends that
    borrow memory wait for their end."""
    cdef Port* port = &network.ports[rank]
    cdef Channel* channel
    cdef int i, source
    drop_events(port)
    port.posted_count = 0
    port.late_count = 0
    for source in range(network.size):
        channel = channel_of(network, source, rank)
        channel.used = 0
        for i in range(channel.data_count - 1, -1, -1):
            if channel.data[i].eager:
                drop_data(channel, i)


cdef void kill_port(Network* network, int rank) noexcept nogil:
    network.ports[rank].dead = 1
    forget_port(network, rank)


cdef void leave_port(Network* network, int rank) noexcept nogil:
    """The rank ends in peace: what it sent will arrive."""
    network.ports[rank].left = 1
    forget_port(network, rank)


cdef void drop_sent(Network* network, int rank, int dest, bint all_of_it) noexcept nogil:
    """The data that a rank sent are lost with its process, and perhaps all else."""
    cdef Channel* channel = channel_of(network, rank, dest)
    channel.data_count = 0
    if all_of_it:
        channel.used = 0


cdef void detect_death(Network* network, int observer, int peer) noexcept nogil:
    """The observer learns of a death; what it had not received by now is lost.  Only data that a
    receive already waits for may still be seen to have come."""
    cdef Port* port = &network.ports[observer]
    cdef Channel* incoming = channel_of(network, peer, observer)
    cdef Channel* outgoing = channel_of(network, observer, peer)
    cdef Posted* posted
    cdef bint dead_first = network.lost_delay != DELAY_ANY or next_random(network) & 1
    cdef int i, k
    if dead_first:
        push_event(port, EVENT_DEAD, peer, 0, 0, NULL)
    i = 0
    while i < port.posted_count:
        posted = &port.posted[i]
        if posted.peer != peer:
            i += 1
            continue
        for k in range(incoming.data_count):
            if incoming.data[k].tag == posted.tag:
                break
        else:
            k = -1
        # Only the first ones of a stream: a receive that is lost loses those behind it.
        if (k >= 0 and network.lost_delay == DELAY_ANY and next_random(network) & 1
                and incoming.data[k].nbytes <= COPY_MAX):
            push_late(port, EVENT_RECEIVED, peer, posted.token, incoming.data[k].nbytes,
                      posted.data, incoming.data[k].copy)
            drop_data(incoming, k)
        else:
            # What was to come may have been written, in part or whole.
            memset(posted.data, SCRIBBLE, posted.nbytes)
            push_lost(port, peer, posted.token)
            for k in range(incoming.data_count - 1, -1, -1):
                if incoming.data[k].tag == posted.tag:
                    drop_data(incoming, k)
        drop_posted(port, i)
    incoming.used = 0
    incoming.data_count = 0
    mask_add(&port.detected, peer)
    for i in range(outgoing.data_count):
        if not outgoing.data[i].eager:
            push_lost(port, peer, outgoing.data[i].token)
    outgoing.data_count = 0
    outgoing.used = 0
    if not dead_first:
        push_event(port, EVENT_DEAD, peer, 0, 0, NULL)


# ---- Python -------------------------------------------------------------------------------

cdef class SimulatedNetwork:
    """A network alone, without engines: for tests that play the ranks themselves.

    Parameters
    ----------
    size : int
        Number of ports.
    control_bytes_max : int
        The longest control message.
    region_bytes : int
        Memory that each port can allocate.
    """
    cdef Network network
    cdef unsigned char* memory

    def __cinit__(self, int size, *, int64_t control_bytes_max=1 << 16,
                  int64_t region_bytes=1 << 22):
        cdef Rooms rooms
        memset(&rooms, 0, sizeof(Rooms))
        rooms.region_bytes = region_bytes
        self.memory = <unsigned char*>calloc(1, network_bytes(size, &rooms))
        if self.memory == NULL:
            raise MemoryError("simulated network: no memory")
        network_init(&self.network, size, &rooms, control_bytes_max, self.memory)

    def __dealloc__(self):
        network_clear(&self.network)
        free(self.memory)

    def port(self, int rank):
        """The port of a rank; it keeps the network alive."""
        if not 0 <= rank < self.network.size:
            raise ValueError(f"rank: {rank} is not in 0..{self.network.size - 1}")
        return SimulatedPort(self, rank)

    def deliver_all(self):
        """Delivers everything that is under way between the living; returns how much it was."""
        cdef int source, dest, count = 0, before = -1
        cdef Channel* channel
        while before != count:
            before = count
            for source in range(self.network.size):
                for dest in range(self.network.size):
                    if self.network.ports[dest].dead:
                        continue
                    channel = channel_of(&self.network, source, dest)
                    while channel.used:
                        deliver_control(&self.network, source, dest)
                        count += 1
                    while channel.data_count and not self.network.error:
                        if find_posted(&self.network.ports[dest], source,
                                       channel.data[0].tag) < 0:
                            break          # it waits for its receive
                        deliver_data(&self.network, source, dest, 0)
                        count += 1
        return count

    def kill(self, int rank):
        """The rank dies; what it sent is still under way."""
        kill_port(&self.network, rank)

    def detect(self, int observer, int rank):
        """The observer learns that `rank` is dead; what it had not received yet is lost."""
        if not self.network.ports[rank].dead:
            raise ValueError(f"rank: {rank} is alive")
        if not mask_has(&self.network.ports[observer].detected, rank):
            detect_death(&self.network, observer, rank)

    @property
    def error(self):
        """None, or the rule that a caller of the ports broke."""
        return {NETWORK_FINE: None, UNEXPECTED_DATA: "unexpected data",
                BORROWED_CHANGED: "borrowed memory changed",
                BORROWED_FREED: "borrowed memory released", NO_ROOM: "no room"}[self.network.error]


cdef class SimulatedPort:
    """One rank's end of a `SimulatedNetwork`."""
    cdef SimulatedNetwork owner
    cdef int index

    def __init__(self, SimulatedNetwork owner, int rank):
        self.owner = owner
        self.index = rank

    @property
    def rank(self):
        return self.index

    @property
    def live_bytes(self):
        """Memory that was allocated and not released."""
        return self.owner.network.ports[self.index].region.live_bytes

    def table_address(self):
        """Address of the port's `Transport`."""
        return <size_t>&self.owner.network.ports[self.index].table
