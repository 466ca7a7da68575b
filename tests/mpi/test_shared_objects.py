"""Objects on real ranks: from one to all, with ranks that are killed in the middle."""

from __future__ import annotations

import pytest

from tests import launch

INLINE = {"HOPCOLL_PROGRESS": "inline"}


def play(*words, ranks=5, dead=(), settings=None, program="tests.mpi.programs.shared_objects"):
    """Runs a scene; what each rank that lived to its end said."""
    ended = launch.run(ranks, "-m", program, *words, settings=settings, timeout_s=90)
    said = {line.pop("rank"): line for line in ended.said}
    assert sorted(said) == [rank for rank in range(ranks) if rank not in dead], str(ended)
    return said


@pytest.mark.parametrize(
    ("ranks", "settings"), [(1, None), (2, None), (5, None), (8, None), (5, INLINE)]
)
def test_from_one_to_all(ranks, settings):
    said = play("broadcast", ranks=ranks, settings=settings)
    for rank, seen in said.items():
        assert seen["right"] and seen["sealed"] and seen["shared"] and seen["kept"], said
        assert seen["left"] == 0
        assert seen["pulls"] == (rank != 0)


@pytest.mark.parametrize(
    ("settings", "pulls"),
    [
        ({}, 2),
        ({"HOPCOLL_INLINE_BYTES": "512"}, 5),
        ({"HOPCOLL_INLINE_BYTES": "65536"}, 1),
        # The room for them does not depend on that of reductions.
        ({"HOPCOLL_INLINE_BYTES": "65536", "HOPCOLL_EAGER_BYTES": "0"}, 1),
    ],
)
def test_small_objects_are_not_pulled(settings, pulls):
    for rank, seen in play("small", ranks=3, settings=settings).items():
        assert seen == {"right": True, "pulls": pulls if rank else 0}, settings


@pytest.mark.parametrize("settings", [None, INLINE])
def test_a_sender_is_killed_in_the_middle(settings):
    said = play("sender_killed", dead=[0], settings=settings)
    assert all(seen["right"] and seen["alive"] == [1, 2, 3, 4] for seen in said.values()), said
    assert sum(seen["resumed"] for seen in said.values()) >= 1
    assert all(seen["left"] == {"used_bytes": 0, "streams": 0} for seen in said.values()), said


def test_what_is_lost_is_said_to_be():
    said = play("lost", dead=[1])
    assert all(seen == {"error": "ObjectLostError", "again": True} for seen in said.values()), said


def test_errors():
    # Objects are too long for messages: copies that ranks keep to answer with would take room.
    little = {
        "HOPCOLL_OBJECT_BYTES": "100000",
        "HOPCOLL_OBJECT_SCRATCH_BYTES": "0",
        "HOPCOLL_INLINE_BYTES": "16384",
    }
    said = play("errors_of_all_kinds", settings=little)
    for rank, seen in said.items():
        full = "ObjectStoreFullError"
        assert seen == {
            "exists": "ObjectExistsError",
            "full": full if rank == 0 else f"{full} {full}",
            "time": "TransferTimeoutError",
            "dtype": "TypeError",
            "fields": "TypeError",
            "ref": "TypeError",
            "out": "ValueError",
            "count": "ValueError",
            "deleted": "ObjectDeletedError",
            "again": True,
            "other": True,
        }


def test_the_last_deletions_are_remembered():
    gone, forgotten = "ObjectDeletedError", "TransferTimeoutError"
    (seen,) = play("many_deletions", ranks=1).values()
    assert seen == {"remembered": [gone, forgotten, forgotten, gone, gone], "used_bytes": 0}


def test_what_may_be_an_object():
    for seen in play("values").values():
        assert all(seen["alike"])
        assert seen["ready"] and seen["few"] and seen["none"] and seen["same"]


@pytest.mark.parametrize("settings", [None, INLINE])
def test_tasks_of_an_event_loop(settings):
    assert all(seen == {"right": True} for seen in play("tasks", settings=settings).values())


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_while_ranks_are_killed(seed):
    said = play("storm", seed, dead=[1, 2])
    for seen in said.values():
        assert seen["wrong"] == 0
        assert seen["left"] == {"used_bytes": 0, "streams": 0}
        assert sum(seen["counts"].values()) == 150
        assert seen["counts"]["ok"] > 50
        assert set(seen["counts"]) <= {
            *("ok", "ObjectExistsError", "ObjectDeletedError", "ObjectLostError"),
            "TransferTimeoutError",
        }
