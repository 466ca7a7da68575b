"""What a launcher finds left behind on its host, and clears away: processes, directories."""

from __future__ import annotations

import math
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

__all__ = ["Orphans", "forget_session", "kill_descendants"]

#: Seconds between two looks for orphans, and how long mpirun may have nothing else to wait for.
_ORPHANS_TICK_S = 0.5
_ORPHANS_PATIENCE_S = 1.0


class Orphans:
    """Ends what forks of dead ranks left behind, when mpirun has nothing else to wait for.

    A data loader's worker that outlives its rank keeps the rank's output open, and mpirun waits for
    its end. When no rank is left on this host, that is all it can be waiting for.
    """

    def __init__(self, mpirun: int) -> None:
        self.mpirun = mpirun
        self.next_s = 0.0
        self.bare_since_s = math.inf

    def look(self) -> None:
        now_s = time.monotonic()
        if now_s < self.next_s:
            return
        self.next_s = now_s + _ORPHANS_TICK_S
        if _has_children(self.mpirun):
            self.bare_since_s = math.inf
        else:
            self.bare_since_s = min(self.bare_since_s, now_s)
        if now_s - self.bare_since_s > _ORPHANS_PATIENCE_S:
            for pid in _children():
                if pid != self.mpirun:
                    os.kill(pid, signal.SIGKILL)


def forget_session(pid: int) -> None:
    """Remove the directory that a killed mpirun of this process id left behind.

    The next mpirun of the same id would find the address of a server in it, take that for a server
    that runs, and end with "The PMIx server's listener thread failed to start".
    """
    left = Path(tempfile.gettempdir(), f"ompi.{pid}")
    try:
        if left.stat().st_uid == os.geteuid():
            shutil.rmtree(left, ignore_errors=True)
    except OSError:
        return  # as it should be: there is none


def _has_children(pid: int) -> bool:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        return any(
            Path(f"/proc/{pid}/task/{thread}/children").read_text().strip() for thread in threads
        )
    except OSError:
        return True  # it ended meanwhile, or this kernel does not tell


def kill_descendants() -> None:
    """Kill what is left of the job on this host, generation by generation."""
    while children := _children():
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                continue


def _children() -> list[int]:
    me = str(os.getpid())
    children = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                after_name = Path(entry.path, "stat").read_text().rpartition(")")[2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if after_name.split()[1] == me:
                children.append(int(entry.name))
    return children
