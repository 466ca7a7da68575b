"""The relaunch loop, with an mpirun and a launch agent that do as they are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hopcoll import _orphans, cli, launcher, restarts
from hopcoll._rank import END_MARK
from hopcoll.restarts import Places, agent, answering, fewer_ranks, read_progress, tell_progress
from tests import launch

#: What an mpirun does, as lines of a shell.
DONE = f"printf '{END_MARK.decode()}' >&2; exit 0"
FAILED = f"printf '{END_MARK.decode()}' >&2; exit 3"
ALL_DIED = "exit 0"
HOST_LOST = "echo 'PRTE has lost communication with a remote daemon.' >&2; exit 0"
KILLED = "kill -KILL $$"
NOBODY_BEGAN = "exit 213"


class Cluster:
    """Some hosts, of which those in `gone` do not answer, and an mpirun with a scenario."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mpirun, self.agent = folder / "mpirun", folder / "agent"
        (folder / "script.py").touch()
        self._program(self.agent, f'test ! -e "{folder}/gone-$1" && "$2"')

    def _program(self, path: Path, text: str) -> None:
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def plays(self, *starts: str) -> None:
        """Have the k-th start do the k-th of these; write down the arguments of each."""
        cases = "\n".join(f"{number}) {what};;" for number, what in enumerate(starts))
        self._program(
            self.mpirun,
            'test "$1" = --version && { echo "mpirun (Open MPI) 5.0.11"; exit; }\n'
            f'echo "$HOPCOLL_RESTART $@" >> {self.folder}/starts\n'
            f'case "$HOPCOLL_RESTART" in\n{cases}\n*) exit 99;;\nesac',
        )

    def lose(self, host: str) -> str:
        """Return what takes a host away."""
        return f"touch {self.folder}/gone-{host}"

    def run(self, count: int, **how: object) -> int:
        hosts = ["a:2", "b:2", "c:2"]
        words = ["--prtemca", "plm_ssh_agent", str(self.agent)]
        how = {"hosts": hosts, "ranks": 6, "backoff_s": 0.0, "mpirun_args": words, **how}
        program = [str(self.folder / "script.py")]
        return restarts.run(program, restarts=count, mpirun=str(self.mpirun), **how)

    @property
    def starts(self) -> list[list[str]]:
        """The words of each start."""
        return [line.split() for line in (self.folder / "starts").read_text().splitlines()]

    def where(self) -> list[tuple[str, str]]:
        """The ranks and the hosts of each start."""
        return [
            (words[words.index("-n") + 1], words[words.index("--host") + 1])
            for words in self.starts
        ]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return Cluster(tmp_path)


def test_a_lost_host_is_left_out(cluster, capfd):
    cluster.plays(f"{cluster.lose('b')}; {HOST_LOST}", DONE)
    assert cluster.run(3) == 0
    assert cluster.where() == [("6", "a:2,b:2,c:2"), ("4", "a:2,c:2")]
    assert [words[0] for words in cluster.starts] == ["0", "1"]
    said = capfd.readouterr().err
    assert "hopcoll run: a host was lost; restart 1 of 3 in 0 s\n" in said
    assert "hopcoll run: without b, which did not answer" in said


def test_one_host_after_the_other(cluster, capfd):
    lost = [f"{cluster.lose(host)}; {HOST_LOST}" for host in "bac"]
    cluster.plays(*lost)
    assert cluster.run(9) == launcher.NOBODY_SURVIVED
    assert [hosts for _, hosts in cluster.where()] == ["a:2,b:2,c:2", "a:2,c:2", "c:2"]
    assert "no host answered within" in capfd.readouterr().err


def test_a_hostfile_gets_shorter(cluster, tmp_path):
    (tmp_path / "hosts").write_text("a slots=2 # the first\n\n# none\nb slots=2\nc\n")
    keeps = f'cat "${{HOSTS}}" > {tmp_path}/seen'
    finds = 'while test "$1" != --hostfile; do shift; done; HOSTS=$2; ' + keeps
    cluster.plays(f"{cluster.lose('b')}; {HOST_LOST}", f"{finds}; {DONE}")
    assert cluster.run(1, hosts=(), hostfile=str(tmp_path / "hosts"), ranks=5) == 0
    assert (tmp_path / "seen").read_text() == "a slots=2 # the first\nc\n"
    assert cluster.starts[1][2] == "3"
    assert (tmp_path / "hosts").read_text().count("\n") == 5


