"""Which objects there are behind the refs of values, who made them, and who makes them again.

The leader's knowledge. It is not asked for anywhere: an object counts as being there from the
record of the task that made it, in this session, until somebody finds it lost. It is deleted when
no value in memory, and no task that is still to run, has its ref.
"""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hopcoll._refs import ref_of
from hopcoll.errors import (
    ObjectDeletedError,
    ObjectLostError,
    TaskFailedError,
    TransferTimeoutError,
)
from hopcoll.objects import ObjectRef
from recovery.workflows import values
from recovery.workflows.board import AVAILABLE, WAITING, Slot
from recovery.workflows.graph import Task
from recovery.workflows.ledger import COMING, FILE, LIVE, Done
from recovery.workflows.references import GET_S, UNKNOWN, Found, key_of, refs_in

if TYPE_CHECKING:
    from recovery.workflows.engine import Engine

__all__ = ["Lineage", "gone"]

#: An object that is lost so often is not made again.
_LOSSES_MAX = 30


@dataclass
class _Object:
    """What is known of an object."""

    maker: str  # "" for one that was there before the workflow: it is not deleted, nor made again
    ref: ObjectRef | None = None  # None until a value with it was looked at
    lost: bool = False
    era: int = 0  # when it was made last
    read: bool = False  # from a file, into memory
    holders: set[str] = field(default_factory=set)


