# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A network with a clock: the engines of all ranks, and how long their operations take.

Discrete events in nanoseconds.  A message takes time four times: at its sender's processor
(`send_ns`), on the sender's link and then on the receiver's, one message after the other, each at
the link's bandwidth, and at the receiver's processor (`event_ns`); between the two links lies the
latency.  The ranks of a host share its links, and reach each other past them.  It is the LogGP
model (Alexandrov et al., 1995) with a link for each direction of each host.

What is sent has no content: the engines move whatever is in a buffer that all ranks share.  That
results are right is what `hopcoll._simulation` proves; here it is counted and timed.
"""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint8_t, uint16_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from cython_kernels.transport cimport (
    EVENT_CONTROL, EVENT_DEAD, EVENT_LOST, EVENT_RECEIVED, EVENT_SENT, Event, Transport)
from hopcoll._state cimport *
from hopcoll._state cimport Engine as EngineState
from hopcoll._engine cimport (
    control_bytes_of, engine_event, engine_free, engine_new, engine_rows, engine_tick)
from hopcoll._operation cimport start_operation

cdef extern from "malloc.h" nogil:
    enum:
        M_MMAP_THRESHOLD
    int mallopt(int parameter, int value)
    int malloc_trim(size_t pad)

cdef enum:
    TICK_NS = 1000000         # between two looks of an idle progress thread
    ITEM_BYTES = 8
    FLOAT64 = 11
    NO_OP = 11
    HEADER_BYTES = 64         # of a message on the wire, besides its own
    FEW = 256                 # ranks, each of which has room for whatever may come
    MMAP_FROM = 1 << 25       # so many engines would need more mappings than there may be

cdef enum What:
    WHAT_ARRIVE = 1           # its first byte is at the receiver's link
    WHAT_DELIVER = 2          # its last byte has come
    WHAT_SENT = 3             # its last byte has left
    WHAT_HANDLE = 4           # the rank's processor looks at what has come
    WHAT_TICK = 5
    WHAT_CALL = 6             # the rank's program calls its next operation
    WHAT_KILL = 7
    WHAT_DETECT = 8           # a rank learns that another one is dead

cdef struct Packet:
    int32_t source
    int32_t dest
    int32_t tag
    int32_t control
    int64_t nbytes
    int64_t token
    unsigned char* payload    # of a control message

cdef struct Due:              # something that happens at a time
    int64_t time_ns
    uint64_t order            # equal times in the order in which they were planned
    int32_t what
    int32_t rank
    int64_t more
    Packet* packet

cdef struct Posted:
    int32_t peer
    int32_t tag
    int64_t nbytes
    int64_t token

cdef struct Waiting:          # an event that the processor has not looked at
    Event event
    unsigned char* payload

cdef struct Node:             # a rank
    Fabric* fabric
    Transport table
    EngineState* engine
    Posted* posted
    int32_t posted_count
    int32_t posted_room
    Waiting* inbox
    int32_t inbox_count
    int32_t inbox_room
    int32_t inbox_first
    int32_t dead
    int32_t called
    int32_t handles           # a WHAT_HANDLE is planned
    int32_t ticks             # a WHAT_TICK is planned
    int64_t free_ns           # when its processor is free
    int64_t now_ns            # while its engine runs
    int64_t controls          # control messages that it was sent
    int64_t data_bytes        # that came
    int64_t messages          # that it sent
    int64_t inbox_most
    int64_t posted_most
    int32_t rows_most         # of its engine's tables
    int32_t pad
    Mask detected
    Result* results
    int64_t* begun_ns
    int64_t* ended_ns

cdef struct Link:
    int64_t out_free_ns
    int64_t in_free_ns
    double out_ns             # a byte
    double in_ns

cdef struct Fabric:
    int32_t size
    int32_t hosts
    int32_t steps
    int32_t failed            # memory, or a message that nobody waited for
    Node* nodes
    Link* links               # by host
    int32_t* host
    int64_t* latency_ns       # from host to host; or one for all
    int32_t alike             # ... that
    int32_t pad2
    int64_t near_latency_ns   # between ranks of one host
    double near_ns            # a byte, ...
    int64_t* send_ns          # by rank
    int64_t* event_ns
    int64_t* detect_ns
    int64_t gap_ns            # between the end of an operation and the next call
    Due* heap
    int64_t heap_count
    int64_t heap_room
    uint64_t order
    int64_t now_ns
    int64_t unfinished        # operations of living ranks
    int32_t kind
    int32_t root
    int32_t flags
    int32_t pad
    int64_t count
    unsigned char* buffer


# ---- what is due --------------------------------------------------------------------------

cdef bint before(const Due* a, const Due* b) noexcept nogil:
    return a.time_ns < b.time_ns or (a.time_ns == b.time_ns and a.order < b.order)


cdef void plan_at(Fabric* f, int64_t time_ns, int what, int rank, int64_t more,
               Packet* packet) noexcept nogil:
    cdef int64_t i, up
    cdef Due due
    cdef Due* heap
    if f.heap_count == f.heap_room:
        heap = <Due*>realloc(f.heap, (2 * f.heap_room + 64) * sizeof(Due))
        if heap == NULL:
            f.failed = 1
            return
        f.heap = heap
        f.heap_room = 2 * f.heap_room + 64
    due.time_ns, due.order, due.what, due.rank = time_ns, f.order, what, rank
    due.more, due.packet = more, packet
    f.order += 1
    i = f.heap_count
    f.heap_count += 1
    while i > 0:
        up = (i - 1) // 2
        if not before(&due, &f.heap[up]):
            break
        f.heap[i] = f.heap[up]
        i = up
    f.heap[i] = due


cdef Due next_due(Fabric* f) noexcept nogil:
    cdef Due out = f.heap[0], last
    cdef int64_t i = 0, down
    f.heap_count -= 1
    if f.heap_count == 0:
        return out
    last = f.heap[f.heap_count]
    while True:
        down = 2 * i + 1
        if down >= f.heap_count:
            break
        if down + 1 < f.heap_count and before(&f.heap[down + 1], &f.heap[down]):
            down += 1
        if not before(&f.heap[down], &last):
            break
        f.heap[i] = f.heap[down]
        i = down
    f.heap[i] = last
    return out


cdef void drop_packet(Packet* packet) noexcept nogil:
    if packet != NULL:
        free(packet.payload)
        free(packet)


# ---- what a rank calls --------------------------------------------------------------------

cdef int64_t push_out(Node* node, Packet* packet, int64_t nbytes) noexcept nogil:
    """Puts a message on its way; returns when its last byte has left the sender's memory."""
    cdef Fabric* f = node.fabric
    cdef int here = f.host[packet.source], there = f.host[packet.dest]
    cdef Link* link = &f.links[here]
    cdef int64_t start, wire = nbytes + HEADER_BYTES, took, latency
    node.now_ns += f.send_ns[packet.source]
    node.messages += 1
    if here == there:
        took = <int64_t>(wire * f.near_ns)
        plan_at(f, node.now_ns + took + f.near_latency_ns, WHAT_DELIVER, packet.dest, 0, packet)
        return node.now_ns + took
    start = node.now_ns if node.now_ns > link.out_free_ns else link.out_free_ns
    took = <int64_t>(wire * link.out_ns)
    latency = f.latency_ns[0 if f.alike else here * f.hosts + there]
    link.out_free_ns = start + took
    plan_at(f, start + latency, WHAT_ARRIVE, packet.dest, start + took + latency, packet)
    return start + took


