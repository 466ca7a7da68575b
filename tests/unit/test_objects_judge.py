"""The judge of the chaos of objects, on logs made up here: each kind of violation is caught."""

import json

import pytest

from benchmarks.objects_judge import judge

RANKS = 4
VICTIM = 3
DEATH_S = 50.0
PATIENCE_S = 5.0
KEY = "own 1 0"
RESULT = "result 0 9"


class Logs:
    """The logs of one job. Rank 3 dies at 50 s, between two calls."""

    def __init__(self, folder):
        self.folder = folder
        self.lines = {rank: [] for rank in range(RANKS)}
        self.launcher = {"code": 0, "timed_out": False}
        self.output = ""
        self.deaths = {str(VICTIM): {"at": 3}}
        self.left = {"used_bytes": 0, "objects": 0, "streams": 0}
        self.views_wrong = 0
        self.dies = True

    def call(self, rank, what, times, end="ok", key=KEY, **told):
        """`times` is when it begins and returns; or only begins. `told` goes to both lines."""
        lines = self.lines[rank]
        number = len(lines)
        if what != "wait":
            told["key"] = key
        begin = {"event": "call", "number": number, "time_s": times[0], "what": what}
        lines.append({**begin, **told})
        for time_s in times[1:]:
            done = {"event": "done", "number": number, "time_s": time_s, "end": end}
            lines.append({**done, **told})

    def put(self, rank, times, version=None, end="ok", key=KEY):
        self.call(rank, "put", times, end, key, version=version or [rank, 1])

    def get(self, rank, times, end="ok", key=KEY, version=(1, 1), right=True, **told):
        told = {"known": False, "limit_s": 10.0, **told}
        if end == "ok":
            told |= {"version": list(version), "right": right}
        elif end != "timeout":
            told = {"names": True, **told}
        self.call(rank, "get", times, end, key, **told)

    def wait(self, rank, times, ready, pending, count=1, limit_s=10.0, end="ok"):
        told = {"ready": ready, "pending": pending, "keys": ready + pending}
        self.call(rank, "wait", times, end, **told, count=count, limit_s=limit_s)

    def verdict(self):
        plan = {"number": 0, "ranks": RANKS, "patience_s": PATIENCE_S, "deaths": self.deaths}
        (self.folder / "plan.json").write_text(json.dumps(plan))
        (self.folder / "launcher.json").write_text(json.dumps(self.launcher))
        (self.folder / "output").write_text(self.output)
        for rank, lines in self.lines.items():
            end = {"event": "finished", "time_s": 99.0, "left": self.left, "stats": {}}
            end["views_wrong"] = self.views_wrong
            if rank == VICTIM and self.dies:
                end = {"event": "dying", "time_s": DEATH_S, "how": "between"}
            text = "".join(json.dumps(line) + "\n" for line in [*lines, end])
            (self.folder / f"log.{rank}").write_text(text + '{"half a li')
        return judge(self.folder)

    def kinds(self):
        return sorted({problem.partition(":")[0] for problem in self.verdict()["problems"]})


@pytest.fixture
def logs(tmp_path):
    return Logs(tmp_path)


def test_what_is_right_passes(logs):
    logs.put(1, (1, 2))
    logs.get(0, (0, 2.5))
    logs.get(2, (2, 3), end="ok")
    logs.call(2, "delete", (4, 5))
    logs.get(0, (6, 7), end="deleted")
    logs.put(3, (10, 11), key="any 0")
    logs.put(2, (12, 13), key="any 0", end="exists")
    logs.get(0, (51, 52), end="lost", key="any 0")
    logs.get(0, (60, 61), end="timeout", key="any 1", limit_s=0.5)
    logs.get(0, (62, 72), end="timeout", key="any 1")
    logs.wait(2, (60, 61), [KEY, "any 0"], ["any 1"])
    verdict = logs.verdict()
    assert verdict["problems"] == []
    assert verdict["deaths"] == 1 and verdict["survivors"] == 3
    assert verdict["calls"] == 11
    assert verdict["gets_cut_short"] == verdict["gets_for_nothing"] == 1


# ---- how it ended ----


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"launcher": {"code": 1, "timed_out": False}}, ["exit_code"]),
        ({"launcher": {"code": None, "timed_out": True}}, ["hang"]),
        ({"output": "Segmentation fault"}, ["crash"]),
        ({"left": {"used_bytes": 8, "objects": 0, "streams": 0}}, ["memory"]),
        ({"left": {"used_bytes": 0, "objects": 1, "streams": 0}}, ["memory"]),
        ({"left": {"used_bytes": 0, "objects": 0, "streams": 1}}, ["memory"]),
        ({"views_wrong": 1}, ["view"]),
        ({"dies": False}, ["not_fired"]),
    ],
)
def test_a_bad_end(logs, change, kinds):
    vars(logs).update(change)
    assert logs.kinds() == kinds


