"""`hopcoll slurm`: submit jobs that survive what Slurm and its nodes do, and look at them.

`render` makes a batch script: options for Slurm, then a call of job.sh, which all batch scripts
share and in which the behaviour is. `check` finds what is wrong before anything is submitted.
"""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import click

from hopcoll.launcher import LauncherError
from hopcoll.restarts import read_facts, read_progress

__all__ = ["Job", "Shown", "check", "command", "look", "render", "submit"]

#: The part that all batch scripts share.
SHARED_PART = Path(__file__).with_name("job.sh")
#: Seconds before the end of its time in which a job is told to commit; Slurm may do so up to
#: `_SIGNAL_EARLY_S` earlier.
SIGNAL_S = 120
_SIGNAL_EARLY_S = 60
#: Seconds for one question to Slurm.
_ASK_S = 30.0
#: ... for a submission, which a busy controller may take after its client has gone.
_SUBMIT_S = 300.0
#: Folders that each host has for itself.
_OF_ONE_HOST = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
#: A job's comment: this, and from its first start on also a space and its folder.
_MARK = "hopcoll"
#: What sbatch says of nodes that are down at the moment, as of those that never were.
_NOT_NOW = re.compile(r"node configuration is not available|Required node not available")
_UNUSABLE = re.compile(r"down|drain|fail|maint|reserv|boot|\*")
#: Variables that mean the same as an option, but are not named after it.
_VARIABLES = {
    "time": "TIMELIMIT",
    "array": "ARRAY_INX",
    "requeue": "NO_REQUEUE",
    "mem": "MEM_PER_NODE",
    "switches": "REQ_SWITCH",
    "verbose": "DEBUG",
}
#: Options of sbatch by their letters, as far as there is a variable for them.
_LETTERS = {
    **{"A": "account", "C": "constraint", "G": "gpus", "J": "job-name", "M": "clusters"},
    **{"O": "overcommit", "S": "core-spec", "W": "wait", "a": "array", "e": "error"},
    **{"i": "input", "k": "no-kill", "m": "distribution", "o": "output", "p": "partition"},
    **{"q": "qos", "t": "time", "v": "verbose"},
}
_FACT = re.compile(r"(\w+)=(.*?)(?= \w+=|$)")


@dataclass(frozen=True)
class Job:
    """What is to be submitted. Immutable.

    Parameters
    ----------
    program : tuple of str
        A Python script and its arguments, or ``-m``, a module and its arguments.
    nodes : int
        On which the ranks begin.
    spares : int
        Further nodes of the allocation, which take the place of lost ones.
    ranks_per_node : int
    ranks : int or None
        The most that there are; as many as `nodes` have by default.
    min_ranks : int or None
        With fewer left in its allocation the job is requeued. 1 by default.
    time : str
        As ``sbatch --time`` takes it.
    partition, account, array, name : str or None
        As sbatch takes them; the name is that of the script by default.
    options : tuple of str
        Further options of sbatch, such as ``--qos=high``.
    environment : str
        The prefix of the Python environment, which all nodes have to see.
    """

    program: tuple[str, ...]
    nodes: int = 1
    spares: int = 0
    ranks_per_node: int = 1
    ranks: int | None = None
    min_ranks: int | None = None
    time: str = "1:00:00"
    partition: str | None = None
    account: str | None = None
    array: str | None = None
    name: str | None = None
    options: tuple[str, ...] = ()
    environment: str = field(default_factory=lambda: sys.prefix)

    @property
    def ranks_max(self) -> int:
        """How many ranks there are at the most."""
        return self.nodes * self.ranks_per_node if self.ranks is None else self.ranks

    @property
    def slots(self) -> int:
        """How many ranks the allocation has room for."""
        return (self.nodes + self.spares) * self.ranks_per_node


