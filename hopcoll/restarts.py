"""`hopcoll run --restarts N`: a job whose host or launcher was lost is started again.

Open MPI's runtime survives the death of a rank, not that of a host: it ends the job. So the job is
started again on the hosts that answer, and goes on from what it has on disk::

    mpirun ends -- not for a loss ----------------------------> that is the job's end
        |
        +-- a loss -- N restarts made, or no progress --------> so is that
                 |
                 +-- ask the hosts, wait 1, 2, 4 ... s, start again on those that answered

**Losses** are: mpirun says that it lost a daemon, or could not start one; mpirun itself was killed,
or failed before any rank began (but not twice on the same hosts); every rank died by a signal. A
program that fails with a code of its own is not started again unless that was asked for.

**Progress.** A failure that comes again at the same step, while no host has gone, is the program's
own, and a third try would not help. The program tells its newest durable step by `tell_progress`,
into the file that ``HOPCOLL_PROGRESS_FILE`` names: a line with one decimal number, and one of JSON
with what people may want to know, replaced as a whole. It is a
hint for the launcher alone; what the job goes on from is what its store says. A program that never
tells is started again N times at the most.

``HOPCOLL_RESTART`` tells the program how many restarts there were before this start, from 0.

The launcher itself is not restarted: if its own host is lost, a batch system has to requeue the
job. Ranks that were cut off, and not killed, may live on for a while beside their successors: what
they write is for the store to refuse.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopcoll import launcher
from hopcoll.launcher import LauncherError

__all__ = ["PROGRESS_VARIABLE", "RESTART_VARIABLE", "Places", "answering", "run", "tell_progress"]

#: Names the file that holds the newest durable step.
PROGRESS_VARIABLE = "HOPCOLL_PROGRESS_FILE"
#: Tells a program how often its job was restarted.
RESTART_VARIABLE = "HOPCOLL_RESTART"

#: Seconds before the first restart, and the most that doubling makes of them.
BACKOFF_S = 1.0
BACKOFF_S_MAX = 60.0
#: Seconds in which a host has to answer; all are asked at once.
PROBE_S = 15.0
#: Seconds in which Slurm's controller, without which no host can be asked, has to come back.
CONTROLLER_S = 180.0

#: Seconds between two looks whether it did.
_AGAIN_S = 5.0
_TICK_S = 0.05
_AGENT_NAMES = ("plm_ssh_agent", "plm_rsh_agent")
_STEP_BYTES_MAX = 32


def tell_progress(
    step: int, path: str | os.PathLike[str] | None = None, **facts: int | float | str
) -> bool:
    """Tell the launcher the newest step that is durable, if it wants to know.

    Local, short. One rank tells it after each commit, whichever that is.

    Parameters
    ----------
    step : int
    path : path, optional
        The file; that of ``HOPCOLL_PROGRESS_FILE`` by default.
    **facts
        More for people (`read_facts`), such as how many ranks there are. With some, the time and
        the number of restarts are told as well.

    Returns
    -------
    bool
        Whether it was written. Without the variable there is nobody to tell; on a host that does
        not share the launcher's file system the file cannot be written. Neither is an error.
    """
    name = os.environ.get(PROGRESS_VARIABLE) if path is None else path
    if not name:
        return False
    if facts:
        restart = int(os.environ.get(RESTART_VARIABLE, "0"))
        facts = {"restart": restart, "time": time.time(), **facts}
    target = Path(name)
    temporary = target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        # Not fsynced: if the launcher's host loses its power, so does the launcher.
        temporary.write_text(f"{int(step)}\n{json.dumps(facts) if facts else ''}")
        os.replace(temporary, target)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


def read_progress(path: str | os.PathLike[str]) -> int | None:
    """Return the step that was told, or None."""
    try:
        with open(path, "rb") as file:
            return int(file.readline(_STEP_BYTES_MAX))
    except (OSError, ValueError):
        return None


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the facts that were told with the step; without any, an empty dict."""
    try:
        facts = json.loads(Path(path).read_text().partition("\n")[2])
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


