"""The communicator: collectives in mpi4py's spelling that survive the death of ranks."""

from __future__ import annotations

import operator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from cython_kernels import reduction
from hopcoll import _life, buffers
from hopcoll.buffers import Buffer
from hopcoll.config import Config, seconds
from hopcoll.errors import (
    ClosedError,
    HopcollError,
    MpiError,
    RankFailedError,
    TransferTimeoutError,
)
from hopcoll.ops import SUM, Op, resolve
from hopcoll.outcome import ALLREDUCE, BARRIER, BCAST, FORKED, REDUCE, Outcome, Request

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Communicator"]

# Flags of an operation, as the engine numbers them.
_IN_PLACE: Final = 1
_RAISE: Final = 2

_ON_FAILURE: Final = {"survivors": 0, "raise": _RAISE}


class Communicator:
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
    contributors are numbers in `comm` as it was at the start.

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
    connect_timeout_s : float, optional
        How long the first contacts may take, in seconds.

    Attributes
    ----------
    rank : int
        This rank.
    size : int
        The number of ranks at the start.
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

    Examples
    --------
    >>> with hopcoll.Communicator(MPI.COMM_WORLD) as comm:        # doctest: +SKIP
    ...     outcome = comm.Allreduce(gradient, mean, op=hopcoll.AVG)
    ...     outcome.contributors
    (0, 1, 3)
    """

    rank: int
    size: int
    config: Config

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
        connect_timeout_s: float | None = None,
    ) -> None:
        flags = _on_failure_flags(on_failure)
        config = Config.collect(
            timeout_s=timeout_s,
            chunk_bytes=chunk_bytes,
            window_chunks=window_chunks,
            eager_bytes=eager_bytes,
            progress=progress,
            connect_timeout_s=connect_timeout_s,
        )
        self._adopt(_make_engine(comm, config), config, flags)
        _life.watch(self)

    def _adopt(self, engine: Any, config: Config, flags: int) -> None:
        self._engine = engine
        self._flags = flags
        self._closed = False
        self._forked = False
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
    def fault_tolerant(self) -> bool:
        """Whether the death of a rank is survived in this job; False: it ends the job. Local."""
        return bool(self._engine.fault_tolerant)

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

    # ---- collectives ----------------------------------------------------------------------

    def Bcast(
        self,
        buf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Broadcast from the root to all ranks. Collective, blocking; see `Ibcast`.

        Parameters
        ----------
        buf : buffer
            The data at the root, the place for it at the others: the same dtype and number of
            items at all ranks, any shape.
        root : int, default 0
            The rank that has the data.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds; None stands for the communicator's limit.

        Returns
        -------
        Outcome
            Its contributors are the members of the epoch in which the broadcast completed.

        Raises
        ------
        TypeError, ValueError, BufferError
            This call is wrong; nothing was sent, the buffer is untouched. ValueError also where
            the calls of the ranks differ, as `Request.wait` says.
        RankFailedError
            The root died and the survivors together do not hold all the data: raised at all of
            them, the buffers are undefined. The root itself keeps its data in every case.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffer.
        """
        return self.Ibcast(buf, root, on_failure=on_failure, timeout_s=timeout_s).wait()

    def Ibcast(
        self,
        buf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start a broadcast from the root to all ranks. Collective; waits for no other rank's call.

        The buffer may have any dtype of fixed size: those that the reductions do not know
        (structured ones, dates, another byte order) are sent as bytes, and then only their length
        is compared between the ranks.

        A receiver that loses the rank it receives from goes on at the offset it has, from any rank
        that holds the bytes, be it the root or not. Cost: with C chunks and n ranks about C + n
        chunk times. Memory beyond the window: none while it runs; when it completes, a copy of a
        small result (up to 32 KiB) is kept until it is stable, while with a larger one
        `Request.wait` returns only once it is.

        Parameters and errors are those of `Bcast`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.4 and 6.12.2; Hoplite (SIGCOMM 2021), section on broadcast.
        """
        engine = self._open_engine()
        root = self._check_root(root)
        flags, limit_s = self._check_call(on_failure, timeout_s)
        buffer = buffers.parse(buf, "buf", writable=root != self.rank)
        operation = engine.start(
            BCAST,
            buffer.code,
            reduction.NONE,
            root,
            buffer.items,
            0,
            buffer.address,
            flags,
            buffer.array,
        )
        return Request(self, operation, BCAST, root=root, raises=flags != 0, timeout_s=limit_s)

    def Reduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Reduce the ranks' inputs to the root. Collective, blocking; see `Ireduce`.

        Parameters
        ----------
        sendbuf : buffer or IN_PLACE
            This rank's input: the same dtype and number of items at all ranks, any shape. At the
            root, `IN_PLACE` (or None, as in mpi4py) takes the input from `recvbuf`.
        recvbuf : buffer or None
            The place of the result at the root, apart from `sendbuf`; not looked at elsewhere.
        op : Op or mpi4py.MPI.Op, default SUM
            The operation.
        root : int, default 0
            The rank that receives the result.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds; None stands for the communicator's limit.

        Returns
        -------
        Outcome
            ``outcome.root_lost`` is True at all survivors if the root is gone.

        Raises
        ------
        TypeError, ValueError, BufferError
            This call is wrong; nothing was sent, no buffer is touched. ValueError also where the
            calls of the ranks differ, as `Request.wait` says.
        RankFailedError
            Only under ``on_failure="raise"``: a rank was lost. `recvbuf` is undefined, the inputs
            are unchanged.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffers.
        """
        return self.Ireduce(
            sendbuf, recvbuf, op, root, on_failure=on_failure, timeout_s=timeout_s
        ).wait()

    def Ireduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start a reduction to the root. Collective; waits for no other rank's call.

        The result is a left fold in the order of the ranks, which starts behind the root and wraps
        around (results of up to `eager_bytes`: at rank 0); ranks that are gone are left out. So
        equal contributors give equal bits. ``AVG`` divides by the number of contributors.

        Only what a death touched is redone: partial sums that the dead rank is no part of are
        kept. Cost: with C chunks and n ranks about C + n chunk times, in a chain that ends at the
        root; up to `eager_bytes` one message from each rank to each. Memory beyond the window:
        a partial result at ranks other than the root, and with `IN_PLACE` an undo copy of the
        root's input, each as large as the result, until the operation is stable.

        Parameters and errors are those of `Reduce`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.9.1 and 6.12.7; Hoplite (SIGCOMM 2021), section on reduce.
        """
        engine = self._open_engine()
        root = self._check_root(root)
        op = resolve(op)
        flags, limit_s = self._check_call(on_failure, timeout_s)
        at_root = root == self.rank
        in_place = _is_in_place(sendbuf)
        if in_place and not at_root:
            raise ValueError(f"sendbuf is IN_PLACE, which only the root (rank {root}) may pass")
        send = None if in_place else self._input(sendbuf, op, "sendbuf")
        recv = self._result(recvbuf, send, op) if at_root else None
        return self._start_reduction(engine, REDUCE, op, root, send, recv, flags, limit_s)

    def Allreduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Reduce the ranks' inputs, and give the result to all. Collective, blocking.

        See `Iallreduce` for how.

        Parameters
        ----------
        sendbuf : buffer or IN_PLACE
            This rank's input: the same dtype and number of items at all ranks, any shape.
            `IN_PLACE` (or None, as in mpi4py) takes the input from `recvbuf`.
        recvbuf : buffer
            The place of the result, apart from `sendbuf`, of its dtype and number of items.
        op : Op or mpi4py.MPI.Op, default SUM
            The operation.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds; None stands for the communicator's limit.

        Returns
        -------
        Outcome
            All survivors have the same bytes, and the same contributors.

        Raises
        ------
        TypeError, ValueError, BufferError
            This call is wrong; nothing was sent, no buffer is touched. ValueError also where the
            calls of the ranks differ, as `Request.wait` says.
        RankFailedError
            Only under ``on_failure="raise"``: a rank was lost. `recvbuf` is undefined (with
            `IN_PLACE` it holds the input again), the inputs are unchanged.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffers.
        """
        return self.Iallreduce(
            sendbuf, recvbuf, op, on_failure=on_failure, timeout_s=timeout_s
        ).wait()

    def Iallreduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start a reduction whose result all ranks get. Collective; waits for no other's call.

        A result of more than `eager_bytes` is cut into at most 8 blocks of whole items. Each block
        is a left fold in the order of the ranks that starts at a rank of its own and wraps around,
        with the ranks left out that are gone, and is then passed on from the rank where the fold
        ended. A smaller result is folded from rank 0 on by every rank itself. So equal contributors
        give equal bits. ``AVG`` divides by the number of contributors.

        Only what a death touched is redone: partial sums that the dead rank is no part of, and
        blocks that are final, are kept. Cost: with C chunks and n ranks about 2 (C + n) chunk
        times, the blocks side by side; up to `eager_bytes` one message from each rank to each.
        Memory beyond the window: with `IN_PLACE` an undo copy of the input. A small result (up to
        32 KiB) is kept as a copy until it is stable, while with a larger one `Request.wait`
        returns only once it is.

        Parameters and errors are those of `Allreduce`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.9.6 and 6.12.8; Hoplite (SIGCOMM 2021), section on allreduce.
        """
        engine = self._open_engine()
        op = resolve(op)
        flags, limit_s = self._check_call(on_failure, timeout_s)
        send = None if _is_in_place(sendbuf) else self._input(sendbuf, op, "sendbuf")
        recv = self._result(recvbuf, send, op)
        return self._start_reduction(engine, ALLREDUCE, op, 0, send, recv, flags, limit_s)

    def Barrier(self, *, on_failure: str | None = None, timeout_s: float | None = None) -> Outcome:
        """Wait until all living ranks have called it. Collective, blocking.

        Cost: one message from each rank to each. No memory beyond it.

        Parameters
        ----------
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds; None stands for the communicator's limit.

        Returns
        -------
        Outcome
            Its contributors are the members of the epoch in which it completed.

        Raises
        ------
        ValueError
            This call is wrong and nothing was sent; or other ranks called another operation.
        RankFailedError
            Only under ``on_failure="raise"``: a rank was lost.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them.

        References
        ----------
        MPI 4.1, section 6.3.
        """
        return self.Ibarrier(on_failure=on_failure, timeout_s=timeout_s).wait()

    def Ibarrier(self, *, on_failure: str | None = None, timeout_s: float | None = None) -> Request:
        """Tell the others that this rank has come. Collective; waits for no other rank's call.

        Parameters and errors are those of `Barrier`; the errors of the operation itself come from
        the request, which is complete when all living ranks have called it.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, section 6.12.1.
        """
        engine = self._open_engine()
        flags, limit_s = self._check_call(on_failure, timeout_s)
        operation = engine.start(BARRIER, reduction.BYTES, reduction.NONE, 0, 0, 0, 0, flags, None)
        return Request(self, operation, BARRIER, root=0, raises=flags != 0, timeout_s=limit_s)

    # ---- the end --------------------------------------------------------------------------

    def close(self, timeout_s: float | None = None) -> bool:
        """Leave the communicator. Every rank should call it; closing again does nothing.

        Blocks until this rank's operations are complete and no other rank can need anything of it,
        then says good-bye. Ranks that go on without it treat it like a rank that died, from the
        next operation on. The end of the program closes what is still open, and so does leaving a
        ``with`` block; with an exception on its way out, both say good-bye without waiting.

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

    def _leave(self, timeout_s: float) -> bool:
        if self._closed or self._forked:
            return True
        self._closed = True
        _life.forget(self)
        return bool(self._engine.finalize(timeout_s))

    def _orphan(self) -> None:
        """Let go of the engine, in the child of a fork."""
        self._forked = True
        self._engine.abandon()

    # ---- checks: each raises before the operation has taken its place in the order --------

    def _open_engine(self) -> Any:
        if self._forked:
            raise ClosedError(FORKED)
        if self._closed:
            raise ClosedError("the communicator is closed")
        return self._engine

    def _check_root(self, root: int) -> int:
        try:
            number = operator.index(root)
        except TypeError:
            raise TypeError(f"root must be an integer, not {type(root).__name__}") from None
        if not 0 <= number < self.size:
            raise ValueError(f"root must be from 0 to {self.size - 1}, not {number}")
        return number

    def _check_call(
        self, on_failure: str | None, timeout_s: float | None
    ) -> tuple[int, float | None]:
        flags = self._flags if on_failure is None else _on_failure_flags(on_failure)
        if timeout_s is None:
            return flags, self.config.timeout_s
        return flags, seconds("timeout_s", timeout_s)

    def _input(self, sendbuf: Any, op: Op, noun: str) -> Buffer:
        buffer = buffers.parse(sendbuf, noun, writable=False)
        buffers.check_reducible(buffer, op, noun)
        return buffer

    def _result(self, recvbuf: Any, send: Buffer | None, op: Op) -> Buffer:
        if _is_in_place(recvbuf):
            raise TypeError("recvbuf must be a buffer; IN_PLACE goes into sendbuf")
        buffer = buffers.parse(recvbuf, "recvbuf", writable=True)
        if send is None:
            buffers.check_reducible(buffer, op, "recvbuf")
        else:
            buffers.check_matching(send, buffer)
            buffers.check_disjoint(send, buffer)
        return buffer

    def _start_reduction(
        self,
        engine: Any,
        kind: int,
        op: Op,
        root: int,
        send: Buffer | None,
        recv: Buffer | None,
        flags: int,
        limit_s: float | None,
    ) -> Request:
        # Both are never None: either is the input, and the root and Allreduce have a result.
        shape: Any = recv if send is None else send
        operation = engine.start(
            kind,
            shape.code,
            op.code,
            root,
            shape.items,
            0 if send is None else send.address,
            0 if recv is None else recv.address,
            flags | (_IN_PLACE if send is None else 0),
            (None if send is None else send.array, None if recv is None else recv.array),
        )
        return Request(self, operation, kind, root=root, raises=flags != 0, timeout_s=limit_s)


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


def _on_failure_flags(on_failure: str) -> int:
    try:
        return _ON_FAILURE[on_failure]
    except (KeyError, TypeError):
        raise ValueError(f"on_failure must be 'survivors' or 'raise', not {on_failure!r}") from None


def _is_in_place(buf: Any) -> bool:
    # mpi4py's constant is a singleton; it can only be here if mpi4py.MPI is loaded already.
    return buf is None or type(buf).__name__ == "InPlaceType"
