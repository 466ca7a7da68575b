"""Communicators that are split off others: what is in them, who dies in them, how they end."""

from __future__ import annotations

import json
import re

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.groups_faults"  # which has the scenes of groups, too
INLINE = {"HOPCOLL_PROGRESS": "inline"}
BOTH = pytest.mark.parametrize("settings", [{}, INLINE], ids=["thread", "inline"])
#: Rank 0 coordinates what the survivors decide.
VICTIMS = pytest.mark.parametrize("victim", [0, 1])


def play(scene, ranks, victim=1, *, code=0, silent=(), timeout_s=60, **more):
    """What the ranks said, by rank; `silent` are those that do not get to say anything."""
    ended = launch.run(ranks, "-m", PROGRAM, scene, str(victim), timeout_s=timeout_s, **more)
    assert ended.code == code, str(ended)
    said = {line.pop("rank"): line for line in ended.said}
    assert sorted(said) == [rank for rank in range(ranks) if rank not in silent], str(ended)
    return said


def alike(said):
    """What all said, which has to be the same."""
    lines = {json.dumps(line) for line in said.values()}
    assert len(lines) == 1, lines
    return json.loads(lines.pop())


# ---- nobody dies ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_the_family_in_communicators_of_all_sorts(ranks):
    assert alike(play("kinds", ranks, timeout_s=120)) == {"failures": []}


@pytest.mark.parametrize(
    ("ranks", "settings"), [(3, {}), (5, {}), (5, INLINE)], ids=["3", "5", "5-inline"]
)
def test_communicators_that_overlap_in_any_order(ranks, settings):
    said = alike(play("overlapping", ranks, settings=settings, timeout_s=120))
    assert said == {"failures": []}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_a_split_of_a_split(ranks):
    assert alike(play("nested", ranks))["alive"] == list(range(ranks))


@BOTH
def test_many_splits_leave_nothing_behind(settings):
    for line in play("many", 3, settings=settings).values():
        assert line["grown_kib"] < 300
        assert line["alive"] == [0, 1, 2]


def test_too_many_are_refused_at_all():
    said = play("too_many", 3)
    assert [line.pop("made") for _, line in sorted(said.items())] == [2, 2, 64]
    (message,) = set(alike(said)["messages"])
    assert message == "ranks 2 are in 64 communicators already: close some first"
    assert len(alike(said)["messages"]) == 2


def test_no_memory_at_one_rank():
    first, second = alike(play("no_memory", 3))["messages"]
    assert first == "Split: a rank has no memory for one more communicator"
    assert second == "ranks 1 have no memory for one more communicator"


def test_user_operations():
    assert alike(play("user_operations", 5)) == {"failures": []}


@BOTH
def test_a_thread_for_each(settings):
    assert alike(play("two_threads", 3, settings=settings)) == {"ended": [3, 3, 3]}


def test_arguments_that_differ_break_one_communicator():
    first, second, third = alike(play("arguments_differ", 3))["messages"]
    assert first == second
    assert "Allreduce(float64, count=20" in first
    # The first of the two to arrive is enough to tell.
    assert re.search("ranks? (1|2|1, 2) called Split, the first of its steps", third)


# ---- closing ----------------------------------------------------------------------------------


@BOTH
def test_close_in_any_order(settings):
    said = alike(play("close_order", 3, settings=settings))
    assert said == {"refused": 5, "pending": True, "outcome": 0}


@BOTH
def test_the_end_of_the_program_closes_all(settings):
    said = alike(play("left_open", 3, silent=[1], settings=settings))
    assert said == {"correct": [True] * 4}


@VICTIMS
def test_leaving_one_is_not_leaving_the_others(victim):
    assert alike(play("leave_one", 3, victim)) == {
        "alive": [0, 1, 2],
        "epoch": 0,
    }


@VICTIMS
def test_an_exception_leaves_the_with_block_of_one(victim):
    assert alike(play("leave_with_an_error", 3, victim)) == {"caught": True, "epoch": 0}


