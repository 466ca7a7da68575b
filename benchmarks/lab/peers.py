"""Time hopcoll and its peers side by side over rate-limited hosts, call by call.

``python -m benchmarks.lab.peers --hosts 8 --rate 1gbit --sizes 1KiB,32KiB,1MiB`` makes a lab of its
own, with a rank a host, and measures in turn, in the order A B C, C B A and so on:

objects
    hopcoll's objects. bcast: a put, and gets by all others; gather: a put on every rank, and gets
    at one; reduce: a put on every rank, `Objects.reduce` and a get at one; allreduce: the same,
    and a get on every rank.
collectives
    hopcoll's Bcast, Gather, Reduce, Allreduce.
mpi
    The same of mpi4py, under a plain mpirun, with that MPI's own choice of algorithms.
gloo
    torch.distributed on the CPU.
ray
    Ray's object store: the same as with objects, between actors; sums are made at one of them.

Every call goes from arrays to arrays: a put is part of what is timed, as a send is. All ranks begin
at a moment that they have agreed on; in the *staggered* calls one after the other, in their order,
every S/B seconds (bcast) or S/2B (reduce, allreduce). The time is from when the last one began (who
sleeps wakes up a little late on few processors) until the last one has its result. Rank 0 is the
root. S is the bytes that one rank gives, B the bytes a second that a link carries behind its
headers. Each result is compared with what it must be, outside of the time. Figures are medians of
all calls.

Gloo needs torch, Ray needs ray; what is not installed is left out, and said so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import click
from tqdm import tqdm

from benchmarks.collectives import cpu_name, size_name
from benchmarks.lab.cluster import Lab, exits_when_told
from benchmarks.lab.collectives import bound_s, busy_share, run_job, sizes_of
from benchmarks.lab.network import LabError, bits_per_s
from benchmarks.lab.peers_job import OPERATIONS, Case, Plan
from hopcoll.launcher import find_mpirun

_JOB = "benchmarks.lab.peers_job"
_JOB_S = 600.0
#: Every system: what people read, and the package that it needs.
SYSTEMS: dict[str, tuple[str, str | None]] = {
    "objects": ("hopcoll objects", None),
    "collectives": ("hopcoll collectives", None),
    "mpi": ("mpi4py", None),
    "gloo": ("Gloo", "torch"),
    "ray": ("Ray", "ray"),
}
#: Its daemons alone need more than a processor can give beyond that.
_RAY_HOSTS_MAX = 8
#: Up to this size a job makes several calls; ranks that come one by one do so from S/B on.
_SMALL_BYTES, _SMALL_CALLS = 1 << 20, 5
_STEP_S_MIN = 1e-3


def peers_of(_: object, __: object, text: str) -> list[str]:
    names = [word.strip() for word in text.split(",")]
    for name in names:
        if name not in SYSTEMS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(SYSTEMS)}")
    return list(dict.fromkeys(names))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--hosts", default=8, show_default=True, help="How many, with a rank each.")
@click.option("--rate", default="1gbit", show_default=True, help="What each link carries.")
@click.option("--sizes", default="1KiB,32KiB,1MiB", show_default=True, callback=sizes_of)
@click.option("--turns", default=3, show_default=True, help="Jobs of each system.")
@click.option("--peers", "names", default=",".join(SYSTEMS), show_default=True, callback=peers_of)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw them here.")
@click.option("--name", default="hoppeers", show_default=True, help="Of the lab.")
def main(
    hosts: int,
    rate: str,
    sizes: list[int],
    turns: int,
    names: list[str],
    path: Path | None,
    png: Path | None,
    name: str,
) -> None:
    """Time hopcoll and its peers over a lab, in turn; print Markdown."""

    def save(report: dict[str, Any]) -> None:
        if path is not None:
            path.write_text(json.dumps(report, indent=1) + "\n")

    try:
        with exits_when_told():
            report = measure(hosts, rate, sizes, turns, names, name, save)
    except LabError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(report))
    if png is not None:
        from benchmarks.plotting import plot_peers

        plot_peers(report, png)


def measure(
    hosts: int,
    rate: str,
    sizes: Sequence[int],
    turns: int,
    names: Sequence[str],
    name: str,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Make a lab, run the jobs and return the report.

    Parameters
    ----------
    hosts, rate, sizes, turns, name
        As on the command line.
    names : sequence of str
        Of `SYSTEMS`.
    save : callable, optional
        Is called with the report as it is after each job. A job that fails is noted in it, and
        the others go on.

    Raises
    ------
    LabError
        No lab can be made.
    """
    if hosts < 2:
        raise LabError("hosts must be at least 2 for a benchmark of wires")
    if turns < 1:
        raise LabError(f"turns must be at least 1, not {turns}")
    missing = left_out(names, hosts)
    for line in missing.values():
        click.echo(f"left out: {line}", err=True)
    names = [one for one in names if one not in missing]
    mpirun = find_mpirun()
    cases = cases_of(hosts, rate, sizes)
    report: dict[str, Any] = {
        "hosts": hosts,
        "rate": rate,
        "turns": turns,
        "systems": {one: _label(one, f"{mpirun.vendor} {mpirun.version}") for one in names},
        "left_out": list(missing.values()),
        "failed": [],
        "rows": [
            {
                "operation": case.operation,
                "step_s": case.step_s,
                "nbytes": case.nbytes,
                "bound_s": bound_s("bcast", case.nbytes, hosts, bits_per_s(rate)),
                "times_s": {},
            }
            for case in cases
        ],
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "busy": [busy_share()],
        },
    }
    with Lab(hosts, rate, name=name) as lab:
        order = [one for turn in range(turns) for one in (names if turn % 2 == 0 else names[::-1])]
        for one in tqdm(order, unit="job", leave=False):
            try:
                times = _job(lab, one, cases)
            except LabError as error:
                report["failed"].append(f"{SYSTEMS[one][0]}: {error}")
                click.echo(f"failed: {report['failed'][-1]}", err=True)
                times = {}
            for case, row in zip(cases, report["rows"], strict=True):
                if case.key in times:
                    row["times_s"].setdefault(one, []).append(times[case.key])
            report["machine"]["busy"].append(busy_share())
            save(report)
    return report


