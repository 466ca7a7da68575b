"""Time hopcoll's collectives and mpi4py's own on 1, 2, 4, ... nodes, and draw the times.

    hopcoll run -m benchmarks.scaling --nodes 4 --json scaling.json     # once for each number
    python -m benchmarks.scaling --json scaling.json --plot scaling.png

Each job adds its rows to the report; a number of nodes that is in it already is not measured again.
slurm/scaling.sbatch does all of that inside of one allocation.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path
from typing import Any

from benchmarks.collectives import COLLECTIVES

SIZES = (8, 1 << 16, 1 << 20, 1 << 23)


def main() -> None:
    """Measure as one rank of a job, or draw what was measured."""
    options = _parse()
    rows = _read(options.json)
    if options.plot is not None:
        from benchmarks.plotting import plot_scaling

        plot_scaling({"rows": rows}, options.plot)
        print(f"plot: {options.plot}")
    elif not any(row["nodes"] == options.nodes for row in rows):
        _measure(options, rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--nodes", type=int, help="on how many the ranks are")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="BYTES")
    parser.add_argument("--turns", type=int, default=11, help="batches of each library and size")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw, and measure nothing")
    options = parser.parse_args()
    if (options.nodes is None) == (options.plot is None):
        parser.error("either --nodes, in a job, or --plot")
    return options


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    except FileNotFoundError:
        return []
    return rows


def _measure(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from mpi4py import MPI

    import hopcoll
    from benchmarks.collectives import measure_one

    world = MPI.COMM_WORLD
    ours = hopcoll.init()
    hosts = len(set(world.allgather(socket.gethostname())))
    if hosts != options.nodes:
        raise SystemExit(f"--nodes says {options.nodes}, and the ranks are on {hosts}")
    for collective in COLLECTIVES:
        for nbytes in options.sizes:
            row = measure_one(world, ours, collective, nbytes, options.turns)
            rows.append({"nodes": hosts, "ranks": world.size, **row})
    if world.rank == 0:
        # A reader, or a job that is requeued now, finds the old report or the new one.
        new = options.json.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        os.replace(new, options.json)


if __name__ == "__main__":
    main()
