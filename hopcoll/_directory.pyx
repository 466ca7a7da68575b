# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The owner's side of the directory: who has what, who waits, and what follows from it.

What comes about a key is written down; `decide` then does all that can be done.  Of a key that was
a gone rank's nothing is decided before all who live have told what they have to do with it
(`settle_directory`).

A holder whose source is a holder, too, is fed by it; going from source to source one comes to a
*root*.  It is complete; or it has told that it has no source; or it will tell something soon, since
its source is gone.  Only copies with a complete root are named, so that no circle closes; and what
has no complete holder is lost once every root has told that it has no source.
"""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memcpy
from hopcoll._items cimport find_item
from hopcoll._letters cimport (
    give_memory, letter_of, send_letter, send_object, take_memory)
from hopcoll._store_state cimport *

cdef enum Root:
    ROOT_COMPLETE = 0
    ROOT_ASKS = 1
    ROOT_IN_TRANSIT = 2


# ---- entries ------------------------------------------------------------------------------

cdef Entry* find_entry(Store* store, const Key* key) noexcept nogil:
    cdef Entry* entry = NULL
    if store.entry_buckets:
        entry = store.entries[hash_of(key) & (store.entry_buckets - 1)]
        while entry != NULL and not key_equal(&entry.key, key):
            entry = entry.next
    return entry


cdef bint grow_entries(Store* store) noexcept nogil:
    cdef int32_t buckets = 2 * store.entry_buckets if store.entry_buckets else BUCKETS_FIRST
    cdef Entry** larger = <Entry**>take_memory(store, buckets * sizeof(Entry*))
    cdef Entry** bucket
    cdef Entry* entry
    cdef Entry* next
    cdef int32_t i
    if larger == NULL:
        return False
    for i in range(store.entry_buckets):
        entry = store.entries[i]
        while entry != NULL:
            next = entry.next
            bucket = &larger[hash_of(&entry.key) & (buckets - 1)]
            entry.next = bucket[0]
            bucket[0] = entry
            entry = next
    give_memory(store, store.entries)
    store.entries = larger
    store.entry_buckets = buckets
    return True


cdef Entry* make_entry(Store* store, const Key* key) noexcept nogil:
    cdef Entry* entry = find_entry(store, key)
    cdef Entry** bucket
    if entry != NULL:
        return entry
    if store.entries_count >= store.entry_buckets and not grow_entries(store):
        return NULL
    entry = <Entry*>take_memory(store, sizeof(Entry))
    if entry == NULL:
        return NULL
    entry.key = key[0]
    bucket = &store.entries[hash_of(key) & (store.entry_buckets - 1)]
    entry.next = bucket[0]
    bucket[0] = entry
    store.entries_count += 1
    return entry


cdef void free_entry(Store* store, Entry* entry) noexcept nogil:
    cdef Entry** link = &store.entries[hash_of(&entry.key) & (store.entry_buckets - 1)]
    while link[0] != entry:
        link = &link[0].next
    link[0] = entry.next
    while entry.holders != NULL:
        drop_holder(store, entry, entry.holders)
    while entry.waiters != NULL:
        drop_waiter(store, &entry.waiters)
    if has_ended(entry):
        leave_ended(store, entry)
    store.entries_count -= 1
    give_memory(store, entry)


cdef void free_entries(Store* store) noexcept nogil:
    cdef int32_t i
    for i in range(store.entry_buckets):
        while store.entries[i] != NULL:
            free_entry(store, store.entries[i])
    give_memory(store, store.entries)
    store.entries = NULL
    store.entry_buckets = 0


cdef inline bint has_ended(const Entry* entry) noexcept nogil:
    return entry.state == ENTRY_DELETED or entry.state == ENTRY_LOST


cdef void leave_ended(Store* store, Entry* entry) noexcept nogil:
    store.ended_count -= 1
    if entry.older != NULL:
        entry.older.newer = entry.newer
    else:
        store.ended_first = entry.newer
    if entry.newer != NULL:
        entry.newer.older = entry.older
    else:
        store.ended_last = entry.older
    entry.older = entry.newer = NULL


cdef void enter_state(Store* store, Entry* entry, int state) noexcept nogil:
    if has_ended(entry):
        leave_ended(store, entry)
    entry.state = state
    if has_ended(entry):
        store.ended_count += 1
        entry.older = store.ended_last
        if store.ended_last != NULL:
            store.ended_last.newer = entry
        else:
            store.ended_first = entry
        store.ended_last = entry


cdef void forget_oldest(Store* store) noexcept nogil:
    """Of the keys that were deleted or lost so many are remembered."""
    while store.ended_count > store.settings.ended_max:
        free_entry(store, store.ended_first)


# ---- holders ------------------------------------------------------------------------------

cdef Holder* find_holder(const Entry* entry, int rank) noexcept nogil:
    cdef Holder* holder = entry.holders
    while holder != NULL and holder.rank != rank:
        holder = holder.next
    return holder


cdef Holder* make_holder(Store* store, Entry* entry, int rank, int64_t stamp) noexcept nogil:
    cdef Holder* holder = find_holder(entry, rank)
    cdef Holder* other = entry.holders
    if holder != NULL:
        holder.stamp = stamp
        return holder
    holder = <Holder*>take_memory(store, sizeof(Holder))
    if holder == NULL:
        return NULL
    holder.rank = rank
    holder.stamp = stamp
    holder.source = -1
    holder.receiver = -1
    while other != NULL:
        if other.source == rank and not other.complete:
            holder.receiver = other.rank
        other = other.next
    holder.next = entry.holders
    entry.holders = holder
    return holder


cdef void leave_source(Entry* entry, Holder* holder) noexcept nogil:
    """It pulls no more: who gave to it may give to another."""
    cdef Holder* source = find_holder(entry, holder.source) if holder.source >= 0 else NULL
    if source != NULL and source.receiver == holder.rank:
        source.receiver = -1
    holder.source = -1


cdef void drop_holder(Store* store, Entry* entry, Holder* holder) noexcept nogil:
    """Who pulls from it still says so, until it tells something else."""
    cdef Holder** link = &entry.holders
    leave_source(entry, holder)
    while link[0] != holder:
        link = &link[0].next
    link[0] = holder.next
    give_memory(store, holder)


cdef Waiter* find_waiter(const Entry* entry, int rank, int kind) noexcept nogil:
    cdef Waiter* waiter = entry.waiters
    while waiter != NULL and (waiter.rank != rank or waiter.kind != kind):
        waiter = waiter.next
    return waiter


cdef Root root_of(const Store* store, const Entry* entry, const Holder* holder) noexcept nogil:
    cdef const Holder* source
    cdef int count = 0
    while not holder.complete:
        if holder.source < 0:
            return ROOT_ASKS if holder.asking else ROOT_IN_TRANSIT
        source = find_holder(entry, holder.source)
        if source == NULL:
            # It was named by an owner that is gone, and has heard of it less than who pulls.
            return ROOT_ASKS if find_waiter(entry, holder.source, ASK_GET) != NULL \
                else ROOT_IN_TRANSIT
        holder = source
        count += 1
        if count > store.size:
            return ROOT_IN_TRANSIT         # a circle: only a broken variant makes one
    return ROOT_COMPLETE


cdef Holder* best_for(const Store* store, const Entry* entry, int rank) noexcept nogil:
    """A location for a receiver: complete rather than partial, of its host rather than of another,
    the first that came; NULL when all serve somebody."""
    cdef Holder* best = NULL
    cdef Holder* holder = entry.holders
    cdef int score, best_score = -1
    while holder != NULL:
        if (holder.rank != rank and holder.stamp == entry.stamp
                and (holder.receiver < 0 or store.settings.sabotage & BREAK_ALONE)
                and (root_of(store, entry, holder) == ROOT_COMPLETE
                     or store.settings.sabotage & BREAK_ROOTS)):
            score = 2 * holder.complete + (store.host[holder.rank] == store.host[rank])
            if score >= best_score:
                best = holder
                best_score = score
        holder = holder.next
    return best


# ---- waiters ------------------------------------------------------------------------------

cdef void drop_waiter(Store* store, Waiter** link) noexcept nogil:
    cdef Waiter* waiter = link[0]
    link[0] = waiter.next
    give_memory(store, waiter)


cdef void make_waiter(Store* store, Entry* entry, int rank, int kind, const Letter* letter,
                      const unsigned char* meta) noexcept nogil:
    """One of a kind for each rank, in the order in which they came."""
    cdef Waiter* waiter = find_waiter(entry, rank, kind)
    cdef Waiter** link = &entry.waiters
    cdef int meta_bytes = letter.meta_bytes if kind == ASK_PUT else 0
    if waiter != NULL:
        if letter.stamp:
            waiter.stamp = letter.stamp
        waiter.serial = letter.serial
        return
    waiter = <Waiter*>take_memory(store, sizeof(Waiter) + meta_bytes)
    if waiter == NULL:
        return
    waiter.rank = rank
    waiter.kind = kind
    waiter.stamp = letter.stamp
    waiter.serial = letter.serial
    waiter.nbytes = letter.nbytes
    waiter.meta_bytes = meta_bytes
    memcpy(waiter + 1, meta, meta_bytes)
    while link[0] != NULL:
        link = &link[0].next
    link[0] = waiter


cdef void tell(Store* store, const Entry* entry, int rank, int type, int64_t stamp) noexcept nogil:
    cdef Letter letter = letter_of(type, &entry.key, stamp)
    send_letter(store, rank, &letter)


cdef void tell_waiters(Store* store, Entry* entry, int type, int64_t stamp) noexcept nogil:
    """The gets and the waits end so."""
    cdef Waiter** link = &entry.waiters
    cdef Letter letter = letter_of(type, &entry.key, stamp)
    while link[0] != NULL:
        if link[0].kind == ASK_GET or link[0].kind == ASK_LOOK:
            letter.serial = link[0].serial
            send_letter(store, link[0].rank, &letter)
            drop_waiter(store, link)
        else:
            link = &link[0].next


cdef void drop_waiters_of(Store* store, Entry* entry, int rank, int kind) noexcept nogil:
    """All of a rank's, or those of one kind (-1: all)."""
    cdef Waiter** link = &entry.waiters
    while link[0] != NULL:
        if link[0].rank == rank and (kind < 0 or link[0].kind == kind):
            drop_waiter(store, link)
        else:
            link = &link[0].next