@BOTH
def test_an_uncaught_exception_leaves_all(settings):
    said = alike(play("exception", 3, code=1, silent=[1], settings=settings))
    assert said == {"alive": [0, 2]}


@BOTH
def test_ctrl_c_in_a_wait(settings):
    said = alike(play("interrupt", 3, settings=settings))
    assert said == {"interrupted": True, "contributors": [0, 1, 2]}


@BOTH
def test_the_child_of_a_fork_is_refused(settings):
    said = alike(play("fork", 3, settings=settings))
    assert said == {"child": 42, "contributors": [0, 1, 2]}


def test_a_split_that_takes_too_long():
    assert alike(play("timeout", 3)) == {"alive": [0, 1, 2]}


# ---- deaths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "victim", "settings"),
    [(2, 0, {}), (2, 1, INLINE), (3, 1, {}), (3, 0, INLINE), (5, 0, {}), (5, 3, {})],
)
def test_a_split_after_a_death(ranks, victim, settings):
    said = alike(play("after_a_death", ranks, victim, silent=[victim], settings=settings))
    living = [rank for rank in range(ranks) if rank != victim]
    assert said == {"alive": list(range(ranks - 1)), "world": living, "epoch": 1}


@pytest.mark.parametrize(
    ("ranks", "victim", "settings"),
    [(3, 1, {}), (3, 0, {}), (3, 0, INLINE), (5, 2, INLINE), (5, 0, {}), (8, 7, {})],
)
def test_a_death_is_noticed_everywhere(ranks, victim, settings):
    said = alike(play("deaths_everywhere", ranks, victim, silent=[victim], settings=settings))
    assert said["alive"] == [rank for rank in range(ranks) if rank != victim]
    assert sorted(said["outcomes"]) == ["dup", "middle", "nested", "reversed", "world"]


@pytest.mark.parametrize("ranks", [3, 5])
@VICTIMS
@pytest.mark.parametrize("step", [4, 5])
def test_a_death_in_the_middle_of_a_split(tmp_path, step, victim, ranks):
    record = tmp_path / "fault"
    settings = {
        "HOPCOLL_FAULT": f"rank={victim},op={step},chunk=0",
        "HOPCOLL_FAULT_RECORD": str(record),
    }
    said = alike(play("dies_in_split", ranks, victim, silent=[victim], settings=settings))
    assert json.loads((tmp_path / f"fault.{victim}").read_text())["op"] == step
    assert said["alive"] == [rank for rank in range(ranks) if rank != victim]
    assert said["members"][victim] is None
    for rank in said["alive"]:
        members = said["members"][rank]
        assert rank in members
        # All of one communicator took the same for its members.
        assert all(said["members"][other] == members for other in set(members) - {victim})


@VICTIMS
@pytest.mark.parametrize("scene", ["dies_between", "leaves_between", "impatient_between"])
def test_a_member_is_gone_before_it_has_begun(scene, victim):
    silent = [victim] if scene == "dies_between" else []
    alike(play(scene, 3, victim, silent=silent))


@pytest.mark.parametrize(
    ("victims", "time_s"), [((0, 3), 0.02), ((2, 3), 0.05), ((0, 1), 0.1), ((1, 4), 0.15)]
)
def test_deaths_while_communicators_come_and_go(tmp_path, victims, time_s):
    settings = {
        "HOPCOLL_FAULT": ";".join(f"rank={victim},time={time_s}" for victim in victims),
        "HOPCOLL_FAULT_RECORD": str(tmp_path / "fault"),
    }
    said = alike(play("deaths_and_splits", 5, silent=victims, settings=settings))
    assert said == {"alive": [r for r in range(5) if r not in victims], "died": True}
    assert all((tmp_path / f"fault.{victim}").exists() for victim in victims)


@VICTIMS
def test_on_failure_raise(victim):
    living = [rank for rank in range(3) if rank != victim]
    said = alike(play("raises", 3, victim, silent=[victim]))
    assert said == {"raised": [[victim], living, [victim], living]}


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_last_one_goes_on_alone(ranks):
    said = alike(play("all_but_one", ranks, silent=range(ranks - 1)))
    assert said == {"alive": [0]}
