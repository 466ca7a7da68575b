"""Split and Dup: communicators of some ranks of a communicator, over its connections.

A new communicator is a context of its root's transport (`hopcoll._contexts`): nothing is connected,
and no MPI communicator is made. Two small collectives of the parent make it:

1. Each rank reserves a place and gathers (color, key, handle of its place) from all. Who has
   contributed is known, alike at all survivors; those of one color are the new ranks, in the order
   of (key, rank). Each makes its end.
2. An Allreduce tells whether all could. After it, every rank that is alive has made its end, so no
   message comes too early; who contributed to the first and not to the second is gone, and the new
   communicator hears of it like of a death.
"""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from cython_kernels import reduction
from hopcoll._calls import address_of, number_of
from hopcoll._objects import Objects
from hopcoll.buffers import parse
from hopcoll.errors import RankFailedError
from hopcoll.ops import MIN
from hopcoll.outcome import ALLGATHER, ALLREDUCE

if TYPE_CHECKING:
    from hopcoll.communicator import Communicator
    from hopcoll.outcome import Outcome

__all__ = ["Groups"]

#: No other call matches those of a Split.
_AGREED: Final = number_of(b"Split")
_INT64_MAX: Final = (1 << 63) - 1
_NO_PLACE, _NO_MEMORY = -1, -2


