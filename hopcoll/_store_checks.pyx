# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What must hold in a world of stores, after each step, at the end, and when all is deleted."""
from libc.stdint cimport int64_t, int32_t, uint64_t
from libc.string cimport memset
from cython_kernels.reduction cimport UINT8
from hopcoll._entries cimport find_entry
from hopcoll._items cimport find_item
from hopcoll._network cimport NETWORK_FINE
from hopcoll._store cimport store_let_go
from hopcoll._store_disk cimport disk_files
from hopcoll._store_state cimport *


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
    if world.uniform and z % 64 != 1:
        return world.bytes_max
    if z % 16 == 0:
        return 0
    return <int64_t>(mixed(z) % <uint64_t>world.bytes_max) + 1


# ---- results of reductions ----------------------------------------------------------------

cdef int result_of(const Key* key) noexcept nogil:
    """Which reduction makes this key; -1: none."""
    cdef Key one
    cdef int i
    for i in range(RESULTS):
        one = key_of(KEYS + i)
        if key_equal(&one, key):
            return i
    return -1


cdef void note_attempt(void* context, const Recipe* recipe) noexcept nogil:
    """All inputs of an attempt are known: what it makes will be held against them."""
    cdef StoreWorld* world = <StoreWorld*>context
    cdef Attempt* attempt = &world.attempts[world.attempts_count]
    cdef int i
    if world.attempts_count == ATTEMPTS:
        return
    world.attempts_count += 1
    memset(attempt, 0, sizeof(Attempt))
    attempt.stamp = recipe.stamp
    attempt.key = KEYS + result_of(&recipe.entry.key)
    attempt.nbytes = recipe.entry.nbytes
    for i in range(recipe.inputs_count):
        if recipe.inputs[i].place >= 0:
            attempt.inputs[attempt.count] = recipe.inputs[i].ask.stamp
            attempt.count += 1
            attempt.bits |= 1 << i


cdef const Attempt* find_attempt(const StoreWorld* world, int64_t stamp) noexcept nogil:
    cdef int i
    for i in range(world.attempts_count - 1, -1, -1):
        if world.attempts[i].stamp == stamp:
            return &world.attempts[i]
    return NULL


cdef unsigned char value_of(const StoreWorld* world, int64_t stamp, int64_t i) noexcept nogil:
    """The sum of the inputs, which may be results themselves; or what was put."""
    cdef const Attempt* attempt = find_attempt(world, stamp)
    cdef unsigned char value = 0
    cdef int at
    if attempt == NULL:
        return byte_of(stamp, i)
    for at in range(attempt.count):
        value += value_of(world, attempt.inputs[at], i)
    return value


cdef uint64_t knowers_of(StoreWorld* world, const Attempt* attempt) noexcept nogil:
    """The ranks by which the outcome outlives others, the dead ones among them; who has left may
    have known it."""
    cdef Key key = key_of(attempt.key)
    cdef uint64_t knowers = 0
    cdef Item* item
    cdef Entry* entry
    cdef int r
    cdef bint knows
    for r in range(world.size):
        item = find_item(world.stores[r], &key)
        entry = find_entry(world.stores[r], &key)
        knows = world.stores[r].left or (
            item != NULL and item.stamp == attempt.stamp and item.have == item.grid.chunks)
        knows = knows or (entry != NULL and (
            entry.noted == attempt.stamp
            or (entry.stamp == attempt.stamp and entry.state == ENTRY_PRESENT
                and not entry.unsealed)))
        knowers |= <uint64_t>knows << r
    return knowers


cdef bint somebody_knows(const StoreWorld* world, const Attempt* attempt) noexcept nogil:
    cdef int r
    for r in range(world.size):
        if attempt.knowers >> r & 1 and counts(world, r):
            return True
    return False


cdef void note_seal(void* context, const Entry* entry) noexcept nogil:
    """From now on the outcome is told: two ranks must know it, if there are two.  Results that are
    inputs of it were final before."""
    cdef StoreWorld* world = <StoreWorld*>context
    cdef Attempt* attempt = <Attempt*>find_attempt(world, entry.stamp)
    cdef const Attempt* input
    cdef int r, owner = -1, here = 0
    if attempt == NULL:
        return
    attempt.sealed = 1
    for r in range(attempt.count):
        input = find_attempt(world, attempt.inputs[r])
        if input != NULL and not input.sealed:
            blame(world, SPLIT, rank_of(entry.stamp), input.key)
    attempt.knowers = knowers_of(world, attempt)
    for r in range(world.size):
        here += counts(world, r)
        if find_entry(world.stores[r], &entry.key) == entry:
            owner = r
    if here > 1 and popcount(attempt.knowers) < 2 and counts(world, owner):
        blame(world, SPLIT, owner, attempt.key)


