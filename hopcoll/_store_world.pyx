# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Stores of objects over the simulated network: random orders of everything, and the checkers.

A world is decided by its seed.  Ranks put, get, wait for and delete a few keys; messages and data
arrive in any order that the network's contract allows; ranks die between any two sends, leave, or
are lost and go on for a while; each learns of it when it does.  Then all that is under way arrives,
and what has not ended by then must have a reason.
"""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint16_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from cython_kernels.transport cimport Event
from hopcoll._items cimport find_item
from hopcoll._network cimport *
from hopcoll._store cimport *
from hopcoll._store_state cimport *

cdef enum:
    RANKS = 8
    KEYS = 6
    NOTES = 160
    STEPS_MAX = 60000
    CHOICES = 4096
    CHUNK = 16
    LIMIT_BYTES = 1 << 20     # more than there can be

cdef enum Violation:
    FINE = 0
    HANG = 1
    WRONG_BYTES = 2
    LOST_TOO_EARLY = 3
    WRONG_ANSWER = 4
    CIRCLE = 5
    TWO_RECEIVERS = 6
    NOT_DELETED = 7
    LEAK = 8
    NETWORK = 9
    LIVELOCK = 10
    BROKEN = 11

VIOLATIONS = {
    FINE: None, HANG: "hang", WRONG_BYTES: "wrong bytes", LOST_TOO_EARLY: "lost too early",
    WRONG_ANSWER: "wrong answer", CIRCLE: "circle", TWO_RECEIVERS: "two receivers",
    NOT_DELETED: "not deleted", LEAK: "leak", NETWORK: "network", LIVELOCK: "livelock",
    BROKEN: "broken"}
SABOTAGES = {
    "roots": BREAK_ROOTS, "settled": BREAK_SETTLED, "register": BREAK_REGISTER,
    "offset": BREAK_OFFSET, "reach": BREAK_REACH, "void": BREAK_VOID,
    "transit": BREAK_TRANSIT, "waiters": BREAK_WAITERS, "alone": BREAK_ALONE}

cdef enum Fate:
    HERE = 0
    DIED = 1
    LEFT = 2
    LOST = 3

cdef struct Note:             # something that a rank has called
    Ask ask
    int32_t rank
    int32_t key
    int32_t seen              # its answer was checked
    int32_t kept              # the program still looks at the copy
    int64_t known             # what its ref knew
    int64_t stamps_before     # of a deletion: stamps of that key that were accepted by then

cdef struct StoreWorld:
    Network network
    int32_t size
    int32_t keys
    int32_t notes_count
    int32_t calls_left
    int32_t deaths_left
    int32_t leaves_left
    int32_t losses_left
    int32_t violation
    int32_t blamed_rank
    int32_t blamed_key
    int32_t deaths
    int32_t steps
    int64_t bytes_max
    int32_t tags[RANKS]
    int32_t fate[RANKS]
    Store* stores[RANKS]
    int32_t told_lost[RANKS][RANKS]
    int32_t deletes[KEYS]
    int64_t accepted[KEYS][NOTES]
    int32_t accepted_count[KEYS]
    int64_t answers[6]
    int64_t letters           # sent before all was deleted at the end
    Note notes[NOTES]

cdef struct Option:
    int32_t what
    int32_t a
    int32_t b
    int32_t c

cdef enum What:
    DO_CONTROL = 0
    DO_DATA = 1
    DO_LATE = 2
    DO_DETECT = 3
    DO_LOSE = 4


cdef uint64_t below(StoreWorld* world, uint64_t n) noexcept nogil:
    return next_random(&world.network) % n


cdef void blame(StoreWorld* world, int violation, int rank, int key) noexcept nogil:
    if world.violation == FINE:
        world.violation = violation
        world.blamed_rank = rank
        world.blamed_key = key


cdef Key key_of(int k) noexcept nogil:
    cdef Key key
    key.high = mixed(<uint64_t>k + 77)
    key.low = <uint64_t>k
    return key


cdef unsigned char byte_of(int64_t stamp, int64_t i) noexcept nogil:
    return <unsigned char>mixed(<uint64_t>stamp * 1000003 + <uint64_t>i)


cdef int64_t length_of(const StoreWorld* world, int64_t stamp) noexcept nogil:
    """Of any length: nothing, less than a chunk, many chunks."""
    cdef uint64_t z = mixed(<uint64_t>stamp + 99)
    if z % 16 == 0:
        return 0
    return <int64_t>(mixed(z) % <uint64_t>world.bytes_max) + 1


cdef bint counts(const StoreWorld* world, int rank) noexcept nogil:
    return world.fate[rank] == HERE


cdef bint acts(const StoreWorld* world, int rank) noexcept nogil:
    return world.fate[rank] != DIED


# ---- checkers -----------------------------------------------------------------------------

cdef void check_answer(StoreWorld* world, Note* note) noexcept nogil:
    cdef Ask* ask = &note.ask
    cdef Key key = key_of(note.key)
    cdef Item* item
    cdef int64_t i, at
    cdef int r
    note.seen = 1
    world.answers[ask.status] += 1
    if ask.status == ASK_CLOSED:
        if counts(world, note.rank):
            blame(world, WRONG_ANSWER, note.rank, note.key)
    elif ask.status == ASK_FULL:
        if world.stores[note.rank].settings.limit_bytes == LIMIT_BYTES:
            blame(world, WRONG_ANSWER, note.rank, note.key)
    elif ask.status == ASK_DELETED:
        if not world.deletes[note.key]:
            blame(world, WRONG_ANSWER, note.rank, note.key)
    elif ask.status == ASK_LOST:
        for r in range(world.size):
            item = find_item(world.stores[r], &key) if counts(world, r) else NULL
            if (item != NULL and item.state == ITEM_COMPLETE and item.stamp != 0
                    and (item.stamp == ask.stamp or item.stamp == note.known)
                    and counts(world, note.rank)):
                blame(world, LOST_TOO_EARLY, note.rank, note.key)
    elif ask.status == ASK_OK and ask.kind == ASK_PUT:
        world.accepted[note.key][world.accepted_count[note.key]] = ask.stamp
        world.accepted_count[note.key] += 1
    elif ask.status == ASK_OK and ask.kind == ASK_GET:
        if ask.copy.nbytes != length_of(world, ask.stamp) or ask.meta_bytes != 8 or (
                <const int64_t*>ask.meta)[0] != ask.stamp:
            blame(world, WRONG_BYTES, note.rank, note.key)
            return
        for i in range(ask.copy.nbytes):
            if ask.copy.data[i] != byte_of(ask.stamp, i):
                blame(world, WRONG_BYTES, note.rank, note.key)
        if below(world, 4):
            store_let_go(world.stores[note.rank], ask.copy)
        else:
            note.kept = 1
    elif ask.status == ASK_OK and ask.kind == ASK_DELETE and counts(world, note.rank):
        for r in range(world.size):
            item = find_item(world.stores[r], &key) if counts(world, r) else NULL
            if item == NULL or item.state != ITEM_COMPLETE:
                continue               # of what was lost, partial copies may not have heard so yet
            for at in range(note.stamps_before):
                if world.accepted[note.key][at] == item.stamp:
                    blame(world, NOT_DELETED, r, note.key)


cdef int source_of(StoreWorld* world, int rank, const Key* key, int64_t* stamp) noexcept nogil:
    cdef Item* item = find_item(world.stores[rank], key)
    if item == NULL or item.pull == NULL or item.pull.sink.broken:
        return -1
    stamp[0] = item.stamp
    return item.pull.sink.source


cdef void check_pulls(StoreWorld* world) noexcept nogil:
    """Nobody waits for itself by way of others; nobody gives to two."""
    cdef Key key
    cdef Item* item
    cdef int k, r, at, count
    cdef int64_t stamp, other
    cdef int given[RANKS]
    for k in range(world.keys):
        key = key_of(k)
        memset(given, 0, sizeof(given))
        for r in range(world.size):
            if not counts(world, r):
                continue
            stamp = 0
            at = source_of(world, r, &key, &stamp)
            if at < 0:
                continue
            item = find_item(world.stores[at], &key) if counts(world, at) else NULL
            if item != NULL and item.stamp == stamp:
                given[at] += 1
                if given[at] > 1:
                    blame(world, TWO_RECEIVERS, at, k)
            count = 0
            while at >= 0 and count <= world.size:
                other = stamp
                at = source_of(world, at, &key, &other) if counts(world, at) else -1
                if other != stamp:
                    break
                count += 1
            if count > world.size:
                blame(world, CIRCLE, r, k)


cdef void check_world(StoreWorld* world) noexcept nogil:
    cdef int i, r
    for i in range(world.notes_count):
        if (world.notes[i].ask.result.complete and not world.notes[i].seen
                and acts(world, world.notes[i].rank)):
            check_answer(world, &world.notes[i])
    check_pulls(world)
    for r in range(world.size):
        if acts(world, r) and world.stores[r].broken:
            blame(world, BROKEN, r, -1)
    if world.network.error != NETWORK_FINE:
        blame(world, NETWORK, -1, world.network.error)


cdef void check_end(StoreWorld* world) noexcept nogil:
    """Nothing is under way any more: what has not ended waits for what nobody has."""
    cdef Note* note
    cdef Key key
    cdef Item* item
    cdef int i, r
    cdef bint there
    for i in range(world.notes_count):
        note = &world.notes[i]
        if note.ask.result.complete or not counts(world, note.rank):
            continue
        key = key_of(note.key)
        there = note.ask.kind == ASK_PUT or note.ask.kind == ASK_DELETE or note.known != 0
        for r in range(world.size):
            item = find_item(world.stores[r], &key) if counts(world, r) else NULL
            there = there or (item != NULL and item.state != ITEM_NONE)
        if there:
            blame(world, HANG, note.rank, note.key)


cdef void check_memory(StoreWorld* world) noexcept nogil:
    """All was deleted and let go."""
    cdef Store* store
    cdef int r
    cdef bint strange = False
    for r in range(world.size):
        strange = strange or world.fate[r] == LOST
    for r in range(world.size):
        store = world.stores[r]
        if strange or not (counts(world, r) or world.fate[r] == LEFT):
            continue
        if (store.used_bytes or store.items_count or store.streams_used
                or store.entries_count != store.ended_count or store.early != NULL):
            blame(world, LEAK, r, -1)


# ---- steps --------------------------------------------------------------------------------

cdef void die(StoreWorld* world, int rank) noexcept nogil:
    kill_port(&world.network, rank)
    world.fate[rank] = DIED
    world.deaths += 1


cdef void drain(StoreWorld* world, int rank) noexcept nogil:
    cdef Port* port = &world.network.ports[rank]
    cdef Event event
    while not world.network.dying and port_poll(port, &event):
        store_event(world.stores[rank], &event)
    world.network.send_budget = -1
    if world.network.dying:
        world.network.dying = 0
        die(world, rank)
        return
    check_borrowed(&world.network, rank)


cdef void begin_step(StoreWorld* world) noexcept nogil:
    """The rank that acts may die before any of its sends."""
    world.network.sends = 0
    world.network.dying = 0
    world.network.send_budget = -1
    if world.deaths_left and below(world, 40) == 0:
        world.deaths_left -= 1
        world.network.send_budget = <int32_t>below(world, 6)


cdef void call(StoreWorld* world, int rank, int kind, int k) noexcept nogil:
    cdef Note* note = &world.notes[world.notes_count]
    cdef Store* store = world.stores[rank]
    cdef Copy* copy
    cdef int64_t stamp, i
    if world.notes_count == NOTES:
        return
    memset(note, 0, sizeof(Note))
    note.rank = rank
    note.key = k
    note.ask.kind = kind
    note.ask.key = key_of(k)
    world.notes_count += 1
    if kind == ASK_PUT:
        stamp = (<int64_t>rank + 1) << 40 | (store.serial + 1)
        copy = store_reserve(store, length_of(world, stamp))
        if copy == NULL:
            note.ask.result.complete = 1
            note.ask.status = ASK_FULL
            return
        for i in range(copy.nbytes):
            copy.data[i] = byte_of(stamp, i)
        memcpy(note.ask.meta, &stamp, 8)
        note.ask.meta_bytes = 8
        store_put(store, copy, &note.ask)
    else:
        if kind == ASK_DELETE:
            world.deletes[k] += 1
            note.stamps_before = world.accepted_count[k]
        elif world.accepted_count[k] and below(world, 2):
            note.known = world.accepted[k][world.accepted_count[k] - 1]
            note.ask.stamp = note.known
        store_ask(store, &note.ask)


cdef void withdraw_something(StoreWorld* world) noexcept nogil:
    cdef Note* note
    if world.notes_count == 0:
        return
    note = &world.notes[below(world, world.notes_count)]
    if note.ask.result.complete or not counts(world, note.rank) or note.ask.kind == ASK_PUT:
        return
    begin_step(world)
    store_withdraw(world.stores[note.rank], &note.ask)
    note.ask.result.complete = 1
    note.seen = 1
    drain(world, note.rank)


cdef void call_something(StoreWorld* world) noexcept nogil:
    cdef int rank = <int>below(world, world.size)
    cdef int what = <int>below(world, 16)
    cdef int k = <int>below(world, world.keys)
    world.calls_left -= 1
    if what == 15 and below(world, 4) == 0:
        withdraw_something(world)
        return
    if not counts(world, rank):
        return
    begin_step(world)
    call(world, rank, ASK_PUT if what < 6 else ASK_GET if what < 13 else ASK_LOOK if what < 14
         else ASK_DELETE, k)
    drain(world, rank)


cdef int list_options(StoreWorld* world, Option* options) noexcept nogil:
    cdef int a, b, c, count = 0
    cdef Channel* channel
    for a in range(world.size):
        if acts(world, a):
            for c in range(world.network.ports[a].late_count):
                if first_of_token(&world.network.ports[a], c) and count < CHOICES:
                    options[count].what, options[count].a, options[count].c = DO_LATE, a, c
                    count += 1
        for b in range(world.size):
            if a == b or count > CHOICES - 64:
                continue
            if acts(world, b):
                channel = channel_of(&world.network, a, b)
                if channel.used:
                    options[count].what, options[count].a, options[count].b = DO_CONTROL, a, b
                    count += 1
                for c in range(channel.data_count):
                    if first_of_tag(channel, c) and count < CHOICES - 2:
                        options[count].what, options[count].a = DO_DATA, a
                        options[count].b, options[count].c = b, c
                        count += 1
            if acts(world, a) and world.fate[b] == DIED and not mask_has(
                    &world.network.ports[a].detected, b):
                options[count].what, options[count].a, options[count].b = DO_DETECT, a, b
                count += 1
            if (acts(world, a) and world.fate[b] == LOST and world.fate[a] != LOST
                    and not world.told_lost[a][b]):
                options[count].what, options[count].a, options[count].b = DO_LOSE, a, b
                count += 1
            # The engine's good-bye comes behind what it sent.
            if (acts(world, a) and world.fate[b] == LEFT and not world.told_lost[a][b]
                    and channel_of(&world.network, b, a).used == 0):
                options[count].what, options[count].a, options[count].b = DO_LOSE, a, b
                count += 1
        if world.fate[a] == LOST and not world.told_lost[a][a]:
            options[count].what, options[count].a, options[count].b = DO_LOSE, a, a
            count += 1
    return count


cdef void take(StoreWorld* world, const Option* option) noexcept nogil:
    cdef int actor = option.a, also = -1
    begin_step(world)
    if option.what == DO_CONTROL:
        actor = option.b
        deliver_control(&world.network, option.a, option.b)
    elif option.what == DO_DATA:
        actor = option.b
        also = option.a
        deliver_data(&world.network, option.a, option.b, option.c)
    elif option.what == DO_LATE:
        deliver_late(&world.network, option.a, option.c)
    elif option.what == DO_DETECT:
        detect_death(&world.network, option.a, option.b)
    else:
        world.told_lost[option.a][option.b] = 1
        if option.a == option.b:           # it is told so itself, and stops
            store_leave(world.stores[option.a])
        else:
            store_gone(world.stores[option.a], option.b,
                       GOING_LEFT if world.fate[option.b] == LEFT else GOING_LOST)
    drain(world, actor)
    if also >= 0 and acts(world, also):
        drain(world, also)


cdef void disturb(StoreWorld* world) noexcept nogil:
    """A rank dies, leaves, or is lost to the others."""
    cdef int rank = <int>below(world, world.size), r, here = 0
    for r in range(world.size):
        here += counts(world, r)
    if here < 2 or not counts(world, rank):
        return
    if world.deaths_left and below(world, 60) == 0:
        world.deaths_left -= 1
        die(world, rank)
    elif world.leaves_left and below(world, 100) == 0:
        world.leaves_left -= 1
        begin_step(world)
        world.fate[rank] = LEFT
        store_leave(world.stores[rank])
        drain(world, rank)
    elif world.losses_left and below(world, 100) == 0:
        world.losses_left -= 1
        world.fate[rank] = LOST


cdef void run(StoreWorld* world, Option* options) noexcept nogil:
    """Until nothing can happen any more."""
    cdef int count
    cdef int64_t steps = 0
    while world.violation == FINE:
        steps += 1
        if steps > STEPS_MAX:
            blame(world, LIVELOCK, -1, -1)
            return
        world.steps += 1
        disturb(world)
        count = list_options(world, options)
        if world.calls_left and (count == 0 or below(world, 8) == 0):
            call_something(world)
        elif count:
            take(world, &options[below(world, count)])
        else:
            check_world(world)
            return
        check_world(world)


cdef void clean(StoreWorld* world, Option* options) noexcept nogil:
    """The program lets go of all, and deletes all."""
    cdef int i, k, r
    world.deaths_left = world.leaves_left = world.losses_left = world.calls_left = 0
    for i in range(world.notes_count):
        if world.notes[i].kept and acts(world, world.notes[i].rank):
            store_let_go(world.stores[world.notes[i].rank], world.notes[i].ask.copy)
            world.notes[i].kept = 0
    for k in range(world.keys):
        for r in range(world.size):
            if counts(world, r):
                begin_step(world)
                call(world, r, ASK_DELETE, k)
                drain(world, r)
                break
    run(world, options)


def simulate_store(int size, seed, *, int calls=24, int keys=3, int deaths=2, int leaves=0,
                   int losses=0, int64_t bytes_max=160, int64_t inline_bytes=24, int window=2,
                   int64_t limit_bytes=LIMIT_BYTES, hosts=(), sabotage=()):
    """Runs one random world of stores.

    Parameters
    ----------
    size : int
        Number of ranks, at most 8.
    seed : int
        Decides everything; the same seed gives the same run.
    calls, keys : int
        How many puts, gets, waits and deletions there are, and of how many keys (at most 6).
    deaths, leaves, losses : int
        At most so many ranks die, leave, and are left out although they live.
    bytes_max, inline_bytes : int
        The longest object, and the longest that travels inside a message. A chunk has 16 bytes.
    window : int
        Chunks that a pull grants ahead.
    limit_bytes : int
        Of all copies of a rank.
    hosts : sequence of int
        The host of each rank; all on one without it.
    sabotage : sequence of str
        Rules that are broken, of `SABOTAGES`.

    Returns
    -------
    dict
        violation (None or what was broken), blamed (rank, key), steps, deaths, letters (sent before
        all was deleted at the end), the answers by status, and the counters of all stores, summed.
    """
    cdef StoreWorld* world
    cdef Option* options
    cdef unsigned char* memory
    cdef Rooms rooms
    cdef StoreSettings settings
    cdef uint16_t host[RANKS]
    cdef int r
    if not 1 <= size <= RANKS or not 1 <= keys <= KEYS or calls > NOTES - KEYS:
        raise ValueError("size, keys or calls: too many")
    memset(&rooms, 0, sizeof(Rooms))
    memset(&settings, 0, sizeof(StoreSettings))
    memset(host, 0, sizeof(host))
    rooms.region_bytes = 1 << 21
    settings.chunk_bytes = CHUNK
    settings.inline_bytes = inline_bytes
    settings.limit_bytes = limit_bytes
    settings.window = window
    settings.ended_max = 64
    for name in sabotage:
        settings.sabotage |= SABOTAGES[name]
    for r, number in enumerate(hosts):
        host[r] = number
    world = <StoreWorld*>calloc(1, sizeof(StoreWorld))
    options = <Option*>calloc(CHOICES, sizeof(Option))
    memory = <unsigned char*>calloc(1, network_bytes(size, &rooms))
    if world == NULL or options == NULL or memory == NULL:
        raise MemoryError("simulation: no memory for the world")
    try:
        network_init(&world.network, size, &rooms, 2048, memory)
        world.network.random = <uint64_t>(seed & 0xffffffffffffffff)
        world.network.sent_delay = DELAY_ANY
        world.network.lost_delay = DELAY_ANY
        world.size, world.keys, world.calls_left = size, keys, calls
        world.deaths_left = min(deaths, size - 1)
        world.leaves_left, world.losses_left = leaves, losses
        world.bytes_max = bytes_max
        for r in range(size):
            world.stores[r] = store_new(&world.network.ports[r].table, &settings,
                                        &world.tags[r], host)
        with nogil:
            run(world, options)
            if world.violation == FINE:
                check_end(world)
            for r in range(size):
                world.letters += world.stores[r].counters.letters_sent
            if world.violation == FINE:
                clean(world, options)
            if world.violation == FINE:
                check_end(world)
                check_memory(world)
        counters = {}
        for r in range(size):
            for name, value in (<dict>world.stores[r].counters).items():
                counters[name] = counters.get(name, 0) + value
        out = {"violation": VIOLATIONS[world.violation], "steps": world.steps,
               "blamed": (world.blamed_rank, world.blamed_key), "deaths": world.deaths,
               "letters": world.letters,
               "answers": dict(zip(("ok", "exists", "lost", "deleted", "full", "closed"),
                                   [world.answers[r] for r in range(6)])),
               "counters": counters, "network": world.network.error,
               "fates": [world.fate[r] for r in range(size)]}
        if world.violation == FINE and LOST not in out["fates"]:
            for r in range(size):
                if counts(world, r):
                    store_free(world.stores[r])
                    if world.network.ports[r].region.live_bytes:
                        out["violation"], out["blamed"] = "leak", (r, -1)
        return out
    finally:
        network_clear(&world.network)
        free(memory)
        free(options)
        free(world)
