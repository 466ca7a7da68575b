"""Letters between the ranks of a workflow, where memory is full, letters get lost and ranks die."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import (
    MpiError,
    ObjectExistsError,
    ObjectLostError,
    ObjectStoreFullError,
    TransferTimeoutError,
)
from hopcoll.objects import ObjectRef
from recovery.workflows import post
from recovery.workflows.post import Post, RankGoneError

_PATIENCE_S = 20.0
#: Has a body.
LARGE = "much " * 10_000


class Letters:
    """Objects that two ranks of this process share, and who can be told to refuse or lose some."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.data: dict[ObjectRef, Any] = {}
        self.deleted: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.before: Callable[[str, bytes], None] = lambda name, data: None
        self.after: Callable[[str], None] = lambda name: None
        self.bad: dict[str, Exception] = {}
        self.waiting: dict[ObjectRef, asyncio.Future[None]] = {}

    def put(self, data: bytes, ref: ObjectRef | None = None) -> ObjectRef:
        ref = ObjectRef() if ref is None else ref
        name = str(ref.name)
        self.before(name, data)
        with self.lock:
            if ref in self.data:
                raise ObjectExistsError("exists", ref)
            self.data[ref] = np.frombuffer(data, np.uint8)
            if ref in self.waiting:
                future = self.waiting[ref]
                future.get_loop().call_soon_threadsafe(_wake, future)
        self.after(name)
        return ref

    def get(self, ref: ObjectRef, timeout_s: float = 0.0) -> Any:
        name = str(ref.name)
        if name in self.bad:
            raise self.bad[name]
        with self.lock:
            return self.data[ref]

    async def get_async(self, ref: ObjectRef) -> Any:
        with self.lock:
            future = None
            if ref not in self.data:
                future = self.waiting[ref] = asyncio.get_running_loop().create_future()
        if future is not None:
            try:
                await future
            finally:
                self.waiting.pop(ref, None)
        name = str(ref.name)
        if name in self.bad:
            raise self.bad[name]
        return self.data[ref]

    def delete(self, ref: ObjectRef, timeout_s: float) -> None:
        with self.lock:
            self.data.pop(ref, None)
        if ref.name is not None:  # the room that is kept for letters has none
            self.deleted.put(ref.name)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Ranks:
    """Two ranks, of which either may die."""

    def __init__(self, *listening: int) -> None:
        self.objects = Letters()
        self.alive: tuple[int, ...] = (0, 1)
        self.posts: dict[int, Post] = {}
        for rank in listening:
            comm: Any = _Comm(self, rank)
            self.posts[rank] = Post(comm, "s", _handle)

    def close(self) -> None:
        while self.posts:
            self.posts.popitem()[1].close()

    def ask(self, what: Any, source: int = 0) -> Any:
        """What the other answers, or the error that is the answer."""
        box = self.call(what, source)
        return box.get(timeout=_PATIENCE_S)

    def call(self, what: Any, source: int = 0) -> queue.SimpleQueue[Any]:
        box: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.posts[source].call(
            1 - source, what, lambda value, error: box.put(value if error is None else error)
        )
        return box


class _Comm(SimpleNamespace):
    def __init__(self, ranks: Ranks, rank: int) -> None:
        super().__init__(rank=rank, size=2, objects=ranks.objects, ranks=ranks)

    @property
    def alive(self) -> tuple[int, ...]:
        return self.ranks.alive  # type: ignore[no-any-return]


def _unreadable() -> Any:
    raise ImportError("not here")


class Unreadable:
    def __reduce__(self) -> Any:
        return _unreadable, ()


_GO_ON = threading.Event()


def _handle(source: int, what: Any) -> Any:
    if what == "wait":
        assert _GO_ON.wait(_PATIENCE_S)
    if what == "exit":
        sys.exit(3)
    return {"large": LARGE, "unreadable": Unreadable()}.get(what, what)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(0, 1)
    yield ranks
    ranks.close()


def refuse(objects: Letters, sender: int, times: int, bytes_max: int = 1 << 30) -> list[str]:
    """Let a rank have no room for its next letters, and never for large ones."""
    refused: list[str] = []

    def before(name: str, data: bytes) -> None:
        if f" {sender}>" in name and (len(refused) < times or len(data) > bytes_max):
            refused.append(name)
            raise ObjectStoreFullError("there is no room")

    objects.before = before
    return refused


