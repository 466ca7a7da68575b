"""Time hopcoll and its peers side by side over rate-limited hosts, call by call.

``python -m benchmarks.lab.peers --hosts 8 --rate 1gbit --json F.json`` makes a lab of its own, with
a rank a host, and measures in turn, in the order A B C, C B A and so on:

objects
    hopcoll's objects. bcast: a put, and gets by all others; gather: a put on every rank, and gets
    at one, all at once; reduce: a put on every rank, `Objects.reduce` and a get at one; allreduce:
    the same, and a get on every rank, of a ref that is an object itself. Deletes come later.
collectives
    hopcoll's Bcast, Gather, Reduce, Allreduce.
mpi
    The same of mpi4py, under a plain mpirun, with that MPI's own choice of algorithms.
gloo
    torch.distributed on the CPU.
ray
    Ray's object store: the same as with objects, between actors; sums are made at one of them.

Every call goes from arrays to arrays: a put is part of what is timed, as a send is. All results are
compared with what they must be, outside of the time. All systems are timed in one way:

- Where S/B is under 50 ms, in batches that take 50 ms or more. All ranks begin at a moment that
  they have agreed on, and make so many calls that follow each other; a call's time is the batch's
  over their number. The root moves on by one rank with each call, so that nobody gives for long
  without having taken: a rank that only sends would be done before anybody has anything.
- Else a batch is one call, with rank 0 as the root.
- In *staggered* calls rank r calls r S/B seconds (bcast) or r S/2B (reduce, allreduce) after rank
  0, where S/B is a millisecond or more; each is timed alone.

The time is from when the last one began (who sleeps wakes up a little late on few processors) until
the last one has its results. S is the bytes that one rank gives, B the bytes a second that a link
carries behind its headers.

The report is written after each cell, with how it was timed; table and plot lie beside it. Called
again with the same file, it measures what is missing there, other sizes and systems too, so a table
can be made in pieces. A cell over the limit says so, and is not tried again; one that failed is.

Gloo needs torch, Ray needs ray; what is not installed is left out, and said so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
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

from benchmarks.collectives import size_name
from benchmarks.lab.cluster import Lab, exits_when_told
from benchmarks.lab.jobs import (
    bound_s,
    busy_share,
    environment,
    machine,
    markdown,
    run_apart,
    run_job,
    sizes_of,
    where,
    write,
)
from benchmarks.lab.network import LabError, bits_per_s
from benchmarks.lab.peers_job import BATCH_S, OPERATIONS, Case, Plan, key_of
from hopcoll.launcher import find_mpirun

_JOB = "benchmarks.lab.peers_job"
_JOB_S = 3600.0  # each cell has a limit of its own
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
#: Ranks come one by one where a step is so long.
_STEP_S_MIN = 1e-3
#: Of each cell in a job: batches, staggered calls.
_BATCHES, _STAGGERED_CALLS = 3, 5
#: A case is measured in as many turns as S/B fits into this, and at least in one.
_TURNS_S = 1.5
_START_S = 120.0
#: For the forecast: seconds of a job's start, of a cell beside its calls.
_STARTS_S = {"gloo": 6.0, "ray": 20.0}
_CELL_S = 0.3


def peers_of(_: object, __: object, text: str) -> list[str]:
    """Return the systems of a word such as mpi,ray: a callback of click."""
    names = [word.strip() for word in text.split(",")]
    for name in names:
        if name not in SYSTEMS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(SYSTEMS)}")
    return list(dict.fromkeys(names))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--hosts", default=8, show_default=True, help="How many, with a rank each.")
@click.option("--rate", default="1gbit", show_default=True, help="What each link carries.")
@click.option("--sizes", default="1KiB,32KiB,1MiB", show_default=True, callback=sizes_of)
@click.option("--turns", default=3, show_default=True, help="Jobs of each system, at the most.")
@click.option("--peers", "names", default=",".join(SYSTEMS), show_default=True, callback=peers_of)
@click.option("--limit", "limit_s", default=60.0, show_default=True, help="Of a cell, in s.")
@click.option(
    "--json", "path", type=click.Path(path_type=Path), metavar="F.json",
    help="Go on with this report; F.md and F.png are table and plot.",
)  # fmt: skip
@click.option("--name", default="hoppeers", show_default=True, help="Of the lab.")
def main(
    hosts: int,
    rate: str,
    sizes: list[int],
    turns: int,
    names: list[str],
    limit_s: float,
    path: Path | None,
    name: str,
) -> None:
    """Time hopcoll and its peers over a lab, in turn; print Markdown."""
    try:
        with exits_when_told():
            report = measure(hosts, rate, sizes, turns, names, name, limit_s=limit_s, path=path)
    except LabError as error:
        raise click.ClickException(str(error)) from error
    text = table(report)
    click.echo(text)
    if path is None:
        return
    path.with_suffix(".md").write_text(f"{text}\n")
    try:
        from benchmarks.plotting import plot_peers
    except ModuleNotFoundError as error:
        raise click.ClickException(f"no plot: {error} (pip install matplotlib)") from error
    plot_peers(report, path.with_suffix(".png"))


def measure(
    hosts: int,
    rate: str,
    sizes: Sequence[int],
    turns: int,
    names: Sequence[str],
    name: str,
    *,
    limit_s: float = 60.0,
    path: Path | None = None,
) -> dict[str, Any]:
    """Make a lab, run the jobs and return the report.

    Parameters
    ----------
    hosts, rate, sizes, turns, name, limit_s
        As on the command line.
    names : sequence of str
        Of `SYSTEMS`.
    path : Path, optional
        Where the report is, or will be. A cell that fails or takes too long is noted in it, and
        the others go on.

    Raises
    ------
    LabError
        No lab can be made, the report at `path` is of other hosts, or memory does not suffice.
    """
    if hosts < 2:
        raise LabError("hosts must be at least 2 for a benchmark of wires")
    if turns < 1:
        raise LabError(f"turns must be at least 1, not {turns}")
    check_memory(hosts, max(sizes), _available_bytes())
    missing = left_out(names, hosts)
    for line in missing.values():
        click.echo(f"left out: {line}", err=True)
    names = [one for one in names if one not in missing]
    cases = cases_of(hosts, rate, sizes)
    mpirun = find_mpirun()
    labels = {one: _label(one, f"{mpirun.vendor} {mpirun.version}") for one in names}
    report = opened(path, hosts, rate, labels, list(missing.values()))
    rows = [row_of(report, case, hosts) for case in cases]
    order = [one for turn in range(turns) for one in (names if turn % 2 == 0 else names[::-1])]
    turns_left = [
        (at // len(names), one)
        for at, one in enumerate(order)
        if todo(rows, cases, one, at // len(names), turns)
    ]
    if not turns_left:
        return report
    most_s = sum(
        forecast_s(one, hosts, todo(rows, cases, one, turn, turns), rows, cases)
        for turn, one in turns_left
    )
    click.echo(f"{len(turns_left)} jobs, about {most_s / 60:.0f} minutes", err=True)
    if path is not None:
        write(report, path)  # while nothing is measured yet: the place can be written to
    failed: set[tuple[str, str]] = set()
    with Lab(hosts, rate, name=name) as lab:
        for turn, one in tqdm(turns_left, unit="job", leave=False):
            report["machine"]["busy"].append(busy_share())
            while True:
                left = [
                    case
                    for case in todo(rows, cases, one, turn, turns)
                    if (one, case.key) not in failed
                ]
                if not left:
                    break
                notes = Notes(report, rows, cases, one, hosts, limit_s, path)
                try:
                    _job(lab, one, left, notes)
                except _OverLimit:
                    pass  # noted; the others go on in another job
                except LabError as error:
                    click.echo(f"failed: {SYSTEMS[one][0]}: {error}", err=True)
                    still = [case.key for case in todo(rows, cases, one, turn, turns)]
                    culprits = [notes.begun] if notes.begun else still
                    failed.update((one, key) for key in culprits)
                    notes.fail(culprits, str(error))
    return report


class _OverLimit(Exception):
    """A cell takes too long."""


class Notes:
    """Follows what a job writes of its cells, into the report and to disk."""

    def __init__(
        self,
        report: dict[str, Any],
        rows: Sequence[dict[str, Any]],
        cases: Sequence[Case],
        name: str,
        hosts: int,
        limit_s: float,
        path: Path | None,
    ) -> None:
        self.report, self.name, self.path = report, name, path
        self.cells = {
            case.key: row["cells"].setdefault(name, {"runs": []})
            for case, row in zip(cases, rows, strict=True)
        }
        # Who comes last comes so late, again and again.
        self.limits_s = {
            case.key: limit_s + case.batches * (hosts - 1) * case.step_s for case in cases
        }
        self.limit_s = limit_s
        self.begun: str | None = None
        self.since_s = time.monotonic()
        self.at = 0

    def look(self, file: Path) -> None:
        """Take over what is new.

        Raises
        ------
        LabError
            The job does not begin.
        _OverLimit
            A cell takes too long.
        """
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        for line in lines[self.at :]:
            if not line.endswith("\n"):
                break  # it is being written
            self.at += 1
            words = json.loads(line)
            self.since_s = time.monotonic()
            if words["run"] is None:
                self.begun = words["key"]
                continue
            self.begun = None
            cell = self.cells[words["key"]]
            cell["runs"].append(words["run"])
            cell.pop("failed", None)
            self.save()
        taken_s = time.monotonic() - self.since_s
        if self.begun is not None and taken_s > self.limits_s[self.begun]:
            self.cells[self.begun]["over_s"] = self.limit_s
            self.save()
            raise _OverLimit
        if self.begun is None and taken_s > _START_S:
            raise LabError(f"hung for {taken_s:.0f} s, outside of any cell")

    def fail(self, keys: Sequence[str], why: str) -> None:
        """Note that cells failed."""
        for key in keys:
            self.cells[key]["failed"] = why.strip()
        self.save()

    def save(self) -> None:
        """Write the report."""
        if self.path is not None:
            write(self.report, self.path)


# ---- what is to be measured -----------------------------------------------------------------


def cases_of(hosts: int, rate: str, sizes: Sequence[int]) -> list[Case]:
    """Return what each job calls, in order."""
    cases = []
    for nbytes in sorted(set(sizes)):
        least_s = bound_s("bcast", nbytes, hosts, bits_per_s(rate))
        is_short = least_s < BATCH_S
        for operation in OPERATIONS:
            cases.append(Case(operation, nbytes, _BATCHES if is_short else 1, is_short))
            step_s = least_s if operation == "bcast" else least_s / 2
            if operation != "gather" and step_s >= _STEP_S_MIN:
                calls = _STAGGERED_CALLS if is_short else 1
                cases.append(Case(operation, nbytes, calls, step_s=step_s))
    return cases


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


def turns_of(least_s: float, turns: int) -> int:
    """Return in how many jobs a case is measured: in fewer when it takes long."""
    return max(1, min(turns, int(_TURNS_S / least_s)))


def todo(
    rows: Sequence[dict[str, Any]], cases: Sequence[Case], name: str, turn: int, turns: int
) -> list[Case]:
    """Return the cases that a system's job still has to do in a turn."""
    left = []
    for case, row in zip(cases, rows, strict=True):
        cell = row["cells"].get(name, {"runs": []})
        wanted = min(turn + 1, turns_of(row["bound_s"], turns))
        if len(cell["runs"]) < wanted and "over_s" not in cell:
            left.append(case)
    return left


