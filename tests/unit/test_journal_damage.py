"""The journal of a workflow: what is wrong on the disk, and what is wrong with a call."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hopcoll.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    WorkflowFencedError,
)
from recovery import segments
from recovery.disk import Disk
from recovery.journal import Journal
from tests.journals import OWNER, heads, opened, put


def two_owners(folder: Path) -> Path:
    """A journal of several groups in two segments, closed; return the second one."""
    first = opened(folder)
    for number in range(4):
        put(first, number, 10 + number)
    second = opened(folder)
    for number in range(4, 7):
        put(second, number)
    second.append("number", {"at": 7}, bytes(range(256)) * 4)
    second.close()
    return segments.path_of(folder, 2)


def flips(path: Path, count: int, seed: int) -> Iterator[int]:
    """Flip one bit after the other, where there is something, and put it back; yield its byte."""
    sound = path.read_bytes()
    draw = random.Random(seed)
    for _ in range(count):
        at = draw.randrange(min(len(sound.rstrip(b"\0")) + 300, len(sound)))
        data = bytearray(sound)
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        yield at
    path.write_bytes(sound)


def test_flipped_bits_are_found(folder: Path) -> None:
    """Of a closed journal no bit goes unnoticed that would change a record."""
    newest = two_owners(folder)
    expected = Journal.read(folder).records
    found = 0
    for path in (segments.path_of(folder, 1), newest):
        data = path.read_bytes()
        # The last group of the old segment is carried by the new one, whose last one says no more
        # than that it was closed.
        end = len(data) if path == newest else data.index(b'"at":3}')
        last = data.rindex(data[4096:4104], 0, end)
        for at in flips(path, 500, seed=path == newest):
            try:
                reading = Journal.read(folder)
            except CheckpointError as error:
                assert str(path) in str(error) and error.path == path
                found += 1
            else:
                assert reading.records == expected
                assert at >= last
    assert found > 800
    assert Journal.read(folder).records == expected


def test_flipped_bits_in_the_last_group_are_a_torn_end(folder: Path) -> None:
    """What was not closed may end anywhere in its last group, and only there."""
    journal = opened(folder)
    put(journal, 1, 2)
    before = len(segments.path_of(folder, 1).read_bytes().rstrip(b"\0"))
    put(journal, 3, 4, 5)
    torn = 0
    for at in flips(segments.path_of(folder, 1), 500, seed=3):
        try:
            reading = Journal.read(folder)
        except CheckpointError:
            assert at < before
            continue
        numbers = [record.head["at"] for record in reading.records]
        assert at >= before and numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 2
        assert reading.torn
        torn += 1
    assert torn > 20


def test_a_bad_record_in_the_middle_taken_for_the_end_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_has_later_group", lambda *_: False)
    with pytest.raises(AssertionError):
        test_flipped_bits_are_found(folder)


def test_corruption_names_the_file_and_the_byte(folder: Path) -> None:
    path = two_owners(folder)
    data = path.read_bytes()
    at = data.index(b'{"at":5}')
    path.write_bytes(data[:at] + b"X" + data[at + 1 :])
    frame = data.rindex(data[4096:4104], 0, at)
    for call in (lambda: Journal.read(folder), lambda: opened(folder)):
        with pytest.raises(CheckpointCorruptError, match=rf"0000000002\.seg.* at byte {frame}:"):
            call()
    assert sorted(os.listdir(folder)) == ["0000000001.seg", "0000000002.seg"]
    path.write_bytes(data)
    assert len(heads(folder)) == 12


def test_a_file_that_grows_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading is not atomic: a group may seem missing, and the next one be there."""
    journal = opened(folder)
    for number in range(6):
        put(journal, number)
    path = segments.path_of(folder, 1)
    whole = path.read_bytes()
    at = [whole.index(b'{"at":%d}' % number) for number in range(6)]
    answers = [
        whole[: at[1]] + bytes(at[2] - at[1]) + whole[at[2] :],
        whole[: at[3]] + bytes(at[4] - at[3]) + whole[at[4] :],
        whole,
    ]
    monkeypatch.setattr(Path, "read_bytes", lambda path: answers.pop(0))
    assert heads(folder) == list(range(6))
    answers += [whole[: at[3]] + bytes(at[4] - at[3]) + whole[at[4] :]] * 2
    with pytest.raises(CheckpointCorruptError):
        heads(folder)
    assert not answers