# ---- decisions ----------------------------------------------------------------------------

cdef void accept(Store* store, Entry* entry, const Waiter* waiter) noexcept nogil:
    cdef Holder* holder
    if entry.state != ENTRY_PRESENT:
        enter_state(store, entry, ENTRY_PRESENT)
        entry.stamp = waiter.stamp
    entry.nbytes = waiter.nbytes
    entry.meta_bytes = waiter.meta_bytes
    memcpy(entry.meta, waiter + 1, waiter.meta_bytes)
    holder = make_holder(store, entry, waiter.rank, waiter.stamp)
    if holder != NULL:
        holder.complete = 1
        holder.asking = 0
        leave_source(entry, holder)
    tell(store, entry, waiter.rank, LETTER_OK, waiter.stamp)


cdef void decide_puts(Store* store, Entry* entry) noexcept nogil:
    cdef Waiter** link = &entry.waiters
    cdef Waiter* waiter
    while link[0] != NULL:
        waiter = link[0]
        if waiter.kind != ASK_PUT:
            link = &waiter.next
            continue
        if entry.state != ENTRY_PRESENT or waiter.stamp == entry.stamp:
            accept(store, entry, waiter)
            drop_waiters_of(store, entry, waiter.rank, ASK_GET)
            link = &entry.waiters          # the list is another now
            while link[0] != waiter:
                link = &link[0].next
        else:
            tell(store, entry, waiter.rank, LETTER_EXISTS, waiter.stamp)
        drop_waiter(store, link)


