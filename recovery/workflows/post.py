"""Letters between the ranks of a workflow, and threads at each of them that answer.

A letter is a small object under a name that counts on, from one rank to another, so nobody has to
be in any call for it to come. All letters of a rank are waited for by one thread, which sleeps
until one is there. That a rank is gone nobody is told by letters: the communicator says so.

Who listens waits for each number in turn, so a number is taken when its letter is there. Each
letter also says how many the other rank's were read; the others are deleted when it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hopcoll.errors import (
    HopcollError,
    ObjectDeletedError,
    ObjectExistsError,
    ObjectLostError,
    ObjectStoreFullError,
)
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
_CALL, _ANSWER, _LOST = range(3)


class RankGoneError(Exception):
    """A rank that was asked something is gone, or what it was asked or answered is lost."""


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
        self._sending = [threading.Lock() for _ in range(comm.size)]
        self._sent = [0] * comm.size  # letters to each
        self._read = [0] * comm.size  # of those, as it said itself
        self._heard = [0] * comm.size  # letters from each
        self._numbers = itertools.count()
        self._open: dict[int, tuple[int, Callable[[Any, BaseException | None], None]]] = {}
        self._gone: set[int] = set()
        self._closed = threading.Event()
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
        body = self._letter(rank, _CALL, number, what, "what a rank is asked")
        with self._lock:
            self._open[number] = (rank, answered)
            gone = rank in self._gone or self._closed.is_set()
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

    def is_gone(self, rank: int) -> bool:
        """Whether nothing comes of what a rank has asked, as it is gone or this is closed."""
        return rank in self._gone or self._closed.is_set() or rank not in self._alive()

    def delete(self, ref: ObjectRef) -> None:
        """Delete an object meanwhile."""
        self._waste.put(ref)

    def close(self) -> None:
        """End its threads; what is still under way has no answer any more."""
        with self._lock:
            self._closed.set()
        self._waste.put(None)
        self._loop.call_soon_threadsafe(self._stopped.set)
        for thread in self._threads:
            thread.join()

    # Sending

    def _ref(self, source: int, dest: int, number: int) -> ObjectRef:
        return ObjectRef(f"{self._session} {source}>{dest} {number}")

    def _letter(self, rank: int, kind: int, call: int, content: Any, what: str = "") -> bytes:
        """Return a letter, of which anybody can read whose it is, even where not the content."""
        body = values.dumps(content, what)
        return values.dumps((kind, call, self._heard[rank], body), what)

    def _send(self, rank: int, letter: bytes) -> None:
        with self._sending[rank]:
            is_there = False
            while not is_there:
                ref = self._ref(self._comm.rank, rank, self._sent[rank])
                # Where there is one, a put before this was interrupted.
                with contextlib.suppress(ObjectExistsError):
                    self.objects.put(letter, ref)
                    is_there = True
                with self._lock:
                    self._sent[rank] += 1
                    gone = rank in self._gone
        if gone:
            self.delete(ref)

    def _send_at_last(self, rank: int, letter: bytes) -> None:
        """Send a letter as soon as there is room for it, if anybody is there to read it."""
        while not self.is_gone(rank):
            try:
                self._send(rank, letter)
                return
            except MemoryError:
                self._closed.wait(_LOOK_S)
            except HopcollError:
                return  # we are leaving

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
            alive = self._alive()
            for source in [one for one in ears if one not in alive]:
                ears.pop(source).cancel()
                self._lose(source)
        for ear in ears.values():
            ear.cancel()
        await asyncio.gather(*ears.values(), return_exceptions=True)
        for source in range(self._comm.size):
            self._end_calls(source, f"rank {source} is gone")

    def _alive(self) -> tuple[int, ...]:
        try:
            return self._comm.alive
        except HopcollError:
            return (self._comm.rank,)

    def _lose(self, rank: int) -> None:
        with self._lock:
            self._gone.add(rank)
            unread = range(self._read[rank], self._sent[rank])
        for number in unread:
            self.delete(self._ref(self._comm.rank, rank, number))
        self._end_calls(rank, f"rank {rank} is gone")

    def _end_calls(self, rank: int, why: str) -> None:
        with self._lock:
            lost = [number for number, (to, _) in self._open.items() if to == rank]
        for number in lost:
            self._end_call(number, None, RankGoneError(why))

    async def _listen_to(self, source: int) -> None:
        for number in itertools.count():
            ref = self._ref(source, self._comm.rank, number)
            data = None
            try:
                data = await self._fetch(ref)
            except (ObjectLostError, ObjectDeletedError):
                if source not in self._alive():
                    return  # its sender is gone with it
            except HopcollError:
                self._lose(source)  # we are leaving
                return
            self.delete(ref)
            self._heard[source] = number + 1
            if data is None:
                # A call or an answer: whose attempt it was begins again, whichever rank waits.
                self._end_calls(source, f"a letter from rank {source} is lost")
                self._start(self._send_at_last, source, self._letter(source, _LOST, 0, None))
                continue
            kind, call, read, body = values.unpack(data)
            self._read[source] = max(read, self._read[source])
            if kind == _CALL:
                self._start(self._answer, source, call, body)
            elif kind == _ANSWER:
                self._end_call(call, *_read_answer(source, body))
            else:
                self._end_calls(source, f"a letter to rank {source} is lost")

    def _start(self, function: Callable[..., None], source: int, *what: Any) -> None:
        name = f"hopcoll-call-{source}"
        threading.Thread(target=function, args=(source, *what), name=name, daemon=True).start()

    async def _fetch(self, ref: ObjectRef) -> bytes:
        while True:
            try:
                return (await self.objects.get_async(ref)).tobytes()
            except ObjectStoreFullError:
                await asyncio.sleep(_LOOK_S)  # until there is room for it

    def _answer(self, source: int, call: int, asked: bytes) -> None:
        """Call what another rank asked for; in a thread of its own."""
        answer: tuple[Any, BaseException | None]
        try:
            answer = self._handle(source, values.unpack(asked)), None
        except BaseException as error:  # also of sys.exit(): who asked waits
            answer = None, error
        try:
            letter = self._letter(source, _ANSWER, call, answer, "what a rank answers")
            if answer[1] is not None:
                values.unpack(values.unpack(letter)[3])  # it may be written and not read
        except Exception as error:
            letter = self._failure(source, call, answer[1] if answer[1] is not None else error)
        try:
            self._send(source, letter)
        except MemoryError as error:
            # Who asked waits for it. What is small will have room; what is not may never have.
            letter = min(letter, self._failure(source, call, error), key=len)
            self._send_at_last(source, letter)
        except HopcollError:
            pass  # we are leaving

    def _failure(self, source: int, call: int, error: BaseException) -> bytes:
        failure = RuntimeError(f"{type(error).__name__}: {error}")
        return self._letter(source, _ANSWER, call, (None, failure))

    def _sweep(self) -> None:
        while (ref := self._waste.get()) is not None:
            with contextlib.suppress(HopcollError):
                self.objects.delete(ref, timeout_s=_DELETE_S)


def _read_answer(source: int, body: bytes) -> tuple[Any, BaseException | None]:
    try:
        value, error = values.unpack(body)
    except Exception as unread:
        text = f"what rank {source} answered cannot be read: {type(unread).__name__}: {unread}"
        return None, RuntimeError(text)
    return value, error
