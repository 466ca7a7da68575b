"""Wrong use is an error on every rank concerned, and never a hang."""

from __future__ import annotations

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.wrong_use"


@pytest.mark.parametrize("ranks", [3, 5])
def test_wrong_use(ranks):
    ended = launch.run(ranks, "-m", PROGRAM, timeout_s=120)
    assert ended.code == 0, str(ended)
    assert sorted(ended.lines) == [f"rank {rank}: 0 failures" for rank in range(ranks)]


def test_wrong_use_without_the_progress_thread():
    ended = launch.run(4, "-m", PROGRAM, settings={"HOPCOLL_PROGRESS": "inline"}, timeout_s=120)
    assert ended.code == 0, str(ended)
    assert len(ended.lines) == 4
