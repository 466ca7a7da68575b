"""A restore by all ranks: one choice, and each byte read once where it can be.

1. The leaders of the hosts tell which commits their directories have, and which shards.
2. The commits are tried from the newest on (places.py says what newest means). The first that is
   whole at some level is it; all ranks see the same lists, so they choose alike.
3. Replicated arrays are spread over the ranks that can read them; each reads its share, checks
   every byte, and broadcasts it. A rank's piece of a cut array is read by the rank itself where its
   host has the shards, only those pieces of the files that it needs; else by one that has them,
   which sends what is wanted.
4. All tell whether they read what was written. If not, another level is tried that has the same
   commit; if there is none, all raise the same error. Older commits are not tried then: what was
   acknowledged must not silently be passed over.

If a rank dies on the way, those who are left begin anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from hopcoll.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFencedError,
    CheckpointNotFoundError,
    RankFailedError,
)
from recovery.cuts import (
    Cut,
    Span,
    checked_target,
    piece_shape,
    portion,
    spans_evenly,
    spans_from,
)
from recovery.group import Group
from recovery.log import Commit
from recovery.places import Key, Offer, Place
from recovery.shards import read_part, read_range
from recovery.state import dtype_from_json

__all__ = ["Found", "Lists", "collect", "find", "take_stock"]

_READERS = 2
#: A reader beside the owner may find commits pruned under its hands, and then takes a newer one.
_TRIES_MAX = 100
#: Smaller arrays travel together.
_SMALL_BYTES = 64 << 10

#: A piece of an array: axis, span, shard, range of the shard.
_Piece = tuple[int, Span, str, int]
#: An array's number, the piece, who reads it, who gets it.
_Move = tuple[int, _Piece, int, int]


@dataclass(frozen=True)
class Lists:
    """What the directories of all hosts have; alike at all ranks.

    Attributes
    ----------
    offers : dict of (int, int) to list of Offer
        By place and the rank that leads there.
    files : dict of (int, str) to frozenset of str
        By place and host, of the places that are not shared.
    """

    offers: dict[tuple[int, int], list[Offer]]
    files: dict[tuple[int, str], frozenset[str]]

    def keys(self) -> list[Key]:
        """Return the keys of all commits, newest first."""
        return sorted({o.key for offers in self.offers.values() for o in offers}, reverse=True)

    def step_of(self, key: Key) -> int:
        return next(o.step for offers in self.offers.values() for o in offers if o.key == key)

    def last_step(self, place: int, key: Key | None) -> int | None:
        """Return the step of the newest commit at a place that is not newer than `key`."""
        known = [
            (o.key, o.step)
            for (index, _), offers in self.offers.items()
            for o in offers
            if index == place and key is not None and o.key <= key
        ]
        return max(known)[1] if known else None


@dataclass(frozen=True)
class Found:
    """A commit that was read: its key, where, its slot's document, and this rank's arrays."""

    key: Key
    place: Place
    body: dict[str, Any]
    arrays: list[Any]
    lists: Lists

    @property
    def step(self) -> int:
        return int(self.body["step"])


def take_stock(group: Group, places: Sequence[Place], owner: str | None) -> Lists:
    """Find out what the directories of all hosts have. Collective.

    Raises
    ------
    CheckpointFencedError
        One belongs to another incarnation than `owner`.
    CheckpointError
        One cannot be read; alike at all ranks.
    """
    answers = group.everyone(_own_stock(group, places, owner))
    for rank, answer in answers.items():
        if isinstance(answer, CheckpointError):
            raise _of_rank(rank, answer, group)
    offers: dict[tuple[int, int], list[Offer]] = {}
    files: dict[tuple[int, str], frozenset[str]] = {}
    for rank, answer in answers.items():
        for index, (offered, names) in answer.items():
            offers[index, rank] = offered
            if names is not None:
                files[index, group.hosts[rank]] = names
    return Lists(offers, files)


def _own_stock(group: Group, places: Sequence[Place], owner: str | None) -> Any:
    stock = {}
    try:
        for place in places:
            lowest = min(group.members) if place.shared else group.leader(group.host)
            if lowest == group.rank:
                with contextlib.suppress(CheckpointNotFoundError):
                    record = place.directory.look()
                    if owner is not None and (record is None or record.owner != owner):
                        return CheckpointFencedError(
                            f"{place.path} was taken over by another process; open it anew",
                            place.path,
                        )
                    names = None if place.shared else place.files()
                    stock[place.index] = place.offers(record), names
    except CheckpointError as error:
        return error
    except OSError as error:
        return CheckpointError(f"{place.path} cannot be read: {error}", place.path)
    return stock


def find(
    group: Group,
    places: Sequence[Place],
    owner: str | None,
    step: int | None,
    cut: dict[str, Any],
) -> Found:
    """Choose a commit and read it. Collective.

    Parameters
    ----------
    owner : str or None
        The incarnation that all places must belong to.
    step : int or None
        The newest where it is None.
    cut : dict
        How arrays are wanted, by name: see `CheckpointStore.restore`.

    Raises
    ------
    CheckpointNotFoundError, CheckpointCorruptError, CheckpointError, ValueError
        Alike at all ranks.
    """
    for _ in range(_TRIES_MAX):
        before = group.members
        try:
            found = _find(group, places, owner, step, cut)
        except RankFailedError:
            if group.members == before:
                group.everyone(None)  # learn who is left
            continue
        except _AgainError:
            continue
        return found
    path = places[-1].path
    raise CheckpointError(f"{path} is pruned faster than it can be read", path)


class _AgainError(Exception):
    """A rank died on the way, or a commit was pruned."""


def _find(
    group: Group,
    places: Sequence[Place],
    owner: str | None,
    step: int | None,
    cut: dict[str, Any],
) -> Found:
    lists = take_stock(group, places, owner)
    spoilt: CheckpointError | None = None
    for key in lists.keys():
        if step is not None and lists.step_of(key) != step:
            continue
        for place in places:
            having = [
                (rank, offer)
                for (index, rank), offers in lists.offers.items()
                for offer in offers
                if index == place.index and offer.key == key
            ]
            if not having:
                continue
            try:
                body = _body(group, place, having)
                plan = _Plan(group, place, lists, body, cut)
                if not plan.whole:
                    continue
                return Found(key, place, body, plan.read(), lists)
            except CheckpointCorruptError as error:
                spoilt = error
            except CheckpointNotFoundError as error:
                raise _AgainError from error  # pruned meanwhile
        if spoilt is not None:
            raise spoilt
    where = ", ".join(str(place.path) for place in places)
    steps = sorted({lists.step_of(key) for key in lists.keys()})
    raise CheckpointNotFoundError(
        f"{where} holds no checkpoint"
        + ("" if step is None else f" of step {step}; there are {steps}"),
        places[-1].path,
    )


def _body(group: Group, place: Place, having: list[tuple[int, Offer]]) -> dict[str, Any]:
    """Return the manifest, from the first of those who have it."""
    told: Any = None
    rank, offer = having[0]
    if rank == group.rank:
        try:
            told = place.directory.read_commit(Commit(offer.slot, offer.step)).body
        except CheckpointError as error:
            told = error
    told = group.everyone(told).get(rank)
    if told is None:
        raise _AgainError
    if isinstance(told, CheckpointError):
        raise told
    return told


class _Plan:
    """Who reads what of a commit at a place, and who gets it; alike at all ranks."""

    def __init__(
        self, group: Group, place: Place, lists: Lists, body: dict[str, Any], cut: dict[str, Any]
    ) -> None:
        self.group = group
        self.place = place
        self.body = body
        self.entries = body["arrays"]
        self.members = group.members
        self._files = lists.files
        targets = group.everyone(cut)
        if group.members != self.members:
            raise _AgainError
        self.wanted = [self._wanted(i, targets) for i in range(len(self.entries))]
        for rank, asked in targets.items():
            for name in asked:
                if name not in {entry["name"] for entry in self.entries}:
                    raise ValueError(f"cut names {name!r} (rank {rank}), which is no array here")

    def _wanted(
        self, i: int, targets: dict[int, dict[str, Any]]
    ) -> dict[int, tuple[int, Span] | None] | None:
        """Return each rank's axis and span of an array; None for all of it, or for all ranks."""
        entry = self.entries[i]
        name, shape = entry["name"], entry["shape"]
        if "cut" not in entry and all(asked.get(name) is None for asked in targets.values()):
            return None
        wanted: dict[int, tuple[int, Span] | None] = {}
        for place, (rank, asked) in enumerate(targets.items()):
            given: Any = entry.get("cut")
            target = checked_target(name, asked.get(name, given), len(shape))
            if target is None:
                wanted[rank] = None
                continue
            axis, offsets = target
            count = len(targets)
            if offsets is not None:
                spans = spans_from(name, offsets, shape[axis], count)
            elif axis == given and len(entry["pieces"]) == count:
                spans = [(piece[0], piece[1]) for piece in entry["pieces"]]  # as it was
            else:
                spans = spans_evenly(shape[axis], count)
            wanted[rank] = axis, spans[place]
        return wanted

    # Who has what

    def _hosts_of(self, shard: str) -> set[str]:
        if self.place.shared:
            return {self.group.hosts[rank] for rank in self.members}
        return {
            host
            for (index, host), names in self._files.items()
            if index == self.place.index and shard in names
        }

    @property
    def whole(self) -> bool:
        """Whether every shard is on a host that is there."""
        pieces = (piece for i in range(len(self.entries)) for piece in self._pieces(i))
        return all(self._hosts_of(shard) for _, _, shard, _ in pieces)

    def _pieces(self, i: int) -> list[_Piece]:
        """Return the pieces of an array that have bytes."""
        entry = self.entries[i]
        if "cut" in entry:
            return [
                (entry["cut"], (start, stop), *piece)
                for start, stop, *piece in entry["pieces"]
                if piece
            ]
        if not entry["piece"]:
            return []
        return [(0, (0, (entry["shape"] or [1])[0]), *entry["piece"])]

    def _reader(self, shard: str, rank: int, loads: dict[int, int], nbytes: int) -> int:
        """Return who reads of a shard for a rank: itself, or the least busy that can."""
        hosts = self._hosts_of(shard)
        if self.group.hosts[rank] in hosts:
            return rank
        able = [one for one in self.members if self.group.hosts[one] in hosts]
        reader = min(able, key=lambda one: (loads[one], one))
        loads[reader] += nbytes
        return reader

    # Reading

    def read(self) -> list[Any]:
        """Return this rank's arrays."""
        loads = dict.fromkeys(self.members, 0)
        order = sorted(range(len(self.entries)), key=lambda i: -self._nbytes(i))
        readers: dict[int, int] = {}
        for i in order:
            if self.wanted[i] is None and self._pieces(i):
                hosts = self._hosts_of(self._pieces(i)[0][2])
                able = [rank for rank in self.members if self.group.hosts[rank] in hosts]
                readers[i] = min(able, key=lambda rank: (loads[rank], rank))
                loads[readers[i]] += self._nbytes(i)
        moves = self._moves(order, loads)
        arrays = [self._empty(i) for i in range(len(self.entries))]
        tasks: list[Any] = [
            (lambda i=i: self._read_whole(i, arrays[i]))
            for i in order
            if readers.get(i) == self.group.rank
        ]
        sent: dict[int, np.ndarray] = {}  # by the number of the move: what goes to another rank
        tasks += [
            (lambda k=k: self._read_move(k, moves[k], arrays, sent))
            for k, (_, _, reader, _) in enumerate(moves)
            if reader == self.group.rank
        ]
        self._run(tasks)
        self._share(arrays, readers, order)
        self._send(arrays, moves, sent)
        return [self._given(i, array) for i, array in enumerate(arrays)]

    def _moves(self, order: list[int], loads: dict[int, int]) -> list[_Move]:
        """Return (array, piece, reader, dest) for each piece that a rank needs of a cut array."""
        moves = []
        for i in order:
            for dest, wanted in (self.wanted[i] or {}).items():
                for piece in self._pieces(i):
                    if portion(self._shape(i), piece[:2], self._target(i, wanted)):
                        reader = self._reader(piece[2], dest, loads, self._nbytes(i))
                        moves.append((i, piece, reader, dest))
        return moves

    def _run(self, tasks: list[Any]) -> None:
        """Read, and compare notes: whether all could."""
        failure: CheckpointError | None = None
        try:
            with ThreadPoolExecutor(_READERS, "hopcoll-read") as pool:
                for done in [pool.submit(task) for task in tasks]:
                    done.result()
        except CheckpointError as error:
            failure = error
        except FileNotFoundError as error:
            failure = self._missing(error)
        except OSError as error:
            failure = CheckpointError(
                f"{self.place.path}: step {self.body['step']} cannot be read: {error}",
                self.place.path,
            )
        answers = self.group.everyone(failure)
        for rank, answer in answers.items():
            if answer is not None:
                raise _of_rank(rank, answer, self.group)
        if self.group.members != self.members:
            raise _AgainError

    def _missing(self, error: FileNotFoundError) -> CheckpointError:
        """A shard is gone: pruned by now, or lost."""
        head = self.place.directory.log.refresh()
        if head is not None and any(one.step == self.body["step"] for one in head.alive):
            return CheckpointCorruptError(f"{error.filename} is missing", error.filename)
        return CheckpointNotFoundError(
            f"{self.place.path}: step {self.body['step']} was pruned while it was read",
            self.place.path,
        )

    def _read_whole(self, i: int, out: np.ndarray) -> None:
        name, index = self.entries[i]["piece"]
        read_range(self._path(name), self._range(name, index), out)

    def _read_move(
        self, k: int, move: _Move, arrays: list[Any], sent: dict[int, np.ndarray]
    ) -> None:
        i, (axis, span, name, index), _, dest = move
        shape = self._shape(i)
        found = portion(shape, (axis, span), self._target(i, self.wanted[i][dest]))
        assert found is not None
        source, target = found
        held = piece_shape(shape, axis, span)
        path, entry = self._path(name), self._range(name, index)
        dtype = arrays[i].dtype
        # Rows of the piece, as few as will do.
        first, last = source[0].start, source[0].stop
        rows = np.empty((last - first, *held[1:]), dtype)
        out = arrays[i][target] if dest == self.group.rank else None
        if out is not None and out.shape == rows.shape and out.flags.c_contiguous:
            rows = out
        row_bytes = int(np.prod(held[1:], dtype=np.int64)) * dtype.itemsize
        read_part(path, entry, first * row_bytes, rows)
        if rows is out:
            return
        part = rows[(slice(None), *source[1:])]
        if out is not None:
            out[...] = part
        else:
            sent[k] = np.ascontiguousarray(part)

    def _share(self, arrays: list[Any], readers: dict[int, int], order: list[int]) -> None:
        """Broadcast the replicated arrays."""
        if self.group.size == 1:
            return
        small = [i for i in order if i in readers and arrays[i].nbytes <= _SMALL_BYTES]
        mine = {i: _raw(arrays[i]) for i in small if readers[i] == self.group.rank}
        for told in self._again_unless_all(self.group.everyone(mine)):
            for i, data in told.items():
                _raw(arrays[i])[:] = data
        for i in order:
            if i in readers and i not in small:
                self.group.copy(arrays[i], readers[i])

    def _send(
        self, arrays: list[Any], moves: list[_Move], sent: dict[int, np.ndarray]
    ) -> None:
        """Send what was read for others, array by array."""
        for i in dict.fromkeys(i for i, _, reader, dest in moves if reader != dest):
            mine: dict[int, dict[int, np.ndarray]] = {}
            for k, (one, _, reader, dest) in enumerate(moves):
                if one == i and reader == self.group.rank and reader != dest:
                    mine.setdefault(dest, {})[k] = sent.pop(k)
            got = self.group.exchange(mine)
            if self.group.members != self.members:
                raise _AgainError
            for parts in got.values():
                for k, part in parts.items():
                    axis, span, _, _ = moves[k][1]
                    wanted = self._target(i, self.wanted[i][self.group.rank])
                    found = portion(self._shape(i), (axis, span), wanted)
                    assert found is not None
                    arrays[i][found[1]] = part

    def _again_unless_all(self, answers: dict[int, Any]) -> list[Any]:
        if self.group.members != self.members:
            raise _AgainError
        return list(answers.values())

    # Shapes

    def _shape(self, i: int) -> tuple[int, ...]:
        return tuple(self.entries[i]["shape"])

    def _nbytes(self, i: int) -> int:
        return int(np.prod(self._shape(i), dtype=np.int64)) * self._dtype(i).itemsize

    def _dtype(self, i: int) -> np.dtype:
        return dtype_from_json(self.entries[i]["dtype"], self.place.path)

    def _target(self, i: int, wanted: tuple[int, Span] | None) -> tuple[int, Span]:
        return (0, (0, self._shape(i)[0])) if wanted is None else wanted

    def _empty(self, i: int) -> np.ndarray:
        wanted = self.wanted[i]
        mine = None if wanted is None else wanted[self.group.rank]
        shape = self._shape(i) if mine is None else piece_shape(self._shape(i), *mine)
        return np.empty(shape, self._dtype(i))

    def _given(self, i: int, array: np.ndarray) -> Any:
        """Return an array as the state gets it."""
        entry = self.entries[i]
        wanted = self.wanted[i]
        mine = None if wanted is None else wanted[self.group.rank]
        if mine is not None:
            axis, (start, _) = mine
            return Cut(array, axis, start, entry["shape"][axis])
        return np.asfortranarray(array) if entry.get("order") == "F" else array

    def _path(self, name: str) -> Any:
        return self.place.path / "shards" / name

    def _range(self, name: str, index: int) -> dict[str, Any]:
        return self.body["shards"][name]["ranges"][index]


def collect(arrays: list[Any]) -> Any:
    """Return a function that hands out arrays: the second time a copy, so that none is shared."""
    handed: set[int] = set()

    def load(i: int) -> Any:
        array = arrays[i]
        if i in handed:
            if isinstance(array, Cut):
                return Cut(array.array.copy(), array.axis, array.offset, array.length)
            return array.copy(order="K")
        handed.add(i)
        return array

    return load


def _raw(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _of_rank(rank: int, error: CheckpointError, group: Group) -> CheckpointError:
    if group.size == 1:
        return error
    return type(error)(f"rank {rank}: {error}", error.path)


