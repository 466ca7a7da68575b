"""Measure what the progress thread gives and costs while a rank is inside its own code.

``python -m benchmarks.progress`` starts itself on three ranks under ``hopcoll run``:

- *answer*: rank 1 was the root of a broadcast, and has been in a Python loop that holds the GIL for
  long enough that its thread sleeps; rank 2 asks it for the bytes. The time until they are there.
- *relay*: rank 1 has called Ibcast and is in such a loop; rank 2 gets the bytes through it. The
  time of rank 2's Bcast, beside that of the same Bcast when rank 1 waits inside the call.
- *idle*: processor time of a rank that has nothing open, as a share of one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

RANKS = 3
ANSWER_BYTES = 1 << 14  # too long for the short path, short enough to be retained
RELAY_BYTES = 1 << 23
BUSY_S = 0.06
IDLE_S = 5.0


def main() -> None:
    """Start the job, then show what it measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.progress",
        description="Measure answers, relays and idle cost of the progress thread.",
    )
    parser.add_argument("--rounds", type=int, default=100, help="answers and relays (100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        report = _measure(options.rounds)
        if report is not None:
            print(table(report))
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
        return
    command = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(RANKS), __file__, "--child"]
    command += ["--rounds", str(options.rounds)]
    if options.json is not None:
        command += ["--json", str(options.json.absolute())]
    sys.exit(subprocess.run(command, check=False).returncode)


def _hold_the_gil(seconds: float) -> None:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass


def _measure(rounds: int) -> dict[str, Any] | None:
    """Measure, as one rank of the job; rank 0 returns the report."""
    from mpi4py import MPI

    import hopcoll

    sys.setswitchinterval(1000)  # no other Python thread gets the GIL in a loop
    comm = hopcoll.init()
    figures: dict[str, list[float]] = {"answer": [], "relay_busy": [], "relay_waiting": []}
    small = np.zeros(ANSWER_BYTES, np.uint8)
    for _ in range(rounds):
        comm.Barrier()
        begin_s = time.perf_counter()
        if comm.rank == 1:
            request = comm.Ibcast(small, root=1)
            _hold_the_gil(BUSY_S)
            request.wait()
        else:
            time.sleep(BUSY_S / 2)
            begin_s = time.perf_counter()
            # One asks rank 1, the other asks that one.
            comm.Bcast(small, root=1)
        if comm.rank == 2:
            figures["answer"].append(time.perf_counter() - begin_s)
    large = np.zeros(RELAY_BYTES, np.uint8)
    for turn in range(2 * rounds):
        busy = turn % 2 == 0
        comm.Barrier()
        begin_s = time.perf_counter()
        if comm.rank == 1 and busy:
            request = comm.Ibcast(large, root=0)
            _hold_the_gil(BUSY_S)
            request.wait()
        else:
            comm.Bcast(large, root=0)
        if comm.rank == 2:
            kind = "relay_busy" if busy else "relay_waiting"
            figures[kind].append(time.perf_counter() - begin_s)
    comm.Barrier()
    time.sleep(0.1)
    begin_s, before_s = time.perf_counter(), time.process_time()
    time.sleep(IDLE_S)
    idle = (time.process_time() - before_s) / (time.perf_counter() - begin_s)
    gathered = MPI.COMM_WORLD.gather((figures, idle))
    if gathered is None:
        return None
    report: dict[str, Any] = {"rounds": rounds, "relay_bytes": RELAY_BYTES}
    for name, values in gathered[2][0].items():
        low, middle, high = np.quantile(values, [0.5, 0.9, 0.99]) * 1e3
        report[name + "_ms"] = {"median": low, "90%": middle, "99%": high}
    report["idle_percent_of_a_core"] = [share * 100 for _, share in gathered]
    return report


def table(report: dict[str, Any]) -> str:
    """Return the figures of a report as text."""
    lines = []
    for name, what in (
        ("answer", f"answer of {ANSWER_BYTES >> 10} KiB by a rank in a Python loop"),
        ("relay_busy", f"relay of {RELAY_BYTES >> 20} MiB by a rank in a Python loop"),
        ("relay_waiting", f"relay of {RELAY_BYTES >> 20} MiB by a rank inside the call"),
    ):
        figures = report[name + "_ms"]
        shown = ", ".join(f"{key} {value:.2f} ms" for key, value in figures.items())
        lines.append(f"{what:<48}{shown}")
    shares = ", ".join(f"{share:.2f} %" for share in report["idle_percent_of_a_core"])
    lines.append(f"{'idle, of one core':<48}{shares}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
