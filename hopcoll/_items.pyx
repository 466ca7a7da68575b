# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Items: what this rank has to do with each key, and what the program waits for there."""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memcpy
from cython_kernels.stream cimport make_grid
from hopcoll._letters cimport copy_let_go, give_memory, take_memory
from hopcoll._pulls cimport pull_cut, serves_close
from hopcoll._room cimport forget_file, touch, unlist
from hopcoll._store_state cimport *


# ---- items --------------------------------------------------------------------------------

cdef Item* find_item(Store* store, const Key* key) noexcept nogil:
    cdef Item* item = NULL
    if store.item_buckets:
        item = store.items[hash_of(key) & (store.item_buckets - 1)]
        while item != NULL and not key_equal(&item.key, key):
            item = item.next
    return item


cdef bint grow_items(Store* store) noexcept nogil:
    cdef int32_t buckets = 2 * store.item_buckets if store.item_buckets else BUCKETS_FIRST
    cdef Item** larger = <Item**>take_memory(store, buckets * sizeof(Item*))
    cdef Item** bucket
    cdef Item* item
    cdef Item* next
    cdef int32_t i
    if larger == NULL:
        return False
    for i in range(store.item_buckets):
        item = store.items[i]
        while item != NULL:
            next = item.next
            bucket = &larger[hash_of(&item.key) & (buckets - 1)]
            item.next = bucket[0]
            bucket[0] = item
            item = next
    give_memory(store, store.items)
    store.items = larger
    store.item_buckets = buckets
    return True


cdef Item* make_item(Store* store, const Key* key) noexcept nogil:
    cdef Item* item = find_item(store, key)
    cdef Item** bucket
    if item != NULL:
        return item
    if store.items_count >= store.item_buckets and not grow_items(store):
        return NULL
    item = <Item*>take_memory(store, sizeof(Item))
    if item == NULL:
        return NULL
    item.key = key[0]
    item.source = -1
    bucket = &store.items[hash_of(key) & (store.item_buckets - 1)]
    item.next = bucket[0]
    bucket[0] = item
    store.items_count += 1
    return item


cdef void settle_item(Store* store, Item* item) noexcept nogil:
    """Nobody here waits to be told its bytes: those who hope for them from us are told so.  What
    is about nothing any more goes."""
    cdef Item** link
    if item.state != ITEM_NONE:
        return
    if not item.asked:
        serves_close(store, item, False)
    if (item.asks != NULL or item.asked or item.looked or item.scouted or item.deleting):
        return
    link = &store.items[hash_of(&item.key) & (store.item_buckets - 1)]
    while link[0] != item:
        link = &link[0].next
    link[0] = item.next
    store.items_count -= 1
    give_memory(store, item)


cdef void fill_item(Store* store, Item* item, int state, int64_t stamp, Copy* copy,
                    int64_t nbytes, const unsigned char* meta, int meta_bytes) noexcept nogil:
    """The item gets a copy; it keeps the reference.  A partial one may wait for its memory."""
    item.state = state
    item.stamp = stamp
    item.copy = copy
    item.nbytes = nbytes
    item.grid = make_grid(nbytes, store.settings.chunk_bytes)
    item.have = 0 if state == ITEM_PARTIAL else item.grid.chunks
    item.source = -1
    item.orphaned = 0
    item.reduced = item.unsealed = item.told = 0
    item.meta_bytes = meta_bytes
    memcpy(item.meta, meta, meta_bytes)


cdef void drop_copy(Store* store, Item* item) noexcept nogil:
    """What is under way from the copy and to it ends."""
    if item.state == ITEM_NONE:
        return
    if item.state == ITEM_OFFERED:
        store.putting -= 1
    serves_close(store, item, True)
    if item.copy == NULL:
        serves_close(store, item, False)   # those that wait for it to come back
    pull_cut(store, item)
    unlist(store, item)
    forget_file(store, item)
    copy_let_go(store, item.copy)
    item.copy = NULL
    item.state = ITEM_NONE
    item.stamp = 0
    item.have = 0
    item.source = -1
    item.orphaned = 0


