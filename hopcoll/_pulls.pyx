# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The streams by which objects move: *pulls* fetch a copy, *serves* answer the pulls of others.

A pull posts a window of receives and grants it; what comes lies in the copy at once, and whatever
is there from the first byte on is served.  A serve sends what was granted and what is there, and
ends with voids for what was granted and will not come.  A pull that got a void tells how far it had
posted (END), so that each receive is matched.

A serve may be asked for before the item has its bytes: the owner of the key named us to another,
and that one was faster than the owner's letter to us; or they are in a file, or what is to be
pulled waits for room.  It waits without a copy.
"""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memcpy, memset
from cython_kernels.stream cimport (
    chunk_length, send_voids, sink_arrived, sink_credit_due, sink_idle, sink_open, sink_post,
    spring_push)
from cython_kernels.transport cimport Event, EVENT_LOST
from hopcoll._letters cimport copy_let_go, give_memory, letter_of, send_letter, take_memory
from hopcoll._room cimport need_back, touch
from hopcoll._state cimport TOKEN_IGNORED
from hopcoll._store_state cimport *


# ---- the table of streams -----------------------------------------------------------------

cdef inline int64_t token_of(const Stream* stream) noexcept nogil:
    return <int64_t>stream.index + 1


cdef Stream* stream_at(Store* store, int64_t token) noexcept nogil:
    return store.streams[token - 1]


cdef Stream* stream_new(Store* store, Item* item, int64_t stamp, bint is_pull) noexcept nogil:
    cdef Stream* stream = store.stream_free
    cdef Stream** larger
    cdef int32_t index, room
    if stream != NULL:
        store.stream_free = stream.next
        index = stream.index
    else:
        if store.streams_made == store.streams_room:
            room = 2 * store.streams_room if store.streams_room else 8
            larger = <Stream**>take_memory(store, room * sizeof(Stream*))
            if larger == NULL:
                return NULL
            if store.streams_made:
                memcpy(larger, store.streams, store.streams_made * sizeof(Stream*))
            give_memory(store, store.streams)
            store.streams = larger
            store.streams_room = room
        stream = <Stream*>take_memory(store, sizeof(Stream))
        if stream == NULL:
            return NULL
        index = store.streams_made
        store.streams[index] = stream
        store.streams_made += 1
    memset(stream, 0, sizeof(Stream))
    stream.index = index
    stream.is_pull = is_pull
    stream.item = item
    stream.stamp = stamp
    stream.sink.tag = -1
    stream.spring.tag = -1
    store.streams_used += 1
    return stream


cdef void stream_free(Store* store, Stream* stream) noexcept nogil:
    copy_let_go(store, stream.copy)
    stream.copy = NULL
    stream.item = NULL
    stream.sink.tag = -1
    stream.spring.tag = -1
    stream.next = store.stream_free
    store.stream_free = stream
    store.streams_used -= 1


cdef void stream_has(Stream* stream, Item* item) noexcept nogil:
    stream.copy = item.copy
    stream.copy.refs += 1
    stream.grid = item.grid


cdef void answer_voids(Store* store, int dest, int tag, int64_t count) noexcept nogil:
    if count > 0 and not store.settings.sabotage & BREAK_VOID:
        store.counters.voids += count
        send_voids(store.transport, dest, tag, count, TOKEN_IGNORED)


# ---- pulls --------------------------------------------------------------------------------

cdef void tell_posted(Store* store, Stream* stream, int type) noexcept nogil:
    """Tells the other end of receives that it does not know of."""
    cdef Letter letter
    cdef Key none
    none.high = none.low = 0
    letter = letter_of(type, &none if stream.item == NULL else &stream.item.key, stream.stamp)
    letter.tag = stream.sink.tag
    letter.first = stream.sink.told
    letter.limit = stream.sink.posted
    stream.sink.told = stream.sink.posted
    send_letter(store, stream.sink.source, &letter)


cdef void post_more(Store* store, Stream* stream) noexcept nogil:
    sink_post(&stream.sink, store.transport, &stream.grid, stream.copy.data, NULL,
              store.settings.window, stream.grid.chunks, token_of(stream))


cdef bint pull_start(Store* store, Item* item, int source) noexcept nogil:
    """Fetches what the copy of an item lacks; False without memory."""
    cdef Stream* stream = stream_new(store, item, item.stamp, True)
    if stream == NULL:
        return False
    store.tags[0] = store.tags[0] + 1 if store.tags[0] < 0x3fffffff else 1
    stream_has(stream, item)
    item.pull = stream
    item.source = source
    store.counters.pulls += 1
    if item.have:
        store.counters.resumed += 1
    sink_open(&stream.sink, source, store.tags[0], item.have, item.grid.chunks)
    post_more(store, stream)
    tell_posted(store, stream, LETTER_GRANT)
    return True


cdef Moved pull_event(Store* store, Stream* stream, const Event* event) noexcept nogil:
    """A receive of a pull has ended."""
    cdef Item* item = stream.item
    cdef int64_t chunk = sink_arrived(&stream.sink)
    if event.kind == EVENT_LOST or event.nbytes == 0:
        if not stream.sink.broken:
            stream.sink.broken = 1
            if event.kind != EVENT_LOST and stream.sink.posted > stream.sink.told:
                tell_posted(store, stream, LETTER_END)
    elif item != NULL and not stream.sink.broken:
        item.have = chunk + 1
        store.counters.chunks_received += 1
        store.counters.bytes_received += event.nbytes
        serves_push(store, item)
        if item.have == item.grid.chunks:
            item.pull = NULL
            stream_free(store, stream)
            return MOVED_ALL
        post_more(store, stream)
        if sink_credit_due(&stream.sink, store.settings.window, 2):
            tell_posted(store, stream, LETTER_CREDIT)
    # The memory of a receive that is lost is undefined until it has ended.
    if (stream.sink.broken or item == NULL) and sink_idle(&stream.sink):
        if item != NULL:
            item.pull = NULL
            if store.settings.sabotage & BREAK_OFFSET:
                item.have = stream.sink.posted
        stream_free(store, stream)
        return MOVED_NO_MORE if item != NULL else MOVED_ON
    return MOVED_ON


cdef void pull_cut(Store* store, Item* item) noexcept nogil:
    """The copy is not wanted any more: its source is told, and ends the stream."""
    cdef Stream* stream = item.pull
    if stream == NULL:
        return
    if not mask_has(&store.dead, stream.sink.source):
        tell_posted(store, stream, LETTER_END)
    item.pull = NULL
    stream.item = NULL
    if sink_idle(&stream.sink):
        stream_free(store, stream)


cdef void pull_abandon(Store* store, Item* item) noexcept nogil:
    """The source is lost, and perhaps alive: nothing waits for the end of its stream.  What it
    still writes into the copy is what belongs there."""
    item.pull.stray = 1
    item.pull.item = NULL
    item.pull = NULL


# ---- serves -------------------------------------------------------------------------------

cdef Stream* find_serve(Store* store, int dest, int tag) noexcept nogil:
    """One that is not closed."""
    cdef Stream* stream
    cdef int i
    for i in range(store.streams_made):
        stream = store.streams[i]
        if (stream.spring.tag == tag and stream.spring.dest == dest and not stream.is_pull
                and stream.item != NULL):
            return stream
    return NULL


cdef void unlink_serve(Stream* stream) noexcept nogil:
    cdef Stream** link = &stream.item.serves
    while link[0] != stream:
        link = &link[0].next
    link[0] = stream.next
    stream.next = NULL
    stream.item = NULL


cdef void push(Store* store, Stream* stream) noexcept nogil:
    """Sends what is granted and here."""
    cdef int64_t limit = stream.spring.limit, before = stream.spring.next, i
    if stream.copy == NULL:
        return
    if stream.spring.limit > stream.item.have:
        stream.spring.limit = stream.item.have
    spring_push(&stream.spring, store.transport, &stream.grid, stream.copy.data, NULL, 0,
                token_of(stream))
    stream.spring.limit = limit
    for i in range(before, stream.spring.next):
        store.counters.chunks_sent += 1
        store.counters.bytes_sent += chunk_length(&stream.grid, i)


cdef void serves_push(Store* store, Item* item) noexcept nogil:
    cdef Stream* stream = item.serves
    while stream != NULL:
        push(store, stream)
        stream = stream.next


cdef void serve_start(Store* store, Item* item, int dest, const Letter* letter) noexcept nogil:
    """Another pulls from us; from an item that has not got its bytes yet, it waits."""
    cdef Stream* stream = stream_new(store, item, letter.stamp, False)
    if stream == NULL:
        answer_voids(store, dest, letter.tag, letter.limit - letter.first)
        return
    stream.spring.dest = dest
    stream.spring.tag = letter.tag
    stream.spring.next = letter.first
    stream.spring.limit = letter.limit
    stream.spring.end = letter.limit
    stream.next = item.serves
    item.serves = stream
    if item.copy != NULL and item.stamp == letter.stamp:
        stream_has(stream, item)
        stream.spring.end = item.grid.chunks
        push(store, stream)
        if item.listed:
            touch(store, item)
    elif item.state == ITEM_COMPLETE:
        need_back(store, item)
    else:
        store.counters.early += 1


cdef void close(Store* store, Stream* stream) noexcept nogil:
    """Ends a serve of an item: by voids, unless the other is dead."""
    if not mask_has(&store.dead, stream.spring.dest):
        answer_voids(store, stream.spring.dest, stream.spring.tag,
                     stream.spring.limit - stream.spring.next)
    unlink_serve(stream)
    stream.spring.next = stream.spring.limit
    stream.spring.end = stream.spring.limit
    if stream.spring.in_flight == 0:
        stream_free(store, stream)


cdef void serves_feed(Store* store, Item* item) noexcept nogil:
    """The item has its bytes, or some of them: those who waited for these get them."""
    cdef Stream* stream = item.serves
    cdef Stream* next
    while stream != NULL:
        next = stream.next
        if stream.copy == NULL:
            if stream.stamp == item.stamp:
                if item.copy != NULL:
                    stream_has(stream, item)
                    stream.spring.end = item.grid.chunks
                    push(store, stream)
            else:
                close(store, stream)
        stream = next


cdef void serves_close(Store* store, Item* item, bint fed) noexcept nogil:
    """Those that have a copy to send from, or those that wait for one."""
    cdef Stream* stream = item.serves
    cdef Stream* next
    while stream != NULL:
        next = stream.next
        if (stream.copy != NULL) == fed:
            close(store, stream)
        stream = next


cdef bint serves_wait(const Item* item) noexcept nogil:
    """Whether any waits for its bytes."""
    cdef const Stream* stream = item.serves
    while stream != NULL and stream.copy != NULL:
        stream = stream.next
    return stream != NULL


cdef void serves_of_gone(Store* store, int dest) noexcept nogil:
    cdef Stream* stream
    cdef int i
    for i in range(store.streams_made):
        stream = store.streams[i]
        if (stream.item != NULL and not stream.is_pull and stream.spring.dest == dest
                and stream.spring.tag >= 0):
            close(store, stream)


cdef void serve_event(Store* store, Stream* stream, const Event* event) noexcept nogil:
    """A send of a serve has ended."""
    stream.spring.in_flight -= 1
    if stream.spring.in_flight:
        return
    if stream.item != NULL and stream.spring.next == stream.spring.end:
        unlink_serve(stream)
    if stream.item == NULL:
        stream_free(store, stream)


cdef void serve_credit(Store* store, int dest, const Letter* letter) noexcept nogil:
    cdef Stream* stream = find_serve(store, dest, letter.tag)
    if stream == NULL:
        answer_voids(store, dest, letter.tag, letter.limit - letter.first)
        return
    stream.spring.limit = letter.limit
    push(store, stream)


cdef void serve_end(Store* store, int dest, const Letter* letter) noexcept nogil:
    cdef Stream* stream = find_serve(store, dest, letter.tag)
    if stream == NULL:
        answer_voids(store, dest, letter.tag, letter.limit - letter.first)
        return
    stream.spring.limit = letter.limit
    close(store, stream)
