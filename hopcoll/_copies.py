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
    """The part of `hopcoll.Communicator` that moves data as they are."""

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
        return self._begin(
            engine, BCAST, buffer.code, reduction.NONE, root, buffer.items, (0, None),
            (buffer.address, buffer.array), flags, limit_s,
        )  # fmt: skip

    def Gather(
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Gather the ranks' blocks at the root. Collective, blocking; see `Igather`.

        The block of a rank that is not among the contributors is filled with zero bytes.

        Parameters
        ----------
        sendbuf : buffer or IN_PLACE
            This rank's block: the same dtype and number of items at all ranks, any shape. At the
            root, `IN_PLACE` (or None) says that its block is in `recvbuf` already.
        recvbuf : buffer of blocks, or None
            The place of all blocks at the root, apart from `sendbuf`; not looked at elsewhere.
            `size` times as long as a block.
        root : int, default 0
            The rank that receives the blocks.
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
        return self.Igather(
            sendbuf, recvbuf, root, on_failure=on_failure, timeout_s=timeout_s
        ).wait()

    def Igather(
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start to gather the ranks' blocks at the root. Collective.

        The root fetches each block from its owner, all at once, in chunks. Blocks of up to
        `eager_bytes` go from each rank to each in one message. A rank other than the root is done
        when the root says that it has all. Memory beyond the window: none.

        Parameters and errors are those of `Gather`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.5 and 6.12.3.
        """
        engine = self._open_engine()
        root = self._check_root(root)
        flags, limit_s = self._check_call(on_failure, timeout_s)
        send = self._block_to_send(sendbuf, root, only_root_in_place=True)
        recv = None
        if self.rank == root:
            recv = self._blocks_to_fill(recvbuf, equal=True)
            self._check_own(send, recv)
        return self._start_blocks(engine, GATHER, root, send, recv, flags, limit_s, vector=False)

    def Gatherv(
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Gather the ranks' blocks at the root, of any length. Collective, blocking; see `Igatherv`.

        The block of a rank that is not among the contributors is filled with zero bytes.

        Parameters
        ----------
        sendbuf : buffer or IN_PLACE
            This rank's block: the same dtype at all ranks, any shape. At the root, `IN_PLACE` (or
            None) says that its block is in `recvbuf` already.
        recvbuf : buffer of blocks, or None
            The place of all blocks at the root, apart from `sendbuf`; not looked at elsewhere. As
            `hopcoll.buffers` says: ``[buf, counts]``, ``[buf, (counts, displs)]``, ``[buf, counts,
            displs, datatype]``, ...; a bare buffer is divided as evenly as possible. Its counts
            must be those of the ranks.
        root : int, default 0
            The rank that receives the blocks.
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
        return self.Igatherv(
            sendbuf, recvbuf, root, on_failure=on_failure, timeout_s=timeout_s
        ).wait()

    def Igatherv(
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start to gather the ranks' blocks at the root, of any length. Collective.

        The root fetches each block from its owner, all at once, in chunks. A rank other than the
        root is done when the root says that it has all. Memory beyond the window: none.

        Parameters and errors are those of `Gatherv`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.5 and 6.12.3.
        """
        engine = self._open_engine()
        root = self._check_root(root)
        flags, limit_s = self._check_call(on_failure, timeout_s)
        send = self._block_to_send(sendbuf, root, only_root_in_place=True)
        recv = None
        if self.rank == root:
            recv = self._blocks_to_fill(recvbuf, equal=False)
            self._check_own(send, recv)
        return self._start_blocks(engine, GATHER, root, send, recv, flags, limit_s, vector=True)

    def Allgather(
        self,
        sendbuf: Any,
        recvbuf: Any,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Gather the ranks' blocks at all ranks. Collective, blocking; see `Iallgather`.

        The block of a rank that is not among the contributors is filled with zero bytes.

        Parameters
        ----------
        sendbuf : buffer or IN_PLACE
            This rank's block: the same dtype and number of items at all ranks, any shape.
            `IN_PLACE` (or None) says that it is in `recvbuf` already.
        recvbuf : buffer of blocks
            The place of all blocks, apart from `sendbuf`. `size` times as long as a block.
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
            Only under ``on_failure="raise"``: a rank was lost. `recvbuf` is undefined, the inputs
            are unchanged.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffers.
        """
        return self.Iallgather(sendbuf, recvbuf, on_failure=on_failure, timeout_s=timeout_s).wait()

    def Iallgather(
        self,
        sendbuf: Any,
        recvbuf: Any,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start to gather the ranks' blocks at all ranks. Collective.

        Each block is a broadcast of its own, along a chain that starts at its owner: all links are
        busy at once. Blocks of up to `eager_bytes` go from each rank to each in one message. If a
        rank dies, the others go on with what they have of its block, if one of them has all of it,
        or else without it. Cost: with C chunks of all blocks together and n ranks about C + n
        chunk times. A small result (up to 32 KiB) is kept as a copy until it is stable, while with
        a larger one `Request.wait` returns only once it is.

        Parameters and errors are those of `Allgather`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.7 and 6.12.5.
        """
        engine = self._open_engine()
        flags, limit_s = self._check_call(on_failure, timeout_s)
        send = self._block_to_send(sendbuf)
        recv = self._blocks_to_fill(recvbuf, equal=True)
        self._check_own(send, recv)
        return self._start_blocks(engine, ALLGATHER, 0, send, recv, flags, limit_s, vector=False)

    def Allgatherv(
        self,
        sendbuf: Any,
        recvbuf: Any,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Gather the ranks' blocks, of any length, at all ranks. Collective, blocking; see `Iallgatherv`.

        The block of a rank that is not among the contributors is filled with zero bytes.

        Parameters
        ----------
        sendbuf : buffer or IN_PLACE
            This rank's block: the same dtype at all ranks, any shape. `IN_PLACE` (or None) says
            that it is in `recvbuf` already.
        recvbuf : buffer of blocks
            The place of all blocks, apart from `sendbuf`. As `hopcoll.buffers` says: ``[buf,
            counts]``, ``[buf, (counts, displs)]``, ``[buf, counts, displs, datatype]``, ...; a
            bare buffer is divided as evenly as possible. The counts must be the same at all ranks,
            the displacements need not.
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
            Only under ``on_failure="raise"``: a rank was lost. `recvbuf` is undefined, the inputs
            are unchanged.
        TransferTimeoutError, ClosedError, MpiError
            As `Request.wait` raises them, with the state of the buffers.
        """
        return self.Iallgatherv(sendbuf, recvbuf, on_failure=on_failure, timeout_s=timeout_s).wait()

    def Iallgatherv(
        self,
        sendbuf: Any,
        recvbuf: Any,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start to gather the ranks' blocks, of any length, at all ranks. Collective.

        Each block is a broadcast of its own, along a chain that starts at its owner: all links are
        busy at once. If a rank dies, the others go on with what they have of its block, if one of
        them has all of it, or else without it. Cost: with C chunks of all blocks together and n
        ranks about C + n chunk times. `Request.wait` returns once the result is stable.

        Parameters and errors are those of `Allgatherv`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.7 and 6.12.5.
        """
        engine = self._open_engine()
        flags, limit_s = self._check_call(on_failure, timeout_s)
        send = self._block_to_send(sendbuf)
        recv = self._blocks_to_fill(recvbuf, equal=False)
        self._check_own(send, recv)
        return self._start_blocks(engine, ALLGATHER, 0, send, recv, flags, limit_s, vector=True)

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
        """Give each rank its block, of any length, from the root. Collective, blocking; see `Iscatterv`.

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

    def Alltoall(
        self,
        sendbuf: Any,
        recvbuf: Any,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Give each rank a block from each rank. Collective, blocking; see `Ialltoall`.

        The block of a rank that is not among the contributors is filled with zero bytes.

        Parameters
        ----------
        sendbuf : buffer of blocks or IN_PLACE
            What this rank has for each rank. Blocks of one length, the same at all ranks.
            `IN_PLACE` (or None) takes it from `recvbuf`.
        recvbuf : buffer of blocks
            The place of what each rank has for this one, apart from `sendbuf`, of its dtype.
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
        return self.Ialltoall(sendbuf, recvbuf, on_failure=on_failure, timeout_s=timeout_s).wait()

    def Ialltoall(
        self,
        sendbuf: Any,
        recvbuf: Any,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start to give each rank a block from each rank. Collective.

        Every rank fetches its block from every other, in chunks. Ranks get different blocks, so it
        is complete only when every living rank has its own: two small messages more than MPI's
        own, from each rank to one and back (results of up to `eager_bytes`, counted over all
        blocks, need none). Memory beyond the window: with `IN_PLACE` an undo copy of `recvbuf`.

        Parameters and errors are those of `Alltoall`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.8 and 6.12.6.
        """
        engine = self._open_engine()
        flags, limit_s = self._check_call(on_failure, timeout_s)
        send = None if is_in_place(sendbuf) else self._blocks_to_send(sendbuf, equal=True)
        recv = self._blocks_to_fill(recvbuf, equal=True)
        if send is not None:
            _check_exchange(send, recv, self.rank)
        return self._start_blocks(engine, ALLTOALL, 0, send, recv, flags, limit_s, vector=False)

    def Alltoallv(
        self,
        sendbuf: Any,
        recvbuf: Any,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Give each rank a block of any length from each rank. Collective, blocking; see `Ialltoallv`.

        The block of a rank that is not among the contributors is filled with zero bytes.

        Parameters
        ----------
        sendbuf : buffer of blocks or IN_PLACE
            What this rank has for each rank. As `hopcoll.buffers` says: ``[buf, counts]``, ``[buf,
            (counts, displs)]``, ``[buf, counts, displs, datatype]``, ...; a bare buffer is divided
            as evenly as possible. `IN_PLACE` (or None) takes it from `recvbuf`.
        recvbuf : buffer of blocks
            The place of what each rank has for this one, apart from `sendbuf`, of its dtype. As
            `hopcoll.buffers` says: ``[buf, counts]``, ``[buf, (counts, displs)]``, ``[buf, counts,
            displs, datatype]``, ...; a bare buffer is divided as evenly as possible.
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
        return self.Ialltoallv(sendbuf, recvbuf, on_failure=on_failure, timeout_s=timeout_s).wait()

    def Ialltoallv(
        self,
        sendbuf: Any,
        recvbuf: Any,
        *,
        on_failure: str | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """Start to give each rank a block of any length from each rank. Collective.

        Every rank fetches its block from every other, in chunks. Ranks get different blocks, so it
        is complete only when every living rank has its own: two small messages more than MPI's
        own, from each rank to one and back (results of up to `eager_bytes`, counted over all
        blocks, need none). Memory beyond the window: with `IN_PLACE` an undo copy of `recvbuf`.

        Parameters and errors are those of `Alltoallv`; the errors of the operation itself come from
        the request. May block until earlier operations are stable, when many are outstanding.

        Returns
        -------
        Request

        References
        ----------
        MPI 4.1, sections 6.8 and 6.12.6.
        """
        engine = self._open_engine()
        flags, limit_s = self._check_call(on_failure, timeout_s)
        send = None if is_in_place(sendbuf) else self._blocks_to_send(sendbuf, equal=False)
        recv = self._blocks_to_fill(recvbuf, equal=False)
        if send is not None:
            _check_exchange(send, recv, self.rank)
        return self._start_blocks(engine, ALLTOALL, 0, send, recv, flags, limit_s, vector=True)

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
        count, lengths = 0, None
        if vector:
            flags |= VECTOR_FLAG
            send_bytes, send_at = self._lengths(send)
            recv_bytes, recv_at = self._lengths(recv)
            layout = 0
            if kind == ALLTOALL and send is None:
                send_bytes, send_at = recv_bytes, recv_at
            elif kind == ALLGATHER and isinstance(recv, Blocks):
                count = int(recv_bytes.sum()) // recv.item_bytes
                layout = layout_of(recv_bytes)
            lengths = (send_bytes, send_at, recv_bytes, recv_at, layout)
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
            lengths,
        )  # fmt: skip

    def _lengths(self, memory: Buffer | Blocks | None) -> tuple[np.ndarray, np.ndarray]:
        """Length and place of the block of each rank, as far as this rank knows them."""
        if isinstance(memory, Blocks):
            return memory.nbytes, memory.at
        nbytes = np.zeros(self.size, np.int64)
        if memory is not None:
            nbytes[self.rank] = memory.nbytes
        return nbytes, np.zeros(self.size, np.int64)


def _check_exchange(send: Blocks, recv: Blocks, rank: int) -> None:
    if send.buffer.code != recv.buffer.code:
        raise ValueError(
            f"recvbuf has dtype {recv.buffer.dtype}, but sendbuf has {send.buffer.dtype}"
        )
    if send.nbytes[rank] != recv.nbytes[rank]:
        raise ValueError(
            f"recvbuf has {recv.nbytes[rank]} bytes for rank {rank} itself, "
            f"but sendbuf has {send.nbytes[rank]}"
        )
    buffers.check_disjoint(send, recv)
