"""The examples' jobs, at small size: ranks are killed, and all, and they end as they should."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.crash.jobs import Job, done
from tests.launch import ROOT

pytestmark = pytest.mark.xdist_group("jobs")

SGD = str(ROOT / "examples" / "sgd_workflow.py")
RL = str(ROOT / "examples" / "rl_cartpole.py")


def turns(ledger: Any) -> int:
    """How many turns of the loop are over."""
    names = [name for name in ledger.states if name.startswith("turn[")]
    return max((int(name[5:].partition("]")[0]) for name in names), default=0)


def test_a_model_is_trained_and_published_once(tmp_path: Path) -> None:
    """A member of the gang dies, then all; then who leads the job that goes on."""
    words = ("sgd", "--epochs", 4, "--steps", 150, "--resume")
    job = Job(4, SGD, tmp_path, *words)
    job.wait_until(lambda ledger: done(ledger, "epoch") >= 1)
    job.kill(2)
    job.wait_until(lambda ledger: done(ledger, "epoch") >= 2)
    job.kill_all()
    job = Job(3, SGD, tmp_path, *words)
    job.wait_until(lambda ledger: ledger.lives >= 1 and done(ledger, "epoch") >= 3)
    job.kill(0)
    said = job.end()
    assert "exit code 0" in said, said
    ledger, _ = job.workflow._folder.look()
    assert ledger.status == "done" and done(ledger, "publish") == 1
    (published,) = (tmp_path / "registry").iterdir()
    output = job.workflow.output()
    assert str(published) == output["model"] and len(output["losses"]) == 4
    assert np.load(published).dtype == np.float32
    (told,) = re.findall(r"accuracy on held-out images ([0-9.]+)", said)
    assert float(told) >= 0.93
    assert (tmp_path / "loss.png").stat().st_size > 1000
    # Once more: what is there is told again, and nothing runs.
    assert told in Job(2, SGD, tmp_path, *words).end()
    assert len(list((tmp_path / "registry").iterdir())) == 1


def test_a_pole_is_balanced(tmp_path: Path) -> None:
    """The rank of an actor dies, then who leads the learner's gang, then all."""
    words = ("rl", "--players", 3, "--resume")
    job = Job(4, RL, tmp_path, *words)
    job.wait_until(lambda ledger: turns(ledger) >= 1)
    job.kill(1)
    job.wait_until(lambda ledger: turns(ledger) >= 2)
    job.kill(0)
    job.wait_until(lambda ledger: turns(ledger) >= 3)
    job.kill_all()
    assert job.workflow.status().state == "interrupted"
    said = Job(3, RL, tmp_path, *words).end()
    assert "exit code 0" in said, said
    (told,) = re.findall(r"the pole stood for ([0-9.]+) steps on average", said)
    assert float(told) >= 475
    averages = job.workflow.output()
    assert len(averages) >= 5 and np.mean(averages[-5:]) >= 475
    assert (tmp_path / "steps.png").stat().st_size > 1000
