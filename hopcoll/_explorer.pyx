# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Every order of everything: a depth-first search over the worlds that choices lead to.

States are recognised by a 64-bit digest, so that one of n states is taken for another with
probability n * n / 2**65.
"""
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy
from hopcoll._digest cimport digest, head_bytes, keeps_answers, mix, raw_digest
from hopcoll._state cimport *
from hopcoll._network cimport (
    Port, Channel, Late, Posted, DataMessage, channel_of, first_of_tag, first_of_token)
from hopcoll._world cimport *
from hopcoll._script cimport *
from hopcoll._checks cimport check_end

cdef enum:
    TICK_US = 300000


# ---- choices ------------------------------------------------------------------------------

cdef void put_choice(Choice* out, int* count, int action, int a, int b, int c) noexcept nogil:
    out[count[0]].action = action
    out[count[0]].a = a
    out[count[0]].b = b
    out[count[0]].c = c
    out[count[0]].budget = -1
    count[0] += 1


cdef void list_steps(World* world, int rank, Choice* out, int* count) noexcept nogil:
    """What this rank can do next, but learning of a death."""
    cdef Port* port = &world.network.ports[rank]
    cdef Channel* channel
    cdef int source, k
    if not is_here(world, rank):
        return
    if can_call(world, rank):
        put_choice(out, count, ACT_CALL, rank, 0, 0)
    for k in range(port.late_count):
        if first_of_token(port, k):
            put_choice(out, count, ACT_LATE, rank, k, 0)
    for source in range(world.size):
        channel = channel_of(&world.network, source, rank)
        if channel.used:
            put_choice(out, count, ACT_CONTROL, source, rank, 0)
        for k in range(channel.data_count):
            if first_of_tag(channel, k):
                put_choice(out, count, ACT_DATA, source, rank, k)
    if can_leave(world, rank):
        put_choice(out, count, ACT_LEAVE, rank, 0, 0)
    if can_go(world, rank):
        put_choice(out, count, ACT_GO, rank, 0, 0)


cdef void list_detections(World* world, int observer, Choice* out, int* count) noexcept nogil:
    cdef int peer
    for peer in range(world.size):
        if can_detect(world, observer, peer):
            put_choice(out, count, ACT_DETECT, observer, peer, 0)


cdef void list_deaths(World* world, int rank, Choice* out, int* count) noexcept nogil:
    if world.deaths_left > 0 and world.alive > 1 and is_here(world, rank):
        put_choice(out, count, ACT_KILL, rank, 0, 0)


cdef int list_choices(World* world, Choice* out) noexcept nogil:
    """All that can happen next."""
    cdef int count = 0, r
    for r in range(world.size):
        list_steps(world, r, out, &count)
        list_detections(world, r, out, &count)
    if count == 0:
        # Everything waits: only the clocks go on.  Two rounds without any effect are the end.
        while world.ticked < 2 * world.size and not is_here(world, world.ticked % world.size):
            world.ticked += 1
        if world.ticked < 2 * world.size:
            put_choice(out, &count, ACT_TICK, world.ticked % world.size, TICK_US, 0)
    for r in range(world.size):
        list_deaths(world, r, out, &count)
    return count


cdef int list_canonical(World* world, bint turns, Choice* out) noexcept nogil:
    """One order of calls and deliveries: the first thing that the first rank can do, counted from
    rank 0 or, in turns, from the one that acted last.  It may die instead, or learn of a death
    before: as both commute with the steps of others, no point in a rank's own life is left out."""
    cdef int count = 0, i, rank
    for i in range(world.size):
        rank = (world.turn + i) % world.size if turns else i
        list_steps(world, rank, out, &count)
        if count:
            count = 1
            list_detections(world, rank, out, &count)
            list_deaths(world, rank, out, &count)
            return count
    return list_choices(world, out)


cdef int actor_of(const Choice* choice) noexcept nogil:
    return choice.b if choice.action == ACT_CONTROL or choice.action == ACT_DATA else choice.a


cdef int sender_of(const Choice* choice) noexcept nogil:
    """Who else can be changed by a step: its data may have been taken."""
    return choice.a if choice.action == ACT_DATA else -1


# ---- saving -------------------------------------------------------------------------------

cdef inline unsigned char* put(unsigned char* at, const void* data, int64_t nbytes) noexcept nogil:
    memcpy(at, data, nbytes)
    return at + ((nbytes + 15) & ~15)


cdef inline const unsigned char* get(void* data, const unsigned char* at,
                                     int64_t nbytes) noexcept nogil:
    memcpy(data, at, nbytes)
    return at + ((nbytes + 15) & ~15)


# The answers to a ballot are only of use to the rank that leads it, what a message is put together
# in is of no use after that, and nor are outlets that were never used, and flights.

cdef unsigned char* unused_of(const Engine* engine) noexcept nogil:
    if not keeps_answers(engine):
        return <unsigned char*>(engine.outlets + engine.outlets_made)
    return engine.outbox


cdef unsigned char* put_region(World* world, unsigned char* at, int rank,
                               bint raw) noexcept nogil:
    cdef const Engine* engine = world.ranks[rank].engine
    cdef unsigned char* base = world.network.ports[rank].region.base
    cdef unsigned char* end = base + world.network.ports[rank].region.used
    cdef unsigned char* behind = <unsigned char*>(engine.flight + FLIGHTS)
    cdef unsigned char* unused = behind if raw else unused_of(engine)
    (<unsigned char**>at)[0] = unused
    at = put(at + 16, base, unused - base)
    return put(at, behind, end - behind)


