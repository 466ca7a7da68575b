# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A simulated world: every rank's engine over the simulated network, its caller, and the checkers.

As soon as an operation has returned, its caller overwrites the buffers: what the protocol may still
need it must have kept.
"""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint32_t, uint16_t, uint8_t, intptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from cython_kernels.transport cimport Event
from hopcoll._state cimport *
from hopcoll._engine cimport (
    engine_new, engine_event, engine_tick, engine_leave, engine_may_go, control_bytes_of)
from hopcoll._operation cimport start_operation
from hopcoll._plan cimport is_fold, is_for_root
from hopcoll._checks cimport check_rank
from hopcoll._script cimport *
from hopcoll._network cimport (
    Rooms, Port, NETWORK_FINE, UNEXPECTED_DATA, BORROWED_CHANGED, BORROWED_FREED, network_init,
    network_bytes, network_clear, region_allocate, deliver_control, deliver_data, deliver_late,
    kill_port, leave_port, detect_death, drop_sent, check_borrowed, channel_of, next_random,
    port_poll)

cdef enum:
    UINT64 = 7
    SUM = 0
    NONE = 11
    RANKS = 64


cdef void note_fence(void* context, int rank) noexcept nogil:
    (<Rank*>context).world.fenced |= (<uint64_t>1) << rank


# ---- making a world -----------------------------------------------------------------------

cdef void fill_buffers(World* world, int rank) noexcept nogil:
    cdef Rank* one = &world.ranks[rank]
    cdef const Step* step
    cdef int k
    cdef int64_t i, at
    for k in range(one.steps):
        step = step_of(world, rank, k)
        for i in range(recv_items(step, world.size, rank)):
            one.recv[k][i] = bcast_item(k, rank, i) \
                if step.kind == BCAST and step.root == rank else 0
        for i in range(send_items(step, world.size, rank)):
            one.send[k][i] = input_item(step, world.size, rank, k, i)
        if not step.flags & FLAG_IN_PLACE or not has_result(world, rank, step) \
                or step.kind == SCATTER or step.kind == BCAST:
            continue
        at = items_before(step, rank, rank) \
            if step.kind == GATHER or step.kind == ALLGATHER else 0
        for i in range(send_items(step, world.size, rank)):
            one.recv[k][at + i] = one.send[k][i]


cdef World* make_world(const World* plan, int64_t* total) noexcept nogil:
    """A new world, one piece of `total` bytes, or NULL."""
    cdef int n = plan.size, r, k
    cdef int64_t items = plan.odd.count + 3, ranks_at
    cdef Rooms rooms
    cdef World* world
    cdef Rank* one
    cdef const Settings* settings = &plan.settings
    for k in range(plan.steps_count):
        items += plan.script[k].count + 3
    items *= n
    memset(&rooms, 0, sizeof(Rooms))
    rooms.region_bytes = (sizeof(Engine) + FLIGHTS * sizeof(Flight)
                          + control_bytes_of(settings, n) * (n + 3)
                          + (n + 4) * (sizeof(Entry) + 64)
                          + settings.ring * (sizeof(Operation)
                                             + n * (settings.eager_bytes + 48 + sizeof(Block)))
                          + settings.outlets_max * (sizeof(Outlet) + sizeof(Landing))
                          + settings.ring * TWINS * (settings.window * settings.chunk_bytes + 64)
                          + items * 8 * 9
                          + plan.steps_count * sizeof(Carry)
                          + plan.steps_count * (512 + sizeof(Result)) + 2048)
    if plan.fixed:
        rooms.channel_bytes = 4096
        rooms.data = 16
        rooms.posted = 32
        rooms.events = 48
        rooms.late = 16
    ranks_at = (sizeof(World) + 15) & ~15
    total[0] = ranks_at + n * sizeof(Rank) + 64 + network_bytes(n, &rooms)
    world = <World*>calloc(1, total[0])
    if world == NULL:
        return NULL
    memcpy(world, plan, sizeof(World))
    world.network.fixed = plan.fixed
    world.alive = n
    world.ranks = <Rank*>(<unsigned char*>world + ranks_at)
    network_init(&world.network, n, &rooms, control_bytes_of(settings, n),
                 <unsigned char*>(world.ranks + n))
    for r in range(n):
        one = &world.ranks[r]
        one.steps = plan.early_steps if r == plan.early_leaver else plan.steps_count
        one.results = <Result*>region_allocate(&world.network.ports[r].region,
                                               (plan.steps_count + 1) * sizeof(Result))
        for k in range(one.steps):
            one.send[k] = <uint64_t*>region_allocate(
                &world.network.ports[r].region, send_items(step_of(world, r, k), n, r) * 8)
            one.recv[k] = <uint64_t*>region_allocate(
                &world.network.ports[r].region, recv_items(step_of(world, r, k), n, r) * 8)
        fill_buffers(world, r)
        one.engine = engine_new(&world.network.ports[r].table, settings)
        if one.engine == NULL:
            world.violation = OUT_OF_ROOM
            continue
        one.engine.user = mix_items
        if plan.silence:
            one.world = world
            one.engine.fence = note_fence
            one.engine.fence_context = one
            for k in range(n):
                one.engine.host[k] = <uint16_t>(plan.host[k])
        one.baseline_bytes = world.network.ports[r].region.live_bytes
    return world


cdef void free_world(World* world) noexcept nogil:
    if world != NULL:
        network_clear(&world.network)
        free(world)


# ---- steps --------------------------------------------------------------------------------

cdef void drain(World* world, int rank) noexcept nogil:
    """The rank's engine handles its events; then the rank dies, or is checked."""
    cdef Port* port = &world.network.ports[rank]
    cdef Event event
    while not world.network.dying and port_poll(port, &event):
        engine_event(world.ranks[rank].engine, &event)
    if world.network.dying:
        world.network.dying = 0
        die(world, rank)
        return
    check_rank(world, rank)
    check_borrowed(&world.network, rank)


