"""Leaving, interrupting, forking, forgetting: what one rank does, and what the others see."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hopcoll._orphans import forget_session
from hopcoll.launcher import find_mpirun
from tests import launch

PROGRAM = "tests.mpi.programs.life"
THREE = [0, 1, 2]
INLINE = {"HOPCOLL_PROGRESS": "inline"}


def play(scene, code=0, ranks=3, **more):
    ended = launch.run(ranks, "-m", PROGRAM, scene, **more)
    assert ended.code == code, str(ended)
    return ended


def by_rank(ended, expected):
    said = {line.pop("rank"): line for line in ended.said}
    assert sorted(said) == list(expected), str(ended)
    return said


def alike(ended, expected=THREE):
    """What all ranks said, which has to be the same."""
    said = by_rank(ended, expected)
    assert len({str(line) for line in said.values()}) == 1, str(ended)
    return said[expected[0]]


# ---- leaving ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scene", "code"),
    [
        ("exception", 1),
        ("exception_with_requests", 1),
        ("sys_exit", 3),
        ("killed", 0),
        ("os_exit", 0),  # a death
        ("forked_then_killed", 0),
        ("killed_then_exit_code", 5),
        ("interrupt_uncaught", 0),  # Python ends by SIGINT then, and a signal is a death
    ],
)
def test_the_others_go_on_without_a_rank_that_leaves(scene, code):
    ended = play(scene, code)
    assert alike(ended, [0, 2])["alive"] == [0, 2]
    assert alike(ended, [0, 2])["epoch"] == 1


@pytest.mark.parametrize("scene", ["exception", "exception_with_requests", "killed"])
def test_the_others_go_on_without_the_progress_thread(scene):
    ended = play(scene, 0 if scene == "killed" else 1, settings=INLINE)
    assert alike(ended, [0, 2])["alive"] == [0, 2]


def test_the_traceback_of_an_exception_is_shown():
    assert "RuntimeError: this rank has had enough" in play("exception", 1).stderr


def test_an_exception_leaves_a_with_block_at_once():
    ended = play("exception_inside_with")
    assert alike(ended, [0, 2])["alive"] == [0, 2]


def test_closing_early_is_leaving():
    said = by_rank(play("close_early"), THREE)
    assert said[1] == {"closed": "the communicator is closed"}
    assert said[0]["alive"] == said[2]["alive"] == [0, 2]


def test_the_exit_code_is_the_programs():
    assert len(play("sys_exit_everywhere", 7).said) == 3


@pytest.mark.parametrize("settings", [{}, INLINE], ids=["thread", "inline"])
def test_a_rank_may_end_with_requests_that_nobody_waited_for(settings):
    said = alike(play("pending_at_exit", settings=settings), [0, 2])
    assert said == {"contributors": [THREE, THREE], "correct": True}


def test_a_process_may_leave_at_once_when_it_has_closed():
    assert len(play("os_exit_everywhere").said) == 3


# ---- requests ---------------------------------------------------------------------------------


def test_a_request_that_is_garbage_collected_goes_on():
    assert alike(play("collected")) == {"contributors": THREE, "correct": True}


@pytest.mark.parametrize("settings", [{}, INLINE], ids=["thread", "inline"])
def test_ctrl_c_inside_a_wait(settings):
    said = alike(play("interrupt", settings=settings))
    assert said == {"interrupted": True, "contributors": [THREE, THREE], "correct": True}


@pytest.mark.parametrize("settings", [{}, INLINE], ids=["thread", "inline"])
def test_ctrl_c_while_closing(settings):
    said = by_rank(play("interrupt_while_closing", settings=settings), THREE)
    assert said[1] == {"closed": True}
    assert said[0]["alive"] == said[2]["alive"] == [0, 2]


@pytest.mark.parametrize("settings", [{}, INLINE], ids=["thread", "inline"])
def test_the_program_ends_mpi_itself(settings):
    assert alike(play("mpi_finalize", settings=settings)) == {"contributors": THREE}
    assert alike(play("mpi_finalize_by_one", settings=settings), [0, 2])["alive"] == [0, 2]


def test_a_start_that_waits_keeps_to_its_limit():
    assert alike(play("too_many_open")) == {"refused": True}


def test_a_dropped_request_lets_go_of_its_buffers():
    assert alike(play("dropped_when_complete")) == {"lives": False}


@pytest.mark.parametrize("settings", [{}, INLINE], ids=["thread", "inline"])
def test_timeout(settings):
    said = by_rank(play("timeout", settings=settings), THREE)
    assert [said[rank]["timeouts"] for rank in THREE] == [3, 0, 3]
    assert all(line["contributors"] == THREE and line["correct"] for line in said.values())


def test_outcomes_become_stable():
    assert alike(play("stable")) == {"stable": True}


# ---- fork -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, INLINE], ids=["thread", "inline"])
def test_the_child_of_a_fork_is_refused_and_ends_well(settings):
    assert alike(play("fork", settings=settings)) == {"child": 46, "contributors": THREE}


def test_processes_of_a_data_loader():
    said = alike(play("data_loader"))
    assert said == {"squares": 328350, "out": "out", "contributors": THREE}


# ---- communicators ----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [3, 5])
def test_communicators_over_parts_of_the_world(ranks):
    said = by_rank(play("split", ranks=ranks), range(ranks))
    for rank, line in said.items():
        part = list(range(rank % 2, ranks, 2))[::-1]
        assert line == {"part": [part.index(rank), len(part), True], "epoch": 0}


def test_init():
    said = alike(play("init"))
    assert said["contributors"] == THREE
    assert said["refused"].startswith("settings {'timeout_s': 31} differ")


def test_settings_that_differ_are_refused_everywhere():
    for line in by_rank(play("settings_differ"), THREE).values():
        assert line["message"].startswith("settings differ between ranks")
        assert "1024" in line["message"] and "2048" in line["message"]
        assert line["contributors"] == THREE


def test_what_is_no_communicator():
    messages = alike(play("no_communicator"))["messages"]
    assert len(messages) == 5
    assert all(message.startswith("comm ") for message in messages)
    assert "COMM_NULL" in messages[2]


def test_counters():
    assert alike(play("counters")) == {"ballots": 0, "sent": True}


def test_more_than_two_gib():
    said = alike(play("over_two_gib", ranks=2, timeout_s=120), [0, 1])
    assert said == {"marks": 2149, "last": 9, "right": True}


# ---- what is said at the start ------------------------------------------------------------------


def plain_mpirun(ranks, *words, settings=None):
    """The same, but started by mpirun itself."""
    command = [find_mpirun().path, "--map-by", ":OVERSUBSCRIBE", "-n", str(ranks)]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    return subprocess.run(
        [*command, *words],
        cwd=launch.ROOT,
        env=launch.environment(settings),
        capture_output=True,
        text=True,
        timeout=60,
        # As `hopcoll run` does: of this id there may have been one that a test killed.
        preexec_fn=lambda: forget_session(os.getpid()),
    )


SCENE = (sys.executable, "-m", PROGRAM)


def notices(stderr):
    return [line for line in stderr.splitlines() if line.startswith("hopcoll:")]


def test_the_launcher_leaves_nothing_to_be_said():
    assert notices(play("stable").stderr) == []


def test_plain_mpirun_survives_a_death_and_says_what_was_left_undone():
    ended = plain_mpirun(3, "--with-ft", "ulfm", *SCENE, "killed")
    assert ended.returncode == 0, ended
    assert ended.stdout.count('"alive": [0, 2]') == 2
    (line,) = notices(ended.stderr)
    assert "not started by 'hopcoll run'" in line


def test_plain_mpirun_without_fault_tolerance_says_that_a_death_ends_the_job():
    ended = plain_mpirun(2, *SCENE, "stable")
    assert ended.returncode == 0, ended
    (line,) = notices(ended.stderr)
    assert "a death will end the job" in line


def test_it_can_be_silenced():
    ended = plain_mpirun(2, *SCENE, "stable", settings={"HOPCOLL_QUIET": "1"})
    assert notices(ended.stderr) == []


def test_one_rank_has_nothing_to_lose():
    assert notices(plain_mpirun(1, *SCENE, "init").stderr) == []


def test_without_fault_tolerance_an_exception_ends_the_job():
    ended = plain_mpirun(3, *SCENE, "exception")
    assert ended.returncode == 1, ended
    assert "RuntimeError: this rank has had enough" in ended.stderr
