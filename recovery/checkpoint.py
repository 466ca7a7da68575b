"""Checkpoints in HDF5: a whole one or none, whenever the process or the machine dies.

One file holds the state of one step. It is written under a temporary name, fsynced, renamed to
``step-XXXXXXXX.h5``, and the folder is fsynced; only then are older files removed. So a file with
such a name is complete, unless the disk itself fails or somebody changes it.

The file is plain HDF5 (``h5dump`` and h5py open it): one dataset an array, and the step, the
format's version and the caller's attributes as attributes of the root. In front of it stands a
user block, a header of 512 bytes of text that HDF5 passes over::

    hopcoll checkpoint
    bytes 15272
    sha256 5f0c...

The digest covers every byte behind the header, HDF5's own metadata among them, and is checked
before HDF5 reads any of them: the library is not made for metadata that lies.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import operator
import os
import re
import secrets
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hopcoll.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)

__all__ = ["AsyncWriter", "Checkpoint", "Disk", "load", "load_latest", "save"]

_VERSION = 1
#: The smallest user block that HDF5 knows.
_HEADER_BYTES = 512
#: HDF5 keeps an attribute in the object's header, which ends at 64 KiB.
_ATTRIBUTES_BYTES_MAX = 60_000
_NAME = re.compile(r"step-(\d{8,})\.h5")
_TEMPORARY = re.compile(r"\.step-\d+\.h5\.[0-9a-f]+\.tmp")


class Disk:
    """The calls that change the disk, in one place: tests count them, and die inside of them.

    Parameters
    ----------
    piece_bytes : int, default 64 MiB
        The most that one write is handed.
    """

    def __init__(self, piece_bytes: int = 64 << 20) -> None:
        self.piece_bytes = piece_bytes

    def write(self, descriptor: int, data: bytes) -> int:
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)


_DISK = Disk()


@dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Attributes
    ----------
    step : int
    arrays : dict of str to ndarray
        The arrays, of the shapes and dtypes that they had; the caller's to change.
    attributes : dict of str to object
    path : Path
        The file that it came from.
    """

    step: int
    arrays: dict[str, np.ndarray]
    attributes: dict[str, Any]
    path: Path


def save(
    folder: str | os.PathLike[str],
    step: int,
    arrays: Mapping[str, np.ndarray],
    attributes: Mapping[str, Any] | None = None,
    *,
    keep: int = 2,
    disk: Disk = _DISK,
) -> Path:
    """Write a checkpoint; when this returns, it is durable and the latest of the folder.

    Local, blocks for the disk. One process at a time may save to a folder.

    Parameters
    ----------
    folder : path
        Made where it is missing.
    step : int
        0 or more. A file of the same step is replaced. Files of later steps are removed in the
        end: the run that wrote them is not the one that goes on.
    arrays : mapping of str to ndarray
        Any shape, any dtype that HDF5 has: numbers, bool, fixed bytes, structures of these. Names
        without a slash.
    attributes : mapping of str to object, optional
        Small things that JSON can carry.
    keep : int, default 2
        How many files stay, this one among them; 1 or more. With 2, a file that the disk spoils
        later leaves the one before it.

    Returns
    -------
    Path

    Raises
    ------
    TypeError, ValueError
        Something in the arguments cannot be saved; nothing was written.
    CheckpointError
        The disk refused (its error is the ``__cause__``). The older files are all there; the new
        one may be (a failed fsync leaves that open), and is whole if it is. Never tried again.

    Notes
    -----
    Memory: one more copy of the arrays while it runs. fsync once for the file and once for the
    folder.
    """
    if keep < 1:
        raise ValueError(f"keep must be 1 or more, not {keep}")
    image = _encode(step, arrays, attributes or {})
    folder = Path(folder)
    path = folder / f"step-{step:08d}.h5"
    # A name of its own each time: what a dead writer left behind is never written to again.
    temporary = folder / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        _make_folder(folder, disk)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            written = 0
            while written < len(image):
                piece = image[written : written + disk.piece_bytes]
                written += disk.write(descriptor, piece)
            disk.fsync(descriptor)
        finally:
            os.close(descriptor)
        disk.rename(temporary, path)
        _fsync_folder(folder, disk)
    except OSError as error:
        with contextlib.suppress(OSError):  # what stays is removed by the next save
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be made durable: {error}", path) from error
    _prune(folder, step, keep, disk)
    return path


