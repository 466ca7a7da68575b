"""What a collective returns: an outcome at once, or a request that becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hopcoll import _report
from hopcoll.config import seconds
from hopcoll.errors import (
    ClosedError,
    MissedError,
    MpiError,
    RankFailedError,
    TransferTimeoutError,
)

if TYPE_CHECKING:
    from hopcoll._calls import Calls

__all__ = ["Outcome", "Request"]

#: The kinds of operation, as the engine numbers them, and their names.
BCAST, REDUCE, ALLREDUCE, BARRIER, GATHER, ALLGATHER, SCATTER, ALLTOALL = range(8)
REDUCE_SCATTER, SCAN, EXSCAN = range(8, 11)
KIND_NAMES: Final = (
    "Bcast",
    "Reduce",
    "Allreduce",
    "Barrier",
    "Gather",
    "Allgather",
    "Scatter",
    "Alltoall",
) + ("Reduce_scatter_block", "Scan", "Exscan")
_FROM_ROOT: Final = (BCAST, SCATTER)
_TO_ROOT: Final = (REDUCE, GATHER)

#: How an operation ended, as the engine numbers it.
OK, ROOT_LOST, RANK_FAILED, MISMATCH, CLOSED, MPI_ERROR, STOPPED, MISSED = range(8)

FORKED: Final = (
    "the communicator belongs to the parent of this forked process, and MPI cannot be used here; "
    "start processes that need MPI with mpirun, and leave this one to computing"
)


class Outcome:
    """How a collective ended. Alike at all survivors; immutable.

    Attributes
    ----------
    contributors : tuple of int
        For a reduction the ranks whose input is in the result, each exactly once (in a Scan or
        Exscan a dead rank behind all survivors, which goes into no result of theirs, may be among
        them although it had not called); for a Gather,
        Allgather and Alltoall those whose blocks are; for a Bcast, Scatter and Barrier the members
        of the epoch in which it completed. Ascending, numbered as at the start. Every rank that is
        alive when the last survivor returns is among them, except where a ``quorum`` or a
        ``deadline_s`` leaves out who came too late.
    epoch : int
        The version of the membership in which the operation completed: 0 at the start, one more
        with each decision that ranks are gone.
    root_lost : bool
        True if the root of a Reduce or Gather is gone, and the result with it; `contributors` then
        says nothing.
    """

    __slots__ = ("_operation", "contributors", "epoch", "root_lost")

    contributors: tuple[int, ...]
    epoch: int
    root_lost: bool
    _operation: Any

    def __init__(self, operation: Any) -> None:
        store = object.__setattr__
        store(self, "contributors", operation.contributors)
        store(self, "epoch", operation.epoch)
        store(self, "root_lost", operation.status == ROOT_LOST)
        store(self, "_operation", operation)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Outcome is immutable: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Outcome is immutable: {name} cannot be deleted")

    def __repr__(self) -> str:
        lost = ", root_lost=True" if self.root_lost else ""
        return f"Outcome(contributors={self.contributors}, epoch={self.epoch}{lost})"

    def stable(self) -> bool:
        """Tell whether nothing that happens can change this result any more.

        Local; does not block. A call may return here before other ranks have the result. If ranks
        die in between, the others still end with the same bytes and contributors as long as one
        rank that has returned is alive; if all of those die first, the operation may be redone
        without them. Ask before doing what cannot be undone: a commit, a message to the outside.

        Returns
        -------
        bool
            True once every living rank has completed the operation; it never turns False again.
        """
        return bool(self._operation.stable())


class Request:
    """A collective that is under way; made by the I-forms of `hopcoll.Communicator`.

    Its buffers are pinned until it completes: the engine holds a reference, so the arrays may go
    out of scope, but the contents of the send buffer must not be changed, and those of the receive
    buffer are undefined, until `wait` or `test` has returned the outcome.

    A request that is garbage collected while it is under way is not cancelled. Its operation
    completes in the background and writes to the receive buffer; the other ranks notice nothing.
    Only its outcome, or its error, is never seen at this rank.

    Not to be used by two threads at once.
    """

    __slots__ = ("__weakref__", "_communicator", "_failed", "_kind", "_operation", "_outcome",
                 "_raises", "_root", "_timeout_s", "_vector")  # fmt: skip

    def __init__(
        self,
        communicator: Calls,
        operation: Any,
        kind: int,
        *,
        root: int,
        raises: bool,
        timeout_s: float | None,
        vector: bool = False,
    ) -> None:
        self._communicator = communicator
        self._operation = operation
        self._kind = kind
        self._root = root
        self._raises = raises
        self._timeout_s = timeout_s
        self._vector = vector
        self._outcome: Outcome | None = None
        # The error itself is made anew each time: a kept one would keep the caller's frames.
        self._failed = False

    def __repr__(self) -> str:
        if self._outcome is not None:
            state = repr(self._outcome)
        else:
            state = "failed" if self._failed else "under way"
        return f"<Request {self._name()}: {state}>"

    @property
    def outcome(self) -> Outcome | None:
        """The outcome, or None as long as neither `wait` nor `test` has found it. Local."""
        return self._outcome

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Wait until the operation is complete.

        Blocks, without the GIL. Called again after that, it returns the same outcome or raises
        the same error at once. A KeyboardInterrupt leaves the request as it was: the operation
        goes on, and `wait` can be called again.

        Parameters
        ----------
        timeout_s : float, optional
            At most so many seconds; ``math.inf`` waits without limit. None stands for the limit
            that was given to the call that made the request, or else to the communicator.

        Returns
        -------
        Outcome

        Raises
        ------
        TransferTimeoutError
            It did not complete in time. It goes on in the background, its buffers stay pinned,
            and `wait` can be called again.
        RankFailedError
            The root of a Bcast died before the survivors together held all of it, or that of a
            Scatter before all had their blocks; or
            ``on_failure="raise"`` holds and a rank was lost. The receive buffer is undefined (but
            that of an ``IN_PLACE`` operation is as it was before), the send buffer unchanged.
        ValueError
            The ranks called different operations; the message names the groups that differ. The
            receive buffer is undefined, and every later operation of this communicator raises
            the same.
        ClosedError
            The communicator was closed meanwhile (the receive buffer is undefined), or this is a
            forked child (the buffers are the child's own copies).
        MissedError
            This rank called a partial operation so late that its result is kept by nobody.
        StaleEpochError
            The others took this rank for dead, and went on without it.
        MinorityError
            Too few ranks are within reach to go on.
        MpiError
            MPI failed in a way that is no rank's death; the receive buffer is undefined.
        """
        if self._outcome is not None:
            return self._outcome
        self._check()
        limit_s = self._timeout_s if timeout_s is None else seconds("timeout_s", timeout_s)
        if not self._communicator._engine.wait(self._operation, limit_s):
            engine = self._communicator._engine
            error = TransferTimeoutError(
                f"{self._name()} did not complete within {limit_s:g} s"
                f"{_report.awaited_text(engine.awaited(self._operation))}; it goes on in the "
                "background, and its buffers stay pinned until it is complete"
                f"{_report.flight_text(engine)}"
            )
            error.request = self
            raise error
        return self._finish()

    def test(self) -> tuple[bool, Outcome | None]:
        """Look whether the operation is complete, and make some progress if it is not.

        Local; does not block. Called again after a success, it returns the same.

        Returns
        -------
        complete : bool
            Whether it is.
        outcome : Outcome or None
            The outcome if it is.

        Raises
        ------
        RankFailedError, ValueError, ClosedError, MpiError
            As `wait` does, and again on each later call.
        """
        if self._outcome is not None:
            return True, self._outcome
        self._check()
        if not self._communicator._engine.test(self._operation):
            return False, None
        return True, self._finish()

    def Wait(self) -> bool:
        """Wait as `wait` does; True, as mpi4py spells it. The outcome is in `outcome`."""
        self.wait()
        return True

    def Test(self) -> bool:
        """Tell whether the operation is complete, as mpi4py spells it; see `test`."""
        return self.test()[0]

    def _name(self) -> str:
        name = KIND_NAMES[self._kind]
        if self._vector:
            name = "Reduce_scatter" if self._kind == REDUCE_SCATTER else name + "v"
        return f"{name} (operation {self._operation.seq} of this communicator)"

    def _check(self) -> None:
        if self._failed:
            self._finish()
        if self._communicator._forked:
            raise ClosedError(FORKED)

    def _finish(self) -> Outcome:
        """Turn the engine's status into an outcome or an error: the one table that does it."""
        operation = self._operation
        status = operation.status
        if status == OK or (status == ROOT_LOST and self._kind in _TO_ROOT and not self._raises):
            self._outcome = Outcome(operation)
            return self._outcome
        self._failed = True
        if status in (ROOT_LOST, RANK_FAILED):
            raise self._rank_failed()
        if status == MISMATCH:
            raise ValueError(operation.message)
        if status == STOPPED:
            raise self._communicator._engine.stopped_error(self._name())
        if status == MISSED:
            raise MissedError(
                f"{self._name()} is over, and its result is kept by nobody any more: this rank "
                "called it too late (late_bytes, HOPCOLL_LATE_BYTES: how much is kept)",
                operation.seq,
            )
        if status == CLOSED:
            raise ClosedError(f"{self._name()} was under way when its communicator closed")
        raise MpiError(operation.message or f"{self._name()} failed inside MPI")

    def _rank_failed(self) -> RankFailedError:
        failed = tuple(self._operation.failed)
        if not failed and self._kind in _FROM_ROOT + _TO_ROOT:
            failed = (self._root,)
        lost = ", ".join(str(rank) for rank in failed)
        noun = "rank" if len(failed) == 1 else "ranks"
        rooted = self._kind in _FROM_ROOT + _TO_ROOT
        root = " with its root" if rooted and self._root in failed else ""
        return RankFailedError(
            f"{self._name()} lost {noun} {lost}{root}; "
            f"the survivors go on in epoch {self._operation.epoch}",
            failed,
            self._operation.epoch,
        )