cdef Packet* packet_of(Node* node, int dest, int tag, int64_t nbytes,
                       int64_t token) noexcept nogil:
    cdef Packet* packet = <Packet*>calloc(1, sizeof(Packet))
    if packet == NULL:
        node.fabric.failed = 1
        return NULL
    packet.source, packet.dest, packet.tag = node.table.rank, dest, tag
    packet.nbytes, packet.token = nbytes, token
    return packet


cdef void node_control(void* self, int dest, const void* head, int64_t head_bytes,
                       const void* body, int64_t body_bytes) noexcept nogil:
    cdef Node* node = <Node*>self
    cdef Packet* packet
    if mask_has(&node.detected, dest):
        return
    packet = packet_of(node, dest, 0, head_bytes + body_bytes, 0)
    if packet == NULL:
        return
    packet.control = 1
    packet.payload = <unsigned char*>malloc(packet.nbytes)
    if packet.payload == NULL:
        free(packet)
        node.fabric.failed = 1
        return
    memcpy(packet.payload, head, head_bytes)
    if body_bytes:
        memcpy(packet.payload + head_bytes, body, body_bytes)
    push_out(node, packet, packet.nbytes)


cdef void node_send(void* self, int dest, int tag, const void* data, int64_t nbytes,
                    int64_t token) noexcept nogil:
    cdef Node* node = <Node*>self
    cdef Packet* packet
    cdef int64_t left_ns
    if mask_has(&node.detected, dest):
        tell(node, EVENT_LOST, dest, token, 0, NULL)
        return
    packet = packet_of(node, dest, tag, nbytes, token)
    if packet != NULL:
        left_ns = push_out(node, packet, nbytes)
        packet = packet_of(node, dest, tag, nbytes, token)
        plan_at(node.fabric, left_ns, WHAT_SENT, node.table.rank, 0, packet)


