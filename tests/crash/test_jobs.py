"""The examples' jobs, at small size: ranks are killed, and all, and they end as they should."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recovery.journal import Journal
from tests.crash.jobs import Job, begin_again, done
from tests.launch import ROOT

pytestmark = pytest.mark.xdist_group("jobs")

SGD = str(ROOT / "examples" / "sgd_workflow.py")
RL = str(Path(__file__).with_name("rl_longer.py"))


def turns(ledger: Any) -> int:
    """How many turns of the loop are over."""
    names = [name for name in ledger.states if name.startswith("turn[")]
    return max((int(name[5:].partition("]")[0]) for name in names), default=-1)


def test_a_model_is_trained_and_published_once(tmp_path: Path) -> None:
    """A member of the gang dies, then all; then who leads the job that goes on."""
    words = ("sgd", "--epochs", 7, "--steps", 150, "--resume")

    def story(folder: Path) -> Job:
        job = Job(4, SGD, folder, *words)
        job.wait_until(lambda ledger: done(ledger, "epoch") >= 1)
        job.kill(2)
        job.wait_until(lambda ledger: done(ledger, "epoch") >= 2)
        job.kill_all()
        job = Job(3, SGD, folder, *words)
        job.wait_until(lambda ledger: ledger.lives >= 1 and done(ledger, "epoch") >= 3)
        job.kill(0)
        return job

    job = begin_again(story, tmp_path)
    folder = job.folder
    said = job.end()
    assert "exit code 0" in said, said
    ledger, _ = job.workflow._folder.look()
    assert ledger.status == "done" and done(ledger, "publish") == 1
    (published,) = (folder / "registry").iterdir()
    output = job.workflow.output()
    assert str(published) == output["model"] and len(output["losses"]) == 7
    assert np.load(published).dtype == np.float32
    (told,) = re.findall(r"accuracy on held-out images ([0-9.]+)", said)
    assert float(told) >= 0.93
    assert (folder / "loss.png").stat().st_size > 1000
    # Once more: what is there is told again, and nothing runs.
    assert told in Job(2, SGD, folder, *words).end()
    assert len(list((folder / "registry").iterdir())) == 1


def moved(job: Job) -> None:
    """See in the journal that rank 1 had an actor, which was called elsewhere in the end, and that
    the gang went on without it."""
    places: dict[str, list[int]] = {}
    gangs = []
    for record in Journal.read(job.folder / "workflows" / "rl" / "journal").records:
        kind, _, number = record.head.get("t", "").rpartition("/")[2].partition("~")
        if record.kind == "done" and kind in ("Player", "Player.sample"):
            places.setdefault(number, []).append(record.head.get("on", 0))
        elif record.kind == "done" and kind == "learn":
            gangs.append(record.head["w"])
    assert len(places) == 3 and any(1 in ranks for ranks in places.values())
    assert all(len(ranks) >= 2 and ranks[-1] != 1 for ranks in places.values()), places
    assert gangs[-1] == [0, 2, 3], gangs


def test_a_pole_is_balanced(tmp_path: Path) -> None:
    """The rank of an actor dies, then who leads the learner's gang, then all."""
    words = ("rl", "--players", 3, "--resume")

    def story(folder: Path) -> Job:
        job = Job(4, RL, folder, *words)
        job.wait_until(lambda ledger: turns(ledger) >= 0)
        job.kill(1)
        before = job.read(turns)
        job.wait_until(lambda ledger: turns(ledger) >= before + 2)
        job.read(lambda _: moved(job))
        job.kill(0)
        before = job.read(turns)
        job.wait_until(lambda ledger: turns(ledger) >= before + 1)
        job.kill_all()
        return job

    job = begin_again(story, tmp_path)
    folder = job.folder
    assert job.workflow.status().state == "interrupted"
    said = Job(3, RL, folder, *words).end()
    assert "exit code 0" in said, said
    (told,) = re.findall(r"the pole stood for ([0-9.]+) steps on average", said)
    assert float(told) >= 475
    averages = job.workflow.output()
    assert len(averages) >= 5 and np.mean(averages[-5:]) >= 475
    assert (folder / "steps.png").stat().st_size > 1000