def forecast_s(
    name: str,
    hosts: int,
    left: Sequence[Case],
    rows: Sequence[dict[str, Any]],
    cases: Sequence[Case],
) -> float:
    """Return about how long a job takes."""
    bounds = {case.key: row["bound_s"] for case, row in zip(cases, rows, strict=True)}
    taken_s = _STARTS_S.get(name, 4.0)
    for case in left:
        call_s = _over_bound(name, case.operation, hosts) * bounds[case.key]
        if case.is_batch:
            call_s = max(2 * BATCH_S, call_s) + _CELL_S / 2
        taken_s += _CELL_S + case.batches * (call_s + (hosts - 1) * case.step_s)
    return taken_s


def _over_bound(name: str, operation: str, hosts: int) -> float:
    """How many times S/B a large call takes, roughly."""
    if operation == "gather":
        return hosts - 1
    if name in ("objects", "collectives"):
        return 3.0 if operation == "allreduce" else 1.5
    if name == "ray":
        return 2.0 * hosts if operation == "allreduce" else hosts
    return hosts - 1 if operation == "bcast" else math.log2(hosts) + 1


def check_memory(hosts: int, nbytes: int, available_bytes: int) -> None:
    """See that the largest call has room on this machine.

    Raises
    ------
    LabError
        It has not.
    """
    # An allreduce of objects: on each host the array, the object, a partial sum and the sum.
    needed = 4 * hosts * nbytes + (2 << 30)
    if needed > available_bytes:
        raise LabError(
            f"sizes: {hosts} hosts with {size_name(nbytes)} each need {needed / 2**30:.1f} GiB, "
            f"and this machine has {available_bytes / 2**30:.1f} GiB to spare"
        )


