"""The two trees of many ranks: the one along which agreement goes, and that of small operations."""

from __future__ import annotations

import math

import pytest

from hopcoll._shapes import control_tree, fan_tree


def depth_of(parents, rank):
    steps = 0
    while parents[rank] >= 0:
        rank = parents[rank]
        steps += 1
    return steps


@pytest.mark.parametrize("degree", [2, 3, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 18, 40, 64, 256])
def test_everyone_is_reached_once(size, degree):
    ranks = [rank for rank in range(size) if rank % 5 != 3 or size < 5]
    root = ranks[len(ranks) // 2]
    for tree in (control_tree(ranks, ranks[1:3], root, degree), fan_tree(ranks, root, degree)):
        parents = {rank: parent for rank, (parent, _) in tree.items()}
        assert sorted(tree) == ranks
        assert [rank for rank in ranks if parents[rank] < 0] == [root]
        assert max(len(children) for _, children in tree.values()) <= degree
        for rank, (_, children) in tree.items():
            assert all(parents[child] == rank for child in children)
        deepest = max(depth_of(parents, rank) for rank in ranks)
        assert deepest <= math.ceil(math.log(len(ranks), degree)) + 1


def test_doubtful_ranks_are_leaves():
    tree = control_tree(range(40), [1, 2, 3, 17], 5, 3)
    assert all(not tree[rank][1] for rank in (1, 2, 3, 17))
    assert tree[5] == (-1, [0, 4, 6])


@pytest.mark.parametrize("root", [0, 4, 11])
def test_a_subtree_is_a_run_of_ranks(root):
    """So that a fold up the tree is one in the order of the ranks."""
    size, tree = 12, fan_tree(range(12), root, 3)

    def below(rank):
        out = [rank]
        for child in tree[rank][1]:
            out += below(child)
        return out

    assert below(root) == [(root + step) % size for step in range(size)]


def test_few_ranks_are_all_children_of_one():
    assert control_tree(range(17), [], 0, 16)[0] == (-1, list(range(1, 17)))
    assert fan_tree(range(17), 0, 16)[0] == (-1, list(range(1, 17)))