class Lineage:
    """The objects of a workflow that runs. Under the engine's lock.

    Parameters
    ----------
    engine : Engine

    Attributes
    ----------
    era : int
        How often objects were made, or made again.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._objects: dict[str, _Object] = {}
        self._stored: dict[str, str] = {}  # a task whose file has the bytes
        self._made_by: dict[str, str] = {}  # as the journal says, of all that values have refs to
        self._held: dict[str, list[str]] = {}  # by whom
        self._waiting: list[tuple[set[str], Callable[[int | None], None]]] = []
        self.era = 0
        self._missed: collections.Counter[str] = collections.Counter()
        self._restoring: set[str] = set()
        self._is_new = True
        #: Values that wait for an object to be written with, by task, and their attempts.
        self._put_off: dict[str, tuple[int, values.Packed]] = {}
        #: Values that the board that comes next may use, with their versions.
        self.carried: dict[str, tuple[int, Any]] = {}

    # What there is

    def load(self) -> None:
        """Take in what the journal says: what is live is of this session, what is stored of any."""
        gang = self._engine.gang
        self._stored.clear()
        self._made_by.clear()
        for task, state in self._engine.ledger.states.items():
            done = state.done
            if done is None or not done.head.get("refs"):
                continue
            for key, maker, *_ in done.head["refs"]:
                self._made_by[key] = maker
                if done.place == FILE and done.head.get("rf"):
                    self._stored[key] = task
                elif gang is not None and done.head.get("ses") == gang.session:
                    known = self._objects.get(key)
                    if known is None:
                        # Of who led before; later, what is not known was deleted.
                        ref = ref_of(bytes.fromhex(key), None, 0) if self._is_new else None
                        known = self._objects[key] = _Object(maker, ref)
                    known.lost |= bool(done.head.get("lost")) and maker == task
        for key, maker in self._made_by.items():
            self._objects.setdefault(key, _Object(maker, lost=True))
        self._is_new = False

    def is_there(self, key: str) -> bool:
        """Whether an object is there, as far as is known, or can be read back."""
        return key in self._stored or self._is_made(key)

    def _is_made(self, key: str) -> bool:
        known = self._objects.get(key)
        return known is not None and not known.lost

    def at_hand(self, task: str, done: Done) -> Iterable[str] | None:
        """As `ledger.plan` wants it."""
        slot = self._engine.board.slots.get(task)
        carried = self.carried.get(task, (None, None))[0] == done.attempt
        if not (carried or (slot is not None and slot.valued) or (done.place == LIVE)):
            return None
        makers = []
        for key, maker, *_ in done.head.get("refs", ()):
            if self.is_there(key):
                continue
            if maker == task or maker not in self._engine.board.slots:
                return None
            makers.append(maker)
        return makers

    def maker_of(self, ref: ObjectRef) -> str | None:
        """Who has to run for an object to be there; None where it is."""
        key = key_of(ref)
        known = self._objects.get(key)
        return None if known is None or self.is_there(key) else known.maker

    def carries(self, slot: Slot) -> bool:
        """Whether there are refs in what a task is called with."""
        if slot.refs or self._engine.gang is None:
            return bool(slot.refs)
        with self._engine.lock:
            inputs = [self._engine.ledger.done(one) for one in self._engine.board.inputs(slot.id)]
        return any(done is not None and "refs" in done.head for done in inputs)

    def known(self, slot: Slot) -> tuple[bool, int]:
        """The same, and how old they may be."""
        carries = self.carries(slot)
        with self._engine.lock:
            return carries, self.era

    def head_of(self, slot: Slot, found: Found) -> dict[str, Any]:
        """What the record of a value says of its refs."""
        gang = self._engine.gang
        if gang is None or not (found.refs or found.firsts):
            return {}
        head: dict[str, Any] = {}
        with self._engine.lock:
            if found.firsts:
                head["k"] = [
                    [self._named(given), self._named(taken)] for given, taken in found.firsts
                ]
            if found.refs:
                head["ses"] = gang.session
                head["refs"] = [
                    [key, self._maker(slot, key, found)] for key in map(key_of, found.refs)
                ]
        return head

    def _maker(self, slot: Slot, key: str, found: Found) -> str:
        if key in found.made:
            return slot.id
        if (known := self._objects.get(key)) is not None:
            return known.maker
        given = any(key_of(ref) == key for ref in slot.refs)
        # What a gang has, and was not given, one of its other ranks has put.
        return self._made_by.get(key, "" if given else slot.id)

    def _named(self, keys: Sequence[str]) -> list[str]:
        """Who made these, for people: the keys where that is not known."""
        return [self._objects[key].maker if key in self._objects else key for key in keys]

    # Who has refs

    def note(self, slot: Slot, head: dict[str, Any], refs: Sequence[ObjectRef]) -> None:
        """A value with refs is there. Locked."""
        self.era += 1
        made = {key: maker for key, maker, *_ in head.get("refs", ())}
        for ref in refs:
            key = key_of(ref)
            known = self._objects.setdefault(key, _Object(made[key]))
            known.ref = ref
            if made[key] == slot.id:
                known.lost, known.era = False, self.era
            if head["st"] == FILE:
                self._stored[key] = slot.id
            elif self._stored.get(key) == slot.id:
                del self._stored[key]  # the file was of the value before
        before = self._held.pop(slot.id, [])
        self.hold(slot.id, refs)
        self._let_go(slot.id, [key for key in before if key not in made])
        self._tell_those_who_wait()

    def kept(self, task: str) -> None:
        """The value of a task is in a file. Locked."""
        done = self._engine.ledger.done(task)
        if done is not None and done.place == FILE:
            for key, *_ in done.head.get("refs", ()):
                self._stored[key] = task

    def hold(self, holder: str, refs: Iterable[ObjectRef]) -> None:
        """Keep objects for a value, or a task that is to run. Locked."""
        for ref in refs:
            key = key_of(ref)
            known = self._objects.get(key)
            if known is not None:
                known.ref = known.ref or ref
                known.holders.add(holder)
                self._held.setdefault(holder, []).append(key)

    def release(self, holder: str) -> None:
        """Delete what nobody else has. Locked."""
        self._let_go(holder, self._held.pop(holder, ()))

    def _let_go(self, holder: str, keys: Iterable[str]) -> None:
        for key in keys:
            known = self._objects.get(key)
            if known is None:
                continue
            known.holders.discard(holder)
            if not known.holders and not known.lost:
                self._delete(key)

    def _delete(self, key: str) -> None:
        known = self._objects.pop(key)
        is_ours = known.maker != "" or known.read
        if is_ours and known.ref is not None and self._engine.gang is not None:
            self._engine.gang.delete(known.ref)

    def prune(self) -> None:
        """Let go of what tasks held that are no more. Locked."""
        slots = self._engine.board.slots
        for holder in list(self._held):
            if not holder.startswith("file of ") and holder.removeprefix("call of ") not in slots:
                self.release(holder)

    def end(self, output: Any) -> None:
        """Delete all that the output has not."""
        with self._engine.lock:
            kept = {key_of(ref) for ref in refs_in(output)} if self._objects else set()
            for key in [key for key in self._objects if key not in kept]:
                self._delete(key)

    # What is lost

    def rebuild(self, keys: list[str], era: int) -> int | None:
        """Have lost objects made again, and wait for that; None where they will be others."""
        box: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        engine = self._engine
        with engine.lock:
            engine.workers += 1  # another thread takes the place of this one
            self.report(keys, era, box.put)
            engine.employ()
        try:
            return box.get()
        finally:
            with engine.lock:
                engine.workers -= 1

    def report(
        self,
        keys: Sequence[str],
        era: int | None = None,
        tell: Callable[[int | None], None] = lambda era: None,
    ) -> None:
        """Somebody found objects lost, who knew what there was at `era`."""
        engine = self._engine
        with engine.lock:
            if engine.is_ending:
                tell(None)
                return
            waiting: dict[str, _Object] = {}
            for key in keys:
                known = self._objects.get(key) or self._recall(key)
                if known is not None and not known.lost and era is not None and known.era > era:
                    continue  # it was made again since
                if known is None or not self._can_be_made(key, known):
                    tell(UNKNOWN)
                    return
                waiting[key] = known
            if not waiting:
                tell(self.era)
                return
            lost: set[str] = set()
            for key, known in waiting.items():
                if not (known.lost and self._is_being_made(key, known)):
                    known.lost = True
                    lost.add(key)
                    self._missed[key] += 1
            self._waiting.append((set(waiting), tell))
            again = {key for key in lost if key not in self._stored}
            self._restoring |= lost - again
            for task in {self._stored[key] for key in lost - again}:
                threading.Thread(target=self._restore, args=(task,), daemon=True).start()
            makers = self._makers(again)
            for task in makers:
                done = engine.ledger.done(task)
                if done is not None and "o" not in done.head:
                    engine.append("lost", {"t": task, "a": done.attempt})
            if again:
                self._make_again(makers)

    def _can_be_made(self, key: str, known: _Object) -> bool:
        return (known.maker != "" or key in self._stored) and self._missed[key] < _LOSSES_MAX

    def _is_being_made(self, key: str, known: _Object) -> bool:
        slot = self._engine.board.slots.get(known.maker)
        return key in self._restoring or (slot is not None and slot.phase != AVAILABLE)

    def _recall(self, key: str) -> _Object | None:
        """What the journal has of an object that nobody seemed to want any more. Locked."""
        maker = self._stored.get(key)
        for state in self._engine.ledger.states.values():
            for one, task, *_ in () if state.done is None else state.done.head.get("refs", ()):
                if one == key:
                    maker = maker or task
        if maker is None:
            return None
        known = self._objects[key] = _Object(maker)
        return known

    def _makers(self, keys: Iterable[str]) -> set[str]:
        """Who has to run again: who made them, or if those are no more, who has them in a value."""
        found = set()
        for key in keys:
            maker = self._objects[key].maker
            if maker in self._engine.board.slots:
                found.add(maker)
                continue
            for task, state in self._engine.ledger.states.items():
                refs = () if state.done is None else state.done.head.get("refs", ())
                if state.done is not None and "o" not in state.done.head and any(
                    key == one[0] for one in refs
                ):
                    found.add(task)
        return found

    def _make_again(self, makers: set[str]) -> None:
        """Let run what has to, because of a loss. Locked.

        If only values come of it that were there before, it runs beside all else. If one will be
        another, what was made from that is void, and may be running: all that runs ends first.
        """
        engine, board = self._engine, self._engine.board
        plan = board.plan_now()
        again = [
            board.slots[task] for task in plan.run
            if task in board.slots
            and board.slots[task].phase == AVAILABLE
            and task not in board.alias
        ]  # fmt: skip
        if (
            not all(self._is_simple(slot, plan.renewed) for slot in again)
            or not makers <= set(plan.run)
            or makers & board.alias.keys()
        ):
            engine.begin_anew()
            return
        board.plan = plan
        self._run_again(again)

    def _run_again(self, slots: list[Slot]) -> None:
        """Tasks that have ended run once more, beside all others, for the same values. Locked."""
        engine, board = self._engine, self._engine.board
        for slot in slots:
            slot.phase, slot.missing, slot.uses = WAITING, 0, slot.vertex.inputs
            slot.reason = board.plan.run[slot.id]
            board.stale.add(slot.id)
        for slot in slots:
            for user in slot.users:
                if user.phase == WAITING and user not in slots:
                    user.missing += 1
            for name in slot.uses:
                other = board.slots[name]
                other.users_left += 1
                slot.missing += other.phase != AVAILABLE
        engine.left += len(slots)
        for slot in slots:
            if slot.missing == 0:
                engine.make_ready(slot)
        engine.employ()

    def _is_simple(self, slot: Slot, renewed: set[str]) -> bool:
        """Whether a task gives the same again, to nobody but those who use its value."""
        done, task = self._engine.ledger.done(slot.id), slot.vertex.node.task
        return (
            done is not None
            and done.deterministic
            and slot.id not in renewed
            and "o" not in done.head
            and isinstance(task, Task)
            and task.annotations.ranks is None  # its thread may be one that waits
            and slot.number is None
            and slot.alias_of is None
        )

    def give_up_lost(self, tasks: Iterable[str]) -> bool:
        """Take values that were to become durable and never will for never made. Locked.

        They were lost before, or who was to write them is gone. Nobody who runs needs them, or they
        would have been made again. But an effect waits for them to last, and none that was made
        from them can have been released.
        """
        found = bool(self._restoring)  # a value may wait for these, to be written
        for task in tasks if not found else ():
            done = self._engine.ledger.done(task)
            if done is not None and (done.head.get("lost") or done.place == COMING):
                self._engine.append("anew", {"t": task})
                found = True
                self._engine.begin_anew()
        return found

    def _restore(self, task: str) -> None:
        """Put what a file has into memory again; in a thread of its own."""
        engine = self._engine
        try:
            with engine.lock:
                done = engine.ledger.done(task)
                if done is None or done.place != FILE:  # it has run again meanwhile, or is to
                    self._restoring.clear()
                    engine.begin_anew()
                    return
            engine.folder.read_value(done.head, done.body, task, self.put_again(done.head))
            with engine.lock:
                self._restoring -= {key for key, *_ in done.head["refs"]}
        except BaseException as error:
            engine.stop(error)

    def put_again(self, head: dict[str, Any]) -> Callable[[ObjectRef, np.ndarray], None]:
        """What has the objects of a record's file in memory, when that is read."""
        gang, makers = self._engine.gang, {key: maker for key, maker, *_ in head.get("refs", ())}
        assert gang is not None

        def put(ref: ObjectRef, array: np.ndarray) -> None:
            was_put = gang.put_again(ref, array)
            with self._engine.lock:
                key = key_of(ref)
                known = self._objects.setdefault(key, _Object(makers.get(key, "")))
                known.ref = known.ref or ref
                known.read |= was_put
                self.era += 1
                known.lost, known.era = False, self.era
                self._tell_those_who_wait()

        return put

    def _tell_those_who_wait(self) -> None:
        for entry in list(self._waiting):
            keys, tell = entry
            for key in list(keys):
                if self._is_made(key):
                    keys.discard(key)
            if not keys:
                self._waiting.remove(entry)
                tell(self.era)
        self._write_again()

    def give_up(self) -> None:
        """Nobody who waits gets what it waits for. Locked."""
        waiting, self._waiting = self._waiting, []
        for _, tell in waiting:
            tell(None)

    def carry(self) -> None:
        """Keep what is in memory for the board that comes next. Locked."""
        for task, slot in self._engine.board.slots.items():
            done = self._engine.ledger.done(task)
            if slot.valued and done is not None:
                self.carried[task] = (done.attempt, slot.value)

    def settle(self) -> None:
        """The board is up: give it the values that are in memory, and see who has which refs.
        Locked."""
        board = self._engine.board
        self._held.clear()
        for known in self._objects.values():
            known.holders.clear()
        # Who uses a loop, or a task that went on, uses the value of another.
        used = {board.resolve(name) for name, slot in board.slots.items() if slot.users_left}
        for task, slot in board.slots.items():
            done = self._engine.ledger.done(task)
            if slot.phase == AVAILABLE and done is not None:
                attempt, value = self.carried.get(task, (None, None))
                if attempt == done.attempt:
                    slot.value, slot.valued = value, True
                if done.head.get("refs") and (task in used or board.is_output(slot)):
                    self._hold_all(task, done)
            elif slot.refs:
                self.hold(f"call of {task}", slot.refs)
        self.carried.clear()
        for task, (attempt, packed) in self._put_off.items():
            self.hold(f"file of {task} {attempt}", packed.refs)
        self._write_again()
        for key, one in list(self._objects.items()):
            if not (one.holders or one.lost or self._is_about_to_be_put(one)):
                self._delete(key)

    def _is_about_to_be_put(self, known: _Object) -> bool:
        """Whether its task runs again, and gives its objects the names that they had."""
        slot = self._engine.board.slots.get(known.maker)
        done = self._engine.ledger.done(known.maker)
        return (
            slot is not None and slot.phase != AVAILABLE and done is not None and done.deterministic
        )

    def _hold_all(self, task: str, done: Done) -> None:
        for key, maker, *_ in done.head["refs"]:
            known = self._objects.setdefault(key, _Object(maker, lost=key not in self._stored))
            known.holders.add(task)
            self._held.setdefault(task, []).append(key)

    # Files

    def put_off(
        self,
        task: str,
        attempt: int,
        packed: values.Packed,
        error: ObjectLostError | ObjectDeletedError,
        era: int,
    ) -> None:
        """A value was not written, for an object that is lost: it is once that is there again."""

        def told(era: int | None) -> None:
            if era == UNKNOWN:
                self._put_off.pop(task, None)
                self._engine.stop(gone(task, error))

        with self._engine.lock:
            self._put_off[task] = attempt, packed
            if self._is_to_write(task, attempt):
                self.report([key_of(error.ref)], era, told)
            self._write_again()

    def _write_again(self) -> None:
        """Have values written that can be now. Locked."""
        if self._engine.is_ending:
            return  # it is not known by now what is lost
        for task, (attempt, packed) in list(self._put_off.items()):
            if not self._is_to_write(task, attempt):
                self.release(f"file of {task} {attempt}")
            elif all(self._is_made(key_of(ref)) for ref in packed.refs):
                self._engine.write_soon(task, attempt, packed)
            else:
                continue
            del self._put_off[task]

    def _is_to_write(self, task: str, attempt: int) -> bool:
        done = self._engine.ledger.done(task)
        return done is not None and done.attempt == attempt and not done.durable

    def with_objects(self, packed: values.Packed) -> values.Packed:
        """Return a value that is to be written with the objects behind its refs.

        Raises
        ------
        ObjectLostError, ObjectDeletedError
            One is gone.
        TransferTimeoutError
            One did not come, and the workflow has ended meanwhile.
        """
        return values.with_objects(packed, [self._fetch(ref) for ref in packed.refs])

    def _fetch(self, ref: ObjectRef) -> np.ndarray:
        gang = self._engine.gang
        assert gang is not None
        while True:
            try:
                return gang.objects.get(ref, timeout_s=GET_S)
            except TransferTimeoutError:
                if self._engine.cancelled.is_set():
                    raise  # nobody will use the file


def gone(task: str, error: Exception) -> TaskFailedError:
    """What a task raises whose value has a ref to what nobody can make again."""
    text = f"{task} returned a ref whose object is gone, and that nobody can make again: {error}"
    failed = TaskFailedError(text, task)
    failed.__cause__ = error
    return failed
