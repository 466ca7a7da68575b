"""Objects that do not fit into memory on real ranks: their files, and what becomes of these."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mpi.test_shared_objects import INLINE, play

NBYTES = 800_000
ROOM = 4
PROGRAM = "tests.mpi.programs.spilled_objects"
EMPTY = {"used_bytes": 0, "streams": 0}


def spill(tmp_path, scene, *, ranks=4, dead=(), files=100, settings=None):
    """Room for a few objects in memory, and for so many in files, in a directory of the test's."""
    given = {
        "HOPCOLL_OBJECT_BYTES": str(ROOM * NBYTES),
        "HOPCOLL_OBJECT_SCRATCH": str(tmp_path / "scratch"),
        "HOPCOLL_OBJECT_SCRATCH_BYTES": str(files * NBYTES),
        **(settings or {}),
    }
    return play(scene, ranks=ranks, dead=dead, settings=given, program=PROGRAM)


@pytest.mark.parametrize(
    ("ranks", "settings"), [(1, None), (2, None), (4, None), (4, INLINE), (1, INLINE)]
)
def test_three_times_as_much_as_fits(tmp_path, ranks, settings):
    said = spill(tmp_path, "more_than_memory", ranks=ranks, settings=settings)
    good = dict.fromkeys(("right", "within", "spilled", "restored"), True)
    assert all(seen == {**good, "left": EMPTY, "files": 0} for seen in said.values()), said
    assert not list(tmp_path.glob("scratch/*"))


@pytest.mark.parametrize("settings", [None, INLINE])
def test_inputs_of_a_reduction(tmp_path, settings):
    said = spill(tmp_path, "reduced", settings=settings)
    want = {"right": True, "restored": True, "left": EMPTY, "files": 0}
    assert all(seen == want for seen in said.values()), said


def test_a_rank_is_killed_while_it_writes(tmp_path):
    said = spill(tmp_path, "killed", dead=[1])
    folders = {seen.pop("folder") for seen in said.values()}
    assert all(seen == {"right": True, "files": True} for seen in said.values()), said
    (folder,) = folders
    assert Path(folder).parent == tmp_path / "scratch"
    assert not list(tmp_path.glob("scratch/*"))  # the launcher has removed what was left


def test_files_that_cannot_be_read(tmp_path):
    said = spill(tmp_path, "damaged", ranks=3)
    lost = "ObjectLostError"
    assert said[0] == {"other": True, "ends": [lost, lost], "error": True, "unread": 3}
    assert said[1] == {"right": True}


def test_what_is_in_the_way_is_said(tmp_path):
    (seen,) = spill(tmp_path, "full", ranks=1, files=6).values()
    for text in (seen["views"], seen["files"], seen["disk"]):
        assert f"of {NBYTES} bytes does not fit: {ROOM * NBYTES} of {ROOM * NBYTES} bytes" in text
        assert str(tmp_path / "scratch") in text
        assert "let go of arrays" in text
    assert "0 of 4800000 bytes are in files" in seen["views"]
    assert "4800000 of 4800000 bytes are in files" in seen["files"]
    assert "something failed" not in seen["files"]
    assert "something failed: OSError: [Errno 28] No space left on device" in seen["disk"]
    assert seen["kept"]
    assert seen["again"] == 1


def test_a_directory_that_is_none(tmp_path):
    tmp_path.joinpath("scratch").write_text("a file")
    for seen in spill(tmp_path, "unwritable", ranks=2).values():
        assert "something failed: NotADirectoryError" in seen["text"]
        assert seen["right"]


def test_without_files(tmp_path):
    for seen in spill(tmp_path, "unwritable", ranks=1, files=0).values():
        assert "object_scratch_bytes is 0" in seen["text"]


def test_a_disk_that_hangs(tmp_path):
    said = spill(tmp_path, "hung", ranks=3)
    total = {"right": True, "total": 3}
    assert said[0] == {**total, "late": "TransferTimeoutError", "then": "none"}
    assert said[1] == said[2] == total


def test_the_end_removes_the_files(tmp_path):
    said = spill(tmp_path, "left_open", ranks=2)
    assert all(seen["files"] for seen in said.values())
    assert not list(tmp_path.glob("scratch/*"))
