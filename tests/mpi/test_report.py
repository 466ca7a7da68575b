"""Ranks that are late, and alive: who waits for whom is said, and where the late one is."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from hopcoll import _report
from tests import launch

PROGRAM = Path(__file__).with_name("programs") / "late.py"


def report_of(job: subprocess.Popen[str], end: str) -> str:
    """What stands on stderr up to a line with these words."""
    lines = []
    for line in job.stderr:
        lines.append(line)
        if end in line:
            return "".join(lines)
    raise AssertionError(f"no line says {end!r}:\n{''.join(lines)}")


def start(tmp_path: Path, late: int, how: str) -> subprocess.Popen[str]:
    settings = {"HOPCOLL_DETECT_S": "4.5", "HOPCOLL_FLIGHT_DIR": str(tmp_path / "flight")}
    return launch.start(3, PROGRAM, str(late), how, str(tmp_path / "over"), settings=settings)


@pytest.mark.parametrize("late", [0, 2])
def test_a_late_rank_is_reported_with_its_stack(tmp_path, late):
    job = start(tmp_path, late, "busy")
    try:
        report = report_of(job, "the last operations of this rank")
        (tmp_path / "over").touch()
        stdout, _ = job.communicate(timeout=120)
    finally:
        launch.end(job)
    others = [rank for rank in range(3) if rank != late]
    assert "operation 1 (Allreduce(float64, count=100, op=SUM)) does not get on" in report
    assert f"in it: ranks {others[0]}, {others[1]}" in report
    assert re.search(rf"rank {late} \(.*, process \d+\) has not called it", report)
    assert "is outside of hopcoll for" in report
    assert "in compute" in report
    assert stdout.count("is through") == 3
    flight = json.loads(Path(report.split("this rank: ")[1].split("\n")[0]).read_text())
    assert flight["operations"][0]["operation"] == 0
    assert flight["operations"][0]["done_us"] is not None


def test_a_rank_that_holds_the_gil_gives_no_stack(tmp_path):
    job = start(tmp_path, 1, "holds")
    try:
        report = report_of(job, "the last operations of this rank")
        (tmp_path / "over").touch()
        stdout, _ = job.communicate(timeout=180)
    finally:
        launch.end(job)
    assert "it gives no Python stack: something holds the GIL" in report
    assert stdout.count("is through") == 3


def test_a_timeout_of_the_callers_names_who_is_missing(tmp_path):
    job = start(tmp_path, 1, "timeout")
    try:
        lines = [job.stdout.readline() for _ in range(2)]
        (tmp_path / "over").touch()
        stdout, _ = job.communicate(timeout=120)
    finally:
        launch.end(job)
    for line in lines:
        assert "did not complete within 2.5 s" in line
        assert "it waits for rank 1" in line
        assert Path(line.split("the last operations: ")[1].strip()).exists()
    assert stdout.count("is through") == 1


def test_words():
    here = {"answers": True, "called": 4, "inside": True, "since_s": 3.0, "stack": "", "name": "a"}
    gone = {"answers": False, "stack": "", "name": "b, process 7"}
    early = {**here, "called": 3}
    text = _report.text_of({"seq": 3, "what": "Barrier()", "ranks": {0: here, 1: gone, 2: early}})
    assert text.startswith("hopcoll: operation 3 (Barrier()) does not get on\n")
    assert "in it: rank 0\n" in text
    assert "rank 1 (b, process 7) gives no sign of life" in text
    assert "rank 2 (a) has not called it: it has called 3 operations, and waits in an" in text
    both = _report.text_of({"seq": 3, "what": "", "ranks": {0: here, 1: here}})
    assert "of an unknown kind" in both
    assert "all have called it, and their data do not come" in both
