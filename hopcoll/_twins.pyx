# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Two binary trees for the large operations of many ranks.

Where not everyone is a child of one rank in the control tree, a large Bcast, Reduce or Allreduce
has two blocks, each half of its bytes, and each of them a tree (Sanders, Speck and Traeff, Two-tree
algorithms for full bandwidth broadcast, reduction and scan, 2009).  A rank that has children in one
of them is a leaf in the other: so each link carries every byte once each way, as in a chain, and
the last rank is log n ranks from the first.

Both trees are over the same *order*: the living ranks from one on, around.  A rank stands in it
between what it reaches through its left child and what it reaches through its right one, so that
its sum is one of a run of ranks; the result is a fold in that order, in the tree's brackets, and
the same for equal contributors.  Positions count from 0 in the first tree and from 1 in the second,
and their bits tell which one is above which: of a run of them the top is the one whose number, plus
one, ends in the most zeros.  So even positions are leaves, whoever has died before.  After a death
those behind the dead in the order have new places, and their sums start anew; a tree that closed
the gap with few of them would have ranks with children in both trees from then on, and half the
bandwidth.

A Bcast begins, and a Reduce ends, at a rank that is in neither tree: its root, whose one child is
the top.  What stands goes out from its holder in the same way.
"""
from libc.stdint cimport int32_t
from hopcoll._state cimport *
from hopcoll._tree cimport is_flat

cdef struct Order:            # the ranks of a tree, by position
    const Mask* members
    int32_t first             # how many lower members there are than the first of them
    int32_t count             # of members, ...
    int32_t inside            # ... of those in the tree
    int32_t shift             # the first position


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

cdef Order order_of(const Mask* members, int outer, int shift) noexcept nogil:
    """All members from rank 0 on; or, below `outer`, those behind it."""
    cdef Order order
    cdef bint below = outer >= 0 and mask_has(members, outer)
    order.members, order.shift = members, shift
    order.count = mask_count(members)
    order.first = mask_below(members, outer) + below if outer >= 0 else 0
    order.inside = order.count - below
    return order


cdef int rank_of(const Order* order, int position) noexcept nogil:
    cdef int place = order.first + position - order.shift
    return mask_nth(order.members, place if place < order.count else place - order.count)


cdef int position_of(const Order* order, int rank) noexcept nogil:
    cdef int place = mask_below(order.members, rank) - order.first
    return order.shift + (place if place >= 0 else place + order.count)


cdef int top_of(int first, int last) noexcept nogil:
    """The position above all others from `first` to `last`."""
    cdef int differ = first ^ (last + 1), level = 0
    while differ >> (level + 1):
        level += 1
    return ((last + 1) >> level << level) - 1


cdef int top_rank(const Order* order, int first, int last) noexcept nogil:
    """The rank above all others, if there is one."""
    return rank_of(order, top_of(first, last)) if first <= last else -1


cdef Twin place_in(const Order* order, int outer, const Mask* away, int rank) noexcept nogil:
    """The place of a rank in a tree, below `outer`, if that is a rank.  Its parent is the nearest
    one above that is not `away` (NULL: nobody is)."""
    cdef Twin twin
    cdef int at, top, first = order.shift, last = order.shift + order.inside - 1
    twin.epoch = twin.attempt = twin.holder = twin.parent = -1
    twin.child[0] = twin.child[1] = twin.first = twin.last = -1
    if not mask_has(order.members, rank):
        return twin
    if rank == outer:
        twin.first, twin.last = first, last
        twin.child[0] = top_rank(order, first, last)
        return twin
    at = position_of(order, rank)
    top = top_of(first, last)
    twin.parent = outer
    while top != at:
        if away == NULL or not mask_has(away, rank_of(order, top)):
            twin.parent = rank_of(order, top)
        if at < top:
            last = top - 1
        else:
            first = top + 1
        top = top_of(first, last)
    twin.first, twin.last = first, last
    twin.child[0] = top_rank(order, first, at - 1)
    twin.child[1] = top_rank(order, at + 1, last)
    return twin


cdef Twin twin_at(const Mask* members, int outer, int shift, int rank) noexcept nogil:
    """The place of a rank in one of the two trees (`shift` 0 and 1); outer -1: all are in it."""
    cdef Order order = order_of(members, outer, shift)
    return place_in(&order, outer, NULL, rank)


# ---- the places of an operation -----------------------------------------------------------

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
    cdef Order order = order_of(members, outer, b)
    return place_in(&order, outer, away, engine.rank)


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


cdef bint keeps_run(const Engine* engine, const Operation* op, int b, int previous) noexcept nogil:
    """Whether our sum of an earlier attempt is of the same ranks, in the same brackets, as in this
    one: the positions of all in it are what they were."""
    cdef Mask before = members_of(engine, previous), members = members_of(engine, op.attempt)
    cdef int outer = outer_of(engine, op, b), position
    cdef Order old = order_of(&before, outer, b), new = order_of(&members, outer, b)
    cdef Twin was = place_in(&old, outer, NULL, engine.rank)
    cdef Twin now = place_in(&new, outer, NULL, engine.rank)
    if engine.settings.sabotage & BREAK_RUN:
        for position in range(was.first, was.last + 1):
            if not mask_has(&members, rank_of(&old, position)):
                return False
        return True
    if was.first > was.last:              # nobody else's
        return True
    return (now.first == was.first and now.last == was.last
            and rank_of(&new, now.first) == rank_of(&old, was.first)
            and rank_of(&new, now.last) == rank_of(&old, was.last))
