"""Whether the owner of a workflow still lives, told without a clock that two hosts share.

The owner writes a **lease**: a small file beside the journal, named after the owner's nonce,
whose content changes with every beat. An observer looks at it for as long as its patience lasts
*on its own clock*, and says what it saw. That serves liveness only: a verdict may be wrong, and
the journal fences whoever was taken for silent and wakes up (`recovery.journal`).

One verdict is a proof, "dead": the process cannot do anything any more, nor to the outside world.

* On the same boot of the same host, in the same namespace of process numbers: no process has the
  owner's number, or one that started at another time has it, or it has ended and waits for its
  parent to ask.
* The same machine (host name and machine id) has booted since.

Anything else (another host, a container of its own, no machine id) is not proved here; the caller
may know more (`proven_dead`), such as Slurm's word that a job has ended. A process that the owner
started may outlive it; the proof is about the owner alone.

Of two starts of one batch job the later one is right, whatever the lease says: a requeued job need
not wait for a process of its older start that goes on beating on a node out of reach, and such a
process, started again there, is told that the workflow runs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from recovery.disk import Disk
from recovery.runs import is_newer, run_of, this_run

__all__ = ["Lease", "Verdict", "describe_owner", "observe", "release"]

#: "running"; "dead", which is proven; "silent", so it may be taken over, but may come back; "free",
#: closed by its owner, or of nobody.
Verdict = Literal["running", "dead", "silent", "free"]

_PREFIX = "lease."
_FREE = b"free"
#: Lines are as long as each other, so that each is written over by the next.
_LINE_BYTES = 20


def describe_owner() -> dict[str, Any]:
    """Return JSON that tells this process apart from all others, for `observe` and for people."""
    owner: dict[str, Any] = {
        "nonce": secrets.token_hex(12),
        "host": socket.gethostname(),
        "machine": _read("/etc/machine-id"),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pid": os.getpid(),
        "start": _start_of(os.getpid()),
        "pid_namespace": _namespace("pid"),
        "time_namespace": _namespace("time"),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if run := this_run():
        owner["slurm_job"], owner["slurm_restarts"] = run
    return owner


class Lease:
    """The sign of life of an owner: a file that a thread changes every `beat_s` seconds.

    Leases that others left are removed; one that lives makes its own anew with its next beat. A
    beat that fails is left out: if they go on failing, the owner is taken for silent.

    Parameters
    ----------
    folder : Path
        Of the workflow's journal.
    owner : dict
        What `describe_owner` returned, as in the journal.
    disk : Disk, optional
    beat_s : float, default 1.0
        A third of the observers' patience, at the most.
    """

    def __init__(
        self, folder: Path, owner: dict[str, Any], disk: Disk | None = None, beat_s: float = 1.0
    ) -> None:
        if not beat_s > 0:
            raise ValueError(f"beat_s must be positive, not {beat_s}")
        self._path = _path_of(Path(folder), owner)
        self._disk = Disk() if disk is None else disk
        self._beat_s = beat_s
        self._beats = 0
        self._stopped = threading.Event()
        self._beat()
        for other in self._path.parent.glob(f"{_PREFIX}*"):
            if other != self._path:
                with contextlib.suppress(OSError):
                    self._disk.unlink(other)
        self._thread = threading.Thread(target=self._run, name="hopcoll lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say that the workflow is free, and beat no more. A second call does nothing.

        Call it when the journal is closed: from now on others take it over at once.
        """
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._put(_FREE)

    def _run(self) -> None:
        while not self._stopped.wait(self._beat_s):
            with contextlib.suppress(OSError):
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._put(b"beat %d" % self._beats)

    def _put(self, line: bytes) -> None:
        self._disk.put(self._path, line.ljust(_LINE_BYTES - 1) + b"\n")


def release(folder: Path, owner: dict[str, Any], disk: Disk | None = None) -> None:
    """Say that an owner has given the workflow up, which it could not take over in the end."""
    with contextlib.suppress(OSError):
        line = _FREE.ljust(_LINE_BYTES - 1) + b"\n"
        (Disk() if disk is None else disk).put(_path_of(Path(folder), owner), line)


