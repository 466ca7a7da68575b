"""Jobs over several hosts: network namespaces of this machine, each with a wire and a name.

They need root and iproute2; a job then starts as it would over ssh, with another agent.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.hosts"
HOSTS = 3
RANKS = 2 * HOSTS


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL)


class Cluster:
    """Hosts 10.x.y.1, 10.x.y.2, ... on one bridge."""

    def __init__(self, folder: Path) -> None:
        pid = os.getpid()
        self.prefix = f"hc{pid}"
        self.network = f"10.{100 + pid // 256 % 100}.{pid % 256}"
        self.agent = folder / "agent"
        self.agent.write_text(
            "#!/bin/sh\n# mpirun calls it instead of ssh: HOST COMMAND...\n"
            "host=$1; shift\n"
            f"name={self.prefix}-${{host##*.}}\n"
            'exec ip netns exec $name unshare --uts sh -c "hostname $name; $*"\n'
        )
        self.agent.chmod(0o755)

    def __enter__(self) -> Cluster:
        ip("link", "add", self.prefix, "type", "bridge")
        ip("link", "set", self.prefix, "up")
        for number in range(1, HOSTS + 1):
            name, wire = f"{self.prefix}-{number}", f"{self.prefix}v{number}"
            ip("netns", "add", name)
            ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", wire, "master", self.prefix, "up")
            ip("-n", name, "addr", "add", f"{self.network}.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for number in range(1, HOSTS + 1):
            subprocess.run(["ip", "netns", "del", f"{self.prefix}-{number}"], check=False)
        subprocess.run(["ip", "link", "del", self.prefix], check=False)

    def start(self, *program: str) -> subprocess.Popen[str]:
        hosts = ",".join(f"{self.network}.{number}:2" for number in range(1, HOSTS + 1))
        name = f"{self.prefix}-1"
        command = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(RANKS), "--host", hosts]
        command += ["-x", "PYTHONPATH", "--mpirun-args", f"--prtemca plm_ssh_agent {self.agent}"]
        return subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c"]
            + [f'hostname {name}; exec "$@"', "sh", *command, *program],
            cwd=launch.ROOT,
            env=launch.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def may_make_hosts() -> bool:
    """Whether this process may make a network namespace with a name of its own."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare"))):
        return False
    tried = f"hc{os.getpid()}-0"
    made = subprocess.run(["ip", "netns", "add", tried], capture_output=True, check=False)
    if made.returncode:
        return False
    command = ["ip", "netns", "exec", tried, "unshare", "--uts", "hostname", tried]
    named = subprocess.run(command, capture_output=True, check=False)
    ip("netns", "del", tried)
    return named.returncode == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not may_make_hosts():
        pytest.skip("network namespaces need root, ip and unshare")
    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


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
def test_a_survived_death_ends_with_code_0(cluster: Cluster, victims: tuple[int, ...]) -> None:
    job = cluster.start("-m", PROGRAM, ",".join(map(str, victims)))
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


def test_ctrl_c_leaves_no_process_on_any_host(cluster: Cluster) -> None:
    job = cluster.start("-m", "tests.mpi.programs.endings", "wait", *map(str, range(RANKS)))
    try:
        assert job.stdout is not None
        ranks = [int(job.stdout.readline()) for _ in range(RANKS)]
        os.killpg(job.pid, signal.SIGINT)
        job.communicate(timeout=30)
    finally:
        launch.end(job)
    assert job.returncode == 128 + signal.SIGINT
    assert launch.ended_processes(ranks)
