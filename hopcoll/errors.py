"""Every exception that hopcoll raises for something that is not the caller's mistake.

A caller's mistake (a wrong dtype, a buffer that is not contiguous, a root out of range) is a plain
``TypeError``, ``ValueError`` or ``BufferError`` whose message starts with the noun that is wrong.
Everything else is in this tree, and the class says whose fault it was::

    HopcollError
    ├── MpiError                 the MPI library returned an error that is no failure of a rank
    ├── RankFailedError          the world: a rank died, and the result went with it
    │   ├── MinorityError            too few ranks are within reach to go on
    │   ├── ObjectLostError          no rank that lives has all of an object
    │   └── TooFewRanksError         fewer are left than the program wants
    ├── MissedError             the world: this rank came too late, and nobody keeps the result
    ├── StaleEpochError          the world: this rank was silent, and the others went on without it
    ├── DivergedError            replicas that must be alike are not: memory, or a user's operation
    ├── TransferTimeoutError     the world, perhaps: nothing came in time (also a TimeoutError)
    ├── ObjectDeletedError       the caller, or another: the object was deleted
    ├── ObjectExistsError        the caller, or another: the ref has an object already
    ├── ObjectStoreFullError     the caller: no room is left for objects (also a MemoryError)
    ├── ClosedError              the caller: the communicator was closed, or belongs to a parent
    ├── ProtocolError            nobody's but ours: a bug, or a peer that sends nonsense
    ├── CheckpointError          a file of a checkpoint
    │   ├── CheckpointCorruptError       its bytes are not those that were written
    │   ├── CheckpointFencedError        another process took the store over
    │   ├── CheckpointMismatchError      it is sound, but it belongs to another job or layout
    │   └── CheckpointNotFoundError      there is none (also a FileNotFoundError)
    └── WorkflowError            a workflow cannot go on, or not here
        ├── WorkflowFencedError          another process took the workflow over
        ├── WorkflowRunningError         another process runs it
        ├── WorkflowMismatchError        there is another workflow of this name
        ├── WorkflowNotFoundError        there is none (also a FileNotFoundError)
        ├── WorkflowCancelledError       somebody cancelled it
        ├── TaskFailedError              a task of it failed
        └── EffectUnknownError           whether an effect was done, only a person can tell

All of them can be pickled, so they pass through process pools unharmed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, ClassVar

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointFencedError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "ClosedError",
    "DivergedError",
    "EffectUnknownError",
    "HopcollError",
    "MinorityError",
    "MissedError",
    "MpiError",
    "ObjectDeletedError",
    "ObjectExistsError",
    "ObjectLostError",
    "ObjectStoreFullError",
    "ProtocolError",
    "RankFailedError",
    "ReductionError",
    "StaleEpochError",
    "TaskFailedError",
    "TooFewRanksError",
    "TransferTimeoutError",
    "WorkflowCancelledError",
    "WorkflowError",
    "WorkflowFencedError",
    "WorkflowMismatchError",
    "WorkflowNotFoundError",
    "WorkflowRunningError",
]


class HopcollError(Exception):
    """The root of the tree: ``except HopcollError`` catches all that is not a caller's mistake."""

    _fields: ClassVar[tuple[str, ...]] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException would call the class again with .args alone and lose the fields.
        message = self.args[0] if self.args else ""
        return type(self), (message, *(getattr(self, name) for name in self._fields))


class MpiError(HopcollError):
    """The MPI library returned an error that is not the failure of a rank.

    The communicator is unusable afterwards. Receive buffers hold undefined bytes, send buffers are
    unchanged.

    Parameters
    ----------
    message : str
        What was called, and the text that MPI gives for the error.
    error_class : int, optional
        The MPI error class (``MPI.ERR_*``), or -1 where it is not known.
    peer : int or None, optional
        The rank at the other end, numbered as at the start, where one is known.
    """

    _fields = ("error_class", "peer")

    def __init__(self, message: str = "", error_class: int = -1, peer: int | None = None) -> None:
        super().__init__(message)
        self.error_class = error_class
        self.peer = peer


class RankFailedError(HopcollError):
    """A rank failed, and what it held cannot be had from anybody else.

    Raised at all survivors alike: from a broadcast whose root died before the survivors together
    held all of its bytes, and under ``on_failure="raise"`` from the first operation whose
    contributors a failure changed. The communicator stays usable: the survivors are in
    ``comm.alive``. Receive buffers of the failed operation hold undefined bytes; send buffers are
    unchanged, and so is the buffer of an ``IN_PLACE`` operation.

    Parameters
    ----------
    message : str
        Which operation failed, and why.
    ranks : iterable of int, optional
        The ranks that failed, numbered as at the start.
    epoch : int, optional
        The epoch in which the survivors go on.
    """

    _fields = ("ranks", "epoch")

    def __init__(self, message: str = "", ranks: Iterable[int] = (), epoch: int = 0) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.epoch = epoch