def render(job: Job) -> str:
    """Return the batch script of a job. Pure."""
    program = job.program[1:] if job.program[0] == "-m" else job.program
    name = job.name or re.sub(r"[^\w.-]+", "-", Path(program[0]).stem)
    options = [
        f"--job-name={shlex.quote(name)}",
        f"--nodes={job.nodes + job.spares}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--time={shlex.quote(job.time)}",
        "--output=%x-%A_%a.out" if job.array else "--output=%x-%j.out",
        *(f"--{what}={shlex.quote(value)}" for what, value in _named(job) if value),
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{SIGNAL_S}",
        "--no-kill",
        f"--comment={_MARK}",
        *map(_quoted, job.options),
    ]
    lines = [
        "#!/bin/bash",
        "# Made by `hopcoll slurm submit`. What happens is told in the file that it sources.",
        *(f"#SBATCH {option}" for option in options),
        "",
        f"hopcoll_environment={shlex.quote(job.environment)}",
        f"hopcoll_ranks={job.ranks_max}",
        f"hopcoll_min_ranks={job.min_ranks or 1}",
        f". {shlex.quote(str(SHARED_PART))} || exit",
        f"hopcoll_job {shlex.join(job.program)}",
        "",
    ]
    return "\n".join(lines)


def _quoted(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}={shlex.quote(value)}" if equals else option


def _named(job: Job) -> list[tuple[str, str | None]]:
    return [("partition", job.partition), ("account", job.account), ("array", job.array)]


def check(job: Job, *, environment_is_shared: bool = False) -> None:
    """Look for what can be known to be wrong, without Slurm. Local.

    Parameters
    ----------
    job : Job
    environment_is_shared : bool
        The user's word that all nodes see the environment and the working directory.

    Raises
    ------
    LauncherError
        The message says what, where, and what to do.
    """
    script = job.program[0]
    if script == "-m":
        if len(job.program) < 2:
            raise LauncherError("program is missing: a module's name after -m")
        if job.environment == sys.prefix and not _has_module(job.program[1]):
            raise LauncherError(
                f"module {job.program[1]!r} is neither in {os.getcwd()} nor in this environment"
            )
    elif not os.path.isfile(script):
        raise LauncherError(f"script {script!r} is not there")
    if job.ranks_max > job.slots:
        raise LauncherError(
            f"ranks: {job.ranks_max} are more than the {job.slots} for which {job.nodes} nodes and "
            f"{job.spares} spares with {job.ranks_per_node} each have room: more --nodes, or more "
            "--ranks-per-node"
        )
    if job.min_ranks is not None and job.min_ranks > job.ranks_max:
        raise LauncherError(
            f"min-ranks is {job.min_ranks}, and there are {job.ranks_max} ranks at the most"
        )
    seconds = seconds_of(job.time)
    if seconds is not None and seconds <= SIGNAL_S + _SIGNAL_EARLY_S:
        raise LauncherError(
            f"time {job.time} is too short: the job is told to commit up to "
            f"{SIGNAL_S + _SIGNAL_EARLY_S} s before its end, and would do nothing else"
        )
    if job.name is not None and re.search(r"[\s/]", job.name):
        raise LauncherError(
            f"name {job.name!r} has a space or a slash: it becomes part of a folder's name"
        )
    python = Path(job.environment, "bin", "python")
    if not os.access(python, os.X_OK):
        raise LauncherError(f"environment {job.environment!r} has no bin/python: --env PATH")
    if not environment_is_shared:
        places = [("environment", job.environment), ("working directory", os.getcwd())]
        places.append(("interpreter", os.path.realpath(python)))
        places.append(("hopcoll", str(SHARED_PART.parent)))
        if script != "-m":
            places.append(("folder of the script", os.path.dirname(os.path.abspath(script))))
        for what, path in places:
            if why := only_here(path):
                raise LauncherError(
                    f"{what} {path} is {why}: compute nodes do not see it. Put it on a shared "
                    "file system (or say --shared, if they do see it)"
                )


def _has_module(name: str) -> bool:
    """Whether `python -m` finds it from here; no code of it is run."""
    top, *rest = name.split(".")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = importlib.util.find_spec(top)  # also what an editable installation has
        for number, _ in enumerate(rest, 2):
            inside = None if found is None else found.submodule_search_locations
            if inside is None:
                return False
            found = PathFinder.find_spec(".".join(name.split(".")[:number]), inside)
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.remove(here)
    return found is not None


