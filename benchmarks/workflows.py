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
_TRAINING_SAVES, _TRAINING_TURNS = 4, 3


@task(checkpoint="sync")
def durable(x: int) -> int:
    return x + 1


@task(checkpoint="none")
def unkept(x: int) -> int:
    return x + 1


@task(checkpoint="sync")
def gather(xs: list[int]) -> int:
    return sum(xs)


class _Step:
    """A training step of some 100 ms on one core: a fixed number of products of matrices, and a new
    state; and when each began."""

    def __init__(self) -> None:
        self._weights = np.full((256, 256), 1e-3, np.float32)
        self._product = np.empty_like(self._weights)
        self.rounds = 0
        self.begun_s: list[float] = []

    def calibrate(self) -> None:
        """Choose the amount of work."""
        times = []
        for _ in range(50):
            begin_s = time.thread_time()
            np.matmul(self._weights, self._weights, out=self._product)
            times.append(time.thread_time() - begin_s)
        self.rounds = round(_STEP_S / statistics.median(times))

    def __call__(self, state: np.ndarray, i: int) -> np.ndarray:
        self.begun_s.append(time.perf_counter())
        for _ in range(self.rounds):
            np.matmul(self._weights, self._weights, out=self._product)
        return state * np.float32(0.999)

    def take_times(self) -> list[float]:
        """How long each took, the pause before the next one included."""
        times = np.diff(self.begun_s).tolist()
        self.begun_s.clear()
        return times


one_step = _Step()


@task(checkpoint="async")
def train(state: np.ndarray, i: int) -> np.ndarray:
    return one_step(state, i)


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


def _training(folder: Path) -> tuple[float, float]:
    """Seconds a step: by a workflow that saves every tenth state, and by a plain loop. They take
    turns in one process, so that what the machine does besides meets both. What is new to the first
    ten steps (modules, threads, memory) is left out."""
    one_step.calibrate()
    state = np.zeros(_STATE_BYTES // 4, np.float32)
    spent: tuple[list[float], list[float]] = ([], [])
    steps = 10 * (1 + _TRAINING_SAVES) + 1
    for turn in range(_TRAINING_TURNS):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            if which == 0:
                with Workflow(f"training-{turn}", folder) as workflow:
                    workflow.run(loop(train, state, steps, every=10))
            else:
                trained = state
                for i in range(steps):
                    trained = one_step(trained, i)
            spent[which].extend(one_step.take_times()[10:])
    return statistics.fmean(spent[0]), statistics.fmean(spent[1])


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


#: Tasks a second, by name: what has to be installed, and what is measured.
CASES: dict[str, tuple[str | None, Callable[[Path], float]]] = {
    "hopcoll, durable, chain": (None, _chain(durable, 3000)),
    "hopcoll, durable, side by side": (None, _wide(durable, 5000)),
    "hopcoll, not kept, chain": (None, _chain(unkept, 10_000)),
    "hopcoll, not kept, side by side": (None, _wide(unkept, 10_000)),
    "DBOS on SQLite, chain": ("dbos", _dbos(500)),
    "Parsl, chain": ("parsl", _parsl(500, wide=False)),
    "Parsl, side by side": ("parsl", _parsl(500, wide=True)),
    "plain Python, chain": (None, _plain(100_000)),
}
TRAINING = "training, by a workflow and plainly"


def _run_apart(name: str, folder: Path) -> list[float]:
    """Run a case in a process of its own, and return what it measured."""
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
    return [float(word) for word in ended.stdout.strip().splitlines()[-1].split()]


def measure(turns: int, folder: Path) -> dict[str, Any]:
    """Return the report: medians, and what the targets compare."""
    names = [
        name
        for name, (package, _) in CASES.items()
        if package is None or importlib.util.find_spec(package) is not None
    ]
    for name in sorted(set(CASES) - set(names)):
        click.echo(f"left out: {name} (pip install hopcoll[peers])", err=True)
    values: dict[str, list[float]] = {name: [] for name in names}
    training: list[list[float]] = []
    names.append(TRAINING)
    order = [one for turn in range(turns) for one in (names if turn % 2 == 0 else names[::-1])]
    for number, name in enumerate(tqdm(order, unit=" runs", disable=None)):
        found = _run_apart(name, folder / str(number))
        if name == TRAINING:
            training.append(found)
        else:
            values[name] += found
    names.pop()
    medians = {name: statistics.median(one) for name, one in values.items()}
    report: dict[str, Any] = {
        "turns": turns,
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
        "python": platform.python_version(),
        "medians": medians,
        "values": values,
        "training_s_per_step": training,
        "training_cost": statistics.median(mine / plain - 1 for mine, plain in training),
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
        found = _training(folder) if case == TRAINING else [CASES[case][1](folder / "store")]
        click.echo(" ".join(map(repr, found)))
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        report = measure(turns, Path(scratch))
    for name, value in report["medians"].items():
        click.echo(f"{name:34} {value:>12,.0f} tasks/s")
    click.echo(f"a training step costs {report['training_cost']:+.2%}")
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    if png_path is not None:
        from benchmarks.plotting import plot_workflows

        plot_workflows(report, png_path)


if __name__ == "__main__":
    command()
