"""What outlives a job: checkpoints on disk. The only package here that imports h5py.

The layout, from the bottom up::

    disk.py         the calls that change the disk
    log.py          numbered slots: what is committed, and who may commit
    shards.py       the arrays, in HDF5, with a hash for every byte
    state.py        a state as a tree of JSON and its arrays
    level.py        one directory: written, committed, read, cleaned, verified
    store.py        the store: asynchronous saves, restore

    checkpoint.py   the older way: one file a step
"""

from recovery.checkpoint import AsyncWriter, Checkpoint, load, load_latest, save
from recovery.disk import Disk
from recovery.history import History
from recovery.level import Problem
from recovery.store import CheckpointStore, Restored, Ticket
from recovery.training import TrainingSession

__all__ = [
    "AsyncWriter",
    "Checkpoint",
    "CheckpointStore",
    "Disk",
    "History",
    "Problem",
    "Restored",
    "Ticket",
    "TrainingSession",
    "load",
    "load_latest",
    "save",
]
