# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Contexts: the engines of many communicators over the transport of one, the *root*.

A context is a transport of its own (the contract of `cython_kernels.transport`) for some ranks of
the root, numbered anew.  Nothing is ever connected for it.  A control message goes out behind a
head that names the receiver's end; the root's messages have none, and cost nothing.  A data
request carries the context's slot in bits of its token that nobody uses.  A death is told to every
context that has the rank.

An end of a context is named by what its owner has chosen: a *slot*, and a *serial* number that the
process never uses twice.  The owners tell each other these handles before the context is used
(`hopcoll._groups`), so that nobody has to agree on a name, and what is late for a context that is
closed meets another serial and is dropped: only a rank that heard this one's good-bye can have
sent it, and it waits for nothing.

A context goes through these states:

reserved   it has a slot and a serial, but no ranks.  What comes is dropped, but for a good-bye: a
           rank whose wait for the others was interrupted has left before they were ready.
open       it takes messages.  Only who knows that all ranks have opened theirs sends any, so an
           open context that has heard of nobody stays silent; above all it is not told of deaths.
told       it knows the dead so far, and hears of the next ones at once.
detached   its slot is free.  No data request is open.

Idle contexts cost nothing: `Hub.awake` has a bit for each whose engine waits for its clock.

The store of objects (`hopcoll._store`) is in a context with a slot of its own, which every rank
opens before it meets the others; it has no clock.
"""
from libc.stdlib cimport calloc, free, malloc
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset
from cython_kernels.transport cimport EVENT_CONTROL, EVENT_DEAD
from hopcoll._state cimport (
    Head, MSG_BYE, mask_add, mask_equal, mask_has, mask_none)
from hopcoll._engine cimport engine_event, engine_tick
from hopcoll._membership cimport lose, on_bye, stop
from hopcoll._operation cimport settle
from hopcoll._store cimport (
    GOING_DEAD, GOING_LEFT, GOING_LOST, store_event, store_gone, store_leave, store_new)

cdef enum:
    SLOT_SHIFT = 43           # the bits of a token from here to 58 are nobody's
    SLOT_MASK = 0xffff


# ---- the table ----------------------------------------------------------------------------

cdef int64_t tagged(const Context* context, int64_t token) noexcept nogil:
    return token | (<int64_t>context.slot << SLOT_SHIFT)


cdef void context_send_control(void* self, int dest, const void* head, int64_t head_bytes,
                               const void* body, int64_t body_bytes) noexcept nogil:
    cdef Context* context = <Context*>self
    cdef Transport* below = context.hub.transport
    cdef unsigned char* room = context.hub.room
    memcpy(room, &context.heads[dest], sizeof(ContextHead))
    if 0 < head_bytes <= context.table.control_bytes_max:      # else it is refused below
        memcpy(room + sizeof(ContextHead), head, head_bytes)
    below.send_control(below.self, context.roots[dest], room, sizeof(ContextHead) + head_bytes,
                       body, body_bytes)


cdef void context_send_data(void* self, int dest, int tag, const void* data, int64_t nbytes,
                            int64_t token) noexcept nogil:
    cdef Context* context = <Context*>self
    cdef Transport* below = context.hub.transport
    context.requests += 1
    below.send_data(below.self, context.roots[dest], tag, data, nbytes, tagged(context, token))


cdef void context_recv_data(void* self, int source, int tag, void* data, int64_t nbytes,
                            int64_t token) noexcept nogil:
    cdef Context* context = <Context*>self
    cdef Transport* below = context.hub.transport
    context.requests += 1
    below.recv_data(below.self, context.roots[source], tag, data, nbytes, tagged(context, token))


cdef int context_poll(void* self, Event* event) noexcept nogil:
    """What comes for other contexts goes to their engines; what comes for the root is dropped, so
    only who has nothing but contexts polls one of them."""
    cdef Context* context = <Context*>self
    cdef Context* other
    cdef Hub* hub = context.hub
    while hub.transport.poll(hub.transport.self, event):
        if event.kind == EVENT_DEAD:
            mask_add(&hub.dead, event.peer)
            if context.ranks[event.peer] >= 0:
                event.peer = context.ranks[event.peer]
                return 1
        elif hub_route(hub, event, &other) == ROUTE_CONTEXT:
            if other == context:
                return 1
            if other.engine != NULL:
                engine_event(other.engine, event)
    return 0


cdef void* context_allocate(void* self, int64_t nbytes) noexcept nogil:
    cdef Transport* below = (<Context*>self).hub.transport
    return below.allocate(below.self, nbytes)


cdef void context_release(void* self, void* memory) noexcept nogil:
    cdef Transport* below = (<Context*>self).hub.transport
    below.release(below.self, memory)


# ---- the life of a context ----------------------------------------------------------------

cdef Context* context_reserve(Hub* hub) noexcept nogil:
    """A context in a free slot, without ranks; NULL when there is no slot (the count says so) or no
    memory."""
    cdef Context* context
    cdef int slot = 1
    while slot <= CONTEXTS_MAX and hub.slots[slot] != NULL:
        slot += 1
    if slot > CONTEXTS_MAX:
        return NULL
    context = context_at_slot(hub, slot)
    if context != NULL:
        hub.serial += 1
        hub.count += 1
        context.serial = hub.serial
    return context


cdef Context* context_at_slot(Hub* hub, int slot) noexcept nogil:
    cdef Transport* below = hub.transport
    cdef Context* context
    cdef int i
    if hub.room == NULL:
        hub.room = <unsigned char*>malloc(below.control_bytes_max)
    context = <Context*>calloc(1, sizeof(Context))
    if context == NULL or hub.room == NULL:
        free(context)
        return NULL
    hub.slots[slot] = context
    context.hub = hub
    context.slot = slot
    for i in range(RANKS_MAX):
        context.ranks[i] = -1
    context.table.self = context
    context.table.control_bytes_max = below.control_bytes_max - sizeof(ContextHead)
    context.table.send_control = context_send_control
    context.table.send_data = context_send_data
    context.table.recv_data = context_recv_data
    context.table.poll = context_poll
    context.table.allocate = context_allocate
    context.table.release = context_release
    return context


cdef int64_t context_handle(const Context* context) noexcept nogil:
    """What the others have to know to send to it; above 0."""
    return <int64_t>context.slot << 32 | context.serial


cdef Context* context_at(Hub* hub, int64_t handle) noexcept nogil:
    """The context of a handle of this process, or NULL."""
    cdef int64_t slot = handle >> 32
    cdef Context* context = hub.slots[slot] if 0 < slot <= CONTEXTS_MAX else NULL
    return context if context != NULL and context.serial == <uint32_t>handle else NULL


cdef void context_open(Context* context, int size, int rank, const int16_t* roots,
                       const int64_t* handles) noexcept nogil:
    """Gives a context its ranks, by the root's numbers, and the handles of their ends."""
    cdef int i
    context.table.size = size
    context.table.rank = rank
    context.size = size
    for i in range(size):
        context.roots[i] = roots[i]
        context.ranks[roots[i]] = <int16_t>i
        context.heads[i].mark = CONTEXT_MARK
        context.heads[i].slot = <uint16_t>(handles[i] >> 32)
        context.heads[i].serial = <uint32_t>handles[i]


