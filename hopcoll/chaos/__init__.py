"""Real jobs, real deaths: ``hopcoll chaos`` hurts ranks of MPI jobs and judges what is left.

The layout::

    plan.py     what each run does and where it is hurt, drawn from a seed
    job.py      the program that every rank of a run executes, and its log
    harness.py  starts the jobs, ends those that hang, counts
    judge.py    a process of its own: recomputes every result from the seed

A death is brought about by the engine itself (``HOPCOLL_FAULT``), so that it falls where the plan
says: in the middle of a chunked transfer, between two messages of a repair, or at a time. The
victim records what it was doing when it died; nothing is taken for killed without such a record.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

__all__ = ["check_place", "command"]


def check_place(path: Path | None) -> Path | None:
    """Make the folder of a report before the work is done, or say why it cannot be written."""
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.BadParameter(f"{path} cannot be written: {error}") from error
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise click.BadParameter(f"{path} cannot be written: permission denied")
    return path


@click.command("chaos")
@click.option(
    "--faults",
    "--kills",
    "faults",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Go on until so many ranks were killed or stopped.",
)
@click.option("--seed", default=1, show_default=True, help="Decides all of the runs.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Runs at the same time.",
)
@click.option(
    "--run", "number", type=click.IntRange(0), help="Replay this run of the seed, and no other."
)
@click.option(
    "--deadline",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds after which a run has hung.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=lambda context, option, path: check_place(path),
    help="Write the report here.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the logs of all runs in this folder (those of failed runs are always kept).",
)
@click.option(
    "--lab",
    "hosts",
    type=click.IntRange(2, 64),
    metavar="HOSTS",
    help="Spread the ranks over so many hosts of a lab (benchmarks.lab; needs root).",
)
def command(
    faults: int,
    seed: int,
    jobs: int,
    number: int | None,
    deadline: float,
    json_path: Path | None,
    keep: Path | None,
    hosts: int | None,
) -> None:
    """Kill and stop ranks of real MPI jobs and check every result.

    Jobs of 2 to 8 ranks call the whole family, and lose 1 to n-1 ranks. Exit code 0: no job hung,
    no result was wrong, and the deaths fell where they should.
    """
    # Only here: `hopcoll --help` should not have to import NumPy.
    try:
        from hopcoll.chaos import harness
    except ModuleNotFoundError as error:
        raise click.UsageError(
            f"chaos needs {error.name}; pip install 'hopcoll[test]' brings it along"
        ) from error

    try:
        report = harness.chaos(
            faults=faults,
            seed=seed,
            jobs=jobs,
            numbers=None if number is None else [number],
            deadline_s=deadline,
            keep=keep,
            hosts=hosts or 0,
        )
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("benchmarks"):
            raise
        raise click.UsageError(
            "the lab is in hopcoll's source tree: run this there, or without --lab"
        ) from error
    except RuntimeError as error:
        if hosts is None:
            raise
        raise click.ClickException(f"no lab of {hosts} hosts: {error}") from error
    if json_path is not None:
        harness.write_report(report, json_path)
    click.echo(harness.summary(report))
    sys.exit(0 if report["passed"] else 1)
