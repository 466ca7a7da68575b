"""Ranks and hosts lost in the middle of commits, again and again: is the last commit always there?

``python -m benchmarks.ckpt_chaos --losses 200`` runs one job after another on one store of two
levels (a directory per host with copies at partners, and a shared one). In each, one rank dies by
SIGKILL before or after one of its disk calls in a save, alone or with all ranks and the
directories of its host; in half of the cases the rest of the job dies as well. What is left of the
job goes on; the next job starts on other hosts, with another number of ranks, and restores. Then:

* all ranks have restored one and the same step, and every byte of it is right;
* it is not older than the last that any rank was told to be durable.

With ``--lab`` hosts are namespaces with launcher's daemons of their own (see `benchmarks.lab`),
and are lost as such. The report goes to ``benchmarks/results/ckpt_chaos.json``.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks.lab import Lab

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ckpt_chaos.json"
PROGRAM = "benchmarks.ckpt_chaos_job"
HOSTS = 4
#: Shards, partner copies and slots of a save make about so many disk calls, twice each.
_AT_MAX = 90
#: How often the moment is not drawn among all calls.
_LINKS = 0.3
_JOB_TIMEOUT_S = 60.0
#: Under load mpirun itself may fail to start; a job of which no rank began is started again.
_STARTS_MAX = 5
_NOBODY_BEGAN = "before any rank began"
_POLL_S = 0.005


def plan_of(rng: random.Random, hosts: list[str], lab: bool, sabotage: str) -> dict[str, Any]:
    """Decide who is lost, where, and how."""
    count = 2 * HOSTS if lab else rng.randint(len(hosts), 6)
    names = sorted(hosts[i % len(hosts)] for i in range(count))
    victim, at = rng.randrange(count), rng.randint(1, _AT_MAX)
    if rng.random() < _LINKS:  # a committer beside its link
        victim, at = names.index(names[victim]), [rng.choice(["before", "after"]), "link", "slots"]
    return {
        "hosts": names,
        "victim": victim,
        "loss": "lab" if lab else rng.choice(["rank", "host"]),
        "all": not lab and rng.random() < 0.5,
        "at": at,
        "after": rng.randint(1, 4),
        "steps": 6,
        "every": rng.choice([1, 2, 3]),
        "sabotage": sabotage,
    }


def judge(ended: list[dict[str, Any]], acknowledged: int, survivors: int) -> list[str]:
    """What is wrong with what the ranks of a job said about their restore.

    Parameters
    ----------
    ended : list of dict
        What each rank that came to its end printed.
    acknowledged : int
        The last step that was durable when the job began, 0 for none.
    survivors : int
        How many ranks had to come to their end.
    """
    wrong = []
    if len(ended) != survivors:
        wrong.append(f"{len(ended)} ranks ended, not {survivors}")
    if len({json.dumps(one["restored"]) for one in ended}) > 1:
        wrong.append(f"ranks restored different steps: {[one['restored'] for one in ended]}")
    if not all(one.get("right", True) for one in ended):
        wrong.append("a restored state is not what was saved")
    for one in ended[:1]:
        first = one["restored"][0] or 0
        if first < acknowledged:
            wrong.append(f"restored {first}, but {acknowledged} was acknowledged as durable")
    return wrong


class Campaign:
    """One store, and the jobs that are lost over it."""

    def __init__(self, root: Path, seed: int, sabotage: str = "", lab: Lab | None = None) -> None:
        self.root = root
        self.rng = random.Random(f"ckpt/{seed}")
        self.sabotage = sabotage
        self.lab = lab
        self.names = self._names()
        self.away: str | None = None
        self.jobs = 0
        self.losses: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()
        self.violations: list[dict[str, Any]] = []
        self.rollbacks = 0
        self.started_again = 0
        self.steps: list[int] = []
        (root / "pids").mkdir()

    def _names(self) -> list[str]:
        if self.lab is None:
            return [f"h{i}" for i in range(HOSTS)]
        return [
            subprocess.run(
                self.lab.inside(host, "hostname"), capture_output=True, text=True, check=True
            ).stdout.strip()
            for host in self.lab.hosts
        ]

    def acknowledged(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return max(map(int, (self.root / "acknowledged").read_text().split()))
        return 0

    def one(self) -> None:
        """Run one job, and judge what it restored; a check of the state that the last one left."""
        hosts = [name for name in self.names if name != self.away or self.lab is not None]
        plan = plan_of(self.rng, hosts, self.lab is not None, self.sabotage)
        plan["root"] = str(self.root)
        before = self.acknowledged()
        fired = self.root / "fired"
        fired.unlink(missing_ok=True)
        file = self.root / "plan.json"
        file.write_text(json.dumps(plan))
        self.jobs += 1
        stdout, how = self._run(plan, file, fired)
        ended = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
        lost = fired.exists()
        left = len(plan["hosts"])
        if lost:
            self.losses[plan["loss"] + (", all ranks dead" if plan["all"] else "")] += 1
            self.calls[fired.read_text()] += 1
            gone = plan["hosts"][plan["victim"]]
            left -= plan["hosts"].count(gone) if plan["loss"] == "host" else 1
            if plan["all"] or plan["loss"] == "lab":
                left = 0
            # The next job has the other hosts, and then this one comes back, empty.
            self.away = gone if plan["loss"] != "rank" else None
        wrong = judge(ended, before, left) if left else []
        if wrong:
            self.violations.append({"plan": plan, "wrong": wrong, **how})
        for one in ended[:1]:
            self.rollbacks += len(one["restored"]) - 1
            self.steps.append(one["restored"][0] or 0)
        if not left:
            self.check()

    def check(self) -> None:
        """Run a job without a loss: what the last one left must restore."""
        before = self.acknowledged()
        hosts = [name for name in self.names if name != self.away or self.lab is not None]
        plan = plan_of(self.rng, hosts, self.lab is not None, self.sabotage)
        plan |= {"root": str(self.root), "victim": -1, "steps": 0}
        file = self.root / "plan.json"
        file.write_text(json.dumps(plan))
        fired = self.root / "fired"
        fired.unlink(missing_ok=True)
        self.jobs += 1
        stdout, how = self._run(plan, file, fired)
        ended = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
        if wrong := judge(ended, before, len(plan["hosts"])):
            self.violations.append({"plan": plan, "wrong": wrong, **how})
        for one in ended[:1]:
            self.steps.append(one["restored"][0] or 0)

    def _run(self, plan: dict[str, Any], file: Path, fired: Path) -> tuple[str, dict[str, Any]]:
        """Run a job; return what its ranks said, and how it ended."""
        for _ in range(_STARTS_MAX):
            stdout, how = self._start(plan, file, fired)
            if fired.exists() or _NOBODY_BEGAN not in how["stderr"]:
                break
            self.started_again += 1
        return stdout, how

    def _start(self, plan: dict[str, Any], file: Path, fired: Path) -> tuple[str, dict[str, Any]]:
        begin_s = time.monotonic()
        words = ["-m", PROGRAM, str(file)]
        how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if self.lab is not None:
            job = self.lab.start(*words, ranks=len(plan["hosts"]), env=environment, **how)
            self._take_host(plan, job, fired)
        else:
            job = subprocess.Popen(
                [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(len(plan["hosts"])), *words],
                env=environment, stdin=subprocess.DEVNULL, start_new_session=True, **how,
            )  # fmt: skip
        try:
            stdout, stderr = job.communicate(timeout=_JOB_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            job.terminate()
            stdout, stderr = job.communicate()
            self.violations.append({"plan": plan, "wrong": ["hangs"], "stderr": stderr[-4000:]})
        seconds = round(time.monotonic() - begin_s, 1)
        return stdout, {"code": job.returncode, "seconds": seconds, "stderr": stderr[-4000:]}

    def _take_host(self, plan: dict[str, Any], job: subprocess.Popen[str], fired: Path) -> None:
        """Wait until the victim is in the middle of its commit; then take its host away."""
        assert self.lab is not None
        deadline_s = time.monotonic() + _JOB_TIMEOUT_S
        while not fired.exists():
            if job.poll() is not None or time.monotonic() > deadline_s:
                return
            time.sleep(_POLL_S)
        name = plan["hosts"][plan["victim"]]
        self.lab.lose(self.lab.hosts[self.names.index(name)])
        shutil.rmtree(self.root / name)

    def report(self) -> dict[str, Any]:
        return {
            "losses": sum(self.losses.values()),
            "by_kind": dict(self.losses),
            "by_call": dict(sorted(self.calls.items())),
            "jobs": self.jobs,
            "started_again": self.started_again,
            "rollbacks_in_a_job": self.rollbacks,
            "last_step": max(self.steps, default=0),
            "acknowledged": self.acknowledged(),
            "violations": self.violations,
        }


def run(
    losses: int, seed: int, sabotage: str = "", lab: bool = False, out: Path | None = None
) -> dict[str, Any]:
    """Lose so many; return the report, which is in `out` all the time, as far as it has come."""
    begin_s = time.monotonic()

    def report() -> dict[str, Any]:
        seconds = round(time.monotonic() - begin_s, 1)
        made = {"seed": seed, "lab": lab, **campaign.report(), "seconds": seconds}
        if out is not None:
            out.write_text(json.dumps(made, indent=1) + "\n")
        return made

    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        made = stack.enter_context(Lab(HOSTS, name=f"hk{os.getpid()}")) if lab else None
        campaign = Campaign(root, seed, sabotage, made)
        bar = stack.enter_context(tqdm(total=losses, unit="loss", disable=None))
        while (done := sum(campaign.losses.values())) < losses:
            campaign.one()
            bar.update(sum(campaign.losses.values()) - done)
            report()
        campaign.check()
        return report()


@click.command(help=__doc__.partition("\n")[0])
@click.option("--losses", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--lab", is_flag=True, help="Lose hosts of a lab; needs root.")
@click.option("--sabotage", default="", type=click.Choice(["", "early"]), help="Prove it awake.")
@click.option(
    "--json", "out", type=click.Path(path_type=Path), default=RESULTS, show_default=True,
    help="The report.",
)
def main(losses: int, seed: int, lab: bool, sabotage: str, out: Path) -> None:
    report = run(losses, seed, sabotage, lab, out)
    click.echo(json.dumps({**report, "violations": len(report["violations"])}, indent=1))
    sys.exit(bool(report["violations"]))


if __name__ == "__main__":
    main()