class MinorityError(RankFailedError):
    """Ranks are out of reach that are not known to be dead, and too few are left to decide.

    Raised by every operation that was not complete, and by all later ones, at each rank that is
    still in touch with this one: the others may go on, as long as they are more than half of the
    last epoch, so this side must not. Receive buffers hold undefined bytes; send buffers are
    unchanged, and so is the buffer of an ``IN_PLACE`` operation. What had been returned before, and
    was not `stable`, the others may not have.

    Parameters
    ----------
    message : str
        Who is out of reach.
    ranks : iterable of int, optional
        These ranks, numbered as at the start.
    epoch : int, optional
        The last epoch of which this rank was a member.
    """


class ObjectLostError(RankFailedError):
    """Every complete copy of an object was at ranks that died, left, or were left out.

    Raised by a get of it at any rank; nothing else is disturbed. The ref may be put again.

    Parameters
    ----------
    message : str
        Which object.
    ranks : iterable of int, optional
        The ranks that failed, where they are known.
    epoch : int, optional
        The epoch in which the survivors go on, where it is known.
    ref : ObjectRef, optional
        The object's.
    """

    _fields = ("ranks", "epoch", "ref")

    def __init__(
        self, message: str = "", ranks: Iterable[int] = (), epoch: int = 0, ref: Any = None
    ) -> None:
        super().__init__(message, ranks, epoch)
        self.ref = ref


class TooFewRanksError(RankFailedError):
    """Fewer ranks are left than the program wants (``min_ranks``), so it stops.

    Raised at all survivors alike. The result of the operation stands, with fewer contributors.

    Parameters
    ----------
    message : str
        How many are left, and which were lost in which steps.
    ranks : iterable of int, optional
        Those that were lost last, numbered as at the start.
    epoch : int, optional
        The epoch in which the survivors are.
    """


class MissedError(HopcollError):
    """This rank called a partial operation so late that nobody keeps its result any more.

    Raised at this rank alone; the others have the result, without this rank's input. With
    ``late="carry"`` the input goes into a later operation all the same. The communicator stays
    usable, and the next operation may be had: results are forgotten from the oldest on. The receive
    buffer holds undefined bytes (``IN_PLACE``: the input), the send buffer is unchanged.

    Parameters
    ----------
    message : str
        Which operation.
    seq : int, optional
        Its number, counted from 0 in the order of the communicator's operations.
    """

    _fields = ("seq",)

    def __init__(self, message: str = "", seq: int = -1) -> None:
        super().__init__(message)
        self.seq = seq


