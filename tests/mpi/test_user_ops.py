"""Operations of the user's, in real jobs."""

from __future__ import annotations

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.user_ops"


def check(ended: launch.Ended, ranks: int) -> None:
    assert ended.code == 0, str(ended)
    assert sorted(line["rank"] for line in ended.said) == list(range(ranks)), str(ended)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_user_ops(ranks):
    check(launch.run(ranks, "-m", PROGRAM), ranks)


def test_without_the_progress_thread():
    check(launch.run(3, "-m", PROGRAM, settings={"HOPCOLL_PROGRESS": "inline"}), 3)


def test_a_function_that_raises_at_one_rank():
    check(launch.run(3, "-m", PROGRAM, "raise"), 3)
