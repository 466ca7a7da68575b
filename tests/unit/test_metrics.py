"""The log of a session: each committed step once, whoever writes and whoever dies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hopcoll.errors import CheckpointError, CheckpointMismatchError
from recovery import metrics as module
from recovery.metrics import Metrics


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "log.jsonl"


def test_one_writes_and_the_next_adds_what_the_dead_one_had_in_hand(path: Path) -> None:
    one, other = Metrics(path, 10), Metrics(path, 10)
    for metrics in (one, other):
        metrics.go_on(0, None)
    for step in (1, 2, 3):
        one.add(step, {"loss": step / 2}, True)
        other.add(step, {"loss": step / 2}, False)
    one.close()
    # It died with the line of step 3 half written, and before it had that of step 4.
    os.truncate(path, path.stat().st_size - 5)
    other.add(4, {"loss": 2.0}, True)
    other.add(5, {"loss": 2.5}, True)
    other.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (step, step / 2) for step in range(1, 6)
    ]
    assert all(line["time_ns"] > 0 for line in lines)


def test_what_is_not_committed_is_cut_off_and_what_a_power_cut_took_is_added(path: Path) -> None:
    first = Metrics(path, 10)
    first.go_on(0, None)
    for step in (1, 2, 3, 4):
        first.add(step, {}, True)
    first.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))  # 3, which is committed, was not durable
    again = Metrics(path, 10)
    again.go_on(3, {"durable": 1, "lines": [[2, {}], [3, {}]]})
    again.write(3)
    again.close()
    assert steps(path) == [1, 2, 3]
    path.write_bytes(b"".join(lines))
    again = Metrics(path, 10)
    again.go_on(3, {"durable": 2, "lines": [[3, {}]]})  # and this one is the first to write at 4
    again.add(4, {"new": True}, True)
    again.close()
    assert steps(path) == [1, 2, 3, 4]
    assert "new" in path.read_text().splitlines()[3]


def test_a_commit_carries_what_may_not_be_durable(path: Path) -> None:
    metrics = Metrics(path, 10)
    metrics.go_on(0, None)
    carried = []
    for step in range(1, 9):
        metrics.add(step, {"a": step}, True)
        if step % 2 == 0:
            carried.append([at for at, _ in metrics.committing(step)["lines"]])
    metrics.close()
    # Up to 2 it is known to be durable by all when 6 is saved: all took part in the save of 4.
    assert carried == [[1, 2], [1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]


def test_a_writer_before_that_lives_on_writes_no_more(path: Path) -> None:
    old, new = Metrics(path, 10.0), Metrics(path, 10.0)
    for metrics in (old, new):
        metrics.go_on(0, None)
        metrics.add(1, {"loss": 1}, False)
    old.write(1)
    new.write(1)
    old.add(2, {"loss": 2}, True)  # it was stopped before it did so
    old.close()
    new.add(2, {"loss": 2}, True)
    new.close()
    assert steps(path) == [1, 2]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_it_keeps_no_more_than_so_many_lines(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LINES_MAX", 3)
    one, other = Metrics(path, 10), Metrics(path, 10)
    for metrics in (one, other):
        metrics.go_on(0, None)
    for step in range(1, 10):
        one.add(step, {}, True)
        other.add(step, {}, False)
    one.close()
    other.add(10, {}, True)
    assert [at for at, _ in other.committing(10)["lines"]] == [8, 9, 10]
    other.close()
    assert steps(path) == list(range(1, 11))


def test_another_file_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"step": 1}\nmy diary\n')
    metrics = Metrics(path, 10)
    metrics.go_on(5, {"durable": 5, "lines": []})
    with pytest.raises(CheckpointMismatchError, match="line 2, is not of a session's log"):
        metrics.write(5)
    assert path.read_text() == '{"step": 1}\nmy diary\n'
    metrics.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    metrics = Metrics(tmp_path / "file" / "log.jsonl", 10)
    with pytest.raises(CheckpointError, match=r"log\.jsonl cannot be written"):
        metrics.add(1, {}, True)
    metrics.close()
