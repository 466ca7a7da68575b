"""What MPI does not notice: stopped processes and pulled cables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab import Lab
from tests import launch

PROGRAM = Path(launch.ROOT, "tests/mpi/programs/silence.py")
SETTINGS = {"HOPCOLL_DETECT_S": "1.5"}
NAME = f"hs{os.getpid()}"


def await_that(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    until_s = time.monotonic() + 40
    while not condition():
        if time.monotonic() > until_s or job.poll() is not None:
            job.terminate()
            raise AssertionError(f"it never came to that: {job.communicate(timeout=20)}")
        time.sleep(0.02)


def said_by(job: subprocess.Popen[str]) -> dict[int, dict[str, Any]]:
    stdout, stderr = job.communicate(timeout=40)
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    said = {line["rank"]: line for line in lines}
    assert all(line["wrong"] == 0 for line in lines), stderr
    return said


@pytest.mark.parametrize("victims", [(2,), (0,), (0, 3)])
def test_a_stopped_rank_is_killed_and_the_others_go_on(tmp_path, victims):
    job = launch.start(4, PROGRAM, str(tmp_path), *map(str, victims), settings=SETTINGS)
    try:
        alive = [rank for rank in range(4) if rank not in victims]
        await_that(lambda: len(list(tmp_path.glob("seen.*.2"))) == len(alive), job)
        pids = [int((tmp_path / f"stopped.{rank}").read_text()) for rank in victims]
        assert launch.ended_processes(pids)
        (tmp_path / "over").touch()
        said = said_by(job)
    finally:
        launch.end(job)
    assert sorted(said) == alive
    assert job.returncode == 0
    for line in said.values():
        assert line["seen"][0] == [0, 1, 2, 3]
        assert line["seen"][-1] == alive
        assert line["seen"] == said[alive[0]]["seen"]
        assert line["lost"] == 0
    assert sum(line["fenced"] for line in said.values()) >= len(victims)


def test_a_short_stop_costs_nothing_but_time(tmp_path):
    job = launch.start(3, PROGRAM, str(tmp_path), "1", settings=SETTINGS)
    try:
        await_that((tmp_path / "stopped.1").exists, job)
        time.sleep(1.0)  # that is what is tested: less than detect_s, more than half of it
        os.kill(int((tmp_path / "stopped.1").read_text()), signal.SIGCONT)
        (tmp_path / "over").touch()
        said = said_by(job)
    finally:
        launch.end(job)
    assert sorted(said) == [0, 1, 2]
    assert job.returncode == 0
    assert all(line["seen"] == [[0, 1, 2]] and line["epoch"] == 0 for line in said.values())
    assert said[1]["pauses"] == 1


def start_on(lab: Lab, folder: Path) -> subprocess.Popen[str]:
    return lab.start(
        str(PROGRAM),
        str(folder),
        ranks=len(lab.hosts),
        cwd=launch.ROOT,
        env=launch.environment(SETTINGS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def lab():
    why_not = launch.why_no_lab()
    if why_not:
        pytest.skip(why_not)
    with Lab(4, name=NAME) as made:
        yield made


def test_more_than_half_go_on_without_a_host_out_of_reach(tmp_path, lab):
    job = start_on(lab, tmp_path)
    try:
        await_that(lambda: len(list(tmp_path.glob("seen.*.1"))) == 4, job)
        lab.cable(3, plugged=False)
        await_that(lambda: len(list(tmp_path.glob("seen.*.2"))) == 3, job)
        lab.cable(3, plugged=True)
        await_that((tmp_path / "failed.2").exists, job)
        (tmp_path / "over").touch()
        said = said_by(job)
    finally:
        lab.cable(3, plugged=True)
        launch.end(job)
    # Who was out of reach has stopped by itself, or was told by the others.
    assert said.pop(2)["error"] in ("StaleEpochError", "MinorityError")
    assert sorted(said) == [0, 1, 3]
    for line in said.values():
        assert line["seen"] == [[0, 1, 2, 3], [0, 1, 3]]
        assert line["error"] == ""
        assert line["lost"] == 1


def test_half_of_the_ranks_do_not_go_on(tmp_path, lab):
    job = start_on(lab, tmp_path)
    try:
        await_that(lambda: len(list(tmp_path.glob("seen.*.1"))) == 4, job)
        for host in (3, 4):
            lab.cable(host, plugged=False)
        await_that(lambda: len(list(tmp_path.glob("failed.*"))) == 4, job)
        for host in (3, 4):
            lab.cable(host, plugged=True)
        said = said_by(job)
    finally:
        for host in (3, 4):
            lab.cable(host, plugged=True)
        launch.end(job)
    assert sorted(said) == [0, 1, 2, 3]
    assert all(line["error"] == "MinorityError" for line in said.values()), said
    assert all(line["seen"] == [[0, 1, 2, 3]] for line in said.values())
    assert said[0]["ranks"] == [2, 3]