def observe(
    folder: Path,
    owner: dict[str, Any] | None,
    patience_s: float,
    *,
    proven_dead: Callable[[dict[str, Any]], bool] | None = None,
    look_s: float = 0.05,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Verdict:
    """Watch an owner until it is known what it does; blocks for `patience_s` at the most.

    Parameters
    ----------
    folder : Path
        Of the workflow's journal.
    owner : dict or None
        From the journal's newest segment; None, where there is none, is "free".
    patience_s : float
        After how long without a change the owner is silent. A process of this host that runs is
        "running" at once; one that is stopped there is watched.
    proven_dead : callable, optional
        Told the owner, whether the caller knows for certain that it can do nothing any more. Asked
        at the beginning, and again before the verdict is "silent".
    look_s : float, default 0.05
        Between two looks.
    clock, pause : callable, optional
        Of this process; for tests.
    """
    if not patience_s >= 0:
        raise ValueError(f"patience_s must be 0 or more, not {patience_s}")
    if owner is None:
        return "free"
    path = _path_of(Path(folder), owner)
    if is_newer(run_of(owner), this_run()):
        return "running"
    until = clock() + patience_s
    content = first = _content(path)
    if is_newer(this_run(), run_of(owner)):
        if content is not None and content.startswith(_FREE):
            return "free"
        dead = _life_of(owner) == "dead" or (proven_dead is not None and proven_dead(owner))
        return "dead" if dead else "silent"
    asks = proven_dead is not None
    while True:
        if content is not None and content.startswith(_FREE):
            return "free"
        if content != first:
            return "running"
        life = _life_of(owner)
        if life is not None:
            return life
        left_s = until - clock()
        if (asks or left_s <= 0) and proven_dead is not None and proven_dead(owner):
            return "dead"
        asks = False
        if left_s <= 0:
            return "silent"
        pause(min(look_s, left_s))
        content = _content(path)


def _path_of(folder: Path, owner: dict[str, Any]) -> Path:
    if "nonce" not in owner:
        raise ValueError("owner has no nonce: it was not made by describe_owner")
    return folder / f"{_PREFIX}{owner['nonce']}"


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _life_of(owner: dict[str, Any]) -> Literal["running", "dead"] | None:
    """Return what this host knows of the owner for certain; None for nothing."""
    here = describe_owner()

    def same(*keys: str) -> bool:
        return all(here[key] and here[key] == owner.get(key) for key in keys)

    if not same("boot"):
        rebooted = same("host", "machine") and here["boot"] and owner.get("boot")
        return "dead" if rebooted else None
    # A kernel that knows no namespaces of time has none for anybody.
    if not same("pid_namespace") or here["time_namespace"] != owner.get("time_namespace"):
        return None
    return _life_of_process(owner["pid"], owner["start"])


def _life_of_process(pid: int, start: int | None) -> Literal["running", "dead"] | None:
    """Return whether the process with this number that started then runs, in this namespace; None
    where it is stopped, or nothing may be known."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "dead"
    except PermissionError:
        pass
    found = _stat_of(pid)
    if found is None or start is None:
        return None  # hidden from us, or it ended just now
    state, its_start = found
    if its_start != start:
        return "dead"
    if state in "ZX":
        # Its first thread has ended. If others go on, it lives.
        with contextlib.suppress(OSError):
            return "dead" if len(os.listdir(f"/proc/{pid}/task")) == 1 else "running"
        return None
    return None if state in "Tt" else "running"


def _stat_of(pid: int) -> tuple[str, int] | None:
    """Return the state of a process, and when it started in ticks since the boot."""
    # Else /proc is of another namespace, and its numbers name other processes.
    if os.readlink("/proc/self") != str(os.getpid()):
        return None
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name of the program stands in brackets and may have any in it.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def _start_of(pid: int) -> int | None:
    found = _stat_of(pid)
    return None if found is None else found[1]


def _namespace(kind: str) -> str | None:
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip() or None
    except OSError:
        return None
