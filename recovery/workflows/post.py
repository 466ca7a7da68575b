"""Letters between the ranks of a workflow, and threads at each of them that answer.

A letter is a small object under a name that counts on, from one rank to another, so nobody has to
be in any call for it to come. All letters of a rank are waited for by one thread, which sleeps
until one is there. That a rank is gone nobody is told by letters: the communicator says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hopcoll.errors import HopcollError, ObjectStoreFullError
from hopcoll.objects import ObjectRef
from recovery.workflows import values

if TYPE_CHECKING:
    from hopcoll import Communicator
    from hopcoll.objects import Objects

__all__ = ["Post", "RankGoneError"]

#: How often it looks who is still there.
_LOOK_S = 0.05
#: Of a deletion: who does not answer is gone soon, or the job is.
_DELETE_S = 30.0
_CALL, _ANSWER, _VOID = range(3)


class RankGoneError(Exception):
    """A rank that was asked something is gone."""


class Post:
    """Calls of functions at other ranks. Local; any thread.

    Parameters
    ----------
    comm : Communicator
    session : str
        Tells its letters apart from those of others; alike at all ranks.
    handle : callable
        ``handle(source, what)`` returns what a call of another rank is answered with; called in a
        thread of its own.

    Attributes
    ----------
    objects : Objects
    """

    def __init__(
        self, comm: Communicator, session: str, handle: Callable[[int, Any], Any]
    ) -> None:
        self.objects: Objects = comm.objects
        self._comm = comm
        self._session = session
        self._handle = handle
        self._lock = threading.Lock()
        self._sent = [itertools.count() for _ in range(comm.size)]
        self._numbers = itertools.count()
        self._open: dict[int, tuple[int, Callable[[Any, BaseException | None], None]]] = {}
        self._gone: set[int] = set()
        self._closed = False
        self._waste: queue.SimpleQueue[ObjectRef | None] = queue.SimpleQueue()
        self._stopped = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._threads = [
            threading.Thread(target=run, name=f"hopcoll-{name}", daemon=True)
            for run, name in ((self._listen, "post"), (self._sweep, "sweeper"))
        ]
        for thread in self._threads:
            thread.start()

    def call(
        self, rank: int, what: Any, answered: Callable[[Any, BaseException | None], None]
    ) -> None:
        """Have a function called at a rank; `answered` is told what it returned, or what it raised,
        or `RankGoneError`. It is called in the thread that listens, and must not wait.

        Raises
        ------
        WorkflowError
            `what` cannot be sent.
        ObjectStoreFullError
            There is no room for it.
        """
        number = next(self._numbers)
        body = values.dumps((_CALL, number, what), "what a rank is asked")
        with self._lock:
            self._open[number] = (rank, answered)
            gone = rank in self._gone or self._closed
        if gone:
            self._end_call(number, None, RankGoneError(f"rank {rank} is gone"))
        else:
            try:
                self._send(rank, body)
            except BaseException:
                with self._lock:
                    self._open.pop(number, None)
                raise

    def ask(self, rank: int, what: Any) -> Any:
        """Call a function at a rank and wait for its answer.

        Raises
        ------
        RankGoneError
        BaseException
            What it raised.
        """
        box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.call(rank, what, lambda value, error: box.put((value, error)))
        value, error = box.get()
        if error is not None:
            raise error
        return value

    def delete(self, ref: ObjectRef) -> None:
        """Delete an object meanwhile."""
        self._waste.put(ref)

    def close(self) -> None:
        """End its threads; what is still under way has no answer any more."""
        with self._lock:
            self._closed = True
        self._waste.put(None)
        self._loop.call_soon_threadsafe(self._stopped.set)
        for thread in self._threads:
            thread.join()

    # Sending

    def _ref(self, source: int, dest: int, number: int) -> ObjectRef:
        return ObjectRef(f"{self._session} {source}>{dest} {number}")

    def _send(self, rank: int, body: bytes) -> None:
        with self._lock:
            number = next(self._sent[rank])
        ref = self._ref(self._comm.rank, rank, number)
        try:
            self.objects.put(body, ref)
        except ObjectStoreFullError:
            # Who listens waits for each number in turn.
            self.objects.put(values.dumps((_VOID, 0, None), ""), ref)
            raise

    def _end_call(self, number: int, value: Any, error: BaseException | None) -> None:
        with self._lock:
            _, answered = self._open.pop(number, (0, None))
        if answered is not None:
            answered(value, error)

    # Listening

    def _listen(self) -> None:
        self._loop.run_until_complete(self._listen_to_all())
        self._loop.close()

    async def _listen_to_all(self) -> None:
        rank = self._comm.rank
        ears = {
            source: asyncio.ensure_future(self._listen_to(source))
            for source in range(self._comm.size)
            if source != rank
        }
        while not self._stopped.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), _LOOK_S)
            try:
                alive = self._comm.alive
            except HopcollError:
                alive = (rank,)
            for source in [one for one in ears if one not in alive]:
                ears.pop(source).cancel()
                self._lose(source)
        for ear in ears.values():
            ear.cancel()
        await asyncio.gather(*ears.values(), return_exceptions=True)
        for source in range(self._comm.size):
            self._lose(source)

    def _lose(self, rank: int) -> None:
        with self._lock:
            self._gone.add(rank)
            lost = [number for number, (to, _) in self._open.items() if to == rank]
        for number in lost:
            self._end_call(number, None, RankGoneError(f"rank {rank} is gone"))

    async def _listen_to(self, source: int) -> None:
        for number in itertools.count():
            ref = self._ref(source, self._comm.rank, number)
            try:
                data = await self._fetch(ref)
            except HopcollError:
                return  # its sender is gone with it, or we are leaving
            self.delete(ref)
            kind, call, what = values.unpack(data)
            if kind == _CALL:
                threading.Thread(
                    target=self._answer, args=(source, call, what),
                    name=f"hopcoll-call-{source}-{call}", daemon=True,
                ).start()  # fmt: skip
            elif kind == _ANSWER:
                self._end_call(call, *what)

    async def _fetch(self, ref: ObjectRef) -> bytes:
        while True:
            try:
                return (await self.objects.get_async(ref)).tobytes()
            except ObjectStoreFullError:
                await asyncio.sleep(_LOOK_S)  # until there is room for it

    def _answer(self, source: int, call: int, what: Any) -> None:
        """Call what another rank asked for; in a thread of its own."""
        answer: tuple[Any, BaseException | None]
        try:
            answer = self._handle(source, what), None
        except Exception as error:
            answer = None, error
        try:
            try:
                body = values.dumps((_ANSWER, call, answer), "what a rank answers")
                if answer[1] is not None:
                    values.unpack(body)  # an exception may be written and not read
            except Exception as error:
                text = answer[1] if answer[1] is not None else error
                failure = RuntimeError(f"{type(text).__name__}: {text}")
                body = values.dumps((_ANSWER, call, (None, failure)), "")
            try:
                self._send(source, body)
            except ObjectStoreFullError as error:
                failure = RuntimeError(f"{type(error).__name__}: {error}")
                self._send(source, values.dumps((_ANSWER, call, (None, failure)), ""))
        except HopcollError:
            pass  # who asked is gone, or we are leaving

    def _sweep(self) -> None:
        while (ref := self._waste.get()) is not None:
            with contextlib.suppress(HopcollError):
                self.objects.delete(ref, timeout_s=_DELETE_S)
