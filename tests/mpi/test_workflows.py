"""Workflows with gangs on real ranks, which die at any point; the last of them leads."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from recovery.workflows import Workflow
from tests import launch

PROGRAM = "tests.mpi.programs.workflow"
#: The sum of what the ranks add up.
WHOLE = 499500.0


def job(store: Path, *deaths: str, ranks: int = 4, code: int = 0) -> launch.Ended:
    words = [word for death in deaths for word in ("--die", death)]
    ended = launch.run(ranks, "-m", PROGRAM, store, *words)
    assert ended.code == code, str(ended)
    for death in deaths:
        name, rank = death.split(":")
        assert (store.parent / f"died-{name}-{rank}").exists(), f"{death} did not happen"
    return ended


def alike(ended: launch.Ended, ranks: list[int]) -> list[Any]:
    """What the ranks that live have as the output, which has to be the same."""
    said = {line["rank"]: line["value"] for line in ended.said}
    assert sorted(said) == ranks, str(ended)
    assert len(set(said.values())) == 1, str(ended)
    return [one[0] for one in json.loads(said[ranks[0]])]


def published(store: Path) -> list[str]:
    with sqlite3.connect(store.parent / "world.db") as database:
        rows = database.execute("select what from published").fetchall()
    database.close()
    return [row[0] for row in rows]


def heads(store: Path) -> dict[str, dict[str, Any]]:
    """What the journal says of the tasks that are done."""
    ledger, _ = Workflow("gangs", store)._folder.look()
    assert ledger.status == "done"
    return {name: one.done.head for name, one in ledger.states.items() if one.done is not None}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_gangs(store: Path) -> None:
    ended = job(store)
    assert alike(ended, [0, 1, 2, 3]) == [WHOLE, 15.0, 2, 4.0]
    assert len(published(store)) == 1
    ran = [line["ran"] for line in ended.said if line["rank"] == 0][0]
    assert ran.count("fails_once") == 2 and ran.count("publish") == 1
    assert [line["ran"] for line in ended.said if line["rank"] != 0] == [[]] * 3
    found = heads(store)
    assert found["total"]["w"] == [0, 1, 2, 3] and not found["total"]["nd"]
    assert found["two"]["w"] == [0, 1] and found["step[5]"]["nd"]
    # Another job has the stored output.
    assert alike(job(store, ranks=2), [0, 1]) == [WHOLE, 15.0, 2, 4.0]
    assert len(published(store)) == 1


@pytest.mark.parametrize(
    ("deaths", "left", "total"),
    [
        # It was one of four that add up their shares.
        pytest.param(["total:1"], [0, 2, 3], WHOLE - sum(range(1, 1000, 4)), id="a member"),
        # The next one begins the task anew, with those who are left.
        pytest.param(["total:0"], [1, 2, 3], WHOLE, id="who leads, in a gang"),
        pytest.param(["step:2"], [0, 1, 3], WHOLE, id="in a loop"),
        pytest.param(["publish:0"], [1, 2, 3], WHOLE, id="who leads, after the effect"),
        # The second is the second of three.
        pytest.param(["load:0", "step:1"], [1, 3], WHOLE, id="who leads, and a member"),
    ],
)
def test_ranks_die(store: Path, deaths: list[str], left: list[int], total: float) -> None:
    value = alike(job(store, *deaths), left)
    assert value[:3] == [total, 15.0, 2] and value[3] in (2.0, 3.0, 4.0)
    found = heads(store)
    # A gang that lacks a rank cannot give its value again, whatever is said of it.
    assert found["total"]["nd"] == (len(found["total"]["w"]) < 4)
    assert len(published(store)) == 1
    assert json.loads(published(store)[0])[0] == [total]


def test_a_whole_job_is_killed_and_another_goes_on(store: Path) -> None:
    job(store, *(f"step:{rank}" for rank in range(4)), code=1)
    assert Workflow("gangs", store).status().state == "interrupted"
    ended = job(store, ranks=3)
    assert alike(ended, [0, 1, 2])[1:3] == [15.0, 2]
    ran = next(line["ran"] for line in ended.said if line["rank"] == 0)
    assert "load" not in ran and "step[1]" not in ran and "step[3]" in ran
    assert len(published(store)) == 1


def test_too_few_ranks(store: Path) -> None:
    ended = job(store, ranks=1, code=1)
    assert "TaskFailedError: two failed" in ended.stderr
    assert "two wants 2 ranks, and 1 are left" in ended.stderr
    assert alike(job(store, ranks=2), [0, 1])[2] == 2
