"""`hopcoll run` with real jobs: exit codes, deaths, signals; the jobs use MPI alone."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from hopcoll._rank import END_MARK
from tests import launch

ENDINGS = Path(__file__).with_name("programs") / "endings.py"


def survivors_of(ended: launch.Ended) -> set[int]:
    return {int(line.split()[1]) for line in ended.lines if line.endswith("is at its end")}


@pytest.mark.parametrize(
    ("ranks", "how", "concerned", "code", "survivors"),
    [
        (1, "nothing", (), 0, {0}),
        (3, "nothing", (), 0, {0, 1, 2}),
        (3, "kill", (1,), 0, {0, 2}),
        (3, "kill", (0,), 0, {1, 2}),
        (3, "kill", (0, 1), 0, {2}),
        (2, "segfault", (0,), 0, {1}),
        (2, "redirect", (0, 1), 0, {0, 1}),
        (3, "kill", (0, 1, 2), 1, set()),
        (3, "exit3", (1,), 3, {0, 2}),
        (3, "exception", (2,), 1, {0, 1}),
        (2, "exit7", (0, 1), 7, set()),
    ],
)
def test_exit_code(ranks, how, concerned, code, survivors):
    ended = launch.run(ranks, ENDINGS, how, *map(str, concerned))
    assert ended.code == code, str(ended)
    assert survivors_of(ended) == survivors, str(ended)
    assert END_MARK.decode() not in ended.stderr
    assert ("every rank died" in ended.stderr) == (not survivors and how == "kill")


def test_abort_ends_the_job_with_its_code():
    ended = launch.run(3, ENDINGS, "abort", "1")
    assert ended.code == 9, str(ended)


def test_a_module_and_its_arguments():
    ended = launch.run(2, "-m", "tests.mpi.programs.endings", "exit5", "0", "1")
    assert ended.code == 5, str(ended)


def test_another_program_than_python():
    ended = launch.run(2, "sh", "-c", "echo rank $OMPI_COMM_WORLD_RANK")
    assert ended.code == 0, str(ended)
    assert set(ended.lines) == {"rank 0", "rank 1"}
    assert launch.run(2, "sh", "-c", "exit 4").code == 4


def test_the_exception_of_a_rank_is_seen():
    ended = launch.run(2, ENDINGS, "exception", "1")
    assert "RuntimeError: this rank raises" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_process_behind(number):
    job = launch.start(3, ENDINGS, "wait", "0", "1", "2")
    try:
        ranks = [int(job.stdout.readline()) for _ in range(3)]
        # As a terminal sends Ctrl-C: to the whole group.
        os.killpg(job.pid, number)
        job.communicate(timeout=30)
    finally:
        launch.end(job)
    assert job.returncode == 128 + number
    assert launch.ended_processes(ranks, within_s=0)


@pytest.mark.parametrize("victim", ["launcher", "mpirun"])
def test_a_killed_launcher_leaves_no_process_behind(victim):
    job = launch.start(3, ENDINGS, "wait", "0", "1", "2")
    try:
        ranks = [int(job.stdout.readline()) for _ in range(3)]
        mpirun = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[0])
        os.kill(job.pid if victim == "launcher" else mpirun, signal.SIGKILL)
        job.communicate(timeout=30)
    finally:
        launch.end(job)
    assert launch.ended_processes([mpirun, *ranks], within_s=60)
    assert job.returncode == (-signal.SIGKILL if victim == "launcher" else 128 + signal.SIGKILL)
    # Else the next mpirun with this process id would take it for a server's, and not start.
    assert not Path(tempfile.gettempdir(), f"ompi.{mpirun}").exists()
