# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The transport contract (transport.pxd) as channels of nonblocking MPI requests.

*Channels.*  The receives of one (peer, tag) form a first-in-first-out channel and only the oldest
is ever tested.  So events of a channel come in the order posted, a poll tests few requests, and
when a peer dies no later receive can pass for an earlier one that was lost.  Tag 0 carries control
messages: `RING` receives stay posted to every peer, from before the first message is sent.

*Death.*  A peer is dead when the oldest control receive from it fails with MPI_ERR_PROC_FAILED, and
not sooner: what it said before has then been handed over in order.  A request that fails for
another reason is checked against MPI's own list of the dead (a local call); when its peer lives,
the error is kept in `error_class` and its data request ends as LOST.

*What Open MPI does that is not obvious* (read in the 5.0 sources).  MPI_Testsome marks a dead
peer's requests before it takes in what the peer had sent, so `poll` lets MPI make progress first
when the last poll is a while ago.  When one request of the array fails, MPI_Testsome also frees
other failed ones that it does not report: `scan_vanished` finds them.  A message above the eager
limit comes in fragments that name their request by address; a fragment that is under way when its
sender's death is noticed may land in a reused request.  Chunks belong below the eager limit.
"""
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from posix.time cimport clock_gettime, nanosleep, timespec, CLOCK_MONOTONIC

from cython_kernels.doorbell cimport bell_written
from cython_kernels.mpi_calls cimport (
    MPI_BYTE, MPI_Cancel, MPI_Comm, MPI_Comm_rank, MPI_Comm_size, MPI_ERR_COUNT,
    MPI_ERR_IN_STATUS, MPI_ERR_NO_MEM, MPI_Get_count, MPI_Irecv, MPI_Isend, MPI_REQUEST_NULL,
    MPI_Request, MPI_Request_free, MPI_STATUS_IGNORE, MPI_SUCCESS, MPI_Status, MPI_Test,
    MPI_Testsome, hopcoll_class, hopcoll_class_is_death, hopcoll_coarse_clock,
    hopcoll_peer_failed, hopcoll_progress)
from cython_kernels.transport cimport (
    Transport, Event, EVENT_CONTROL, EVENT_SENT, EVENT_RECEIVED, EVENT_LOST, EVENT_DEAD)

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void** memory, size_t alignment, size_t nbytes)

cdef extern from *:
    """
    #include <sys/mman.h>
    #ifdef MADV_HUGEPAGE
    #define hopcoll_ask_huge(memory, nbytes) madvise(memory, nbytes, MADV_HUGEPAGE)
    #else
    #define hopcoll_ask_huge(memory, nbytes) 0
    #endif
    """
    int hopcoll_ask_huge(void* memory, size_t nbytes) nogil

cdef enum:
    # Control receives that stay posted to each peer.  More messages than that between two polls are
    # safe; MPI buffers them.
    RING = 8
    CONTROL_TAG = 0
    MESSAGE_BYTES_MAX = 0x7FFFFFFF
    ZEROED_BYTES_MAX = 65536
    SPARE_BYTES_MAX = 128 << 20       # of large blocks that are kept for the next
    BLOCK_HEAD = 64
    HUGE_BYTES = 2 << 20              # a page of the other size, where the system has them
    # Of what waits in shared memory MPI takes in 31 fragments at a time.
    ROUNDS_AFTER_A_PAUSE = 32
    PAUSE_NS = 10000000


# ---- memory -------------------------------------------------------------------------------

cdef void record_error(World* world, int error_class, int peer) noexcept nogil:
    if world.error_class == 0:
        world.error_class = error_class
        world.error_peer = peer


cdef Node* take_node(World* world, bint with_memory) noexcept nogil:
    """A spare node, or a new one when more requests are open than ever before."""
    cdef Node** spare = &world.spare_slots if with_memory else &world.spare_nodes
    cdef Node* node = spare[0]
    if node != NULL:
        spare[0] = node.next
    else:
        node = <Node*>calloc(1, sizeof(Node) + (world.control_bytes_max if with_memory else 0))
        if node == NULL:
            record_error(world, MPI_ERR_NO_MEM, -1)
            return NULL
        if with_memory:
            node.memory = <unsigned char*>(node + 1)
        node.registered = world.registered
        world.registered = node
    node.next = NULL
    node.refused = 0
    return node


cdef void give_node(World* world, Node* node) noexcept nogil:
    cdef Node** spare = &world.spare_slots if node.memory != NULL else &world.spare_nodes
    node.next = spare[0]
    spare[0] = node


cdef int grow_table(World* world) noexcept nogil:
    """Doubles the arrays of MPI_Testsome; 0 when memory is short."""
    cdef int capacity = 2 * world.capacity
    cdef void* memory = realloc(world.requests, capacity * sizeof(MPI_Request))
    if memory == NULL:
        return 0
    world.requests = <MPI_Request*>memory
    memory = realloc(world.nodes, capacity * sizeof(Node*))
    if memory == NULL:
        return 0
    world.nodes = <Node**>memory
    memory = realloc(world.indices, capacity * sizeof(int))
    if memory == NULL:
        return 0
    world.indices = <int*>memory
    memory = realloc(world.statuses, capacity * sizeof(MPI_Status))
    if memory == NULL:
        return 0
    world.statuses = <MPI_Status*>memory
    world.capacity = capacity
    return 1


cdef bint table_has_room(World* world) noexcept nogil:
    if world.active < world.capacity or grow_table(world):
        return True
    record_error(world, MPI_ERR_NO_MEM, -1)
    return False


cdef void watch(World* world, Node* node, MPI_Request request) noexcept nogil:
    """Adds a request to those that poll tests; the caller made sure of the room."""
    world.requests[world.active] = request
    world.nodes[world.active] = node
    world.active += 1


cdef void push(World* world, int kind, int peer, int64_t token, int64_t nbytes,
               Node* node) noexcept nogil:
    cdef Queued* queued
    cdef Queued* larger
    cdef int64_t i
    if world.queue_count == world.queue_room:
        larger = <Queued*>malloc(2 * world.queue_room * sizeof(Queued))
        if larger == NULL:
            record_error(world, MPI_ERR_NO_MEM, peer)
            return
        for i in range(world.queue_count):
            larger[i] = world.queue[(world.queue_first + i) & (world.queue_room - 1)]
        free(world.queue)
        world.queue = larger
        world.queue_first = 0
        world.queue_room *= 2
    queued = &world.queue[(world.queue_first + world.queue_count) & (world.queue_room - 1)]
    queued.event.kind = kind
    queued.event.peer = peer
    queued.event.token = token
    queued.event.nbytes = nbytes
    queued.event.payload = node.memory if node != NULL else NULL
    queued.node = node
    world.queue_count += 1


# ---- channels -----------------------------------------------------------------------------

cdef Channel* find_channel(World* world, int peer, int tag) noexcept nogil:
    """The data channel of (peer, tag); a new one when it is not open; NULL without memory."""
    cdef Channel* channel = world.data[peer]
    while channel != NULL:
        if channel.tag == tag:
            return channel
        channel = channel.next
    channel = world.spare_channels
    if channel != NULL:
        world.spare_channels = channel.next
    else:
        channel = <Channel*>malloc(sizeof(Channel))
        if channel == NULL:
            record_error(world, MPI_ERR_NO_MEM, peer)
            return NULL
    memset(channel, 0, sizeof(Channel))
    channel.tag = tag
    channel.next = world.data[peer]
    world.data[peer] = channel
    return channel


cdef void drop_channel(World* world, int peer, Channel* channel) noexcept nogil:
    cdef Channel** link = &world.data[peer]
    while link[0] != channel:
        link = &link[0].next
    link[0] = channel.next
    channel.next = world.spare_channels
    world.spare_channels = channel


cdef inline Channel* channel_of(World* world, Node* node) noexcept nogil:
    if node.kind == CONTROL_IN:
        return &world.control[node.peer]
    return find_channel(world, node.peer, node.tag)


cdef inline void append(Channel* channel, Node* node) noexcept nogil:
    node.next = NULL
    if channel.head == NULL:
        channel.head = node
    else:
        channel.tail.next = node
    channel.tail = node


cdef void post_control(World* world, Node* node) noexcept nogil:
    """Posts a slot of the ring of control receives behind the others of its peer."""
    cdef Channel* channel = &world.control[node.peer]
    cdef MPI_Request request = MPI_REQUEST_NULL
    if world.dead[node.peer]:
        give_node(world, node)
        return
    node.refused = hopcoll_class(MPI_Irecv(
        node.memory, <int>world.control_bytes_max, MPI_BYTE, node.peer, CONTROL_TAG, world.comm,
        &request))
    node.request = request
    if channel.head == NULL and node.refused:
        finish(world, node, node.refused, NULL, channel)
        return
    append(channel, node)
    if channel.head == node and table_has_room(world):
        watch(world, node, request)


cdef void finish(World* world, Node* node, int error_class, const MPI_Status* status,
                 Channel* channel) noexcept nogil:
    """Turns the end of a request into its event and lets go of the node."""
    cdef int count = 0
    cdef int peer = node.peer
    cdef bint death = False
    if error_class:
        death = hopcoll_class_is_death(error_class) or hopcoll_peer_failed(world.comm, peer)
        if not death:
            record_error(world, error_class, peer)
    elif node.kind == CONTROL_IN or node.kind == DATA_IN:
        MPI_Get_count(status, MPI_BYTE, &count)
    if node.kind == CONTROL_IN:
        if world.dead[peer]:
            give_node(world, node)
        elif not error_class:
            push(world, EVENT_CONTROL, peer, 0, count, node)
        elif death:
            world.dead[peer] = 1
            if world.error_peer == peer:      # the death explains that error
                world.error_class = 0
            push(world, EVENT_DEAD, peer, 0, 0, NULL)
            give_node(world, node)
        else:
            # Not posted again: an error that stays would be met at every poll.
            give_node(world, node)
    elif node.kind == CONTROL_OUT:
        give_node(world, node)
    elif node.kind == DATA_OUT:
        push(world, EVENT_LOST if error_class else EVENT_SENT, peer, node.token, 0, NULL)
        give_node(world, node)
    else:
        if error_class:
            channel.broken = 1
        if channel.broken:
            push(world, EVENT_LOST, peer, node.token, 0, NULL)
        else:
            push(world, EVENT_RECEIVED, peer, node.token, count, NULL)
        give_node(world, node)


cdef void settle(World* world, int place, int error_class, const MPI_Status* status) noexcept nogil:
    """Ends the request at a place of the table and moves its channel's next one there."""
    cdef Node* node = world.nodes[place]
    cdef Channel* channel
    if world.requests[place] != MPI_REQUEST_NULL:      # a failed one that MPI has kept
        MPI_Request_free(&world.requests[place])
    world.nodes[place] = NULL
    if node.kind == CONTROL_OUT or node.kind == DATA_OUT:
        finish(world, node, error_class, status, NULL)
        return
    channel = channel_of(world, node)
    channel.head = node.next
    finish(world, node, error_class, status, channel)
    while channel.head != NULL:
        node = channel.head
        if not node.refused:
            world.requests[place] = node.request
            world.nodes[place] = node
            return
        channel.head = node.next
        finish(world, node, node.refused, NULL, channel)
    if node.kind == DATA_IN:
        drop_channel(world, node.peer, channel)