def seconds_of(text: str) -> int | None:
    """Return a time limit of Slurm's in seconds; None for no limit.

    Raises
    ------
    LauncherError
        It is none.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise LauncherError(f"time {text!r} is none that Slurm understands: 2:00:00, or 1-12:00:00")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)


def only_here(path: str) -> str:
    """Return why other hosts certainly do not see a path; empty where they may."""
    real = os.path.realpath(path)
    for folder in (*_OF_ONE_HOST, tempfile.gettempdir()):
        if real == folder or real.startswith(f"{folder.rstrip('/')}/"):
            return f"in {folder}, which each host has for itself"
    kind, longest = "", -1
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        where = line.split()[4]
        if len(where) > longest and (real + "/").startswith(where.rstrip("/") + "/"):
            kind, longest = line.partition(" - ")[2].split()[0], len(where)
    return f"on {kind}, in this host's memory" if kind in _MEMORY else ""


def submit(job: Job) -> str:
    """Submit a job, unless Slurm would refuse it. Blocks for Slurm's answers.

    Returns
    -------
    str
        Its number.

    Raises
    ------
    LauncherError
        There is no Slurm, or it would not take the job; the message says why.
    """
    unusable = _check_with_slurm(job)
    script = render(job)
    try:
        _try_out(script, unusable)
        try:
            said = _ask(["sbatch", "--parsable"], script, within_s=_SUBMIT_S)
        except _Silent as silent:
            raise LauncherError(
                f"{silent}: the job may have been submitted; look with 'squeue --me' before you "
                "submit it again"
            ) from silent
    except _Refused as refused:
        raise LauncherError(f"Slurm does not take the job: {refused}") from refused
    return said.strip().partition(";")[0]


def _try_out(script: str, unusable: int) -> None:
    """Have Slurm refuse what it would; but what waits for a node that is down is to be queued."""
    try:
        _ask(["sbatch", "--test-only"], script)
    except _Refused as refused:
        if not (unusable and _NOT_NOW.search(str(refused))):
            raise
        # What could never run sbatch itself refuses.
        print(
            f"hopcoll slurm: {unusable} nodes are down, drained or reserved, and the job waits "
            f"for some of them ({refused})",
            file=sys.stderr,
        )


def _check_with_slurm(job: Job) -> int:
    """Refuse what Slurm has not; return how many nodes of the partition are of no use now."""
    missing = [tool for tool in ("sbatch", "scontrol", "sinfo", "squeue") if not shutil.which(tool)]
    if missing:
        raise LauncherError(
            f"no Slurm on this machine: {', '.join(missing)} not found. Submit from a login node "
            "of the cluster, or use 'hopcoll run' here"
        )
    try:
        said = _ask(["sinfo", "-a", "-h", "-o", "%R|%D|%T"])
    except _Refused as refused:
        raise LauncherError(f"Slurm does not answer: {refused}") from refused
    counts: dict[str, int] = {}
    unusable: dict[str, int] = {}
    for line in said.splitlines():
        partition, count, state = line.split("|")
        counts[partition] = counts.get(partition, 0) + int(count)
        if _UNUSABLE.search(state):
            unusable[partition] = unusable.get(partition, 0) + int(count)
    if job.partition is not None:
        for name in job.partition.split(","):
            if name not in counts:
                raise LauncherError(
                    f"partition {name!r} does not exist here; there are {', '.join(sorted(counts))}"
                )
    names = job.partition.split(",") if job.partition else list(counts)
    most = max((counts[name] for name in names), default=0)
    if job.nodes + job.spares > most:
        raise LauncherError(
            f"nodes: {job.nodes} and {job.spares} spares are more than the {most} that "
            f"{'partition ' + job.partition if job.partition else 'any partition'} has"
        )
    if job.account is not None:
        _check_account(job.account)
    return max((unusable.get(name, 0) for name in names), default=0)


def _check_account(account: str) -> None:
    """Refuse an account that the cluster's data base does not have, or not for this user."""
    if shutil.which("sacctmgr") is None:
        return  # sbatch --test-only is asked in any case
    user = getpass.getuser()
    words = ["sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", "format=account"]
    try:
        accounts = sorted({*_ask(words).split()})
    except _Refused:
        return  # this cluster has no data base of accounts
    # Slurm keeps them in lower case.
    if accounts and account.lower() not in map(str.lower, accounts):
        raise LauncherError(
            f"account {account!r} is none of {user}'s, which are {', '.join(accounts)}"
        )