@pytest.mark.parametrize(
    ("what", "code", "why"),
    [
        (HOST_LOST, 1, "a host was lost"),
        (ALL_DIED, 1, "every rank died"),
        (KILLED, 128 + signal.SIGKILL, "mpirun was killed by signal 9"),
    ],
)
def test_what_a_loss_is(cluster, capfd, what, code, why):
    cluster.plays(what, what, what)
    assert cluster.run(2) == code
    assert len(cluster.starts) == 3
    assert f"hopcoll run: {why}; that was the last of 3 starts\n" in capfd.readouterr().err


def test_an_mpirun_that_starts_nobody_gets_another_chance(cluster, capfd):
    cluster.plays(NOBODY_BEGAN, ALL_DIED, NOBODY_BEGAN, DONE)
    assert cluster.run(9) == 0
    assert "mpirun ended with code 213 before any rank began; restart 1" in capfd.readouterr().err


def test_an_mpirun_that_starts_nobody_twice_gets_no_more(cluster, capfd):
    cluster.plays(NOBODY_BEGAN, NOBODY_BEGAN, DONE)
    assert cluster.run(9) == 213
    assert len(cluster.starts) == 2
    assert "nor did one the time before" in capfd.readouterr().err


def test_a_failure_of_the_script_is_its_own(cluster):
    cluster.plays(FAILED)
    assert cluster.run(5) == 3
    assert len(cluster.starts) == 1


def test_a_failure_of_the_script_is_no_end_if_that_was_asked_for(cluster, capfd):
    cluster.plays(FAILED, DONE)
    assert cluster.run(5, failures=True) == 0
    assert "the program failed with code 3; restart 1 of 5" in capfd.readouterr().err


def test_no_restart_without_progress(cluster, capfd):
    tells = "echo {} > $HOPCOLL_PROGRESS_FILE; " + ALL_DIED
    cluster.plays(tells.format(7), tells.format(9), tells.format(9), DONE)
    assert cluster.run(9) == 1
    assert len(cluster.starts) == 3
    assert "no progress since step 9, and no host has gone" in capfd.readouterr().err
    assert not list(cluster.folder.glob(".hopcoll-progress*"))


def test_hosts_that_go_are_not_the_programs_fault(cluster):
    tells = "echo 9 > $HOPCOLL_PROGRESS_FILE; "
    lost = [f"{tells}{cluster.lose(host)}; {HOST_LOST}" for host in "ab"]
    cluster.plays(*lost, DONE)
    assert cluster.run(2) == 0


