# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What the ranks of a simulated world call, and with what: pure functions of the world.

Inputs are made so that a result shows what went into it: item i of rank r's input is bit r, rotated
by i, and a sum of such items is the set of its contributors; an input counted twice carries.
"""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from hopcoll._state cimport *
from hopcoll._plan cimport is_for_root
from hopcoll._twins cimport twin_at
from hopcoll._world cimport OPERATIONS_MAX, Rank, Step, World


cdef uint64_t bcast_item(int seq, int root, int64_t i) noexcept nogil:
    return (<uint64_t>(seq + 1) * 0x9E3779B97F4A7C15ULL) ^ (<uint64_t>root << 48) ^ <uint64_t>i


cdef uint64_t copy_item(int seq, int source, int dest, int64_t i) noexcept nogil:
    """Item i of what one rank has for another."""
    return bcast_item(seq, source, i) ^ <uint64_t>(dest + 1) << 40


cdef const Step* step_of(const World* world, int rank, int k) noexcept nogil:
    """What a rank calls as its operation k."""
    if rank == world.odd_rank and k == world.odd_step:
        return &world.odd
    return &world.script[k]


cdef int64_t pair_count(const Step* step, int source, int dest) noexcept nogil:
    """Items of the block from one rank to another; the same both ways, for Alltoalls in place."""
    cdef int which
    if not step.flags & FLAG_VECTOR:
        return step.count
    if step.kind == ALLTOALL:
        which = source + dest
    elif step.kind == SCATTER or step.kind == REDUCE_SCATTER:
        which = dest
    else:
        which = source
    return (step.count + 5 * which) % (step.count + 3)


cdef int64_t send_items(const Step* step, int size, int rank) noexcept nogil:
    cdef int64_t items = 0
    cdef int r
    if step.kind == BARRIER:
        return 0
    if step.kind == GATHER or step.kind == ALLGATHER:
        return pair_count(step, rank, step.root)
    if (step.kind == REDUCE_SCATTER or step.kind == ALLTOALL
            or (step.kind == SCATTER and step.root == rank)):
        for r in range(size):
            items += pair_count(step, rank, r)
        return items
    return 0 if step.kind == SCATTER else step.count


cdef int64_t recv_items(const Step* step, int size, int rank) noexcept nogil:
    cdef int64_t items = 0
    cdef int r
    if step.kind == BARRIER:
        return 0
    if (step.kind == ALLGATHER or step.kind == ALLTOALL
            or (step.kind == GATHER and step.root == rank)):
        for r in range(size):
            items += pair_count(step, r, rank)
        return items
    if step.kind == SCATTER:
        return pair_count(step, step.root, rank)
    if step.kind == REDUCE_SCATTER:
        return send_items(step, size, rank) if step.flags & FLAG_IN_PLACE \
            else pair_count(step, 0, rank)
    return 0 if step.kind == GATHER else step.count


cdef int64_t items_before(const Step* step, int rank, int dest) noexcept nogil:
    """Where the block from (or, for what is cut by its owner, of) `rank` starts."""
    cdef int64_t items = 0
    cdef int r
    for r in range(rank):
        items += pair_count(step, r, dest) if step.kind != REDUCE_SCATTER \
            else pair_count(step, 0, r)
    return items


cdef uint64_t input_item(const Step* step, int size, int rank, int k, int64_t j) noexcept nogil:
    """Item j of a rank's input."""
    cdef int r
    cdef int64_t count
    if step.kind == GATHER or step.kind == ALLGATHER or step.flags & FLAG_CARRY:
        return copy_item(k, rank, 0, j)
    if step.kind == SCATTER or step.kind == ALLTOALL:
        for r in range(size):
            count = pair_count(step, rank, r)
            if j < count:
                return copy_item(k, rank, r, j)
            j -= count
    return rotate((<uint64_t>1) << rank, j)


cdef int mix_items(void* context, const Operation* op, void* dest, const void* left,
                   const void* right, int64_t count) noexcept nogil:
    """The operation of MIXED steps, of which no two orders or brackets give the same."""
    cdef int64_t i
    for i in range(count):
        (<uint64_t*>dest)[i] = mixed((<const uint64_t*>left)[i], (<const uint64_t*>right)[i])
    return 0


cdef bint has_brackets(const World* world, const Step* step) noexcept nogil:
    """Whether it is known here in which brackets a MIXED step combines: in those of two trees."""
    return ((step.kind == ALLREDUCE or step.kind == REDUCE)
            and world.size - 1 > world.settings.degree
            and 8 * step.count > world.settings.eager_bytes)


cdef uint64_t mixed_below(const World* world, const Step* step, int k, const Mask* members,
                          int outer, int shift, int rank, int64_t i) noexcept nogil:
    """Item i of all that a rank, and those below it in a tree, give to operation k."""
    cdef Twin twin = twin_at(members, outer, shift, rank)
    cdef uint64_t out = input_item(step, world.size, rank, k, i)
    if twin.child[0] >= 0:
        out = mixed(mixed_below(world, step, k, members, outer, shift, twin.child[0], i), out)
    if twin.child[1] >= 0:
        out = mixed(out, mixed_below(world, step, k, members, outer, shift, twin.child[1], i))
    return out