cdef void context_tell(Context* context, const Mask* gone) noexcept nogil:
    """Everyone has opened it: from now on it hears of deaths, first of all that there have been,
    and of those of its ranks that did not get so far (`gone`, as it numbers them)."""
    cdef Event event
    cdef int i, peer
    context.told = 1
    context_wake(context)
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_DEAD
    for i in range(context.size):
        peer = context.roots[i]
        if mask_has(&context.early_byes, peer):
            on_bye(context.engine, i)
        if mask_has(&context.hub.dead, peer) or mask_has(gone, i):
            event.peer = i
            engine_event(context.engine, &event)
        if mask_has(&context.hub.lost, peer):
            lose(context.engine, i)


cdef bint context_detach(Context* context) noexcept nogil:
    """Frees its slot; the memory stays, since its engine allocates by it.  False when another
    thread was faster."""
    if context.hub.slots[context.slot] != context:
        return False
    context.hub.slots[context.slot] = NULL
    context.hub.awake &= ~(<uint64_t>1 << (context.slot - 1))
    context.hub.count -= 1
    return True


cdef void context_wake(Context* context) noexcept nogil:
    """Its engine is about to be used: it shall know the time, and hear the clock afterwards."""
    context.hub.awake |= <uint64_t>1 << (context.slot - 1)
    if context.engine != NULL:
        context.engine.now_us = context.hub.now_us


