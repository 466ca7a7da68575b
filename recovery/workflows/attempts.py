"""One attempt of one task: called, judged, recorded."""

from __future__ import annotations

import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np

from hopcoll.errors import (
    EffectUnknownError,
    ObjectDeletedError,
    ObjectLostError,
    TaskFailedError,
    WorkflowError,
)
from recovery.workflows import ledger as ledgers
from recovery.workflows import values
from recovery.workflows.board import READY, Slot
from recovery.workflows.checks import check_graph
from recovery.workflows.context import Done, NotDoneError, TaskContext
from recovery.workflows.graph import Graph, Node, Stop, Task, takes_context
from recovery.workflows.ledger import COMING, FILE, FIRST, INLINE, LIVE, NOWHERE
from recovery.workflows.lineage import gone
from recovery.workflows.post import RankGoneError
from recovery.workflows.references import UNKNOWN, Found, key_of, refs_in
from recovery.workflows.stored import dump_call, dump_graph

if TYPE_CHECKING:
    from recovery.workflows.engine import Engine

__all__ = ["ERROR_LENGTH_MAX", "Attempts", "GangError", "TaskTimeoutError", "VoidError"]

#: Of the text of an exception in the journal.
ERROR_LENGTH_MAX = 4000

#: What it costs to store a value, until one was stored: seconds, and bytes a second.
_STORE_S, _STORE_RATE = 1e-4, 4e8


class TaskTimeoutError(Exception):
    """A task did not return within its ``timeout_s``. Its thread may go on; nobody hears it."""