cdef void scan_vanished(World* world) noexcept nogil:
    """Finds the requests that MPI_Testsome freed in its error path without reporting them."""
    cdef int place
    cdef Node* node
    for place in range(world.active):
        node = world.nodes[place]
        while node != NULL and world.requests[place] == MPI_REQUEST_NULL:
            # Without a class of its own: MPI's list of the dead decides.
            settle(world, place, MPI_ERR_IN_STATUS, NULL)
            node = world.nodes[place]


cdef void compact(World* world) noexcept nogil:
    cdef int place = 0
    while place < world.active:
        if world.nodes[place] != NULL:
            place += 1
            continue
        world.active -= 1
        world.nodes[place] = world.nodes[world.active]
        world.requests[place] = world.requests[world.active]


cdef void test_requests(World* world) noexcept nogil:
    cdef int done = 0
    cdef int i, place, rc, error_class
    cdef long long now = hopcoll_coarse_clock()
    if now != world.last_poll:
        for i in range(ROUNDS_AFTER_A_PAUSE if now - world.last_poll > PAUSE_NS else 1):
            hopcoll_progress()
        world.last_poll = now
    rc = MPI_Testsome(world.active, world.requests, &done, world.indices, world.statuses)
    if rc == MPI_SUCCESS:
        if done <= 0:          # MPI_UNDEFINED is negative
            return
        for i in range(done):
            settle(world, world.indices[i], 0, &world.statuses[i])
    else:
        if hopcoll_class(rc) != MPI_ERR_IN_STATUS and done <= 0:
            record_error(world, hopcoll_class(rc), -1)
        for i in range(done):
            place = world.indices[i]
            error_class = hopcoll_class(world.statuses[i].MPI_ERROR)
            settle(world, place, error_class, &world.statuses[i])
        scan_vanished(world)
    compact(world)


