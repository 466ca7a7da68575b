"""`hopcoll doctor` on this machine, and on one whose mpirun cannot go on after a death."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests import launch


def doctor(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hopcoll.cli", "doctor", *options],
        cwd=launch.ROOT,
        env=launch.environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_fault_tolerance_is_real_here(tmp_path):
    ended = doctor("--json", str(tmp_path / "findings.json"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    content = json.loads((tmp_path / "findings.json").read_text())
    assert content["ok"]
    details = {finding["name"]: finding["detail"] for finding in content["findings"]}
    assert "MPI_ERR_PROC_FAILED" in details["a death is reported"]
    assert "100 exchanges" in details["messages go on"]
    assert "without the dead rank" in details["hopcoll goes on"]


def test_what_is_missing_is_named_with_its_fix(tmp_path):
    # It says that it is of an older Open MPI, and every job that it starts ends with 1.
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(
        "#!/bin/sh\ntest \"$1\" = --version || exit 1\necho 'mpirun (Open MPI) 4.1.4'\n"
    )
    os.chmod(mpirun, 0o755)
    ended = doctor("--mpirun", str(mpirun))
    assert ended.returncode == 1
    missing = [line for line in ended.stdout.splitlines() if line.startswith("MISSING")]
    assert [name for name in ("mpirun", "a death", "hopcoll") if name in "".join(missing)] == [
        "mpirun",
        "a death",
        "hopcoll",
    ]
    assert ended.stdout.count("to do: ") == len(missing)
