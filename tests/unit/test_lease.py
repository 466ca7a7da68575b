"""Whether the owner of a workflow still lives: clocks that the tests turn, and real processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recovery import lease as lease_module
from recovery.disk import Disk
from recovery.journal import Journal
from recovery.lease import Lease, describe_owner, observe
from tests import launch

HOST = {"host": "elsewhere", "boot": "another boot", "machine": "another machine"}


class Clock:
    """A clock that only moves while an observer pauses; `during` is called in each pause."""

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.now_s = 100.0
        self.during = during

    def __call__(self) -> float:
        return self.now_s

    def pause(self, duration_s: float) -> None:
        assert duration_s > 0
        self.now_s += duration_s
        self.during()


def seen(folder: Path, owner: dict[str, Any] | None, clock: Clock, **how: Any) -> str:
    how = {"patience_s": 5.0, **how}
    return observe(folder, owner, clock=clock, pause=clock.pause, **how)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that says who it is, and then waits to be told to end."""
    program = (
        "import json, sys; from recovery.lease import describe_owner\n"
        "print(json.dumps(describe_owner()), flush=True); sys.stdin.read()"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program],
        env=launch.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield started
    started.kill()
    started.communicate()


def owner_of(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdout is not None
    owner: dict[str, Any] = json.loads(child.stdout.readline())
    assert owner["pid"] == child.pid
    return owner


# What this host knows


def test_an_owner_is_json_and_tells_processes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    first, second = describe_owner(), describe_owner()
    assert json.loads(json.dumps(first)) == first
    assert first.pop("nonce") != second.pop("nonce")
    assert {**first, "since": ""} == {**second, "since": ""}
    assert first["pid"] == os.getpid() and first["start"] > 0
    assert "slurm_job" not in first
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    owner = describe_owner()
    assert (owner["slurm_job"], owner["slurm_restarts"]) == ("4711", 2)


def test_nobody_is_free(tmp_path: Path) -> None:
    assert seen(tmp_path, None, Clock()) == "free"


def test_a_process_of_this_host_runs_or_is_dead_at_once(
    tmp_path: Path, child: subprocess.Popen[str]
) -> None:
    owner, clock = owner_of(child), Clock()
    assert seen(tmp_path, owner, clock) == "running"
    assert seen(tmp_path, {**owner, "start": owner["start"] + 1}, clock) == "dead"
    child.kill()
    # It has ended, and its parent has not asked for it yet.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert seen(tmp_path, owner, clock) == "dead"
    child.wait()
    assert seen(tmp_path, owner, clock) == "dead"
    assert clock.now_s == 100.0


def test_a_stopped_process_is_silent_and_not_dead(
    tmp_path: Path, child: subprocess.Popen[str]
) -> None:
    owner = owner_of(child)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    clock = Clock()
    assert seen(tmp_path, owner, clock) == "silent"
    assert clock.now_s == pytest.approx(105.0, abs=0.1)
    clock = Clock(lambda: child.send_signal(signal.SIGCONT))
    assert seen(tmp_path, owner, clock) == "running"


def test_a_process_that_ends_while_it_is_watched(
    tmp_path: Path, child: subprocess.Popen[str]
) -> None:
    owner = owner_of(child)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)

    def end() -> None:
        child.kill()
        child.wait()

    clock = Clock(end)
    assert seen(tmp_path, owner, clock) == "dead"
    assert clock.now_s < 101.0


def test_a_process_whose_first_thread_has_ended_lives(tmp_path: Path) -> None:
    """Its state is that of a process that has ended, but its other threads go on."""
    program = (
        "import ctypes, json, sys, threading; from recovery.lease import describe_owner\n"
        "def run():\n"
        "    stat = '/proc/self/stat'\n"
        "    while open(stat).read().rsplit(')', 1)[1].split()[0] != 'Z': pass\n"
        "    print(json.dumps(owner), flush=True); sys.stdin.read(1)\n"
        "owner = describe_owner()\n"
        "threading.Thread(target=run, daemon=True).start()\n"
        "lib = ctypes.CDLL(None); lib.syscall(60, 0)"  # exit of this thread alone
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        env=launch.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert seen(tmp_path, owner_of(child), Clock()) == "running"
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"boot": "an earlier boot"}, "dead"),
        ({"boot": "an earlier boot", "host": "elsewhere"}, "silent"),
        ({"boot": "an earlier boot", "machine": "another"}, "silent"),
        ({"boot": "an earlier boot", "machine": None}, "silent"),
        ({"boot": None}, "silent"),
        # Another container: its process numbers are not ours.
        ({"pid_namespace": "pid:[1]", "pid": 1 << 30}, "silent"),
        ({"pid_namespace": None, "pid": 1 << 30}, "silent"),
        # There processes that started at the same time seem to have started at another.
        ({"time_namespace": "time:[1]", "start": 1}, "silent"),
        ({"time_namespace": None, "start": 1}, "silent"),
        ({"start": None}, "silent"),
        ({"pid": 1 << 30}, "dead"),
    ],
)
def test_what_is_proven_and_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], verdict: str
) -> None:
    here = {**describe_owner(), "machine": "m", "host": "h"}
    monkeypatch.setattr(lease_module, "describe_owner", lambda: here)
    assert seen(tmp_path, here, Clock()) == "running"
    assert seen(tmp_path, {**here, **changes}, Clock()) == verdict


def test_a_process_that_is_hidden_from_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc may be mounted so that others' processes are hidden, or be of another namespace."""
    owner = describe_owner()

    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert seen(tmp_path, owner, Clock()) == "running"
    monkeypatch.setattr(lease_module, "_stat_of", lambda pid: None)
    assert seen(tmp_path, owner, Clock()) == "silent"
    monkeypatch.undo()
    monkeypatch.setattr(os, "getpid", lambda: 1 << 30)
    assert seen(tmp_path, owner, Clock()) == "silent"