# ---- the table ----------------------------------------------------------------------------

cdef void mpi_send_control(void* self, int dest, const void* head, int64_t head_bytes,
                           const void* body, int64_t body_bytes) noexcept nogil:
    cdef World* world = <World*>self
    cdef MPI_Request request = MPI_REQUEST_NULL
    cdef Node* node
    cdef int error_class
    cdef int complete = 0
    if world.closed or world.dead[dest]:
        return
    if head_bytes + body_bytes > world.control_bytes_max:
        record_error(world, MPI_ERR_COUNT, dest)
        return
    if not table_has_room(world):
        return
    node = take_node(world, True)
    if node == NULL:
        return
    node.kind = CONTROL_OUT
    node.peer = dest
    node.tag = CONTROL_TAG
    memcpy(node.memory, head, head_bytes)
    if body_bytes:
        memcpy(node.memory + head_bytes, body, body_bytes)
    error_class = hopcoll_class(MPI_Isend(node.memory, <int>(head_bytes + body_bytes), MPI_BYTE,
                                          dest, CONTROL_TAG, world.comm, &request))
    if world.bell != NULL:
        bell_written(world.bell, dest)
    if error_class == 0:
        error_class = hopcoll_class(MPI_Test(&request, &complete, MPI_STATUS_IGNORE))
        if error_class == 0 and not complete:
            watch(world, node, request)
            return
    finish(world, node, error_class, NULL, NULL)


