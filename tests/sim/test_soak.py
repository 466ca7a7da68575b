"""The soak: what it draws, counts, and how it ends."""

from __future__ import annotations

import collections
import json

from click.testing import CliRunner

from hopcoll import simulate, soak


def test_the_mix():
    """Of a hundred thousand: 10,000 with 16 ranks or more, 1,000 with 48 or more, every kind."""
    cases = [soak.case_of(seed) for seed in range(100_000)]
    sizes = [case["size"] for case in cases]
    assert min(sizes) == 2
    assert max(sizes) == 64
    assert sum(size >= 16 for size in sizes) >= 10_000
    assert sum(size >= 48 for size in sizes) >= 1_000
    modes = collections.Counter(case["mode"] for case in cases)
    assert set(modes) == set(soak.MODES)
    assert min(modes.values()) >= 20_000
    kinds = {case["last"][0] for case in cases}
    assert len(kinds) == 10  # of all that have data


def test_a_short_soak(tmp_path):
    path = tmp_path / "soak.json"
    words = ["--count", "600", "--json", str(path), "--branches-min", "100", "--workers", "2"]
    done = CliRunner().invoke(soak.command, words)
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert report["worlds"] == 600
    assert report["violations"] == []
    assert set(report["branches"]) == set(soak.BRANCHES)
    assert sum(report["died"].values()) == sum(report["modes"].values()) == 600
    assert report["died"]["all but one"] > 0


def test_a_membership_that_was_only_proposed_elects_nobody():
    """The soak found this world of 53 ranks, in which two groups went on beside each other."""
    case = soak.case_of(99598)
    assert simulate.run(99598, **case)["violation"] is None
    broken = simulate.run(99598, sabotage=("chain",), **case)
    assert broken["violation"] == "two groups went on without each other"


def test_a_violation_names_the_command_that_shows_it(tmp_path):
    path = tmp_path / "soak.json"
    words = ["--count", "200", "--json", str(path), "--sabotage", "voids", "--workers", "1"]
    done = CliRunner().invoke(soak.command, words)
    assert done.exit_code == 1
    first = json.loads(path.read_text())["violations"][0]
    again = first["replay"].split()[2:]
    done = CliRunner().invoke(soak.command, [*again, "--sabotage", "voids"])
    assert done.exit_code == 1
    assert first["violation"] in done.output


def test_a_branch_that_was_not_reached_fails():
    done = CliRunner().invoke(soak.command, ["--count", "10", "--branches-min", "1000000000"])
    assert done.exit_code == 1
    assert "was reached fewer than" in done.output


def test_a_wrong_folder_is_said_before_anything_runs(tmp_path):
    words = ["--count", "10", "--json", str(tmp_path / "no" / "soak.json")]
    done = CliRunner().invoke(soak.command, words)
    assert done.exit_code == 2
    assert "is no folder" in done.output
