"""The files of objects: what is written comes back, or is said to be damaged; nothing is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from hopcoll import _scratch
from hopcoll._scratch import Scratch, job_folder, sweep


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv(_scratch.JOB_VARIABLE, "job")
    one = Scratch(str(tmp_path), 3)
    yield one
    one.close()


@pytest.mark.parametrize("count", [1, 4096, 1_000_001])
def test_bytes_come_back(scratch, count, monkeypatch):
    monkeypatch.setattr(_scratch, "_WRITE_BYTES_MAX", 300_000)
    data = os.urandom(count)
    checksum = scratch.write(1, memoryview(data))
    back = bytearray(count)
    scratch.read(1, memoryview(back), checksum)
    assert back == data
    scratch.remove(1)
    assert os.listdir(scratch.path) == ["lock"]


def test_a_write_in_parts(scratch, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    checksum = scratch.write(1, memoryview(b"x" * 100))
    scratch.read(1, memoryview(bytearray(100)), checksum)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], "has 99 bytes, and 100 were written"),
        (lambda data: data[:-1] + b"y", "has other bytes than were written"),
    ],
)
def test_damage_is_seen(scratch, damage, said):
    data = b"x" * 100
    checksum = scratch.write(1, memoryview(data))
    (scratch.path / "1.object").write_bytes(damage(data))
    with pytest.raises(OSError, match=said):
        scratch.read(1, memoryview(bytearray(100)), checksum)


def test_a_disk_that_is_full_leaves_no_part_of_a_file(scratch, monkeypatch):
    write = os.write

    def write_some(file, data):
        if os.fstat(file).st_size >= 50:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:50])

    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(OSError, match="No space left on device"):
        scratch.write(1, memoryview(b"x" * 100))
    assert os.listdir(scratch.path) == ["lock"]


def test_the_end_removes_everything(scratch, tmp_path):
    scratch.write(1, memoryview(b"x"))
    assert scratch.path == tmp_path / "hopcoll-job" / f"rank-3-{os.getpid()}"
    assert scratch.path.stat().st_mode & 0o77 == 0
    scratch.close()
    assert os.listdir(tmp_path) == []
    scratch.close()


def test_nothing_is_made_before_it_is_needed(scratch, tmp_path):
    scratch.close()
    assert os.listdir(tmp_path) == []


def test_the_dead_are_swept_and_the_living_are_not(scratch, tmp_path):
    scratch.write(1, memoryview(b"x"))
    program = (
        "import os, sys; from hopcoll._scratch import Scratch; one = Scratch(sys.argv[1], 4); "
        "one.write(1, memoryview(b'y')); print(one.path, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, _scratch.JOB_VARIABLE: "other"},
    )
    path = other.stdout.readline().strip()
    sweep(tmp_path)
    assert os.path.exists(f"{path}/1.object")
    other.send_signal(signal.SIGKILL)
    other.communicate()
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["hopcoll-job"]
    assert (scratch.path / "1.object").exists()


def test_the_child_of_a_fork_removes_nothing(scratch):
    scratch.write(1, memoryview(b"x"))
    scratch._process += 1
    scratch.close()
    assert (scratch.path / "1.object").exists()
    scratch._process -= 1


def test_where_the_files_are(tmp_path):
    assert job_folder("/a", {"HOPCOLL_JOB": "1"}).as_posix() == "/a/hopcoll-1"
    where = {"SLURM_TMPDIR": "/s", "TMPDIR": "/t", "SLURM_JOB_ID": "7"}
    assert job_folder(None, where).as_posix() == "/s/hopcoll-7"
    where = {"TMPDIR": "/t", "PMIX_NAMESPACE": "prterun-n1@1/x", "SLURM_JOB_ID": "7"}
    assert job_folder("", where).as_posix() == "/t/hopcoll-prterun-n1-1-x"


class Keeper:
    """Jobs for the thread; what it says of them."""

    def __init__(self, jobs):
        self.jobs = jobs
        self.ended = []

    def take_job(self):
        return self.jobs.pop(0) if self.jobs else None

    def end_job(self, job, checksum, failed):
        self.ended.append((job, failed))


def test_the_thread_does_jobs_and_tells_what_failed(scratch):
    back = bytearray(3)
    keeper = Keeper(
        [
            (1, "write", 1, memoryview(b"abc"), 0),
            (2, "read", 1, memoryview(back), 5),
            (3, "remove", 1, None, 0),
            (4, "remove", 1, None, 0),
        ]
    )
    thread, wake = _scratch.start(keeper, scratch)
    os.write(wake, b"j")
    limit_s = time.monotonic() + 20
    while len(keeper.ended) < 4 and time.monotonic() < limit_s:
        thread.join(0.01)
    os.close(wake)
    thread.join()
    assert keeper.ended == [(1, False), (2, True), (3, False), (4, True)]
    assert back == b"abc"
    assert scratch.error.startswith("FileNotFoundError: ")
