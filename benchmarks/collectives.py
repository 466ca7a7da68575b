"""Time hopcoll's Bcast and Allreduce and mpi4py's own, in turn, in one job on one host.

``python -m benchmarks.collectives`` starts itself under ``hopcoll run``. For each size the two
libraries take turns, a batch of calls each, in the order A B B A and so on, so that whatever else
the machine does hits both. A batch is as many calls as take some milliseconds, made one after the
other without a barrier between them, on warm buffers; its time is that of the slowest rank. The
ratio of the two batches of a turn is taken; the table shows the medians, and the quartiles of the
ratio. Results are compared with what they must be before anything is timed.

mpi4py's collectives do not survive the death of a rank. What hopcoll pays for that is in its
figures, its progress thread included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
SIZES = (8, 64, 1 << 10, 1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 26)
COLLECTIVES = ("bcast", "allreduce")
_BATCH_S = 0.004
_CALLS_MAX = 2000


def main() -> None:
    """Start the job, then show and write what it measured."""
    options = _parse()
    if options.child is not None:
        report = _measure(options)
        if report is not None:
            options.child.write_text(json.dumps(report, indent=1) + "\n")
        return
    options.json.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(options.ranks)]
    command += [__file__, "--child", str(options.json.absolute())]
    command += ["--turns", str(options.turns), "--sizes", *map(str, options.sizes)]
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)
    report = json.loads(options.json.read_text())
    print(table(report, markdown=options.markdown))
    print(f"\nfigures: {options.json}")
    plot = options.plot or options.json.with_suffix(".png")
    try:
        from benchmarks.plotting import plot_collectives
    except ModuleNotFoundError:
        print("plot: none without matplotlib; pip install 'hopcoll[bench]' brings it along")
    else:
        plot_collectives(report, plot)
        print(f"plot: {plot}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.collectives",
        description="Time hopcoll's Bcast and Allreduce against mpi4py's own, on one host.",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="BYTES")
    parser.add_argument("--turns", type=int, default=21, help="batches of each library and size")
    parser.add_argument("--json", type=Path, default=RESULTS / "collectives.json", metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="by default beside FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for nbytes in options.sizes:
        if nbytes < 4 or nbytes % 4:
            parser.error(f"sizes are whole numbers of float32 items, not {nbytes} bytes")
    if options.turns < 2:
        parser.error("quartiles need at least 2 turns")
    return options


def _measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure, as one rank of the job; rank 0 returns the report."""
    from mpi4py import MPI

    import hopcoll

    world = MPI.COMM_WORLD
    ours = hopcoll.init()
    todo = [(collective, nbytes) for collective in COLLECTIVES for nbytes in options.sizes]
    rows = []
    for collective, nbytes in tqdm(todo, leave=False, disable=world.rank != 0):
        rows.append(measure_one(world, ours, collective, nbytes, options.turns))
    if world.rank == 0:
        return {
            "ranks": world.size,
            "hosts": 1,
            "dtype": "float32",
            "turns": options.turns,
            "rows": rows,
            "machine": {
                "cpu": cpu_name(),
                "cores": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
                "numpy": np.__version__,
                "mpi": MPI.Get_library_version().split(",")[0].strip(),
                "progress": os.environ.get("HOPCOLL_PROGRESS", "thread"),
            },
        }
    return None


def cpu_name() -> str:
    """Return what the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def measure_one(world: Any, ours: Any, collective: str, nbytes: int, turns: int) -> dict[str, Any]:
    import hopcoll

    count = nbytes // 4
    # Whole numbers, so that every order of summation gives the same float32.
    send = (np.arange(count) % 1000 + world.rank).astype(np.float32)
    receive = np.empty(count, np.float32)
    calls: dict[str, Callable[[], Any]]
    if collective == "bcast":
        calls = {"mpi4py": lambda: world.Bcast(receive), "hopcoll": lambda: ours.Bcast(receive)}
        must = np.arange(count) % 1000
    else:
        calls = {
            "mpi4py": lambda: world.Allreduce(send, receive),
            "hopcoll": lambda: ours.Allreduce(send, receive, op=hopcoll.SUM),
        }
        ranks = world.size
        must = (np.arange(count) % 1000) * ranks + ranks * (ranks - 1) // 2
    for name, call in calls.items():
        receive[:] = send if collective == "bcast" and world.rank == 0 else -1
        call()
        if not np.array_equal(receive, must):
            raise AssertionError(f"{name}: wrong result of a {collective} of {nbytes} bytes")

    def batch(call: Callable[[], Any], length: int) -> float:
        world.Barrier()
        begin_s = time.perf_counter()
        for _ in range(length):
            call()
        return (time.perf_counter() - begin_s) / length

    lengths = {}  # the same at all ranks, from rank 0's warm time
    for name, call in calls.items():
        warm_s = min(batch(call, 2) for _ in range(3))
        lengths[name] = world.bcast(min(_CALLS_MAX, max(1, round(_BATCH_S / warm_s))))
        batch(call, lengths[name])
    order = list(calls)
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name in order if turn % 2 == 0 else reversed(order):
            times_s[name].append(batch(calls[name], lengths[name]))
    slowest = {}
    for name, values in times_s.items():
        total = np.array(values)
        world.Allreduce(total.copy(), total, op=_maximum())
        slowest[name] = total.tolist()
    ratios = [a / b for a, b in zip(slowest["hopcoll"], slowest["mpi4py"], strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {
        "collective": collective,
        "nbytes": nbytes,
        "calls_per_batch": lengths,
        "mpi4py_us": median(slowest["mpi4py"]) * 1e6,
        "hopcoll_us": median(slowest["hopcoll"]) * 1e6,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "times_us": {name: [value * 1e6 for value in slowest[name]] for name in slowest},
    }


def _maximum() -> Any:
    from mpi4py import MPI

    return MPI.MAX


def size_name(nbytes: int) -> str:
    """Return bytes as people say them: 8 B, 64 KiB, 1 MiB."""
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor and nbytes % factor == 0:
            return f"{nbytes // factor} {unit}"
    return f"{nbytes} B"


def table(report: dict[str, Any], markdown: bool = False) -> str:
    """Return the figures of a report as a table.

    Parameters
    ----------
    report : dict
        What the job wrote.
    markdown : bool
        As Markdown, for a README, instead of plain columns.
    """
    header = (
        "",
        "size",
        "mpi4py us",
        "hopcoll us",
        "mpi4py MB/s",
        "hopcoll MB/s",
        "ratio",
        "quartiles",
    )
    lines = [header]
    for row in report["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(
            (
                row["collective"].capitalize(),
                size_name(row["nbytes"]),
                f"{row['mpi4py_us']:.1f}",
                f"{row['hopcoll_us']:.1f}",
                f"{row['nbytes'] / row['mpi4py_us']:.0f}",
                f"{row['nbytes'] / row['hopcoll_us']:.0f}",
                f"{row['ratio']:.2f}",
                f"{low:.2f}-{high:.2f}",
            )
        )
    if markdown:
        rule = ("---", *["---:"] * (len(header) - 1))
        return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines[1:]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    machine = report["machine"]
    where = (
        f"{report['ranks']} ranks on one host ({machine['cpu']}, {machine['cores']} cores), "
        f"{machine['mpi']}; ratio = hopcoll / mpi4py, median of {report['turns']} turns"
    )
    rows = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join((where, *rows))


if __name__ == "__main__":
    main()
