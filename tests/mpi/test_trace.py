"""What real ranks write down is what the protocol does without MPI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hopcoll.replay import replay
from tests import launch

PROGRAM = Path(__file__).with_name("programs") / "traced.py"
ASKED = PROGRAM.with_name("asked.py")
#: How a trace has a question of rank 0's, where somebody is: an event (2), which is a message (1),
#: from rank 0, without a token, of 72 bytes, and the first of these (MSG_ASK).
QUESTION = bytes([2, 1, 0, 0, 72, 40])


def trace(folder: Path, dead: int, **settings: str) -> launch.Ended:
    return launch.run(4, PROGRAM, dead, settings={"HOPCOLL_TRACE": str(folder), **settings})


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Of a job of four ranks that lost rank 1."""
    folder = tmp_path_factory.mktemp("traces")
    assert trace(folder, 1).code == 0
    return folder


def hopcoll(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hopcoll.cli", *map(str, words)],
        cwd=launch.ROOT,
        env=launch.environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_living_and_the_dead_did_what_the_protocol_does(traces):
    (found,) = replay(traces)
    assert found.wrong == []
    assert found.size == len(found.ranks) == 4
    assert [found.ranks[rank]["dead"] for rank in range(4)] == [(1,), (), (1,), (1,)]
    assert [found.ranks[rank]["epoch"] for rank in range(4)] == [1, 0, 1, 1]
    # Five calls a turn beside the one in the half, and two of the split.
    assert [found.ranks[rank]["complete"] for rank in (0, 2, 3)] == [42] * 3
    assert found.ranks[1]["operations"] == 2 + 4 * 5 + 1
    assert found.ranks[0]["counters"]["ballots"] > 0


def test_the_command(traces, tmp_path):
    ended = hopcoll("replay", traces, "--json", tmp_path / "out.json")
    assert ended.returncode == 0, ended.stderr
    assert "rank 0:" in ended.stdout
    assert "saw die 1" in ended.stdout
    assert "all did what the protocol does, and agree" in ended.stdout
    (one,) = json.loads((tmp_path / "out.json").read_text())
    assert one["wrong"] == []


@pytest.mark.parametrize("rule", ["voids", "ballot"])
def test_another_protocol_would_have_done_something_else(traces, rule):
    (found,) = replay(traces, [rule])
    assert found.wrong
    assert "the trace has" in found.wrong[0]
    ended = hopcoll("replay", traces, "--sabotage", rule)
    assert ended.returncode == 1
    assert "WRONG" in ended.stdout


def test_ranks_that_tell_different_stories(traces, tmp_path):
    """The trace of one rank is from another job: each is right in itself."""
    other = tmp_path / "other"
    assert trace(other, 2).code == 0
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for rank in range(4):
        source = (other if rank == 3 else traces) / f"rank-{rank}.trace"
        (mixed / source.name).write_bytes(source.read_bytes())
    (found,) = replay(mixed)
    assert found.wrong


@pytest.mark.parametrize("place", [8, 50, 400, 5000, 20_000])
def test_a_damaged_file_is_refused(traces, tmp_path, place):
    content = bytearray((traces / "rank-0.trace").read_bytes())
    content[place] ^= 0x55
    (tmp_path / "rank-0.trace").write_bytes(content)
    with pytest.raises(ValueError, match=r"rank-0\.trace: (damaged|written by another build)"):
        replay(tmp_path)
    assert hopcoll("replay", tmp_path).returncode == 2


def test_a_full_file_ends_and_the_job_goes_on(tmp_path):
    ended = trace(tmp_path, 1, HOPCOLL_TRACE_BYTES="65536")
    assert ended.code == 0, ended
    assert ended.stdout.count("is at its end") == 3
    (found,) = replay(tmp_path)
    assert found.wrong == []
    assert any(one["full"] for one in found.ranks.values())
    assert all(path.stat().st_size <= 65536 for path in tmp_path.iterdir())


@pytest.mark.parametrize("how", ["starting", "inline"])
def test_a_rank_is_asked_while_nobody_looks_out_there(tmp_path, how):
    settings = {"HOPCOLL_TRACE": str(tmp_path / "traces"), "HOPCOLL_DETECT_S": "6"}
    ended = launch.run(3, ASKED, how, tmp_path, settings=settings)
    assert ended.code == 0, ended
    assert ended.stdout.count("has [3.0, 3.0, 3.0]") == 3
    early = tmp_path if how == "starting" else tmp_path / "traces"
    assert QUESTION in (early / "rank-2.trace").read_bytes()
    (found,) = replay(tmp_path / "traces")
    assert found.wrong == []
    assert len(found.ranks) == 3


def test_nothing_is_written_over(traces):
    before = (traces / "rank-0.trace").read_bytes()
    ended = trace(traces, 1, HOPCOLL_CONNECT_TIMEOUT_S="5")
    assert ended.code != 0
    assert "FileExistsError" in ended.stderr
    assert (traces / "rank-0.trace").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no trace", bytes(4096)])
def test_what_is_no_trace_is_refused(tmp_path, content):
    (tmp_path / "rank-0.trace").write_bytes(content)
    with pytest.raises(ValueError, match="this is no trace of a rank"):
        replay(tmp_path)


def test_a_folder_without_traces(tmp_path):
    with pytest.raises(FileNotFoundError, match="no traces"):
        replay(tmp_path)
    ended = hopcoll("replay", tmp_path)
    assert ended.returncode == 2
    assert "no traces" in ended.stderr
