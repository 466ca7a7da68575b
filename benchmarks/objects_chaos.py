"""Ranks killed in the middle of random calls of ``comm.objects``: does the store keep its word?

``python -m benchmarks.objects_chaos --jobs 20 --ranks 16 --deaths 15 --ops 10000 --seed 0`` starts
one job after another. In each, ranks put, get, wait for and delete objects of 0 bytes to 4 MiB
under shared names (and reduce them, where the store can), and up to 15 of the 16 die by SIGKILL:
between two calls, in the middle of one, or when chunks of an object have just moved. Then the judge
(`benchmarks.objects_judge`) reads what all ranks have logged, also those that died:

* every get returned every byte of a version that was there, or raised `ObjectLostError` with the
  ref, which it may only when every copy that anybody was known to have had died;
* nobody waited for what a living rank had, no call and no job hung;
* in the end the store of each survivor was as empty as at its start.

The report goes to ``benchmarks/results/objects_chaos.json``.
"""

from __future__ import annotations

import collections
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks import objects_judge

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "objects_chaos.json"
PROGRAM = "benchmarks.objects_chaos_job"
#: Also as slow as stores can be made, and with many chunks.
_SETTINGS: tuple[dict[str, str], ...] = (
    {},
    {},
    {"HOPCOLL_CHUNK_BYTES": "8192"},
    {"HOPCOLL_PROGRESS": "inline"},
)
_HOWS = ("between", "call", "sender", "sender", "receiver")
#: A get may take so long while a living rank has its object.
PATIENCE_S = 5.0
_DEADLINE_S = 150.0
_GRACE_S = 15.0
#: Under load mpirun itself may fail to start; a job of which no rank began is started again.
_STARTS_MAX = 5
_NOBODY_BEGAN = "before any rank began"


