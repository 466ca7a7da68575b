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

import ast
import asyncio
import hashlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from hopcoll.config import seconds
from hopcoll.errors import (
    ClosedError,
    ObjectDeletedError,
    ObjectExistsError,
    ObjectLostError,
    ObjectStoreFullError,
    TransferTimeoutError,
)

if TYPE_CHECKING:
    from hopcoll._keeper import Keeper

__all__ = ["ObjectRef", "Objects"]

_KEY_BYTES = 16
#: Kinds of dtypes whose bytes mean the same in every process.
_KINDS = "?biufcSUmM"


class ObjectRef:
    """The name of an object, which may exist, or not yet, or no more. Immutable and hashable.

    It can be pickled and sent to any rank. Two refs are equal when they name the same object.

    Parameters
    ----------
    name : str, optional
        What all ranks know it by: refs of the same name are equal. Without a name it is a new one,
        equal to no other.
    """

    __slots__ = ("_key", "_name", "_stamp")

    _key: bytes
    _name: str | None
    _stamp: int

    def __init__(self, name: str | None = None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a str, not {type(name).__name__}")
        if name is None:
            key = os.urandom(_KEY_BYTES)
        else:
            key = hashlib.blake2b(name.encode(), digest_size=_KEY_BYTES).digest()
        self._fill(key, name, 0)

    def _fill(self, key: bytes, name: str | None, stamp: int) -> ObjectRef:
        store = object.__setattr__
        store(self, "_key", key)
        store(self, "_name", name)
        store(self, "_stamp", stamp)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"ObjectRef is immutable: {name} cannot be set")

    @property
    def name(self) -> str | None:
        """The name that it was made with."""
        return self._name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"<ObjectRef {self._key.hex()[:12] if self._name is None else repr(self._name)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _ref_of, (self._key, self._name, self._stamp)

    def _put(self, stamp: int) -> ObjectRef:
        """The same ref, which says that there was such an object."""
        return _ref_of(self._key, self._name, stamp)


def _ref_of(key: bytes, name: str | None, stamp: int) -> ObjectRef:
    return ObjectRef.__new__(ObjectRef)._fill(key, name, stamp)


class Objects:
    """The store of objects of a job, as one rank sees it; `Communicator.objects` gives it.

    Every call is local to its rank: nobody else has to call anything, or to be in a call. Any
    thread may call. A rank holds what it put, what it got, and at times small objects of others,
    in at most ``object_bytes`` (a setting of the communicator) of memory, until the object is
    deleted. Faults: any number of deaths, at any time.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._loops: dict[asyncio.AbstractEventLoop, _Bridge] = {}

    def put(
        self, value: Any, id: ObjectRef | str | None = None, *, timeout_s: float | None = None
    ) -> ObjectRef:
        """Put a copy of an array into the store. Local, blocks for one round trip.

        The object is sealed: nobody can change it any more. Time: a copy of the bytes, and a small
        message to the rank that keeps the key and back.

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
            It does not fit into this rank's memory for objects. Nothing was put.
        TransferTimeoutError
            It was not accepted in time; it may still be.
        ClosedError, StaleEpochError, MinorityError, MpiError
            As `Request.wait` raises them.
        """
        from hopcoll import _keeper  # late: it starts MPI

        ref = ObjectRef() if id is None else _check_ref("id", id)
        array = _array_of(value)
        data = np.frombuffer(array.tobytes() if array.size == 0 else array, np.uint8)
        waiting = self._keeper.put(ref._key, data, _meta_of(array))
        if waiting is None:
            raise self._full_error(ref, array.nbytes)
        self._wait(waiting, ref, "put", timeout_s)
        if waiting.status != _keeper.OK:
            raise self._error(waiting.status, ref, "put")
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
            It does not fit into this rank's memory for objects. Others are not disturbed.
        TransferTimeoutError
            It did not come in time. It is not called off: if the object comes, this rank gets it.
        TypeError, ValueError
            `ref` is no ref, or `out` has another dtype or shape (the object is here then).
        ClosedError, StaleEpochError, MinorityError, MpiError
            As `Request.wait` raises them.
        """
        from hopcoll import _keeper

        known = _check_ref("ref", ref)
        waiting = self._keeper.ask(_keeper.GET, known._key, known._stamp)
        self._wait(waiting, known, "get", timeout_s)
        return _into(self._taken(waiting, known), out)

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

        known = _check_ref("ref", ref)
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

        known = [_check_ref("refs", ref) for ref in refs]
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

        known = _check_ref("ref", ref)
        waiting = self._keeper.ask(_keeper.DELETE, known._key, 0)
        self._wait(waiting, known, "delete", timeout_s)
        if waiting.status != _keeper.OK:
            raise self._error(waiting.status, known, "delete")

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
            raise TransferTimeoutError(f"{what} of {ref!r} had no end within {limit_s:g} s")

    def _taken(self, waiting: Any, ref: ObjectRef) -> np.ndarray:
        from hopcoll import _keeper

        if waiting.status != _keeper.OK:
            raise self._error(waiting.status, ref, "get")
        meta, sealed = waiting.take()
        return _view_of(meta, sealed)

    def _full_error(self, ref: ObjectRef, nbytes: int | None) -> ObjectStoreFullError:
        stats = self._keeper.stats()
        what = "" if nbytes is None else f" of {nbytes} bytes"
        return ObjectStoreFullError(
            f"{ref!r}{what} does not fit: {stats['used_bytes']} of {stats['limit_bytes']} bytes "
            "are used at this rank (object_bytes, HOPCOLL_OBJECT_BYTES: the limit)",
            ref,
        )

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


