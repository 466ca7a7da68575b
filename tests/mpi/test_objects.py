"""Python objects: mpi4py's lower-case methods, in real jobs, also when a rank dies."""

from __future__ import annotations

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.objects"


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_objects(ranks):
    ended = launch.run(ranks, "-m", PROGRAM)
    assert ended.code == 0, str(ended)
    left = [r for r in range(ranks) if ranks < 3 or r != ranks - 2]
    assert sorted(line["rank"] for line in ended.said) == left, str(ended)
    assert all(line["alive"] == left for line in ended.said), str(ended)
