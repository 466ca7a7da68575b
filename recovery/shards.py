"""Shards: plain HDF5 files that are written once, in order, and checked byte for byte.

h5py makes the file's skeleton in memory: every dataset has its place, and no byte of data. Then the
file goes to the disk from its first byte to its last, the arrays straight from memory, while a
second thread hashes them. Reading goes the other way by the *record* of the shard, which the commit
keeps: HDF5's own metadata, which may lie when the disk does, is passed over.

A record is what JSON carries::

    {"nbytes": 8393848,                          the whole file
     "rest": "9a1f...",                          XXH3-128 of all bytes that no extent has
     "ranges": [                                 one a dataset
        {"dataset": "model/weight",
         "nbytes": 8388608,                      of the array
         "extents": [[4096, 8388608, "03d4..."]],  offset, nbytes, XXH3-128: pieces of the file
         "probe": "c3f0...",                     XXH3-64 of the array's first bytes
         "content": ["77ab...", ...]},           of its pieces; only where it is compressed
        ...]}
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from hopcoll.errors import CheckpointCorruptError, CheckpointMismatchError
from recovery.disk import Disk

__all__ = [
    "PIECE_BYTES",
    "Dataset",
    "check_compression",
    "check_shard",
    "content_of",
    "hash_pieces",
    "hdf5_type",
    "name_datasets",
    "probe",
    "read_part",
    "read_range",
    "write_image",
    "write_shard",
]

#: What is hashed, written and read at a time.
PIECE_BYTES = 16 << 20
_PROBE_BYTES = 4096
#: What is read before it is hashed: a part of a core's own cache.
_BLOCK_BYTES = 256 << 10
#: Smaller pieces are joined to one write.
_JOIN_BYTES = 1 << 20
#: Large arrays start at a page of memory; smaller ones are packed.
_ALIGN_FROM_BYTES, _ALIGN_BYTES = 64 << 10, 4096
#: Smaller arrays are not worth a chunk.
_COMPRESS_FROM_BYTES = 64 << 10
_NAME_LENGTH_MAX = 200
_HDF5_RANK_MAX = 32
_PAGE_BYTES = 4096
#: Files without data that are kept for the next of their kind, and how many arrays these may have.
_KEPT_SKELETONS, _KEPT_DATASETS_MAX = 8, 64

#: One array of a shard: its name in the file, and the array, contiguous in C order.
Dataset = tuple[str, np.ndarray]


def write_shard(
    disk: Disk,
    path: Path,
    datasets: Sequence[Dataset],
    *,
    compression: str | None = None,
    attributes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a new HDF5 file and make its bytes durable (its name is the caller's to fsync).

    Local, blocks for the disk.

    Parameters
    ----------
    disk : Disk
    path : Path
        Must not be there.
    datasets : sequence of (str, ndarray)
        Their names (see `name_datasets`) and arrays, contiguous in C order, of any dtype without
        objects.
    compression : {None, "blosc2", "zstd"}
    attributes : dict, optional
        Attributes of the file's root, for people.

    Returns
    -------
    dict
        The shard's record.

    Raises
    ------
    OSError
        The disk refused. The file may be there, with any bytes.

    Notes
    -----
    Memory: the skeleton; where compression is on, also the compressed arrays.
    """
    image, ranges = _skeleton(datasets, compression, attributes or {})
    nbytes = image.nbytes
    pieces: list[tuple[int, memoryview | None, list[Any]]] = []
    for (_, array), entry in zip(datasets, ranges, strict=True):
        view = memoryview(_bytes_of(array))
        start = 0
        for extent in entry["extents"]:
            part = view[start : start + extent[1]] if "content" not in entry else None
            start += extent[1]
            pieces.append((extent[0], part, extent))
    pieces.sort(key=lambda piece: piece[0])
    rest = xxhash.xxh3_128()
    descriptor = disk.create(path)
    try:
        with ThreadPoolExecutor(1, "hopcoll-hash") as hasher:
            writer = _Writer(disk, descriptor)
            hashes = []
            end = 0
            for offset, view, extent in pieces:
                gap = image.read(end, offset - end)
                rest.update(gap)
                writer.add(gap)
                data = view if view is not None else image.read(offset, extent[1])
                hashes.append((extent, _begin(hasher, data)))
                writer.add(data)
                end = offset + extent[1]
            gap = image.read(end, nbytes - end)
            rest.update(gap)
            writer.add(gap)
            writer.flush()
            for extent, answer in hashes:
                extent.append(answer())
        disk.fsync(descriptor)
    finally:
        disk.close(descriptor)
    return {"nbytes": nbytes, "rest": rest.hexdigest(), "ranges": ranges}