cdef void die(World* world, int rank) noexcept nogil:
    kill_port(&world.network, rank)
    world.alive -= 1
    world.deaths_left -= 1


cdef bint can_call(World* world, int rank) noexcept nogil:
    cdef Rank* one = &world.ranks[rank]
    return (acts(world, rank) and not one.engine.stopped and one.called < one.steps
            and one.called - one.engine.finished < world.depth
            and one.called < one.engine.freed + world.settings.ring // 2)


cdef bint can_leave(World* world, int rank) noexcept nogil:
    """Others may still be asking this rank for operations that it does not call: a rank waits for
    quiet only so long."""
    cdef Rank* one = &world.ranks[rank]
    if world.silence:           # who has stopped has nothing else to do
        return (one.engine.stopped and not one.leaving and one.checked == one.called
                and acts(world, rank))
    return (world.leaving and not one.leaving and one.called == one.steps and is_here(world, rank)
            and one.checked == one.steps and one.engine.stable >= one.steps
            and one.engine.finished == one.steps
            and not one.engine.frozen and not one.engine.stage)


cdef bint can_go(World* world, int rank) noexcept nogil:
    """All who count on it have heard the good-bye, or said theirs (they may have gone since)."""
    cdef int r
    if not world.ranks[rank].leaving or not engine_may_go(world.ranks[rank].engine):
        return False
    if world.silence:
        for r in range(world.size):        # on its own host nothing is lost
            if world.host[r] == world.host[rank] and is_here(world, r) and (
                    channel_of(&world.network, rank, r).used
                    or channel_of(&world.network, rank, r).data_count
                    or channel_of(&world.network, r, rank).data_count):
                return False
        return acts(world, rank)
    return is_here(world, rank)


cdef bint can_detect(World* world, int observer, int peer) noexcept nogil:
    cdef Port* port = &world.network.ports[peer]
    if (not acts(world, observer) or mask_has(&world.network.ports[observer].detected, peer)
            or is_cut(world, observer, peer)):
        return False
    if port.dead:
        return True
    # The process of a rank that left ends, when all that it sent has arrived.
    return (world.exits and port.left and channel_of(&world.network, peer, observer).used == 0
            and channel_of(&world.network, peer, observer).data_count == 0)


cdef void call_next(World* world, int rank) noexcept nogil:
    cdef Rank* one = &world.ranks[rank]
    cdef int k = one.called
    cdef const Step* step = step_of(world, rank, k)
    cdef Signature sig
    cdef unsigned char* send = <unsigned char*>one.send[k]
    cdef unsigned char* recv = <unsigned char*>one.recv[k]
    cdef int flags = step.flags & (FLAG_IN_PLACE | FLAG_CARRY)
    cdef int64_t sent[RANKS]
    cdef int64_t sent_at[RANKS]
    cdef int64_t got[RANKS]
    cdef int64_t got_at[RANKS]
    cdef int64_t send_at = 0, recv_at = 0
    cdef Layout layout
    cdef int r
    cdef bint vector = step.flags & FLAG_VECTOR
    memset(&sig, 0, sizeof(Signature))
    sig.kind = step.kind
    sig.dtype = UINT64
    sig.redop = SUM if is_fold(step.kind) else NONE
    if step.flags & STEP_MIXED:
        sig.redop = USER_OP
    sig.root = step.root
    sig.flags = step.flags & (FLAG_RAISE | FLAG_VECTOR | FLAG_ORDERED | FLAG_PARTIAL
                              | FLAG_CARRY | FLAG_ARRIVAL)
    sig.count = step.count
    sig.deadline_us = step.deadline_us
    layout.send_bytes, layout.send_at = sent, sent_at
    layout.recv_bytes, layout.recv_at = got, got_at
    for r in range(world.size):
        sent[r] = 8 * pair_count(step, rank, r)
        got[r] = 8 * pair_count(step, r, rank)
        sent_at[r], got_at[r] = send_at, recv_at
        send_at += sent[r]
        recv_at += got[r]
    if vector and step.kind == REDUCE_SCATTER:
        sig.count = send_at // 8
        sig.layout = step.count
    elif vector and step.kind == ALLGATHER:
        sig.count = recv_at // 8
        sig.layout = step.count
    elif vector:
        sig.count = 0
    if is_for_root(step.kind) and rank != step.root:
        recv = NULL
        flags = 0
    elif step.kind == SCATTER:
        if rank != step.root:
            send = NULL
        elif flags:
            recv = NULL
        flags = 0
    elif step.kind == BCAST or flags & FLAG_IN_PLACE:
        send = NULL
    note_call(world, rank, k)
    one.called += 1
    if start_operation(one.engine, &sig, 8, send, recv, flags, &layout,
                       &one.results[k]) != START_OK:
        world.violation = OUT_OF_ROOM


cdef void cut(World* world, uint64_t side) noexcept nogil:
    """Parts the ranks; those of the smaller side may be left out, or of both when none is."""
    cdef int r, inside = 0
    world.side = side
    if world.paused:
        world.disturbed = ~<uint64_t>0
    for r in range(world.size):
        # A proposal that the cut stops half way binds, whomever it left out.
        if world.ranks[r].engine.frozen:
            world.disturbed = ~<uint64_t>0
        if is_here(world, r) and side >> r & 1:
            inside += 1
    for r in range(world.size):
        if (2 * inside <= world.alive and side >> r & 1) or (
                2 * inside >= world.alive and not side >> r & 1):
            world.disturbed |= (<uint64_t>1) << r


cdef void perform(World* world, const Choice* choice) noexcept nogil:
    """One step of one rank (data that arrive may end the sender's request in the same step)."""
    cdef int actor = choice.a, also = -1
    world.network.sends = 0
    world.network.send_budget = choice.budget
    world.network.dying = 0
    world.ticked = world.ticked + 1 if choice.action == ACT_TICK else 0
    if choice.action == ACT_CALL:
        call_next(world, actor)
    elif choice.action == ACT_CONTROL:
        actor = choice.b
        deliver_control(&world.network, choice.a, choice.b)
    elif choice.action == ACT_DATA:
        actor = choice.b
        also = choice.a
        deliver_data(&world.network, choice.a, choice.b, choice.c)
    elif choice.action == ACT_LATE:
        deliver_late(&world.network, actor, choice.b)
    elif choice.action == ACT_DETECT:
        detect_death(&world.network, actor, choice.b)
    elif choice.action == ACT_KILL:
        die(world, actor)
        return
    elif choice.action == ACT_TICK:
        engine_tick(world.ranks[actor].engine, world.ranks[actor].engine.now_us + choice.b)
    elif choice.action == ACT_LEAVE:
        world.ranks[actor].leaving = 1
        engine_leave(world.ranks[actor].engine)
    elif choice.action == ACT_GO:
        leave_port(&world.network, actor)
        for also in range(world.size if world.silence else 0):
            if world.host[also] != world.host[actor]:
                drop_sent(&world.network, actor, also, next_random(&world.network) & 1)
        return
    elif choice.action == ACT_PAUSE:
        world.paused |= (<uint64_t>1) << actor
        world.disturbed |= (<uint64_t>1) << actor
        if world.side:             # now the other side may be more
            world.disturbed = ~<uint64_t>0
        return
    elif choice.action == ACT_RESUME:
        world.paused &= ~((<uint64_t>1) << actor)
        engine_tick(world.ranks[actor].engine, world.clock_us)
    elif choice.action == ACT_CUT:
        cut(world, <uint64_t><uint32_t>choice.a | <uint64_t><uint32_t>choice.b << 32)
        return
    elif choice.action == ACT_HEAL:
        world.side = 0
        return
    drain(world, actor)
    if choice.action != ACT_DETECT:
        world.turn = (actor + 1) % world.size
    world.network.send_budget = -1
    if also >= 0 and world.network.ports[also].events_count and acts(world, also):
        drain(world, also)
    while world.fenced:
        for actor in range(world.size):
            if world.fenced >> actor & 1:
                world.fenced &= ~((<uint64_t>1) << actor)
                if is_here(world, actor):
                    die(world, actor)
    if world.network.error != NETWORK_FINE and world.violation == FINE:
        if world.network.error == UNEXPECTED_DATA:
            world.violation = BAD_UNEXPECTED_DATA
        elif world.network.error == BORROWED_CHANGED:
            world.violation = BAD_BORROWED_CHANGED
        elif world.network.error == BORROWED_FREED:
            world.violation = BAD_BORROWED_FREED
        else:
            world.violation = OUT_OF_ROOM
    if world.network.controls > world.controls_max and world.violation == FINE:
        world.violation = TOO_MANY_MESSAGES
