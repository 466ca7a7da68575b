"""A store of real ranks that die by SIGKILL in the middle of a save, and jobs that go on from
it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import launch

PROGRAM = "benchmarks.ckpt_chaos_job"
PLAN = {"loss": "rank", "all": False, "at": 1, "after": 2, "steps": 4, "every": 1, "victim": -1}


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


def job(root: Path, hosts: list[str], **plan) -> list[dict]:
    """Run one; what its ranks said."""
    (root / "pids").mkdir(exist_ok=True)
    (root / "fired").unlink(missing_ok=True)
    given = {**PLAN, "sabotage": "", "root": str(root), "hosts": hosts, **plan}
    (root / "plan.json").write_text(json.dumps(given))
    ended = launch.run(len(hosts), "-m", PROGRAM, root / "plan.json")
    said = ended.said
    assert all(one.get("right", True) for one in said), str(ended)
    assert len({str(one["restored"]) for one in said}) <= 1, str(ended)
    assert (root / "fired").exists() == (given["victim"] >= 0), str(ended)
    return said


def acknowledged(root: Path) -> int:
    return max(map(int, (root / "acknowledged").read_text().split()))


@pytest.mark.parametrize(
    ("victim", "point"),
    [
        pytest.param(2, ["before", "fsync", "shared/shards"], id="writer, no shard"),
        pytest.param(2, ["after", "close", "shared/shards"], id="writer, shard"),
        pytest.param(0, ["before", "link", "shared/slots"], id="committer, no slot"),
        pytest.param(0, ["after", "link", "shared/slots"], id="committer, slot"),
    ],
)
def test_the_others_go_on_and_the_next_job_has_what_they_saved(root, victim, point):
    said = job(root, ["h0", "h0", "h1", "h1"], victim=victim, at=point)
    assert sorted(one["rank"] for one in said) == [rank for rank in range(4) if rank != victim]
    # Step 3 is safe on the hosts, also where its piece never came to the shared level. Whether the
    # state of step 4 was cut before the death or after it is a race.
    assert said[0]["restored"] in ([None], [None, 3])
    assert acknowledged(root) == 5
    said = job(root, ["h0", "h1", "h2"], steps=0)
    assert [one["restored"] for one in said] == [[5]] * 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_whole_job_dies_at_its_commit(root, when):
    point = [when, "link", "shared/slots"]
    assert job(root, ["h0", "h1"], victim=0, at=point, all=True) == []
    before = acknowledged(root)
    said = job(root, ["h0", "h1", "h2"], steps=0)
    assert {one["restored"][0] for one in said} == {3} and before == 2


def test_a_host_is_lost_with_its_directories_in_the_middle_of_a_commit(root):
    point = ["before", "link", "h0/fast/slots"]
    said = job(root, ["h0", "h0", "h1", "h2"], victim=0, loss="host", at=point, all=True, every=9)
    assert said == [] and not (root / "h0").exists()
    said = job(root, ["h1", "h2", "h3"], steps=1)
    assert len({one["restored"][0] for one in said}) == 1
    assert said[0]["restored"][0] >= 2 > acknowledged(root) - 9
