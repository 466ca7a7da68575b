"""The communicator: collectives in mpi4py's spelling that survive the death of ranks."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hopcoll import _life
from hopcoll._calls import on_failure_flags
from hopcoll._groups import Groups
from hopcoll.config import Config, seconds
from hopcoll.errors import HopcollError, MpiError, RankFailedError, TransferTimeoutError

if TYPE_CHECKING:
    from mpi4py import MPI

    from hopcoll.objects import Objects

__all__ = ["Communicator"]


class Communicator(Groups):
    """Collectives over the ranks of an MPI communicator, which go on when ranks die.

    Making one is collective over `comm` and blocking: the communicator is duplicated, every pair of
    ranks makes its first contact, and the settings are compared. Faults are tolerated from the
    moment that this has returned at all ranks. Memory: a few MiB, and `window_chunks` chunks for
    each stream that is under way.

    The collectives are those of MPI (MPI 4.1, chapter 6): all ranks call the same ones in the same
    order, with matching arguments. Each returns an `Outcome`, the I-forms a `Request`. What is
    wrong with this rank's own arguments is raised before anything is sent, so the call does not
    count as one of that order; arguments that do not match those of other ranks raise a ValueError
    at every rank concerned, which names the groups that differ, and break the communicator: every
    later operation raises the same ValueError. A rank may use it from one thread at a time.

    A rank that is lost stays lost, and no rank is renumbered: `rank`, `size`, roots and
    contributors are numbers in `comm` as it was at the start. `Split` and `Dup` make communicators
    with numbers of their own.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks. It is duplicated and otherwise left alone.
    on_failure : {"survivors", "raise"}, default "survivors"
        What becomes of an operation that a death touches. ``"survivors"``: it completes with the
        contributions of the survivors. ``"raise"``: it raises `RankFailedError`, alike at all
        survivors; where its result stands all the same, it succeeds everywhere, and the next one
        raises. Each call can say otherwise, but all ranks must say the same.
    timeout_s : float, optional
        How long a call waits before it raises `TransferTimeoutError`, in seconds; each call can
        say otherwise. None looks at ``HOPCOLL_TIMEOUT_S``; without that there is no limit.
    chunk_bytes, window_chunks, eager_bytes : int, optional
        How results are cut into messages (see `hopcoll.config.Config`); alike at all ranks.
    progress : {"thread", "inline"}, optional
        Whether a native thread makes progress between this rank's calls. With ``"inline"``, other
        ranks may have to wait until this one calls again, and it learns of a death no sooner.
    detect_s : float, optional
        How long a rank may be silent before the others go on without it, in seconds (30 by
        default; ``math.inf``: for ever); alike at all ranks.
    late_bytes : int, optional
        How many bytes of results are kept for ranks that are late (64 MiB by default; see
        `hopcoll.config.Config`).
    object_bytes : int, optional
        Memory for the objects that this rank holds (2 GiB by default; see `objects`).
    object_scratch : str or os.PathLike, optional
        Where the files are made of those that have no room there (see `hopcoll.config.Config`).
    object_scratch_bytes : int, optional
        How long these may be together (16 GiB by default; 0: there are none).
    inline_bytes : int, optional
        Up to which size objects travel in the directory's messages (32 KiB by default); alike at
        all ranks.
    trace : str or os.PathLike, optional
        A folder into which each rank writes what its engine is told and what it does, for
        ``hopcoll replay``. Without it nothing is written, and nothing is paid.
    trace_bytes : int, optional
        How long a rank's trace may become (256 MiB by default).
    connect_timeout_s : float, optional
        How long the first contacts may take, in seconds.

    Attributes
    ----------
    rank : int
        This rank.
    size : int
        The number of ranks at the start.
    parent_ranks : tuple of int
        What rank i of this communicator is, at place i, in the one that it was split off; in `comm`
        if it was not.
    config : Config
        The settings in force.

    Raises
    ------
    TypeError, ValueError
        `comm` is no intracommunicator, or a setting is wrong; at once and without communication.
        ValueError also, at all ranks, where the settings of two ranks differ.
    TransferTimeoutError
        Not all ranks came within `connect_timeout_s`; the message names those that did not.
    RankFailedError
        A rank died before it was connected. The others have to make a communicator without it.
    MpiError
        MPI failed, or is not the one that the kernels were built against.
    OSError
        The trace cannot be written; FileExistsError where there is one already.

    Examples
    --------
    >>> with hopcoll.Communicator(MPI.COMM_WORLD) as comm:        # doctest: +SKIP
    ...     outcome = comm.Allreduce(gradient, mean, op=hopcoll.AVG)
    ...     outcome.contributors
    (0, 1, 3)
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        *,
        on_failure: str = "survivors",
        timeout_s: float | None = None,
        chunk_bytes: int | None = None,
        window_chunks: int | None = None,
        eager_bytes: int | None = None,
        progress: str | None = None,
        detect_s: float | None = None,
        late_bytes: int | None = None,
        object_bytes: int | None = None,
        object_scratch: str | os.PathLike[str] | None = None,
        object_scratch_bytes: int | None = None,
        inline_bytes: int | None = None,
        trace: str | os.PathLike[str] | None = None,
        trace_bytes: int | None = None,
        connect_timeout_s: float | None = None,
    ) -> None:
        flags = on_failure_flags(on_failure)
        config = Config.collect(
            timeout_s=timeout_s,
            chunk_bytes=chunk_bytes,
            window_chunks=window_chunks,
            eager_bytes=eager_bytes,
            progress=progress,
            detect_s=detect_s,
            late_bytes=late_bytes,
            object_bytes=object_bytes,
            object_scratch=object_scratch,
            object_scratch_bytes=object_scratch_bytes,
            inline_bytes=inline_bytes,
            trace=trace,
            trace_bytes=trace_bytes,
            connect_timeout_s=connect_timeout_s,
        )
        self._adopt(_make_engine(comm, config), config, flags)
        _life.watch(self)

    def _adopt(self, engine: Any, config: Config, flags: int) -> None:
        self._engine = engine
        self._flags = flags
        self._closed = False
        self._forked = False
        self._partials = 0
        self._outcome = None
        self._root = self
        self._branches: list[Communicator] = []
        self._store: Objects | None = None
        self.parent_ranks = tuple(range(engine.size))
        self.config = config
        self.rank = engine.rank
        self.size = engine.size

    def __repr__(self) -> str:
        state = " closed" if self._closed or self._forked else ""
        return f"<Communicator rank {self.rank} of {self.size}{state}>"

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # With an error on its way out, the others may be waiting for what never comes.
        if kind is None:
            self.close()
        else:
            self._leave(0.0)

    # ---- what is known about the group ----------------------------------------------------

    @property
    def alive(self) -> tuple[int, ...]:
        """The ranks that are members in the current epoch, ascending. Local.

        Numbered as at the start. A rank that died is listed until its death was noticed and
        decided upon.
        """
        return tuple(self._open_engine().alive)

    @property
    def epoch(self) -> int:
        """The version of the membership: 0 at the start, one more with each decision. Local."""
        return int(self._open_engine().epoch)

    @property
    def partial_count(self) -> int:
        """How many operations with a ``quorum`` or a ``deadline_s`` this rank has called. Local."""
        return self._partials

    @property
    def fault_tolerant(self) -> bool:
        """Whether the death of a rank is survived in this job; False: it ends the job. Local."""
        return bool(self._engine.fault_tolerant)

    @property
    def objects(self) -> Objects:
        """The store of objects of the job: the same one from every communicator of it. Local."""
        self._open_engine()
        root = self._root
        if root._store is None:
            from hopcoll._keeper import Keeper  # late: it starts MPI
            from hopcoll._scratch import Scratch
            from hopcoll.objects import Objects

            config, engine = root.config, root._open_engine()
            scratch = Scratch(config.object_scratch, root.rank)
            root._store = Objects(Keeper(engine, scratch if config.object_scratch_bytes else None))
        return root._store

    def Get_rank(self) -> int:
        """Return this rank, as mpi4py spells it. Local."""
        return self.rank

    def Get_size(self) -> int:
        """Return the number of ranks at the start, as mpi4py spells it. Local."""
        return self.size

    def counters(self) -> dict[str, int]:
        """Return what the engine has counted at this rank since the communicator was made.

        Local. The dict is the caller's own copy.

        Returns
        -------
        dict of str to int
            ``ballots`` (that this rank took part in), ``stands`` and ``reruns`` (operations that a
            ballot let stand, or had redone), ``chunks_sent``, ``chunks_received``, ``bytes_sent``,
            ``bytes_received``, ``voids`` (streams that ended because a death made their data
            worthless) and others.

        Raises
        ------
        ClosedError
            The communicator is closed.
        """
        return dict(self._open_engine().counters())

    def _sprout(self, branch: Any, members: tuple[int, ...]) -> Communicator:
        made = type(self).__new__(type(self))
        made._adopt(branch, self.config, self._flags)
        made._root = self._root
        made.parent_ranks = members
        self._root._branches.append(made)
        return made

    # ---- the end --------------------------------------------------------------------------

    def close(self, timeout_s: float | None = None) -> bool:
        """Leave the communicator. Every rank should call it; closing again does nothing.

        Blocks until this rank's operations are complete and no other rank can need anything of it,
        then says good-bye. Ranks that go on without it treat it like a rank that died, from the
        next operation on. The end of the program closes what is still open, and so does leaving a
        ``with`` block; with an exception on its way out, both say good-bye without waiting. What
        was split off it, and off that, is left first; closing one of those leaves only that one.

        Parameters
        ----------
        timeout_s : float, optional
            Wait at most so many seconds before the good-bye; None stands for 60.

        Returns
        -------
        bool
            False if the time was too short: operations of this rank may be incomplete (their
            requests raise `ClosedError`, their receive buffers are undefined), and others may have
            lost what only this rank had, as if it had died.

        Raises
        ------
        TypeError, ValueError
            `timeout_s` is no time. The communicator stays open.
        """
        limit_s = seconds("timeout_s", timeout_s)
        return self._leave(_life.LEAVE_TIMEOUT_S if limit_s is None else limit_s)

    def Free(self) -> None:
        """Leave the communicator, as mpi4py spells it; see `close`."""
        self.close()

    def _leave(self, timeout_s: float) -> bool:
        if self._closed or self._forked:
            return True
        self._closed = True
        if self._root is self:
            _life.forget(self)
            for branch in self._branches:
                branch._closed = True
            self._branches.clear()
        elif self in self._root._branches:
            self._root._branches.remove(self)
        try:
            return bool(self._engine.finalize(timeout_s))
        finally:
            if self._store is not None:
                self._store._close()

    def _orphan(self) -> None:
        """Let go of the engine, in the child of a fork."""
        for one in (self, *self._branches):
            one._forked = True
            one._engine.abandon()


def _make_engine(comm: Any, config: Config) -> Any:
    from mpi4py import MPI

    if isinstance(comm, MPI.Comm) and comm == MPI.COMM_NULL:
        raise ValueError("comm is COMM_NULL: this rank belongs to no group")
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm must be an intracommunicator of MPI, not {type(comm).__name__}")
    # Loaded late, so that `import hopcoll` alone does not start MPI.
    from hopcoll._runtime import Engine

    try:
        return Engine(comm, config)
    except HopcollError:
        raise
    except ConnectionError as error:
        raise RankFailedError(f"comm could not be connected: {error}") from error
    except TimeoutError as error:
        raise TransferTimeoutError(f"comm could not be connected: {error}") from error
    except RuntimeError as error:
        raise MpiError(f"comm could not be connected: {error}") from error
