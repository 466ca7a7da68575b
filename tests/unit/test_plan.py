"""Chains, blocks and value trees, against their definitions."""

from __future__ import annotations

import itertools
import random

import pytest

from hopcoll._shapes import block_starts, chain, twin_tree


@pytest.mark.parametrize("size", range(1, 8))
def test_chain_is_the_rotation_without_the_dead(size):
    for start in range(size):
        order = [(start + i) % size for i in range(size)]
        for alive in itertools.chain.from_iterable(
            itertools.combinations(range(size), n) for n in range(1, size + 1)
        ):
            members = [rank for rank in order if rank in alive]
            links = {rank: (before, after) for rank, before, after in chain(size, alive, start)}
            assert set(links) == set(alive)
            for i, rank in enumerate(members):
                assert links[rank][0] == (members[i - 1] if i else -1)
                assert links[rank][1] == (members[i + 1] if i + 1 < len(members) else -1)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 9, 64, 256])
def test_blocks_start_where_the_value_tree_does(size):
    blocks = min(size, 8)
    assert block_starts("allreduce", size, 0) == [b * size // blocks for b in range(blocks)]
    for root in {0, size // 2, size - 1}:
        assert block_starts("reduce", size, root) == [(root + 1) % size]  # the root comes last
        assert block_starts("bcast", size, root) == [root]  # the root comes first


def tree_over(positions):
    """{position: (parent, left, right, (first, last))}: above all is the position whose number,
    plus one, ends in the most zeros, and so on in what is before it and behind it."""
    out = {}

    def grow(some, parent):
        if not some:
            return -1
        top = max(some, key=lambda at: (at + 1) & -(at + 1))
        below = range(some[0], top), range(top + 1, some[-1] + 1)
        out[top] = (parent, *(grow(part, top) for part in below), (some[0], some[-1]))
        return top

    grow(positions, -1)
    return out


def twins_of(size, ranks, outer):
    """Both trees by their definition, with ranks for positions."""
    around = [(outer + 1 + i) % size for i in range(size)]
    order = [rank for rank in around if rank in ranks and rank != outer]
    for shift in (0, 1):
        rank_at = {i + shift: rank for i, rank in enumerate(order)} | {-1: -1}
        tree = tree_over(range(shift, shift + len(order)))
        out = {
            rank_at[i]: (rank_at[p] if p >= 0 else outer, rank_at[left], rank_at[right], run)
            for i, (p, left, right, run) in tree.items()
        }
        if outer in ranks:
            top = next((rank_at[i] for i, place in tree.items() if place[0] < 0), -1)
            out[outer] = (-1, top, -1, (shift, shift + len(order) - 1))
        yield shift, out


def living_sets(size, count, rng):
    for _ in range(count):
        share = rng.choice((0.05, 0.3, 0.7, 0.95, 1.0))
        yield sorted({rng.randrange(size)} | {r for r in range(size) if rng.random() < share})


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 17, 18, 31, 32, 33, 64, 100, 256])
def test_two_trees_follow_from_the_living(size):
    rng = random.Random(size)
    for ranks in living_sets(size, 40, rng):
        for outer in (-1, rng.choice(ranks)):
            for shift, expected in twins_of(size, ranks, outer):
                assert twin_tree(ranks, outer, shift) == expected


def depth_of(tree, rank):
    steps = 0
    while tree[rank][0] >= 0:
        rank = tree[rank][0]
        steps += 1
    return steps


@pytest.mark.parametrize("size", [4, 18, 64, 255, 256])
def test_two_trees_are_low_and_who_gives_in_one_only_takes_in_the_other(size):
    """Whoever has died before: so no link carries more than the whole once each way."""
    rng = random.Random(size)
    for ranks in living_sets(size, 40, rng):
        for outer in (-1, rng.choice(ranks)):
            one, two = (twin_tree(ranks, outer, shift) for shift in (0, 1))
            for tree in (one, two):
                assert max(depth_of(tree, rank) for rank in ranks) <= len(ranks).bit_length() + 1
            for rank in set(ranks) - {outer}:
                assert (-1, -1) in (one[rank][1:3], two[rank][1:3])


@pytest.mark.parametrize("size", [18, 64, 256])
def test_a_death_moves_nobody_before_it(size):
    """Sums of ranks that all come before it are what they were."""
    rng = random.Random(size)
    for ranks in living_sets(size, 20, rng):
        for dead in rng.sample(ranks, min(5, len(ranks) - 1)):
            left = [rank for rank in ranks if rank != dead]
            for shift in (0, 1):
                before, after = (twin_tree(some, -1, shift) for some in (ranks, left))
                at = ranks.index(dead) + shift
                for rank in left:
                    if before[rank][3][1] < at:
                        assert before[rank][1:] == after[rank][1:]
