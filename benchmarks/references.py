"""ExoFlow's experiments at our scale: ``python -m benchmarks.references --json FILE [--png FILE]``.

* passing: between two tasks on two ranks, 1 B to 128 MiB, beside an MPI send of the same bytes;
* sharing: one data set, read by 1 to 16 tasks on all ranks;
* rate: no-op tasks a second, on 1 to 4 ranks;
* kept: ETL and training (ingest, four augmentations, epochs of a gang) with checkpoints "none",
  "async", "sync" and "auto", as the data grow;
* dies: how much longer that takes when all ranks die and it is started again, or the rank of the
  ingest, of an augmentation, or one that trains.

Each case is a job of its own (`benchmarks.references_job`).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

_SIZES = [1 << power for power in (0, 10, 14, 17, 20, 23, 25, 27)]
_ROWS = [1 << power for power in (12, 14, 16, 18)]
_CHECKPOINTS = ["none", "async", "sync", "auto"]
_DEATHS = ["", "job", "ingest", "augment", "trainer"]
_JOB_S = 300.0


def _job(ranks: int, case: str, folder: Path, **words: Any) -> dict[str, Any] | None:
    """Run a case; None where all its ranks died."""
    folder.mkdir(exist_ok=True, parents=True)
    command = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(ranks), "-m"]
    command += ["benchmarks.references_job", case, str(folder)]
    command += [f"{key}={value}" for key, value in words.items()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_JOB_S, check=False)
    said = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if not said and words.get("kill") != "job":
        raise click.ClickException(f"{case} {words}: {ended.stderr[-2000:]}")
    return json.loads(said[-1]) if said else None


def _cases(small: bool) -> list[tuple[str, int, dict[str, Any]]]:
    """The experiment, its ranks, and what it is about."""
    found: list[tuple[str, int, dict[str, Any]]] = []
    sizes, rows = (_SIZES[:4], _ROWS[:1]) if small else (_SIZES, _ROWS)
    epochs = 2 if small else 10
    found += [("passing", 2, {"nbytes": nbytes}) for nbytes in sizes]
    found += [
        ("sharing", 3, {"nbytes": sizes[-1], "consumers": count}) for count in (1, 2, 4, 8, 16)
    ]
    found += [("rate", ranks, {"tasks": 50 if small else 1000}) for ranks in (1, 2, 3, 4)]
    found += [
        ("kept", 3, {"rows": count, "epochs": epochs, "checkpoint": one})
        for count in rows for one in _CHECKPOINTS
    ]  # fmt: skip
    found += [
        ("dies", 3, {"rows": rows[-1], "epochs": epochs, "checkpoint": "async", "kill": kill})
        for kill in _DEATHS
    ]
    return found


def _measure(scratch: Path, name: str, ranks: int, words: dict[str, Any]) -> dict[str, Any]:
    if name in ("kept", "dies"):
        begin_s = time.monotonic()
        found = _job(ranks, "pipeline", scratch, **words)
        if found is None:
            found = _job(ranks, "pipeline", scratch, **words)  # another job goes on
        whole_s = time.monotonic() - begin_s
        return {"experiment": name, "ranks": ranks, **words, **(found or {}), "whole_s": whole_s}
    found = _job(ranks, name, scratch, **words)
    return {"experiment": name, "ranks": ranks, **words, **(found or {})}


@click.command("references")
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True)
@click.option("--small", is_flag=True, help="See that all of it works, in a minute or two.")
@click.option("--only", multiple=True, help="Of these experiments alone.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path),
              help="Where the stores are made; a temporary one where it is left out.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--png", "png_path", type=click.Path(dir_okay=False, path_type=Path))
def command(
    turns: int, small: bool, only: tuple[str, ...], folder: Path | None, json_path: Path | None,
    png_path: Path | None,
) -> None:  # fmt: skip
    """Time workflows over references: passing, sharing, checkpoints, deaths."""
    cases = [one for one in _cases(small) if not only or one[0] in only]
    order = [one for turn in range(turns) for one in (cases if turn % 2 == 0 else cases[::-1])]
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for number, (name, ranks, words) in enumerate(tqdm(order, unit=" jobs", disable=None)):
            rows.append(_measure(Path(scratch) / str(number), name, ranks, words))
    report = {
        "turns": turns,
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
        "python": platform.python_version(),
        "rows": rows,
    }
    for nbytes in sorted({row["nbytes"] for row in rows if row["experiment"] == "passing"}):
        same = [row for row in rows if row["experiment"] == "passing" and row["nbytes"] == nbytes]
        trigger_s, get_s, send_s = (
            statistics.median(time_s for row in same for time_s in row[name])
            for name in ("trigger_s", "get_s", "send_s")
        )
        click.echo(
            f"{nbytes:>10} B: {trigger_s * 1e3:.2f} ms from task to task, a get "
            f"{get_s * 1e3:.2f} ms ({get_s / send_s:.2f} x a send; both "
            f"{(trigger_s + get_s) / send_s:.2f} x), "
            f"{max(row['file_bytes'] for row in same)} bytes in files"
        )
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    if png_path is not None:
        from benchmarks.plotting import plot_references

        plot_references(report, png_path)


if __name__ == "__main__":
    command()
