"""The pure parts of `benchmarks.lab.peers`: what is called, how often, what is left, the table."""

import importlib.util
import json
import threading

import click
import numpy as np
import pytest

from benchmarks import inline
from benchmarks.lab import jobs, peers
from benchmarks.lab.network import LabError
from benchmarks.lab.object_reduces import BENCHMARK as REDUCES
from benchmarks.lab.objects import BENCHMARK as BROADCASTS
from benchmarks.lab.peers_job import (
    BATCH_S,
    CALLS_MAX,
    OPERATIONS,
    Case,
    Meeting,
    Plan,
    check,
    make_input,
    measure,
    next_count,
    note,
)

KIB, MIB = 1 << 10, 1 << 20
MACHINE = {"cpu": "a cpu", "cores": 2, "busy": [0.0, 0.1]}


def test_names_of_systems():
    assert peers.peers_of(None, None, "ray, mpi,ray") == ["ray", "mpi"]
    with pytest.raises(click.BadParameter, match="'dask' is none of objects, "):
        peers.peers_of(None, None, "mpi,dask")


# ---- what is called -------------------------------------------------------------------------


def test_ranks_come_one_by_one_where_a_step_can_be_slept():
    cases = peers.cases_of(8, "992mbit", [MIB, KIB, KIB])
    assert [case.operation for case in cases if case.nbytes == KIB] == list(OPERATIONS)
    steps = {case.operation: case.step_s for case in cases if case.step_s}
    assert steps.keys() == {"bcast", "reduce", "allreduce"}
    assert steps["bcast"] == pytest.approx(2 * steps["reduce"])
    assert [case.nbytes for case in cases] == sorted(case.nbytes for case in cases)
    assert len({case.key for case in cases}) == len(cases)


def test_short_calls_are_timed_in_batches_and_long_ones_alone():
    cases = peers.cases_of(8, "1gbit", [KIB, MIB, 32 * MIB])
    together = [case for case in cases if not case.step_s]
    assert {case.nbytes for case in together if case.is_batch} == {KIB, MIB}
    assert not any(case.is_batch for case in cases if case.step_s)
    assert all(case.batches > 1 for case in cases if case.nbytes < 32 * MIB)
    assert all(case.batches == 1 for case in cases if case.nbytes == 32 * MIB)


def test_long_cases_are_measured_in_fewer_jobs():
    assert [peers.turns_of(least_s, 3) for least_s in (1e-5, 0.3, 0.7, 1.2, 9.0)] == [3, 3, 2, 1, 1]
    assert peers.turns_of(1e-5, 1) == 1