def _available_bytes() -> int:
    words = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(words["MemAvailable"].split()[0]) << 10


# ---- the report -----------------------------------------------------------------------------


def opened(
    path: Path | None, hosts: int, rate: str, labels: dict[str, str], missing: list[str]
) -> dict[str, Any]:
    """Return the report at a path, to go on with, or a new one.

    Raises
    ------
    LabError
        The file is no report of these hosts.
    """
    if path is None or not path.exists():
        return {
            "hosts": hosts,
            "rate": rate,
            "timing": (
                "Each number of seconds is a batch's time over its calls, which follow each other; "
                f"a batch takes {BATCH_S} s or more, or is one call. Each rank is the root in "
                "turn, from rank 0 on. In rows with a step_s rank r begins r of them after rank 0."
            ),
            "systems": labels,
            "left_out": missing,
            "rows": [],
            "machine": machine(),
        }
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        before = report["hosts"], report["rate"]
        cells = [row["cells"] for row in report["rows"]]
        if not all(isinstance(each, dict) for each in cells):
            raise TypeError("cells are no objects")
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path} is no report of this benchmark: {error}") from error
    if before != (hosts, rate):
        raise LabError(
            f"{path} is of {before[0]} hosts at {before[1]}, not of {hosts} at {rate}; "
            "take another file"
        )
    both = {**report["systems"], **labels}
    report["systems"] = {one: both[one] for one in SYSTEMS if one in both}
    report["left_out"] = missing
    return report