def test_a_rank_that_ends_and_was_not_to(logs):
    logs.verdict()
    (logs.folder / "log.2").write_text("")
    assert [one.partition(":")[0] for one in judge(logs.folder)["problems"]] == ["lost_rank"]


def test_a_call_that_does_not_return(logs):
    logs.put(1, (1,))
    assert logs.kinds() == ["hang"]


@pytest.mark.parametrize("what", ["put", "delete"])
def test_a_call_that_runs_out_of_time(logs, what):
    logs.call(1, what, (1, 21), end="timeout", version=[1, 1])
    assert logs.kinds() == ["hang"]


def test_an_error_that_names_another_ref(logs):
    logs.call(1, "delete", (1, 2))
    logs.get(0, (3, 4), end="deleted", names=False)
    assert logs.kinds() == ["names"]


def test_a_store_that_is_full(logs):
    logs.put(1, (1, 2), end="full")
    assert logs.kinds() == ["full"]


# ---- what gets return ----


def test_wrong_bytes(logs):
    logs.put(1, (1, 2))
    logs.get(0, (3, 4), right=False)
    assert logs.kinds() == ["bytes"]


def test_a_version_that_nobody_put(logs):
    logs.put(1, (1, 2))
    logs.get(0, (3, 4), key="any 0", version=(2, 5))
    assert logs.kinds() == ["version"]


def test_a_version_that_was_refused(logs):
    logs.put(1, (1, 2))
    logs.put(2, (3, 4), end="exists")
    logs.get(0, (5, 6), version=(2, 1))
    assert "version" in logs.kinds()


def test_a_version_that_was_put_later(logs):
    logs.get(0, (1, 2))
    logs.put(1, (3, 4))
    assert logs.kinds() == ["version"]


def test_a_version_that_was_deleted(logs):
    logs.put(1, (1, 2))
    logs.call(1, "delete", (3, 4))
    logs.get(0, (5, 6))
    assert logs.kinds() == ["stale"]


def test_a_version_that_is_being_deleted_may_come(logs):
    logs.put(1, (1, 2))
    logs.call(1, "delete", (3, 6))
    logs.get(0, (5, 7))
    assert logs.kinds() == []


@pytest.mark.parametrize("times", [(3, 4), (1.5, 1.7)])
def test_two_versions_at_a_time(logs, times):
    logs.put(1, (1, 2), key="any 0")
    logs.put(2, times, key="any 0")
    assert logs.kinds() == ["two_versions"]


def test_two_versions_where_the_first_was_lost_or_may_be_deleted(logs):
    logs.put(3, (1, 2), key="any 0")
    logs.put(2, (51, 52), key="any 0")
    logs.put(1, (1, 2), key="any 1")
    logs.call(0, "delete", (1, 4), key="any 1")
    logs.put(2, (3, 5), key="any 1")
    assert logs.kinds() == []


def test_a_get_of_another_version_than_the_one_that_is_there(logs):
    logs.put(3, (1, 2), key="any 0")
    logs.put(2, (51, 52), key="any 0")
    logs.get(0, (53, 54), key="any 0", version=(3, 1))
    assert logs.kinds() == ["two_versions"]


def test_a_put_is_refused_though_nothing_is_there(logs):
    logs.put(1, (1, 2), end="exists")
    logs.put(1, (3, 4), key="any 0")
    logs.call(1, "delete", (5, 6), key="any 0")
    logs.put(2, (7, 8), end="exists", key="any 0")
    assert len(logs.verdict()["problems"]) == 2
    assert logs.kinds() == ["exists"]


# ---- lost, deleted, late ----


def test_lost_though_its_putter_lives(logs):
    logs.put(1, (1, 2))
    logs.get(0, (51, 52), end="lost")
    assert logs.kinds() == ["not_lost"]


def test_lost_though_somebody_has_got_it(logs):
    logs.put(3, (1, 2), key="any 0")
    logs.get(2, (3, 4), key="any 0", version=(3, 1))
    logs.get(0, (51, 52), end="lost", key="any 0")
    assert logs.kinds() == ["not_lost"]


def test_lost_while_the_get_of_another_is_under_way(logs):
    logs.put(3, (1, 2), key="any 0")
    logs.get(2, (49, 51.5), key="any 0", version=(3, 1))
    logs.get(0, (51, 52), end="lost", key="any 0")
    assert logs.kinds() == []


def test_lost_before_the_death(logs):
    logs.put(3, (1, 2), key="any 0")
    logs.get(0, (48, 49), end="lost", key="any 0")
    assert logs.kinds() == ["not_lost"]


def test_lost_though_nobody_ever_put_it(logs):
    logs.get(0, (51, 52), end="lost")
    assert logs.kinds() == ["not_lost"]