def test_a_progress_file_of_the_callers_stays(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("HOPCOLL_PROGRESS_FILE", str(tmp_path / "step"))
    cluster.plays("echo 4 > $HOPCOLL_PROGRESS_FILE; " + DONE)
    assert cluster.run(1) == 0
    assert read_progress(tmp_path / "step") == 4


def test_the_wait_doubles_up_to_a_limit(cluster, monkeypatch):
    waits = []
    monkeypatch.setattr(restarts, "_wait", lambda wait_s, _: waits.append(wait_s))
    cluster.plays(*[ALL_DIED] * 9)
    assert cluster.run(8, backoff_s=1.0) == 1
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_in_another_allocation_mpirun_is_asked_again(cluster, monkeypatch):
    monkeypatch.setenv("PBS_NODEFILE", "/dev/null")
    cluster.plays(HOST_LOST, DONE)
    assert cluster.run(1, hosts=()) == 0
    assert all("--host" not in words for words in cluster.starts)


@pytest.mark.parametrize("is_back", [True, False])
def test_a_controller_that_is_away_does_not_make_hosts_dead(
    cluster, monkeypatch, capfd, is_back
) -> None:
    """Without it srun reaches nobody. Host b is really gone."""
    tools = cluster.folder / "tools"
    tools.mkdir()
    away = cluster.folder / "away"
    cluster._program(tools / "srun", f'test ! -s {away} -a "$6" != b')
    once = f"truncate -s -1 {away}; " if is_back else ""
    cluster._program(
        tools / "scontrol", f"if [ -s {away} ]; then {once}echo X is DOWN; else echo X is UP; fi"
    )
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(restarts, "_AGAIN_S", 0.0)
    if not is_back:
        monkeypatch.setattr(restarts, "CONTROLLER_S", 0.2)
    cluster.plays(f"printf xxx > {away}; {HOST_LOST}", DONE)
    assert cluster.run(1, mpirun_args=[]) == (0 if is_back else launcher.NOBODY_SURVIVED)
    said = capfd.readouterr().err
    assert said.count("Slurm's controller does not answer; the hosts are asked when it does") == 1
    if is_back:
        assert cluster.where()[1] == ("4", "a:2,c:2")
    else:
        assert "no host answered within" in said


def test_the_hosts_of_a_slurm_allocation(cluster, monkeypatch):
    bin_folder = cluster.folder / "bin"
    bin_folder.mkdir()
    cluster._program(
        bin_folder / "scontrol",
        'test "$1" = ping && echo x is UP\ntest "$*" = "show hostnames n[1-4]" && seq -f n%g 4',
    )
    cluster._program(bin_folder / "srun", f'test "$6" != n3 && echo "$@" >> {cluster.folder}/srun')
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert restarts.allocation() == {}
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    assert restarts.allocation() == {"n1": 1, "n2": 1, "n3": 1, "n4": 1}
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2,4(x3)")
    assert restarts.allocation() == {"n1": 2, "n2": 4, "n3": 4, "n4": 4}
    cluster.plays(HOST_LOST, DONE)
    assert cluster.run(1, hosts=(), ranks=None, mpirun_args=[]) == 0
    first, second = cluster.starts
    assert "--host" not in first
    assert second[second.index("--host") + 1] == "n1:2,n2:4,n4:4"
    asked = (cluster.folder / "srun").read_text().splitlines()
    srun = "--nodes=1 --ntasks=1 --overlap --quiet --nodelist"
    assert sorted(asked) == [f"{srun} {host} true" for host in ("n1", "n2", "n4")]
    cluster._program(bin_folder / "scontrol", "exit 1")
    assert restarts.allocation() == {}


@pytest.mark.parametrize("moment", ["mpirun runs", "it waits", "hosts are asked"])
def test_a_signal_ends_all_of_it(cluster, moment, monkeypatch):
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    if moment == "mpirun runs":
        cluster.plays(f"kill -INT {os.getpid()}; exec sleep 600")
    else:
        cluster.plays(f"{cluster.lose('a')}; {HOST_LOST}")
    if moment == "it waits":
        monkeypatch.setattr(restarts, "_say", interrupt)
    if moment == "hosts are asked":
        cluster._program(cluster.agent, f"kill -INT {os.getpid()}; exec sleep 600")
    how = {"backoff_s": 600.0} if moment == "it waits" else {}
    others = set(_orphans._children())  # of other tests
    assert cluster.run(5, probe_s=600.0, **how) == 128 + signal.SIGINT
    assert len(cluster.starts) == 1
    assert set(_orphans._children()) <= others


def test_a_host_that_does_not_answer_in_time(tmp_path):
    agent_of = tmp_path / "agent"
    agent_of.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    agent_of.chmod(0o755)
    others = set(_orphans._children())  # of other tests
    # This host is not asked.
    assert answering(["localhost", "far"], [str(agent_of)], 0.5) == ["localhost"]
    assert set(_orphans._children()) <= others
    if (tmp_path / "pid").exists():  # on a slow machine it had not come so far
        assert launch.ended_processes([int((tmp_path / "pid").read_text())], within_s=0)


def test_who_is_asked_and_who_is_here(tmp_path):
    asked = tmp_path / "asked"
    agent_of = tmp_path / "agent"
    agent_of.write_text(f'#!/bin/sh\necho "$@" >> {asked}\ntest $1 != 240.0.0.2\n')
    agent_of.chmod(0o755)
    names = ["240.0.0.1", "127.0.0.1", "240.0.0.2", os.uname().nodename]
    assert answering(names, [str(agent_of)], 60) == [names[0], names[1], names[3]]
    assert sorted(asked.read_text().splitlines()) == ["240.0.0.1 true", "240.0.0.2 true"]


def test_the_agent_is_mpiruns():
    assert agent([], {})[0] == "ssh"
    assert agent(["--prtemca", "plm_ssh_agent", "/bin/sh 'a b'"], {}) == ["/bin/sh", "a b"]
    assert agent([], {"PRTE_MCA_plm_ssh_agent": "rsh -4 : ssh"}) == ["rsh", "-4"]
    with pytest.raises(launcher.LauncherError, match="agent /no/agent"):
        answering(["240.0.0.1"], ["/no/agent"])


@pytest.mark.parametrize(
    ("ranks", "left", "then"),
    [
        (6, ("a", "c"), 4),
        (4, ("a", "c"), 4),  # two slots were free
        (None, ("a",), None),
        (12, ("a", "c"), 8),  # two ranks a slot
        (12, ("a",), 4),
        (6, ("a",), 2),
    ],
)
def test_ranks_on_the_hosts_left(ranks, left, then):
    before = {"a": 2, "b": 2, "c": 2}
    assert fewer_ranks(ranks, before, {host: before[host] for host in left}) == then


def test_places(tmp_path):
    places = Places(("a:2", "b", "a:1"))
    assert places.slots() == {"a": 3, "b": 1}
    assert places.only(["a"], tmp_path) == Places(("a:2", "a:1"))
    with pytest.raises(launcher.LauncherError, match="hostfile '/no/file' cannot be read"):
        Places(hostfile="/no/file").slots()


def test_progress_is_told_as_a_whole(tmp_path, monkeypatch):
    assert not tell_progress(3)
    file = tmp_path / "step"
    assert read_progress(file) is None
    monkeypatch.setenv("HOPCOLL_PROGRESS_FILE", str(file))
    assert tell_progress(3) and read_progress(file) == 3
    assert tell_progress(12) and read_progress(file) == 12
    assert os.listdir(tmp_path) == ["step"]
    file.write_text("what?")
    assert read_progress(file) is None
    assert not tell_progress(5, tmp_path / "nowhere" / "step")


def test_the_command(cluster):
    cluster.plays(ALL_DIED, f"echo $HOPCOLL_PROGRESS_FILE; {DONE}")
    words = [sys.executable, "-m", "hopcoll.cli", "run", "--mpirun", str(cluster.mpirun)]
    done = subprocess.run(
        [*words, "--restarts", "1", "script.py"],
        capture_output=True,
        text=True,
        env=launch.environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "every rank died; restart 1 of 1 in 1 s" in done.stderr
    assert done.stdout.startswith(f"{cluster.folder}/.hopcoll-progress-")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--restart-failures"], "--restart-failures says what --restarts N is for"),
        (["--restarts", "-1"], "--restarts"),
        (["--restarts", "1", "--mpirun", "/no/mpirun"], "/no/mpirun"),
    ],
)
def test_wrong_use(words, told):
    result = CliRunner().invoke(cli.main, ["run", *words, "-m", "json"])
    assert result.exit_code == 2
    assert told in result.output