def row_of(report: dict[str, Any], case: Case, hosts: int) -> dict[str, Any]:
    """Return a case's row of a report; a new one if there is none."""
    for row in report["rows"]:
        row_key = key_of(row["operation"], row["nbytes"], row["step_s"] > 0)
        if row_key == case.key:
            return row
    row = {
        "operation": case.operation,
        "step_s": case.step_s,
        "nbytes": case.nbytes,
        "bound_s": bound_s("bcast", case.nbytes, hosts, bits_per_s(report["rate"])),
        "cells": {},
    }
    report["rows"].append(row)
    return row


def medians(row: dict[str, Any]) -> dict[str, float]:
    """Return the median time of a call of each system that has one, in seconds."""
    return {
        name: median(time_s for run in cell["runs"] for time_s in run["seconds"])
        for name, cell in row["cells"].items()
        if cell["runs"]
    }


def table(report: dict[str, Any]) -> str:
    """Return the figures of a report as Markdown: milliseconds, and in brackets over S/B."""
    systems = report["systems"]
    rows = [["ms (over S/B)", "size", "S/B ms", *systems.values(), "timed"]]
    for row in sorted(report["rows"], key=_place):
        kind = f"{row['operation']}{', staggered' if row['step_s'] else ''}"
        figures = [_figure(row, name) for name in systems]
        size, least = size_name(row["nbytes"]), _ms(row["bound_s"])
        rows.append([kind, size, least, *figures, how_timed(row)])
    lines = markdown(rows)
    lines += [
        "",
        f"{where(report)} between jobs. Medians. Timed: so many times, each a call's share of "
        "so many calls in a row (few for slow systems, many for fast ones).",
    ]
    if any("over_s" in cell for row in report["rows"] for cell in row["cells"].values()):
        lines.append(">: given up after so long, the warm-up counted in.")
    lines += [f"left out: {line}" for line in report["left_out"]]
    for row in report["rows"]:
        for name, cell in row["cells"].items():
            if "failed" in cell:
                what = key_of(row["operation"], row["nbytes"], row["step_s"] > 0)
                lines.append(f"failed: {systems[name]}, {what}: {cell['failed'].splitlines()[0]}")
    return "\n".join(lines)


