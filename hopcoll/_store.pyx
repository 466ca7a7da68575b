# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One rank's store of objects: its calls, its events, and deaths.

An *item* is what this rank has to do with a key: a copy, streams to and from it, and what the
program waits for (*asks*).  All of it can be told to a new owner of the key at any time, which is
what a death asks for.  The owner's own side is in _directory.pyx; what a rank tells itself goes by
the inbox, so that it is never in the middle of something else.
"""
from libc.stdint cimport int64_t, int32_t, uint8_t, uint16_t
from libc.string cimport memcpy, memset
from cython_kernels.transport cimport (
    Event, EVENT_CONTROL, EVENT_DEAD, EVENT_LOST, EVENT_RECEIVED, Transport)
from hopcoll._asks cimport (
    copy_arrived, delete_at_owner, on_deleted, register, tell_hold, tell_orphan, tell_owner,
    tell_put, wait_again, wait_anew)
from hopcoll._directory cimport forget_gone, on_note, on_owner_letter, settle_directory
from hopcoll._entries cimport find_entry, forget_oldest, free_entries
from hopcoll._items cimport (
    drop_copy, fill_item, find_item, finish, finish_answered, finish_complete, finish_kind,
    has_ask, make_item, settle_item, unsay_after)
from hopcoll._letters cimport (
    copy_force, copy_let_go, copy_new, give_memory, letter_of, parcel_of, post, send_letter,
    send_object, send_sync, take_memory)
from hopcoll._pulls cimport (
    MOVED_ALL, MOVED_NO_MORE, answer_voids, pull_abandon, pull_event, serve_credit, serve_end,
    serve_event, serve_start, serves_close, serves_feed, serves_of_gone, serves_push, serves_wait,
    stream_at)
from hopcoll._places cimport (
    feed_event, item_of_place, on_place_letter, places_advance, places_free, places_of_gone,
    places_release, places_sweep)
from hopcoll._recipes cimport (
    on_recipe_letter, on_scouted, recipe_call, recipe_made, recipe_taken, recipes_free,
    recipes_register, recipes_step)
from hopcoll._room cimport has_room, need_back, touch, unwant, want_room
from hopcoll._spills cimport (
    begin_pull, job_ended, jobs_free, may_hope, no_room, room_due, room_step, wants_end)
from hopcoll._state cimport TOKEN_IGNORED
from hopcoll._store_state cimport *


# ---- what the owner of a key says ---------------------------------------------------------

cdef void refuse_put(Store* store, Item* item) noexcept nogil:
    cdef int64_t stamp = item.stamp
    drop_copy(store, item)
    finish_kind(store, item, ASK_PUT, ASK_EXISTS, stamp)
    wait_anew(store, item)


cdef bint is_unwanted(const Item* item) noexcept nogil:
    """We have put another one meanwhile, and what waits here waits for what becomes of that; or
    nobody waits any more, nor pulls from what was to come."""
    return item.state == ITEM_OFFERED or (item.state == ITEM_NONE and not serves_wait(item)
                                          and not has_ask(item, ASK_GET))


cdef void decline(Store* store, Item* item, int64_t stamp) noexcept nogil:
    item.asked = 0
    serves_close(store, item, False)
    tell_owner(store, item, LETTER_DROPPED, stamp, -1)


cdef void on_name(Store* store, Item* item, const Letter* letter,
                  const unsigned char* meta) noexcept nogil:
    """The owner says from where to pull.  Without room the item is a partial copy, with nothing
    yet, until there is some, or none to come."""
    cdef Copy* copy = NULL
    if is_unwanted(item):
        decline(store, item, letter.stamp)
        return
    if item.state == ITEM_NONE:
        if letter.serial == 0 and not store.settings.sabotage & BREAK_STALE:
            return                         # we had a part, and have told that it is dropped
        if has_room(store, letter.nbytes):
            copy = copy_new(store, letter.nbytes)
        fill_item(store, item, ITEM_PARTIAL, letter.stamp, copy, letter.nbytes, meta,
                  letter.meta_bytes)
        item.reduced = letter.flags & LETTER_IS_REDUCED
        item.unsealed = letter.flags & LETTER_IS_UNSEALED
        unsay_after(item, letter.serial)
        item.asked = 0
        serves_feed(store, item)
        if copy == NULL:
            want_room(store, &item.want, WANT_PULL, item, item.nbytes)
    elif (item.state != ITEM_PARTIAL or item.stamp != letter.stamp
          or not item.orphaned):
        return
    begin_pull(store, item, letter.rank)


cdef void on_have(Store* store, Item* item, const Letter* letter,
                  const unsigned char* meta) noexcept nogil:
    """The owner sends the bytes.  They are here already: where files can make room, they take it
    before these have."""
    cdef Copy* copy = NULL
    cdef bint is_new = item.state == ITEM_NONE
    if is_unwanted(item):
        decline(store, item, letter.stamp)
        return
    if is_new and letter.serial == 0 and not store.settings.sabotage & BREAK_STALE:
        return
    if not is_new and (item.state != ITEM_PARTIAL or item.stamp != letter.stamp
                       or item.pull != NULL):
        return
    if is_new or item.copy == NULL:
        if has_room(store, letter.nbytes) or may_hope(store, letter.nbytes):
            copy = copy_force(store, letter.nbytes)
        if copy == NULL:
            no_room(store, item, letter.stamp)
            return
    if is_new:
        fill_item(store, item, ITEM_COMPLETE, letter.stamp, copy, letter.nbytes, meta,
                  letter.meta_bytes)
        item.reduced = letter.flags & LETTER_IS_REDUCED
    elif item.copy == NULL:
        unwant(store, &item.want)
        item.copy = copy
    store.counters.inlined += 1
    memcpy(item.copy.data, meta + letter.meta_bytes, letter.nbytes)
    item.have = item.grid.chunks
    finish_complete(store, item)
    serves_push(store, item)
    serves_feed(store, item)


cdef void on_end(Store* store, Item* item, const Letter* letter) noexcept nogil:
    """The object is deleted, or lost."""
    cdef int status = (ASK_LOST if letter.type == LETTER_LOST
                       else ASK_FAILED if letter.type == LETTER_FAILED else ASK_DELETED)
    if letter.type == LETTER_DROP:
        if item.state != ITEM_NONE and item.stamp == letter.stamp:
            drop_copy(store, item)
        tell_owner(store, item, LETTER_DROPPED, letter.stamp, -1)
    elif letter.type == LETTER_LOST and item.state == ITEM_PARTIAL and item.stamp == letter.stamp:
        drop_copy(store, item)
    if item.state == ITEM_NONE:
        finish_answered(store, item, status, letter.stamp, letter.serial)
        wait_anew(store, item)
    elif letter.serial:
        # Who waits here waits for what becomes of our put, or of the copy.
        if item.looked <= letter.serial:
            item.looked = 0
        if item.scouted <= letter.serial:
            item.scouted = 0
        if item.asked <= letter.serial:
            item.asked = 0
            if item.copy != NULL:
                serves_close(store, item, False)


cdef void on_looked(Store* store, Item* item, const Letter* letter,
                    const unsigned char* meta) noexcept nogil:
    """It is there, which is an answer to whoever waits."""
    cdef Ask* ask = item.asks
    while ask != NULL:
        if ask.kind == ASK_LOOK:
            ask.meta_bytes = letter.meta_bytes
            memcpy(ask.meta, meta, letter.meta_bytes)
        ask = ask.next
    if item.looked <= letter.serial:
        item.looked = 0
    finish_kind(store, item, ASK_LOOK, ASK_OK, letter.stamp)


cdef void on_sealed(Store* store, Item* item, const Letter* letter) noexcept nogil:
    """What we have of this attempt is the object."""
    if item.state != ITEM_PARTIAL or item.stamp != letter.stamp or not item.unsealed:
        return
    item.unsealed = 0
    if item.have == item.grid.chunks and item.pull == NULL:
        finish_complete(store, item)


cdef void on_retry(Store* store, Item* item, const Letter* letter) noexcept nogil:
    """What we have of this attempt is nothing, or what we were told that we would have."""
    if (item.state == ITEM_PARTIAL and item.stamp == letter.stamp
            and not store.settings.sabotage & BREAK_ATTEMPT):
        drop_copy(store, item)
    if item.state == ITEM_NONE:
        wait_again(store, item)


cdef void on_owner_says(Store* store, const Letter* letter,
                        const unsigned char* meta) noexcept nogil:
    cdef Item* item = make_item(store, &letter.key)
    if item == NULL:
        return
    if letter.type == LETTER_OK:
        if item.state == ITEM_OFFERED and item.stamp == letter.stamp:
            finish_complete(store, item)
            finish_kind(store, item, ASK_PUT, ASK_OK, letter.stamp)
            serves_feed(store, item)
    elif letter.type == LETTER_EXISTS:
        if item.state == ITEM_OFFERED and item.stamp == letter.stamp:
            refuse_put(store, item)
    elif letter.type == LETTER_NAME:
        on_name(store, item, letter, meta)
    elif letter.type == LETTER_HAVE:
        on_have(store, item, letter, meta)
    elif letter.type == LETTER_LOOKED:
        on_looked(store, item, letter, meta)
    elif letter.type == LETTER_GONE:
        on_deleted(store, item)
    elif letter.type == LETTER_SEALED:
        on_sealed(store, item, letter)
    elif letter.type == LETTER_RETRY:
        on_retry(store, item, letter)
    elif letter.type == LETTER_SCOUTED:
        on_scouted(store, item, letter, meta)
    else:
        if letter.type == LETTER_FAILED and item.state == ITEM_NONE:
            item.meta_bytes = letter.meta_bytes
            memcpy(item.meta, meta, letter.meta_bytes)
        on_end(store, item, letter)
    settle_item(store, item)


# ---- events -------------------------------------------------------------------------------

cdef void keep_bytes(Store* store, const Letter* letter, const unsigned char* meta) noexcept nogil:
    """A small object is about to be accepted by us: we keep a copy, to answer with."""
    cdef Entry* entry = find_entry(store, &letter.key)
    cdef Waiter* waiter = NULL if entry == NULL else entry.waiters
    cdef Item* item
    cdef Copy* copy
    if (not is_settled_for(store, &letter.key)
            or (entry != NULL and (entry.state == ENTRY_PRESENT
                                   or entry.state == ENTRY_DELETING))):
        return
    while waiter != NULL:
        if waiter.kind == ASK_PUT:
            return
        waiter = waiter.next
    item = make_item(store, &letter.key)
    if item == NULL or item.state != ITEM_NONE:
        return
    copy = copy_new(store, letter.nbytes) if has_room(store, letter.nbytes) else NULL
    if copy == NULL:
        settle_item(store, item)
        return
    memcpy(copy.data, meta + letter.meta_bytes, letter.nbytes)
    fill_item(store, item, ITEM_COMPLETE, letter.stamp, copy, letter.nbytes, meta,
              letter.meta_bytes)
    finish_complete(store, item)
    serves_feed(store, item)
    tell_hold(store, item)


cdef void on_stream_letter(Store* store, int peer, const Letter* letter) noexcept nogil:
    cdef Item* item
    if letter.type == LETTER_GRANT:
        if letter.rank >= 0:               # a parent asks for the partial sum of a place
            item = NULL if store.left else item_of_place(store, letter)
        else:
            item = find_item(store, &letter.key)
        if (item == NULL or store.left or mask_has(&store.gone, peer)
                or (item.stamp != letter.stamp and not item.asked)):
            answer_voids(store, peer, letter.tag, letter.limit - letter.first)
        else:
            serve_start(store, item, peer, letter)
    elif letter.type == LETTER_CREDIT:
        serve_credit(store, peer, letter)
    else:
        serve_end(store, peer, letter)
        places_sweep(store)


cdef void on_letter(Store* store, int peer, const Letter* letter, int64_t nbytes) noexcept nogil:
    cdef const unsigned char* meta = <const unsigned char*>(letter + 1)
    cdef Parcel* parcel
    cdef Letter answer
    if LETTER_GRANT <= letter.type <= LETTER_END:
        on_stream_letter(store, peer, letter)
    elif store.left or mask_has(&store.gone, peer):
        return
    elif letter.type == LETTER_BYE:
        store_gone(store, peer, GOING_LEFT)
    elif letter.type == LETTER_SYNC:
        store.synced[peer] = (<const Mask*>meta)[0]
    elif letter.type == LETTER_PING:
        answer = letter[0]
        answer.type = LETTER_PONG
        post(store, peer, &answer, sizeof(Letter), meta, nbytes - <int64_t>sizeof(Letter))
    elif letter.type == LETTER_PONG:
        if store.pong != NULL:
            store.pong(store.notify_context, letter.serial)
    elif letter.type == LETTER_NOTE or letter.type == LETTER_UNNOTE:
        on_note(store, peer, letter)
    elif letter.type >= LETTER_PLACE:
        on_place_letter(store, letter, meta)
    elif letter.type == LETTER_TAKEN:
        recipe_taken(store, letter)
    elif letter.type == LETTER_MADE:
        recipe_made(store, letter)
    elif letter.type >= LETTER_OK:
        on_owner_says(store, letter, meta)
    elif owner_now(store, &letter.key) != store.rank:
        # It knows of deaths that we have not heard of.
        parcel = parcel_of(store, peer, letter, nbytes)
        if parcel == NULL:
            return
        store.counters.held += 1
        if store.early == NULL:
            store.early = parcel
        else:
            store.early_last.next = parcel
        store.early_last = parcel
    elif (letter.type == LETTER_REDUCE or letter.type == LETTER_UNPLACED
          or letter.type == LETTER_FORGOT):
        on_recipe_letter(store, peer, letter, meta)
    else:
        if letter.type == LETTER_PUT and letter.flags & LETTER_INLINE:
            keep_bytes(store, letter, meta)
        on_owner_letter(store, peer, letter, meta)


cdef void read_inbox(Store* store) noexcept nogil:
    cdef Parcel* parcel
    while store.inbox != NULL:
        parcel = store.inbox
        store.inbox = parcel.next
        on_letter(store, parcel.peer, <const Letter*>(parcel + 1), parcel.nbytes)
        give_memory(store, parcel)


cdef void settle_letters(Store* store) noexcept nogil:
    read_inbox(store)
    settle_directory(store)
    read_inbox(store)


cdef void settle_rest(Store* store) noexcept nogil:
    """What letters tell may be what a place waited for, so places come last."""
    cdef bint again = True
    while again:
        settle_letters(store)
        recipes_step(store)
        if store.places != NULL:
            places_advance(store)
        again = (store.recipes_dirty or store.inbox != NULL) and not store.broken


cdef void settle_store(Store* store) noexcept nogil:
    """After anything that happened."""
    settle_rest(store)
    while room_due(store) and room_step(store):
        settle_rest(store)
    forget_oldest(store)


cdef void on_data(Store* store, const Event* event) noexcept nogil:
    cdef Stream* stream = stream_at(store, event.token)
    cdef Item* item = stream.item
    cdef int source, moved
    if not stream.is_pull:
        serve_event(store, stream, event)
        return
    if stream.place != NULL:
        feed_event(store, stream, event)
        return
    source = stream.sink.source
    moved = pull_event(store, stream, event)
    if moved == MOVED_ALL:
        copy_arrived(store, item)
    elif moved == MOVED_NO_MORE:
        tell_orphan(store, item, source)


cdef void use(Store* store) noexcept nogil:
    """The first that is asked of the store.  What was not told of deaths so far is told now: others
    wait for our marker, and we need theirs."""
    if not store.used and not store.left:
        store.used = 1
        if not mask_empty(&store.gone):
            send_sync(store)


cdef void store_event(Store* store, const Event* event) noexcept nogil:
    if store.broken:
        return
    if event.kind == EVENT_CONTROL:
        if event.nbytes >= <int64_t>sizeof(Letter):
            if (<const Letter*>event.payload).type != LETTER_BYE:
                use(store)
            on_letter(store, event.peer, <const Letter*>event.payload, event.nbytes)
    elif event.kind == EVENT_DEAD:
        store_gone(store, event.peer, GOING_DEAD)
    elif event.token != TOKEN_IGNORED:
        on_data(store, event)
    settle_store(store)


cdef void register_all(Store* store, int rank, const Mask* before, int going) noexcept nogil:
    """A rank is gone: what it gave us, and what it owned."""
    cdef Item* item
    cdef int32_t i
    cdef bint owned, fed, waits
    for i in range(store.item_buckets):
        item = store.items[i]
        while item != NULL:
            owned = owner_of(store, &item.key, before) == rank
            fed = going == GOING_LOST and item.pull != NULL and item.pull.sink.source == rank
            waits = item.want.kind == WANT_PULL and item.source == rank
            if fed:
                pull_abandon(store, item)
            if fed or waits:
                if owned:
                    item.orphaned = 1
                    item.source = -1
                else:
                    tell_orphan(store, item, rank)
            if owned:
                register(store, item)
            item = item.next


cdef void store_gone(Store* store, int rank, int going) noexcept nogil:
    """A rank is dead, lost, or has left: from now on nothing is asked of it."""
    cdef Mask before = store.gone
    cdef Parcel* parcel
    cdef Parcel* next
    if going == GOING_DEAD:
        mask_add(&store.dead, rank)
    elif going == GOING_LOST:
        mask_add(&store.lost, rank)
    if mask_has(&before, rank) or store.left or rank == store.rank:
        return
    mask_add(&store.gone, rank)
    if not store.used:
        return
    serves_of_gone(store, rank)
    places_of_gone(store, rank, going == GOING_LOST)
    places_sweep(store)
    recipes_register(store, rank, &before)
    store.recipes_dirty = 1
    register_all(store, rank, &before, going)
    send_sync(store)
    read_inbox(store)
    forget_gone(store, rank)
    parcel = store.early
    store.early = NULL
    while parcel != NULL:
        next = parcel.next
        on_letter(store, parcel.peer, <const Letter*>(parcel + 1), parcel.nbytes)
        give_memory(store, parcel)
        parcel = next
    settle_store(store)


# ---- calls --------------------------------------------------------------------------------

cdef void store_reserve(Store* store, Ask* ask, int64_t nbytes) noexcept nogil:
    """Room for what is to be put, as the copy of the ask.  It is there, or will never be, when
    the ask's want is complete."""
    ask.want.result.complete = 1
    if has_room(store, nbytes):
        ask.copy = copy_new(store, nbytes)
        store.putting += ask.copy != NULL
    elif not store.left and nbytes <= store.settings.limit_bytes:
        want_room(store, &ask.want, WANT_PUT, ask, nbytes)
        settle_store(store)


