"""Fault-tolerant MPI collectives: a job goes on when a rank is killed.

The package, from the top down; each line uses only those below it:

- `init`, `Communicator` (communicator.py): what programs call, in mpi4py's spelling. Its parts,
  each a class on top of the one before: _calls.py, _copies.py, _gathers.py, _reductions.py,
  _shares.py, _objects.py, _groups.py.
  `Outcome`, `Request` (outcome.py): what they get back.
- objects.py: `Communicator.objects`, the store of objects; _keeper.pyx: it on MPI; _scratch.py: its
  files.
- buffers.py, ops.py, config.py, errors.py: buffers to addresses, operations, settings, exceptions;
  _life.py: fork, uncaught exceptions and the end of the process.
- _runtime.pyx: the engine of one rank over MPI, with its progress thread.
  _branches.pyx: those that Split and Dup add to it.
  _simulation.pyx: the same engine over a simulated network, for the tests.
- _engine.pyx and the other modules with an underscore: the protocol. It knows no MPI, no clock and
  no randomness; what decides is the same code in both.
- cython_kernels: moves and reduces chunks without the GIL.

Beside them cli.py, launcher.py and doctor.py are the command ``hopcoll``, and chaos/ kills ranks of
real jobs to prove all this.

Importing the package does not start MPI; `init` and `Communicator` do. Nor does it load NumPy:
the names below are found when they are asked for, so that the command ``hopcoll`` starts at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from hopcoll import errors

if TYPE_CHECKING:
    from mpi4py import MPI

    from hopcoll.communicator import Communicator
    from hopcoll.objects import ObjectRef
    from hopcoll.ops import AVG, BAND, BOR, BXOR, LAND, LOR, LXOR, MAX, MIN, PROD, SUM, Op
    from hopcoll.outcome import Outcome, Request

__all__ = [
    "AVG",
    "BAND",
    "BOR",
    "BXOR",
    "IN_PLACE",
    "LAND",
    "LOR",
    "LXOR",
    "MAX",
    "MIN",
    "PROD",
    "SUM",
    "Communicator",
    "ObjectRef",
    "Op",
    "Outcome",
    "Request",
    "errors",
    "init",
]

__version__ = "0.1.0"

#: Where the names are that are not loaded with the package.
_HOMES = {
    "Communicator": "communicator",
    "ObjectRef": "objects",
    "Outcome": "outcome",
    "Request": "outcome",
    **dict.fromkeys(
        ("AVG", "BAND", "BOR", "BXOR", "LAND", "LOR", "LXOR", "MAX", "MIN", "PROD", "SUM", "Op"),
        "ops",
    ),
}

# Not `_world`: a module of that name becomes an attribute of the package once it is imported.
_first: Communicator | None = None
_first_settings: dict[str, Any] = {}
_first_comm: Any = None


def init(comm: MPI.Intracomm | None = None, **settings: Any) -> Communicator:
    """Return the communicator of all ranks of the job, made at the first call.

    The first call is collective over all ranks and blocking, and starts MPI if nothing else has;
    later calls are local and return the same communicator, unless it was closed. Faults are
    tolerated from the moment that the first call has returned at all ranks.

    Rank 0 says on stderr, in one line, if a death will end the job because its MPI is not fault
    tolerant, or what was left undone because the job was not started by ``hopcoll run``;
    ``HOPCOLL_QUIET=1`` silences it.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        The ranks, if not all of ``MPI.COMM_WORLD``.
    **settings
        As for `Communicator`.

    Returns
    -------
    Communicator

    Raises
    ------
    TypeError, ValueError
        A setting is wrong; or the communicator exists already, of another `comm` or with other
        settings.
    TransferTimeoutError
        Not all ranks came within ``connect_timeout_s``.
    ClosedError
        This process is the fork of one that has called it.

    Examples
    --------
    >>> import hopcoll                                             # doctest: +SKIP
    >>> comm = hopcoll.init(timeout_s=60)                          # doctest: +SKIP
    >>> comm.Bcast(weights, root=0)                                # doctest: +SKIP
    Outcome(contributors=(0, 1, 2, 3), epoch=0)
    """
    from hopcoll.communicator import Communicator

    global _first, _first_settings, _first_comm
    if _first is not None and _first._forked:
        raise errors.ClosedError("init was called by the parent of this forked process")
    if _first is None or _first._closed:
        if comm is None:
            from mpi4py import MPI

            comm = MPI.COMM_WORLD
        _first = Communicator(comm, **settings)
        _first_settings, _first_comm = settings, comm
        _say_what_is_missing(_first)
    elif comm is not None and comm is not _first_comm:
        raise ValueError(
            "comm is another one than that with which init was called first; "
            "make a second Communicator"
        )
    elif settings and settings != _first_settings:
        raise ValueError(
            f"settings {settings} differ from {_first_settings}, with which init was called first; "
            "make a second Communicator"
        )
    return _first


def _say_what_is_missing(comm: Communicator) -> None:
    if comm.rank != 0 or comm.size == 1 or os.environ.get("HOPCOLL_QUIET", "") not in ("", "0"):
        return
    if not comm.fault_tolerant:
        line = (
            "this MPI job is not fault tolerant: a death will end the job "
            "(start it with 'hopcoll run', or ask 'hopcoll doctor')"
        )
    elif "HOPCOLL_LAUNCHER" not in os.environ:
        line = (
            "not started by 'hopcoll run', which alone could have set the transport's eager limit "
            "and made ranks that share a core yield: deaths are survived, but it may be slow"
        )
    else:
        return
    print(f"hopcoll: {line}", file=sys.stderr, flush=True)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "IN_PLACE":
        from mpi4py import MPI

        return MPI.IN_PLACE
    if name in _HOMES:
        value = getattr(importlib.import_module(f"hopcoll.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
