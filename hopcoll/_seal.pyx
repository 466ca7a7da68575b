# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The seal: what is private to a rank is complete once everyone has theirs."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *
from hopcoll._plan cimport is_private
from hopcoll._records cimport send_message


cdef void tell_whole(Engine* engine, Operation* op) noexcept nogil:
    """Our part is there: the coordinator of this epoch hears of it."""
    cdef int coordinator = coordinator_of(engine)
    if op.whole_told == coordinator and op.whole_epoch == engine.epoch:
        return
    op.whole_told = coordinator
    op.whole_epoch = engine.epoch
    if coordinator == engine.rank:
        note_whole(op, engine.rank, engine.epoch)
    else:
        send_message(engine, coordinator, MSG_WHOLE, op.seq, &op.sig, NULL, 0)


cdef void note_whole(Operation* op, int peer, int epoch) noexcept nogil:
    if epoch > op.wholes_epoch:
        op.wholes_epoch = epoch
        op.wholes = mask_none()
    if epoch == op.wholes_epoch:
        mask_add(&op.wholes, peer)


cdef void send_seal(Engine* engine, const Operation* op, const Mask* to) noexcept nogil:
    cdef int r
    for r in range(engine.size):
        if r != engine.rank and mask_has(to, r):
            send_message(engine, r, MSG_SEAL, op.seq, &op.sig, NULL, 0)


cdef void seal(Engine* engine, Operation* op) noexcept nogil:
    """At the coordinator: completes an operation, for all, of which everyone has their part."""
    cdef Mask members = members_of(engine, engine.epoch), out
    if op.wholes_epoch != engine.epoch or op.status != STATUS_OK:
        return
    if op.complete:               # it was sealed before: by another coordinator, or in time
        send_seal(engine, op, &op.wholes)
        op.wholes = mask_none()
        return
    if engine.frozen or not op.whole or not mask_within(&members, &op.wholes):
        return
    op.complete = 1
    out = gone(engine)
    members = mask_without(&members, &out)
    send_seal(engine, op, &members)
    op.wholes = mask_none()


cdef void check_whole(Engine* engine) noexcept nogil:
    """Tells of what became whole, and seals what is whole everywhere."""
    cdef Operation* op
    cdef int64_t seq
    if not engine.wholes_due:
        return
    engine.wholes_due = 0
    for seq in range(engine.freed, engine.next_seq):
        op = find_operation(engine, seq)
        if op == NULL or not op.called or op.small or not is_private(op.sig.kind):
            continue
        if op.whole:
            tell_whole(engine, op)
        if coordinator_of(engine) == engine.rank:
            seal(engine, op)
