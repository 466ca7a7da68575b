"""The pure parts of `benchmarks.lab.peers`: what is called, what is left out, table and inputs."""

import importlib.util
import threading

import click
import numpy as np
import pytest

from benchmarks.lab import peers
from benchmarks.lab.peers_job import Case, Meeting, Plan, is_right, make_input

KIB, MIB = 1 << 10, 1 << 20


def test_names_of_systems():
    assert peers.peers_of(None, None, "ray, mpi,ray") == ["ray", "mpi"]
    with pytest.raises(click.BadParameter, match="'dask' is none of objects, "):
        peers.peers_of(None, None, "mpi,dask")


def test_ranks_come_one_by_one_where_a_step_can_be_slept():
    cases = peers.cases_of(8, "992mbit", [MIB, KIB])
    assert [case.operation for case in cases if case.nbytes == KIB] == list(peers.OPERATIONS)
    steps = {case.operation: case.step_s for case in cases if case.step_s}
    assert steps.keys() == {"bcast", "reduce", "allreduce"}
    assert steps["bcast"] == pytest.approx(2 * steps["reduce"])
    assert [case.nbytes for case in cases] == sorted(case.nbytes for case in cases)
    assert len({case.key for case in cases}) == len(cases)


def test_what_is_not_there_is_left_out_with_a_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    left = peers.left_out(list(peers.SYSTEMS), 8)
    assert left == {"gloo": "Gloo (pip install torch)", "ray": "Ray (pip install ray)"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert list(peers.left_out(list(peers.SYSTEMS), 16)) == ["ray"]


def test_the_table_has_what_was_measured():
    rows = [
        {"operation": operation, "step_s": step_s, "nbytes": nbytes, "bound_s": nbytes / 1e8}
        for operation, step_s, nbytes in [
            ("gather", 0.0, KIB),
            ("bcast", 0.0, KIB),
            ("bcast", 0.1, MIB),
            ("bcast", 0.0, MIB),
        ]
    ]
    for row in rows:
        row["times_s"] = {"mpi": [[row["bound_s"]], [2 * row["bound_s"], 3 * row["bound_s"]]]}
    report = {
        "hosts": 8,
        "rate": "1gbit",
        "turns": 2,
        "systems": {"objects": "hopcoll objects", "mpi": "mpi4py"},
        "left_out": ["Ray (pip install ray)"],
        "failed": ["hopcoll objects: a job hung\nand more"],
        "rows": rows,
        "machine": {"cpu": "a cpu", "cores": 2, "busy": [0.0, 0.1]},
    }
    lines = peers.table(report).splitlines()
    assert lines[2:6] == [
        "| bcast | 1 KiB | 0.0102 |  | 0.0205 |",
        "| bcast | 1 MiB | 10.5 |  | 21 (2.00) |",
        "| gather | 1 KiB | 0.0102 |  | 0.0205 |",
        "| bcast, staggered | 1 MiB | 10.5 |  | 21 (2.00) |",
    ]
    assert lines[-2:] == ["left out: Ray (pip install ray)", "failed: hopcoll objects: a job hung"]


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = Plan("here", 8, "10.0.0.1", (Case("bcast", KIB, 5), Case("reduce", MIB, 1, 0.25)))
    plan.write(tmp_path / "plan")
    assert Plan.read(tmp_path / "plan") == plan


@pytest.mark.parametrize("nbytes", [4, KIB, MIB + 4])
def test_results_are_compared_with_what_they_must_be(nbytes):
    inputs = [make_input(nbytes, rank) for rank in range(3)]
    total = np.sum(inputs, axis=0)
    assert is_right("bcast", inputs[0], 3)
    assert is_right("gather", inputs[2], 3, 2)
    assert is_right("allreduce", total, 3)
    total[-1] += 1
    assert not is_right("reduce", total, 3)
    assert not is_right("gather", inputs[2], 3, 1)


def test_ranks_that_meet_tell_each_other_numbers(tmp_path):
    told = {}

    def meet(rank):
        meeting = Meeting(tmp_path, rank, 3, lambda: None)
        told[rank] = [meeting.all(10 * turn + rank) for turn in range(20)]

    ranks = [threading.Thread(target=meet, args=[rank]) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    every = [[10.0 * turn, 10.0 * turn + 1, 10.0 * turn + 2] for turn in range(20)]
    assert told == {rank: every for rank in range(3)}
