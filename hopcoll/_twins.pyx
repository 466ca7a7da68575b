# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Two binary trees for the large operations of many ranks.

Where not everyone is a child of one rank in the control tree, a large Bcast, Reduce or Allreduce
has two blocks, each half of its bytes, and each of them a tree (Sanders, Speck and Traeff, Two-tree
algorithms for full bandwidth broadcast, reduction and scan, 2009).  A rank that has children in one
of them is a leaf in the other: so each link carries every byte once each way, as in a chain, and the
last rank is log n ranks from the first.

Both trees are over the same *order*: the ranks from `start` up, modulo the size.  A rank stands in
it between what it reaches through its left child and what it reaches through its right one, so
that its sum is one of a run of ranks; the result is a fold in that order, in the tree's brackets,
and the same for equal contributors.  Positions are those of all ranks, dead or not, and count from
0 in the first tree and from 1 in the second.  Which position is above which is told by their bits:
of a run of them the top is the one whose number, plus one, ends in the most zeros, or the living
one nearest to it.  So even positions are leaves, and a death changes the place of those that are
above it, and of those above the rank that takes its place: of O(log n).

A Bcast begins, and a Reduce ends, at a rank that is in neither tree: its root, whose one child is
the top.  What stands goes out from its holder in the same way.
"""
from libc.stdint cimport int32_t
from hopcoll._state cimport *
from hopcoll._tree cimport is_flat

cdef struct Order:            # a tree's positions: `count` of them, from `shift` on
    int32_t size
    int32_t start             # the rank at the first of them
    int32_t count
    int32_t shift


cdef bint is_twinned(const Engine* engine, const Signature* sig) noexcept nogil:
    """Whether an operation goes along two trees where it is large."""
    return (not is_flat(engine) and not sig.flags & (FLAG_PARTIAL | FLAG_CARRY | FLAG_ARRIVAL)
            and (sig.kind == BCAST or sig.kind == REDUCE or sig.kind == ALLREDUCE))


cdef int twin_levels(int size) noexcept nogil:
    """How many ranks are above one another, at the most."""
    cdef int levels = 1
    while size >> levels:
        levels += 1
    return levels


# ---- positions ----------------------------------------------------------------------------

cdef inline int rank_of(const Order* order, int position) noexcept nogil:
    cdef int rank = order.start + position - order.shift
    return rank if rank < order.size else rank - order.size


cdef int next_in(const Order* order, const Mask* members, int position, int last) noexcept nogil:
    """The first member's position from this one on; -1: there is none up to the last."""
    while position <= last:
        if mask_has(members, rank_of(order, position)):
            return position
        position += 1
    return -1


cdef int last_in(const Order* order, const Mask* members, int position, int first) noexcept nogil:
    """The last member's position up to this one; -1: there is none from the first on."""
    while position >= first:
        if mask_has(members, rank_of(order, position)):
            return position
        position -= 1
    return -1


cdef int top_of(const Order* order, const Mask* members, int first, int last) noexcept nogil:
    """Of a run whose ends are members: the position above all others."""
    cdef int differ = first ^ (last + 1), level = 0, top, step = 0
    while differ >> (level + 1):
        level += 1
    top = ((last + 1) >> level << level) - 1
    while True:
        if top - step >= first and mask_has(members, rank_of(order, top - step)):
            return top - step
        if top + step <= last and mask_has(members, rank_of(order, top + step)):
            return top + step
        step += 1


cdef int top_rank(const Order* order, const Mask* members, int first, int last) noexcept nogil:
    """The rank above all others of a run, if there is one."""
    return rank_of(order, top_of(order, members, first, last)) if first >= 0 and last >= 0 else -1


