"""What MPI does not notice: stopped processes and pulled cables; and a store in that case."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab import Lab
from recovery import CheckpointStore
from tests import launch

PROGRAM = Path(launch.ROOT, "tests/mpi/programs/silence.py")
SETTINGS = {"HOPCOLL_DETECT_S": "1.5"}
NAME = f"hs{os.getpid()}"


class Story:
    """What the ranks of a job say, in lines of JSON, while it runs."""

    def __init__(self, job: subprocess.Popen[str]) -> None:
        self.job = job
        self.lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.job.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))

    def await_events(self, count: int, event: str, **more: Any) -> dict[int, dict[str, Any]]:
        """What so many ranks say of one kind, by rank; other lines are dropped."""
        found: dict[int, dict[str, Any]] = {}
        while len(found) < count:
            try:
                line = self.lines.get(timeout=40)
            except queue.Empty:
                raise AssertionError(f"{event} {more} never came; only {found}") from None
            if line["event"] == event and all(line[key] == more[key] for key in more):
                found[line["rank"]] = line
        return found

    def end(self) -> None:
        launch.end(self.job)
        self.reader.join()


def ended(story: Story, ranks: list[int]) -> dict[int, dict[str, Any]]:
    """How these ranks say that it ended for them, without a wrong value anywhere."""
    said = story.await_events(len(ranks), "ended")
    assert sorted(said) == ranks
    assert all(line["wrong"] == 0 for line in said.values())
    return said


@pytest.mark.parametrize("victims", [(2,), (0,), (0, 3)])
def test_a_stopped_rank_is_killed_and_the_others_go_on(tmp_path, victims):
    story = Story(launch.start(4, PROGRAM, str(tmp_path), *map(str, victims), settings=SETTINGS))
    try:
        alive = [rank for rank in range(4) if rank not in victims]
        stopping = story.await_events(len(victims), "stopping")
        story.await_events(len(alive), "seen", times=2)
        assert launch.ended_processes([line["pid"] for line in stopping.values()])
        (tmp_path / "over").touch()
        said = ended(story, alive)
        assert story.job.wait(timeout=30) == 0
    finally:
        story.end()
    for line in said.values():
        assert line["seen"][0] == [0, 1, 2, 3]
        assert line["seen"][-1] == alive
        assert line["seen"] == said[alive[0]]["seen"]
        assert line["lost"] == 0
    assert sum(line["fenced"] for line in said.values()) >= len(victims)


def test_a_short_stop_costs_nothing_but_time(tmp_path):
    patient = {"HOPCOLL_DETECT_S": "6"}
    story = Story(launch.start(3, PROGRAM, str(tmp_path), "1", settings=patient))
    try:
        stopping = story.await_events(1, "stopping")
        # Less than detect_s and more than half of it, in which nothing happens; what the others saw
        # at first may be heard of after the stop.
        end_s = time.monotonic() + 3.5
        with pytest.raises(queue.Empty):
            while line := story.lines.get(timeout=max(end_s - time.monotonic(), 0)):
                assert line["event"] == "seen" and line["times"] == 1, line
        os.kill(stopping[1]["pid"], signal.SIGCONT)
        (tmp_path / "over").touch()
        said = ended(story, [0, 1, 2])
        assert story.job.wait(timeout=30) == 0
    finally:
        story.end()
    told = [(line["seen"], line["epoch"], line["fenced"]) for line in said.values()]
    assert told == [([[0, 1, 2]], 0, 0)] * 3
    assert said[1]["pauses"] == 1


@pytest.fixture(scope="module")
def lab():
    why_not = launch.why_no_lab()
    if why_not:
        pytest.skip(why_not)
    with Lab(4, name=NAME) as made:
        yield made


def lab_job(lab: Lab, program: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a rank on each host."""
    return lab.start(
        str(program),
        str(folder),
        ranks=len(lab.hosts),
        cwd=launch.ROOT,
        env=launch.environment(SETTINGS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def story(tmp_path, lab):
    made = Story(lab_job(lab, PROGRAM, tmp_path))
    yield made
    for host in lab.hosts:
        lab.cable(host, plugged=True)
    made.end()


def test_more_than_half_go_on_without_a_host_out_of_reach(tmp_path, lab, story):
    story.await_events(4, "seen", times=1)
    lab.cable(3, plugged=False)
    story.await_events(3, "seen", times=2)
    lab.cable(3, plugged=True)
    # Who was out of reach has stopped by itself, or was told by the others.
    stopped = story.await_events(1, "ended")
    assert stopped[2]["error"] in ("StaleEpochError", "MinorityError")
    (tmp_path / "over").touch()
    for line in ended(story, [0, 1, 3]).values():
        assert line["seen"] == [[0, 1, 2, 3], [0, 1, 3]]
        assert line["error"] == ""
        assert line["lost"] == 1


def test_a_committer_that_is_left_out_of_a_save_and_wakes_up(tmp_path, lab):
    """It is alone on its host, so nobody can kill it. The next one commits; it finds its number
    taken, and removes nothing."""
    program = Path(launch.ROOT, "tests/mpi/programs/left_out.py")
    story = Story(lab_job(lab, program, tmp_path))
    try:
        stopping = story.await_events(1, "stopping")
        story.await_events(3, "saved", step=3)
        slots = sorted(os.listdir(tmp_path / "store" / "slots"))
        os.kill(stopping[0]["pid"], signal.SIGCONT)
        said = story.await_events(4, "ended")
    finally:
        story.end()
    assert [said[rank]["error"] for rank in range(4)] == ["StaleEpochError", "", "", ""]
    assert sorted(os.listdir(tmp_path / "store" / "slots")) == slots
    with CheckpointStore(tmp_path / "store", readonly=True) as store:
        assert store.steps() == [2, 3]
        assert not list(store.verify())
        for step in (2, 3):
            state = store.restore(step).state
            assert all((state[f"array{i}"] == 10.0 * step + i).all() for i in range(4))


def test_half_of_the_ranks_do_not_go_on(tmp_path, lab, story):
    story.await_events(4, "seen", times=1)
    for host in (3, 4):
        lab.cable(host, plugged=False)
    said = story.await_events(2, "ended")
    assert sorted(said) == [0, 1]
    assert said[0]["away"] == [2, 3]
    # What the others say cannot be heard; they give up too, each by itself.
    paths = [tmp_path / f"ended.{rank}" for rank in (2, 3)]
    for _ in range(200):
        if all(path.exists() for path in paths):
            break
        with pytest.raises(queue.Empty):
            story.lines.get(timeout=0.2)
    said |= {rank: json.loads(path.read_text()) for rank, path in zip((2, 3), paths, strict=True)}
    for line in said.values():
        assert line["error"] == "MinorityError"
        assert line["seen"] == [[0, 1, 2, 3]]
        assert line["wrong"] == 0


def test_who_comes_back_when_the_others_have_left(tmp_path, lab, story):
    """Two give up and end; the links of the other two come back just then. What the first two still
    owed them never arrives: they do not wait for it, and go on or give up, both alike."""
    story.await_events(4, "seen", times=1)
    for host in (3, 4):
        lab.cable(host, plugged=False)
    assert sorted(story.await_events(2, "ended")) == [0, 1]
    for host in (3, 4):
        lab.cable(host, plugged=True)
    (tmp_path / "over").touch()
    said = ended(story, [2, 3])
    assert said[2]["error"] == said[3]["error"]
    assert said[2]["error"] in ("", "MinorityError")
    if not said[2]["error"]:
        assert said[2]["seen"] == said[3]["seen"] == [[0, 1, 2, 3], [2, 3]]