def test_bytes_that_an_older_segment_lost(folder: Path) -> None:
    two_owners(folder)
    path = segments.path_of(folder, 1)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b'{"at":2}')])
    with pytest.raises(CheckpointCorruptError, match=r"0000000001\.seg is corrupt at byte"):
        Journal.read(folder)
    path.unlink()
    with pytest.raises(CheckpointCorruptError, match=r"0000000001\.seg is missing"):
        Journal.read(folder)


def test_a_segment_under_another_name(folder: Path) -> None:
    path = two_owners(folder)
    path.rename(segments.path_of(folder, 5))
    with pytest.raises(CheckpointCorruptError, match="was written as segment 2"):
        Journal.read(folder)


def test_what_an_old_owner_writes_later_does_not_count(folder: Path) -> None:
    first = opened(folder)
    put(first, 1)
    second = opened(folder)
    put(second, 2)
    for number in (3, 4):
        first._failure = None
        first.append("number", {"at": number})
        with pytest.raises(WorkflowFencedError):
            first.flush()
    assert heads(folder) == [1, 2]


def test_a_newer_version_is_refused(folder: Path) -> None:
    path = two_owners(folder)
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<I", segments.VERSION + 1) + data[12:])
    for call in (lambda: Journal.read(folder), lambda: opened(folder)):
        with pytest.raises(CheckpointMismatchError, match=r"version 2.*install a newer one"):
            call()


def test_a_folder_of_something_else(folder: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        Journal.read(folder)
    folder.mkdir()
    assert Journal.read(folder).segments == []
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointMismatchError, match=r"something else \(notes.txt\)"):
        opened(folder)
    assert os.listdir(folder) == ["notes.txt"]
    for call in (lambda: opened(folder / "notes.txt"), lambda: Journal.read(folder / "notes.txt")):
        with pytest.raises((CheckpointMismatchError, NotADirectoryError)):
            call()
    segments.path_of(folder, 1).write_bytes(b"something that is not ours" * 400)
    with pytest.raises(CheckpointMismatchError, match="no segment of a workflow's journal"):
        Journal.read(folder)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((1, {}), TypeError, "kind must be a str"),
        (("k" * 65, {}), ValueError, "kind .* has 65 bytes"),
        (("k", []), TypeError, "head must be a dict"),
        (("k", {"a": b""}), TypeError, "head of a 'k' record is no JSON"),
        (("k", {"a": "x" * segments.HEAD_BYTES_MAX}), ValueError, "head .* is the most"),
        (("k", {}, "text"), TypeError, "body must be bytes, not str"),
        (("k", {}, bytes(segments.BODY_BYTES_MAX + 1)), ValueError, "body .* files of their own"),
    ],
)
def test_bad_records(folder: Path, arguments: Any, error: type[Exception], text: str) -> None:
    journal = opened(folder)
    with pytest.raises(error, match=text):
        journal.append(*arguments)
    assert journal.append("k", {}) == 1


def test_calls_at_the_wrong_time(folder: Path) -> None:
    with pytest.raises(TypeError, match="owner must be a dict"):
        Journal(folder, Disk(), "me")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="owner is no JSON"):
        Journal(folder, Disk(), {"a": {1}})
    journal = Journal(folder, Disk(), OWNER)
    for call in (journal.flush, lambda: journal.append("k", {}), lambda: journal.compact([])):
        with pytest.raises(ValueError, match="journal is not open"):
            call()
    journal.open()
    with pytest.raises(ValueError, match="journal was opened before"):
        journal.open()
    journal.close()
    for call in (journal.flush, lambda: journal.append("k", {}), lambda: journal.compact([])):
        with pytest.raises(ValueError, match="journal is closed"):
            call()
    Journal(folder, Disk(), OWNER).close()
