"""A job run again by its history: who is left out when, over communicators of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hopcoll.errors import DivergedError
from recovery import live
from recovery.history import History

if TYPE_CHECKING:
    from hopcoll import Communicator

__all__ = ["Replay"]


class Replay:
    """What one rank does in a replay. Collective over the communicator.

    Each era gets a communicator, split off, of as many ranks as the job had then. A rank that was
    lost leaves it before the operation from which it was missing, works on for itself until the
    step is over, and waits for the next era; there it gets the state from one who was not lost.

    Parameters
    ----------
    comm : Communicator
        With at least as many ranks as the job ever had.
    history : History
    state : dict
        What is handed over.
    """

    def __init__(self, comm: Communicator, history: History, state: dict[Any, Any]) -> None:
        if live.has_cut(state):
            raise ValueError("state has an array that is cut over the ranks: no replay of that")
        largest = max((era.size for era in history.eras), default=0)
        if not history.eras:
            raise ValueError("history is empty: there is nothing to replay")
        if comm.size < largest:
            raise ValueError(f"comm has {comm.size} ranks, and the history is of {largest}")
        self.history = history
        self._comm = comm
        self._state = state
        self._era = history.eras[0]
        self._branch: Communicator | None = None

    def contributors(self, step: int, index: int) -> tuple[int, ...]:
        """Return who contributed to an operation of a step of this era."""
        return self._era.contributors(step, index)

    def begin(self, index: int) -> tuple[Communicator, int, int]:
        """Begin an era.

        Returns
        -------
        comm : Communicator
            That of the era; at a rank that stays out, the whole one.
        first, last : int
            The steps of the era.
        """
        self.end()
        eras = self.history.eras
        if index > 0:
            root = self._era.beginning(eras[index].first)[0]
            state = self._comm.bcast(live.take(self._state), root)
            if self._comm.rank != root:
                live.put_back(self._state, state)
        self._era = era = eras[index]
        self._branch = self._comm.Split(0 if self._comm.rank < era.size else None, self._comm.rank)
        self.stays_out(era.first, 0)
        last = eras[index + 1].first - 1 if index + 1 < len(eras) else self.history.last
        return self._branch or self._comm, era.first, last

    def end(self) -> None:
        """Leave the communicator of the era."""
        if self._branch is not None:
            self._branch.close()
            self._branch = None

    def stays_out(self, step: int, index: int) -> bool:
        """Tell whether this rank was lost before an operation; then it leaves."""
        if self._branch is not None:
            if self._comm.rank in self._era.contributors(step, index):
                return False
            self.end()
        return True

    def check(self, step: int, index: int, contributors: tuple[int, ...]) -> None:
        """Compare who contributed with who did then.

        Raises
        ------
        DivergedError
        """
        then = self._era.contributors(step, index)
        if contributors != then:
            raise DivergedError(
                f"step {step} of the replay had the contributors {contributors}, and {then} in "
                "the history: a rank was lost",
                [contributors, then],
            )
