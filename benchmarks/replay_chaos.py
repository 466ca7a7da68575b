"""Jobs whose ranks and launchers are killed at any time, and their replays: equal, bit for bit?

    python -m benchmarks.replay_chaos --jobs 20 --json FILE

Each job trains (tests/mpi/programs/training.py) with SIGKILLs at random moments: of single ranks,
and of all at once, after which it is started again with another number of ranks. Then its history
is replayed by a job that nobody disturbs. What is random comes from the seed; when the kills fall,
from the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import recovery
from examples.demo import find_processes, kill_job

ROOT = Path(__file__).resolve().parents[1]
RANKS_MAX = 4
STEPS = 400
JOB_TIMEOUT_S = 120.0


def main() -> int:
    """Run the jobs and their replays, and report; 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    # The jobs are in sessions of their own, so the end of this must become theirs.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    jobs = []
    for number in range(options.jobs):
        with tempfile.TemporaryDirectory(prefix="replay-chaos-") as folder:
            job = run_job(Path(folder), random.Random(f"{options.seed}/{number}"))
        jobs.append(job)
        print(json.dumps({"job": number, **job}), flush=True)
    report = {
        "jobs": len(jobs),
        "identical": sum(job["identical"] for job in jobs),
        "starts": sum(job["starts"] for job in jobs),
        "whole_jobs_killed": sum(job["whole_jobs_killed"] for job in jobs),
        "ranks_killed": sum(job["ranks_killed"] for job in jobs),
        "losses_in_histories": sum(job["losses"] for job in jobs),
        "lines_missing_or_twice": sum(job["lines_wrong"] for job in jobs),
        "seed": options.seed,
        "steps": STEPS,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    good = report["identical"] == report["jobs"] and not report["lines_missing_or_twice"]
    return 0 if good else 1


def run_job(folder: Path, draw: random.Random) -> dict[str, Any]:
    """Run a job through its kills, then its replay."""
    store, log = folder / "store", folder / "log.jsonl"
    words = ["--steps", STEPS, "--store", store, "--log", log]
    words += ["--interval", draw.choice([3, 7, "auto"])]
    starts = whole = killed = 0
    said: list[dict[str, Any]] = []
    while not said:
        starts += 1
        ranks = draw.randint(2, RANKS_MAX)
        ends = starts <= draw.randint(1, 3)  # whether it is killed as a whole
        process = start(ranks, words)
        try:
            for _ in range(draw.randint(0, ranks - 1)):
                wait_for_steps(process, log, draw.randint(5, 60))
                killed += kill_a_rank(process, draw)
            if ends:
                wait_for_steps(process, log, draw.randint(5, 60))
                if process.poll() is None:
                    kill_job(process)
                    whole += 1
                    process.communicate()
                    continue
            said = finish(process)
        finally:
            if process.poll() is None:
                kill_job(process)
    history = recovery.History.read(store)
    replay = finish(start(RANKS_MAX, ["--steps", STEPS, "--replay", store]))
    by_rank = {line["rank"]: line["digest"] for line in replay}
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    return {
        "identical": all(by_rank[line["rank"]] == line["digest"] for line in said),
        "starts": starts,
        "whole_jobs_killed": whole,
        "ranks_killed": killed,
        "losses": sum(len(era.losses) for era in history.eras),
        "lines_wrong": int(steps != list(range(1, STEPS + 1))),
        "eras": [[era.first, era.size, len(era.losses)] for era in history.eras],
    }


def start(ranks: int, words: list[Any]) -> subprocess.Popen[str]:
    """Start a job in a session of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOPCOLL_")}
    environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(ranks), "-m"]
    return subprocess.Popen(
        [*command, "tests.mpi.programs.training", *map(str, words)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_steps(process: subprocess.Popen[str], log: Path, count: int) -> None:
    """Wait until a job has made so many steps more, or is over."""
    deadline_s = time.monotonic() + JOB_TIMEOUT_S
    begin, now = None, 0
    while process.poll() is None and (begin is None or now < begin + count):
        if time.monotonic() > deadline_s:
            raise TimeoutError("a job hung")
        with contextlib.suppress(FileNotFoundError):
            now = log.read_bytes().count(b"\n")
            begin = now if begin is None or now < begin else begin
        time.sleep(0.005)


def kill_a_rank(process: subprocess.Popen[str], draw: random.Random) -> int:
    """Kill one of a job's ranks, unless it is the last one; return how many that were."""
    ranks = []
    for pid in find_processes({process.pid}):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if len(words) > 1 and words[1].endswith(b"_rank.py"):
                ranks.append(pid)
    if len(ranks) < 2:
        return 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(draw.choice(ranks), signal.SIGKILL)
    return 1


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Wait for a good end, and return what the ranks said."""
    try:
        stdout, stderr = process.communicate(timeout=JOB_TIMEOUT_S)
    finally:
        if process.poll() is None:
            kill_job(process)
    if process.returncode != 0:
        raise RuntimeError(f"a job ended with {process.returncode}:\n{stdout}\n{stderr}")
    return [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    sys.exit(main())
