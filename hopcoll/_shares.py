"""Reductions of which each rank gets a result of its own: Reduce_scatter, Scan and Exscan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hopcoll import buffers
from hopcoll._calls import VECTOR_FLAG, is_in_place, layout_of
from hopcoll._reductions import Reductions
from hopcoll.buffers import Buffer
from hopcoll.errors import RankFailedError
from hopcoll.ops import AVG, SUM, Op, resolve
from hopcoll.outcome import EXSCAN, REDUCE_SCATTER, SCAN, Outcome, Request

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Shares"]


class Shares(Reductions):
    """The part of `hopcoll.Communicator` that gives each rank its share of a reduction."""

    def Reduce_scatter_block(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Reduce, and give each rank its block of the result.

        Collective, blocking; see `Ireduce_scatter_block`.

        The block of a rank that is gone is not made.

        Parameters
        ----------
        sendbuf : buffer or IN_PLACE
            This rank's input, `size` times as long as a block: the same dtype and number of items
            at all ranks, any shape. `IN_PLACE` (or None) takes the input from `recvbuf`, which is
            as long then; the result comes to its start.
        recvbuf : buffer
            The place of this rank's block of the result, apart from `sendbuf`, of its dtype.
        op : Op or mpi4py.MPI.Op, default SUM
            The operation.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds; None stands for the communicator's limit.

        Returns
        -------
        Outcome
            The same contributors at all survivors.

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
        return self.Ireduce_scatter_block(
            sendbuf, recvbuf, op, on_failure=on_failure, timeout_s=timeout_s
        ).wait()

    def Ireduce_scatter_block(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start a reduction of whose result each rank gets its block. Collective.

        Each block is a left fold in the order of the ranks, which starts behind its owner and ends
        there (results of up to `eager_bytes`: at rank 0). So equal contributors give equal bits.
        ``AVG`` divides by the number of contributors. Only what a death touched is redone. Ranks
        get different blocks, so it is complete only when every living rank has its own: two small
        messages more than MPI's own, from each rank to one and back (results of up to
        `eager_bytes`, counted over all blocks, need none). Memory beyond the window: partial sums
        as large as the input, and with `IN_PLACE` an undo copy.

        Parameters and errors are those of `Reduce_scatter_block`; the errors of the operation
        itself come from the request. May block until earlier operations are stable, when many are
        outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.10.1 and 6.12.9.
        """
        engine = self._open_engine()
        op = resolve(op)
        flags, limit_s = self._check_call(on_failure, timeout_s)
        send = None if is_in_place(sendbuf) else self._input(sendbuf, op, "sendbuf")
        recv = self._own_block(recvbuf, send, op)
        whole = recv if send is None else send
        if whole.items % self.size:
            noun = "recvbuf" if send is None else "sendbuf"
            raise ValueError(
                f"{noun} has {whole.items} items, which do not make {self.size} equal blocks"
            )
        count = whole.items // self.size
        if send is not None and recv.items != count:
            raise ValueError(
                f"recvbuf has {recv.items} items, but the blocks of sendbuf have {count}"
            )
        return self._start_reduction(
            engine, REDUCE_SCATTER, op, 0, send, recv, flags, limit_s, count=count
        )

    def Reduce_scatter(
        self,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Sequence[int] | None = None,
        op: Op | MPI.Op = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Reduce, and give each rank its part of the result.

        Collective, blocking; see `Ireduce_scatter`.

        The part of a rank that is gone is not made.

        Parameters
        ----------
        sendbuf : buffer or IN_PLACE
            This rank's input, all parts one behind the other: the same dtype and number of items
            at all ranks, any shape. `IN_PLACE` (or None) takes the input from `recvbuf`, which is
            as long then; the result comes to its start.
        recvbuf : buffer
            The place of this rank's part of the result, apart from `sendbuf`, of its dtype.
        recvcounts : sequence of int, optional
            The number of items of each rank's part, the same at all ranks. None asks every rank
            for the length of its `recvbuf`, by an `Allgather` that blocks (not possible with
            `IN_PLACE`, nor once a rank is lost).
        op : Op or mpi4py.MPI.Op, default SUM
            The operation.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds; None stands for the communicator's limit.

        Returns
        -------
        Outcome
            The same contributors at all survivors.

        Raises
        ------
        TypeError, ValueError, BufferError
            This call is wrong; nothing was sent, no buffer is touched. ValueError also where the
            calls of the ranks differ, as `Request.wait` says.
        RankFailedError
            A rank is lost and `recvcounts` is None: raised at all ranks, no buffer is touched.
            Otherwise only under ``on_failure="raise"``: a rank was lost. `recvbuf` is undefined
            (with `IN_PLACE` it holds the input again), the inputs are unchanged.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffers.
        """
        return self.Ireduce_scatter(
            sendbuf, recvbuf, recvcounts, op, on_failure=on_failure, timeout_s=timeout_s
        ).wait()

    def Ireduce_scatter(
        self,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Sequence[int] | None = None,
        op: Op | MPI.Op = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start a reduction of whose result each rank gets a part. Collective.

        As `Ireduce_scatter_block` does it, with parts of any length.

        Parameters and errors are those of `Reduce_scatter`; the errors of the operation itself
        come from the request. May block until earlier operations are stable, when many are
        outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.10.2 and 6.12.10.
        """
        engine = self._open_engine()
        op = resolve(op)
        flags, limit_s = self._check_call(on_failure, timeout_s)
        send = None if is_in_place(sendbuf) else self._input(sendbuf, op, "sendbuf")
        recv = self._own_block(recvbuf, send, op)
        whole = recv if send is None else send
        if recvcounts is None:
            counts = self._ask_for_counts(None if send is None else recv, on_failure, timeout_s)
        else:
            counts = self._given_counts(recvcounts)
        if counts.sum() != whole.items:
            noun = "recvbuf" if send is None else "sendbuf"
            raise ValueError(
                f"{noun} has {whole.items} items, but recvcounts add up to {counts.sum()}"
            )
        if send is not None and recv.items != counts[self.rank]:
            raise ValueError(
                f"recvbuf has {recv.items} items, "
                f"but recvcounts[{self.rank}] is {counts[self.rank]}"
            )
        nbytes = counts * whole.dtype.itemsize
        at = np.cumsum(nbytes) - nbytes
        return self._start_reduction(
            engine, REDUCE_SCATTER, op, 0, send, recv, flags | VECTOR_FLAG, limit_s,
            count=whole.items, lengths=(nbytes, at, nbytes, at), layout=layout_of(nbytes),
        )  # fmt: skip

    def Scan(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Reduce the inputs of the ranks up to and with this one.

        Collective, blocking; see `Iscan`.

        The result holds the input of each contributor whose rank is not higher than this one, each
        exactly once.

        Parameters
        ----------
        sendbuf : buffer or IN_PLACE
            This rank's input: the same dtype and number of items at all ranks, any shape.
            `IN_PLACE` (or None) takes the input from `recvbuf`.
        recvbuf : buffer
            The place of the result, apart from `sendbuf`, of its dtype and number of items.
        op : Op or mpi4py.MPI.Op, default SUM
            The operation; not ``AVG``.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds; None stands for the communicator's limit.

        Returns
        -------
        Outcome
            Its contributors are alike at all survivors: those of all ranks, not only of the ranks
            that are in this result.

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
        return self.Iscan(sendbuf, recvbuf, op, on_failure=on_failure, timeout_s=timeout_s).wait()

    def Iscan(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start a reduction over the ranks up to and with this one. Collective.

        A left fold in the order of the ranks along a chain, chunk by chunk: equal contributors
        give equal bits. A death leaves the results of lower ranks as they are. Ranks get different
        blocks, so it is complete only when every living rank has its own: two small messages more
        than MPI's own, from each rank to one and back (results of up to `eager_bytes`, counted
        over all blocks, need none). Memory beyond the window: with `IN_PLACE` an undo copy. Cost:
        with C chunks and n ranks about C + n chunk times.

        Parameters and errors are those of `Scan`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.11.1 and 6.12.11.
        """
        return self._start_scan(
            SCAN, sendbuf, recvbuf, op, on_failure=on_failure, timeout_s=timeout_s
        )

    def Exscan(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Reduce the inputs of the ranks before this one. Collective, blocking; see `Iexscan`.

        The result holds the input of each contributor whose rank is lower than this one, each
        exactly once. The first contributor has nobody before it: its `recvbuf` is undefined.

        Parameters
        ----------
        sendbuf : buffer or IN_PLACE
            This rank's input: the same dtype and number of items at all ranks, any shape.
            `IN_PLACE` (or None) takes the input from `recvbuf`.
        recvbuf : buffer
            The place of the result, apart from `sendbuf`, of its dtype and number of items.
        op : Op or mpi4py.MPI.Op, default SUM
            The operation; not ``AVG``.
        on_failure : {"survivors", "raise"}, optional
            As for the communicator, for this call only.
        timeout_s : float, optional
            At most so many seconds; None stands for the communicator's limit.

        Returns
        -------
        Outcome
            Its contributors are alike at all survivors: those of all ranks, not only of the ranks
            that are in this result.

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
        return self.Iexscan(sendbuf, recvbuf, op, on_failure=on_failure, timeout_s=timeout_s).wait()

    def Iexscan(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op = SUM,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start a reduction over the ranks before this one. Collective.

        A left fold in the order of the ranks along a chain, chunk by chunk: equal contributors
        give equal bits. A death leaves the results of lower ranks as they are. Ranks get different
        blocks, so it is complete only when every living rank has its own: two small messages more
        than MPI's own, from each rank to one and back (results of up to `eager_bytes`, counted
        over all blocks, need none). Memory beyond the window: with `IN_PLACE` an undo copy, and
        the partial sums that are passed on. Cost: with C chunks and n ranks about C + n chunk
        times.

        Parameters and errors are those of `Exscan`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.11.2 and 6.12.12.
        """
        return self._start_scan(
            EXSCAN, sendbuf, recvbuf, op, on_failure=on_failure, timeout_s=timeout_s
        )

    def _start_scan(
        self,
        kind: int,
        sendbuf: Any,
        recvbuf: Any,
        op: Op | MPI.Op,
        *,
        on_failure: str | None,
        timeout_s: float | None,
    ) -> Request:
        engine = self._open_engine()
        op = resolve(op)
        if op is AVG:
            raise TypeError("op AVG is not defined for a scan: divide the sums by what you mean")
        flags, limit_s = self._check_call(on_failure, timeout_s)
        send = None if is_in_place(sendbuf) else self._input(sendbuf, op, "sendbuf")
        recv = self._result(recvbuf, send, op)
        return self._start_reduction(engine, kind, op, 0, send, recv, flags, limit_s)

    def _own_block(self, recvbuf: Any, send: Buffer | None, op: Op) -> Buffer:
        """The place of this rank's part; in place: of the input as well."""
        if not op.commute:
            raise TypeError(
                f"op {op.name} does not commute, and the parts are folded in different orders: "
                "use Allreduce, or make it with commute=True"
            )
        if is_in_place(recvbuf):
            raise TypeError("recvbuf must be a buffer; IN_PLACE goes into sendbuf")
        recv = buffers.parse(recvbuf, "recvbuf", writable=True)
        if send is None:
            buffers.check_reducible(recv, op, "recvbuf")
        else:
            if send.code != recv.code:
                raise ValueError(f"recvbuf has dtype {recv.dtype}, but sendbuf has {send.dtype}")
            buffers.check_disjoint(send, recv)
        return recv

    def _ask_for_counts(
        self, recv: Buffer | None, on_failure: str | None, timeout_s: float | None
    ) -> np.ndarray:
        if recv is None:
            raise ValueError("recvcounts must be given where sendbuf is IN_PLACE")
        counts = np.empty(self.size, np.int64)
        own = np.array([recv.items], np.int64)
        outcome = self.Allgather(own, counts, on_failure=on_failure, timeout_s=timeout_s)
        silent = tuple(sorted(set(range(self.size)) - set(outcome.contributors)))
        if silent:
            raise RankFailedError(
                "recvcounts must be given where ranks are lost, which cannot be asked for theirs: "
                + ", ".join(str(rank) for rank in silent),
                silent,
                outcome.epoch,
            )
        return counts

    def _given_counts(self, recvcounts: Sequence[int]) -> np.ndarray:
        counts = np.asarray(recvcounts)
        if counts.shape != (self.size,) or (counts.size and counts.dtype.kind not in "iu"):
            raise ValueError(f"recvcounts must be {self.size} integers, not {recvcounts!r}")
        if (counts < 0).any():
            raise ValueError(f"recvcounts must not be negative: {recvcounts!r}")
        return counts.astype(np.int64)
