"""What the user sees when an operation does not get on: a report, and the flight recorder.

One thread of Python's in each process, asleep in a read: the engine's own thread wakes it when
another rank wants to know where this program is, or when the coordinator has a report.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import Any

__all__ = ["awaited_text", "flight_path", "flight_text", "start", "text_of", "trace_path",
           "write_flight"]

_INDENT = "    "
#: How many traces this process has begun, by rank.
_traces: dict[int, int] = {}


def start(engine: Any) -> int:
    """Start the thread for an engine; return the end of the pipe that wakes and ends it."""
    wakes, wake = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(wake, False)
    main = threading.main_thread().ident
    threading.Thread(
        target=_watch, args=(weakref.ref(engine), wakes, main), name="hopcoll-report", daemon=True
    ).start()
    return wake


def _watch(engine_of: Any, wakes: int, main: int | None) -> None:
    try:
        while wanted := os.read(wakes, 64):
            engine = engine_of()
            if engine is None:
                return
            if b"s" in wanted:
                frame = sys._current_frames().get(main or 0)
                stack = traceback.format_stack(frame)[-12:] if frame is not None else []
                engine.give_stack("".join(stack).encode())
            if b"r" in wanted:
                report = engine.late_report()
                path = write_flight(engine)
                sys.stderr.write(text_of(report, path))
                sys.stderr.flush()
            del engine
    finally:
        os.close(wakes)


def text_of(report: dict[str, Any], path: Path | None = None) -> str:
    """Put into words who waits in an operation and who has not called it. Local.

    Parameters
    ----------
    report : dict
        ``seq`` (the operation), ``what`` (its call), and ``ranks``: by number ``answers``,
        ``called`` (operations), ``inside`` (a call of hopcoll), ``since_s``, ``stack``, ``name``.
    path : Path, optional
        Where the flight recorder was written.

    Returns
    -------
    str
        Some lines, each of which begins with "hopcoll: " or is indented.
    """
    seq, ranks = report["seq"], report["ranks"]
    waiting = [r for r, one in ranks.items() if one["answers"] and one["called"] > seq]
    lines = [f"operation {seq} ({report['what'] or 'of an unknown kind'}) does not get on"]
    if waiting:
        lines.append(f"{_INDENT}in it: {_numbers(waiting)}")
    for rank, one in ranks.items():
        who = f"rank {rank} ({one['name']})"
        if not one["answers"]:
            lines.append(
                f"{_INDENT}{who} gives no sign of life: it is stopped, out of reach, or makes no "
                "progress outside of its calls"
            )
        elif one["called"] <= seq:
            where = "waits in an earlier call" if one["inside"] else "is outside of hopcoll"
            lines.append(
                f"{_INDENT}{who} has not called it: it has called {one['called']} operations, and "
                f"{where} for {one['since_s']:.1f} s"
            )
            if one["stack"]:
                lines += [_INDENT * 2 + line for line in one["stack"].rstrip().splitlines()]
            else:
                lines.append(f"{_INDENT * 2}it gives no Python stack: something holds the GIL")
    if len(waiting) == len(ranks):
        lines.append(f"{_INDENT}all have called it, and their data do not come")
    if path is not None:
        lines.append(f"{_INDENT}the last operations of this rank: {path}")
    return "hopcoll: " + "\n".join(lines) + "\n"


def _numbers(ranks: list[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, ranks))}"


def awaited_text(ranks: tuple[int, ...]) -> str:
    """Say which ranks an operation waits for, as a part of a sentence. Local."""
    return f"; it waits for {_numbers(list(ranks))}" if ranks else ""


def flight_text(engine: Any) -> str:
    """Write the flight recorder and say where, as the end of a message. Local."""
    path = write_flight(engine)
    return "" if path is None else f"; the last operations: {path}"


def trace_path(folder: str, rank: int) -> str:
    """Where the trace of a rank's next communicator goes; the folder is made."""
    _traces[rank] = count = _traces.get(rank, 0) + 1
    os.makedirs(folder, exist_ok=True)
    number = "" if count == 1 else f".{count}"
    return os.path.join(folder, f"rank-{rank}{number}.trace")


def flight_path(rank: int) -> Path:
    """Where a rank's flight recorder is written: ``HOPCOLL_FLIGHT_DIR``, or a temporary folder."""
    folder = os.environ.get("HOPCOLL_FLIGHT_DIR") or os.path.join(
        tempfile.gettempdir(), f"hopcoll-flight-{os.getuid()}"
    )
    return Path(folder, f"{os.getpid()}.{rank}.json")


def write_flight(engine: Any) -> Path | None:
    """Write what the engine remembers of its last operations; None where that is not possible."""
    path = flight_path(engine.rank)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = path.with_suffix(".tmp")
        content = {
            "rank": engine.rank,
            "pid": os.getpid(),
            "time": time.time(),
            "clock_us": time.monotonic_ns() // 1000,
            "state": engine.describe(),
            "counters": engine.counters(),
            "operations": engine.flight(),
        }
        written.write_text(json.dumps(content, indent=1) + "\n")
        written.replace(path)
    except OSError:
        return None
    return path