def load(
    path: str | os.PathLike[str],
    *,
    like: Mapping[str, np.ndarray] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Read one checkpoint and check every byte of it.

    Local, blocks for the disk.

    Parameters
    ----------
    path : path
        A file that `save` wrote.
    like : mapping of str to ndarray, optional
        Arrays whose names, shapes and dtypes the saved ones must have.
    attributes : mapping of str to object, optional
        Attributes that must be there with these values.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointNotFoundError
        There is no such file.
    CheckpointCorruptError
        Its bytes are not those that were written.
    CheckpointMismatchError
        It is sound, but not what `like` and `attributes` ask for, or of another version of the
        format.
    CheckpointError
        It could not be read (the ``__cause__`` says why).

    Notes
    -----
    Memory: the file and the arrays, both, while it runs.
    """
    path = Path(path)
    try:
        image = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path} is not there", path) from error
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error}", path) from error
    if image[:_HEADER_BYTES] != _header(image):
        raise CheckpointCorruptError(f"{path} is corrupt: its SHA-256 does not fit", path)
    checkpoint = _decode(image, path)
    _compare(checkpoint, like, attributes or {})
    return checkpoint


def load_latest(
    folder: str | os.PathLike[str],
    *,
    like: Mapping[str, np.ndarray] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Read the checkpoint of the highest step that is sound.

    Local, blocks for the disk. A file that cannot be read or is corrupt is passed over with a
    `RuntimeWarning` that names it.

    Parameters
    ----------
    folder : path
    like, attributes
        As for `load`.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointNotFoundError
        The folder holds none, or is not there.
    CheckpointCorruptError, CheckpointError
        There are some, and none of them is sound: the error of the newest.
    CheckpointMismatchError
        The newest sound one is not what was asked for. An older one would not be either.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; to read one file there is load", folder)
    first_error = None
    for _, path in reversed(_list(folder)):
        try:
            return load(path, like=like, attributes=attributes)
        except (CheckpointMismatchError, CheckpointNotFoundError):
            raise
        except CheckpointError as error:
            warnings.warn(f"passed over: {error}", RuntimeWarning, stacklevel=2)
            first_error = first_error or error
    if first_error is not None:
        raise first_error
    raise CheckpointNotFoundError(f"{folder} holds no checkpoint", folder)


class AsyncWriter:
    """Saves checkpoints from a thread of its own, so that nobody waits for the disk.

    Local. At the end of a ``with`` block all that was submitted is durable, or an error was
    raised. Memory: up to two copies of the arrays, and a third while one is written.

    Parameters
    ----------
    folder, keep, disk
        As for `save`.

    Attributes
    ----------
    durable_step : int or None
        The step of the last checkpoint that is known to be durable.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int = 2, disk: Disk = _DISK
    ) -> None:
        self.durable_step: int | None = None
        self._folder = Path(folder)
        self._keep = keep
        self._disk = disk
        self._changed = threading.Condition()
        self._pending: _Request | None = None
        self._writing = False
        self._closed = False
        self._error: BaseException | None = None
        # A daemon: a save that is cut short by the end of the process leaves the older files.
        self._thread = threading.Thread(target=self._run, name="hopcoll-checkpoint", daemon=True)
        self._thread.start()

    def submit(
        self,
        step: int,
        arrays: Mapping[str, np.ndarray],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy the arrays and have them saved; returns without waiting for the disk.

        One that was submitted earlier and is not being written yet is dropped for this one: a disk
        that is too slow makes checkpoints rarer, and the loop no slower.

        Parameters
        ----------
        step, arrays, attributes
            As for `save`. The arrays may be changed as soon as this returns.

        Raises
        ------
        Exception
            What went wrong with an earlier checkpoint, once. This one was not taken then.
        ValueError
            The writer is closed.
        """
        copies = {name: np.array(array) for name, array in arrays.items()}
        request = _Request(step, copies, copy.deepcopy(dict(attributes or {})))
        with self._changed:
            self._raise_error()
            if self._closed:
                raise ValueError("AsyncWriter is closed")
            self._pending = request
            self._changed.notify_all()

    def wait(self, timeout_s: float = 120.0) -> None:
        """Wait until all that was submitted is durable.

        Parameters
        ----------
        timeout_s : float

        Raises
        ------
        Exception
            What went wrong with a checkpoint, once.
        CheckpointError
            The time was over. The writing goes on.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while self._pending is not None or self._writing:
                rest_s = deadline_s - time.monotonic()
                if rest_s <= 0:
                    raise CheckpointError(
                        f"{self._folder}: not durable after {timeout_s} s", self._folder
                    )
                self._changed.wait(rest_s)
            self._raise_error()

    def close(self, timeout_s: float = 120.0) -> None:
        """Wait as `wait` does, and end the thread. Closing again does nothing."""
        try:
            self.wait(timeout_s)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def __enter__(self) -> AsyncWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._closed)
                if self._pending is None:
                    return
                request, self._pending = self._pending, None
                self._writing = True
            error: BaseException | None = None
            try:
                save(
                    self._folder,
                    request.step,
                    request.arrays,
                    request.attributes,
                    keep=self._keep,
                    disk=self._disk,
                )
            except BaseException as raised:  # handed on: submit, wait or close raises it
                error = raised
            with self._changed:
                self._writing = False
                if error is None:
                    self.durable_step = request.step
                else:
                    self._error = self._error or error
                self._changed.notify_all()


@dataclass(frozen=True)
class _Request:
    step: int
    arrays: dict[str, np.ndarray]
    attributes: dict[str, Any]