class Groups(Objects):
    """The part of `hopcoll.Communicator` that makes communicators of some of its ranks."""

    def Split(
        self,
        color: int | None = 0,
        key: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Communicator | None:
        """Make a communicator of the ranks that give the same color. Collective, blocking.

        Its ranks are numbered from 0 in the order of `key`, those of equal keys as they are here;
        `parent_ranks` tells what they are here. It has the settings of this communicator,
        `on_failure` included, and is as fault tolerant, also while it is made: a rank that dies on
        the way is left out, or is dropped from the new communicator by its first operation. Deaths
        are noticed in each communicator by itself, so its epochs are its own.

        Both communicators may be used in turn or at once, in any order that does not make ranks
        wait for each other in a circle, also by two threads. Close the new one when it is done
        with: a rank may be in 64 at a time, besides the one that they all come from. That one, when
        it is closed, closes them all; otherwise closing one does nothing to any other.

        No connection is made. Time: two collectives of 32 bytes here. Memory: about 100 KiB, and
        what is under way.

        Parameters
        ----------
        color : int or None, default 0
            Ranks of the same color get together: 0 or more. None or ``MPI.UNDEFINED``: this rank
            joins none, but it has to call this all the same.
        key : int, default 0
            Where in the order this rank comes.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only; not for the new communicator.
        timeout_s : float, optional
            At most so many seconds for each of its two collectives.

        Returns
        -------
        Communicator or None
            None without a color.

        Raises
        ------
        TypeError, ValueError
            `color` or `key` is no such number; at once, and the call does not count. ValueError
            also, at all ranks, where the ranks called different operations, or where a rank that
            gives a color is in 64 communicators already.
        MemoryError
            A rank had no memory for it; at all ranks, and none has made one.
        RankFailedError
            ``on_failure="raise"`` holds and a rank was lost; at all survivors, and none has made
            one.
        TransferTimeoutError
            Not all ranks came in time. The others may still get one, which this rank has left; this
            communicator is out of step with them and should be closed.
        ClosedError, MpiError
            As `Request.wait` raises them.

        References
        ----------
        MPI 4.1, section 7.4.2 (MPI_Comm_split).
        """
        number, order = _color_of(color), _integer("key", key)
        return self._split(number, order, on_failure, timeout_s)

    def Dup(self, *, on_failure: str | None = None, timeout_s: float | None = None) -> Communicator:
        """Make a second communicator of the ranks of this one that are alive.

        Collective, blocking; a `Split` with one color for all: what goes on in one communicator is
        apart from what goes on in the other. Where ranks have died, those that are left are
        numbered anew, without gaps, in the same order.

        Parameters
        ----------
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only; not for the new communicator.
        timeout_s : float, optional
            At most so many seconds for each of its two collectives.

        Returns
        -------
        Communicator

        Raises
        ------
        ValueError, MemoryError, RankFailedError, TransferTimeoutError, ClosedError, MpiError
            As `Split` does.

        References
        ----------
        MPI 4.1, section 7.4.2 (MPI_Comm_dup).
        """
        made = self._split(0, 0, on_failure, timeout_s)
        assert made is not None
        return made

    def _split(
        self, color: int, key: int, on_failure: str | None, timeout_s: float | None
    ) -> Communicator | None:
        engine = self._open_engine()
        flags, limit_s = self._check_call(on_failure, timeout_s)
        from hopcoll import _branches  # late: it is the runtime, and starts MPI

        handle = _branches.reserve(engine) if color >= 0 else 0
        branch = None
        try:
            mine = np.array([color, key, handle], np.int64)
            table = np.zeros((self.size, 3), np.int64)
            came = self._step(engine, ALLGATHER, mine, table, flags, limit_s)
            _check_places(came.contributors, table, _branches.OPEN_MAX)
            members = sorted(
                (rank for rank in came.contributors if color >= 0 and table[rank, 0] == color),
                key=lambda rank: (int(table[rank, 1]), rank),
            )
            if color >= 0:
                handles = [int(table[rank, 2]) for rank in members]
                branch = _branches.grow(engine, handle, members, handles)
            made = np.array([color < 0 or branch is not None], np.int64)
            everyone = np.zeros(1, np.int64)
            stayed = self._step(engine, ALLREDUCE, made, everyone, flags, limit_s)
        except RankFailedError:
            # Alike at all: nobody has used it.
            if branch is not None:
                branch.discard()
            raise
        except BaseException:
            if branch is not None:
                branch.finalize(0.0, False)  # others may have it
            raise
        finally:
            if branch is None and handle > 0:
                _branches.cancel(engine, handle)
        if not everyone[0]:
            if branch is not None:
                branch.discard()
            raise MemoryError("Split: a rank has no memory for one more communicator")
        if branch is None:
            return None
        branch.tell([i for i, rank in enumerate(members) if rank not in stayed.contributors])
        return self._sprout(branch, tuple(members))

    def _sprout(self, branch: Any, members: tuple[int, ...]) -> Communicator:
        raise NotImplementedError

    def _step(
        self,
        engine: Any,
        kind: int,
        mine: np.ndarray,
        everyone: np.ndarray,
        flags: int,
        limit_s: float | None,
    ) -> Outcome:
        send = parse(mine, "mine", writable=False)
        recv = parse(everyone, "everyone", writable=True)
        return self._begin(
            engine, kind, send.code, MIN.code if kind == ALLREDUCE else reduction.NONE, 0,
            send.items, address_of(send), address_of(recv), flags, limit_s, None, None, _AGREED,
        ).wait()  # fmt: skip


def _check_places(contributors: tuple[int, ...], table: np.ndarray, most: int) -> None:
    """What one rank lacks is refused at all, alike."""
    for code, error, what in (
        (_NO_PLACE, ValueError, f"are in {most} communicators already: close some first"),
        (_NO_MEMORY, MemoryError, "have no memory for one more communicator"),
    ):
        ranks = [rank for rank in contributors if table[rank, 2] == code]
        if ranks:
            raise error(f"ranks {', '.join(map(str, ranks))} {what}")


def _color_of(color: int | None) -> int:
    """The color as it is sent: -1 for none."""
    if color is None:
        return -1
    number = _integer("color", color)
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and number == MPI.UNDEFINED:
        return -1
    if number < 0:
        raise ValueError(f"color must be 0 or more, or None for no communicator, not {number}")
    return number


def _integer(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if abs(number) > _INT64_MAX:
        raise ValueError(f"{name} must fit into 64 bits, not {number}")
    return number
