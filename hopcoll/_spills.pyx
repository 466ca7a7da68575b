# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Who gets memory, and which copies make room in files.

A complete copy that nothing uses but its item may be *spilled*: its bytes become a file, then its
memory goes.  To the directory, and to all others, it is a complete copy as before.  A get, a
stream or a place that needs its bytes asks for them *back*.  A file stays when its copy is back:
the object is sealed, so that the next time its memory can go at once.

What waits for room gets it in the order in which it came, and fails when nothing more can go.  A
copy that others pull is not refused to them for what this rank's program and places hold: one at a
time, the *rescue*, may come back over the limit, to be sent and for nothing else, so that it ends
whatever else waits.  So may the bytes of small objects that came in a message.
"""
from libc.stdint cimport int64_t
from hopcoll._asks cimport copy_arrived, tell_orphan, tell_owner, wait_again, wait_anew
from hopcoll._items cimport drop_copy, find_item, finish_kind, has_ask, settle_item
from hopcoll._letters cimport copy_force, copy_let_go, copy_new, give_memory
from hopcoll._places cimport place_refused, place_roomed, place_waits_for, places_refused
from hopcoll._pulls cimport pull_start, serves_close, serves_feed, serves_wait
from hopcoll._room cimport add_job, queue_job, remove_file, touch, unlist, unwant
from hopcoll._store_state cimport *


cdef void begin_pull(Store* store, Item* item, int source) noexcept nogil:
    item.orphaned = 0
    if item.grid.chunks == 0:
        copy_arrived(store, item)
    elif mask_has(&store.gone, source):
        tell_orphan(store, item, source)
    elif item.copy == NULL:
        item.source = source               # it waits for room
    elif not pull_start(store, item, source):
        tell_orphan(store, item, source)


# ---- which copies may go ------------------------------------------------------------------

cdef bint may_go(const Store* store, const Item* item) noexcept nogil:
    return (item.listed and item.job == NULL and item.copy.nbytes > 0
            and item.copy.refs == 1)


cdef bint free_scratch(Store* store, int64_t nbytes) noexcept nogil:
    """Room for one more file; those of copies that are in memory as well may go."""
    cdef Item* item = store.oldest
    while item != NULL and nbytes > store.settings.scratch_bytes - store.filed_bytes:
        if item.file and item.job == NULL:
            remove_file(store, item, item.file, item.nbytes)
            item.file = 0
        item = item.newer
    return nbytes <= store.settings.scratch_bytes - store.filed_bytes


cdef bint spill(Store* store, Item* item) noexcept nogil:
    """The memory goes at once if a file has the bytes, else one is begun.  False: none can be."""
    cdef Job* job
    if item.file:
        unlist(store, item)
        copy_let_go(store, item.copy)
        item.copy = NULL
        return True
    if (store.disk == NULL or store.disk_fails
            or not free_scratch(store, item.nbytes)):
        return False
    store.files += 1
    job = add_job(store, JOB_WRITE, item, store.files)
    if job == NULL:
        return False
    item.job = job
    item.touched = 0
    job.copy = item.copy
    job.copy.refs += 1
    store.filed_bytes += item.nbytes
    store.writing_bytes += item.nbytes
    return True


cdef bint make_way(Store* store, int64_t nbytes) noexcept nogil:
    """Lets go of copies until so many bytes are free, or will be; whether some are now."""
    cdef Item* item = store.oldest
    cdef Item* next
    cdef int64_t before = store.used_bytes
    while item != NULL and nbytes > before - store.used_bytes + store.writing_bytes:
        next = item.newer
        if may_go(store, item):
            spill(store, item)
        item = next
    return store.used_bytes < before


cdef bint may_hope(Store* store, int64_t nbytes) noexcept nogil:
    """Whether there may be more room without anything that the program does: of what is on its way
    to a file or back, of what is about to be accepted, or of what streams send to others, which
    ends."""
    cdef const Item* item = store.oldest
    cdef const Stream* stream
    cdef int32_t refs
    if store.writing_bytes or store.reading:
        return True
    if store.disk == NULL or store.disk_fails:
        return False
    if store.putting and nbytes <= store.settings.scratch_bytes - store.filed_bytes:
        return True
    while item != NULL:
        if item.nbytes and (item.file or item.nbytes <= store.settings.scratch_bytes
                            - store.filed_bytes):
            refs = 1
            stream = item.serves
            while stream != NULL:
                refs += stream.copy == item.copy
                stream = stream.next
            if refs == item.copy.refs:
                return True
        item = item.newer
    return False


# ---- who gets room ------------------------------------------------------------------------

cdef void bring_back(Store* store, Item* item, Copy* copy) noexcept nogil:
    cdef Job* job = add_job(store, JOB_READ, item, item.file)
    if job == NULL:
        copy_let_go(store, copy)
        return
    job.copy = copy
    item.job = job
    store.reading += 1


cdef void take_up(Store* store, Item* item, Copy* copy) noexcept nogil:
    """There is room for what was to be pulled."""
    cdef int source = item.source
    item.copy = copy
    serves_feed(store, item)
    if source >= 0:
        begin_pull(store, item, source)


cdef bint grant(Store* store, Want* want) noexcept nogil:
    """Gives what was waited for; False without memory."""
    cdef int kind = want.kind
    cdef Copy* copy
    if kind == WANT_SUMS:
        unwant(store, want)
        place_roomed(store, <Place*>want.whose)
        return True
    if (kind == WANT_BACK and not serves_wait(<Item*>want.whose)
            and not place_waits_for(store, <Item*>want.whose)
            and not has_ask(<Item*>want.whose, ASK_GET)):
        unwant(store, want)
        return True
    copy = copy_new(store, want.nbytes)
    if copy == NULL:
        return False
    unwant(store, want)
    if kind == WANT_PUT:
        (<Ask*>want.whose).copy = copy
        store.putting += 1
        want.result.complete = 1
    elif kind == WANT_PULL:
        take_up(store, <Item*>want.whose, copy)
    else:
        bring_back(store, <Item*>want.whose, copy)
    return True


cdef void no_room(Store* store, Item* item, int64_t stamp) noexcept nogil:
    """What was to come cannot: others are not disturbed."""
    drop_copy(store, item)
    item.asked = 0
    finish_kind(store, item, ASK_GET, ASK_FULL, stamp)
    tell_owner(store, item, LETTER_DROPPED, stamp, -1)
    wait_anew(store, item)


cdef bint refuse(Store* store, Want* want) noexcept nogil:
    """Nothing more can go; False: it waits on."""
    cdef Item* item = <Item*>want.whose
    cdef Copy* copy
    if want.kind == WANT_PUT:
        unwant(store, want)
        want.result.complete = 1
    elif want.kind == WANT_PULL:
        no_room(store, item, item.stamp)
        settle_item(store, item)
    elif want.kind == WANT_SUMS:
        unwant(store, want)
        place_refused(store, <Place*>want.whose)
    else:
        finish_kind(store, item, ASK_GET, ASK_FULL, item.stamp)
        places_refused(store, item)
        if not serves_wait(item):
            unwant(store, want)
        elif store.rescue != NULL:
            return False
        else:
            unwant(store, want)
            copy = copy_force(store, item.nbytes)
            if copy == NULL:
                lose_copy(store, item)
            else:
                store.rescue = item
                bring_back(store, item, copy)
    return True


cdef bint is_rescued(const Store* store) noexcept nogil:
    """There is room for it now, or it was sent."""
    cdef const Item* item = store.rescue
    return (store.used_bytes <= store.settings.limit_bytes
            or (item.job == NULL and item.serves == NULL))


cdef bint room_due(const Store* store) noexcept nogil:
    return store.wants != NULL or store.used_bytes > store.settings.limit_bytes


cdef bint room_step(Store* store) noexcept nogil:
    """Lets one that waits have what it waits for, or fail; False: there is nothing to do now."""
    cdef Want* want = store.wants
    cdef int64_t lack = store.used_bytes - store.settings.limit_bytes
    if store.rescue != NULL and is_rescued(store):
        store.rescue = NULL
    if want == NULL:
        if lack > 0:
            make_way(store, lack)
        return False
    lack += want.nbytes
    if want.nbytes <= store.settings.limit_bytes:
        while lack > 0 and make_way(store, lack):
            lack = store.used_bytes - store.settings.limit_bytes + want.nbytes
        if lack <= 0 and grant(store, want):
            return True
        if lack > 0 and may_hope(store, want.nbytes):
            return False
    return refuse(store, want)


cdef void wants_end(Store* store) noexcept nogil:
    """Nothing is given any more."""
    cdef Want* want
    while store.wants != NULL:
        want = store.wants
        unwant(store, want)
        want.result.complete = 1


# ---- what became of jobs ------------------------------------------------------------------

cdef void written(Store* store, Item* item, Job* job) noexcept nogil:
    store.writing_bytes -= job.nbytes
    copy_let_go(store, job.copy)
    if job.failed:
        store.filed_bytes -= job.nbytes
        store.counters.unwritten += 1
        store.disk_fails = 1
        if item != NULL:
            touch(store, item)             # another one is tried next
        return
    store.counters.spilled += 1
    if item == NULL:
        store.filed_bytes -= job.nbytes
        job.kind = JOB_REMOVE
        return
    item.file = job.file
    item.checksum = job.checksum
    if may_go(store, item) and not item.touched and room_due(store):
        spill(store, item)


cdef void was_read(Store* store, Item* item, Job* job) noexcept nogil:
    store.reading -= 1
    if item == NULL or job.failed:
        copy_let_go(store, job.copy)
        store.filed_bytes -= job.nbytes
    if item == NULL:
        job.kind = JOB_REMOVE
        return
    if job.failed:
        job.kind = JOB_REMOVE
        store.counters.unread += 1
        lose_copy(store, item)
        return
    store.counters.restored += 1
    item.copy = job.copy
    touch(store, item)
    finish_kind(store, item, ASK_GET, ASK_FULL if item == store.rescue else ASK_OK, item.stamp)
    serves_feed(store, item)


cdef void lose_copy(Store* store, Item* item) noexcept nogil:
    """Its file was the copy, and cannot be read: whoever waits for it asks the owner."""
    cdef int64_t stamp = item.stamp
    item.file = 0
    drop_copy(store, item)
    if not store.settings.sabotage & BREAK_UNREAD:
        tell_owner(store, item, LETTER_DROPPED, stamp, -1)
    wait_again(store, item)
    settle_item(store, item)


cdef void job_ended(Store* store, Job* job) noexcept nogil:
    """What is left of it is a file to be removed, or nothing."""
    cdef int kind = job.kind
    cdef Item* item = NULL
    if kind != JOB_REMOVE and not job.dropped:
        item = find_item(store, &job.key)
    if store.settings.sabotage & BREAK_FILE and kind == JOB_WRITE and job.dropped:
        item = find_item(store, &job.key)
        if item != NULL and (not item.listed or item.job != NULL or item.file
                             or item.nbytes != job.nbytes):
            item = NULL
    if item != NULL:
        item.job = NULL
    if kind == JOB_WRITE:
        written(store, item, job)
    elif kind == JOB_READ:
        was_read(store, item, job)
    if kind != JOB_REMOVE and job.kind == JOB_REMOVE:
        queue_job(store, job)
    else:
        give_memory(store, job)


cdef void jobs_free(Store* store) noexcept nogil:
    """Those that nobody has taken."""
    cdef Job* job
    while store.jobs != NULL:
        job = store.jobs
        store.jobs = job.next
        if job.copy != NULL and job.kind != JOB_REMOVE:
            copy_let_go(store, job.copy)
        give_memory(store, job)
