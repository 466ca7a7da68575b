"""The child of test_journal.py: ``journal_child.py FOLDER``.

For k = 1, 2, ... a process is forked that keeps the journal FOLDER/k/journal, and gets SIGKILL at
its k-th call that changes the disk, until one comes through. FOLDER/k/killed then names the call,
and FOLDER/k/notes has what the process noted (`tests.crash.journal_runs`).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

from recovery.disk import Disk
from tests.crash.journal_runs import Session, Tags, small_and_same_every_time
from tests.store_faults import FatalDisk


class FileNotes:
    """Notes that a SIGKILL leaves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._file = open(root / "notes", "ab", buffering=0)

    def note(self, what: tuple[str, Tags]) -> None:
        self._file.write(json.dumps(what).encode() + b"\n")


def work(notes: FileNotes, disk: Disk) -> None:
    """Two owners one after the other, with a compaction each."""
    for _ in range(2):
        session = Session(notes, disk)
        session.append(2)
        session.flush()
        session.append(4)
        session.flush()
        session.compact()
        session.append()
        session.flush()
        session.append()
    session.journal.close()
    notes.note(("durable", session.tags))


def main() -> None:
    """Fork one process for each k."""
    for k in itertools.count(1):
        folder = Path(sys.argv[1]) / str(k)
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            with small_and_same_every_time():
                work(FileNotes(folder), FatalDisk(k, folder))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            continue
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
