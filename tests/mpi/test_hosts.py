"""Jobs over several hosts: a lab of network namespaces, each with a wire and a name.

They need root and iproute2; a job then starts as it would over ssh, with another agent.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.lab import Lab
from tests import launch

PROGRAM = "tests.mpi.programs.hosts"
HOSTS = 3
RANKS = 2 * HOSTS


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if reason := launch.why_no_lab(limits_rates=False):
        pytest.skip(reason)
    with Lab(HOSTS, name=f"hc{os.getpid()}") as made:
        yield made


def start(lab: Lab, *program: str, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    return lab.start(
        *program,
        ranks=RANKS,
        options=options,
        cwd=launch.ROOT,
        env=launch.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param((), id="nobody"),
        pytest.param((3,), id="one on a further host"),
        pytest.param((0,), id="the coordinator, beside mpirun"),
        pytest.param((4, 5), id="all of a host"),
        pytest.param((0, 1, 2, 3, 4), id="all but one"),
    ],
)
def test_a_survived_death_ends_with_code_0(lab: Lab, victims: tuple[int, ...]) -> None:
    job = start(lab, "-m", PROGRAM, ",".join(map(str, victims)))
    try:
        stdout, stderr = job.communicate(timeout=60)
    finally:
        launch.end(job)
    ended = launch.Ended(job.returncode, stdout, stderr, 0.0)
    assert ended.code == 0, str(ended)
    survivors = [rank for rank in range(RANKS) if rank not in victims]
    said = {line["rank"]: line for line in ended.said}
    assert sorted(said) == survivors, str(ended)
    assert all(line["right"] for line in said.values()), str(ended)
    assert all(line["who"] == survivors for line in said.values()), str(ended)
    assert len({line["host"] for line in said.values()}) == len({r // 2 for r in survivors})


@pytest.mark.parametrize("options", [(), ("--restarts", "9")])
def test_ctrl_c_leaves_no_process_on_any_host(lab: Lab, options: Sequence[str]) -> None:
    program = ("-m", "tests.mpi.programs.endings", "wait", *map(str, range(RANKS)))
    job = start(lab, *program, options=options)
    try:
        assert job.stdout is not None
        ranks = [int(job.stdout.readline()) for _ in range(RANKS)]
        os.killpg(job.pid, signal.SIGINT)
        job.communicate(timeout=30)
    finally:
        launch.end(job)
    assert job.returncode == 128 + signal.SIGINT
    assert launch.ended_processes(ranks)


def lose_host(lab: Lab) -> None:
    assert lab.lose(HOSTS) >= 3  # the daemon and two ranks
    lab.cable(HOSTS, plugged=False)


def lose_mpirun(lab: Lab) -> None:
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in lab.pids(1)}
    (mpirun,) = [pid for pid, name in names.items() if name in ("mpirun", "prterun")]
    os.kill(mpirun, signal.SIGKILL)


@pytest.mark.parametrize(("lose", "hosts"), [(lose_host, HOSTS - 1), (lose_mpirun, HOSTS)])
def test_a_lost_job_goes_on_where_it_was(lab: Lab, tmp_path: Path, lose, hosts: int) -> None:
    file = tmp_path / "steps"
    job = start(lab, "-m", "tests.mpi.programs.restarted", str(file), options=("--restarts", "2"))
    try:
        assert job.stdout is not None
        line = job.stdout.readline()
        if line != '{"runs": true}\n':
            stdout, stderr = job.communicate(timeout=60)
            pytest.fail(f"the job did not start: {line}{stdout}{stderr}")
        lose(lab)
        stdout, stderr = job.communicate(timeout=60)
    finally:
        launch.end(job)
        lab.cable(HOSTS, plugged=True)
    ended = launch.Ended(job.returncode, stdout, stderr, 0.0)
    assert ended.code == 0, str(ended)
    (said,) = ended.said
    assert said["restart"] == 1 and said["right"], str(ended)
    assert said["began"] >= 20 and said["ended"] == said["began"] + 10, str(ended)
    assert said["hosts"] == [lab.layout.namespace(host) for host in range(1, hosts + 1)]
    assert said["ranks"] == 2 * hosts
    assert "restart 1 of 2 in 1 s" in stderr
    assert ("which did not answer" in stderr) == (lose is lose_host), stderr
    assert [lab.pids(host) for host in lab.hosts] == [[], [], []]
