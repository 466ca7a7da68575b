"""The collectives of Python objects: bcast, gather, allreduce and the others in lower case.

An object travels as one piece of bytes: its pickle (protocol 5), and behind that the memory of its
arrays as it lies. What arrives is not copied again: arrays are views of what was
received. Nobody but the sender knows how long a piece is, so the lengths go first; pieces of up to
`_INLINE_BYTES` go along with them.
"""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hopcoll._shares import Shares
from hopcoll.ops import AVG, SUM, Op
from hopcoll.outcome import Outcome

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Objects"]

#: So long a piece goes along with its length. With it, a message is still sent at once.
_INLINE_BYTES: Final = 1016
_SLOT_BYTES: Final = 8 + _INLINE_BYTES
#: Where arrays may start in a piece: aligned for every dtype.
_ALIGNMENT: Final = 64

Fold = Callable[[Any, Any], Any]

_FUNCTIONS: Final[dict[str, Fold]] = {
    "SUM": operator.add,
    "AVG": operator.add,
    "PROD": operator.mul,
    "MIN": min,
    "MAX": max,
    "LAND": lambda a, b: bool(a) and bool(b),
    "LOR": lambda a, b: bool(a) or bool(b),
    "LXOR": lambda a, b: bool(a) != bool(b),
    "BAND": operator.and_,
    "BOR": operator.or_,
    "BXOR": operator.xor,
}


