"""What a launcher passes on of mpirun's output, and what it hears in it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hopcoll._rank import BEGIN_MARK, END_MARK
from hopcoll._relay import Relay
from tests import launch

LOST = b"said\nPRTE has lost communication with a remote daemon.\n"


class Slow:
    """A pipe whose reads bring `size` bytes at the most."""

    def __init__(self, source, size=1 << 16):
        self.source, self.size = source, size

    def fileno(self):
        return self.source

    def read(self, limit):
        return os.read(self.source, min(limit, self.size))

    def close(self):
        os.close(self.source)


@pytest.fixture
def pipe():
    """Makes pipes, as two descriptors; closes what is left of them."""
    with contextlib.ExitStack() as stack:

        def close(descriptor):
            with contextlib.suppress(OSError):
                os.close(descriptor)

        def make():
            ends = os.pipe()
            for descriptor in ends:
                stack.callback(close, descriptor)
            return ends

        yield make


def heard(pipe, text, size=1 << 16):
    """Pass `text` on, and return the relay and what came."""
    (source, feed), (reader, target) = pipe(), pipe()
    relay = Relay([(Slow(source, size), target)])
    os.write(feed, text)
    os.close(feed)
    relay.finish(60, lambda: False)
    os.close(target)
    return relay, os.read(reader, 1 << 16)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_marks_are_kept_back_wherever_the_pipe_cuts(pipe, size):
    text = BEGIN_MARK + b"one\n" + END_MARK + b"two\x1e\x1ehop" + END_MARK + END_MARK
    text += b"three\n" + BEGIN_MARK + END_MARK[:4]
    relay, came = heard(pipe, text, size)
    assert (relay.began, relay.marks) == (True, 3)
    assert came == b"one\ntwo\x1e\x1ehopthree\n" + END_MARK[:4]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_lost_host_is_heard_wherever_the_pipe_cuts(pipe, size):
    relay, came = heard(pipe, LOST, size)
    assert relay.host_lost(1) and came == LOST
    assert not relay.began and relay.marks == 0


def test_a_host_that_was_not_lost(pipe):
    assert not heard(pipe, LOST.replace(b"lost", b"no"))[0].host_lost(1)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_slow_readers_get_all_of_it_and_nothing_blocks(pipe, blocking, apart):
    """Two streams into two pipes, or into one that has room for one write of both."""
    sources, outs = [pipe(), pipe()], [pipe(), pipe()] if apart else [pipe()]
    for _, target in outs:
        os.set_blocking(target, blocking)
    targets = [outs[0][1], outs[-1][1]]
    streams = [(Slow(source), target) for (source, _), target in zip(sources, targets, strict=True)]
    relay = Relay(streams)
    text = b"x" * (1 << 18)
    came = bytearray()
    begun = threading.Event()

    def supply(feed):
        with os.fdopen(feed, "wb") as writes:
            writes.write(text)

    def drain():
        begun.wait(20)
        while len(came) < 2 * len(text):
            for reader, _ in outs:
                os.set_blocking(reader, False)
                with contextlib.suppress(BlockingIOError):
                    came.extend(os.read(reader, 1000))

    threads = [threading.Thread(target=supply, args=(os.dup(feed),)) for _, feed in sources]
    threads.append(threading.Thread(target=drain))
    for thread in threads:
        thread.start()
    for _, feed in sources:
        os.close(feed)
    while not relay.is_behind:
        relay.pass_on(0.1)
    began_s = time.monotonic()
    relay.pass_on(0.3)  # nobody reads: it is back in time, and waits for room
    assert time.monotonic() - began_s < 10
    assert relay.is_open and relay.is_behind
    begun.set()
    while relay.is_open or relay.is_behind:
        relay.pass_on(1)
    for thread in threads:
        thread.join(20)
    assert bytes(came) == 2 * text


def test_what_is_in_the_pipes_is_read_ahead_of_a_slow_reader(pipe):
    (source, feed), (_, target) = pipe(), pipe()
    os.set_blocking(target, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(target, b"x" * 1000)
    relay = Relay([(Slow(source, 10), target)])
    os.write(feed, LOST)
    os.close(feed)
    relay.pass_on(0.2)
    assert relay.is_open and not relay.host_lost(1)
    while relay.is_open:
        relay.pass_on(0.2, ahead=True)
    assert relay.is_behind and relay.host_lost(1)


def test_a_reader_that_went_away_stops_nobody(pipe):
    (source, feed), (reader, target) = pipe(), pipe()
    os.close(reader)
    relay = Relay([(Slow(source), target)])
    os.write(feed, LOST)
    os.close(feed)
    relay.pass_on(10)
    assert not relay.is_open and not relay.is_behind and relay.host_lost(1)


def run_with(folder: Path, mpirun: str, **how) -> subprocess.CompletedProcess:
    """Run a job under an mpirun that is a shell script."""
    path = folder / "mpirun"
    path.write_text(
        '#!/bin/sh\ntest "$1" = --version && { echo "mpirun (Open MPI) 5.0.11"; exit; }\n' + mpirun
    )
    path.chmod(0o755)
    (folder / "script.py").touch()
    words = ["-m", "hopcoll.cli", "run", "--mpirun", str(path), str(folder / "script.py")]
    return subprocess.run(
        [sys.executable, *words],
        env=launch.environment({"PYTHONPATH": str(launch.ROOT)}),
        timeout=60,
        check=False,
        **{"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, **how},
    )


def test_a_program_that_prints_such_words_ends_well(tmp_path):
    mark = END_MARK.decode()
    ended = run_with(tmp_path, f"echo '{LOST.decode()}'; printf '{mark}' >&2; exit 0")
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, LOST.strip(), b"")


def test_a_terminal_that_nobody_reads_does_not_block(pipe):
    """A terminal says that it has room when it has little."""
    (source, feed), (terminal, target) = pipe(), os.openpty()
    relay = Relay([(Slow(source), target)])
    fed = os.write(feed, b"x" * (1 << 16))
    os.close(feed)
    relay.pass_on(0.3)  # comes back
    assert relay.is_behind
    seen = 0
    while relay.is_behind:
        seen += len(os.read(terminal, 1 << 16))
        relay.pass_on(0.01)
    relay.finish(60, lambda: True)
    while seen < fed:
        seen += len(os.read(terminal, 1 << 16))
    assert seen == fed
    os.close(target)
    os.close(terminal)


def test_the_beginning_of_a_mark_is_no_mark_when_the_time_is_over(pipe):
    (source, feed), (reader, target) = pipe(), pipe()
    relay = Relay([(Slow(source), target)])
    os.write(feed, b"one" + END_MARK[:3])
    relay.finish(0.2, lambda: False)  # somebody holds the other end open
    assert os.read(reader, 1 << 16) == b"one" + END_MARK[:3]


def test_output_that_a_full_disk_loses(tmp_path):
    with open("/dev/full", "wb") as full:
        ended = run_with(tmp_path, f"seq 9; printf '{END_MARK.decode()}' >&2", stdout=full)
    assert ended.returncode == 0
    assert ended.stderr == b"hopcoll run: 18 bytes of output are lost: No space left on device\n"


@pytest.mark.parametrize("stream", ["1", "2"])
def test_a_lost_host_is_heard_on_either_stream(tmp_path, stream):
    """Open MPI takes stderr for it, and stdout once in ten."""
    said = "A daemon failed to report back after being spawned. This could"
    ended = run_with(tmp_path, f"echo '{said}' >&{stream}; exit 137")
    assert ended.returncode == 137
    assert b"hopcoll run: a host was lost" in ended.stderr
    assert said.encode() in (ended.stdout if stream == "1" else ended.stderr)


def test_both_streams_go_where_they_belong(tmp_path):
    mark = END_MARK.decode()
    ended = run_with(tmp_path, f"echo out; echo err >&2; printf '{mark}' >&2; exit 0")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"out\n", b"err\n")


def test_streams_that_the_caller_closed(tmp_path):
    mark = END_MARK.decode()
    ended = run_with(
        tmp_path,
        f"seq 100000; seq 100000 >&2; printf '{mark}' >&2; exit 3",
        preexec_fn=lambda: [os.close(one) for one in range(3)],
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, b"", b"")
