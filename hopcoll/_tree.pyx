# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The control tree: who passes agreement on to whom.

A tree of degree `settings.degree` over a set of ranks, laid out like a heap: its root first, then
the others by rank, and behind them the *doubtful* (silent, or gone for somebody), which so are
leaves.  The children of position p are at degree * p + 1 and on.  It follows from the set alone, so
whoever knows the set knows the tree; with no more than degree + 1 ranks all are children of the
root.
"""
from libc.stdint cimport int16_t
from hopcoll._state cimport *


cdef Mask sure_in(const Tree* tree) noexcept nogil:
    cdef Mask out = mask_without(&tree.ranks, &tree.doubtful)
    mask_drop(&out, tree.root)
    return out


cdef Mask doubtful_in(const Tree* tree) noexcept nogil:
    cdef Mask out = mask_and(&tree.ranks, &tree.doubtful)
    mask_drop(&out, tree.root)
    return out


cdef int rank_at(const Tree* tree, int position) noexcept nogil:
    """The rank at a position; -1: the tree has none there."""
    cdef Mask part = sure_in(tree)
    cdef int count = mask_count(&part)
    if position == 0:
        return tree.root
    if position <= count:
        return mask_nth(&part, position - 1)
    part = doubtful_in(tree)
    return mask_nth(&part, position - 1 - count)


cdef int position_of(const Tree* tree, int rank) noexcept nogil:
    """Where a rank is; -1: nowhere."""
    cdef Mask part
    cdef int before
    if rank == tree.root:
        return 0
    if not mask_has(&tree.ranks, rank):
        return -1
    part = sure_in(tree)
    if mask_has(&part, rank):
        return 1 + mask_below(&part, rank)
    before = mask_count(&part)
    part = doubtful_in(tree)
    return 1 + before + mask_below(&part, rank)


cdef int parent_in(const Tree* tree, int rank) noexcept nogil:
    """Who passes on to a rank; -1: nobody."""
    cdef int position = position_of(tree, rank)
    return rank_at(tree, (position - 1) // tree.degree) if position > 0 else -1


cdef bint is_interior(const Tree* tree, int rank) noexcept nogil:
    cdef int position = position_of(tree, rank)
    return position >= 0 and tree.degree * position + 1 < tree.count


cdef int children_in(const Tree* tree, int rank, int16_t* out) noexcept nogil:
    """To whom a rank passes on; returns how many there are."""
    cdef int position = position_of(tree, rank), count = 0, i
    if position < 0:
        return 0
    for i in range(tree.degree * position + 1, tree.degree * position + tree.degree + 1):
        if i < tree.count:
            out[count] = rank_at(tree, i)
            count += 1
    return count


cdef Mask subtree_in(const Tree* tree, int rank) noexcept nogil:
    """A rank and all that is reached through it."""
    cdef Mask out = mask_none()
    cdef int low = position_of(tree, rank), high = low, i
    while 0 <= low < tree.count:
        for i in range(low, high + 1 if high < tree.count else tree.count):
            mask_add(&out, rank_at(tree, i))
        low = tree.degree * low + 1
        high = tree.degree * high + tree.degree
    return out


cdef bint is_cut(const Tree* tree, const Mask* out) noexcept nogil:
    """Whether one of `out` is where others are reached through it."""
    cdef int i
    cdef Mask part = mask_and(out, &tree.ranks)
    if mask_empty(&part):
        return False
    for i in range((tree.count - 2) // tree.degree + 1 if tree.count > 1 else 0):
        if mask_has(&part, rank_at(tree, i)):
            return True
    return False


cdef Mask hidden_in(const Tree* tree, const Mask* missing) noexcept nogil:
    """Those of the missing that are behind another one: perhaps only that one is to blame."""
    cdef Mask out = mask_none()
    cdef int r
    for r in range(RANKS_MAX if not mask_empty(missing) else 0):
        if mask_has(missing, r) and mask_has(&tree.ranks, r) and r != tree.root \
                and mask_has(missing, parent_in(tree, r)):
            mask_add(&out, r)
    return out


cdef bint is_flat(const Engine* engine) noexcept nogil:
    """Whether everyone is a child of the root, whoever that is."""
    return engine.size - 1 <= engine.settings.degree


cdef Tree members_tree(const Engine* engine) noexcept nogil:
    """The tree of the last membership that was decided: the same at all who adopted it."""
    cdef Tree tree
    tree.ranks = members_of(engine, engine.epoch)
    tree.doubtful = mask_none()
    tree.root = mask_nth(&tree.ranks, 0)
    tree.degree = engine.settings.degree
    tree.count = mask_count(&tree.ranks)
    tree.pad = 0
    return tree
