"""The interval between saves: the best one by simulation, and inside its bounds."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from recovery.interval import (
    PERIOD_S_MAX,
    STALL_SHARE_MAX,
    Measured,
    best_period_s,
    next_interval,
)

USUAL = Measured(step_s=0.5, stall_s=2.0, durable_s=3.0, running_s=86400.0, failures=20)
LONG = 1 << 40


def wasted(period_s: float, stall_s: float, between_s: float, random: np.random.Generator) -> float:
    """Simulate: the share of the time that is no lasting progress, over many failures."""
    lives_s = random.exponential(between_s, 20_000)
    whole = np.floor(lives_s / (period_s + stall_s))
    return float(1 - (whole * period_s).sum() / lives_s.sum())


@pytest.mark.parametrize(("stall_s", "between_s"), [(1.0, 3600.0), (20.0, 3600.0), (60.0, 600.0)])
def test_no_other_period_wastes_less(stall_s: float, between_s: float) -> None:
    best_s = best_period_s(stall_s, between_s)
    losses = {
        factor: wasted(best_s * factor, stall_s, between_s, np.random.default_rng(1))
        for factor in (0.3, 0.5, 1.0, 2.0, 3.0)
    }
    assert min(losses, key=losses.__getitem__) == 1.0, losses


def test_young_where_saves_are_cheap_and_no_less_than_the_failures_where_they_are_not() -> None:
    assert best_period_s(1e-3, 1e6) == pytest.approx(math.sqrt(2 * 1e-3 * 1e6), rel=1e-2)
    assert best_period_s(100.0, 10.0) == 10.0


def test_more_failures_make_it_shorter_and_dearer_saves_longer() -> None:
    usual = next_interval(USUAL, LONG)
    assert next_interval(dataclasses.replace(USUAL, failures=80), LONG) < usual
    assert next_interval(dataclasses.replace(USUAL, stall_s=4.0), LONG) > usual
    expected_s = math.sqrt(2 * 2.0 * (86400 + 8640) / 20.1)
    assert usual * USUAL.step_s == pytest.approx(expected_s, rel=0.05)


def test_a_job_that_saw_no_failure_expects_one_a_day() -> None:
    fresh = Measured(1.0, 1.0, 1.0, running_s=0.0, failures=0)
    assert fresh.between_failures_s == pytest.approx(86400)
    assert dataclasses.replace(fresh, running_s=864_000.0).between_failures_s > 10 * 86400 / 2


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({"failures": 10**9}, 2.0 / STALL_SHARE_MAX / 0.5),  # no more of the time than its share
        ({"stall_s": 0.0}, 6),  # one after the other
        ({"durable_s": 900.0}, 1800),
        ({"stall_s": 100.0, "failures": 0}, PERIOD_S_MAX / 0.5),
        ({"step_s": 7200.0}, 1),
        ({"step_s": 0.0, "stall_s": 0.0, "durable_s": 0.0}, 1),
    ],
)
def test_bounds(change: dict[str, float], steps: float) -> None:
    assert next_interval(dataclasses.replace(USUAL, **change), LONG) == steps


def test_it_doubles_at_the_most() -> None:
    intervals = [1]
    while len(intervals) < 12:
        intervals.append(next_interval(USUAL, intervals[-1]))
    assert intervals[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert intervals[-1] == intervals[-2] == next_interval(USUAL, LONG)
