"""The training job of examples/: deaths, checkpoints and resumption, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recovery
from examples import demo
from tests import launch

SCRIPT = launch.ROOT / "examples" / "sgd_digits.py"
STEPS = 12
#: The Allreduce of step 1. Before it come two for the store, and two for the session.
FIRST_OPERATION = demo.FIRST_OPERATION


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
        assert len(lines) == len({line["step"] for line in lines})  # none is there twice
        return {line["step"]: line for line in lines}

    def accuracy(self) -> float:
        return self.steps()[STEPS]["accuracy"]

    def restored(self) -> recovery.Restored:
        with recovery.CheckpointStore(self.store, readonly=True) as store:
            return store.restore()

    def state(self) -> dict[str, bytes]:
        found = self.restored()
        assert found.step == STEPS
        return {name: array.tobytes() for name, array in found.state["state"].items()}

    def history(self) -> recovery.History:
        return recovery.History.read(self.store)


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
    assert undisturbed.accuracy() > 0.3
    assert [era.first for era in undisturbed.history().eras] == [1]
    with recovery.CheckpointStore(undisturbed.store, readonly=True) as store:
        assert store.steps() == [8, 12]
        assert list(store.verify()) == []


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_dies_in_the_middle(tmp_path: Path, victim: int) -> None:
    training = Training(tmp_path)
    ended = training.run(fault=f"rank={victim},op={FIRST_OPERATION + 5},chunk=5")
    assert ended.code == 0, str(ended)
    assert 0 < training.fault(victim)["moved_bytes"] < training.fault(victim)["total_bytes"]
    survivors = [rank for rank in range(3) if rank != victim]
    steps = training.steps()
    assert {5, 7} < steps.keys()
    assert steps[5]["contributors"] == [0, 1, 2]
    assert all(steps[step]["contributors"] == survivors for step in range(7, STEPS + 1))
    found = training.restored()
    assert found.step == STEPS
    assert training.history().contributors(STEPS) == tuple(survivors)
    assert np.isfinite(found.state["state"]["parameters"]).all()


def test_the_reporting_rank_dies_at_the_end(tmp_path: Path) -> None:
    training = Training(tmp_path)
    last = FIRST_OPERATION + STEPS - 1
    ended = training.run(fault=f"rank=0,op={last},chunk=0")
    assert ended.code == 0, str(ended)
    assert training.fault(0)["op"] == last
    assert training.accuracy() > 0.3
    assert list(training.steps()) == list(range(1, STEPS + 1))
    assert training.restored().step == STEPS


def test_resumed_is_bit_for_bit_the_same(tmp_path: Path, undisturbed: Training) -> None:
    training = Training(tmp_path)
    ended = training.run(steps=4)
    assert ended.code == 0, str(ended)
    # The next commit would come after step 8.
    op = FIRST_OPERATION + 2
    ended = training.run(
        "--resume", fault=";".join(f"rank={rank},op={op},chunk=0" for rank in range(3))
    )
    assert ended.code != 0, str(ended)
    assert {training.fault(rank)["op"] for rank in range(3)} == {op}
    ended = training.run("--resume")
    assert ended.code == 0, str(ended)
    assert [era.first for era in training.history().eras] == [1, 5]
    assert training.state() == undisturbed.state()
    lines = [
        {key: value for key, value in line.items() if key != "time_ns"}
        for job in (training, undisturbed)
        for line in job.steps().values()
    ]
    # The job of four steps was over with the fourth, and said how good it was.
    del lines[3]["accuracy"]
    assert lines[:STEPS] == lines[STEPS:]


def test_a_rank_dies_while_the_job_is_resumed(tmp_path: Path) -> None:
    training = Training(tmp_path)
    ended = training.run(steps=8)
    assert ended.code == 0, str(ended)
    ended = training.run("--resume", fault=f"rank=0,op={FIRST_OPERATION - 1}")
    assert ended.code == 0, str(ended)
    assert training.fault(0)["op"] == FIRST_OPERATION - 1
    assert training.history().contributors(STEPS) == (1, 2)
    assert list(training.steps()) == list(range(1, STEPS + 1))
    assert training.restored().step == STEPS


def test_an_old_job_is_neither_overwritten_nor_mixed_up(undisturbed: Training) -> None:
    before = undisturbed.state()
    ended = undisturbed.run()
    assert ended.code == 2, str(ended)
    assert ended.stderr.count("--resume goes on") == 1, str(ended)
    ended = undisturbed.run("--resume", "--seed", "1")
    assert ended.code == 1, str(ended)
    assert "setting 'seed' was 0, and is 1 now" in ended.stderr
    # To resume what is complete changes nothing either.
    ended = undisturbed.run("--resume", steps=5)
    assert ended.code == 0, str(ended)
    assert undisturbed.state() == before
