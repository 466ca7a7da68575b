"""Rank 2 is asked where it is while nobody looks out for that there: ``asked.py HOW FOLDER``.

HOW: "starting" is asked in the second round of its start, and leaves in FOLDER what its trace has
of that; "inline" has no progress thread.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from mpi4py import MPI

import hopcoll
from hopcoll import _report

LATE = 2

how, folder = sys.argv[1], Path(sys.argv[2])
asked, starting = folder / "asked", folder / "starting"
rank = MPI.COMM_WORLD.rank
start, trace_path, watch = _report.start, _report.trace_path, _report._watch


def wait_for(path: Path) -> None:
    while not path.exists():
        threading.Event().wait(0.001)


def watch_the_coordinator(engine_of: Callable[[], Any], wakes: int, main: int | None) -> None:
    """It asks all ranks at once, its own first, and has the lock meanwhile."""
    os.read(wakes, 64)
    engine_of().flight()
    asked.touch()
    watch(engine_of, wakes, main)


def trace_path_of_late(folder_: str, rank_: int) -> str:
    """The last thing before the second round: from there on only that one heeds signals."""
    path = trace_path(folder_, rank_)
    signal.signal(signal.SIGALRM, stay)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    return path


def stay(number: int, frame: FrameType | None) -> None:
    if frame is not None and frame.f_code is not trace_path_of_late.__code__:
        signal.setitimer(signal.ITIMER_REAL, 0)
        starting.touch()
        wait_for(asked)


def start_late(engine: Any) -> int:
    """The first thing after the second round."""
    shutil.copy(Path(os.environ["HOPCOLL_TRACE"], f"rank-{LATE}.trace"), folder)
    return start(engine)


def trace_path_of_last(folder_: str, rank_: int) -> str:
    """Without this rank the late one is not through."""
    wait_for(starting)
    return trace_path(folder_, rank_)


def main() -> None:
    if rank == 0:
        _report._watch = watch_the_coordinator
    elif how == "starting" and rank == 1:
        _report.trace_path = trace_path_of_last
    elif how == "starting":
        _report.trace_path, _report.start = trace_path_of_late, start_late
    comm = hopcoll.init(progress="inline" if how == "inline" and rank == LATE else "thread")
    if rank != 1:
        wait_for(asked)
    result = comm.allreduce(np.ones(3))
    print(f"rank {rank} has {result.tolist()}", flush=True)


if __name__ == "__main__":
    main()
