"""What the order of arrival costs when all ranks are punctual, and gains when one is late.

``python -m benchmarks.arrival`` starts itself under ``hopcoll run``; in a lab it is run as any
other program, ``python -m benchmarks.lab run -n 8 benchmarks/arrival.py --child``. Allreduces with
``order="rank"`` and ``order="arrival"`` take turns, all ranks at once or one of them late by a few
times what the operation takes. A time ends with the slowest rank, and begins when the last one
calls: all ranks of a machine have the same clock. The late rank is another one each time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ORDERS = ("rank", "arrival")
LATE_TIMES = 3.0


def main() -> None:
    """Start the job, then show what it measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arrival",
        description="Compare order='rank' and order='arrival', with punctual and late ranks.",
    )
    parser.add_argument("--ranks", type=int, default=4, help="ranks (4)")
    parser.add_argument("--mib", type=int, default=32, help="size of the input, in MiB (32)")
    parser.add_argument("--turns", type=int, default=20, help="turns of each (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        report = _measure(options.mib << 20, options.turns)
        if report is not None:
            print(table(report))
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
        return
    command = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(options.ranks), __file__]
    command += ["--child", "--mib", str(options.mib), "--turns", str(options.turns)]
    if options.json is not None:
        command += ["--json", str(options.json.absolute())]
    sys.exit(subprocess.run(command, check=False).returncode)


def _measure(nbytes: int, turns: int) -> dict[str, Any] | None:
    """Measure, as one rank of the job; rank 0 returns the report."""
    import hopcoll

    comm = hopcoll.init()
    given = np.ones(nbytes // 4, np.float32)
    result = np.empty_like(given)

    def once(order: str, late_rank: int, late_s: float) -> float:
        comm.Barrier()
        if comm.rank == late_rank:
            time.sleep(late_s)
        begin_s = time.perf_counter()
        comm.Allreduce(given, result, order=order)
        end_s = time.perf_counter()
        assert result[0] == result[-1] == comm.size
        times = comm.allgather((begin_s, end_s))
        return max(end for _, end in times) - max(begin for begin, _ in times)

    warm = [once(order, -1, 0.0) for order in ORDERS * 2]
    late_s = LATE_TIMES * max(warm)
    figures: dict[str, list[float]] = {
        f"{order}, {when}": [] for when in ("punctual", "late") for order in ORDERS
    }
    for turn in range(turns):
        for order in ORDERS if turn % 2 else ORDERS[::-1]:
            figures[f"{order}, punctual"].append(once(order, -1, 0.0))
            figures[f"{order}, late"].append(once(order, turn % comm.size, late_s))
    if comm.rank:
        return None
    return {
        "ranks": comm.size,
        "bytes": nbytes,
        "turns": turns,
        "late_ms": late_s * 1e3,
        "median_ms": {name: median(values) * 1e3 for name, values in figures.items()},
        "quartiles_ms": {
            name: [float(q) * 1e3 for q in np.quantile(values, [0.25, 0.75])]
            for name, values in figures.items()
        },
    }


def table(report: dict[str, Any]) -> str:
    """Return the figures of a report as text."""
    mib, ranks = report["bytes"] >> 20, report["ranks"]
    lines = [f"Allreduce of {mib} MiB, {ranks} ranks, from the last call to the last return"]
    for name, middle in report["median_ms"].items():
        low, high = report["quartiles_ms"][name]
        lines.append(f"  {name:<20}{middle:8.1f} ms   ({low:.1f} to {high:.1f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
