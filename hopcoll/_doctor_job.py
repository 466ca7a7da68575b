"""The tiny jobs of `hopcoll doctor`; a program of three ranks, one of which kills itself.

``_doctor_job.py mpi`` uses nothing but MPI, so that what it shows is the library's doing;
``_doctor_job.py hopcoll`` loses a rank to an Allreduce. Each rank prints one line of JSON. Times
are of the monotonic clock, which all ranks of one host share.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

RANKS = 3
VICTIM = 1
PATIENCE_S = 10.0
ROUNDS = 100


def say(**facts: Any) -> None:
    """Print one line, whole and at once: the victim has no time to lose."""
    os.write(1, (json.dumps(facts) + "\n").encode())


def die(rank: int) -> None:
    """End as a rank does that the system kills."""
    say(rank=rank, died_at=time.monotonic())
    os.kill(os.getpid(), signal.SIGKILL)


def mpi() -> None:
    """Watch a receive from the victim fail, then exchange messages with the other survivor."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    rank = comm.rank

    def complete(*requests: MPI.Request) -> None:
        end = time.monotonic() + PATIENCE_S
        while not all([request.Test() for request in requests]):
            if time.monotonic() > end:
                raise TimeoutError

    def exchange(peers: list[int]) -> None:
        incoming = [comm.Irecv(bytearray(8), peer, 1) for peer in peers]
        outgoing = [comm.Isend(bytes(8), peer, 1) for peer in peers]
        complete(*incoming, *outgoing)

    # First contacts are made while everybody lives.
    exchange([peer for peer in range(RANKS) if peer != rank])
    if rank == VICTIM:
        die(rank)
    error, seen_at = "", 0.0
    try:
        complete(comm.Irecv(bytearray(8), VICTIM, 2))
    except MPI.Exception as failure:
        seen_at = time.monotonic()
        is_report = failure.Get_error_class() == MPI.ERR_PROC_FAILED
        error = "ERR_PROC_FAILED" if is_report else failure.Get_error_string()
    except TimeoutError:
        error = f"nothing was reported within {PATIENCE_S:.0f} s"
    begin = time.monotonic()
    try:
        for _ in range(ROUNDS):
            exchange([RANKS - VICTIM - rank])
        rounds = ROUNDS
    except (MPI.Exception, TimeoutError):
        rounds = 0
    round_us = (time.monotonic() - begin) / ROUNDS * 1e6
    say(rank=rank, error=error, seen_at=seen_at, rounds=rounds, round_us=round_us)


def hopcoll() -> None:
    """Allreduce once with everybody and once without the victim."""
    import numpy as np

    import hopcoll

    comm = hopcoll.init(timeout_s=PATIENCE_S)
    total = np.zeros(1 << 18, dtype=np.float32)
    before = comm.Allreduce(np.ones_like(total), total)
    if comm.rank == VICTIM:
        die(comm.rank)
    after = comm.Allreduce(np.ones_like(total), total)
    say(
        rank=comm.rank,
        before=before.contributors,
        after=after.contributors,
        right=bool((total == len(after.contributors)).all()),
        seen_at=time.monotonic(),
    )


if __name__ == "__main__":
    # The folder of this file would hide the package's own name from the imports above.
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    {"mpi": mpi, "hopcoll": hopcoll}[sys.argv[1]]()
