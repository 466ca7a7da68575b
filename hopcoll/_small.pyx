# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The small path: every rank sends its whole input to all, and each makes the result by itself."""
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset
from cython_kernels.reduction cimport divide
from hopcoll._state cimport *
from hopcoll._plan cimport ends_at_root, is_from_root
from hopcoll._records cimport combine, send_message

cdef enum:
    AVG = 10


cdef bint store_contribution(Engine* engine, Operation* op, int rank, const unsigned char* data,
                             int64_t nbytes) noexcept nogil:
    cdef bint one = is_from_root(op.sig.kind)
    if op.inbox != NULL and nbytes != op.nbytes:
        return True                     # a wrong call: its signature tells the coordinator
    if nbytes > 0:
        if op.inbox == NULL:
            op.nbytes = nbytes
            op.inbox = <unsigned char*>engine.transport.allocate(
                engine.transport.self, nbytes if one else engine.size * nbytes)
            if op.inbox == NULL:
                return False
        memcpy(op.inbox + (0 if one else rank * op.nbytes), data, nbytes)
    mask_add(&op.have, rank)
    return True


cdef void fetch(Engine* engine, Operation* op) noexcept nogil:
    """A STAND without us: what the dead had sent to others is asked for, once an epoch."""
    cdef FetchBody body
    if (op.standing and op.fetched != engine.epoch + 1 and op.holder[0] != NOBODY
            and op.holder[0] != engine.rank):
        op.fetched = engine.epoch + 1
        body.have = op.have
        send_message(engine, op.holder[0], MSG_FETCH, op.seq, &op.sig, &body, sizeof(body))


cdef void try_small(Engine* engine, Operation* op) noexcept nogil:
    """A small operation is complete once all contributions are here."""
    cdef Mask members
    if not op.called or op.complete or awaits_roll(op):
        return
    members = attempt_members(engine, op)
    if is_from_root(op.sig.kind):
        members = mask_none()
        mask_add(&members, op.sig.root)
    if mask_within(&members, &op.have):
        op.complete = 1
    else:
        fetch(engine, op)


cdef void fold_small(Engine* engine, Operation* op, const Mask* members, int64_t offset,
                     int64_t nbytes, int until) noexcept nogil:
    """Folds the contributions of ranks below `until` in rank order: all ranks, alike."""
    cdef int r, folded = 0
    cdef const unsigned char* one
    for r in range(until):
        if mask_has(members, r):
            one = op.inbox + r * op.nbytes + offset
            if not folded:
                memcpy(op.base, one, nbytes)
            else:
                combine(engine, op, op.base, op.base, one, nbytes)
            folded += 1
    if op.sig.redop == AVG:
        divide(op.sig.dtype, op.base, nbytes // op.item_bytes, folded)


cdef void land_small(Engine* engine, Operation* op) noexcept nogil:
    """The result, from the contributions into the caller's buffer."""
    cdef Mask members = attempt_members(engine, op)
    cdef int64_t nbytes = op.nbytes, block = op.nbytes // engine.size
    cdef int kind = op.sig.kind, r, n = engine.size, me = engine.rank
    cdef int64_t at = 0
    if nbytes == 0 or op.base == NULL or op.inbox == NULL:
        return
    if kind == BCAST:
        if op.sig.root != me:
            memcpy(op.base, op.inbox, nbytes)
    elif kind == SCATTER:
        memcpy(op.base, op.inbox + me * block, block)
    elif kind == GATHER or kind == ALLGATHER or kind == ALLTOALL:
        if kind != ALLTOALL:
            block = nbytes
        else:
            at = me * block
        for r in range(n):
            if mask_has(&members, r):
                memcpy(op.base + r * block, op.inbox + r * nbytes + at, block)
            else:
                memset(op.base + r * block, 0, block)
    elif kind == REDUCE_SCATTER:
        if op.sig.flags & FLAG_VECTOR:
            fold_small(engine, op, &members, op.share_at, op.share_bytes, n)
        else:
            fold_small(engine, op, &members, me * block, block, n)
    elif kind != BARRIER:
        fold_small(engine, op, &members, 0, nbytes,
                   me + 1 if kind == SCAN else me if kind == EXSCAN else n)


cdef void answer_fetch(Engine* engine, const Operation* op, int peer,
                       const FetchBody* body) noexcept nogil:
    """Every contribution that we have and the other lacks; they do not depend on the epoch."""
    cdef RelayBody* relay = <RelayBody*>engine.outbox
    cdef int64_t slot
    cdef int r
    if not op.small:
        if ends_at_root(&op.sig) and op.complete and op.status == STATUS_OK:
            send_message(engine, peer, MSG_ROOT_DONE, op.seq, &op.sig, NULL, 0)
        return
    for r in range(engine.size):
        if not mask_has(&op.have, r) or mask_has(&body.have, r):
            continue
        relay.rank = r
        relay.pad = 0
        if op.nbytes:
            slot = 0 if is_from_root(op.sig.kind) else r
            memcpy(engine.outbox + sizeof(RelayBody), op.inbox + slot * op.nbytes, op.nbytes)
        send_message(engine, peer, MSG_RELAY, op.seq, &op.sig, relay,
                     sizeof(RelayBody) + op.nbytes)


cdef void on_contribution(Engine* engine, Operation* op, int rank, const unsigned char* data,
                          int64_t nbytes) noexcept nogil:
    if not mask_has(&op.have, rank) and not op.done:
        if op.called and nbytes != op.nbytes:
            return
        if not store_contribution(engine, op, rank, data, nbytes):
            engine.broken = 1
    if op.called:
        try_small(engine, op)
