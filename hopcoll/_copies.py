"""The collectives that only move data, and Barrier."""

from __future__ import annotations

from typing import Any

import numpy as np

from cython_kernels import reduction
from hopcoll import buffers
from hopcoll._calls import (
    IN_PLACE_FLAG,
    VECTOR_FLAG,
    Calls,
    address_of,
    is_in_place,
    layout_of,
)
from hopcoll.buffers import Blocks, Buffer
from hopcoll.outcome import (
    ALLGATHER,
    ALLTOALL,
    BARRIER,
    BCAST,
    GATHER,
    SCATTER,
    Outcome,
    Request,
)

__all__ = ["Copies"]


class Copies(Calls):
    """The part of `hopcoll.Communicator` that moves data from one rank, or to all."""

    def Bcast(
        self,
        buf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
        check: str | None = None,
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
        check : {"hash"}, optional
            Compare a hash of the result over all ranks afterwards, by one small message to each:
            for those who do not trust their memory, or an operation of their own.

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
        DivergedError
            ``check="hash"`` found buffers that differ; raised at all ranks.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffer.
        """
        self._check_check(check)
        outcome = self.Ibcast(buf, root, on_failure=on_failure, timeout_s=timeout_s).wait()
        if check is not None:
            self._compare_replicas("Bcast", buf, timeout_s)
        return outcome

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
        that holds the bytes, be it the root or not. Above `eager_bytes` a rank is done when the
        next one in the chain has called it too, so that ranks that differ in the root notice.
        Cost: with C chunks and n ranks about C + n chunk times. Memory beyond the window: none
        while it runs; when it completes, a copy of a small result (up to 32 KiB) is kept until it
        is stable, while with a larger one `Request.wait` returns only once it is.

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
        return self._begin(
            engine, BCAST, buffer.code, reduction.NONE, root, buffer.items, (0, None),
            (buffer.address, buffer.array), flags, limit_s,
        )  # fmt: skip

    def Scatter(
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Give each rank its block from the root. Collective, blocking; see `Iscatter`.

        Either every living rank gets its block, or all raise.

        Parameters
        ----------
        sendbuf : buffer of blocks, or None
            The blocks at the root; not looked at elsewhere. `size` times as long as a block.
        recvbuf : buffer or IN_PLACE
            The place of this rank's block: the same dtype and number of items at all ranks, any
            shape. At the root, `IN_PLACE` (or None) leaves its block where it is.
        root : int, default 0
            The rank that has the blocks.
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
        TypeError, ValueError, BufferError
            This call is wrong; nothing was sent, no buffer is touched. ValueError also where the
            calls of the ranks differ, as `Request.wait` says.
        RankFailedError
            The root died before every living rank had its block: raised at all of them, `recvbuf`
            is undefined. Under ``on_failure="raise"`` also if another rank was lost.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffers.
        """
        return self.Iscatter(
            sendbuf, recvbuf, root, on_failure=on_failure, timeout_s=timeout_s
        ).wait()

    def Iscatter(
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start to give each rank its block from the root. Collective.

        Each rank fetches its block from the root, in chunks. Ranks get different blocks, so it is
        complete only when every living rank has its own: two small messages more than MPI's own,
        from each rank to one and back (results of up to `eager_bytes`, counted over all blocks,
        need none). Memory beyond the window: none.

        Parameters and errors are those of `Scatter`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.6 and 6.12.4.
        """
        engine = self._open_engine()
        root = self._check_root(root)
        flags, limit_s = self._check_call(on_failure, timeout_s)
        at_root = self.rank == root
        if is_in_place(recvbuf):
            if not at_root:
                raise ValueError(f"recvbuf is IN_PLACE, which only the root (rank {root}) may pass")
            recv = None
        else:
            recv = buffers.parse(recvbuf, "recvbuf", writable=True)
        send = None
        if at_root:
            send = self._blocks_to_send(sendbuf, equal=True)
            self._check_own(recv, send)
        return self._start_blocks(engine, SCATTER, root, send, recv, flags, limit_s, vector=False)

    def Scatterv(
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Give each rank its block, of any length, from the root.

        Collective, blocking; see `Iscatterv`.

        Either every living rank gets its block, or all raise.

        Parameters
        ----------
        sendbuf : buffer of blocks, or None
            The blocks at the root; not looked at elsewhere. As `hopcoll.buffers` says: ``[buf,
            counts]``, ``[buf, (counts, displs)]``, ``[buf, counts, displs, datatype]``, ...; a
            bare buffer is divided as evenly as possible. Its counts must be those that the ranks
            expect.
        recvbuf : buffer or IN_PLACE
            The place of this rank's block: the same dtype at all ranks, any shape. At the root,
            `IN_PLACE` (or None) leaves its block where it is.
        root : int, default 0
            The rank that has the blocks.
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
        TypeError, ValueError, BufferError
            This call is wrong; nothing was sent, no buffer is touched. ValueError also where the
            calls of the ranks differ, as `Request.wait` says.
        RankFailedError
            The root died before every living rank had its block: raised at all of them, `recvbuf`
            is undefined. Under ``on_failure="raise"`` also if another rank was lost.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffers.
        """
        return self.Iscatterv(
            sendbuf, recvbuf, root, on_failure=on_failure, timeout_s=timeout_s
        ).wait()

    def Iscatterv(
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start to give each rank its block, of any length, from the root. Collective.

        Each rank fetches its block from the root, in chunks. Ranks get different blocks, so it is
        complete only when every living rank has its own: two small messages more than MPI's own,
        from each rank to one and back (results of up to `eager_bytes`, counted over all blocks,
        need none). Memory beyond the window: none.

        Parameters and errors are those of `Scatterv`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.6 and 6.12.4.
        """
        engine = self._open_engine()
        root = self._check_root(root)
        flags, limit_s = self._check_call(on_failure, timeout_s)
        at_root = self.rank == root
        if is_in_place(recvbuf):
            if not at_root:
                raise ValueError(f"recvbuf is IN_PLACE, which only the root (rank {root}) may pass")
            recv = None
        else:
            recv = buffers.parse(recvbuf, "recvbuf", writable=True)
        send = None
        if at_root:
            send = self._blocks_to_send(sendbuf, equal=False)
            self._check_own(recv, send)
        return self._start_blocks(engine, SCATTER, root, send, recv, flags, limit_s, vector=True)

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
        return self._begin(
            engine, BARRIER, reduction.BYTES, reduction.NONE, 0, 0, (0, None), (0, None), flags,
            limit_s,
        )  # fmt: skip

    # ---- blocks ---------------------------------------------------------------------------

    def _block_to_send(
        self, sendbuf: Any, root: int = 0, *, only_root_in_place: bool = False
    ) -> Buffer | None:
        """This rank's block; None: it is at its place in recvbuf."""
        if is_in_place(sendbuf):
            if only_root_in_place and self.rank != root:
                raise ValueError(f"sendbuf is IN_PLACE, which only the root (rank {root}) may pass")
            return None
        return buffers.parse(sendbuf, "sendbuf", writable=False)

    def _blocks_to_send(self, sendbuf: Any, *, equal: bool) -> Blocks:
        return buffers.parse_blocks(sendbuf, "sendbuf", self.size, writable=False, equal=equal)

    def _blocks_to_fill(self, recvbuf: Any, *, equal: bool) -> Blocks:
        if is_in_place(recvbuf):
            raise TypeError("recvbuf must be a buffer; IN_PLACE goes into sendbuf")
        return buffers.parse_blocks(recvbuf, "recvbuf", self.size, writable=True, equal=equal)

    def _check_own(self, one: Buffer | None, all_: Blocks) -> None:
        """At a rank that has both: the block in `one` must be that of this rank in `all_`."""
        if one is None:
            return
        if one.code != all_.buffer.code:
            raise ValueError(
                f"recvbuf and sendbuf have different dtypes: {one.dtype} and {all_.buffer.dtype}"
            )
        if one.nbytes != all_.nbytes[self.rank]:
            raise ValueError(
                f"recvbuf and sendbuf do not match: the block of rank {self.rank} has "
                f"{one.nbytes} bytes in one and {all_.nbytes[self.rank]} in the other"
            )
        buffers.check_disjoint(one, all_)

    def _start_blocks(
        self,
        engine: Any,
        kind: int,
        root: int,
        send: Buffer | Blocks | None,
        recv: Buffer | Blocks | None,
        flags: int,
        limit_s: float | None,
        *,
        vector: bool,
    ) -> Request:
        # At least one is there: who has no block to send receives one, or all.
        shape: Any = send if send is not None else recv
        blocks = isinstance(shape, Blocks)
        code = shape.buffer.code if blocks else shape.code
        count, lengths, layout = 0, None, 0
        if vector:
            flags |= VECTOR_FLAG
            send_bytes, send_at = self._lengths(send)
            recv_bytes, recv_at = self._lengths(recv)
            if kind == ALLTOALL and send is None:
                send_bytes, send_at = recv_bytes, recv_at
            elif kind == ALLGATHER and isinstance(recv, Blocks):
                count = int(recv_bytes.sum()) // recv.item_bytes
                layout = layout_of(recv_bytes)
            lengths = (send_bytes, send_at, recv_bytes, recv_at)
        elif blocks:
            count = int(shape.nbytes[0]) // shape.item_bytes
        else:
            count = shape.items
        send_from, recv_to = address_of(send), address_of(recv)
        if not vector:  # one block behind the other, but perhaps not from the start
            if isinstance(send, Blocks):
                send_from = send_from[0] + int(send.at[0]), send_from[1]
            if isinstance(recv, Blocks):
                recv_to = recv_to[0] + int(recv.at[0]), recv_to[1]
        if send is None and kind in (GATHER, ALLGATHER, ALLTOALL):
            flags |= IN_PLACE_FLAG
        return self._begin(
            engine, kind, code, reduction.NONE, root, count, send_from, recv_to, flags, limit_s,
            lengths, None, layout,
        )  # fmt: skip

    def _lengths(self, memory: Buffer | Blocks | None) -> tuple[np.ndarray, np.ndarray]:
        """Length and place of the block of each rank, as far as this rank knows them."""
        if isinstance(memory, Blocks):
            return memory.nbytes, memory.at
        nbytes = np.zeros(self.size, np.int64)
        if memory is not None:
            nbytes[self.rank] = memory.nbytes
        return nbytes, np.zeros(self.size, np.int64)
