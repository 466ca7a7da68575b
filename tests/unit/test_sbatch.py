"""The batch script: bash and Slurm read it as it is meant, and it does so without a cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "train_sgd.sbatch"

#: Stands in for hopcoll: notes its arguments, says that it runs, and ends as it is told to.
HOPCOLL = """\
#!{python}
import json, os, signal, sys
json.dump(sys.argv[1:], open("arguments.json", "w"))
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
print("started", flush=True)
if os.environ["END"] == "signal":
    signal.pause()
sys.exit(int(os.environ["END"]))
"""
SCONTROL = """\
#!/bin/sh
echo "$@" >> scontrol.txt
"""


def test_bash_can_read_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=10)


def test_what_it_asks_of_slurm() -> None:
    lines = SCRIPT.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
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
    assert {"requeue", "no-kill", "nodes", "ntasks-per-node", "time", "output"} <= options.keys()
    assert "export SLURM_NO_KILL=set" in lines


@pytest.fixture
def submit(tmp_path: Path):
    """A function that runs the script as slurmd would, with stand-ins for hopcoll and scontrol."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("hopcoll", HOPCOLL.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def start(end: str, restarts: str | None = None) -> subprocess.Popen[str]:
        environment = {name: v for name, v in os.environ.items() if not name.startswith("SLURM_")}
        environment.update(
            PATH=f"{programs}:{environment['PATH']}",
            SLURM_SUBMIT_DIR=str(tmp_path),
            SLURM_JOB_ID="123",
            END=end,
        )
        if restarts is not None:
            environment["SLURM_RESTART_COUNT"] = restarts
        return subprocess.Popen(
            ["bash", str(SCRIPT)], stdout=subprocess.PIPE, text=True, env=environment, cwd="/"
        )

    return start


def requeued(tmp_path: Path) -> bool:
    asked = tmp_path / "scontrol.txt"
    if not asked.exists():
        return False
    assert asked.read_text() == "requeue 123\n"
    return True


@pytest.mark.parametrize(
    ("end", "restarts", "expected"),
    [
        ("0", None, False),
        ("0", "3", False),
        ("7", None, True),
        ("7", "19", True),
        ("7", "20", False),
    ],
)
def test_a_job_that_failed_is_requeued_so_often(
    tmp_path: Path, submit, end: str, restarts: str | None, expected: bool
) -> None:
    with submit(end, restarts) as process:
        assert process.wait(30) == int(end)
    assert requeued(tmp_path) is expected


def test_the_signal_before_the_time_limit_ends_the_job_and_requeues_it(
    tmp_path: Path, submit
) -> None:
    with submit("signal") as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 143
    assert requeued(tmp_path)


def test_the_program_takes_the_arguments_that_it_is_given(tmp_path: Path, submit) -> None:
    with submit("0") as process:
        assert process.wait(30) == 0
    check = (
        "import json, sys; from examples import sgd_digits; words = json.load(sys.stdin);"
        "assert words[:4] == ['run', '--restarts', '5', 'examples/sgd_digits.py'], words;"
        "sys.argv = words[3:]; print(sgd_digits.parse_arguments().checkpoint_dir)"
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
    assert parsed.stdout == "train-sgd-output/123\n"
    assert (tmp_path / "train-sgd-output").is_dir()
