"""What a launcher hears of mpirun: its output, passed on as it comes, and the marks in it."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import time
from collections.abc import Callable, Sequence
from typing import IO

from hopcoll._rank import BEGIN_MARK, END_MARK

__all__ = ["TICK_S", "Relay"]

#: Seconds between two looks at what else is to be done.
TICK_S = 0.1

#: What Open MPI 5 says before it ends a job because one of its daemons is gone, or never came. It
#: does so on stderr as a rule, and on stdout now and then.
_HOST_LOST = (
    b"PRTE has lost communication with a remote daemon",
    b"A daemon failed to report back after being spawned",
    b"was unable to reliably start one or more daemons",
    b"PRTE daemon has unexpectedly failed after launch",
)
_LONGEST = max(map(len, _HOST_LOST))

#: Bytes of one read, and of one write: so many fit where `select` finds room (PIPE_BUF).
_READ_BYTES = 1 << 16
_WRITE_BYTES = 1 << 12


class Relay:
    """Passes output on, keeps the ranks' marks back, and hears mpirun lose a host.

    Nothing here blocks: what a slow reader has not taken yet waits, and its source with it.

    No thread: when a process of two threads is killed, the kernel may tell its child twice that
    the parent died, and at the second SIGTERM mpirun flees and leaves its ranks behind.

    Parameters
    ----------
    streams : sequence of (source, target)
        Pipes to read from, unbuffered, and the file descriptors that their text goes to.
    """

    def __init__(self, streams: Sequence[tuple[IO[bytes], int]]) -> None:
        self._streams = [_Stream(source, target) for source, target in streams]

    @property
    def is_open(self) -> bool:
        """Whether more may come."""
        return any(stream.is_open for stream in self._streams)

    @property
    def is_behind(self) -> bool:
        """Whether text waits for its reader."""
        return any(stream.waiting for stream in self._streams)

    @property
    def marks(self) -> int:
        """How many ranks told their end."""
        return sum(stream.marks for stream in self._streams)

    @property
    def began(self) -> bool:
        """Whether any rank ran."""
        return any(stream.began for stream in self._streams)

    def host_lost(self, code: int) -> bool:
        """Whether mpirun, which ended with `code`, said that it lost a host.

        Stdout is the program's, which may print such words; but a job that ended well did not.
        """
        return any(
            stream.host_lost and (code != 0 or stream.target == 2) for stream in self._streams
        )

    def pass_on(self, within_s: float, *, ahead: bool = False) -> None:
        """Read and write for so long, or until there is nothing left to do.

        Parameters
        ----------
        within_s : float
            Seconds.
        ahead : bool, default False
            Read on while text waits for its reader: what is in the pipes of an mpirun that ended.
        """
        deadline_s = time.monotonic() + within_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            reads = [one for one in self._streams if one.is_open and (ahead or not one.waiting)]
            writes = [one for one in self._streams if one.waiting]
            if not reads and not writes:
                return
            sources, targets, _ = select.select(reads, [one.room for one in writes], [], left_s)
            for stream in sources:
                stream.read()
            for stream in writes:
                if stream.room in targets:
                    stream.write()
                    # The other may have the same target, which had room for one; its turn is next.
                    self._streams.reverse()
                    break

    def finish(self, within_s: float, in_a_hurry: Callable[[], bool]) -> None:
        """Pass on what is left of an mpirun that has ended.

        Parameters
        ----------
        within_s : float
            Seconds for the pipes' ends: a process that hides from us may hold them open for ever.
        in_a_hurry : callable
            Whether a reader that takes none of it has so long as well; else it has for ever.
        """
        deadline_s = time.monotonic() + within_s
        while self.is_open and time.monotonic() < deadline_s:
            self.pass_on(TICK_S, ahead=True)
        for stream in self._streams:
            stream.close_source()
        while self.is_behind and (not in_a_hurry() or time.monotonic() < deadline_s):
            self.pass_on(TICK_S)
        for stream in self._streams:
            stream.close_target()


class _Stream:
    """One of the pipes: see `Relay`."""

    def __init__(self, source: IO[bytes], target: int) -> None:
        self.source = source
        self.target = target
        self.room = _unblocked(target)
        self.is_open = True
        self.began = False
        self.marks = 0
        self.host_lost = False
        self.waiting = b""  # for its reader
        self._held = b""  # the beginning of a mark, maybe
        self._tail = b""
        self._complained = False

    def fileno(self) -> int:
        return self.source.fileno()

    def read(self) -> None:
        block = self.source.read(_READ_BYTES)
        self.is_open = bool(block)
        heard = self._tail + block
        self.host_lost |= any(words in heard for words in _HOST_LOST)
        self._tail = heard[-_LONGEST:]
        text = self._held + block
        self.marks += text.count(END_MARK)
        self.began |= BEGIN_MARK in text or self.marks > 0
        text = text.replace(BEGIN_MARK, b"").replace(END_MARK, b"")
        # The beginning of a mark may be all that has come so far.
        split = text.rfind(END_MARK[:1])
        rest = text[split:]
        keeps = self.is_open and split >= 0 and (
            BEGIN_MARK.startswith(rest) or END_MARK.startswith(rest)
        )
        text, self._held = (text[:split], text[split:]) if keeps else (text, b"")
        self.waiting += text

    def write(self) -> None:
        try:
            done = os.write(self.room, self.waiting[:_WRITE_BYTES])
        except BlockingIOError:  # the room was taken by another process
            return
        except OSError as error:  # the job goes on
            done = len(self.waiting)
            # That its reader is gone it knows itself; a full disk nobody does.
            if error.errno != errno.EPIPE and self.target != 2 and not self._complained:
                self._complained = True
                text = f"hopcoll run: {done} bytes of output are lost: {error.strerror}\n"
                with contextlib.suppress(OSError):
                    os.write(2, text.encode())
        self.waiting = self.waiting[done:]

    def close_source(self) -> None:
        self.source.close()
        self.is_open = False
        self.waiting += self._held
        self._held = b""

    def close_target(self) -> None:
        if self.room != self.target:
            os.close(self.room)
            self.room = self.target


def _unblocked(target: int) -> int:
    """A descriptor for the same pipe or terminal that does not block, whatever others do to it.

    The caller's own may be shared with processes that do not expect it to become so. A file is not
    opened again: that one would begin at its start.
    """
    mode = os.fstat(target).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):  # another's terminal; a pipe without a reader
            how = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{target}", how)
    return target