def write_image(
    disk: Disk, path: Path, fill: Callable[[h5py.File], Any], attributes: dict[str, Any]
) -> dict[str, Any]:
    """Write a new HDF5 file that `fill` makes, in memory first; returns its record, without ranges.

    Raises
    ------
    OSError
        The disk refused. The file may be there.
    """
    image = _Image()
    with h5py.File(image, "w", libver=("v110", "v110")) as file:
        file.attrs.update(attributes)
        fill(file)
    data = image.read(0, image.nbytes)
    descriptor = disk.create(path)
    try:
        disk.write(descriptor, data, 0)
        disk.fsync(descriptor)
    finally:
        disk.close(descriptor)
    return {"nbytes": image.nbytes, "rest": _hash(data), "ranges": []}


def read_range(path: Path, entry: dict[str, Any], out: np.ndarray) -> None:
    """Read one array of a shard into `out`, and check every byte.

    Local, blocks for the disk. Calls from several threads run side by side.

    Parameters
    ----------
    path : Path
    entry : dict
        The array's part of the record.
    out : ndarray
        Contiguous in C order, of as many bytes as the array. Undefined after an error.

    Raises
    ------
    CheckpointCorruptError
        The bytes are not those that were written; names the file and the dataset.
    CheckpointMismatchError
        It is compressed, and hdf5plugin is not installed.
    OSError
    """
    target = memoryview(_bytes_of(out))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        start = 0
        for extent in entry["extents"]:
            offset, nbytes, expected = extent
            packed = "content" in entry
            piece = memoryview(bytearray(nbytes)) if packed else target[start : start + nbytes]
            start += nbytes
            if _read_hashed(descriptor, piece, offset) != expected:
                raise CheckpointCorruptError(
                    f"{path} is corrupt in the dataset {entry['dataset']}: the {nbytes} bytes at "
                    f"{offset} are not those that were written",
                    path,
                )
    finally:
        os.close(descriptor)
    if "content" in entry:
        _read_packed(path, entry, target)


def read_part(path: Path, entry: dict[str, Any], start: int, out: np.ndarray) -> None:
    """Read the bytes of an array from `start` on into `out`; as `read_range` reads all of them.

    Reads, and checks, the pieces of the file that they are in.

    Parameters
    ----------
    path : Path
    entry : dict
        The array's part of the record.
    start : int
        In bytes.
    out : ndarray
        Contiguous in C order. Undefined after an error.

    Raises
    ------
    CheckpointCorruptError, CheckpointMismatchError, OSError
        As `read_range`.
    """
    target = _bytes_of(out)
    stop = start + len(target)
    if "content" in entry:
        whole = np.empty(entry["nbytes"], np.uint8)
        read_range(path, entry, whole)
        target[:] = whole[start:stop]
        return
    place = 0
    for extent in entry["extents"]:
        first, last = max(start, place), min(stop, place + extent[1])
        if first < last:
            piece = {**entry, "extents": [extent]}
            if last - first == extent[1]:
                read_range(path, piece, target[first - start : last - start])
            else:
                whole = np.empty(extent[1], np.uint8)
                read_range(path, piece, whole)
                target[first - start : last - start] = whole[first - place : last - place]
        place += extent[1]