cdef void mpi_send_data(void* self, int dest, int tag, const void* data, int64_t nbytes,
                        int64_t token) noexcept nogil:
    cdef World* world = <World*>self
    cdef MPI_Request request = MPI_REQUEST_NULL
    cdef Node* node
    cdef int error_class
    if nbytes > MESSAGE_BYTES_MAX:
        record_error(world, MPI_ERR_COUNT, dest)
    if world.closed or world.dead[dest] or nbytes > MESSAGE_BYTES_MAX:
        push(world, EVENT_LOST, dest, token, 0, NULL)
        return
    node = take_node(world, False) if table_has_room(world) else NULL
    if node == NULL:
        push(world, EVENT_LOST, dest, token, 0, NULL)
        return
    node.kind = DATA_OUT
    node.peer = dest
    node.tag = tag
    node.token = token
    error_class = hopcoll_class(MPI_Isend(data, <int>nbytes, MPI_BYTE, dest, tag, world.comm,
                                          &request))
    if error_class:
        finish(world, node, error_class, NULL, NULL)
    else:
        watch(world, node, request)


cdef void mpi_recv_data(void* self, int source, int tag, void* data, int64_t nbytes,
                        int64_t token) noexcept nogil:
    cdef World* world = <World*>self
    cdef MPI_Request request = MPI_REQUEST_NULL
    cdef Channel* channel = NULL
    cdef Node* node = NULL
    if nbytes > MESSAGE_BYTES_MAX:
        record_error(world, MPI_ERR_COUNT, source)
    elif not world.closed and table_has_room(world):
        channel = find_channel(world, source, tag)
        if channel != NULL:
            node = take_node(world, False)
            if node == NULL and channel.head == NULL:
                drop_channel(world, source, channel)
    if node == NULL:
        push(world, EVENT_LOST, source, token, 0, NULL)
        return
    node.kind = DATA_IN
    node.peer = source
    node.tag = tag
    node.token = token
    node.refused = hopcoll_class(MPI_Irecv(data, <int>nbytes, MPI_BYTE, source, tag, world.comm,
                                           &request))
    node.request = request
    if channel.head == NULL and node.refused:
        finish(world, node, node.refused, NULL, channel)
        drop_channel(world, source, channel)
        return
    append(channel, node)
    if channel.head == node:
        watch(world, node, request)