@dataclass(frozen=True)
class Places:
    """Where the ranks of a job may run: as given, or what is left of that.

    Parameters
    ----------
    hosts : tuple of str
        ``name`` or ``name:slots``, as for ``--host``.
    hostfile : str or None
        Its path.
    """

    hosts: tuple[str, ...] = ()
    hostfile: str | None = None

    def slots(self) -> dict[str, int]:
        """Return the hosts in their order, with their slots; where none are named, 1.

        Raises
        ------
        LauncherError
            The hostfile cannot be read.
        """
        found: dict[str, int] = {}
        for word in self.hosts:
            name, _, count = word.partition(":")
            found[name] = found.get(name, 0) + (int(count) if count.isdecimal() else 1)
        if self.hosts:
            return found
        for line in self._lines():
            name, *words = line.partition("#")[0].split() or [""]
            counts = [word.partition("=")[2] for word in words if word.startswith("slots=")]
            if name:
                found[name] = found.get(name, 0) + (int(counts[0]) if counts else 1)
        return found

    def _lines(self) -> list[str]:
        if self.hostfile is None:
            return []
        try:
            return Path(self.hostfile).read_text().splitlines()
        except (OSError, ValueError) as error:
            raise LauncherError(f"hostfile {self.hostfile!r} cannot be read: {error}") from error

    def only(self, names: Sequence[str], folder: Path) -> Places:
        """Return the places on these hosts alone.

        Parameters
        ----------
        names : sequence of str
        folder : Path
            Where a shorter hostfile is written.
        """
        hosts = tuple(word for word in self.hosts if word.partition(":")[0] in names)
        lines = [line for line in self._lines() if (line.split() or [""])[0] in names]
        if self.hostfile is None:
            return Places(hosts)
        shorter = folder / "hosts"
        shorter.write_text("\n".join([*lines, ""]))
        return Places(hosts, str(shorter))


def allocation(environ: Mapping[str, str] | None = None) -> dict[str, int]:
    """Return the hosts that Slurm gave this job, in its order, with their tasks.

    Local, blocks for ``scontrol``, `PROBE_S` seconds at the most.

    Parameters
    ----------
    environ : mapping of str to str, optional
        ``os.environ`` by default.

    Returns
    -------
    dict of str to int
        Empty outside of an allocation, or where Slurm does not answer.
    """
    environ = os.environ if environ is None else environ
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return {}
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=PROBE_S,
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return {}
    counts: list[int] = []
    words = environ.get("SLURM_TASKS_PER_NODE", "")
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", words):
        counts += [int(count)] * int(times or 1)
    return dict(zip(names, counts if len(counts) == len(names) else [1] * len(names), strict=True))