class _Refused(Exception):
    """A command of Slurm's failed; the message is its own."""


class _Silent(_Refused):
    """A command of Slurm's did not end in time; what it did is not known."""


def _ask(words: Sequence[str], script: str = "", within_s: float | None = None) -> str:
    within_s = _ASK_S if within_s is None else within_s
    # For sbatch a variable comes before the script, which is to say what the job is.
    given = "\n".join(re.findall(r"^#SBATCH(.*)", script, re.M))
    options = re.findall(r"(?<=\s)-(?:-([\w-]+)|(\w))", given)
    said = {_variable(name or _LETTERS.get(letter, letter)) for name, letter in options}
    # A job that is submitted inside another one must not inherit what that one is.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not (name.startswith("SLURM_") or name in said)
    }
    try:
        done = subprocess.run(
            words,
            input=script,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=within_s,
        )
    except subprocess.TimeoutExpired as error:
        raise _Silent(f"{words[0]} did not answer within {within_s:g} s") from error
    except OSError as error:
        raise _Refused(f"{words[0]}: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{words[0]} ended with {done.returncode}"]
        raise _Refused("; ".join(lines))
    return done.stdout


def _variable(option: str) -> str:
    return "SBATCH_" + _VARIABLES.get(option, option.upper().replace("-", "_"))


@dataclass(frozen=True)
class Shown:
    """What is known of a job.

    Parameters
    ----------
    job : str
        Its number, with the task's in an array.
    name, state, reason : str
        As Slurm says them.
    nodes : int
    requeues : int
        How often Slurm started it again.
    step : int or None
        The newest one that is durable: the last commit.
    age_s : float or None
        How long ago that was.
    ranks, began, epoch, restarts : int or None
        At the last commit: how many ranks there were, and at their start; the version of the
        membership; how often `hopcoll run` had started them again in this allocation.
    """

    job: str
    name: str
    state: str
    reason: str
    nodes: int
    requeues: int
    step: int | None = None
    age_s: float | None = None
    ranks: int | None = None
    began: int | None = None
    epoch: int | None = None
    restarts: int | None = None


def look(jobs: Sequence[str] = ()) -> list[Shown]:
    """Ask Slurm for this user's jobs, or for these, and read what they told. Blocks.

    Raises
    ------
    LauncherError
        Slurm is not there, or knows no such job.
    """
    if shutil.which("scontrol") is None:
        raise LauncherError("no Slurm on this machine: scontrol not found")
    lines: list[str] = []
    try:
        for job in jobs or [""]:
            lines += _ask(["scontrol", "-o", "show", "job", *([job] if job else [])]).splitlines()
    except _Refused as refused:
        raise LauncherError(f"Slurm does not tell: {refused}") from refused
    mine = f"({os.getuid()})"
    shown = []
    for line in lines:
        facts = {key: value.strip() for key, value in _FACT.findall(line)}
        if "JobId" not in facts or not (jobs or facts.get("UserId", "").endswith(mine)):
            continue
        if not jobs and facts.get("Comment", "").partition(" ")[0] != _MARK:
            continue  # another kind of job
        shown.append(_shown(facts))
    return shown


def _shown(facts: dict[str, str]) -> Shown:
    number = facts["JobId"]
    if "ArrayJobId" in facts and "ArrayTaskId" in facts:
        number = f"{facts['ArrayJobId']}_{facts['ArrayTaskId']}"
    told: dict[str, Any] = {}
    mark, _, folder = facts.get("Comment", "").partition(" ")
    if mark == _MARK and folder:
        told = _told(Path(folder))
    return Shown(
        job=number,
        name=facts.get("JobName", ""),
        state=facts.get("JobState", ""),
        reason=facts.get("Reason", ""),
        nodes=int(facts.get("NumNodes", "0").partition("-")[0]),
        requeues=int(facts.get("Restarts", "0")),
        **told,
    )


