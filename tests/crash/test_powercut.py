"""Every state that a power cut may leave of a store, and what is found in it.

The first half looks at the looks: a small log of checksummed files (`Ledger`) shows that the model
of `tests.powercut` is as unkind as it says. The second half is the store's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from recovery.disk import Disk
from tests.powercut import (
    SECTOR_BYTES,
    Examiner,
    Killed,
    Log,
    RecordingDisk,
    cuts,
    old_or_new,
)

MEMORY = Path("/dev/shm")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where an fsync costs nothing."""
    folder = MEMORY / f"hopcoll-powercut-{os.getpid()}-{tmp_path.name}"
    folder = folder if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else tmp_path / "scratch"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def log(scratch: Path) -> Iterator[Log]:
    (scratch / "disk").mkdir()
    with Log(scratch / "disk") as made:
        yield made


def contents(log: Log, name: str = "file") -> set[bytes | None]:
    """What a file may hold after the last call; None: the name is not there."""
    last = len(log.calls)
    states = [cut.state for cut in cuts(log, first=last, randoms=64)]
    return {state.content[state.tree[name]] if name in state.tree else None for state in states}


A, B, C = (letter * SECTOR_BYTES for letter in (b"a", b"b", b"c"))
ZEROS = bytes(SECTOR_BYTES)


def test_an_unsynced_file_may_be_anything(log: Log) -> None:
    disk = RecordingDisk(log)
    descriptor = disk.create(log.root / "file")
    assert contents(log) == {None, b""}
    disk.write(descriptor, A + B, 0)
    torn = {A + ZEROS, ZEROS + B}
    assert contents(log) == {None, b"", A + B, ZEROS + ZEROS, *torn}
    disk.fsync_folder(log.root)
    assert contents(log) == {b"", A + B, ZEROS + ZEROS, *torn}
    disk.fsync(descriptor)
    assert contents(log) == {A + B}
    os.close(descriptor)


def test_writes_come_in_any_order_and_lengths_apart(log: Log) -> None:
    disk = RecordingDisk(log)
    descriptor = disk.create(log.root / "file")
    disk.write(descriptor, A, 0)
    disk.fsync(descriptor)
    assert contents(log) == {None, A}, "an fsync of the file does not keep its name"
    disk.fsync_folder(log.root)
    disk.write(descriptor, C, 0)
    disk.write(descriptor, B, SECTOR_BYTES)
    assert contents(log) == {A, C, A + ZEROS, C + ZEROS, A + B, C + B}
    disk.truncate(descriptor, 0)
    assert {b"", A} <= contents(log)
    disk.fsync(descriptor)
    assert contents(log) == {b""}
    os.close(descriptor)


def test_names_are_lost_each_for_itself(log: Log) -> None:
    disk = RecordingDisk(log)
    os.close(disk.create(log.root / "temporary"))
    disk.fsync_folder(log.root)
    disk.link(log.root / "temporary", log.root / "file")
    disk.unlink(log.root / "temporary")

    def names() -> set[frozenset[str]]:
        return {frozenset(cut.state.tree) for cut in cuts(log, first=len(log.calls))}

    subsets = {frozenset(), frozenset({"file"}), frozenset({"temporary"})}
    assert names() == {*subsets, frozenset({"file", "temporary"})}
    disk.fsync_folder(log.root)
    assert names() == {frozenset({"file"})}


def test_a_folder_takes_all_that_is_in_it_along(log: Log) -> None:
    disk = RecordingDisk(log)
    disk.mkdir(log.root / "folder")
    descriptor = disk.create(log.root / "folder" / "file")
    disk.write(descriptor, A, 0)
    disk.fsync(descriptor)
    os.close(descriptor)
    disk.fsync_folder(log.root / "folder")
    assert contents(log, "folder/file") == {None, A}
    disk.fsync_folder(log.root)
    assert contents(log, "folder/file") == {A}


def test_what_was_there_before_is_durable_and_states_can_be_made(scratch: Path) -> None:
    root = scratch / "disk"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "one").write_bytes(A)
    os.link(root / "folder" / "one", root / "two")
    with Log(root) as log:
        (cut,) = cuts(log)
        cut.state.make(scratch / "made")
    assert (scratch / "made" / "folder" / "one").read_bytes() == A
    assert (scratch / "made" / "two").samefile(scratch / "made" / "folder" / "one")


def test_old_or_new() -> None:
    notes = [("begin", 1), ("durable", 1), ("begin", 2), ("begin", 3), ("durable", 2)]
    found = [old_or_new(notes[:count]) for count in range(6)]
    assert found == [{None}, {None, 1}, {1}, {1, 2}, {1, 2, 3}, {2, 3}]


