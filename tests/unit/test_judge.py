"""The judge of chaos runs, on logs made up here: what is right passes, the rest is caught."""

import dataclasses
import json
import math

import numpy as np
import pytest

from hopcoll.chaos.judge import expected_result, judge
from hopcoll.chaos.shares import digest_of, whole_bytes
from hopcoll.chaos.plan import BIG_BYTES, Fault, Operation, Run, make_input, make_run

SIZE = 4
VICTIM = 2
DIES_IN = 3  # the operation that the victim called and never finished


def fold_items(run, number, contributors, chained="", op=lambda a, b: a + b):
    """Compute a result item by item, from nothing but the documented value order."""
    operation = run.operations[number]
    inputs = {rank: make_input(run, number, rank, chained) for rank in contributors}
    result = np.empty(operation.count, operation.dtype)
    blocks = min(run.size, 8)
    for item in range(operation.count):
        if operation.nbytes <= run.eager_bytes:
            start = 0
        elif operation.kind == "reduce":
            start = (operation.root + 1) % run.size
        else:
            block = max(b for b in range(blocks) if b * operation.count // blocks <= item)
            start = block * run.size // blocks
        order = [(start + place) % run.size for place in range(run.size)]
        values = [inputs[rank][item] for rank in order if rank in inputs]
        total = values[0]
        for value in values[1:]:
            total = op(total, value)
        result[item] = total
    return result


def make_small_run(**changes):
    operations = (
        Operation("allreduce", "float32", "SUM", 37),
        Operation("bcast", "uint8", "", 11, root=1, chained_to=0),
        Operation("barrier"),
        Operation("allreduce", "float32", "SUM", 5, chained_to=1),
        Operation("reduce", "float64", "SUM", 9, root=3, chained_to=3),
        Operation("bcast", "uint8", "", 5, root=2),
        Operation("allreduce", "float32", "SUM", 5, chained_to=1),
    )
    settings = {"HOPCOLL_EAGER_BYTES": "0"}
    steps = tuple(("call", number) for number in range(len(operations)))
    values = {"seed": 1, "number": 0, "size": SIZE, "operations": operations, "steps": steps}
    values |= {"faults": (Fault(VICTIM, "chunk", DIES_IN, 1),), "settings": settings}
    return Run(**(values | changes))


def write_logs(folder, run, victim=VICTIM, dies_in=DIES_IN):
    """Write the logs of a run in which all is well, with or without (None) a victim."""
    run.save(folder / "run.json")
    launcher = {"returncode": 0, "timed_out": False, "seconds": 1.0, "left_behind": []}
    (folder / "launcher.json").write_text(json.dumps(launcher))
    (folder / "output").write_text("")
    logs = {rank: [] for rank in range(run.size)}
    digests = {}
    for number, operation in enumerate(run.operations):
        after = victim is not None and number >= dies_in
        members = [rank for rank in range(run.size) if not after or rank != victim]
        chained = digests.get(operation.chained_to, "")
        entry = {"op": number, "status": "ok", "contributors": members, "epoch": int(after)}
        if operation.rooted and operation.root not in members:
            assert operation.kind == "bcast"
            entry = {"op": number, "status": "rank_failed", "failed": [victim], "epoch": 1}
            result = None
        elif operation.kind == "barrier":
            result = None
        elif operation.kind == "bcast":
            result = make_input(run, number, operation.root, chained)
        else:
            result = fold_items(run, number, members, chained)
        for rank, log in logs.items():
            if rank in members or number == dies_in:
                log.append({"event": "call", "time_s": float(number), "op": number})
            if rank not in members:
                continue
            has_result = result is not None and (
                operation.kind != "reduce" or rank == operation.root
            )
            digest = digest_of(result) if has_result else None
            if has_result:
                digests[number] = digest
            done = {"event": "done", "time_s": number + 0.5, "digest": digest, "intact": True}
            log.append({**done, **entry})
    for rank, log in logs.items():
        if rank == victim:
            log.append({"event": "stable", "time_s": 0.0, "op": 0})
        else:
            log.append(
                {"event": "finished", "time_s": 99.0, "counters": {"stands": 1, "reruns": 2}}
            )
        write_log(folder, rank, log)
    if victim is not None:
        write_record(folder, victim, op=dies_in)


def write_record(folder, rank, **changes):
    record = {"rank": rank, "trigger": "chunk", "op": 0, "chunk": 1, "moved_bytes": 1}
    record |= {"total_bytes": 2, "repair": 0, "coordinator": 0, "epoch": 0}
    (folder / f"fault.{rank}").write_text(json.dumps(record | changes) + "\n")


def write_log(folder, rank, entries):
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / f"log.{rank}").write_text(text)


