"""The calls that change the disk, in one place: tests record, count and fail them, and die in them.

Nothing else in this package writes to the directory of a store or of a workflow's journal. Reading
needs no such place.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Disk", "writing"]


@contextlib.contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Let an error of the disk say what it was that could not be written, and where."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        text = f"{what} could not be written: {error.strerror}"
        raise OSError(error.errno, text, str(path)) from error


class Disk:
    """Local, blocking calls of the operating system; each raises `OSError` where it fails.

    A failed `fsync` is never tried again: the kernel may have dropped the pages and forgotten it.
    """

    def create(self, path: Path) -> int:
        """Make a new file and return its descriptor; a file that is there is never opened."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: Any, offset: int) -> None:
        """Write all of `data` at `offset` bytes from the start of the file."""
        with memoryview(data) as view, view.cast("B") as rest:
            written = 0
            while written < len(rest):
                count = self.write_some(descriptor, rest[written:], offset + written)
                if count <= 0:
                    raise OSError(errno.EIO, "the disk took no byte of a write")
                written += count

    def push(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Let the disk begin with what was written there, so that the fsync is shorter; a hint."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write at `offset`; return how many bytes the system took, at least one."""
        return os.pwrite(descriptor, data, offset)

    def truncate(self, descriptor: int, nbytes: int) -> None:
        """Make the file `nbytes` long; what is new reads as zeros."""
        os.ftruncate(descriptor, nbytes)

    def fsync(self, descriptor: int) -> None:
        """Make the file's bytes durable (not its name)."""
        os.fsync(descriptor)

    def fdatasync(self, descriptor: int) -> None:
        """Make the file's bytes durable, and its length; where only bytes were written over, the
        file system need not commit anything else, which is 20 times as fast."""
        os.fdatasync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Give the file `source` the second name `target`.

        Raises
        ------
        FileExistsError
            Another file has that name; it stays as it is.
        """
        try:
            os.link(source, target)
        except FileExistsError:
            # NFS sends a link again whose answer was lost, and is told of its own success.
            if not os.path.samefile(source, target):
                raise

    def put(self, path: Path, data: bytes) -> None:
        """Write `data` over the first bytes of a file, which is made if it is not there. Nothing
        becomes durable."""
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        try:
            os.pwrite(descriptor, data, 0)
        finally:
            os.close(descriptor)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def fsync_folder(self, path: Path) -> None:
        """Make the names in a folder durable: those that came and those that went."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