cdef bint is_right(StoreWorld* world, Note* note) noexcept nogil:
    """The bytes of what was got, and its meta."""
    cdef Ask* ask = &note.ask
    cdef const Attempt* attempt = find_attempt(world, ask.stamp)
    cdef int64_t i
    if attempt == NULL:
        if (ask.copy.nbytes != length_of(world, ask.stamp) or ask.meta_bytes != 10
                or (<const int64_t*>(ask.meta + 2))[0] != ask.stamp):
            return False
    elif (ask.copy.nbytes != attempt.nbytes or ask.meta_bytes != 3 or attempt.key != note.key
          or ask.meta[2] != attempt.bits
          or attempt.count != world.reductions[note.key - KEYS].count):
        return False
    for i in range(ask.copy.nbytes):
        if ask.copy.data[i] != value_of(world, ask.stamp, i):
            return False
    return True


cdef void check_read(StoreWorld* world, Note* note, int64_t stamp) noexcept nogil:
    """Whoever reads a result reads the same, also as a part of another, as long as one of those
    lives who knew which it was."""
    cdef Attempt* attempt = <Attempt*>find_attempt(world, stamp)
    cdef Reduction* reduction
    cdef int i
    if attempt == NULL or not counts(world, note.rank):
        return
    attempt.knowers |= knowers_of(world, attempt)
    reduction = &world.reductions[attempt.key - KEYS]
    if reduction.read == 0:
        reduction.read = stamp
    if ((reduction.ended and attempt.key == note.key)
            or (reduction.read != stamp
                and somebody_knows(world, find_attempt(world, reduction.read)))):
        blame(world, SPLIT, note.rank, attempt.key)
    for i in range(attempt.count):
        check_read(world, note, attempt.inputs[i])


cdef void check_ended(StoreWorld* world, const Note* note) noexcept nogil:
    """There is no result: nobody may read one later, nor have read one that somebody still has,
    nor would have it made after another death."""
    cdef Reduction* reduction
    cdef const Called* called
    cdef int r
    if note.key < KEYS or not counts(world, note.rank) or note.ask.kind == ASK_DELETE:
        return
    reduction = &world.reductions[note.key - KEYS]
    reduction.ended = 1
    if note.ask.status == ASK_FAILED and reduction.read and somebody_knows(
            world, find_attempt(world, reduction.read)):
        blame(world, SPLIT, note.rank, note.key)
    for r in range(world.size if note.ask.status == ASK_FAILED else 0):
        called = world.stores[r].called if counts(world, r) else NULL
        while called != NULL:
            if key_equal(&called.key, &note.ask.key):
                blame(world, SPLIT, note.rank, note.key)
            called = called.next


cdef void check_failed(StoreWorld* world, Note* note) noexcept nogil:
    cdef const Why* why = <const Why*>note.ask.meta
    cdef const Reduction* reduction = &world.reductions[note.key - KEYS]
    cdef bint fine = note.key >= KEYS and note.ask.meta_bytes == sizeof(Why)
    cdef bint disturbed = False
    cdef int i, r
    if fine and why.reason == WHY_DELETED:
        fine = False
        for i in range(reduction.inputs_count):
            fine = fine or world.deletes[reduction.inputs[i]] > 0
    elif fine and why.reason == WHY_LOST:
        for r in range(world.size):
            disturbed = disturbed or not counts(world, r)
        fine = disturbed or world.disk.failures > 0
    elif fine and why.reason == WHY_FULL:
        fine = world.stores[note.rank].settings.limit_bytes != LIMIT_BYTES
    elif fine:
        fine = why.reason == WHY_FAILED or why.reason == WHY_DIFFERENT
    if not fine:
        blame(world, WRONG_ANSWER, note.rank, note.key)


cdef bint somebody_has(StoreWorld* world, int k) noexcept nogil:
    cdef Key key = key_of(k)
    cdef Item* item
    cdef int r
    for r in range(world.size):
        item = find_item(world.stores[r], &key) if counts(world, r) else NULL
        if item != NULL and item.state != ITEM_NONE:
            return True
    return False


cdef bint waits_rightly(StoreWorld* world, const Note* note) noexcept nogil:
    """The reduction has not enough inputs."""
    cdef const Reduction* reduction = &world.reductions[note.key - KEYS]
    cdef Recipe* recipe
    cdef int r, i, count = 0
    cdef bint known = False
    for r in range(world.size):
        recipe = world.stores[r].recipes if counts(world, r) else NULL
        while recipe != NULL:
            known = known or result_of(&recipe.entry.key) == note.key - KEYS
            recipe = recipe.next
    for i in range(reduction.inputs_count):
        # What was deleted is out, also when it is put again.
        count += somebody_has(world, reduction.inputs[i]) and not world.deletes[reduction.inputs[i]]
    if known:
        return count < reduction.count
    return False