cdef Twin place_in(const Order* order, const Mask* members, int outer, const Mask* away,
                   int rank) noexcept nogil:
    """The place of a rank in a tree, below `outer`, if that is a rank.  Its parent is the nearest
    one above that is not `away` (NULL: nobody is)."""
    cdef Twin twin
    cdef int at, top, ends = order.shift + order.count - 1
    cdef int first = next_in(order, members, order.shift, ends)
    cdef int last = last_in(order, members, ends, order.shift)
    twin.epoch = twin.attempt = twin.holder = twin.parent = -1
    twin.child[0] = twin.child[1] = twin.first = twin.last = -1
    if not mask_has(members, rank):
        return twin
    if rank == outer:
        twin.first, twin.last = first, last
        twin.child[0] = top_rank(order, members, first, last)
        return twin
    at = rank - order.start + order.shift
    if rank < order.start:
        at += order.size
    twin.parent = outer
    while True:
        top = top_of(order, members, first, last)
        if top == at:
            break
        if away == NULL or not mask_has(away, rank_of(order, top)):
            twin.parent = rank_of(order, top)
        if at < top:
            last = last_in(order, members, top - 1, first)
        else:
            first = next_in(order, members, top + 1, last)
    twin.first, twin.last = first, last
    twin.child[0] = top_rank(order, members, first, last_in(order, members, at - 1, first))
    twin.child[1] = top_rank(order, members, next_in(order, members, at + 1, last), last)
    return twin


cdef Twin twin_at(const Mask* members, int size, int outer, int shift, int rank) noexcept nogil:
    """The place of a rank in one of the two trees (`shift` 0 and 1); outer -1: all are in it."""
    cdef Order order = order_below(size, outer, shift)
    return place_in(&order, members, outer, NULL, rank)


# ---- the places of an operation -----------------------------------------------------------

cdef Order order_below(int size, int outer, int shift) noexcept nogil:
    """Of all ranks but `outer`, if that is one."""
    cdef Order order
    order.size = size
    order.start = outer + 1 if outer + 1 < size else 0
    order.count = size if outer < 0 else size - 1
    order.shift = shift
    return order


cdef int outer_of(const Engine* engine, const Operation* op, int b) noexcept nogil:
    """The rank above the tree of a block; -1: there is none."""
    if op.standing:
        return op.holder[b] if op.holder[b] < engine.size else -1
    if op.sig.kind == ALLREDUCE or op.sig.flags & FLAG_ORDERED:
        return -1
    return op.sig.root


cdef Twin find_twin(const Engine* engine, const Operation* op, int b, const Mask* members,
                    const Mask* away) noexcept nogil:
    """Our place in the tree of a block, over these members."""
    cdef int outer = outer_of(engine, op, b)
    cdef Order order = order_below(engine.size, outer, b)
    return place_in(&order, members, outer, away, engine.rank)


cdef const Twin* twin_of(const Engine* engine, const Operation* op, int b) noexcept nogil:
    """Our place in the tree of a block: looked for once in an epoch."""
    cdef Twin* twin = &op.block[b].twin
    cdef int holder = op.holder[b] if op.standing else -1
    cdef Mask members
    if twin.epoch != engine.epoch or twin.attempt != op.attempt or twin.holder != holder:
        members = members_of(engine, engine.epoch if op.standing else op.attempt)
        twin[0] = find_twin(engine, op, b, &members, NULL)
        twin.epoch, twin.attempt, twin.holder = engine.epoch, op.attempt, holder
    return twin


cdef int twin_source(const Engine* engine, const Operation* op, int b) noexcept nogil:
    """Who gives us the finals of a block: who is above us, and not late."""
    cdef Mask members
    if op.sig.kind != BCAST or mask_empty(&op.away):
        return twin_of(engine, op, b).parent
    members = members_of(engine, engine.epoch if op.standing else op.attempt)
    return find_twin(engine, op, b, &members, &op.away).parent


cdef bint keeps_run(const Engine* engine, const Operation* op, int b, int previous,
                    const Mask* lost) noexcept nogil:
    """Whether our sum of an earlier attempt is of the same ranks as in this one.  Then it is in the
    same brackets: those of a run follow from who is in it."""
    cdef Mask members = members_of(engine, previous)
    cdef Order order = order_below(engine.size, outer_of(engine, op, b), b)
    cdef Twin old = find_twin(engine, op, b, &members, NULL), new
    members = members_of(engine, op.attempt)
    new = find_twin(engine, op, b, &members, NULL)
    if (new.first != old.first or new.last != old.last) \
            and not engine.settings.sabotage & BREAK_RUN:
        return False
    return old.first < 0 or next_in(&order, lost, old.first, old.last) < 0
