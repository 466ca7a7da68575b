"""The command line that `hopcoll run` decides on, and how it reads what comes back."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import sys
import tempfile

import pytest
from click.testing import CliRunner

import hopcoll
from hopcoll import _orphans, cli, launcher


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "my script.py"
    path.write_text("")
    return str(path)


@pytest.fixture
def fake_mpirun(tmp_path, monkeypatch):
    """Make an mpirun that only knows its version; `given(says)` returns its path."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def given(says: str) -> str:
        path = tmp_path / "mpirun"
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return given


OPEN_MPI_5 = "mpirun (Open MPI) 5.0.11\n\nReport bugs to ..."
OPEN_MPI_4 = "mpirun (Open MPI) 4.1.4"
HYDRA = "HYDRA build details:\n    Version:                                 5.0.2\n"


def arguments(job: launcher.Plan) -> str:
    return " ".join(job.command)


def test_every_switch_that_survival_needs(fake_mpirun, script):
    job = launcher.plan([script, "--epochs", "3"], ranks=8, mpirun=fake_mpirun(OPEN_MPI_5))
    for switch in (
        "-n 8",
        "--with-ft ulfm",
        "--mca pml ob1",
        "--mca btl self,sm,tcp",
        "--mca coll ^han,cuda,portals4",
        "--mca mpi_preconnect_mpi 1",
        "--mca async_mpi_finalize 1",
        f"--mca btl_tcp_eager_limit {launcher.EAGER_LIMIT_BYTES}",
        "--bind-to none",
        "-x HOPCOLL_LAUNCHER",
    ):
        assert f" {switch} " in arguments(job)
    assert job.command[-3:] == [script, "--epochs", "3"]
    assert job.command[-5] == sys.executable
    assert job.note == ""


@pytest.mark.parametrize(("ranks", "crowded"), [(2, False), (3, True)])
def test_ranks_that_share_a_core_make_room(fake_mpirun, script, monkeypatch, ranks, crowded):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    job = launcher.plan([script], ranks=ranks, mpirun=fake_mpirun(OPEN_MPI_5))
    assert ("mpi_yield_when_idle 1" in arguments(job)) == crowded


@pytest.mark.parametrize(("user", "said"), [(0, True), (1000, False)])
def test_root_is_told_to_mpirun(fake_mpirun, script, monkeypatch, user, said):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    job = launcher.plan([script], mpirun=fake_mpirun(OPEN_MPI_5))
    assert ("--allow-run-as-root" in job.command) == said


def test_hosts_keep_their_slots(fake_mpirun, script, tmp_path):
    given = fake_mpirun(OPEN_MPI_5)
    job = launcher.plan([script], ranks=4, hosts=["n1:2", "n2:2"], mpirun=given)
    assert " --host n1:2,n2:2 " in arguments(job)
    assert "OVERSUBSCRIBE" not in arguments(job)
    job = launcher.plan([script], ranks=4, hostfile="hosts", oversubscribe=True, mpirun=given)
    assert " --hostfile hosts --map-by :OVERSUBSCRIBE " in arguments(job)


def test_a_batch_allocation_keeps_its_slots(fake_mpirun, script, monkeypatch):
    given = fake_mpirun(OPEN_MPI_5)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    job = launcher.plan([script], mpirun=given)
    assert "OVERSUBSCRIBE" not in arguments(job)
    assert "-n" not in job.command and "--host" not in job.command


def test_settings_reach_other_hosts(fake_mpirun, script, monkeypatch):
    monkeypatch.setenv("HOPCOLL_CHUNK_BYTES", "131072")
    job = launcher.plan([script], export=["PYTHONPATH"], mpirun=fake_mpirun(OPEN_MPI_5))
    assert " -x HOPCOLL_CHUNK_BYTES " in arguments(job)
    assert " -x PYTHONPATH " in arguments(job)


def test_own_switches_come_last(fake_mpirun, script):
    job = launcher.plan(
        [script], mpirun=fake_mpirun(OPEN_MPI_5), mpirun_args=["--mca", "btl", "tcp,self"]
    )
    assert arguments(job).index("btl tcp,self") > arguments(job).index("btl self,sm,tcp")


