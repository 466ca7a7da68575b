"""Partial operations in real jobs: quorums, deadlines, what is carried, what is missed."""

from __future__ import annotations

import json
import re

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.partial"
BOTH = pytest.mark.parametrize(
    "settings", [{}, {"HOPCOLL_PROGRESS": "inline"}], ids=["thread", "inline"]
)
#: Rank 0 keeps the roll.
VICTIMS = pytest.mark.parametrize("victim", [0, 3])


def play(scene, ranks=4, victim=3, *, silent=(), **more):
    """What the ranks said, by rank; `silent` are those that do not get to say anything."""
    ended = launch.run(ranks, "-m", PROGRAM, scene, str(victim), **more)
    assert ended.code == 0, str(ended)
    said = {line.pop("rank"): line for line in ended.said}
    assert sorted(said) == [rank for rank in range(ranks) if rank not in silent], str(ended)
    return said


def alike(said):
    first = next(iter(said.values()))
    assert all(line == first for line in said.values()), said
    return first


@VICTIMS
def test_a_late_rank_holds_nobody_up(victim):
    said = play("quorum", victim=victim)
    others = [rank for rank in range(4) if rank != victim]
    for rank, line in said.items():
        assert line["seen"] == [others] * 8
        # Counted at the call: that the others have begun may not have reached it by then.
        assert 0 < line["late"] <= 8 if rank == victim else line["late"] == 0


@VICTIMS
def test_in_time(victim):
    everyone = [0, 1, 2, 3]
    others = [rank for rank in everyone if rank != victim]
    seen = alike(play("deadline", victim=victim))["seen"]
    assert all(line and set(line) <= set(others) for line in seen[::3])
    assert seen[1::3] == seen[2::3] == [everyone] * 4


@VICTIMS
def test_the_first_is_in_time(victim):
    assert alike(play("alone_in_time", victim=victim)) == {"seen": [[victim]]}


@BOTH
def test_what_is_late_counts_once(settings):
    said = play("carry", settings=settings)
    assert all(line["right"] for line in said.values())


def test_what_nobody_keeps_is_missed():
    said = play("missed")
    late = said.pop(3)
    assert alike(said) == {"missed": [], "had": list(range(10)), "total": 150.0, "given": 10}
    assert late["missed"] == list(range(1, 8))      # operation 0 is a Barrier
    assert late["had"] == [7, 8, 9]


def test_nobody_runs_ahead_for_ever():
    said = play("bound")
    late = said.pop(3)
    assert all(line["next_s"] >= late["begin_s"] for line in said.values())


@VICTIMS
def test_fewer_alive_than_asked_for(victim):
    others = [rank for rank in range(4) if rank != victim]
    assert alike(play("few", victim=victim, silent=[victim]))["seen"] == [others] * 4


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("fault", ["op=20,chunk=0", "op=41,chunk=3", "op=61,chunk=1"])
def test_a_death_in_the_middle(tmp_path, victim, fault):
    settings = {
        "HOPCOLL_FAULT": f"rank={victim},{fault}",
        "HOPCOLL_FAULT_RECORD": str(tmp_path / "fault"),
    }
    said = alike(play("death", victim=victim, silent=[victim], settings=settings))
    assert json.loads((tmp_path / f"fault.{victim}").read_text())["op"] >= 20
    assert said["alive"] == [rank for rank in range(4) if rank != victim]


def test_arguments_that_differ():
    first, second = alike(play("differ"))["messages"]
    # Those who have come so far are enough to tell.
    assert re.search(r"ranks? [012, ]+ called Allreduce\(float64, .* op=SUM, quorum=1\)", first)
    assert "rank 3 called Allreduce(float64, count=10, op=SUM, quorum=2)" in first
    assert "late='carry', name" in second


@VICTIMS
def test_in_a_communicator_that_was_split_off(victim):
    others = [3 - rank for rank in range(3, -1, -1) if rank != victim]
    seen = alike(play("in_a_branch", victim=victim))["seen"]
    assert seen[::2] == [others] * 4
    assert all(line and set(line) <= set(others) for line in seen[1::2])


@VICTIMS
def test_a_bcast_goes_around_a_late_rank(victim):
    said = play("detour", victim=victim)
    for line in said.values():
        assert line["seen"] == [[0, 1, 2, 3]] * 9
    assert sum(line["detours"] for line in said.values()) > 0


@BOTH
def test_the_order_of_arrival(settings):
    assert alike(play("arrival", settings=settings))["seen"] == [[0, 1, 2, 3]] * 32


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("fault", ["op=12,chunk=9", "op=13,chunk=3"])
def test_a_death_in_the_order_of_arrival(tmp_path, victim, fault):
    settings = {
        "HOPCOLL_FAULT": f"rank={victim},{fault}",
        "HOPCOLL_FAULT_RECORD": str(tmp_path / "fault"),
    }
    said = alike(play("arrival_death", victim=victim, silent=[victim], settings=settings))
    assert json.loads((tmp_path / f"fault.{victim}").read_text())["op"] >= 12
    survivors = [rank for rank in range(4) if rank != victim]
    assert said["alive"] == survivors
    assert said["seen"][0] == [0, 1, 2, 3] and said["seen"][-1] == survivors


def test_alone():
    assert play("quorum", ranks=1, victim=7)[0]["seen"] == [[0]] * 8
