"""Who contributed to which step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recovery
from hopcoll.errors import CheckpointMismatchError
from recovery import History


@pytest.fixture
def history() -> History:
    """Four ranks; 1 dies in the second operation of step 3, 0 and 3 in step 5. From 5 on anew."""
    made = History()
    made.begin(1, 4, range(4))
    for step, index, ranks in [
        (1, 0, (0, 1, 2, 3)),
        (3, 0, (0, 1, 2, 3)),
        (3, 1, (0, 2, 3)),
        (4, 0, (0, 2, 3)),
        (5, 0, (2,)),
    ]:
        made.record(step, index, ranks)
        made.last = step
    return made


def test_each_operation_has_its_contributors(history: History) -> None:
    era = history.eras[0]
    assert era.contributors(1, 0) == era.contributors(3, 0) == (0, 1, 2, 3)
    assert era.contributors(3, 1) == era.contributors(3, 9) == era.contributors(4, 9) == (0, 2, 3)
    assert era.beginning(3) == (0, 1, 2, 3)
    assert era.beginning(4) == era.beginning(5) == (0, 2, 3)
    assert era.beginning(6) == (2,)
    assert len(era.losses) == 2
    assert [history.contributors(step) for step in (2, 3, 5)] == [(0, 1, 2, 3), (0, 2, 3), (2,)]
    with pytest.raises(ValueError, match="step 6"):
        history.contributors(6)


def test_a_new_era_forgets_what_came_after(history: History) -> None:
    history.begin(5, 2, (0, 1))
    assert [(era.first, era.size, era.ranks) for era in history.eras] == [
        (1, 4, (0, 1, 2, 3)),
        (5, 2, (0, 1)),
    ]
    assert history.eras[0].losses == [(3, 1, (0, 2, 3))]
    assert history.last == 4
    history.begin(1, 3, (0, 2))
    assert [era.ranks for era in history.eras] == [(0, 2)]


def test_it_comes_back_from_json_and_from_a_file(history: History, tmp_path: Path) -> None:
    history.begin(5, 2, (0, 1))
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history
    history.write(tmp_path / "history.json")
    assert History.read(tmp_path / "history.json") == history


def test_a_store_of_something_else(tmp_path: Path) -> None:
    with recovery.CheckpointStore(tmp_path) as store:
        store.save_sync(1, {"a": 1})
    with pytest.raises(CheckpointMismatchError, match="not saved by a TrainingSession"):
        History.read(tmp_path)
