"""Files for objects that have no room in memory, and the thread that writes and reads them.

One directory a rank, ``<scratch>/hopcoll-<job>/rank-<rank>-<process>``, with one plain file an
object; it is made when the first is written and goes when the communicator closes. A lock
in it, which the kernel gives back whatever ends a process, tells a dead rank's directory from that
of one that lives: those go when the launcher ends, when another rank of the host closes, or
when the next job writes there.

The store knows no disk (`hopcoll._spills`). It leaves jobs for one thread of Python's, asleep in a
read until there are some; nothing else waits for a disk that hangs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

__all__ = ["JOB_VARIABLE", "Scratch", "job_folder", "start", "sweep"]

#: How a launcher tells its ranks which job they are of.
JOB_VARIABLE = "HOPCOLL_JOB"
_LOCK = "lock"
_WRITE_BYTES_MAX = 1 << 30


class Scratch:
    """The files of one rank.

    Parameters
    ----------
    base : str or None
        Under which directory; by default that of temporary files (``SLURM_TMPDIR``, ``TMPDIR``).
    rank : int
        Whose files they are.
    """

    def __init__(self, base: str | None, rank: int) -> None:
        name = f"rank-{rank}-{os.getpid()}"
        self.path = job_folder(base, os.environ) / name
        #: Why a file could not be written, or read, last.
        self.error = ""
        self._lock = -1
        self._process = os.getpid()

    def write(self, number: int, data: memoryview) -> int:
        """Write a file; return the checksum of its bytes. Blocking.

        Raises
        ------
        OSError
            It cannot be written; nothing is left of it.
        """
        if self._lock < 0:
            self._make()
        path = self._file(number)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            done = 0
            while done < len(data):
                done += os.write(file, data[done : done + _WRITE_BYTES_MAX])
            os.close(file)
        except OSError:
            with contextlib.suppress(OSError):
                os.close(file)
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        return _checksum(data)

    def read(self, number: int, data: memoryview, checksum: int) -> None:
        """Read a file back into memory of its length. Blocking.

        Raises
        ------
        OSError
            It cannot be read, or is not what was written.
        """
        path = self._file(number)
        with open(path, "rb", buffering=0) as file:
            done = 0
            while done < len(data):
                count = file.readinto(data[done : done + _WRITE_BYTES_MAX])
                if not count:
                    raise OSError(f"{path} has {done} bytes, and {len(data)} were written")
                done += count
        if _checksum(data) != checksum:
            raise OSError(f"{path} has other bytes than were written")

    def remove(self, number: int) -> None:
        """Remove a file. Blocking.

        Raises
        ------
        OSError
            It cannot be removed.
        """
        os.unlink(self._file(number))

    def close(self) -> None:
        """Remove all that is left, of dead ranks too. Blocking."""
        if self._lock < 0 or os.getpid() != self._process:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1
        with contextlib.suppress(OSError):  # others of the job are not at their end yet
            self.path.parent.rmdir()
        sweep(self.path.parent.parent)

    def _file(self, number: int) -> Path:
        return self.path / f"{number}.object"

    def _make(self) -> None:
        sweep(self.path.parent.parent)
        self.path.parent.mkdir(0o700, parents=True, exist_ok=True)
        self.path.mkdir(0o700, exist_ok=True)
        lock = os.open(self.path / _LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / _LOCK).stat()  # who sweeps may have been here before the lock was
        except OSError:
            os.close(lock)
            raise
        self._lock = lock


def _checksum(data: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def job_folder(base: str | None, environ: Mapping[str, str]) -> Path:
    """Return where the ranks of this job keep their files on this host. Local.

    Parameters
    ----------
    base : str or None
        The directory that was asked for.
    environ : mapping of str to str
        The environment of a rank, or of its launcher.

    Returns
    -------
    Path
        Nobody has made it yet.
    """
    if not base:
        base = environ.get("SLURM_TMPDIR") or environ.get("TMPDIR") or tempfile.gettempdir()
    names = (environ.get(name, "") for name in (JOB_VARIABLE, "PMIX_NAMESPACE", "SLURM_JOB_ID"))
    job = next(filter(None, names), f"process-{os.getpid()}")
    return Path(base) / f"hopcoll-{re.sub(r'[^A-Za-z0-9._-]', '-', job)}"


def sweep(base: Path) -> None:
    """Remove what dead ranks have left under a directory, those of this user. Local, blocking.

    Parameters
    ----------
    base : Path
        A scratch directory; if it is not there, nothing is done.
    """
    for lock in base.glob(f"hopcoll-*/rank-*/{_LOCK}"):
        try:
            file = os.open(lock, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # another's, or gone meanwhile
        try:
            if os.fstat(file).st_uid == os.geteuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
                lock.parent.parent.rmdir()
        except OSError:
            pass  # its rank lives, or another one's files are there
        finally:
            os.close(file)


def start(keeper: Any, scratch: Scratch) -> tuple[threading.Thread, int]:
    """Start the thread; return it, and the end of the pipe that wakes and ends it."""
    wakes, wake = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(wake, False)
    thread = threading.Thread(
        target=_work, args=(weakref.ref(keeper), scratch, wakes), name="hopcoll-disk", daemon=True
    )
    thread.start()
    return thread, wake


def _work(keeper_of: Any, scratch: Scratch, wakes: int) -> None:
    try:
        while os.read(wakes, 64):
            keeper = keeper_of()
            while keeper is not None and (job := keeper.take_job()) is not None:
                _do(keeper, scratch, *job)
            del keeper
    finally:
        os.close(wakes)


def _do(
    keeper: Any, scratch: Scratch, job: int, kind: str, number: int, data: Any, checksum: int
) -> None:
    failed = True
    try:
        if kind == "write":
            checksum = scratch.write(number, data)
        elif kind == "read":
            scratch.read(number, data, checksum)
        else:
            scratch.remove(number)
        failed = False
    except OSError as error:
        scratch.error = f"{type(error).__name__}: {error}"
    finally:
        keeper.end_job(job, checksum, failed)
