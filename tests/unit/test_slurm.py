"""`hopcoll slurm`: what is said before anything is submitted, and what a job tells of itself."""

from __future__ import annotations

import getpass
import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hopcoll import cli, slurm
from hopcoll.launcher import LauncherError
from hopcoll.restarts import tell_progress
from hopcoll.slurm import Job, check, look, render, seconds_of, submit


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a script, on a file system that may be shared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "only_here", lambda path: "")
    (tmp_path / "train.py").touch()
    return tmp_path


class Tools:
    """Slurm's commands, which answer as they are told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "squeue"):
            self.plays(name, f'cat > "{folder}/script"; echo "$@" >> "{folder}/asked"; echo 42')
        self.plays("sinfo", "printf 'main|4|idle\\nmain|2|mixed\\ngpu|1|idle\\n'")
        self.plays("scontrol", "exit 1")

    def plays(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    @property
    def asked(self) -> list[str]:
        file = self.folder / "asked"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def tools(here: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    made = Tools(here / "tools")
    monkeypatch.setenv("PATH", f"{here}/tools:/bin:/usr/bin")
    which = slurm.shutil.which
    # What this machine has of Slurm is none of these tests' business.
    monkeypatch.setattr(slurm.shutil, "which", lambda name: which(name, path=str(made.folder)))
    return made


def test_a_job_is_tried_before_it_is_submitted(tools: Tools) -> None:
    job = Job(("train.py",), nodes=4)
    assert submit(job) == "42"
    assert tools.asked == ["--test-only", "--parsable"]
    assert (tools.folder / "script").read_text() == render(job)


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (Job(("no.py",)), "script 'no.py' is not there"),
        (Job(("-m",)), "program is missing: a module's name after -m"),
        (Job(("-m", "no.such.module")), "module 'no.such.module' is neither in "),
        (Job(("-m", "json.nothing")), "module 'json.nothing' is neither in "),
        (Job(("-m", "train.more")), "module 'train.more' is neither in "),
        (
            Job(("train.py",), nodes=2, spares=1, ranks_per_node=4, ranks=13),
            "ranks: 13 are more than the 12 for which 2 nodes and 1 spares with 4 each have room",
        ),
        (Job(("train.py",), min_ranks=2), "min-ranks is 2, and there are 1 ranks at the most"),
        (Job(("train.py",), name="a b"), "name 'a b' has a space or a slash"),
        (Job(("train.py",), name="a/b"), "name 'a/b' has a space or a slash"),
        (Job(("train.py",), time="3"), "time 3 is too short: the job is told to commit up to 180"),
        (Job(("train.py",), time="noon"), "time 'noon' is none that Slurm understands"),
        (Job(("train.py",), environment="/no/env"), "environment '/no/env' has no bin/python"),
    ],
)
def test_bad_input_is_found_without_slurm(here: Path, job: Job, said: str) -> None:
    with pytest.raises(LauncherError) as raised:
        check(job)
    assert said in str(raised.value)


@pytest.mark.parametrize("folder", ["/tmp/x", "/dev/shm/x", "/run/x"])
def test_an_environment_that_only_this_host_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    monkeypatch.setattr(slurm.os, "access", lambda path, mode: True)
    job = Job(("train.py",), environment=folder)
    with pytest.raises(LauncherError, match=rf"environment {folder} is in /.*--shared"):
        check(job)
    check(job, environment_is_shared=True)


def test_a_file_system_in_memory_is_of_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "21 1 0:1 / / rw - ext4 /dev/a rw\n22 21 0:2 / /scratch rw shared:1 - tmpfs none rw\n"
    monkeypatch.setattr(Path, "read_text", lambda self: lines)
    assert slurm.only_here("/scratch/env") == "on tmpfs, in this host's memory"
    assert slurm.only_here("/scratchy/env") == ""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("30", 1800), ("2:30", 150), ("1:00:00", 3600), ("1-0", 86400), ("2-1:30", 178200)),
        *(("1-00:00:30", 86430), ("UNLIMITED", None), ("0", None)),
    ],
)
def test_times_of_slurm(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


def test_no_slurm_on_this_machine(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    with pytest.raises(LauncherError, match="no Slurm on this machine: sbatch, scontrol, sinfo"):
        submit(Job(("train.py",)))
    with pytest.raises(LauncherError, match="no Slurm on this machine"):
        look()


def test_what_slurm_says(tools: Tools) -> None:
    with pytest.raises(LauncherError, match="partition 'cpu' does not exist here; there are gpu"):
        submit(Job(("train.py",), partition="cpu"))
    with pytest.raises(LauncherError, match="nodes: 1 and 1 spares are more than the 1 that part"):
        submit(Job(("train.py",), partition="gpu", spares=1))
    tools.plays("sinfo", "echo 'slurm_load_partitions: Unable to contact' >&2; exit 1")
    with pytest.raises(LauncherError, match=r"Slurm does not answer: .*Unable to contact"):
        submit(Job(("train.py",)))
    tools.plays("sinfo", "echo 'main|4|idle'")
    tools.plays("sbatch", "echo 'sbatch: error: Invalid qos' >&2; exit 1")
    with pytest.raises(LauncherError, match=r"Slurm does not take the job: .*Invalid qos"):
        submit(Job(("train.py",)))
    assert tools.asked == []


def test_nodes_that_are_down_are_waited_for(
    tools: Tools, capfd: pytest.CaptureFixture[str]
) -> None:
    said = "allocation failure: Requested node configuration is not available"
    refuses = f'echo "{said}" >&2; exit 1'
    tools.plays("sbatch", f'[ "$1" = --parsable ] || {{ {refuses}; }}; echo 42')
    with pytest.raises(LauncherError, match="Slurm does not take the job: allocation failure"):
        submit(Job(("train.py",), nodes=4))
    tools.plays("sinfo", "printf 'main|3|idle\\nmain|1|drained*\\ngpu|1|idle\\n'")
    with pytest.raises(LauncherError, match="Slurm does not take the job: allocation failure"):
        submit(Job(("train.py",), partition="gpu"))
    assert submit(Job(("train.py",), nodes=4)) == "42"
    assert "1 nodes are down, drained or reserved, and the job waits" in capfd.readouterr().err
    tools.plays("sbatch", "echo 'Invalid qos' >&2; exit 1")
    with pytest.raises(LauncherError, match="Slurm does not take the job: Invalid qos"):
        submit(Job(("train.py",), nodes=4))


def test_a_submission_without_an_answer(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_SUBMIT_S", 0.2)
    tools.plays("sbatch", '[ "$1" = --test-only ] || exec sleep 60')
    with pytest.raises(LauncherError, match=r"within 0.2 s: the job may have been .*squeue --me"):
        submit(Job(("train.py",)))
    monkeypatch.setattr(slurm, "_ASK_S", 5.0)
    tools.plays("sbatch", "exec sleep 60")  # nothing but a trial, so far
    with pytest.raises(LauncherError, match=r"Slurm does not take the job: .* did not answer"):
        submit(Job(("train.py",)))


def test_an_account_that_does_not_exist(tools: Tools) -> None:
    tools.plays("sacctmgr", "printf 'physics\\nphysics\\nmaths\\n'")
    with pytest.raises(LauncherError) as raised:
        submit(Job(("train.py",), account="chemistry"))
    who = getpass.getuser()
    assert str(raised.value) == (
        f"account 'chemistry' is none of {who}'s, which are maths, physics"
    )
    assert tools.asked == []
    assert submit(Job(("train.py",), account="Maths")) == "42"
    tools.plays("sacctmgr", "echo 'there is no data base' >&2; exit 1")
    assert submit(Job(("train.py",), account="chemistry")) == "42"  # Slurm's own to refuse


def test_what_is_submitted_inside_a_job_inherits_nothing_of_it(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CONF"):
        monkeypatch.setenv(name, "7")
    tools.plays("sbatch", f'env | grep ^SLURM_ > "{tools.folder}/seen"; echo 42')
    assert submit(Job(("train.py",))) == "42"
    assert (tools.folder / "seen").read_text() == "SLURM_CONF=7\n"


def test_a_variable_does_not_overrule_the_script(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of variables and a script sbatch believes the variables."""
    ours = ("TIMELIMIT", "SIGNAL", "NO_REQUEUE", "NO_KILL", "OPEN_MODE", "JOB_NAME", "QOS")
    for name in (*ours, "PARTITION", "RESERVATION"):
        monkeypatch.setenv(f"SBATCH_{name}", "7")
    tools.plays("sbatch", f'env | grep ^SBATCH_ | sort > "{tools.folder}/seen"; echo 42')
    assert submit(Job(("train.py",), options=("--qos=high",))) == "42"
    assert (tools.folder / "seen").read_text() == "SBATCH_PARTITION=7\nSBATCH_RESERVATION=7\n"


