"""Time the reduction kernels against NumPy's own functions, in turn, in one thread.

``python -m benchmarks.kernels`` takes every dtype and operation, into an array apart from the
inputs and into the left input itself, as a collective does. The two take turns in the order
A B B A and so on, so that whatever else the machine does hits both; the ratio of the two times of
a turn is taken, and the table shows its median and quartiles. Below 1 the kernel is the faster one.
bfloat16 is compared with ml_dtypes. What a kernel computes is checked in the tests, not here.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.collectives import size_name
from cython_kernels import reduction

_BATCH_S = 0.002
_FUNCTIONS = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "LAND": np.logical_and,
    "LOR": np.logical_or,
    "LXOR": np.logical_xor,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}
DTYPES = tuple(name for name in reduction.DTYPE_NAMES if name != "bytes")


def main() -> None:
    """Measure, print the table, and write the figures where ``--json`` says."""
    options = _parse()
    todo = [
        (dtype, op, in_place)
        for dtype in options.dtypes
        for op in options.ops
        if reduction.supported(_code(dtype), reduction.OP_NAMES.index(op))
        for in_place in (False, True)
    ]
    rows = [
        _measure_one(*case, options.bytes, options.turns, options.variant)
        for case in tqdm(todo, leave=False)
    ]
    report = {
        "nbytes": options.bytes,
        "turns": options.turns,
        "variant": options.variant,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "rows": rows,
    }
    print(table(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Time the reduction kernels against NumPy's functions, in one thread.",
    )
    parser.add_argument("--bytes", type=int, default=1 << 26, help="of one array; 64 MiB")
    parser.add_argument("--turns", type=int, default=11, help="batches of each")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--ops", nargs="+", default=list(_FUNCTIONS), choices=list(_FUNCTIONS))
    parser.add_argument("--variant", default=reduction.VARIANTS[-1], choices=reduction.VARIANTS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.bytes < 16 or options.bytes % 16:
        parser.error("--bytes must be a multiple of 16, the largest item")
    if options.turns < 2:
        parser.error("quartiles need at least 2 turns")
    return options


def _code(dtype: str) -> int:
    return reduction.DTYPE_NAMES.index(dtype)


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _measure_one(
    dtype_name: str, op_name: str, in_place: bool, nbytes: int, turns: int, variant: str
) -> dict[str, Any]:
    dtype, code, op = _dtype(dtype_name), _code(dtype_name), reduction.OP_NAMES.index(op_name)
    count = nbytes // dtype.itemsize
    # Sums of zeros and products of ones keep an array in place what it is, so that no turn meets
    # infinities or subnormals that an earlier one made.
    left = np.ones(count, dtype)
    left[::2] = 2
    right = np.full(count, 0 if op_name == "SUM" else 1, dtype)
    dest = left.copy() if in_place else np.empty_like(left)
    one = dest if in_place else left
    function = _FUNCTIONS[op_name]
    if dtype_name == "bool" and op_name in ("SUM", "PROD"):
        function = np.logical_or if op_name == "SUM" else np.logical_and
    calls: dict[str, Callable[[], Any]] = {
        # A logical function answers bool: writing 0 or 1 in the dtype is part of the job.
        "numpy": lambda: function(one, right, out=dest, casting="unsafe"),
        "kernel": lambda: reduction.reduce(code, op, one, right, dest, variant=variant),
    }

    def batch(call: Callable[[], Any], length: int) -> float:
        begin_s = time.perf_counter()
        for _ in range(length):
            call()
        return (time.perf_counter() - begin_s) / length

    warm_s = max(min(batch(call, 1) for _ in range(2)) for call in calls.values())
    length = max(1, round(_BATCH_S / warm_s))
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            times_s[name].append(batch(calls[name], length))
    ratios = [a / b for a, b in zip(times_s["kernel"], times_s["numpy"], strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {
        "dtype": dtype_name,
        "op": op_name,
        "in_place": in_place,
        "numpy_GBps": nbytes / median(times_s["numpy"]) / 1e9,
        "kernel_GBps": nbytes / median(times_s["kernel"]) / 1e9,
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def table(report: dict[str, Any]) -> str:
    """Return the figures of a report as a table; GB/s counts one of the three arrays."""
    lines = [
        f"{size_name(report['nbytes'])} arrays, {report['variant']} kernels, NumPy "
        f"{report['numpy']}; ratio = time of the kernel / of NumPy, median of {report['turns']}",
        f"{'dtype':<11}{'op':<6}{'dest':<7}{'numpy GB/s':>11}{'kernel GB/s':>12}{'ratio':>7}"
        f"  quartiles",
    ]
    for row in report["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"{row['dtype']:<11}{row['op']:<6}{'left' if row['in_place'] else 'apart':<7}"
            f"{row['numpy_GBps']:>11.2f}{row['kernel_GBps']:>12.2f}{row['ratio']:>7.2f}"
            f"  {low:.2f}-{high:.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