def plan_of(
    seed: int,
    number: int,
    *,
    ranks: int,
    deaths: tuple[int, int],
    calls: int,
    patience_s: float = PATIENCE_S,
) -> dict[str, Any]:
    """Decide who dies in a job, when and how.

    Parameters
    ----------
    seed, number : int
        Decide all that is random, also at the ranks.
    ranks : int
    deaths : (int, int)
        The least and the most.
    calls : int
        Of each rank that does not die.
    patience_s : float
        A get may take so long while a living rank has its object.
    """
    draw = random.Random(f"objects/{seed}/{number}")
    victims = draw.sample(range(ranks), draw.randint(*deaths))
    at, plan = 0, {}
    for rank in victims:
        if not plan or draw.random() < 0.8:  # else at about the same time as the one before
            at = draw.randrange(calls // 20, calls)
        plan[str(rank)] = {
            "at": at,
            "how": draw.choice(_HOWS),
            "delay_s": math.exp(draw.uniform(math.log(1e-4), math.log(0.03))),
            "chunks": draw.randint(1, 40),
        }
    return {
        "seed": seed,
        "number": number,
        "ranks": ranks,
        "calls": calls,
        "deaths": plan,
        "patience_s": patience_s,
        "deadline_s": _DEADLINE_S,
        "settings": draw.choice(_SETTINGS),
    }


def run_job(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do one job, leave its logs in a folder, and return the judge's verdict; blocks.

    Parameters
    ----------
    plan : dict
        From `plan_of`.
    folder : Path
        Made by the call; gets plan.json, log.RANK, output and launcher.json, and stacks.PID of a
        rank that hung.
    """
    for start in range(_STARTS_MAX):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps(plan))
        begin_s = time.monotonic()
        how = _start(plan, folder)
        how |= {"seconds": round(time.monotonic() - begin_s, 1), "starts": start + 1}
        if _NOBODY_BEGAN not in (folder / "output").read_text(errors="replace"):
            break
    (folder / "launcher.json").write_text(json.dumps(how) + "\n")
    return {**objects_judge.judge(folder), **how}


def _start(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    # A setting of the caller's shell must not change what a seed means.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOPCOLL_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **plan["settings"]}
    words = ["run", "-n", str(plan["ranks"]), "--oversubscribe", "-m", PROGRAM, str(folder)]
    with open(folder / "output", "wb") as output:
        job = subprocess.Popen(
            [sys.executable, "-m", "hopcoll.cli", *words],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            job.wait(plan["deadline_s"])
        except subprocess.TimeoutExpired:
            for number in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(job.pid, number)
                try:
                    job.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    continue
                break
            return {"code": job.returncode, "timed_out": True}
    return {"code": job.returncode, "timed_out": False}


def report_of(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up what the judge says of all jobs."""
    totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for verdict in verdicts:
        for name in ("answers", "deaths_in_a_call", "deaths_by_kind", "stats_of_survivors"):
            totals[name].update(verdict[name])
        for problem in verdict["problems"]:
            totals["problems_by_kind"][problem.partition(":")[0]] += 1
    sums = ("calls", "deaths", "survivors", "pulls_resumed", "gets_for_nothing", "gets_cut_short")
    sums += ("lost_that_were_deleted", "results_without_a_ref")
    return {
        "jobs": len(verdicts),
        **{name: sum(verdict[name] for verdict in verdicts) for name in sums},
        "problems": sum(len(verdict["problems"]) for verdict in verdicts),
        **{name: dict(sorted(counter.items())) for name, counter in totals.items()},
    }


def run(
    jobs: int,
    ranks: int,
    deaths: int,
    ops: int,
    seed: int,
    out: Path | None = None,
    keep: Path | None = None,
    numbers: list[int] | None = None,
) -> dict[str, Any]:
    """Do so many jobs or more; return the report, which is in `out` all the time."""
    begin_s = time.monotonic()
    verdicts: list[dict[str, Any]] = []
    # Who dies makes two thirds of its calls or fewer.
    calls = max(20, math.ceil(1.8 * ops / (jobs * ranks)))
    base = Path(tempfile.mkdtemp(prefix="objects-chaos-", dir="/dev/shm"))
    asked = numbers if numbers else range(3 * jobs)

    def report() -> dict[str, Any]:
        made = {
            "seed": seed,
            "ranks": ranks,
            "calls_of_a_rank": calls,
            **report_of(verdicts),
            "seconds": round(time.monotonic() - begin_s, 1),
            "verdicts": verdicts,
        }
        if out is not None:
            out.write_text(json.dumps(made, indent=1) + "\n")
        return made

    with tqdm(total=len(numbers) if numbers else jobs, unit="job", disable=None) as bar:
        for number in asked:
            answered = sum(verdict["calls"] for verdict in verdicts)
            if not numbers and len(verdicts) >= jobs and answered >= ops:
                break
            folder = base / f"job-{seed}-{number}"
            plan = plan_of(
                seed, number, ranks=ranks, deaths=(max(1, deaths // 2), deaths), calls=calls
            )
            verdict = run_job(plan, folder)
            verdicts.append(verdict)
            for problem in verdict["problems"]:
                bar.write(f"job {number}: {problem}")
            if keep is not None or verdict["problems"]:
                kept = Path(tempfile.gettempdir()) if keep is None else keep
                verdict["folder"] = str(kept / f"{base.name}-{folder.name}")
                shutil.copytree(folder, verdict["folder"])
            shutil.rmtree(folder)
            bar.update()
            report()
    base.rmdir()
    return report()


@click.command(help=__doc__.partition("\n")[0])
@click.option("--jobs", default=20, show_default=True)
@click.option("--ranks", default=16, show_default=True)
@click.option("--deaths", default=15, show_default=True, help="In a job, at most.")
@click.option("--ops", default=10_000, show_default=True, help="Calls in all jobs, at least.")
@click.option("--seed", default=0, show_default=True)
@click.option("--number", "numbers", multiple=True, type=int, help="Only this job of the seed.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the logs of all jobs here.")
@click.option(
    "--json", "out", type=click.Path(path_type=Path), default=RESULTS, show_default=True,
    help="The report.",
)
def main(
    jobs: int,
    ranks: int,
    deaths: int,
    ops: int,
    seed: int,
    numbers: tuple[int, ...],
    keep: Path | None,
    out: Path,
) -> None:
    report = run(jobs, ranks, deaths, ops, seed, out, keep, list(numbers))
    click.echo(json.dumps({**report, "verdicts": len(report["verdicts"])}, indent=1))
    sys.exit(bool(report["problems"]))


if __name__ == "__main__":
    main()
