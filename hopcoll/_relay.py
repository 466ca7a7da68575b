"""What a launcher hears of mpirun: its output, passed on as it comes, and the marks in it."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from typing import IO

from hopcoll._rank import BEGIN_MARK, END_MARK

__all__ = ["Relay"]

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

    @property
    def host_lost(self) -> bool:
        """Whether mpirun said that it lost a host."""
        return any(stream.host_lost for stream in self._streams)

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
            sources, targets, _ = select.select(reads, [one.target for one in writes], [], left_s)
            for stream in sources:
                stream.read()
            for stream in writes:
                if stream.target in targets:
                    stream.write()
                    # The other may have the same target, which had room for one; its turn is next.
                    self._streams.reverse()
                    break

    def close(self) -> None:
        """Close the sources, whether or not more would come."""
        for stream in self._streams:
            stream.source.close()
            stream.is_open = False


class _Stream:
    """One of the pipes: see `Relay`."""

    def __init__(self, source: IO[bytes], target: int) -> None:
        self.source = source
        self.target = target
        self.is_open = True
        self.began = False
        self.marks = 0
        self.host_lost = False
        self.waiting = b""  # for its reader
        self._held = b""  # the beginning of a mark, maybe
        self._tail = b""

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
            done = os.write(self.target, self.waiting[:_WRITE_BYTES])
        except BlockingIOError:  # the room was taken by another process
            return
        except OSError:  # nobody reads it any more; the job goes on
            done = len(self.waiting)
        self.waiting = self.waiting[done:]
