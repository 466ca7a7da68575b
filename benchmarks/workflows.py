"""Times of workflows: ``python -m benchmarks.workflows --json FILE [--png FILE]``.

No-op tasks a second, in a chain (each needs the value of the one before) and side by side, with
every value durable and with none kept, by hopcoll, DBOS on SQLite, Parsl and plain Python; and what
a training loop of 100 ms steps pays for being a workflow that saves 16 MiB of state every ten
steps. Each case is a process of its own, in turns A B C ... C B A. DBOS and Parsl are the extra
[peers]; what is not installed is left out, and said so.

What each one promises for a value it calls done is not the same: hopcoll and DBOS have made it
durable; Parsl has written its checkpoint, and synced nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from recovery.workflows import Workflow, loop, task

_STEP_S = 0.1
_STATE_BYTES = 16 << 20


@task(checkpoint="sync")
def durable(x: int) -> int:
    return x + 1


@task(checkpoint="none")
def unkept(x: int) -> int:
    return x + 1


@task(checkpoint="sync")
def gather(xs: list[int]) -> int:
    return sum(xs)


@task(checkpoint="async")
def train(state: np.ndarray, i: int) -> np.ndarray:
    return one_step(state, i)


def one_step(state: np.ndarray, i: int) -> np.ndarray:
    """A step of so many seconds of work, whatever else it pays for."""
    end_s = time.thread_time() + _STEP_S
    while time.thread_time() < end_s:
        new = state * np.float32(0.999)
        new[i % len(new)] += 1.0
    return new


def _chain(kind: Any, count: int) -> Callable[[Path], float]:
    def run(folder: Path) -> float:
        node = kind.bind(0)
        for _ in range(count - 1):
            node = kind.bind(node)
        with Workflow("chain", folder) as workflow:
            begin_s = time.perf_counter()
            assert workflow.run(node) == count
            return count / (time.perf_counter() - begin_s)

    return run


def _wide(kind: Any, count: int) -> Callable[[Path], float]:
    def run(folder: Path) -> float:
        node = gather.bind([kind.bind(i) for i in range(count)])
        with Workflow("wide", folder) as workflow:
            begin_s = time.perf_counter()
            workflow.run(node)
            return count / (time.perf_counter() - begin_s)

    return run


def _training(steps: int) -> Callable[[Path], float]:
    def run(folder: Path) -> float:
        state = np.zeros(_STATE_BYTES // 4, np.float32)
        with Workflow("training", folder) as workflow:
            begin_s = time.perf_counter()
            workflow.run(loop(train, state, steps, every=10))
            return (time.perf_counter() - begin_s) / steps

    return run


def _plain_training(steps: int) -> Callable[[Path], float]:
    def run(folder: Path) -> float:
        state = np.zeros(_STATE_BYTES // 4, np.float32)
        begin_s = time.perf_counter()
        for i in range(steps):
            state = one_step(state, i)
        return (time.perf_counter() - begin_s) / steps

    return run


def _plain(count: int) -> Callable[[Path], float]:
    def run(folder: Path) -> float:
        begin_s = time.perf_counter()
        x = 0
        for _ in range(count):
            x = durable.function(x)
        return count / (time.perf_counter() - begin_s)

    return run


def _dbos(count: int) -> Callable[[Path], float]:
    def run(folder: Path) -> float:
        from dbos import DBOS

        folder.mkdir()
        url = f"sqlite:///{folder / 'dbos.sqlite'}"
        DBOS(config={"name": "bench", "system_database_url": url, "run_admin_server": False})

        @DBOS.step()
        def step(x: int) -> int:
            return x + 1

        @DBOS.workflow()
        def chain(count: int) -> int:
            x = 0
            for _ in range(count):
                x = step(x)
            return x

        DBOS.launch()
        chain(10)
        begin_s = time.perf_counter()
        assert chain(count) == count
        taken_s = time.perf_counter() - begin_s
        DBOS.destroy()
        return count / taken_s

    return run


def _parsl(count: int, *, wide: bool) -> Callable[[Path], float]:
    def run(folder: Path) -> float:
        import parsl
        from parsl.config import Config
        from parsl.dataflow.memoization import BasicMemoizer
        from parsl.executors import ThreadPoolExecutor

        config = Config(
            executors=[ThreadPoolExecutor(max_threads=8)],
            memoizer=BasicMemoizer(checkpoint_mode="task_exit"),
            run_dir=str(folder),
            initialize_logging=False,
        )

        @parsl.python_app(cache=True)
        def step(x: int) -> int:
            return x + 1

        with parsl.load(config):
            step(-1).result()
            begin_s = time.perf_counter()
            if wide:
                for future in [step(i) for i in range(count)]:
                    future.result()
            else:
                future = step(0)
                for _ in range(count - 1):
                    future = step(future)
                future.result()
            return count / (time.perf_counter() - begin_s)

    return run


#: By name: what has to be installed, what is measured, and the unit.
CASES: dict[str, tuple[str | None, Callable[[Path], float], str]] = {
    "hopcoll, durable, chain": (None, _chain(durable, 3000), "tasks/s"),
    "hopcoll, durable, side by side": (None, _wide(durable, 5000), "tasks/s"),
    "hopcoll, not kept, chain": (None, _chain(unkept, 10_000), "tasks/s"),
    "hopcoll, not kept, side by side": (None, _wide(unkept, 10_000), "tasks/s"),
    "DBOS on SQLite, chain": ("dbos", _dbos(500), "tasks/s"),
    "Parsl, chain": ("parsl", _parsl(500, wide=False), "tasks/s"),
    "Parsl, side by side": ("parsl", _parsl(500, wide=True), "tasks/s"),
    "plain Python, chain": (None, _plain(100_000), "tasks/s"),
    "training, workflow": (None, _training(60), "s/step"),
    "training, plain": (None, _plain_training(60), "s/step"),
}


def _run_apart(name: str, folder: Path) -> float:
    """Run a case in a process of its own."""
    folder.mkdir()
    words = ["-m", "benchmarks.workflows", "--case", name, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *words],
        capture_output=True, text=True, timeout=600, env=environment, check=False,
    )  # fmt: skip
    shutil.rmtree(folder)
    if ended.returncode:
        raise click.ClickException(f"{name} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    return float(ended.stdout.strip().splitlines()[-1])


def measure(turns: int, folder: Path) -> dict[str, Any]:
    """Return the report: medians, and what the targets compare."""
    names = [
        name
        for name, (package, _, _) in CASES.items()
        if package is None or importlib.util.find_spec(package) is not None
    ]
    for name in sorted(set(CASES) - set(names)):
        click.echo(f"left out: {name} (pip install hopcoll[peers])", err=True)
    values: dict[str, list[float]] = {name: [] for name in names}
    order = [one for turn in range(turns) for one in (names if turn % 2 == 0 else names[::-1])]
    for number, name in enumerate(tqdm(order, unit=" runs", disable=None)):
        values[name].append(_run_apart(name, folder / str(number)))
    medians = {name: statistics.median(one) for name, one in values.items()}
    pairs = zip(values["training, workflow"], values["training, plain"], strict=True)
    report: dict[str, Any] = {
        "turns": turns,
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
        "python": platform.python_version(),
        "units": {name: CASES[name][2] for name in names},
        "medians": medians,
        "values": values,
        "training_cost": statistics.median(mine / plain - 1 for mine, plain in pairs),
    }
    if "DBOS on SQLite, chain" in medians:
        report["chain_over_dbos"] = (
            medians["hopcoll, durable, chain"] / medians["DBOS on SQLite, chain"]
        )
    return report


@click.command("workflows")
@click.option("--turns", type=click.IntRange(1), default=5, show_default=True)
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path),
              help="Where the stores are made; a temporary one where it is left out.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--png", "png_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--case", hidden=True)
def command(
    turns: int, folder: Path | None, json_path: Path | None, png_path: Path | None, case: str | None
) -> None:
    """Time workflows beside DBOS, Parsl and plain Python."""
    if case is not None:
        assert folder is not None
        click.echo(repr(CASES[case][1](folder / "store")))
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        report = measure(turns, Path(scratch))
    for name, value in report["medians"].items():
        unit = report["units"][name]
        text = f"{value:,.0f}" if unit == "tasks/s" else f"{value:.4f}"
        click.echo(f"{name:34} {text:>12} {unit}")
    click.echo(f"a training step costs {report['training_cost']:+.2%}")
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    if png_path is not None:
        from benchmarks.plotting import plot_workflows

        plot_workflows(report, png_path)


if __name__ == "__main__":
    command()
