# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Answers of many ranks in one.

What a ballot has to know of its members can be put together on the way to its leader: the history
of the highest ballot, how far they are, and of each operation who calls it alike, who of them
holds what, and how many are whole.  So an answer is as long for a thousand ranks as for one, but
for the sets of ranks in it, and for those who called something else.
"""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memcpy, memmove
from hopcoll._state cimport *


cdef StatusBody* status_at(const Engine* engine, int row) noexcept nogil:
    """What was answered by us (row 0), or through our child `row` - 1."""
    return <StatusBody*>(engine.statuses + row * engine.status_bytes)


cdef Entry* entries_of(StatusBody* status) noexcept nogil:
    return <Entry*>(<unsigned char*>status + sizeof(StatusBody))


cdef OperationStatus* first_operation(StatusBody* status) noexcept nogil:
    return <OperationStatus*>(entries_of(status) + status.entries)


cdef int64_t status_length(StatusBody* status) noexcept nogil:
    return <unsigned char*>(first_operation(status) + status.operations) - <unsigned char*>status


cdef int items_max_of(const Settings* settings, int size) noexcept nogil:
    """How many operations an answer has room for: those that may be open, and, of many ranks, some
    again that are called otherwise, or in another attempt."""
    return settings.ring // 2 + (1 if size - 1 <= settings.degree else 3 * GROUPS_MAX)


cdef OperationStatus* alike(StatusBody* status, const OperationStatus* item) noexcept nogil:
    """What is already told of this attempt by ranks that call it alike; NULL: nothing."""
    cdef OperationStatus* known = first_operation(status)
    cdef int i
    for i in range(status.operations):
        if (known[i].seq == item.seq and known[i].attempt == item.attempt
                and signature_equal(&known[i].sig, &item.sig)):
            return &known[i]
    return NULL


cdef void merge_operation(OperationStatus* into, const OperationStatus* more) noexcept nogil:
    cdef int b
    cdef bint from_root
    into.who = mask_or(&into.who, &more.who)
    into.held = mask_or(&into.held, &more.held)
    into.common = mask_and(&into.common, &more.common)
    if mask_count(&more.kept) > mask_count(&into.kept):
        into.kept = more.kept
        into.keeper = more.keeper
    into.whole += more.whole
    if more.complete > into.complete:
        into.complete = more.complete
    if not mask_empty(&more.roll):
        into.roll = more.roll
    if more.quarrel.source >= 0:
        into.quarrel = more.quarrel
    for b in range(BLOCKS_MAX):
        from_root = into.sig.kind == BCAST and into.holder[b] == into.sig.root
        if not from_root and (more.holder[b] < into.holder[b] or (
                into.sig.kind == BCAST and more.holder[b] == into.sig.root)):
            into.holder[b] = more.holder[b]


cdef void adopt_entries(StatusBody* into, const StatusBody* more) noexcept nogil:
    """The history of a higher ballot takes the place of ours."""
    cdef int64_t nbytes = into.operations * <int64_t>sizeof(OperationStatus)
    cdef OperationStatus* items = first_operation(into)
    into.accepted = more.accepted
    into.entries = more.entries
    memmove(first_operation(into), items, nbytes)
    memcpy(entries_of(into), entries_of(<StatusBody*>more), more.entries * sizeof(Entry))


cdef OperationStatus* room_for(Engine* engine, StatusBody* status, int64_t seq) noexcept nogil:
    cdef OperationStatus* items = first_operation(status)
    cdef OperationStatus* first = items
    cdef int i
    if status.operations < items_max_of(&engine.settings, engine.size):
        status.operations += 1
        return &items[status.operations - 1]
    for i in range(status.operations):
        if items[i].seq < first.seq:
            first = &items[i]
    return first if first.seq < seq else NULL


cdef void merge_status(Engine* engine, StatusBody* into, const StatusBody* more) noexcept nogil:
    """Puts what others say into an answer.  Where there is no room, the first operations are left
    out: nobody that answers lacks anything of them."""
    cdef const OperationStatus* item = first_operation(<StatusBody*>more)
    cdef OperationStatus* known
    cdef int i
    if more.accepted > into.accepted:
        adopt_entries(into, more)
    if more.next_seq > into.next_seq:
        into.next_seq = more.next_seq
    if more.next_low < into.next_low:
        into.next_low = more.next_low
    if more.done > into.done:
        into.done = more.done
    if more.done_low < into.done_low:
        into.done_low = more.done_low
    if more.decided > into.decided:
        into.decided = more.decided
    if more.dispute.seq >= 0 and (into.dispute.seq < 0 or more.dispute.seq < into.dispute.seq):
        into.dispute = more.dispute
    into.who = mask_or(&into.who, &more.who)
    if engine.settings.sabotage & BREAK_MERGE:
        return
    for i in range(more.operations):
        known = alike(into, &item[i])
        if known != NULL:
            merge_operation(known, &item[i])
            continue
        known = room_for(engine, into, item[i].seq)
        if known != NULL:
            known[0] = item[i]
