"""The soak: what it draws, counts, and how it ends."""

from __future__ import annotations

import collections
import json

from click.testing import CliRunner

from hopcoll import simulate, soak
from hopcoll._simulation import simulate as simulate_one


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
    """One of 45,000 worlds of few ranks, in which two groups went on beside each other."""

    def run(*sabotage):
        return simulate_one(
            5,
            [("allreduce", 1, 0, 0)] * 2,
            45555,
            deaths=0,
            detect_us=1_000_000,
            disturb_every=40,
            hosts=range(5),
            sabotage=sabotage,
        )["violation"]

    assert run() is None
    assert run("chain") == "two groups went on without each other"


def test_what_the_soak_found():
    """Each was a violation once: trees of two decisions of one epoch, a root that left, an interior
    rank that was taken for a leaf, one that was left out and gone before another of its host had
    what it was asked for."""
    for seed in (1809, 3999, 6632, 7976, 23213, 35245, 43617):
        assert simulate.run(seed, **soak.case_of(seed))["violation"] is None, seed


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