cdef void node_recv(void* self, int source, int tag, void* data, int64_t nbytes,
                    int64_t token) noexcept nogil:
    cdef Node* node = <Node*>self
    cdef Posted* posted
    if mask_has(&node.detected, source):
        tell(node, EVENT_LOST, source, token, 0, NULL)
        return
    if node.posted_count == node.posted_room:
        posted = <Posted*>realloc(node.posted, (2 * node.posted_room + 16) * sizeof(Posted))
        if posted == NULL:
            node.fabric.failed = 1
            return
        node.posted = posted
        node.posted_room = 2 * node.posted_room + 16
    posted = &node.posted[node.posted_count]
    posted.peer, posted.tag, posted.nbytes, posted.token = source, tag, nbytes, token
    node.posted_count += 1
    if node.posted_count > node.posted_most:
        node.posted_most = node.posted_count


cdef int node_poll(void* self, Event* event) noexcept nogil:
    return 0


cdef void* node_allocate(void* self, int64_t nbytes) noexcept nogil:
    return malloc(nbytes if nbytes else 1)


cdef void node_release(void* self, void* memory) noexcept nogil:
    free(memory)


cdef int combine_nothing(void* context, const Operation* op, void* dest, const void* left,
                         const void* right, int64_t count) noexcept nogil:
    return 0


# ---- what happens -------------------------------------------------------------------------

cdef void tell(Node* node, int kind, int peer, int64_t token, int64_t nbytes,
               unsigned char* payload) noexcept nogil:
    """An event for a rank, which its processor looks at when it can."""
    cdef Fabric* f = node.fabric
    cdef Waiting* more
    cdef Waiting* waiting
    cdef int64_t at
    if node.inbox_first and node.inbox_first == node.inbox_count:
        node.inbox_first = node.inbox_count = 0
    if node.inbox_count == node.inbox_room:
        more = <Waiting*>realloc(node.inbox, (2 * node.inbox_room + 16) * sizeof(Waiting))
        if more == NULL:
            free(payload)
            f.failed = 1
            return
        node.inbox = more
        node.inbox_room = 2 * node.inbox_room + 16
    waiting = &node.inbox[node.inbox_count]
    memset(waiting, 0, sizeof(Waiting))
    waiting.event.kind, waiting.event.peer, waiting.event.token = kind, peer, token
    waiting.event.nbytes = nbytes
    waiting.event.payload = payload
    waiting.payload = payload
    node.inbox_count += 1
    if node.inbox_count - node.inbox_first > node.inbox_most:
        node.inbox_most = node.inbox_count - node.inbox_first
    if not node.handles:
        node.handles = 1
        at = f.now_ns if f.now_ns > node.free_ns else node.free_ns
        plan_at(f, at, WHAT_HANDLE, node.table.rank, 0, NULL)


cdef void deliver(Fabric* f, Packet* packet) noexcept nogil:
    cdef Node* node = &f.nodes[packet.dest]
    cdef int i
    # After the report of a death nothing comes of the dead any more.
    if node.dead or mask_has(&node.detected, packet.source):
        drop_packet(packet)
        return
    if packet.control:
        node.controls += 1
        tell(node, EVENT_CONTROL, packet.source, 0, packet.nbytes, packet.payload)
        packet.payload = NULL
        drop_packet(packet)
        return
    for i in range(node.posted_count):
        if node.posted[i].peer == packet.source and node.posted[i].tag == packet.tag:
            break
    else:
        f.failed = 2
        drop_packet(packet)
        return
    node.data_bytes += packet.nbytes
    tell(node, EVENT_RECEIVED, packet.source, node.posted[i].token, packet.nbytes, NULL)
    node.posted_count -= 1
    while i < node.posted_count:
        node.posted[i] = node.posted[i + 1]
        i += 1
    drop_packet(packet)