def read_log(folder, rank):
    return [json.loads(line) for line in (folder / f"log.{rank}").read_text().splitlines()]


def change(folder, rank, number, **fields):
    """Doctor what a rank logged as the outcome of an operation."""
    entries = read_log(folder, rank)
    (entry,) = [e for e in entries if e["event"] == "done" and e["op"] == number]
    entry.update(fields)
    write_log(folder, rank, entries)


def drop(folder, rank, event, number=None):
    entries = read_log(folder, rank)
    kept = [e for e in entries if e["event"] != event or e.get("op") != number]
    assert len(kept) == len(entries) - 1
    write_log(folder, rank, kept)


def change_launcher(folder, **fields):
    path = folder / "launcher.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def kinds(verdict):
    return {problem.partition(":")[0] for problem in verdict["problems"]}


def test_judge_passes_a_run_without_a_death(tmp_path):
    write_logs(tmp_path, make_small_run(faults=()), victim=None)
    verdict = judge(tmp_path)
    assert verdict["problems"] == []
    assert verdict["faults_fired"] == 0


def test_judge_passes_a_run_with_a_death_and_counts_it(tmp_path):
    write_logs(tmp_path, make_small_run())
    write_record(tmp_path, VICTIM, op=DIES_IN, repair=1, coordinator=1)
    verdict = judge(tmp_path)
    assert verdict["problems"] == []
    assert verdict["faults_fired"] == 1
    assert verdict["during_repair"] == verdict["coordinators_killed"] == 1
    assert verdict["in_flight"] == 0, "the operation is a small one"
    assert (verdict["stands"], verdict["reruns"]) == (1, 2)


def test_judge_passes_a_victim_that_was_killed_in_the_middle_of_a_line(tmp_path):
    write_logs(tmp_path, make_small_run())
    with open(tmp_path / f"log.{VICTIM}", "a") as log:
        log.write('{"event": "do')
    assert judge(tmp_path)["problems"] == []


def same_wrong_bytes(folder):
    for rank in (0, 1, 3):
        change(folder, rank, 3, digest="00" * 16)


def result_of_other_contributors(folder):
    run = make_small_run()
    (source,) = {
        entry["digest"]
        for entry in read_log(folder, 0)
        if entry["event"] == "done" and entry["op"] == 1
    }
    digest = digest_of(fold_items(run, 3, range(SIZE), source))
    for rank in (0, 1, 3):
        change(folder, rank, 3, digest=digest)


def stale_chain(folder):
    """Op 3 fed with something else than the result of op 1."""
    digest = digest_of(fold_items(make_small_run(), 3, (0, 1, 3), "ab" * 16))
    for rank in (0, 1, 3):
        change(folder, rank, 3, digest=digest)


def everywhere(number, **fields):
    def doctor(folder):
        for rank in (0, 1, 3):
            change(folder, rank, number, **fields)

    return doctor


def early_return(folder):
    change(folder, 0, 2, time_s=1.9)


