# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The places of reductions that this rank fills, one for each input that it has.

A *place* is an input in the tree of an attempt.  It pulls the partial sums of its children, its
*feeds*, adds its input chunk by chunk as they come, and serves the outcome to its parent from the
first chunk on.  What the root makes is the object; it may be pulled at once, and is the object for
good when it is sealed.  The owner of the result orders all of this (`hopcoll._recipes`); a place
lives until the owner says that the attempt is over, or is gone.

A parent may be faster than the owner's letter to the child: its grant makes a place that has
nothing yet, and waits there.  So does one whose input is in a file, or for whose sums there is no
room yet.
"""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memcpy, memset
from cython_kernels.reduction cimport AVG, SUM, divide, itemsize_of, reduce_into
from cython_kernels.stream cimport (
    chunk_length, make_grid, sink_arrived, sink_credit_due, sink_idle, sink_open, sink_post,
    slot_of_chunk)
from cython_kernels.transport cimport Event, EVENT_LOST
from hopcoll._asks cimport copy_arrived, tell_owner, wait_again
from hopcoll._items cimport drop_copy, fill_item, find_item, make_item, settle_item
from hopcoll._letters cimport (
    copy_let_go, copy_new, give_memory, letter_of, send_letter, take_memory)
from hopcoll._pulls cimport serves_close, serves_feed, serves_push, stream_free, stream_new
from hopcoll._room cimport has_room, need_back, touch, unwant, want_room
from hopcoll._store_state cimport *


# ---- the list of places -------------------------------------------------------------------

cdef Place* find_place(Store* store, const Key* key, int64_t stamp, int index) noexcept nogil:
    cdef Place* place = store.places
    while place != NULL and (place.index != index or place.out.stamp != stamp
                             or not key_equal(&place.out.key, key)):
        place = place.next
    return place


cdef Place* make_place(Store* store, const Letter* letter) noexcept nogil:
    cdef Place* place = find_place(store, &letter.key, letter.stamp, letter.rank)
    if place != NULL:
        return place
    place = <Place*>take_memory(store, sizeof(Place))
    if place == NULL:
        return NULL
    place.out.key = letter.key
    place.out.stamp = letter.stamp
    place.out.source = -1
    place.index = letter.rank
    place.next = store.places
    store.places = place
    return place


cdef void cut_feed(Store* store, Feed* feed) noexcept nogil:
    """Its source is told, and ends the stream, which drains."""
    cdef Stream* stream = feed.stream
    if stream == NULL:
        return
    if not mask_has(&store.dead, stream.sink.source):
        tell_feed(store, stream, LETTER_END, feed.index)
    if mask_has(&store.lost, stream.sink.source):
        stream.stray = 1
    stream.place = NULL
    feed.stream = NULL
    if sink_idle(&stream.sink):
        stream_free(store, stream)


cdef void free_place(Store* store, Place* place) noexcept nogil:
    cdef Place** link = &store.places
    cdef int i
    while link[0] != place:
        link = &link[0].next
    link[0] = place.next
    serves_close(store, &place.out, True)
    serves_close(store, &place.out, False)
    for i in range(place.feeds_count):
        cut_feed(store, &place.feeds[i])
    unwant(store, &place.out.want)
    copy_let_go(store, place.out.copy)
    copy_let_go(store, place.input)
    copy_let_go(store, place.slots)
    give_memory(store, place.feeds)
    give_memory(store, place)


cdef void places_sweep(Store* store) noexcept nogil:
    """Those that were only asked for, by who asks no more."""
    cdef Place* place = store.places
    cdef Place* next
    while place != NULL:
        next = place.next
        if not place.filled and place.out.serves == NULL:
            free_place(store, place)
        place = next


cdef void places_free(Store* store) noexcept nogil:
    while store.places != NULL:
        free_place(store, store.places)


cdef void places_release(Store* store) noexcept nogil:
    """Their memory; no stream of theirs has an open request."""
    cdef Place* place
    while store.places != NULL:
        place = store.places
        store.places = place.next
        copy_let_go(store, place.out.copy)
        copy_let_go(store, place.input)
        copy_let_go(store, place.slots)
        give_memory(store, place.feeds)
        give_memory(store, place)


# ---- feeds --------------------------------------------------------------------------------

cdef void tell_feed(Store* store, Stream* stream, int type, int index) noexcept nogil:
    """Tells a child of receives that it does not know of."""
    cdef Letter letter
    cdef Key none
    none.high = none.low = 0
    letter = letter_of(type, &none if stream.place == NULL else &stream.place.out.key,
                       stream.stamp)
    letter.rank = index
    letter.tag = stream.sink.tag
    letter.first = stream.sink.told
    letter.limit = stream.sink.posted
    stream.sink.told = stream.sink.posted
    send_letter(store, stream.sink.source, &letter)


cdef unsigned char* chunk_of_feed(Store* store, Place* place, const Feed* feed,
                                  int64_t chunk) noexcept nogil:
    """Where a chunk of a child is once it has come."""
    if feed.local != NULL:
        return feed.local.out.copy.data + chunk * place.out.grid.chunk_bytes
    if feed.slot < 0:
        return place.out.copy.data + chunk * place.out.grid.chunk_bytes
    return slot_of_chunk(&place.out.grid, slots_of(store, place, feed), store.settings.window,
                         chunk)


cdef unsigned char* slots_of(Store* store, Place* place, const Feed* feed) noexcept nogil:
    return place.slots.data + feed.slot * store.settings.window * place.out.grid.chunk_bytes


cdef void post_feed(Store* store, Place* place, Feed* feed) noexcept nogil:
    """Receives ahead, as far as there is room; the child is told when it is worth a letter."""
    cdef Stream* stream = feed.stream
    cdef int64_t gate = place.out.grid.chunks
    if stream.sink.broken:
        return
    if feed.slot >= 0 and gate > place.out.have + store.settings.window:
        gate = place.out.have + store.settings.window
    sink_post(&stream.sink, store.transport, &place.out.grid, place.out.copy.data,
              NULL if feed.slot < 0 else slots_of(store, place, feed), store.settings.window, gate,
              <int64_t>stream.index + 1)
    if sink_credit_due(&stream.sink, store.settings.window, 2):
        tell_feed(store, stream, LETTER_GRANT if stream.sink.told == 0 else LETTER_CREDIT,
                  feed.index)


cdef void start_feed(Store* store, Place* place, Feed* feed) noexcept nogil:
    """A child is known: what it makes is pulled, or looked at where it is."""
    cdef Stream* stream
    if feed.rank == store.rank:
        feed.local = find_place(store, &place.out.key, place.out.stamp, feed.index)
        return
    if place.out.grid.chunks == 0 or mask_has(&store.gone, feed.rank):
        return                             # the owner will say that the attempt is over
    stream = stream_new(store, NULL, place.out.stamp, True)
    if stream == NULL:
        return
    store.tags[0] = store.tags[0] + 1 if store.tags[0] < 0x3fffffff else 1
    stream.place = place
    stream.copy = place.out.copy if feed.slot < 0 else place.slots
    stream.copy.refs += 1
    feed.stream = stream
    sink_open(&stream.sink, feed.rank, store.tags[0], 0, place.out.grid.chunks)
    post_feed(store, place, feed)


cdef void feed_event(Store* store, Stream* stream, const Event* event) noexcept nogil:
    """A receive from a child has ended."""
    cdef Place* place = stream.place
    cdef int i
    sink_arrived(&stream.sink)
    if event.kind == EVENT_LOST or event.nbytes == 0:
        if not stream.sink.broken:
            stream.sink.broken = 1
            if event.kind != EVENT_LOST and stream.sink.posted > stream.sink.told:
                tell_feed(store, stream, LETTER_END, -1)
    elif place != NULL and not stream.sink.broken:
        store.counters.chunks_received += 1
        store.counters.bytes_received += event.nbytes
        for i in range(place.feeds_count):
            if place.feeds[i].stream != stream:
                continue
            if stream.sink.arrived < place.out.grid.chunks:
                post_feed(store, place, &place.feeds[i])
            else:
                place.feeds[i].chunks = stream.sink.arrived
                place.feeds[i].stream = NULL
                stream_free(store, stream)
            return
    if place == NULL and sink_idle(&stream.sink):
        stream_free(store, stream)


# ---- adding up ----------------------------------------------------------------------------

cdef int64_t feed_has(const Feed* feed) noexcept nogil:
    """How many chunks of a child are here."""
    if feed.local != NULL:
        return feed.local.out.have
    if feed.chunks:
        return feed.chunks
    if feed.stream == NULL or feed.stream.sink.broken:
        return 0
    return feed.stream.sink.arrived


cdef int64_t input_has(Store* store, Place* place) noexcept nogil:
    """How many chunks of the input may be used; -1: it is gone, before it was whole.  The last
    one of an attempt that is not sealed may not: it may still come to nothing."""
    cdef Item* item
    if place.input_whole:
        return place.out.grid.chunks
    item = find_item(store, &place.input_key)
    if item == NULL or item.state == ITEM_NONE or item.stamp != place.input_stamp:
        return -1
    if item.state != ITEM_PARTIAL:
        place.input_whole = 1
        return item.grid.chunks
    if (item.unsealed and item.have == item.grid.chunks and item.have
            and not store.settings.sabotage & BREAK_HELD):
        return item.have - 1
    return item.have


cdef void add_chunk(Store* store, Place* place, int64_t chunk) noexcept nogil:
    cdef int64_t at = chunk * place.out.grid.chunk_bytes
    cdef int64_t count = chunk_length(&place.out.grid, chunk) // itemsize_of(place.dtype)
    cdef int op = SUM if place.op == AVG else place.op
    cdef unsigned char* dest = place.out.copy.data + at
    cdef const unsigned char* left = place.input.data + at
    cdef int i
    for i in range(place.feeds_count):
        reduce_into(place.dtype, op, dest, chunk_of_feed(store, place, &place.feeds[i], chunk),
                    left, count)
        left = dest
    if place.is_root and place.op == AVG and place.count > 1:
        divide(place.dtype, dest, count, place.count)


cdef bint advance(Store* store, Place* place) noexcept nogil:
    """Adds all that has come; whether that was something."""
    cdef int64_t before = place.out.have, have
    cdef Item* item
    cdef int i
    if place.filled and place.out.state == ITEM_NONE:
        open_place(store, place)
    if place.failed or place.out.state == ITEM_NONE:
        return False
    have = input_has(store, place)
    if have < 0:
        fail_place(store, place, WHY_LOST)
        return False
    for i in range(place.feeds_count):
        if feed_has(&place.feeds[i]) < have:
            have = feed_has(&place.feeds[i])
    while place.out.have < have:
        if place.feeds_count:
            add_chunk(store, place, place.out.have)
        place.out.have += 1
    if place.out.have > before:
        serves_push(store, &place.out)
        for i in range(place.feeds_count):
            if place.feeds[i].slot >= 0 and place.feeds[i].stream != NULL:
                post_feed(store, place, &place.feeds[i])
    if place.is_root:
        item = find_item(store, &place.out.key)
        if item != NULL and item.state == ITEM_PARTIAL and item.stamp == place.out.stamp:
            item.have = place.out.have
            serves_push(store, item)
            if item.have == item.grid.chunks and not item.told and input_ended(place):
                item.told = 1
                copy_arrived(store, item)
    return place.out.have > before


cdef bint input_ended(const Place* place) noexcept nogil:
    """An empty input has no chunk that could be held back."""
    return place.input_whole or place.out.grid.chunks > 0


cdef void places_advance(Store* store) noexcept nogil:
    """Until nothing more can be added; a child may come after its parent in the list."""
    cdef Place* place
    cdef bint moved = True
    while moved:
        moved = False
        place = store.places
        while place != NULL:
            moved = advance(store, place) or moved
            place = place.next


# ---- what the owner of the result says ----------------------------------------------------

cdef void fail_place(Store* store, Place* place, int reason) noexcept nogil:
    """It stays, with nothing, until the owner says that the attempt is over."""
    cdef Letter letter = letter_of(LETTER_UNPLACED, &place.out.key, place.out.stamp)
    place.failed = 1
    unwant(store, &place.out.want)
    copy_let_go(store, place.input)
    place.input = NULL
    letter.rank = place.index
    letter.first = reason
    send_letter(store, rank_of(place.out.stamp), &letter)


cdef void fill_place(Store* store, Place* place, const Letter* letter,
                     const unsigned char* body) noexcept nogil:
    cdef Item* item
    cdef int i
    place.filled = 1
    memcpy(&place.input_key, body, sizeof(Key))
    place.input_stamp = letter.limit
    place.feeds_count = <int32_t>letter.first
    place.count = <int32_t>letter.serial
    place.dtype = letter.tag & 0xff
    place.op = letter.tag >> 8 & 0xff
    place.is_root = letter.tag >> 16 & 1
    place.out.nbytes = letter.nbytes
    place.out.grid = make_grid(letter.nbytes, store.settings.chunk_bytes)
    store.counters.places += 1
    if place.feeds_count:
        place.feeds = <Feed*>take_memory(store, place.feeds_count * sizeof(Feed))
        if place.feeds == NULL:
            place.feeds_count = 0
            return
    for i in range(place.feeds_count):
        place.feeds[i].rank = -1
        place.feeds[i].slot = i - 1
    open_place(store, place)


cdef int64_t slots_bytes(Store* store, const Place* place) noexcept nogil:
    return ((place.feeds_count - 1) * store.settings.window * store.settings.chunk_bytes
            if place.feeds_count > 1 else 0)


cdef void open_place(Store* store, Place* place) noexcept nogil:
    """It begins, if its input is in memory and there is room for its sums."""
    cdef Item* item = find_item(store, &place.input_key)
    if place.failed:
        return
    if item == NULL or item.state == ITEM_NONE or item.stamp != place.input_stamp:
        fail_place(store, place, WHY_LOST)
        return
    if place.input == NULL:
        if item.copy == NULL:
            need_back(store, item)
            return
        if item == store.rescue:
            fail_place(store, place, WHY_FULL)
            return
        place.input = item.copy
        place.input.refs += 1
        if item.listed:
            touch(store, item)
    if place.feeds_count == 0:
        place.out.copy = place.input
        place.input.refs += 1
    elif place.out.want.kind:
        return
    elif not has_room(store, place.out.nbytes + slots_bytes(store, place)):
        want_room(store, &place.out.want, WANT_SUMS, place,
                  place.out.nbytes + slots_bytes(store, place))
        return
    else:
        place_roomed(store, place)
        return
    begin_place(store, place)


cdef void begin_place(Store* store, Place* place) noexcept nogil:
    """Its parent, those who pull the result and its children have waited for it."""
    cdef Item* item = find_item(store, &place.out.key)
    cdef int i
    place.out.state = ITEM_PARTIAL
    serves_feed(store, &place.out)
    for i in range(place.feeds_count):
        if place.feeds[i].rank >= 0:
            start_feed(store, place, &place.feeds[i])
    if (item != NULL and place.is_root and item.state == ITEM_PARTIAL and item.copy == NULL
            and item.stamp == place.out.stamp):
        item.copy = place.out.copy
        item.copy.refs += 1
        serves_feed(store, item)


cdef void place_roomed(Store* store, Place* place) noexcept nogil:
    """There is room for its sums."""
    place.out.copy = copy_new(store, place.out.nbytes)
    if place.feeds_count > 1 and place.out.copy != NULL:
        place.slots = copy_new(store, slots_bytes(store, place))
    if place.out.copy == NULL or (place.feeds_count > 1 and place.slots == NULL):
        fail_place(store, place, WHY_FULL)
    else:
        begin_place(store, place)


cdef void place_refused(Store* store, Place* place) noexcept nogil:
    fail_place(store, place, WHY_FULL)


cdef bint waits_for(const Place* place, const Item* item) noexcept nogil:
    return (place.filled and not place.failed and place.input == NULL
            and place.input_stamp == item.stamp and key_equal(&place.input_key, &item.key))


cdef bint place_waits_for(Store* store, const Item* item) noexcept nogil:
    """Whether the copy is the input of a place that has not begun."""
    cdef const Place* place = store.places
    while place != NULL and not waits_for(place, item):
        place = place.next
    return place != NULL


cdef void places_refused(Store* store, const Item* item) noexcept nogil:
    """There is no room for their input."""
    cdef Place* place = store.places
    while place != NULL:
        if waits_for(place, item):
            fail_place(store, place, WHY_FULL)
        place = place.next


cdef void on_root(Store* store, Place* place, const Letter* letter,
                  const unsigned char* meta) noexcept nogil:
    """What the place makes is the object."""
    cdef Item* item = make_item(store, &letter.key)
    if item == NULL or place.failed:
        return
    if item.state == ITEM_PARTIAL:
        drop_copy(store, item)
    elif item.state != ITEM_NONE:          # we have put one, which will be refused
        fail_place(store, place, WHY_LOST)
        return
    if place.out.copy != NULL:
        place.out.copy.refs += 1
    fill_item(store, item, ITEM_PARTIAL, letter.stamp, place.out.copy, place.out.nbytes, meta,
              letter.meta_bytes)
    item.reduced = item.unsealed = 1
    item.have = place.out.have
    item.asked = 0
    serves_feed(store, item)


cdef void drop_result(Store* store, const Place* place) noexcept nogil:
    """Of an attempt that came to nothing, unless all of it was made."""
    cdef Item* item = find_item(store, &place.out.key) if place.is_root else NULL
    if (item != NULL and item.state == ITEM_PARTIAL and item.stamp == place.out.stamp
            and item.have < item.grid.chunks):
        drop_copy(store, item)
        wait_again(store, item)
        settle_item(store, item)


cdef void on_place_letter(Store* store, const Letter* letter,
                          const unsigned char* body) noexcept nogil:
    cdef Place* place
    cdef Place* next
    if letter.type == LETTER_LEAVE:
        place = store.places
        while place != NULL:
            next = place.next
            if place.out.stamp == letter.stamp and key_equal(&place.out.key, &letter.key):
                free_place(store, place)
            place = next
        return
    if letter.type == LETTER_PLACE:
        place = make_place(store, letter)
        if place != NULL:
            fill_place(store, place, letter, body)
    else:
        place = find_place(store, &letter.key, letter.stamp, letter.rank)
        if place == NULL or place.failed:
            return
        if letter.type == LETTER_FEED:
            place.feeds[letter.first].rank = <int32_t>letter.limit
            place.feeds[letter.first].index = letter.tag
            if place.out.state != ITEM_NONE:
                start_feed(store, place, &place.feeds[letter.first])
        else:
            on_root(store, place, letter, body)
    places_advance(store)


cdef Item* item_of_place(Store* store, const Letter* letter) noexcept nogil:
    """Whose output a parent asks for; NULL: it will get nothing."""
    cdef Place* place
    if mask_has(&store.gone, rank_of(letter.stamp)):
        return NULL
    place = make_place(store, letter)
    return NULL if place == NULL or place.failed else &place.out


cdef void places_of_gone(Store* store, int rank, bint lost) noexcept nogil:
    """A rank is gone: its attempts are over, and its partial sums come no more."""
    cdef Place* place = store.places
    cdef Place* next
    cdef int i
    while place != NULL:
        next = place.next
        if rank_of(place.out.stamp) == rank:
            drop_result(store, place)
            free_place(store, place)
        else:
            for i in range(place.feeds_count):
                if lost and place.feeds[i].rank == rank:
                    cut_feed(store, &place.feeds[i])
        place = next
