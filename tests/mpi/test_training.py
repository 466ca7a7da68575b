"""Training sessions on real ranks: deaths, restarts, and the replay of both, bit for bit."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import recovery
from hopcoll import launcher
from recovery.cli import ckpt
from tests import launch

PROGRAM = "tests.mpi.programs.training"
CHUNKS = {"HOPCOLL_CHUNK_BYTES": "4096"}


def train(
    *words: Any, ranks: int = 4, code: int = 0, options: Sequence[str] = (), **settings: str
) -> launch.Ended:
    ended = launch.run(
        ranks, "-m", PROGRAM, *words, settings={**CHUNKS, **settings}, options=options
    )
    assert ended.code == code, str(ended)
    return ended


def alike(ended: launch.Ended, ranks: list[int]) -> dict[str, Any]:
    """What the ranks said, which has to be the same."""
    said = {line.pop("rank"): line for line in ended.said}
    assert sorted(said) == ranks, str(ended)
    assert len({json.dumps(line) for line in said.values()}) == 1, str(ended)
    return said[ranks[0]]


def test_a_replay_leaves_out_who_died_where_it_died(tmp_path: Path) -> None:
    history = tmp_path / "history.json"
    ended = train(
        "--history", history, "--die", "1:3", "--die-between", "3:6",
        HOPCOLL_FAULT="rank=0,op=17,chunk=4", HOPCOLL_FAULT_RECORD=str(tmp_path / "fault"),
    )  # fmt: skip
    said = alike(ended, [2])
    fault = json.loads((tmp_path / "fault.0").read_text())
    assert 0 < fault["moved_bytes"] < fault["total_bytes"]
    recorded = recovery.History.read(history)
    losses = recorded.eras[0].losses
    assert [(step, index) for step, index, _ in losses] == [(3, 0), (6, 1), (9, 0)]
    assert [ranks for _, _, ranks in losses] == [(0, 2, 3), (0, 2), (2,)]
    again = train("--replay", history, "--log", tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))  # three ranks wrote, in turn
    by_rank = {line["rank"]: line for line in again.said}
    assert sorted(by_rank) == [0, 1, 2, 3]
    assert by_rank[2]["digest"] == said["digest"]
    assert by_rank[2]["made"] == list(range(1, 13))
    assert by_rank[1]["made"] == [1, 2]
    assert by_rank[3]["made"] == [1, 2, 3, 4, 5, 6]
    undisturbed = alike(train(), [0, 1, 2, 3])
    assert undisturbed["digest"] != said["digest"]  # so it does show who contributed


@pytest.mark.parametrize("cut", [(), ("--cut",)])
def test_all_stop_behind_the_same_step_when_they_are_asked_to(
    tmp_path: Path, cut: tuple[str, ...]
) -> None:
    store, log = tmp_path / "store", tmp_path / "log.jsonl"
    words = ["--store", store, "--log", log, "--interval", 10**9, *cut]
    options = ("--stop-within", "60")
    job = launch.start(
        3, "-m", PROGRAM, *words, "--steps", 10**6, settings=CHUNKS, options=options
    )
    try:
        deadline_s = time.monotonic() + 60
        while not log.exists() or log.read_text().count("\n") < 20:
            assert job.poll() is None and time.monotonic() < deadline_s
            threading.Event().wait(0.05)
        job.send_signal(signal.SIGUSR1)
        stdout, stderr = job.communicate(timeout=60)
    finally:
        launch.end(job)
    assert job.returncode == launcher.STOPPED, stderr
    assert stdout == ""  # nobody came to the end of the program
    lines = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    stopped = lines[-1]
    assert f"asked to stop, did so behind step {stopped}\n" in stderr
    steps = ["--steps", stopped + 5]
    said = alike(train(*words, *steps, ranks=3), [0, 1, 2])
    assert said["made"] == [*range(stopped + 1, stopped + 6)]
    undisturbed = alike(train(*steps, *cut, ranks=3), [0, 1, 2])
    assert undisturbed["digest"] == said["digest"]
    assert recovery.History.read(store).eras[1].first == stopped + 1


def test_a_program_without_a_session_just_ends(tmp_path: Path) -> None:
    program = ("-m", "tests.mpi.programs.endings", "wait", "0", "1")
    job = launch.start(2, *program, options=("--stop-within", "60", "--restarts", "3"))
    try:
        assert job.stdout is not None
        for _ in range(2):
            job.stdout.readline()
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=30)
    finally:
        launch.end(job)
    assert job.returncode == launcher.NOBODY_SURVIVED


def test_a_job_that_was_started_again_is_replayed_too(tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "log.jsonl"
    train("--store", store, "--log", log, "--die", "0:2,1:8,2:8,3:8", code=1)
    ended = train("--store", store, "--log", log, "--die", "2:9", ranks=3)
    said = alike(ended, [0, 1])
    assert said["first"] == 7
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [*range(1, 13)]
    history = recovery.History.read(store)
    assert [(era.first, era.size) for era in history.eras] == [(1, 4), (7, 3)]
    assert history.contributors(6) == (1, 2, 3)
    assert history.contributors(7) == (0, 1, 2)
    # With a rank more than the job ever had.
    again = {line["rank"]: line for line in train("--replay", store, ranks=5).said}
    assert again[4]["made"] == []
    assert again[1]["digest"] == again[0]["digest"] == said["digest"]
    assert again[0]["made"] == [1, *range(7, 13)]
    assert again[3]["made"] == [1, 2, 3, 4, 5, 6]


def test_a_job_that_was_killed_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    everyone = ",".join(f"{rank}:8" for rank in range(3))
    train("--store", tmp_path / "store", "--die", everyone, ranks=3, code=1)
    said = alike(train("--store", tmp_path / "store", ranks=3), [0, 1, 2])
    undisturbed = alike(train(ranks=3), [0, 1, 2])
    assert said["first"] == 7
    assert said["digest"] == undisturbed["digest"]


def test_the_launcher_starts_it_again_unless_it_dies_at_the_same_step(tmp_path: Path) -> None:
    again = ["--restarts", "3"]
    deaths = "0:8,1:8"
    ended = train("--store", tmp_path / "a", "--die-once", deaths, ranks=2, options=again)
    assert alike(ended, [0, 1])["first"] == 7
    assert recovery.History.read(tmp_path / "a").last == 12
    ended = train("--store", tmp_path / "b", "--die", deaths, ranks=2, options=again, code=1)
    history = recovery.History.read(tmp_path / "b")
    assert history.last == 6
    assert "no progress since step 6, and no host has gone: the program's fault" in ended.stderr


def test_input_that_kills_one_rank_after_another_stops_the_job(tmp_path: Path) -> None:
    # In every epoch of some four steps the sample comes to someone else.
    ended = train("--poison", 11, "--steps", 100, "--min-ranks", 3, code=1)
    expected = "TooFewRanksError: 2 of 4 ranks are left, and min_ranks is 3; lost: rank "
    assert expected in ended.stderr
    assert "If it was the input that killed them" in ended.stderr
    assert ended.said == []


@pytest.mark.parametrize(
    ("how", "step", "saved"), [("--die", 8, 6), ("--die-committing", 12, 9), ("--die", 2, 0)]
)
def test_a_death_takes_a_cut_array_back_to_the_last_commit(
    tmp_path: Path, how: str, step: int, saved: int
) -> None:
    ended = train("--cut", "--store", tmp_path / "store", how, f"1:{step}", ranks=3)
    said = alike(ended, [0, 2])
    made = said["made"]
    again = made.index(saved + 1, saved + 1)  # it may have been noticed a step later
    assert made == [*range(1, again + 1), *range(saved + 1, 13)]
    assert again in (step, step + 1)
    history = recovery.History.read(tmp_path / "store")
    eras = [(era.first, era.ranks) for era in history.eras]
    assert eras == [(1, (0, 1, 2)), (saved + 1, (0, 2))][-2 if saved else -1 :]
    for command in (["verify"], ["show"], ["diff", "--steps", "9", "9"]):
        asked = CliRunner().invoke(ckpt, [command[0], str(tmp_path / "store"), *command[1:]])
        assert asked.exit_code == 0, asked.output
    asked = CliRunner().invoke(ckpt, ["diff", str(tmp_path / "store")])
    assert "state/rows: 100 of 100 elements differ" in asked.output
    rows = said["rows"]
    assert len(rows) == 50
    # All rows have had the same added to them, in all of the steps.
    assert len({round(row[0] - 2 * i, 9) for i, row in enumerate(rows)}) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_numbers_of_ranks_go_on_from_it(tmp_path: Path, ranks: int) -> None:
    train("--cut", "--store", tmp_path / "store", "--steps", 6, ranks=3)
    said = alike(train("--cut", "--store", tmp_path / "store", ranks=ranks), [*range(ranks)])
    assert said["first"] == 7
    assert len(said["rows"]) == 50
