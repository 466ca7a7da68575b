# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What the owner of keys has written down: entries, holders of copies, and who waits."""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memcpy
from hopcoll._letters cimport give_memory, letter_of, send_letter, send_object, take_memory
from hopcoll._store_state cimport *


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


cdef bint has_ended(const Entry* entry) noexcept nogil:
    return (entry.state == ENTRY_DELETED or entry.state == ENTRY_LOST
            or entry.state == ENTRY_FAILED)


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


cdef void end_recipe(Store* store, Entry* entry, int state) noexcept nogil:
    """What is left to do about it, `hopcoll._recipes` does."""
    if entry.recipe != NULL:
        entry.recipe.state = state
        store.recipes_dirty = 1


cdef void list_ended(Store* store, Entry* entry) noexcept nogil:
    """Behind those that ended before; if nobody can name it in front, to be forgotten at once."""
    store.ended_count += 1
    entry.older = NULL if entry.unnamed else store.ended_last
    entry.newer = store.ended_first if entry.unnamed else NULL
    if entry.older != NULL:
        entry.older.newer = entry
    else:
        store.ended_first = entry
    if entry.newer != NULL:
        entry.newer.older = entry
    else:
        store.ended_last = entry


cdef void enter_state(Store* store, Entry* entry, int state) noexcept nogil:
    if has_ended(entry):
        leave_ended(store, entry)
    entry.state = state
    if state != ENTRY_PRESENT:
        entry.unsealed = 0
    if has_ended(entry):
        end_recipe(store, entry, RECIPE_OVER)
        entry.noted = 0
        if entry.note:
            tell(store, entry, entry.noted_at, LETTER_UNNOTE, entry.note)
            entry.note = 0
        list_ended(store, entry)


cdef void forget_oldest(Store* store) noexcept nogil:
    """Of the keys that were deleted or lost, and that somebody can name, so many are remembered."""
    while (store.ended_count > store.settings.ended_max
           or (store.ended_first != NULL and store.ended_first.unnamed)):
        if store.ended_first.waiters != NULL:
            enter_state(store, store.ended_first, ENTRY_FREE)
        else:
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
        waiter.bad_rank = letter.rank
        waiter.bad_stamp = letter.nbytes
        waiter.patient = letter.flags & LETTER_IS_PATIENT
        waiter.bad_gone = letter.flags & LETTER_IS_GONE
        return
    waiter = <Waiter*>take_memory(store, sizeof(Waiter) + meta_bytes)
    if waiter == NULL:
        return
    waiter.rank = rank
    waiter.kind = kind
    waiter.stamp = letter.stamp
    waiter.serial = letter.serial
    waiter.nbytes = letter.nbytes
    waiter.bad_rank = letter.rank
    waiter.bad_stamp = letter.nbytes
    waiter.patient = letter.flags & LETTER_IS_PATIENT
    waiter.bad_gone = letter.flags & LETTER_IS_GONE
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
        if link[0].kind == ASK_GET or link[0].kind == ASK_LOOK or (
                link[0].kind == ASK_SCOUT and not (link[0].patient and type == LETTER_LOST)):
            letter.serial = link[0].serial
            if type == LETTER_FAILED:
                send_object(store, link[0].rank, &letter, entry.meta, entry.meta_bytes, NULL)
            else:
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
