"""Which start of which batch job a process belongs to.

A job of Slurm's that is requeued keeps its number and counts its starts. Processes of an older
start may live on, on a node that Slurm does not reach; whatever they still do, or start anew, must
not count beside the newer one. The number and the count say which of two is newer, without a clock;
between jobs of different numbers nobody is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["is_newer", "refusal", "run_of", "this_run"]

#: The job's number, and how often it was started before.
Run = tuple[str, int]


def this_run(environ: Mapping[str, str] | None = None) -> Run | None:
    """Return the start that this process belongs to; None outside of Slurm. Local.

    Each task of an array has a number of its own in ``SLURM_JOB_ID``.
    """
    environ = os.environ if environ is None else environ
    job = environ.get("SLURM_JOB_ID")
    return (job, int(environ.get("SLURM_RESTART_COUNT") or 0)) if job else None


def run_of(owner: Mapping[str, Any]) -> Run | None:
    """Return the start that an owner belonged to; see `recovery.lease.describe_owner`."""
    if "slurm_job" not in owner:
        return None
    return owner["slurm_job"], owner["slurm_restarts"]


def is_newer(one: Run | None, other: Run | None) -> bool:
    """Whether one is a later start of the same job than the other."""
    return one is not None and other is not None and one[0] == other[0] and one[1] > other[1]


def refusal(what: object, owner: Mapping[str, Any] | None) -> str:
    """Say why this process must not take something over: a later start has it. Empty if none does.

    Parameters
    ----------
    what : object
        Its name, for people.
    owner : dict or None
        Who has it.
    """
    theirs, ours = run_of(owner or {}), this_run()
    if theirs is None or ours is None or not is_newer(theirs, ours):
        return ""
    return (
        f"{what} belongs to start {theirs[1]} of job {theirs[0]}, and this process is of start "
        f"{ours[1]}: it must do nothing any more"
    )
