"""Time hopcoll's collectives and Open MPI's over rate-limited hosts, against what the wire allows.

``python -m benchmarks.lab.collectives --hosts 8 --rate 1gbit --sizes 1MiB,32MiB`` makes a lab of
its own with a rank a host. For each size there are two jobs: one under `hopcoll run`, in which
hopcoll and mpi4py's own collectives take turns, in the order A B B A and so on, and one under a
plain mpirun, which shows Open MPI as it comes. Each call starts at a moment that all ranks agreed
on (all hosts have this machine's clock) and ends with the slowest rank; results are compared with
what they must be before anything is timed.

Figures are multiples of the bandwidth bound, with n ranks, S bytes and B, the bytes a second that a
link carries behind its headers (0.992 of the rate): S/B for Bcast and Reduce, 2S(n-1)/(nB) for
Allreduce. A full token bucket lets 1 ms' worth of bytes through at once; a figure that is less
than 1 by more than that means that bytes took another way than the wire. The hosts share this
machine's processors with whatever else runs on it, so the report says how busy that kept them; when
a lower rate gives lower figures, the processors were the limit and not the wire. So a Bcast is also
timed as a bare chain: a loop over Irecv, Test and Isend in Python, with no more to it.

With ``--kill`` jobs in which a rank is killed half way through an Allreduce of 32 MiB come after
that: the time until all survivors have the result, over that of the same call before.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks.collectives import size_name
from benchmarks.lab.cluster import Lab, exits_when_told
from benchmarks.lab.jobs import (
    GOODPUT,
    agreed_start,
    bound_s,
    busy_share,
    machine,
    markdown,
    run_job,
    sizes_of,
    where,
)
from benchmarks.lab.network import LabError, bits_per_s
from hopcoll.config import Config
from hopcoll.launcher import find_mpirun

_MODULE = "benchmarks.lab.collectives"
COLLECTIVES = ("bcast", "reduce", "allreduce")
KILL_BYTES = 1 << 25
#: The columns: a key of the times, and what people read.
SERIES = {
    "hopcoll": "hopcoll",
    "openmpi": "Open MPI, default",
    "mpi4py": "Open MPI, hopcoll's switches",
    "chain": "a bare chain",
}
_CHAIN_CHUNK_BYTES = 65000  # with its header below Open MPI's own eager limit
_CHAIN_WINDOW = 16


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--hosts", default=8, show_default=True, help="How many, with a rank each.")
@click.option("--rate", default="1gbit", show_default=True, help="What each link carries.")
@click.option("--sizes", default="1MiB,32MiB", show_default=True, callback=sizes_of)
@click.option("--turns", default=5, show_default=True, help="Calls of each; medians are shown.")
@click.option("--kill", is_flag=True, help="Also kill a rank in the middle of an Allreduce.")
@click.option("--kills", default=3, show_default=True, help="Jobs with a kill in each.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--name", default="hopbench", show_default=True, help="Of the lab.")
def main(
    hosts: int,
    rate: str,
    sizes: list[int],
    turns: int,
    kill: bool,
    kills: int,
    path: Path | None,
    name: str,
) -> None:
    """Time collectives over a lab, as multiples of the bandwidth bound; print Markdown."""
    try:
        with exits_when_told():
            report = measure(hosts, rate, sizes, turns, kills if kill else 0, name)
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
        No lab can be made, a job failed or hung, or a fault did not fire.
    """
    if hosts < 2:
        raise LabError("hosts must be at least 2 for a benchmark of wires")
    if turns < 1:
        raise LabError(f"turns must be at least 1, not {turns}")
    mpirun = find_mpirun()
    report: dict[str, Any] = {
        "hosts": hosts,
        "rate": rate,
        "bandwidth_mb_s": GOODPUT * bits_per_s(rate) / 8e6,
        "dtype": "float32",
        "turns": turns,
        "rows": [],
        "machine": {**machine(), "mpi": f"{mpirun.vendor} {mpirun.version}"},
    }
    with Lab(hosts, rate, name=name) as lab, tempfile.TemporaryDirectory() as folder:
        todo = tqdm(total=2 * len(sizes) + kills, unit="job", leave=False)
        for nbytes in sizes:
            times: dict[str, Any] = {}
            for plain in (False, True):
                out = Path(folder, "times.json")
                words = ["times", str(out), str(nbytes), str(turns)]
                run_job(lab, _MODULE, words, plain=plain)
                times.update(json.loads(out.read_text()))
                todo.update()
            report["rows"] += _rows(times, nbytes, hosts, bits_per_s(rate))
        deaths = []
        # One in the middle, the coordinator, the last; then the others.
        victims = list(dict.fromkeys([hosts // 2, 0, hosts - 1, *range(hosts)]))
        for number in range(kills):
            deaths.append(_kill(lab, victims[number % hosts], Path(folder, f"kill{number}"), turns))
            todo.update()
        todo.close()
        report["machine"]["busy"].append(busy_share())
    if kills:
        report["kill"] = {
            "nbytes": KILL_BYTES,
            "ratio": median(death["ratio"] for death in deaths),
            "deaths": deaths,
        }
    return report


def _rows(times: dict[str, Any], nbytes: int, ranks: int, bits: int) -> list[dict[str, Any]]:
    rows = []
    for collective in COLLECTIVES:
        least = bound_s(collective, nbytes, ranks, bits)
        series = {
            key: times[f"{collective} {key}"] for key in SERIES if f"{collective} {key}" in times
        }
        rows.append(
            {
                "collective": collective,
                "nbytes": nbytes,
                "bound_s": least,
                "times_s": series,
                "over_bound": {key: median(values) / least for key, values in series.items()},
            }
        )
    return rows


def _kill(lab: Lab, victim: int, folder: Path, turns: int) -> dict[str, Any]:
    """Run a job in which a rank dies half way; the fault-free calls before are its measure."""
    folder.mkdir()
    ranks = len(lab.hosts)
    # A rank receives and sends on its partial sums, then its finals: four times its share.
    chunks = 4 * KILL_BYTES * (ranks - 1) // ranks // Config().chunk_bytes
    settings = {
        "HOPCOLL_FAULT": f"rank={victim},op={turns + 1},chunk={chunks // 2}",
        "HOPCOLL_FAULT_RECORD": str(folder / "fault"),
    }
    run_job(lab, _MODULE, ["death", str(folder), str(turns)], **settings)
    record = folder / f"fault.{victim}"
    if not record.exists():
        raise LabError(f"the fault did not fire: {settings['HOPCOLL_FAULT']}")
    fault = json.loads(record.read_text())
    said = [json.loads(path.read_text()) for path in sorted(folder.glob("survivor.*"))]
    survivors = [rank for rank in range(ranks) if rank != victim]
    if [one["contributors"] for one in said] != [said[0]["contributors"]] * len(survivors):
        raise LabError(f"survivors of rank {victim} disagree, or are not all there: {said}")
    with_death_s = max(one["end_s"] for one in said) - said[0]["begin_s"]
    fault_free_s = median(said[0]["fault_free_s"])
    return {
        "victim": victim,
        "moved": fault["moved_bytes"] / fault["total_bytes"],
        "contributors": said[0]["contributors"],
        "fault_free_s": fault_free_s,
        "with_death_s": with_death_s,
        "ratio": with_death_s / fault_free_s,
    }


def table(report: dict[str, Any]) -> str:
    """Return the figures of a report as Markdown."""
    rows = [["times over the bound", "size", "bound ms", *SERIES.values()]]
    for row in report["rows"]:
        figures = [f"{row['over_bound'].get(key, float('nan')):.2f}" for key in SERIES]
        figures = ["" if figure == "nan" else figure for figure in figures]
        size = size_name(row["nbytes"])
        rows.append([row["collective"].capitalize(), size, f"{row['bound_s'] * 1e3:.1f}", *figures])
    lines = [
        *markdown(rows),
        "",
        f"{where(report)} before and after (a link: {report['bandwidth_mb_s']:.0f} MB/s); "
        f"{report['machine']['mpi']}; medians of {report['turns']} turns.",
    ]
    if "kill" in report:
        size = size_name(report["kill"]["nbytes"])
        lines += ["", f"| killed in an Allreduce of {size} | moved | fault-free s | s | ratio |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        for death in report["kill"]["deaths"]:
            lines.append(
                f"| rank {death['victim']} | {100 * death['moved']:.0f} % | "
                f"{death['fault_free_s']:.3f} | {death['with_death_s']:.3f} | "
                f"{death['ratio']:.2f} |"
            )
    return "\n".join(lines)


# What follows runs in the ranks.


def _rank(words: Sequence[str]) -> None:
    if words[0] == "times":
        _measure_times(Path(words[1]), int(words[2]), int(words[3]))
    else:
        _measure_death(Path(words[1]), int(words[2]))


def _measure_times(out: Path, nbytes: int, turns: int) -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    libraries: dict[str, Any] = {"mpi4py": world}
    if "HOPCOLL_LAUNCHER" in os.environ:
        import hopcoll

        libraries = {"hopcoll": hopcoll.init(), **libraries}
    else:
        libraries = {"openmpi": world}
    found = {}
    for collective in COLLECTIVES:
        calls = {
            key: _checked(world, library, collective, nbytes) for key, library in libraries.items()
        }
        if collective == "bcast" and "hopcoll" in calls:
            calls["chain"] = _checked(world, _Chain(world), collective, nbytes)
        times_s: dict[str, list[float]] = {key: [] for key in calls}
        for turn in range(turns):
            for key in list(calls) if turn % 2 == 0 else reversed(calls):
                begin_s = agreed_start(world)
                calls[key]()
                times_s[key].append(max(world.allgather(time.monotonic())) - begin_s)
        found.update({f"{collective} {key}": values for key, values in times_s.items()})
    if world.rank == 0:
        out.write_text(json.dumps(found))


class _Chain:
    """A Bcast from rank 0 from rank to rank, chunk by chunk: what this machine can do at all."""

    def __init__(self, world: Any) -> None:
        self.world = world

    def Bcast(self, array: np.ndarray) -> None:  # noqa: N802 - as mpi4py spells it
        world, data = self.world, array.view(np.uint8)
        chunks = [
            data[at : at + _CHAIN_CHUNK_BYTES] for at in range(0, len(data), _CHAIN_CHUNK_BYTES)
        ]
        ahead = iter(chunks if world.rank else [])
        coming = deque(
            world.Irecv(chunk, world.rank - 1) for chunk in islice(ahead, _CHAIN_WINDOW)
        )
        going: deque[Any] = deque()
        for chunk in chunks:
            if world.rank:
                self._end(coming.popleft())
                coming.extend(world.Irecv(more, world.rank - 1) for more in islice(ahead, 1))
            if world.rank < world.size - 1:
                going.append(world.Isend(chunk, world.rank + 1))
                if len(going) > _CHAIN_WINDOW:
                    self._end(going.popleft())
        while going:
            self._end(going.popleft())

    @staticmethod
    def _end(request: Any) -> None:
        while not request.Test():
            os.sched_yield()


def _checked(world: Any, library: Any, collective: str, nbytes: int) -> Callable[[], Any]:
    """Return a warm call whose result has been looked at."""
    count = nbytes // 4
    # Whole numbers, so that every order of summation gives the same float32.
    send = (np.arange(count) % 1000 + world.rank).astype(np.float32)
    receive = np.full(count, -1, np.float32)
    total = (np.arange(count) % 1000) * world.size + world.size * (world.size - 1) // 2
    if collective == "bcast":
        receive[:] = send if world.rank == 0 else -1
        call, must = (lambda: library.Bcast(receive)), np.arange(count) % 1000
    elif collective == "reduce":
        call, must = (lambda: library.Reduce(send, receive)), total if world.rank == 0 else receive
    else:
        call, must = (lambda: library.Allreduce(send, receive)), total
    call()
    if not np.array_equal(receive, must):
        raise AssertionError(f"wrong result of a {collective} of {nbytes} bytes")
    return call


def _measure_death(folder: Path, turns: int) -> None:
    from mpi4py import MPI

    import hopcoll

    world = MPI.COMM_WORLD
    comm = hopcoll.init()
    count = KILL_BYTES // 4
    send = np.full(count, world.rank + 1, np.float32)
    receive = np.empty(count, np.float32)
    comm.Allreduce(send, receive)
    fault_free_s = []
    for _ in range(turns):
        begin_s = agreed_start(world)
        comm.Allreduce(send, receive)
        fault_free_s.append(max(world.allgather(time.monotonic())) - begin_s)
    begin_s = agreed_start(world)
    outcome = comm.Allreduce(send, receive)
    end_s = time.monotonic()
    if not (receive == sum(rank + 1 for rank in outcome.contributors)).all():
        raise AssertionError(f"wrong result at rank {comm.rank}: {outcome}")
    report = {"begin_s": begin_s, "end_s": end_s, "fault_free_s": fault_free_s}
    report["contributors"] = outcome.contributors
    (folder / f"survivor.{world.rank}").write_text(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        _rank(sys.argv[2:])
    else:
        main(prog_name="python -m benchmarks.lab.collectives")
