"""What outlives a job: checkpoints on disk. The only package here that imports h5py.

The layout::

    checkpoint.py   one file a step: written aside, made durable, then renamed; checked when read

Nothing in here talks to other ranks. Which rank writes, and which file all of them resume from, is
decided by the program (examples/sgd_digits.py shows how, with two collectives).
"""

from recovery.checkpoint import AsyncWriter, Checkpoint, load, load_latest, save

__all__ = ["AsyncWriter", "Checkpoint", "load", "load_latest", "save"]
