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
from cython_kernels.reduction cimport SUM, UINT8
from hopcoll._network cimport *
from hopcoll._store cimport *
from hopcoll._items cimport find_item
from hopcoll._spills cimport may_go, spill
from hopcoll._store_checks cimport *
from hopcoll._store_disk cimport disk_clear, disk_has, disk_rings, disk_step
from hopcoll._store_state cimport *

VIOLATIONS = {
    FINE: None, HANG: "hang", WRONG_BYTES: "wrong bytes", LOST_TOO_EARLY: "lost too early",
    WRONG_ANSWER: "wrong answer", CIRCLE: "circle", TWO_RECEIVERS: "two receivers",
    NOT_DELETED: "not deleted", LEAK: "leak", NETWORK: "network", LIVELOCK: "livelock",
    BROKEN: "broken", SPLIT: "split", OVER_LIMIT: "over the limit"}
SABOTAGES = {
    "roots": BREAK_ROOTS, "settled": BREAK_SETTLED, "register": BREAK_REGISTER,
    "offset": BREAK_OFFSET, "reach": BREAK_REACH, "void": BREAK_VOID,
    "transit": BREAK_TRANSIT, "waiters": BREAK_WAITERS, "alone": BREAK_ALONE,
    "seal": BREAK_SEAL, "attempt": BREAK_ATTEMPT, "held": BREAK_HELD, "caller": BREAK_CALLER,
    "failed": BREAK_FAILED, "file": BREAK_FILE, "unread": BREAK_UNREAD, "stale": BREAK_STALE}

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
    DO_DISK = 5


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


cdef void go_on(StoreWorld* world, Note* note) noexcept nogil:
    """A put of which is known whether there is room: how long it is, its stamp says, which it has
    only now."""
    cdef Store* store = world.stores[note.rank]
    cdef int64_t stamp = (<int64_t>note.rank + 1) << 40 | (store.serial + 1), i
    cdef Ask* ask = &note.ask
    note.waits = 0
    if ask.copy != NULL and ask.copy.nbytes != length_of(world, stamp):
        store_withdraw(store, ask)
        reserve(world, note)
        return
    if ask.copy == NULL:
        ask.result.complete = 1
        ask.status = ASK_CLOSED if store.left else ASK_FULL
        return
    for i in range(ask.copy.nbytes):
        ask.copy.data[i] = byte_of(stamp, i)
    ask.meta[0] = UINT8
    ask.meta[1] = 2
    memcpy(ask.meta + 2, &stamp, 8)
    ask.meta_bytes = 10
    store_put(store, ask)


cdef void reserve(StoreWorld* world, Note* note) noexcept nogil:
    cdef Store* store = world.stores[note.rank]
    store_reserve(store, &note.ask,
                  length_of(world, (<int64_t>note.rank + 1) << 40 | (store.serial + 1)))
    note.waits = 1
    if note.ask.want.result.complete:
        go_on(world, note)


cdef bint move_program(StoreWorld* world) noexcept nogil:
    """One put that waited for room goes on, or a view is let go of; whether any was."""
    cdef Note* note
    cdef int i
    for i in range(world.notes_count):
        note = &world.notes[i]
        if not acts(world, note.rank):
            continue
        if note.waits and note.ask.want.result.complete:
            begin_step(world)
            go_on(world, note)
        elif note.kept and note.drops and below(world, 2):
            begin_step(world)
            note.kept = 0
            store_let_go(world.stores[note.rank], note.ask.copy)
        else:
            continue
        drain(world, note.rank)
        return True
    return False


cdef void spill_something(StoreWorld* world) noexcept nogil:
    """A copy goes to a file, with need or without."""
    cdef int rank = <int>below(world, world.size)
    cdef int k = <int>below(world, world.keys + world.reductions_count)
    cdef Key key = key_of(k if k < world.keys else KEYS + k - world.keys)
    cdef Item* item = find_item(world.stores[rank], &key) if acts(world, rank) else NULL
    if item != NULL and may_go(world.stores[rank], item):
        spill(world.stores[rank], item)