cdef int mpi_poll(void* self, Event* event) noexcept nogil:
    cdef World* world = <World*>self
    cdef Queued* queued
    if world.lent != NULL:
        if not world.closed:
            post_control(world, world.lent)
        world.lent = NULL
    if world.queue_count == 0:
        if world.active == 0 or world.closed:
            return 0
        test_requests(world)
        if world.queue_count == 0:
            return 0
    queued = &world.queue[world.queue_first]
    world.queue_first = (world.queue_first + 1) & (world.queue_room - 1)
    world.queue_count -= 1
    event[0] = queued.event
    world.lent = queued.node
    return 1


cdef unsigned char* take_block(int64_t nbytes) noexcept nogil:
    """Fresh memory.  In pages of 4 KiB the first touch of 32 MiB took 26 ms, in huge ones 4."""
    cdef void* block = NULL
    if nbytes < 2 * HUGE_BYTES:
        return <unsigned char*>malloc(nbytes)
    if posix_memalign(&block, HUGE_BYTES, nbytes):
        return NULL
    hopcoll_ask_huge(block, nbytes)
    return <unsigned char*>block


cdef void* mpi_allocate(void* self, int64_t nbytes) noexcept nogil:
    """A block behind a head that says how long it is.  Large ones are left as they are (clearing
    them would cost as much as filling them), and serve again: the pages of fresh memory cost more
    than the bytes that go through them."""
    cdef World* world = <World*>self
    cdef Spare* best = NULL
    cdef Spare* spare
    cdef unsigned char* block
    cdef int i
    if nbytes <= ZEROED_BYTES_MAX:
        block = <unsigned char*>calloc(1, BLOCK_HEAD + nbytes)
    else:
        for i in range(SPARES_MAX):
            spare = &world.spares[i]
            if (spare.block != NULL and nbytes <= spare.nbytes <= 2 * nbytes
                    and (best == NULL or spare.nbytes < best.nbytes)):
                best = spare
        if best != NULL:
            block = best.block
            world.spare_bytes -= best.nbytes
            best.block = NULL
            return block + BLOCK_HEAD
        block = take_block(BLOCK_HEAD + nbytes)
        if block == NULL and world.spare_bytes:
            free_spares(world)
            block = take_block(BLOCK_HEAD + nbytes)
    if block == NULL:
        return NULL
    (<int64_t*>block)[0] = nbytes
    return block + BLOCK_HEAD


cdef void mpi_release(void* self, void* memory) noexcept nogil:
    cdef World* world = <World*>self
    cdef unsigned char* block = <unsigned char*>memory - BLOCK_HEAD
    cdef int64_t nbytes = (<int64_t*>block)[0]
    cdef int i
    if nbytes > ZEROED_BYTES_MAX and world.spare_bytes + nbytes <= SPARE_BYTES_MAX:
        for i in range(SPARES_MAX):
            if world.spares[i].block == NULL:
                world.spares[i].block = block
                world.spares[i].nbytes = nbytes
                world.spare_bytes += nbytes
                return
    free(block)


cdef void free_spares(World* world) noexcept nogil:
    cdef int i
    for i in range(SPARES_MAX):
        free(world.spares[i].block)
        world.spares[i].block = NULL
    world.spare_bytes = 0


cdef void fill_table(Transport* table, World* world) noexcept nogil:
    table.self = world
    table.rank = world.rank
    table.size = world.size
    table.control_bytes_max = world.control_bytes_max
    table.send_control = mpi_send_control
    table.send_data = mpi_send_data
    table.recv_data = mpi_recv_data
    table.poll = mpi_poll
    table.allocate = mpi_allocate
    table.release = mpi_release


# ---- beginning and end --------------------------------------------------------------------

cdef double clock_s() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + 1e-9 * now.tv_nsec


cdef void rest_since(double begin) noexcept nogil:
    """A pause for who has waited since then.  Whoever spins takes the processor from those that it
    waits for, where ranks outnumber cores; a start takes a second."""
    cdef double waited = clock_s() - begin
    cdef timespec nap
    if waited < 1e-3:
        sched_yield()
        return
    nap.tv_sec = 0
    nap.tv_nsec = <long>(1e9 * min(max(waited / 20, 5e-5), 1e-3))
    nanosleep(&nap, NULL)


