"""Jobs on a real Slurm, with nodes that fail, are drained, and jobs that are preempted.

They need root, iproute2, Slurm and munge: `make test-slurm` installs the last two. Whatever happens
to a job, its model is that of an undisturbed run for the same contributors, bit for bit; its log
has each step once, and what it does outside is done once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import recovery
from tests import launch
from tests.slurm.cluster import CannotStart, Cluster, why_no_slurm

STEPS = 50
RANKS = 2
PROGRAM = launch.ROOT / "tests/slurm/job.py"
#: What a script of these tests takes otherwise than it is by default, to be over soon.
SETTINGS = {
    "hopcoll_environment": sys.prefix,
    "hopcoll_watch_s": "1",
    "hopcoll_backoff_s": "1",
    "hopcoll_stop_within_s": "20",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@pytest.fixture(scope="module")
def started() -> Iterator[Cluster]:
    if reason := why_no_slurm():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="hcs-"))
    try:
        try:
            cluster = Cluster(folder).__enter__()
        except CannotStart as why:
            print(f"\n** tests/slurm are LEFT OUT: {why}", file=sys.__stderr__, flush=True)
            pytest.skip(str(why).splitlines()[0])
        try:
            yield cluster
        finally:
            cluster.__exit__()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    yield started
    started.heal()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of a job to which nothing happened."""
    folder = tmp_path_factory.mktemp("undisturbed") / "job"
    words = ("--folder", folder, "--steps", STEPS, "--step-s", 0)
    launch.run(RANKS, PROGRAM, *map(str, words), timeout_s=180)
    return (folder / "model").read_text()


class Submitted:
    """A job of `PROGRAM` under `hopcoll slurm submit`."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str, **settings: object) -> None:
        self.cluster, self.folder = cluster, folder
        words = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        done = cluster.call(
            *("hopcoll", "slurm", "submit", "--shared", "--time=10", *options, str(PROGRAM)),
            *("--folder", str(folder / "job"), "--steps", str(STEPS), *words),
            cwd=folder,
            settings=SETTINGS,
        )
        self.number = done.stdout.strip()
        assert self.number.isdecimal(), done

    @property
    def log(self) -> list[dict[str, object]]:
        """The lines of its training's log."""
        file = self.folder / "job" / "log.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def output(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("job-*.out")))

    def wait_for_step(self, step: int) -> None:
        def there() -> bool:
            return any(line["step"] >= step for line in self.log)

        self.cluster.wait_for(there, f"job {self.number} makes step {step}\n{self.output}", 60)

    def wait_for_start(self, count: int, within_s: float = 60) -> None:
        """Wait until Slurm has started it again so often, and it runs."""

        def runs() -> bool:
            facts = self.cluster.job(self.number)
            return facts["Restarts"] == str(count) and facts["JobState"] == "RUNNING"

        self.cluster.wait_for(runs, f"job {self.number} is started again", within_s)

    def wait(self, state: str = "COMPLETED", within_s: float = 120) -> dict[str, str]:
        """Wait for its end, and return what Slurm knows of it."""
        over = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")

        def ended() -> bool:
            return self.cluster.job(self.number)["JobState"] in over

        self.cluster.wait_for(ended, f"job {self.number} ends\n{self.output}", within_s)
        facts = self.cluster.job(self.number)
        assert facts["JobState"] == state, f"{facts}\n{self.output}\n{self.cluster.report()}"
        return facts

    def check(self, undisturbed: str, effects: int = 1) -> recovery.History:
        """Hold what it left behind against an undisturbed run for the same contributors."""
        folder = self.folder / "job"
        history = recovery.History.read(folder / "store")
        size = max(era.size for era in history.eras)
        alone = [era.ranks for era in history.eras if not era.losses]
        if len(alone) == len(history.eras) and {len(ranks) for ranks in alone} == {RANKS}:
            must = undisturbed
        else:
            launch.run(
                *(size, PROGRAM, "--folder", str(folder), "--steps", str(STEPS), "--replay"),
                timeout_s=180,
            )
            must = (folder / "replayed").read_text()
        assert (folder / "model").read_text() == must
        assert [line["step"] for line in self.log] == list(range(1, STEPS + 1))
        world = folder / "world"
        done = sorted(file.name.split(".")[1] for file in world.glob("done.*"))
        assert done == sorted(map(str, range(effects))), done
        for file in world.glob("done.*"):
            assert json.loads(file.read_text())["model"] == must
        return history