# ---- arrays -----------------------------------------------------------------------------------


def _check_ref(noun: str, ref: Any) -> ObjectRef:
    if isinstance(ref, str):
        return ObjectRef(ref)
    if not isinstance(ref, ObjectRef):
        raise TypeError(f"{noun} must be an ObjectRef or a name, not {type(ref).__name__}")
    return ref


def _array_of(value: Any) -> np.ndarray:
    """A contiguous array, in C order."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = np.frombuffer(value, np.uint8)
    array = np.asarray(value, order="C")
    if array.dtype.kind not in _KINDS and not _is_named(array.dtype):
        raise TypeError(f"value has dtype {array.dtype}, which cannot be an object")
    return array


def _is_named(dtype: np.dtype) -> bool:
    """One that a package defines, and that NumPy then knows by its name, as bfloat16."""
    try:
        return dtype.kind == "V" and dtype.names is None and np.dtype(dtype.name) == dtype
    except TypeError:
        return False


def _meta_of(array: np.ndarray) -> bytes:
    dtype = array.dtype
    meta = repr((dtype.name if dtype.kind == "V" else dtype.str, array.shape)).encode()
    from hopcoll import _keeper

    if len(meta) > _keeper.META_BYTES_MAX:
        raise ValueError(f"value has too many dimensions: {array.ndim}")
    return meta


def _view_of(meta: bytes, sealed: Any) -> np.ndarray:
    name, shape = ast.literal_eval(meta.decode())
    try:
        dtype = np.dtype(name)
    except TypeError:
        import ml_dtypes  # noqa: F401  # which makes its names known

        dtype = np.dtype(name)
    if len(sealed) == 0:
        array = np.empty(shape, dtype)
    else:
        array = np.frombuffer(sealed, np.uint8).view(dtype).reshape(shape)
    array.flags.writeable = False
    return array


def _into(array: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return array
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an array, not {type(out).__name__}")
    if out.dtype != array.dtype or out.shape != array.shape:
        raise ValueError(
            f"out has dtype {out.dtype} and shape {out.shape}, but the object has {array.dtype} "
            f"and {array.shape}"
        )
    out[...] = array
    return out
