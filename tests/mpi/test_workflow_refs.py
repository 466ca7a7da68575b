"""Workflows over objects in the ranks' memory, on real ranks, which die with what they have."""

from __future__ import annotations

import collections
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recovery.workflows import Workflow
from tests import launch
from tests.mpi.programs.workflow_refs import COUNT, SHAPES

PROGRAM = "tests.mpi.programs.workflow_refs"


def total(number: float) -> float:
    return COUNT * (COUNT - 1) / 2 + COUNT * number


def play(
    scene: str, store: Path, *deaths: str, ranks: int = 4, dead: tuple[int, ...] = (), code: int = 0
) -> Any:
    words = [word for death in deaths for word in ("--die", death)]
    ended = launch.run(ranks, "-m", PROGRAM, scene, store, *words)
    assert ended.code == code, str(ended)
    for death in deaths:
        name, rank = death.rsplit(":", 1)
        assert (store.parent / f"died-{name}-{rank}").exists(), f"{death} did not happen"
    return None if code else result(ended, ranks, dead)


def result(ended: launch.Ended, ranks: int = 4, dead: tuple[int, ...] = ()) -> Any:
    """What all ranks but the dead said, which is the same."""
    said = {line["rank"]: line["value"] for line in ended.said}
    assert sorted(said) == [rank for rank in range(ranks) if rank not in dead], str(ended)
    values = list(said.values())
    assert all(value == values[0] for value in values), said
    return values[0]


def ran(store: Path) -> collections.Counter[str]:
    """How often each task ran, wherever."""
    return collections.Counter(line.rpartition(" ")[0] for line in _lines(store))


def _lines(store: Path) -> list[str]:
    return (store.parent / "ran.txt").read_text().splitlines()


def ledger_of(store: Path) -> Any:
    ledger, _ = Workflow("refs", store)._folder.look()
    return ledger


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_a_reference_is_passed_and_nothing_goes_to_the_disk(store: Path) -> None:
    assert play("passing", store) == [total(1), total(1)]
    assert ran(store) == {"make 1": 1, "passes": 1, "total": 2}
    assert not (store / "refs" / "values").exists()
    journal = sum(path.stat().st_blocks * 512 for path in (store / "refs" / "journal").iterdir())
    assert journal < 4 << 20


@pytest.mark.parametrize("victim", [2, 3])
def test_the_rank_that_has_an_input_of_a_running_reduction_is_killed(
    store: Path, victim: int
) -> None:
    for _ in range(5):
        ended = launch.run(4, "-m", PROGRAM, "reduction", store, "--die", f"giving:{victim}")
        assert ended.code == 0, str(ended)
        if (store.parent / f"died-giving-{victim}").exists():
            break
        store = store.parent / "again" / "store"  # it was over before its victim saw it begin
        store.parent.mkdir()
    value = result(ended, dead=(victim,))
    assert value == [total(1) + total(2) + total(3)]
    again = {f"make {number}": 1 + (number == victim) for number in (1, 2, 3)}
    assert ran(store) == {**again, "adds": 1}
    why = {one: state.done.head.get("why", "") for one, state in ledger_of(store).states.items()}
    assert sum("references were lost" in text for text in why.values()) == 1


@pytest.mark.parametrize("victim", [2, 3])
def test_a_reduction_within_another_fails_as_the_rank_of_an_input_is_killed(
    store: Path, victim: int
) -> None:
    value = play("parts", store, f"at once:{victim}", dead=(victim,))
    assert value == [total(1) + total(2) + total(3)]
    again = {f"make {number}": 1 + (number == victim) for number in (1, 2, 3)}
    assert ran(store) == {**again, "adds": 1}


def test_the_rank_that_makes_an_object_is_killed(store: Path) -> None:
    assert play("passing", store, "make 1:1", dead=(1,)) == [total(1), total(1)]
    assert ran(store) == {"make 1": 2, "passes": 1, "total": 2}


def test_what_was_made_from_a_lost_object_that_is_another_now_runs_again(store: Path) -> None:
    early, late, other = play("void", store, "at once:3", dead=(3,))
    assert early == late == total(1 + 2000) and other == total(5)
    assert ran(store) == {"draw 1": 2, "make 5": 1, "look": 3, "late": 2}


