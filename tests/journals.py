"""What the tests of a workflow's journal share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recovery.disk import Disk
from recovery.journal import Journal

OWNER = {"is": "a test"}


def opened(folder: Path, disk: Disk | None = None) -> Journal:
    """Return a journal that is taken over."""
    journal = Journal(folder, Disk() if disk is None else disk, OWNER)
    journal.open()
    return journal


def put(journal: Journal, *numbers: int) -> None:
    """Append records that tell a number each, and flush."""
    for number in numbers:
        journal.append("number", {"at": number})
    journal.flush()


def heads(folder: Path) -> list[Any]:
    """Return the numbers of a journal's records."""
    return [record.head["at"] for record in Journal.read(folder).records]
