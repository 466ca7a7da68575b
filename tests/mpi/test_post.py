"""Letters between real ranks: where there is no room, where one is damaged, where a rank dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.mpi.programs.post import NBYTES, Crowded
from tests.mpi.test_shared_objects import play


def letters(
    scene: str, folder: Path, *, files: int = 0, dead: tuple[int, ...] = ()
) -> Any:
    settings = {
        "HOPCOLL_OBJECT_BYTES": str(5 * NBYTES),
        "HOPCOLL_OBJECT_SCRATCH": str(folder / "scratch"),
        "HOPCOLL_OBJECT_SCRATCH_BYTES": str(files * NBYTES),
    }
    program = "tests.mpi.programs.post"
    return play(scene, folder, ranks=2, dead=dead, settings=settings, program=program)


def test_a_rank_whose_memory_is_full_answers_when_there_is_room(tmp_path: Path) -> None:
    said = letters("full", tmp_path)
    assert said[0] == {"said": ["before", "fill", "after", "large" * (NBYTES // 5)], "refused": 0}
    assert said[1]["refused"] == Crowded.REFUSALS


def test_a_letter_whose_file_is_damaged_is_a_lost_attempt(tmp_path: Path) -> None:
    lost, after = letters("damaged", tmp_path, files=20)[0]["said"]
    assert "RankGoneError" in lost and "a letter from rank 0 to rank 1 is lost" in lost
    assert after == "after"


def test_what_a_dead_rank_has_not_read_is_deleted(tmp_path: Path) -> None:
    said = letters("unread", tmp_path, dead=(1,))[0]
    assert said == {"said": ["RankGoneError('rank 1 is gone')"] * 3, "used_bytes": 0}


def test_who_leads_and_has_no_room_for_a_call_fails_that_task_alone(tmp_path: Path) -> None:
    """Small ones travel all the same."""
    said = letters("leading", tmp_path)
    error, small, large = said[0]["value"]
    assert "rank 0 had no room for what goes to rank 1" in error
    assert f"of {5 * NBYTES} bytes are used at this rank (object_bytes" in error
    assert (small, large) == (5, NBYTES)
    assert said[1]["value"] == said[0]["value"]


def test_a_rank_that_has_no_room_for_a_call_fails_that_task_alone(tmp_path: Path) -> None:
    said = letters("called", tmp_path)
    error, small, large = said[0]["value"]
    assert "rank 1 had no room for what comes from rank 0" in error
    assert (small, large) == (5, NBYTES)
