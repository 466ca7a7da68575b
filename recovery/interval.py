"""How often to save: the interval that costs least, by Young and Daly, from what was measured.

Pure: what was measured goes in, a number of steps comes out, the same at all ranks that put the
same in.

A save every W seconds costs ``stall / W`` of the time, and a failure every M seconds costs W/2 and
the time until the last save was durable. The best W is about ``sqrt(2 * stall * M)`` (J. W. Young,
1974); Daly's higher order (2006) holds also where saves are dear. It is kept inside of these
bounds:

* Saves take at most a twentieth of the time (`STALL_SHARE_MAX`), even if failures come faster.
* A save is durable before the next one starts.
* A failure costs an hour at the most (`PERIOD_S_MAX`), even if saves are free and none was seen.
* The number of steps at most doubles from one save to the next: the first steps of a job are slow,
  and what they measure is not trusted for long.

M is estimated from the failures that this job has seen, beside a tenth of a failure in a tenth of a
day: so a job that has seen none takes M for 1 day (and more, as it runs), and after the first
failures what it saw decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["PERIOD_S_MAX", "STALL_SHARE_MAX", "Measured", "best_period_s", "next_interval"]

STALL_SHARE_MAX = 0.05
PERIOD_S_MAX = 3600.0
_PRIOR_FAILURES, _PRIOR_S = 0.1, 8640.0
_GROWTH_MAX = 2


@dataclass(frozen=True)
class Measured:
    """What a job has seen, in seconds.

    Attributes
    ----------
    step_s : float
        Of one step, without saves.
    stall_s : float
        For which a save stops the training.
    durable_s : float
        From the call of a save until it is durable.
    running_s : float
        That the job has run, over all of its starts.
    failures : int
        That threw it back to a save.
    """

    step_s: float
    stall_s: float
    durable_s: float
    running_s: float
    failures: int

    @property
    def between_failures_s(self) -> float:
        """The mean time between failures."""
        return (self.running_s + _PRIOR_S) / (self.failures + _PRIOR_FAILURES)


def best_period_s(stall_s: float, between_failures_s: float) -> float:
    """Return for how long to work between two saves, by Daly's formula.

    Parameters
    ----------
    stall_s : float
        What a save costs.
    between_failures_s : float

    References
    ----------
    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future
    Generation Computer Systems 22 (2006), equation 37.
    """
    if stall_s >= 2 * between_failures_s:
        return between_failures_s
    share = stall_s / (2 * between_failures_s)
    series = 1 + math.sqrt(share) / 3 + share / 9
    return math.sqrt(2 * stall_s * between_failures_s) * series - stall_s


def next_interval(measured: Measured, last: int) -> int:
    """Return after how many steps to save again.

    Parameters
    ----------
    measured : Measured
    last : int
        The interval before; 1 or more.
    """
    period_s = best_period_s(measured.stall_s, measured.between_failures_s)
    period_s = min(max(period_s, measured.stall_s / STALL_SHARE_MAX), PERIOD_S_MAX)
    period_s = max(period_s, measured.durable_s)
    return max(1, min(math.ceil(period_s / max(measured.step_s, 1e-9)), _GROWTH_MAX * last))
