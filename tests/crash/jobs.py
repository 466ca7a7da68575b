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
from typing import Any, TypeVar

from hopcoll.errors import HopcollError
from recovery.workflows import Workflow
from tests import launch

_LIMIT_S = 150.0

T = TypeVar("T")


class OverTooSoonError(AssertionError):
    """A job ended well before what was to happen to it: the machine was busy with others."""


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
        """Wait until the journal says something.

        Raises
        ------
        OverTooSoonError
            The job has come to a good end, and was not seen there on its way.
        """
        end_s = time.monotonic() + _LIMIT_S
        while time.monotonic() < end_s and self.process.poll() is None:
            with contextlib.suppress(HopcollError, OSError):
                if there(self.ledger()):
                    return
            threading.Event().wait(0.02)
        said = self.end()
        if self.process.returncode == 0:
            self._check_not_done()
        raise AssertionError(f"it did not come so far: {said}")

    def read(self, look: Callable[[Any], T]) -> T:
        """What is found in the journal, which somebody may just be taking over."""
        found: list[T] = []

        def there(ledger: Any) -> bool:
            found.append(look(ledger))
            return True

        self.wait_until(there)
        return found[0]

    def ledger(self) -> Any:
        """What the journal says by now."""
        return self.workflow._folder.look()[0]

    def kill(self, rank: int) -> None:
        try:
            os.kill(self.pids()[rank], signal.SIGKILL)
        except (KeyError, ProcessLookupError):
            self._check_not_done()
            raise

    def kill_all(self) -> None:
        """All ranks, and what started them."""
        for pid in self.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.end()
        end_s = time.monotonic() + _LIMIT_S
        # The system takes its time to end a process.
        while self.workflow.status().state == "running" and time.monotonic() < end_s:
            threading.Event().wait(0.02)
        self._check_not_done()

    def _check_not_done(self) -> None:
        if self.workflow.status().state == "done":
            raise OverTooSoonError(f"it had done all: {self.end()}")

    def end(self) -> str:
        """Wait for its end; returns what it said."""
        try:
            stdout, stderr = self.process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            launch.end(self.process)
            raise AssertionError("the job hangs") from None
        return f"exit code {self.process.returncode}\n{stdout}\n{stderr}"


def begin_again(story: Callable[[Path], Job], folder: Path) -> Job:
    """Let a job live through something; up to three times, each in a folder of its own, where it
    was over too soon for that."""
    for number in range(2):
        with contextlib.suppress(OverTooSoonError):
            return story(_made(folder / str(number)))
    return story(_made(folder / "2"))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def done(ledger: Any, name: str) -> int:
    """How many tasks of a name have ended."""
    return sum(
        state.done is not None and one.rpartition("/")[2].split("~")[0].split("[")[0] == name
        for one, state in ledger.states.items()
    )
