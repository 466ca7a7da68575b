"""The collectives in which every rank has data: Gather, Allgather, Alltoall, and their vectors."""

from __future__ import annotations

from typing import Any

from hopcoll import buffers
from hopcoll._calls import is_in_place
from hopcoll._copies import Copies
from hopcoll.buffers import Blocks
from hopcoll.outcome import ALLGATHER, ALLTOALL, GATHER, Outcome, Request

__all__ = ["Gathers"]


class Gathers(Copies):
    """The part of `hopcoll.Communicator` that brings together what every rank has."""

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
        """Gather the ranks' blocks at the root, of any length.

        Collective, blocking; see `Igatherv`.

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
        """Gather the ranks' blocks, of any length, at all ranks.

        Collective, blocking; see `Iallgatherv`.

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

        Parameters and errors are those of `Allgatherv`; the errors of the operation itself come
        from the request. May block until earlier operations are stable, when many are outstanding.

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
        """Give each rank a block of any length from each rank.

        Collective, blocking; see `Ialltoallv`.

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
