"""Stores of objects in random worlds by seed: see hopcoll/_store_world.pyx for what is checked."""

from __future__ import annotations

import collections

import pytest

from hopcoll._store_world import SABOTAGES, simulate_store

MODES = {
    "plain": {},
    "alive": {"deaths": 0},
    "left": {"leaves": 2},
    "lost": {"losses": 1},
    "all": {"deaths": 3, "leaves": 1, "losses": 1},
    "full": {"limit_bytes": 250, "leaves": 1},
    "chains": {"deaths": 3, "keys": 1, "bytes_max": 600, "calls": 30, "inline_bytes": 0},
    "reductions": {"deaths": 2, "reduces": 4, "keys": 4},
    "reductions, all": {"deaths": 2, "leaves": 1, "losses": 1, "reduces": 6, "keys": 3},
    "results": {"deaths": 2, "reduces": 6, "keys": 2, "bytes_max": 16, "deletes": False},
}
#: Little memory, and files: of which some cannot be written or read, or have little room, too.
FILES = {"scratch_bytes": 1 << 20}
FILE_MODES = {
    "files": {**FILES, "limit_bytes": 200, "leaves": 1, "inline_bytes": 0},
    "files, alive": {**FILES, "limit_bytes": 400, "deaths": 0},
    "files, bad": {"limit_bytes": 300, "scratch_bytes": 400, "disk_fails": 6, "losses": 1},
    "files, bad, few": {
        **{"limit_bytes": 200, "scratch_bytes": 200, "disk_fails": 3, "inline_bytes": 0},
        **{"leaves": 2, "keys": 3, "calls": 60},
    },
    "files, reductions": {
        **{**FILES, "limit_bytes": 600, "inline_bytes": 0},
        **{"deaths": 2, "reduces": 5, "keys": 4},
    },
    "files, reductions, bad": {
        **{"limit_bytes": 900, "scratch_bytes": 1000, "disk_fails": 8},
        **{"deaths": 2, "leaves": 1, "losses": 1, "reduces": 5, "keys": 4},
    },
    "files, one": {
        **{**FILES, "limit_bytes": 200, "inline_bytes": 0, "bytes_max": 48},
        **{"keys": 1, "calls": 60, "deaths": 0, "reduces": 1},
    },
}
#: Seeds within which each broken rule must be caught: of a mode, from where on, how many. Some need
#: a death or two at one moment.
CAUGHT_WITHIN = {
    "roots": ("chains", 0, 2000),
    "settled": ("plain", 0, 500),
    "register": ("plain", 0, 100),
    "offset": ("plain", 0, 500),
    "reach": ("plain", 0, 100),
    "void": ("plain", 0, 100),
    "transit": ("chains", 0, 2000),
    "waiters": ("plain", 0, 500),
    "alone": ("plain", 0, 100),
    "seal": ("results", 0, 100),
    "attempt": ("results", 0, 1000),
    "held": ("results", 0, 1000),
    "caller": ("reductions", 0, 1000),
    "file": ("files, one", 5500, 500),
    "unread": ("files, bad", 0, 500),
    "stale": ("files, bad, few", 3600, 200),
    "failed": ("reductions", 0, 1000),
}


def run(seed, mode="plain", sabotage=()):
    size = 2 + seed % 5
    case = {
        "calls": 16 + seed % 30,
        "keys": 1 + seed % 4,
        "deaths": seed // 5 % 4,
        "hosts": [rank % 2 for rank in range(size)],
        "inline_bytes": 0 if seed % 3 else 24,
        "window": 1 + seed % 3,
        "degree": (0, 1, 2, 3, 8)[seed // 7 % 5],
    }
    given = {**case, **{**MODES, **FILE_MODES}[mode]}
    return simulate_store(size, seed, **given, sabotage=sabotage)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_seeds(mode):
    """All of them, so that a failure names every seed; and rough enough to reach every path."""
    total, failed = collections.Counter(), []
    for seed in range(3000):
        found = run(seed, mode)
        if found["violation"]:
            failed.append(f"{seed}: {found['violation']} {found['blamed']}")
        total.update(found["counters"])
        total.update(found["answers"])
        total["deaths"] += found["deaths"]
    assert not failed
    assert min(total[name] for name in ("ok", "deleted", "pulls", "voids", "early")) > 50
    if mode != "alive":
        assert min(total[name] for name in ("settled", "held", "registered")) > 20
        assert (total["resumed"] > 20) == (mode != "results")  # which has one chunk an object
        assert total["lost"] > 100
    if "re" in mode:
        assert min(total[name] for name in ("sealed", "failed")) > 1000
        assert total["sealed"] < total["attempts"] < total["places"]
    elif mode not in ("alive", "chains"):
        assert min(total["exists"], total["inlined"], total["deaths"]) > 500
    assert (total["full"] > 1000) == (mode == "full")
    if mode in ("left", "all"):
        assert total["closed"] > 100


@pytest.mark.parametrize("mode", sorted(FILE_MODES))
def test_seeds_with_files(mode):
    """Copies go to files with need and without, what has no room waits; all holds as before."""
    total, failed = collections.Counter(), []
    for seed in range(2000):
        found = run(seed, mode)
        if found["violation"]:
            failed.append(f"{seed}: {found['violation']} {found['blamed']}")
        total.update(found["counters"])
        total.update(found["answers"])
    assert not failed
    assert min(total[name] for name in ("ok", "waited", "spilled")) > 100
    assert total["restored"] > 50
    assert (min(total["unread"], total["unwritten"]) > 5) == ("bad" in mode)


def test_what_nobody_looks_at_is_never_in_the_way():
    """Puts, waits and deletions: as long as there are files, no put is refused."""
    waited = 0
    for seed in range(1000):
        found = simulate_store(
            *(1 + seed % 4, seed),
            **{"calls": 60, "keys": 6, "deaths": 0, "inline_bytes": 0, "gets": False},
            **{"limit_bytes": 200, "scratch_bytes": 1 << 20},
        )
        assert not found["violation"], seed
        assert not found["answers"]["full"], seed
        waited += found["counters"]["waited"]
    assert waited > 1000


@pytest.mark.parametrize("mode", ["alive", "files, alive"])
def test_nothing_is_lost_while_all_live(mode):
    assert not any(run(seed, mode)["answers"]["lost"] for seed in range(2000))


def test_a_store_that_nobody_uses_sends_nothing():
    for seed in range(200):
        found = simulate_store(5, seed, calls=0, keys=1, deaths=3, leaves=1)
        assert not found["violation"]
        assert found["letters"] == 0


def test_a_store_that_is_first_used_after_deaths():
    settled = 0
    for seed in range(2000):
        found = simulate_store(6, seed, calls=3, keys=2, deaths=3, leaves=1, losses=1)
        assert not found["violation"], seed
        settled += found["counters"]["settled"]
    assert settled > 1000


def test_a_seed_decides_everything():
    assert all(run(seed, "all") == run(seed, "all") for seed in range(50))


def test_every_rule_has_a_broken_variant():
    assert set(CAUGHT_WITHIN) == set(SABOTAGES)


@pytest.mark.parametrize("rule", sorted(CAUGHT_WITHIN))
def test_a_broken_rule_is_caught(rule):
    mode, first, count = CAUGHT_WITHIN[rule]
    seeds = range(first, first + count)
    caught = (seed for seed in seeds if run(seed, mode, (rule,))["violation"])
    assert next(caught, None) is not None, f"{rule} went unnoticed in {count} seeds"
