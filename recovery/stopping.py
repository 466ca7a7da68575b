"""All ranks of a session stop behind the same step, soon after one of them was asked to.

``hopcoll run --stop-within S`` passes SIGUSR1 on to the ranks, which get it at different moments.
So each step carries along a reduction of one byte: was anybody asked? It begins with the commit of
a step and is waited for with that of the next one, so that no step waits for it.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import hopcoll
from hopcoll.launcher import STOPS_VARIABLE

if TYPE_CHECKING:
    from hopcoll import Communicator
    from hopcoll.outcome import Request

__all__ = ["Stop"]

#: A session goes on with those who are left, whatever the communicator does by default.
_SURVIVORS: Final = "survivors"


class Stop:
    """Whether the ranks were asked to stop. It does nothing where the launcher asks nobody.

    Parameters
    ----------
    comm : Communicator
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._wanted = False
        self._agreed = np.zeros(1, np.uint8)
        self._request: Request | None = None
        self._before: Any = None
        # Alike at all ranks, as their launcher sets it.
        self._heeds = STOPS_VARIABLE in os.environ
        if self._heeds and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._wanted = True

    def is_agreed(self) -> bool:
        """Whether all stop behind this step. Collective: with the commit of each step."""
        if not self._heeds:
            return False
        agreed = self._take()
        if not agreed:
            # Its buffers are this request's own: a rank that is late still reads the last one's.
            self._agreed = np.zeros(1, np.uint8)
            self._request = self._comm.Iallreduce(
                np.array([self._wanted], np.uint8), self._agreed, hopcoll.MAX,
                on_failure=_SURVIVORS,
            )
        return agreed

    def _take(self) -> bool:
        request, self._request = self._request, None
        if request is None:
            return False
        request.wait()
        return bool(self._agreed[0])

    def close(self, well: bool) -> None:
        """Let the signal mean what it meant before. After a loop that ended well, collective."""
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)
            self._before = None
        if well:
            self._take()
