"""Plots of benchmark reports, into PNG files; the only place that imports matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a benchmark has no window to draw in

from matplotlib import pyplot

__all__ = ["plot_collectives"]

_COLOURS = {"mpi4py": "#8a8f98", "hopcoll": "#c2410c"}


def plot_collectives(report: dict[str, Any], path: Path) -> None:
    """Draw a report of `benchmarks.collectives`: time over size, and below it the ratio.

    Parameters
    ----------
    report : dict
        What the benchmark wrote as JSON.
    path : Path
        The PNG file; its folder is made.
    """
    names = list(dict.fromkeys(row["collective"] for row in report["rows"]))
    figure, axes = pyplot.subplots(
        2,
        len(names),
        figsize=(5 * len(names), 6),
        sharex=True,
        squeeze=False,
        height_ratios=(2, 1),
        layout="constrained",
    )
    for column, name in enumerate(names):
        rows = [row for row in report["rows"] if row["collective"] == name]
        sizes = [row["nbytes"] for row in rows]
        times, ratios = axes[0][column], axes[1][column]
        for library, colour in _COLOURS.items():
            values = [row[f"{library}_us"] for row in rows]
            times.loglog(sizes, values, marker="o", color=colour, label=library)
        times.set_title(f"{name.capitalize()}, {report['dtype']}")
        times.set_ylabel("time of a call (µs)")
        times.grid(alpha=0.3)
        times.legend()
        low = [row["ratio_quartiles"][0] for row in rows]
        high = [row["ratio_quartiles"][1] for row in rows]
        ratios.fill_between(sizes, low, high, color=_COLOURS["hopcoll"], alpha=0.25, lw=0)
        ratios.semilogx(
            sizes, [row["ratio"] for row in rows], marker="o", color=_COLOURS["hopcoll"]
        )
        ratios.axhline(1, color=_COLOURS["mpi4py"], lw=1)
        ratios.set_ylim(bottom=0)
        ratios.set_xscale("log", base=2)
        ratios.set_ylabel("hopcoll / mpi4py")
        ratios.set_xlabel("bytes")
        ratios.grid(alpha=0.3)
    figure.suptitle(f"{report['ranks']} ranks on one host, {report['machine']['mpi']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
