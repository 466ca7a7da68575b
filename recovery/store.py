"""A store of checkpoints: `save` copies the state and returns, a thread makes it durable.

The thread does all that waits for the disk, one save at a time; so at most one save is under way,
and one copy of the state, in memory that is kept for the next one, is all that it costs. An error
of the thread is raised by the next call, once. With many ranks the threads of all make a save
together (saving.py), so all have the same errors when the same next call looks for them.
"""

from __future__ import annotations

import atexit
import contextlib
import operator
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hopcoll.errors import CheckpointError
from recovery.disk import Disk
from recovery.group import Group
from recovery.level import Problem, retention
from recovery.levels import Levels, Verdict
from recovery.log import Commit
from recovery.places import Level, named_levels
from recovery.restoring import collect
from recovery.saving import Job
from recovery.shards import check_compression
from recovery.state import Leaf, decode, encode

if TYPE_CHECKING:
    from hopcoll import Communicator

__all__ = ["CheckpointStore", "Restored", "Ticket"]

_ALIGN_BYTES = 64
#: What one thread copies at a time, and how many do.
_COPY_BYTES, _COPIERS = 4 << 20, 2


class Restored(NamedTuple):
    """What was saved: the step, and the state, which is the caller's to change."""

    step: int
    state: Any


class Ticket:
    """A save that may be under way.

    Attributes
    ----------
    step : int
    durable : bool
        Whether it is known to outlive a power cut, at the highest level.
    done : bool
        Whether it is over, also by an error.
    abandoned : bool
        Whether its caller went away before its end; then it is not committed.
    """

    def __init__(self, store: CheckpointStore, step: int) -> None:
        self.step = step
        self.durable = False
        self.done = False
        self.abandoned = False
        self._store = store
        self._safe: frozenset[int] = frozenset()

    def safe_on(self, level: Level) -> bool:
        """Whether it is committed at one of the store's levels, as far as is known. Local."""
        return self._store.levels.index(level) in self._safe

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the save is durable.

        Parameters
        ----------
        timeout_s : float, optional
            That of the store where it is left out.

        Raises
        ------
        CheckpointError
            The save went wrong, and no other call has said so; or the time was over, and the save
            goes on.
        """
        self._store._wait(lambda: self.done, timeout_s)
        self._store._raise_error(self)


class CheckpointStore:
    """Saves the state of a program to a directory, so that the last save is whole whatever dies.

    A store that is opened for writing belongs to the process, or the job, that opened it last:
    whoever opened it earlier is refused from then on (`CheckpointFencedError`), also if it was only
    stopped and wakes up. Any number of processes may read, and prune with `prune`.

    With a communicator, all of its ranks share the store. Making one, `save`, `save_sync`,
    `restore`, `steps`, `prune` and `close` are then collective: every rank calls them, in the same
    order and with the same steps. A save is committed for all or for none, and all hear the same
    of it: the same tickets are durable, the same call raises the same error. Ranks may die at any
    time; those who are left go on. Each wait has a limit, `timeout_s`.

    An array in the state is *replicated*, the same at all ranks, and written once; so is
    everything else in it. A `Cut` is a rank's piece of a larger array. Where a rank dies with a
    piece that is not written yet, the save is not committed, and `RankFailedError` says so
    to all: restore, which cuts anew for those who are left, and go on from there.

    Parameters
    ----------
    path : path, Level, or sequence of Level
        A directory of its own, made where it is missing, on a file system with exclusive links
        and an fsync for folders (this is tried). All ranks must see it. Or the levels of the store,
        the ones that are saved to first first; the last one that is shared (without such, the last
        one) decides what is durable.
    comm : Communicator, optional
        It is duplicated.
    keep_last : int, default 2
        How many commits stay. With 2, one that the disk spoils leaves the one before it.
    keep_every : int, optional
        Commits of steps that are multiples of it stay for good.
    compression : {None, "blosc2", "zstd"}
        Of arrays from 64 KiB. Needs ``pip install 'hopcoll[compression]'``.
    writers : {"host", "rank"}, default "host"
        Over whom replicated arrays are spread: the lowest rank of each host, or all ranks. Pieces
        of cut arrays are always written by the ranks that have them.
    check_replicas : bool, default True
        Whether the ranks compare hashes of what is replicated.
    allow_pickle : bool, default False
        Whether objects of other types are pickled, and loaded. Loading can run any code.
    readonly : bool, default False
        Take nothing over and change nothing.
    timeout_s : float, default 600
        How long a call waits for the disk, and for the other ranks.
    host : str, optional
        The name of this rank's host; what the system calls it where it is left out.
    disk : Disk, optional

    Raises
    ------
    ValueError
        An argument.
    CheckpointNotFoundError
        There is no store, and `readonly` is True.
    CheckpointMismatchError
        The directory holds something else, or a store of a newer version.
    CheckpointCorruptError
        The newest slot is corrupt; `hopcoll ckpt repair` makes the store go on from the one before.
    CheckpointError
        The directory cannot be written to, or its file system is not fit; or the ranks did not
        all come in time. With a communicator all of these are raised at all ranks.

    Notes
    -----
    Arrays that did not change since the commit before are not written again at a shared level.
    Memory: one copy of the state while the store is open, and what compression makes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Level | Sequence[Level],
        comm: Communicator | None = None,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        compression: str | None = None,
        writers: str = "host",
        check_replicas: bool = True,
        allow_pickle: bool = False,
        readonly: bool = False,
        timeout_s: float = 600.0,
        host: str | None = None,
        disk: Disk | None = None,
    ) -> None:
        retain = _checked_retention(keep_last, keep_every)
        check_compression(compression)
        if writers not in ("host", "rank"):
            raise ValueError(f"writers must be 'host' or 'rank', not {writers!r}")
        self.levels = named_levels(path)
        self._allow_pickle = allow_pickle
        self._readonly = readonly
        self._timeout_s = timeout_s
        self._group = Group(comm, host, timeout_s)
        self._all = Levels(
            self._group,
            self.levels,
            disk or Disk(),
            retain=retain,
            compression=compression,
            writers=writers,
            check_replicas=check_replicas,
            readonly=readonly,
        )
        self._callbacks: list[Callable[[int], Any]] = []
        self._staging = _Staging()
        self._saves = 0
        self._last_step: int | None = self._all.step

        self._calls = threading.RLock()  # one caller at a time
        self._changed = threading.Condition()
        self._job: Callable[[], None] | None = None
        self._errors: list[tuple[Ticket | None, BaseException]] = []
        self._closed = False
        self._thread: threading.Thread | None = None

        # A reader sees what its owner may not have fsynced yet, and can vouch for nothing.
        self.durable_step: int | None = None if readonly else self._all.highest.last_step
        self._at_exit = partial(_finish, weakref.ref(self))
        if not readonly:
            # A daemon, which ends with the process; `_finish` gives it the time for its last save.
            self._thread = threading.Thread(target=self._run, name="hopcoll-store", daemon=True)
            self._thread.start()
            atexit.register(self._at_exit)

    @property
    def path(self) -> Any:
        """The directory of the highest level."""
        return self._all.highest.path

    # Saving

    def save(self, step: int, state: Any) -> Ticket:
        """Copy a state and have it saved; returns without waiting for the disk.

        Waits for the save before it, where that is still under way.

        Parameters
        ----------
        step : int
            0 or more, and higher than that of the last save (or of what was restored).
        state : object
            See `recovery.state`. May be changed as soon as this returns.

        Returns
        -------
        Ticket

        Raises
        ------
        TypeError, ValueError
            The state or the step; nothing was saved. The other ranks hear of it, by a
            `CheckpointError`, at their next call (where no level takes every step, at the next one
            that is due).
        CheckpointError
            A save before it went wrong, or does not end; this one was not taken.
        DivergedError, RankFailedError
            The same: ranks had different states; a piece of a cut array died with its rank.
        """
        return self._submit(step, state, staged=True)

    def save_sync(self, step: int, state: Any) -> None:
        """Save a state; when this returns, it is durable.

        Parameters and errors as for `save`. The arrays are written from where they are, so they
        must not change meanwhile.
        """
        ticket = self._submit(step, state, staged=False)
        try:
            ticket.wait()
        except BaseException:
            ticket.abandoned = True  # its arrays may change from now on
            raise

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all that was saved is durable.

        Raises
        ------
        CheckpointError
            Something went wrong, and no other call has said so; or the time was over.
        """
        self._wait(lambda: self._job is None, timeout_s)
        self._raise_error()

    def on_durable(self, callback: Callable[[int], Any]) -> None:
        """Have `callback(step)` called, in the store's thread, after each save that is durable.

        What it raises is raised by the next call of this rank alone.
        """
        self._callbacks.append(callback)

    def _submit(self, step: int, state: Any, *, staged: bool) -> Ticket:
        with self._calls:
            self._check_writable()
            self.wait()
            try:
                step = self._checked_step(step)
            except (TypeError, ValueError) as error:
                if not staged or self._all.always_due:
                    self._tell_others(error, staged)
                raise
            if staged and not self._all.is_due(step):
                self._last_step = step
                ticket = Ticket(self, step)
                ticket.done = True
                return ticket
            try:
                arrays = self._arrays_of(state, staged)
            except Exception as error:
                self._tell_others(error, staged)
                raise
            self._last_step = step
            return self._begin(staged, step, *arrays)

    def _tell_others(self, error: Exception, staged: bool) -> None:
        """Take part in the save for which the other ranks wait, with nothing but an error."""
        if self._group.size == 1:
            return
        ticket = self._begin(staged, self._last_step or 0, None, [], [], error)
        if not staged:  # they hear of it in this call, and so does this rank, by `error`
            with contextlib.suppress(CheckpointError):
                ticket.wait()

    def _begin(self, staged: bool, step: int, *what: Any) -> Ticket:
        self._saves += 1
        ticket = Ticket(self, step)
        given_up = partial(getattr, ticket, "abandoned")
        job = Job(step, self._saves, *what, given_up=given_up)
        self._start(lambda: self._save(job, ticket, staged))
        return ticket

    def _arrays_of(self, state: Any, staged: bool) -> tuple[Any, list[Leaf], list[np.ndarray]]:
        tree, leaves = encode(state, allow_pickle=self._allow_pickle)
        arrays = [leaf.array for leaf in leaves]
        if staged:
            arrays = self._staging.copy(arrays)
        else:
            arrays = [np.asarray(array, order="C") for array in arrays]
        return tree, leaves, arrays

    def _save(self, job: Job, ticket: Ticket, staged: bool) -> None:
        """Save, in the store's thread."""
        try:
            verdict = self._all.save(job, everywhere=not staged)
        except BaseException as error:
            verdict = Verdict(errors=[error])
        durable = self._all.highest.index in verdict.done
        if not verdict.done:
            self._last_step = self._all.step
        with self._changed:
            ticket._safe = frozenset(verdict.done)
            ticket.done, ticket.durable = True, durable
            if verdict.errors:
                first, *others = verdict.errors
                # As add_note does it, which Python 3.10 does not have.
                first.__notes__ = [f"and also: {other}" for other in others]
                self._errors.append((ticket, first))
            if durable:
                self.durable_step = job.step
            self._changed.notify_all()
        if durable:
            with self._noting():
                for callback in self._callbacks:
                    callback(job.step)
        if verdict.done:
            with self._noting():
                self._all.clean()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep an error for the next call that waits for the thread."""
        try:
            yield
        except BaseException as error:
            with self._changed:
                self._errors.append((None, error))

    def _checked_step(self, step: Any) -> int:
        try:
            step = operator.index(step)
        except TypeError:
            raise TypeError(f"step must be an integer, not {type(step).__name__}") from None
        if step < 0:
            raise ValueError(f"step must be 0 or more, not {step}")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"step must be higher than {self._last_step}, the last one in {self.path}, not "
                f"{step}; to go on from an older one restore it first"
            )
        return step

    # Reading

    def restore(
        self, step: int | None = None, *, cut: Mapping[str, Any] | None = None
    ) -> Restored:
        """Read a state, and check every byte of it. The next save goes on from it.

        Waits for a save that is under way. Commits that came after an older `step` are dead as
        soon as the next save is durable.

        Parameters
        ----------
        step : int, optional
            The newest where it is left out.
        cut : dict, optional
            How this rank wants arrays, by their names: None for all of it, an axis along which it
            is cut evenly, or (axis, offsets) with the place where each member's piece begins.
            Without it, cut arrays are cut as they were saved where there are as many ranks, and
            evenly along the same axis where not. What is cut comes as a `Cut`.

        Returns
        -------
        Restored

        Raises
        ------
        CheckpointNotFoundError
            There is none, or not of this step.
        CheckpointCorruptError
            The bytes are not those that were written; names the file, and the dataset in it.
        CheckpointMismatchError
            It needs a package that is missing, or a newer hopcoll.
        CheckpointFencedError
            The store was taken over.
        CheckpointError
            The disk refused, a save before it went wrong, or it holds pickled objects and the
            store was opened without `allow_pickle`.
        """
        with self._calls:
            self._check_open()
            self.wait()
            found = self._all.restore(step, dict(cut or {}))
            path = found.place.path
            state = decode(
                found.body["tree"],
                collect(found.arrays),
                allow_pickle=self._allow_pickle,
                path=path,
            )
            self._last_step = found.step
            if not self._readonly:
                self.durable_step = self._all.highest.last_step
            return Restored(found.step, state)

    def steps(self) -> list[int]:
        """Return the steps that can be restored, oldest first. Collective."""
        with self._calls:
            self._check_open()
            self.wait()
            return self._all.steps()

    def verify(self) -> Iterator[Problem]:
        """Read every byte that counts, and yield what is wrong: the file, the dataset, and how.

        Local: reads what this host sees.
        """
        return self._all.verify()

    # Keeping house

    def prune(self, keep_last: int = 1, keep_every: int | None = None) -> None:
        """Remove all but these commits, and all files that nobody needs. Waits for the disk.

        May also be called on a store that is open for reading, beside an owner that goes on.

        Parameters
        ----------
        keep_last, keep_every
            As for the store itself.
        """
        retain = _checked_retention(keep_last, keep_every)
        with self._calls:
            self._check_open()
            self.wait()
            if self._readonly:
                self._all.prune(retain)
                return
            self._start(lambda: self._all.prune(retain))
            self.wait()

    def close(self) -> None:
        """Wait until all is durable, and end the thread. Closing again does nothing.

        Raises
        ------
        CheckpointError
            Something went wrong, and no other call has said so; the store is closed all the same.
        """
        with self._calls:
            if self._closed:
                return
            try:
                self.wait()
            finally:
                with self._changed:
                    self._closed = True
                    self._changed.notify_all()
                self._staging = _Staging()
                atexit.unregister(self._at_exit)
                self._group.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # The thread

    def _start(self, job: Callable[[], Any]) -> None:
        with self._changed:
            self._job = job
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._job is not None or self._closed)
                job = self._job
                if job is None:
                    return
            with self._noting():
                job()
            del job  # and with it the arrays
            with self._changed:
                self._job = None
                self._changed.notify_all()

    def _wait(self, over: Callable[[], bool], timeout_s: float | None) -> None:
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        with self._changed:
            while not over():
                rest_s = deadline_s - time.monotonic()
                if rest_s <= 0:
                    raise CheckpointError(
                        f"{self.path}: the disk did not answer in time; the save goes on",
                        self.path,
                    )
                self._changed.wait(rest_s)

    def _raise_error(self, ticket: Ticket | None = None) -> None:
        """Raise what nobody was told of: of this save, or the first."""
        with self._changed:
            for entry in self._errors:
                if ticket is None or entry[0] is ticket:
                    self._errors.remove(entry)
                    raise entry[1]

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("store is closed")

    def _check_writable(self) -> None:
        self._check_open()
        if self._readonly:
            raise ValueError("store is open for reading only")


def _finish(reference: weakref.ref[CheckpointStore]) -> None:
    """Let the save that is under way end with the interpreter, and say what went wrong."""
    store = reference()
    if store is not None and not store._closed:
        store.close()


@dataclass
class _Staging:
    """Memory for copies of arrays, kept from one save to the next (fresh pages are slow)."""

    memory: np.ndarray | None = None

    def copy(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Return copies in C order; those of the call before are overwritten."""
        places, end = [], 0
        for array in arrays:
            places.append(end)
            end += -(-array.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        if self.memory is None or not end <= len(self.memory) <= 4 * end:
            self.memory = None  # not both at once
            self.memory = np.empty(end, np.uint8)
        copies = []
        for array, place in zip(arrays, places, strict=True):
            if array.nbytes:
                room = self.memory[place : place + array.nbytes]
                copies.append(room.view(array.dtype).reshape(array.shape))
            else:
                copies.append(np.empty(array.shape, array.dtype))
        _copy(copies, arrays)
        return copies


def _copy(copies: list[np.ndarray], arrays: list[np.ndarray]) -> None:
    """Copy arrays, large ones by two threads: one core alone cannot move what the memory can."""
    parts = []
    for copy, array in zip(copies, arrays, strict=True):
        count = min(-(-array.nbytes // _COPY_BYTES), array.shape[0] if array.shape else 1)
        if count > 1:
            parts += zip(np.array_split(copy, count), np.array_split(array, count), strict=True)
        else:
            parts.append((copy, array))
    if len(parts) > len(arrays) and len(os.sched_getaffinity(0)) > 1:
        with contextlib.suppress(RuntimeError):  # the interpreter ends, and starts no more threads
            with ThreadPoolExecutor(_COPIERS, "hopcoll-copy") as pool:
                for done in [pool.submit(np.copyto, *part) for part in parts]:
                    done.result()
            return
    for copy, array in parts:
        np.copyto(copy, array)


def _checked_retention(
    keep_last: int, keep_every: int | None
) -> Callable[[list[Commit]], list[Commit]]:
    if operator.index(keep_last) < 1:
        raise ValueError(f"keep_last must be 1 or more, not {keep_last}")
    if keep_every is not None and operator.index(keep_every) < 1:
        raise ValueError(f"keep_every must be 1 or more, not {keep_every}")
    return retention(keep_last, keep_every)