@pytest.mark.parametrize(
    ("option", "variable"),
    [
        ("-pdebug", "PARTITION"),
        ("-p debug", "PARTITION"),
        ("-A me", "ACCOUNT"),
        ("-t 5", "TIMELIMIT"),
        ("--qos=high -t 5", "TIMELIMIT"),
        ("--mem=1G", "MEM_PER_NODE"),
        ("-k", "NO_KILL"),
    ],
)
def test_a_variable_does_not_overrule_an_option(
    tools: Tools, monkeypatch: pytest.MonkeyPatch, option: str, variable: str
) -> None:
    monkeypatch.setenv(f"SBATCH_{variable}", "7")
    monkeypatch.setenv("SBATCH_WCKEY", "7")
    tools.plays("sbatch", f'env | grep ^SBATCH_ | sort > "{tools.folder}/seen"; echo 42')
    submit(Job(("train.py",), options=(option,)))
    assert (tools.folder / "seen").read_text() == "SBATCH_WCKEY=7\n"


def test_names_and_values_that_need_care(here: Path) -> None:
    job = Job(("my runs/a b.py",), partition="a b", options=("--comment=it is", "--exclusive"))
    lines = render(job).splitlines()
    assert "#SBATCH --job-name=a-b" in lines
    assert "#SBATCH --partition='a b'" in lines
    assert "#SBATCH --comment='it is'" in lines and "#SBATCH --exclusive" in lines


