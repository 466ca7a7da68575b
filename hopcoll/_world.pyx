# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A simulated world: every rank's engine over the simulated network, its caller, and the checkers.

Inputs are made so that a result shows what went into it: item i of rank r's input is bit r, rotated
by i, and a sum of such items is the set of its contributors; an input counted twice carries.  As
soon as an operation has returned, its caller overwrites the buffers: what the protocol may still
need it must have kept.

The checkers state what a user may rely on, apart from how the protocol goes about it.
"""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint32_t, uint16_t, uint8_t, intptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from cython_kernels.transport cimport Event
from hopcoll._state cimport *
from hopcoll._engine cimport (
    engine_new, engine_event, engine_tick, engine_leave, control_bytes_of)
from hopcoll._operation cimport start_operation
from hopcoll._plan cimport is_fold, is_for_root, is_from_root
from hopcoll._network cimport (
    Rooms, Port, NETWORK_FINE, UNEXPECTED_DATA, BORROWED_CHANGED, BORROWED_FREED, network_init,
    network_bytes, network_clear, region_allocate, deliver_control, deliver_data, deliver_late,
    kill_port, leave_port, detect_death, check_borrowed, channel_of, port_poll)

cdef enum:
    UINT64 = 7
    SUM = 0
    NONE = 11
    GARBAGE = 0xA5
    RANKS = 64


cdef inline uint64_t rotate(uint64_t x, int64_t by) noexcept nogil:
    by &= 63
    return (x << by) | (x >> (64 - by)) if by else x


cdef uint64_t bcast_item(int seq, int root, int64_t i) noexcept nogil:
    return (<uint64_t>(seq + 1) * 0x9E3779B97F4A7C15ULL) ^ (<uint64_t>root << 48) ^ <uint64_t>i


cdef uint64_t copy_item(int seq, int source, int dest, int64_t i) noexcept nogil:
    """Item i of what one rank has for another."""
    return bcast_item(seq, source, i) ^ <uint64_t>(dest + 1) << 40


cdef const Step* step_of(const World* world, int rank, int k) noexcept nogil:
    """What a rank calls as its operation k."""
    if rank == world.odd_rank and k == world.odd_step:
        return &world.odd
    return &world.script[k]


cdef int64_t pair_count(const Step* step, int source, int dest) noexcept nogil:
    """Items of the block from one rank to another; the same both ways, for Alltoalls in place."""
    cdef int which
    if not step.flags & FLAG_VECTOR:
        return step.count
    if step.kind == ALLTOALL:
        which = source + dest
    elif step.kind == SCATTER or step.kind == REDUCE_SCATTER:
        which = dest
    else:
        which = source
    return (step.count + 5 * which) % (step.count + 3)


cdef int64_t send_items(const Step* step, int size, int rank) noexcept nogil:
    cdef int64_t items = 0
    cdef int r
    if step.kind == BARRIER:
        return 0
    if step.kind == GATHER or step.kind == ALLGATHER:
        return pair_count(step, rank, step.root)
    if (step.kind == REDUCE_SCATTER or step.kind == ALLTOALL
            or (step.kind == SCATTER and step.root == rank)):
        for r in range(size):
            items += pair_count(step, rank, r)
        return items
    return 0 if step.kind == SCATTER else step.count


cdef int64_t recv_items(const Step* step, int size, int rank) noexcept nogil:
    cdef int64_t items = 0
    cdef int r
    if step.kind == BARRIER:
        return 0
    if (step.kind == ALLGATHER or step.kind == ALLTOALL
            or (step.kind == GATHER and step.root == rank)):
        for r in range(size):
            items += pair_count(step, r, rank)
        return items
    if step.kind == SCATTER:
        return pair_count(step, step.root, rank)
    if step.kind == REDUCE_SCATTER:
        return send_items(step, size, rank) if step.flags & FLAG_IN_PLACE \
            else pair_count(step, 0, rank)
    return 0 if step.kind == GATHER else step.count


cdef int64_t items_before(const Step* step, int rank, int dest) noexcept nogil:
    """Where the block from (or, for what is cut by its owner, of) `rank` starts."""
    cdef int64_t items = 0
    cdef int r
    for r in range(rank):
        items += pair_count(step, r, dest) if step.kind != REDUCE_SCATTER \
            else pair_count(step, 0, r)
    return items


cdef uint64_t input_item(const Step* step, int size, int rank, int k, int64_t j) noexcept nogil:
    """Item j of a rank's input."""
    cdef int r
    cdef int64_t count
    if step.kind == GATHER or step.kind == ALLGATHER:
        return copy_item(k, rank, 0, j)
    if step.kind == SCATTER or step.kind == ALLTOALL:
        for r in range(size):
            count = pair_count(step, rank, r)
            if j < count:
                return copy_item(k, rank, r, j)
            j -= count
    return rotate((<uint64_t>1) << rank, j)


