"""Ranks that are killed in the middle of a Gather, Allgather, Scatter, Alltoall, Reduce_scatter or
scan: all survivors have the same outcome, what it says is in their buffers, and they go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.family_faults"
RANKS = 4
ROOTED = ["gather", "gatherv", "scatter", "scatterv"]
FOR_ALL = [
    *("allgather", "allgatherv", "alltoall", "alltoallv"),
    *("reduce_scatter_block", "reduce_scatter", "scan", "exscan"),
]
#: Root and victim. Rank 0 coordinates what the survivors decide.
ROOT_AND_VICTIM = [(1, 2), (1, 1), (1, 0), (0, 0)]


class Play:
    """A job that is hurt, and what is true of each of them."""

    def __init__(self, folder: Path, form: str, victims: list[int], *faults: str, **more: Any):
        self.form, self.victims = form, victims
        self.root, self.on_failure = more.get("root", 0), more.get("on_failure", "survivors")
        record = folder / "fault"
        settings = {"HOPCOLL_FAULT": ";".join(faults), "HOPCOLL_FAULT_RECORD": str(record)}
        words = [form, self.root, int(more.get("in_place", False)), self.on_failure]
        self.ended = launch.run(
            RANKS, "-m", PROGRAM, *map(str, words), settings=settings | more.get("settings", {})
        )
        self.survivors = [rank for rank in range(RANKS) if rank not in victims]
        said = {line.pop("rank"): line for line in self.ended.said}
        assert self.ended.code == 0, str(self.ended)
        assert sorted(said) == self.survivors, str(self.ended)
        # The faults fired, the first of them in the middle of the operation.
        self.fired = [json.loads((folder / f"fault.{rank}").read_text()) for rank in victims]
        assert self.fired[0]["op"] == 1
        assert 0 < self.fired[0]["moved_bytes"] < self.fired[0]["total_bytes"]
        # Everybody says the same, and nobody found anything wrong.
        self.all = said[self.survivors[0]]
        assert all(line == self.all for line in said.values()), str(self.ended)
        assert self.all["wrong"] == [], str(self.ended)
        for key in ("after", "last", "alive"):
            assert self.all[key] == self.survivors, str(self.ended)
        assert 1 <= self.all["epoch"] <= len(victims)
        assert len(self.all["seen"]) == 3
        for seen in self.all["seen"]:
            if "contributors" in seen:
                assert set(self.survivors) <= set(seen["contributors"])

    @property
    def struck(self) -> dict[str, Any]:
        """How the operation ended in whose middle the first victim died."""
        outcome: dict[str, Any] = self.all["seen"][0]
        return outcome


@pytest.mark.parametrize(("root", "victim"), ROOT_AND_VICTIM)
@pytest.mark.parametrize("form", ROOTED)
def test_a_death_in_what_has_a_root(tmp_path, form, root, victim):
    fault = f"rank={victim},op=1,chunk=40"
    play = Play(tmp_path, form, [victim], fault, root=root, in_place=victim == 2)
    if victim != root:
        assert "contributors" in play.struck
        # The root lacks a part of what the dead had; what it had for the dead nobody misses.
        assert (victim in play.struck["contributors"]) == form.startswith("scatter")
    elif form.startswith("gather"):
        assert play.struck == {"root_lost": True, "epoch": 1}
        assert play.all["seen"] == [play.struck] * 3
    else:
        assert play.struck == {"failed": [root], "epoch": 1}


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("form", FOR_ALL)
def test_a_death_in_what_all_have_a_result_of(tmp_path, form, victim):
    fault = f"rank={victim},op=1,chunk=40"
    play = Play(tmp_path, form, [victim], fault, in_place=victim == 2)
    assert play.struck == {"contributors": play.survivors, "epoch": 1}


@pytest.mark.parametrize("form", ["scan", "exscan"])
def test_the_last_of_a_scan_dies(tmp_path, form):
    """Nobody misses what it had, so that the results of the others may stand."""
    play = Play(tmp_path, form, [3], "rank=3,op=1,chunk=40")
    assert "contributors" in play.struck


@pytest.mark.parametrize("form", ["gather", "scatterv", "allgather", "alltoallv", "exscan"])
def test_a_death_under_raise(tmp_path, form):
    """With IN_PLACE the input is given back, which the program checks."""
    fault = "rank=2,op=1,chunk=40"
    play = Play(tmp_path, form, [2], fault, root=1, in_place=True, on_failure="raise")
    if not form.startswith("scatter"):  # all who live have their blocks
        assert play.struck == {"failed": [2], "epoch": 1}


@pytest.mark.parametrize(
    "form", ["gatherv", "scatterv", "alltoall", "reduce_scatter"]
)
def test_the_new_coordinator_dies_while_they_decide(tmp_path, form):
    faults = ("rank=0,op=1,chunk=40", "rank=1,ballot=1,send=1")
    play = Play(tmp_path, form, [0, 1], *faults, root=2)
    assert play.fired[1]["trigger"] == "ballot"
    assert "contributors" in play.struck


@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize("form", ["alltoallv"])
def test_a_death_without_the_progress_thread(tmp_path, form, victim):
    fault, settings = f"rank={victim},op=1,chunk=40", {"HOPCOLL_PROGRESS": "inline"}
    play = Play(tmp_path, form, [victim], fault, root=1, settings=settings)
    assert play.struck == {"contributors": play.survivors, "epoch": 1}