def fewer_ranks(
    ranks: int | None, before: Mapping[str, int], left: Mapping[str, int]
) -> int | None:
    """Return how many ranks there are on the hosts that are left.

    Slots that were free are used first; ranks that shared slots share them as before.

    Parameters
    ----------
    ranks : int or None
        How many there were; None: one a slot, as mpirun counts them.
    before, left : mapping of str to int
        Slots by host.
    """
    total, rest = sum(before.values()), sum(left.values())
    if ranks is None or ranks <= rest:
        return ranks
    return rest if ranks <= total else max(ranks * rest // total, 1)


def agent(mpirun_args: Sequence[str], environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the command that starts something on another host: mpirun's own launch agent.

    Parameters
    ----------
    mpirun_args : sequence of str
        Further words for mpirun, among which it may be.
    environ : mapping of str to str, optional
        ``os.environ`` by default.
    """
    environ = os.environ if environ is None else environ
    for at, word in enumerate(mpirun_args):
        if word in _AGENT_NAMES and at + 1 < len(mpirun_args):
            return shlex.split(mpirun_args[at + 1].split(" : ")[0])
    for name in _AGENT_NAMES:
        if words := environ.get(f"PRTE_MCA_{name}"):
            return shlex.split(words.split(" : ")[0])
    if "SLURM_JOB_ID" in environ:
        return ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--quiet", "--nodelist"]
    return ["ssh", "-x", "-o", "BatchMode=yes"]


def answering(
    names: Sequence[str],
    words: Sequence[str],
    within_s: float = PROBE_S,
    ending: launcher.Ending | None = None,
) -> list[str]:
    """Return those hosts on which the agent can run ``true``.

    Blocking, for `within_s` seconds at the most; all are asked at once. This host is not asked.

    Parameters
    ----------
    names : sequence of str
    words : sequence of str
        The agent, see `agent`.
    within_s : float
    ending : Ending, optional
        Whose signal ends the wait.
    """
    asked: dict[str, subprocess.Popen[bytes]] = {}
    here = [name for name in names if _is_here(name)]
    try:
        for name in names:
            if name not in here:
                try:
                    asked[name] = subprocess.Popen(
                        [*words, name, "true"],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                except OSError as error:
                    raise LauncherError(f"agent {shlex.join(words)}: {error}") from error
        deadline_s = time.monotonic() + within_s
        while any(one.poll() is None for one in asked.values()):
            if time.monotonic() > deadline_s or (ending and ending.over):
                break
            time.sleep(_TICK_S)
        return [name for name in names if name in here or asked[name].returncode == 0]
    finally:
        for one in asked.values():
            if one.returncode is None:
                os.killpg(one.pid, signal.SIGKILL)  # the agent, and what it started
                one.wait()


def _left(
    names: Sequence[str], words: Sequence[str], probe_s: float, ending: launcher.Ending
) -> list[str]:
    """Return those hosts that answer. Where srun asks them, silence means nothing unless Slurm's
    controller answers before and after: that is waited for, for `CONTROLLER_S` at the most."""
    if words[0] != "srun":
        return answering(names, words, probe_s, ending)
    deadline_s = time.monotonic() + CONTROLLER_S
    told = False
    while True:
        last = ending.over or time.monotonic() > deadline_s
        if last or _controller_answers():
            found = answering(names, words, probe_s, ending)
            if last or len(found) == len(names) or _controller_answers():
                return found
        if not told:
            told = True
            _say("Slurm's controller does not answer; the hosts are asked when it does")
        _wait(_AGAIN_S, ending)


def _controller_answers() -> bool:
    words = ["scontrol", "ping"]
    try:
        said = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_S
        ).stdout
    except subprocess.TimeoutExpired:
        return False
    except OSError:  # no scontrol here, and nothing to be known
        return True
    return " is UP" in said


def _is_here(name: str) -> bool:
    """Whether an address of this host has that name: only to such a one can a socket be bound."""
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as tried:
            tried.bind(address)
            return True
    return False


def run(
    program: Sequence[str],
    *,
    restarts: int,
    failures: bool = False,
    ranks: int | None = None,
    hosts: Sequence[str] = (),
    hostfile: str | None = None,
    mpirun_args: Sequence[str] = (),
    min_ranks: int = 1,
    stop_within_s: float | None = None,
    backoff_s: float = BACKOFF_S,
    probe_s: float = PROBE_S,
    **how: Any,
) -> int:
    """Run a job, and again on the hosts that are left when it was lost.

    Blocking; for a process of its own, see `launcher.run`. A signal ends all of it, also between
    two starts. Without `hosts` and `hostfile` the hosts are those of Slurm's allocation; in that of
    another batch system mpirun is asked for all of them again.

    Parameters
    ----------
    program, ranks, hosts, hostfile, mpirun_args, **how
        See `launcher.plan`.
    restarts : int
        How often at the most.
    failures : bool
        Whether a failure of the program is a reason, too.
    min_ranks : int, default 1
        With fewer there is no start. Where the hosts are known, and have fewer slots than `ranks`,
        but as many as this, there are as many ranks as slots from the first start on.
    stop_within_s : float, optional
        SIGUSR1 asks the ranks to commit and to stop, and no restart follows; see `launcher.Ending`.
    backoff_s : float
        Seconds before the first restart; they double with each, up to `BACKOFF_S_MAX`.
    probe_s : float
        Seconds that hosts have to answer.

    Returns
    -------
    int
        The exit code of the last start, see `launcher.run`; `launcher.STOPPED` if the ranks stopped
        because they were asked to.

    Raises
    ------
    LauncherError
        The job cannot be started; nothing runs.
    """
    places = Places(tuple(hosts), hostfile)
    slots = places.slots() or allocation()
    if min_ranks > 1 and slots:
        if sum(slots.values()) < min_ranks:
            raise LauncherError(
                f"min-ranks is {min_ranks}, and the hosts have {sum(slots.values())} slots: "
                f"{', '.join(f'{host}:{count}' for host, count in slots.items())}"
            )
        if ranks is not None:
            ranks = min(ranks, sum(slots.values()))
    variables = {} if stop_within_s is None else {launcher.STOPS_VARIABLE: "1"}
    step: int | None = None
    began = True
    with (
        launcher.Ending(stop_within_s) as ending,
        tempfile.TemporaryDirectory(prefix="hopcoll-") as folder,
        _progress_file(Path(folder)) as progress,
    ):
        for count in range(restarts + 1):
            job = launcher.plan(
                program,
                ranks=ranks,
                hosts=places.hosts,
                hostfile=places.hostfile,
                mpirun_args=mpirun_args,
                variables={
                    RESTART_VARIABLE: str(count),
                    PROGRESS_VARIABLE: str(progress),
                    **variables,
                },
                **how,
            )
            ended = launcher.attend(job, ending)
            why = ended.lost
            if failures and ended.code and not why:
                why = f"the program failed with code {ended.code}"
            if ending.number is not None or ending.asked or not why:
                return ended.code
            if count == restarts:
                _say(f"{why}; that was the last of {restarts + 1} starts")
                return ended.code
            wait_s = min(backoff_s * 2**count, BACKOFF_S_MAX)
            _say(f"{why}; restart {count + 1} of {restarts} in {wait_s:g} s")
            _wait(wait_s, ending)
            left = _left(list(slots), agent(mpirun_args), probe_s, ending)
            if ending.number is not None:
                return 128 + ending.number
            if ending.asked:  # between two starts all that is committed is durable
                return launcher.STOPPED
            before, step = step, read_progress(progress)
            if slots and not left:
                _say(f"no host answered within {probe_s:g} s: {', '.join(slots)}")
                return ended.code
            if len(left) < len(slots):
                gone = [host for host in slots if host not in left]
                slots, all_slots = {host: slots[host] for host in left}, slots
                ranks = fewer_ranks(ranks, all_slots, slots)
                if places == Places():
                    places = Places(tuple(f"{host}:{its}" for host, its in slots.items()))
                else:
                    places = places.only(left, Path(folder))
                _say(f"without {', '.join(gone)}, which did not answer within {probe_s:g} s")
                if (count_left := sum(slots.values()) if ranks is None else ranks) < min_ranks:
                    _say(f"{count_left} ranks would be left, and min-ranks is {min_ranks}")
                    return ended.code or launcher.NOBODY_SURVIVED
            elif not (began or ended.began):
                _say("nor did one the time before, and no host has gone: no further start")
                return ended.code
            elif step is not None and step == before:
                _say(f"no progress since step {step}, and no host has gone: the program's fault")
                return ended.code
            began = ended.began
    raise AssertionError("the last start has returned")


def _say(what: str) -> None:
    print(f"hopcoll run: {what}", file=sys.stderr, flush=True)


def _wait(wait_s: float, ending: launcher.Ending) -> None:
    deadline_s = time.monotonic() + wait_s
    while not ending.over and (left_s := deadline_s - time.monotonic()) > 0:
        time.sleep(min(left_s, _TICK_S))


@contextmanager
def _progress_file(folder: Path) -> Iterator[Path]:
    """The caller's, else one in the working directory, which hosts mostly share."""
    if given := os.environ.get(PROGRESS_VARIABLE):
        yield Path(given)
        return
    here = Path.cwd()
    name = f".hopcoll-progress-{socket.gethostname()}-{os.getpid()}"
    file = (here if os.access(here, os.W_OK) else folder) / name
    try:
        yield file
    finally:
        for left in (file, *file.parent.glob(f"{name}.*")):  # those of ranks that died in between
            left.unlink(missing_ok=True)
