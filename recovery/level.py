"""One directory of a store: how it is laid out, checked, filled, read and cleaned.

    PATH/STORE.json                             the format and its version
    PATH/slots/0000000042.json                  the log (log.py); a commit has the manifest in it
    PATH/shards/<incarnation>-<save>-<writer>.h5  the arrays (shards.py)
    PATH/tmp/                                   what is not finished

A save is in two parts, so that many processes can share one: each writer calls `write`, which
returns what is durable now; one of them calls `commit` with the answers of all.

What the file system must give: a link that only one process gets, and the fsync of folders. Both
are tried when a store is opened. HDF5's own locks are not used.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


from hopcoll.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from recovery import shards
from recovery.disk import Disk
from recovery.log import Commit, Log, Record, UncertainError, publish, read_sealed

__all__ = ["Level", "Problem", "PrunedError", "Written", "retention"]

_FORMAT = "hopcoll checkpoint store"
_FOLDERS = ("shards", "slots", "tmp")
_SHARD = re.compile(r"([0-9a-f]+)-(\d+)-[\w.]+\.h5")
_TEMPORARY = re.compile(r"([0-9a-f]+)-.*")
#: A shard is referred to, instead of written anew, where at least this much of it is used.
_REUSED_MIN = 0.3
_OPENINGS_MAX = 5


@dataclass(frozen=True)
class Written:
    """What a writer made durable, or found durable in older shards.

    Attributes
    ----------
    pieces : list of [str, int]
        For each array: its shard, and which of the shard's ranges; nothing for an empty array.
    shards : dict of str to dict
        The records of these shards.
    fresh : list of str
        Those of them that are new.
    """

    pieces: list[list[Any]]
    shards: dict[str, dict[str, Any]]
    fresh: list[str]


@dataclass(frozen=True)
class Problem:
    """Something that `Level.verify` found.

    Attributes
    ----------
    path : Path
        The file.
    dataset : str or None
        The dataset in it, where the bytes belong to one.
    text : str
    """

    path: Path
    dataset: str | None
    text: str

    def __str__(self) -> str:
        where = "" if self.dataset is None else f", dataset {self.dataset}"
        return f"{self.path}{where}: {self.text}"


class PrunedError(Exception):
    """A shard that a commit refers to was let die meanwhile; its arrays must be written anew."""


class Level:
    """A store's directory. Local; every call blocks for the disk.

    Parameters
    ----------
    root : path
    disk : Disk
    incarnation : str, optional
        The name of the process or the job that writes; all of its writers use the same.
    member : str, default "0"
        Tells the processes of one job apart.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        disk: Disk,
        incarnation: str | None = None,
        member: str = "0",
    ) -> None:
        self.root = Path(root)
        self.log = Log(self.root, disk, incarnation, member)
        self._disk = disk
        self._used: dict[int, frozenset[str]] = {}  # the shards of a slot
        self._listed: tuple[list[str], list[str]] = ([], [])

    # Opening

    def take(self) -> Record:
        """Make the directory where it is missing, try the file system, and become the owner.

        Raises
        ------
        CheckpointMismatchError
            The directory holds something else, or a newer version of a store.
        CheckpointError
            It cannot be written to, or the file system is not fit.
        """
        with self._explained("cannot be opened for writing"):
            for tries_left in reversed(range(_OPENINGS_MAX)):
                try:
                    self._prepare()
                    self._try_links()
                    break
                except FileNotFoundError:  # who opens it at the same time took it for rubbish
                    if not tries_left:
                        raise
            self._list()
            record = self.log.open()
        self.clean(record)
        return record

    def look(self) -> Record | None:
        """Open the directory to read it; returns the highest slot.

        Raises
        ------
        CheckpointNotFoundError, CheckpointMismatchError, CheckpointCorruptError
        """
        with self._explained("cannot be read"):
            if not (self.root / "STORE.json").exists():
                raise CheckpointNotFoundError(f"{self.root} holds no checkpoint store", self.root)
            self._check_format()
            return self.log.refresh()

    def _prepare(self) -> None:
        root = self.root
        if root.exists() and not root.is_dir():
            raise CheckpointMismatchError(f"{root} is no directory", root)
        missing = [path for path in (root, *root.absolute().parents) if not path.exists()]
        if not (root / "STORE.json").exists():
            # What is there may be of one who was killed before the fsync.
            self._disk.fsync_folder((missing[-1].parent if missing else root).absolute().parent)
            for path in reversed(missing):
                self._mkdir(path)
            others = sorted(set(os.listdir(root)) - {*_FOLDERS, "STORE.json", "lost+found"})
            if others:
                raise CheckpointMismatchError(
                    f"{root} holds something else ({others[0]}); a store wants a directory of "
                    "its own",
                    root,
                )
            for name in _FOLDERS:
                self._mkdir(root / name)
            publish(
                self._disk,
                {"format": _FORMAT, "made_by": self.log.incarnation},
                root / "tmp" / f"{self.log.label}-store",
                root / "STORE.json",
            )
        self._disk.fsync_folder(root)
        self._check_format()

    def _mkdir(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            self._disk.mkdir(path)
        self._disk.fsync_folder(path.absolute().parent)

    def _check_format(self) -> None:
        path = self.root / "STORE.json"
        if read_sealed(path).get("format") != _FORMAT:
            raise CheckpointMismatchError(f"{path} is of something else", path)

    def _try_links(self) -> None:
        first = self.root / "tmp" / f"{self.log.label}-try"
        second = self.root / "tmp" / f"{self.log.label}-tried"
        third = self.root / "tmp" / f"{self.log.label}-third"
        for path in (first, third):
            self._disk.close(self._disk.create(path))
        try:
            self._disk.link(first, second)
            try:
                self._disk.link(third, second)
            except FileExistsError:
                return
            raise CheckpointError(
                f"{self.root}: this file system gives one name to two files; a store needs links "
                "that are exclusive",
                self.root,
            )
        finally:
            for path in (first, second, third):
                with contextlib.suppress(OSError):
                    self._disk.unlink(path)

    # Saving

    def write(
        self,
        save: int,
        writer: str,
        datasets: Sequence[shards.Dataset],
        *,
        base: Record | None = None,
        compression: str | None = None,
        step: int = 0,
    ) -> Written:
        """Make arrays durable: as a new shard, or by reference to those of the commit `base`.

        Parameters
        ----------
        save : int
            Counts the saves of this incarnation.
        writer : str
            Tells the writers of a save apart: letters, digits, dots.
        datasets : sequence of (str, ndarray)
        base : Record, optional
            The commit whose arrays need not be written again.
        compression : {None, "blosc2", "zstd"}
        step : int
            Noted in the file, for people.

        Raises
        ------
        CheckpointError
            The disk refused; no shard stays.
        """
        pieces, used = self._unchanged(datasets, base)
        rest = [i for i, (_, array) in enumerate(datasets) if array.nbytes and not pieces[i]]
        if not rest:
            return Written(pieces, used, [])
        name = f"{self.log.incarnation}-{save}-{writer}.h5"
        path = self.root / "shards" / name
        try:
            with self._explained(f"step {step} cannot be saved"):
                record = shards.write_shard(
                    self._disk,
                    path,
                    [datasets[i] for i in rest],
                    compression=compression,
                    attributes={"hopcoll": "shard of a checkpoint store", "step": step},
                )
                self._disk.fsync_folder(path.parent)
        except BaseException:
            self.discard([name])
            raise
        for index, i in enumerate(rest):
            pieces[i] = [name, index]
        return Written(pieces, {**used, name: record}, [name])

    def discard(self, names: Sequence[str]) -> None:
        """Remove shards that no commit will refer to. What stays is for the next clean-up."""
        for name in names:
            with contextlib.suppress(OSError):
                self._disk.unlink(self.root / "shards" / name)

    def commit(
        self,
        step: int,
        save: int,
        parent: int | None,
        manifest: dict[str, Any],
        retain: Callable[[list[Commit]], list[Commit]],
        fresh: Sequence[str] = (),
    ) -> Record:
        """Commit what was written; when this returns, it is durable. `clean` is to follow.

        After an error the new shards are still there. Whether they may go is for all to say that
        could commit them.

        Parameters
        ----------
        step, save, parent, retain
            As for `Log.commit`.
        manifest : dict
            Has ``shards``, the records of all shards that it refers to.
        fresh : sequence of str
            Those that are new.

        Raises
        ------
        PrunedError
            Nothing was committed: a shard that is not new is no longer there for it.
        CheckpointFencedError
        CheckpointError
            The disk refused; the step may be committed where the cause is an `UncertainError`.
        """
        old = set(manifest["shards"]) - set(fresh)

        def build(head: Record) -> dict[str, Any]:
            self._list()
            if lost := old - self._in_use(head, needed=old):
                raise PrunedError(lost)
            return manifest

        with self._explained(f"step {step} cannot be saved"):
            record = self.log.commit(step, save, parent, build, retain)
        self._used[record.number] = frozenset(manifest["shards"])
        return record

    def abort(self, save: int) -> bool:
        """Keep a save from being committed later, by whoever tried it; see `Log.abort`."""
        with self._explained(f"save {save} cannot be given up"):
            return self.log.abort(save)

    def prune(self, retain: Callable[[list[Commit]], list[Commit]]) -> Record | None:
        """Let commits die and remove what only they need; also beside an owner that goes on."""
        with self._explained("cannot be pruned"):
            self._check_format()
            record = self.log.prune(retain, lambda head: self._list())
            if record is not None:
                self.clean(record)
            return record

    def clean(self, record: Record) -> None:
        """Remove what is dead from `record` on, a slot that this process has just filled.

        Raises
        ------
        CheckpointError
            The disk refused. The next clean-up tries again.
        """
        files, temporaries = self._listed
        with self._explained("cannot be cleaned"):
            for number in self.log.void_slots(record):
                self._unlink(self.log.path(number))
            for name in temporaries:
                if (match := _TEMPORARY.fullmatch(name)) and match[1] != record.owner:
                    self._unlink(self.root / "tmp" / name)
            try:
                used = self._in_use(record)
            except CheckpointCorruptError as error:
                warnings.warn(f"no shard was removed: {error}", RuntimeWarning, stacklevel=2)
                return
            except FileNotFoundError:
                return  # a later prune let one of these commits die, and cleans for this one too
            for name in files:
                match = _SHARD.fullmatch(name)
                if match is None or name in used:
                    continue
                if match[1] != record.owner or int(match[2]) <= record.save:
                    self._unlink(self.root / "shards" / name)
        self._used = {one.slot: self._used[one.slot] for one in record.alive}

    def _unlink(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # two clean-ups at once
            self._disk.unlink(path)

    def _list(self) -> None:
        """Note what is there, before a slot is filled: only this may be removed afterwards."""
        self._listed = os.listdir(self.root / "shards"), os.listdir(self.root / "tmp")

    def _in_use(self, record: Record, needed: set[str] | None = None) -> frozenset[str]:
        """Return the shards of the living commits; with `needed`, only as many as tell of these."""
        used: frozenset[str] = frozenset()
        for commit in reversed(record.alive):
            if needed is not None and needed <= used:
                break
            if commit.slot not in self._used:
                try:
                    body = self.log.read(commit.slot).body
                except FileNotFoundError:
                    if needed is None:
                        raise
                    continue  # pruned meanwhile, so the slot is lost as well
                self._used[commit.slot] = frozenset(body["shards"])
            used |= self._used[commit.slot]
        return used

    def _unchanged(
        self, datasets: Sequence[shards.Dataset], base: Record | None
    ) -> tuple[list[list[Any]], dict[str, dict[str, Any]]]:
        """Find the arrays in the shards of a commit: their pieces, and the shards' records."""
        pieces: list[list[Any]] = [[] for _ in datasets]
        if base is None:
            return pieces, {}
        known: dict[tuple[int, str], list[tuple[str, int]]] = {}
        for name, record in base.body["shards"].items():
            for index, entry in enumerate(record["ranges"]):
                if entry["nbytes"]:
                    known.setdefault((entry["nbytes"], entry["probe"]), []).append((name, index))
        found_bytes: dict[str, int] = {}
        for i, (_, array) in enumerate(datasets):
            places = known.get((array.nbytes, shards.probe(array))) if array.nbytes else None
            for name, index in places or ():
                content = shards.content_of(base.body["shards"][name]["ranges"][index])
                if all(map(str.__eq__, content, shards.hash_pieces(array))):
                    pieces[i] = [name, index]
                    found_bytes[name] = found_bytes.get(name, 0) + array.nbytes
                    break
        kept = {
            name: base.body["shards"][name]
            for name, count in found_bytes.items()
            if count >= _REUSED_MIN * base.body["shards"][name]["nbytes"]
        }
        return [piece if piece and piece[0] in kept else [] for piece in pieces], kept

    # Reading

    def read_commit(self, commit: Commit) -> Record:
        """Return the slot of a living commit."""
        try:
            with self._explained(
                f"step {commit.step} cannot be read", but=(FileNotFoundError,)
            ):
                return self.log.read(commit.slot)
        except FileNotFoundError:
            path = self.log.path(commit.slot)
            raise self._missing(path, commit) from None

    def _missing(self, path: Path, commit: Commit) -> CheckpointError:
        head = self.log.refresh()
        if head is not None and commit in head.alive:
            return CheckpointCorruptError(f"{path} is missing", path)
        return CheckpointNotFoundError(
            f"{self.root}: step {commit.step} was pruned while it was read", self.root
        )

    def verify(
        self, *, partial: bool = False, progress: Callable[[int], Any] | None = None
    ) -> Iterator[Problem]:
        """Read every byte of the store that counts, and yield what is wrong with it.

        Where it is `partial`, shards may be missing: other hosts have them. `progress` is called
        with the size of each shard that was read.
        """
        with self._explained("cannot be read"):
            slots: dict[int, Record] = {}
            try:
                self._check_format()
            except CheckpointError as error:
                yield _problem(self.root / "STORE.json", error)
            except FileNotFoundError:
                yield Problem(self.root / "STORE.json", None, "is missing")
            numbers = self.log.numbers()
            unread: dict[int, Problem] = {}
            for number in numbers:
                try:
                    slots[number] = self.log.read(number)
                except FileNotFoundError:
                    continue  # pruned meanwhile
                except CheckpointError as error:
                    unread[number] = _problem(self.log.path(number), error)
            head = slots[max(slots)] if slots else None
            yield from (unread[n] for n in unread if head is None or head.counts(n))
            if head is None:
                return
            # Where the highest slot cannot be read, what those below it name may be gone by right.
            certain = head.number == numbers[-1]
            seen = set()
            for commit in head.alive:
                if commit.slot not in slots:
                    if certain and not self.log.path(commit.slot).exists():
                        yield Problem(self.log.path(commit.slot), None, "is missing")
                    continue
                for name, record in slots[commit.slot].body["shards"].items():
                    path = self.root / "shards" / name
                    if name not in seen and (path.exists() or (certain and not partial)):
                        seen.add(name)
                        for dataset, text in shards.check_shard(path, record):
                            yield Problem(path, dataset, text)
                        if progress is not None:
                            progress(record["nbytes"])

    @contextlib.contextmanager
    def _explained(self, what: str, *, but: tuple[type[OSError], ...] = ()) -> Iterator[None]:
        """Turn an `OSError` into a `CheckpointError` that says what cannot be done."""
        try:
            yield
        except (CheckpointError, *but):
            raise
        except UncertainError as error:
            raise CheckpointError(
                f"{self.root}: whether the last slot is durable is not known: {error}", self.root
            ) from error
        except OSError as error:
            raise CheckpointError(f"{self.root} {what}: {error}", self.root) from error


def retention(keep_last: int, keep_every: int | None) -> Callable[[list[Commit]], list[Commit]]:
    """Return what keeps the last commits, and those whose step is a multiple of `keep_every`."""

    def retain(chain: list[Commit]) -> list[Commit]:
        old, new = chain[:-keep_last], chain[-keep_last:]
        return [one for one in old if keep_every and one.step % keep_every == 0] + new

    return retain


def _problem(path: Path, error: CheckpointError) -> Problem:
    return Problem(path, None, str(error).removeprefix(f"{path} "))
