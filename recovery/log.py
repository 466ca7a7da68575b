"""The log of a store: numbered slots, which decide what is committed and who may commit.

A slot is a file ``slots/0000000042.json``, one JSON object with a hash of itself. It is written
aside, fsynced, and linked to its name, which the file system gives to one file only; then the
folder is fsynced. So slot n is filled once, by one process, whatever stops or wakes up meanwhile.
The kinds: ``open`` (an incarnation takes the store over), ``commit``, ``prune``, ``abort`` (a save
is given up). **The highest slot tells all**; each repeats what holds from it on:

* ``owner``: the incarnation that may commit; ``save``: the number of its last save that was
  committed, or given up.
* ``alive``: the commits that count, oldest first, as (slot, step). They are the living chain: each
  is the parent of the next, the last is what a restore gives. A commit that goes on from an older
  one leaves the others out, and these are dead from then on.
* ``floor``: slots with lower numbers are void, unless they are in ``alive``.
* ``run``: which start of which batch job opened the store, if one did. An older start of that job
  cannot open it any more.

Why a stopped process can do no harm
------------------------------------
*A slot from the floor up is never removed.* A process fills n after it saw n - 1. So when it fills
n, and then finds (with one more look) a floor of at most n, nobody had filled n before, nobody had
seen n filled and gone past it: its slot was the highest, and all later ones build on it. When it
finds a higher floor, n was a hole in the past: its slot is void, nobody ever reads it as the
highest, and it removes it. The look cannot miss the floor that counts: the newest slots, at least
`_SLOTS_KEPT` of them, stay while a folder is listed once. Hence, for who was stopped anywhere:

* An owner whose store was taken over finds its number filled, reads an owner who is not itself, and
  is *fenced* (`CheckpointFencedError`); or it filled a hole, and is fenced as well. If it filled
  its number before the other came, the other has adopted the commit.
* Prunes from elsewhere take a number too, and name no owner but the one they found. An owner that
  loses its number to one builds its commit anew on what is alive after it.
* *What is dead stays dead:* alive commits only come from the slot before, or are new. A shard that
  no alive commit refers to at slot r is never referred to again, because commits refer to new
  shards and to those of living commits. So who filled r may remove such shards at any later time,
  also after a stop of days, if he listed them *before* he filled r (the shards of later owners are
  not on that list), and left alone those of the owner's saves that were under way (``save``).
* *Nothing outlives what it builds on:* whoever adopts a slot syncs the folder before it fills the
  next one, as the slot's own process may have been killed before it did.
* A power cut may bring back what was removed last. It does no harm: the slot that let it die was
  durable before, and no commit counts by its file alone.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from hopcoll.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFencedError,
    CheckpointMismatchError,
)
from recovery.disk import Disk
from recovery.runs import is_newer, this_run

__all__ = ["VERSION", "Commit", "Log", "Record", "UncertainError", "publish", "read_sealed"]

#: Of the format of a store. A store with a higher one is refused.
VERSION = 1
#: How many slots stay behind the highest, though their commits may be dead.
_SLOTS_KEPT = 8
_NAME = re.compile(r"(\d{10,})\.json")
#: Each try that is lost lost to somebody's success.
_TRIES_MAX = 1000


@dataclass(frozen=True)
class Commit:
    """One that is alive: its slot, and its step."""

    slot: int
    step: int


@dataclass(frozen=True)
class Record:
    """A slot as it was read; `body` has the parts that only its kind has."""

    number: int
    kind: str
    owner: str
    save: int
    floor: int
    alive: tuple[Commit, ...]
    body: dict[str, Any]

    @property
    def run(self) -> tuple[str, int] | None:
        """Which start of a batch job has the store."""
        run = self.body.get("run")
        return None if run is None else (run[0], run[1])

    @property
    def newest(self) -> Commit | None:
        """The commit that a restore gives."""
        return self.alive[-1] if self.alive else None

    def counts(self, number: int) -> bool:
        """Whether another slot is not void from this one on."""
        return number >= self.floor or any(one.slot == number for one in self.alive)


class Log:
    """The slots of one store. Local; every call blocks for the disk.

    Parameters
    ----------
    root : Path
        The store's directory, with ``slots`` and ``tmp`` in it.
    disk : Disk
    incarnation : str, optional
        The name of this one; only a log that appends needs one.
    member : str, default "0"
        Tells the processes of one incarnation apart. One at a time appends.
    """

    def __init__(
        self, root: Path, disk: Disk, incarnation: str | None = None, member: str = "0"
    ) -> None:
        self.root = root
        self.folder = root / "slots"
        self.incarnation = incarnation or secrets.token_hex(12)
        #: How the names of its temporaries begin.
        self.label = f"{self.incarnation}-{member}"
        #: The highest slot that this process knows of.
        self.head: Record | None = None
        self._disk = disk
        self._count = itertools.count(1)
        self._durable = 0  # the highest slot that is known to be

    def numbers(self) -> list[int]:
        """Return the numbers of all slots, void ones too, in order."""
        return sorted(
            int(match[1]) for name in os.listdir(self.folder) if (match := _NAME.fullmatch(name))
        )

    def path(self, number: int) -> Path:
        return self.folder / f"{number:010d}.json"

    def read(self, number: int) -> Record:
        """Return a slot.

        Raises
        ------
        FileNotFoundError
            It is not there (any more).
        CheckpointCorruptError, CheckpointMismatchError
        """
        path = self.path(number)
        document = read_sealed(path)
        if document["number"] != number:
            raise CheckpointCorruptError(
                f"{path} is corrupt: it was written as slot {document['number']}", path
            )
        return _record(document)

    def refresh(self) -> Record | None:
        """Read the highest slot and return it, None where there is none."""
        for _ in range(_TRIES_MAX):
            numbers = self.numbers()
            if not numbers:
                self.head = None
                return None
            try:
                self.head = self.read(numbers[-1])
            except FileNotFoundError:
                continue  # it became old while the folder was listed
            except CheckpointCorruptError as error:
                raise CheckpointCorruptError(
                    f"{error}; a person may have the store go on from the slot before it by "
                    f"`hopcoll ckpt repair {shlex.quote(str(self.root))}`",
                    error.path,
                ) from None
            return self.head
        raise CheckpointError(f"{self.folder} changes too fast to be read", self.folder)

    def open(self) -> Record:
        """Take the store over: nobody who opened it before can commit from now on.

        Raises
        ------
        CheckpointFencedError
            Another took it over at the same moment, after this one. Or a later start of this
            process's batch job has it.
        OSError, CheckpointError
        """
        ours = this_run()

        def build(head: Record | None) -> dict[str, Any]:
            theirs = head.run if head else None
            if is_newer(theirs, ours):
                assert theirs is not None and ours is not None
                raise CheckpointFencedError(
                    f"{self.root} belongs to start {theirs[1]} of job {theirs[0]}, and this "
                    f"process is of start {ours[1]}: it must do nothing any more",
                    self.root,
                )
            alive = _alive(head)
            return {
                "kind": "open", "owner": self.incarnation, "save": 0, "alive": alive, "run": ours
            }  # fmt: skip

        self.refresh()
        record = self._append(build)
        self._check_owner()
        return record

    def commit(
        self,
        step: int,
        save: int,
        parent: int | None,
        build: Callable[[Record], dict[str, Any]],
        retain: Callable[[list[Commit]], list[Commit]],
    ) -> Record:
        """Commit a step; when this returns, it is durable.

        Parameters
        ----------
        step : int
        save : int
            Counts the saves of this incarnation; higher than that of its last commit.
        parent : int or None
            The slot of the commit that this one goes on from; later ones die.
        build : callable
            Called with the record that the commit goes on from, again for each slot that was lost
            to a prune; returns the rest of the slot. What it raises ends the commit.
        retain : callable
            Which of these commits stay alive; the last is this one, and must.

        Raises
        ------
        CheckpointFencedError
            The store was taken over. Nothing was committed.
        OSError
            Nothing was committed, but for an `UncertainError`.
        CheckpointError
        """

        def document(head: Record | None) -> dict[str, Any]:
            self._check_owner()
            assert head is not None
            if save <= head.save:
                raise CheckpointError(f"save {save} comes after save {head.save}", self.root)
            chain = [one for one in head.alive if parent is not None and one.slot <= parent]
            rest = build(head)
            alive = retain([*chain, Commit(head.number + 1, step)])
            return {
                "kind": "commit",
                "owner": self.incarnation,
                "save": save,
                "alive": [[one.slot, one.step] for one in alive],
                "step": step,
                "parent": chain[-1].slot if chain else None,
                **rest,
            }

        return self._append(document)

    def abort(self, save: int) -> bool:
        """Let nobody commit a save any more who has not yet.

        Returns
        -------
        bool
            False where it is committed.

        Raises
        ------
        CheckpointFencedError
            The store was taken over, and whether the save was committed before is not known.
        OSError, CheckpointError
            As for `commit`.
        """

        def build(head: Record | None) -> dict[str, Any]:
            self._check_owner()
            assert head is not None
            if head.save >= save:
                raise _TooLateError
            return {"kind": "abort", "owner": head.owner, "save": save, "alive": _alive(head)}

        self.refresh()
        try:
            self._append(build)
        except _TooLateError:
            return False
        return True

    def pass_by(self, highest: Record, alive: Sequence[Commit]) -> Record | None:
        """Take the store over behind slots that cannot be read; see repairs.py.

        Parameters
        ----------
        highest : Record
            What is taken for the highest slot, with its number.
        alive : sequence of Commit

        Returns
        -------
        Record or None
            None where another process has filled the next slot.
        """

        def build(head: Record | None) -> dict[str, Any]:
            if head != highest:
                raise _TooLateError
            return {
                "kind": "open",
                "owner": self.incarnation,
                "save": 0,
                "floor": highest.number + 1,
                "alive": [[one.slot, one.step] for one in alive],
            }

        self.head = highest
        try:
            return self._append(build)
        except _TooLateError:
            return None

    def prune(
        self, retain: Callable[[list[Commit]], list[Commit]], examine: Callable[[Record], None]
    ) -> Record | None:
        """Let all commits die that `retain` does not keep; None where there is none at all.

        `examine` is called with the record that the prune goes on from, before it is final.
        """

        def build(head: Record | None) -> dict[str, Any]:
            assert head is not None
            examine(head)
            alive = retain(list(head.alive))
            return {
                "kind": "prune",
                "owner": head.owner,
                "save": head.save,
                "alive": [[one.slot, one.step] for one in alive],
            }

        if self.refresh() is None:
            return None
        return self._append(build)

    def void_slots(self, record: Record) -> list[int]:
        """Return the numbers of the slots that are void from `record` on and still there."""
        return [n for n in self.numbers() if not record.counts(n)]

    def _check_owner(self) -> None:
        head = self.head
        if head is None or head.owner != self.incarnation:
            raise CheckpointFencedError(
                f"{self.root} was taken over by another process "
                f"({'it is gone' if head is None else 'incarnation ' + head.owner}); "
                "this one can commit nothing more, open the store anew to go on",
                self.root,
            )

    def _append(self, build: Callable[[Record | None], dict[str, Any]]) -> Record:
        """Fill the next slot with what `build` makes of the head, until a slot is won."""
        for _ in range(_TRIES_MAX):
            head = self.head
            if head is not None and head.number > self._durable:
                # Who filled it may have been killed before it did this.
                self._disk.fsync_folder(self.folder)
                self._durable = head.number
            number = head.number + 1 if head else 1
            run = head.run if head else None
            document = {"number": number, "floor": _floor(number, head), "run": run, **build(head)}
            document["by"] = {"host": socket.gethostname(), "pid": os.getpid()}
            document["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            try:
                if not self._fill(number, document):
                    self._adopt(number)
                    continue
                self._durable = number
                if self._counts(number):
                    return _record(document)
            except UncertainError:
                if head is not None:  # go past it, and build on it no more
                    self.head = replace(head, number=number)
                raise
        raise CheckpointError(f"{self.folder}: no slot was won in {_TRIES_MAX} tries", self.root)

    def _counts(self, number: int) -> bool:
        """Look again: whether the slot that this process filled was the next one."""
        try:
            newest = self.refresh()
            if newest is not None and newest.number >= number:
                if newest.counts(number):
                    return True
                with contextlib.suppress(FileNotFoundError):
                    self._disk.unlink(self.path(number))  # it was a hole in the past
                return False
        except (OSError, CheckpointError) as error:
            raise UncertainError(errno.EIO, str(error)) from error
        raise UncertainError(errno.EIO, f"{self.path(number)} is gone after it was made")

    def _fill(self, number: int, document: dict[str, Any]) -> bool:
        """Give the slot to this document; False where another has it."""
        try:
            return publish(
                self._disk,
                document,
                self.root / "tmp" / f"{self.label}.{next(self._count)}.json",
                self.path(number),
            )
        except FileNotFoundError:
            return False  # a prune took our temporary for one of the dead: look who owns the store

    def _adopt(self, number: int) -> None:
        """Take what is there for the head."""
        try:
            self.head = self.read(number)
        except FileNotFoundError:
            self.refresh()


class _TooLateError(Exception):
    """Another slot was filled first, and that decides."""


class UncertainError(OSError):
    """A file has its name, but whether it is durable is not known."""


def publish(disk: Disk, document: dict[str, Any], temporary: Path, target: Path) -> bool:
    """Write a JSON document with its hash, durable, under a name that it alone gets.

    Returns
    -------
    bool
        False where another file has the name.

    Raises
    ------
    OSError
        Nothing has the name.
    UncertainError
        It has the name, and may be durable or not.
    """
    data = seal(document)
    descriptor = disk.create(temporary)
    try:
        try:
            disk.write(descriptor, data, 0)
            disk.fsync(descriptor)
        finally:
            disk.close(descriptor)
        try:
            disk.link(temporary, target)
        except FileExistsError:
            return False
        try:
            disk.fsync_folder(target.parent)
        except OSError as error:
            raise UncertainError(error.errno, error.strerror) from error
        return True
    finally:
        _remove(disk, temporary)


def _remove(disk: Disk, path: Path) -> None:
    """Remove a temporary; what stays is for the next prune."""
    with contextlib.suppress(OSError):
        disk.unlink(path)


def seal(document: dict[str, Any]) -> bytes:
    """Return a document as JSON that ends with the hash of all that stands before it."""
    text = json.dumps({"version": VERSION, **document}, separators=(",", ":"))[:-1].encode()
    return b'%s,"xxh3_128":"%s"}\n' % (text, xxhash.xxh3_128_hexdigest(text).encode())


_SEAL_BYTES = len(b',"xxh3_128":""}\n') + 32


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a document that `seal` made.

    Raises
    ------
    FileNotFoundError
    CheckpointCorruptError
        A byte of it is not what was written.
    CheckpointMismatchError
        It is of a newer version.
    """
    data = path.read_bytes()
    text = data[:-_SEAL_BYTES]
    expected = b',"xxh3_128":"%s"}\n' % xxhash.xxh3_128_hexdigest(text).encode()
    if data[-_SEAL_BYTES:] != expected or not text:
        raise CheckpointCorruptError(f"{path} is corrupt: its hash does not fit", path)
    document = json.loads(text + b"}")
    if document["version"] > VERSION:
        raise CheckpointMismatchError(
            f"{path} is of version {document['version']}, and this hopcoll reads up to {VERSION}: "
            "install a newer one",
            path,
        )
    return document


def _record(document: dict[str, Any]) -> Record:
    body = dict(document)
    number, kind, owner, save, floor, alive = (
        body.pop(name) for name in ("number", "kind", "owner", "save", "floor", "alive")
    )
    return Record(number, kind, owner, save, floor, tuple(Commit(*one) for one in alive), body)


def _alive(head: Record | None) -> list[list[int]]:
    return [[one.slot, one.step] for one in head.alive] if head else []


def _floor(number: int, head: Record | None) -> int:
    floor = head.floor if head else 1
    return number - _SLOTS_KEPT if number - floor >= 2 * _SLOTS_KEPT else floor
