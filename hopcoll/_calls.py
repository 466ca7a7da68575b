"""What all collectives share: the checks before a call counts, and its start."""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hopcoll.buffers import hash_of
from hopcoll.config import Config, seconds
from hopcoll.errors import ClosedError, DivergedError
from hopcoll.outcome import FORKED, Request

if TYPE_CHECKING:
    from hopcoll.buffers import Blocks, Buffer

__all__ = [
    "ARRIVAL_FLAG",
    "CARRY_FLAG",
    "IN_PLACE_FLAG",
    "ORDERED_FLAG",
    "PARTIAL_FLAG",
    "VECTOR_FLAG",
    "Calls",
    "address_of",
    "is_in_place",
    "layout_of",
    "number_of",
    "on_failure_flags",
]

# Flags of an operation, as the engine numbers them.
IN_PLACE_FLAG: Final = 1
_RAISE: Final = 2
VECTOR_FLAG: Final = 4
ORDERED_FLAG: Final = 8
PARTIAL_FLAG: Final = 16
CARRY_FLAG: Final = 32
ARRIVAL_FLAG: Final = 64

_ON_FAILURE: Final = {"survivors": 0, "raise": _RAISE}


class Calls:
    """The state of a communicator, and the checks that each call makes.

    Each check raises before the operation has taken its place in the order.
    """

    rank: int
    size: int
    config: Config
    _engine: Any
    _flags: int
    _closed: bool
    _forked: bool
    _partials: int
    Allgather: Any  # of a part that is built on this one

    def _open_engine(self) -> Any:
        if self._forked:
            raise ClosedError(FORKED)
        if self._closed:
            raise ClosedError("the communicator is closed")
        return self._engine

    def _check_root(self, root: int) -> int:
        try:
            number = operator.index(root)
        except TypeError:
            raise TypeError(f"root must be an integer, not {type(root).__name__}") from None
        if not 0 <= number < self.size:
            raise ValueError(f"root must be from 0 to {self.size - 1}, not {number}")
        return number

    def _check_call(
        self, on_failure: str | None, timeout_s: float | None
    ) -> tuple[int, float | None]:
        flags = self._flags if on_failure is None else on_failure_flags(on_failure)
        if timeout_s is None:
            return flags, self.config.timeout_s
        return flags, seconds("timeout_s", timeout_s)

    def _check_check(self, check: str | None) -> None:
        if check not in (None, "hash"):
            raise ValueError(f"check must be 'hash' or None, not {check!r}")

    def _compare_replicas(self, name: str, buf: Any, timeout_s: float | None) -> None:
        """Compare a hash of what must be alike at all ranks; a collective of its own."""
        own = np.array([hash_of(buf)], np.uint32)
        every = np.zeros(self.size, np.uint32)
        members = self.Allgather(own, every, timeout_s=timeout_s).contributors
        groups: dict[int, list[int]] = {}
        for rank in members:
            groups.setdefault(int(every[rank]), []).append(rank)
        if len(groups) > 1:
            text = "; ".join(
                f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} have "
                f"{digest:08x}"
                for digest, ranks in groups.items()
            )
            raise DivergedError(f"{name}: results differ between ranks: {text}", groups.values())

    def _begin(
        self,
        engine: Any,
        kind: int,
        code: int,
        op_code: int,
        root: int,
        count: int,
        send: tuple[int, Any],
        recv: tuple[int, Any],
        flags: int,
        limit_s: float | None,
        lengths: tuple[Any, Any, Any, Any] | None = None,
        function: tuple[Any, np.dtype] | None = None,
        agreed: int = 0,
        deadline_s: float | None = None,
    ) -> Request:
        """Start an operation; `send` and `recv` are an address and what keeps it valid."""
        operation = engine.start(
            kind, code, op_code, root, count, send[0], recv[0], flags, (send[1], recv[1]),
            lengths, function, agreed, limit_s, deadline_s,
        )  # fmt: skip
        return Request(
            self,
            operation,
            kind,
            root=root,
            raises=bool(flags & _RAISE),
            timeout_s=limit_s,
            vector=bool(flags & VECTOR_FLAG),
        )


def on_failure_flags(on_failure: str) -> int:
    try:
        return _ON_FAILURE[on_failure]
    except (KeyError, TypeError):
        raise ValueError(f"on_failure must be 'survivors' or 'raise', not {on_failure!r}") from None


def is_in_place(buf: Any) -> bool:
    # mpi4py's constant is a singleton; it can only be here if mpi4py.MPI is loaded already.
    return buf is None or type(buf).__name__ == "InPlaceType"


def address_of(memory: Buffer | Blocks | None) -> tuple[int, Any]:
    """The address that the engine gets, and what keeps it valid; of no memory: 0 and None."""
    if memory is None:
        return 0, None
    buffer = getattr(memory, "buffer", memory)
    return buffer.address, buffer.array


def layout_of(nbytes: np.ndarray) -> int:
    """A number that two ranks have in common where all their blocks are of the same lengths."""
    return number_of(np.ascontiguousarray(nbytes).tobytes())


def number_of(what: bytes) -> int:
    """A number that two ranks have in common where they agree; never 0."""
    return int.from_bytes(hashlib.blake2b(what, digest_size=8).digest(), "little") | 1