@pytest.mark.parametrize("what", ["hopcoll", "folder of the script", "interpreter"])
def test_all_that_the_nodes_need_is_looked_at(
    here: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "train.py").touch()
    where = {
        "hopcoll": slurm.SHARED_PART.parent,
        "folder of the script": here / "sub",
        "interpreter": os.path.realpath(sys.executable),
    }[what]
    monkeypatch.setattr(slurm, "only_here", lambda path: "far" if path == str(where) else "")
    with pytest.raises(LauncherError, match=f"{what} {where} is far: compute nodes do not see it"):
        check(Job(("sub/train.py",)))


def test_options_may_stand_behind_the_script(tools: Tools) -> None:
    environment = f"--env={sys.prefix}"
    words = ["slurm", "submit", "train.py", "--nodes", "4", "--spares", "1", "--time", "2:00:00"]
    shown = CliRunner().invoke(cli.main, [*words, environment, "--lr", "3", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    job = Job(("train.py", "--lr", "3"), nodes=4, spares=1, time="2:00:00")
    assert shown.output == render(job)
    assert tools.asked == []
    done = CliRunner().invoke(cli.main, [*words, environment])
    assert (done.exit_code, done.output) == (0, "42\n")
    (tools.folder.parent / "mine").mkdir()
    (tools.folder.parent / "mine" / "train.py").write_text("raise SystemExit('it was imported')")
    module = CliRunner().invoke(cli.main, ["slurm", "submit", environment, "--dry-run", "--",
                                           "-m", "mine.train", "--nodes", "7"])  # fmt: skip
    assert "#SBATCH --job-name=mine\n#SBATCH --nodes=1\n" in module.output
    assert module.output.endswith("hopcoll_job -m mine.train --nodes 7\n")
    wrong = CliRunner().invoke(cli.main, ["slurm", "submit", "no.py"])
    assert wrong.exit_code == 2 and "script 'no.py' is not there" in wrong.output


def line(folder: Path | None, number: str, more: str = "") -> str:
    """What scontrol shows of a job."""
    comment = f"Comment=hopcoll {folder}" if folder else "Comment=hopcollective"
    return (
        f"JobId={number} {more}JobName=train UserId=somebody({os.getuid()}) JobState=RUNNING "
        f"Reason=None Restarts=2 NumNodes=4-4 Command=/a b.sh {comment}  StdErr=/x.out Power="
    )


def test_what_a_job_tells_of_itself(tools: Tools, tmp_path: Path) -> None:
    folder = tmp_path / "my runs" / "train-7"
    folder.mkdir(parents=True)
    told = {"epoch": 3, "ranks": 7, "began": 8, "restart": 1, "time": slurm.time.time() - 5}
    tell_progress(120, folder / "progress.2", **told)
    # The newest start has told nothing yet; one that lives on tells elsewhere; a file half made.
    tell_progress(100, folder / "progress.1", **{**told, "ranks": 8})
    (folder / "progress.2.n1.4711").write_text("130\n")
    rows = [line(folder, "7"), line(None, "8"), line(folder, "9", "ArrayJobId=6 ArrayTaskId=2 ")]
    rows.append(line(folder, "10").replace("somebody(", "another(1"))
    (tools.folder / "jobs").write_text("\n".join([*rows, ""]))
    tools.plays("scontrol", f"cat {tools.folder}/jobs")
    first, second = look()
    assert (first.job, first.name, first.state, first.nodes) == ("7", "train", "RUNNING", 4)
    assert (first.step, first.ranks, first.began, first.epoch) == (120, 7, 8, 3)
    assert (first.requeues, first.restarts) == (2, 1)
    assert first.age_s is not None and 4 < first.age_s < 60
    assert second.job == "6_2"
    shown = CliRunner().invoke(cli.main, ["slurm", "status"]).output.splitlines()
    assert shown[0].split() == [
        *("JOB", "NAME", "STATE", "NODES", "STEP", "COMMIT", "RANKS", "EPOCH", "STARTS")
    ]
    words = shown[1].split()
    assert int(words.pop(5)) >= 5
    assert words == "7 train RUNNING 4 120 s ago 7 of 8 3 3+1".split()
    as_json = json.loads(CliRunner().invoke(cli.main, ["slurm", "status", "--json"]).output)
    assert [one["job"] for one in as_json] == ["7", "6_2"]


def test_a_job_that_told_nothing_yet(tools: Tools, tmp_path: Path) -> None:
    tools.plays("scontrol", f"echo '{line(tmp_path / 'none', '7')}'")
    (shown,) = look(["7"])
    assert shown.step is None and shown.requeues == 2
    # Before its first start it has no folder.
    tools.plays("scontrol", f"echo '{line(None, '7').replace('collective', 'coll')}'")
    (shown,) = look()
    assert shown.step is None and shown.job == "7"
    tools.plays("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    with pytest.raises(LauncherError, match=r"Slurm does not tell: .*Invalid job id"):
        look(["999"])


def test_facts_of_progress_are_optional(tmp_path: Path) -> None:
    file = tmp_path / "progress.0"
    for text in ("", "7", "7\n", "7\n[1]", "7\n{"):
        file.write_text(text)
        assert slurm.read_facts(file) == {}
    os.unlink(file)
    assert slurm.read_facts(file) == {}
