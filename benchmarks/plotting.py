"""Plots of benchmark reports, into PNG files; the only place that imports matplotlib."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a benchmark has no window to draw in

from matplotlib import pyplot

__all__ = [
    "plot_checkpoints", "plot_collectives", "plot_peers", "plot_references", "plot_scaling",
    "plot_workflows",
]  # fmt: skip

_COLOURS = {"mpi4py": "#8a8f98", "hopcoll": "#c2410c"}
#: Of the systems of `benchmarks.lab.peers`; none is told from another by its colour alone.
_PEERS = {
    "objects": ("#c2410c", "o"),
    "collectives": ("#f59e0b", "s"),
    "mpi": ("#6b7280", "^"),
    "gloo": ("#2563eb", "v"),
    "ray": ("#7c3aed", "D"),
}
#: Below that the ratio to S/B says nothing.
_PEERS_BOUND_S = 1e-3


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


def plot_checkpoints(report: dict[str, Any], path: Path) -> None:
    """Draw a report of `benchmarks.checkpoint`: each time as a dot, the medians as bars.

    Parameters
    ----------
    report : dict
        What the benchmark wrote as JSON.
    path : Path
        The PNG file; its folder is made.
    """
    panels = {
        "Until it is durable": [
            *("hopcoll save_sync", "hopcoll save", "h5py + fsync", "np.savez + fsync"),
            *("torch save", "torch async_save"),
        ],
        "Until an asynchronous save returns": ["hopcoll save stall", "torch async_save stall"],
        "Until it is read": ["hopcoll restore", "plain read"],
    }
    shown = {
        title: [name for name in names if name in report["times_s"]]
        for title, names in panels.items()
    }
    figure, axes = pyplot.subplots(
        len(shown),
        1,
        figsize=(8, 6),
        height_ratios=[len(names) + 0.8 for names in shown.values()],
        layout="constrained",
    )
    for axis, (title, names) in zip(axes, shown.items(), strict=True):
        for row, name in enumerate(names):
            colour = _COLOURS["hopcoll" if name.startswith("hopcoll") else "mpi4py"]
            times_ms = [1000 * value for value in report["times_s"][name]]
            median_ms = 1000 * report["medians_s"][name]
            axis.barh(row, median_ms, color=colour, alpha=0.55)
            axis.plot(times_ms, [row] * len(times_ms), "|", color=colour, markersize=9)
            axis.annotate(
                f"{median_ms:.0f} ms", (0, row), (6, 0), textcoords="offset points",
                va="center", fontweight="bold",
            )
        axis.set_yticks(range(len(names)), [name.removesuffix(" stall") for name in names])
        axis.invert_yaxis()
        axis.set_title(title, loc="left")
        slowest_ms = max(1000 * value for name in names for value in report["times_s"][name])
        axis.set_xlim(0, 1.02 * slowest_ms)
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set_xlabel("ms (bars: medians; ticks: each time)")
    figure.suptitle(f"{report['nbytes'] >> 20} MiB of state, one process, local disk")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_scaling(report: dict[str, Any], path: Path) -> None:
    """Draw a report of `benchmarks.scaling`: time over nodes, a panel for each collective and size.

    Parameters
    ----------
    report : dict
        What the benchmark wrote as JSON.
    path : Path
        The PNG file; its folder is made.
    """
    rows = report["rows"]
    names = list(dict.fromkeys(row["collective"] for row in rows))
    sizes = sorted({row["nbytes"] for row in rows})
    figure, axes = pyplot.subplots(
        len(names), len(sizes), figsize=(3.4 * len(sizes), 3 * len(names)),
        squeeze=False, layout="constrained", sharex=True,
    )  # fmt: skip
    for across, name in zip(axes, names, strict=True):
        for axis, nbytes in zip(across, sizes, strict=True):
            ours = sorted(
                (row for row in rows if (row["collective"], row["nbytes"]) == (name, nbytes)),
                key=lambda row: row["nodes"],
            )
            nodes = [row["nodes"] for row in ours]
            for library, colour in _COLOURS.items():
                values = [row[f"{library}_us"] for row in ours]
                axis.loglog(nodes, values, marker="o", color=colour, label=library)
            axis.set_xscale("log", base=2)
            axis.set_xticks(nodes, list(map(str, nodes)))
            axis.set_title(f"{name.capitalize()}, {nbytes} bytes", fontsize=10)
            axis.grid(alpha=0.3)
        across[0].set_ylabel("time of a call (µs)")
    for axis in axes[-1]:
        axis.set_xlabel("nodes")
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_workflows(report: dict[str, Any], path: Path) -> None:
    """Draw a report of `benchmarks.workflows`: tasks a second, each run as a dot.

    Parameters
    ----------
    report : dict
        What the benchmark wrote as JSON.
    path : Path
        The PNG file; its folder is made.
    """
    names = list(report["medians"])
    figure, axis = pyplot.subplots(figsize=(8, 0.5 * len(names) + 1.4), layout="constrained")
    for row, name in enumerate(names):
        colour = _COLOURS["hopcoll" if name.startswith("hopcoll") else "mpi4py"]
        values, median = report["values"][name], report["medians"][name]
        axis.barh(row, median, color=colour, alpha=0.55)
        axis.plot(values, [row] * len(values), "|", color=colour, markersize=9)
        axis.annotate(
            f"{median:,.0f}", (median, row), (4, 0), textcoords="offset points", va="center",
            fontweight="bold",
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(right=axis.get_xlim()[1] * 10)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("no-op tasks a second (bars: medians; ticks: each run)")
    figure.suptitle(
        f"A 100 ms training step that saves 16 MiB every tenth time: "
        f"{report['training_cost']:+.2%}", fontsize=10,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_peers(report: dict[str, Any], path: Path) -> None:
    """Draw a report of `benchmarks.lab.peers`: times, and where the wire counts the ratio to S/B.

    Parameters
    ----------
    report : dict
        What the benchmark wrote as JSON.
    path : Path
        The PNG file; its folder is made.
    """
    names = list(dict.fromkeys(row["operation"] for row in report["rows"]))
    large = [row for row in report["rows"] if row["bound_s"] >= _PEERS_BOUND_S]
    bars = [is_staggered for is_staggered in (False, True) if _peers_rows(large, is_staggered)]
    figure, axes = pyplot.subplots(
        1 + len(bars),
        len(names),
        figsize=(4.6 * len(names), 3.4 * (1 + len(bars)) + 0.8),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for column, name in enumerate(names):
        rows = _peers_rows(report["rows"], False, name)
        _plot_peer_times(axes[0][column], rows, report["systems"])
        axes[0][column].set_title(name)
        for axis, is_staggered in zip(axes[1:, column], bars, strict=True):
            rows = _peers_rows(large, is_staggered, name)
            if rows:
                _plot_peer_ratios(axis, rows, report["systems"])
                axis.set_title(f"{name}, ranks {'one by one' if is_staggered else 'at once'}")
            else:
                axis.set_axis_off()
    axes[0][0].set_ylabel("ms a call")
    for axis in axes[1:, 0]:
        axis.set_ylabel("over S/B")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    figure.suptitle(
        f"{report['hosts']} hosts at {report['rate']}: medians; hollow or hatched: over the limit"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_references(report: dict[str, Any], path: Path) -> None:
    """Draw a report of `benchmarks.references`: an experiment a panel, medians and extremes.

    Parameters
    ----------
    report : dict
        What the benchmark wrote as JSON.
    path : Path
        The PNG file; its folder is made.
    """
    figure, axes = pyplot.subplots(1, 5, figsize=(22, 4), layout="constrained")

    def lines(name: str, x: str, y: str, by: str = "experiment") -> dict[str, Any]:
        found: dict[str, dict[Any, list[float]]] = {}
        for row in report["rows"]:
            if row["experiment"] == name:
                value = row[y] if isinstance(row[y], (int, float)) else median(row[y])
                found.setdefault(row[by], {}).setdefault(row[x], []).append(value)
        return {
            one: ([*points], *_medians(list(points.values()))) for one, points in found.items()
        }

    for y, label in (("get_s", "get"), ("send_s", "MPI send"), ("trigger_s", "trigger")):
        for xs, ys, spread in lines("passing", "nbytes", y).values():
            axes[0].errorbar(xs, ys, spread, fmt="o-", capsize=2, label=label)
    axes[0].set(xscale="log", yscale="log")
    panels = [
        ("passing", "bytes", "seconds"), ("sharing", "consumers", "seconds"),
        ("rate", "ranks", "no-op tasks a second"), ("kept", "rows of data", "seconds"),
        ("dies", "who dies", "seconds, from start to end"),
    ]  # fmt: skip
    draw = [
        (1, lines("sharing", "consumers", "seconds")), (2, lines("rate", "ranks", "tasks_per_s")),
        (3, lines("kept", "rows", "seconds", "checkpoint")),
    ]  # fmt: skip
    for column, found in draw:
        for label, (xs, ys, spread) in found.items():
            axes[column].errorbar(xs, ys, spread, fmt="o-", capsize=2, label=label)
        axes[column].set_ylim(bottom=0)
    axes[3].set_xscale("log", base=2)
    for xs, ys, spread in lines("dies", "kill", "whole_s").values():
        names = [one or "nobody" for one in xs]
        axes[4].bar(names, ys, yerr=spread, capsize=4, color=_COLOURS["hopcoll"])
    for axis, (title, x, y) in zip(axes, panels, strict=True):
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    for axis in (axes[0], axes[3]):
        if axis.lines:
            axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _medians(runs: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """The median of each, and how far below and above it the others are."""
    middle = [median(values) for values in runs]
    below = [one - min(values) for one, values in zip(middle, runs, strict=True)]
    above = [max(values) - one for one, values in zip(middle, runs, strict=True)]
    return middle, [below, above]


def _peers_rows(
    rows: list[dict[str, Any]], is_staggered: bool, name: str | None = None
) -> list[dict[str, Any]]:
    chosen = [
        row
        for row in rows
        if (row["step_s"] > 0) == is_staggered and name in (None, row["operation"])
    ]
    return sorted(chosen, key=lambda row: row["nbytes"])


def _peer_time(row: dict[str, Any], system: str) -> tuple[float, bool] | None:
    """The time of a cell in seconds, and whether that is only the limit."""
    cell = row["cells"].get(system, {"runs": []})
    if "over_s" in cell:
        return cell["over_s"], True
    times_s = list(chain.from_iterable(run["seconds"] for run in cell["runs"]))
    return (median(times_s), False) if times_s else None


def _plot_peer_times(axis: Any, rows: list[dict[str, Any]], systems: dict[str, str]) -> None:
    from benchmarks.collectives import size_name  # which imports this module

    sizes = [row["nbytes"] for row in rows]
    axis.plot(
        sizes, [1e3 * row["bound_s"] for row in rows], "--", color="#111827", lw=1, label="S/B"
    )
    for system, label in systems.items():
        found = [(row["nbytes"], _peer_time(row, system)) for row in rows]
        points = [(nbytes, 1e3 * time[0], time[1]) for nbytes, time in found if time]
        colour, marker = _PEERS[system]
        axis.plot(
            [nbytes for nbytes, *_ in points],
            [ms for _, ms, _ in points],
            marker=marker,
            color=colour,
            label=label,
            lw=2.2 if label.startswith("hopcoll") else 1.2,
            markersize=6,
        )
        over = [(nbytes, ms) for nbytes, ms, is_over in points if is_over]
        if over:
            axis.plot(*zip(*over, strict=True), marker, mfc="white", mec=colour, ms=9, ls="none")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(sizes, [size_name(nbytes) for nbytes in sizes], rotation=30)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _plot_peer_ratios(axis: Any, rows: list[dict[str, Any]], systems: dict[str, str]) -> None:
    from benchmarks.collectives import size_name

    width = 0.86 / len(systems)
    for place, system in enumerate(systems):
        for group, row in enumerate(rows):
            time = _peer_time(row, system)
            if time is None:
                continue
            ratio = time[0] / row["bound_s"]
            at = group + (place - (len(systems) - 1) / 2) * width
            hatch = "////" if time[1] else None
            colour = _PEERS[system][0]
            axis.bar(at, ratio, 0.92 * width, color="white" if hatch else colour, ec=colour,
                     hatch=hatch)  # fmt: skip
            axis.annotate(
                f"{'>' * time[1]}{ratio:.1f}" if ratio < 10 else f"{'>' * time[1]}{ratio:.0f}",
                (at, ratio), (0, 2), textcoords="offset points", ha="center", fontsize=7,
            )  # fmt: skip
    axis.axhline(1, color="#111827", lw=1, ls="--")
    axis.set_xticks(range(len(rows)), [size_name(row["nbytes"]) for row in rows])
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
