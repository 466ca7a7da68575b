"""What the benchmarks of objects share: jobs that lose nobody, jobs that lose a rank, the report.

A `Benchmark` says what differs. Each job runs all its kinds of calls, `turns` times; in one with a
victim the first kind comes first, then once more while a rank is killed, when half of the median
time of the calls before has passed. Times are of the slowest, from a moment that all have agreed
on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks.collectives import size_name
from benchmarks.lab.cluster import Lab, exits_when_told
from benchmarks.lab.jobs import (
    agreed_start,
    bound_s,
    busy_share,
    machine,
    markdown,
    run_job,
    sizes_of,
    sleep_until,
    where,
    write,
)
from benchmarks.lab.network import LabError, bits_per_s

__all__ = ["GET_S", "Benchmark", "Job"]

GET_S = 60.0


class Job:
    """What the ranks of a job have in common."""

    def __init__(self, words: Sequence[str]) -> None:
        import hopcoll

        folder, nbytes, turns, least_s, victim = words
        self.folder, self.turns = Path(folder), int(turns)
        #: S/B; and the rank that is killed, which is never the first: 0 is none.
        self.least_s, self.victim = float(least_s), int(victim)
        self.comm = hopcoll.init()
        self.objects = self.comm.objects
        self.given = (np.arange(int(nbytes) // 4) % 1000).astype(np.float32)

    def slowest_s(
        self,
        begin_s: float,
        getters: Iterable[int],
        get: Callable[[], np.ndarray],
        expected: np.ndarray,
    ) -> float:
        """Get something at some ranks from a moment on; return how long the slowest one took."""
        taken_s, got = 0.0, None
        if self.comm.rank in getters:
            sleep_until(begin_s)
            got = get()
            taken_s = time.monotonic() - begin_s
        longest_s: float = max(self.comm.allgather(taken_s))
        assert got is None or np.array_equal(got, expected)
        return longest_s

    def delete(self, refs: Iterable[Any]) -> None:
        """Delete objects, by rank 0, and wait for that."""
        if self.comm.rank == 0:
            for ref in refs:
                self.objects.delete(ref)
        self.comm.Barrier()

    def with_death(
        self, usual_s: float, getters: Iterable[int], get: Callable[[], np.ndarray],
        expected: np.ndarray,
    ) -> None:  # fmt: skip
        """Get something while a rank dies; each that lives writes down how long it took."""
        self.comm.Barrier()
        begin_s = agreed_start(self.comm)
        if self.comm.rank == self.victim:
            after_s = begin_s + usual_s / 2 - time.monotonic()
            threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if self.comm.rank in getters:
            got = get()
            end_s = time.monotonic()
            if self.comm.rank != self.victim:
                assert np.array_equal(got, expected)
                (self.folder / f"survivor.{self.comm.rank}").write_text(repr(end_s - begin_s))
        if self.comm.rank == self.victim:
            time.sleep(GET_S)  # until it dies
        self.comm.Barrier()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of objects: what differs from another one.

    Parameters
    ----------
    module, lab : str
        Its module, and what its lab is called.
    calls : str
        What it times, for people.
    kinds : tuple of str
        The kinds of calls, by which `rank` gives their times; the first is the one with a death.
    victims : callable
        Which ranks are killed in turn, of so many.
    getters : callable
        Which ranks get something while one is killed, of so many.
    head : tuple of str
        The columns between S/B and those of the kills.
    figures : callable
        Their figures, of the median of each kind over S/B.
    rank : callable
        What a rank does; returns the times of each kind, in seconds. After the first kind it calls
        `Job.with_death` if there is a victim, and nothing more.
    """

    module: str
    lab: str
    calls: str
    kinds: tuple[str, ...]
    victims: Callable[[int], Sequence[int]]
    getters: Callable[[int], Iterable[int]]
    head: tuple[str, ...]
    figures: Callable[[dict[str, float]], Sequence[float]]
    rank: Callable[[Job], dict[str, list[float]]]

    def run(self) -> None:
        """Be the command, or a rank of one of its jobs."""
        if sys.argv[1:2] != ["--rank"]:
            self.command()(prog_name=f"python -m {self.module}")
            return
        job = Job(sys.argv[2:])
        times = self.rank(job)
        if job.comm.rank == 0:
            (job.folder / "times.json").write_text(json.dumps(times))

    def command(self) -> click.Command:
        """Return the command line."""

        @click.command(
            context_settings={"help_option_names": ["-h", "--help"]},
            help=f"Time {self.calls} over a lab, as multiples of the bound; print Markdown.",
        )
        @click.option("--hosts", default=8, show_default=True, help="How many, with a rank each.")
        @click.option("--rate", default="1gbit", show_default=True, help="What each link carries.")
        @click.option("--sizes", default="1MiB,32MiB", show_default=True, callback=sizes_of)
        @click.option("--turns", default=5, show_default=True, help="Calls of each kind.")
        @click.option("--kills", default=3, show_default=True, help="Jobs with one, of each size.")
        @click.option("--json", "path", type=click.Path(path_type=Path), help="For the figures.")
        @click.option("--name", default=self.lab, show_default=True, help="Of the lab.")
        def main(path: Path | None, **how: Any) -> None:
            try:
                with exits_when_told():
                    report = self.measure(**how)
            except LabError as error:
                raise click.ClickException(str(error)) from error
            click.echo(self.table(report))
            if path is not None:
                write(report, path)
                click.echo(f"\nfigures: {path}")

        return main

    def measure(
        self, hosts: int, rate: str, sizes: Sequence[int], turns: int, kills: int, name: str
    ) -> dict[str, Any]:
        """Make a lab, run the jobs and return the report.

        Raises
        ------
        LabError
            No lab can be made, or a job failed or hung.
        """
        if hosts < 3:
            raise LabError("hosts must be at least 3, for one to be killed")
        if turns < 1:
            raise LabError(f"turns must be at least 1, not {turns}")
        report: dict[str, Any] = {
            "hosts": hosts,
            "rate": rate,
            "turns": turns,
            "rows": [],
            "machine": machine(),
        }
        with Lab(hosts, rate, name=name) as lab, tempfile.TemporaryDirectory() as scratch:
            todo = tqdm(total=len(sizes) * (1 + kills), unit="job", leave=False)
            for nbytes in sizes:
                least_s = bound_s("bcast", nbytes, hosts, bits_per_s(rate))
                row: dict[str, Any] = {"nbytes": nbytes, "bound_s": least_s, "killed": []}
                for number in range(1 + kills):
                    folder = Path(scratch, f"{nbytes}-{number}")
                    folder.mkdir()
                    victims = self.victims(hosts)
                    victim = victims[(number - 1) % len(victims)] if number else 0
                    words = [str(folder), str(nbytes), str(turns), repr(least_s), str(victim)]
                    run_job(lab, self.module, words)
                    times = json.loads((folder / "times.json").read_text())
                    if victim:
                        row["killed"].append(self._death(folder, victim, hosts, times))
                    else:
                        row.update(times)
                    todo.update()
                report["rows"].append(row)
            todo.close()
            report["machine"]["busy"].append(busy_share())
        return report

    def _death(
        self, folder: Path, victim: int, hosts: int, times: dict[str, list[float]]
    ) -> dict[str, Any]:
        said = [float(path.read_text()) for path in folder.glob("survivor.*")]
        living = [rank for rank in self.getters(hosts) if rank != victim]
        if len(said) != len(living):
            raise LabError(f"of {len(living)} ranks that live {len(said)} had the object")
        usual_s = median(times[self.kinds[0]])
        return {"victim": victim, "usual_s": usual_s, "time_s": max(said)}

    def table(self, report: dict[str, Any]) -> str:
        """Return the figures of a report as Markdown."""
        rows = [["size", "S/B ms", *self.head, f"killed half way, over {self.kinds[0]}"]]
        for row in report["rows"]:
            over = {kind: median(row[kind]) / row["bound_s"] for kind in self.kinds}
            rows.append([
                size_name(row["nbytes"]),
                f"{row['bound_s'] * 1e3:.1f}",
                *(f"{figure:.2f}" for figure in self.figures(over)),
                " ".join(f"{one['time_s'] / one['usual_s']:.2f}" for one in row["killed"]),
            ])  # fmt: skip
        last = f"{where(report)} before and after; medians of {report['turns']}."
        return "\n".join([*markdown(rows), "", last])
