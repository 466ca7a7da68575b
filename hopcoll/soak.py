"""A hundred thousand failures: random worlds of the whole family, counted, on all cores.

``hopcoll soak`` runs `hopcoll.simulate` over a range of seeds. Their worlds have 2 to 64 ranks, up
to all but one of which die, and at least one operation of several chunks. It counts what happened
in them, so that one can see that the rare branches of the protocol were reached.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from hopcoll import __version__, simulate

#: Of a thousand worlds, so many have ranks from one of these ranges.
SIZES = ((2, 15, 885), (16, 47, 103), (48, 64, 12))
MODES = ("plain", "ballots", "leave", "silence", "partial")
#: What must have happened often enough, and the counter that shows it.
BRANCHES = {
    "stand": "stands",
    "rerun": "reruns",
    "superseded ballot": "superseded",
    "void": "voids",
    "zombie": "zombies",
    "minority": "minorities",
    "kept chunk": "kept_chunks",
    "dropped chunk": "dropped_chunks",
    "fenced rank": "fenced",
    "lost rank": "lost",
    "detour": "detours",
    "copy for a late rank": "copies",
    "closed roll": "rolls",
    "late rank": "late",
    "carried input": "carried",
}
#: Operations that are cut into at least four chunks for each block.
_LONG = (
    *(("allreduce", 70), ("allreduce", 130), ("bcast", 9), ("bcast", 50), ("reduce", 9)),
    *(("gather", 9), ("allgather", 9), ("scatter", 9), ("alltoall", 9)),
    *(("reduce_scatter", 9), ("scan", 9), ("exscan", 9)),
)
_BATCH = 100


def case_of(seed: int) -> dict[str, Any]:
    """The world of a seed, as the arguments of `hopcoll.simulate.run`: its size and its mode."""
    rng = random.Random(f"soak/{seed}")
    low, high, _ = rng.choices(SIZES, [share for _, _, share in SIZES])[0]
    kind, count = rng.choice(_LONG)
    root = rng.randrange(low) if kind in simulate.ROOTED else 0
    return {
        "size": rng.randint(low, high),
        "mode": MODES[seed % len(MODES)],
        "last": (kind, count, root, 0),
    }


def run_batch(seeds: range, sabotage: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run some seeds; return what happened in them, summed up."""
    total: dict[str, Any] = {"worlds": 0, "steps": 0, "deaths": 0, "violations": []}
    counters: collections.Counter[str] = collections.Counter()
    modes: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    died: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        case = case_of(seed)
        found = simulate.run(seed, sabotage=sabotage, **case)
        size = found["case"]["size"]
        total["worlds"] += 1
        total["steps"] += found["steps"]
        total["deaths"] += found["deaths"]
        counters.update(found["counters"])
        modes[case["mode"]] += 1
        sizes["48 and more" if size >= 48 else "16 to 47" if size >= 16 else "2 to 15"] += 1
        died["none" if not found["deaths"] else "all but one" if found["deaths"] == size - 1
             else "some"] += 1  # fmt: skip
        if found["violation"]:
            total["violations"].append({"seed": seed, "violation": found["violation"]})
    return total | {"counters": counters, "modes": modes, "ranks": sizes, "died": died}


def add(total: dict[str, Any], batch: dict[str, Any]) -> None:
    """Add what happened in a batch."""
    for name, value in batch.items():
        if name not in total:
            total[name] = value
        elif isinstance(value, collections.Counter):
            total[name].update(value)
        else:
            total[name] += value


def report_of(total: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    """What is written as JSON: counts by name, and a command for each violation."""
    counters = total.pop("counters")
    for one in total["violations"]:
        one["replay"] = f"hopcoll soak --seed {one['seed']} --count 1"
    return {
        "hopcoll": __version__,
        "first_seed": seed,
        "seconds": round(seconds, 1),
        **total,
        "branches": {name: counters[counter] for name, counter in BRANCHES.items()},
        "counters": counters,
    }


@click.command("soak")
@click.option("--count", type=click.IntRange(1), default=100_000, show_default=True,
              help="Worlds.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="The first of them.")
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True,
              help="Processes.")  # fmt: skip
@click.option("--branches-min", type=click.IntRange(0), default=1000, show_default=True,
              help="How often each branch must be reached, where there are 100,000 worlds; "
                   "fewer worlds, fewer times.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the counts here.")  # fmt: skip
@click.option("--sabotage", type=click.Choice(sorted(simulate.sabotages())), multiple=True,
              help="Switch a rule off.")  # fmt: skip
def command(
    count: int,
    seed: int,
    workers: int,
    branches_min: int,
    json_path: Path | None,
    sabotage: tuple[str, ...],
) -> None:
    """Run a hundred thousand random failures of the whole family, and count what happened.

    A seed that violates a rule is printed with the command that runs it alone. Exit code: 0 if
    nothing was violated and every branch of the protocol was reached often enough, else 1; after
    Ctrl-C 130, with the counts so far.
    """
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise click.BadParameter(f"{json_path.parent} is no folder", param_hint="--json")
    begin = time.monotonic()
    total: dict[str, Any] = {"worlds": 0, "violations": []}
    end = seed + count
    batches = [range(at, min(at + _BATCH, end)) for at in range(seed, end, _BATCH)]
    interrupted = False
    bar = tqdm(total=count, unit="world", disable=not sys.stderr.isatty())
    pool = concurrent.futures.ProcessPoolExecutor(workers)
    try:
        for done in concurrent.futures.as_completed(
            [pool.submit(run_batch, batch, sabotage) for batch in batches]
        ):
            batch = done.result()
            add(total, batch)
            bar.update(batch["worlds"])
            for one in batch["violations"]:
                bar.write(f"seed {one['seed']}: {one['violation']}")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        pool.shutdown(wait=not interrupted, cancel_futures=True)
        bar.close()
    if not total["worlds"]:
        raise SystemExit(130)
    report = report_of(total, seed, time.monotonic() - begin)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(
        f"{report['worlds']} worlds, {report['deaths']} deaths, {len(report['violations'])} "
        f"violations in {report['seconds']:.0f} s"
    )
    for name, times in report["branches"].items():
        click.echo(f"  {times:>10} {name}")
    if interrupted:
        raise SystemExit(130)
    # In proportion, for those who run fewer.
    least = branches_min * report["worlds"] // 100_000
    rare = [name for name, times in report["branches"].items() if times < least]
    for name in rare:
        click.echo(f"{name} was reached fewer than {least} times", err=True)
    if report["violations"] or rare:
        raise SystemExit(1)