def check_shard(path: Path, record: dict[str, Any]) -> Iterator[tuple[str | None, str]]:
    """Read a whole shard and yield what is wrong with it: the dataset (or None) and how.

    Local, blocks for the disk.

    Parameters
    ----------
    path : Path
    record : dict
        What `write_shard` returned.

    Yields
    ------
    dataset : str or None
        None for bytes that belong to no dataset.
    problem : str
    """
    extents = sorted(
        (offset, nbytes, expected, entry["dataset"])
        for entry in record["ranges"]
        for offset, nbytes, expected in entry["extents"]
    )
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        yield None, f"cannot be opened: {error.strerror}"
        return
    try:
        size = os.fstat(descriptor).st_size
        if size != record["nbytes"]:
            yield None, f"is {size} bytes long instead of {record['nbytes']}"
        rest = xxhash.xxh3_128()
        end = 0
        for offset, nbytes, expected, dataset in [*extents, (record["nbytes"], 0, "", None)]:
            rest.update(_read(descriptor, end, offset - end))
            end = offset + nbytes
            if dataset is not None and _hash(_read(descriptor, offset, nbytes)) != expected:
                yield dataset, f"the {nbytes} bytes at {offset} are not those that were written"
        if rest.hexdigest() != record["rest"]:
            yield None, "HDF5's own bytes are not those that were written"
    except OSError as error:
        yield None, f"cannot be read: {error.strerror}"
    finally:
        os.close(descriptor)


def probe(array: np.ndarray) -> str:
    """Return a hash of the first bytes of an array: where it differs, the array does."""
    return xxhash.xxh3_64_hexdigest(memoryview(_bytes_of(array))[:_PROBE_BYTES])


def hash_pieces(array: np.ndarray) -> Iterator[str]:
    """Yield the hash of each piece of an array, to be compared with `content_of`."""
    view = memoryview(_bytes_of(array))
    for start in range(0, len(view), PIECE_BYTES):
        yield _hash(view[start : start + PIECE_BYTES])


def content_of(entry: dict[str, Any]) -> list[str]:
    """Return the hashes of the pieces of a stored array."""
    return entry["content"] if "content" in entry else [extent[2] for extent in entry["extents"]]