cdef void end_waits(Store* store, Entry* entry, int kind, int type) noexcept nogil:
    cdef Waiter** link = &entry.waiters
    while link[0] != NULL:
        if link[0].kind == kind:
            tell(store, entry, link[0].rank, type, entry.stamp)
            drop_waiter(store, link)
        else:
            link = &link[0].next


cdef void start_deleting(Store* store, Entry* entry) noexcept nogil:
    cdef Holder* holder = entry.holders
    cdef Holder* next
    enter_state(store, entry, ENTRY_DELETING)
    tell_waiters(store, entry, LETTER_DELETED, entry.stamp)
    while holder != NULL:
        next = holder.next
        if store.settings.sabotage & BREAK_REACH and not holder.complete:
            drop_holder(store, entry, holder)
        else:
            tell(store, entry, holder.rank, LETTER_DROP, holder.stamp)
        holder = next


cdef bint is_lost(Store* store, const Entry* entry) noexcept nogil:
    cdef const Holder* holder = entry.holders
    cdef Root root
    while holder != NULL:
        root = root_of(store, entry, holder)
        if root == ROOT_COMPLETE or (root == ROOT_IN_TRANSIT
                                     and not store.settings.sabotage & BREAK_TRANSIT):
            return False
        holder = holder.next
    return True


cdef void end_lost(Store* store, Entry* entry) noexcept nogil:
    """No complete copy is left; what there is of it is thrown away."""
    enter_state(store, entry, ENTRY_LOST)
    store.counters.lost += 1
    while entry.holders != NULL:
        tell(store, entry, entry.holders.rank, LETTER_LOST, entry.holders.stamp)
        drop_holder(store, entry, entry.holders)
    tell_waiters(store, entry, LETTER_LOST, entry.stamp)


