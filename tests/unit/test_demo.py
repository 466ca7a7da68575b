"""What the demo concludes from the logs and files of its jobs, and that it leaves no process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recovery
from examples import demo
from tests import launch

#: Two processes in sessions of their own, one of them the grandchild of a process that ends.
FAMILY = """\
import os, subprocess, sys
wait = [sys.executable, "-c", "print('ready', flush=True); import signal; signal.pause()"]
orphan = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session={0})"
subprocess.run([sys.executable, "-c", orphan.format(False), *wait])
subprocess.Popen(wait, start_new_session=True).wait()
"""


def write_log(job: demo.Job, lines: list[dict[str, Any]]) -> None:
    job.log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(step: int, time_ns: int, contributors: list[int], loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "time_ns": time_ns, "contributors": contributors, "loss": loss}


def test_kill_job_leaves_no_process() -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert [job.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    sessions = {job.pid}
    family = demo.find_processes(sessions)
    assert job.pid in family
    assert len(family) == 3
    assert len(sessions) == 2
    demo.kill_job(job)
    assert job.returncode == -9
    assert job.stdout.read() == ""  # the pipe is closed: nobody has it open any more
    job.stdout.close()
    assert launch.ended_processes(family, within_s=0)


def test_a_kill_is_read_from_record_and_log(tmp_path: Path) -> None:
    job = demo.Job(tmp_path, "survived")
    record = Path(f"{job.record}.2")
    record.write_text('{"rank": 2, "moved_bytes": 3, "total_bytes": 9}\n')
    os.utime(record, ns=(50_000_000, 50_000_000))
    everyone, survivors = [0, 1, 2, 3], [0, 1, 3]
    lines = [
        line(1, 10_000_000, everyone),
        line(2, 51_000_000, everyone),  # a survivor was late with it
        line(3, 62_500_000, survivors),
        line(4, 70_000_000, survivors),
        {**line(demo.STEPS, 80_000_000, survivors), "accuracy": 1.0},
    ]
    write_log(job, lines)
    with open(job.log, "a") as log:
        log.write('{"step": 5, "half a li')
    kill = job.kill(2, 3)
    assert kill.recovery_ms == 12.5
    assert (kill.contributors_before, kill.contributors_after) == (everyone, survivors)
    assert sorted(job.steps()) == [1, 2, 3, 4, demo.STEPS]
    assert job.accuracy() == 1.0
    with pytest.raises(demo.DemoError, match="did not fire"):
        job.kill(1, 3)
    write_log(job, lines[:2])
    with pytest.raises(demo.DemoError, match="both sides"):
        job.kill(2, 3)
    with pytest.raises(demo.DemoError, match="did not say"):
        job.accuracy()


@pytest.mark.parametrize("difference", ["none", "state", "step", "loss"])
def test_identical_means_every_bit(tmp_path: Path, difference: str) -> None:
    jobs = [demo.Job(tmp_path, name) for name in ("left", "right")]
    for job in jobs:
        other = job.name == "right"
        state = np.zeros(5, np.float32)
        if other and difference == "state":
            state[3] = -0.0  # equal, but not the same bits
        step = demo.STEPS - (other and difference == "step")
        with recovery.CheckpointStore(job.checkpoints) as store:
            store.save_sync(step, {"state": {"parameters": state}, "session": {}})
        write_log(job, [line(1, 1, [0], loss=2.0 if other and difference == "loss" else 1.0)])
    assert demo.identical(*jobs) is (difference == "none")


GOOD = {
    "accuracy": 0.97,
    "accuracy_undisturbed": 0.98,
    "contributors_before": [0, 1, 2, 3],
    "contributors_after": [0, 2, 3],
    "killed_rank": 1,
    "killed_after_bytes": 5,
    "of_bytes": 9,
    "resumed_from_step": 80,
    "resumed_killed_after_step": 87,
    "resumed_identical": True,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 0.94),
        ("accuracy_undisturbed", 0.94),
        ("contributors_before", [0, 1, 2]),
        ("contributors_after", [0, 1, 2, 3]),
        ("killed_after_bytes", 0),
        ("killed_after_bytes", 9),
        ("resumed_from_step", 0),
        ("resumed_identical", False),
    ],
)
def test_every_broken_promise_is_a_problem(name: str, value: Any) -> None:
    assert demo.find_problems(GOOD) == []
    assert len(demo.find_problems({**GOOD, name: value})) == 1


def test_an_earlier_demo_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    for name in ("survived.jsonl", "survived-fault.2", "thesis.txt"):
        (tmp_path / name).write_text("old")
    recovery.CheckpointStore(tmp_path / "survived").close()
    demo.Job(tmp_path, "survived")
    assert os.listdir(tmp_path) == ["thesis.txt"]