# ---- asks ---------------------------------------------------------------------------------

cdef void finish(Store* store, Item* item, Ask* ask, int status, int64_t stamp) noexcept nogil:
    ask.status = status
    ask.stamp = stamp
    ask.next = NULL
    if status == ASK_OK and ask.kind == ASK_GET:
        ask.copy = item.copy
        ask.copy.refs += 1
    if status == ASK_FAILED or (status == ASK_OK and ask.kind != ASK_DELETE
                                and item.state != ITEM_NONE and item.stamp == stamp):
        ask.nbytes = item.nbytes
        ask.meta_bytes = item.meta_bytes
        memcpy(ask.meta, item.meta, item.meta_bytes)
    ask.result.complete = 1
    if ask.kind == ASK_SCOUT:
        store.recipes_dirty = 1
    elif store.notify != NULL:
        store.notify(store.notify_context)


cdef void finish_kind(Store* store, Item* item, int kind, int status, int64_t stamp) noexcept nogil:
    cdef Ask** link = &item.asks
    cdef Ask* ask
    while link[0] != NULL:
        ask = link[0]
        if ask.kind == kind:
            link[0] = ask.next
            finish(store, item, ask, status, stamp)
        else:
            link = &ask.next


cdef void finish_scouts(Store* store, Item* item, int rank, int64_t stamp) noexcept nogil:
    """A rank has it, or a part of it."""
    cdef Ask* ask = item.asks
    while ask != NULL:
        if ask.kind == ASK_SCOUT:
            ask.rank = rank
        ask = ask.next
    finish_kind(store, item, ASK_SCOUT, ASK_OK, stamp)


cdef void finish_answered(Store* store, Item* item, int status, int64_t stamp,
                          int64_t serial) noexcept nogil:
    """Gets and waits end for which a letter up to this one spoke.  Of 0 the owner has told a holder
    something: those end for which any did.  Others were called later: what was decided before that
    is no answer to them."""
    cdef Ask** link = &item.asks
    cdef Ask* ask
    while link[0] != NULL:
        ask = link[0]
        if ((ask.kind == ASK_GET or ask.kind == ASK_LOOK or ask.kind == ASK_SCOUT) and ask.serial
                and (serial == 0 or ask.serial <= serial)):
            link[0] = ask.next
            finish(store, item, ask, status, stamp)
        else:
            link = &ask.next
    if item.asked <= serial or serial == 0:
        item.asked = 0
    if item.looked <= serial or serial == 0:
        item.looked = 0
    if item.scouted <= serial or serial == 0:
        item.scouted = 0


cdef void finish_complete(Store* store, Item* item) noexcept nogil:
    """The copy is complete, and accepted."""
    if item.state == ITEM_OFFERED:
        store.putting -= 1
    item.state = ITEM_COMPLETE
    touch(store, item)
    item.source = -1
    item.orphaned = 0
    item.asked = 0
    finish_kind(store, item, ASK_GET, ASK_OK, item.stamp)
    finish_kind(store, item, ASK_LOOK, ASK_OK, item.stamp)
    finish_scouts(store, item, store.rank, item.stamp)


cdef bint has_ask(const Item* item, int kind) noexcept nogil:
    cdef const Ask* ask = item.asks
    while ask != NULL and ask.kind != kind:
        ask = ask.next
    return ask != NULL


cdef bint has_unsent(const Item* item, int kind) noexcept nogil:
    cdef const Ask* ask = item.asks
    while ask != NULL and (ask.kind != kind or ask.serial):
        ask = ask.next
    return ask != NULL


cdef void unsay_after(Item* item, int64_t serial) noexcept nogil:
    """Our letters for gets up to this one were answered by a copy; for those that were called later
    nobody has spoken, should it come to nothing."""
    cdef Ask* ask = item.asks
    while ask != NULL:
        if ask.kind == ASK_GET and ask.serial > serial:
            ask.serial = 0
        ask = ask.next
