"""References to objects on real ranks: what goes with the last one, and what stays."""

from __future__ import annotations

import pytest

from tests.mpi.test_shared_objects import INLINE, play

PROGRAM = "tests.mpi.programs.counted_objects"


@pytest.mark.parametrize(("ranks", "settings"), [(1, None), (3, None), (3, INLINE)])
def test_the_last_ref_takes_its_object_along(ranks, settings):
    said = play("counted", ranks=ranks, settings=settings, program=PROGRAM)
    for seen in said.values():
        assert len(seen) == 10
        assert all(seen.values()), said


def test_what_others_may_have_stays():
    for seen in play("shared", ranks=3, program=PROGRAM).values():
        want = {"first": [3.0, 1.0, 7.0], "inputs": [3.0, 4.0]}
        assert seen == {**want, "gone": ["ObjectDeletedError"], "used": 0}


def test_a_get_that_ran_out_of_time_is_called_off():
    said = play("called_off", ranks=3, program=PROGRAM)
    for rank, seen in said.items():
        late = "TransferTimeoutError" if rank else ""
        assert seen == {"late": late, "used": 0, "right": True}


def test_refs_at_the_end():
    said = play("at_exit", ranks=3, dead=[1], program=PROGRAM)
    assert all(seen["used"] for seen in said.values())
