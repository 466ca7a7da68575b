"""The log of a training session: one line of JSON a committed step, once, whatever dies.

One rank writes: the lowest that is left. All keep the lines that may not be on the disk yet, so
that the next one can write anew what a dead writer had in hand; and the commits carry them, so that
a power cut loses none of a step that is committed. A job that goes on from a commit cuts the file
after it; one that starts from nothing starts the file anew. It has to be on a file system that all
hosts share.

Who begins to write does so in a file of its own, which takes the place of the one before it. So
the writer before it may still be alive (stopped and left out, or in a replay): what it had under
way ends up in a file that has no name any more.

The disk is waited for in a thread.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hopcoll.errors import CheckpointError, CheckpointMismatchError

__all__ = ["Metrics"]

#: A step, what was logged, and when (`time.time_ns`).
Line = tuple[int, dict[str, Any], int]


#: How many are kept, and carried by a commit, even if they are not known to be durable.
_LINES_MAX = 4096


class Metrics:
    """The file, at one rank. Local.

    Parameters
    ----------
    path : path
    timeout_s : float
        How long a call waits for the disk.
    """

    def __init__(self, path: str | os.PathLike[str], timeout_s: float) -> None:
        self.path = Path(os.path.realpath(path))
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(1, "hopcoll-log")
        self._floor = 0  # up to this step the file is durable
        self._lines: list[Line] = []  # all later ones
        self._file: int | None = None  # at the rank that writes
        self._written = 0  # the step up to which the file is complete
        self._commits = (0, 0)  # the last one, and the one before it
        self._syncing: Future[None] | None = None
        self._failed: Future[None] | None = None

    def go_on(self, step: int, carried: dict[str, Any] | None) -> None:
        """Go on after a commit, with the lines that it carries (None: from nothing)."""
        self._release()
        now_ns = time.time_ns()
        self._floor = carried["durable"] if carried else 0
        self._lines = [(at, fields, now_ns) for at, fields in carried["lines"]] if carried else []
        self._commits, self._syncing = (step, self._floor), None
        self._written = step

    def add(self, step: int, fields: dict[str, Any], writes: bool) -> None:
        """Take the line of a committed step.

        Parameters
        ----------
        step : int
        fields : dict
            Alike at all ranks.
        writes : bool
            Whether this rank is the one that writes.
        """
        self._lines.append((step, fields, time.time_ns()))
        if len(self._lines) > _LINES_MAX:
            self._floor = self._lines.pop(0)[0]
        if writes:
            self.write(step)

    def write(self, step: int) -> None:
        """See to it that the file has all lines up to a step, and none after it."""
        self._check()
        if self._file is None:
            lines = list(self._lines)
            self._file = self._call(lambda: self._open(step, lines))
        elif lines := [line for line in self._lines if line[0] > self._written]:
            file = self._file
            self._failed = self._thread.submit(_append, file, lines)
        self._written = step

    def committing(self, step: int) -> dict[str, Any]:
        """Before a step is saved: have the lines up to it made durable meanwhile.

        Returns when those up to the save before it are. All ranks take part in a save, so those up
        to the one before that are known to be durable by all, and are carried no more.

        Returns
        -------
        dict
            What the commit has to carry, alike at all ranks.
        """
        if self._syncing is not None:
            self._result(self._syncing)
        before, self._floor = self._commits
        self._commits = step, before
        self._lines = [line for line in self._lines if line[0] > self._floor]
        file = self._file
        self._syncing = None if file is None else self._thread.submit(os.fsync, file)
        return {"durable": self._floor, "lines": [[at, fields] for at, fields, _ in self._lines]}

    def close(self) -> None:
        """Wait for the disk, and close the file."""
        try:
            if self._file is not None:
                self._call(lambda: os.fsync(self._file))
        finally:
            self._release()
            self._thread.shutdown(wait=False)

    def _open(self, step: int, lines: list[Line]) -> int:
        """Replace the file by one of our own, with all that is not known to be durable anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for left in self.path.parent.glob(glob.escape(f".{self.path.name}.") + "*.next"):
            left.unlink(missing_ok=True)  # of one who died, or who is not to write any more
        aside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.next")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        file = os.open(aside, flags, 0o666)
        try:
            self._copy_durable(file)
            _append(file, [line for line in lines if line[0] <= step])
            os.fsync(file)
            os.replace(aside, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException:
            os.close(file)
            aside.unlink(missing_ok=True)
            raise
        return file

    def _copy_durable(self, file: int) -> None:
        """Copy the lines that are known to be durable."""
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as files:
            before = files.enter_context(open(self.path, "rb"))
            copy = files.enter_context(open(file, "ab", closefd=False))
            for number, line in enumerate(before, 1):
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    if line.endswith(b"\n"):
                        raise CheckpointMismatchError(
                            f"{self.path}, line {number}, is not of a session's log", self.path
                        ) from None
                    break  # half a line, of one who was killed
                if step > self._floor:
                    break
                copy.write(line)

    def _call(self, function: Any) -> Any:
        return self._result(self._thread.submit(function))

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result(self._timeout_s)
        except OSError as error:  # also a TimeoutError
            what = str(error) or "the disk did not answer in time"
            raise CheckpointError(f"{self.path} cannot be written: {what}", self.path) from error

    def _check(self) -> None:
        if self._failed is not None and self._failed.done():
            failed, self._failed = self._failed, None
            self._result(failed)

    def _release(self) -> None:
        if self._file is not None:
            self._thread.submit(os.close, self._file)
            self._file = None


def _append(file: int, lines: list[Line]) -> None:
    text = "".join(
        json.dumps({"step": step, **fields, "time_ns": time_ns}) + "\n"
        for step, fields, time_ns in lines
    )
    data = memoryview(text.encode())
    while data:
        data = data[os.write(file, data) :]
