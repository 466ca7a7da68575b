"""What stands in a workflow's journal, and how it is read; `recovery.journal` tells how it is kept.

A journal is a folder of segments, ``0000000001.seg`` and so on, each written by one process
alone. A segment is a **header** (magic, version, who wrote it, a mark of 8 random bytes), then
**frames** one after the other, then zeros. A frame begins with the segment's mark and an XXH3 of
all the rest of it, seeded with where it stands: so the body of a record that is itself a piece of
a journal is never taken for a frame. The forms: a *record* of the user's; the *base*, always
first, which says up to which byte each older segment counts, and repeats (*carries*) records that
count as well; the *end* of a segment that was closed.

**Groups.** What one flush writes is a group, numbered from 1; a group is written only when the one
before it is durable. So of a segment that a power cut or a kill ended, only the last group can be
torn: what is bad there is dropped, from the first bad frame on. A bad frame before a good one of a
later group was whole once, and is corruption; so is a bad one before the byte up to which a base
counts a segment.

A segment without a valid base is *void*: its process took the number and said nothing yet. The
valid base with the highest number tells what the journal is.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from hopcoll.errors import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError

__all__ = [
    "BODY_BYTES_MAX",
    "END",
    "HEAD_BYTES_MAX",
    "RECORD",
    "VERSION",
    "Chain",
    "Entry",
    "Record",
    "encode_base",
    "encode_entry",
    "encode_group",
    "encode_header",
    "load",
    "numbers_in",
    "path_of",
]

#: Of the format of a journal. A segment with a higher one is refused.
VERSION = 1
#: Larger values do not belong into a journal.
BODY_BYTES_MAX = 16 << 20
HEAD_BYTES_MAX = 1 << 20
KIND_BYTES_MAX = 64

#: Forms of a frame.
RECORD, BASE, END = range(3)

NAME = re.compile(r"(\d{10})\.seg")
_MAGIC = b"hopcollJ"
_BLOCK_BYTES = 4096
#: magic, version, bytes of JSON, number, mark, XXH3 of all else in the header.
_HEADER = struct.Struct("<8sIIQ8sQ")
#: mark, XXH3 of the rest.
_SEAL = struct.Struct("<8sQ")
#: group, sequence number, bytes of the body, of the head, frames of the group that follow, bytes of
#: the kind, form.
_FRAME = struct.Struct("<QQQIIHH")
_WHOLE = struct.Struct(_SEAL.format + _FRAME.format[1:])
#: sequence number, bytes of body, head and kind: a record that a base carries.
_CARRIED = struct.Struct("<QQIH")
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_from_json = json.JSONDecoder().raw_decode
#: A folder whose segments are replaced while it is read is read again.
_TRIES_MAX = 100


@dataclass(frozen=True)
class Record:
    """One record that counts.

    Parameters
    ----------
    seq : int
        Its number over the journal's whole life, from 1.
    kind : str
    head : dict
        JSON.
    body : bytes
    segment : int
        The segment that it was read from.
    """

    seq: int
    kind: str
    head: dict[str, Any]
    body: bytes
    segment: int


#: What a frame is made from: sequence number, form, kind, head, body.
Entry = tuple[int, int, bytes, bytes, bytes]


def path_of(folder: Path, number: int) -> Path:
    return folder / f"{number:010d}.seg"


def numbers_in(folder: Path) -> list[int]:
    """Return the numbers of the segments in a folder, in order."""
    return sorted(int(match[1]) for name in os.listdir(folder) if (match := NAME.fullmatch(name)))


def encode_header(number: int, owner: dict[str, Any], mark: bytes) -> bytes:
    """Return the first bytes of a segment; a whole number of blocks, so no frame shares one."""
    text = _to_json(owner).encode()
    head = _HEADER.pack(_MAGIC, VERSION, len(text), number, mark, 0) + text
    head += bytes(-len(head) % _BLOCK_BYTES)
    total = xxhash.xxh3_64_intdigest(head)
    return _HEADER.pack(_MAGIC, VERSION, len(text), number, mark, total) + head[_HEADER.size :]


def encode_entry(kind: str, head: dict[str, Any], body: bytes) -> tuple[bytes, bytes, bytes]:
    """Check a record and return its kind, head and body as bytes.

    Raises
    ------
    TypeError, ValueError
    """
    if not isinstance(kind, str):
        raise TypeError(f"kind must be a str, not {type(kind).__name__}")
    if not isinstance(head, dict):
        raise TypeError(f"head must be a dict, not {type(head).__name__}")
    try:
        text = _to_json(head).encode()
    except (TypeError, ValueError) as error:
        raise type(error)(f"head of a {kind!r} record is no JSON: {error}") from None
    try:
        content = body if type(body) is bytes else memoryview(body).tobytes()
    except TypeError:
        raise TypeError(f"body must be bytes, not {type(body).__name__}") from None
    name = kind.encode()
    for what, found, nbytes_max in (
        ("kind", name, KIND_BYTES_MAX),
        ("head", text, HEAD_BYTES_MAX),
        ("body", content, BODY_BYTES_MAX),
    ):
        if len(found) > nbytes_max:
            raise ValueError(
                f"{what} of a {kind[:KIND_BYTES_MAX]!r} record has {len(found)} bytes, and "
                f"{nbytes_max} is the most; larger values go into files of their own"
            )
    return name, text, content


def encode_group(mark: bytes, group: int, offset: int, entries: Sequence[Entry]) -> bytes:
    """Return the frames of a group that is written at `offset`."""
    parts: list[bytes] = []
    rest = len(entries)
    for seq, form, kind, head, body in entries:
        rest -= 1
        frame = _FRAME.pack(group, seq, len(body), len(head), rest, len(kind), form)
        frame += kind + head + body
        parts += (_SEAL.pack(mark, xxhash.xxh3_64_intdigest(frame, offset)), frame)
        offset += _SEAL.size + len(frame)
    return b"".join(parts)


def encode_base(
    last: int, counts: Iterable[tuple[int, int]], carried: Iterable[tuple[int, bytes, bytes, bytes]]
) -> Entry:
    """Return the first entry of a segment.

    Parameters
    ----------
    last : int
        The sequence number of the last record that counts with it.
    counts : iterable of (int, int)
        Older segments, in order, and up to which byte each counts.
    carried : iterable of (seq, kind, head, body)
        Records that follow on those of the older segments.
    """
    body = b"".join(
        part
        for seq, kind, head, content in carried
        for part in (
            _CARRIED.pack(seq, len(content), len(head), len(kind)),
            kind,
            head,
            content,
        )
    )
    head = _to_json({"counts": [list(one) for one in counts]}).encode()
    return last, BASE, b"", head, body


@dataclass
class _Segment:
    """One segment as it was read.

    `records` begins with those that its base carries; those from `last_index` on are of its last
    group, which begins at `last_offset`. Without a valid base `counts` is None.
    """

    number: int
    owner: dict[str, Any]
    counts: list[tuple[int, int]] | None
    records: list[Record]
    seq: int = 0
    group: int = 0
    last_index: int = 0
    last_offset: int = 0
    torn: bool = False
    ended: bool = False


class _Bad(Exception):
    """A bad frame where no frame may be bad; its argument is the offset."""


def _read_segment(folder: Path, number: int, limit: int | None = None) -> _Segment:
    """Read a segment, up to the byte `limit` or to its end.

    Raises
    ------
    FileNotFoundError
    CheckpointCorruptError, CheckpointMismatchError
    """
    path, bad_at = path_of(folder, number), -1
    while True:
        try:
            return _scan(path, number, limit)
        except _Bad as bad:
            # Its process may have written this group and the next one while the file was read. If
            # so, it is whole now, because the next one was there.
            if bad.args[0] == bad_at:
                raise CheckpointCorruptError(
                    f"{path} is corrupt at byte {bad_at}: what was durable is not there; restore "
                    "the file from a copy",
                    path,
                ) from None
            bad_at = bad.args[0]


def _scan(path: Path, number: int, limit: int | None) -> _Segment:
    data = path.read_bytes()
    owner, mark, offset = _parse_header(path, data, number)
    segment = _Segment(number, owner, None, [])
    view, rest = memoryview(data), 0
    while limit is None or offset < limit:
        frame = _parse_frame(view, mark, offset)
        if frame is None:
            break
        group, seq, body_bytes, head_bytes, rest, kind_bytes, form = frame
        if group != segment.group:
            segment.group, segment.last_offset = group, offset
            segment.last_index = len(segment.records)
        head_at = offset + _WHOLE.size + kind_bytes
        body_at = head_at + head_bytes
        head = _from_json(data[head_at:body_at].decode())[0]
        offset = body_at + body_bytes
        if form == BASE:
            segment.counts = [(one, up_to) for one, up_to in head["counts"]]
            segment.records += _parse_carried(data[body_at:offset], number)
        elif form == RECORD:
            kind = data[head_at - kind_bytes : head_at].decode()
            segment.records.append(Record(seq, kind, head, data[body_at:offset], number))
        segment.ended = form == END
        segment.seq = seq
    if limit is not None:
        if offset != limit or segment.counts is None:
            raise _Bad(offset)
        return segment
    bad_group = segment.group if rest else segment.group + 1
    if _has_later_group(view, mark, offset, bad_group):
        raise _Bad(offset)
    segment.torn = bool(rest) or data.count(0, offset) != len(data) - offset
    return segment


def _parse_header(path: Path, data: bytes, number: int) -> tuple[dict[str, Any], bytes, int]:
    """Return the owner, the mark, and where the frames begin."""
    if len(data) >= _HEADER.size and data.startswith(_MAGIC):
        _, version, text_bytes, found, mark, total = _HEADER.unpack_from(data)
        if version > VERSION:
            raise CheckpointMismatchError(
                f"{path} is of version {version}, and this hopcoll reads up to {VERSION}: "
                "install a newer one",
                path,
            )
        end = _HEADER.size + text_bytes
        end += -end % _BLOCK_BYTES
        blank = _HEADER.pack(_MAGIC, version, text_bytes, found, mark, 0)
        if len(data) >= end and total == xxhash.xxh3_64_intdigest(blank + data[_HEADER.size : end]):
            if found != number:
                raise CheckpointCorruptError(
                    f"{path} is corrupt: it was written as segment {found}", path
                )
            return json.loads(data[_HEADER.size : _HEADER.size + text_bytes]), mark, end
        raise CheckpointCorruptError(
            f"{path} is corrupt: the hash of its header does not fit", path
        )
    raise CheckpointMismatchError(f"{path} is no segment of a workflow's journal", path)


def _parse_frame(view: memoryview, mark: bytes, offset: int) -> tuple[int, ...] | None:
    """Return the numbers of the frame at `offset`; None where there is no good one."""
    if len(view) - offset < _WHOLE.size:
        return None
    found, total, *numbers = _WHOLE.unpack_from(view, offset)
    if found != mark:
        return None
    begin = offset + _SEAL.size
    end = offset + _WHOLE.size + numbers[2] + numbers[3] + numbers[5]
    if end > len(view) or xxhash.xxh3_64_intdigest(view[begin:end], offset) != total:
        return None
    return tuple(numbers)


def _has_later_group(view: memoryview, mark: bytes, offset: int, group: int) -> bool:
    """Whether behind a bad frame of `group` at `offset` stands a good one of a later group."""
    data = view.obj
    assert isinstance(data, bytes)
    at = data.find(mark, offset + 1)
    while at >= 0:
        frame = _parse_frame(view, mark, at)
        if frame is not None and frame[0] > group:
            return True
        at = data.find(mark, at + 1)
    return False


def _parse_carried(data: bytes, number: int) -> list[Record]:
    records, offset = [], 0
    while offset < len(data):
        seq, body_bytes, head_bytes, kind_bytes = _CARRIED.unpack_from(data, offset)
        kind_at = offset + _CARRIED.size
        head_at = kind_at + kind_bytes
        body_at = head_at + head_bytes
        offset = body_at + body_bytes
        kind, head = data[kind_at:head_at].decode(), _from_json(data[head_at:body_at].decode())[0]
        records.append(Record(seq, kind, head, data[body_at:offset], number))
    return records


@dataclass(frozen=True)
class Chain:
    """All that counts in a journal.

    Parameters
    ----------
    records : list of Record
    last : int
        The sequence number of the last one.
    counts, carried
        What the base of the next segment has to say. The last group of the newest segment is
        carried, not counted, as nobody but its process knows whether it is durable: an fsync by
        another process says nothing of one that failed before, nor of what another host holds.
    owner : dict or None
        Who took the newest segment, void or not.
    numbers : list of int
        Of all segments there are.
    torn : bool
        Whether something unfinished was dropped from the end.
    closed : bool
        Whether the newest segment was closed.
    """

    records: list[Record]
    last: int
    counts: list[tuple[int, int]]
    carried: list[Record]
    owner: dict[str, Any] | None
    numbers: list[int]
    torn: bool
    closed: bool


def load(folder: Path, below: int | None = None) -> Chain:
    """Read what counts, in the segments with numbers under `below` or in all. Changes nothing.

    Raises
    ------
    CheckpointNotFoundError
        There is no such folder.
    CheckpointCorruptError, CheckpointMismatchError, OSError
    """
    before = None
    for _ in range(_TRIES_MAX):
        try:
            every = numbers_in(folder)
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"{folder} does not exist", folder) from None
        except NotADirectoryError:
            raise CheckpointMismatchError(f"{folder} is no folder", folder) from None
        numbers = [number for number in every if below is None or number < below]
        try:
            return _follow(folder, numbers)
        except FileNotFoundError as error:
            # Somebody went on meanwhile and removed what counts no more; unless nothing moved.
            if numbers == before:
                raise CheckpointCorruptError(
                    f"{error.filename} is missing, and a later segment of the journal builds on it",
                    error.filename,
                ) from None
            before = numbers
    raise CheckpointCorruptError(f"{folder} changes too fast to be read", folder)


def _follow(folder: Path, numbers: list[int]) -> Chain:
    """Read the newest segment that is not void, and what it counts."""
    owner, newest = None, None
    for number in reversed(numbers):
        segment = _read_segment(folder, number)
        owner = segment.owner if owner is None else owner
        if segment.counts is not None:
            newest = segment
            break
    if newest is None or newest.counts is None:
        return Chain([], 0, [], [], owner, numbers, False, False)
    records: list[Record] = []
    for number, limit in newest.counts:
        records += _read_segment(folder, number, limit).records
    counts, carried = list(newest.counts), newest.records
    if newest.group > 1:
        carried = newest.records[newest.last_index :]
        if newest.last_index:  # else it holds nothing that is not carried
            counts.append((newest.number, newest.last_offset))
    records += newest.records
    for record, following in zip(records, records[1:], strict=False):
        if following.seq != record.seq + 1:
            path = path_of(folder, following.segment)
            raise CheckpointCorruptError(
                f"{path} is corrupt: record {following.seq} follows on {record.seq}", path
            )
    closed = newest.ended and newest.number == numbers[-1]
    return Chain(records, newest.seq, counts, carried, owner, numbers, newest.torn, closed)