def how_timed(row: dict[str, Any]) -> str:
    """Return in a few words how the cells of a row were timed: batches x calls in each."""
    runs = [run for cell in row["cells"].values() for run in cell["runs"]]
    if not runs:
        return ""
    times = [
        sum(len(run["seconds"]) for run in cell["runs"])
        for cell in row["cells"].values()
        if cell["runs"]
    ]
    calls = [run["calls"] for run in runs]
    return f"{_span(times)} x {_span(calls)}"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _place(row: dict[str, Any]) -> tuple[bool, int, int]:
    """Those with all ranks at once come before the staggered ones."""
    return row["step_s"] > 0, OPERATIONS.index(row["operation"]), row["nbytes"]


def _figure(row: dict[str, Any], name: str) -> str:
    cell = row["cells"].get(name, {"runs": []})
    if "over_s" in cell:
        return f">{cell['over_s'] * 1e3:.0f}"
    if not cell["runs"]:
        return "failed" if "failed" in cell else ""
    time_s, least_s = medians(row)[name], row["bound_s"]
    ms = _ms(time_s)
    return ms if least_s < _STEP_S_MIN else f"{ms} ({time_s / least_s:.2f})"


def _ms(time_s: float) -> str:
    return f"{time_s * 1e3:.3g}" if time_s < 1 else f"{time_s * 1e3:.0f}"


def _label(name: str, mpi: str) -> str:
    label, package = SYSTEMS[name]
    if package is not None:
        return f"{label} ({package} {importlib.metadata.version(package)})"
    return f"{mpi} (mpi4py)" if name == "mpi" else label


# ---- jobs -----------------------------------------------------------------------------------


def _job(lab: Lab, name: str, cases: Sequence[Case], notes: Notes) -> None:
    with tempfile.TemporaryDirectory(prefix="hop", ignore_cleanup_errors=True) as folder:
        address = lab.layout.address(lab.hosts[0])
        path = Path(folder, "plan.json")
        plan = Plan(folder, len(lab.hosts), address, tuple(cases))
        plan.write(path)
        # Of a host: its array, all that it gathers, or its partial sum and the sum.
        room = max((len(lab.hosts) + 2) * max(case.nbytes for case in cases), 1 << 30)

        def look() -> None:
            notes.look(plan.notes)

        try:
            if name == "ray":
                _run_ray(lab, path, Path(folder), room, look)
            elif name == "gloo":
                words = [["--rank", name, str(path), str(host - 1)] for host in lab.hosts]
                run_apart(lab, _JOB, words, limit_s=_JOB_S, look=look)
            else:
                settings = {} if name == "mpi" else {"HOPCOLL_OBJECT_BYTES": str(room)}
                words = [name, str(path)]
                run_job(
                    lab, _JOB, words, plain=name == "mpi", limit_s=_JOB_S, look=look, **settings
                )
        except LabError:
            look()  # which cell it was in
            raise
        look()


def _run_ray(lab: Lab, plan: Path, folder: Path, room: int, look: Callable[[], None]) -> None:
    """Run Ray's daemons on all hosts, and its driver on the first; end all of them."""
    environ = environment(RAY_USAGE_STATS_ENABLED="0")
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
                command, env=environ, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip
            ends.callback(daemon.wait)
            ends.callback(lab.lose, host)
            if host == lab.hosts[0]:
                _wait_for(daemon, folder / "ray.out")
        run_apart(lab, "benchmarks.lab.peers_ray", [[str(plan)]], limit_s=_JOB_S, look=look)


def _wait_for(daemon: subprocess.Popen[bytes], said: Path) -> None:
    """Wait until Ray's head has written that it runs."""
    deadline_s = time.monotonic() + 60
    while "Ray runtime started" not in said.read_text():
        if daemon.poll() is not None or time.monotonic() > deadline_s:
            raise LabError(f"Ray did not start: {said.read_text()[-2000:]}")
        time.sleep(0.2)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.lab.peers")