cdef bint is_here(const World* world, int rank) noexcept nogil:
    """Neither dead nor gone."""
    return not world.network.ports[rank].dead and not world.network.ports[rank].left


cdef bint acts(const World* world, int rank) noexcept nogil:
    return is_here(world, rank) and not world.paused >> rank & 1


cdef bint is_cut(const World* world, int a, int b) noexcept nogil:
    return (world.side >> a ^ world.side >> b) & 1


cdef bint is_disturbed(const World* world, int rank) noexcept nogil:
    return world.disturbed >> rank & 1


cdef bint in_force(const World* world, int rank) noexcept nogil:
    """Whether a rank is there at the end, and has a part in what was decided."""
    return acts(world, rank) and not world.ranks[rank].engine.stopped


cdef bint is_settled(const World* world) noexcept nogil:
    """Whether every rank that acts has all that it will get."""
    cdef int r
    cdef const Rank* one
    for r in range(world.size):
        one = &world.ranks[r]
        if not acts(world, r):
            continue
        if one.engine.stopped:
            if one.checked < one.called:
                return False
        elif one.checked < one.steps or one.engine.stable < one.steps:
            return False
    return True


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
    rooms.region_bytes = (sizeof(Engine) + control_bytes_of(settings, n) * (n + 1)
                          + (n + 4) * (sizeof(Entry) + 64)
                          + settings.ring * (sizeof(Operation)
                                             + n * (settings.eager_bytes + 48 + sizeof(Block)))
                          + settings.outlets_max * sizeof(Outlet) + items * 8 * 6
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
        elif plan.silence:
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
    return (world.leaving and not one.leaving and one.called == one.steps and is_here(world, rank)
            and one.checked == one.steps and one.engine.stable >= one.steps
            and one.engine.finished == one.steps
            and not one.engine.frozen and not one.engine.stage)


cdef bint can_go(World* world, int rank) noexcept nogil:
    """All others have heard the good-bye, or have said theirs (they may have gone since)."""
    cdef const Engine* engine = world.ranks[rank].engine
    cdef Mask known = gone(engine), everyone = mask_full(world.size)
    known = mask_or(&known, &engine.heard)
    mask_add(&known, rank)
    return (world.ranks[rank].leaving and is_here(world, rank)
            and mask_within(&everyone, &known))


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
    cdef int flags = step.flags & FLAG_IN_PLACE
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
    sig.root = step.root
    sig.flags = step.flags & (FLAG_RAISE | FLAG_VECTOR | FLAG_ORDERED)
    sig.count = step.count
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
    elif step.kind == BCAST or flags:
        send = NULL
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


# ---- the checkers -------------------------------------------------------------------------

cdef void report(World* world, int violation, int rank, int step) noexcept nogil:
    if world.violation == FINE:
        world.violation = violation
        world.blamed_rank = rank
        world.blamed_step = step


cdef bint has_result(const World* world, int rank, const Step* step) noexcept nogil:
    return step.kind != BARRIER and not (is_for_root(step.kind) and step.root != rank)


cdef void check_value(World* world, int rank, int k) noexcept nogil:
    """The bytes are those of the contributors, each once; the input is as it was."""
    cdef Rank* one = &world.ranks[rank]
    cdef const Result* result = &one.results[k]
    cdef const Step* step = step_of(world, rank, k)
    cdef uint64_t expected, who = result.contributors.word[0]
    cdef int64_t i, count, at = 0
    cdef int r
    cdef bint in_place = step.flags & FLAG_IN_PLACE and has_result(world, rank, step)
    if result.status == STATUS_OK and has_result(world, rank, step):
        if step.kind == GATHER or step.kind == ALLGATHER or step.kind == ALLTOALL:
            for r in range(world.size):
                count = pair_count(step, r, rank)
                for i in range(count):
                    expected = copy_item(k, r, rank if step.kind == ALLTOALL else 0, i) \
                        if mask_has(&result.contributors, r) else 0
                    if one.recv[k][at + i] != expected:
                        report(world, WRONG_VALUE, rank, k)
                at += count
        elif step.kind == SCATTER:
            for i in range(0 if in_place and rank == step.root
                           else pair_count(step, step.root, rank)):
                if one.recv[k][i] != copy_item(k, step.root, rank, i):
                    report(world, WRONG_VALUE, rank, k)
        else:
            count = step.count
            if step.kind == REDUCE_SCATTER:
                count = pair_count(step, 0, rank)
                at = items_before(step, rank, rank)
            elif step.kind == SCAN:
                who &= ~<uint64_t>0 >> (63 - rank)
            elif step.kind == EXSCAN:
                who &= ((<uint64_t>1) << rank) - 1
                if who == 0:
                    count = 0           # nobody is before it: undefined
            for i in range(count):
                expected = bcast_item(k, step.root, i) if step.kind == BCAST \
                    else rotate(who, at + i)
                if one.recv[k][i] != expected:
                    report(world, WRONG_VALUE, rank, k)
    if not in_place or step.kind == SCATTER:
        for i in range(send_items(step, world.size, rank) if step.kind != BCAST else 0):
            if one.send[k][i] != input_item(step, world.size, rank, k, i):
                report(world, INPUT_CHANGED, rank, k)


cdef void check_status(World* world, int rank, int k) noexcept nogil:
    """The status follows from who is dead, and from what was raised before."""
    cdef Rank* one = &world.ranks[rank]
    cdef const Result* result = &one.results[k]
    cdef const Step* step = step_of(world, rank, k)
    cdef Mask before = mask_full(world.size)
    cdef bint shrank
    cdef int i, r
    for i in range(k):
        if step_of(world, rank, i).flags & FLAG_RAISE:
            before = one.results[i].contributors
    shrank = step.flags & FLAG_RAISE and not mask_equal(&before, &result.contributors)
    if result.status == STATUS_STOPPED:
        if not one.engine.stopped:
            report(world, WRONG_STATUS, rank, k)
        elif not world.silence:
            report(world, LEFT_THE_HEALTHY, rank, k)
        return
    if result.status == STATUS_MISMATCH:
        if world.odd_rank < 0 or k < world.odd_step:
            report(world, WRONG_STATUS, rank, k)
        return
    if k and one.results[k - 1].status == STATUS_MISMATCH:
        report(world, WRONG_STATUS, rank, k)
    if shrank != (result.status == STATUS_RANK_FAILED) and not (
            is_from_root(step.kind) and not mask_has(&result.contributors, step.root)):
        report(world, RAISED_WRONGLY, rank, k)
    if is_from_root(step.kind) and not shrank:
        if (result.status == STATUS_RANK_FAILED) == mask_has(&result.contributors, step.root):
            report(world, WRONG_STATUS, rank, k)
    if result.status == STATUS_ROOT_LOST and (
            not is_for_root(step.kind) or mask_has(&result.contributors, step.root)):
        report(world, WRONG_STATUS, rank, k)
    if result.status == STATUS_RANK_FAILED:
        if mask_empty(&result.failed):
            report(world, RAISED_WRONGLY, rank, k)
        for r in range(world.size):
            if (mask_has(&result.failed, r) and is_here(world, r) and not world.ranks[r].leaving
                    and not is_disturbed(world, r)):
                report(world, RAISED_WRONGLY, rank, k)
    for r in range(world.size):
        # What a rank that left had called is stable: it stays in.
        if (not mask_has(&result.contributors, r) and not world.network.ports[r].dead
                and not is_disturbed(world, r) and not (
                    world.ranks[r].leaving and k >= world.ranks[r].steps)):
            report(world, LIVING_LEFT_OUT, rank, k)
    if k and not mask_within(&result.contributors, &one.results[k - 1].contributors):
        report(world, CONTRIBUTORS_GREW, rank, k)


cdef void check_alike(World* world, int rank, int k) noexcept nogil:
    """All ranks that have this outcome have the same one."""
    cdef const Result* result = &world.ranks[rank].results[k]
    cdef const Result* other
    cdef int r
    for r in range(world.size):
        # A rank that died may have taken with it a result that nobody else had.
        if world.ranks[r].checked <= k or r == rank or world.network.ports[r].dead:
            continue
        other = &world.ranks[r].results[k]
        if world.odd_rank >= 0 and (other.status == STATUS_MISMATCH
                                    or result.status == STATUS_MISMATCH):
            continue           # who had returned before learns of it at its next call
        if world.odd_rank >= 0 and k >= world.odd_step and (rank == world.odd_rank
                                                            or r == world.odd_rank):
            continue           # each failed, or succeeded alone, for what it had called
        if (other.status != result.status or other.epoch != result.epoch
                or not mask_equal(&other.contributors, &result.contributors)
                or not mask_equal(&other.failed, &result.failed)):
            report(world, DIFFERENT_OUTCOMES, rank, k)


cdef void check_rank(World* world, int rank) noexcept nogil:
    """After each step of a rank: what it got back, and what it believes."""
    cdef Rank* one = &world.ranks[rank]
    cdef Engine* engine = one.engine
    cdef int64_t nbytes
    cdef int r, k
    world.network.ports[rank].given_up = engine.lost if not engine.stopped \
        else mask_full(world.size)
    if engine.broken:
        report(world, ENGINE_BROKEN, rank, one.checked)
    if engine.stable < one.stable:
        report(world, STABLE_WENT_BACK, rank, one.checked)
    if not engine.stopped:
        one.stable = engine.stable
    while one.checked < one.called and one.results[one.checked].complete:
        k = one.checked
        check_value(world, rank, k)
        check_status(world, rank, k)
        if not world.silence:
            check_alike(world, rank, k)
        one.checked += 1
        nbytes = 8 * send_items(step_of(world, rank, k), world.size, rank)
        memset(one.send[k], GARBAGE, nbytes)
        nbytes = 8 * recv_items(step_of(world, rank, k), world.size, rank)
        memset(one.recv[k], GARBAGE, nbytes)
    for r in range(world.size):
        if (is_here(world, r) and not world.ranks[r].leaving and not is_disturbed(world, r)
                and not engine.stopped and not world.ranks[r].engine.stopped
                and world.ranks[r].engine.done < engine.stable):
            report(world, STABLE_TOO_EARLY, rank, one.checked)


cdef bint is_garbage(const uint64_t* items, int64_t count) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        if items[i] != <uint64_t>0xA5A5A5A5A5A5A5A5ULL:
            return False
    return True


cdef bint succeeds_alone(const World* world, int rank) noexcept nogil:
    """The operation in question needs no other rank here: the root has its data, nobody else has
    any, and where a loss is raised, or a root is lost, nobody is asked."""
    cdef const Step* step = step_of(world, rank, world.odd_step)
    cdef int status = world.ranks[rank].results[world.odd_step].status
    cdef int r
    if status == STATUS_RANK_FAILED or status == STATUS_ROOT_LOST:
        return True
    if is_from_root(step.kind):            # what is small is sent, and that is all
        return step.root == rank and not step.flags & FLAG_VECTOR and 8 * step.count * (
            world.size if step.kind == SCATTER else 1) <= world.settings.eager_bytes
    if not step.flags & FLAG_VECTOR or not (step.kind == ALLGATHER or (
            step.kind == GATHER and step.root == rank)):
        return False
    for r in range(world.size):
        if r != rank and pair_count(step, r, rank):
            return False
    return True


cdef bint same_outcome(const Result* a, const Result* b) noexcept nogil:
    return (a.status == b.status and a.epoch == b.epoch
            and mask_equal(&a.contributors, &b.contributors)
            and mask_equal(&a.failed, &b.failed))


cdef void check_silence(World* world) noexcept nogil:
    """After stops and cuts: one group at most has gone on, all of it alike; who was left out has
    no stable result that differs, and no buffer of anyone was touched."""
    cdef int r, other, k
    cdef Rank* one
    cdef Mask members
    cdef const Step* step
    for r in range(world.size):
        one = &world.ranks[r]
        for k in range(one.checked if is_here(world, r) else 0):
            step = step_of(world, r, k)
            if not is_garbage(one.send[k], send_items(step, world.size, r)) or not is_garbage(
                    one.recv[k], recv_items(step, world.size, r)):
                report(world, TOUCHED_AFTER_RETURN, r, k)
        if not in_force(world, r):
            continue
        members = members_of(one.engine, one.engine.epoch)
        for other in range(world.size):
            if (in_force(world, other) and not mask_has(&members, other)
                    and not world.ranks[other].engine.frozen
                    and not world.ranks[other].engine.unsure):
                report(world, SPLIT, r, one.checked)
            for k in range(world.ranks[other].checked):
                if (in_force(world, other) or k < world.ranks[other].stable) and not same_outcome(
                        &one.results[k], &world.ranks[other].results[k]):
                    report(world, DIFFERENT_OUTCOMES, other, k)
        if one.engine.counters.strays == 0 and mask_empty(&one.engine.lost) and (
                one.engine.landings_used or one.engine.outlets_used):
            report(world, LEAK, r, one.checked)


cdef void check_end(World* world) noexcept nogil:
    """Nothing can happen any more: everyone alive must have everything, and owe nothing."""
    cdef int r, k
    cdef Rank* one
    cdef const Step* step
    cdef bint noticed = False
    cdef int others = 0
    cdef bint odd_lives = world.odd_rank >= 0 and not world.network.ports[world.odd_rank].dead
    if world.silence:
        check_silence(world)
        return
    for r in range(world.size):
        one = &world.ranks[r]
        if world.network.ports[r].dead:
            continue
        if one.checked < one.steps or one.engine.stable < one.steps:
            report(world, HANG, r, one.checked)
            return
        if world.leaving and not world.network.ports[r].left:
            report(world, HANG, r, one.checked)
            return
        for k in range(one.steps):
            step = step_of(world, r, k)
            if not is_garbage(one.send[k], send_items(step, world.size, r)) or not is_garbage(
                    one.recv[k], recv_items(step, world.size, r)):
                report(world, TOUCHED_AFTER_RETURN, r, one.checked)
            if one.results[k].status != STATUS_MISMATCH and not mask_has(
                    &one.results[k].contributors, r):
                report(world, LIVING_LEFT_OUT, r, one.checked)
        if odd_lives and r != world.odd_rank:
            noticed = noticed or one.results[one.steps - 1].status == STATUS_MISMATCH
            others += 1
        if world.network.ports[r].left:
            continue
        if (one.engine.freed < one.steps or one.engine.outlets_used or one.engine.retained_bytes
                or world.network.ports[r].region.live_bytes != one.baseline_bytes
                or world.network.ports[r].posted_count):
            report(world, LEAK, r, one.checked)
    # Whoever had returned from it learns of it at its next call: ranks that call nothing more, or
    # only what they can do alone, may never.
    if odd_lives and others and not noticed and not succeeds_alone(world, world.odd_rank):
        for k in range(world.odd_step, world.ranks[world.odd_rank].steps):
            if world.ranks[world.odd_rank].results[k].status == STATUS_MISMATCH:
                return
        report(world, MISMATCH_MISSED, world.odd_rank, world.odd_step)
