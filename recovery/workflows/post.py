"""Letters between the ranks of a workflow, and threads at each of them that answer.

A letter is a small object under a name that counts on, from one rank to another, so nobody has to
be in any call for it to come. All letters of a rank are waited for by one thread, which sleeps
until one is there. That a rank is gone nobody is told by letters: the communicator says so.

Who listens waits for each number in turn, so a number is taken when its letter is there. Each
letter also says how many the other rank's were read; the others are deleted when it is gone.

Letters are small enough for the directory's messages. What is not is an object of its own, the
*body*, which the thread fetches that works on the letter. Either waits for room at either rank,
since objects are given up, but not for ever (`ROOM_S`): then that one call is answered with the
error. Each rank keeps some room for small letters: what fills its memory may be what others are to
be asked about, and would never be given up if nobody could be asked. It is enough for one, and
what it is given up for, others may be faster to take: then small letters wait as well.

Who cannot read a letter does not know which call it is about, but its sender does. So the sender is
told its number, before any other letter says that it was read, and answers for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hopcoll.errors import (
    HopcollError,
    ObjectDeletedError,
    ObjectExistsError,
    ObjectLostError,
    ObjectStoreFullError,
    TransferTimeoutError,
)
from hopcoll.objects import ObjectRef
from recovery.workflows import values

if TYPE_CHECKING:
    import numpy as np

    from hopcoll import Communicator
    from hopcoll.objects import Objects

__all__ = ["ROOM_S", "Post", "RankGoneError"]

#: What has no room waits so long for it, at the rank that sends it and at the one that gets it.
ROOM_S = 60.0
#: The room that each rank keeps for letters. Larger ones have a body.
_SMALL_BYTES = 32 << 10
_BODY_BYTES_MIN = _SMALL_BYTES - 512
#: How often it looks who is still there.
_LOOK_S = 0.05
#: Of a deletion: who does not answer is gone soon, or the job is.
_DELETE_S = 30.0
_CALL, _ANSWER, _LOST = range(3)


class RankGoneError(Exception):
    """A rank that was asked something is gone, or what it was asked or answered is lost."""


@dataclass
class _Letter:
    kind: int
    call: int  # its number; of _LOST, the number of the letter that was lost
    data: bytes
    body: bytes | None = None  # until it is there
    ref: ObjectRef | None = None  # of the body


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
        self._ahead: list[set[int]] = [set() for _ in range(comm.size)]  # later ones that are read
        self._unread: list[dict[int, _Letter]] = [{} for _ in range(comm.size)]  # by each, as known
        self._numbers = itertools.count()
        self._open: dict[int, tuple[int, Callable[[Any, BaseException | None], None]]] = {}
        self._gone: set[int] = set()
        self._closed = threading.Event()
        self._swept = threading.Event()
        self._end_s: float | None = None  # of deletions, when this is closed
        self._waste: queue.SimpleQueue[ObjectRef | None] = queue.SimpleQueue()
        self._reserve: tuple[ObjectRef, np.ndarray] | None = None
        self._reserving = threading.Lock()
        self._take_reserve()
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
        or `RankGoneError`, or `ObjectStoreFullError` where there was no room in time. It is called
        in a thread that others wait for, and must not wait.

        Raises
        ------
        WorkflowError
            `what` cannot be sent.
        """
        number = next(self._numbers)
        letter = self._letter(rank, _CALL, number, what, "what a rank is asked")
        with self._lock:
            self._open[number] = (rank, answered)
            gone = rank in self._gone or self._closed.is_set()
        if gone:
            self._end_call(number, None, RankGoneError(f"rank {rank} is gone"))
        else:
            try:
                self._send(rank, letter)
            except MemoryError:
                # Not here: what gives objects up may be for this thread to do.
                self._start(self._call_late, rank, number, letter)
            except BaseException:
                with self._lock:
                    self._open.pop(number, None)
                self._drop_body(letter)
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
        """Delete an object meanwhile; when this is closed, at once."""
        self._waste.put(ref)
        if self._swept.is_set():  # calls that still run here let go of what they had
            self._sweep_rest()

    def close(self) -> None:
        """End its threads; what is still under way has no answer any more.

        Letters that nobody has said to have read are deleted: nobody waits for them.
        """
        with self._lock:
            self._closed.set()
            self._end_s = time.monotonic() + _DELETE_S
        with self._reserving:
            reserve, self._reserve = self._reserve, None
        if reserve is not None:
            self.delete(reserve[0])
            del reserve  # with the view
        self._loop.call_soon_threadsafe(self._stopped.set)
        listener, sweeper = self._threads
        listener.join()
        for rank in range(self._comm.size):
            if rank not in self._gone:
                self._delete_unread(rank)
        self._waste.put(None)
        sweeper.join()
        self._swept.set()
        self._sweep_rest()  # of what came after that None, before it was set

    # Sending

    def _ref(self, source: int, dest: int, number: int) -> ObjectRef:
        return ObjectRef(f"{self._session} {source}>{dest} {number}")

    def _ref_of_body(self, source: int, dest: int, kind: int, call: int) -> ObjectRef:
        what = "call" if kind == _CALL else "answer"
        return ObjectRef(f"{self._session} {source}>{dest} {what} {call}")

    def _letter(self, rank: int, kind: int, call: int, content: Any, what: str = "") -> _Letter:
        """Return a letter, of which anybody can read whose it is, even where not the content."""
        body = values.dumps(content, what)
        if len(body) < _BODY_BYTES_MIN:
            return _Letter(kind, call, values.dumps((kind, call, self._heard[rank], body), what))
        data = values.dumps((kind, call, self._heard[rank], None), what)
        ref = self._ref_of_body(self._comm.rank, rank, kind, call)
        return _Letter(kind, call, data, body, ref)

    def _send(self, rank: int, letter: _Letter) -> None:
        if letter.body is not None:
            assert letter.ref is not None
            with contextlib.suppress(ObjectExistsError):
                self.objects.put(letter.body, letter.ref)
            letter.body = None
        with self._sending[rank]:
            is_there = False
            while not is_there:
                number = self._sent[rank]
                ref = self._ref(self._comm.rank, rank, number)
                with self._lock:  # it may be said to be lost before its put is over
                    is_own = self._unread[rank].setdefault(number, letter) is letter
                try:
                    self._put(letter.data, ref)
                    is_there = True
                except Exception as error:
                    if is_own:
                        with self._lock:
                            self._unread[rank].pop(number, None)
                    # Where there is one, a put before this was interrupted.
                    if not isinstance(error, ObjectExistsError):
                        raise
                with self._lock:
                    self._sent[rank] += 1
                    if is_there and not is_own:
                        self._unread[rank][number] = letter
                    gone = rank in self._gone or self._closed.is_set()
        if gone:
            self.delete(ref)
            self._drop_body(letter)

    def _put(self, data: bytes, ref: ObjectRef) -> None:
        try:
            self.objects.put(data, ref)
        except ObjectStoreFullError:
            if not self._give_reserve():
                raise
            self.objects.put(data, ref)

    def _drop_body(self, letter: _Letter) -> None:
        if letter.ref is not None and letter.body is None:
            self.delete(letter.ref)

    def _send_at_last(self, rank: int, letter: _Letter, limit_s: float | None = None) -> None:
        """Send a letter as soon as there is room for it, if anybody is there to read it.

        Raises
        ------
        ObjectStoreFullError
            There was none for so many seconds.
        """
        full_s = None
        while not self.is_gone(rank):
            try:
                self._send(rank, letter)
                return
            except MemoryError as error:
                full_s = full_s or time.monotonic()
                if limit_s is not None and time.monotonic() - full_s >= limit_s:
                    self._drop_body(letter)
                    raise self._no_room(f"what goes to rank {rank}", error) from error
                self._closed.wait(_LOOK_S)
            except HopcollError:
                break  # we are leaving
        self._drop_body(letter)

    def _call_late(self, rank: int, number: int, letter: _Letter) -> None:
        try:
            self._send_at_last(rank, letter, ROOM_S)
        except Exception as error:
            self._end_call(number, None, error)

    def _no_room(self, what: str, error: MemoryError) -> ObjectStoreFullError:
        return ObjectStoreFullError(
            f"rank {self._comm.rank} had no room for {what} for {ROOM_S:g} s: {error}; raise "
            "object_bytes, or have less put there at a time",
            getattr(error, "ref", None),
        )

    def _end_call(self, number: int, value: Any, error: BaseException | None) -> None:
        with self._lock:
            _, answered = self._open.pop(number, (0, None))
        if answered is not None:
            answered(value, error)

    # Room for small letters

    def _take_reserve(self) -> None:
        with self._reserving, contextlib.suppress(HopcollError):
            if self._reserve is None and not self._closed.is_set():
                ref = self.objects.put(bytes(_SMALL_BYTES))
                # As long as it is looked at it goes to no file.
                self._reserve = ref, self.objects.get(ref)

    def _give_reserve(self) -> bool:
        """Let go of that room; whether there was any."""
        with self._reserving:
            if self._reserve is None:
                return False
            ref, self._reserve = self._reserve[0], None
            with contextlib.suppress(HopcollError):
                self.objects.delete(ref, timeout_s=_DELETE_S)
        return True

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
            self._end_calls(source, RankGoneError(f"rank {source} is gone"))

    def _alive(self) -> tuple[int, ...]:
        try:
            return self._comm.alive
        except HopcollError:
            return (self._comm.rank,)

    def _lose(self, rank: int) -> None:
        with self._lock:
            self._gone.add(rank)
        self._delete_unread(rank)
        self._end_calls(rank, RankGoneError(f"rank {rank} is gone"))

    def _delete_unread(self, rank: int) -> None:
        with self._lock:
            unread = range(self._read[rank], self._sent[rank])
            letters = list(self._unread[rank].values())
        for number in unread:
            self.delete(self._ref(self._comm.rank, rank, number))
        for letter in letters:
            self._drop_body(letter)

    def _end_calls(self, rank: int, error: Exception) -> None:
        with self._lock:
            lost = [number for number, (to, _) in self._open.items() if to == rank]
        for number in lost:
            self._end_call(number, None, error)

    async def _listen_to(self, source: int) -> None:
        for number in itertools.count():
            ref = self._ref(source, self._comm.rank, number)
            data, lost = None, _lost(source, self._comm.rank)
            try:
                data = await self._fetch(ref)
            except (ObjectLostError, ObjectDeletedError):
                if source not in self._alive():
                    return  # its sender is gone with it
            except ObjectStoreFullError as error:
                lost = self._no_room(f"what comes from rank {source}", error)
            except HopcollError:
                self._lose(source)  # we are leaving
                return
            self.delete(ref)
            if data is None:
                self._start(self._tell_lost, source, number, lost)
                continue
            kind, call, read, body = values.unpack(data)
            self._take_note(source, read)
            if body is not None:
                self._was_read(source, number)
            if kind == _CALL:
                self._start(self._answer, source, number, call, body)
            elif kind == _LOST:
                self._was_lost(source, call, values.unpack(body))
            elif body is not None:
                self._end_call(call, *_read_answer(source, body))
            else:
                self._start(self._take_answer, source, number, call)

    def _tell_lost(self, source: int, number: int, why: Exception) -> None:
        """Tell a rank that its letter cannot be read here; in a thread of its own."""
        letter = self._letter(source, _LOST, number, why)
        try:
            self._send_at_last(source, letter, ROOM_S)
        except ObjectStoreFullError:
            # So it may not be known here for long whose it was. Those begin again, and if there is
            # still no room for their calls, each says so itself.
            self._end_calls(source, _lost(source, self._comm.rank))
            self._send_at_last(source, letter)
        self._was_read(source, number)  # its sender knows it by its number until then

    def _was_lost(self, rank: int, number: int, why: Exception) -> None:
        """A rank could not read a letter of this one."""
        with self._lock:
            letter = self._unread[rank].pop(number)
        self._drop_body(letter)
        if letter.kind == _CALL:
            self._end_call(letter.call, None, why)
            return
        if letter.kind == _ANSWER:
            letter = self._letter(rank, _ANSWER, letter.call, (None, why))
        self._start(self._send_at_last, rank, letter)

    def _was_read(self, source: int, number: int) -> None:
        """Nobody at this rank wants a letter any more, or its body."""
        with self._lock:
            self._ahead[source].add(number)
            while self._heard[source] in self._ahead[source]:
                self._ahead[source].remove(self._heard[source])
                self._heard[source] += 1

    def _take_note(self, rank: int, read: int) -> None:
        """A rank has read so many letters; it may have said that it has read more."""
        with self._lock:
            for number in range(self._read[rank], read):
                self._unread[rank].pop(number, None)
            self._read[rank] = max(read, self._read[rank])

    def _start(self, function: Callable[..., None], source: int, *what: Any) -> None:
        name = f"hopcoll-call-{source}"
        threading.Thread(target=function, args=(source, *what), name=name, daemon=True).start()

    async def _fetch(self, ref: ObjectRef) -> bytes:
        limit_s = None
        while True:
            try:
                return (await self.objects.get_async(ref)).tobytes()
            except ObjectStoreFullError:
                now_s = time.monotonic()
                limit_s = limit_s or now_s + ROOM_S
                if now_s >= limit_s:
                    raise
                if not await asyncio.to_thread(self._give_reserve):
                    await asyncio.sleep(_LOOK_S)  # until there is room for it

    def _fetch_body(self, source: int, number: int, kind: int, call: int) -> bytes:
        """Return what a letter had no room for.

        Raises
        ------
        RankGoneError
            It is lost.
        ObjectStoreFullError
            There was no room here.
        """
        ref = self._ref_of_body(source, self._comm.rank, kind, call)
        full_s = None
        try:
            while not self.is_gone(source):
                try:
                    return self.objects.get(ref, timeout_s=1.0).tobytes()
                except TransferTimeoutError:
                    continue  # its sender may be gone
                except ObjectStoreFullError as error:
                    full_s = full_s or time.monotonic()
                    if time.monotonic() - full_s >= ROOM_S:
                        raise self._no_room(f"what comes from rank {source}", error) from error
                    self._closed.wait(_LOOK_S)
                except HopcollError:
                    break  # it is lost, or we are leaving
            raise _lost(source, self._comm.rank)
        finally:
            self.delete(ref)
            self._was_read(source, number)

    def _take_answer(self, source: int, number: int, call: int) -> None:
        try:
            body = self._fetch_body(source, number, _ANSWER, call)
        except Exception as error:
            self._end_call(call, None, error)
        else:
            self._end_call(call, *_read_answer(source, body))

    def _answer(self, source: int, number: int, call: int, asked: bytes | None) -> None:
        """Call what another rank asked for; in a thread of its own."""
        answer: tuple[Any, BaseException | None]
        try:
            if asked is None:
                asked = self._fetch_body(source, number, _CALL, call)
            answer = self._handle(source, values.unpack(asked)), None
        except BaseException as error:  # also of sys.exit(): who asked waits
            answer = None, error
        try:
            letter = self._letter(source, _ANSWER, call, answer, "what a rank answers")
            if answer[1] is not None:  # it may be written and not read
                values.unpack(letter.body or values.unpack(letter.data)[3])
        except Exception as error:
            letter = self._failure(source, call, answer[1] if answer[1] is not None else error)
        try:
            self._send_at_last(source, letter, ROOM_S)
        except ObjectStoreFullError as error:
            # Who asked waits for it. What is small will have room; what is not may never have.
            if letter.ref is not None:
                letter = self._failure(source, call, error)
            self._send_at_last(source, letter)

    def _failure(self, source: int, call: int, error: BaseException) -> _Letter:
        failure = RuntimeError(f"{type(error).__name__}: {error}")
        return self._letter(source, _ANSWER, call, (None, failure))

    def _sweep(self) -> None:
        while (ref := self._waste.get()) is not None:
            self._delete(ref)
            if self._reserve is None:
                self._take_reserve()

    def _sweep_rest(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                ref = self._waste.get_nowait()
                if ref is not None:
                    self._delete(ref)

    def _delete(self, ref: ObjectRef) -> None:
        """Delete an object now. At the end there is one time for all; they go all the same."""
        end_s = self._end_s
        limit_s = _DELETE_S if end_s is None else max(0.0, end_s - time.monotonic())
        with contextlib.suppress(HopcollError):
            self.objects.delete(ref, timeout_s=limit_s)


def _lost(source: int, dest: int) -> Exception:
    return RankGoneError(f"a letter from rank {source} to rank {dest} is lost")


def _read_answer(source: int, body: bytes) -> tuple[Any, BaseException | None]:
    try:
        value, error = values.unpack(body)
    except Exception as unread:
        text = f"what rank {source} answered cannot be read: {type(unread).__name__}: {unread}"
        return None, RuntimeError(text)
    return value, error