class StaleEpochError(HopcollError):
    """The other ranks took this one for dead, and went on without it.

    It was stopped, or out of reach, for longer than ``detect_s``. Raised by every operation that
    was not complete and by all later ones; buffers are as after a `MinorityError`.

    Parameters
    ----------
    message : str
        What happened.
    epoch : int, optional
        The last epoch of which this rank was a member.
    """

    _fields = ("epoch",)

    def __init__(self, message: str = "", epoch: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch


class DivergedError(HopcollError):
    """A result that all ranks must have alike differs between them.

    Found by ``check="hash"``, and raised at all ranks. hopcoll makes each value once and copies
    it, so this is memory that failed, a write beside the result, or an operation of the caller's
    (`Op.Create`) that does not always give the same. The receive buffers are as they were found.

    Parameters
    ----------
    message : str
        Which ranks have what.
    groups : iterable of iterable of int, optional
        The ranks that have the same.
    """

    _fields = ("groups",)

    def __init__(self, message: str = "", groups: Iterable[Iterable[int]] = ()) -> None:
        super().__init__(message)
        self.groups = tuple(tuple(ranks) for ranks in groups)


class TransferTimeoutError(HopcollError, TimeoutError):
    """An operation did not complete within its timeout.

    It was not cancelled: it goes on in the background, its buffers stay pinned, and `request.wait`
    may still find it complete. Until then the send buffer must not be changed and the receive
    buffer holds undefined bytes.

    Parameters
    ----------
    message : str
        What was waited for, and for how long.
    peer : int or None, optional
        The rank that was waited for, where one is known.
    watermark_bytes : int, optional
        The contiguous prefix that had been received, in bytes.

    Attributes
    ----------
    request : Request or None
        The request of the operation, also where a blocking call raised; None where nothing was
        started.
    """

    _fields = ("peer", "watermark_bytes")
    request: Any = None

    def __init__(
        self, message: str = "", peer: int | None = None, watermark_bytes: int = 0
    ) -> None:
        super().__init__(message)
        self.peer = peer
        self.watermark_bytes = watermark_bytes


class ObjectDeletedError(HopcollError):
    """Somebody deleted the object; it may be put again.

    Parameters
    ----------
    message : str
        Which object.
    ref : ObjectRef, optional
        Its ref.
    """

    _fields = ("ref",)

    def __init__(self, message: str = "", ref: Any = None) -> None:
        super().__init__(message)
        self.ref = ref


class ObjectExistsError(HopcollError):
    """The ref has an object already, and an object cannot be changed. Nothing was put.

    Parameters
    ----------
    message : str
        Which object.
    ref : ObjectRef, optional
        Its ref.
    """

    _fields = ("ref",)

    def __init__(self, message: str = "", ref: Any = None) -> None:
        super().__init__(message)
        self.ref = ref


class ReductionError(HopcollError):
    """The result of a reduction of objects cannot be; raised by whoever asks for it.

    Nothing else is disturbed: the inputs stay as they are.

    Parameters
    ----------
    message : str
        Which inputs, and what is wrong with them.
    ref : ObjectRef, optional
        The result's ref.
    inputs : iterable of ObjectRef, optional
        The inputs.
    """

    _fields = ("ref", "inputs")

    def __init__(self, message: str = "", ref: Any = None, inputs: Iterable[Any] = ()) -> None:
        super().__init__(message)
        self.ref = ref
        self.inputs = tuple(inputs)


class ObjectStoreFullError(HopcollError, MemoryError):
    """An object does not fit into a rank's memory for objects. Raised at this rank alone.

    Parameters
    ----------
    message : str
        Which object, how much is used, and the setting that limits it.
    ref : ObjectRef, optional
        Its ref.
    """

    _fields = ("ref",)

    def __init__(self, message: str = "", ref: Any = None) -> None:
        super().__init__(message)
        self.ref = ref


class ClosedError(HopcollError):
    """The communicator is closed, or was made by the parent of this (forked) process.

    Nothing was sent and no buffer was touched by the call that raises it. An operation that was
    under way when the communicator closed leaves its receive buffer undefined.
    """


class ProtocolError(HopcollError):
    """A message that no correct rank can have sent: a bug here, or a corrupt peer.

    Never caught inside hopcoll. No buffer of an operation that was under way can be trusted.
    """


class CheckpointError(HopcollError):
    """A checkpoint could not be written or read; the arrays in memory are as they were.

    Parameters
    ----------
    message : str
        What is wrong with it.
    path : str or os.PathLike or None, optional
        The file or the folder that it is about.
    """

    _fields = ("path",)

    def __init__(self, message: str = "", path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message)
        self.path = path


class CheckpointCorruptError(CheckpointError):
    """The file is there, but its bytes are not those that were written."""


class CheckpointFencedError(CheckpointError):
    """Another process took the store over, and this one can commit nothing any more."""


class CheckpointMismatchError(CheckpointError):
    """The file is sound, but it belongs to another job, layout or version."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was asked for."""


class WorkflowError(HopcollError):
    """A workflow cannot go on, or not in this process; what it made durable is as it was."""


class WorkflowFencedError(WorkflowError):
    """Another process took the workflow over, and this one can record nothing any more.

    What was not reported durable before may count or not: the process that took over decides.
    """


class WorkflowRunningError(WorkflowError):
    """Another process runs the workflow; nothing was changed."""


class WorkflowMismatchError(WorkflowError):
    """The name is that of another graph, or of one with other arguments; nothing was changed."""


class WorkflowNotFoundError(WorkflowError, FileNotFoundError):
    """There is no workflow of this name."""


class WorkflowCancelledError(WorkflowError):
    """Somebody cancelled the workflow. It can be resumed."""


class TaskFailedError(WorkflowError):
    """A task failed for good, or its rollback did. The workflow can be resumed from there.

    Parameters
    ----------
    message : str
        Which, and why; the exception of the task is the cause (``__cause__``).
    task : str, optional
        Its identifier.
    """

    _fields = ("task",)

    def __init__(self, message: str = "", task: str = "") -> None:
        super().__init__(message)
        self.task = task


class EffectUnknownError(WorkflowError):
    """Whether an external effect was done is not known, and nothing can tell but a person.

    Its intent is durable and its end is not, and neither an idempotency key nor ``verify`` settles
    it. ``hopcoll wf resolve`` does; then the workflow can be resumed.

    Parameters
    ----------
    message : str
        Which, and what to do.
    task : str, optional
        Its identifier.
    """

    _fields = ("task",)

    def __init__(self, message: str = "", task: str = "") -> None:
        super().__init__(message)
        self.task = task
