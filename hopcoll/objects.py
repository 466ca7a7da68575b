"""Objects: sealed arrays that any rank puts and any rank gets, without a schedule.

`Communicator.objects` gives the store, one for a job. Collectives want all ranks to call the same
in the same order; here who takes part is known when the data are ready. Any rank may put an object
under a ref, any may get it, before or after; receivers that come together form a chain, in which
each passes on what it has from the first byte on. Ranks may die at any time: an object is lost
only when no rank that lives has all of it.

>>> ref = hopcoll.objects.ObjectRef()                            # doctest: +SKIP
>>> comm.objects.put(weights, ref)                               # doctest: +SKIP
>>> comm.objects.get(ref, timeout_s=10)                          # doctest: +SKIP
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from hopcoll._metas import array_of, bits_of, into, meta_of, view_of
from hopcoll._refs import ObjectRef, check_ref, ref_of
from hopcoll.config import seconds
from hopcoll.errors import (
    ClosedError,
    ObjectDeletedError,
    ObjectExistsError,
    ObjectLostError,
    ObjectStoreFullError,
    ReductionError,
    TransferTimeoutError,
)
from hopcoll.ops import SUM, resolve

if TYPE_CHECKING:
    from hopcoll._keeper import Keeper

__all__ = ["ObjectRef", "Objects"]


class Objects:
    """The store of objects of a job, as one rank sees it; `Communicator.objects` gives it.

    Every call is local to its rank: nobody else has to call anything, or to be in a call. Any
    thread may call. A rank holds what it put, what it got, and at times small objects of others,
    until the object is deleted: in at most ``object_bytes`` of memory, and beyond that in files, at
    most ``object_scratch_bytes`` of them (settings of the communicator). What the program has a
    view of stays in memory. Faults: any number of deaths, at any time.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._loops: dict[asyncio.AbstractEventLoop, _Bridge] = {}

    def put(
        self, value: Any, id: ObjectRef | str | None = None, *, timeout_s: float | None = None
    ) -> ObjectRef:
        """Put a copy of an array into the store. Local, blocks for one round trip.

        The object is sealed: nobody can change it any more. Time: a copy of the bytes, and a small
        message to the rank that keeps the key and back; without room in memory also what it takes
        to write others to files.

        Parameters
        ----------
        value : array_like or bytes-like
            Of numbers, booleans, dates or fixed-length strings; bytes are taken for uint8.
        id : ObjectRef or str, optional
            Under which ref, or name. A new one without it.
        timeout_s : float, optional
            At most so many seconds; without it the wait has no limit.

        Returns
        -------
        ObjectRef
            The ref. It also knows that its object existed, so that a `get` of it tells loss from
            an object that is still to come, whatever dies.

        Raises
        ------
        TypeError, ValueError
            `value` cannot be an object, or `id` is no ref.
        ObjectExistsError
            There is an object of this ref already, which was not deleted. Nothing was put.
        ObjectStoreFullError
            It does not fit into this rank's memory for objects, and no other can go to a file:
            all are looked at, or the files have no room, or cannot be written. Nothing was put.
        TransferTimeoutError
            It was not accepted in time; it may still be.
        ClosedError, StaleEpochError, MinorityError, MpiError
            As `Request.wait` raises them.
        """
        from hopcoll import _keeper  # late: it starts MPI

        ref = ObjectRef() if id is None else check_ref("id", id)
        array = array_of(value)
        data = np.frombuffer(array.tobytes() if array.size == 0 else array, np.uint8)
        limit_s, begin_s = seconds("timeout_s", timeout_s), time.monotonic()
        ref._held_by(self._keeper)
        waiting = self._keeper.put(ref._key, data, meta_of(array), limit_s)
        if waiting.complete and waiting.status == _keeper.FULL:
            raise self._full_error(ref, array.nbytes)
        left_s = None if limit_s is None else max(0.0, limit_s - time.monotonic() + begin_s)
        if not self._keeper.wait(waiting, left_s):
            raise self._late(ref, "put", limit_s)
        self._check_end(waiting, ref, "put")
        return ref._put(waiting.stamp)

    def get(
        self,
        ref: ObjectRef | str,
        out: np.ndarray | None = None,
        *,
        timeout_s: float | None = None,
    ) -> np.ndarray:
        """Return the object of a ref, when it exists. Blocking.

        This rank has a copy afterwards, and gives it to others. On a rank that has one already the
        call is local and copies nothing.

        Parameters
        ----------
        ref : ObjectRef or str
            The ref, or a name.
        out : numpy.ndarray, optional
            Also copy it there: an array of its dtype and shape.
        timeout_s : float, optional
            At most so many seconds; without it the wait has no limit.

        Returns
        -------
        numpy.ndarray
            A read-only view of this rank's copy, which stays as long as the view does, also when
            the object is deleted; `out`, if that was given.

        Raises
        ------
        ObjectLostError
            Every complete copy was at ranks that are gone.
        ObjectDeletedError
            Somebody has deleted it, and nobody put it again.
        ObjectStoreFullError
            It does not fit into this rank's memory for objects, as for `put`. Others are not
            disturbed.
        TransferTimeoutError
            It did not come in time. What has begun to come, comes, for the next call; else this
            rank gets no copy.
        TypeError, ValueError
            `ref` is no ref, or `out` has another dtype or shape (the object is here then).
        ClosedError, StaleEpochError, MinorityError, MpiError
            As `Request.wait` raises them.
        """
        from hopcoll import _keeper

        known = check_ref("ref", ref)
        waiting = self._keeper.ask(_keeper.GET, known._key, known._stamp)
        self._wait(waiting, known, "get", timeout_s)
        return into(self._taken(waiting, known), out)

    def reduce(
        self,
        refs: Iterable[ObjectRef | str],
        op: Any = SUM,
        count: int | None = None,
        *,
        timeout_s: float | None = None,
    ) -> ObjectRef:
        """Have an object made of others, of the first of them that exist.

        Local, blocks for one round trip: the result can be got, waited for, deleted and reduced
        further before any input exists. The ranks that have the inputs form a tree in the order in
        which these appear, and add chunk by chunk; its degree follows from the measured latency
        and bandwidth (Hoplite, section 4.3). Who gets the result receives it while it is made.

        Each input counts once. Faults: a rank that dies with its input is replaced by the next
        input that exists, and the reduction begins anew; an object that is put again under a lost
        ref may take part. All who get the result get the same bits: before anybody does, two ranks
        know which inputs were taken. It is lost like any object, when no rank that lives has it.

        Parameters
        ----------
        refs : iterable of ObjectRef or str
            The inputs, of one dtype and shape; each once.
        op : Op or mpi4py.MPI.Op, default SUM
            A predefined one that the kernels have for the dtype.
        count : int, optional
            How many inputs are taken; all without it.
        timeout_s : float, optional
            Of the round trip; without it the wait has no limit.

        Returns
        -------
        ObjectRef
            The result's, with its `inputs`. A `get` of it raises what follows.

        Raises
        ------
        TypeError, ValueError
            A ref is none or there twice, `op` is not predefined, `count` is not from 1 to their
            number, or there are more refs than a message has room for.
        TransferTimeoutError
            The reduction was not taken in time; it may still be.
        ClosedError, StaleEpochError, MinorityError, MpiError
            As `Request.wait` raises them.
        ReductionError, ObjectLostError, ObjectDeletedError, ObjectStoreFullError
            By `get`: inputs differ in dtype or shape, or `op` is not for the dtype; fewer inputs
            than `count` are left; a rank has no room for partial sums.
        """
        inputs = tuple(check_ref("refs", ref)._put(check_ref("refs", ref)._stamp) for ref in refs)
        code = _check_op(op)
        taken = len(inputs) if count is None else count
        if not isinstance(taken, int) or isinstance(taken, bool):
            raise TypeError(f"count must be an integer, not {type(count).__name__}")
        if not 1 <= taken <= len(inputs):
            raise ValueError(f"count must be from 1 to the {len(inputs)} refs, not {taken}")
        if len(set(inputs)) < len(inputs):
            twice = next(ref for i, ref in enumerate(inputs) if ref in inputs[:i])
            raise ValueError(f"refs has {twice!r} twice; each input counts once")
        if len(inputs) > self._keeper.inputs_max:
            raise ValueError(
                f"refs has {len(inputs)} refs, and a reduction has room for "
                f"{self._keeper.inputs_max}; reduce the results of parts"
            )
        ref = ObjectRef()
        ref._held_by(self._keeper)
        names = [(one._key, one._stamp) for one in inputs]
        waiting = self._keeper.reduce(ref._key, names, taken, code)
        self._wait(waiting, ref, "reduce", timeout_s)
        self._check_end(waiting, ref, "reduce")
        return ref._put(waiting.stamp, inputs)

    def contributors(
        self, ref: ObjectRef, *, timeout_s: float | None = None
    ) -> tuple[ObjectRef, ...]:
        """Return which inputs a reduction has taken, when that is final. Blocking.

        Parameters
        ----------
        ref : ObjectRef
            What `reduce` returned, or a copy of it.
        timeout_s : float, optional
            At most so many seconds; without it the wait has no limit.

        Returns
        -------
        tuple of ObjectRef
            ``count`` of ``ref.inputs``, in their order; the same at every rank.

        Raises
        ------
        ReductionError, ObjectLostError, ObjectDeletedError, ObjectStoreFullError
            As a `get` of the result does.
        TransferTimeoutError
            It was not final in time.
        TypeError, ValueError
            `ref` is no ref, or not that of a reduction.
        ClosedError, StaleEpochError, MinorityError, MpiError
            As `Request.wait` raises them.
        """
        from hopcoll import _keeper

        known = check_ref("ref", ref)
        if not known.inputs:
            raise ValueError(f"ref must be one that reduce returned, not {ref!r}")
        waiting = self._keeper.ask(_keeper.LOOK, known._key, known._stamp)
        self._wait(waiting, known, "contributors", timeout_s)
        self._check_end(waiting, known, "contributors")
        bits = bits_of(waiting.meta, len(known.inputs))
        return tuple(one for one, bit in zip(known.inputs, bits, strict=True) if bit)

    async def get_async(self, ref: ObjectRef | str) -> np.ndarray:
        """Return the object of a ref, as `get` does, without blocking the event loop.

        A task that waits for it can be cancelled; ``asyncio.wait_for`` limits the time.

        Parameters
        ----------
        ref : ObjectRef or str
            The ref, or a name.

        Returns
        -------
        numpy.ndarray
            A read-only view, as from `get`.

        Raises
        ------
        ObjectLostError, ObjectDeletedError, ObjectStoreFullError, TypeError, ClosedError
            As `get` does.
        RuntimeError
            More event loops wait at a time than there are places (16).
        """
        from hopcoll import _keeper

        known = check_ref("ref", ref)
        waiting = self._keeper.ask(_keeper.GET, known._key, known._stamp)
        if not waiting.complete:
            loop = asyncio.get_running_loop()
            if loop not in self._loops:
                self._loops[loop] = _Bridge(self, loop)
            await self._loops[loop].completion(waiting)
        return self._taken(waiting, known)

    def wait(
        self,
        refs: Iterable[ObjectRef | str],
        count: int | None = None,
        *,
        timeout_s: float | None = None,
    ) -> tuple[list[ObjectRef], list[ObjectRef]]:
        """Wait until objects exist, without fetching them. Blocking.

        Parameters
        ----------
        refs : iterable of ObjectRef or str
            Which objects.
        count : int, optional
            How many of them are enough; all without it.
        timeout_s : float, optional
            At most so many seconds; without it the wait has no limit.

        Returns
        -------
        ready, pending : list of ObjectRef
            Those of which a `get` has an end in sight: they exist, were lost or were deleted; and
            the others. After the time is over, fewer than `count` are ready. Each is in the order
            of `refs`.

        Raises
        ------
        TypeError, ValueError
            A ref is none, or `count` is not from 0 to their number.
        ClosedError, StaleEpochError, MinorityError, MpiError
            As `Request.wait` raises them.
        """
        from hopcoll import _keeper

        known = [check_ref("refs", ref) for ref in refs]
        enough = len(known) if count is None else count
        if not isinstance(enough, int) or isinstance(enough, bool):
            raise TypeError(f"count must be an integer, not {type(count).__name__}")
        if not 0 <= enough <= len(known):
            raise ValueError(f"count must be from 0 to {len(known)}, not {count}")
        limit_s = seconds("timeout_s", timeout_s)
        asked = [self._keeper.ask(_keeper.LOOK, ref._key, ref._stamp) for ref in known]
        self._keeper.wait_some(asked, enough, limit_s)
        ready = [one.complete and one.status != _keeper.CLOSED for one in asked]
        return (
            [ref for ref, is_ready in zip(known, ready, strict=True) if is_ready],
            [ref for ref, is_ready in zip(known, ready, strict=True) if not is_ready],
        )

    def delete(self, ref: ObjectRef | str, *, timeout_s: float | None = None) -> None:
        """Delete an object, everywhere. Blocking.

        When it returns no rank holds a copy, but for views that programs have, and the ref may be
        put again. What waits for the object raises `ObjectDeletedError`, there or not. Deleting
        what does not exist is no error.

        Parameters
        ----------
        ref : ObjectRef or str
            The ref, or a name.
        timeout_s : float, optional
            At most so many seconds; without it the wait has no limit.

        Raises
        ------
        TransferTimeoutError
            Not all had dropped it in time; they still will.
        TypeError
            `ref` is no ref.
        ClosedError, StaleEpochError, MinorityError, MpiError
            As `Request.wait` raises them.
        """
        from hopcoll import _keeper

        known = check_ref("ref", ref)
        waiting = self._keeper.ask(_keeper.DELETE, known._key, 0)
        self._wait(waiting, known, "delete", timeout_s)
        self._check_end(waiting, known, "delete")
        known._held_by(None)

    def network(self) -> dict[str, float]:
        """Return what this rank has measured of the network. Local.

        Pings to another rank, of another host if there is one, measure it when the store is first
        used at a rank; the fastest of its last large gets refines the bandwidth. The trees of
        reductions follow from it.

        Returns
        -------
        dict of str to float
            ``latency_s``, of a short message in one direction; ``bandwidth_bytes_per_s``, of one
            link.

        Raises
        ------
        ClosedError
            The communicator is closed.
        """
        latency_s, bandwidth = self._keeper.network()
        return {"latency_s": latency_s, "bandwidth_bytes_per_s": bandwidth}

    def stats(self) -> dict[str, int]:
        """Return what this rank's store holds, and has counted since its start. Local.

        Returns
        -------
        dict of str to int
            ``used_bytes`` of ``limit_bytes``, ``objects`` that it has to do with, ``pulls``,
            ``bytes_sent``, ``bytes_received`` and others.

        Raises
        ------
        ClosedError
            The communicator is closed.
        """
        return dict(self._keeper.stats())

    # ---- how it ends ------------------------------------------------------------------------

    def _wait(self, waiting: Any, ref: ObjectRef, what: str, timeout_s: float | None) -> None:
        limit_s = seconds("timeout_s", timeout_s)
        if not self._keeper.wait(waiting, limit_s):
            raise self._late(ref, what, limit_s)

    def _late(self, ref: ObjectRef, what: str, limit_s: float | None) -> TransferTimeoutError:
        return TransferTimeoutError(f"{what} of {ref!r} had no end within {limit_s:g} s")

    def _taken(self, waiting: Any, ref: ObjectRef) -> np.ndarray:
        self._check_end(waiting, ref, "get")
        meta, sealed = waiting.take()
        return view_of(meta, sealed)

    def _full_error(self, ref: ObjectRef, nbytes: int | None) -> ObjectStoreFullError:
        stats, scratch = self._keeper.stats(), self._keeper.scratch
        what = "" if nbytes is None else f" of {nbytes} bytes"
        why = (
            f"{ref!r}{what} does not fit: {stats['used_bytes']} of {stats['limit_bytes']} bytes "
            "are used at this rank (object_bytes, HOPCOLL_OBJECT_BYTES: the limit)"
        )
        if scratch is None:
            return ObjectStoreFullError(f"{why}, and object_scratch_bytes is 0: no files", ref)
        why += (
            f"; {stats['scratch_bytes']} of {stats['scratch_limit_bytes']} bytes are in files in "
            f"{scratch.path} (object_scratch_bytes: the limit)"
        )
        if scratch.error:
            why += f", where something failed: {scratch.error}"
        return ObjectStoreFullError(
            f"{why}. What a program looks at stays in memory: let go of arrays that get "
            "returned, delete objects, or raise a limit",
            ref,
        )

    def _close(self) -> None:
        self._keeper.close()

    def _check_end(self, waiting: Any, ref: ObjectRef, what: str) -> None:
        from hopcoll import _keeper

        if waiting.status == _keeper.FAILED:
            raise self._reduction_error(ref, *waiting.why)
        if waiting.status != _keeper.OK:
            raise self._error(waiting.status, ref, what)

    def _reduction_error(self, ref: ObjectRef, reason: str, *keys: bytes) -> Exception:
        """Why a result cannot be: `hopcoll._recipes` says so in a word and the keys of inputs."""
        names = {one._key: one for one in ref.inputs}
        first, other = [names.get(key) or ref_of(key, None, 0) for key in keys]
        whose = f"{ref!r} cannot be made: its input {first!r}"
        if reason == "lost":
            return ObjectLostError(f"{whose} is lost, and too few others are left", ref=ref)
        if reason == "deleted":
            return ObjectDeletedError(f"{whose} was deleted, and too few others are left", ref)
        if reason == "full":
            what = "is at a rank without room for partial sums (object_bytes)"
            return ObjectStoreFullError(f"{whose} {what}", ref)
        if reason == "different":
            what = f"and {other!r} have not one dtype and shape"
            return ReductionError(f"{whose} {what}", ref, (first, other))
        if reason == "unsupported":
            what = "has a dtype that the operation is not for"
            return ReductionError(f"{whose} {what}", ref, (first,))
        return ReductionError(f"{whose} cannot be made either", ref, (first,))

    def _error(self, status: int, ref: ObjectRef, what: str) -> Exception:
        """Turn the store's status into an error: the one table that does it."""
        from hopcoll import _keeper

        if status == _keeper.LOST:
            return ObjectLostError(
                f"{ref!r} is lost: every complete copy was at ranks that are gone", ref=ref
            )
        if status == _keeper.DELETED:
            return ObjectDeletedError(f"{ref!r} was deleted", ref)
        if status == _keeper.EXISTS:
            return ObjectExistsError(f"{ref!r} exists already; delete it first", ref)
        if status == _keeper.FULL:
            return self._full_error(ref, None)
        return ClosedError(f"{what} of {ref!r} was under way when the communicator closed")


