# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What the owner of a key is told by those who have to do with it."""
from libc.stdint cimport int64_t
from hopcoll._items cimport finish, finish_complete, has_ask, has_unsent
from hopcoll._letters cimport letter_of, send_letter, send_object
from hopcoll._store_state cimport *


cdef void tell_owner(Store* store, Item* item, int type, int64_t stamp, int rank) noexcept nogil:
    cdef Letter letter = letter_of(type, &item.key, stamp)
    letter.rank = rank
    send_letter(store, owner_now(store, &item.key), &letter)


cdef void tell_orphan(Store* store, Item* item, int source) noexcept nogil:
    cdef Letter letter = letter_of(LETTER_ORPHAN, &item.key, item.stamp)
    item.orphaned = 1
    item.source = -1
    letter.rank = source
    if mask_has(&store.gone, source):
        letter.flags |= LETTER_IS_GONE
    send_letter(store, owner_now(store, &item.key), &letter)


cdef void tell_put(Store* store, Item* item) noexcept nogil:
    cdef Letter letter = letter_of(LETTER_PUT, &item.key, item.stamp)
    cdef int owner = owner_now(store, &item.key)
    letter.nbytes = item.nbytes
    send_object(store, owner, &letter, item.meta, item.meta_bytes,
                item.copy if item.nbytes <= store.settings.inline_bytes and owner != store.rank
                else NULL)


cdef bint is_whole(const Item* item) noexcept nogil:
    """Of an attempt that is not sealed: all of it is here."""
    return (item.state == ITEM_PARTIAL and item.unsealed and item.pull == NULL
            and item.have == item.grid.chunks)


cdef void tell_hold(Store* store, Item* item) noexcept nogil:
    cdef Letter letter = letter_of(LETTER_HOLD, &item.key, item.stamp)
    letter.nbytes = item.nbytes
    letter.rank = item.source
    if item.reduced:
        letter.flags |= LETTER_IS_REDUCED
    if item.unsealed:
        letter.flags |= LETTER_IS_UNSEALED
    if item.state == ITEM_COMPLETE or is_whole(item):
        letter.flags |= LETTER_IS_COMPLETE
    elif item.orphaned:
        letter.flags |= LETTER_ASKS
    send_object(store, owner_now(store, &item.key), &letter, item.meta, item.meta_bytes, NULL)


cdef bint all_patient(const Item* item) noexcept nogil:
    cdef const Ask* ask = item.asks
    while ask != NULL and (ask.kind != ASK_SCOUT or ask.patient):
        ask = ask.next
    return ask == NULL


cdef int letter_for(int kind) noexcept nogil:
    return LETTER_ASK if kind == ASK_GET else LETTER_LOOK if kind == ASK_LOOK else LETTER_SCOUT


cdef void tell_waiting(Store* store, Item* item, int kind, int64_t serial) noexcept nogil:
    cdef Letter letter = letter_of(letter_for(kind), &item.key, 0)
    cdef const Ask* ask = item.asks
    letter.serial = serial
    if kind == ASK_SCOUT:
        letter.rank = item.bad_rank
        letter.nbytes = item.bad_stamp
        letter.flags = (LETTER_IS_PATIENT * all_patient(item)
                        | LETTER_IS_GONE * (item.bad_gone != 0))
    while ask != NULL:
        if ask.kind == kind and ask.stamp:
            letter.stamp = ask.stamp       # its ref says that there was an object
        ask = ask.next
    send_letter(store, owner_now(store, &item.key), &letter)


cdef void register(Store* store, Item* item) noexcept nogil:
    """Tells a new owner all that we have to do with a key."""
    store.counters.registered += 1
    if item.state == ITEM_OFFERED:
        tell_put(store, item)
    elif item.state != ITEM_NONE and not store.settings.sabotage & BREAK_REGISTER:
        tell_hold(store, item)
    if item.asked and not store.settings.sabotage & BREAK_WAITERS:
        tell_waiting(store, item, ASK_GET, item.asked)
    if item.looked:
        tell_waiting(store, item, ASK_LOOK, item.looked)
    if item.scouted:
        tell_waiting(store, item, ASK_SCOUT, item.scouted)
    if item.deleting:
        tell_delete(store, item)


cdef void tell_delete(Store* store, const Item* item) noexcept nogil:
    cdef Letter letter = letter_of(LETTER_DELETE, &item.key, 0)
    letter.flags = LETTER_IS_UNNAMED * (item.unnamed != 0)
    send_letter(store, owner_now(store, &item.key), &letter)


cdef void delete_at_owner(Store* store, Item* item) noexcept nogil:
    """One deletion at a time: those that are called meanwhile may be about a later object."""
    cdef Ask* ask = item.asks
    item.deleting = 1
    while ask != NULL:
        if ask.kind == ASK_DELETE:
            ask.stamp = 1
            item.unnamed |= ask.unnamed
        ask = ask.next
    tell_delete(store, item)


cdef void on_deleted(Store* store, Item* item) noexcept nogil:
    cdef Ask** link = &item.asks
    cdef Ask* ask
    item.deleting = item.unnamed = 0
    while link[0] != NULL:
        ask = link[0]
        if ask.kind == ASK_DELETE and ask.stamp:
            link[0] = ask.next
            finish(store, item, ask, ASK_OK, 0)
        else:
            link = &ask.next
    if has_ask(item, ASK_DELETE):
        delete_at_owner(store, item)


cdef void wait_at_owner(Store* store, Item* item, int kind) noexcept nogil:
    """A letter for all gets, or all waits, that none has spoken for since they were called.  Its
    number is new in the store: an item may go and come again while an answer is under way."""
    cdef Ask* ask = item.asks
    store.waits += 1
    while ask != NULL:
        if ask.kind == kind and ask.serial == 0:
            ask.serial = store.waits
        ask = ask.next
    if kind == ASK_GET:
        item.asked = store.waits
    elif kind == ASK_LOOK:
        item.looked = store.waits
    else:
        item.scouted = store.waits
    tell_waiting(store, item, kind, store.waits)


cdef void wait_anew(Store* store, Item* item) noexcept nogil:
    """There is no copy here, nor one under way: who waits, waits at the owner."""
    if has_ask(item, ASK_GET) and (not item.asked or has_unsent(item, ASK_GET)):
        wait_at_owner(store, item, ASK_GET)
    if has_ask(item, ASK_LOOK) and (not item.looked or has_unsent(item, ASK_LOOK)):
        wait_at_owner(store, item, ASK_LOOK)
    if has_ask(item, ASK_SCOUT) and (not item.scouted or has_unsent(item, ASK_SCOUT)):
        wait_at_owner(store, item, ASK_SCOUT)


cdef void wait_again(Store* store, Item* item) noexcept nogil:
    """The copy by which gets were answered came to nothing: they wait at the owner again."""
    cdef Ask* ask = item.asks
    while ask != NULL:
        if ask.kind == ASK_GET:
            ask.serial = 0
        ask = ask.next
    item.asked = 0
    wait_anew(store, item)


cdef void copy_arrived(Store* store, Item* item) noexcept nogil:
    """All bytes are here.  Of an attempt that is not sealed nobody may be told yet."""
    item.source = -1
    item.orphaned = 0
    if not item.unsealed:
        finish_complete(store, item)
    tell_owner(store, item, LETTER_COMPLETE, item.stamp, -1)
