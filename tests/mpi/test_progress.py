"""A rank in a Python loop that holds the GIL still works for the others."""

from __future__ import annotations

import mmap

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.progress"


def play(tmp_path, scene, **more):
    shared = tmp_path / "shared"
    shared.write_bytes(bytes(mmap.PAGESIZE))
    ended = launch.run(3, "-m", PROGRAM, scene, str(shared), **more)
    assert ended.code == 0, str(ended)
    said = {line["rank"]: line for line in ended.said}
    assert all(line["right"] for line in said.values()), str(ended)
    return said


@pytest.mark.parametrize("scene", ["relay", "answer"])
def test_a_rank_in_a_loop(tmp_path, scene):
    """It leaves the loop only when the others are through; otherwise the job hangs."""
    said = play(tmp_path, scene)
    assert sorted(said) == [0, 1, 2]
    assert said[1]["seen"] is True


def test_a_death_is_repaired_around_a_rank_in_a_loop(tmp_path):
    said = play(tmp_path, "repair")
    assert sorted(said) == [1, 2]
    assert said[1]["seen"] is True
    assert said[1]["who"] == said[2]["who"] == [1, 2]


def test_without_the_thread_others_wait_for_the_next_call(tmp_path):
    inline = {"HOPCOLL_PROGRESS": "inline"}
    said = play(tmp_path, "nothing_without_the_thread", settings=inline)
    assert said[1]["seen"] is False
