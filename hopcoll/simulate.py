"""Random runs of the protocol over the simulated network, by seed.

A seed decides everything: the number of ranks, what they call, the settings, and then the order of
every call, delivery, death and detection.  ``hopcoll simulate --seed N`` replays a run that failed
and shows what the ranks were at.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import click

from hopcoll import _simulation

SMALL_SIZES = (1, 2, 2, 3, 3, 4, 5, 6, 8, 11, 16)
MODES = ("plain", "plain", "ballots", "leave", "mismatch", "mismatch-deaths", "silence", "partial")


#: Kinds of operation, as often as they shall come; which have a root, no buffer, blocks.
KINDS = (
    ("allreduce", "allreduce", "allreduce", "bcast", "bcast", "reduce", "reduce", "barrier")
    + ("gather", "allgather", "scatter", "alltoall", "reduce_scatter", "scan", "exscan")
)
ROOTED = ("bcast", "reduce", "gather", "scatter")
BLOCKS = ("gather", "allgather", "scatter", "alltoall", "reduce_scatter")


def random_step(rng: random.Random, size: int) -> tuple[str, int, int, int]:
    """One operation: kind, items, root and flags."""
    kind = rng.choice(KINDS)
    count = 0 if kind == "barrier" else rng.choice((0, 1, 1, 3, 5, 9, 20, 50))
    root = rng.randrange(size) if kind in ROOTED else 0
    flags = rng.choice((0, 0, _simulation.IN_PLACE, _simulation.RAISE))
    if kind in ("bcast", "barrier"):
        flags &= _simulation.RAISE
    if kind in BLOCKS:
        count = min(count, 9)
        if rng.random() < 0.4:
            flags |= _simulation.VECTOR
    if kind in ("allreduce", "reduce") and rng.random() < 0.1:
        flags |= _simulation.ORDERED
    elif kind in ("allreduce", "reduce") and rng.random() < 0.2:
        flags |= _simulation.ARRIVAL
    return kind, count, root, flags


def partial_step(
    rng: random.Random, size: int, counts: tuple[int, ...]
) -> tuple[str, int, int, int, int]:
    """An Allreduce of the first to arrive, or of those in time; what is late may be carried."""
    flags = _simulation.PARTIAL | rng.choice((0, _simulation.IN_PLACE))
    if rng.random() < 0.5:
        flags |= _simulation.CARRY
        if rng.random() < 0.3:
            flags &= ~_simulation.PARTIAL  # the end of the job: of all, with what was carried
    quorum = rng.randint(0, size) if flags & _simulation.PARTIAL else 0
    deadline_us = rng.choice((0, 0, 1000, 100_000)) if flags & _simulation.PARTIAL else 0
    return "allreduce", rng.choice(counts), quorum, flags, deadline_us


def random_case(seed: int, *, size: int | None = None, mode: str | None = None) -> dict[str, Any]:
    """The arguments of `hopcoll._simulation.simulate` that belong to a seed.

    Parameters
    ----------
    seed : int
        Decides everything that is not given.
    size : int, optional
        Number of ranks; chosen from `SMALL_SIZES` otherwise.
    mode : one of `MODES`, optional
        ballots: coordinators die while they decide; leave: ranks leave when they are through,
        one of them possibly early; mismatch: one rank calls something else (and nobody dies, or
        somebody may); silence: ranks stop and links are cut; partial: operations of the first to
        arrive.
    """
    rng = random.Random(seed)
    size = size or rng.choice(SMALL_SIZES)
    mode = mode or rng.choice(MODES)
    script = [random_step(rng, size) for _ in range(rng.randint(1, 8 if size <= 16 else 3))]
    case: dict[str, Any] = {
        "size": size,
        "script": script,
        "seed": seed,
        "deaths": rng.randint(0, size - 1) if rng.randrange(8) else 0,
        "depth": rng.choice((1, 2, 3, 4)),
        "ring": rng.choice((8, 16)),
        "window": rng.choice((1, 2, 4)),
        "active": rng.choice((1, 2, 4)),
        "kill_every": rng.choice((10, 40, 100, 400)) * (1 if size <= 16 else size // 4),
        "sent": rng.choice(("none", "eager", "late", "any")),
        "lost": rng.choice(("none", "late", "any")),
        # So that small worlds have a tree, too.
        "degree": random.Random(f"degree/{seed}").choice((2, 2, 3, 16, 16)),
    }
    if mode == "ballots":
        case["size"] = size = max(size, 4) if size <= 8 else size
        small = ("allreduce", 1, 0, 0)
        case["script"] = [
            small if rng.random() < 0.5 else random_step(rng, size)
            for _ in range(rng.randint(1, 3))
        ]
        case["deaths"] = rng.randint(2, size - 1)
        case["kill_every"] = rng.choice((3, 10, 30))
        case["aim_percent"] = rng.choice((10, 30, 60))
    if mode == "leave":
        case["leaving"] = True
        case["exits"] = rng.random() < 0.5
        if rng.random() < 0.5:
            case["early"] = (rng.randrange(size), rng.randrange(len(script) + 1))
    if mode == "silence":
        case["size"] = size = max(size, 2)
        case["detect_us"] = 1000000
        case["disturb_every"] = rng.choice((20, 60, 200, 600)) * (1 if size <= 16 else size // 4)
        hosts = rng.choice((1, 2, 3, size))
        case["hosts"] = [rng.randrange(hosts) for _ in range(size)]
        case["deaths"] = rng.choice((0, 0, 1, size // 2))
    if mode == "partial":
        # What is carried goes into an operation of the same length.
        counts = tuple(rng.choices((0, 1, 1, 5, 9, 9, 20), k=2))
        case["script"] = script = [
            partial_step(rng, size, counts) if rng.random() < 0.8 else random_step(rng, size)
            for _ in script
        ]
        case["late_budget_bytes"] = rng.choice((0, 100, 200, 400, 4000))
        if rng.random() < 0.25:
            case["size"] = size = max(size, 2)
            case["detect_us"] = 1000000
            case["disturb_every"] = rng.choice((60, 200, 600))
            case["hosts"] = [rng.randrange(3) for _ in range(size)]
    # A fold by an operation that shows its brackets; apart, so that seeds stay what they were.
    mixed = random.Random(f"mixed/{seed}")
    case["script"] = script = [
        _mixed(step) if mixed.random() < 0.3 else step for step in case["script"]
    ]
    if mode == "mismatch":
        case["deaths"] = 0
    if mode in ("mismatch", "mismatch-deaths") and size > 1:
        step = rng.randrange(len(script))
        odd = random_step(rng, size)
        if rng.random() < 0.2:
            case["script"] = script = [partial_step(rng, size, (1, 9)) for _ in script]
        # Vectors whose lengths differ may still agree between the ranks concerned.
        if _signature(odd) != _signature(script[step]) and not (
            odd[0] == script[step][0] and odd[3] & script[step][3] & _simulation.VECTOR
        ):
            case["odd"] = (rng.randrange(size), step, odd)
    return case


def _mixed(step: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same operation, where it is a fold of all in the order of the ranks, with brackets that
    show in its result."""
    kind, count, root, flags, *more = step
    others = _simulation.ARRIVAL | _simulation.PARTIAL | _simulation.CARRY
    if kind in ("allreduce", "reduce") and not flags & others:
        flags |= _simulation.MIXED
    return kind, count, root, flags, *more


