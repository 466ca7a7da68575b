"""More real ranks than a chain is for: large operations along two trees."""

from __future__ import annotations

from pathlib import Path

from hopcoll.replay import replay
from tests import launch

PROGRAM = Path(__file__).with_name("programs") / "many.py"
RANKS = 20


def test_large_operations_of_many_ranks(tmp_path):
    """The bits are those that follow from the contributors; the protocol alone does the same."""
    dead = 9
    ended = launch.run(
        RANKS, PROGRAM, dead, settings={"HOPCOLL_TRACE": str(tmp_path)}, timeout_s=200
    )
    assert ended.code == 0, str(ended)
    living = [rank for rank in range(RANKS) if rank != dead]
    said = {line["rank"]: line for line in ended.said}
    assert sorted(said) == living, str(ended)
    assert all(line["right"] for line in said.values()), str(ended)
    assert len({str(line["contributors"]) for line in said.values()}) == 1, str(ended)
    assert said[0]["contributors"][0] == list(range(RANKS))
    assert said[0]["contributors"][2] == living
    (found,) = replay(tmp_path)
    assert found.wrong == []