DOCTORED = {
    "one rank's bytes": (
        lambda f: change(f, 1, 3, digest="00" * 16),
        {"disagreement", "wrong_value"},
    ),
    "all ranks' bytes": (same_wrong_bytes, {"wrong_value"}),
    "the dead one's input is in": (result_of_other_contributors, {"wrong_value"}),
    "a stale input of a chain": (stale_chain, {"wrong_value"}),
    "the root's bytes": (lambda f: change(f, 3, 4, digest="11" * 16), {"wrong_value"}),
    "a broadcast's bytes": (lambda f: change(f, 0, 1, digest="11" * 16), {"disagreement"}),
    "no bytes": (lambda f: change(f, 0, 3, digest=None), {"wrong_value"}),
    "one rank's contributors": (
        lambda f: change(f, 1, 4, contributors=[0, 1, 2, 3]),
        {"disagreement"},
    ),
    "one rank's epoch": (lambda f: change(f, 1, 4, epoch=7), {"disagreement"}),
    "one rank's status": (lambda f: change(f, 1, 4, status="root_lost"), {"disagreement"}),
    "one rank's failed ranks": (lambda f: change(f, 1, 5, failed=[]), {"disagreement"}),
    "a survivor left out": (everywhere(4, contributors=[0, 3]), {"contributors", "wrong_value"}),
    "a rank that came back": (everywhere(6, contributors=[0, 1, 2, 3]), {"contributors"}),
    "a new membership in an old epoch": (everywhere(3, epoch=0), {"contributors"}),
    "an epoch that goes back": (everywhere(6, epoch=0), {"contributors"}),
    "a rank twice": (everywhere(6, contributors=[0, 1, 1, 3]), {"contributors"}),
    "a root that lives is lost": (everywhere(4, status="root_lost"), {"status"}),
    "a failure that nobody asked for": (everywhere(6, status="rank_failed"), {"status"}),
    "a living rank called failed": (everywhere(5, failed=[1]), {"status"}),
    "a result missing": (lambda f: drop(f, 1, "done", 6), {"unfinished"}),
    "an end missing": (lambda f: drop(f, 1, "finished"), {"lost_rank"}),
    "a record missing": (lambda f: (f / f"fault.{VICTIM}").unlink(), {"lost_rank"}),
    "a death that was not planned": (lambda f: write_record(f, 3), {"lost_rank"}),
    "no log at all": (lambda f: (f / "log.1").unlink(), {"lost_rank"}),
    "an input changed": (lambda f: change(f, 0, 0, intact=False), {"buffer"}),
    "the dead one's input changed": (lambda f: change(f, VICTIM, 0, intact=False), {"buffer"}),
    "a barrier left too early": (early_return, {"early"}),
    "a contributor that never called": (lambda f: drop(f, VICTIM, "call", 2), {"early"}),
    "the dead one had other bytes": (
        lambda f: change(f, VICTIM, 1, digest="22" * 16),
        {"wrong_value"},
    ),
    "the dead one had other contributors": (
        lambda f: change(f, VICTIM, 1, contributors=[1, 2]),
        {"dead_disagrees"},
    ),
    "a result of the dead one was undone": (everywhere(2, epoch=1), {"contributors"}),
    "a stable result was undone": (everywhere(0, epoch=1), {"unstable"}),
    "an exception": (
        lambda f: write_log(f, 0, [*read_log(f, 0), {"event": "exception", "text": "Oh"}]),
        {"exception"},
    ),
    "an exit code": (lambda f: change_launcher(f, returncode=1), {"exit_code"}),
    "a crash at the very end": (
        lambda f: (f / "output").write_text("[host:17] *** Process received signal ***\n"),
        {"crash"},
    ),
    "a process left behind": (lambda f: change_launcher(f, left_behind=[4711]), {"left_behind"}),
    "a hang": (lambda f: change_launcher(f, timed_out=True), {"hang"}),
}


@pytest.mark.parametrize("name", DOCTORED)
def test_judge_catches_doctored_logs(tmp_path, name):
    doctor, expected = DOCTORED[name]
    write_logs(tmp_path, make_small_run())
    assert judge(tmp_path)["problems"] == []
    doctor(tmp_path)
    assert expected <= kinds(judge(tmp_path))


def test_judge_allows_what_a_lost_root_allows(tmp_path):
    operations = [*make_small_run().operations]
    operations[4] = Operation("reduce", "float64", "SUM", 9, root=VICTIM)
    run = make_small_run(operations=tuple(operations))
    # Written by hand: every survivor says alike that the root was lost.
    plain = make_small_run()
    write_logs(tmp_path, plain)
    run.save(tmp_path / "run.json")
    for rank in (0, 1, 3):
        change(tmp_path, rank, 4, status="root_lost", digest=None)
    assert judge(tmp_path)["problems"] == []