cdef const Copy* own_copy(Store* store, const Entry* entry) noexcept nogil:
    """The bytes that the owner has itself, if they fit into a message."""
    cdef Item* item = find_item(store, &entry.key)
    if entry.nbytes > store.settings.inline_bytes:
        return NULL
    if (item == NULL or item.stamp != entry.stamp
            or (item.state != ITEM_COMPLETE and item.state != ITEM_OFFERED)):
        return NULL
    return item.copy


cdef bint give_location(Store* store, Entry* entry, int rank, int64_t serial) noexcept nogil:
    """Tells a receiver where to pull, or gives it the bytes; False while there is no place."""
    cdef Holder* location
    cdef Holder* receiver
    cdef const Copy* copy = own_copy(store, entry)
    cdef Letter letter
    if copy == NULL:
        location = best_for(store, entry, rank)
        if location == NULL:
            return False
    receiver = make_holder(store, entry, rank, entry.stamp)
    if receiver == NULL:
        return False
    receiver.asking = 0
    if copy != NULL:
        receiver.complete = 1
        receiver.source = -1
        letter = letter_of(LETTER_HAVE, &entry.key, entry.stamp)
    else:
        receiver.source = location.rank
        location.receiver = rank
        letter = letter_of(LETTER_NAME, &entry.key, entry.stamp)
        letter.rank = location.rank
    letter.nbytes = entry.nbytes
    letter.serial = serial
    send_object(store, rank, &letter, entry.meta, entry.meta_bytes, copy)
    return True


cdef void give_locations(Store* store, Entry* entry) noexcept nogil:
    """To who has begun before who has not."""
    cdef Holder* holder = entry.holders
    cdef Waiter** link = &entry.waiters
    cdef Letter letter
    while holder != NULL:
        if not holder.complete and holder.asking:
            give_location(store, entry, holder.rank, 0)
        holder = holder.next
    while link[0] != NULL:
        if link[0].kind == ASK_LOOK:
            letter = letter_of(LETTER_LOOKED, &entry.key, entry.stamp)
            letter.nbytes = entry.nbytes
            letter.serial = link[0].serial
            send_object(store, link[0].rank, &letter, entry.meta, entry.meta_bytes, NULL)
            drop_waiter(store, link)
        elif link[0].kind == ASK_GET and (find_holder(entry, link[0].rank) != NULL
                                          or give_location(store, entry, link[0].rank,
                                                           link[0].serial)):
            drop_waiter(store, link)
        else:
            link = &link[0].next


cdef bint knows_better(const Entry* entry) noexcept nogil:
    """Whether a ref of somebody who waits says that there was an object."""
    cdef const Waiter* waiter = entry.waiters
    while waiter != NULL:
        if (waiter.kind == ASK_GET or waiter.kind == ASK_LOOK) and waiter.stamp:
            return True
        waiter = waiter.next
    return False


cdef void decide(Store* store, Entry* entry) noexcept nogil:
    """Does what can be done about a key that is ours, and of which all is known."""
    if entry.state == ENTRY_DELETING:
        if entry.holders != NULL:
            return
        enter_state(store, entry, ENTRY_DELETED)
        end_waits(store, entry, ASK_DELETE, LETTER_GONE)
    decide_puts(store, entry)
    if entry.state != ENTRY_PRESENT:
        if find_delete(entry):
            enter_state(store, entry, ENTRY_DELETED)
            end_waits(store, entry, ASK_DELETE, LETTER_GONE)
        elif entry.state == ENTRY_FREE and knows_better(entry):
            entry.stamp = 0
            enter_state(store, entry, ENTRY_LOST)
            store.counters.lost += 1
        if entry.state == ENTRY_DELETED:
            tell_waiters(store, entry, LETTER_DELETED, entry.stamp)
        elif entry.state == ENTRY_LOST:
            tell_waiters(store, entry, LETTER_LOST, entry.stamp)
        elif entry.waiters == NULL:
            free_entry(store, entry)
    elif find_delete(entry):
        start_deleting(store, entry)
        if entry.holders == NULL:
            decide(store, entry)
    elif is_lost(store, entry):
        end_lost(store, entry)
    else:
        give_locations(store, entry)


cdef bint find_delete(const Entry* entry) noexcept nogil:
    cdef const Waiter* waiter = entry.waiters
    while waiter != NULL and waiter.kind != ASK_DELETE:
        waiter = waiter.next
    return waiter != NULL


# ---- what comes ---------------------------------------------------------------------------

