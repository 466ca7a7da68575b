"""What a task can ask for: its parameter ``ctx``."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from hopcoll.errors import WorkflowError

if TYPE_CHECKING:
    from hopcoll import Communicator
    from hopcoll.objects import ObjectRef
    from recovery.workflows.references import References
    from recovery.workflows.workflow import Workflow

__all__ = ["Done", "NotDoneError", "TaskContext"]


class Done:
    """What a ``verify`` function returns for an effect that was done, with what it had returned."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


class NotDoneError(Exception):
    """Raised by an external task that knows that nothing has happened outside.

    The attempt then counts as failed, and may be tried again; after any other exception it is not
    known whether the effect was done.
    """


class TaskContext:
    """The surroundings of one call of a task. Belongs to that call alone.

    Attributes
    ----------
    workflow_id, task_id, uuid : str
        The last is the workflow's as well, and no other's.
    attempt : int
        1 for the first.
    comm : Communicator or None
        Of the ranks of a gang; None elsewhere.
    references : References or None
        The objects, where the workflow has ranks.
    """

    def __init__(
        self,
        workflow_id: str,
        task_id: str,
        attempt: int,
        uuid: str,
        recall: Callable[[int, Callable[[], Any]], Any],
        cancelled: threading.Event | None = None,
        key: bool | str = False,
        comm: Communicator | None = None,
        begin: Callable[[str], Workflow] | None = None,
        references: References | None = None,
        known: tuple[bool, int] = (False, 0),
    ) -> None:
        self.workflow_id = workflow_id
        self.task_id = task_id
        self.attempt = attempt
        self.comm = comm
        self.uuid = uuid
        self._key = key
        self._recall = recall
        self._recalled = 0
        self._cancelled = cancelled
        self._begin = begin
        self.references = references
        self._known = known  # whether its arguments have refs, and how old they may be
        self._rng: np.random.Generator | None = None

    def bare(self) -> tuple[Any, ...]:
        """What other ranks need to know, as something that can be sent."""
        who = self.workflow_id, self.task_id, self.attempt, self.uuid, self._key
        return (*who, *self._known)

    @classmethod
    def at(
        cls, bare: tuple[Any, ...], recall: Callable[[int, Callable[[], Any]], Any],
        references: References, comm: Communicator | None = None,
    ) -> TaskContext:  # fmt: skip
        """The context of a call at another rank than the leader."""
        workflow_id, task_id, attempt, uuid, key, *known = bare
        return cls(
            workflow_id, task_id, attempt, uuid, recall, None, key, comm, None, references,
            (known[0], known[1]),
        )  # fmt: skip

    @classmethod
    def from_bare(
        cls, bare: tuple[Any, ...], leading: TaskContext | None, comm: Communicator,
        references: References,
    ) -> TaskContext:  # fmt: skip
        """The context of a rank of a gang: what one of them recalls, all do."""

        def recall(number: int, ask: Callable[[], Any]) -> Any:
            told = None if leading is None else leading._recall(number, ask)
            leader = comm.parent_ranks.index(min(comm.parent_ranks))
            return comm.bcast(told, root=leader)

        return cls.at(bare, recall, references, comm)

    @property
    def idempotency_key(self) -> str:
        """A text for this effect of this workflow, the same in every attempt."""
        if isinstance(self._key, str):
            return self._key
        return f"{self.uuid}/{self.task_id}"

    @property
    def rng(self) -> np.random.Generator:
        """Random numbers that are the same in every attempt: a generator of this task's own."""
        if self._rng is None:
            seed = hashlib.sha256(f"{self.uuid}/{self.task_id}".encode()).digest()
            self._rng = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "big")))
        return self._rng

    def workflow(self, name: str) -> Workflow:
        """Return another workflow of the same store, for this task to run: a *sub-workflow*.

        It has a journal of its own, and the name ``WORKFLOW.NAME``, whichever attempt runs it: an
        attempt that comes later gets its stored output, or goes on with it. To the workflow that
        the task is of it is outside, so the task has to be ``external=True`` with an
        ``idempotency_key`` (which the name is).

        Raises
        ------
        WorkflowError
            The task is not annotated so.
        """
        if self._begin is None or not self._key:
            raise WorkflowError(
                f"{self.task_id} runs a workflow of its own, which may have effects: annotate it "
                "with external=True, idempotency_key=True"
            )
        return self._begin(f"{self.workflow_id}.{name}")

    def _objects(self) -> References:
        if self.references is None:
            raise WorkflowError(
                f"{self.task_id} uses references, and the workflow has no ranks to keep objects: "
                "give Workflow a communicator (comm=)"
            )
        return self.references

    def put(self, value: Any) -> ObjectRef:
        """Put a copy of an array into this rank's memory, for the task to return its ref.

        Nothing of it goes to the disk but by a checkpoint. A ref that the value does not have in
        the end is deleted; one that is lost has the task run again. Local; blocks for a copy.

        Raises
        ------
        WorkflowError
            The workflow has no ranks.
        TypeError, ValueError, ObjectStoreFullError
            As `hopcoll.objects.Objects.put` does.
        """
        return self._objects().put(value)

    def get(self, ref: ObjectRef) -> np.ndarray:
        """Return the object of a ref, a read-only array; where it is lost, it is made again first.

        Blocks for that. An attempt whose input will be another one is void: it raises, and runs
        again with the new one.

        Raises
        ------
        WorkflowError
            The workflow has no ranks.
        ObjectLostError, ObjectDeletedError
            The attempt is void: let it through.
        ObjectStoreFullError, ReductionError
            As `hopcoll.objects.Objects.get` does.
        """
        return self._objects().get(ref)

    def reduce(
        self, refs: Iterable[ObjectRef], op: Any = None, count: int | None = None
    ) -> ObjectRef:
        """Have an object made of others (their sum), or of the first `count` that exist.

        As `hopcoll.objects.Objects.reduce`; inputs that are lost are made again. Which ones it took
        is written into the journal. A task that returns its ref is not deterministic.

        Raises
        ------
        WorkflowError
            The workflow has no ranks.
        TypeError, ValueError
            As there.
        """
        return self._objects().reduce(refs, op, count)

    def contributors(self, ref: ObjectRef) -> tuple[ObjectRef, ...]:
        """Return which inputs a reduction of this attempt took; blocks until that is final.

        Raises
        ------
        WorkflowError, ObjectLostError, ObjectDeletedError, ReductionError
            As `get` does.
        """
        return self._objects().contributors(ref)

    def now(self) -> float:
        """Return the time (seconds since 1970), as it was when this call was first made."""
        import time

        return float(self.recall(time.time))

    def recall(self, ask: Callable[[], Any]) -> Any:
        """Return what `ask()` returned when this call was first made: something JSON can carry.

        For what a deterministic task learns from outside. Calls are told apart by their order. In a
        gang it is collective, like `now`.
        """
        number = self._recalled
        self._recalled += 1
        return self._recall(number, ask)

    @property
    def cancelled(self) -> bool:
        """Whether the workflow is to end; a long task may look, and return early by raising."""
        return self._cancelled is not None and self._cancelled.is_set()