def make_partial(folder, contributors, *, quorum=2, missed=()):
    """The logs of a run whose last operation was of these ranks only."""
    run = make_small_run()
    number = len(run.operations) - 1
    partial = dataclasses.replace(run.operations[number], quorum=quorum)
    run = dataclasses.replace(run, operations=(*run.operations[:-1], partial))
    write_logs(folder, run)
    source = read_log(folder, 0)
    (chained,) = [e["digest"] for e in source if e["event"] == "done" and e["op"] == 1]
    digest = digest_of(fold_items(run, number, contributors, chained)) if contributors else None
    for rank in (0, 1, 3):
        change(folder, rank, number, contributors=contributors, digest=digest)
    for rank in missed:
        change(folder, rank, number, status="missed", epoch=-1, digest=None)
    return judge(folder)["problems"]


@pytest.mark.parametrize("missed", [(), (1,)])
@pytest.mark.parametrize("contributors", [[0, 3], [0, 1, 3]])
def test_judge_passes_an_operation_of_those_who_came_first(tmp_path, contributors, missed):
    assert make_partial(tmp_path, contributors, missed=missed) == []


def test_judge_knows_how_many_are_enough(tmp_path):
    (problem,) = make_partial(tmp_path, [0])
    assert problem == "contributors: op 6: 1 of 2"


def test_judge_knows_that_the_dead_do_not_come_back(tmp_path):
    problems = make_partial(tmp_path, [0, VICTIM])
    assert any("came back" in problem for problem in problems)


def test_judge_lets_nobody_miss_what_is_of_all(tmp_path):
    problems = make_partial(tmp_path, [0, 1, 3], quorum=0, missed=(1,))
    assert any(problem.startswith("disagreement") for problem in problems)


def test_judge_allows_failures_where_the_caller_asked_for_them(tmp_path):
    write_logs(tmp_path, make_small_run(on_failure="raise"))
    everywhere(4, status="rank_failed", failed=[VICTIM], contributors=None, digest=None)(tmp_path)
    assert judge(tmp_path)["problems"] == []


def test_judge_allows_a_rerun_of_what_only_the_dead_one_had(tmp_path):
    """The victim returned from op 3 in epoch 0; nobody else did, and it was redone without it."""
    run = make_small_run()
    write_logs(tmp_path, run)
    entries = read_log(tmp_path, VICTIM)
    (source,) = [e["digest"] for e in entries if e["event"] == "done" and e["op"] == 1]
    done = {"event": "done", "time_s": 3.5, "op": 3, "status": "ok", "epoch": 0, "intact": True}
    done["contributors"] = list(range(SIZE))
    done["digest"] = digest_of(fold_items(run, 3, range(SIZE), source))
    write_log(tmp_path, VICTIM, [*entries, done])
    assert judge(tmp_path)["problems"] == []
    # Had it been called stable, the redoing would have been a broken promise.
    stable = {"event": "stable", "time_s": 3.6, "op": 3}
    write_log(tmp_path, VICTIM, [*entries, done, stable])
    assert kinds(judge(tmp_path)) == {"unstable"}


@pytest.mark.parametrize(
    ("op", "dtype", "scalar"),
    [
        ("SUM", "float32", lambda a, b: a + b),
        ("SUM", "float16", lambda a, b: a + b),
        ("PROD", "float64", lambda a, b: a * b),
        ("MAX", "int16", max),
        ("BXOR", "uint64", lambda a, b: a ^ b),
        ("LXOR", "bool", lambda a, b: bool(a) != bool(b)),
    ],
)
@pytest.mark.parametrize("contributors", [range(5), (0, 3), (1, 2, 4)])
@pytest.mark.parametrize("kind", ["allreduce", "reduce"])
@pytest.mark.parametrize("eager_bytes", [0, 4096])
def test_expected_result_follows_the_value_order(
    kind, contributors, op, dtype, scalar, eager_bytes
):
    operation = Operation(kind, dtype, op, 41, root=3 if kind == "reduce" else 0)
    settings = {"HOPCOLL_EAGER_BYTES": str(eager_bytes)}
    run = Run(7, 0, 5, (operation,), (("call", 0),), settings=settings)
    result = expected_result(run, 0, contributors, "")
    must = fold_items(run, 0, contributors, op=scalar)
    assert result.dtype == must.dtype
    assert result.tobytes() == must.tobytes()