# ---- events -------------------------------------------------------------------------------

cdef int hub_route(Hub* hub, Event* event, Context** found) noexcept nogil:
    """Whose an event of the root's transport is.  One of a context is changed to what the context's
    own transport would say."""
    cdef const ContextHead* head
    cdef Context* context
    cdef int slot
    if event.kind == EVENT_CONTROL:
        head = <const ContextHead*>event.payload
        if event.nbytes < <int64_t>sizeof(ContextHead) or head.mark != CONTEXT_MARK:
            return ROUTE_ROOT
        context = hub.slots[head.slot] if head.slot <= STORE_SLOT else NULL
        if context == NULL or context.serial != head.serial:
            return ROUTE_NOWHERE           # late: it is closed
        event.payload += sizeof(ContextHead)
        event.nbytes -= sizeof(ContextHead)
        if context.size == 0:
            if event.nbytes and (<const Head*>event.payload).type == MSG_BYE:
                mask_add(&context.early_byes, event.peer)
            return ROUTE_NOWHERE
    else:
        slot = (event.token >> SLOT_SHIFT) & SLOT_MASK
        if event.kind == EVENT_DEAD or slot == 0:
            return ROUTE_ROOT
        context = hub.slots[slot]      # it stays as long as it has requests
        context.requests -= 1
        event.token &= ~(<int64_t>SLOT_MASK << SLOT_SHIFT)
    if context.ranks[event.peer] < 0:
        return ROUTE_NOWHERE
    event.peer = context.ranks[event.peer]
    found[0] = context
    return ROUTE_CONTEXT


cdef void spread_death(Hub* hub, int peer) noexcept nogil:
    cdef Context* context
    cdef Event event
    cdef int slot
    mask_add(&hub.dead, peer)
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_DEAD
    for slot in range(1, CONTEXTS_MAX + 1):
        context = hub.slots[slot]
        if context != NULL and context.told and context.ranks[peer] >= 0:
            event.peer = context.ranks[peer]
            context_wake(context)
            engine_event(context.engine, &event)
    if hub.slots[STORE_SLOT] != NULL:
        store_gone(hub.slots[STORE_SLOT].store, peer, GOING_DEAD)


cdef bint hub_event(Hub* hub, Event* event) noexcept nogil:
    """Hands an event to the engines of contexts; False when the root's has to hear it (too)."""
    cdef Context* context
    cdef int route
    if event.kind == EVENT_DEAD:
        spread_death(hub, event.peer)
        return False
    route = hub_route(hub, event, &context)
    if route == ROUTE_CONTEXT and context.store != NULL:
        store_event(context.store, event)
        if context.store.used:
            hub.store_used = 1
    elif route == ROUTE_CONTEXT:
        context_wake(context)
        engine_event(context.engine, event)
    return route != ROUTE_ROOT


cdef void follow(Hub* hub, Context* context, const Engine* root) noexcept nogil:
    """What was decided about a process holds in all its communicators."""
    cdef Mask by = mask_none()
    cdef int i
    context_wake(context)
    if root.stopped and not context.engine.stopped:
        for i in range(context.size):
            if mask_has(&root.stopped_by, context.roots[i]):
                mask_add(&by, i)
        stop(context.engine, root.stopped, &by)
    for i in range(context.size):
        if mask_has(&root.lost, context.roots[i]):
            lose(context.engine, i)
    context.engine.unsure = root.unsure
    settle(context.engine)


cdef void store_follow(Store* store, const Engine* root) noexcept nogil:
    """Who is left out has no part in it any more; nor have we when we are."""
    cdef int r
    if root.stopped:
        store_leave(store)
        return
    for r in range(store.size):
        if mask_has(&root.lost, r) and not mask_has(&store.gone, r):
            store_gone(store, r, GOING_LOST)
        if mask_has(&root.left, r) and not mask_has(&store.gone, r):
            store_gone(store, r, GOING_LEFT)


