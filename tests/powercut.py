"""Power cuts: everything that a disk may hold when the power fails in the middle of a run.

A `Log` takes down what runs do to one folder through their `RecordingDisk`: several writers, in one
order. `cuts` then walks through it call by call, and makes the states in which a power cut at that
moment may leave the disk; `examine` has each of them looked at.

**The model** is that of ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014),
with the least that POSIX promises and ext4 and XFS keep, and nothing that one of them does besides:

* What was written to a file and not fsynced since is on the disk or not, each 512-byte sector of it
  for itself. So a write may be lost, torn, and there without an earlier one.
* The length of a file is kept apart from its bytes. It may outlive them, which then read as zeros
  (delayed allocation), and they may outlive it, which cuts them off.
* A name (create, link, unlink, mkdir, rmdir) that came after the last fsync of its folder is there
  or not, each for itself. An fsync of the file does not keep its name: on ext4 it mostly does, by
  its journal, but POSIX does not say so.
* A name may be there, and what it names be an empty file or an empty folder.
* What was fsynced before is there: the bytes and the length of a file (so with fdatasync, which
  leaves out what is not needed to read the bytes), the names of a folder. That
  holds for a file under all its names, and for a name if the folders above it are there.
* A sector is written as a whole, and what is on the disk is not changed by a cut.

That is more than one machine can do to a file system with a journal, which keeps most of the order
of names. A store that survives it does not have to know which file system it is on.

Not all subsets are tried, there are too many: for each call nothing kept and all kept, each
unsynced item lost alone and kept alone, each write torn, names without bytes, lengths without
bytes, bytes without lengths, and random subsets from a seed. States that were seen before are not
looked at again. That a look would notice is proved by taking each fsync that stands in the program
out of the logs (`Examiner.needed_syncs`): that has to make some state fail.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recovery.disk import Disk

SECTOR_BYTES = 512
#: Calls that make something durable.
SYNCS = frozenset({"fsync", "fdatasync", "fsync_folder"})
#: Boundaries at which one write is torn; of a longer one so many are drawn.
_TEARS_MAX = 3
_DISK = sys.modules[Disk.__module__].__file__
_PROBABILITIES = (0.15, 0.5, 0.85)


class Killed(BaseException):
    """The process that called is dead: a `RecordingDisk` whose calls are used up."""


class Violation(AssertionError):
    """A state that a power cut may leave, and that must not be."""


@dataclass(frozen=True)
class Call:
    """One change of the disk, or a remark of the run.

    Parameters
    ----------
    kind : str
        The method of `Disk`, or "note".
    number : int
        Of the file or folder that is written, synced or named; they are counted from 0, the root.
        Where a name goes, -1.
    folder : int
        In which a name changes.
    name : str
        The name that changes; of a note, empty.
    offset, data
        Of a write; the new length of a truncate is its offset.
    note : object
        What the run remarked.
    site : str
        Where in the program an fsync stands.
    """

    kind: str
    number: int = -1
    folder: int = -1
    name: str = ""
    offset: int = 0
    data: bytes = b""
    note: Any = None
    site: str = ""

    def __str__(self) -> str:
        if self.kind == "note":
            return f"note {self.note}"
        what = f" {self.name} in folder {self.folder}" if self.name else ""
        where = f" [{self.offset}:{self.offset + len(self.data)}]" if self.data else ""
        return f"{self.kind} #{self.number}{what}{where}"


class Log:
    """What runs did to a folder, in one order. What is there at the beginning is durable.

    Parameters
    ----------
    root : Path
        A folder; what happens outside of it is no part of the log.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[Call] = []
        self.lock = threading.RLock()
        self._numbers: dict[tuple[int, int], int] = {}
        self._held: list[int] = []
        self.start = Medium()
        self._read(root)

    def _read(self, path: Path) -> int:
        number, new = self.number_of(path)
        if new and path.is_dir():
            names = {entry: self._read(path / entry) for entry in sorted(os.listdir(path))}
            self.start.folders[number] = _Folder(names)
        elif new:
            self.start.files[number] = _File(path.read_bytes())
        return number

    def number_of(self, path: str | os.PathLike[str] | int) -> tuple[int, bool]:
        """Return the number of a file or folder, by path or descriptor, and whether it is new."""
        found = os.stat(path)
        key = (found.st_dev, found.st_ino)
        if key in self._numbers:
            return self._numbers[key], False
        # As long as somebody holds it, the file system gives its inode number to nobody else.
        self._held.append(os.dup(path) if isinstance(path, int) else os.open(path, os.O_PATH))
        self._numbers[key] = len(self._numbers)
        return self._numbers[key], True

    def add(self, kind: str, **what: Any) -> None:
        """Append a call; for those who hold `lock`."""
        self.calls.append(Call(kind, **what))

    def note(self, what: Hashable) -> None:
        """Remark something about the run, such as ("durable", 3)."""
        with self.lock:
            self.add("note", note=what)

    def syncs(self) -> dict[str, list[int]]:
        """Return the indices of the calls that make something durable, by their site."""
        found: dict[str, list[int]] = {}
        for index, call in enumerate(self.calls):
            if call.kind in SYNCS:
                found.setdefault(call.site, []).append(index)
        return found

    def without(self, indices: Collection[int]) -> Log:
        """Return the log of a disk that says that it has done these calls, and did not.

        The program cannot tell, so all other calls are the same.
        """
        other = Log.__new__(Log)
        other.__dict__ = dict(self.__dict__, _held=[])
        other.calls = list(self.calls)
        for index in indices:
            call = self.calls[index]
            other.calls[index] = Call("note", note=f"not done: {call}")
        return other

    def close(self) -> None:
        """Let go of the files."""
        while self._held:
            os.close(self._held.pop())

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class RecordingDisk(Disk):
    """A disk of one process: does what it is told, and takes it down.

    One call at a time, so that the log is the order in which they happened.

    Parameters
    ----------
    log : Log
        Where the calls of all processes go.
    lives_for : int, optional
        How many calls the process makes before it dies: the next one raises `Killed`, and so do all
        that its clean-up would make.
    """

    def __init__(self, log: Log, lives_for: int | None = None) -> None:
        super().__init__()
        self.log = log
        self.left = lives_for

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self.log.lock:
            if self.left == 0:
                raise Killed
            yield
            if self.left is not None:
                self.left -= 1  # a call that failed is not in the log either

    def _number(self, path: Path | int) -> int:
        return self.log.number_of(path)[0]

    def _named(self, path: Path) -> dict[str, Any]:
        parent, name = os.path.split(os.fspath(path))
        return {"folder": self._number(Path(parent)), "name": name}

    def create(self, path: Path) -> int:
        with self._call():
            descriptor = super().create(path)
            self.log.add("create", number=self._number(descriptor), **self._named(path))
            return descriptor

    def write(self, descriptor: int, data: Any, offset: int) -> None:
        with self._call():
            super().write(descriptor, data, offset)
            written = memoryview(data).cast("B").tobytes()
            number = self._number(descriptor)
            self.log.add("write", number=number, offset=offset, data=written)

    def truncate(self, descriptor: int, nbytes: int) -> None:
        with self._call():
            super().truncate(descriptor, nbytes)
            self.log.add("truncate", number=self._number(descriptor), offset=nbytes)

    def fsync(self, descriptor: int) -> None:
        with self._call():
            super().fsync(descriptor)
            self.log.add("fsync", number=self._number(descriptor), site=_site())

    def fdatasync(self, descriptor: int) -> None:
        with self._call():
            super().fdatasync(descriptor)
            self.log.add("fdatasync", number=self._number(descriptor), site=_site())

    def link(self, source: Path, target: Path) -> None:
        with self._call():
            super().link(source, target)
            self.log.add("link", number=self._number(source), **self._named(target))

    def unlink(self, path: Path) -> None:
        with self._call():
            super().unlink(path)
            self.log.add("unlink", **self._named(path))

    def mkdir(self, path: Path) -> None:
        with self._call():
            super().mkdir(path)
            self.log.add("mkdir", number=self._number(path), **self._named(path))

    def rmdir(self, path: Path) -> None:
        with self._call():
            super().rmdir(path)
            self.log.add("rmdir", **self._named(path))

    def fsync_folder(self, path: Path) -> None:
        with self._call():
            super().fsync_folder(path)
            self.log.add("fsync_folder", number=self._number(path), site=_site())