def left_out(names: Sequence[str], hosts: int) -> dict[str, str]:
    """Return which systems cannot be measured here, and why."""
    why = {}
    for name in names:
        label, package = SYSTEMS[name]
        if package is not None and importlib.util.find_spec(package) is None:
            why[name] = f"{label} (pip install {package})"
        elif name == "ray" and hosts > _RAY_HOSTS_MAX:
            why[name] = f"{label} (its daemons are too many beyond {_RAY_HOSTS_MAX} hosts)"
    return why


def cases_of(hosts: int, rate: str, sizes: Sequence[int]) -> list[Case]:
    """Return what each job calls, in order."""
    cases = []
    for nbytes in sorted(sizes):
        calls = _SMALL_CALLS if nbytes <= _SMALL_BYTES else 1
        least_s = bound_s("bcast", nbytes, hosts, bits_per_s(rate))
        for operation in OPERATIONS:
            cases.append(Case(operation, nbytes, calls))
            step_s = least_s if operation == "bcast" else least_s / 2
            if operation != "gather" and step_s >= _STEP_S_MIN:
                cases.append(Case(operation, nbytes, calls, step_s))
    return cases


def _label(name: str, mpi: str) -> str:
    label, package = SYSTEMS[name]
    if package is not None:
        return f"{label} ({package} {importlib.metadata.version(package)})"
    return f"{mpi} (mpi4py)" if name == "mpi" else label


