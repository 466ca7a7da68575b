"""Random workflows on real ranks, whose processes are killed at any moment.

``python -m tests.crash.workflow_chaos --kills 300 --json FILE``. A job of 1 to 3 ranks runs a
workflow of `tests.crash.workflow_corpus`; a rank, or all of them with the launcher, gets SIGKILL at
a random moment; what is left goes on, or is started again, and is killed again. In the end the
world outside (a real SQLite database, a file) must be as if nothing had happened.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from hopcoll.errors import WorkflowNotFoundError
from recovery.workflows import Workflow
from tests import launch
from tests.crash import workflow_graphs
from tests.crash.workflow_corpus import Counts, Trial, WrongError
from tests.crash.workflow_job import UNKNOWN, RealWorld

_RUN_S = 0.6
_JOB_S = 120.0
_KILLS_OF_ONE_MAX = 4


class Job:
    """One launch of the program, in a process group of its own."""

    def __init__(self, seed: int, ranks: int, folder: Path) -> None:
        self.begun = threading.Event()
        self.lines: list[str] = []
        self._folder = os.fsencode(folder)
        program = ("-m", "tests.crash.workflow_job", str(seed), str(folder))
        self.process = subprocess.Popen(
            ["hopcoll", "run", "-n", str(ranks), *program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=launch.environment(),
            cwd=launch.ROOT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "begun" in line:
                self.begun.set()
        self.begun.set()

    def ranks(self) -> list[int]:
        """The processes of the ranks."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if self._folder in words and any(word.endswith(b"/_rank.py") for word in words):
                found.append(int(entry.name))
        return found

    def kill(self, draw: random.Random) -> str:
        """Kill one rank, or all there is; returns which."""
        ranks = self.ranks()
        if len(ranks) > 1 and draw.random() < 0.5:
            os.kill(draw.choice(ranks), signal.SIGKILL)
            return "rank"
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return "group"

    def wait(self) -> int:
        code = self.process.wait(timeout=_JOB_S)
        self._reader.join(timeout=_JOB_S)
        return code


def run_workflow(seed: int, draw: random.Random, folder: Path, counts: collections.Counter) -> None:
    """One workflow to its end, with kills."""
    world = RealWorld(folder)
    kills = draw.randint(1, _KILLS_OF_ONE_MAX)
    sender = _Sender(folder)
    settled: set[str] = set()  # since something was killed
    try:
        while True:
            job = Job(seed, draw.randint(1, 3), folder)
            killed = None
            try:
                while kills and job.begun.wait(_JOB_S):
                    delay_s = draw.random() * _RUN_S
                    try:
                        job.process.wait(timeout=delay_s)
                        break
                    except subprocess.TimeoutExpired:
                        killed = job.kill(draw)
                        counts[f"{killed}s killed"] += 1
                        kills -= 1
                    if killed == "group":
                        break
                code = job.wait()
            except subprocess.TimeoutExpired:
                job.kill(random.Random(0))
                raise WrongError(f"seed {seed} hangs:\n" + "\n".join(job.lines)) from None
            counts["jobs"] += 1
            told = [json.loads(line) for line in job.lines if line.startswith("{")]
            if any("contradiction" in one for one in told):
                counts["contradictory"] += 1
                return
            if killed is not None:
                settled.clear()
            unknown = next((one["unknown"] for one in told if "unknown" in one), None)
            if unknown is not None:
                if unknown in settled:
                    said = "\n".join(job.lines)
                    raise WrongError(f"seed {seed}: {unknown} is unknown again, of itself:\n{said}")
                _settle(folder, unknown, world)
                settled.add(unknown)
                counts["unknown"] += 1
            elif told and code == 0:
                _check(seed, folder, told[-1], world)
                counts["workflows"] += 1
                return
            elif killed is None and code != UNKNOWN:
                raise WrongError(f"seed {seed} ended with {code}:\n" + "\n".join(job.lines))
    finally:
        sender.stop()
        world.database.close()


class _Sender:
    """Sends all events, again and again until each was heard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        unsent = [(key, number) for key in "ab" for number in range(12)]
        workflow = Workflow("w", self._folder / "store")
        while unsent and not self._stopped.is_set():
            key, number = unsent[0]
            payload = {"tokens": {f"sent {key} {number}": "once"}}
            try:
                workflow.send(key, payload, str(number))
                unsent.pop(0)
            except (WorkflowNotFoundError, OSError):
                self._stopped.wait(0.05)  # it is not there yet

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _settle(folder: Path, name: str, world: RealWorld) -> None:
    """A person looks at the world, and says what is true."""
    if re.split(r"[/~]", name)[-1] != "blind" and not re.search(r"(^|/)blind(~\d+)?$", name):
        raise WrongError(f"{name} could be asked about")
    rows = world.rows("select tokens from plain where task = ?", name)
    value = {"tokens": json.loads(rows[0][0])} if rows else None
    Workflow("w", folder / "store", patience_s=0.5).resolve(name, done=bool(rows), value=value)


def _check(seed: int, folder: Path, tokens: dict[str, str], world: RealWorld) -> None:
    workflow_graphs.WORLD = world
    trial = Trial(seed * 1000, folder, Counts())
    trial.world, trial.value = world, {"tokens": tokens}
    trial.check(folder / "store")


@click.command()
@click.option("--kills", default=300, show_default=True, help="At the least.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(kills: int, seed: int, json_path: Path | None) -> None:
    """Kill the processes of random workflows, and see that they end as if nothing had happened."""
    counts: collections.Counter[str] = collections.Counter()
    draw = random.Random(seed)
    begin_s = time.monotonic()
    number = 0
    with tqdm(total=kills, unit=" kills", disable=None) as bar:
        while (done := counts["ranks killed"] + counts["groups killed"]) < kills:
            bar.update(done - bar.n)
            folder = Path(tempfile.mkdtemp(prefix="hopcoll-workflow-"))
            run_workflow((seed * 1000 + number) % 100, draw, folder, counts)
            shutil.rmtree(folder)
            number += 1
    report: dict[str, Any] = {**counts, "seconds": round(time.monotonic() - begin_s, 1)}
    click.echo(json.dumps(report, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