@pytest.mark.parametrize("call_s", [1e-6, 3e-5, 1e-3, 0.02, 0.049, 0.05, 7.0])
@pytest.mark.parametrize("nbytes", [4, KIB, MIB, 256 * MIB])
def test_a_batch_grows_until_it_takes_long_enough(call_s, nbytes):
    count, tries = 1, 0
    while (more := next_count(count, count * call_s, nbytes)) != count:
        assert more > count
        count, tries = more, tries + 1
    most = max(1, min(CALLS_MAX, 64 * MIB // nbytes))
    assert count == most or (count <= most and count * call_s >= BATCH_S)
    assert tries <= 3


def test_no_time_at_all_is_no_batch_without_end():
    assert next_count(1, 0.0, KIB) == CALLS_MAX


def test_the_batch_that_finds_the_count_is_not_a_figure():
    made = []

    def batch(case, count):
        made.append(count)
        return 0.01 * count

    run = measure(Case("bcast", KIB, 3, True), batch)
    assert made == [1, 7, 7, 7, 7]
    assert run == {"calls": 7, "seconds": [pytest.approx(0.01)] * 3}
    made.clear()
    slow = iter([0.2, 0.03, 0.06, 0.03])  # the first was disturbed, and the fourth is too short
    run = measure(Case("bcast", KIB, 2, True), lambda _, count: next(slow, 0.01 * count))
    assert run == {"calls": 7, "seconds": [pytest.approx(0.01)] * 2}
    assert measure(Case("bcast", 256 * MIB), batch) == {"calls": 1, "seconds": [0.01]}
    assert made == [1]


# ---- what is left ---------------------------------------------------------------------------


def test_what_is_not_there_is_left_out_with_a_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    left = peers.left_out(list(peers.SYSTEMS), 8)
    assert left == {"gloo": "Gloo (pip install torch)", "ray": "Ray (pip install ray)"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert list(peers.left_out(list(peers.SYSTEMS), 16)) == ["ray"]


def opened(path, hosts=8, rate="1gbit", labels=None):
    return peers.opened(path, hosts, rate, labels or {"mpi": "mpi4py"}, [])


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(jobs, "busy_share", lambda: 0.0)


@pytest.fixture
def started(tmp_path, no_wait):
    """A report with rows, and what follows a job of one of its systems."""
    path = tmp_path / "F.json"
    report = opened(path)
    cases = peers.cases_of(8, "1gbit", [KIB])
    rows = [peers.row_of(report, case, 8) for case in cases]
    plan = Plan(str(tmp_path), 8, "10.0.0.1", tuple(cases))
    return report, rows, plan, peers.Notes(report, rows, cases, "mpi", 8, 60.0, path)


RUN = {"calls": 100, "seconds": [1e-3, 2e-3, 3e-3]}


def test_each_cell_is_written_when_it_is_there_and_the_next_call_goes_on(started, tmp_path):
    report, rows, plan, notes = started
    bcast, gather, *_ = plan.cases
    note(plan, bcast)
    note(plan, bcast, RUN)
    note(plan, gather)
    with plan.notes.open("a") as file:
        file.write('{"key": "gath')  # it is being written
    notes.look(plan.notes)
    assert notes.begun == gather.key
    again = opened(tmp_path / "F.json", labels={"objects": "hopcoll objects"})
    assert again["rows"] == report["rows"]
    assert list(again["systems"]) == ["objects", "mpi"]
    for name, left in (("mpi", plan.cases[1:]), ("objects", plan.cases)):
        rows = [peers.row_of(again, case, 8) for case in plan.cases]
        assert peers.todo(rows, plan.cases, name, 0, 3) == list(left)
    assert peers.todo(rows, plan.cases, "mpi", 1, 3) == list(plan.cases)
    assert peers.todo(rows, plan.cases, "mpi", 1, 1) == list(plan.cases[1:])


def test_other_sizes_join_the_rows_that_are_there(no_wait):
    report = opened(None)
    row = peers.row_of(report, Case("bcast", KIB), 8)
    assert peers.row_of(report, Case("bcast", KIB, 3, True), 8) is row
    assert peers.row_of(report, Case("bcast", KIB, step_s=1.0), 8) is not row
    assert peers.row_of(report, Case("bcast", MIB), 8) is not row
    assert len(report["rows"]) == 3


def test_a_cell_over_the_limit_is_not_tried_again(started):
    report, rows, plan, notes = started
    note(plan, plan.cases[0])
    notes.look(plan.notes)
    notes.since_s -= 61
    with pytest.raises(peers._OverLimit):
        notes.look(plan.notes)
    assert rows[0]["cells"]["mpi"] == {"runs": [], "over_s": 60.0}
    assert peers.todo(rows, plan.cases, "mpi", 0, 3) == list(plan.cases[1:])
    assert "| >60000 |" in peers.table(report)


def test_who_comes_last_has_more_time(started):
    report, _, _, _ = started
    case = Case("bcast", 32 * MIB, step_s=0.25)
    notes = peers.Notes(report, [peers.row_of(report, case, 8)], [case], "mpi", 8, 60.0, None)
    assert notes.limits_s == {case.key: 60 + 7 * 0.25}


def test_a_job_that_does_not_begin_has_a_limit_too(started, tmp_path):
    _, _, _, notes = started
    notes.since_s -= 1000
    with pytest.raises(LabError, match="hung for .* outside of any cell"):
        notes.look(tmp_path / "nothing")


def test_a_cell_that_failed_is_tried_again(started, tmp_path):
    report, rows, plan, notes = started
    case = plan.cases[0]
    notes.fail([case.key], "a job ended with code 1\nand more")
    assert peers.todo(rows, plan.cases, "mpi", 0, 1) == list(plan.cases)
    lines = peers.table(report).splitlines()
    assert "| failed |" in lines[2]
    assert lines[-1] == f"failed: mpi4py, {case.key}: a job ended with code 1"
    note(plan, case, RUN)
    notes.look(plan.notes)
    assert "failed" not in rows[0]["cells"]["mpi"]


def test_a_report_of_other_hosts_is_not_written_over(started, tmp_path):
    path = tmp_path / "F.json"
    jobs.write(started[0], path)
    with pytest.raises(LabError, match="is of 8 hosts at 1gbit, not of 4 at 1gbit; take another"):
        opened(path, hosts=4)
    for text in ("{", "[]", "{}", json.dumps({**started[0], "rows": [{}]})):
        path.write_text(text)
        with pytest.raises(LabError, match="is no report of this benchmark"):
            opened(path)


def test_memory_has_to_suffice():
    peers.check_memory(8, 256 * MIB, 11 << 30)
    with pytest.raises(LabError, match="sizes: 8 hosts with 256 MiB each need 10.0 GiB"):
        peers.check_memory(8, 256 * MIB, 9 << 30)


def test_the_forecast_counts_what_is_left():
    cases = peers.cases_of(8, "1gbit", [KIB, 256 * MIB])
    rows = [{"bound_s": case.nbytes / 124e6, "cells": {}} for case in cases]
    all_s = peers.forecast_s("mpi", 8, cases, rows, cases)
    assert peers.forecast_s("objects", 8, cases, rows, cases) < all_s
    assert peers.forecast_s("ray", 8, cases, rows, cases) > all_s
    small = [case for case in cases if case.nbytes == KIB]
    small_s = peers.forecast_s("mpi", 8, small, rows, cases)
    assert 0 < small_s < 30 < all_s


# ---- the table ------------------------------------------------------------------------------


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
        least_s = row["bound_s"]
        first = {"calls": 9, "seconds": [least_s]}
        second = {"calls": 12, "seconds": [2 * least_s, 3 * least_s]}
        row["cells"] = {"mpi": {"runs": [first, second]}}
    report = {
        "hosts": 8,
        "rate": "1gbit",
        "systems": {"objects": "hopcoll objects", "mpi": "mpi4py"},
        "left_out": ["Ray (pip install ray)"],
        "rows": rows,
        "machine": MACHINE,
    }
    lines = peers.table(report).splitlines()
    assert lines[2:6] == [
        "| bcast | 1 KiB | 0.0102 |  | 0.0205 | 3 x 9-12 |",
        "| bcast | 1 MiB | 10.5 |  | 21 (2.00) | 3 x 9-12 |",
        "| gather | 1 KiB | 0.0102 |  | 0.0205 | 3 x 9-12 |",
        "| bcast, staggered | 1 MiB | 10.5 |  | 21 (2.00) | 3 x 9-12 |",
    ]
    assert "which other work kept 0 to 10 % busy" in lines[-2]
    assert lines[-1] == "left out: Ray (pip install ray)"


def test_the_tables_of_objects():
    row = {
        "nbytes": MIB,
        "bound_s": 0.01,
        "together": [0.01, 0.02, 0.03],
        "one by one": [0.01],
        "killed": [{"usual_s": 0.02, "time_s": 0.03}, {"usual_s": 0.02, "time_s": 0.02}],
    }
    report = {"hosts": 8, "rate": "1gbit", "turns": 3, "rows": [row], "machine": MACHINE}
    lines = BROADCASTS.table(report).splitlines()
    assert lines[0] == "| size | S/B ms | together | one by one | killed half way, over together |"
    assert lines[2] == "| 1 MiB | 10.0 | 2.00 | 1.00 | 1.50 1.00 |"
    row.update({"reduce": [0.02], "broadcast": [0.02], "allreduce": [0.03]})
    assert REDUCES.table(report).splitlines()[2].split(" | ")[2:7] == [
        "2.00", "1.00", "2.00", "3.00", "0.75",
    ]  # fmt: skip


def test_the_best_limit_is_the_largest_size_that_is_no_slower_inline():
    def row(nbytes, put, one, every):
        times = {"put": put, "one get": one, "all get": every}
        return {
            "nbytes": nbytes,
            "times_s": {
                kind: dict(zip(inline.WAYS, ([us * 1e-6] for us in both), strict=True))
                for kind, both in times.items()
            },
        }

    rows = [
        row(4 * KIB, (30, 20), (50, 100), (200, 300)),
        row(16 * KIB, (40, 20), (60, 100), (300, 300)),
        row(64 * KIB, (50, 20), (70, 110), (900, 300)),
    ]
    report = {"ranks": 3, "where": "one host", "turns": 50, "rows": rows, "machine": MACHINE}
    assert inline.best(report) == 16 * KIB
    lines = inline.table(report).splitlines()
    assert lines[2] == "| 4 KiB | 30 | 20 | 50 | 100 | 200 | 300 |"
    assert lines[-1].endswith("Inline is no slower up to 16 KiB.")
    report["rows"] = rows[2:]
    assert inline.best(report) == 0
    assert inline.table(report).endswith("medians of 200. Inline is no slower at no size.")


# ---- what runs in the ranks -----------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(tmp_path):
    cases = Case("bcast", KIB, 5, True), Case("reduce", MIB, 1, step_s=0.25)
    plan = Plan("here", 8, "10.0.0.1", cases)
    plan.write(tmp_path / "plan")
    assert Plan.read(tmp_path / "plan") == plan


@pytest.mark.parametrize("nbytes", [4, KIB, MIB + 4])
def test_results_are_compared_with_what_they_must_be(nbytes):
    inputs = [make_input(nbytes, rank) for rank in range(3)]
    total = np.sum(inputs, axis=0)
    check("bcast", [[(0, inputs[0])], [(1, inputs[1])], []], 3)
    check("gather", [list(enumerate(inputs))], 3)
    check("allreduce", [[(2, total)]], 3)
    total[-1] += 1
    with pytest.raises(AssertionError, match="call 1, reduce: wrong from item"):
        check("reduce", [[], [(0, total)]], 3)
    with pytest.raises(AssertionError, match="call 0, gather: wrong from item 0"):
        check("gather", [[(1, inputs[2])]], 3)


def test_ranks_that_meet_tell_each_other_numbers(tmp_path):
    told = {}

    def meet(rank):
        meeting = Meeting(tmp_path, rank, 3, lambda: None)
        told[rank] = [meeting.all(10 * turn, rank) for turn in range(20)]

    ranks = [threading.Thread(target=meet, args=[rank]) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    every = [[[10.0 * turn, 0.0], [10.0 * turn, 1.0], [10.0 * turn, 2.0]] for turn in range(20)]
    assert told == {rank: every for rank in range(3)}
