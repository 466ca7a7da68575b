# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What stores tell each other, and the memory of one."""
from libc.stdint cimport int64_t, uint8_t, uint16_t
from libc.string cimport memcpy, memset
from hopcoll._store_state cimport *


# ---- memory -------------------------------------------------------------------------------

cdef void* take_memory(Store* store, int64_t nbytes) noexcept nogil:
    """Zeroed memory for what cannot be left out; without any the store gives up."""
    cdef void* memory = store.transport.allocate(store.transport.self, nbytes)
    if memory == NULL:
        store.broken = 1
        return NULL
    memset(memory, 0, nbytes)
    return memory


cdef void give_memory(Store* store, void* memory) noexcept nogil:
    if memory != NULL:
        store.transport.release(store.transport.self, memory)


cdef Copy* copy_new(Store* store, int64_t nbytes) noexcept nogil:
    """Room for an object; NULL when it would be more than the limit, or there is no memory."""
    if nbytes < 0 or nbytes > store.settings.limit_bytes - store.used_bytes:
        return NULL
    return copy_force(store, nbytes)


cdef Copy* copy_force(Store* store, int64_t nbytes) noexcept nogil:
    """Over the limit, if it has to be; NULL: there is no memory."""
    cdef Copy* copy = <Copy*>store.transport.allocate(store.transport.self, sizeof(Copy))
    if copy == NULL:
        return NULL
    copy.data = <unsigned char*>store.transport.allocate(store.transport.self,
                                                         nbytes if nbytes else 1)
    if copy.data == NULL:
        give_memory(store, copy)
        return NULL
    copy.nbytes = nbytes
    copy.refs = 1
    copy.pad = 0
    store.used_bytes += nbytes
    return copy


cdef void copy_let_go(Store* store, Copy* copy) noexcept nogil:
    if copy == NULL:
        return
    copy.refs -= 1
    if copy.refs == 0:
        store.used_bytes -= copy.nbytes
        give_memory(store, copy.data)
        give_memory(store, copy)


# ---- letters ------------------------------------------------------------------------------

cdef Letter letter_of(int type, const Key* key, int64_t stamp) noexcept nogil:
    cdef Letter letter
    memset(&letter, 0, sizeof(Letter))
    letter.type = <uint8_t>type
    letter.key = key[0]
    letter.stamp = stamp
    letter.rank = -1
    return letter


cdef Parcel* parcel_of(Store* store, int peer, const void* bytes, int64_t nbytes) noexcept nogil:
    """A letter that is kept."""
    cdef Parcel* parcel = <Parcel*>take_memory(store, sizeof(Parcel) + nbytes)
    if parcel != NULL:
        parcel.next = NULL
        parcel.peer = peer
        parcel.nbytes = nbytes
        memcpy(parcel + 1, bytes, nbytes)
    return parcel


cdef void post(Store* store, int dest, const void* head, int64_t head_bytes, const void* body,
               int64_t body_bytes) noexcept nogil:
    """What goes to ourselves is read when what we are at is over."""
    cdef Parcel* parcel
    if dest != store.rank:
        store.counters.letters_sent += 1
        store.transport.send_control(store.transport.self, dest, head, head_bytes, body,
                                     body_bytes)
        return
    parcel = <Parcel*>take_memory(store, sizeof(Parcel) + head_bytes + body_bytes)
    if parcel == NULL:
        return
    parcel.peer = dest
    parcel.nbytes = head_bytes + body_bytes
    memcpy(parcel + 1, head, head_bytes)
    if body_bytes:
        memcpy(<unsigned char*>(parcel + 1) + head_bytes, body, body_bytes)
    if store.inbox == NULL:
        store.inbox = parcel
    else:
        store.inbox_last.next = parcel
    store.inbox_last = parcel


cdef void send_letter(Store* store, int dest, const Letter* letter) noexcept nogil:
    post(store, dest, letter, sizeof(Letter), NULL, 0)


cdef void send_object(Store* store, int dest, Letter* letter, const unsigned char* meta,
                      int meta_bytes, const Copy* copy) noexcept nogil:
    """A letter with the meta of an object and, if a copy is given, its bytes."""
    letter.meta_bytes = <uint16_t>meta_bytes
    memcpy(store.outbox, meta, meta_bytes)
    if copy == NULL:
        post(store, dest, letter, sizeof(Letter), store.outbox, meta_bytes)
        return
    letter.flags |= LETTER_INLINE
    memcpy(store.outbox + meta_bytes, copy.data, copy.nbytes)
    post(store, dest, letter, sizeof(Letter), store.outbox, meta_bytes + copy.nbytes)


cdef void send_sync(Store* store) noexcept nogil:
    """Tells all who are there that they know of us what they have to, as far as these are gone."""
    cdef Letter letter
    cdef Key none
    cdef int r
    memset(&none, 0, sizeof(Key))
    letter = letter_of(LETTER_SYNC, &none, 0)
    for r in range(store.size):
        if r != store.rank and not mask_has(&store.gone, r):
            post(store, r, &letter, sizeof(Letter), &store.gone, sizeof(Mask))
