"""What a durable record costs in a workflow's journal: ``python -m benchmarks.journal``.

Turns of an append and a flush of one record, of 64 records in one flush, and of 16 threads that
flush one each; beside them the same bytes by a bare write and fdatasync over zeros, which is what
the disk itself can do. Then all is read back.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recovery.disk import Disk
from recovery.journal import Journal

HEAD = {"task": "step 17", "attempt": 1}
BODY = bytes(range(64))
#: Bytes of such a record on the disk, nearly.
RECORD_BYTES = 150
THREADS = 16


def main() -> None:
    """Measure, and show it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.journal", description=__doc__)
    parser.add_argument("--turns", type=int, default=5000, help="of each (5000)")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (.)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report = measure(Path(folder), options.turns)
    for name, figure in report.items():
        print(f"{name:32} {figure}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(folder: Path, turns: int) -> dict[str, Any]:
    """Return figures by what they are."""
    report: dict[str, Any] = {"turns": turns}
    descriptor = os.open(folder / "bare", os.O_CREAT | os.O_RDWR)
    os.pwrite(descriptor, bytes(turns * RECORD_BYTES), 0)
    os.fsync(descriptor)

    def bare(turn: int) -> None:
        os.pwrite(descriptor, b"x" * RECORD_BYTES, turn * RECORD_BYTES)
        os.fdatasync(descriptor)

    report |= _times("write_fdatasync", bare, turns)
    os.close(descriptor)
    journal = Journal(folder / "journal", Disk(), {"is": "a benchmark"})
    journal.open()

    def one(turn: int) -> None:
        journal.append("commit", HEAD, BODY)
        journal.flush()

    def many(turn: int) -> None:
        for _ in range(64):
            journal.append("commit", HEAD, BODY)
        journal.flush()

    report |= _times("append_flush", one, turns)
    report |= _times("append_64_flush", many, turns // 10)
    with ThreadPoolExecutor(THREADS) as pool:
        begin_s = time.perf_counter()
        list(pool.map(one, range(turns)))
        rate = turns / (time.perf_counter() - begin_s)
    report[f"threads_{THREADS}_per_s"] = round(rate)
    journal.close()
    begin_s = time.perf_counter()
    count = len(Journal.read(folder / "journal").records)
    duration_s = time.perf_counter() - begin_s
    report["read_100000_s"] = round(duration_s / count * 1e5, 2)
    return report


def _times(name: str, work: Callable[[int], None], turns: int) -> dict[str, Any]:
    times_s = []
    for turn in range(turns):
        begin_s = time.perf_counter()
        work(turn)
        times_s.append(time.perf_counter() - begin_s)
    times_s.sort()
    return {
        f"{name}_us": round(times_s[turns // 2] * 1e6, 1),
        f"{name}_p99_us": round(times_s[turns * 99 // 100] * 1e6, 1),
        f"{name}_per_s": round(turns / sum(times_s)),
    }


if __name__ == "__main__":
    main()