class Ledger:
    """A store of one owner: bytes in files of their own, and numbered slots that name them."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self.disk, self.path = disk, path
        for folder in (path, path / "bytes", path / "slots", path / "tmp"):
            if not folder.is_dir():
                disk.mkdir(folder)
        # Whoever made them may have died before it synced.
        disk.fsync_folder(path.parent)
        disk.fsync_folder(path)
        disk.fsync_folder(path / "slots")
        for name in os.listdir(path / "tmp"):
            disk.unlink(path / "tmp" / name)
        self.step, _ = self.newest()
        known = {self._slot(name)["file"] for name in os.listdir(path / "slots")}
        for name in set(os.listdir(path / "bytes")) - known:
            disk.unlink(path / "bytes" / name)

    def _slot(self, name: str) -> dict[str, str]:
        digest, _, text = (self.path / "slots" / name).read_text().partition(" ")
        assert digest == hashlib.md5(text.encode()).hexdigest(), f"slot {name} is torn"
        return json.loads(text)

    def newest(self) -> tuple[int | None, bytes]:
        names = os.listdir(self.path / "slots") if (self.path / "slots").is_dir() else []
        if not names:
            return None, b""
        slot = self._slot(max(names))
        content = (self.path / "bytes" / slot["file"]).read_bytes()
        assert hashlib.md5(content).hexdigest() == slot["digest"], f"{slot['file']} is torn"
        return int(max(names)), content

    def save(self, content: bytes) -> int:
        step = (self.step or 0) + 1
        target = self.path / "bytes" / f"{step:03}"
        descriptor = self.disk.create(target)
        half = len(content) // 2
        self.disk.write(descriptor, content[half:], half)
        self.disk.write(descriptor, content[:half], 0)
        self.disk.fsync(descriptor)
        os.close(descriptor)
        self.disk.fsync_folder(target.parent)
        text = json.dumps({"file": target.name, "digest": hashlib.md5(content).hexdigest()})
        temporary = self.path / "tmp" / f"{step:03}"
        descriptor = self.disk.create(temporary)
        self.disk.write(descriptor, f"{hashlib.md5(text.encode()).hexdigest()} {text}".encode(), 0)
        self.disk.fsync(descriptor)
        os.close(descriptor)
        self.disk.link(temporary, self.path / "slots" / f"{step:03}")
        self.disk.fsync_folder(self.path / "slots")
        self.disk.unlink(temporary)
        self.step = step
        return step


def content_of(step: int | None) -> bytes:
    return hashlib.shake_128(str(step).encode()).digest(1800) if step else b""


def look_at_ledger(folder: Path) -> int | None:
    """What is in a ledger after a cut: whole, and fit for a next save."""
    ledger = Ledger(Disk(), folder / "store")
    step, content = ledger.newest()
    assert content == content_of(step)
    assert ledger.save(content_of((step or 0) + 1)) == (step or 0) + 1
    return step


def fill(log: Log, disk: RecordingDisk, saves: int) -> None:
    ledger = Ledger(disk, log.root / "store")
    if ledger.step is not None:
        log.note(("durable", ledger.step))
    for _ in range(saves):
        log.note(("begin", (ledger.step or 0) + 1))
        log.note(("durable", ledger.save(content_of((ledger.step or 0) + 1))))


def calls_of(log: Log) -> int:
    return len([call for call in log.calls if call.kind != "note"])


def test_a_sound_ledger_and_each_of_its_fsyncs(log: Log, scratch: Path) -> None:
    fill(log, RecordingDisk(log), saves=3)
    examiner = Examiner(look_at_ledger, scratch)
    examiner.examine(log)
    assert set(examiner.seen.values()) == {None, 1, 2, 3}
    # The ledger was empty when it was opened: there was no slot yet whose name could be lost.
    assert len(set(log.syncs()) - examiner.needed_syncs(log)) == 1


def test_a_successor_syncs_what_it_adopts(log: Log, scratch: Path) -> None:
    """One owner is killed at any call, and its successor loses the power at any call."""
    fill(log, RecordingDisk(log), saves=2)
    examiner = Examiner(look_at_ledger, scratch)
    needed = set()
    for lives in range(calls_of(log)):
        root = scratch / f"killed after {lives}"
        root.mkdir()
        with Log(root) as taken:
            with pytest.raises(Killed):
                fill(taken, RecordingDisk(taken, lives_for=lives), saves=2)
            killed_at = len(taken.calls)
            fill(taken, RecordingDisk(taken), saves=1)
            examiner.examine(taken, first=killed_at)
            needed |= examiner.needed_syncs(taken, first=killed_at)
    assert needed == set(log.syncs())
    assert len(needed) == 7