cdef void on_hold(Store* store, Entry* entry, int peer, const Letter* letter,
                  const unsigned char* meta) noexcept nogil:
    """Another owner had accepted this object.  Of two stamps the one with a complete copy is the
    later: the other was lost."""
    cdef bint complete = letter.flags & LETTER_IS_COMPLETE
    cdef Holder* holder = make_holder(store, entry, peer, letter.stamp)
    cdef Holder* source
    if holder == NULL:
        return
    if entry.state == ENTRY_FREE or complete:
        if entry.state != ENTRY_PRESENT:
            enter_state(store, entry, ENTRY_PRESENT)
        entry.stamp = letter.stamp
        entry.nbytes = letter.nbytes
        entry.meta_bytes = letter.meta_bytes
        memcpy(entry.meta, meta, letter.meta_bytes)
    holder.complete = complete
    holder.asking = letter.flags & LETTER_ASKS
    holder.source = -1 if complete else letter.rank
    if holder.source >= 0:
        source = find_holder(entry, holder.source)
        if source != NULL:
            source.receiver = peer


cdef void on_orphan(Store* store, Entry* entry, int peer, const Letter* letter) noexcept nogil:
    """A partial copy has no source any more.  If that is gone, it is none for anybody."""
    cdef Holder* holder = find_holder(entry, peer)
    cdef Holder* source
    if holder == NULL or holder.stamp != letter.stamp or holder.complete:
        return
    leave_source(entry, holder)
    holder.asking = 1
    source = find_holder(entry, letter.rank) if letter.flags & LETTER_IS_GONE else NULL
    if source != NULL:
        drop_holder(store, entry, source)


cdef void on_owner_letter(Store* store, int peer, const Letter* letter,
                          const unsigned char* meta) noexcept nogil:
    """Something about a key that is ours."""
    cdef Entry* entry = make_entry(store, &letter.key)
    cdef Holder* holder
    if entry == NULL:
        return
    if letter.type == LETTER_PUT:
        make_waiter(store, entry, peer, ASK_PUT, letter, meta)
    elif letter.type == LETTER_HOLD:
        on_hold(store, entry, peer, letter, meta)
    elif letter.type == LETTER_ASK:
        make_waiter(store, entry, peer, ASK_GET, letter, meta)
    elif letter.type == LETTER_LOOK:
        make_waiter(store, entry, peer, ASK_LOOK, letter, meta)
    elif letter.type == LETTER_DELETE:
        make_waiter(store, entry, peer, ASK_DELETE, letter, meta)
    elif letter.type == LETTER_UNLOOK:
        drop_waiters_of(store, entry, peer, ASK_LOOK)
    elif letter.type == LETTER_ORPHAN:
        on_orphan(store, entry, peer, letter)
    else:
        holder = find_holder(entry, peer)
        if holder != NULL and holder.stamp == letter.stamp:
            if letter.type == LETTER_DROPPED:
                drop_holder(store, entry, holder)
            else:
                leave_source(entry, holder)
                holder.complete = 1
                holder.asking = 0
    if is_settled_for(store, &letter.key):
        decide(store, entry)


cdef void forget_gone(Store* store, int rank) noexcept nogil:
    """A rank is gone: what it had, what it waited for, and who gave to it."""
    cdef Entry* entry
    cdef Entry* next
    cdef Holder* holder
    cdef int32_t i
    for i in range(store.entry_buckets):
        entry = store.entries[i]
        while entry != NULL:
            next = entry.next
            holder = find_holder(entry, rank)
            if holder != NULL:
                drop_holder(store, entry, holder)
            drop_waiters_of(store, entry, rank, -1)
            if is_settled_for(store, &entry.key):
                decide(store, entry)
            entry = next


cdef void settle_others(Store* store, Entry* entry) noexcept nogil:
    """Copies of a stamp that was lost, as the owner before had found."""
    cdef Holder* holder = entry.holders
    cdef Holder* next
    while holder != NULL:
        next = holder.next
        if holder.stamp != entry.stamp:
            tell(store, entry, holder.rank, LETTER_LOST, holder.stamp)
            drop_holder(store, entry, holder)
        holder = next


cdef void settle_directory(Store* store) noexcept nogil:
    """Once every living rank has told what it has to, as far as we know who is gone: decides."""
    cdef Entry* entry
    cdef Entry* next
    cdef int32_t i
    cdef int r
    if mask_equal(&store.settled, &store.gone):
        return
    for r in range(store.size):
        if (r != store.rank and not mask_has(&store.gone, r)
                and not mask_within(&store.gone, &store.synced[r])):
            return
    store.settled = store.gone
    store.counters.settled += 1
    for i in range(store.entry_buckets):
        entry = store.entries[i]
        while entry != NULL:
            next = entry.next
            settle_others(store, entry)
            decide(store, entry)
            entry = next