def test_a_rank_without_room_answers_when_there_is_room(ranks: Ranks) -> None:
    assert ranks.ask("one") == "one"
    refused = refuse(ranks.objects, sender=1, times=3)
    assert ranks.ask("two") == "two"
    assert refused == ["s 1>0 1"] * 3
    assert ranks.ask("three") == "three"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for room."""
    monkeypatch.setattr(post, "ROOM_S", 0.0)


@pytest.mark.usefixtures("impatient")
def test_an_answer_that_never_has_room_is_an_error_as_soon_as_that_has_room(ranks: Ranks) -> None:
    refused = refuse(ranks.objects, sender=1, times=5, bytes_max=len(LARGE))
    error = str(ranks.ask("large"))
    assert "ObjectStoreFullError: rank 1 had no room for what goes to rank 0 for 0 s" in error
    assert "there is no room" in error and "raise object_bytes" in error
    assert len(refused) == 5 and set(refused[2:]) == {"s 1>0 0"}
    assert ranks.ask("next") == "next"


@pytest.mark.usefixtures("impatient")
def test_a_call_that_never_has_room_fails_alone(ranks: Ranks) -> None:
    refuse(ranks.objects, sender=0, times=0, bytes_max=len(LARGE) // 2)
    error = ranks.ask(LARGE)
    assert isinstance(error, ObjectStoreFullError)
    assert "rank 0 had no room for what goes to rank 1 for 0 s: there is no room" in str(error)
    assert ranks.ask("next") == "next"


@pytest.mark.parametrize("slow", ["get", "put"])
def test_time_that_a_transfer_takes_is_not_time_without_room(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(post, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    errors: list[Exception] = [ObjectStoreFullError("there is no room")]

    def one_error() -> None:
        if errors:
            now_s[0] += 2 * post.ROOM_S
            raise errors.pop()

    def before(name: str, data: bytes) -> None:
        if name == "s 1>0 answer 0":
            one_error()

    get = ranks.objects.get

    def get_late(ref: ObjectRef, timeout_s: float = 0.0) -> Any:
        if ref.name is not None:
            one_error()
        return get(ref)

    if slow == "get":
        errors.append(TransferTimeoutError("it is on its way"))
        monkeypatch.setattr(ranks.objects, "get", get_late)
    else:
        ranks.objects.before = before
    assert ranks.ask(LARGE) == LARGE
    assert not errors


def test_a_call_waits_for_room_and_lets_others_go_first(ranks: Ranks) -> None:
    refused = refuse(ranks.objects, sender=0, times=0, bytes_max=len(LARGE) // 2)
    box = ranks.call(LARGE)
    assert ranks.ask("next") == "next" and box.empty()
    assert set(refused) == {"s 0>1 call 0"}
    ranks.objects.before = lambda name, data: None
    assert box.get(timeout=_PATIENCE_S) == LARGE


def test_a_small_letter_has_the_room_that_was_kept_for_it(ranks: Ranks) -> None:
    """All memory is full, but for that."""
    kept = [ref for ref in ranks.objects.data if ref.name is None]
    assert len(kept) == 2

    def before(name: str, data: bytes) -> None:
        if kept[0] in ranks.objects.data and kept[1] in ranks.objects.data:
            raise ObjectStoreFullError("there is no room")

    ranks.objects.before = before
    assert ranks.ask("one") == "one"
    assert not any(one.name == "hopcoll-call-1" for one in threading.enumerate())


@pytest.mark.parametrize(
    ("name", "what", "why"),
    [
        ("s 0>1 1", "one", "rank 1 had no room for what comes from rank 0"),
        ("s 1>0 1", "one", "rank 0 had no room for what comes from rank 1"),
        ("s 0>1 call 1", LARGE, "rank 1 had no room for what comes from rank 0"),
        ("s 1>0 answer 1", "large", "rank 0 had no room for what comes from rank 1"),
    ],
    ids=["call", "answer", "body of a call", "body of an answer"],
)
@pytest.mark.usefixtures("impatient")
def test_who_never_has_room_for_a_letter_says_so(
    ranks: Ranks, name: str, what: str, why: str
) -> None:
    assert ranks.ask("zero") == "zero"
    ranks.objects.bad[name] = ObjectStoreFullError("there is no room")
    error = ranks.ask(what)
    assert isinstance(error, ObjectStoreFullError) and why in str(error)
    for source in (0, 1):
        assert ranks.ask("next", source) == "next"


@pytest.mark.parametrize(
    ("name", "what"), [("s 0>1 call 1", LARGE), ("s 1>0 answer 1", "large")], ids=["call", "answer"]
)
def test_a_lost_body_is_one_lost_attempt(ranks: Ranks, name: str, what: str) -> None:
    held, go_on = threading.Event(), threading.Event()

    def before(name: str, data: bytes) -> None:
        if name == "s 1>0 0":
            held.set()
            assert go_on.wait(_PATIENCE_S)

    ranks.objects.before = before
    box = ranks.call("open")
    assert held.wait(_PATIENCE_S)
    ranks.objects.before = lambda name, data: None
    ranks.objects.bad[name] = ObjectLostError("its file is damaged")
    other = ranks.call(what)
    go_on.set()
    assert isinstance(other.get(timeout=_PATIENCE_S), RankGoneError)
    assert box.get(timeout=_PATIENCE_S) == "open"


def test_who_waits_for_room_to_answer_stops_when_nobody_waits_for_it(ranks: Ranks) -> None:
    waits = threading.Event()

    def before(name: str, data: bytes) -> None:
        if " 1>" in name:
            waits.set()
            raise ObjectStoreFullError("there is no room")

    ranks.objects.before = before
    box = ranks.call("one")
    assert waits.wait(_PATIENCE_S)
    answering = [one for one in threading.enumerate() if one.name == "hopcoll-call-0"]
    ranks.alive = (1,)
    for thread in answering:
        thread.join(_PATIENCE_S)
        assert not thread.is_alive()
    ranks.posts.pop(0).close()
    assert answering and isinstance(box.get(timeout=_PATIENCE_S), RankGoneError)


def test_a_call_that_could_not_be_sent_leaves_no_hole(ranks: Ranks) -> None:
    def before(name: str, data: bytes) -> None:
        raise BufferError("broken")

    ranks.objects.before = before
    with pytest.raises(BufferError):
        ranks.call("one")
    ranks.objects.before = lambda name, data: None
    assert ranks.ask("two") == "two"


def test_a_call_that_was_interrupted_when_it_was_there_leaves_no_hole(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after(name: str) -> None:
        ranks.objects.after = lambda name: None
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ranks.objects, "delete", lambda ref, timeout_s: None)
        ranks.objects.after = after
        with pytest.raises(KeyboardInterrupt):
            ranks.call("one")
        assert ranks.ask("two") == "two"


@pytest.mark.parametrize("name", ["s 0>1 1", "s 1>0 1"], ids=["call", "answer"])
def test_a_lost_letter_of_a_rank_that_lives_is_a_lost_attempt(ranks: Ranks, name: str) -> None:
    assert ranks.ask("one") == "one"
    ranks.objects.bad[name] = ObjectLostError("its file is damaged")
    error = ranks.ask("two")
    assert isinstance(error, RankGoneError) and "letter" in str(error)
    assert not ranks.posts[0].is_gone(1)
    for source in (0, 1):
        assert ranks.ask("three", source) == "three"


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Calls of "wait" are answered from when it is set."""
    _GO_ON.clear()
    yield _GO_ON
    _GO_ON.set()