def _told(folder: Path) -> dict[str, Any]:
    """What the newest start told that has told anything."""
    starts = [
        int(path.suffix[1:]) for path in folder.glob("progress.*") if path.suffix[1:].isdecimal()
        and path.stem == "progress"
    ]  # fmt: skip
    for start in sorted(starts, reverse=True):
        path = folder / f"progress.{start}"
        step = read_progress(path)
        if step is None:
            continue
        facts = read_facts(path)
        return {
            "step": step,
            "age_s": time.time() - facts["time"] if "time" in facts else None,
            "restarts": facts.get("restart"),
            **{key: facts.get(key) for key in ("ranks", "began", "epoch")},
        }
    return {}


def table(shown: Sequence[Shown]) -> str:
    """The jobs as text, one a line."""
    rows = [("JOB", "NAME", "STATE", "NODES", "STEP", "COMMIT", "RANKS", "EPOCH", "STARTS")]
    for one in shown:
        state = one.state if one.reason in ("", "None") else f"{one.state} ({one.reason})"
        rows.append(
            (
                *(one.job, one.name, state, str(one.nodes)),
                "-" if one.step is None else str(one.step),
                "-" if one.age_s is None else f"{one.age_s:.0f} s ago",
                "-" if one.ranks is None else f"{one.ranks} of {one.began}",
                "-" if one.epoch is None else str(one.epoch),
                f"{one.requeues + 1}" + (f"+{one.restarts}" if one.restarts else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    aligned = ("  ".join(cell.ljust(width) for cell, width in line) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


@click.group("slurm")
def command() -> None:
    """Submit jobs to Slurm that survive lost nodes, preemption and time limits.

    \b
    hopcoll slurm submit --nodes 4 --spares 1 --time 2:00:00 train.py --resume
    hopcoll slurm status
    """


@command.command(
    "submit", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True}
)
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--spares", type=click.IntRange(min=0), default=0, show_default=True,
              help="Further nodes, to take the place of lost ones.")  # fmt: skip
@click.option("--ranks-per-node", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), help="The most. [all that the nodes have]")
@click.option("--min-ranks", type=click.IntRange(min=1), metavar="N",
              help="With fewer left, wait in the queue for nodes. [1]")  # fmt: skip
@click.option("--time", "limit", default="1:00:00", show_default=True, help="As for sbatch.")
@click.option("--partition", metavar="NAME")
@click.option("--account", metavar="NAME")
@click.option("--array", metavar="TASKS", help="As for sbatch, such as 0-9.")
@click.option("--name", metavar="NAME", help="[that of the script]")
@click.option("--sbatch", "options", multiple=True, metavar="OPTION",
              help="A further option of sbatch, such as --sbatch=--qos=high.")  # fmt: skip
@click.option("--env", "environment", metavar="PATH", default=sys.prefix,
              help="The Python environment, on a shared file system. [this one]")  # fmt: skip
@click.option("--shared", is_flag=True,
              help="All nodes do see the environment and this directory.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the script, and submit nothing.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED, required=True)
def submit_command(
    program: tuple[str, ...],
    limit: str,
    shared: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Render a batch script for PROGRAM, a Python script and its arguments, and submit it.

    Options may stand behind PROGRAM, too; what is none of them is PROGRAM's. Behind -- all is.

    The job keeps its files in NAME-NUMBER under the working directory, and is requeued with the
    same number after the loss of its nodes, before its time is over, or when it is preempted. So
    PROGRAM has to go on from its last commit by itself. It finds the folder in
    HOPCOLL_JOB_FOLDER.
    """
    job = Job(program=program, time=limit, **settings)
    try:
        check(job, environment_is_shared=shared)
        if dry_run:
            click.echo(render(job), nl=False)
        else:
            click.echo(submit(job))
    except LauncherError as error:
        raise click.UsageError(str(error)) from error


@command.command("status")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.argument("jobs", nargs=-1)
def status_command(jobs: tuple[str, ...], as_json: bool) -> None:
    """Show this user's jobs, or JOBS: their last commit, ranks, and how often they were started.

    STARTS counts Slurm's, and after a + those that 'hopcoll run' made in the last allocation.
    """
    try:
        shown = look(jobs)
    except LauncherError as error:
        raise click.UsageError(str(error)) from error
    click.echo(json.dumps([vars(one) for one in shown], indent=2) if as_json else table(shown))