def sabotages() -> list[str]:
    """The names of the rules that can be switched off."""
    return list(_simulation.SABOTAGES)


def sabotage_mask(names: Iterable[str]) -> int:
    """The rules of these names, as one number."""
    mask = 0
    for name in names:
        mask |= _simulation.SABOTAGES[name]
    return mask


def _signature(step: tuple[int | str, ...]) -> tuple[Any, ...]:
    kind, count, root, flags = step[:4]
    return kind, count, root, flags & ~_simulation.IN_PLACE


def run(
    seed: int,
    *,
    sabotage: Iterable[str] = (),
    size: int | None = None,
    mode: str | None = None,
    last: tuple[str, int, int, int] | None = None,
    want_trace: bool = False,
) -> dict[str, Any]:
    """Runs the case of a seed; returns what `simulate` returns, and the case.

    `last` is an operation that takes the place of the script's last one.

    Local, no MPI; milliseconds for 16 ranks, a second for 64.
    """
    case = random_case(seed, size=size, mode=mode)
    if last is not None and "odd" not in case:
        case["script"][-1] = last
    arguments = dict(case)
    outcome = _simulation.simulate(
        arguments.pop("size"),
        arguments.pop("script"),
        arguments.pop("seed"),
        sabotage=tuple(sabotage),
        want_trace=want_trace,
        **arguments,
    )
    return {**outcome, "case": case}


@click.command("simulate")
@click.option("--seed", type=int, default=0, show_default=True, help="The first seed.")
@click.option(
    "--count",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many seeds, from the first one on.",
)
@click.option("--size", type=click.IntRange(1, 64), help="Ranks; otherwise the seed decides.")
@click.option("--mode", type=click.Choice(sorted(set(MODES))), help="Otherwise the seed decides.")
@click.option(
    "--sabotage",
    type=click.Choice(sorted(_simulation.SABOTAGES)),
    multiple=True,
    help="Switch a rule off.",
)
@click.option("--trace", is_flag=True, help="Show every step of a violation.")
def command(
    seed: int,
    count: int,
    size: int | None,
    mode: str | None,
    sabotage: tuple[str, ...],
    trace: bool,
) -> None:
    """Run the protocol over the simulated network, by seed.

    Each seed is a world of 1 to 16 ranks (or --size) with calls, delays, deaths and whatever else
    the mode brings along; every result is checked. A seed that fails is printed; given alone, it
    is replayed and shown in full. Exit code: 0 if nothing was violated, else 1.

    \b
    hopcoll simulate --count 10000
    hopcoll simulate --seed 4711 --mode plain --trace
    """
    violations = 0
    for one in range(seed, seed + count):
        outcome = run(one, sabotage=sabotage, size=size, mode=mode)
        if outcome["violation"] is None:
            continue
        violations += 1
        click.echo(
            f"seed {one}: {outcome['violation']} (after {outcome['steps']} steps, "
            f"{outcome['deaths']} deaths)"
        )
        if count == 1:
            click.echo(f"  {outcome['case']}")
            for line in outcome["ranks"]:
                click.echo(f"  {line}")
            if trace:
                for step in outcome["trace"]:
                    click.echo(f"  {step}")
    click.echo(f"{count} seeds, {violations} violations")
    if violations:
        raise SystemExit(1)


if __name__ == "__main__":
    command()