@pytest.mark.parametrize("name", ["s 0>1 3", "s 1>0 3"], ids=["call", "answer"])
@pytest.mark.parametrize("what", ["small", "large"])
@pytest.mark.parametrize("why", [ObjectLostError("damaged"), ObjectStoreFullError("no room")])
@pytest.mark.usefixtures("impatient")
def test_a_letter_that_is_not_read_ends_its_call_and_no_other(
    ranks: Ranks, held: threading.Event, name: str, what: str, why: Exception
) -> None:
    others = [ranks.call("wait", source) for source in (0, 1, 0, 1)]
    assert ranks.ask("small") == "small"
    ranks.objects.bad[name] = why
    error = ranks.ask(LARGE if what == "large" else what)
    expected = RankGoneError if isinstance(why, ObjectLostError) else ObjectStoreFullError
    assert isinstance(error, expected)
    held.set()
    assert [box.get(timeout=_PATIENCE_S) for box in others] == ["wait"] * 4
    ranks.close()
    names = [str(ref.name) for ref in ranks.objects.data]
    assert not [name for name in names if " call " in name or " answer " in name]


@pytest.mark.usefixtures("impatient")
def test_that_a_letter_was_not_read_is_said_again_where_that_is_not_read(ranks: Ranks) -> None:
    ranks.objects.bad["s 0>1 0"] = ranks.objects.bad["s 1>0 0"] = ObjectLostError("damaged")
    assert isinstance(ranks.ask("one"), RankGoneError)
    assert ranks.ask("two") == "two"


@pytest.mark.usefixtures("impatient")
def test_who_can_neither_read_nor_say_so_takes_its_calls_for_lost(
    ranks: Ranks, held: threading.Event
) -> None:
    """Those who begin again are told that there is no room, if there is none."""
    others = [ranks.call("wait"), ranks.call("wait")]
    assert ranks.ask("zero") == "zero"
    ranks.objects.bad["s 1>0 1"] = ObjectStoreFullError("there is no room")

    def before(name: str, data: bytes) -> None:
        if " 0>" in name and number <= int(name.split()[-1]):
            raise ObjectStoreFullError("there is no room")

    number = ranks.posts[0]._sent[1] + 1
    ranks.objects.before = before
    boxes = [ranks.call("one"), *others]
    assert all(isinstance(box.get(timeout=_PATIENCE_S), RankGoneError) for box in boxes)
    assert isinstance(ranks.ask("again"), ObjectStoreFullError)
    ranks.objects.before = lambda name, data: None
    assert ranks.ask("two") == "two"