def name_datasets(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a name in an HDF5 file for each path of keys: readable, valid, and no two alike.

    What HDF5 has a use for (``/``, ``.``) and what cannot be printed becomes ``%XX``.
    """
    # No name may be a group (the way to another) and a dataset at once.
    taken = {paths_part for path in paths for paths_part in _groups(path)}
    names = []
    for path in paths:
        name = wanted = "/".join(_quoted(key) for key in path)
        count = 1
        while name in taken:
            count += 1
            name = f"{wanted}%{count}"
        taken.add(name)
        names.append(name)
    return names


def check_compression(compression: str | None) -> None:
    """Raise ValueError for a compression that is not known, or whose package is not installed."""
    if compression is not None:
        _filter(compression)


def _groups(path: tuple[str, ...]) -> Iterator[str]:
    name = ""
    for key in path[:-1]:
        name = f"{name}/{_quoted(key)}" if name else _quoted(key)
        yield name


def _quoted(key: str) -> str:
    if key in ("", "."):
        return "%" if key == "" else "%2E"
    quoted = "".join(
        c if c.isprintable() and c not in "/%" else _percent(c) for c in key[:_NAME_LENGTH_MAX]
    )
    return quoted if len(key) <= _NAME_LENGTH_MAX else quoted + "%"


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _skeleton(
    datasets: Sequence[Dataset], compression: str | None, attributes: dict[str, Any]
) -> tuple[_Image, list[dict[str, Any]]]:
    """Return the file without the arrays' bytes, and the ranges without their hashes."""
    if compression is not None:
        return _packed_skeleton(datasets, compression, attributes)
    kinds = tuple((name, array.dtype, array.shape) for name, array in datasets)
    make = _plain_skeleton if len(kinds) <= _KEPT_DATASETS_MAX else _plain_skeleton.__wrapped__
    image, places = make(kinds, tuple(attributes.items()))
    ranges = []
    for (name, array), place in zip(datasets, places, strict=True):
        ranges.append(entry := _entry(name, array))
        for start in range(0, array.nbytes, PIECE_BYTES):
            entry["extents"].append([place + start, min(PIECE_BYTES, array.nbytes - start)])
    return image, ranges


# HDF5 keeps the GIL, for milliseconds. A loop that saves its state makes the same file each time,
# and should not have to wait for it.
@functools.lru_cache(maxsize=_KEPT_SKELETONS)
def _plain_skeleton(
    kinds: tuple[tuple[str, np.dtype, tuple[int, ...]], ...],
    attributes: tuple[tuple[str, Any], ...],
) -> tuple[_Image, list[int]]:
    """Return a file without the bytes of the arrays, to be read only, and where these go."""
    image = _Image()
    with _new_file(image, attributes) as file:
        links = _links()
        places = [
            _place(file, links, name, *hdf5_type(dtype, shape)) for name, dtype, shape in kinds
        ]
    return image, places


def _packed_skeleton(
    datasets: Sequence[Dataset], compression: str, attributes: dict[str, Any]
) -> tuple[_Image, list[dict[str, Any]]]:
    """Return a file with the large arrays in it, compressed."""
    image = _Image()
    ranges = []
    with _new_file(image, tuple(attributes.items())) as file:
        links = _links()
        for name, array in datasets:
            ranges.append(entry := _entry(name, array))
            kind, shape = hdf5_type(array.dtype, array.shape)
            if array.nbytes >= _COMPRESS_FROM_BYTES:
                _pack(file, entry, array, kind, shape, compression)
            else:
                place = _place(file, links, name, kind, shape)
                if array.nbytes:
                    entry["extents"].append([place, array.nbytes])
    return image, ranges


def _entry(name: str, array: np.ndarray) -> dict[str, Any]:
    entry: dict[str, Any] = {"dataset": name, "nbytes": array.nbytes, "extents": []}
    if array.nbytes:
        entry["probe"] = probe(array)
    return entry


def _new_file(image: _Image, attributes: tuple[tuple[str, Any], ...]) -> h5py.File:
    file = h5py.File(
        image,
        "w",
        libver=("v110", "v110"),
        alignment_threshold=_ALIGN_FROM_BYTES,
        alignment_interval=_ALIGN_BYTES,
    )
    file.attrs.update(attributes)
    return file


def _links() -> Any:
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    return links


def _place(
    file: h5py.File, links: Any, name: str, kind: Any, shape: tuple[int, ...]
) -> int | None:
    """Make a dataset without data and return where its bytes go."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    made = h5py.h5d.create(
        file.id, name.encode(), h5py.h5t.py_create(kind, logical=True), space, layout, links
    )
    return made.get_offset()


def _pack(
    file: h5py.File,
    entry: dict[str, Any],
    array: np.ndarray,
    kind: np.dtype,
    shape: tuple[int, ...],
    compression: str,
) -> None:
    """Make a compressed dataset, data and all, and note where its chunks are."""
    data = _bytes_of(array).view(kind).reshape(shape)
    made = file.create_dataset(
        entry["dataset"], data=data, chunks=True, **_filter(compression)
    )
    file.flush()
    made.id.chunk_iter(
        lambda chunk: entry["extents"].append([chunk.byte_offset, chunk.size])
    )
    entry["content"] = list(hash_pieces(array))


def _filter(compression: str) -> Any:
    if compression not in ("blosc2", "zstd"):
        raise ValueError(f"compression must be None, 'blosc2' or 'zstd', not {compression!r}")
    try:
        import hdf5plugin
    except ImportError:
        raise ValueError(
            f"compression={compression!r} needs hdf5plugin: pip install 'hopcoll[compression]'"
        ) from None
    if compression == "zstd":
        return hdf5plugin.Zstd(clevel=3)
    return hdf5plugin.Blosc2(cname="zstd", clevel=3, filters=hdf5plugin.Blosc2.SHUFFLE)


def _read_packed(path: Path, entry: dict[str, Any], target: memoryview) -> None:
    try:
        import hdf5plugin  # noqa: F401 - it makes its filters known to HDF5
    except ImportError:
        raise CheckpointMismatchError(
            f"{path} is compressed: pip install 'hopcoll[compression]'", path
        ) from None
    # Locks are of no use to a file that nobody changes, and do not work on some file systems.
    with h5py.File(path, "r", locking=False) as file:
        dataset = file[entry["dataset"]]
        data = np.empty(dataset.shape, dataset.dtype)
        dataset.read_direct(data)
    target[:] = memoryview(_bytes_of(data))


def hdf5_type(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[np.dtype, tuple[int, ...]]:
    """Return dtype and shape as HDF5 gets to see them; where it has no such type, bytes."""
    if not dtype.itemsize or len(shape) > _HDF5_RANK_MAX:
        return np.dtype(np.uint8), (math.prod(shape) * dtype.itemsize,)
    if dtype.type.__module__ == "numpy":
        with contextlib.suppress(TypeError, ValueError):
            if h5py.h5t.py_create(dtype, logical=True).get_size() == dtype.itemsize:
                return dtype, shape
    return np.dtype(np.uint8), (*shape, dtype.itemsize)


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array that is contiguous in C order, as a view."""
    if not array.nbytes:
        return np.empty(0, np.uint8)
    return array.reshape(-1).view(np.uint8)


def _hash(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _begin(hasher: ThreadPoolExecutor, data: Any) -> Callable[[], str]:
    """Have data hashed, in the thread of `hasher` where there still are threads."""
    try:
        return hasher.submit(_hash, data).result
    except RuntimeError:  # the interpreter ends
        return functools.partial(_hash, data)


def _read_hashed(descriptor: int, out: memoryview, offset: int) -> str:
    """Fill `out` and return its hash, block by block while these are in the processor's cache."""
    state = xxhash.xxh3_128()
    for start in range(0, len(out), _BLOCK_BYTES):
        block = out[start : start + _BLOCK_BYTES]
        state.update(block[: _read_fully(descriptor, block, offset + start)])
    return state.hexdigest()


def _read(descriptor: int, offset: int, nbytes: int) -> memoryview:
    """Return the bytes at `offset`, fewer where the file ends."""
    data = memoryview(bytearray(nbytes))
    return data[: _read_fully(descriptor, data, offset)]


def _read_fully(descriptor: int, out: memoryview, offset: int) -> int:
    count = 0
    while count < len(out):
        got = os.preadv(descriptor, [out[count:]], offset + count)
        if not got:
            break
        count += got
    return count


class _Writer:
    """Appends to a file; what is small is joined."""

    def __init__(self, disk: Disk, descriptor: int) -> None:
        self._disk = disk
        self._descriptor = descriptor
        self._joined = bytearray()
        self._offset = 0

    def add(self, data: memoryview | bytes) -> None:
        if len(data) < _JOIN_BYTES:
            self._joined += data
            if len(self._joined) < _JOIN_BYTES:
                return
            data = b""
        self.flush()
        if len(data):
            self._disk.write(self._descriptor, data, self._offset)
            self._disk.push(self._descriptor, self._offset, len(data))
            self._offset += len(data)

    def flush(self) -> None:
        if self._joined:
            self._disk.write(self._descriptor, self._joined, self._offset)
            self._offset += len(self._joined)
            self._joined = bytearray()


class _Image(io.RawIOBase):
    """A file in memory that keeps only the pages that were written to."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self._position = 0
        self._pages: dict[int, bytearray] = {}

    def read(self, offset: int, nbytes: int) -> bytes:  # type: ignore[override]
        """Return bytes; what was not written is zero."""
        parts = []
        for page, start, stop in self._spans(offset, nbytes):
            found = self._pages.get(page)
            parts.append(bytes(stop - start) if found is None else bytes(found[start:stop]))
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer) as view:
            view[:] = self.read(self._position, len(view))
            self._position += len(view)
            return len(view)

    def write(self, data: Any) -> int:
        with memoryview(data) as view:
            done = 0
            for page, start, stop in self._spans(self._position, len(view)):
                kept = self._pages.setdefault(page, bytearray(_PAGE_BYTES))
                kept[start:stop] = view[done : done + stop - start]
                done += stop - start
            self._position += done
            self.nbytes = max(self.nbytes, self._position)
            return done

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = (0, self._position, self.nbytes)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, nbytes: int | None = None) -> int:
        self.nbytes = self._position if nbytes is None else nbytes
        return self.nbytes

    @staticmethod
    def _spans(offset: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        end = offset + nbytes
        while offset < end:
            page, start = divmod(offset, _PAGE_BYTES)
            stop = min(_PAGE_BYTES, start + end - offset)
            yield page, start, stop
            offset += stop - start