def _header(image: bytes | memoryview) -> bytes:
    """Return the header that belongs to the bytes behind an image's header."""
    with memoryview(image) as view, view[_HEADER_BYTES:] as body:
        digest = hashlib.sha256(body).hexdigest()
        text = f"hopcoll checkpoint\nbytes {len(body)}\nsha256 {digest}\n"
    return text.encode().ljust(_HEADER_BYTES, b"\0")


def _encode(step: int, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> bytes:
    """Return the bytes of a checkpoint's file."""
    try:
        step = operator.index(step)
    except TypeError:
        raise TypeError(f"step must be an integer, not {type(step).__name__}") from None
    if step < 0:
        raise ValueError(f"step must be 0 or more, not {step}")
    for name in attributes:
        if not isinstance(name, str):  # JSON would make a string of it without a word
            raise TypeError(f"attributes: {name!r} is no string")
    text = json.dumps(dict(attributes), sort_keys=True)
    if len(text) > _ATTRIBUTES_BYTES_MAX:
        raise ValueError(
            f"attributes take {len(text)} bytes as JSON, at most {_ATTRIBUTES_BYTES_MAX} fit"
        )
    stream = io.BytesIO()
    with h5py.File(stream, "w", userblock_size=_HEADER_BYTES) as file:
        file.attrs["format"] = "hopcoll checkpoint"
        file.attrs["version"] = _VERSION
        file.attrs["step"] = step
        file.attrs["attributes"] = text
        for name, array in arrays.items():
            if not name or "/" in name or name == ".":
                raise ValueError(f"arrays: {name!r} cannot be the name of a dataset")
            array = np.asarray(array)
            try:
                dataset = file.create_dataset(name, data=array)
                known = dataset.dtype == array.dtype
            except TypeError:
                known = False
            # bfloat16, for one, would be stored as opaque bytes and come back as such.
            if not known:
                raise TypeError(f"arrays: {name!r} has dtype {array.dtype}, which HDF5 has not")
    # No view of a stream may outlive this: kept by the traceback of an exception, it can crash the
    # garbage collector of CPython 3.12.
    with stream.getbuffer() as image:
        header = _header(image)
    stream.seek(0)
    stream.write(header)
    return stream.getvalue()


def _decode(image: bytes, path: Path) -> Checkpoint:
    with h5py.File(io.BytesIO(image), "r") as file:
        if file.attrs["version"] != _VERSION:
            raise CheckpointMismatchError(
                f"{path} has version {file.attrs['version']} of the format, not {_VERSION}", path
            )
        return Checkpoint(
            step=int(file.attrs["step"]),
            arrays={name: np.asarray(dataset[()]) for name, dataset in file.items()},
            attributes=json.loads(file.attrs["attributes"]),
            path=path,
        )


def _compare(
    checkpoint: Checkpoint, like: Mapping[str, np.ndarray] | None, attributes: Mapping[str, Any]
) -> None:
    problems = []
    if like is not None:
        saved = checkpoint.arrays
        for name in sorted(saved.keys() | like.keys()):
            there = f"{saved[name].dtype}{saved[name].shape}" if name in saved else "missing"
            wanted = f"{like[name].dtype}{like[name].shape}" if name in like else "not wanted"
            if there != wanted:
                problems.append(f"array {name!r} is {there}, wanted {wanted}")
    for name, value in attributes.items():
        # By way of JSON, as the saved ones went: a tuple is a list there.
        value = json.loads(json.dumps(value))
        saved_value = checkpoint.attributes.get(name)
        # As text: a NaN is not equal to itself.
        if json.dumps(saved_value, sort_keys=True) != json.dumps(value, sort_keys=True):
            problems.append(f"attribute {name!r} is {saved_value!r}, wanted {value!r}")
    if problems:
        raise CheckpointMismatchError(
            f"{checkpoint.path} is of another job: {'; '.join(problems)}", checkpoint.path
        )


def _list(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a folder as (step, path), the highest step last."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    matches = [_NAME.fullmatch(name) for name in names]
    return sorted((int(match[1]), folder / match[0]) for match in matches if match)


def _make_folder(folder: Path, disk: Disk) -> None:
    """Make a folder and those above it, each of them durable in the one that it is in."""
    if folder.is_dir():
        return
    _make_folder(folder.parent, disk)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent, disk)


def _fsync_folder(folder: Path, disk: Disk) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, step: int, keep: int, disk: Disk) -> None:
    """Remove what the checkpoint that was just made durable has made useless."""
    listed = _list(folder)
    kept = [path for other, path in listed if other <= step][-keep:]
    useless = [path for _, path in listed if path not in kept]
    # One process saves at a time, and its own temporary file has been renamed by now.
    useless += [folder / name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    for path in useless:
        try:
            disk.unlink(path)
        except OSError as error:
            # The checkpoint itself is durable: no reason to let the caller think otherwise.
            warnings.warn(f"{path} could not be removed: {error}", RuntimeWarning, stacklevel=3)