def test_who_leads_is_killed_and_the_objects_of_others_stay(store: Path) -> None:
    """The next one knows of them from the journal."""
    assert play("succession", store, "later:0", dead=(0,)) == [total(1), total(2), total(3)]
    counts = ran(store)
    assert [counts[f"make {number}"] for number in (1, 2, 3)] == [1, 1, 1]
    assert counts["late"] == 6


def test_a_gang_returns_what_another_rank_than_the_leader_has_put(store: Path) -> None:
    assert play("of_a_gang", store) == [total(4)]
    ((_, maker),) = ledger_of(store).done("gang").head["refs"]
    assert maker == "gang"


def test_first_k_are_recorded(store: Path) -> None:
    (value,) = play("first_k", store)
    ((given, taken),) = ledger_of(store).done("firsts").head["k"]
    assert given == ["make", "make~2", "make~3"] and len(taken) == 2 and set(taken) < set(given)
    assert value == sum(total(given.index(name) + 1) for name in taken)


def test_a_reference_that_outlives_its_workflow_is_stored(store: Path) -> None:
    want = [total(1), total(2 + 1000)]
    assert play("stored", store) == want
    counts = ran(store)
    # In another job its objects are put again, and without ranks arrays stand in their place.
    assert play("stored", store, ranks=2) == want and ran(store) == counts
    arrays = Workflow("refs", store).output()
    assert [type(one) for one in arrays] == [np.ndarray] * 2
    assert [float(one.sum()) for one in arrays] == want


@pytest.mark.parametrize("ranks", [2, 5])
def test_a_job_goes_on_with_another_number_of_ranks(store: Path, ranks: int) -> None:
    """Its actor and its objects were on ranks that may not exist any more."""
    play("resized", store, code=1)
    assert ran(store) == {"make 1": 1, "add": 1, "passes": 1}
    before = _lines(store)
    assert {line.rpartition(" ")[2] for line in before} == {"2", "3"}
    assert play("resized", store, ranks=ranks) == [10.0 + 1 + 2, total(1)]
    # What is lost with the first job is made again, and the actor goes on from its checkpoint.
    again = {"make 1": 2, "passes": 1, "restore": 1, "add": 2, "make 2": 1, "total": 1}
    assert ran(store) == again
    places = {line.rpartition(" ")[2] for line in _lines(store)[len(before) :]}
    assert places <= {str(rank) for rank in range(ranks)} and len(places) > 1


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_arrays_without_elements(store: Path, ranks: tuple[int, int]) -> None:
    """Also where a rank is alone; the second job has them from the files of the first."""
    play("nothing", store, ranks=ranks[0], code=1)
    assert ran(store) == {"put nothing": 2, "add nothing": 1, "see nothing": 2}
    want = [[dtype, list(shape)] for shape in SHAPES for dtype in ("float64", "int16")]
    assert play("nothing", store, ranks=ranks[1]) == [want] * 6
    assert ran(store)["put nothing"] == 2 and ran(store)["add nothing"] == 1
    *_, kept = Workflow("refs", store).output()
    assert [[str(one.dtype), list(one.shape)] for one in kept["ref"]] == want


def test_ctrl_c_while_another_rank_is_called(store: Path) -> None:
    """As a terminal sends it: to the whole group."""
    job = launch.start(2, "-m", PROGRAM, "interrupted", store)
    try:
        assert job.stdout is not None
        said = sorted(job.stdout.readline().strip() for _ in range(3))
        assert said.pop() == "called", said
        os.killpg(job.pid, signal.SIGINT)
        job.communicate(timeout=30)
    finally:
        launch.end(job)
    assert job.returncode == 128 + signal.SIGINT
    assert launch.ended_processes([int(pid) for pid in said], within_s=0)
    assert ran(store) == {"make 1": 1, "effect before": 1, "held": 1}
    assert play("interrupted", store, ranks=2) == [total(1), None]
    assert ran(store) == {"make 1": 2, "effect before": 1, "held": 2, "effect after": 1}
