"""A store of checkpoints: `save` copies the state and returns, a thread makes it durable.

The thread does all that waits for the disk, one save at a time; so at most one save is under way,
and one copy of the state, in memory that is kept for the next one, is all that it costs. An error
of the thread is raised by the next call, once.
"""

from __future__ import annotations

import atexit
import contextlib
import operator
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from hopcoll.errors import CheckpointError, CheckpointFencedError, CheckpointNotFoundError
from recovery.disk import Disk
from recovery.level import Level, Problem, PrunedError, retention
from recovery.log import Commit, Record
from recovery.shards import check_compression, name_datasets
from recovery.state import Leaf, decode, encode

__all__ = ["CheckpointStore", "Restored", "Ticket"]

_ALIGN_BYTES = 64
#: A reader beside the owner may find commits pruned under its hands, and then takes a newer one.
_READS_MAX = 100


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
        Whether it is known to outlive a power cut.
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

    Local. A store that is opened for writing belongs to the process that opened it last: whoever
    opened it earlier is refused from then on (`CheckpointFencedError`), also if it was only stopped
    and wakes up. Any number of processes may read, and prune with `prune`.

    Parameters
    ----------
    path : path
        A directory of its own, made where it is missing, on a file system with exclusive links
        and an fsync for folders (this is tried).
    keep_last : int, default 2
        How many commits stay. With 2, one that the disk spoils leaves the one before it.
    keep_every : int, optional
        Commits of steps that are multiples of it stay for good.
    compression : {None, "blosc2", "zstd"}
        Of arrays from 64 KiB. Needs ``pip install 'hopcoll[compression]'``.
    allow_pickle : bool, default False
        Whether objects of other types are pickled, and loaded. Loading can run any code.
    readonly : bool, default False
        Take nothing over and change nothing.
    timeout_s : float, default 600
        How long a call waits for the disk.
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
        The newest slot is corrupt. Where that slot is lost, removing its file makes the store go on
        from the one before it.
    CheckpointError
        The directory cannot be written to, or its file system is not fit.

    Notes
    -----
    Arrays that did not change since the commit before are not written again. Memory: one copy of
    the state while the store is open, and what compression makes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        compression: str | None = None,
        allow_pickle: bool = False,
        readonly: bool = False,
        timeout_s: float = 600.0,
        disk: Disk | None = None,
    ) -> None:
        self._retain = _checked_retention(keep_last, keep_every)
        check_compression(compression)
        self._compression = compression
        self._allow_pickle = allow_pickle
        self._readonly = readonly
        self._timeout_s = timeout_s
        self._level = Level(path, disk or Disk())
        self._callbacks: list[Callable[[int], Any]] = []
        self._staging = _Staging()
        self._saves = 0
        self._parent: Commit | None = None
        self._base: Record | None = None  # the parent's manifest
        self._last_step: int | None = None

        self._calls = threading.RLock()  # one caller at a time
        self._changed = threading.Condition()
        self._job: Callable[[], None] | None = None
        self._errors: list[tuple[Ticket | None, BaseException]] = []
        self._closed = False
        self._thread: threading.Thread | None = None

        record = self._level.look() if readonly else self._level.take()
        if record is not None and record.newest is not None:
            self._parent = record.newest
            self._last_step = record.newest.step
        # A reader sees what its owner may not have fsynced yet, and can vouch for nothing.
        self.durable_step: int | None = None if readonly else self._last_step
        self._at_exit = partial(_finish, weakref.ref(self))
        if not readonly:
            # A daemon, which ends with the process; `_finish` gives it the time for its last save.
            self._thread = threading.Thread(target=self._run, name="hopcoll-store", daemon=True)
            self._thread.start()
            atexit.register(self._at_exit)

    @property
    def path(self) -> Any:
        """The directory."""
        return self._level.root

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
            The state or the step; nothing was saved.
        CheckpointError
            A save before it went wrong, or does not end; this one was not taken.
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
        """Have `callback(step)` called, in the store's thread, after each save that is durable."""
        self._callbacks.append(callback)

    def _submit(self, step: int, state: Any, *, staged: bool) -> Ticket:
        with self._calls:
            self._check_writable()
            self.wait()
            step = self._checked_step(step)
            tree, leaves = encode(state, allow_pickle=self._allow_pickle)
            arrays = [leaf.array for leaf in leaves]
            if staged:
                arrays = self._staging.copy(arrays)
            else:
                arrays = [np.asarray(array, order="C") for array in arrays]
            ticket = Ticket(self, step)
            self._last_step = step
            self._saves += 1
            save = self._saves

            def job() -> None:
                try:
                    record = self._write(ticket, save, tree, leaves, arrays)
                except BaseException as error:
                    self._last_step = self._parent.step if self._parent else None
                    with self._changed:
                        ticket.done = True
                        self._errors.append((ticket, error))
                    return
                self._parent, self._base = record.newest, record
                with self._changed:
                    ticket.done = ticket.durable = True
                    self.durable_step = step
                    self._changed.notify_all()
                for after in (*self._callbacks, lambda _: self._level.clean(record)):
                    try:
                        after(step)
                    except BaseException as error:
                        with self._changed:
                            self._errors.append((None, error))

            self._start(job)
            return ticket

    def _write(
        self, ticket: Ticket, save: int, tree: Any, leaves: list[Leaf], arrays: list[np.ndarray]
    ) -> Record:
        step = ticket.step
        names = name_datasets([leaf.path for leaf in leaves])
        datasets = list(zip(names, arrays, strict=True))
        parent = self._parent.slot if self._parent else None
        for writer, base in (("0", self._base), ("0.anew", None)):
            written = self._level.write(
                save, writer, datasets, base=base, compression=self._compression, step=step
            )
            if ticket.abandoned:
                self._level.discard(written.fresh)
                raise CheckpointError(f"{self.path}: step {step} was given up", self.path)
            manifest = {
                "tree": tree,
                "arrays": [
                    _described(name, leaf, piece)
                    for name, leaf, piece in zip(names, leaves, written.pieces, strict=True)
                ],
                "shards": written.shards,
            }
            with contextlib.suppress(PrunedError):
                return self._level.commit(
                    step, save, parent, manifest, self._retain, written.fresh
                )
        raise AssertionError("a commit without references was pruned")

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

    def restore(self, step: int | None = None) -> Restored:
        """Read a state, and check every byte of it. The next save goes on from it.

        Waits for a save that is under way. Commits that came after an older `step` are dead as
        soon as the next save is durable.

        Parameters
        ----------
        step : int, optional
            The newest where it is left out.

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
            for _ in range(_READS_MAX):
                record = self._head()
                commit = record and (record.newest if step is None else record.commit_of(step))
                if not commit:
                    raise CheckpointNotFoundError(
                        f"{self.path} holds no checkpoint"
                        + ("" if step is None else f" of step {step}; there are {self.steps()}"),
                        self.path,
                    )
                try:
                    return self._read(commit)
                except CheckpointNotFoundError:
                    continue  # pruned meanwhile
            raise CheckpointError(f"{self.path} is pruned faster than it can be read", self.path)

    def steps(self) -> list[int]:
        """Return the steps that can be restored, oldest first."""
        record = self._head()
        return [commit.step for commit in record.alive] if record else []

    def verify(self) -> Iterator[Problem]:
        """Read every byte that counts, and yield what is wrong: the file, the dataset, and how."""
        return self._level.verify()

    def _head(self) -> Record | None:
        record = self._level.look()
        if not self._readonly and (record is None or record.owner != self._level.log.incarnation):
            raise CheckpointFencedError(
                f"{self.path} was taken over by another process; open it anew", self.path
            )
        return record

    def _read(self, commit: Commit) -> Restored:
        record = self._level.read_commit(commit)
        if record.kind != "commit":
            raise CheckpointError(f"{self.path}: slot {record.number} is no commit", self.path)
        arrays: list[Any] = list(self._level.read_arrays(record))
        handed: set[int] = set()

        def load(i: int) -> np.ndarray:
            array = arrays[i].copy(order="K") if i in handed else arrays[i]
            handed.add(i)
            return array

        path = self._level.log.path(commit.slot)
        state = decode(record.body["tree"], load, allow_pickle=self._allow_pickle, path=path)
        if not self._readonly:
            self._parent, self._base, self._last_step = commit, record, commit.step
            self.durable_step = commit.step
        return Restored(commit.step, state)

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
                self._level.prune(retain)
                return
            self._start(lambda: self._level.prune(retain))
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
            try:
                job()
            except BaseException as error:  # handed on: the next call raises it
                with self._changed:
                    self._errors.append((None, error))
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
                copy = room.view(array.dtype).reshape(array.shape)
                np.copyto(copy, array)
            else:
                copy = np.empty(array.shape, array.dtype)
            copies.append(copy)
        return copies


def _described(name: str, leaf: Leaf, piece: list[Any]) -> dict[str, Any]:
    """Return an array's part of the manifest."""
    flags = leaf.array.flags
    order = {"order": "F"} if flags.f_contiguous and not flags.c_contiguous else {}
    shape = list(leaf.array.shape)
    return {"name": name, "dtype": leaf.dtype, "shape": shape, **order, "piece": piece}


def _checked_retention(
    keep_last: int, keep_every: int | None
) -> Callable[[list[Commit]], list[Commit]]:
    if operator.index(keep_last) < 1:
        raise ValueError(f"keep_last must be 1 or more, not {keep_last}")
    if keep_every is not None and operator.index(keep_every) < 1:
        raise ValueError(f"keep_every must be 1 or more, not {keep_every}")
    return retention(keep_last, keep_every)
