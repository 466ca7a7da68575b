"""A workflow's journal: power cuts and SIGKILL at every call; owners that are stopped and woken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from recovery import segments
from recovery.disk import Disk
from recovery.journal import Journal
from tests import launch
from tests.crash.journal_runs import RUNS, Campaign, allowed, look, tags_of
from tests.crash.store_runs import scratch_folder
from tests.powercut import Violation

CHILD = Path(__file__).with_name("journal_child.py")


@pytest.fixture(scope="module")
def campaign() -> Iterator[Campaign]:
    """One for all tests, so that a state which two of them come to is looked at once."""
    with scratch_folder("hopcoll-journal-") as folder:
        yield Campaign(folder)


@pytest.fixture
def memory() -> Iterator[Path]:
    with scratch_folder("hopcoll-journal-") as folder:
        yield folder


@pytest.mark.parametrize("name", RUNS)
def test_a_power_cut_leaves_all_that_was_reported(campaign: Campaign, name: str) -> None:
    campaign.cut(name)


@pytest.mark.parametrize(
    ("name", "calls"),
    [("plain", 23), ("one_after_the_other", 48), ("compacted", 44), ("woken", 14)],
)
def test_a_successor_of_a_killed_owner_loses_the_power(
    campaign: Campaign, name: str, calls: int
) -> None:
    """At every call of the owner, and at every call of the successor."""
    kills = 0
    while campaign.kill_and_cut(name, kills):
        kills += 1
    assert kills == calls


@pytest.mark.parametrize("name", RUNS)
def test_the_power_is_cut_again_while_a_successor_takes_over(campaign: Campaign, name: str) -> None:
    campaign.cut_and_cut(name, 15)


def test_each_fsync_of_the_program_is_needed(campaign: Campaign) -> None:
    for name in RUNS:
        campaign.cut(name)
    assert {site.split(":")[0] for site in campaign.sites} == {
        *("journal.py _prepare", "journal.py _take", "journal.py put"),
    }
    assert len(campaign.sites) == 4
    assert campaign.sites - campaign.needed == set()


def test_a_successor_that_counts_what_only_the_page_cache_has_is_found(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The looks are awake: the last group of a killed owner has to be carried, not counted."""
    read = segments._read_segment

    def trusting(folder: Path, number: int, limit: int | None = None) -> segments._Segment:
        found = read(folder, number, limit)
        data = segments.path_of(folder, number).read_bytes()
        end = limit or len(data.rstrip(b"\0"))
        return replace(found, last_index=len(found.records), last_offset=end)

    monkeypatch.setattr(segments, "_read_segment", trusting)
    with pytest.raises(Violation, match="is corrupt at byte"):
        for lives in range(48):
            campaign.kill_and_cut("one_after_the_other", lives)


def test_old_segments_that_are_removed_too_early_are_found(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Journal._take

    def hasty(self: Journal, number: int) -> object:
        own = take(self, number)
        if self._own is not None:
            self._remove(range(1, number))
        return own

    monkeypatch.setattr(Journal, "_take", hasty)
    with pytest.raises(Violation):
        campaign.cut("compacted")


def test_killed_at_every_call(memory: Path) -> None:
    subprocess.run(
        [sys.executable, str(CHILD), str(memory)], check=True, timeout=120, env=launch.environment()
    )
    folders = sorted(memory.iterdir(), key=lambda folder: int(folder.name))
    assert not (folders[-1] / "killed").exists()
    calls = [(folder / "killed").read_text() for folder in folders[:-1]]
    assert {"create", "write", "fsync", "fdatasync", "link", "fsync_folder", "unlink"} <= set(calls)
    for folder in folders:
        lines = (folder / "notes").read_text().splitlines()
        notes = [(kind, tuple(tags)) for kind, tags in map(json.loads, lines)]
        assert look(folder) in allowed(notes), folder


STOPPED = """
import json, os, signal, sys, threading
from pathlib import Path
from hopcoll.errors import WorkflowFencedError
from recovery.journal import Journal
from tests.crash.journal_runs import body_of
from tests.store_faults import CountingDisk

class Stopping(CountingDisk):
    left = None
    def _before(self, k, name, arguments):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

for line in sys.stdin:
    path, calls = json.loads(line)
    disk = Stopping()
    journal = Journal(Path(path), disk, {"is": "stopped"})
    reported = []
    try:
        journal.open()
        disk.left = calls
        for tag in range(1, 100):
            journal.append("tag", {"tag": tag}, body_of(tag))
            journal.flush()
            reported.append(tag)
            if tag % 4 == 0:
                journal.compact([("tag", {"tag": one}, body_of(one)) for one in reported])
    except WorkflowFencedError:
        print(json.dumps(reported), flush=True)
    else:
        print("not fenced", flush=True)
"""


def test_a_stopped_owner_wakes_up_after_it_was_succeeded(memory: Path) -> None:
    """Stopped before each of the calls of four flushes and a compaction, and woken after its
    successor has worked, and compacted or not."""
    child = subprocess.Popen(
        [sys.executable, "-c", STOPPED],
        env=launch.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        for turn in range(40):
            path = memory / str(turn)
            child.stdin.write(json.dumps([str(path), turn // 2 + 1]) + "\n")
            child.stdin.flush()
            _, status = os.waitpid(child.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            successor = Journal(path, Disk(), {"is": "the successor"})
            found = successor.open()
            successor.append("by the successor", {})
            successor.flush()
            if turn % 2:
                successor.compact([*found, ("by the successor", {}, b"")])
            os.kill(child.pid, signal.SIGCONT)
            reported = json.loads(child.stdout.readline())
            assert list(tags_of(found))[: len(reported)] == reported
            assert len(found) - len(reported) in (0, 1)
            successor.append("by the successor", {})
            successor.close()
            records = Journal.read(path).records
            assert [one.kind for one in records[len(found) :]] == ["by the successor"] * 2
            assert tags_of(records[: len(found)]) == tags_of(found)
    finally:
        child.kill()
        child.communicate()


RIVAL = """
import json, sys
from pathlib import Path
from hopcoll.errors import WorkflowFencedError
from recovery.disk import Disk
from recovery.journal import Journal

for line in sys.stdin:
    journal = Journal(Path(line.strip()), Disk(), {"is": "a rival"})
    reported = []
    try:
        journal.open()
        for at in range(30):
            head = {"by": int(sys.argv[1]), "at": at}
            journal.append("rival", head)
            journal.flush()
            reported.append(head)
            if at == 20:
                mine = journal.read(Path(line.strip())).records
                journal.compact(mine)
    except WorkflowFencedError:
        pass
    print(json.dumps(reported), flush=True)
"""


def test_three_take_over_at_once(memory: Path) -> None:
    """All that anyone was told to be durable counts, whoever is fenced."""
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, str(number)],
            env=launch.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    fenced = 0
    try:
        for turn in range(40):
            path = memory / str(turn)
            for rival in rivals:
                assert rival.stdin is not None
                rival.stdin.write(f"{path}\n")
                rival.stdin.flush()
            answers = [json.loads(rival.stdout.readline()) for rival in rivals if rival.stdout]
            heads = [record.head for record in Journal.read(path).records]
            for reported in answers:
                assert [head for head in heads if head in reported] == reported
            assert all(heads.count(head) == 1 for head in heads)
            fenced += sum(len(reported) < 30 for reported in answers)
    finally:
        for rival in rivals:
            rival.kill()
            rival.communicate()
    assert fenced >= 40
