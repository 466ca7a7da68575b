"""Copies of shards at a partner: each host's shards are also kept by the next host.

The bytes go from rank to rank by collectives of the store's group, a bounded number at a time, and
into a file of the same name; so a copy is as good as what it was made of.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from hopcoll.errors import CheckpointError
from recovery.group import Group
from recovery.places import Place

__all__ = ["send"]

#: How much a rank sends at a time.
_PIECE_BYTES = 8 << 20

#: What is sent: name, size, who sends it, who gets it.
_Transfer = tuple[str, int, int, int]


def send(group: Group, place: Place, holders: dict[str, set[str]]) -> list[str]:
    """Send each shard that only one living host has to the next one. Collective.

    Parameters
    ----------
    holders : dict of str to set of str
        Which hosts have a shard; alike at all ranks, and brought up to date.

    Returns
    -------
    list of str
        The shards that no living host has.

    Raises
    ------
    CheckpointError
        A disk refused; alike at all ranks.
    """
    hosts = group.host_names()
    lost = sorted(name for name, held in holders.items() if not held & set(hosts))
    sizes = _sizes(group, place, [name for name in holders if group.host in holders[name]])
    hosts = group.host_names()  # of those who told
    transfers: list[_Transfer] = []
    for name, held in sorted(holders.items()):
        there = [host for host in hosts if host in held]
        if len(there) == 1 and len(hosts) > 1 and name in sizes:
            partner = hosts[(hosts.index(there[0]) + 1) % len(hosts)]
            source, dest = group.leader(there[0]), group.leader(partner)
            assert source is not None and dest is not None
            transfers.append((name, sizes[name], source, dest))
    sink = _Sink(place)
    rounds = max((-(-nbytes // _PIECE_BYTES) for _, nbytes, _, _ in transfers), default=0)
    for k in range(rounds):
        mine: dict[int, list[Any]] = {}
        for name, nbytes, source, dest in transfers:
            if source == group.rank and k * _PIECE_BYTES < nbytes:
                piece = sink.read(name, k * _PIECE_BYTES)
                mine.setdefault(dest, []).append((name, k * _PIECE_BYTES, piece))
        for pieces in group.exchange(mine).values():
            for name, offset, piece in pieces:
                sink.write(name, offset, piece)
    owed = {name: nbytes for name, nbytes, _, dest in transfers if dest == group.rank}
    answers = group.everyone(sink.finish(owed))
    for rank, (names, error) in answers.items():
        for name in names:
            holders[name].add(group.hosts[rank])
    for rank, (_, error) in answers.items():
        if error is not None:
            raise CheckpointError(f"rank {rank}: {error}", place.path)
    return lost


def _sizes(group: Group, place: Place, names: list[str]) -> dict[str, int]:
    mine = {}
    if group.leader(group.host) == group.rank:
        for name in names:
            with contextlib.suppress(OSError):
                mine[name] = os.stat(place.path / "shards" / name).st_size
    sizes: dict[str, int] = {}
    for told in group.everyone(mine).values():
        sizes |= told
    return sizes


class _Sink:
    """The files of this rank that are sent, or made. An error is kept until the end."""

    def __init__(self, place: Place) -> None:
        self._folder: Path = place.path / "shards"
        self._disk = place.disk
        self._files: dict[str, tuple[int, int]] = {}  # descriptor, bytes that have come
        self._error: OSError | None = None

    def read(self, name: str, offset: int) -> np.ndarray:
        piece = np.empty(0, np.uint8)
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                piece = np.frombuffer(os.pread(descriptor, _PIECE_BYTES, offset), np.uint8)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._error = self._error or error
        return piece

    def write(self, name: str, offset: int, piece: np.ndarray) -> None:
        if self._error is not None:
            return
        try:
            if name not in self._files:
                self._files[name] = self._create(self._folder / name), 0
            descriptor, count = self._files[name]
            self._disk.write(descriptor, piece, offset)
            self._files[name] = descriptor, count + len(piece)
        except OSError as error:
            self._error = error

    def _create(self, path: Path) -> int:
        try:
            return self._disk.create(path)
        except FileExistsError:
            self._disk.unlink(path)  # of a member of this host that died on the way
            return self._disk.create(path)

    def finish(self, owed: dict[str, int]) -> tuple[list[str], str | None]:
        """Make durable what has come as a whole; remove the rest."""
        whole = []
        for name, (descriptor, count) in self._files.items():
            try:
                try:
                    if self._error is None and count == owed.get(name):
                        self._disk.fsync(descriptor)
                        whole.append(name)
                finally:
                    self._disk.close(descriptor)
                if name not in whole:
                    self._disk.unlink(self._folder / name)
            except OSError as error:
                self._error = self._error or error
        try:
            if whole:
                self._disk.fsync_folder(self._folder)
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            return [], str(self._error)
        return whole, None