def test_who_can_hear_nobody_any_more_waits_for_nobody(ranks: Ranks) -> None:
    assert ranks.ask("one") == "one"
    ranks.objects.bad["s 1>0 1"] = MpiError("MPI is broken")
    for _ in range(2):
        assert isinstance(ranks.ask("two"), RankGoneError)


def test_letters_that_a_dead_rank_has_not_read_are_deleted() -> None:
    ranks = Ranks(0)
    boxes = [ranks.call(f"call {number}") for number in range(2)] + [ranks.call(LARGE)]

    def after(name: str) -> None:
        """It is found dead while a letter is on its way there."""
        ranks.alive = (0,)
        for box in boxes:
            assert isinstance(box.get(timeout=_PATIENCE_S), RankGoneError)

    ranks.objects.after = after
    last = ranks.call("the last")
    assert isinstance(last.get(timeout=_PATIENCE_S), RankGoneError)
    deleted = [ranks.objects.deleted.get(timeout=_PATIENCE_S) for _ in range(5)]
    assert deleted == [*(f"s 0>1 {number}" for number in range(3)), "s 0>1 call 2", "s 0>1 3"]
    ranks.posts[0].close()
    assert not ranks.objects.data


def test_letters_that_nobody_has_read_are_deleted_at_the_end() -> None:
    ranks = Ranks(0)
    boxes = [ranks.call("small"), ranks.call(LARGE)]
    ranks.close()
    assert all(isinstance(box.get(timeout=_PATIENCE_S), RankGoneError) for box in boxes)
    assert not ranks.objects.data


def test_what_calls_let_go_of_after_the_end_is_deleted(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is just fetching what it is asked; another was sent meanwhile."""
    fetching, sending, go_on = threading.Event(), threading.Event(), threading.Event()
    get = ranks.objects.get

    def get_late(ref: ObjectRef, timeout_s: float = 0.0) -> Any:
        if ref.name == "s 0>1 call 0":
            fetching.set()
            assert go_on.wait(_PATIENCE_S)
        return get(ref)

    def before(name: str, data: bytes) -> None:
        if name == "s 1>0 0":
            sending.set()
            assert go_on.wait(_PATIENCE_S)

    monkeypatch.setattr(ranks.objects, "get", get_late)
    ranks.objects.before = before
    others = threading.enumerate()
    boxes = [ranks.call(LARGE), ranks.call("small")]
    assert fetching.wait(_PATIENCE_S) and sending.wait(_PATIENCE_S)
    late = [one for one in threading.enumerate() if one not in others]
    posts = list(ranks.posts.values())
    ranks.close()
    ref = ranks.objects.put(b"of a task")
    posts[0].delete(ref)
    assert ref not in ranks.objects.data
    ranks.objects.put(b"the body again", ObjectRef("s 0>1 call 0"))
    go_on.set()
    for thread in late:
        thread.join(_PATIENCE_S)
    assert len(late) == 2 and not ranks.objects.data
    assert all(isinstance(box.get(timeout=_PATIENCE_S), RankGoneError) for box in boxes)


def test_letters_that_a_dead_rank_has_read_are_left_alone(ranks: Ranks) -> None:
    count = 20
    for number in range(count):
        assert ranks.ask(LARGE) == LARGE
    for _ in range(4 * count):
        ranks.objects.deleted.get(timeout=_PATIENCE_S)
    ranks.posts.pop(1).close()  # what it knows to be read it leaves alone as well
    last = [f"s 1>0 {count - 1}", f"s 1>0 answer {count - 1}"]
    assert [ranks.objects.deleted.get(timeout=_PATIENCE_S) for _ in last] == last
    box = ranks.call("to nobody")
    ranks.alive = (0,)
    assert isinstance(box.get(timeout=_PATIENCE_S), RankGoneError)
    ranks.posts.pop(0).close()
    assert not ranks.objects.data
    assert [ranks.objects.deleted.get(timeout=_PATIENCE_S)] == [f"s 0>1 {count}"]
    assert ranks.objects.deleted.empty()


def test_letters_that_nobody_can_read_and_calls_that_exit_are_answered(ranks: Ranks) -> None:
    assert isinstance(ranks.ask("exit"), SystemExit)
    assert isinstance(ranks.ask(Unreadable()), ImportError)
    assert "what rank 1 answered cannot be read: ImportError" in str(ranks.ask("unreadable"))
    assert ranks.ask("well") == "well"
