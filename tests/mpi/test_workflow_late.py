"""Gangs of which a rank comes late, or never: what bounds the wait of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recovery.workflows import Workflow
from tests import launch


def job(scene: str, folder: Path, *, ranks: int = 2, **settings: str) -> launch.Ended:
    names = {f"HOPCOLL_{name.upper()}": value for name, value in settings.items()}
    program = ("-m", "tests.mpi.programs.workflow_late", scene, folder / "store")
    return launch.run(ranks, *program, settings=names)


def values(ended: launch.Ended) -> dict[int, Any]:
    assert ended.code == 0, str(ended)
    return {line["rank"]: line["value"] for line in ended.said}


def test_a_rank_comes_to_a_gang_while_an_earlier_task_of_it_runs(tmp_path: Path) -> None:
    want = ["waited", [0, 1]]
    assert values(job("earlier", tmp_path)) == {0: want, 1: want}


def test_a_stopped_rank_of_a_gang_is_waited_for_as_long_as_any(tmp_path: Path) -> None:
    """`detect_s`; then a rank of its host kills it."""
    assert values(job("stopped", tmp_path, detect_s="2")) == {0: [[0, None]]}
    assert (tmp_path / "stopped").exists()


def test_a_rank_that_does_not_return_from_a_gang_ends_the_workflow(tmp_path: Path) -> None:
    """All say so, also the late one, and then another job goes on."""
    ended = job("stuck", tmp_path)
    assert ended.code == 1 and not ended.said, str(ended)
    text = "TaskFailedError: sticks did not end at all ranks within 0.2 s"
    assert ended.stderr.count(text) == 2, str(ended)
    assert "rank 1 was late; a rank that is stuck in a gang cannot be called" in ended.stderr
    status = Workflow("late", tmp_path / "store").status()
    assert status.state == "failed" and "sticks did not end" in str(status.error)
    assert values(job("stuck", tmp_path)) == {0: [[0, 1]], 1: [[0, 1]]}


def test_a_rank_that_comes_when_others_give_up_is_left_by_all_or_nobody(tmp_path: Path) -> None:
    """Whoever sees the others go must not take them for dead and go on alone."""
    ended = job("near", tmp_path, ranks=3)
    assert ended.code == 1 and not ended.said, str(ended)
    text = "TaskFailedError: nears did not end at all ranks within 0.2 s"
    assert ended.stderr.count(text) == 3, str(ended)


def test_a_gang_may_take_longer_than_a_call_may_wait(tmp_path: Path) -> None:
    """Who waits for its end, and for orders, does not count that."""
    assert values(job("long", tmp_path, timeout_s="1")) == {0: [[0]], 1: [[0]]}