def test_a_job_ends_and_tells_of_itself(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, "--nodes=2", step_s=0.2)
    job.wait_for_step(12)
    shown = cluster.call("hopcoll", "slurm", "status", "--json", job.number).stdout
    (facts,) = json.loads(shown)
    assert facts["state"] == "RUNNING" and facts["requeues"] == 0
    assert facts["step"] >= 5 and facts["step"] % 5 == 0 and facts["age_s"] < 60
    assert (facts["ranks"], facts["began"], facts["restarts"]) == (2, 2, 0)
    row = cluster.call("hopcoll", "slurm", "status").stdout.splitlines()[-1].split()
    assert row[:3] == [job.number, "job", "RUNNING"]
    facts = job.wait()
    assert facts["Restarts"] == "0"
    job.check(undisturbed)


def test_a_lost_node_and_a_spare(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, "--nodes=2", "--spares=1")
    job.wait_for_step(12)
    cluster.kill_node(cluster.nodes[1])
    facts = job.wait()
    assert facts["Restarts"] == "0"
    history = job.check(undisturbed)
    assert [era.size for era in history.eras] == [2, 2]
    assert f"without {cluster.nodes[1]}, which did not answer" in job.output


def test_a_lost_node_without_a_spare(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, "--nodes=3", "--min-ranks=2")
    job.wait_for_step(12)
    cluster.kill_node(cluster.nodes[2])
    assert job.wait()["Restarts"] == "0"
    assert [era.size for era in job.check(undisturbed).eras] == [3, 2]


def test_a_lost_node_while_the_controller_is_away(cluster, tmp_path, undisturbed):
    """Nobody can be reached then: only afterwards it shows who is lost."""
    job = Submitted(cluster, tmp_path, "--nodes=2", "--spares=1")
    job.wait_for_step(12)
    cluster.kill_node(cluster.nodes[1])
    cluster.wait_for(lambda: "restart 1 of 5" in job.output, "it is to be started again", 60)
    cluster.freeze_controller(True)
    away = "Slurm's controller does not answer; the hosts are asked when it does"
    cluster.wait_for(lambda: away in job.output, f"{away}\n{job.output}", 90)
    cluster.freeze_controller(False)
    assert job.wait()["Restarts"] == "0"
    assert [era.size for era in job.check(undisturbed).eras] == [2, 2]
    assert f"without {cluster.nodes[1]}, which did not answer" in job.output


def test_too_few_ranks_wait_in_the_queue(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, "--nodes=2", "--min-ranks=2")
    job.wait_for_step(12)
    cluster.kill_node(cluster.nodes[1])
    assert job.wait()["Restarts"] == "1"
    assert "1 ranks would be left, and min-ranks is 2" in job.output
    assert [era.size for era in job.check(undisturbed).eras] == [2, 2]


def test_the_first_node_is_lost(cluster, tmp_path, undisturbed):
    """It has the batch script and mpirun. A watcher on another node sees it."""
    job = Submitted(cluster, tmp_path, "--nodes=2")
    job.wait_for_step(12)
    cluster.kill_node(cluster.nodes[0])
    facts = job.wait()
    assert facts["Restarts"] == "1" and facts["BatchHost"] == cluster.nodes[1]
    job.check(undisturbed)
    (said,) = tmp_path.glob("job-*/watchers.log")
    assert f"lost its first node, {cluster.nodes[0]}; requeued" in said.read_text()


