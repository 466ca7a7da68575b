"""Reductions of objects on real ranks, with ranks that are killed in the middle."""

from __future__ import annotations

import pytest

from tests.mpi.test_shared_objects import INLINE, play

PROGRAM = "tests.mpi.programs.object_reductions"
NOTHING = {"used_bytes": 0, "streams": 0}


@pytest.mark.parametrize(("ranks", "settings"), [(1, None), (2, None), (5, None), (5, INLINE)])
def test_operations_dtypes_and_lengths(ranks, settings):
    said = play("all_of_them", program=PROGRAM, ranks=ranks, settings=settings)
    assert all(seen == {"wrong": [], "left": NOTHING} for seen in said.values()), said


def test_the_first_that_exist_are_taken():
    said = play("first_of_many", program=PROGRAM)
    want = {"pending": True, "taken": [0, 2, 4], "first": 1 + 4 + 16}
    assert all(seen == want for seen in said.values()), said


@pytest.mark.parametrize(
    ("victim", "settings"), [(0, None), (1, None), (2, None), (4, None), (3, INLINE)]
)
def test_a_rank_with_an_input_is_killed(victim, settings):
    said = play("member_killed", victim, program=PROGRAM, dead=[victim], settings=settings)
    assert all(seen["right"] and seen["left"] == NOTHING for seen in said.values()), said
    (taken,) = {tuple(seen["taken"]) for seen in said.values()}
    assert len(taken) == 5


@pytest.mark.parametrize("settings", [None, INLINE])
def test_a_get_of_a_result_is_interrupted(settings):
    said = play("interrupted", program=PROGRAM, ranks=3, settings=settings)
    for rank, seen in said.items():
        assert seen == {"interrupted": rank == 1, "right": True, "left": NOTHING}, said


def test_a_reduction_outlives_its_caller():
    said = play("caller_killed", program=PROGRAM, dead=[1])
    for seen in said.values():
        # Of those of which it was also the owner nobody knows any more.
        assert set(seen["ends"]) <= {True, "lost"} and True in seen["ends"], said
        assert seen["left"] == NOTHING
    assert len({tuple(seen["ends"]) for seen in said.values()}) == 1


def test_errors():
    said = play("errors_of_reductions", program=PROGRAM, ranks=3)
    for seen in said.values():
        assert seen == {
            "twice": "ValueError",
            "none": "ValueError",
            "count": "ValueError",
            "op": "TypeError",
            "user": "TypeError",
            "many": "ValueError",
            "not one": "ValueError",
            "shape": "ReductionError ReductionError",
            "dtype": "ReductionError ReductionError",
            "deleted": "ObjectDeletedError ObjectDeletedError",
            "of that": "ReductionError ReductionError",
            "fine": "none",
        }


@pytest.mark.parametrize("seed", range(3))
def test_random_reductions_while_ranks_are_killed(seed):
    said = play("storm", seed, program=PROGRAM, dead=[1, 2])
    for seen in said.values():
        assert seen["wrong"] == 0 and seen["left"] == NOTHING, said
        assert set(seen["counts"]) <= {"ok", "ObjectLostError"}, said
        assert seen["counts"]["ok"] > 5
