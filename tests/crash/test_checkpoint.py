"""SIGKILL at every single call by which a checkpoint changes the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hopcoll.errors import CheckpointNotFoundError
from recovery import load_latest, save
from tests import launch

CHILD = Path(__file__).with_name("checkpoint_child.py")
STEPS = (1, 2, 3, 4)


@pytest.mark.parametrize("how", ["save", "submit"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_call(tmp_path: Path, how: str, moment: str) -> None:
    subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path), how, moment],
        check=True,
        timeout=120,
        env=launch.environment(),  # one thread, as the child forks
    )
    folders = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    *killed, unharmed = folders
    assert not (unharmed / "killed").exists()
    assert load_latest(unharmed / "store").step == STEPS[-1]
    calls = [(folder / "killed").read_text() for folder in killed]
    assert set(calls) == {"write", "fsync", "rename", "unlink"}
    assert calls.count("rename") == len(STEPS)
    for folder in killed:
        check_store(folder)


def check_store(folder: Path) -> None:
    """The newest acknowledged state is there, or the one after it; and work can go on."""
    acknowledged = [int(line) for line in (folder / "acknowledged").read_text().split()]
    newest = acknowledged[-1] if acknowledged else 0
    store = folder / "store"
    try:
        found = load_latest(store)  # a warning would be an error here: no file is damaged
    except CheckpointNotFoundError:
        assert newest == 0
    else:
        assert found.step in (newest, newest + 1)
        assert found.attributes == {"step": found.step}
        np.testing.assert_array_equal(found.arrays["weights"], np.arange(1000.0) + found.step)
    save(store, newest + 1, {"after": np.ones(3)})
    assert load_latest(store).step == newest + 1
    assert not [name for name in os.listdir(store) if name.endswith(".tmp")]
