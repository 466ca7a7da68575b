"""Twenty faults in real jobs, and a proof that their judge would have noticed."""

import json
import shutil
from pathlib import Path

import pytest

from hopcoll.chaos import harness, plan

SEED = 2
FAULTS = 20


#: What has to have happened, at the least.
QUOTAS = {
    "faults_fired": FAULTS,
    "in_flight_5_95": FAULTS // 4,
    "during_repair": 1,
    "coordinators_killed": 1,
    "roots_killed": 1,
}
TRIGGERS = {"chunk", "ballot", "time"}


def is_enough(report):
    return (
        all(report[name] >= need for name, need in QUOTAS.items())
        and report["reruns"] + report["stands"] >= 1
        and set(report["by_trigger"]) == TRIGGERS
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Which of the planned faults still find something to hit is a matter of speed: further runs
    of the seed are made until each kind has happened."""
    folder = tmp_path_factory.mktemp("chaos")
    found = harness.chaos(faults=FAULTS, seed=SEED, keep=folder, progress=False)
    while found["passed"] and not is_enough(found) and found["runs"] < 3 * FAULTS:
        numbers = range(found["runs"], found["runs"] + 2)
        more = harness.chaos(
            faults=FAULTS, seed=SEED, numbers=numbers, keep=folder, progress=False
        )
        verdicts = found["verdicts"] + more["verdicts"]
        found = harness._report(verdicts, FAULTS, SEED, False, 0, found["seconds"])
    return found


@pytest.fixture(scope="module")
def judge():
    with harness.Judge() as process:
        yield process


def test_twenty_faults_leave_every_result_right(report):
    problems = {v["run"]: v["problems"] for v in report["verdicts"] if v["problems"]}
    assert problems == {}
    assert report["hangs"] == report["wrong_results"] == 0
    assert report["passed"]


def test_the_faults_happened_where_they_should(report):
    for name, need in QUOTAS.items():
        assert report[name] >= need, name
    assert report["reruns"] + report["stands"] >= 1
    assert set(report["by_trigger"]) == TRIGGERS


def flip_bytes(entry, victim):
    entry["digest"] = entry["digest"][::-1]


def add_the_dead(entry, victim):
    entry["contributors"] = sorted({*entry["contributors"], victim})


def lose_a_survivor(entry, victim):
    entry["contributors"] = entry["contributors"][:-1]


def go_back_to_the_first_epoch(entry, victim):
    entry["epoch"] = 0


@pytest.mark.parametrize("ranks", ["one survivor", "all survivors"])
@pytest.mark.parametrize(
    "doctor", [flip_bytes, add_the_dead, lose_a_survivor, go_back_to_the_first_epoch]
)
def test_judge_catches_a_doctored_log_of_a_real_run(report, judge, tmp_path, doctor, ranks):
    """The last Allreduce without the victim is changed, in the log of one survivor or of all."""
    folder, run, records = _run_with_a_death(report)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert judge.ask(copy)["problems"] == []
    victim = next(iter(records))
    survivors = [rank for rank in range(run.size) if rank not in records]
    number = _last_without(folder, run, survivors[0], victim)
    for rank in survivors[:1] if ranks == "one survivor" else survivors:
        entries = _entries(copy, rank)
        for entry in entries:
            if entry["event"] == "done" and entry["op"] == number:
                doctor(entry, victim)
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (copy / f"log.{rank}").write_text(text)
    assert judge.ask(copy)["problems"] != []


def _entries(folder, rank):
    return [json.loads(line) for line in (folder / f"log.{rank}").read_text().splitlines()]


def _last_without(folder, run, rank, victim):
    """Return the last sum over some survivors; one more input would show in each of its items."""
    for entry in reversed(_entries(folder, rank)):
        if entry["event"] != "done" or entry["status"] != "ok":
            continue
        operation = run.operations[entry["op"]]
        if (
            operation.kind == "allreduce"
            and operation.op in ("SUM", "AVG", "PROD")
            and operation.count > 0
            and not operation.quorum
            and victim not in entry["contributors"]
        ):
            return entry["op"]
    return None


def _run_with_a_death(report):
    """Return a run after whose first death at least two survivors made an Allreduce."""
    for verdict in report["verdicts"]:
        folder = Path(verdict["folder"])
        run = plan.Run.load(folder / "run.json")
        records = {record["rank"]: record for record in verdict["records"]}
        survivors = [rank for rank in range(run.size) if rank not in records]
        if records and len(survivors) >= 2:
            victim = next(iter(records))
            if _last_without(folder, run, survivors[0], victim) is not None:
                return folder, run, records
    raise AssertionError("no run of this seed lost a rank before an Allreduce")


def test_a_job_that_does_not_end_is_a_hang(judge, tmp_path):
    """The deadline is too short for any job, so this one counts as hung, and is ended."""
    folder = tmp_path / "run"
    harness.run_job(plan.make_run(SEED, 0), folder, deadline_s=0.2)
    verdict = judge.ask(folder)
    assert verdict["hang"]
    assert any(problem.startswith("hang:") for problem in verdict["problems"])