def test_with_too_few_ranks_left_there_is_no_restart(cluster, capfd):
    cluster.plays(f"{cluster.lose('b')}; {HOST_LOST}", DONE)
    assert cluster.run(3, min_ranks=5) == launcher.NOBODY_SURVIVED
    assert len(cluster.starts) == 1
    assert "4 ranks would be left, and min-ranks is 5" in capfd.readouterr().err
    assert cluster.run(3, hosts=["a:2", "c:2"], min_ranks=4) == 0
    # As many as there are slots: fewer than wished for, and no fewer than that.
    assert cluster.where()[1] == ("4", "a:2,c:2")


def test_too_few_ranks_from_the_start_are_an_error(cluster):
    with pytest.raises(launcher.LauncherError, match="min-ranks is 7, and the hosts have 6 slots"):
        cluster.run(3, min_ranks=7)


def test_a_job_that_was_asked_to_stop_is_not_started_again(cluster, capfd):
    """It stops as it likes: with a commit and a code of its own, or because all its ranks die."""
    waits = f"trap 'exit 75' USR1; kill -USR1 {os.getpid()}; while :; do :; done"
    cluster.plays(waits, DONE)
    assert cluster.run(3, stop_within_s=60.0) == launcher.STOPPED
    cluster.plays(f"trap 'exit 0' USR1; kill -USR1 {os.getpid()}; while :; do :; done", DONE)
    assert cluster.run(3, stop_within_s=60.0) == launcher.NOBODY_SURVIVED
    assert [words[0] for words in cluster.starts] == ["0", "0"]
    assert "-x" in cluster.starts[0] and launcher.STOPS_VARIABLE in cluster.starts[0]


def test_who_does_not_stop_in_time_is_ended(cluster):
    cluster.plays(
        f"trap '' USR1; trap 'exit 9' TERM; kill -USR1 {os.getpid()}; while :; do :; done", DONE
    )
    assert cluster.run(3, stop_within_s=0.2) == 128 + signal.SIGUSR1
    assert len(cluster.starts) == 1


def test_a_stop_between_two_starts(cluster, monkeypatch):
    def ask(what: str) -> None:
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(restarts, "_say", ask)
    cluster.plays(HOST_LOST, DONE)
    assert cluster.run(5, stop_within_s=1.0, backoff_s=600.0) == launcher.STOPPED
    assert len(cluster.starts) == 1


def test_mpirun_in_an_allocation_gets_what_its_srun_needs(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    cluster.plays(f'echo "$SLURM_NO_KILL $SLURM_OVERLAP" > {cluster.folder}/steps; {DONE}')
    assert cluster.run(1) == 0
    assert (cluster.folder / "steps").read_text() == "set 1\n"
