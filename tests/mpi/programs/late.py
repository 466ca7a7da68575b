"""One rank comes late to an Allreduce: ``late.py RANK HOW``; all say when they are through.

HOW: "busy" computes in Python, "holds" holds the GIL in C, "timeout" is busy while the others give
the call a short time; all of them until the file that stdin names is there.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

import hopcoll

late, how, over = int(sys.argv[1]), sys.argv[2], sys.argv[3]
comm = hopcoll.init()
data, result = np.ones(100), np.empty(100)
comm.Allreduce(data, result)


def compute() -> None:
    while not os.path.exists(over):
        time.monotonic()


def hold() -> None:
    """Some seconds, in one call in C, in which no other thread of this process gets the GIL."""
    sum(range(1 << 29))


if comm.rank == late:
    hold() if how == "holds" else compute()
try:
    comm.Allreduce(data, result, timeout_s=2.5 if how == "timeout" and comm.rank != late else None)
    os.write(1, f"rank {comm.rank} is through\n".encode())
except hopcoll.errors.TransferTimeoutError as error:
    os.write(1, f"rank {comm.rank}: {error}\n".encode())
    error.request.wait(60)
