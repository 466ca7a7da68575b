"""Where workflows are kept: one directory, a folder for each of them.

    PATH/STORE.json                  the format and its version
    PATH/ID/journal/                 its journal (recovery.journal), and the lease of who runs it
    PATH/ID/values/                  large values, one HDF5 file each
    PATH/ID/events/                  what came from outside
    PATH/ID/cancel                   somebody wants it to end
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hopcoll.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    WorkflowError,
    WorkflowFencedError,
    WorkflowMismatchError,
    WorkflowNotFoundError,
    WorkflowRunningError,
)
from recovery.disk import Disk, writing
from recovery.journal import Journal
from recovery.lease import Lease, Verdict, describe_owner, observe, release
from recovery.log import publish, read_sealed
from recovery.runs import refusal
from recovery.workflows import values
from recovery.workflows.ledger import INLINE, LIVE, NOWHERE, Ledger
from recovery.workflows.references import arrays_for, key_of

__all__ = ["Folder", "Store"]

_FORMAT = "hopcoll workflow store"
_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,99}")
#: Larger graphs and arguments have a file of their own.
_SPOOL_BYTES_MAX = 1 << 20
_EVENT_BYTES_MAX = 1 << 20
_ERROR_LENGTH_MAX = 4000
#: By which nonces this process was about to take a workflow over, and did not.
_GIVEN_UP: set[str] = set()


class Store:
    """A directory of workflows. Local; its calls block for the disk.

    Parameters
    ----------
    path : path
    disk : Disk, optional
    """

    def __init__(self, path: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self.path = Path(path).absolute()
        self.disk = Disk() if disk is None else disk

    def create(self) -> None:
        """Make the directory where it is missing, and check what it is.

        Raises
        ------
        WorkflowMismatchError
            It is something else, or of a newer version.
        WorkflowError
            It cannot be made.
        """
        try:
            missing = [one for one in (self.path, *self.path.parents) if not one.exists()]
            for one in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    self.disk.mkdir(one)
            for one in missing or [self.path]:
                self.disk.fsync_folder(one.parent)
            mark = self.path / "STORE.json"
            if not mark.exists():
                names = os.listdir(self.path)
                others = [name for name in names if not name.startswith(".mark-")]
                if others and mark.name not in names:  # another process may have made it just now
                    raise WorkflowMismatchError(
                        f"{self.path} holds something else ({sorted(others)[0]}); workflows want "
                        "a directory of their own"
                    )
                document = {"format": _FORMAT, "workflows": _VERSION}
                publish(self.disk, document, self.path / f".mark-{secrets.token_hex(8)}", mark)
            self.check()
        except OSError as error:
            if isinstance(error, WorkflowError):
                raise
            raise WorkflowError(f"{self.path} cannot be used for workflows: {error}") from error

    def check(self) -> None:
        """Raise `WorkflowMismatchError` where it is something else, or newer."""
        try:
            document = read_sealed(self.path / "STORE.json")
        except FileNotFoundError:
            raise WorkflowNotFoundError(f"{self.path} holds no workflows") from None
        except CheckpointMismatchError as error:
            raise WorkflowMismatchError(str(error)) from error
        if document.get("format") != _FORMAT:
            raise WorkflowMismatchError(
                f"{self.path} is a {document.get('format', 'directory of something else')}, and "
                "no store of workflows"
            )
        if document["workflows"] > _VERSION:
            raise WorkflowMismatchError(
                f"{self.path} is of version {document['workflows']}, and this hopcoll knows up to "
                f"{_VERSION}: install a newer one"
            )

    def ids(self) -> list[str]:
        """Return the names of all workflows that were begun, in order."""
        self.check()
        return sorted(
            entry.name
            for entry in os.scandir(self.path)
            if entry.is_dir() and (Path(entry.path) / "journal").is_dir()
        )

    def folder(self, identifier: str) -> Folder:
        return Folder(self, identifier)


class Folder:
    """One workflow's folder.

    Attributes
    ----------
    id : str
    path : Path
    journal : Journal
        After `open`.
    nonce : str
        Of this process's owner, after `open`.
    uuid : str
        Of the workflow, after `open` and the start.
    """

    journal: Journal
    nonce: str
    uuid: str

    def __init__(self, store: Store, identifier: str) -> None:
        if not isinstance(identifier, str) or not _NAME.fullmatch(identifier):
            raise ValueError(
                "id of a workflow must be 1 to 100 letters, digits, _ . = + or -, and begin with "
                f"a letter, digit or _, not {identifier!r}"
            )
        self.store = store
        self.id = identifier
        self.path = store.path / identifier
        self._disk = store.disk
        self._lease: Lease | None = None
        self._count = itertools.count(1)
        self._proven: Callable[[dict[str, Any]], bool] | None = None

    # Looking

    def look(self) -> tuple[Ledger, dict[str, Any] | None]:
        """Return what the journal says, and who wrote it last; whoever runs it goes on.

        Raises
        ------
        WorkflowNotFoundError, WorkflowMismatchError
        CheckpointCorruptError
        """
        self.store.check()
        try:
            reading = Journal.read(self.path / "journal")
        except CheckpointNotFoundError:
            raise WorkflowNotFoundError(f"{self.store.path} has no workflow {self.id}") from None
        except CheckpointMismatchError as error:
            raise WorkflowMismatchError(str(error)) from error
        ledger = Ledger()
        for record in reading.records:
            ledger.apply(record.kind, record.head, record.body, record.seq)
        if ledger.status in ("empty", "deleted"):
            raise WorkflowNotFoundError(f"{self.store.path} has no workflow {self.id}")
        return ledger, reading.owner

    def is_left(self) -> bool:
        """Whether there is a folder, of whatever is left in it of a workflow."""
        self.store.check()
        return (self.path / "journal").is_dir()

    def watch(self, owner: dict[str, Any] | None, patience_s: float) -> Verdict:
        """Tell what an owner does."""
        return observe(self.path / "journal", owner, patience_s, proven_dead=self._proven)

    # Owning

    def open(
        self,
        patience_s: float,
        *,
        beat_s: float = 1.0,
        proven_dead: Callable[[dict[str, Any]], bool] | None = None,
        lost: Callable[[dict[str, Any]], bool] | None = None,
        force: bool = False,
    ) -> Ledger:
        """Take the workflow over, and return what its journal says.

        `lost` tells of an owner that nobody hears any more, though it may not be dead: so nobody
        waits for it either.

        Raises
        ------
        WorkflowRunningError
            Another process runs it.
        WorkflowFencedError
            Another took it over at the same moment. Or a later start of this process's batch job
            has it.
        """
        self._proven = proven_dead
        journal_path = self.path / "journal"
        for path in (self.path, journal_path):
            with writing(f"workflow {self.id}", path):
                with contextlib.suppress(FileExistsError):
                    self._disk.mkdir(path)
                if not path.is_dir():
                    raise WorkflowMismatchError(f"{path} is no folder of a workflow")
                self._disk.fsync_folder(path.parent)
        reading = Journal.read(journal_path)
        # Before a segment is taken, which would fence the later start.
        if why := refusal(f"workflow {self.id}", reading.owner):
            raise WorkflowFencedError(why)
        over = []
        if reading.owner is not None and not reading.closed:
            gone = lost is not None and lost(reading.owner)
            verdict = self.watch(reading.owner, 0.0 if gone else patience_s)
            if reading.owner["nonce"] in _GIVEN_UP:
                verdict = "free"
            if verdict == "running" and not (force or gone):
                raise WorkflowRunningError(
                    f"workflow {self.id} runs in process {reading.owner['pid']} of "
                    f"{reading.owner['host']} (since {reading.owner['since']})"
                )
            if verdict in ("dead", "free"):
                over.append(reading.owner["nonce"])
        elif reading.owner is not None:
            over.append(reading.owner["nonce"])
        owner = describe_owner()
        self.nonce = owner["nonce"]
        self.journal = Journal(journal_path, self._disk, owner)
        self._owner, self._over = owner, over
        try:
            records = self.journal.open()
            self._lease = Lease(journal_path, owner, beat_s=beat_s)
            ledger = Ledger()
            for record in records:
                ledger.apply(record.kind, record.head, record.body, record.seq)
            if ledger.status == "deleted":
                ledger = Ledger()
                self._empty()  # who deleted it may not have come so far
            if ledger.start is not None:
                self.uuid = ledger.start["uuid"]
            self._clean(ledger)
        except BaseException:
            # Else it would seem to run for as long as this process does.
            _GIVEN_UP.add(self.nonce)
            if self._lease is None:
                release(journal_path, owner)
            with contextlib.suppress(Exception):
                self.close()
            raise
        return ledger

    def start(self, ledger: Ledger, fingerprint: str, graph: bytes) -> None:
        """Write down what the workflow is; durable when this returns."""
        self.uuid = secrets.token_hex(16)
        place, body = self.spool(graph, "the graph")
        head = {"uuid": self.uuid, "print": fingerprint, "owner": self._owner, **place}
        self._put(ledger, "start", head, body)

    def resume(self, ledger: Ledger) -> None:
        """Write down that this process goes on with it."""
        with contextlib.suppress(FileNotFoundError):
            self._disk.unlink(self.path / "cancel")
        self._put(ledger, "resume", {"owner": self._owner, "over": self._over})

    def end(
        self, ledger: Ledger, status: str, error: str | None = None, output: str | None = None
    ) -> None:
        """Write down how it ended."""
        error = None if error is None else error[:_ERROR_LENGTH_MAX]
        self._put(ledger, "end", {"status": status, "error": error, "output": output})

    def _put(
        self, ledger: Ledger, kind: str, head: dict[str, Any], body: bytes = b""
    ) -> None:
        seq = self.journal.append(kind, head, body)
        ledger.apply(kind, head, body, seq)
        self.journal.flush()

    def is_dead(self, owner: dict[str, Any]) -> bool:
        """Whether a process is known to do nothing any more."""
        return self.watch(owner, 0.0) == "dead"

    def close(self) -> None:
        """Let others have it."""
        lease, self._lease = self._lease, None
        try:
            self.journal.close()
        finally:
            if lease is not None:
                lease.stop()

    def _clean(self, ledger: Ledger) -> None:
        """Remove the files of values that were never recorded."""
        used = {
            state.done.head["f"]
            for state in ledger.states.values()
            if state.done is not None and state.done.place != NOWHERE and "f" in state.done.head
        } | {
            begun.head["f"]
            for state in ledger.states.values()
            for begun in (state.begun, state.undoable)
            if begun is not None and "f" in begun.head
        } | {
            begun.head["f"]
            for rows in ledger.attic.values()
            for _, begun in rows
            if "f" in begun.head
        }
        if ledger.start is not None and "f" in ledger.start:
            used.add(ledger.start["f"])
        ledger.dropped.clear()
        with contextlib.suppress(FileNotFoundError):
            self.remove_values([n for n in os.listdir(self.path / "values") if n not in used])

    # Values

    def write_value(self, packed: values.Packed, what: str) -> dict[str, Any]:
        """Make a value durable in a file of its own; returns what a record says of it."""
        folder = self.path / "values"
        name = f"{self.nonce}-{next(self._count)}.h5"
        try:
            with writing(what, folder / name):
                if not folder.is_dir():
                    with contextlib.suppress(FileExistsError):
                        self._disk.mkdir(folder)
                    self._disk.fsync_folder(self.path)
                shard = values.write(self._disk, folder / name, packed)
                self._disk.fsync_folder(folder)
        except BaseException:
            self.remove_values([name])
            raise
        return {"f": name, "sh": shard}

    def read_value(
        self, head: dict[str, Any], body: bytes, task: str,
        put: Callable[[Any, Any], object] | None = None,
    ) -> Any:  # fmt: skip
        """Return a value that is durable. `put` is told what is behind its refs, ref by ref;
        without it, the arrays stand in their place."""
        if head["st"] in (INLINE, LIVE):
            return values.unpack(body)
        what = f"the value of {task}"
        value = values.read(self.path / "values", head["f"], head["sh"], what)
        if not head.get("rf"):
            return value
        value, objects = values.without_objects(value)
        if put is None:
            return arrays_for(value, {key_of(ref): array for ref, array in objects})
        for ref, array in objects:
            put(ref, array)
        return value

    def remove_values(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                self._disk.unlink(self.path / "values" / name)

    def spool(self, data: bytes, what: str) -> tuple[dict[str, Any], bytes]:
        """Return the head and the body of a record for bytes that may be too many for it."""
        if len(data) <= _SPOOL_BYTES_MAX:
            return {}, data
        return self.write_value(values.Packed(values.dumps(None, ""), [data]), what), b""

    def unspool(self, body: bytes, head: dict[str, Any]) -> bytes:
        """Return the bytes that `spool` put away."""
        if "f" not in head:
            return body
        return values.read_bytes(self.path / "values", head["f"], head["sh"])

    # Events, and the wish to end

    def send(self, key: str, payload: Any, event_id: str) -> bool:
        """Make an event durable. False where one with this id was sent before.

        Raises
        ------
        WorkflowError
            It cannot be stored.
        """
        if not isinstance(event_id, str):
            raise TypeError(f"event_id must be a text, not {event_id!r}")
        body = values.dumps(payload, f"the event {event_id}")
        if len(body) > _EVENT_BYTES_MAX:
            raise WorkflowError(
                f"the event {event_id} has {len(body)} bytes, and {_EVENT_BYTES_MAX} is the most: "
                "put it into a file, and send its name"
            )
        folder = self.path / "events"
        with contextlib.suppress(FileExistsError):
            self._disk.mkdir(folder)
        self._disk.fsync_folder(self.path)
        name = hashlib.sha256(f"{key}\n{event_id}".encode()).hexdigest()[:32]
        document = {
            "id": event_id,
            "key": key,
            "time": time.time(),
            "body": base64.b64encode(body).decode(),
        }
        new = publish(
            self._disk, document, folder / f".{secrets.token_hex(8)}", folder / f"{name}.json"
        )
        if not new:
            self._disk.fsync_folder(folder)  # who sent it first may not have come so far
        return new

    def events(self, key: str, given: set[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the events of a key that were not given out, oldest first."""
        try:
            names = os.listdir(self.path / "events")
        except FileNotFoundError:
            return
        found = []
        for name in names:
            if not name.endswith(".json") or name[:-5] in given:
                continue
            document = read_sealed(self.path / "events" / name)
            if document["key"] == key:
                found.append((document["time"], name[:-5], document["body"]))
        for _, identifier, body in sorted(found):
            if identifier not in given:
                yield identifier, base64.b64decode(body)

    def request_cancel(self) -> None:
        """Ask whoever runs it to end."""
        path = self.path / "cancel"
        with contextlib.suppress(FileExistsError):
            self._disk.close(self._disk.create(path))

    def cancel_requested(self) -> bool:
        return (self.path / "cancel").exists()

    def delete(self) -> None:
        """Remove it; the journal of this process is open. Where it is cut off, nothing of it counts
        from the first moment on, and the next call removes the rest."""
        self.journal.compact([("end", {"status": "deleted", "error": None}, b"")])
        self.close()
        self._empty()
        journal = self.path / "journal"
        *others, newest = sorted(os.listdir(journal), key=_segments_last)
        for entry in others:
            self._disk.unlink(journal / entry)
        # The segment that says so goes when no older one can come back any more.
        self._disk.fsync_folder(journal)
        self._disk.unlink(journal / newest)
        self._disk.rmdir(journal)
        self._disk.rmdir(self.path)
        self._disk.fsync_folder(self.store.path)

    def _empty(self) -> None:
        """Remove all but the journal."""
        for name in ("values", "events"):
            folder = self.path / name
            if folder.is_dir():
                for entry in os.listdir(folder):
                    self._disk.unlink(folder / entry)
                self._disk.rmdir(folder)
        with contextlib.suppress(FileNotFoundError):
            self._disk.unlink(self.path / "cancel")
        self._disk.fsync_folder(self.path)


def _segments_last(name: str) -> tuple[bool, str]:
    return name.endswith(".seg"), name