cdef Job* store_take_job(Store* store) noexcept nogil:
    """What is to be done with a file, by who has a disk; NULL: nothing."""
    cdef Job* job = store.jobs
    if job != NULL:
        store.jobs = job.next
    return job


cdef void store_end_job(Store* store, Job* job) noexcept nogil:
    """It is done, or has failed.  Nothing is sent before somebody looks who may."""
    job.next = store.ended
    store.ended = job


cdef void store_look(Store* store) noexcept nogil:
    """What follows from jobs that have ended."""
    cdef Job* job
    while store.ended != NULL:
        job = store.ended
        store.ended = job.next
        job_ended(store, job)
        settle_store(store)


cdef void store_ping(Store* store, int peer, int64_t serial, int64_t nbytes) noexcept nogil:
    """A message of so many bytes behind its head goes to a rank and back."""
    cdef Letter letter
    cdef Key none
    none.high = none.low = 0
    if store.left or mask_has(&store.gone, peer):
        return
    use(store)
    letter = letter_of(LETTER_PING, &none, 0)
    letter.serial = serial
    post(store, peer, &letter, sizeof(Letter), store.outbox, nbytes)


cdef void store_let_go(Store* store, Copy* copy) noexcept nogil:
    copy_let_go(store, copy)
    if room_due(store):
        settle_store(store)


