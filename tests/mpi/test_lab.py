"""The lab: what it makes, what it takes away again, and what its faults do to a job."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.lab import Lab, LabError, network, peers, state
from benchmarks.lab.__main__ import main
from benchmarks.lab.collectives import measure, table
from benchmarks.lab.jobs import bound_s
from benchmarks.lab.object_reduces import BENCHMARK as REDUCES
from benchmarks.lab.objects import BENCHMARK as BROADCASTS
from hopcoll.chaos import command as chaos
from hopcoll.chaos import harness
from tests import launch

#: Of the lab that most tests share, and of those that a test makes, or fails to make, itself.
NAME, OTHER = f"hl{os.getpid()}", f"hm{os.getpid()}"
HOSTS = 3
RATES = {1: "160mbit", 2: "160mbit", 3: "40mbit"}
MIB = 1 << 20


@functools.cache
def why_not() -> str:
    return launch.why_no_lab()


@pytest.fixture
def may_make_labs() -> None:
    if why_not():
        pytest.skip(why_not())


needs_lab = pytest.mark.usefixtures("may_make_labs")


def traces(name: str = OTHER) -> tuple[list[str], list[str], bool]:
    """What a lab leaves behind: namespaces, links, and whether there are files."""
    words = [["netns", "list"], ["-o", "link"]]
    spaces, links = (network.call("ip", *its).splitlines() for its in words)
    files = [*Path("/dev/shm").glob(f"*{name}*"), *state.folder(name).parent.glob(f"{name}*")]
    return (
        [line.split()[0] for line in spaces if line.startswith(name)],
        [line.split()[1].split("@")[0].rstrip(":") for line in links if f" {name}" in line],
        bool(files),
    )


NOTHING = ([], [], False)


def command(*words: str, name: str = OTHER) -> tuple[int, str]:
    """Exit code and words of a command of a lab."""
    done = CliRunner().invoke(main, [words[0], "--name", name, *words[1:]])
    return done.exit_code, done.output


def fake_tool(folder: Path, name: str, says: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 2\n")
    (folder / name).chmod(0o755)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if why_not():
        pytest.skip(why_not())
    with Lab(HOSTS, name=NAME, rates=RATES) as made:
        yield made
    assert traces(NAME) == NOTHING


def start(lab: Lab, *program: str, ranks: int) -> subprocess.Popen[str]:
    return lab.start(
        *program,
        ranks=ranks,
        cwd=launch.ROOT,
        env=launch.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def transfer_bits_per_s(lab: Lab, source: int, dest: int, nbytes: int) -> float:
    program = [sys.executable, "-m", "tests.mpi.programs.wire"]
    address = lab.layout.address(dest)
    receiver = subprocess.Popen(
        lab.inside(dest, *program, "receive", address),
        cwd=launch.ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert receiver.stdout is not None
        port = receiver.stdout.readline().strip()
        send = lab.inside(source, *program, "send", address, port, str(nbytes))
        subprocess.run(send, cwd=launch.ROOT, stdin=subprocess.DEVNULL, check=True, timeout=30)
        said = json.loads(receiver.communicate(timeout=30)[0])
    finally:
        launch.end(receiver)
    return 8 * said["bytes"] / said["seconds"]


@pytest.mark.parametrize(
    ("source", "dest", "nbytes"),
    [
        pytest.param(1, 2, 12 * MIB, id="160 Mbit/s"),
        pytest.param(1, 3, 4 * MIB, id="to the slow host"),
        pytest.param(3, 1, 4 * MIB, id="from the slow host"),
    ],
)
def test_a_rate_holds(lab: Lab, source: int, dest: int, nbytes: int) -> None:
    rate = min(network.bits_per_s(RATES[source]), network.bits_per_s(RATES[dest]))
    # Never more; less only as far as the machine is busy otherwise.
    assert 0.4 * rate < transfer_bits_per_s(lab, source, dest, nbytes) < 1.15 * rate


def test_a_cable_is_pulled_and_plugged(lab: Lab, tmp_path: Path) -> None:
    job = start(lab, "-m", "tests.mpi.programs.long_job", str(tmp_path / "end"), ranks=HOSTS)
    try:
        assert job.stdout is not None
        assert json.loads(job.stdout.readline()) == {"runs": True}
        assert command("cable", "3", "pull", name=NAME)[0] == 0
        assert "pulled" in command("status", name=NAME)[1]
        assert not lab.reaches(1, 3, within_s=0.4)
        assert lab.reaches(1, 2)
        assert command("cable", "3", "plug", name=NAME)[0] == 0
        assert lab.reaches(1, 3, within_s=10)
        (tmp_path / "end").touch()
        stdout, stderr = job.communicate(timeout=30)
    finally:
        launch.end(job)
    assert job.returncode == 0, stderr
    said = json.loads(stdout)
    assert said["slowest_s"] > 0.3, "no step waited for the cable"
    assert said["right"] and said["who"] == [0, 1, 2]


def test_a_lost_host_ends_the_job(lab: Lab, tmp_path: Path) -> None:
    job = start(lab, "-m", "tests.mpi.programs.long_job", str(tmp_path / "never"), ranks=2 * HOSTS)
    try:
        assert job.stdout is not None
        assert json.loads(job.stdout.readline()) == {"runs": True}
        assert lab.lose(3) >= 3  # the daemon and two ranks
        assert lab.pids(3) == []
        stderr = job.communicate(timeout=30)[1]
    finally:
        launch.end(job)
    assert job.returncode not in (0, -signal.SIGKILL), stderr
    assert [lab.pids(host) for host in lab.hosts] == [[], [], []]
    code, said = command("lose", "3", name=NAME)
    assert code == 1 and "nothing ran on it" in said


def test_run_and_shell_pass_the_exit_code_on(lab: Lab) -> None:
    def code_of(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.lab", words[0], "--name", NAME, *words[1:]],
            cwd=launch.ROOT,
            env=launch.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    said = code_of("shell", "2", "--", "sh", "-c", "hostname; exit 5")
    assert (said.returncode, said.stdout) == (5, f"{NAME}-2\n")
    assert code_of("run", "-n", "1", "--", "sh", "-c", "exit 7").returncode == 7


def test_a_second_up_names_down(lab: Lab) -> None:
    code, said = command("up", "--hosts", "2", name=NAME)
    assert code == 1
    assert f"is up already, with 3 hosts: python -m benchmarks.lab down --name {NAME}" in said
    assert lab.reaches(3, 1)


@needs_lab
def test_up_and_down_leave_nothing() -> None:
    assert command("down") == (0, f"lab {OTHER!r} is not up\n")
    code, said = command("up", "--hosts", "2", "--rate", "1gbit", "--rate-of", "2=100mbit")
    assert code == 0, said
    assert [line.split()[3] for line in said.splitlines()] == ["rate", "1gbit", "100mbit"]
    spaces, links, files = traces()
    assert sorted(spaces) == [f"{OTHER}-1", f"{OTHER}-2"]
    assert sorted(links) == [OTHER, f"{OTHER}v1", f"{OTHER}v2"]
    assert files
    words = Lab.opened(OTHER).inside(2, "sh", "-c", "echo here; exec sleep 600")
    sleeper = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == "here\n"
        assert command("down") == (0, f"lab {OTHER!r} is down\n")
        assert sleeper.wait(10) == -signal.SIGKILL
    finally:
        launch.end(sleeper)
    assert traces() == NOTHING
    code, said = command("run", "x.py")
    assert code == 1 and "python -m benchmarks.lab up" in said


@needs_lab
@pytest.mark.parametrize(
    ("tool", "says", "told"),
    [
        ("tc", "Error: Specified qdisc kind is unknown.", "tbf is missing"),
        ("tc", "Error: something else.", "something else"),
    ],
)
def test_an_error_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, says: str, told: str
) -> None:
    fake_tool(tmp_path / "bin", tool, says)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    code, said = command("up", "--hosts", "2", "--rate", "1gbit")
    assert code == 1 and told in said
    assert traces() == NOTHING


@needs_lab
def test_an_interrupt_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bool:
        assert traces() != NOTHING
        raise KeyboardInterrupt

    monkeypatch.setattr(network, "reaches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Lab(2, name=OTHER).up()
    assert traces() == NOTHING


@needs_lab
def test_a_broken_off_up_is_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    # As after a SIGKILL: nobody tidied up.
    lab = Lab(2, name=OTHER)
    with state.locked(OTHER):
        state.save(lab.layout, complete=False)
        network.call("ip", "netns", "add", lab.layout.namespace(1))
    with pytest.raises(LabError, match="was broken off"):
        Lab.opened(OTHER)
    assert command("up")[0] == 1
    assert command("down") == (0, f"lab {OTHER!r} is down\n")
    assert traces() == NOTHING


@needs_lab
def test_what_others_made_is_left_alone() -> None:
    network.call("ip", "netns", "add", f"{OTHER}-2")
    try:
        code, said = command("up", "--hosts", "2")
        assert code == 1 and f"namespace {OTHER}-2 exists already" in said
        assert traces() == ([f"{OTHER}-2"], [], False)
    finally:
        network.call("ip", "netns", "del", f"{OTHER}-2")


@pytest.mark.parametrize("words", [("up",), ("down",)])
def test_without_root(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, said = command(*words)
    assert code == 1 and "needs root" in said


@pytest.mark.parametrize("missing", ["ip", "tc", "unshare"])
def test_without_a_tool(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    which = shutil.which
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == missing else which(tool))
    code, said = command("up", "--rate", "1gbit")
    # On a machine that has none of them, ip is named.
    assert code == 1 and "is missing" in said and "apt install" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--rate", "1gigabit"), "rate '1gigabit' is none that tc understands"),
        (("--rate", "0"), "rate '0' is none"),
        (("--rate-of", "3"), "rate-of '3' is not HOST=RATE"),
        (("--rate-of", "9=1gbit"), "host 9 of a rate is none of 1 to 8"),
        (("--hosts", "65"), "hosts must be 1 to 64, not 65"),
        (("--hosts", "0"), "hosts must be 1 to 64, not 0"),
        (("--mtu", "70000"), "mtu must be"),
        (("--subnet", "10.0"), "subnet '10.0'"),
        (("--name", "Lab-1"), "name 'Lab-1'"),
    ],
)
def test_a_wrong_word(words: tuple[str, ...], told: str) -> None:
    code, said = command("up", *words)
    assert code == 1 and told in said


@needs_lab
def test_the_benchmark_measures_and_kills() -> None:
    report = measure(3, "1gbit", [MIB], turns=1, kills=1, name=OTHER)
    assert [row["collective"] for row in report["rows"]] == ["bcast", "reduce", "allreduce"]
    # Less than this, and bytes took another way than the wire; a full bucket gives 1 ms away.
    assert all(figure > 0.8 for row in report["rows"] for figure in row["over_bound"].values())
    (death,) = report["kill"]["deaths"]
    assert 0.3 < death["moved"] < 0.7 and death["ratio"] > 0.5
    assert len(death["contributors"]) >= 2
    assert table(report).count("| Allreduce | 1 MiB |") == 1
    assert traces() == NOTHING


@needs_lab
@pytest.mark.parametrize("benchmark", [BROADCASTS, REDUCES], ids=["broadcasts", "reductions"])
def test_the_benchmarks_of_objects(benchmark) -> None:
    report = benchmark.measure(4, "1gbit", [MIB], turns=1, kills=1, name=OTHER)
    (row,) = report["rows"]
    # From the last input on, less is left to do than to carry all of it.
    least = {kind: 0.4 if kind == "one by one" else 0.8 for kind in REDUCES.kinds}
    if benchmark is BROADCASTS:
        least = dict.fromkeys(BROADCASTS.kinds, 0.8)
    assert all(row[kind][0] > share * row["bound_s"] for kind, share in least.items())
    assert [death["victim"] for death in row["killed"]] == [2]
    assert benchmark.table(report).count("| 1 MiB |") == 1
    assert traces() == NOTHING


@needs_lab
def test_the_benchmark_of_peers(tmp_path) -> None:
    path, names = tmp_path / "F.json", ["objects", "collectives", "mpi"]
    for sizes, some in (([4096], names), ([4096, MIB], names[:2]), ([4096, MIB], names)):
        report = peers.measure(3, "1gbit", sizes, 1, some, OTHER, path=path)
    assert json.loads(path.read_text()) == report
    for row in report["rows"]:
        assert row["cells"].keys() == set(names)
        assert [len(cell["runs"]) for cell in row["cells"].values()] == [1, 1, 1]
        if row["nbytes"] == MIB and not row["step_s"]:  # no byte took another way than the wire
            assert min(peers.medians(row).values()) > 0.8 * row["bound_s"]
    assert traces() == NOTHING


def test_rates_as_tc_spells_them() -> None:
    said = {rate: network.bits_per_s(rate) for rate in ("1gbit", "12.5mbps", "8kibit", "9600")}
    assert said == {"1gbit": 10**9, "12.5mbps": 10**8, "8kibit": 8192, "9600": 9600}


def test_bounds() -> None:
    assert bound_s("bcast", 124_000_000, 8, 10**9) == pytest.approx(1.0)
    assert bound_s("allreduce", 124_000_000, 8, 10**9) == pytest.approx(1.75)


@needs_lab
def test_chaos_over_hosts(tmp_path):
    """The ranks of its jobs are on several hosts; nobody is stopped for ever."""
    report = harness.chaos(faults=2, seed=3, hosts=3, keep=tmp_path, progress=False)
    assert report["passed"], harness.summary(report)
    assert report["hosts"] == 3
    assert report["faults_fired"] >= 2
    assert report["stops_killed_by_others"] == 0
    assert traces("hopchaos") == NOTHING


def test_chaos_says_why_there_are_no_hosts(monkeypatch):
    def fail(self: Lab) -> Lab:
        raise LabError("network namespaces need root")

    monkeypatch.setattr(Lab, "__enter__", fail)
    done = CliRunner().invoke(chaos, ["--lab", "3", "--faults", "1"])
    assert done.exit_code == 1
    assert "no lab of 3 hosts: network namespaces need root" in done.output