cdef void call(StoreWorld* world, int rank, int kind, int k) noexcept nogil:
    cdef Note* note = &world.notes[world.notes_count]
    cdef Store* store = world.stores[rank]
    if world.notes_count == NOTES or (k >= KEYS and not world.reductions[k - KEYS].known
                                      and kind != ASK_DELETE):
        return                 # nobody has its ref yet
    memset(note, 0, sizeof(Note))
    note.rank = rank
    note.key = k
    note.ask.kind = kind
    note.ask.key = key_of(k)
    world.notes_count += 1
    if kind == ASK_PUT:
        reserve(world, note)
    else:
        if kind == ASK_DELETE:
            world.deletes[k] += 1
            if k < KEYS:
                note.stamps_before = world.accepted_count[k]
            else:
                note.known = world.reductions[k - KEYS].known
        elif k >= KEYS:
            note.known = world.reductions[k - KEYS].known
            note.ask.stamp = note.known
        elif world.accepted_count[k] and below(world, 2):
            note.known = world.accepted[k][world.accepted_count[k] - 1]
            note.ask.stamp = note.known
        store_ask(store, &note.ask)


cdef void reduce_something(StoreWorld* world, int rank) noexcept nogil:
    """A few of the objects, and results of before, in any order."""
    cdef Note* note = &world.notes[world.notes_count]
    cdef Reduction* reduction = &world.reductions[world.reductions_count]
    cdef Ask inputs[INPUTS]
    cdef int there = world.keys + world.reductions_count, i, j, k
    cdef bint again
    if world.notes_count == NOTES:
        return
    memset(note, 0, sizeof(Note))
    memset(inputs, 0, sizeof(inputs))
    note.rank = rank
    note.key = KEYS + world.reductions_count
    note.ask.key = key_of(note.key)
    note.ask.kind = ASK_REDUCE
    world.notes_count += 1
    world.reductions_count += 1
    reduction.caller = rank
    reduction.inputs_count = 1 + <int32_t>below(world, INPUTS if there > INPUTS else there)
    reduction.count = 1 + <int32_t>below(world, reduction.inputs_count)
    for i in range(reduction.inputs_count):
        again = True
        while again:
            again = False
            k = <int>below(world, there)
            k = k if k < world.keys else KEYS + k - world.keys
            for j in range(i):
                again = again or reduction.inputs[j] == k
        reduction.inputs[i] = k
        inputs[i].key = key_of(k)
        if k >= KEYS:
            inputs[i].stamp = world.reductions[k - KEYS].known
        elif world.accepted_count[k] and below(world, 2):
            inputs[i].stamp = world.accepted[k][world.accepted_count[k] - 1]
    store_reduce(world.stores[rank], &note.ask, inputs, reduction.inputs_count, reduction.count,
                 SUM)


cdef void withdraw_something(StoreWorld* world) noexcept nogil:
    cdef Note* note
    if world.notes_count == 0:
        return
    note = &world.notes[below(world, world.notes_count)]
    if (note.ask.result.complete or not counts(world, note.rank) or (note.ask.kind == ASK_PUT
                                                                        and not note.waits)
            or note.ask.kind == ASK_REDUCE):
        return
    begin_step(world)
    store_withdraw(world.stores[note.rank], &note.ask)
    note.ask.result.complete = 1
    note.seen = 1
    drain(world, note.rank)


cdef void call_something(StoreWorld* world) noexcept nogil:
    cdef int rank = <int>below(world, world.size)
    cdef int what = <int>below(world, 16)
    cdef int k = <int>below(world, world.keys + world.reductions_count)
    world.calls_left -= 1
    if what == 15 and below(world, 4) == 0:
        withdraw_something(world)
        return
    if not counts(world, rank):
        return
    begin_step(world)
    if world.reduces_left and below(world, 6) == 0:
        world.reduces_left -= 1
        reduce_something(world, rank)
        drain(world, rank)
        return
    k = k if k < world.keys else KEYS + k - world.keys
    if k >= KEYS and what < 6:
        what = 6                           # results are not put
    if what >= 14 and not world.deletes_too:
        what = 6
    if 6 <= what < 13 and world.no_gets:
        what = 0
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
        if (world.with_disk and acts(world, a) and count < CHOICES
                and disk_has(&world.disk, world.stores[a], a)):
            options[count].what, options[count].a = DO_DISK, a
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
    elif option.what == DO_DISK:
        disk_step(&world.disk, world.stores[actor], actor, next_random(&world.network))
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


