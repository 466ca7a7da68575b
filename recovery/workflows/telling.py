"""A workflow tells how far it came, as a training session does: `hopcoll.restarts.tell_progress`.

The number is that of the newest record which is durable and says that a task has ended, with a
value that need not be made again. So it only grows, and a start which gets nowhere tells none: it
takes the journal, begins tasks, fails, and all these records count for nothing.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hopcoll.errors import ClosedError
from hopcoll.restarts import PROGRESS_VARIABLE, tell_progress
from recovery.workflows.ledger import FILE, INLINE

if TYPE_CHECKING:
    from hopcoll import Communicator
    from recovery.journal import Journal

__all__ = ["telling"]

#: Seconds between two looks, and from one telling to the next. A start tells its first step soon:
#: if it is killed then, it got on all the same.
_LOOK_S = 0.1
_TELL_S = 1.0


@contextmanager
def telling(journal: Journal, comm: Communicator | None) -> Iterator[None]:
    """Tell progress during the block, and once more at its end. Local.

    A thread of its own does it, once a second at the most: neither the tasks nor the flushes wait
    for the file. Nothing is done where the launcher does not want to know.

    Parameters
    ----------
    journal : Journal
        It is open; the numbers are its own.
    comm : Communicator or None
        Whose ranks are told of.
    """
    if PROGRESS_VARIABLE not in os.environ:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        told = newest = coming = 0
        told_s = -math.inf
        last = False
        while not last:
            last = over.wait(_LOOK_S)
            for _ in range(1 + last):
                # One is held until it is durable, however many come meanwhile.
                if coming <= journal.durable:
                    newest, coming = coming, journal.counted
            now_s = time.monotonic()
            if newest > told and (last or now_s - told_s >= _TELL_S):
                tell_progress(newest, **_facts(comm))
                told, told_s = newest, now_s

    journal.counts = _counts
    thread = threading.Thread(target=watch, name="hopcoll-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _counts(kind: str, head: dict[str, Any]) -> bool:
    return kind == "kept" or (kind == "done" and head["st"] in (INLINE, FILE))


def _facts(comm: Communicator | None) -> dict[str, int]:
    if comm is None:
        return {"ranks": 1, "began": 1}
    try:
        return {"epoch": comm.epoch, "ranks": len(comm.alive), "began": comm.size}
    except ClosedError:
        return {}
