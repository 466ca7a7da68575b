"""What outlives a job: checkpoints on disk. The only package here that imports h5py.

The layout, from the bottom up::

    disk.py         the calls that change the disk
    log.py          numbered slots: what is committed, and who may commit
    shards.py       the arrays, in HDF5, with a hash for every byte
    state.py        a state as a tree of JSON and its arrays
    level.py        one directory: written, committed, read, cleaned, verified
    cuts.py         arrays that are cut over ranks: who has what. Pure
    group.py        the ranks that share a store, and their rounds
    places.py       the levels as they are declared and found; which commit is newest
    copies.py       shards sent to a partner host
    index.py        a commit's cut arrays in one file, for people
    saving.py       a save by all ranks
    restoring.py    a restore by all ranks
    levels.py       all levels of a store
    store.py        the store: asynchronous saves, restore
    history.py      who contributed to each step
    interval.py     how often to save. Pure
    live.py         a state in use, taken and put back
    metrics.py      the log of a session
    replays.py      a job run again by its history
    segments.py     what stands in a workflow's journal
    journal.py      the journal: one owner at a time, fenced; group commit
    lease.py        whether the owner of a workflow still lives
    training.py     the session: a loop that goes on
    segments.py     the bytes of a journal
    journal.py      what was intended and what was done, by one process at a time
    lease.py        whether the owner of a workflow lives
    workflows/      exactly-once workflows
    cli.py          hopcoll ckpt
"""

from recovery.cuts import Cut
from recovery.disk import Disk
from recovery.history import History
from recovery.level import Problem
from recovery.places import Level
from recovery.store import CheckpointStore, Restored, Ticket
from recovery.training import TrainingSession

__all__ = [
    "CheckpointStore",
    "Cut",
    "Disk",
    "History",
    "Level",
    "Problem",
    "Restored",
    "Ticket",
    "TrainingSession",
]
