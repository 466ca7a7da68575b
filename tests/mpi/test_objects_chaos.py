"""One small job of the chaos of objects, and a proof that its judge would have noticed."""

from __future__ import annotations

import json

import pytest

from benchmarks import objects_chaos, objects_judge

SEED, RANKS, DEATHS = 4, 8, 3


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos") / "job"
    plan = objects_chaos.plan_of(
        SEED, 0, ranks=RANKS, deaths=(DEATHS, DEATHS), calls=30, patience_s=1.5
    )
    return folder, objects_chaos.run_job(plan, folder)


def test_the_store_keeps_its_word_while_ranks_die(job):
    _, verdict = job
    assert verdict["problems"] == []
    assert verdict["deaths"] == DEATHS
    assert verdict["survivors"] == RANKS - DEATHS
    answers = verdict["answers"]
    assert verdict["calls"] > 30 * (RANKS - DEATHS)
    assert answers["get ok"] > 50 and answers["put ok"] > 10 and answers["delete ok"] > 40


def swap_version(done):
    done["version"] = [done["version"][0], done["version"][1] + 1000]


def say_lost(done):
    done |= {"end": "lost", "names": True}
    del done["version"]


def say_deleted(done):
    say_lost(done)
    done["end"] = "deleted"


@pytest.mark.parametrize(
    ("doctor", "kind"),
    [(swap_version, "version"), (say_lost, "not_lost"), (say_deleted, "not_deleted")],
)
def test_the_judge_catches_a_doctored_log_of_a_real_job(job, tmp_path, doctor, kind):
    """The last get of a survivor is of what is there, and stays until all is deleted."""
    folder, _ = job
    for path in folder.glob("*"):
        if not path.name.startswith("ref."):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    survivor = next(rank for rank in range(RANKS) if '"finished"' in text_of(folder, rank))
    lines = [json.loads(line) for line in text_of(folder, survivor).splitlines()]
    gets = [line for line in lines if line["event"] == "done" and line.get("right")]
    doctor([line for line in gets if "version" in line][-1])  # of an object that was put
    (tmp_path / f"log.{survivor}").write_text("".join(json.dumps(one) + "\n" for one in lines))
    problems = objects_judge.judge(tmp_path)["problems"]
    assert [problem.partition(":")[0] for problem in problems] == [kind]


def text_of(folder, rank):
    return (folder / f"log.{rank}").read_text()