cdef void learn_of_death(Fabric* f, Node* node, int peer) noexcept nogil:
    cdef int i, kept = 0
    if node.dead or mask_has(&node.detected, peer):
        return
    mask_add(&node.detected, peer)
    tell(node, EVENT_DEAD, peer, 0, 0, NULL)
    for i in range(node.posted_count):
        if node.posted[i].peer == peer:
            tell(node, EVENT_LOST, peer, node.posted[i].token, 0, NULL)
        else:
            node.posted[kept] = node.posted[i]
            kept += 1
    node.posted_count = kept


cdef void look_at_results(Fabric* f, Node* node) noexcept nogil:
    """The program goes on when its operation is complete."""
    cdef int k = node.called - 1
    if k < 0 or node.ended_ns[k] >= 0 or not node.results[k].complete:
        return
    node.ended_ns[k] = node.now_ns
    f.unfinished -= 1
    if node.called < f.steps:
        plan_at(f, node.now_ns + f.gap_ns, WHAT_CALL, node.table.rank, 0, NULL)


cdef void begin_turn(Fabric* f, Node* node) noexcept nogil:
    node.now_ns = f.now_ns if f.now_ns > node.free_ns else node.free_ns


cdef void end_turn(Fabric* f, Node* node) noexcept nogil:
    if node.now_ns // 1000 > node.engine.now_us:
        engine_tick(node.engine, node.now_ns // 1000)
    node.free_ns = node.now_ns
    if engine_rows(node.engine) > node.rows_most:
        node.rows_most = engine_rows(node.engine)
    look_at_results(f, node)
    if node.engine.broken:
        f.failed = 3
    if not node.ticks:
        node.ticks = 1
        plan_at(f, node.now_ns + TICK_NS, WHAT_TICK, node.table.rank, 0, NULL)


cdef void call_next(Fabric* f, Node* node) noexcept nogil:
    cdef Signature sig
    cdef Layout layout
    cdef int k = node.called, rank = node.table.rank
    cdef bint for_root = f.kind == REDUCE or f.kind == GATHER
    cdef unsigned char* send = f.buffer
    cdef unsigned char* recv = f.buffer
    memset(&sig, 0, sizeof(sig))
    memset(&layout, 0, sizeof(layout))
    sig.kind = f.kind
    sig.dtype = FLOAT64
    sig.redop = USER_OP if (f.kind == REDUCE or f.kind == ALLREDUCE or f.kind == REDUCE_SCATTER
                            or f.kind == SCAN or f.kind == EXSCAN) else NO_OP
    sig.root = f.root
    sig.flags = f.flags
    sig.count = f.count
    if f.kind == BARRIER:
        sig.dtype, send, recv = 0, NULL, NULL
    elif f.kind == BCAST:
        send = NULL
    elif for_root and rank != f.root:
        recv = NULL
    elif f.kind == SCATTER and rank != f.root:
        send = NULL
    node.called += 1
    node.begun_ns[k] = node.now_ns
    if start_operation(node.engine, &sig, 0 if f.kind == BARRIER else ITEM_BYTES, send, recv, 0,
                       &layout, &node.results[k]) != START_OK:
        f.failed = 3


cdef void kill(Fabric* f, Node* node) noexcept nogil:
    cdef int r, k
    if node.dead:
        return
    node.dead = 1
    node.posted_count = 0
    for k in range(f.steps):
        if node.ended_ns[k] < 0:
            f.unfinished -= 1
    for r in range(f.size):
        if not f.nodes[r].dead:
            plan_at(f, f.now_ns + f.detect_ns[r], WHAT_DETECT, r, node.table.rank, NULL)


cdef void happen(Fabric* f, const Due* due) noexcept nogil:
    cdef Node* node = &f.nodes[due.rank]
    cdef Link* link = &f.links[f.host[due.rank]]
    cdef Waiting* waiting
    cdef unsigned char* payload
    cdef int64_t done
    f.now_ns = due.time_ns
    if due.what == WHAT_ARRIVE:
        # Its last byte is there at the earliest when it has crossed the sender's link.
        done = f.now_ns if f.now_ns > link.in_free_ns else link.in_free_ns
        done += <int64_t>((due.packet.nbytes + HEADER_BYTES) * link.in_ns)
        link.in_free_ns = done
        plan_at(f, done if done > due.more else due.more, WHAT_DELIVER, due.rank, 0, due.packet)
        return
    if due.what == WHAT_DELIVER:
        deliver(f, due.packet)
        return
    if node.dead:
        drop_packet(due.packet)
        return
    if due.what == WHAT_SENT:
        # A send to a dead rank is lost when it is known, and ends all the same before that.
        tell(node, EVENT_LOST if mask_has(&node.detected, due.packet.dest) else EVENT_SENT,
             due.packet.dest, due.packet.token, 0, NULL)
        drop_packet(due.packet)
    elif due.what == WHAT_HANDLE:
        begin_turn(f, node)
        waiting = &node.inbox[node.inbox_first]
        node.inbox_first += 1
        payload = waiting.payload
        node.now_ns += f.event_ns[due.rank]
        engine_event(node.engine, &waiting.event)
        free(payload)
        end_turn(f, node)
        node.handles = node.inbox_first < node.inbox_count
        if node.handles:
            plan_at(f, node.free_ns, WHAT_HANDLE, due.rank, 0, NULL)
    elif due.what == WHAT_TICK:
        node.ticks = 0
        if f.unfinished > 0:
            begin_turn(f, node)
            end_turn(f, node)
    elif due.what == WHAT_CALL:
        begin_turn(f, node)
        call_next(f, node)
        end_turn(f, node)
    elif due.what == WHAT_KILL:
        kill(f, node)
    elif due.what == WHAT_DETECT:
        learn_of_death(f, node, <int>due.more)


# ---- making and running -------------------------------------------------------------------

cdef void free_fabric(Fabric* f) noexcept nogil:
    cdef int r, i
    cdef int64_t k
    cdef Node* node
    for k in range(f.heap_count):
        drop_packet(f.heap[k].packet)
    for r in range(f.size if f.nodes != NULL else 0):
        node = &f.nodes[r]
        if node.engine != NULL:
            engine_free(node.engine)
        for i in range(node.inbox_first, node.inbox_count):
            free(node.inbox[i].payload)
        free(node.inbox)
        free(node.posted)
        free(node.results)
        free(node.begun_ns)
        free(node.ended_ns)
    free(f.nodes)
    free(f.links)
    free(f.host)
    free(f.heap)
    free(f.buffer)
    free(f.latency_ns)
    free(f.send_ns)
    free(f.event_ns)
    free(f.detect_ns)


cdef bint make_nodes(Fabric* f, const Settings* settings) noexcept nogil:
    cdef int r, k
    cdef Node* node
    f.nodes = <Node*>calloc(f.size, sizeof(Node))
    if f.nodes == NULL:
        return False
    for r in range(f.size):
        node = &f.nodes[r]
        node.fabric = f
        node.table.self = node
        node.table.rank, node.table.size = r, f.size
        node.table.control_bytes_max = control_bytes_of(settings, f.size)
        node.table.send_control = node_control
        node.table.send_data = node_send
        node.table.recv_data = node_recv
        node.table.poll = node_poll
        node.table.allocate = node_allocate
        node.table.release = node_release
        node.results = <Result*>calloc(f.steps, sizeof(Result))
        node.begun_ns = <int64_t*>calloc(f.steps, sizeof(int64_t))
        node.ended_ns = <int64_t*>calloc(f.steps, sizeof(int64_t))
        node.engine = engine_new(&node.table, settings)
        if (node.engine == NULL or node.results == NULL or node.begun_ns == NULL
                or node.ended_ns == NULL):
            return False
        node.engine.user = combine_nothing
        for k in range(f.steps):
            node.begun_ns[k] = node.ended_ns[k] = -1
    return True                   # all on host 0: landing slots would only copy no content


def forecast(int size, str kind, int64_t nbytes, *, hosts, rates, delays_ns, kills, int64_t steps,
             latency_ns, int64_t near_latency_ns, double near_ns, send_ns, event_ns, detect_ns,
             int64_t gap_ns, int64_t chunk_bytes, int window, int64_t eager_bytes, int root,
             int flags, int degree, int64_t turns_max):
    """Runs one operation after the other on a network with a clock; see `hopcoll.forecast`.

    `hosts` gives the host of each rank, `rates` the nanoseconds a byte of each host's links (out,
    in), `latency_ns` those between any two hosts, row by row, `delays_ns` how late each rank comes,
    `kills` pairs of (rank, nanoseconds); `send_ns`, `event_ns` and `detect_ns` are by rank.
    """
    cdef Fabric f
    cdef Settings settings
    cdef Due due
    cdef int64_t turns = 0
    cdef int r, k
    memset(&f, 0, sizeof(f))
    memset(&settings, 0, sizeof(settings))
    settings.chunk_bytes, settings.eager_bytes = chunk_bytes, eager_bytes
    settings.window = window
    settings.retain_bytes_max, settings.retain_budget_bytes = 32768, 4 << 20
    settings.late_budget_bytes = 64 << 20
    settings.ring, settings.active, settings.degree = 128, 4, degree
    if size > FEW:             # memory for the engines of all; so much is never open here
        settings.ring = 8
        mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
    settings.outlets_max = settings.ring * (size if size < FEW else FEW)
    settings.epochs_max = len(kills) + 4
    settings.announce_us, settings.flush_us, settings.patience_us = 250000, 1000, 2000
    settings.report_us = 10000000
    f.size, f.steps, f.hosts = size, steps, len(rates)
    f.kind, f.root, f.flags = KIND_NUMBERS[kind], root, flags
    f.count = -(-nbytes // ITEM_BYTES)
    f.near_latency_ns, f.near_ns, f.gap_ns = near_latency_ns, near_ns, gap_ns
    try:
        blocks = size if kind in ("gather", "allgather", "scatter", "alltoall",
                                  "reduce_scatter") else 1
        f.buffer = <unsigned char*>calloc(1, f.count * ITEM_BYTES * blocks + 64)
        f.links = <Link*>calloc(f.hosts, sizeof(Link))
        f.host = <int32_t*>calloc(size, sizeof(int32_t))
        f.alike = len(latency_ns) == 1
        pairs = len(latency_ns)
        f.latency_ns = <int64_t*>calloc(pairs, sizeof(int64_t))
        f.send_ns = <int64_t*>calloc(size, sizeof(int64_t))
        f.event_ns = <int64_t*>calloc(size, sizeof(int64_t))
        f.detect_ns = <int64_t*>calloc(size, sizeof(int64_t))
        if (f.buffer == NULL or f.links == NULL or f.host == NULL or f.latency_ns == NULL
                or f.send_ns == NULL or f.event_ns == NULL or f.detect_ns == NULL
                or not make_nodes(&f, &settings)):
            raise MemoryError("forecast: no memory for the network")
        for k in range(pairs):
            f.latency_ns[k] = latency_ns[k]
        for k in range(f.hosts):
            f.links[k].out_ns, f.links[k].in_ns = rates[k]
        f.unfinished = size * steps
        for r in range(size):
            f.host[r] = hosts[r]
            f.send_ns[r], f.event_ns[r], f.detect_ns[r] = send_ns[r], event_ns[r], detect_ns[r]
            plan_at(&f, delays_ns[r], WHAT_CALL, r, 0, NULL)
        for rank, time_ns in kills:
            plan_at(&f, time_ns, WHAT_KILL, rank, 0, NULL)
        with nogil:
            while f.heap_count and not f.failed and turns < turns_max and f.unfinished > 0:
                due = next_due(&f)
                happen(&f, &due)
                turns += 1
        if f.failed == 1:
            raise MemoryError("forecast: no memory for what is under way")
        if f.failed:
            raise RuntimeError("forecast: an engine gave up, or got what it had not asked for")
        nodes = []
        for r in range(size):
            nodes.append({
                "dead": bool(f.nodes[r].dead),
                "begun_ns": [f.nodes[r].begun_ns[k] for k in range(steps)],
                "ended_ns": [f.nodes[r].ended_ns[k] for k in range(steps)],
                "controls": f.nodes[r].controls, "messages": f.nodes[r].messages,
                "controls_sent": f.nodes[r].engine.counters.controls_sent,
                "rows": f.nodes[r].rows_most,
                "data_bytes": f.nodes[r].data_bytes, "inbox_most": f.nodes[r].inbox_most,
                "posted_most": f.nodes[r].posted_most,
            })
        return {"events": turns, "through": f.unfinished == 0, "now_ns": f.now_ns, "nodes": nodes}
    finally:
        free_fabric(&f)
        if size > FEW:
            malloc_trim(0)         # the next ones will touch other pages


def ranks_max():
    """How many ranks this build has room for."""
    return RANKS_MAX


KIND_NUMBERS = {"bcast": BCAST, "reduce": REDUCE, "allreduce": ALLREDUCE, "barrier": BARRIER,
                "gather": GATHER, "allgather": ALLGATHER, "scatter": SCATTER,
                "alltoall": ALLTOALL, "reduce_scatter": REDUCE_SCATTER, "scan": SCAN,
                "exscan": EXSCAN}
