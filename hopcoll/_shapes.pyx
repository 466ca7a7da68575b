# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The chains and trees along which messages go, as tests see them."""
from libc.stdint cimport int16_t
from hopcoll._state cimport *
from hopcoll._fan cimport place_in
from hopcoll._plan cimport block_count, block_start, chain_after, chain_before
from hopcoll._simulation import KINDS
from hopcoll._tree cimport children_in, parent_in
from hopcoll._twins cimport twin_at


def chain(int size, members, int start):
    """The order in which a block's partial sums go: (rank, the one before, the one after) of each
    member; -1 at the ends."""
    cdef Mask mask = mask_none()
    for rank in members:
        mask_add(&mask, rank)
    return [(rank, chain_before(&mask, size, start, rank), chain_after(&mask, size, start, rank))
            for rank in members]


cdef Mask mask_of(ranks) except *:
    cdef Mask mask = mask_none()
    for rank in ranks:
        mask_add(&mask, rank)
    return mask


def control_tree(ranks, doubtful, int root, int degree):
    """(parent, children) of each rank in the tree along which agreement goes; -1: no parent."""
    cdef Tree tree
    cdef int16_t children[DEGREE_MAX]
    tree.ranks = mask_of(ranks)
    tree.doubtful = mask_of(doubtful)
    tree.root, tree.degree, tree.count = root, degree, len(ranks)
    return {rank: (parent_in(&tree, rank),
                   [children[i] for i in range(children_in(&tree, rank, children))])
            for rank in ranks}


def fan_tree(ranks, int first, int degree):
    """(parent, children) of each rank in the tree of a small operation; -1: no parent."""
    cdef Mask members = mask_of(ranks)
    cdef Passing place
    out = {}
    for rank in ranks:
        place = place_in(&members, first, degree, rank)
        out[rank] = (place.parent, [place.child[i] for i in range(place.children)])
    return out


def twin_tree(ranks, int outer, int shift):
    """(parent, left child, right child, run) of each rank in one of the two trees of large
    operations, below `outer` if that is a rank; a run is its first and last position."""
    cdef Mask members = mask_of(ranks)
    cdef Twin twin
    out = {}
    for rank in ranks:
        twin = twin_at(&members, outer, shift, rank)
        out[rank] = (twin.parent, twin.child[0], twin.child[1], (twin.first, twin.last))
    return out


def block_starts(kind, int size, int root):
    """The rank at which the value tree of each block starts."""
    cdef int blocks = block_count(KINDS[kind], size)
    return [block_start(KINDS[kind], size, root, b, blocks) for b in range(blocks)]