cdef Store* hub_open_store(Hub* hub, const StoreSettings* settings,
                           const uint16_t* host) noexcept nogil:
    """The store of this rank, at the slot that it has everywhere; NULL without memory.  Before the
    ranks have met, so that no message of it comes too early."""
    cdef Context* context = context_at_slot(hub, STORE_SLOT)
    cdef int16_t roots[RANKS_MAX]
    cdef int64_t handles[RANKS_MAX]
    cdef int i
    if context == NULL:
        return NULL
    for i in range(hub.transport.size):
        roots[i] = <int16_t>i
        handles[i] = <int64_t>STORE_SLOT << 32
    context.table.size = hub.transport.size
    context.table.rank = hub.transport.rank
    context.store = store_new(&context.table, settings, hub.tags, host)
    context_open(context, hub.transport.size, hub.transport.rank, roots, handles)
    return context.store


cdef Store* hub_store(const Hub* hub) noexcept nogil:
    return hub.slots[STORE_SLOT].store if hub.slots[STORE_SLOT] != NULL else NULL


cdef void hub_follow(Hub* hub, const Engine* root) noexcept nogil:
    """After a turn of the root: who is lost, whether we have a part in anything, and know it."""
    cdef int slot
    if hub.store_used and not mask_equal(&hub.left, &root.left):
        hub.left = root.left
        store_follow(hub.slots[STORE_SLOT].store, root)
    if (hub.unsure == root.unsure and hub.stopped == root.stopped
            and mask_equal(&hub.lost, &root.lost)):
        return
    hub.unsure = root.unsure
    hub.stopped = root.stopped
    hub.lost = root.lost
    for slot in range(1, CONTEXTS_MAX + 1):
        if hub.slots[slot] != NULL and hub.slots[slot].told:
            follow(hub, hub.slots[slot], root)
    if hub.slots[STORE_SLOT] != NULL:
        store_follow(hub.slots[STORE_SLOT].store, root)


cdef bint is_awake(Context* context) noexcept nogil:
    """Whether its engine has something that the clock decides."""
    cdef const Engine* engine = context.engine
    return (engine.finished < engine.next_seq or engine.frozen or engine.stage
            or engine.watermark_due or engine.outlets_used > 0 or engine.roll_us
            or engine.patience_us
            or engine.done != context.flushed_done or engine.stable != context.flushed_stable)


cdef void hub_tick(Hub* hub, int64_t now_us) noexcept nogil:
    """Hands the time to the engines that wait for it."""
    cdef uint64_t left = hub.awake
    cdef int slot = 0
    cdef Context* context
    while left:
        slot += 1
        if left & 1:
            context = hub.slots[slot]
            if context.engine == NULL:
                hub.awake &= ~(<uint64_t>1 << (slot - 1))
            else:
                engine_tick(context.engine, now_us)
                if context.engine.watermark_us == now_us:
                    context.flushed_done = context.engine.done
                    context.flushed_stable = context.engine.stable
                if not is_awake(context) or context.engine.broken:
                    hub.awake &= ~(<uint64_t>1 << (slot - 1))
        left >>= 1


# ---- for the tests of the contract ----------------------------------------------------------

cdef class ContextPort:
    """A context without an engine, over a transport that nothing else uses: what holds it to the
    contract of transports.  All ranks make theirs alike.

    Parameters
    ----------
    owner : object
        Has a method ``table_address()``: the address of a ``Transport``, as an int.
    members : sequence of int
        The transport's numbers of the context's ranks, in their order here.
    before : int, default 0
        How many contexts each rank has reserved before: rank r of the transport r more.
    """
    cdef Hub hub
    cdef Context* context
    cdef readonly object owner

    def __cinit__(self, owner, members, int before=0):
        cdef int16_t roots[RANKS_MAX]
        cdef int64_t handles[RANKS_MAX]
        cdef int i
        memset(&self.hub, 0, sizeof(Hub))
        self.owner = owner
        self.hub.transport = <Transport*><uintptr_t>owner.table_address()
        for i in range(before + self.hub.transport.rank + 1):
            self.context = context_reserve(&self.hub)
        if self.context == NULL:
            raise MemoryError("context: no memory")
        for i in range(len(members)):
            roots[i] = members[i]
            handles[i] = <int64_t>(before + roots[i] + 1) << 32 | (before + roots[i] + 1)
        context_open(self.context, len(members), members.index(self.hub.transport.rank), roots,
                     handles)

    def __dealloc__(self):
        cdef int slot
        for slot in range(CONTEXTS_MAX + 1):
            free(self.hub.slots[slot])
        free(self.hub.room)

    def table_address(self):
        """The address of the context's `Transport`."""
        return <uintptr_t>&self.context.table
