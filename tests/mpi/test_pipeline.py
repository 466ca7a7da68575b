"""The verbs of the pipeline in real jobs: twins, wrong use, giving up, SIGKILL in the middle."""

from __future__ import annotations

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.pipeline"


def run(ranks: int, *words: str, dead: int = 0) -> None:
    ended = launch.run(ranks, "-m", PROGRAM, *words, timeout_s=150)
    assert ended.code == 0, str(ended)
    # A survivor is done only when it has seen what the fault was to cause.
    assert len(ended.lines) == ranks - dead, str(ended)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_twins(ranks):
    run(ranks, "twins")


def test_wrong_use():
    run(2, "wrong")


def test_giving_up():
    run(2, "given-up")


@pytest.mark.parametrize("verb", ["relay", "reduce"])
@pytest.mark.parametrize(
    ("ranks", "victim"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (5, 0), (5, 2), (5, 4)]
)
def test_death_in_the_middle(ranks, verb, victim):
    run(ranks, "kill", verb, str(victim), dead=1)