cdef void store_put(Store* store, Ask* ask) noexcept nogil:
    """The copy, with all its bytes, becomes the object of `ask.key`; its meta is the ask's."""
    cdef Item* item = NULL if store.left else make_item(store, &ask.key)
    cdef Copy* copy = ask.copy
    ask.copy = NULL
    use(store)
    store.counters.puts += 1
    if item == NULL or item.state != ITEM_NONE:
        store.putting -= 1
        finish(store, item, ask, ASK_CLOSED if item == NULL else ASK_EXISTS, 0)
        store_let_go(store, copy)
        return
    store.serial += 1
    ask.stamp = (<int64_t>store.rank + 1) << 40 | store.serial
    fill_item(store, item, ITEM_OFFERED, ask.stamp, copy, copy.nbytes, ask.meta, ask.meta_bytes)
    ask.next = item.asks
    item.asks = ask
    tell_put(store, item)
    settle_store(store)


cdef void store_reduce(Store* store, Ask* ask, const Ask* inputs, int inputs_count, int count,
                       int op) noexcept nogil:
    """The object of `ask.key` is made of the first `count` of these that exist."""
    use(store)
    recipe_call(store, ask, inputs, inputs_count, count, op)
    settle_store(store)


cdef void add_ask(Item* item, Ask* ask) noexcept nogil:
    ask.next = item.asks
    item.asks = ask