def _site() -> str:
    """Return the function and the line that called the disk."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in (__file__, _DISK):
        frame = frame.f_back
    code = frame.f_code
    return f"{Path(code.co_filename).name} {code.co_name}:{frame.f_lineno}"


@dataclass
class _File:
    durable: bytes = b""
    #: (offset, bytes) of a write, (length, None) of a truncate.
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    size: int = -1  # as processes see it

    def __post_init__(self) -> None:
        self.size = len(self.durable) if self.size < 0 else self.size


@dataclass
class _Folder:
    durable: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[str, int | None]] = field(default_factory=list)


#: ("name", folder, index), ("data", file, index) or ("size", file, 0).
Item = tuple[str, int, int]


@dataclass(frozen=True)
class Choice:
    """Which unsynced items are on the disk.

    Parameters
    ----------
    label : str
        In words.
    kept : mapping of str to bool
        By kind of item.
    but : mapping of Item to bool or tuple of bool
        Exceptions; a tuple says it for each sector of a write.
    """

    label: str
    kept: Mapping[str, bool]
    but: Mapping[Item, bool | tuple[bool, ...]] = field(default_factory=dict)

    def __call__(self, *item: Any) -> bool | tuple[bool, ...]:
        return self.but.get(item, self.kept[item[0]])


class Medium:
    """What is on the disk for certain, and what may be."""

    def __init__(self) -> None:
        self.files: dict[int, _File] = {}
        self.folders: dict[int, _Folder] = {}
        self._digests: dict[bytes, bytes] = {}

    def copy(self) -> Medium:
        other = Medium()
        other.files = {n: _File(f.durable, list(f.pending), f.size) for n, f in self.files.items()}
        folders = self.folders.items()
        other.folders = {n: _Folder(dict(f.durable), list(f.pending)) for n, f in folders}
        return other

    def apply(self, call: Call) -> None:
        """Go one call on."""
        if call.kind == "create":
            self.files[call.number] = _File()
        elif call.kind == "mkdir":
            self.folders[call.number] = _Folder()
        if call.folder in self.folders:
            gone = call.kind in ("unlink", "rmdir")
            change = (call.name, None if gone else call.number)
            self.folders[call.folder].pending.append(change)
        elif call.kind in ("write", "truncate"):
            its = self.files[call.number]
            writes = call.kind == "write"
            its.pending.append((call.offset, call.data if writes else None))
            its.size = max(its.size, call.offset + len(call.data)) if writes else call.offset
        elif call.kind in SYNCS and call.number in self.files:
            self.files[call.number] = _File(self._content(call.number, _ALL))
        elif call.kind in SYNCS and call.number in self.folders:
            self.folders[call.number] = _Folder(self._names(call.number, _ALL))

    def items(self) -> list[Item]:
        """Return what is unsynced, in files and folders that may be reached."""
        found: list[Item] = []
        for number in sorted(self._reachable()):
            if number in self.folders:
                pending = self.folders[number].pending
                found += [("name", number, index) for index in range(len(pending))]
            else:
                its = self.files[number]
                found += [("data", number, index) for index in range(len(its.pending))]
                found += [("size", number, 0)] * (its.size != len(its.durable))
        return found

    def _reachable(self) -> set[int]:
        found, todo = set(), [0]
        while todo:
            number = todo.pop()
            if number not in found:
                found.add(number)
                if number in self.folders:
                    its = self.folders[number]
                    todo += [*its.durable.values(), *(n for _, n in its.pending if n is not None)]
        return found

    def sectors(self, item: Item) -> int:
        """Return how many sectors a write concerns."""
        offset, data = self.files[item[1]].pending[item[2]]
        if not data:
            return 1
        return (offset + len(data) - 1) // SECTOR_BYTES - offset // SECTOR_BYTES + 1

    def _names(self, number: int, choice: Choice) -> dict[str, int]:
        its = self.folders[number]
        names = dict(its.durable)
        for index, (name, target) in enumerate(its.pending):
            if choice("name", number, index):
                if target is None:
                    names.pop(name, None)
                else:
                    names[name] = target
        return names

    def _content(self, number: int, choice: Choice) -> bytes:
        its = self.files[number]
        if not its.pending:
            return its.durable
        content = bytearray(its.durable)
        content.extend(bytes(max(its.size - len(content), 0)))
        for index, (offset, data) in enumerate(its.pending):
            kept = choice("data", number, index)
            if data is None:
                if kept:
                    content[offset:] = bytes(max(len(content) - offset, 0))
            elif kept is True:
                content[offset : offset + len(data)] = data
            elif kept:
                begin = offset
                for here in kept:
                    end = min((begin // SECTOR_BYTES + 1) * SECTOR_BYTES, offset + len(data))
                    if here:
                        content[begin:end] = data[begin - offset : end - offset]
                    begin = end
        size = its.size if choice("size", number, 0) else len(its.durable)
        content.extend(bytes(max(size - len(content), 0)))
        return bytes(content[:size])

    def state(self, choice: Choice) -> State:
        """Return what is on the disk when of the unsynced items these are kept."""
        tree: dict[str, int] = {}
        content: dict[int, bytes | None] = {0: None}
        todo = [("", 0)]
        while todo:
            path, number = todo.pop()
            for name, target in self._names(number, choice).items():
                below = f"{path}/{name}" if path else name
                tree[below] = target
                if target in self.folders:
                    content[target] = None
                    todo.append((below, target))
                elif target not in content:
                    content[target] = self._content(target, choice)
        return State(tree, content, self._fingerprint(tree, content))

    def _fingerprint(self, tree: Mapping[str, int], content: Mapping[int, bytes | None]) -> bytes:
        whole = hashlib.blake2b(digest_size=16)
        first: dict[int, int] = {}
        for path in sorted(tree):
            number = tree[path]
            its = content[number]
            if its is None:
                what = b"folder"
            else:
                what = self._digests.get(its) or hashlib.blake2b(its, digest_size=16).digest()
                self._digests[its] = what
            whole.update(f"{path}\0{first.setdefault(number, len(first))}\0".encode() + what)
        return whole.digest()


@dataclass(frozen=True)
class State:
    """What is on the disk after a cut: paths below the root, what they name, and what is in it."""

    tree: Mapping[str, int]
    content: Mapping[int, bytes | None]
    fingerprint: bytes

    def make(self, folder: Path) -> None:
        """Write it into a folder that is not there yet."""
        folder.mkdir()
        made: dict[int, Path] = {}
        for path in sorted(self.tree):  # a folder comes before what is in it
            number, target = self.tree[path], folder / path
            its = self.content[number]
            if its is None:
                target.mkdir()
            elif number in made:
                os.link(made[number], target)
            else:
                target.write_bytes(its)
                made[number] = target

    def __str__(self) -> str:
        def one(path: str) -> str:
            its = self.content[self.tree[path]]
            return f"{path}/" if its is None else f"{path} ({len(its)} bytes)"

        return "\n".join(f"  {one(path)}" for path in sorted(self.tree)) or "  nothing"


@dataclass(frozen=True)
class Cut:
    """A power cut: after how many calls, what is left, which choice that was, the notes so far."""

    calls: int
    state: State
    choice: Choice
    notes: tuple[Any, ...]


_KINDS = ("name", "data", "size")


def _only(label: str, *kinds: str) -> Choice:
    return Choice(label, {kind: kind in kinds for kind in _KINDS})


_ALL = _only("all kept", *_KINDS)
_NOTHING = _only("all lost")


def choices(medium: Medium, draw: random.Random, randoms: int) -> Iterator[Choice]:
    """Yield what of the unsynced items may be on the disk: extremes, single ones, random ones."""
    yield _NOTHING
    items = medium.items()
    if not items:
        return
    yield _ALL
    if any(kind != "name" for kind, *_ in items):
        yield _only("names only", "name")
        yield _only("names and lengths", "name", "size")
        yield _only("names and bytes, old lengths", "name", "data")
    for item in items:
        yield replace(_ALL, label=f"{item} lost", but={item: False})
        yield replace(_NOTHING, label=f"{item} kept", but={item: True})
        if item[0] == "data":
            yield replace(
                _only("", "name", "size"), label=f"of bytes {item} kept", but={item: True}
            )
            count = medium.sectors(item)
            tears = range(1, count)
            if count > _TEARS_MAX:
                tears = draw.sample(tears, _TEARS_MAX)
            for at in tears:
                for begins in (True, False):
                    kept = tuple((sector < at) == begins for sector in range(count))
                    label = f"{item} torn at sector {at}"
                    yield replace(_ALL, label=label, but={item: kept})
    for _ in range(randoms if len(items) > 1 else 0):
        chance = draw.choice(_PROBABILITIES)
        but: dict[Item, bool | tuple[bool, ...]] = {}
        for item in items:
            count = medium.sectors(item) if item[0] == "data" else 1
            kept = tuple(draw.random() < chance for _ in range(count))
            but[item] = kept[0] if count == 1 else kept
        yield replace(_NOTHING, label="random", but=but)


def cuts(log: Log, *, randoms: int = 4, seed: int = 0, first: int = 0) -> Iterator[Cut]:
    """Yield what power cuts may leave: before the first call, and after each.

    Parameters
    ----------
    log : Log
    randoms : int
        Random subsets for each call.
    seed : int
        Decides which.
    first : int
        Cuts after fewer calls are left out.
    """
    medium = log.start.copy()
    notes: list[Any] = []
    for done in range(len(log.calls) + 1):
        if done:
            call = log.calls[done - 1]
            medium.apply(call)
            if call.kind == "note":
                notes.append(call.note)
        if done < first:
            continue
        draw = random.Random(f"{seed} {done}")
        seen = set()
        for choice in choices(medium, draw, randoms):
            state = medium.state(choice)
            if state.fingerprint not in seen:
                seen.add(state.fingerprint)
                yield Cut(done, state, choice, tuple(notes))


def old_or_new(notes: Sequence[Any]) -> set[Any]:
    """Return the steps that may be found: the newest that is durable, and what was begun since.

    Notes are ("begin", step) and ("durable", step); before anything is durable None may be found.
    """
    durable = [index for index, note in enumerate(notes) if note[0] == "durable"]
    oldest = {notes[durable[-1]][1]} if durable else {None}
    newest = notes[durable[-1]][1] if durable else None
    begun = {
        note[1] for note in notes if note[0] == "begin" and (newest is None or note[1] > newest)
    }
    return oldest | begun


@dataclass
class Examiner:
    """Looks at states, and remembers what it saw.

    Parameters
    ----------
    look : callable
        Gets a folder with a state, which it may change; returns what is found there, and raises
        whatever it likes if something is wrong.
    scratch : Path
        Where states are made; best in memory.
    allowed : callable
        From the notes of a run to what may be found.
    """

    look: Callable[[Path], Any]
    scratch: Path
    allowed: Callable[[Sequence[Any]], Collection[Any]] = old_or_new
    seen: dict[bytes, Any] = field(default_factory=dict)
    cuts: int = 0

    def examine(self, log: Log, **how: Any) -> Cut | None:
        """Look at all cuts of a log (see `cuts`).

        Raises
        ------
        Violation
            Something is found that must not be.
        """
        for cut in cuts(log, **how):
            self.cuts += 1
            found = self.found(cut.state)
            plain = tuple(note for note in cut.notes if not isinstance(note, str))
            allowed = self.allowed(plain)
            if isinstance(found, Exception) or found not in allowed:
                raise Violation(_report(log, cut, found, allowed)) from (
                    found if isinstance(found, Exception) else None
                )

    def found(self, state: State) -> Any:
        """Return what is found in a state, or the error."""
        if state.fingerprint not in self.seen:
            folder = self.scratch / "state"
            state.make(folder)
            try:
                self.seen[state.fingerprint] = self.look(folder)
            except Exception as error:  # whatever it is, it belongs to this state
                self.seen[state.fingerprint] = error
            finally:
                shutil.rmtree(folder)
        return self.seen[state.fingerprint]

    def needed_syncs(self, log: Log, but: Collection[str] = (), **how: Any) -> set[str]:
        """Return the sites of the program whose fsyncs are needed in this run: without them, a
        state is found that must not be. Sites in `but` are left out.

        A site that no run needs is superfluous, or shows that the looks are blind.
        """
        syncs = log.syncs().items()
        return {site for site, its in syncs if site not in but and self.needs(log, its, **how)}

    def needs(self, log: Log, indices: Collection[int], **how: Any) -> bool:
        """Whether a state is found that must not be when these fsyncs are not done."""
        how = {**how, "first": max(min(indices) + 1, how.get("first", 0))}
        try:
            self.examine(log.without(indices), **how)
        except Violation:
            return True
        return False


def _names_of(log: Log, index: int) -> str:
    number = log.calls[index].number
    names = [call.name for call in log.calls if call.name and call.number == number]
    return f" ({', '.join(names)})" if names else ""


def _report(log: Log, cut: Cut, found: Any, allowed: Collection[Any]) -> str:
    before = range(max(cut.calls - 6, 0), cut.calls)
    lines = [f"  {index}: {log.calls[index]}{_names_of(log, index)}" for index in before]
    what = f"{type(found).__name__}: {found}" if isinstance(found, Exception) else repr(found)
    return "\n".join(
        [
            f"power cut after {cut.calls} of {len(log.calls)} calls, {cut.choice.label}: "
            f"found {what}, where one of {sorted(allowed, key=repr)} must be",
            "the last calls:",
            *lines,
            "what is left:",
            str(cut.state),
        ]
    )
