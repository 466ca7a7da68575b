"""Time broadcasts of objects over rate-limited hosts, against what the wire allows.

``python -m benchmarks.lab.objects --hosts 8 --rate 1gbit --sizes 1MiB,32MiB`` makes a lab of its
own with a rank a host. Rank 0 has put an object of S bytes; all others get it, in three ways:

together
    All at the same moment, on the clock that all hosts share; the time is that of the last.
one by one
    One every S/B seconds; the time is the longest that one took from its own call on.
killed
    Together, and one of them, which the others may be pulling from, is killed when half of the
    time of the calls before has passed; the time is that of the last survivor.

Figures are multiples of S/B, where B is the bytes a second that a link carries behind its headers;
those of "killed" of the median of "together" in the same job.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks.collectives import cpu_name, size_name
from benchmarks.lab.cluster import Lab, exits_when_told
from benchmarks.lab.collectives import agreed_start, bound_s, busy_share, run_job, sizes_of
from benchmarks.lab.network import LabError, bits_per_s

_MODULE = "benchmarks.lab.objects"
_GET_S = 60.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--hosts", default=8, show_default=True, help="How many, with a rank each.")
@click.option("--rate", default="1gbit", show_default=True, help="What each link carries.")
@click.option("--sizes", default="1MiB,32MiB", show_default=True, callback=sizes_of)
@click.option("--turns", default=5, show_default=True, help="Broadcasts of each kind.")
@click.option("--kills", default=3, show_default=True, help="Jobs with a kill, of each size.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--name", default="hopobj", show_default=True, help="Of the lab.")
def main(
    hosts: int, rate: str, sizes: list[int], turns: int, kills: int, path: Path | None, name: str
) -> None:
    """Time broadcasts of objects over a lab, as multiples of the bound; print Markdown."""
    try:
        with exits_when_told():
            report = measure(hosts, rate, sizes, turns, kills, name)
    except LabError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(report))
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
        click.echo(f"\nfigures: {path}")


def measure(
    hosts: int, rate: str, sizes: Sequence[int], turns: int, kills: int, name: str
) -> dict[str, Any]:
    """Make a lab, run the jobs and return the report.

    Raises
    ------
    LabError
        No lab can be made, or a job failed or hung.
    """
    if hosts < 3:
        raise LabError("hosts must be at least 3, for one to be killed")
    report: dict[str, Any] = {
        "hosts": hosts,
        "rate": rate,
        "turns": turns,
        "rows": [],
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "busy_before": busy_share(),
        },
    }
    with Lab(hosts, rate, name=name) as lab, tempfile.TemporaryDirectory() as scratch:
        todo = tqdm(total=len(sizes) * (1 + kills), unit="job", leave=False)
        for nbytes in sizes:
            least_s = bound_s("bcast", nbytes, hosts, bits_per_s(rate))
            row: dict[str, Any] = {"nbytes": nbytes, "bound_s": least_s, "killed": []}
            for number in range(1 + kills):
                folder = Path(scratch, f"{nbytes}-{number}")
                folder.mkdir()
                # The first job loses nobody; then one in the middle, the first, the last.
                victim = [0, hosts // 2, 1, hosts - 1][number % 4]
                words = [str(folder), str(nbytes), str(turns), repr(least_s), str(victim)]
                run_job(lab, _MODULE, words)
                if number == 0:
                    row.update(json.loads((folder / "times.json").read_text()))
                else:
                    row["killed"].append(_death(folder, victim, hosts))
                todo.update()
            report["rows"].append(row)
        todo.close()
        report["machine"]["busy_after"] = busy_share()
    return report


def _death(folder: Path, victim: int, hosts: int) -> dict[str, Any]:
    said = [json.loads(path.read_text()) for path in folder.glob("survivor.*")]
    if len(said) != hosts - 2:
        raise LabError(f"of {hosts - 2} receivers that live {len(said)} had the object")
    together_s = median(json.loads((folder / "times.json").read_text())["together"])
    time_s = max(one["end_s"] - one["begin_s"] for one in said)
    return {"victim": victim, "together_s": together_s, "time_s": time_s}


def table(report: dict[str, Any]) -> str:
    """Return the figures of a report as Markdown."""
    rows = [["size", "S/B ms", "together", "one by one", "killed half way, over together"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for row in report["rows"]:
        kills = [f"{one['time_s'] / one['together_s']:.2f}" for one in row["killed"]]
        rows.append([
            size_name(row["nbytes"]),
            f"{row['bound_s'] * 1e3:.1f}",
            f"{median(row['together']) / row['bound_s']:.2f}",
            f"{median(row['one by one']) / row['bound_s']:.2f}",
            " ".join(kills),
        ])  # fmt: skip
    machine = report["machine"]
    return "\n".join([
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"{report['hosts']} hosts at {report['rate']}, a rank each, on {machine['cores']} cores "
        f"({machine['cpu']}), which other work kept {100 * machine['busy_before']:.0f} % busy "
        f"before and {100 * machine['busy_after']:.0f} % after; medians of {report['turns']}.",
    ])  # fmt: skip


# What follows runs in the ranks.


def _rank(folder: Path, nbytes: int, turns: int, least_s: float, victim: int) -> None:
    import hopcoll

    comm = hopcoll.init()
    objects = comm.objects
    given = (np.arange(nbytes // 4) % 1000).astype(np.float32)

    def broadcast(name: str, step_s: float) -> float:
        """How long the slowest took to get a new object from its call on."""
        if comm.rank == 0:
            objects.put(given, id=name)
        begin_s = agreed_start(comm) + comm.rank * step_s
        taken_s = 0.0
        if comm.rank:
            sleep_until(begin_s)
            got = objects.get(name, timeout_s=_GET_S)
            taken_s = time.monotonic() - begin_s
            assert np.array_equal(got, given)
        slowest_s = max(comm.allgather(taken_s))
        if comm.rank == 0:
            objects.delete(name)
        comm.Barrier()
        return slowest_s

    broadcast("warm", 0.0)
    times = {"together": [broadcast(f"together{turn}", 0.0) for turn in range(turns)]}
    if not victim:
        times["one by one"] = [broadcast(f"step{turn}", least_s) for turn in range(turns)]
    if comm.rank == 0:
        (folder / "times.json").write_text(json.dumps(times))
        if victim:
            objects.put(given, id="last")
    if not victim:
        return
    begin_s = agreed_start(comm)
    if comm.rank == victim:
        after_s = begin_s + median(times["together"]) / 2 - time.monotonic()
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if comm.rank:
        got = objects.get("last", timeout_s=_GET_S)
        end_s = time.monotonic()
        if comm.rank == victim:
            time.sleep(_GET_S)  # until it dies
        assert np.array_equal(got, given)
        said = {"begin_s": begin_s, "end_s": end_s}
        (folder / f"survivor.{comm.rank}").write_text(json.dumps(said))
    comm.Barrier()


def sleep_until(moment_s: float) -> None:
    while (left_s := moment_s - time.monotonic()) > 0:
        time.sleep(left_s)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        _rank(Path(sys.argv[2]), *map(int, sys.argv[3:5]), float(sys.argv[5]), int(sys.argv[6]))
    else:
        main(prog_name="python -m benchmarks.lab.objects")
