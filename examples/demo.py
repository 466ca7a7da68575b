"""Show that the training job of sgd_digits.py survives: ``python -m examples.demo``.

Three jobs of 4 ranks, the same but for what happens to them: one is left alone; in one a random
rank is killed inside a random Allreduce; one is killed as a whole and resumed. The folder
``demo-output`` gets a plot, the figures as summary.json, and the logs. The exit code is 0 if all
that is promised was seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import recovery

RANKS = 4
STEPS = 160
CHECKPOINT_EVERY = 20
ACCURACY_MIN = 0.95
#: Of the first step; before it come two for the store, and two for the session.
FIRST_OPERATION = 4
#: A job that takes longer has hung; an undisturbed one takes some 15 s on two cores.
JOB_TIMEOUT_S = 200.0
SCRIPT = Path(__file__).with_name("sgd_digits.py")


class DemoError(Exception):
    """Something that was promised was not seen."""


def main() -> int:
    """Run the three jobs, write what came out, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR")
    parser.add_argument("--seed", type=int, help="decides where the kills fall (default: random)")
    options = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "demo.png"):
        (output / name).unlink(missing_ok=True)
    # The jobs are in sessions of their own, so this end of the demo must become theirs.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    print(f"The kills fall where seed {seed} says; --seed {seed} repeats them.", flush=True)
    try:
        return demo(output, random.Random(seed), seed)
    except DemoError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1


