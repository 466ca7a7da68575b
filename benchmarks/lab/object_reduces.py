"""Time reductions of objects over rate-limited hosts, against what the wire allows.

``python -m benchmarks.lab.object_reduces --hosts 8 --rate 1gbit --sizes 1MiB,32MiB`` makes a lab
of its own with a rank a host. Each rank puts an object of S bytes; rank 0 has them added up:

reduce
    All inputs are there; until rank 0 has the result.
one by one
    An input appears every S/B/2 seconds; from the last one on until rank 0 has the result.
broadcast, allreduce
    An object that is there, to all; and a reduction of which all ranks get the result.
killed
    As reduce, and a rank with an input, of one more than are taken, is killed when half of the
    time of the reductions before has passed.

Figures are multiples of S/B, where B is the bytes a second that a link carries behind its headers;
allreduce also of reduce and broadcast one after the other, killed of the median of "reduce".
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
from collections.abc import Callable, Sequence
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
from benchmarks.lab.objects import sleep_until

_MODULE = "benchmarks.lab.object_reduces"
_GET_S = 60.0
_KINDS = ("reduce", "one by one", "broadcast", "allreduce")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--hosts", default=8, show_default=True, help="How many, with a rank each.")
@click.option("--rate", default="1gbit", show_default=True, help="What each link carries.")
@click.option("--sizes", default="1MiB,32MiB", show_default=True, callback=sizes_of)
@click.option("--turns", default=5, show_default=True, help="Reductions of each kind.")
@click.option("--kills", default=3, show_default=True, help="Jobs with a kill, of each size.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--name", default="hopred", show_default=True, help="Of the lab.")
def main(
    hosts: int, rate: str, sizes: list[int], turns: int, kills: int, path: Path | None, name: str
) -> None:
    """Time reductions of objects over a lab, as multiples of the bound; print Markdown."""
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
                # The first job loses nobody; then one in the middle, the last, the next to rank 0.
                victim = [0, hosts // 2, hosts - 1, 1][number % 4]
                words = [str(folder), str(nbytes), str(turns), repr(least_s), str(victim)]
                run_job(lab, _MODULE, words)
                said = json.loads((folder / "times.json").read_text())
                if number == 0:
                    row.update(said)
                else:
                    row["killed"].append(said)
                todo.update()
            report["rows"].append(row)
        todo.close()
        report["machine"]["busy_after"] = busy_share()
    return report


def table(report: dict[str, Any]) -> str:
    """Return the figures of a report as Markdown."""
    head = ["size", "S/B ms", *_KINDS, "allreduce, over both", "killed half way, over reduce"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in report["rows"]:
        middle = {kind: median(row[kind]) for kind in _KINDS}
        both = middle["allreduce"] / (middle["reduce"] + middle["broadcast"])
        rows.append([
            size_name(row["nbytes"]),
            f"{row['bound_s'] * 1e3:.1f}",
            *(f"{middle[kind] / row['bound_s']:.2f}" for kind in _KINDS),
            f"{both:.2f}",
            " ".join(f"{one['time_s'] / median(one['reduce']):.2f}" for one in row["killed"]),
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
    expected = given * comm.size

    def called(names: list[str], count: int) -> Any:
        """The ref of a reduction that rank 0 has called, at all."""
        return comm.bcast(objects.reduce(names, count=count) if comm.rank == 0 else None)

    def ended(begin_s: float, getters: Sequence[int], get: Callable[[], np.ndarray]) -> float:
        """How long the slowest of them took."""
        taken_s, got = 0.0, None
        if comm.rank in getters:
            sleep_until(begin_s)
            got = get()
            taken_s = time.monotonic() - begin_s
        slowest_s = max(comm.allgather(taken_s))
        assert got is None or np.array_equal(got, expected)
        return slowest_s

    def reduced(name: str, getters: Sequence[int], step_s: float) -> float:
        names = [f"{name}-{rank}" for rank in range(comm.size)]
        if not step_s:
            objects.put(given, id=names[comm.rank])
            comm.Barrier()
            begin_s = agreed_start(comm)
            sleep_until(begin_s)
            ref = called(names, comm.size)
        else:
            ref = called(names, comm.size)
            first_s = agreed_start(comm)
            sleep_until(first_s + comm.rank * step_s)
            objects.put(given, id=names[comm.rank])
            begin_s = comm.bcast(time.monotonic(), root=comm.size - 1)
        slowest_s = ended(begin_s, getters, lambda: objects.get(ref, timeout_s=_GET_S))
        if comm.rank == 0:
            for each in (ref, *names):
                objects.delete(each)
        comm.Barrier()
        return slowest_s

    def broadcast(name: str) -> float:
        if comm.rank == 0:
            objects.put(expected, id=name)
        begin_s = agreed_start(comm)
        getters = range(1, comm.size)
        slowest_s = ended(begin_s, getters, lambda: objects.get(name, timeout_s=_GET_S))
        if comm.rank == 0:
            objects.delete(name)
        comm.Barrier()
        return slowest_s

    everybody = range(comm.size)
    reduced("warm", everybody, 0.0)
    times = {"reduce": [reduced(f"r{turn}", [0], 0.0) for turn in range(turns)]}
    if not victim:
        times["one by one"] = [reduced(f"s{turn}", [0], least_s / 2) for turn in range(turns)]
        times["broadcast"] = [broadcast(f"b{turn}") for turn in range(turns)]
        times["allreduce"] = [reduced(f"a{turn}", everybody, 0.0) for turn in range(turns)]
        if comm.rank == 0:
            (folder / "times.json").write_text(json.dumps(times))
        return
    # One input more than is taken, at rank 0, which lives.
    names = [f"last-{rank}" for rank in range(comm.size)]
    objects.put(given, id=names[comm.rank])
    if comm.rank == 0:
        objects.put(given, id="spare")
    comm.Barrier()
    begin_s = agreed_start(comm)
    if comm.rank == victim:
        after_s = begin_s + median(times["reduce"]) / 2 - time.monotonic()
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    sleep_until(begin_s)
    if comm.rank == 0:
        got = objects.get(objects.reduce([*names, "spare"], count=comm.size), timeout_s=_GET_S)
        time_s = time.monotonic() - begin_s
        assert np.array_equal(got, expected)
        said = {**times, "victim": victim, "time_s": time_s}
        (folder / "times.json").write_text(json.dumps(said))
    if comm.rank == victim:
        time.sleep(_GET_S)  # until it dies
    comm.Barrier()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        _rank(Path(sys.argv[2]), *map(int, sys.argv[3:5]), float(sys.argv[5]), int(sys.argv[6]))
    else:
        main(prog_name="python -m benchmarks.lab.object_reduces")