cdef const unsigned char* get_region(World* world, const unsigned char* at,
                                     int rank) noexcept nogil:
    cdef const Engine* engine = world.ranks[rank].engine
    cdef unsigned char* base = world.network.ports[rank].region.base
    cdef unsigned char* end = base + world.network.ports[rank].region.used
    cdef unsigned char* behind = <unsigned char*>(engine.flight + FLIGHTS)
    cdef unsigned char* unused = (<unsigned char* const*>at)[0]
    at = get(base, at + 16, unused - base)
    return get(behind, at, end - behind)


cdef void save(World* world, unsigned char* at, int actor, int also, bint raw) noexcept nogil:
    """What a step of `actor` can change, which may leave something with `also`."""
    cdef int i
    cdef Port* port
    cdef Channel* channel
    at = put(at, world, head_bytes(world))
    for i in range(world.size):
        port = &world.network.ports[i]
        if i == actor:
            at = put_region(world, at, i, raw)
        if i == actor or i == also:
            at = put(at, port.posted, port.posted_count * sizeof(Posted))
            at = put(at, port.late, port.late_count * sizeof(Late))
    for i in range(world.size * world.size):
        channel = &world.network.channels[i]
        if i // world.size == actor or i % world.size == actor:
            at = put(at, channel.bytes, channel.used)
            at = put(at, channel.data, channel.data_count * sizeof(DataMessage))


cdef void restore(World* world, const unsigned char* at, int actor, int also) noexcept nogil:
    """Undoes that step."""
    cdef int i
    cdef Port* port
    cdef Channel* channel
    at = get(world, at, head_bytes(world))
    for i in range(world.size):
        port = &world.network.ports[i]
        if i == actor:
            at = get_region(world, at, i)
        if i == actor or i == also:
            at = get(port.posted, at, port.posted_count * sizeof(Posted))
            at = get(port.late, at, port.late_count * sizeof(Late))
    for i in range(world.size * world.size):
        channel = &world.network.channels[i]
        if i // world.size == actor or i % world.size == actor:
            at = get(channel.bytes, at, channel.used)
            at = get(channel.data, at, channel.data_count * sizeof(DataMessage))


# ---- the search ---------------------------------------------------------------------------

cdef bint visit(Explorer* x) noexcept nogil:
    """Whether this world is new."""
    cdef uint64_t h = digest(x) if x.canonical_states else raw_digest(x)
    cdef uint64_t slot = h & (x.seen_room - 1)
    while x.seen[slot]:
        if x.seen[slot] == h:
            return False
        slot = (slot + 1) & (x.seen_room - 1)
    if x.states >= x.states_max:
        x.stopped = 1
        return False
    x.seen[slot] = h
    x.states += 1
    return True


cdef uint64_t verdict(World* world) noexcept nogil:
    """The outcomes at an end: who is alive and what each one got back."""
    cdef uint64_t h = 0x7E12D1C7
    cdef int r, k
    for r in range(world.size):
        h = mix(h, world.network.ports[r].dead | world.network.ports[r].left << 1)
        if world.network.ports[r].dead:
            continue
        for k in range(world.ranks[r].checked):
            h = mix(h, world.ranks[r].results[k].status)
            h = mix(h, world.ranks[r].results[k].contributors.word[0])
            h = mix(h, world.ranks[r].results[k].failed.word[0])
    return h


cdef void note_end(Explorer* x) noexcept nogil:
    """Adds to the set of verdicts."""
    cdef uint64_t h = verdict(x.world) | 1
    cdef uint64_t slot = h & (VERDICTS_ROOM - 1)
    x.ends += 1
    while x.verdicts[slot]:
        if x.verdicts[slot] == h:
            return
        slot = (slot + 1) & (VERDICTS_ROOM - 1)
    x.verdicts[slot] = h
    x.verdicts_count += 1
    x.verdicts_digest += h


cdef void explore_from(Explorer* x, int depth) noexcept nogil:
    cdef World* world = x.world
    cdef Choice* choices
    cdef unsigned char* saved
    cdef int count, i, sends, budget, actor = -1, also = -1
    cdef bint may_die, stepped = False
    cdef uint64_t engine = 0
    cdef Choice choice
    if world.violation != FINE or x.stopped:
        return
    if depth >= x.stack_room:
        x.stopped = 2
        return
    choices = x.choices + depth * CHOICES_MAX
    if x.order == EVERY_ORDER:
        count = list_choices(world, choices)
    else:
        count = list_canonical(world, x.order == IN_TURNS, choices)
    if not visit(x):
        return
    for i in range(count):
        if choices[i].action != ACT_KILL:
            stepped = True
    if not stepped:
        x.trace_count = depth
        note_end(x)
        check_end(world)
        if world.violation != FINE:
            return
    saved = x.stack + depth * x.world_bytes
    may_die = world.deaths_left > 0 and world.alive > 1
    for i in range(count):
        choice = choices[i]
        sends = 0
        if actor != actor_of(&choice) or also != sender_of(&choice):    # else it is saved already
            actor, also = actor_of(&choice), sender_of(&choice)
            save(world, saved, actor, also, not x.canonical_states)
            engine = x.engine[actor]
        # Dying before the first send is dying before the step: that is ACT_KILL, except that data
        # may have been taken from their sender.
        budget = -1
        while True:
            choice.budget = budget
            x.trace[depth] = choice
            x.trace_count = depth + 1
            x.transitions += 1
            x.engine[actor] = 0
            perform(world, &choice)
            if budget < 0:
                sends = world.network.sends
            explore_from(x, depth + 1)
            if world.violation != FINE or x.stopped:
                return
            restore(world, saved, actor, also)
            x.engine[actor] = engine
            if budget < 0:
                budget = 0 if choice.action == ACT_DATA else 1
            else:
                budget += 1
            if not may_die or budget >= sends or choice.action == ACT_KILL:
                break


cdef void explore(Explorer* x) noexcept nogil:
    explore_from(x, 0)
