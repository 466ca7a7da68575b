"""The levels of a store: what the user declares, and what a rank knows of each.

A store has one or more levels, each a directory with a log of its own (level.py). One on a *shared*
file system is one directory for all ranks; of the other kinds each host has its own, filled by
its ranks. All of them are taken over by the same incarnation.

Which commit is newest
----------------------
The logs of several directories may disagree after a crash: a level is saved to less often, a host
was away, a save reached some hosts and not the others. So commits are ordered by their *key*,
(generation, save). A job that opens the store reads all logs it can reach, and its generation is
one more than the highest that opened any of them; it is the first part of its incarnation's name.
`save` counts the saves of an incarnation. Then:

* Of one incarnation, a higher save was made later, and went on from a lower one, unless a restore
  of an older step came in between: then the lower one is dead, and the higher one counts.
* An incarnation of a higher generation has seen the logs, and chose what to go on from: the newest
  that was whole, or an older one on request. What it then commits is newer than all that was there
  before it, also than a commit of a host that was away at the time and comes back with steps that
  are higher. Such commits are on a branch that the job gave up.
* Two jobs that read before either opens would have the same generation. But the second one to open
  a directory finds the slot of the first before its own, and opens all of them anew with a higher
  one.

A commit is *whole* where each of its shards is on some host that is there. The newest whole one is
restored, whichever level has it; a commit that is acknowledged as durable is whole at the highest
level as long as that one has its files, so nothing older is ever chosen. Living commits with
higher keys than the one that a job goes on from die with its first save.
"""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopcoll.errors import CheckpointCorruptError
from recovery.disk import Disk
from recovery.level import Level as Directory
from recovery.log import Commit, Record

__all__ = ["Key", "Level", "Offer", "Place", "generation_of", "name_incarnation", "named_levels"]

#: Orders the commits of all levels: generation of the incarnation, number of its save.
Key = tuple[int, float]
_KINDS = ("shared", "host", "local")
_GENERATION_DIGITS, _TOKEN_DIGITS = 8, 16


@dataclass(frozen=True)
class Level:
    """One of the levels of a store.

    Parameters
    ----------
    path : path
        The directory. ``{host}`` in it stands for the name of the host.
    every : int, default 1
        The level is left out of a save that is less than so many steps after its last commit.
    kind : {"shared", "host", "local"}, default "shared"
        ``"shared"``: one directory, which all ranks see. ``"host"``: one on each host that
        outlives the ranks (tmpfs), with copies at another host. ``"local"``: one on each host,
        without copies; a host that is lost takes the level's commits with it.
    partner : bool, default True
        Whether what the ranks of a host write is copied to the next host (only ``"host"``).
    """

    path: str | os.PathLike[str]
    every: int = 1
    kind: str = "shared"
    partner: bool = True

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind of a Level must be one of {_KINDS}, not {self.kind!r}")
        if operator.index(self.every) < 1:
            raise ValueError(f"every of a Level must be 1 or more, not {self.every}")


@dataclass(frozen=True)
class Offer:
    """A commit that a directory has: its key, its slot there, and its step."""

    key: Key
    slot: int
    step: int


class Place:
    """A level as this rank sees it. Local; what it does not know it is told by the others.

    Attributes
    ----------
    index : int
    level : Level
    path : Path
    directory : Directory or None
        Once it is opened.
    base : Record or None
        The commit whose arrays need not be written again; alike at all ranks.
    last_step : int or None
        Of the newest commit in the living chain here; alike at all ranks.
    leads : bool
        Whether what this rank knows of the log is what stands there: it filled the last slot.
    filled : Record or None
        A commit of this rank, behind which nobody has cleaned up yet.
    """

    def __init__(self, index: int, level: Level, host: str, disk: Disk) -> None:
        self.index = index
        self.level = level
        self.path = Path(str(os.fspath(level.path)).replace("{host}", host))
        self.shared = level.kind == "shared"
        self.disk = disk
        self.directory = Directory(self.path, disk)
        self.base: Record | None = None
        self.last_step: int | None = None
        self.leads = False
        self.filled: Record | None = None
        self._known: dict[int, Offer] = {}

    def open(self, incarnation: str, member: str) -> None:
        """Be of this incarnation; the directory is taken over apart."""
        self.directory = Directory(self.path, self.disk, incarnation, member)

    def clean(self) -> None:
        """Remove what the commit of this rank let die.

        Raises
        ------
        CheckpointError
            The disk refused. The clean-up behind the next commit tries again.
        """
        record, self.filled = self.filled, None
        if record is not None:
            self.directory.clean(record)

    def is_due(self, step: int) -> bool:
        return self.last_step is None or step - self.last_step >= self.level.every

    def offers(self, record: Record | None) -> list[Offer]:
        """Return the living commits of a slot, oldest first.

        One whose slot cannot be read has a key right after the one before it, so that it is not
        passed over unless another level has it.
        """
        offers: list[Offer] = []
        for commit in record.alive if record else ():
            before = offers[-1].key if offers else (0, 0)
            unknown = Offer((before[0], before[1] + 0.5), commit.slot, commit.step)
            offers.append(self._offer(commit) or unknown)
        self._known = {o.slot: o for o in offers if o.slot in self._known}
        return offers

    def parent(self, record: Record | None, key: Key | None) -> int | None:
        """Return the slot of the newest living commit that is not newer than `key`."""
        slots = [o.slot for o in self.offers(record) if key is not None and o.key <= key]
        return slots[-1] if slots else None

    def files(self) -> frozenset[str]:
        """Return the names of the shards that are there."""
        return frozenset(os.listdir(self.path / "shards"))

    def _offer(self, commit: Commit) -> Offer | None:
        if commit.slot not in self._known:
            try:
                found = self.directory.log.read(commit.slot)
            except (FileNotFoundError, CheckpointCorruptError):
                return None
            key = (generation_of(found.owner), found.save)
            self._known[commit.slot] = Offer(key, commit.slot, commit.step)
        return self._known[commit.slot]


def named_levels(path_or_levels: Any) -> tuple[Level, ...]:
    """Return the levels that a caller declared; a path alone is one that all ranks share."""
    if isinstance(path_or_levels, (str, os.PathLike)):
        return (Level(path_or_levels),)
    levels = (
        (path_or_levels,) if isinstance(path_or_levels, Level) else tuple(path_or_levels)
    )
    if not levels:
        raise ValueError("levels must be one or more")
    for level in levels:
        if not isinstance(level, Level):
            raise TypeError(f"levels must be Level, not {type(level).__name__}")
    return levels


def generation_of(incarnation: str) -> int:
    return int(incarnation[:_GENERATION_DIGITS], 16)


def name_incarnation(generation: int, token: str) -> str:
    return f"{generation:0{_GENERATION_DIGITS}x}{token[:_TOKEN_DIGITS]}"
