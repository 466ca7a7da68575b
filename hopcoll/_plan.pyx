# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Where a block's data comes from: pure functions of membership and rank.

The *value tree* of a block is a left fold over the ranks in a rotated order: it starts at
`block_start` and goes up, modulo the size; dead ranks are left out.  The data follow the same
order as a chain, so that each rank adds its input to what it received and passes the partial sum
on; the last one makes the final value, the only place where it is made.  Finals flow back along
the chain (Allreduce) or along it (Bcast).  Chains over rotated orders keep every link busy both
ways (Hoplite, section 4, pipelines chunks along a chain; the rotation is the ring's).
"""
from hopcoll._state cimport (
    Mask, Engine, Operation, BCAST, REDUCE, ALLREDUCE, BLOCKS_MAX, mask_has, mask_add, mask_none,
    members_of)


cdef int chain_before(const Mask* members, int size, int start, int rank) noexcept nogil:
    """The member before `rank` in the order that starts at `start`; -1 when rank is the first."""
    while rank != start:
        rank = rank - 1 if rank else size - 1
        if mask_has(members, rank):
            return rank
    return -1


cdef int chain_after(const Mask* members, int size, int start, int rank) noexcept nogil:
    """The member after `rank` in the order that starts at `start`; -1 when rank is the last."""
    while True:
        rank = rank + 1 if rank < size - 1 else 0
        if rank == start:
            return -1
        if mask_has(members, rank):
            return rank


cdef Mask chain_prefix(int size, int start, int rank) noexcept nogil:
    """All positions from `start` up to, and without, `rank`."""
    cdef Mask out = mask_none()
    while start != rank:
        mask_add(&out, start)
        start = start + 1 if start < size - 1 else 0
    return out


cdef int block_count(int kind, int size) noexcept nogil:
    if kind == ALLREDUCE:
        return size if size < BLOCKS_MAX else BLOCKS_MAX
    return 1


cdef int block_start(int kind, int size, int root, int block, int blocks) noexcept nogil:
    if kind == REDUCE:
        return (root + 1) % size      # the root comes last: it makes the final value
    if kind == BCAST:
        return root
    return block * size // blocks


cdef int partial_source(const Engine* engine, const Operation* op, int block) noexcept nogil:
    """Who sends us partial sums; -1: nobody."""
    cdef Mask members
    if op.sig.kind == BCAST or op.standing:
        return -1
    members = members_of(engine, op.attempt)
    return chain_before(&members, engine.size, op.block[block].start, engine.rank)


cdef int final_source(const Engine* engine, const Operation* op, int block) noexcept nogil:
    """Who sends us finals; -1: we make them, or need none."""
    cdef Mask members
    if op.sig.kind == REDUCE and op.sig.root != engine.rank:
        return -1
    if op.standing:
        members = members_of(engine, engine.epoch)
        return chain_before(&members, engine.size, op.holder[block], engine.rank)
    members = members_of(engine, op.attempt)
    if op.sig.kind == BCAST:
        return chain_before(&members, engine.size, op.block[block].start, engine.rank)
    return chain_after(&members, engine.size, op.block[block].start, engine.rank)


cdef bint is_finalizer(const Engine* engine, const Operation* op, int block) noexcept nogil:
    cdef Mask members
    if op.sig.kind == BCAST or op.standing:
        return False
    members = members_of(engine, op.attempt)
    return chain_after(&members, engine.size, op.block[block].start, engine.rank) < 0
