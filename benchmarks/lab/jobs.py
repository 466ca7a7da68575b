"""What the benchmarks of the lab share: jobs over its hosts, moments in them, and reports.

A job is a module that is run again, in each rank, with ``--rank`` before its words.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.collectives import cpu_name
from benchmarks.lab.cluster import Lab
from benchmarks.lab.network import LabError
from hopcoll.launcher import find_mpirun

__all__ = [
    "GOODPUT",
    "agreed_start",
    "bound_s",
    "busy_share",
    "environment",
    "machine",
    "markdown",
    "run_apart",
    "run_job",
    "sizes_of",
    "sleep_until",
    "where",
    "write",
]

#: What a link carries of a message, behind the headers of packets of 9000 bytes.
GOODPUT = 0.992
#: How far ahead the start of a call is agreed on: until then every rank knows it.
_HEADSTART_S = 0.03
_JOB_S = 300.0
_LOOK_S = 0.1
_SAID_CHARACTERS = 4000


# ---- sizes and bounds -----------------------------------------------------------------------


def bound_s(collective: str, nbytes: int, ranks: int, bits: int) -> float:
    """Return the least time that a collective can take, by bandwidth alone."""
    whole = nbytes / (GOODPUT * bits / 8)
    return 2 * whole * (ranks - 1) / ranks if collective == "allreduce" else whole


def sizes_of(_: object, __: object, text: str) -> list[int]:
    """Return the bytes of sizes such as 1KiB,32MiB: a callback of click."""
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)\s*(B|KiB|MiB)?", word.strip())
        nbytes = int(match[1]) * {"KiB": 1 << 10, "MiB": 1 << 20}.get(match[2], 1) if match else 0
        if nbytes < 4 or nbytes % 4:
            raise click.BadParameter(f"{word!r} is no whole number of float32 items, as 1MiB is")
        sizes.append(nbytes)
    return sizes


# ---- jobs -----------------------------------------------------------------------------------


def environment(**settings: str) -> dict[str, str]:
    """Return the environment of a job: this one without hopcoll's settings, one thread a rank."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HOPCOLL_")}
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**inherited, "PYTHONPATH": path, **threads, **settings}


def run_job(
    lab: Lab,
    module: str,
    words: Sequence[str],
    *,
    plain: bool = False,
    limit_s: float = _JOB_S,
    look: Callable[[], None] | None = None,
    **settings: str,
) -> None:
    """Run a module as a job, by hopcoll or by a plain mpirun, with ``--rank`` before the words.

    Parameters
    ----------
    lab, module, words
        Where and what.
    plain : bool, default False
        By mpirun, without hopcoll's switches.
    limit_s : float
        How long it may take.
    look : callable, optional
        Is called again and again while it runs. An exception of it ends the job.
    **settings : str
        Further variables of its environment.

    Raises
    ------
    LabError
        It failed, or hung; nothing of it runs any more.
    """
    program = ["-m", module, "--rank", *words]
    command = _plain(lab, program) if plain else lab.command(program)
    _run(lab, module, [command], environment(**settings), limit_s, look)


def run_apart(
    lab: Lab,
    module: str,
    words: Sequence[Sequence[str]],
    *,
    limit_s: float = _JOB_S,
    look: Callable[[], None] | None = None,
) -> None:
    """Run a module without mpirun on the first hosts, one process each; as `run_job`.

    Raises
    ------
    LabError
        One failed, or hung; nothing of them runs any more.
    """
    commands = [
        lab.inside(host, sys.executable, "-m", module, *its)
        for host, its in zip(lab.hosts, words, strict=False)
    ]
    _run(lab, module, commands, environment(), limit_s, look)


def _run(
    lab: Lab,
    name: str,
    commands: Sequence[Sequence[str]],
    environ: dict[str, str],
    limit_s: float,
    look: Callable[[], None] | None,
) -> None:
    with tempfile.TemporaryFile("w+") as said:
        jobs = [
            subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=said, start_new_session=True,
            )
            for command in commands
        ]  # fmt: skip
        try:
            deadline_s = time.monotonic() + limit_s
            while any(job.poll() is None for job in jobs) and not any(job.poll() for job in jobs):
                if time.monotonic() > deadline_s:
                    raise LabError(f"{name} hung, {limit_s:.0f} s")
                if look is not None:
                    look()
                time.sleep(_LOOK_S)
            codes = [job.returncode for job in jobs if job.returncode]
            if codes:
                said.seek(0)
                text = said.read()[-_SAID_CHARACTERS:]
                raise LabError(f"{name} ended with code {codes[0]}\n{text}")
        except BaseException:
            # Not mpirun alone: its daemons and ranks on the other hosts would go on for a while.
            for job in jobs:
                if job.poll() is None:
                    job.kill()
            for host in lab.hosts:
                lab.lose(host)
            raise
        finally:
            for job in jobs:
                job.wait()


def _plain(lab: Lab, program: Sequence[str]) -> list[str]:
    """Open MPI as it comes; only what makes so many ranks on so few cores bearable is added."""
    ranks = len(lab.hosts)
    hosts, words = lab.mpirun_words(ranks)
    command = [find_mpirun().path, "-n", str(ranks), "--host", hosts, "--allow-run-as-root"]
    command += ["--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", *words]
    return lab.inside(1, *command, sys.executable, *program)


# ---- moments, in the ranks ------------------------------------------------------------------


def sleep_until(moment_s: float) -> None:
    """Return at a moment of the clock that all hosts share."""
    while (left_s := moment_s - time.monotonic()) > 0:
        time.sleep(left_s)


def agreed_start(world: Any) -> float:
    """Wait for the moment, on the clock that all hosts share, at which all ranks start."""
    world.Barrier()
    begin_s: float = world.bcast(time.monotonic() + _HEADSTART_S)
    sleep_until(begin_s)
    return begin_s


# ---- reports --------------------------------------------------------------------------------


def busy_share(within_s: float = 1.0) -> float:
    """The share of its time that this machine is busy with other work; blocks so long."""

    def ticks() -> np.ndarray:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        counted = np.array(words, float)
        return np.array([counted.sum() - counted[3:5].sum(), counted.sum()])

    before = ticks()
    time.sleep(within_s)
    busy, total = ticks() - before
    return float(busy / max(total, 1.0))


def machine() -> dict[str, Any]:
    """Return what a report says of this machine; ``busy`` grows while it is measured."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "busy": [busy_share()],
    }


def where(report: dict[str, Any]) -> str:
    """Return in words where a report was measured, and what else the machine did then."""
    facts = report["machine"]
    busy = [100 * share for share in facts["busy"]]
    return (
        f"{report['hosts']} hosts at {report['rate']}, a rank each, on {facts['cores']} cores "
        f"({facts['cpu']}), which other work kept {min(busy):.0f} to {max(busy):.0f} % busy"
    )


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; its first row is the head, its first column words."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, in one step: who is interrupted leaves the file before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(path)
