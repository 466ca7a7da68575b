"""The collectives that combine inputs: Reduce and Allreduce."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


from hopcoll import buffers
from hopcoll._calls import (
    IN_PLACE_FLAG,
    ORDERED_FLAG,
    address_of,
    is_in_place,
    number_of,
)
from hopcoll._gathers import Gathers
from hopcoll.buffers import Buffer
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
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds; None stands for the communicator's limit.
        check : {"hash"}, optional
            Compare a hash of the result over all ranks afterwards, by one small message to each:
            for those who do not trust their memory, or an operation of their own.

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
        DivergedError
            ``check="hash"`` found results that differ; raised at all ranks.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffers.
        """
        self._check_check(check)
        outcome = self.Iallreduce(
            sendbuf, recvbuf, op, on_failure=on_failure, timeout_s=timeout_s
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
        send = None if is_in_place(sendbuf) else self._input(sendbuf, op, "sendbuf")
        recv = self._result(recvbuf, send, op)
        return self._start_reduction(engine, ALLREDUCE, op, 0, send, recv, flags, limit_s)

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
        )
