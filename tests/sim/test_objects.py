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
}
#: Seeds within which each broken rule must be caught, and where.
CAUGHT_WITHIN = {
    "roots": ("chains", 2000),
    "settled": ("plain", 500),
    "register": ("plain", 100),
    "offset": ("plain", 500),
    "reach": ("plain", 100),
    "void": ("plain", 100),
    "transit": ("chains", 2000),
    "waiters": ("plain", 500),
    "alone": ("plain", 100),
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
    }
    return simulate_store(size, seed, **{**case, **MODES[mode]}, sabotage=sabotage)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_seeds(mode):
    """All of them, so that a failure names every seed; and rough enough to reach every path."""
    total, failed = collections.Counter(), []
    for seed in range(4000):
        found = run(seed, mode)
        if found["violation"]:
            failed.append(f"{seed}: {found['violation']} {found['blamed']}")
        total.update(found["counters"])
        total.update(found["answers"])
        total["deaths"] += found["deaths"]
    assert not failed
    assert min(total[name] for name in ("ok", "deleted", "pulls", "voids", "early")) > 50
    if mode != "alive":
        assert min(total[name] for name in ("resumed", "settled", "held", "registered")) > 20
        assert total["lost"] > 100
    if mode not in ("alive", "chains"):
        assert min(total["exists"], total["inlined"], total["deaths"]) > 500
    assert (total["full"] > 1000) == (mode == "full")
    if mode in ("left", "all"):
        assert total["closed"] > 100


def test_nothing_is_lost_while_all_live():
    assert not any(run(seed, "alive")["answers"]["lost"] for seed in range(2000))


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
    mode, count = CAUGHT_WITHIN[rule]
    caught = (seed for seed in range(count) if run(seed, mode, (rule,))["violation"])
    assert next(caught, None) is not None, f"{rule} went unnoticed in {count} seeds"
