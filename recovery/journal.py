"""The journal of a workflow: what was intended and what was done, by one process at a time.

A folder of segments (`recovery.segments` has their bytes). Who takes the journal over makes a
segment of its own: the file is written aside, fsynced, and linked to the next free number, which
the file system gives to one process only; then the folder is fsynced. *Then* it reads what counts,
and makes the **base** of its segment durable: up to which byte each older segment counts, with a
copy of the records of the last group it found. From then on it appends. A compaction is a
take-over from oneself: a new segment whose base counts nothing and carries all that is to be kept.

A **flush** writes all records that wait as one group, syncs them, and **then looks** whether there
is a segment with a higher number. Only then are they reported durable.

Why nothing that was reported is ever left out
----------------------------------------------
No clock and no lock is needed, and a process may be stopped anywhere, for as long as one likes.

*One step.* Process P, with segment p, reports a record. It wrote it, the fsync returned, and then
it saw no segment above p. So every segment above p got its name after that look, and whoever made
it read afterwards: it finds P's record, and P's base, in the file.

*All steps.* Claim: every valid base above p counts or carries the record. The one with the lowest
number was built on the highest valid base that its process found: p's own, as shown (those between
are void or, if they became valid meanwhile, are lower, and the claim holds for them). So it counts
p up to its last group and carries that. Each later one repeats what the base before it counts, and
carries or counts the rest. A journal is read by its highest valid base, so the record counts.

* *Two take over at once:* the numbers differ. The lower one finds the higher number after its
  base, and is fenced before it reports anything. The higher one reads the lower segment with its
  base or without one (void), either is right, as nothing was reported. A void segment that becomes
  valid later is below the next base, and nobody reads it; or it *is* the highest valid one again,
  because all above it are void: then it was built by the same rule, and those reported nothing.
* *The old owner wakes up while or after it was succeeded:* it may write what it likes into its own
  segment. A base counts that up to a byte that was whole before, and later bytes are not read. Its
  look finds the higher number and it is fenced: the highest segment is removed by nobody but its
  own process, if that gave up before it opened the journal, and then nobody built on it.
* *Compaction by a successor while the old owner writes:* its file has lost its name, and a higher
  number is there: fenced. A compaction takes the next number; is that taken, its process is
  fenced. The old segments are removed only when the new base is durable, and after a look. What is
  removed is in no later base, so it may be removed days later, and a power cut may bring it back.
* *A hole:* a process chose its number, was stopped, and links it when that was taken and removed
  meanwhile. Whoever removed it has a valid base with a higher number: the process is fenced, and
  nobody reads what it wrote.
* *Power cuts.* The name of a segment is durable before its base is written, so a valid base has a
  name. What a base counts was durable before: group g + 1 is written after the fsync of group g
  returned, and the last group is not counted, but carried. (An fsync by the successor would not
  do: it may succeed after the owner's own has failed, and says nothing of another host's cache.) A
  base is one frame with one hash: it is there as a whole, or its segment is void. So nothing that
  counts can be missing without being noticed.
* *A failed write or fsync* ends the journal in this process: its records may be there or not, and
  a second fsync would say nothing. The next owner reads what is there.
* *Shared file systems.* Segments are opened for reading after the link, so close-to-open holds.
  The look lists the folder, which opens it: a client asks the server then, where a lookup of one
  name might be answered from a cache of names that were not there.

What is needed of the disk: a 512-byte sector is written as a whole and does not disturb others; a
link has one winner.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopcoll.errors import CheckpointMismatchError, WorkflowError, WorkflowFencedError
from recovery import segments
from recovery.disk import Disk, writing
from recovery.runs import refusal
from recovery.segments import Entry, Record

__all__ = ["Journal", "Reading", "Record"]

#: A segment grows by so many zeros, which are on the disk before they are written over: ext4 then
#: commits nothing but the bytes.
_GROW_BYTES = 1 << 20
#: More that waits is written in several groups: a successor copies the last one.
_GROUP_BYTES_MAX = 16 << 20
_TEMPORARY = re.compile(r"[0-9a-f]{24}\.seg-tmp")
_LEASE = "lease"
#: Each try that is lost lost to somebody's success.
_TRIES_MAX = 1000


@dataclass(frozen=True)
class Reading:
    """What a look at a journal found.

    Parameters
    ----------
    records : list of Record
        All that count, in order.
    owner : dict or None
        Who took the newest segment; None where there is none.
    segments : list of int
        The numbers of all segments.
    torn : bool
        Whether something unfinished was dropped from the end.
    closed : bool
        Whether its last owner closed it.
    """

    records: list[Record]
    owner: dict[str, Any] | None
    segments: list[int]
    torn: bool
    closed: bool


class Journal:
    """One workflow's journal. Thread-safe; local; `open`, `flush`, `compact` and `close` block.

    After a failed write or fsync, a take-over by somebody else, or an interrupt in the middle of a
    flush, every call raises the same error: make another `Journal` and open it.

    Parameters
    ----------
    folder : Path
        Its own; made if it is not there. Files named ``lease...`` may be in it too.
    disk : Disk
    owner : dict
        JSON about this process, for people and for the lease; `read` gives it back.
    """

    def __init__(self, folder: Path, disk: Disk, owner: dict[str, Any]) -> None:
        if not isinstance(owner, dict):
            raise TypeError(f"owner must be a dict, not {type(owner).__name__}")
        try:
            json.dumps(owner)
        except (TypeError, ValueError) as error:
            raise type(error)(f"owner is no JSON: {error}") from None
        self.folder = Path(folder).absolute()
        self.owner = owner
        self._disk = disk
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._own: _Own | None = None
        self._closed = False
        self._failure: Exception | None = None
        #: Whether a thread is writing; it alone touches `_own`.
        self._writing = False
        self._pending: list[Entry] = []
        #: Told the kind and the head of a record, whether `counted` is to be its number.
        self.counts: Callable[[str, dict[str, Any]], bool] | None = None
        self.counted = 0
        self._appended = 0
        self._durable = 0

    @classmethod
    def read(cls, folder: Path) -> Reading:
        """Return what counts, without taking the journal over; its owner may go on meanwhile.

        Raises
        ------
        CheckpointNotFoundError
            There is no such folder.
        CheckpointCorruptError
            What was durable is not there.
        CheckpointMismatchError
            It is something else, or of a newer version.
        OSError
        """
        chain = segments.load(Path(folder).absolute())
        return Reading(chain.records, chain.owner, chain.numbers, chain.torn, chain.closed)

    def open(self) -> list[Record]:
        """Take the journal over and return the records that count. Once; from then on it appends.

        Raises
        ------
        WorkflowFencedError
            Another took it over at the same moment. Or a later start of this process's batch job
            has it.
        CheckpointCorruptError, CheckpointMismatchError, OSError
            The journal is as it was.
        """
        if self._own is not None or self._closed:
            raise ValueError("journal was opened before; make another one")
        with writing("the journal", self.folder):
            self._prepare()
            own = self._take_next()
        try:
            chain = segments.load(self.folder, below=own.number)
            if why := refusal(self.folder, chain.owner):
                raise WorkflowFencedError(why)
            carried = [
                (one.seq, *segments.encode_entry(one.kind, one.head, one.body))
                for one in chain.carried
            ]
            self._write(own, [segments.encode_base(chain.last, chain.counts, carried)])
        except BaseException:
            self._disk.close(own.descriptor)
            # It said nothing, or nothing that anybody was told. Were it left, a journal that cannot
            # be read would grow with each try.
            with contextlib.suppress(OSError):
                self._disk.unlink(self.folder / own.name)
            raise
        self._appended = self._durable = chain.last
        self._own = own
        counted = {number for number, _ in chain.counts}
        self._remove([number for number in chain.numbers if number not in counted])
        return chain.records

    def append(self, kind: str, head: dict[str, Any], body: bytes = b"") -> int:
        """Add a record in memory and return its sequence number. Does not block.

        Parameters
        ----------
        kind : str
            Up to 64 bytes.
        head : dict
            JSON, up to 1 MiB.
        body : bytes
            Up to 16 MiB.
        """
        entry = segments.encode_entry(kind, head, body)
        with self._changed:
            self._check()
            self._appended += 1
            self._pending.append((self._appended, segments.RECORD, *entry))
            if self.counts is not None and self.counts(kind, head):
                self.counted = self._appended
            return self._appended

    @property
    def durable(self) -> int:
        """The highest sequence number that is known to be durable."""
        return self._durable

    @property
    def segment(self) -> int:
        """The number of the segment that is written now."""
        own = self._own
        if own is None:
            raise ValueError("journal is not open")
        return own.number

    def flush(self, upto: int | None = None) -> None:
        """Return when all records up to `upto` (or all so far) are durable and this process was the
        owner after that. One of the threads that wait writes for all.

        Raises
        ------
        WorkflowFencedError
            Another process took the journal over. The records may count or not.
        OSError
            The disk failed. The records may count or not.
        """
        with self._changed:
            self._check()
            target = self._appended if upto is None else upto
            if not 0 <= target <= self._appended:
                raise ValueError(f"upto is {upto}, and {self._appended} records were appended")
        while self._durable < target:
            with self._changed:
                while self._writing and self._durable < target:
                    self._changed.wait()
                if self._durable >= target:
                    return
                self._check()
                self._writing = True
                batch = self._next_batch()
            self._in_turn(self._write_batch, batch)

    def _write_batch(self, batch: list[Entry]) -> None:
        assert self._own is not None
        self._write(self._own, batch)
        self._durable = batch[-1][0]

    def compact(self, keep: Iterable[Any]) -> None:
        """Replace all records that were appended so far by these, which get new numbers.

        They become durable together, or the journal stays as it was; what was appended before and
        is not kept counts as durable then. The caller sees to it that nothing that `keep` does not
        know is appended before the call; what is appended during it comes after.

        Parameters
        ----------
        keep : iterable
            Records, or tuples of (kind, head, body).

        Raises
        ------
        WorkflowFencedError, OSError
            As in `flush`.
        """
        entries = []
        for one in keep:
            kind, head, body = (
                (one.kind, one.head, one.body) if isinstance(one, Record) else tuple(one)
            )
            entries.append(segments.encode_entry(kind, head, body))
        with self._changed:
            while self._writing:
                self._changed.wait()
            self._check()
            self._writing = True
            self._pending.clear()
            first = self._appended + 1
            self._appended = last = self._appended + len(entries)
        carried = [(first + index, *entry) for index, entry in enumerate(entries)]
        self._in_turn(self._replace, segments.encode_base(last, [], carried))

    def _replace(self, base: Entry) -> None:
        """Go on in a new segment, which counts none of the older ones."""
        old = self._own
        assert old is not None
        for _ in range(_TRIES_MAX):
            with writing("the journal", self.folder):
                own = self._take(old.number + 1)
            if own is not None:
                break
            self._look(old)  # passes where somebody took the number and gave up
        else:
            raise WorkflowError(f"{self.folder}: segment {old.number + 1} was not won")
        self._own = own
        self._disk.close(old.descriptor)
        self._write(own, [base])
        self._durable = base[0]
        self._remove([n for n in segments.numbers_in(self.folder) if n < own.number])

    def close(self) -> None:
        """Flush, and append no more. Local; a second call does nothing.

        Raises
        ------
        WorkflowFencedError, OSError
            As in `flush`; it is closed all the same.
        """
        if self._closed:
            return
        try:
            if self._own is not None and self._pid == os.getpid() and self._failure is None:
                self.flush()
                self._end()
            elif self._pending and self._pid == os.getpid():
                self._check()
        finally:
            with self._changed:
                self._closed = True
                own, self._own = self._own, None
            if own is not None:
                self._disk.close(own.descriptor)

    def _end(self) -> None:
        """Say that nothing follows, so that what was flushed last is missed if it is not there. A
        hint: nobody was promised it."""
        with self._changed:
            while self._writing:
                self._changed.wait()
            own = self._own
            assert own is not None
            with contextlib.suppress(OSError):
                own.put([(self._durable, segments.END, b"", b"{}", b"")])
                own.trim()

    def _check(self) -> None:
        """Raise where this journal appends nothing more; for those who hold the lock."""
        if self._failure is not None:
            raise copy.copy(self._failure) from self._failure
        if self._own is None:
            raise ValueError("journal is closed" if self._closed else "journal is not open")
        if self._pid != os.getpid():
            raise WorkflowError(f"{self.folder} belongs to the parent of this forked process")

    def _next_batch(self) -> list[Entry]:
        nbytes = 0
        for count, entry in enumerate(self._pending):
            nbytes += len(entry[3]) + len(entry[4])
            if count and nbytes > _GROUP_BYTES_MAX:
                batch, self._pending = self._pending[:count], self._pending[count:]
                return batch
        batch, self._pending = self._pending, []
        return batch

    def _in_turn(self, work: Callable[[Any], None], what: Any) -> None:
        """Do what only one thread does at a time. Whatever ends it early ends the journal: what is
        on the disk is not known then."""
        failure: Exception | None = None
        done = False
        try:
            work(what)
            done = True
        except Exception as error:
            failure = error
            raise
        finally:
            with self._changed:
                if not done:
                    self._failure = failure or WorkflowError(
                        f"{self.folder}: a flush was interrupted, and what it wrote is uncertain; "
                        "open the journal anew"
                    )
                self._writing = False
                self._changed.notify_all()

    def _write(self, own: _Own, entries: Sequence[Entry]) -> None:
        """Write one group, make it durable, look."""
        try:
            with writing("the journal", self.folder / own.name):
                own.put(entries)
        except OSError as error:
            # On a shared file system that may be because a successor removed the file.
            try:
                self._look(own)
            except WorkflowFencedError as fenced:
                raise fenced from error
            raise
        self._look(own)

    def _look(self, own: _Own) -> None:
        """Raise where another process took the journal over since `own` got its name."""
        newer, there = "", False
        try:
            # Not fstat: Linux gives a file that was asked for its times finer ones at the next
            # write, and then its fdatasync takes 1.4 times as long.
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name == own.name:
                        there = entry.inode() == own.inode
                    elif name > own.name and segments.NAME.fullmatch(name):
                        newer = max(name, newer)
        except FileNotFoundError:
            pass
        if newer or not there:
            what = f"was taken over by another process ({newer})" if newer else "was removed"
            raise WorkflowFencedError(
                f"{self.folder} {what}; this one can record nothing more. What it had not been "
                "told to be durable may count or not: resume the workflow to see"
            )

    def _prepare(self) -> None:
        """Make the folder, or see whether it is one of ours."""
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self._disk.mkdir(path)
        # Also where it is there: who made it may have been killed before this.
        for path in missing or [self.folder]:
            self._disk.fsync_folder(path.parent)
        if not self.folder.is_dir():
            raise CheckpointMismatchError(f"{self.folder} is no folder", self.folder)
        names = os.listdir(self.folder)
        others = [name for name in sorted(names) if not _is_ours(name)]
        if others and not any(segments.NAME.fullmatch(name) for name in names):
            raise CheckpointMismatchError(
                f"{self.folder} holds something else ({others[0]}); a journal wants a folder of "
                "its own",
                self.folder,
            )

    def _take_next(self) -> _Own:
        """Take the first number that is free behind all others."""
        for _ in range(_TRIES_MAX):
            own = self._take(max(segments.numbers_in(self.folder), default=0) + 1)
            if own is not None:
                return own
        raise WorkflowError(f"{self.folder}: no segment was won in {_TRIES_MAX} tries")

    def _take(self, number: int) -> _Own | None:
        """Make a segment, durable under its number; None where another process has that."""
        mark = b"J" + secrets.token_bytes(7)
        header = segments.encode_header(number, self.owner, mark)
        temporary = self.folder / f"{secrets.token_hex(12)}.seg-tmp"
        target = segments.path_of(self.folder, number)
        descriptor = self._disk.create(temporary)
        taken = False
        try:
            zeros = max(_GROW_BYTES - len(header), 0)
            self._disk.write(descriptor, header + bytes(zeros), 0)
            self._disk.fsync(descriptor)
            # Not found: a successor took the temporary for one of the dead.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                self._disk.link(temporary, target)
                self._disk.fsync_folder(self.folder)
                taken = True
        finally:
            with contextlib.suppress(OSError):
                self._disk.unlink(temporary)
            if not taken:
                self._disk.close(descriptor)
        if not taken:
            return None
        return _Own(self._disk, descriptor, number, mark, len(header), len(header) + zeros)

    def _remove(self, numbers: Iterable[int]) -> None:
        """Remove segments that no base will ever count, and what others did not finish. What stays
        is for the next time."""
        names = [segments.path_of(self.folder, number).name for number in sorted(numbers)]
        names += [name for name in sorted(os.listdir(self.folder)) if _TEMPORARY.fullmatch(name)]
        for name in names:
            with contextlib.suppress(OSError):
                self._disk.unlink(self.folder / name)


class _Own:
    """The segment that this process writes."""

    def __init__(
        self, disk: Disk, descriptor: int, number: int, mark: bytes, end: int, size: int
    ) -> None:
        self.descriptor = descriptor
        self.inode = os.fstat(descriptor).st_ino
        self.number = number
        self.name = f"{number:010d}.seg"
        self._disk = disk
        self._mark = mark
        self._end = end
        self._size = size
        self._group = 0

    def put(self, entries: Sequence[Entry]) -> None:
        """Write a group and make it durable."""
        data = segments.encode_group(self._mark, self._group + 1, self._end, entries)
        end = self._end + len(data)
        if end > self._size:
            self._size = end + -end % _GROW_BYTES
            data += bytes(self._size - end)
        self._disk.write(self.descriptor, data, self._end)
        self._disk.fdatasync(self.descriptor)
        self._end = end
        self._group += 1

    def trim(self) -> None:
        """Give back what was not needed."""
        self._disk.truncate(self.descriptor, self._end)


def _is_ours(name: str) -> bool:
    return bool(
        segments.NAME.fullmatch(name) or _TEMPORARY.fullmatch(name) or name.startswith(_LEASE)
    )