cdef void store_ask(Store* store, Ask* ask) noexcept nogil:
    """A get, a wait or a deletion."""
    cdef Item* item = NULL if store.left else make_item(store, &ask.key)
    use(store)
    if item == NULL:
        finish(store, item, ask, ASK_CLOSED, 0)
        return
    if ask.kind == ASK_DELETE:
        store.counters.deletes += 1
        ask.stamp = 0
        add_ask(item, ask)
        if not item.deleting:
            delete_at_owner(store, item)
    elif item.state == ITEM_COMPLETE and (item.copy != NULL or ask.kind != ASK_GET):
        if item.listed:
            touch(store, item)
        finish(store, item, ask, ASK_FULL if item == store.rescue and ask.kind == ASK_GET
               else ASK_OK, item.stamp)
    else:
        ask.serial = 0
        add_ask(item, ask)
        if item.state == ITEM_NONE:
            wait_anew(store, item)
        need_back(store, item)
    store.counters.gets += ask.kind == ASK_GET
    settle_store(store)


cdef void store_withdraw(Store* store, Ask* ask) noexcept nogil:
    """The program waits for it no more.  Of a get the owner is not told: it may have named us
    already.  What then has not begun to come is declined, unless another counts on it."""
    cdef Item* item = find_item(store, &ask.key)
    cdef Ask** link
    unwant(store, &ask.want)
    if ask.kind == ASK_PUT and ask.copy != NULL:
        store.putting -= 1                 # there was room, and it is not used
        store_let_go(store, ask.copy)
        ask.copy = NULL
        return
    if item == NULL or ask.result.complete:
        return
    link = &item.asks
    while link[0] != NULL:
        if link[0] == ask:
            link[0] = ask.next
            break
        link = &link[0].next
    if item.looked and not has_ask(item, ASK_LOOK):
        item.looked = 0
        tell_owner(store, item, LETTER_UNLOOK, 0, -1)
    settle_item(store, item)
    settle_store(store)