def test_the_first_node_is_shut_down(cluster, tmp_path, undisturbed):
    """Its init ends the batch script, and Slurm knows nothing of it yet."""
    job = Submitted(cluster, tmp_path, "--nodes=2")
    job.wait_for_step(12)
    scripts = [
        pid
        for pid in cluster.processes(cluster.nodes[0])
        if b"/slurm_script" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert scripts
    for pid in scripts:
        os.kill(pid, signal.SIGTERM)
    assert job.wait()["Restarts"] == "1"
    assert "SIGTERM" in job.output and "requeued, for 1 s at least" in job.output
    job.check(undisturbed)


def test_a_drained_node(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, "--nodes=2")
    job.wait_for_step(12)
    drain = ("state=drain", "reason=test")
    cluster.call("scontrol", "update", f"NodeName={cluster.nodes[0]}", *drain)
    first = job.cluster.job(job.number)
    assert first["JobState"] == "RUNNING"
    # It goes on there; started again, it is elsewhere.
    cluster.call("scontrol", "requeue", job.number)
    facts = job.wait()
    assert facts["Restarts"] == "1" and facts["BatchHost"] == cluster.nodes[1]
    job.check(undisturbed)


def test_a_signal_leads_to_a_commit_and_a_requeue(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, "--nodes=2", interval=1000)
    job.wait_for_step(12)
    for _ in range(2):  # the second one says nothing new
        cluster.call("scancel", "--signal=USR1", "--batch", job.number)
    assert job.wait()["Restarts"] == "1"
    assert "asked to stop, did so behind step" in job.output
    history = job.check(undisturbed)
    # Nothing was saved before, and no step was made again.
    assert len(history.eras) == 2 and history.eras[1].first > 12


def test_a_workflow_tells_how_far_it_came(cluster, tmp_path, undisturbed):
    """So it goes on at once when it was asked to stop: its training told 50 steps before."""
    wide = ("--nodes=1", "--ranks-per-node=2")
    # So many that it is not over before all has been asked that is asked here.
    job = Submitted(cluster, tmp_path, *wide, step_s=0, effects=20, effect_s=1)
    world = tmp_path / "job" / "world"

    def shown() -> dict[str, object]:
        said = cluster.call("hopcoll", "slurm", "status", "--json", job.number).stdout
        (facts,) = json.loads(said)
        return facts

    cluster.wait_for(lambda: len(list(world.glob("done.*"))) >= 2, "some effects are done", 60)
    cluster.wait_for(lambda: shown()["step"] not in (None, STEPS), "the workflow tells", 60)
    facts = shown()
    assert (facts["ranks"], facts["began"]) == (2, 2) and facts["age_s"] < 20
    cluster.wait_for(lambda: shown()["step"] > facts["step"], "it tells more", 60)
    cluster.call("scancel", "--signal=USR1", "--batch", job.number)
    assert job.wait()["Restarts"] == "1"
    assert "requeued, for 0 s at least" in job.output
    job.check(undisturbed, effects=20)


def test_requeued_by_an_administrator(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, "--nodes=2")
    job.wait_for_step(12)
    cluster.call("scontrol", "requeue", job.number)
    assert job.wait()["Restarts"] == "1"
    assert len(job.check(undisturbed).eras) == 2


@pytest.mark.parametrize("asked", [False, True], ids=["cancelled", "asked to stop just before"])
def test_cancelled_jobs_stay_cancelled(cluster, tmp_path, asked):
    job = Submitted(cluster, tmp_path, "--nodes=2")
    job.wait_for_step(6)
    if asked:
        cluster.call("scancel", "--signal=USR1", "--batch", job.number)
    cluster.call("scancel", job.number)
    job.wait("CANCELLED")
    cluster.wait_for(lambda: set(cluster.states().values()) == {"idle"}, "its nodes are free", 30)
    assert cluster.job(job.number)["JobState"] == "CANCELLED"


def test_names_with_spaces_and_quotes(cluster, tmp_path, undisturbed):
    folder = tmp_path / "my runs"
    folder.mkdir()
    job = Submitted(cluster, folder, "--nodes=2", "--name=it's", step_s=0)
    assert job.wait()["JobName"] == "it's"
    job.check(undisturbed)
    (shown,) = json.loads(cluster.call("hopcoll", "slurm", "status", "--json", job.number).stdout)
    assert shown["step"] is not None
    assert [path.name for path in folder.glob("it's-*")] != []
    assert (folder / f"it's-{job.number}" / "progress.0").exists()


def test_an_ordinary_users_job_requeues_itself_and_waits(cluster):
    """With programs of the shell alone: this Python may be root's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bin").mkdir()
        program = folder / "bin" / "hopcoll"
        program.write_text(
            '#!/bin/sh\n[ "$1" != --version ] || exit 0\ndate +%s.%N >> times\nid -u > user\n'
            '[ -n "$SLURM_RESTART_COUNT" ] || exit 3\n'
        )
        program.chmod(0o755)
        shutil.copy(launch.ROOT / "hopcoll" / "job.sh", folder)
        (folder / "script").write_text(
            f"#!/bin/bash\nhopcoll_backoff_s=5 hopcoll_environment={folder}\n"
            ". ./job.sh || exit\nhopcoll_job x.py\n"
        )
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        words = ("--nodes=2", "--ntasks-per-node=1", "--output=out", "--open-mode=append")
        number = cluster.call(
            *(*nobody, "sbatch", "--parsable", "--requeue", *words, "script"), cwd=folder
        ).stdout.strip()
        over = ("COMPLETED", "FAILED")
        cluster.wait_for(lambda: cluster.job(number)["JobState"] in over, "it ends", 60)
        said = (folder / "out").read_text()
        facts = cluster.job(number)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), said
        assert facts["Comment"] == "hopcoll" and "requeued, for 5 s at least" in said
        assert (folder / "user").read_text() == "65534\n"
        first, second = map(float, (folder / "times").read_text().split())
        # Slurm's clock has whole seconds.
        assert second - first >= 4


def test_preempted_with_a_commit(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, "--nodes=2", interval=1000, step_s=0.4)
    job.wait_for_step(12)
    urgent = ("--partition=urgent", "--nodes=4", "--exclusive", "--output=urgent.out")
    number = cluster.call("sbatch", "--parsable", *urgent, "--wrap=hostname", cwd=tmp_path).stdout
    assert job.wait()["Restarts"] == "1"
    assert cluster.job(number.strip())["JobState"] == "COMPLETED"
    history = job.check(undisturbed)
    assert len(history.eras) == 2 and history.eras[1].first > 12


def test_the_time_limit(cluster, tmp_path, undisturbed):
    """Slurm looks every 30 s whose time is about to be over: a start has 30 s at the least, and 60
    at the most."""
    job = Submitted(
        cluster, tmp_path, "--nodes=2", "--sbatch=--time=2", "--sbatch=--signal=B:USR1@60",
        interval=1000, step_s=1.0,
    )  # fmt: skip
    facts = job.wait(within_s=300)
    assert int(facts["Restarts"]) >= 1, job.output
    history = job.check(undisturbed)
    # On a busy machine it may be told so before its first step.
    assert 2 <= len(history.eras) <= int(facts["Restarts"]) + 1
    assert "asked to stop, did so behind step" in job.output
    # Nothing was made again: the next start began behind the commit.
    stops = [int(step) for step in re.findall(r"did so behind step (\d+)", job.output)]
    assert [era.first for era in history.eras] == [1, *(step + 1 for step in stops)]


def test_older_starts_that_live_on_do_no_harm(cluster, tmp_path, undisturbed):
    """Their nodes are out of reach of Slurm, but not of the disk that all share: one job trains,
    and one is at its effects."""
    folders = [tmp_path / name for name in ("trains", "acts")]
    for folder in folders:
        folder.mkdir()
    wide = ("--nodes=1", "--ranks-per-node=2")
    trains = Submitted(cluster, folders[0], *wide, step_s=1.0)
    acts = Submitted(cluster, folders[1], *wide, step_s=0, effects=40, effect_s=1.2)
    trains.wait_for_step(6)
    world = folders[1] / "job" / "world"
    cluster.wait_for(lambda: len(list(world.glob("done.*"))) >= 3, "some effects are done", 60)
    nodes = [cluster.job(job.number)["BatchHost"] for job in (trains, acts)]
    assert len(set(nodes)) == 2
    for node in nodes:
        cluster.cable(node, plugged=False)
    for job, node in zip((trains, acts), nodes, strict=True):
        job.wait_for_start(1)
        assert cluster.processes(node), "nobody is left there"
    for job in (trains, acts):
        job.wait()
    trains.check(undisturbed)
    acts.check(undisturbed, effects=40)
    # Who trained went on, and found at its next commit that it must not.
    starts = [line["start"] for line in trains.log]
    assert starts == sorted(starts) and {*starts} == {0, 1}
    assert "was taken over by another process" in trains.output
    asked = [json.loads(file.read_text()) for file in world.glob("asked.*")]
    older = [one for one in asked if one["start"] == 0]
    newer = [one for one in asked if one["start"] == 1]
    assert {one["host"] for one in older} == {nodes[1]} and newer
    # One may have been under way when the other took over, no more.
    assert len(asked) <= 41
    assert max(one["number"] for one in older) <= min(one["number"] for one in newer)
    # The old starts learn it by themselves, with their nodes still cut off.
    for node in nodes:
        cluster.wait_for(lambda node=node: not cluster.ranks(node), "the older ranks end", 60)


def test_a_job_that_always_fails_comes_to_an_end(cluster, tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "fails").touch()
    begin_s = time.monotonic()
    settings = {**SETTINGS, "hopcoll_failures": "3"}
    words = ("--shared", "--time=10", "--nodes=2", str(PROGRAM), "--folder", str(tmp_path / "job"))
    number = cluster.call(
        "hopcoll", "slurm", "submit", *words, cwd=tmp_path, settings=settings
    ).stdout.strip()
    cluster.wait_for(
        lambda: cluster.job(number)["JobState"] == "FAILED", "the job has had enough", 90
    )
    assert cluster.job(number)["Restarts"] == "2"
    (output,) = tmp_path.glob("job-*.out")
    said = output.read_text()
    assert said.count("ended with 3; requeued, for 1 s at least") == 1
    assert said.count("ended with 3; requeued, for 2 s at least") == 1
    assert "failed 3 times since step 0, the last time with 3" in said
    assert time.monotonic() - begin_s > 3


def test_the_tasks_of_an_array(cluster, tmp_path):
    """Each is requeued for itself: one of them fails at its first start."""
    array = ("--array=3,5", "--nodes=1", "--shared", "--time=10")
    program = tmp_path / "say.py"
    program.write_text(
        "import os, sys\n"
        "if os.environ['SLURM_ARRAY_TASK_ID'] == '5' and 'SLURM_RESTART_COUNT' not in os.environ:\n"
        "    sys.exit(3)\n"
        "print(os.environ['HOPCOLL_JOB_FOLDER'])\n"
    )
    number = cluster.call(
        "hopcoll", "slurm", "submit", *array, str(program), cwd=tmp_path, settings=SETTINGS
    ).stdout.strip()
    outputs = [tmp_path / f"say-{number}_{task}.out" for task in (3, 5)]
    for task, output in zip((3, 5), outputs, strict=True):
        folder = str(tmp_path / f"say-{number}_{task}")
        cluster.wait_for(
            lambda output=output, folder=folder: output.exists() and folder in output.read_text(),
            f"task {task} ends",
            60,
        )
    shown = json.loads(cluster.call("hopcoll", "slurm", "status", "--json", number).stdout)
    assert {one["job"]: one["requeues"] for one in shown} == {f"{number}_3": 0, f"{number}_5": 1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--partition=nowhere"], "partition 'nowhere' does not exist here; there are main, sho"),
        (["--nodes=4", "--spares=1"], "nodes: 4 and 1 spares are more than the 4 that any part"),
        (["--partition=short"], "Slurm does not take the job: "),
        (["--ranks-per-node=3"], "Slurm does not take the job: "),
    ],
)
def test_what_slurm_would_refuse_is_not_submitted(cluster, tmp_path, options, said):
    before = cluster.call("squeue", "-h", "-t", "all").stdout.count("\n")
    words = ("--shared", "--time=10", *options, str(PROGRAM))  # 5 minutes are "short"
    done = cluster.call("hopcoll", "slurm", "submit", *words, cwd=tmp_path, check=False)
    assert done.returncode == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert cluster.call("squeue", "-h", "-t", "all").stdout.count("\n") == before


def test_an_environment_that_a_node_does_not_see(cluster, tmp_path):
    """Its folder is there on the first node alone."""
    where = tmp_path / "environment" / "bin"
    where.mkdir(parents=True)
    program = where / "hopcoll"
    program.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    program.chmod(0o755)
    cluster.hide(cluster.nodes[1], tmp_path / "environment")
    settings = {**SETTINGS, "hopcoll_environment": str(where.parent)}
    script = "\n".join(
        ["#!/bin/bash", f". {launch.ROOT}/hopcoll/job.sh || exit", "hopcoll_job x.py", ""]
    )
    (tmp_path / "script").write_text(script)
    words = ("--nodes=2", "--ntasks-per-node=1", "--output=%j.out", "--requeue", "script")
    number = cluster.call("sbatch", "--parsable", *words, cwd=tmp_path, settings=settings)
    number = number.stdout.strip()
    cluster.wait_for(lambda: cluster.job(number)["JobState"] == "FAILED", "it says so", 60)
    assert cluster.job(number)["Restarts"] == "0"
    said = (tmp_path / f"{number}.out").read_text()
    assert f"{cluster.nodes[1]} cannot run {program}: it has to be on a shared file system" in said


def test_a_job_waits_for_a_node_that_is_drained(cluster, tmp_path):
    drain = ("state=drain", "reason=test")
    cluster.call("scontrol", "update", f"NodeName={cluster.nodes[0]}", *drain)
    words = ("--shared", "--time=10", "--nodes=4", str(PROGRAM))
    done = cluster.call("hopcoll", "slurm", "submit", *words, cwd=tmp_path)
    assert "1 nodes are down, drained or reserved, and the job waits" in done.stderr
    assert cluster.job(done.stdout.strip())["JobState"] == "PENDING"
    row = cluster.call("hopcoll", "slurm", "status").stdout.splitlines()[-1].split()
    assert row[:3] == [done.stdout.strip(), "job", "PENDING"]


def test_the_doctor_looks_at_all_nodes(cluster, tmp_path):
    words = ("--nodes=3", "--ntasks-per-node=1", "--output=%j.out", "--wrap=hopcoll doctor")
    number = cluster.call("sbatch", "--parsable", *words, cwd=tmp_path).stdout.strip()
    over = ("COMPLETED", "FAILED")
    cluster.wait_for(lambda: cluster.job(number)["JobState"] in over, "the doctor is done", 120)
    said = (tmp_path / f"{number}.out").read_text()
    assert f"mpirun starts hopcoll on {', '.join(cluster.nodes[:3])}" in said, said
    assert "Fault tolerance is real here" in said


SMALL = {
    "train_sgd": ["--steps", "40", "--batch", "64", "--checkpoint-every", "10"],
    "train_rl": ["--players", "2", "--turns", "3"],
    "workflow": ["--epochs", "2", "--steps", "20"],
    "scaling": ["--sizes", "8", "65536", "--turns", "2"],
}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_script_runs_to_its_end(cluster, tmp_path, name):
    examples = tmp_path / "examples"
    shutil.copytree(launch.ROOT / "examples", examples)
    for folder in ("hopcoll", "benchmarks"):
        os.symlink(launch.ROOT / folder, tmp_path / folder)
    settings = {**SETTINGS, "hopcoll_ranks": "2", "hopcoll_min_ranks": "2"}
    settings["PYTHONPATH"] = f"{tmp_path}:{launch.ROOT}"
    script = launch.ROOT / "slurm" / f"{name}.sbatch"
    words = ("--nodes=2", "--ntasks-per-node=1", str(script), *SMALL[name])
    number = cluster.call(
        "sbatch", "--parsable", *words, cwd=tmp_path, settings=settings
    ).stdout.strip()
    over = ("COMPLETED", "FAILED", "CANCELLED")
    cluster.wait_for(lambda: cluster.job(number)["JobState"] in over, f"{name} ends", 180)
    (output,) = tmp_path.glob(f"*-{number}.out")
    assert cluster.job(number)["JobState"] == "COMPLETED", output.read_text()
    assert cluster.job(number)["Restarts"] == "0", output.read_text()
    told = [path.read_text() for path in tmp_path.glob(f"*-{number}/progress.0")]
    assert len(told) == (name != "scaling"), "what trains, and what is a workflow, tells its steps"
    if name == "train_sgd":
        assert "40 steps, test accuracy 0.9" in output.read_text()
    if name == "train_rl":
        assert "3 turns, the pole stood for" in output.read_text()
    if name == "workflow":
        assert "2 epochs, accuracy on held-out images" in output.read_text()
    if name == "scaling":
        (report,) = tmp_path.glob("scaling-*/scaling.json")
        rows = json.loads(report.read_text())["rows"]
        assert {(row["nodes"], row["nbytes"]) for row in rows} == {
            (nodes, nbytes) for nodes in (1, 2) for nbytes in (8, 65536)
        }
        assert report.with_suffix(".png").stat().st_size > 1000