@pytest.mark.parametrize(
    ("says", "name"), [(OPEN_MPI_4, "Open MPI 4.1.4"), (HYDRA, "MPICH 5.0.2"), ("?", "mpirun")]
)
def test_an_mpi_without_fault_tolerance_runs_with_one_line(fake_mpirun, script, says, name):
    job = launcher.plan([script], ranks=2, mpirun=fake_mpirun(says))
    assert "--with-ft" not in job.command
    assert " -n 2 " in arguments(job)
    assert f"{name} is not fault tolerant: a death will end the job" in job.note
    assert "\n" not in job.note


def test_hydra_knows_no_mca(fake_mpirun, script):
    job = launcher.plan([script], ranks=2, hosts=["a", "b"], mpirun=fake_mpirun(HYDRA))
    assert job.command[1:5] == ["-n", "2", "-hosts", "a,b"]
    assert "--mca" not in job.command and "-x" not in job.command


def test_dry_run_can_be_pasted_and_gives_reasons(fake_mpirun, script):
    result = CliRunner().invoke(
        cli.main,
        ["run", "-n", "3", "--mpirun", fake_mpirun(OPEN_MPI_5), "--dry-run", script, "-n", "a b"],
    )
    assert result.exit_code == 0, result.output
    *reasons, command = result.output.splitlines()
    assert all(line.startswith("# ") and ": " in line for line in reasons)
    words = shlex.split(command)
    assert words[-3:] == [script, "-n", "a b"]
    for switch in ("--with-ft ulfm", "--mca pml ob1", "--bind-to none"):
        assert any(line.startswith(f"# {switch}: ") for line in reasons)


def test_open_mpi_gets_a_home(fake_mpirun, script, monkeypatch):
    monkeypatch.delenv("HOME")
    job = launcher.plan([script], mpirun=fake_mpirun(OPEN_MPI_5))
    assert os.path.isdir(job.environment["HOME"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "-n", "2", "no_such_script.py"], "no_such_script.py"),
        (["run", "-n", "0", "script.py"], "-n"),
        (["run", "-n", "2"], "PROGRAM"),
        (["run", "-n", "2", "-m"], "module"),
        (["run", "--mpirun", "/no/mpirun", "-m", "json"], "/no/mpirun"),
        (["run", "--mpirun-args", "'a", "-m", "json"], "No closing quotation"),
        (["doctor", "--json", "/proc/none/report.json"], "cannot be written"),
        (["chaos", "--json", "/etc/passwd/report.json"], "cannot be written"),
        (["chaos", "--faults", "0"], "--faults"),
        (["chaos", "--jobs", "0"], "--jobs"),
        (["chaos", "--deadline", "-1"], "--deadline"),
        (["chaos", "--run", "-1"], "--run"),
    ],
)
def test_wrong_use_says_what_is_wrong(words, message):
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 2
    assert message in result.output


def test_an_mpirun_that_is_no_program(tmp_path):
    path = tmp_path / "mpirun"
    path.write_bytes(b"\x00no program")
    path.chmod(0o755)
    result = CliRunner().invoke(cli.main, ["run", "--mpirun", str(path), "-m", "json"])
    assert result.exit_code == 2
    assert "cannot be executed" in result.output


def test_a_signal_that_nohup_leaves_out_stays_out():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launcher.Ending():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_directory_left_by_a_killed_mpirun_is_in_nobodys_way(tmp_path, monkeypatch):
    """Process ids come again, and mpirun takes what it finds for a server that runs."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("ompi.17", "ompi.171", "other.17"):
        (tmp_path / name / "1").mkdir(parents=True)
    _orphans.forget_session(17)
    _orphans.forget_session(18)  # there is none
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ompi.171", "other.17"]


def test_the_mpirun_of_this_environment_comes_before_path(fake_mpirun, monkeypatch):
    beside = fake_mpirun(OPEN_MPI_5)
    monkeypatch.setattr(launcher.sysconfig, "get_path", lambda _: os.path.dirname(beside))
    assert launcher.find_mpirun().path == beside


def test_version():
    result = CliRunner().invoke(cli.main, ["--version"])
    assert result.output == f"hopcoll {hopcoll.__version__}\n"


def test_help_names_all_commands():
    result = CliRunner().invoke(cli.main, ["--help"])
    for name in ("run", "doctor", "chaos", "simulate"):
        assert f"\n  {name} " in result.output
