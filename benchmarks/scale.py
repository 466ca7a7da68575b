"""Many ranks, simulated: what an operation and a death cost the busiest of them.

The engines of 1,024 and more ranks need sets of ranks wider than those of an ordinary build:

    HOPCOLL_RANKS_MAX=16384 python setup.py build_ext --inplace     # in a copy of the sources
    python -m benchmarks.scale --json benchmarks/results/scale.json
"""

from __future__ import annotations

import heapq
import json
import math
import time
from pathlib import Path
from typing import Any

import click

from hopcoll import forecast

LATENCY_US = 2.0
RATE = 25e9
SMALL = (("barrier", 0), ("bcast", 8), ("reduce", 8), ("allreduce", 8))
#: A message of 8 bytes on the wire, at the least.
_WIRE_BYTES = 72
#: When the rank dies, and when the others know.
_KILL_US = 1.0
_DETECT_MS = 0.1


def best_tree_us(size: int) -> float:
    """How soon all can have one value: whoever has it sends it on as fast as its link allows
    (Karp and others, Optimal broadcast and summation in the LogP model, 1993)."""
    gap_us = _WIRE_BYTES / RATE * 1e6
    senders = [0.0]
    latest = 0.0
    for _ in range(size - 1):
        at = heapq.heappop(senders)
        latest = at + gap_us + LATENCY_US
        heapq.heappush(senders, at + gap_us)
        heapq.heappush(senders, latest)
    return latest


def small(kind: str, nbytes: int, size: int) -> dict[str, Any]:
    """One small operation, without a death and with one of a rank that others hang on."""
    one = forecast.forecast(kind, nbytes, size, rate=RATE, latency_us=LATENCY_US)
    dead = forecast.forecast(
        kind,
        nbytes,
        size,
        rate=RATE,
        latency_us=LATENCY_US,
        kills=[(1, _KILL_US * 1e-6)],
        detect_ms=_DETECT_MS,
        root=0,
    )
    best_us = best_tree_us(size) * (1 if kind == "bcast" else 2)
    return {
        "kind": kind,
        "nbytes": nbytes,
        "ranks": size,
        "us": round(one.seconds[0] * 1e6, 3),
        "best_tree_us": round(best_us, 3),
        "multiple": round(one.seconds[0] * 1e6 / best_us, 2),
        "through": one.through and dead.through,
        "control_messages": one.handled_most,
        "control_messages_with_a_death": dead.handled_most,
        "rows": max(one.rows_most, dead.rows_most),
        "us_with_a_death": round(dead.seconds[0] * 1e6, 1),
        "log2": round(math.log2(size), 1),
    }


def large(kind: str, nbytes: int, size: int, chunk_bytes: int, window: int) -> dict[str, Any]:
    """One large operation, along two trees."""
    one = forecast.forecast(
        kind, nbytes, size, rate=RATE, latency_us=LATENCY_US, chunk_bytes=chunk_bytes,
        window_chunks=window, events_max=1 << 40,
    )  # fmt: skip
    return {
        "kind": kind,
        "nbytes": nbytes,
        "ranks": size,
        "chunk_bytes": chunk_bytes,
        "window_chunks": window,
        "through": one.through,
        "ms": round(one.seconds[0] * 1e3, 3),
        "bound_ms": round(one.bound_seconds * 1e3, 3),
        "multiple": round(one.multiple, 3),
        "control_messages": one.handled_most,
        "rows": one.rows_most,
    }


@click.command("scale")
@click.option("-n", "sizes", type=click.IntRange(2), multiple=True,
              default=(1024, 4096, 16384), show_default=True, help="Ranks.")  # fmt: skip
@click.option("--large-bytes", type=int, default=0, show_default=True,
              help="Also a bcast and an allreduce of so many bytes.")  # fmt: skip
@click.option("--chunk-bytes", type=int, default=2 << 20, show_default=True,
              help="At most; shorter messages have shorter ones.")  # fmt: skip
@click.option("--window", type=int, default=8, show_default=True, help="Chunks under way.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def command(
    sizes: tuple[int, ...],
    large_bytes: int,
    chunk_bytes: int,
    window: int,
    json_path: Path | None,
) -> None:
    """Simulate many ranks over links of 2 us and 25 GB/s, and count."""
    rows = []
    for size in sizes:
        cases = [(small, (kind, nbytes, size)) for kind, nbytes in SMALL]
        if large_bytes:
            cases += [
                (large, (kind, large_bytes, size, chunk_bytes, window))
                for kind in ("bcast", "allreduce")
            ]
        for measure, arguments in cases:
            begin = time.monotonic()
            row = measure(*arguments)
            rows.append(row)
            click.echo(json.dumps(row) + f"  # {time.monotonic() - begin:.0f} s")
            if json_path is not None:
                report = {"latency_us": LATENCY_US, "bytes_a_second": RATE, "rows": rows}
                json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    command()
