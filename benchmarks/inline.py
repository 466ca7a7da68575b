"""Measure up to which size an object should travel in the directory's messages.

``python -m benchmarks.inline`` runs jobs of three ranks on this host; with ``--hosts 8`` each rank
is on a host of a lab. In one job ``inline_bytes`` is 64 KiB, so that all objects travel in
messages, in the next 512, so that all are pulled; in all, four of each. For each size:

put
    Until the directory has accepted an object. Inline, its bytes go along.
one get
    A get of it at one other rank, of each in turn.
all get
    Gets of another object at all other ranks at once, behind a barrier; the time is that of the
    slowest. Inline, the rank that keeps the key sends the bytes to all.

Keys are kept by all ranks in turn, so figures are medians over all places. Best is the largest
size up to which a put and a get together take no longer inline than otherwise, nor gets of all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from benchmarks.collectives import size_name
from benchmarks.lab.cluster import Lab, exits_when_told
from benchmarks.lab.jobs import environment, machine, markdown, run_job, sizes_of, write
from benchmarks.lab.network import LabError

_MODULE = "benchmarks.inline"
#: What both ways are called, and the limit that makes objects go that way.
WAYS = {"inline": 65536, "pulled": 512}
KINDS = ("put", "one get", "all get")
_SIZES = "1KiB,2KiB,4KiB,8KiB,16KiB,32KiB,64KiB"
_GET_S = 60.0
_ROUNDS = 2  # of four jobs, A B B A


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--ranks", default=3, show_default=True, help="How many, without a lab.")
@click.option("--hosts", type=int, help="Of a lab, with a rank each.")
@click.option("--rate", default="1gbit", show_default=True, help="What each of its links carries.")
@click.option("--sizes", default=_SIZES, show_default=True, callback=sizes_of)
@click.option("--turns", default=50, show_default=True, help="Objects of each size in a job.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--name", default="hopinline", show_default=True, help="Of the lab.")
def main(
    ranks: int,
    hosts: int | None,
    rate: str,
    sizes: list[int],
    turns: int,
    path: Path | None,
    name: str,
) -> None:
    """Time puts and gets of small objects inline and pulled; print Markdown."""
    if max(sizes) > WAYS["inline"] or min(sizes) <= WAYS["pulled"]:
        raise click.ClickException(
            f"sizes must be above {WAYS['pulled']} bytes and at most {WAYS['inline']}"
        )
    try:
        with exits_when_told():
            report = measure(ranks, hosts, rate, sizes, turns, name)
    except LabError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(report))
    if path is not None:
        write(report, path)


def measure(
    ranks: int, hosts: int | None, rate: str, sizes: Sequence[int], turns: int, name: str
) -> dict[str, Any]:
    """Run the jobs and return the report.

    Raises
    ------
    LabError
        No lab can be made, or a job failed or hung.
    """
    if (hosts or ranks) < 2:
        raise LabError("ranks must be at least 2, for one to get what another one put")
    report: dict[str, Any] = {
        "ranks": hosts or ranks,
        "where": f"a lab of {hosts} hosts at {rate}" if hosts else "one host",
        "turns": turns,
        "rows": [
            {"nbytes": nbytes, "times_s": {kind: {way: [] for way in WAYS} for kind in KINDS}}
            for nbytes in sizes
        ],
        "machine": machine(),
    }
    with ExitStack() as ends:
        lab = ends.enter_context(Lab(hosts, rate, name=name)) if hosts else None
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        for way in _ROUNDS * [*WAYS, *reversed(WAYS)]:
            out = folder / "times.json"
            words = [str(out), json.dumps(list(sizes)), str(turns)]
            settings = {"HOPCOLL_INLINE_BYTES": str(WAYS[way])}
            if lab is not None:
                run_job(lab, _MODULE, words, **settings)
            else:
                _run_here(ranks, words, settings)
            found = json.loads(out.read_text())
            for row, times in zip(report["rows"], found, strict=True):
                for kind in KINDS:
                    row["times_s"][kind][way] += times[kind]
    return report


def _run_here(ranks: int, words: Sequence[str], settings: dict[str, str]) -> None:
    command = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(ranks), "--oversubscribe"]
    done = subprocess.run(
        [*command, "-m", _MODULE, "--rank", *words],
        env=environment(**settings), stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise LabError(f"a job ended with code {done.returncode}\n{done.stderr}")


def middle_us(row: dict[str, Any], kind: str, way: str) -> float:
    """Return the median of one kind of calls, in microseconds."""
    return 1e6 * median(row["times_s"][kind][way])


def best(report: dict[str, Any]) -> int:
    """Return the largest size up to which inline is no slower; 0 if it always is."""
    largest = 0
    for row in sorted(report["rows"], key=lambda row: row["nbytes"]):
        took = {
            way: [
                middle_us(row, "put", way) + middle_us(row, "one get", way),
                middle_us(row, "all get", way),
            ]
            for way in WAYS
        }
        if any(a > b for a, b in zip(took["inline"], took["pulled"], strict=True)):
            break
        largest = row["nbytes"]
    return largest


def table(report: dict[str, Any]) -> str:
    """Return the figures of a report as Markdown."""
    columns = [(kind, way) for kind in KINDS for way in WAYS]
    rows = [["us", *(f"{kind}, {way}" for kind, way in columns)]]
    for row in report["rows"]:
        figures = [f"{middle_us(row, kind, way):.0f}" for kind, way in columns]
        rows.append([size_name(row["nbytes"]), *figures])
    facts, limit = report["machine"], best(report)
    upto = f"up to {size_name(limit)}" if limit else "at no size"
    return "\n".join([
        *markdown(rows),
        "",
        f"{report['ranks']} ranks, {report['where']}, {facts['cores']} cores ({facts['cpu']}), "
        f"which other work kept {100 * facts['busy'][0]:.0f} % busy before; medians of "
        f"{2 * _ROUNDS * report['turns']}. Inline is no slower {upto}.",
    ])  # fmt: skip


# What follows runs in the ranks.


def _rank(out: Path, sizes: Sequence[int], turns: int) -> None:
    import hopcoll

    comm = hopcoll.init()
    objects = comm.objects

    def timed(name: str, rank: int | None) -> float:
        """How long a get takes, at one rank or, behind a barrier, at the slowest of all."""
        comm.Barrier()
        begin_s = time.monotonic()
        if comm.rank == rank or (rank is None and comm.rank != 0):
            got = objects.get(name, timeout_s=_GET_S)
            taken_s = time.monotonic() - begin_s
            assert got[0] == got[-1] == 7
        else:
            taken_s = 0.0
        return max(comm.allgather(taken_s))

    found = []
    for nbytes in sizes:
        given = np.full(nbytes, 7, np.uint8)
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(-2, turns):  # the first are warm-ups
            names = [f"{nbytes}.{turn}.{which}" for which in ("one", "all")]
            begin_s = time.monotonic()
            if comm.rank == 0:
                objects.put(given, id=names[0])
            put_s = time.monotonic() - begin_s
            if comm.rank == 0:
                objects.put(given, id=names[1])
            one_s = timed(names[0], 1 + turn % (comm.size - 1))
            all_s = timed(names[1], None)
            if comm.rank == 0:
                for name in names:
                    objects.delete(name)
            if turn >= 0:
                for kind, taken_s in zip(KINDS, (put_s, one_s, all_s), strict=True):
                    times[kind].append(taken_s)
        found.append(times)
    if comm.rank == 0:
        out.write_text(json.dumps(found))
    comm.Barrier()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        _rank(Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))
    else:
        main(prog_name="python -m benchmarks.inline")