# ---- the beginning and the end ------------------------------------------------------------

cdef Store* store_new(Transport* transport, const StoreSettings* settings, int32_t* tags,
                      const uint16_t* host) noexcept nogil:
    """A new store over `transport`, or NULL when memory is short."""
    cdef Store* store = <Store*>transport.allocate(transport.self, sizeof(Store))
    cdef int64_t room = transport.control_bytes_max - <int64_t>sizeof(Letter) - META_MAX
    if store == NULL:
        return NULL
    memset(store, 0, sizeof(Store))
    store.transport = transport
    store.settings = settings[0]
    store.tags = tags
    store.rank = transport.rank
    store.size = transport.size
    if store.settings.inline_bytes > room:
        store.settings.inline_bytes = room
    store.synced = <Mask*>take_memory(store, store.size * sizeof(Mask))
    store.host = <uint16_t*>take_memory(store, store.size * sizeof(uint16_t))
    store.outbox = <unsigned char*>take_memory(store, META_MAX + store.settings.inline_bytes)
    if store.synced == NULL or store.host == NULL or store.outbox == NULL:
        store_free(store)
        return NULL
    memcpy(store.host, host, store.size * sizeof(uint16_t))
    return store


cdef void free_parcels(Store* store, Parcel* parcel) noexcept nogil:
    cdef Parcel* next
    while parcel != NULL:
        next = parcel.next
        give_memory(store, parcel)
        parcel = next