cdef int wait_request(MPI_Request* request, int* complete, double until) noexcept nogil:
    """Tests until the request is complete or the time has come; returns MPI's code."""
    cdef double begin = clock_s()
    cdef int rc
    while True:
        rc = MPI_Test(request, complete, MPI_STATUS_IGNORE)
        if rc != MPI_SUCCESS or complete[0] or clock_s() >= until:
            return rc
        rest_since(begin)


cdef World* make_world(MPI_Comm comm, int64_t control_bytes_max) noexcept nogil:
    """The state over a communicator that is ours, with all control receives posted; NULL without
    memory."""
    cdef World* world = <World*>calloc(1, sizeof(World))
    cdef int peer, i
    cdef Node* node
    if world == NULL:
        return NULL
    world.comm = comm
    world.error_peer = -1
    world.control_bytes_max = control_bytes_max
    MPI_Comm_rank(comm, &world.rank)
    MPI_Comm_size(comm, &world.size)
    world.capacity = 2 * world.size + 64
    world.queue_room = 64
    while world.queue_room < 4 * world.size:
        world.queue_room *= 2
    world.control = <Channel*>calloc(world.size, sizeof(Channel))
    world.data = <Channel**>calloc(world.size, sizeof(Channel*))
    world.dead = <unsigned char*>calloc(world.size, 1)
    world.requests = <MPI_Request*>calloc(world.capacity, sizeof(MPI_Request))
    world.nodes = <Node**>calloc(world.capacity, sizeof(Node*))
    world.indices = <int*>calloc(world.capacity, sizeof(int))
    world.statuses = <MPI_Status*>calloc(world.capacity, sizeof(MPI_Status))
    world.queue = <Queued*>calloc(world.queue_room, sizeof(Queued))
    if (world.control == NULL or world.data == NULL or world.dead == NULL
            or world.requests == NULL or world.nodes == NULL or world.indices == NULL
            or world.statuses == NULL or world.queue == NULL):
        free_world(world)
        return NULL
    for peer in range(world.size):
        if peer == world.rank:
            continue
        for i in range(RING):
            node = take_node(world, True)
            if node == NULL:
                break            # MPI_ERR_NO_MEM is recorded; the constructor looks
            node.kind = CONTROL_IN
            node.peer = peer
            node.tag = CONTROL_TAG
            post_control(world, node)
    return world


cdef void free_world(World* world) noexcept nogil:
    cdef Node* node = world.registered
    cdef Node* next_node
    cdef Channel* channel
    cdef int peer
    while node != NULL:
        next_node = node.registered
        free(node)
        node = next_node
    if world.data != NULL:
        for peer in range(world.size):
            while world.data[peer] != NULL:
                channel = world.data[peer]
                world.data[peer] = channel.next
                free(channel)
    while world.spare_channels != NULL:
        channel = world.spare_channels
        world.spare_channels = channel.next
        free(channel)
    free_spares(world)
    free(world.control)
    free(world.data)
    free(world.dead)
    free(world.requests)
    free(world.nodes)
    free(world.indices)
    free(world.statuses)
    free(world.queue)
    free(world)


cdef bint drain(World* world, double until) noexcept nogil:
    """Cancels the control receives and waits for every request to end; whether all did."""
    cdef int peer, complete
    cdef Channel* channel
    cdef Node* node
    cdef int place
    cdef bint all_ended = True
    # Sends first: a peer may still need the last messages.
    for place in range(world.active):
        node = world.nodes[place]
        if node.kind == CONTROL_OUT or node.kind == DATA_OUT:
            complete = 0
            if wait_request(&world.requests[place], &complete, until) == 0 and not complete:
                all_ended = False
        else:
            node.request = world.requests[place]
    for peer in range(world.size):
        channel = &world.control[peer]
        while channel != NULL:
            node = channel.head
            while node != NULL:
                if not node.refused and node.request != MPI_REQUEST_NULL:
                    # Posted receives only; one that has matched completes by itself.
                    MPI_Cancel(&node.request)
                    complete = 0
                    if wait_request(&node.request, &complete, until) == 0 and not complete:
                        all_ended = False
                node = node.next
            if channel == &world.control[peer]:
                channel = world.data[peer]
            else:
                channel = channel.next
    return all_ended
