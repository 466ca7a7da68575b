"""Every state that a power cut may leave of a checkpoint store: the old state or the new one.

More states, and a kill at every single call: ``python -m tests.crash.store_runs``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from recovery import CheckpointStore
from recovery import log as store_log
from tests.crash.store_runs import RUNS, Campaign, scratch_folder
from tests.powercut import Killed, RecordingDisk, Violation, cuts


@pytest.fixture(scope="module")
def campaign() -> Iterator[Campaign]:
    """One for all tests, so that a state which two of them come to is looked at once."""
    with scratch_folder() as folder:
        yield Campaign(folder, randoms=2)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("sync", {None, 1, 2, 3, 4}),
        ("below_missing_folders", {None, 1, 2, 3, 4}),
        ("asynchronous", {None, 1, 2, 3, 4}),
        ("pruned", {None, 1, 2, 3, 4}),
        ("pruned_from_outside", {None, 1, 2, 3, 4}),
        ("gone_back", {None, 1, 2, 3, 7}),
        ("four_writers", {None, 1, 2, 3}),
    ],
)
def test_a_power_cut_leaves_the_old_state_or_the_new_one(
    campaign: Campaign, name: str, found: set[int | None]
) -> None:
    assert campaign.cut(name) == found


def kill(campaign: Campaign) -> None:
    """Kill a process whose last name is not synced: its successor sees it, the disk may not have
    it. Of folders above the store and in it, of the first commit, of a prune."""
    lives = campaign.calls_that_name("below_missing_folders")
    for count in lives[:8]:
        assert campaign.kill_and_cut("below_missing_folders", count)
    lives = campaign.calls_that_name("pruned")
    assert len(lives) == 12
    for count in (lives[7], lives[10]):
        assert campaign.kill_and_cut("pruned", count)


def test_a_successor_of_a_killed_process_loses_the_power(campaign: Campaign) -> None:
    kill(campaign)


def test_the_power_is_cut_again_while_a_successor_takes_over(campaign: Campaign) -> None:
    assert campaign.cut_and_cut("four_writers", 5) == 5


def test_each_fsync_of_the_program_is_needed(campaign: Campaign) -> None:
    """Each place where an fsync stands, taken out, lets a state of some run fail."""
    for name in RUNS:
        campaign.cut(name)
    kill(campaign)  # after the tests above, all these states are known
    assert {site.split()[0] for site in campaign.sites} == {"level.py", "log.py", "shards.py"}
    assert campaign.sites - campaign.needed == set()


@pytest.mark.parametrize(
    ("name", "count"), [("sync", 16), ("asynchronous", 16), ("pruned", 18), ("gone_back", 16)]
)
def test_each_single_fsync_is_needed(campaign: Campaign, name: str, count: int) -> None:
    """Four a save, two a prune. Not so of writers at once, where one may do it for the others."""
    found = campaign.single_syncs(name)
    assert found[False] == []
    assert len(found[True]) == count


def test_a_slot_that_is_adopted_unsynced_is_found(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The looks are awake: a store that builds on what only the page cache has is caught."""
    synced = property(lambda _: 1 << 60, lambda *_: None)
    monkeypatch.setattr(store_log.Log, "_durable", synced, raising=False)
    with pytest.raises(Violation, match=r"slots/0000000002.json is missing"):
        for count in campaign.calls_that_name("pruned"):
            campaign.kill_and_cut("pruned", count)


def test_a_reader_calls_nothing_durable(campaign: Campaign) -> None:
    """It reads a commit whose owner was killed before the name was synced; a cut may take it."""
    count = campaign.calls_that_name("sync")[7]
    with campaign.log() as log:
        with pytest.raises(Killed):
            RUNS["sync"](log, RecordingDisk(log, lives_for=count))
        with CheckpointStore(log.root / "store", readonly=True) as store:
            assert store.restore().step == 1
            assert store.durable_step is None
        left = {campaign.examiner.found(cut.state) for cut in cuts(log, first=len(log.calls))}
    assert left == {None, 1}


def test_the_runs_refer_to_older_shards(campaign: Campaign) -> None:
    """Else the states above would say nothing of what saves share."""
    with campaign.log() as log:
        RUNS["sync"](log, RecordingDisk(log))
        nbytes = [path.stat().st_size for path in sorted((log.root / "store/shards").iterdir())]
    assert len(nbytes) == 3 and nbytes[0] > 2 * nbytes[1]
