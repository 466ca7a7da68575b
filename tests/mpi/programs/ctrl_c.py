"""Ctrl-C for the programs of the tests: it comes when the rank waits, however slow the machine."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


def comes_inside(function: Callable[..., object], every_s: float = 0.05) -> None:
    """Have Ctrl-C come when the program waits in a call that a function in Python makes.

    For the first line of a ``try``. The program is looked at again and again; seen twice at the
    same instruction, with a while in between, it is in what that one calls.
    """
    before = -1

    def look(number: int, frame: FrameType | None) -> None:
        nonlocal before
        if frame is None or frame.f_code is not function.__code__:
            before = -1
        elif frame.f_lasti == before:
            signal.raise_signal(signal.SIGINT)
            return
        else:
            before = frame.f_lasti
        signal.setitimer(signal.ITIMER_REAL, every_s)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, every_s)