class _Bridge:
    """Between the store and one event loop, as long as something waits there."""

    #: How often a rank without a progress thread turns the crank for a loop.
    TURN_S = 0.001

    def __init__(self, objects: Objects, loop: asyncio.AbstractEventLoop) -> None:
        self.objects = objects
        self.loop = loop
        self.waiting: dict[asyncio.Future[None], Any] = {}
        self.bell = objects._keeper.add_bell()
        loop.add_reader(self.bell, self.on_bell)
        self.timer: asyncio.TimerHandle | None = None
        if not objects._keeper.threaded:
            self.timer = loop.call_later(self.TURN_S, self.on_time)

    async def completion(self, waiting: Any) -> None:
        future = self.loop.create_future()
        self.waiting[future] = waiting
        self.look()  # it may have been answered before the bell was there
        try:
            await future
        finally:
            self.waiting.pop(future, None)
            if not self.waiting:
                self.end()

    def on_bell(self) -> None:
        os.eventfd_read(self.bell)
        self.look()

    def on_time(self) -> None:
        try:
            self.objects._keeper.turn()
        except BaseException as error:
            for future in self.waiting:
                if not future.done():
                    future.set_exception(error)
            return
        self.look()
        self.timer = self.loop.call_later(self.TURN_S, self.on_time)

    def look(self) -> None:
        for future, waiting in self.waiting.items():
            if waiting.complete and not future.done():
                future.set_result(None)

    def end(self) -> None:
        self.loop.remove_reader(self.bell)
        if self.timer is not None:
            self.timer.cancel()
        self.objects._keeper.drop_bell(self.bell)
        del self.objects._loops[self.loop]


def _check_op(op: Any) -> int:
    ours = resolve(op)
    if ours.function is not None:
        raise TypeError(f"op must be a predefined one, not {op!r}: ranks add without Python")
    return ours.code
