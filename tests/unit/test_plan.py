"""Chains, blocks and value trees, against their definitions."""

from __future__ import annotations

import itertools

import pytest

from hopcoll._simulation import block_starts, chain


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