# What a lease tells


def distant() -> dict[str, Any]:
    return {**describe_owner(), **HOST}


def test_a_lease_that_changes_runs_and_one_that_does_not_is_silent(tmp_path: Path) -> None:
    owner = distant()
    beats = iter(range(100))
    lines: list[bytes] = []

    class Told(Disk):
        def put(self, path: Path, data: bytes) -> None:
            lines.append(data)
            super().put(path, data)

    lease = Lease(tmp_path, owner, Told(), beat_s=3600.0)
    (path,) = tmp_path.iterdir()
    clock = Clock()
    assert seen(tmp_path, owner, clock) == "silent"
    assert clock.now_s == pytest.approx(105.0, abs=0.1)
    clock = Clock(lambda: lease._beat() if next(beats) == 40 else None)
    assert seen(tmp_path, owner, clock) == "running"
    assert clock.now_s == pytest.approx(102.05, abs=0.1)
    # Removed is silent as well, and made anew is a change.
    path.unlink()
    assert seen(tmp_path, owner, Clock()) == "silent"
    assert seen(tmp_path, owner, Clock(lease._beat)) == "running"
    assert len(set(lines)) == len(lines) and len({len(line) for line in lines}) == 1
    lease.stop()
    lease.stop()
    assert seen(tmp_path, owner, Clock()) == "free"
    assert len(lines) == 4


def test_beats_come_by_themselves_and_end(tmp_path: Path) -> None:
    beaten, failing = threading.Semaphore(0), threading.Event()

    class Told(Disk):
        def put(self, path: Path, data: bytes) -> None:
            beaten.release()
            if failing.is_set():
                raise OSError(errno.ENOSPC, "full")
            super().put(path, data)

    owner = distant()
    lease = Lease(tmp_path, owner, Told(), beat_s=0.001)
    for _ in range(5):
        assert beaten.acquire(timeout=30)
    assert observe(tmp_path, owner, 30.0, look_s=0.001) == "running"
    failing.set()
    for _ in range(20):  # a full disk ends nothing
        assert beaten.acquire(timeout=30)
    failing.clear()
    assert observe(tmp_path, owner, 30.0, look_s=0.001) == "running"
    lease.stop()
    assert observe(tmp_path, owner, 30.0) == "free"
    assert not [one for one in threading.enumerate() if one.name == "hopcoll lease"]


def test_an_old_owner_that_wakes_up_does_not_speak_for_the_new_one(tmp_path: Path) -> None:
    old, new = distant(), distant()
    first = Lease(tmp_path, old, beat_s=3600.0)
    second = Lease(tmp_path, new, beat_s=3600.0)
    assert [path.name for path in tmp_path.iterdir()] == [f"lease.{new['nonce']}"]
    assert seen(tmp_path, new, Clock(first._beat)) == "silent"
    second.stop()
    assert seen(tmp_path, new, Clock(first._beat)) == "free"
    assert seen(tmp_path, old, Clock(first._beat)) == "running"
    first.stop()
    assert seen(tmp_path, old, Clock()) == "free"


def test_a_caller_may_know_more(tmp_path: Path) -> None:
    owner, asked = distant(), []
    clock = Clock()

    def ended(whom: dict[str, Any]) -> bool:
        asked.append(whom)
        return clock.now_s > 100.0

    assert seen(tmp_path, owner, clock, proven_dead=ended) == "dead"
    assert asked == [owner, owner]
    assert clock.now_s == pytest.approx(105.0, abs=0.1)
    assert seen(tmp_path, owner, clock, proven_dead=ended) == "dead"
    assert len(asked) == 3
    assert seen(tmp_path, owner, Clock(), proven_dead=lambda owner: False) == "silent"


def test_a_lease_lies_beside_the_journal(tmp_path: Path) -> None:
    owner = describe_owner()
    folder = tmp_path / "journal"
    folder.mkdir()
    lease = Lease(folder, owner, beat_s=3600.0)
    journal = Journal(folder, Disk(), owner)
    journal.open()
    found = Journal.read(folder).owner
    assert found == owner
    assert seen(folder, found, Clock()) == "running"
    journal.close()
    lease.stop()
    assert seen(folder, found, Clock()) == "free"


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="beat_s must be positive"):
        Lease(tmp_path, describe_owner(), beat_s=0)
    with pytest.raises(FileNotFoundError):
        Lease(tmp_path / "missing", describe_owner())
    for patience_s in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="patience_s"):
            observe(tmp_path, describe_owner(), patience_s)
    with pytest.raises(ValueError, match="owner has no nonce"):
        observe(tmp_path, {"pid": 1}, 1.0)
    with pytest.raises(ValueError, match="owner has no nonce"):
        Lease(tmp_path, {"pid": 1})


# Starts of one batch job


def test_a_later_start_of_the_job_does_not_wait_for_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[str]
) -> None:
    """Though that one beats on, or even is a process that runs here."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    older = {**owner_of(child), "slurm_job": "7", "slurm_restarts": 0}
    clock = Clock()
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert seen(tmp_path, older, clock) == "running"  # the same start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert seen(tmp_path, older, clock) == "silent"
    child.kill()
    child.wait()
    assert seen(tmp_path, older, clock) == "dead"


def test_an_older_start_is_told_that_the_later_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its lease says: it may be about to write the first line of it."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    later = {**describe_owner(), "slurm_restarts": 3, "host": "elsewhere", "boot": "another"}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert seen(tmp_path, later, Clock()) == "running"
    # Of other jobs nobody knows which is later.
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert seen(tmp_path, later, Clock()) == "silent"
