"""A rank's ways to end, with MPI alone: argv[1] says which, argv[2:] which ranks take it.

All ranks wait for all others first, so that no end falls before everybody has started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from mpi4py import MPI

comm = MPI.COMM_WORLD
comm.Set_errhandler(MPI.ERRORS_RETURN)
peers = [peer for peer in range(comm.size) if peer != comm.rank]
requests = [comm.Irecv(bytearray(1), peer, 1) for peer in peers]
requests += [comm.Isend(b"x", peer, 1) for peer in peers]
MPI.Request.Waitall(requests)

how, concerned = sys.argv[1], [int(word) for word in sys.argv[2:]]
if comm.rank in concerned:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "segfault":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(0)
    elif how == "exception":
        raise RuntimeError("this rank raises")
    elif how.startswith("exit"):
        sys.exit(int(how.removeprefix("exit")))
    elif how == "abort":
        comm.Abort(9)
    elif how == "wait":
        os.write(1, f"{os.getpid()}\n".encode())
        signal.pause()
    elif how == "redirect":
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
os.write(1, f"rank {comm.rank} is at its end\n".encode())
