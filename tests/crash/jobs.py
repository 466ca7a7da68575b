"""Jobs of the examples that are killed from outside: a rank, the one that leads, or all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hopcoll.errors import HopcollError
from recovery.workflows import Workflow
from tests import launch

_LIMIT_S = 150.0


class Job:
    """A job that runs ``PROGRAM FOLDER ...`` on some ranks."""

    def __init__(self, ranks: int, program: str, folder: Path, name: str, *words: Any) -> None:
        self.folder = folder
        self.workflow = Workflow(name, folder / "workflows")
        self.process = launch.start(ranks, program, folder, *words)
        self._said: tuple[str, str] | None = None

    def pids(self) -> dict[int, int]:
        """The processes of the ranks that live, by rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if str(self.folder).encode() not in words:
                    continue
                if not any(word.endswith(b"/_rank.py") for word in words):
                    continue
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                known = dict(
                    one.split(b"=", 1) for one in (entry / "environ").read_bytes().split(b"\0")
                    if b"=" in one
                )  # fmt: skip
            except OSError:
                continue
            if state != "Z" and b"OMPI_COMM_WORLD_RANK" in known:
                found[int(known[b"OMPI_COMM_WORLD_RANK"])] = int(entry.name)
        return found

    def wait_until(self, there: Callable[[Any], bool]) -> None:
        """Wait until the journal says something."""
        end_s = time.monotonic() + _LIMIT_S
        while time.monotonic() < end_s and self.process.poll() is None:
            with contextlib.suppress(HopcollError, OSError):
                if there(self.ledger()):
                    return
            threading.Event().wait(0.02)
        raise AssertionError(f"it did not come so far: {self.end()}")

    def ledger(self) -> Any:
        """What the journal says by now."""
        return self.workflow._folder.look()[0]

    def kill(self, rank: int) -> None:
        os.kill(self.pids()[rank], signal.SIGKILL)

    def kill_all(self) -> None:
        """All ranks, and what started them."""
        for pid in self.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.end()

    def end(self) -> str:
        """Wait for its end; returns what it said."""
        try:
            stdout, stderr = self.process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            launch.end(self.process)
            raise AssertionError("the job hangs") from None
        return f"exit code {self.process.returncode}\n{stdout}\n{stderr}"


def done(ledger: Any, name: str) -> int:
    """How many tasks of a name have ended."""
    return sum(
        state.done is not None and one.rpartition("/")[2].split("~")[0].split("[")[0] == name
        for one, state in ledger.states.items()
    )