def test_expected_average_divides_by_the_contributors():
    run = Run(7, 0, 5, (Operation("allreduce", "float32", "AVG", 41),), (("call", 0),))
    must = fold_items(run, 0, (0, 1, 4)) / np.float32(3)
    assert expected_result(run, 0, (0, 1, 4), "").tobytes() == must.tobytes()


def test_order_of_summation_shows_in_the_inputs():
    """Inputs whose sum did not depend on the order would let a wrong value order pass."""
    small = {"HOPCOLL_EAGER_BYTES": "65536"}
    operation = Operation("allreduce", "float32", "SUM", 2000)
    one = Run(7, 0, 5, (operation,), (("call", 0),))
    other = Run(7, 0, 5, (operation,), (("call", 0),), settings=small)
    assert one.eager_bytes < operation.nbytes
    results = expected_result(one, 0, range(5), "0"), expected_result(other, 0, range(5), "0")
    assert np.allclose(*results, rtol=1e-3, atol=1e-3)
    assert not np.array_equal(*results)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_inputs_are_plain_numbers(dtype):
    run = Run(3, 0, 8, (Operation("allreduce", dtype, "PROD", 5000),), ())
    product = np.ones(5000, dtype)
    for rank in range(8):
        values = make_input(run, 0, rank, "")
        assert np.isfinite(values).all() and (values != 0).all()
        if dtype != "complex64":
            product *= values
    tiny = np.finfo(dtype).tiny
    assert np.isfinite(product).all() and (np.abs(product) >= tiny).all()


def test_inputs_depend_on_everything_that_they_should():
    run = make_run(1, 1)
    number = next(n for n, operation in enumerate(run.operations) if operation.nbytes > 100)
    first = make_input(run, number, 0, "")
    assert np.array_equal(first, make_input(run, number, 0, ""))
    assert not np.array_equal(first, make_input(run, number, 1, ""))
    assert not np.array_equal(first, make_input(run, number, 0, "ab"))


def test_runs_are_a_function_of_the_seed_and_survive_their_file(tmp_path):
    run = make_run(5, 17)
    assert run == make_run(5, 17) != make_run(5, 18)
    assert make_run(6, 17) != run
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run


def test_planned_runs_keep_the_rules():
    runs = [make_run(1, number) for number in range(300)]
    faults = [fault for run in runs for fault in run.faults]
    in_big = during_repair = 0
    for run in runs:
        victims = [fault.rank for fault in run.faults]
        assert 1 <= len(victims) == len(set(victims)) <= run.size - 1
        assert 2 <= run.size <= 8 and 6 <= len(run.operations) <= 12
        started = [number for verb, number in run.steps if verb in ("call", "start")]
        assert started == list(range(len(run.operations)))
        ended = [number for verb, number in run.steps if verb in ("call", "wait")]
        assert sorted(ended) == started
        for place, (_, number) in enumerate(run.steps):
            source = run.operations[number].chained_to
            if source is not None:
                before = [n for verb, n in run.steps[:place] if verb in ("call", "wait")]
                assert source in before
        for fault in run.faults:
            in_big += (
                fault.trigger == "chunk"
                and whole_bytes(run.operations[int(fault.first)], run.size) >= BIG_BYTES
                and fault.second > 2
            )
            during_repair += fault.trigger == "ballot"
    assert in_big >= 0.55 * len(faults)
    assert during_repair >= 0.12 * len(faults)
    assert any(len(run.faults) == run.size - 1 > 3 for run in runs)
    assert {run.size for run in runs} == set(range(2, 9))
    assert math.isclose(np.mean([len(run.faults) for run in runs]), 2.2, abs_tol=0.8)