class Objects(Shares):
    """The part of `hopcoll.Communicator` that takes any Python object.

    These are mpi4py's lower-case methods: they pickle what they are given, block, and return
    objects. How a call ended is in `outcome` afterwards. A rank that died contributes nothing: its
    place in a list is None, and `outcome` does not name it among the contributors. Each call is one
    or two collectives of bytes, so it may raise whatever those raise, alike at all survivors.

    What comes from other ranks is unpickled: it can run any code that those ranks could.
    """

    _outcome: Outcome | None

    @property
    def outcome(self) -> Outcome | None:
        """How the last call of a lower-case method ended; None before the first. Local."""
        return self._outcome

    def barrier(self, *, on_failure: str | None = None, timeout_s: float | None = None) -> None:
        """Wait until all living ranks have called it; see `Barrier`. Collective, blocking."""
        self._outcome = self.Barrier(on_failure=on_failure, timeout_s=timeout_s)

    def bcast(
        self,
        obj: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Broadcast an object from the root. Collective, blocking; see `Ibcast`.

        Parameters
        ----------
        obj : object
            At the root what is sent; not looked at elsewhere.
        root : int, default 0
            The rank that has the object.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds for each of its collectives.

        Returns
        -------
        object
            At the root `obj` itself, elsewhere a copy.

        Raises
        ------
        RankFailedError
            The root died before the survivors had all of it.
        ValueError, TransferTimeoutError, ClosedError, MpiError
            As `Bcast` raises them; and whatever pickling `obj` raises, before anything is sent.
        """
        more = {"on_failure": on_failure, "timeout_s": timeout_s}
        at_root = self.rank == self._check_root(root)
        piece = _packed(obj) if at_root else None
        slot = _slot(piece)
        self._outcome = self.Bcast(slot, root, **more)
        length = _length(slot)
        if length <= _INLINE_BYTES:
            return obj if at_root else _unpacked(slot[8 : 8 + length])
        if piece is None:
            piece = np.empty(length, np.uint8)
        self._outcome = self.Bcast(piece, root, **more)
        return obj if at_root else _unpacked(piece)

    def gather(
        self,
        sendobj: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> list[Any] | None:
        """Gather objects at the root. Collective, blocking; see `Igatherv`.

        Parameters
        ----------
        sendobj : object
            This rank's object.
        root : int, default 0
            The rank that receives them.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds for each of its collectives.

        Returns
        -------
        list or None
            At the root the objects by rank, with None for ranks that are not among
            ``outcome.contributors``; None elsewhere. A root that died is not among them either.

        Raises
        ------
        RankFailedError, ValueError, TransferTimeoutError, ClosedError, MpiError
            As `Gatherv` raises them; and whatever pickling raises, before anything is sent.
        """
        more = {"on_failure": on_failure, "timeout_s": timeout_s}
        at_root = self.rank == self._check_root(root)
        piece, slots, lengths = self._share_lengths(sendobj, more)
        if lengths.max(initial=0) <= _INLINE_BYTES:
            return self._objects_in(slots, lengths) if at_root else None
        everything = np.empty(int(lengths.sum()), np.uint8) if at_root else None
        self._outcome = self.Gatherv(
            piece, [everything, lengths] if at_root else None, root, **more
        )
        return self._objects_of(everything, lengths) if at_root else None

    def allgather(
        self,
        sendobj: Any,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        """Gather objects at all ranks. Collective, blocking; see `Iallgatherv`.

        Parameters
        ----------
        sendobj : object
            This rank's object.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds for each of its collectives.

        Returns
        -------
        list
            The objects by rank (also this rank's own as a copy), with None for ranks that are not
            among ``outcome.contributors``. Alike at all survivors.

        Raises
        ------
        RankFailedError, ValueError, TransferTimeoutError, ClosedError, MpiError
            As `Allgatherv` raises them; and whatever pickling raises, before anything is sent.
        """
        more = {"on_failure": on_failure, "timeout_s": timeout_s}
        piece, slots, lengths = self._share_lengths(sendobj, more)
        if lengths.max(initial=0) <= _INLINE_BYTES:
            return self._objects_in(slots, lengths)
        everything = np.empty(int(lengths.sum()), np.uint8)
        self._outcome = self.Allgatherv(piece, [everything, lengths], **more)
        return self._objects_of(everything, lengths)

    def scatter(
        self,
        sendobj: Sequence[Any] | None,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Give each rank its object from the root. Collective, blocking; see `Iscatterv`.

        Parameters
        ----------
        sendobj : sequence of `size` objects, or None
            At the root one object for each rank, also for those that are gone; not looked at
            elsewhere.
        root : int, default 0
            The rank that has the objects.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds for each of its collectives.

        Returns
        -------
        object
            This rank's, a copy (also at the root).

        Raises
        ------
        RankFailedError
            The root died before every living rank had its object: raised at all of them.
        TypeError, ValueError
            `sendobj` has not one object for each rank; nothing was sent.
        TransferTimeoutError, ClosedError, MpiError
            As `Scatterv` raises them; and whatever pickling raises, before anything is sent.
        """
        more = {"on_failure": on_failure, "timeout_s": timeout_s}
        at_root = self.rank == self._check_root(root)
        pieces = self._pieces_of(sendobj) if at_root else []
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        length = np.empty(1, np.int64)
        self._outcome = self.Scatter(lengths if at_root else None, length, root, **more)
        mine = np.empty(int(length[0]), np.uint8)
        self._outcome = self.Scatterv(
            [np.concatenate(pieces), lengths] if at_root else None, mine, root, **more
        )
        return _unpacked(mine)

    def alltoall(
        self,
        sendobj: Sequence[Any],
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        """Give each rank an object from each rank. Collective, blocking; see `Ialltoallv`.

        Parameters
        ----------
        sendobj : sequence of `size` objects
            One object for each rank, also for those that are gone.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds for each of its collectives.

        Returns
        -------
        list
            What each rank had for this one, with None for ranks that are not among
            ``outcome.contributors``.

        Raises
        ------
        TypeError, ValueError
            `sendobj` has not one object for each rank; nothing was sent.
        RankFailedError, TransferTimeoutError, ClosedError, MpiError
            As `Alltoallv` raises them; and whatever pickling raises, before anything is sent.
        """
        more = {"on_failure": on_failure, "timeout_s": timeout_s}
        pieces = self._pieces_of(sendobj)
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        expected = np.empty(self.size, np.int64)
        self._outcome = self.Alltoall(lengths, expected, **more)
        everything = np.empty(int(expected.sum()), np.uint8)
        self._outcome = self.Alltoallv(
            [np.concatenate(pieces), lengths], [everything, expected], **more
        )
        return self._objects_of(everything, expected)

    def reduce(
        self,
        sendobj: Any,
        op: Op | MPI.Op | Fold = SUM,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Fold objects at the root, in the order of the ranks. Collective, blocking; see `gather`.

        Parameters
        ----------
        sendobj : object
            This rank's object.
        op : Op, mpi4py.MPI.Op or callable of two objects, default SUM
            The operation; ``AVG`` adds, and divides by the number of contributors.
        root : int, default 0
            The rank that receives the result.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds for each of its collectives.

        Returns
        -------
        object
            At the root the result, over ``outcome.contributors``; None elsewhere.

        Raises
        ------
        TypeError
            `op` is no operation; nothing was sent.
        RankFailedError, ValueError, TransferTimeoutError, ClosedError, MpiError
            As `gather` raises them; at the root also what `op` raises.
        """
        function = _function(op)
        objects = self.gather(sendobj, root, on_failure=on_failure, timeout_s=timeout_s)
        return None if objects is None else self._folded(objects, op, function, self.size)

    def allreduce(
        self,
        sendobj: Any,
        op: Op | MPI.Op | Fold = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Fold objects at all ranks, in the order of the ranks. Collective; see `allgather`.

        Every rank folds by itself: the results are alike if `op` gives the same for the same.
        Parameters, errors and ``outcome`` are those of `reduce`, without a root.

        Returns
        -------
        object
            The result, over ``outcome.contributors``.
        """
        function = _function(op)
        objects = self.allgather(sendobj, on_failure=on_failure, timeout_s=timeout_s)
        return self._folded(objects, op, function, self.size)

    def scan(
        self,
        sendobj: Any,
        op: Op | MPI.Op | Fold = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Fold the objects of the ranks up to and with this one. Collective; see `allgather`.

        Parameters, errors and ``outcome`` are those of `reduce`, without a root.

        Returns
        -------
        object
            The result, over the contributors whose rank is not higher than this one's.
        """
        function = _function(op)
        objects = self.allgather(sendobj, on_failure=on_failure, timeout_s=timeout_s)
        return self._folded(objects, op, function, self.rank + 1)

    def exscan(
        self,
        sendobj: Any,
        op: Op | MPI.Op | Fold = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Fold the objects of the ranks before this one. Collective; see `allgather`.

        Parameters, errors and ``outcome`` are those of `reduce`, without a root.

        Returns
        -------
        object
            The result, over the contributors whose rank is lower than this one's; None if there
            are none.
        """
        function = _function(op)
        objects = self.allgather(sendobj, on_failure=on_failure, timeout_s=timeout_s)
        return self._folded(objects, op, function, self.rank)

    # ---- pieces ---------------------------------------------------------------------------

    def _share_lengths(
        self, sendobj: Any, more: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """This rank's piece; the slots of all ranks, and the lengths that are in them."""
        piece = _packed(sendobj)
        slots = np.empty((self.size, _SLOT_BYTES), np.uint8)
        self._outcome = self.Allgather(_slot(piece), slots, **more)
        return piece, slots, slots[:, :8].copy().view(np.int64)[:, 0]

    def _pieces_of(self, objects: Sequence[Any] | None) -> list[np.ndarray]:
        if objects is None:
            raise TypeError("sendobj must be a sequence with one object for each rank, not None")
        pieces = [_packed(one) for one in objects]
        if len(pieces) != self.size:
            raise ValueError(
                f"sendobj has {len(pieces)} objects, but there are {self.size} ranks (also those "
                "that are gone have their place)"
            )
        return pieces

    def _contributed(self, rank: int) -> bool:
        return self._outcome is not None and rank in self._outcome.contributors

    def _objects_in(self, slots: np.ndarray, lengths: np.ndarray) -> list[Any]:
        return [
            _unpacked(slots[rank, 8 : 8 + length]) if self._contributed(rank) else None
            for rank, length in enumerate(lengths)
        ]

    def _objects_of(self, everything: np.ndarray | None, lengths: np.ndarray) -> list[Any]:
        assert everything is not None
        ends = np.cumsum(lengths)
        return [
            _unpacked(everything[end - length : end]) if self._contributed(rank) else None
            for rank, (end, length) in enumerate(zip(ends, lengths, strict=True))
        ]

    def _folded(
        self, objects: list[Any], op: Op | MPI.Op | Fold, function: Fold, until: int
    ) -> Any:
        ranks = [rank for rank in range(until) if self._contributed(rank)]
        if not ranks:
            return None
        result = objects[ranks[0]]
        for rank in ranks[1:]:
            result = function(result, objects[rank])
        return result / len(ranks) if op is AVG else result


def _function(op: Any) -> Fold:
    if isinstance(op, Op):
        return _FUNCTIONS[op.name] if op.function is None else op.function
    if not callable(op):
        raise TypeError(f"op must be an operation or a callable of two objects, not {op!r}")
    function: Fold = op
    return function


def _packed(obj: Any) -> np.ndarray:
    """An object as bytes: lengths, pickle, then the memory of its arrays at aligned places."""
    outside: list[pickle.PickleBuffer] = []
    body = pickle.dumps(obj, protocol=5, buffer_callback=outside.append)
    raws = [buffer.raw() for buffer in outside]
    head = np.array([len(raws), len(body), *(raw.nbytes for raw in raws)], np.int64)
    at = _places(head)
    piece = np.empty(at[-1], np.uint8)
    piece[: head.nbytes] = head.view(np.uint8)
    piece[head.nbytes : head.nbytes + len(body)] = np.frombuffer(body, np.uint8)
    for start, raw in zip(at, raws, strict=False):
        piece[start : start + raw.nbytes] = np.frombuffer(raw, np.uint8)
    return piece


def _places(head: np.ndarray) -> list[int]:
    """Where the memory of each array starts in a piece, and where the piece ends."""
    end = head.nbytes + int(head[1])
    places = []
    for nbytes in head[2:]:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        places.append(start)
        end = start + int(nbytes)
    return [*places, end]


def _unpacked(piece: np.ndarray) -> Any:
    count = int(piece[:8].copy().view(np.int64)[0])
    head = piece[: 8 * (2 + count)].copy().view(np.int64)
    body = piece[head.nbytes : head.nbytes + int(head[1])]
    raws = [
        piece[start : start + int(nbytes)]
        for start, nbytes in zip(_places(head), head[2:], strict=False)
    ]
    return pickle.loads(body.data, buffers=[raw.data for raw in raws])


def _slot(piece: np.ndarray | None) -> np.ndarray:
    """The length of a piece, and the piece itself if it is short."""
    slot = np.zeros(_SLOT_BYTES, np.uint8)
    if piece is not None:
        slot[:8] = np.array([len(piece)], np.int64).view(np.uint8)
        if len(piece) <= _INLINE_BYTES:
            slot[8 : 8 + len(piece)] = piece
    return slot


def _length(slot: np.ndarray) -> int:
    return int(slot[:8].view(np.int64)[0])
