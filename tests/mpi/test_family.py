"""Gather, Allgather, Scatter, Alltoall, Reduce_scatter and the scans against their twins."""

from __future__ import annotations

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.family"


def check(ended: launch.Ended, ranks: int) -> None:
    assert ended.code == 0, str(ended)
    assert len(ended.lines) == ranks, str(ended)
    for line in ended.lines:
        assert line.endswith(" cases, 0 failures"), str(ended)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_family(ranks):
    check(launch.run(ranks, "-m", PROGRAM, timeout_s=180), ranks)


def test_without_the_progress_thread():
    check(launch.run(3, "-m", PROGRAM, settings={"HOPCOLL_PROGRESS": "inline"}, timeout_s=120), 3)
