# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Who waits for memory, which copies may go to files, and the jobs for these.

What does not fit at once waits in one line (*wants*).  Copies that are complete are listed by
their last use.  What is to be written, read and removed is a *job*, which somebody else does and
tells the end of: the store knows no disk, and waits for none.  Who gets room, and from whom, is
decided in `hopcoll._spills`.
"""
from libc.stdint cimport int64_t
from hopcoll._letters cimport take_memory
from hopcoll._store_state cimport *


# ---- who waits ----------------------------------------------------------------------------

cdef bint has_room(const Store* store, int64_t nbytes) noexcept nogil:
    """Whether it fits, and nobody has waited for longer."""
    return nbytes == 0 or (store.wants == NULL
                           and nbytes <= store.settings.limit_bytes - store.used_bytes)


cdef void want_room(Store* store, Want* want, int kind, void* whose, int64_t nbytes) noexcept nogil:
    cdef Want** link = &store.wants
    if store.wants == NULL:
        store.disk_fails = 0               # it may be better now
    while link[0] != NULL:
        link = &link[0].next
    want.next = NULL
    want.kind = kind
    want.whose = whose
    want.nbytes = nbytes
    want.result.complete = 0
    link[0] = want
    store.counters.waited += 1


cdef void unwant(Store* store, Want* want) noexcept nogil:
    cdef Want** link = &store.wants
    if not want.kind:
        return
    while link[0] != want:
        link = &link[0].next
    link[0] = want.next
    want.next = NULL
    want.kind = 0


cdef void need_back(Store* store, Item* item) noexcept nogil:
    """Somebody wants the bytes of a copy that is in a file alone."""
    if (item.state == ITEM_COMPLETE and item.copy == NULL and item.job == NULL
            and not item.want.kind):
        want_room(store, &item.want, WANT_BACK, item, item.nbytes)


# ---- by their last use --------------------------------------------------------------------

cdef void unlist(Store* store, Item* item) noexcept nogil:
    if not item.listed:
        return
    item.listed = 0
    if item.older != NULL:
        item.older.newer = item.newer
    else:
        store.oldest = item.newer
    if item.newer != NULL:
        item.newer.older = item.older
    else:
        store.newest = item.older
    item.older = item.newer = NULL


cdef void touch(Store* store, Item* item) noexcept nogil:
    """A copy that is complete, and here, is used."""
    item.touched = 1
    if item.listed and item.newer == NULL:
        return
    unlist(store, item)
    item.listed = 1
    item.older = store.newest
    if store.newest != NULL:
        store.newest.newer = item
    else:
        store.oldest = item
    store.newest = item


# ---- jobs ---------------------------------------------------------------------------------

cdef void queue_job(Store* store, Job* job) noexcept nogil:
    job.next = NULL
    if store.jobs == NULL:
        store.jobs = job
    else:
        store.jobs_last.next = job
    store.jobs_last = job
    if store.disk != NULL:
        store.disk(store.notify_context)


cdef Job* add_job(Store* store, int kind, const Item* item, int64_t file) noexcept nogil:
    cdef Job* job = <Job*>take_memory(store, sizeof(Job))
    if job == NULL:
        return NULL
    job.kind = kind
    job.key = item.key
    job.nbytes = item.nbytes
    job.file = file
    job.checksum = item.checksum
    queue_job(store, job)
    return job


cdef void remove_file(Store* store, const Item* item, int64_t file, int64_t nbytes) noexcept nogil:
    store.filed_bytes -= nbytes
    add_job(store, JOB_REMOVE, item, file)


cdef void forget_file(Store* store, Item* item) noexcept nogil:
    """The item has no use for its file, or for what is under way to it and from it."""
    unwant(store, &item.want)
    if store.rescue == item:
        store.rescue = NULL
    if item.job != NULL:
        item.job.dropped = 1               # who does it says when the file may go
        item.job = NULL
    elif item.file:
        remove_file(store, item, item.file, item.nbytes)
    item.file = 0