def demo(output: Path, draw: random.Random, seed: int) -> int:
    """Run the three jobs, write what came out, and return the exit code."""
    begin_s = time.monotonic()

    headline(f"1. {RANKS} ranks, undisturbed")
    undisturbed = Job(output, "undisturbed")
    undisturbed.run()

    step = draw.randint(STEPS // 4, STEPS * 3 // 4)
    victim, chunk = draw.randrange(RANKS), draw.randint(4, 20)
    headline(f"2. Rank {victim} gets SIGKILL in the Allreduce of step {step}, after {chunk} chunks")
    survived = Job(output, "survived")
    survived.run(fault=f"rank={victim},op={FIRST_OPERATION + step - 1},chunk={chunk}")
    kill = survived.kill(victim, step)

    step = draw.randint(STEPS // 2, STEPS * 3 // 4)
    headline(f"3. All {RANKS} ranks and their launcher get SIGKILL after step {step}")
    for earlier in (step, step * 2 // 3, step // 2):  # a busy machine may see a step too late
        resumed = Job(output, "resumed")
        resumed.run_until(earlier)
        killed_step = max(resumed.steps())
        if killed_step < STEPS:
            break
    else:
        raise DemoError("the job was over before it could be killed, three times")
    headline("   ... and the job is resumed from its last commit")
    resumed.run("--resume")

    summary = {
        "accuracy": survived.accuracy(),
        "accuracy_undisturbed": undisturbed.accuracy(),
        "contributors_before": kill.contributors_before,
        "contributors_after": kill.contributors_after,
        "recovery_ms": round(kill.recovery_ms, 2),
        "resumed_identical": identical(undisturbed, resumed),
        "steps": STEPS,
        "killed_rank": victim,
        "killed_in_step": kill.step,
        "killed_after_bytes": kill.record["moved_bytes"],
        "of_bytes": kill.record["total_bytes"],
        "resumed_killed_after_step": killed_step,
        "resumed_from_step": recovery.History.read(resumed.checkpoints).eras[-1].first - 1,
        "resumed_accuracy": resumed.accuracy(),
        "seed": seed,
        "seconds": round(time.monotonic() - begin_s, 1),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(output / "demo.png", undisturbed, survived, resumed, kill)
    print_summary(summary, output)
    problems = find_problems(summary)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


@dataclass
class Kill:
    """How one rank died, and what the others made of it."""

    record: dict[str, Any]
    step: int
    time_ns: int
    recovery_ms: float
    contributors_before: list[int]
    contributors_after: list[int]


class Job:
    """One training job: its folder, its processes, and its log."""

    def __init__(self, output: Path, name: str) -> None:
        self.name = name
        self.checkpoints = output / name
        self.log = output / f"{name}.jsonl"
        self.record = output / f"{name}-fault"
        self.lost: list[dict[str, Any]] = []  # what the log said when the job was killed
        # What an earlier demo left; nothing else, as the folder may be anybody's.
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for path in (self.log, *output.glob(f"{name}-fault.*")):
            path.unlink(missing_ok=True)

    def start(self, *arguments: str, fault: str = "") -> subprocess.Popen[bytes]:
        """Start it under the launcher, in a session of its own."""
        # A setting of the caller's shell must not make the jobs differ.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HOPCOLL_")}
        if fault:
            environment.update(HOPCOLL_FAULT=fault, HOPCOLL_FAULT_RECORD=str(self.record))
        command = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(RANKS), str(SCRIPT)]
        command += ["--steps", str(STEPS), "--checkpoint-every", str(CHECKPOINT_EVERY)]
        command += ["--checkpoint-dir", str(self.checkpoints), "--log", str(self.log), *arguments]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )

    def run(self, *arguments: str, fault: str = "") -> None:
        """Run it to its end, which must be a good one."""
        process = self.start(*arguments, fault=fault)
        try:
            returncode = process.wait(JOB_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"job '{self.name}' hung") from None
        finally:
            if process.poll() is None:
                kill_job(process)
        if returncode != 0:
            raise DemoError(f"job '{self.name}' ended with exit code {returncode}")

    def run_until(self, step: int) -> None:
        """Run it until its log says that it made this step, and kill all of its processes."""
        process = self.start()
        deadline_s = time.monotonic() + JOB_TIMEOUT_S
        try:
            while max(self.steps(), default=0) < step:
                if time.monotonic() > deadline_s:
                    raise DemoError(f"job '{self.name}' hung before step {step}")
                try:
                    returncode = process.wait(0.01)
                except subprocess.TimeoutExpired:
                    continue
                if returncode == 0:
                    break  # it was over before anybody looked
                raise DemoError(f"job '{self.name}' ended by itself, with {returncode}")
        finally:
            kill_job(process)
        self.lost = self.lines()

    def lines(self) -> list[dict[str, Any]]:
        """Return what the log says; a line that is still being written does not count."""
        if not self.log.exists():
            return []
        whole = self.log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def steps(self) -> dict[int, dict[str, Any]]:
        """Return the log's line of each step."""
        return {line["step"]: line for line in self.lines()}

    def accuracy(self) -> float:
        """Return the accuracy that the log's last line has, by which the job is done."""
        last = self.lines()[-1]
        if last["step"] != STEPS or "accuracy" not in last:
            raise DemoError(f"job '{self.name}' did not say that it finished")
        return float(last["accuracy"])

    def kill(self, victim: int, step: int) -> Kill:
        """Return how the death went that this job was given."""
        record_path = Path(f"{self.record}.{victim}")
        if not record_path.exists():
            raise DemoError(f"rank {victim} was not killed: the fault did not fire")
        record = json.loads(record_path.read_text())
        # The victim wrote the record right before its SIGKILL. The file system's clock lags by a
        # tick of the kernel at most; the recovery looks slower for it, never faster.
        time_ns = record_path.stat().st_mtime_ns
        lines = self.lines()
        later = [line for line in lines if line["time_ns"] > time_ns and line["step"] >= step]
        earlier = [line for line in lines if line["step"] < step]
        if not later or not earlier:
            raise DemoError("the log has no steps on both sides of the kill")
        return Kill(
            record=record,
            step=step,
            time_ns=time_ns,
            recovery_ms=(later[0]["time_ns"] - time_ns) / 1e6,
            contributors_before=earlier[-1]["contributors"],
            contributors_after=later[-1]["contributors"],
        )


def kill_job(launcher: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and all that it has started, until nothing of it is left."""
    sessions = {launcher.pid}
    deadline_s = time.monotonic() + 10
    while pids := find_processes(sessions):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.kill(pid, signal.SIGKILL)
        launcher.poll()
        if time.monotonic() > deadline_s:
            raise DemoError(f"processes {pids} cannot be killed")
    launcher.wait()


def find_processes(sessions: set[int]) -> list[int]:
    """Return the living processes of some sessions and their descendants, as /proc has them.

    The sessions of the descendants are added: by them those are found whose parent is gone.
    """
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold spaces; behind it: state, parent, group, session.
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if state not in "ZX":
            table[int(path.parent.name)] = int(parent), int(session)
    found: set[int] = set()
    while True:
        more = {
            pid
            for pid, (parent, session) in table.items()
            if session in sessions or parent in found
        }
        sessions.update(table[pid][1] for pid in more)
        if more == found:
            return sorted(found)
        found = more


def identical(left: Job, right: Job) -> bool:
    """Tell whether two jobs ended with the same bytes, and had the same loss in every step."""
    ends = []
    for job in (left, right):
        with recovery.CheckpointStore(job.checkpoints, readonly=True) as store:
            ends.append(store.restore())
    steps, states = [end.step for end in ends], [end.state["state"] for end in ends]
    same = steps == [STEPS, STEPS] and states[0].keys() == states[1].keys()
    same = same and all(a.tobytes() == states[1][name].tobytes() for name, a in states[0].items())
    losses = [{step: line["loss"] for step, line in job.steps().items()} for job in (left, right)]
    return same and losses[0] == losses[1]


def find_problems(summary: dict[str, Any]) -> list[str]:
    """Return what the summary shows that was promised otherwise."""
    everyone = list(range(RANKS))
    survivors = [rank for rank in everyone if rank != summary["killed_rank"]]
    promises = {
        f"accuracy is below {ACCURACY_MIN}": summary["accuracy"] >= ACCURACY_MIN,
        f"accuracy undisturbed is below {ACCURACY_MIN}":
            summary["accuracy_undisturbed"] >= ACCURACY_MIN,
        "the kill did not fall inside of the Allreduce":
            0 < summary["killed_after_bytes"] < summary["of_bytes"],
        "not all ranks contributed before the kill": summary["contributors_before"] == everyone,
        "not just the survivors contributed in the end":
            summary["contributors_after"] == survivors,
        "the resumed job did not start from a commit":
            0 < summary["resumed_from_step"] <= summary["resumed_killed_after_step"],
        "the resumed job's result differs from the undisturbed one": summary["resumed_identical"],
    }  # fmt: skip
    return [problem for problem, kept in promises.items() if not kept]


def plot(path: Path, undisturbed: Job, survived: Job, resumed: Job, kill: Kill) -> None:
    """Draw the loss and the contributors over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 6), height_ratios=(2, 1), layout="constrained"
    )
    gap_s = 0.2
    styles = [
        (undisturbed, "undisturbed", "0.6", "-", 5),
        (resumed, "killed as a whole, then resumed", "tab:blue", "--", 3),
        (survived, f"rank {kill.record['rank']} killed", "tab:red", "-", 1.5),
    ]
    for job, label, colour, line_style, width in styles:
        begun = recovery.History.read(job.checkpoints).eras[-1].first if job.lost else 1
        lines = job.lost + [line for line in job.lines() if line["step"] >= begun]
        begin_ns = lines[0]["time_ns"]
        seconds = np.array([(line["time_ns"] - begin_ns) / 1e9 for line in lines])
        loss = np.array([line["loss"] for line in lines])
        ranks = np.array([len(line["contributors"]) for line in lines], float)
        killed_s = (kill.time_ns - begin_ns) / 1e9
        if k := len(job.lost):
            # Resumed: the next job's start takes longer than all the training, and no line leads
            # from one job to the other.
            seconds[k:] -= seconds[k] - seconds[k - 1] - gap_s
            killed_s = seconds[k - 1]
            seconds, loss, ranks = (np.insert(a, k, np.nan) for a in (seconds, loss, ranks))
        top.semilogy(seconds, loss, line_style, color=colour, label=label, linewidth=1.2)
        bottom.step(seconds, ranks, line_style, where="post", color=colour, linewidth=width)
        if job is not undisturbed:
            for axes in (top, bottom):
                axes.axvline(killed_s, color=colour, alpha=0.5, linewidth=1)
            top.annotate(
                "SIGKILL", (killed_s, loss[0]), color=colour, ha="right", va="top", rotation=90
            )
    top.set_title(
        f"{STEPS} steps of SGD on digits; a rank killed in step {kill.step}, "
        f"the next step finished after {kill.recovery_ms:.0f} ms"
    )
    top.set_ylabel("training loss")
    top.legend()
    bottom.set_ylabel("contributors")
    bottom.set_ylim(0, RANKS + 0.5)
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlabel("seconds since the first step; the start of the resumed job is left out")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def print_summary(summary: dict[str, Any], output: Path) -> None:
    """Print the figures as a table."""
    share = summary["killed_after_bytes"] / summary["of_bytes"]
    rows = [
        ("steps", summary["steps"]),
        ("test accuracy, undisturbed", f"{summary['accuracy_undisturbed']:.4f}"),
        ("test accuracy, one rank killed", f"{summary['accuracy']:.4f}"),
        ("killed", f"rank {summary['killed_rank']}, in step {summary['killed_in_step']}, "
                   f"{share:.0%} into its Allreduce"),
        ("contributors before", summary["contributors_before"]),
        ("contributors after", summary["contributors_after"]),
        ("from the kill to the next finished step", f"{summary['recovery_ms']:.1f} ms"),
        ("whole job killed after, resumed from", f"step {summary['resumed_killed_after_step']}, "
                                                 f"step {summary['resumed_from_step']}"),
        ("resumed = undisturbed, bit for bit", "yes" if summary["resumed_identical"] else "NO"),
        ("plot, figures and logs in", output),
    ]  # fmt: skip
    headline(f"Summary ({summary['seconds']:.0f} s)")
    for name, value in rows:
        print(f"  {name:<40} {value}")


def headline(text: str) -> None:
    """Print a line that stands out from the jobs' own."""
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
