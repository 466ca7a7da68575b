"""The training job of examples/: deaths, checkpoints and resumption, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recovery
from tests import launch

SCRIPT = launch.ROOT / "examples" / "sgd_digits.py"
STEPS = 12


class Training:
    """Jobs that train in one folder. Small: a gradient of 20 KB, which still takes many chunks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "checkpoints"
        self.log = folder / "log.jsonl"
        self.record = folder / "fault"

    def run(self, *arguments: str, fault: str = "", steps: int = STEPS) -> launch.Ended:
        settings = {"HOPCOLL_CHUNK_BYTES": "512"}
        if fault:
            settings.update(HOPCOLL_FAULT=fault, HOPCOLL_FAULT_RECORD=str(self.record))
        words = ["--steps", str(steps), "--hidden", "40", "--checkpoint-every", "4"]
        words += ["--checkpoint-dir", str(self.store), "--log", str(self.log), *arguments]
        return launch.run(3, SCRIPT, *words, settings=settings, timeout_s=200)

    def fault(self, victim: int) -> dict[str, Any]:
        return json.loads(Path(f"{self.record}.{victim}").read_text())

    def steps(self) -> dict[int, dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return {line["step"]: line for line in lines if "step" in line}

    def finish(self) -> dict[str, Any]:
        last = json.loads(self.log.read_text().splitlines()[-1])
        assert "finished" in last, last
        return last

    def state(self) -> dict[str, bytes]:
        found = recovery.load_latest(self.store)
        assert found.step == STEPS
        return {name: array.tobytes() for name, array in found.arrays.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(tmp_path_factory.mktemp("undisturbed"))
    ended = training.run()
    assert ended.code == 0, str(ended)
    return training


def test_undisturbed(undisturbed: Training) -> None:
    steps = undisturbed.steps()
    assert list(steps) == list(range(1, STEPS + 1))
    assert all(line["contributors"] == [0, 1, 2] for line in steps.values())
    assert steps[STEPS]["loss"] < steps[1]["loss"]
    assert undisturbed.finish()["first"] == 0
    assert [path.name for path in sorted(undisturbed.store.iterdir())] == [
        "step-00000008.h5",
        "step-00000012.h5",
    ]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_dies_in_the_middle(tmp_path: Path, victim: int) -> None:
    training = Training(tmp_path)
    ended = training.run(fault=f"rank={victim},op=6,chunk=5")
    assert ended.code == 0, str(ended)
    assert 0 < training.fault(victim)["moved_bytes"] < training.fault(victim)["total_bytes"]
    survivors = [rank for rank in range(3) if rank != victim]
    steps = training.steps()
    assert {5, 7} < steps.keys()
    assert steps[5]["contributors"] == [0, 1, 2]
    assert all(steps[step]["contributors"] == survivors for step in range(7, STEPS + 1))
    finish = training.finish()
    assert (finish["finished"], finish["contributors"]) == (STEPS, survivors)
    found = recovery.load_latest(training.store)
    assert (found.step, found.attributes["contributors"]) == (STEPS, survivors)
    assert np.isfinite(found.arrays["parameters"]).all()


@pytest.mark.parametrize("op", [STEPS, STEPS + 1])
def test_the_reporting_rank_dies_at_the_end(tmp_path: Path, op: int) -> None:
    """In the last Allreduce nobody has reported yet; in the Barrier behind it, rank 0 has."""
    training = Training(tmp_path)
    ended = training.run(fault=f"rank=0,op={op},chunk=0")
    assert ended.code == 0, str(ended)
    assert training.fault(0)["op"] == op
    assert training.finish()["finished"] == STEPS
    assert recovery.load_latest(training.store).step == STEPS


def test_resumed_is_bit_for_bit_the_same(tmp_path: Path, undisturbed: Training) -> None:
    training = Training(tmp_path)
    ended = training.run(steps=4)
    assert ended.code == 0, str(ended)
    # Operations 0 and 1 hand the state on; the next checkpoint would come after step 8.
    everyone = ";".join(f"rank={rank},op=4,chunk=0" for rank in range(3))
    ended = training.run("--resume", fault=everyone)
    assert ended.code != 0, str(ended)
    assert {training.fault(rank)["op"] for rank in range(3)} == {4}
    ended = training.run("--resume")
    assert ended.code == 0, str(ended)
    assert training.finish()["first"] == 4
    assert training.state() == undisturbed.state()
    assert training.finish()["accuracy"] == undisturbed.finish()["accuracy"]


def test_the_rank_that_hands_the_state_on_dies(tmp_path: Path) -> None:
    training = Training(tmp_path)
    ended = training.run(steps=8)
    assert ended.code == 0, str(ended)
    # Operation 0 finds out who has the newest state; operation 1 is its broadcast.
    ended = training.run("--resume", fault="rank=0,op=1,chunk=3")
    assert ended.code == 0, str(ended)
    assert training.fault(0)["trigger"] == "chunk"
    finish = training.finish()
    assert (finish["first"], finish["contributors"]) == (8, [1, 2])
    assert recovery.load_latest(training.store).step == STEPS


def test_an_old_job_is_neither_overwritten_nor_mixed_up(undisturbed: Training) -> None:
    before = undisturbed.state()
    ended = undisturbed.run()
    assert ended.code == 2, str(ended)
    assert ended.stderr.count("--resume goes on") == 1, str(ended)
    ended = undisturbed.run("--resume", "--seed", "1")
    assert ended.code == 1, str(ended)
    assert "attribute 'seed' is 0, wanted 1" in ended.stderr
    # To resume what is complete changes nothing either.
    ended = undisturbed.run("--resume", steps=5)
    assert ended.code == 0, str(ended)
    assert undisturbed.state() == before
