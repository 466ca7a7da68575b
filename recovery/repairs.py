"""A store whose newest slot is corrupt, and a person who has it go on from the one before.

The newest slot tells all, so a store where it cannot be read is not opened: what was acknowledged
must not silently be passed over. Nothing is removed here, either. The next number is filled with a
slot that goes on from the newest one that can be read, and is the floor of the log from then on; so
a process that was stopped anywhere still finds each number filled (log.py). Whoever had the store
open is refused from then on.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hopcoll.errors import CheckpointCorruptError, CheckpointError
from recovery.disk import Disk
from recovery.level import Level
from recovery.log import Commit, Record
from recovery.places import generation_of, name_incarnation

__all__ = ["Finding", "examine", "repair"]


@dataclass(frozen=True)
class Finding:
    """What a store can go on from.

    Attributes
    ----------
    corrupt : list of Path
        The slots that cannot be read, above all those that can; where there are none, all is well.
    base : Record
        The highest slot that can be read.
    kept : list of Commit
        Its living commits whose files are all there, oldest first.
    gone : list of Commit
        The others: what cannot be read may have let them die.
    """

    corrupt: list[Path]
    base: Record
    kept: list[Commit]
    gone: list[Commit]


def examine(path: Path) -> Finding:
    """Look what a store can go on from. Local; reads slots, and of shards only their sizes.

    Raises
    ------
    CheckpointCorruptError
        No slot can be read.
    CheckpointMismatchError
        The newest one is of a newer version.
    OSError
    """
    log = Level(path, Disk()).log
    corrupt: list[Path] = []
    for number in reversed(log.numbers()):
        try:
            base = log.read(number)
        except FileNotFoundError:
            continue  # pruned meanwhile
        except CheckpointCorruptError:
            corrupt.append(log.path(number))
            continue
        there = {commit: _is_there(path, log.read, commit) for commit in base.alive}
        return Finding(
            corrupt,
            base,
            [commit for commit in base.alive if there[commit]],
            [commit for commit in base.alive if not there[commit]],
        )
    raise CheckpointCorruptError(f"{log.folder}: no slot can be read", log.folder)


def repair(path: Path, finding: Finding, disk: Disk | None = None) -> Record:
    """Let a store go on from what `examine` found; durable when this returns. Local.

    Parameters
    ----------
    path : Path
    finding : Finding
        With a corrupt slot.
    disk : Disk, optional

    Raises
    ------
    CheckpointError
        Another process filled the next slot meanwhile; or the disk refused.
    """
    generation = generation_of(finding.base.owner) + len(finding.corrupt)
    incarnation = name_incarnation(generation, secrets.token_hex(8))
    log = Level(path, disk or Disk(), incarnation, "repair").log
    highest = int(finding.corrupt[0].stem)
    try:
        record = log.pass_by(replace(finding.base, number=highest), finding.kept)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be repaired: {error}", path) from error
    if record is None:
        raise CheckpointError(
            f"{log.path(highest + 1)} was made meanwhile: the store is in use", path
        )
    return record


def _is_there(path: Path, read: Any, commit: Commit) -> bool:
    """Whether the slot of a commit can be read, and its shards are as long as they were."""
    try:
        shards = read(commit.slot).body["shards"]
        return all(
            (path / "shards" / name).stat().st_size == its["nbytes"]
            for name, its in shards.items()
        )
    except (FileNotFoundError, CheckpointCorruptError):
        return False
