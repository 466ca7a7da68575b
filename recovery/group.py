"""The ranks of a store: rounds in which each tells all, and who is on which host.

A *round* is one collective of the store's own communicator. Every rank that comes out of it has the
same answers of the same ranks, so what follows from them alone is decided alike everywhere. A store
without a communicator is a group of one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hopcoll.errors import CheckpointError, HopcollError, TransferTimeoutError

if TYPE_CHECKING:
    from hopcoll import Communicator

__all__ = ["Group"]

_STABLE_POLL_S = 0.0005


class Group:
    """The ranks that share a store. Its methods are collective, but for those that say otherwise.

    Parameters
    ----------
    comm : Communicator or None
        Is duplicated.
    host : str or None
        The name of this rank's host; what the system calls it where it is None.
    timeout_s : float
        How long a round may take.

    Attributes
    ----------
    rank, size : int
    members : tuple of int
        Who took part in the last round.
    expected : tuple of int
        Who was there when the state was last agreed upon (at the start, or by a restore).
    hosts : dict of int to str
        The host of each rank.
    """

    def __init__(self, comm: Communicator | None, host: str | None, timeout_s: float) -> None:
        self._comm = None if comm is None else comm.Dup(timeout_s=timeout_s)
        self._timeout_s = timeout_s
        self._broken: HopcollError | None = None
        self.rank = 0 if self._comm is None else self._comm.rank
        self.size = 1 if self._comm is None else self._comm.size
        self.members: tuple[int, ...] = tuple(range(self.size))
        self.hosts: dict[int, str] = {}
        self.hosts = self.everyone(host or socket.gethostname())
        self.expected = self.members

    @property
    def broken(self) -> bool:
        """Whether this rank lost the others: it cannot know what they do. Local."""
        return self._broken is not None

    @property
    def host(self) -> str:
        """The host of this rank. Local."""
        return self.hosts[self.rank]

    def everyone(self, answer: Any) -> dict[int, Any]:
        """Give an answer and get those of all members, by rank in ascending order."""
        if self._comm is None:
            return {0: answer}
        answers = self._run(self._comm.allgather, answer)
        return {rank: answers[rank] for rank in self.members}

    def exchange(self, answers: dict[int, Any]) -> dict[int, Any]:
        """Give some ranks an answer each, and get what they have for this one."""
        if self._comm is None:
            return dict(answers)
        got = self._run(self._comm.alltoall, [answers.get(r) for r in range(self.size)])
        return {rank: got[rank] for rank in self.members if got[rank] is not None}

    def copy(self, array: np.ndarray, root: int) -> None:
        """Make an array (contiguous in C order) what it is at `root`.

        Raises
        ------
        RankFailedError
            The root died; at all members.
        """
        if self._comm is not None and array.nbytes:
            self._comm.Bcast(array.reshape(-1).view(np.uint8), root=root, timeout_s=self._timeout_s)

    def settle(self) -> None:
        """Wait until no death can change the answers of the last round any more. Local.

        Raises
        ------
        CheckpointError
            It took too long.
        """
        if self._comm is None:
            return
        deadline_s = time.monotonic() + self._timeout_s
        while not self._comm.outcome.stable():
            if time.monotonic() > deadline_s:
                raise CheckpointError("the ranks of the store did not agree in time")
            time.sleep(_STABLE_POLL_S)

    def leader(self, host: str, members: Iterable[int] | None = None) -> int | None:
        """Return the lowest member on a host, None where there is none. Local."""
        ranks = self.members if members is None else members
        return min((rank for rank in ranks if self.hosts[rank] == host), default=None)

    def host_names(self, members: Sequence[int] | None = None) -> list[str]:
        """Return the hosts of the members, in the order of their lowest ranks. Local."""
        return list(dict.fromkeys(self.hosts[r] for r in members or self.members))

    def close(self) -> None:
        if self._comm is not None:
            self._comm.close(0.0 if self._broken is not None else None)

    def _run(self, collective: Any, argument: Any) -> Any:
        if self._broken is not None:
            raise CheckpointError(
                f"the ranks of the store lost each other: {self._broken}; open it anew"
            ) from self._broken
        assert self._comm is not None
        try:
            result = collective(argument, timeout_s=self._timeout_s, on_failure="survivors")
        except TransferTimeoutError as error:
            self._broken = error
            raise CheckpointError(
                f"the ranks of the store did not all answer within {self._timeout_s:g} s: {error}"
            ) from error
        except HopcollError as error:
            self._broken = error
            raise
        self.members = self._comm.outcome.contributors
        return result