# ---- checkers -----------------------------------------------------------------------------

cdef void check_answer(StoreWorld* world, Note* note) noexcept nogil:
    cdef Ask* ask = &note.ask
    cdef Key key = key_of(note.key)
    cdef Item* item
    cdef int64_t i, at
    cdef int r
    note.seen = 1
    world.answers[ask.status] += 1
    if ask.status == ASK_LOST or ask.status == ASK_FAILED:
        check_ended(world, note)
    if ask.status == ASK_CLOSED:
        if counts(world, note.rank):
            blame(world, WRONG_ANSWER, note.rank, note.key)
    elif ask.status == ASK_FULL:
        if world.stores[note.rank].settings.limit_bytes == LIMIT_BYTES:
            blame(world, WRONG_ANSWER, note.rank, note.key)
    elif ask.status == ASK_FAILED:
        check_failed(world, note)
    elif ask.status == ASK_DELETED:
        if not world.deletes[note.key]:
            blame(world, WRONG_ANSWER, note.rank, note.key)
    elif ask.status == ASK_LOST:
        for r in range(world.size):
            item = find_item(world.stores[r], &key) if counts(world, r) else NULL
            if (item != NULL and item.state == ITEM_COMPLETE and item.stamp != 0
                    and (note.key >= KEYS or item.stamp == ask.stamp
                         or item.stamp == note.known)
                    and counts(world, note.rank)):
                blame(world, LOST_TOO_EARLY, note.rank, note.key)
    elif ask.status == ASK_OK and ask.kind == ASK_PUT:
        world.accepted[note.key][world.accepted_count[note.key]] = ask.stamp
        world.accepted_count[note.key] += 1
    elif ask.status == ASK_OK and ask.kind == ASK_REDUCE:
        world.reductions[note.key - KEYS].known = ask.stamp
    elif ask.status == ASK_OK and ask.kind == ASK_GET:
        if not is_right(world, note):
            blame(world, WRONG_BYTES, note.rank, note.key)
            return
        check_read(world, note, ask.stamp)
        note.drops = below(world, 4) != 0
        note.kept = not note.drops or world.with_disk
        if not note.kept:
            store_let_go(world.stores[note.rank], ask.copy)
    elif ask.status == ASK_OK and ask.kind == ASK_DELETE and counts(world, note.rank):
        for r in range(world.size):
            item = find_item(world.stores[r], &key) if counts(world, r) else NULL
            if item == NULL or item.state != ITEM_COMPLETE:
                continue               # of what was lost, partial copies may not have heard so yet
            if note.key >= KEYS and note.known:
                blame(world, NOT_DELETED, r, note.key)
            for at in range(note.stamps_before if note.key < KEYS else 0):
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
    for k in range(KEYS + RESULTS):
        if world.keys <= k < KEYS or k >= KEYS + world.reductions_count:
            continue
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


cdef int64_t limit_of(const StoreWorld* world, int rank) noexcept nogil:
    """One copy may be over it, for others who wait; and small ones that came in messages."""
    cdef const StoreSettings* settings = &world.stores[rank].settings
    return (settings.limit_bytes if not world.with_disk
            else settings.limit_bytes + world.bytes_max if settings.inline_bytes == 0
            else LIMIT_BYTES)


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
        if acts(world, r) and world.stores[r].used_bytes > limit_of(world, r):
            blame(world, OVER_LIMIT, r, -1)
    if world.disk.strange:
        blame(world, BROKEN, world.disk.strange - 1, -2)
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
        if note.key >= KEYS and (note.ask.kind == ASK_GET or note.ask.kind == ASK_LOOK):
            if not waits_rightly(world, note):
                blame(world, HANG, note.rank, note.key)
            continue
        key = key_of(note.key)
        there = (note.ask.kind == ASK_REDUCE or note.ask.kind == ASK_PUT
                 or note.ask.kind == ASK_DELETE or note.known != 0)
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
                or store.entries_count != store.ended_count or store.early != NULL
                or store.wants != NULL or store.jobs != NULL or store.filed_bytes
                or store.writing_bytes or store.reading or store.putting
                or store.rescue != NULL or store.oldest != NULL
                or disk_files(&world.disk, r)
                or store.places != NULL or store.recipes != NULL or store.called != NULL):
            blame(world, LEAK, r, -1)