cdef void store_leave(Store* store) noexcept nogil:
    """Good-bye: streams end, what waits ends, and the others count on nothing of ours any more."""
    cdef Letter letter
    cdef Key none
    cdef Item* item
    cdef int32_t i
    cdef int r
    if store.left:
        return
    store.left = 1
    if not store.used:
        return                 # the engine's good-bye is enough
    recipes_free(store)
    places_free(store)
    wants_end(store)
    for i in range(store.item_buckets):
        while store.items[i] != NULL:
            item = store.items[i]
            drop_copy(store, item)
            item.asked = item.looked = item.scouted = 0
            finish_kind(store, item, ASK_GET, ASK_CLOSED, 0)
            finish_kind(store, item, ASK_LOOK, ASK_CLOSED, 0)
            finish_kind(store, item, ASK_PUT, ASK_CLOSED, 0)
            finish_kind(store, item, ASK_DELETE, ASK_CLOSED, 0)
            finish_kind(store, item, ASK_REDUCE, ASK_CLOSED, 0)
            item.deleting = 0
            settle_item(store, item)
    free_entries(store)
    free_parcels(store, store.inbox)
    free_parcels(store, store.early)
    store.inbox = store.early = NULL
    none.high = none.low = 0
    letter = letter_of(LETTER_BYE, &none, 0)
    for r in range(store.size):
        if r != store.rank and not mask_has(&store.gone, r):
            send_letter(store, r, &letter)


cdef bint store_moves(const Store* store) noexcept nogil:
    """Whether something is under way that should be looked after at once."""
    return store.streams_used > 0 or store.writing_bytes > 0 or store.reading > 0


cdef void store_free(Store* store) noexcept nogil:
    """All memory but what the program still looks at.  No request of a stream is open."""
    cdef Item* item
    cdef int32_t i
    recipes_free(store)
    places_release(store)
    free_entries(store)
    jobs_free(store)
    for i in range(store.item_buckets):
        while store.items[i] != NULL:
            item = store.items[i]
            store.items[i] = item.next
            copy_let_go(store, item.copy)
            give_memory(store, item)
    for i in range(store.streams_made):
        copy_let_go(store, store.streams[i].copy)
        give_memory(store, store.streams[i])
    free_parcels(store, store.inbox)
    free_parcels(store, store.early)
    give_memory(store, store.items)
    give_memory(store, store.streams)
    give_memory(store, store.synced)
    give_memory(store, store.host)
    give_memory(store, store.outbox)
    give_memory(store, store)
