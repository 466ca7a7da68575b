"""From the first communicator to the end of the process: fork, uncaught exceptions, exit.

What is promised to the other ranks, and how it is kept:

====================================  =============================================================
what this rank does                   what happens
====================================  =============================================================
reaches the end, or ``sys.exit(n)``   open communicators complete their own operations and say
                                      good-bye (bounded by a deadline), then mpi4py calls
                                      MPI_Finalize; the exit code is n
ends with an uncaught exception       it says good-bye at once, waiting for nothing; the others go
                                      on as after a death; the exit code is Python's (1; after a
                                      KeyboardInterrupt the process ends by SIGINT). Without fault
                                      tolerance the job is aborted with code 1
calls MPI.Finalize itself             as at the end: what is open is closed first
forks                                 in the child every call raises `ClosedError` and MPI is never
                                      touched, its finalization at the child's exit included
dies by a signal                      nothing here runs: the others learn it from MPI
====================================  =============================================================

A death makes MPI_Finalize's own barrier hang when a job spans several hosts, so that barrier is
switched off in a job that can survive deaths; the good-bye above takes its place. Open MPI's
mpirun tells nobody of a rank that leaves by ``os._exit`` with a code other than 0, and never ends:
under ``hopcoll run`` such a rank dies by SIGKILL instead. A C library that calls ``exit`` with
such a code cannot be caught.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import traceback
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hopcoll.communicator import Communicator

__all__ = ["forget", "is_open", "watch"]

#: How long the end of a program waits for its operations, and for the other ranks to have them.
LEAVE_TIMEOUT_S = 60.0

# Values of Open MPI's ompi_mpi_state (ompi/runtime/mpiruntime.h): initialised; finalised.
_STATE_INITIALISED, _STATE_FINALISED = 2, 5


class _Process:
    """What this process has to clean up. One object, made when the first communicator is."""

    def __init__(self) -> None:
        self.open: list[Communicator] = []
        self.failed = False
        self.mpi_state = _variable_of_open_mpi("ompi_mpi_state", ctypes.c_int32)
        self.previous_hook = sys.excepthook
        sys.excepthook = self.on_uncaught
        atexit.register(self.on_exit)
        self.leave_before_mpi_ends()
        os.register_at_fork(after_in_child=self.on_fork)

    def on_uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        # At an interactive prompt the process goes on after an error.
        if not (hasattr(sys, "ps1") or sys.flags.interactive):
            self.failed = True
        self.previous_hook(kind, error, trace)

    def on_exit(self) -> None:
        if self.failed and any(c.size > 1 and not c.fault_tolerant for c in self.open):
            from mpi4py import MPI

            # The others would wait for ever. mpi4py aborts the job last, when files are flushed.
            MPI._set_abort_status(1)
            return
        # The last one made is the first to go, at every rank.
        for communicator in reversed(self.open[:]):
            try:
                communicator._leave(0.0 if self.failed else LEAVE_TIMEOUT_S)
            except BaseException:
                # One that cannot say good-bye, or is interrupted by Ctrl-C, must not keep the next
                # from doing so.
                traceback.print_exc()

    def leave_before_mpi_ends(self) -> None:
        """A program may call MPI.Finalize itself: it first deletes the attributes of COMM_SELF."""
        from mpi4py import MPI

        def on_delete(comm: Any, keyval: int, value: Any) -> None:
            self.on_exit()

        MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=on_delete), None)

    def on_fork(self) -> None:
        for communicator in self.open:
            communicator._orphan()
        self.open.clear()
        atexit.unregister(self.on_exit)
        # The child has mpi4py's exit hook, but none of MPI's threads: MPI_Finalize would hang.
        if self.mpi_state is not None and self.mpi_state.value == _STATE_INITIALISED:
            self.mpi_state.value = _STATE_FINALISED


_process: _Process | None = None


def watch(communicator: Communicator) -> None:
    """Take care of `communicator` until `forget`, or until the process ends.

    Local.

    Parameters
    ----------
    communicator : Communicator
        It stays referenced, so a communicator that nobody closes lives as long as the process.
    """
    global _process
    if _process is None:
        _process = _Process()
    _process.open.append(communicator)
    if communicator.fault_tolerant:
        no_barrier = _variable_of_open_mpi("ompi_async_mpi_finalize", ctypes.c_bool)
        if no_barrier is not None:
            no_barrier.value = True


def forget(communicator: Communicator) -> None:
    """Stop taking care of `communicator`: it said its good-bye. Local.

    Parameters
    ----------
    communicator : Communicator
        One that `watch` was called with.
    """
    if _process is not None and communicator in _process.open:
        _process.open.remove(communicator)


def is_open() -> bool:
    """Whether other ranks still count on this process. Local."""
    return _process is not None and bool(_process.open)


def _variable_of_open_mpi(name: str, kind: Any) -> Any:
    """A global variable of the loaded Open MPI library; None with another MPI.

    ``async_mpi_finalize`` is an MCA parameter, but one that MPI_T may not write; the launcher sets
    it by mpirun's command line, and only this reaches it in a job that plain mpirun started.
    """
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None or MPI.get_vendor()[0] != "Open MPI":
        return None
    try:
        return kind.in_dll(ctypes.CDLL(MPI.__file__), name)
    except (OSError, ValueError):
        return None  # a build that does not export it