class GangError(Exception):
    """A gang could not go on; `cause` is what a rank raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class VoidError(Exception):
    """What an attempt was called with is lost, and will be another: it comes to nothing."""


class Attempts:
    """Runs what the engine says can run, in any thread.

    Parameters
    ----------
    engine : Engine
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._board = engine.board
        self._ledger = engine.ledger
        self._folder = engine.folder
        self._store_s, self._store_rate = _STORE_S, _STORE_RATE
        self._spares = values.Spares()

    def execute(self, slot: Slot) -> None:
        """Run a task, or as much of it as can be done now."""
        task = slot.vertex.node.task
        assert isinstance(task, Task)
        options = task.annotations
        state = self._ledger.states.get(slot.id)
        done = None if state is None else state.done
        if not slot.announced:
            if done is not None and done.deterministic and slot.id not in self._board.plan.renewed:
                slot.attempt = done.attempt  # the same value again, or an error
            else:
                slot.attempt = self._ledger.attempts(slot.id) + 1
        arguments, keywords = slot.vertex.call(self._engine.value_of)
        arguments = [values.freeze(one) for one in arguments]
        if keywords:
            keywords = values.freeze(keywords)
        if not slot.announced and (options.external or options.rollback is not None):
            begun = None if state is None else state.begun
            if begun is not None and options.external:
                if self._was_done(slot, task, begun, arguments, keywords):
                    return
            self._announce(slot, task, arguments, keywords)
            return
        slot.announced = False
        self._engine.note_run(slot)
        if options.ranks is not None:
            self._engine.elsewhere.hand_over(slot, arguments, keywords, self.context(slot, task))
            return
        if options.on is not None and self._engine.elsewhere.send(slot, task, arguments, keywords):
            return
        context = None
        if task.wants_context or self._engine.lineage.carries(slot):
            context = self.context(slot, task)
        extra = {"ctx": context} if task.wants_context else {}
        references = None if context is None else context.references
        start_s = time.perf_counter()
        found = Found()
        try:
            with self._engine.elsewhere.here(task):
                if options.timeout_s is None:
                    value = task.function(*arguments, **keywords, **extra)
                else:
                    value = _call_within(options.timeout_s, task, arguments, {**keywords, **extra})
            self._engine.elsewhere.ran_here(value)
            if references is not None:
                value, found = references.finish(value)
        except Exception as error:
            if references is not None:
                references.drop(None)
                if references.void is not None:
                    error = VoidError(str(error))
            context = context or self.context(slot, task)
            self.failed(slot, task, error, arguments, keywords, context)
        else:
            if references is not None:
                references.drop(found)
            self.succeeded(slot, task, value, time.perf_counter() - start_s, found=found)

    def answered(
        self, slot: Slot, task: Task, arguments: Any, keywords: Any, rank: int, value: Any,
        error: BaseException | None,
    ) -> None:  # fmt: skip
        """A call at another rank has ended."""
        if error is None:
            value, found, took_s = value
            self.succeeded(slot, task, value, took_s, extra={"on": rank}, found=found)
        elif isinstance(error, RankGoneError):
            self._lose(slot, f"{error}, where it ran")
        elif isinstance(error, Exception):
            self.failed(slot, task, error, arguments, keywords, self.context(slot, task))
        else:
            raise error

    def _lose(self, slot: Slot, text: str) -> None:
        """Nothing of an attempt counts, as if the leader's process had died with it."""
        with self._engine.lock:
            self._engine.append("fail", {"t": slot.id, "a": slot.attempt, "error": text})
            if slot.reason in ("", FIRST):
                slot.reason = text
            # At once, by any thread: the one that looks at time may be in a gang that waits for it.
            self._engine.make_ready(slot)
            if not self._engine.is_ending:
                self._engine.employ()

    def note(self, name: str, number: int, *found: Any) -> tuple[Any] | None:
        """What was noted under a number; where nothing was, that is what was found, if anything."""
        with self._engine.lock:
            notes = self._ledger.state(name).notes
            if number not in notes:
                if not found:
                    return None
                self._engine.append("note", {"t": name, "k": number, "v": found[0]})
            return (notes[number],)

    def context(self, slot: Slot, task: Task) -> TaskContext:
        def recall(number: int, ask: Any) -> Any:
            told = self.note(slot.id, number)
            if told is None:
                told = self.note(slot.id, number, ask())
            assert told is not None
            return told[0]

        known = self._engine.lineage.known(slot)
        gang = self._engine.gang
        references = None
        if gang is not None:
            bare = (self._folder.id, slot.id, slot.attempt, self._folder.uuid, False, *known)
            references = gang.references(bare, task.annotations.deterministic, None)
        return TaskContext(
            self._folder.id,
            slot.id,
            slot.attempt,
            self._folder.uuid,
            recall,
            self._engine.cancelled,
            task.annotations.idempotency_key,
            begin=self._engine.begin if task.annotations.external else None,
            references=references,
            known=known,
        )

    # Effects

    def _announce(self, slot: Slot, task: Task, arguments: Any, keywords: Any) -> None:
        """Write the intent of an effect; the task comes back when that is durable."""
        head: dict[str, Any] = {"t": slot.id, "a": slot.attempt, "in": self.versions(slot)}
        head["by"] = self._folder.nonce
        if task.annotations.catch_exceptions:
            head["p"] = 1
        body = b""
        if task.annotations.rollback is not None:
            head["r"] = 1
            what = f"the arguments of {slot.id}"
            call = dump_call((task, arguments, keywords), what)
            head_of_file, body = self._folder.spool(call, what)
            head.update(head_of_file)
        with self._engine.lock:
            slot.announced = True
            self._engine.after_flush(self._engine.append("begin", head, body), slot, READY)

    def _was_done(
        self, slot: Slot, task: Task, begun: ledgers.Begun, arguments: Any, keywords: Any
    ) -> bool:
        """An effect was begun, and its end is not known: find out, and take it for done if so."""
        options = task.annotations
        if options.verify is not None:
            slot.attempt = begun.attempt
            context = self.context(slot, task)
            answer = self._verify(slot, task, arguments, keywords, context)
            if answer is not None:
                self.succeeded(slot, task, answer.value, 0.0)
                return True
            slot.attempt = begun.attempt + 1
            # Who began it may still be about to do it, unless it is dead or over.
            if options.idempotency_key or self._is_over(begun):
                with self._engine.lock:
                    self._engine.append("not", {"t": slot.id, "a": begun.attempt})
                return False
        elif options.idempotency_key:
            return False
        raise self._unknown(slot, "was cut off")

    def _is_over(self, begun: ledgers.Begun) -> bool:
        """Whether the attempt can have no effect any more."""
        owner = self._ledger.owners.get(begun.by)
        if begun.late:
            return owner is not None and self._folder.is_dead(owner)
        return (
            begun.by == self._folder.nonce
            or begun.by in self._ledger.over
            or (owner is not None and self._folder.is_dead(owner))
        )

    def _verify(
        self, slot: Slot, task: Task, arguments: Any, keywords: Any, context: TaskContext
    ) -> Done | None:
        verify = task.annotations.verify
        assert verify is not None
        extra = {"ctx": context} if takes_context(verify) else {}
        try:
            answer = verify(*arguments, **keywords, **extra)
        except Exception as error:
            raise EffectUnknownError(
                f"{slot.id}: verify could not tell whether the effect was done: {error}; resume "
                "when the outside answers again",
                slot.id,
            ) from error
        if isinstance(answer, Done):
            return answer
        if answer is None or isinstance(answer, (bool, np.bool_)):
            return Done() if answer else None
        raise WorkflowError(
            f"verify of {slot.id} must return True, False or Done(value), not {answer!r}"
        )

    def _unknown(self, slot: Slot, what: str) -> EffectUnknownError:
        return EffectUnknownError(
            f"{slot.id} {what} and may have had its effect or not; find out, and then: hopcoll wf "
            f"resolve {self._folder.path} {slot.id} --done (or --not-done)",
            slot.id,
        )

    def failed(
        self,
        slot: Slot,
        task: Task,
        error: Exception,
        arguments: Any,
        keywords: Any,
        context: TaskContext,
    ) -> None:
        """An attempt has raised: undo it, try again, or give up."""
        options = task.annotations
        text = "".join(traceback.format_exception_only(type(error), error)).strip()
        text = text[:ERROR_LENGTH_MAX]
        with self._engine.lock:
            head = {"t": slot.id, "a": slot.attempt, "error": text}
            if isinstance(error, TaskTimeoutError):
                head["late"] = 1
            self._engine.append("fail", head)
        if options.external:
            not_done = isinstance(error, NotDoneError)
            if not (not_done or options.verify is None or isinstance(error, TaskTimeoutError)):
                answer = self._verify(slot, task, arguments, keywords, context)
                if answer is not None:
                    self.succeeded(slot, task, answer.value, 0.0)
                    return
                not_done = True  # this attempt is over, nobody will do it later
            if not_done:
                with self._engine.lock:
                    self._engine.append("not", {"t": slot.id, "a": slot.attempt})
            elif not options.idempotency_key:
                raise self._unknown(slot, f"raised {text},") from error
        elif options.rollback is not None:
            self.roll_back(slot.id, task, arguments, keywords, {"t": slot.id, "a": slot.attempt})
        if isinstance(error, VoidError):
            self._engine.void(slot)
        elif slot.tries < options.retries:
            delay_s = options.backoff_s * 2**slot.tries
            slot.tries += 1
            self._engine.delay(slot, delay_s)
        elif options.catch_exceptions:
            self.succeeded(slot, task, (None, error), 0.0, caught=True)
        else:
            raise TaskFailedError(f"{slot.id} failed: {text}", slot.id) from error

    def roll_back(
        self, name: str, task: Task, arguments: Any, keywords: Any, head: dict[str, Any]
    ) -> None:
        """Undo what an attempt did."""
        rollback = task.annotations.rollback
        assert rollback is not None
        extra: dict[str, Any] = {}
        if takes_context(rollback):
            context = TaskContext(
                self._folder.id, name, head["a"], self._folder.uuid, lambda number, ask: ask()
            )
            extra = {"ctx": context}
        try:
            rollback(*arguments, **keywords, **extra)
        except Exception as error:
            raise TaskFailedError(
                f"the rollback of {name} failed: {type(error).__name__}: {error}; nothing that "
                "depends on it can run before it succeeds",
                name,
            ) from error
        with self._engine.lock:
            self._engine.append("undone", head)
            self._engine.undone.append(name)

    # What a task returned

    def succeeded(
        self,
        slot: Slot,
        task: Task,
        value: Any,
        took_s: float,
        *,
        extra: dict[str, Any] | None = None,
        whole: bool = True,
        caught: bool = False,
        found: Found | None = None,
    ) -> None:
        """Record what an attempt returned, and store it as the annotation says."""
        options = task.annotations
        found = found or Found()
        if options.ranks is not None:
            # Other ranks may well give another value: in a job of another size, all were there.
            before = self._ledger.done(slot.id)
            whole = whole and extra is not None and (
                before is None or before.head.get("w") == extra["w"]
            )
        head: dict[str, Any] = {
            "t": slot.id,
            "a": slot.attempt,
            "in": self.versions(slot),
            # To run again, what can be rolled back is undone, and all that was made from it.
            "nd": (
                not (options.deterministic and whole)
                or options.rollback is not None
                or found.new
            ),
            "s": round(took_s, 6),
            "c": task.code,
            **(extra or {}),
        }
        if slot.reason and slot.reason != FIRST:
            head["why"] = slot.reason
        if slot.number is not None:
            loop = slot.vertex.loop.node.task  # type: ignore[attr-defined]
            if isinstance(value, Stop):
                value = value.value
                head["l"] = 1
            elif slot.number + 1 >= loop.times:
                head["l"] = 1
        elif isinstance(value, Stop):
            raise WorkflowError(f"{slot.id} returned Stop, and is not the body of a loop")
        if isinstance(value, Node):
            if options.catch_exceptions:
                raise WorkflowError(
                    f"{slot.id} returned a graph, whose exceptions nobody catches: "
                    "catch_exceptions is for tasks that return values"
                )
            self._go_on(slot, head, value, found)
            return
        if options.catch_exceptions and not caught:
            value = (value, None)
        value = values.freeze(value)
        if options.external:
            head["x"] = 1
        head.update(self._engine.lineage.head_of(slot, found))
        if not head["nd"]:
            head["h"] = values.fingerprint(value, found.text_of if found.refs else None)
            self._compare(slot, task, head["h"])
        elif (done := self._ledger.done(slot.id)) is not None and done.attempt == head["a"]:
            # It was said to give the same again, and a rank was lost this time, or it added up
            # objects: that is another version, and what was made from the one before is void.
            head["a"] = slot.attempt = self._ledger.attempts(slot.id) + 1
            with self._engine.lock:
                self._engine.begin_anew()
        nbytes = sum(one[1] for one in found.made.values())
        mode = self._mode(slot, head, value, took_s, nbytes)
        self.store(slot, head, value, mode, found)

    def finish_empty(self, loop: Slot) -> None:
        """A loop that is never gone round: its value is what it would have begun with. Locked."""
        engine = self._engine
        value = loop.vertex.call(engine.value_of)[0][0]
        loop.attempt = 1
        head = {
            "t": loop.id, "a": 1, "in": self.versions(loop), "nd": False, "s": 0.0,
            "c": loop.vertex.node.task.code,
        }  # fmt: skip
        found = Found()
        if engine.lineage.carries(loop):
            found.refs = refs_in(value)
            head.update(engine.lineage.head_of(loop, found))
        mode = "async" if self._board.is_output(loop) else "none"
        self.store(loop, head, values.freeze(value), mode, found)

    def _compare(self, slot: Slot, task: Task, found: str) -> None:
        """A deterministic task must give what it gave before."""
        done = self._ledger.done(slot.id)
        if done is None or done.attempt != slot.attempt or done.hash in (None, found):
            return
        changed = done.head.get("c", "") != task.code
        raise TaskFailedError(
            f"{slot.id} is annotated as deterministic, but gave another value than before"
            + ("; its code has changed in between" if changed else "")
            + "; what was made from the first cannot be kept: correct the annotation, and run it "
            "under another id",
            slot.id,
        )

    def _mode(
        self, slot: Slot, head: dict[str, Any], value: Any, took_s: float, nbytes: int
    ) -> str:
        """How a value is kept."""
        last = None
        if "l" in head:
            last = self._board.slots[slot.vertex.loop.id]  # type: ignore[attr-defined]
        mode = slot.checkpoint if last is None else last.checkpoint
        inputs = [self._board.slots[name] for name in head["in"] if name in self._board.slots]
        debt_s = took_s + max((one.debt_s for one in inputs), default=0.0)
        # An effect of it would have to wait for ever for what is not kept and could be another.
        loose = any(one.loose for one in inputs)
        if head.get("x"):
            return "sync"
        if mode == "auto":
            store_s = self._store_s + (_guess_bytes(value) + nbytes) / self._store_rate
            mode = "async" if head["nd"] or loose or debt_s > store_s else "none"
        if mode == "none":
            # A gang that loses a rank cannot give its value again, whatever was said of it.
            may_change = _is_steady_gang(slot)
            if may_change or self._board.is_output(slot if last is None else last):
                mode = "async"
            else:
                slot.debt_s = debt_s
        slot.loose = mode == "none" and (head["nd"] or loose)
        return mode

    def store(
        self, slot: Slot, head: dict[str, Any], value: Any, mode: str, found: Found | None = None
    ) -> None:
        """Record a value, and what was done for it to be durable."""
        engine = self._engine
        refs = found.refs if found is not None else []
        if mode == "none":
            place, body = NOWHERE, b""
            if refs and (packed := values.pack(value, f"the value of {slot.id}")).is_small:
                place, body = LIVE, packed.data
            engine.finish(slot, value, {**head, "st": place}, body, wait=False, refs=refs)
            return
        packed = values.pack(value, f"the value of {slot.id}", self._spares)
        packed.refs = refs
        if packed.is_small and not refs:
            engine.finish(slot, value, {**head, "st": INLINE}, packed.data, wait=mode == "sync")
        elif mode == "sync":
            place_of = self._write_now(slot, packed, found)
            if place_of is not None:
                head = {**head, **place_of, "st": FILE}
                engine.finish(slot, value, head, b"", wait=True, refs=refs)
        else:
            with engine.lock:
                engine.finish(slot, value, {**head, "st": COMING}, b"", wait=False, refs=refs)
                # It may have been used by all before it is written.
                engine.lineage.hold(f"file of {slot.id} {slot.attempt}", refs)
            engine.write_later(slot.id, slot.attempt, packed)

    def _note_cost(self, nbytes: int, took_s: float) -> None:
        self._store_rate += 0.3 * (nbytes / max(took_s - self._store_s, 1e-6) - self._store_rate)

    def write(self, task: str, attempt: int, packed: values.Packed) -> None:
        """Write a value that was recorded before; in the writer's thread."""
        lineage = self._engine.lineage
        era = lineage.era
        try:
            place = self._write(task, packed)
        except (ObjectLostError, ObjectDeletedError) as error:
            lineage.put_off(task, attempt, packed, error, era)
            return
        self._engine.kept(task, attempt, place)
        if packed.refs:
            with self._engine.lock:
                lineage.release(f"file of {task} {attempt}")

    def _write_now(
        self, slot: Slot, packed: values.Packed, found: Found | None
    ) -> dict[str, Any] | None:
        """Write a value, and have made again first what it refers to and is lost; None where the
        attempt comes to nothing for that."""
        lineage = self._engine.lineage
        made = {} if found is None else found.made
        while True:
            _, era = lineage.known(slot)
            try:
                return self._write(slot.id, packed)
            except (ObjectLostError, ObjectDeletedError) as error:
                key = key_of(error.ref)
                again = None if key in made else lineage.rebuild([key], era)
                if again == UNKNOWN:
                    raise gone(slot.id, error) from error
                if again is not None:
                    continue
                if slot.vertex.node.task.annotations.external:
                    # It was done. Its intent stays open, so whoever comes next asks first.
                    self._engine.void(slot)
                else:
                    self._lose(slot, str(error))
                return None

    def _write(self, task: str, packed: values.Packed) -> dict[str, Any]:
        start_s = time.perf_counter()
        whole = self._engine.lineage.with_objects(packed) if packed.refs else packed
        place = self._folder.write_value(whole, f"the value of {task}")
        if packed.refs:
            place["rf"] = 1
        self._note_cost(whole.nbytes, time.perf_counter() - start_s)
        self._spares.give(packed)  # of the objects there are views only, which are others'
        return place

    def _go_on(self, slot: Slot, head: dict[str, Any], node: Node, found: Found) -> None:
        """The task has returned a graph, whose output is its value."""
        with self._engine.lock:
            owner, generation = self._board.owner_of(slot)
        if found.made:
            raise WorkflowError(
                f"{slot.id} returned a graph with a ref of its own in it, which nobody could make "
                "again without the graph: put the array in a task of the graph, or before"
            )
        if found.refs and generation > 1:
            raise WorkflowError(
                f"{slot.id}, whose graph goes on from that of {owner}, returned one with refs in it"
                "; of who made them nothing is kept: use a loop"
            )
        graph = Graph.of(node, ledgers.generation_prefix(owner, generation))
        check_graph(graph)
        self._engine.elsewhere.check(graph.vertices.values())
        in_file, body = self._folder.spool(dump_graph(graph), f"the graph of {slot.id}")
        head = {**head, **in_file, "st": INLINE, "o": owner, "g": generation}
        if found.refs:
            head.update(self._engine.lineage.head_of(slot, found), st=LIVE)
        self._engine.go_on(slot, owner, generation, graph, head, body, found.refs)

    def versions(self, slot: Slot) -> dict[str, int]:
        """Of what a task is made from."""
        found = {}
        with self._engine.lock:
            for name in self._board.inputs(slot.id):
                done = self._ledger.done(name)
                assert done is not None, (slot.id, name)
                found[name] = done.attempt
        return found


def _is_steady_gang(slot: Slot) -> bool:
    options = slot.vertex.node.task.annotations
    return options.deterministic and options.ranks is not None


def _call_within(
    timeout_s: float, task: Task, arguments: list[Any], keywords: dict[str, Any]
) -> Any:
    box: list[Any] = []

    def run() -> None:
        try:
            box.append((task.function(*arguments, **keywords), None))
        except BaseException as error:
            box.append((None, error))

    thread = threading.Thread(target=run, name=f"hopcoll-{task.name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not box:
        raise TaskTimeoutError(f"it did not return within {timeout_s:g} s")
    value, error = box[0]
    if error is not None:
        raise error
    return value


def _guess_bytes(value: Any, depth: int = 0) -> int:
    """About how large a value is; without a look into what is not plain."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, (bytes, bytearray, str)):
        return len(value)
    if depth < 4 and isinstance(value, (list, tuple)):
        return sum(_guess_bytes(one, depth + 1) for one in value)
    if depth < 4 and isinstance(value, dict):
        return sum(_guess_bytes(one, depth + 1) for one in value.values())
    return 64