@pytest.mark.parametrize(("known", "kinds"), [(True, []), (False, ["not_lost"])])
def test_who_knew_of_the_deletion_died(logs, known, kinds):
    logs.put(1, (1, 2))
    logs.call(1, "delete", (3, 4))
    logs.get(0, (51, 52), end="lost", known=known)
    verdict = logs.verdict()
    assert logs.kinds() == kinds
    assert verdict["lost_that_were_deleted"] == known


def test_deleted_though_nobody_did(logs):
    logs.get(0, (3, 4), end="deleted")
    logs.call(0, "delete", (5, 6))
    assert logs.kinds() == ["not_deleted"]


def test_deleted_though_it_was_put_again(logs):
    logs.put(1, (1, 2))
    logs.call(1, "delete", (3, 4))
    logs.put(1, (5, 6), version=[1, 2])
    logs.get(0, (7, 8), end="deleted")
    assert logs.kinds() == ["not_deleted"]


def test_the_deletion_of_a_dead_rank_counts_for_a_while(logs):
    logs.put(1, (1, 2))
    logs.call(3, "delete", (49,))
    logs.get(0, (51, 52), end="deleted")
    logs.put(1, (60, 61), key="any 0")
    logs.call(3, "delete", (49.5,), key="any 0")
    logs.get(0, (62, 63), key="any 0", end="deleted")
    problems = logs.verdict()["problems"]
    assert len(problems) == 1 and "any 0" in problems[0]


def test_a_get_runs_out_of_time_though_it_is_there(logs):
    logs.put(1, (1, 2))
    logs.get(0, (3, 13), end="timeout")
    assert logs.kinds() == ["hang"]


def test_a_get_runs_out_of_time_though_it_was_there_for_long(logs):
    logs.put(3, (1, 2), key="any 0")
    logs.get(0, (42, 52), end="timeout", key="any 0")
    assert logs.kinds() == ["hang"]


def test_a_get_runs_out_of_time_soon_after_it_came(logs):
    logs.get(0, (3, 13), end="timeout")
    logs.put(1, (8, 9))
    assert logs.kinds() == []


def test_a_get_that_knows_that_it_existed_does_not_wait_for_nothing(logs):
    logs.put(3, (1, 2), key="any 0")
    logs.get(0, (51, 61), end="timeout", key="any 0", known=True)
    assert logs.kinds() == ["hang"]


# ---- waits ----


@pytest.mark.parametrize(
    ("told", "kinds"),
    [
        ({"ready": [KEY], "pending": ["any 0"]}, []),
        ({"ready": [], "pending": [KEY]}, ["hang"]),
        ({"ready": [KEY, "any 0"], "pending": []}, ["wait"]),
        ({"ready": [KEY], "pending": ["any 0"], "count": 2, "limit_s": 20.0}, ["wait"]),
        ({"ready": [], "pending": [], "end": "timeout"}, ["wait"]),
    ],
)
def test_waits(logs, told, kinds):
    logs.put(1, (1, 2))
    logs.wait(0, (3, 13), **told)
    assert logs.kinds() == kinds


def test_a_wait_that_loses_a_ref(logs):
    logs.put(1, (1, 2))
    logs.call(0, "wait", (3, 4), keys=[KEY, "any 0"], ready=[KEY], pending=[], count=1, limit_s=1)
    assert logs.kinds() == ["wait"]


# ---- reductions ----


def reduced(logs, *readers, end="ok", times=(20, 21), **changes):
    for rank in range(RANKS):
        logs.put(rank, (1 + rank, 2 + rank), [rank, 0], key=f"part 1 {rank}")
    logs.call(0, "reduce", (10, 11), key=RESULT, group=1, count=2)
    for contributors in readers:
        told = {"contributors": contributors, "digest": "ab", "right": True, **changes}
        logs.get(2, times, end=end, key=RESULT, **told)
    return logs.kinds()


RIGHT = ["part 1 0", "part 1 2"]


@pytest.mark.parametrize(
    ("readers", "changes", "kinds"),
    [
        ([RIGHT, RIGHT], {}, []),
        ([RIGHT], {"right": False}, ["bytes"]),
        ([RIGHT, ["part 1 0", "part 1 1"]], {}, ["two_versions"]),
        ([["part 1 0"]], {}, ["contributors"]),
        ([["part 1 0", "part 1 0"]], {}, ["contributors"]),
        ([["part 1 0", "part 0 2"]], {}, ["contributors"]),
        ([["part 1 0", "?"]], {}, ["contributors"]),
        ([[]], {"end": "lost"}, ["not_lost"]),
        ([[]], {"end": "lost", "times": (51, 52)}, []),
        ([[]], {"end": "deleted"}, ["not_deleted"]),
        ([[]], {"end": "timeout", "times": (20, 30)}, ["hang"]),
        ([[]], {"end": "timeout", "times": (20, 21), "limit_s": 1.0}, []),
    ],
)
def test_reductions(logs, readers, changes, kinds):
    assert reduced(logs, *readers, **changes) == kinds