def _job(lab: Lab, name: str, cases: Sequence[Case]) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="hop") as folder:
        address = lab.layout.address(lab.hosts[0])
        plan = Path(folder, "plan.json")
        Plan(folder, len(lab.hosts), address, tuple(cases)).write(plan)
        if name == "ray":
            _run_ray(lab, plan, Path(folder), max(case.nbytes for case in cases))
        elif name == "gloo":
            words = [_JOB, "--rank", name, str(plan)]
            _run_apart(lab, [[*words, str(host - 1)] for host in lab.hosts])
        else:
            room = (len(lab.hosts) + 2) * max(case.nbytes for case in cases)
            settings = {} if name == "mpi" else {"HOPCOLL_OBJECT_BYTES": str(max(room, 1 << 28))}
            words = [name, str(plan)]
            run_job(lab, _JOB, words, plain=name == "mpi", limit_s=_JOB_S, **settings)
        times: dict[str, list[float]] = json.loads(Path(folder, "times.json").read_text())
        return times


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _run_apart(lab: Lab, modules: Sequence[Sequence[str]]) -> None:
    """Run a module on each host, the first on the first, and wait for all of them.

    Raises
    ------
    LabError
        One failed, or hung; all have ended.
    """
    with tempfile.TemporaryFile("w+") as said:
        jobs = [
            subprocess.Popen(
                lab.inside(host, sys.executable, "-m", *words),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
            for host, words in zip(lab.hosts, modules, strict=False)
        ]
        try:
            deadline_s = time.monotonic() + _JOB_S
            while any(job.poll() is None for job in jobs):
                late = time.monotonic() > deadline_s
                if late or any(job.returncode for job in jobs):
                    said.seek(0)
                    what = f"hung, {_JOB_S:.0f} s" if late else f"failed\n{said.read()[-4000:]}"
                    raise LabError(f"{modules[0][0]} {what}")
                time.sleep(0.1)
            if any(job.returncode for job in jobs):
                said.seek(0)
                raise LabError(f"{modules[0][0]} failed\n{said.read()[-4000:]}")
        finally:
            for job in jobs:
                if job.poll() is None:
                    job.kill()
                job.wait()


def _run_ray(lab: Lab, plan: Path, folder: Path, nbytes: int) -> None:
    """Run Ray's daemons on all hosts, and its driver on the first; end all of them."""
    room = max((len(lab.hosts) + 2) * nbytes, 1 << 28)
    environment = {**_environment(), "RAY_USAGE_STATS_ENABLED": "0"}
    with ExitStack() as ends, (folder / "ray.out").open("w") as said:
        for host in lab.hosts:
            address = lab.layout.address(host)
            words = ["start", "--block", "--node-ip-address", address, "--num-cpus", "1"]
            words += ["--object-store-memory", str(room)]
            # A folder each: hosts that share one would take each other's sockets.
            words += ["--include-log-monitor", "false", "--temp-dir", str(folder / f"ray{host}")]
            head = f"{lab.layout.address(lab.hosts[0])}:6379"
            if host == lab.hosts[0]:
                words += ["--head", "--port", "6379", "--include-dashboard", "false"]
            else:
                words += ["--address", head]
            command = lab.inside(host, sys.executable, "-m", "ray.scripts.scripts", *words)
            daemon = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip
            ends.callback(daemon.wait)
            ends.callback(lab.lose, host)
            if host == lab.hosts[0]:
                _wait_for(lab, daemon, folder / "ray.out")
        _run_apart(lab, [["benchmarks.lab.peers_ray", str(plan)]])


def _wait_for(lab: Lab, daemon: subprocess.Popen[bytes], said: Path) -> None:
    """Wait until Ray's head has written that it runs."""
    deadline_s = time.monotonic() + 60
    while "Ray runtime started" not in said.read_text():
        if daemon.poll() is not None or time.monotonic() > deadline_s:
            raise LabError(f"Ray did not start: {said.read_text()[-2000:]}")
        time.sleep(0.2)


def medians(row: dict[str, Any]) -> dict[str, float]:
    """Return the median of all calls of each system, in seconds."""
    return {
        name: median(time_s for turn in turns for time_s in turn)
        for name, turns in row["times_s"].items()
    }


def table(report: dict[str, Any]) -> str:
    """Return the figures of a report as Markdown: milliseconds, and in brackets over S/B."""
    systems = report["systems"]
    rows = [["ms (over S/B)", "size", "S/B ms", *systems.values()]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    order = {(name, step): at for at, (name, step) in enumerate(_kinds(report))}
    for row in sorted(report["rows"], key=lambda row: order[row["operation"], row["step_s"] > 0]):
        found = medians(row)
        kind = f"{row['operation']}{', staggered' if row['step_s'] else ''}"
        figures = [_figure(found.get(name), row["bound_s"]) for name in systems]
        rows.append([kind, size_name(row["nbytes"]), f"{row['bound_s'] * 1e3:.3g}", *figures])
    machine = report["machine"]
    busy = [100 * share for share in machine["busy"]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += [
        "",
        f"{report['hosts']} hosts at {report['rate']}, a rank each, on {machine['cores']} cores "
        f"({machine['cpu']}), which other work kept {min(busy):.0f} to {max(busy):.0f} % busy "
        f"between jobs; medians of {report['turns']} turns.",
    ]
    lines += [f"left out: {line}" for line in report["left_out"]]
    lines += [f"failed: {line.splitlines()[0]}" for line in report["failed"]]
    return "\n".join(lines)


def _kinds(report: dict[str, Any]) -> list[tuple[str, bool]]:
    """The operations, those with all ranks at once before the staggered ones."""
    kinds = {(row["operation"], row["step_s"] > 0) for row in report["rows"]}
    return sorted(kinds, key=lambda kind: (kind[1], OPERATIONS.index(kind[0])))


def _figure(time_s: float | None, least_s: float) -> str:
    if time_s is None:
        return ""
    ms = f"{time_s * 1e3:.3g}" if time_s < 1 else f"{time_s * 1e3:.0f}"
    return ms if least_s < _STEP_S_MIN else f"{ms} ({time_s / least_s:.2f})"


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.lab.peers")
