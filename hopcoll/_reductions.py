"""The collectives that combine inputs: Reduce, and Allreduce, also of part of the ranks."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from hopcoll import buffers
from hopcoll._calls import (
    ARRIVAL_FLAG,
    CARRY_FLAG,
    IN_PLACE_FLAG,
    ORDERED_FLAG,
    PARTIAL_FLAG,
    address_of,
    is_in_place,
    number_of,
)
from hopcoll._gathers import Gathers
from hopcoll.buffers import Buffer
from hopcoll.config import seconds
from hopcoll.ops import SUM, Op, resolve
from hopcoll.outcome import (
    ALLREDUCE,
    REDUCE,
    Outcome,
    Request,
)

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Reductions"]


class Reductions(Gathers):
    """The part of `hopcoll.Communicator` that combines inputs to one result."""

    def Reduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        root: int = 0,
        *,
        order: str = "rank",
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
        order : {"rank", "arrival"}, default "rank"
            In which order the inputs are combined; see `Iallreduce`. Alike at all ranks.
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
            sendbuf, recvbuf, op, root, order=order, on_failure=on_failure, timeout_s=timeout_s
        ).wait()

    def Ireduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        root: int = 0,
        *,
        order: str = "rank",
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
        flags |= self._check_order(op, order)
        at_root = root == self.rank
        in_place = is_in_place(sendbuf)
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
        order: str = "rank",
        quorum: int | None = None,
        deadline_s: float | None = None,
        late: str | None = None,
        name: str = "",
        on_failure: str | None = None,
        timeout_s: float | None = None,
        check: str | None = None,
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
        order : {"rank", "arrival"}, default "rank"
            In which order the inputs are combined. Alike at all ranks.
        quorum : int, optional
            The inputs of so many ranks are enough: those that call first; of all that are alive
            where they are fewer. 1 to `size`. Alike at all ranks, as are the next three.
        deadline_s : float, optional
            So many seconds after the first rank has called it, the inputs of those that have called
            are enough. With a quorum too: whichever comes first.
        late : {"drop", "carry"}, optional
            What becomes of this rank's input when it came too late. ``"drop"`` (the default): it is
            left out. ``"carry"``: it is added to this rank's input to the next operation with the
            same `name`, dtype and count, exactly once; for ``op=SUM`` alone. Without `quorum`
            and `deadline_s`, ``"carry"`` waits for all ranks, and takes along what they carry.
        name : str, default ""
            Tells apart what is carried, for ``late="carry"``.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds; None stands for the communicator's limit.
        check : {"hash"}, optional
            Compare a hash of the result over all ranks afterwards, by one small message to each:
            for those who do not trust their memory, or an operation of their own. Waits for all
            ranks, so not with `quorum` or `deadline_s`.

        Returns
        -------
        Outcome
            All survivors have the same bytes, and the same contributors.

        Raises
        ------
        TypeError, ValueError, BufferError
            This call is wrong; nothing was sent, no buffer is touched. ValueError also where the
            calls of the ranks differ, as `Request.wait` says.
        MissedError
            This rank came so late to a partial operation that nobody keeps the result any more.
        RankFailedError
            Only under ``on_failure="raise"``: a rank was lost. `recvbuf` is undefined (with
            `IN_PLACE` it holds the input again), the inputs are unchanged.
        DivergedError
            ``check="hash"`` found results that differ; raised at all ranks.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffers.
        """
        self._check_check(check)
        if check is not None and (quorum is not None or deadline_s is not None):
            raise ValueError("check waits for all ranks: not with quorum or deadline_s")
        outcome = self.Iallreduce(
            sendbuf,
            recvbuf,
            op,
            order=order,
            quorum=quorum,
            deadline_s=deadline_s,
            late=late,
            name=name,
            on_failure=on_failure,
            timeout_s=timeout_s,
        ).wait()
        if check is not None:
            self._compare_replicas("Allreduce", recvbuf, timeout_s)
        return outcome

    def Iallreduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        *,
        order: str = "rank",
        quorum: int | None = None,
        deadline_s: float | None = None,
        late: str | None = None,
        name: str = "",
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

        **Order.** ``order="rank"`` is what was said above: equal contributors give equal bits. With
        ``order="arrival"`` results above `eager_bytes` are folded in the order in which the ranks
        call: those who are early have combined their inputs by the time that the last one comes,
        whose data then pass each link once. It costs a small message to and from the lowest
        rank, and the last bits of a sum of floats depend on who came when. The operation must
        commute. Not with `quorum` or `deadline_s`.

        **Partial operations.** With `quorum` or `deadline_s` the lowest living rank keeps the roll:
        its thread hears who has called (one small message from each), and closes the roll when it
        is time, by its own clock. From then on it is a reduction of those on the roll, whom the
        outcome names, alike at all ranks. Ranks that call it later get the result from a copy that
        is kept for them (`late_bytes` of the communicator), and their own input is dropped or
        carried. The first to call is always in time, so there is always a contributor. The others
        run ahead of a rank by at most 64 operations: then they wait for it. A death makes an
        operation that does not stand start again with a new roll, of the quorum or more. What a
        dead rank carries is lost with it; what a living one carries at the end of the job, an
        operation with ``late="carry"`` and neither quorum nor deadline takes along (or `Flush`).

        Parameters and errors are those of `Allreduce`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.9.6 and 6.12.8; Hoplite (SIGCOMM 2021), sections on allreduce, and on
        reducing the first objects that are ready.
        """
        engine = self._open_engine()
        op = resolve(op)
        flags, limit_s = self._check_call(on_failure, timeout_s)
        roll, enough, deadline = self._check_partial(op, quorum, deadline_s, late, name)
        roll |= self._check_order(op, order)
        if roll & PARTIAL_FLAG and roll & ARRIVAL_FLAG:
            raise ValueError("order='arrival' is for operations of all ranks: not with quorum or "
                             "deadline_s")  # fmt: skip
        send = None if is_in_place(sendbuf) else self._input(sendbuf, op, "sendbuf")
        recv = self._result(recvbuf, send, op)
        return self._start_reduction(
            engine,
            ALLREDUCE,
            op,
            enough,
            send,
            recv,
            flags | roll,
            limit_s,
            layout=number_of(f"carry {name}".encode()) if roll & CARRY_FLAG else 0,
            deadline_s=deadline,
        )

    def Flush(
        self,
        recvbuf: Any,
        *,
        name: str = "",
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Sum up what the ranks still carry, and give it to all. Collective, blocking.

        For the end of a job whose operations had ``late="carry"``: an Allreduce of zeros, to which
        every rank adds what it carries under this name. Nothing is carried afterwards.

        Parameters
        ----------
        recvbuf : buffer
            The place of the sum, of the dtype and number of items of those operations.
        name : str, default ""
            As it was given to them.
        on_failure, timeout_s
            As for `Allreduce`.

        Returns
        -------
        Outcome

        Raises
        ------
        HopcollError, TypeError, ValueError, BufferError
            As `Allreduce` raises them.
        """
        place = buffers.parse(recvbuf, "recvbuf", writable=True)
        zeros = np.zeros(place.items, place.dtype)
        return self.Allreduce(
            zeros, recvbuf, late="carry", name=name, on_failure=on_failure, timeout_s=timeout_s
        )

    def _check_order(self, op: Op, order: str) -> int:
        if order not in ("rank", "arrival"):
            raise ValueError(f"order must be 'rank' or 'arrival', not {order!r}")
        if order == "arrival" and op.function is not None and not op.commute:
            raise ValueError(f"order='arrival' needs an op that commutes, which {op.name} does not")
        return ARRIVAL_FLAG if order == "arrival" else 0

    def _check_partial(
        self,
        op: Op,
        quorum: int | None,
        deadline_s: float | None,
        late: str | None,
        name: str,
    ) -> tuple[int, int, float | None]:
        """The flags, the quorum (0: none) and the deadline of a call."""
        enough, flags = 0, 0
        if quorum is not None:
            try:
                enough = operator.index(quorum)
            except TypeError:
                raise TypeError(f"quorum must be an integer, not {type(quorum).__name__}") from None
            if not 1 <= enough <= self.size:
                raise ValueError(f"quorum must be from 1 to {self.size}, not {enough}")
        deadline = seconds("deadline_s", deadline_s)
        if quorum is not None or deadline is not None:
            flags |= PARTIAL_FLAG
        if late not in (None, "drop", "carry"):
            raise ValueError(f"late must be 'drop' or 'carry', not {late!r}")
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {type(name).__name__}")
        if late == "carry":
            flags |= CARRY_FLAG
            if op.code != SUM.code or op.function is not None:
                raise ValueError(f"late='carry' adds inputs up: op must be SUM, not {op.name}")
        elif name:
            raise ValueError("name is for late='carry' alone")
        elif late == "drop" and not flags & PARTIAL_FLAG:
            raise ValueError("late is for operations with a quorum or a deadline_s")
        self._partials += flags & PARTIAL_FLAG != 0
        return flags, enough, deadline

    def _input(self, sendbuf: Any, op: Op, noun: str) -> Buffer:
        buffer = buffers.parse(sendbuf, noun, writable=False)
        buffers.check_reducible(buffer, op, noun)
        return buffer

    def _result(self, recvbuf: Any, send: Buffer | None, op: Op) -> Buffer:
        if is_in_place(recvbuf):
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
        *,
        count: int | None = None,
        lengths: tuple[Any, Any, Any, Any] | None = None,
        layout: int = 0,
        deadline_s: float | None = None,
    ) -> Request:
        # Both are never None: either is the input, and who has no input has a result.
        shape: Any = recv if send is None else send
        function = None
        if op.function is not None:
            function = op.function, shape.dtype
            layout ^= number_of(op.name.encode())
            if not op.commute:
                flags |= ORDERED_FLAG
        return self._begin(
            engine,
            kind,
            shape.code,
            op.code,
            root,
            shape.items if count is None else count,
            address_of(send),
            address_of(recv),
            flags | (IN_PLACE_FLAG if send is None else 0),
            limit_s,
            lengths,
            function,
            layout,
            deadline_s,
        )
