"""Who contributed to each step of a job, over all of its starts, so that it can be run again.

A history is a list of *eras*. An era begins when a job starts or goes back to a commit, with the
ranks that are there; from then on ranks can only be lost. So it is short: a line an era, and a line
a loss, however many steps there are.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hopcoll.errors import CheckpointMismatchError

__all__ = ["Era", "History"]


@dataclass
class Era:
    """From a start, or a way back to a commit, to the next.

    Attributes
    ----------
    first : int
        Its first step.
    size : int
        The ranks of the communicator when it was made; they are numbered by it.
    ranks : tuple of int
        Those that began the era.
    losses : list of (int, int, tuple of int)
        A step, which of its operations (from 0), and the contributors from that one on.
    """

    first: int
    size: int
    ranks: tuple[int, ...]
    losses: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)

    def contributors(self, step: int, index: int) -> tuple[int, ...]:
        """Return who contributed to an operation of a step."""
        place = bisect_right(self.losses, (step, index), key=lambda loss: loss[:2])
        return self.losses[place - 1][2] if place else self.ranks

    def beginning(self, step: int) -> tuple[int, ...]:
        """Return the contributors of the last operation before a step: who shares its batch."""
        return self.contributors(step, -1)


@dataclass
class History:
    """The eras of a job.

    Attributes
    ----------
    eras : list of Era
    last : int
        The last committed step.
    """

    eras: list[Era] = field(default_factory=list)
    last: int = 0

    def begin(self, first: int, size: int, ranks: Iterable[int]) -> None:
        """Begin an era; what was recorded of its steps before is forgotten."""
        kept = [era for era in self.eras if era.first < first]
        for era in kept:
            era.losses = [loss for loss in era.losses if loss[0] < first]
        self.eras = [*kept, Era(first, size, tuple(ranks))]
        self.last = first - 1

    def record(self, step: int, index: int, contributors: Iterable[int]) -> None:
        """Note who contributed to an operation of the present era."""
        era, ranks = self.eras[-1], tuple(contributors)
        if ranks != era.contributors(step, index):
            era.losses.append((step, index, ranks))

    def contributors(self, step: int) -> tuple[int, ...]:
        """Return who contributed to the last operation of a step."""
        era = next((era for era in reversed(self.eras) if era.first <= step), None)
        if era is None or step > self.last:
            raise ValueError(f"step {step} is not in this history")
        return era.beginning(step + 1)

    def to_json(self) -> dict[str, Any]:
        """Return what JSON carries."""
        return {
            "last": self.last,
            "eras": [
                {
                    "first": era.first,
                    "size": era.size,
                    "ranks": list(era.ranks),
                    "losses": [[step, index, list(ranks)] for step, index, ranks in era.losses],
                }
                for era in self.eras
            ],
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> History:
        """Return what `to_json` was made from."""
        return cls(
            [
                Era(
                    era["first"],
                    era["size"],
                    tuple(era["ranks"]),
                    [(step, index, tuple(ranks)) for step, index, ranks in era["losses"]],
                )
                for era in document["eras"]
            ],
            document["last"],
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike[str], step: int | None = None) -> History:
        """Read the history of a job from its store, or from a file that `write` made.

        Local, changes nothing.

        Parameters
        ----------
        path : path
        step : int, optional
            Of which commit; the newest where it is left out.

        Raises
        ------
        CheckpointMismatchError
            What is there was not saved by a training session.
        CheckpointError, OSError
            As `CheckpointStore` and `CheckpointStore.restore` raise them.
        """
        if not Path(path).is_dir():
            return cls.from_json(json.loads(Path(path).read_text()))
        from recovery.store import CheckpointStore

        with CheckpointStore(path, readonly=True, allow_pickle=True) as store:
            saved = store.restore(step).state
        if not (isinstance(saved, dict) and "history" in saved.get("session", {})):
            raise CheckpointMismatchError(f"{path} was not saved by a TrainingSession", path)
        return cls.from_json(json.loads(saved["session"]["history"]))
