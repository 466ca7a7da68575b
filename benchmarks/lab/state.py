"""What is up, remembered between two commands in a folder under /run, and changed under a lock."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from benchmarks.lab.network import LabError, Layout

__all__ = ["folder", "forget", "load", "locked", "save"]

_FILE = "state.json"


def _base() -> Path:
    run = Path("/run")
    return (run if os.access(run, os.W_OK) else Path(tempfile.gettempdir())) / "hopcoll-lab"


def folder(name: str) -> Path:
    """The runtime folder of a lab: its state, its launch agent, the sessions of its jobs."""
    return _base() / name


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Keep other commands from changing this lab; blocks while one does."""
    path = _base() / f"{name}.lock"
    while True:
        with suppress(FileNotFoundError):  # the last one to leave took the folder away
            path.parent.mkdir(mode=0o755, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.fstat(lock).st_ino == path.stat().st_ino:
                    break
            os.close(lock)
    try:
        yield
    finally:
        if not folder(name).exists():
            path.unlink()
            with suppress(OSError):  # other labs are there
                path.parent.rmdir()
        os.close(lock)


def save(layout: Layout, complete: bool) -> None:
    """Remember a lab: before it is made, and again when all of it is there."""
    home = folder(layout.name)
    home.mkdir(mode=0o755, exist_ok=True)
    written = home / f"{_FILE}.new"
    written.write_text(json.dumps({**asdict(layout), "complete": complete}, indent=1) + "\n")
    written.replace(home / _FILE)


def load(name: str) -> tuple[Layout, bool] | None:
    """What is remembered of a lab and whether it is complete; None: nothing."""
    path = folder(name) / _FILE
    try:
        data = json.loads(path.read_text())
        complete = bool(data.pop("complete"))
        return Layout(**{**data, "rates": tuple(data["rates"])}), complete
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path} is no state of a lab: {error}") from error


def names() -> list[str]:
    """The labs that are remembered."""
    return sorted(path.parent.name for path in _base().glob(f"*/{_FILE}"))


def forget(name: str) -> None:
    """Remove the runtime folder of a lab."""
    shutil.rmtree(folder(name), ignore_errors=True)
