"""Runs a workflow: threads that take what comes next, with the journal between them.

A thread takes a task that is ready, or the flush that others wait for. So in a chain one thread
does it all without handing over, and where much is ready at once a flush makes many commits durable
together. Nobody waits for the disk while something else can be done.

The way of a task: its inputs are there; (an effect: nothing that it was made from is exposed, and
its intent is durable); it runs; its record is in the journal; ("sync": that is durable); those who
use it may begin.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hopcoll.errors import WorkflowCancelledError, WorkflowError
from recovery.workflows import values
from recovery.workflows.attempts import Attempts
from recovery.workflows.board import (
    AVAILABLE, DELAYED, FLUSHING, HELD, READY, RUNNING, WAITING, Board, Slot,
)  # fmt: skip
from recovery.workflows.elsewhere import Elsewhere
from recovery.workflows.graph import Event, Graph, Loop
from recovery.workflows.ledger import FIRST, INLINE, Ledger
from recovery.workflows.lineage import Lineage
from recovery.workflows.stored import load_call

if TYPE_CHECKING:
    from hopcoll.objects import ObjectRef
    from recovery.workflows.folder import Folder
    from recovery.workflows.gang import Gang

__all__ = ["Engine"]

#: While something is ready, a commit waits for others so long at the most, and for so many.
_GROUP_S = 0.001
_GROUP_MAX = 256
_BACKOFF_MAX_S = 60.0
#: Large values that wait to be written; whoever makes more waits.
_WRITING_BYTES_MAX = 256 << 20
_COMPACT_RECORDS = 2000
#: How often time itself is looked at: retries, events, a request to cancel.
_POLL_S = 0.05


class Engine:
    """One run of one workflow, from its journal to its end.

    Parameters
    ----------
    folder : Folder
        Where it is kept; its journal is open.
    ledger : Ledger
    workers : int
        Threads for tasks.
    gang : Gang, optional
        The ranks. Its `call` and `idle` are called in the thread that calls `run`.
    progress : callable, optional
        ``progress(task, what, left)``, called with each task that ends.
    begin : callable, optional
        Returns another workflow of the same store, by name.

    Attributes
    ----------
    ran : list of (str, str)
        What ran, and why.
    undone : list of str
        What was rolled back.
    """

    def __init__(
        self,
        folder: Folder,
        ledger: Ledger,
        *,
        workers: int = 8,
        gang: Gang | None = None,
        progress: Callable[[str, str, int], None] | None = None,
        begin: Callable[[str], Any] | None = None,
    ) -> None:
        self.folder = folder
        self.ledger = ledger
        self.lock = threading.RLock()
        self.gang = gang
        self.lineage = Lineage(self)
        self.board = Board(
            ledger, folder.unspool, self._begin_anew, self.lineage.at_hand, self.lineage.maker_of
        )
        self.begin = begin
        self.ran: list[tuple[str, str]] = []
        self.undone: list[str] = []
        self.cancelled = threading.Event()
        self._journal = folder.journal
        self._attempts = Attempts(self)
        self._turn = threading.Condition(self.lock)
        self.workers = workers
        self.elsewhere = Elsewhere(self, self._attempts)
        self._progress = progress
        self.left = 0
        self._ready: deque[Slot] = deque()
        self._anew = False  # what runs ends, then the board is put up anew
        #: Commits, and intents, that wait for a flush: (record, since when, task, its next phase).
        self._pending: deque[tuple[int, float, Slot | None, int]] = deque()
        self._appended = 0
        self._held: list[Slot] = []
        self._delayed: list[tuple[float, int, Slot]] = []
        self._events: dict[str, list[Slot]] = {}
        self._garbage: deque[tuple[int, str]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle_workers = 0
        self._running = 0
        self._flushing = False
        self._flush_left = False  # to whoever was woken for it
        self._to_write: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._writing = 0
        self._writing_bytes = 0
        self._error: BaseException | None = None
        self._stopping = False
        self._finished = False
        self.over = False  # no thread of it runs any more

    # From the start to the end

    def run(self) -> None:
        """Run until the output is there, and durable. Blocks.

        Raises
        ------
        BaseException
            What the first task that failed raised, or the journal.
        """
        try:
            self._prepare()
            while True:
                ran = self.elsewhere.run_gang(_POLL_S)
                with self._turn:
                    if self._finished:
                        break
                    self._poll()
                    quiet = self._anew and not (
                        self._running or self._flushing or self._pending or self._writing
                    )
                if quiet:
                    self._put_up_anew()
                if not ran and self.gang is not None:
                    self.gang.idle()
        except BaseException as error:
            self.stop(error)
            raise
        finally:
            self._end_threads()
        if self._error is not None:
            raise self._error

    def _prepare(self) -> None:
        """Undo what has to be undone, then begin."""
        with self.lock:
            self.lineage.load()
        while True:
            self.board.load()
            self.elsewhere.check(self.board.slots[task].vertex for task in self.board.plan.run)
            if not self.board.plan.undo:
                break
            for name, begun, heir in self.board.plan.undo:
                call = self.folder.unspool(begun.body, begun.head)
                task, arguments, keywords = load_call(call)
                head: dict[str, Any] = {"t": name, "a": begun.attempt}
                if heir is not None:
                    head.update(of=heir, seq=begun.seq)
                self._attempts.roll_back(name, task, arguments, keywords, head)
        with self._turn:
            self.left = len(self.board.plan.run)
            self._connect(list(self.board.slots.values()))
            self.lineage.settle()
            self._check_output()
            self.employ()

    @property
    def is_ending(self) -> bool:
        """Whether no task begins any more, or none of this board."""
        return self._anew or self._stopping or self._finished

    def begin_anew(self) -> None:
        """Let what runs end, and then see what is void. Locked."""
        if not self.is_ending:
            self._anew = True
            self.lineage.give_up()
            self._turn.notify_all()

    def _put_up_anew(self) -> None:
        """Nothing runs: go on as after a crash, but with the values that are in memory."""
        with self._turn:
            for slot in self.board.slots.values():
                if slot.announced and slot.vertex.node.task.annotations.external:
                    self.append("not", {"t": slot.id, "a": slot.attempt})
            upto = self._appended
            tries = {one.id: one.tries for one in self.board.slots.values() if one.tries}
        self._journal.flush(upto)
        with self._turn:
            self.lineage.carry()
            for waiting in (self._ready, self._held, self._delayed, self._events):
                waiting.clear()
            self._anew = False
        self._prepare()
        with self._turn:
            for name, count in tries.items():
                if name in self.board.slots:
                    self.board.slots[name].tries = count

    def void(self, slot: Slot) -> None:
        """What a task was called with will be another: it begins again when that is there."""
        with self._turn:
            slot.phase = WAITING
            self.begin_anew()

    def stop(self, error: BaseException) -> None:
        """Let no more tasks begin; `run` raises `error` when those that run are over."""
        self.cancelled.set()
        with self._turn:
            if self._error is None and not self._finished:
                self._error = error
            self._stopping = True
            self.lineage.give_up()
            self._check_output()
            self._turn.notify_all()

    def _end_threads(self) -> None:
        self.cancelled.set()
        with self._turn:
            self._finished = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()
        if self._writer is not None:
            self._to_write.put(None)
            self._writer.join()
        self.over = True

    def sweep(self) -> None:
        """Remove the files that nobody needs; once the journal says so, at the end."""
        names = [name for _, name in self._garbage] + self.ledger.dropped
        self._garbage.clear()
        self.ledger.dropped.clear()
        self.folder.remove_values(names)

    def started(self) -> None:
        """Something runs elsewhere. Locked."""
        self._running += 1

    def ended(self) -> None:
        """It has ended. Locked."""
        self._running -= 1
        self.employ()

    def _begin_anew(self, head: dict[str, Any]) -> None:
        with self.lock:
            self.append("anew", head)

    def _check_output(self) -> None:
        """Note when all is over. Locked."""
        if self._finished:
            return
        if self._stopping:
            self._finished = not self._running and not self._flushing
        elif not self._anew and self.board.slots[self.board.output].phase == AVAILABLE:
            done = self.ledger.done(self.board.resolve(self.board.output))
            self._finished = (
                done is not None
                and done.durable
                and self._journal.durable >= self._appended
                and not self._running
            )
        if self._finished:
            self.elsewhere.wake()
            self._turn.notify_all()

    # Threads

    def employ(self) -> None:
        """Have a thread for what is there to do. Locked."""
        if self._finished or not (
            self._ready or self._delayed or self.elsewhere.answers
            or (self._pending and not self._flushing)
        ):  # fmt: skip
            return
        if self._idle_workers:
            self._turn.notify()
        elif len(self._threads) < self.workers:
            thread = threading.Thread(
                target=self._work, name=f"hopcoll-task-{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            with self._turn:
                slot = self._next()
            if slot is None:
                return
            try:
                if isinstance(slot, Slot):
                    self._attempts.execute(slot)
                elif isinstance(slot, tuple):
                    self._attempts.answered(*slot)
                else:
                    self._flush()
            except BaseException as error:
                self.stop(error)
            finally:
                with self._turn:
                    if isinstance(slot, (Slot, tuple)):
                        self._running -= 1
                    else:
                        self._flushing = False
                    self._look_for_the_end()

    def _next(self) -> Slot | tuple[Any, ...] | bool | None:
        """Return the task to be run, what another rank answered, True for a flush, None when all is
        over. Locked."""
        while not self._finished:
            self._look_at_delayed()
            if self.elsewhere.answers:
                answer = self.elsewhere.answers.popleft()
                if self.elsewhere.answers:
                    self.employ()
                return answer
            if self._pending and not self._flushing and not self._stopping and (
                not self._ready
                or len(self._pending) >= _GROUP_MAX
                or time.monotonic() - self._pending[0][1] > _GROUP_S
            ):
                # What uses a task's value stays in its thread, where that is warm: the disk is left
                # to another, if there is one.
                spare = self._idle_workers or len(self._threads) < self.workers
                if not (self._ready and spare) or self._flush_left:
                    self._flushing, self._flush_left = True, False
                    if self._ready:
                        self.employ()
                    return True
                self._flush_left = True
                self.employ()
            if self._ready and not self.is_ending:
                slot = self._ready.popleft()
                slot.phase = RUNNING
                self._running += 1
                if self._ready:
                    self.employ()
                return slot
            self._idle_workers += 1
            self._turn.wait(_POLL_S if self._delayed else None)
            self._idle_workers -= 1
        return None

    def _poll(self) -> None:
        """Look at what time brings. Locked."""
        self._look_at_delayed()
        for key in list(self._events):
            self._give_events(key)
        if self._journal.durable < self._appended and not self._pending:
            # What nobody waits for.
            self._pending.append((self._appended, time.monotonic(), None, 0))
        if not self._stopping and self.folder.cancel_requested():
            self.stop(WorkflowCancelledError(f"workflow {self.folder.id} was cancelled"))
        self.employ()
        self._look_for_the_end()

    def _look_for_the_end(self) -> None:
        """See whether all is over, or nothing can go on. Locked."""
        self._check_output()
        if self.is_ending or not self._held or self._ready or self._pending or self._running:
            return
        if self._delayed or self._writing or self._events or self._flushing:
            return
        self._look_at_held()
        if self._ready:
            self.employ()
            return
        slot = self._held[0]
        exposed = sorted(self.board.exposed(slot))
        if self.lineage.give_up_lost(exposed):
            return
        self.stop(
            WorkflowError(
                f"{slot.id} has an effect that cannot be released: {', '.join(exposed)} would give"
                ' another value if it ran again, and checkpoint="none" keeps it from becoming '
                'durable; annotate it with checkpoint="async"'
            )
        )

    def _look_at_held(self) -> None:
        """See which effects can be released by now. Locked."""
        held, self._held = self._held, []
        for slot in held:
            self.make_ready(slot)

    # The way of a task

    def _connect(self, slots: list[Slot]) -> None:
        """Let tasks wait for what they need, and begin with those that need nothing. Locked."""
        board = self.board
        for slot in slots:
            if slot.id in board.alias:
                lacks = self._is_to_run(board.resolve(slot.id))
                slot.phase = RUNNING if lacks else AVAILABLE  # it is what it went on to
            elif not self._is_to_run(slot.id):
                slot.phase = AVAILABLE
        for slot in slots:
            if slot.phase == WAITING:
                slot.uses = slot.vertex.inputs
            for name in slot.vertex.inputs:
                other = board.slots[name]
                other.users.append(slot)
                if slot.uses:
                    other.users_left += 1
                    slot.missing += other.phase != AVAILABLE
        for slot in slots:
            if slot.phase == WAITING and slot.missing == 0:
                self.make_ready(slot)

    def _is_to_run(self, task: str) -> bool:
        return task in self.board.plan.run or self.ledger.done(task) is None

    def make_ready(self, slot: Slot) -> None:
        """Its inputs are there. Locked."""
        task = slot.vertex.node.task
        if isinstance(task, Event):
            slot.phase = RUNNING
            done = self.ledger.done(slot.id)
            if done is not None:  # what it was given once is its own
                self._give(slot, done.head["e"], done.body)
            else:
                self._events.setdefault(task.key, []).append(slot)
                self._give_events(task.key)
        elif slot.is_loop:
            slot.phase = RUNNING
            self._go_round(slot)
        elif (
            task.annotations.external
            and not slot.announced
            and self.board.exposed(slot)
        ):
            slot.phase = HELD
            self._held.append(slot)
        else:
            slot.phase = READY
            self._ready.append(slot)

    def _go_round(self, loop: Slot) -> None:
        """Begin the next iteration of a loop, or end it. Locked."""
        body = loop.vertex.node.task
        assert isinstance(body, Loop)
        newest = self.board.newest_iteration(loop)
        if newest is None:
            if body.times == 0:
                self._attempts.finish_empty(loop)
                return
            following = self.board.add_iteration(loop, 0)
        else:
            if newest.phase != AVAILABLE:
                return  # it runs (again)
            done = self.ledger.done(newest.id)
            assert newest.number is not None
            if (done is not None and done.head.get("l")) or newest.number + 1 >= body.times:
                self.board.set_alias(loop.id, newest.id)
                self._become_available(loop)
                return
            following = self.board.add_iteration(loop, newest.number + 1, newest.number)
        following.reason = self.board.reason_of(following.id)
        self._connect([following])

    def _give_events(self, key: str) -> None:
        """Give what came from outside to those that wait for it. Locked."""
        slots = self._events[key]
        for event_id, body in self.folder.events(key, self.ledger.events):
            self._give(slots.pop(0), event_id, body)
            if not slots:
                del self._events[key]
                break

    def _give(self, slot: Slot, event_id: str, body: bytes) -> None:
        slot.attempt = self.ledger.attempts(slot.id) + 1
        head = {"t": slot.id, "a": slot.attempt, "in": self._attempts.versions(slot), "nd": True,
                "s": 0.0, "c": "", "st": INLINE, "e": event_id}  # fmt: skip
        self.finish(slot, values.freeze(values.unpack(body)), head, body, wait=True)

    def note_run(self, slot: Slot) -> None:
        reason = slot.reason or FIRST
        if slot.tries:
            reason = slot.reason = f"it failed (try {slot.tries + 1})"
        self.ran.append((slot.id, reason))

    def append(self, kind: str, head: dict[str, Any], body: bytes = b"") -> int:
        """Put a record into the journal, and into the ledger. Locked."""
        self._appended = seq = self._journal.append(kind, head, body)
        self.ledger.apply(kind, head, body, seq)
        if kind in ("done", "more"):
            self.board.stale.discard(head["t"])
        while self.ledger.dropped:
            self._garbage.append((seq, self.ledger.dropped.pop()))
        return seq

    def after_flush(self, seq: int, slot: Slot | None, phase: int) -> None:
        """Let a task go on once a record is durable. Locked."""
        if slot is not None:
            slot.phase = FLUSHING
        self._pending.append((seq, time.monotonic(), slot, phase))

    def delay(self, slot: Slot, delay_s: float) -> None:
        """Try a task again later."""
        with self._turn:
            slot.phase = DELAYED
            due_s = time.monotonic() + min(delay_s, _BACKOFF_MAX_S)
            heapq.heappush(self._delayed, (due_s, id(slot), slot))
            self.employ()

    def _look_at_delayed(self) -> None:
        """See what is due. Locked. Any thread: a gang may wait for it, in that of `run`."""
        while self._delayed and self._delayed[0][0] <= time.monotonic():
            self.make_ready(heapq.heappop(self._delayed)[2])

    def finish(
        self, slot: Slot, value: Any, head: dict[str, Any], body: bytes, *, wait: bool,
        refs: Sequence[ObjectRef] = (),
    ) -> None:  # fmt: skip
        """A task has its value. Where `wait` says so, its users begin when that is durable.

        Nobody is woken for what is to be done now: the caller is about to look for it itself, and
        in a chain there would be nothing left for whoever was woken.
        """
        with self.lock:
            seq = self.append("done", head, body)
            slot.value, slot.valued = value, True
            if refs:
                self.lineage.note(slot, head, refs)
            self._settle(slot.id)
            if wait:
                self.after_flush(seq, slot, AVAILABLE)
            else:
                self._become_available(slot)

    def kept(self, task: str, attempt: int, place: dict[str, Any]) -> None:
        """A value that was coming is durable, but for the record that says so."""
        with self._turn:
            seq = self.append("kept", {"t": task, "a": attempt, **place})
            self.lineage.kept(task)
            self._settle(task)
            self.after_flush(seq, None, 0)
            self.employ()

    def _settle(self, task: str) -> None:
        """Let go of iterations that nobody needs any more. Locked."""
        iteration = self.board.iteration_of(task)
        if iteration is None:
            return
        done, own = self.ledger.done(task), self.ledger.done(iteration.id)
        if done is not None and done.durable and own is not None and not own.durable:
            self.append("settled", {"t": iteration.id})
        self.board.settle_loop(iteration.id)
        self.lineage.prune()

    def go_on(
        self, slot: Slot, owner: str, generation: int, graph: Graph, head: dict[str, Any],
        body: bytes, refs: Sequence[ObjectRef] = (),
    ) -> None:  # fmt: skip
        """A task has a graph in the place of a value; nobody is woken, as in `finish`."""
        with self.lock:
            self.append("more", head, body)
            self.lineage.hold("what goes on", refs)
            self.board.settle_loop(slot.id)
            self._consumed(slot)
            slot.phase = AVAILABLE if generation > 1 else RUNNING
            added = self.board.go_on(slot.id, owner, generation, graph, bool(refs))
            for one in added:
                self.lineage.hold(f"call of {one.id}", one.refs)
            self.lineage.release("what goes on")
            for one in added:
                one.reason = self.board.reason_of(one.id)
            self.left += len(added)
            self._connect(added)

    def _become_available(self, slot: Slot) -> None:
        """Let those begin that waited for it. Locked."""
        chain = [slot]
        while chain:
            one = chain.pop()
            one.phase = AVAILABLE
            self._consumed(one)
            for user in one.users:
                if user.phase == WAITING:
                    user.missing -= 1
                    if user.missing == 0:
                        self.make_ready(user)
            if one.alias_of is not None:
                chain.append(self.board.slots[one.alias_of])
            elif one.number is not None:
                self._go_round(self.board.slots[one.vertex.loop.id])  # type: ignore[attr-defined]
        self.left -= 1
        if self._progress is not None:
            self._progress(slot.id, slot.reason, max(self.left, 0))

    def _consumed(self, slot: Slot) -> None:
        """A task has used its inputs: values that nobody else will use are let go. Locked."""
        names, slot.uses = slot.uses, ()
        if slot.refs:
            self.lineage.release(f"call of {slot.id}")
        for name in names:
            other = self.board.slots.get(name)
            if other is None:
                continue
            other.users_left -= 1
            if other.users_left == 0:
                source = self.board.slots.get(self.board.resolve(name))
                if source is not None and not self.board.is_output(source):
                    source.value, source.valued = None, False
                    self.lineage.release(source.id)

    def value_of(self, task: str) -> Any:
        """Return the value of a task; read back where it is not in memory."""
        with self.lock:
            name = self.board.resolve(task)
            slot = self.board.slots[name]
            if slot.valued:
                return slot.value
            done = self.ledger.done(name)
            assert done is not None and (done.durable or done.body), (task, name, done)
        put = None if self.gang is None else self.lineage.put_again(done.head)
        value = values.freeze(self.folder.read_value(done.head, done.body, name, put))
        with self.lock:
            slot.value, slot.valued = value, True
        return value

    # The disk

    def _flush(self) -> None:
        """Make durable what others wait for; in a worker's thread."""
        with self.lock:
            upto = self._appended
        self._journal.flush(upto)
        with self._turn:
            if self.ledger.records > _COMPACT_RECORDS + 4 * len(self.ledger.states):
                self._journal.compact(self.ledger.keep())
                self.ledger.records = 0
                self._appended = self._journal.durable
            durable = self._journal.durable
            while self._pending and self._pending[0][0] <= durable:
                _, _, slot, phase = self._pending.popleft()
                if slot is None:
                    continue
                if phase == AVAILABLE:
                    self._become_available(slot)
                else:
                    slot.phase = READY
                    self._ready.append(slot)
            garbage = []
            while self._garbage and self._garbage[0][0] <= durable:
                garbage.append(self._garbage.popleft()[1])
            self._look_at_held()
        self.folder.remove_values(garbage)

    def write_later(self, task: str, attempt: int, packed: values.Packed) -> None:
        """Have a value written meanwhile; waits where too much is on its way already."""
        with self._turn:
            self.employ()
            while self._writing_bytes > _WRITING_BYTES_MAX and not self._stopping:
                self._turn.wait(_POLL_S)
            self.write_soon(task, attempt, packed)

    def write_soon(self, task: str, attempt: int, packed: values.Packed) -> None:
        """The same without a wait. Locked."""
        self._writing += 1
        self._writing_bytes += packed.nbytes
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="hopcoll-values", daemon=True)
            self._writer.start()
        self._to_write.put((task, attempt, packed))

    def _write(self) -> None:
        while (item := self._to_write.get()) is not None:
            try:
                if not (self._stopping and self._error is not None):
                    self._attempts.write(*item)
            except BaseException as error:
                self.stop(error)
            finally:
                with self._turn:
                    self._writing -= 1
                    self._writing_bytes -= item[2].nbytes
