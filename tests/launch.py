"""Starts MPI jobs for the tests: each is an mpirun of its own, with a deadline."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETTINGS_PREFIX = "HOPCOLL_"
#: Seconds that a job which is being ended gets before the test run itself would hang.
_PATIENCE_S = 15.0


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """Standard output without empty lines; ranks come in any order."""
        return [line for line in self.stdout.splitlines() if line.strip()]

    @property
    def said(self) -> list[dict[str, Any]]:
        """The lines of standard output that are JSON objects."""
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.1f} s\n{self.stdout}\n{self.stderr}"


def environment(settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's environment without its own settings, one thread a rank, plus `settings`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS_PREFIX)}
    kept["PYTHONPATH"] = str(ROOT)
    kept["OMP_NUM_THREADS"] = kept["OPENBLAS_NUM_THREADS"] = "1"
    return {**kept, **(settings or {})}


def start(
    ranks: int,
    *program: str | Path,
    settings: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Start ``hopcoll run -n RANKS OPTIONS PROGRAM``; the caller ends it (see `end`)."""
    return subprocess.Popen(
        [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(ranks), *options]
        + [str(word) for word in program],
        cwd=ROOT,
        env=environment(settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(job: subprocess.Popen[str]) -> None:
    """End a job that may still run, and all its ranks."""
    if job.poll() is None:
        job.terminate()
        try:
            job.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            job.kill()  # mpirun is told by the kernel that its launcher died
            job.communicate()
    for stream in (job.stdout, job.stderr):
        if stream is not None:
            stream.close()


def run(
    ranks: int,
    *program: str | Path,
    settings: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    timeout_s: float = 60.0,
) -> Ended:
    """Run a job to its end; one that takes longer than `timeout_s` has hung and fails the test."""
    begin_s = time.monotonic()
    job = start(ranks, *program, settings=settings, options=options)
    try:
        stdout, stderr = job.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as hang:
        job.terminate()
        stdout, stderr = job.communicate(timeout=_PATIENCE_S)
        raise AssertionError(
            f"the job hung: {' '.join(map(str, program))} on {ranks} ranks, {timeout_s:.0f} s\n"
            f"{stdout}\n{stderr}"
        ) from hang
    finally:
        end(job)
    return Ended(job.returncode, stdout, stderr, time.monotonic() - begin_s)


def ended_processes(pids: Sequence[int], within_s: float = 10.0) -> bool:
    """Whether all of these processes are gone, or go within the time."""
    deadline_s = time.monotonic() + within_s
    for pid in pids:
        while _alive(pid):
            if time.monotonic() > deadline_s:
                return False
    return True


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def why_no_lab(limits_rates: bool = True) -> str:
    """Why this process cannot make hosts (see benchmarks.lab), by a try; empty if it can."""
    importlib.import_module("benchmarks.lab.network")  # which knows where its tools are
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "unshare", "hostname"):
        if shutil.which(tool) is None:
            return f"{tool} is missing"
    tried = f"hc{os.getpid()}-0"
    inside = ["ip", "netns", "exec", tried]
    steps = [["ip", "netns", "add", tried], [*inside, "unshare", "--uts", "hostname", tried]]
    if limits_rates:
        tbf = "tbf rate 1mbit burst 16k latency 20ms"
        steps.append([*inside, "tc", "qdisc", "add", "dev", "lo", "root", *tbf.split()])
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{' '.join(step)}: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", tried], capture_output=True, check=False)
    return ""
