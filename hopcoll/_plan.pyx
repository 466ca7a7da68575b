# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Where a block's data comes from: pure functions of membership and rank.

The *value tree* of a block is a left fold over the ranks in a rotated order: it starts at
`block_start` and goes up, modulo the size; dead ranks are left out.  The data follow the same
order as a chain, so that each rank adds its input to what it received and passes the partial sum
on; the last one makes the final value, the only place where it is made.  Finals flow back along
the chain (Allreduce) or along it (Bcast, and Allgather, where every rank's block is a broadcast).
Chains over rotated orders keep every link busy both ways (Hoplite, section 4, pipelines chunks
along a chain; the rotation is the ring's).  What only one rank wants it fetches from where it is;
in a Scan each partial sum is the final value of its rank.  Many ranks have two trees in the place
of some of these chains (`hopcoll._twins`).
"""
from hopcoll._state cimport *
from hopcoll._twins cimport is_twinned, twin_of, twin_source


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


cdef bint is_fold(int kind) noexcept nogil:
    """Whether inputs are combined; else they are only copied."""
    return (kind == ALLREDUCE or kind == REDUCE or kind == REDUCE_SCATTER or kind == SCAN
            or kind == EXSCAN)


cdef bint is_scan(int kind) noexcept nogil:
    return kind == SCAN or kind == EXSCAN


cdef bint is_private(int kind) noexcept nogil:
    """Whether a rank gets what no other rank has: nobody may return before all have theirs."""
    return (kind == SCATTER or kind == ALLTOALL or kind == REDUCE_SCATTER or kind == SCAN
            or kind == EXSCAN)


cdef bint is_for_root(int kind) noexcept nogil:
    return kind == REDUCE or kind == GATHER


cdef bint ends_at_root(const Signature* sig) noexcept nogil:
    """Whether only the root makes or gets the result.  A Reduce in the order of the ranks ends at
    the last rank, and goes from there to all like an Allreduce."""
    return is_for_root(sig.kind) and not sig.flags & FLAG_ORDERED


cdef bint is_from_root(int kind) noexcept nogil:
    return kind == BCAST or kind == SCATTER


cdef int blocks_of(const Engine* engine, const Signature* sig) noexcept nogil:
    """How many blocks a large operation has: alike at all ranks, and in all epochs."""
    return TWINS if is_twinned(engine, sig) else block_count(sig.kind, engine.size)


cdef int block_count(int kind, int size) noexcept nogil:
    """... along chains."""
    if kind == ALLREDUCE:
        return size if size < BLOCKS_MAX else BLOCKS_MAX
    if (kind == GATHER or kind == ALLGATHER or kind == SCATTER or kind == ALLTOALL
            or kind == REDUCE_SCATTER):
        return size
    return 1


cdef int block_start(int kind, int size, int root, int block, int blocks) noexcept nogil:
    """Where a fold begins, or where the bytes are (in an Alltoall: of what comes to us)."""
    if kind == REDUCE:
        return (root + 1) % size      # the root comes last: it makes the final value
    if kind == REDUCE_SCATTER:
        return (block + 1) % size
    if kind == BCAST or kind == SCATTER:
        return root
    if kind == GATHER or kind == ALLGATHER or kind == ALLTOALL:
        return block
    if kind == ALLREDUCE:
        return block * size // blocks
    return 0


cdef int block_dest(int kind, int rank, int root, int block) noexcept nogil:
    """Who wants a block; -1: everyone."""
    if kind == REDUCE or kind == GATHER:
        return root
    if kind == SCATTER or kind == REDUCE_SCATTER:
        return block
    return rank if kind == ALLTOALL else -1


cdef int block_at(const Engine* engine, const Operation* op, int block) noexcept nogil:
    """The number of one of our blocks at the rank that gives it to us."""
    return engine.rank if op.sig.kind == ALLTOALL else block


cdef bint is_wanted(const Engine* engine, const Operation* op, int block) noexcept nogil:
    """Whether we need a block: who is no contributor has none."""
    cdef const Block* b = &op.block[block]
    cdef Mask members
    if b.dest >= 0 and b.dest != engine.rank:
        return False
    if is_fold(op.sig.kind):
        return True
    members = attempt_members(engine, op)
    return mask_has(&members, b.start)


cdef int partial_source(const Engine* engine, const Operation* op, int block,
                        int phase) noexcept nogil:
    """Who sends us partial sums, by phase: along a chain one rank at the most; -1: nobody."""
    cdef Mask members
    cdef int dest = op.block[block].dest
    if not is_fold(op.sig.kind) or op.standing:
        return -1
    if op.twins:
        return twin_of(engine, op, block).child[1 if phase == RIGHT_PHASE else 0]
    if phase == RIGHT_PHASE:
        return -1
    members = attempt_members(engine, op)
    if (dest >= 0 and not mask_has(&members, dest)) or not mask_has(&members, engine.rank):
        return -1             # nobody wants it any more; or it goes on without us
    if op.sig.flags & FLAG_ARRIVAL:
        return op.before
    return chain_before(&members, engine.size, op.block[block].start, engine.rank)


cdef bint adds(const Engine* engine, const Operation* op, int block) noexcept nogil:
    """Whether partial sums come to us: else we give our input as it is."""
    return (partial_source(engine, op, block, PARTIAL_PHASE) >= 0
            or partial_source(engine, op, block, RIGHT_PHASE) >= 0)


cdef int late_source(const Engine* engine, const Operation* op, int block,
                     const Mask* members) noexcept nogil:
    """Who gives the result of a partial operation to a rank that came too late for it, or lacks
    what stands.  Not along a chain: ranks in between may not have called it."""
    cdef int r = engine.rank, i
    if op.standing:
        r = op.holder[block]
        return r if r != engine.rank and r != NOBODY else -1
    for i in range(engine.size):
        r = r + 1 if r < engine.size - 1 else 0
        if mask_has(members, r):
            return r
    return -1


cdef int final_source(const Engine* engine, const Operation* op, int block) noexcept nogil:
    """Who sends us finals; -1: we make them, or need none, or nobody can."""
    cdef Mask members
    cdef int kind = op.sig.kind, start = op.block[block].start, dest = op.block[block].dest
    if is_scan(kind) or (dest >= 0 and dest != engine.rank):
        return -1
    if op.twins and op.block[block].behind < 0:
        return -1 if op.standing and dest >= 0 else twin_source(engine, op, block)
    members = members_of(engine, engine.epoch) if op.standing \
        else attempt_members(engine, op)
    if op.rolled and (op.standing or not mask_has(&members, engine.rank)):
        return late_source(engine, op, block, &members)
    if op.block[block].behind >= 0:
        return op.block[block].behind
    members = mask_without(&members, &op.away)
    if is_fold(kind) or kind == BCAST:
        if op.standing:
            if dest >= 0:
                return -1
            return chain_before(&members, engine.size, op.holder[block], engine.rank)
        if kind == BCAST:
            return chain_before(&members, engine.size, start, engine.rank)
        if op.sig.flags & FLAG_ARRIVAL:
            return op.after
        return chain_after(&members, engine.size, start, engine.rank)
    if dest >= 0:
        return start if start != engine.rank and mask_has(&members, start) else -1
    if not mask_has(&members, start):
        if not op.standing or op.holder[0] == NOBODY:
            return -1
        start = op.holder[0]
    return chain_before(&members, engine.size, start, engine.rank)


cdef int final_takers(const Engine* engine, const Operation* op, int block,
                      int* takers) noexcept nogil:
    """Whom we are to give the finals of a Bcast; returns how many there are, two at the most."""
    cdef Mask members
    cdef const Twin* twin
    cdef int side, count = 0
    if op.twins:
        twin = twin_of(engine, op, block)
        for side in range(2):
            if twin.child[side] >= 0:
                takers[count] = twin.child[side]
                count += 1
        return count
    members = members_of(engine, engine.epoch if op.standing else op.attempt)
    takers[0] = chain_after(&members, engine.size,
                            op.holder[block] if op.standing else op.block[block].start,
                            engine.rank)
    return takers[0] >= 0


cdef int final_giver(const Engine* engine, const Operation* op, int block) noexcept nogil:
    """Whose taker we are in a Bcast; -1: nobody's."""
    cdef Mask members
    if op.twins:
        return twin_of(engine, op, block).parent
    members = members_of(engine, engine.epoch if op.standing else op.attempt)
    return chain_before(&members, engine.size,
                        op.holder[block] if op.standing else op.block[block].start, engine.rank)


cdef bint is_finalizer(const Engine* engine, const Operation* op, int block) noexcept nogil:
    cdef Mask members
    if not is_fold(op.sig.kind) or op.standing or not is_wanted(engine, op, block):
        return False
    if is_scan(op.sig.kind):
        return True
    if op.sig.flags & FLAG_ARRIVAL:
        return op.last
    if op.twins:
        return twin_of(engine, op, block).parent < 0
    members = attempt_members(engine, op)
    return (mask_has(&members, engine.rank)
            and chain_after(&members, engine.size, op.block[block].start, engine.rank) < 0)