cdef bint must_move(StoreWorld* world) noexcept nogil:
    """Whether the program still has something to do."""
    cdef const Note* note
    cdef int i
    for i in range(world.notes_count):
        note = &world.notes[i]
        if acts(world, note.rank) and ((note.waits and note.ask.want.result.complete)
                                       or (note.kept and note.drops)):
            return True
    return False


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
        if world.with_disk:
            if world.calls_left and below(world, 6) == 0:
                spill_something(world)
            if below(world, 4) == 0 and move_program(world):
                check_world(world)
                continue
        count = list_options(world, options)
        if world.calls_left and (count == 0 or below(world, 8) == 0):
            call_something(world)
        elif count:
            take(world, &options[below(world, count)])
        elif world.with_disk and must_move(world):
            pass
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
            begin_step(world)
            store_let_go(world.stores[world.notes[i].rank], world.notes[i].ask.copy)
            world.notes[i].kept = 0
            drain(world, world.notes[i].rank)
    for k in range(KEYS + RESULTS):
        if world.keys <= k < KEYS or k >= KEYS + world.reductions_count:
            continue
        for r in range(world.size):
            if counts(world, r):
                begin_step(world)
                call(world, r, ASK_DELETE, k)
                drain(world, r)
                break
    run(world, options)


def simulate_store(int size, seed, *, int calls=24, int keys=3, int deaths=2, int leaves=0,
                   int losses=0, int64_t bytes_max=160, int64_t inline_bytes=24, int window=2,
                   int64_t limit_bytes=LIMIT_BYTES, int reduces=0, int degree=0,
                   bint deletes=True, int64_t scratch_bytes=-1, int disk_fails=0,
                   bint gets=True, hosts=(),
                   sabotage=()):
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
    reduces, degree : int
        How many reductions are called, at most 6; nearly all objects have one length then. Of
        which degree the trees are; 0: by what it costs.
    deletes : bool
        Whether objects are deleted before the end.
    scratch_bytes, disk_fails : int
        Of all files of a rank; -1: it has no disk. One in so many reads and writes fails; 0: none.
    gets : bool
        Whether there are any.
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
    if (not 1 <= size <= RANKS or not 1 <= keys <= KEYS or reduces > RESULTS
            or calls > NOTES - KEYS - RESULTS):
        raise ValueError("size, keys or calls: too many")
    memset(&rooms, 0, sizeof(Rooms))
    memset(&settings, 0, sizeof(StoreSettings))
    memset(host, 0, sizeof(host))
    rooms.region_bytes = 1 << 21
    settings.chunk_bytes = CHUNK
    settings.inline_bytes = inline_bytes
    settings.limit_bytes = limit_bytes
    settings.scratch_bytes = scratch_bytes
    settings.window = window
    settings.ended_max = 64
    settings.degree = degree
    settings.latency_ns = 1000
    settings.bytes_per_ms = 16000
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
        world.reduces_left = reduces
        world.deletes_too = deletes
        world.uniform = reduces > 0
        world.with_disk = scratch_bytes >= 0
        world.disk.fails = disk_fails
        world.no_gets = not gets
        for r in range(size):
            world.stores[r] = store_new(&world.network.ports[r].table, &settings,
                                        &world.tags[r], host)
            if world.with_disk:
                world.stores[r].disk = disk_rings
            world.stores[r].audit = note_attempt
            world.stores[r].audit_seal = note_seal
            world.stores[r].audit_context = world
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
               "answers": dict(zip(("ok", "exists", "lost", "deleted", "full", "closed",
                                    "failed"), [world.answers[r] for r in range(7)])),
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
        disk_clear(&world.disk)
        free(memory)
        free(options)
        free(world)