cdef enum:
    MEMO_ITEMS = 64

cdef struct Memo:             # the result of one operation, which all its ranks are held against
    Step step
    int32_t size
    int32_t pad
    uint64_t who
    uint64_t known            # bit i: so is item i
    uint64_t item[MEMO_ITEMS]

cdef Memo memos[OPERATIONS_MAX]


cdef uint64_t mixed_item(const World* world, const Step* step, int k, const Mask* members,
                         int64_t i) noexcept nogil:
    """Item i of the result of a MIXED step: it follows from who contributed."""
    cdef Memo* memo = &memos[k]
    if i >= MEMO_ITEMS:
        return mixed_result(world, step, k, members, i)
    if (memo.step.kind != step.kind or memo.step.root != step.root
            or memo.step.flags != step.flags or memo.step.count != step.count
            or memo.size != world.size or memo.who != members.word[0]):
        memo.step, memo.size, memo.who, memo.known = step[0], world.size, members.word[0], 0
    if not memo.known >> i & 1:
        memo.item[i] = mixed_result(world, step, k, members, i)
        memo.known |= <uint64_t>1 << i
    return memo.item[i]


cdef uint64_t mixed_result(const World* world, const Step* step, int k, const Mask* members,
                           int64_t i) noexcept nogil:
    cdef int outer = step.root if step.kind == REDUCE and not step.flags & FLAG_ORDERED else -1
    cdef int shift = i >= step.count // 2, r
    for r in range(world.size):
        if mask_has(members, r) and twin_at(members, outer, shift, r).parent < 0:
            return mixed_below(world, step, k, members, outer, shift, r, i)
    return 0


cdef uint64_t carried_sum(const World* world, int rank, int k, int64_t j) noexcept nogil:
    """Item j of what a rank gives to operation k: its input, and those that it takes along."""
    cdef uint64_t out = copy_item(k, rank, 0, j)
    cdef int i
    for i in range(k):
        if world.ranks[rank].takes[k] >> i & 1:
            out += copy_item(i, rank, 0, j)
    return out


cdef bint same_carry(const Step* a, const Step* b) noexcept nogil:
    return a.flags & FLAG_CARRY and b.flags & FLAG_CARRY and a.count == b.count


cdef void note_call(World* world, int rank, int k) noexcept nogil:
    """What this call takes along: all that came too late before, unless a call that is under way
    has some of it along already."""
    cdef Rank* one = &world.ranks[rank]
    cdef const Step* step = step_of(world, rank, k)
    cdef int i
    one.takes[k] = 0
    if not step.flags & FLAG_CARRY or step.count == 0:
        return
    for i in range(one.checked, k):
        if one.takes[i] and same_carry(step_of(world, rank, i), step):
            return
    for i in range(k):
        if one.pending >> i & 1 and same_carry(step_of(world, rank, i), step):
            one.takes[k] |= <uint32_t>1 << i
    one.pending &= ~one.takes[k]


cdef void note_return(World* world, int rank, int k) noexcept nogil:
    cdef Rank* one = &world.ranks[rank]
    cdef const Result* result = &one.results[k]
    cdef const Step* step = step_of(world, rank, k)
    cdef bint ended = result.status == STATUS_OK or result.status == STATUS_MISSED
    if not step.flags & FLAG_CARRY or step.count == 0 or (
            ended and mask_has(&result.contributors, rank)):
        return
    one.pending |= one.takes[k]
    if ended:
        one.pending |= <uint32_t>1 << k


cdef bint is_here(const World* world, int rank) noexcept nogil:
    """Neither dead nor gone."""
    return not world.network.ports[rank].dead and not world.network.ports[rank].left


cdef bint acts(const World* world, int rank) noexcept nogil:
    return is_here(world, rank) and not world.paused >> rank & 1


cdef bint is_cut(const World* world, int a, int b) noexcept nogil:
    return (world.side >> a ^ world.side >> b) & 1


cdef bint is_disturbed(const World* world, int rank) noexcept nogil:
    return world.disturbed >> rank & 1


cdef bint in_force(const World* world, int rank) noexcept nogil:
    """Whether a rank is there at the end, and has a part in what was decided."""
    return acts(world, rank) and not world.ranks[rank].engine.stopped


cdef bint is_settled(const World* world) noexcept nogil:
    """Whether every rank that acts has all that it will get."""
    cdef int r
    cdef const Rank* one
    for r in range(world.size):
        one = &world.ranks[r]
        if not acts(world, r):
            continue
        if one.engine.stopped:
            if one.checked < one.called:
                return False
        elif one.checked < one.steps or one.engine.stable < one.steps:
            return False
    return True


cdef bint has_result(const World* world, int rank, const Step* step) noexcept nogil:
    return step.kind != BARRIER and not (is_for_root(step.kind) and step.root != rank)
