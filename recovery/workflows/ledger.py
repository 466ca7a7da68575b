"""What a journal says about a workflow, and what has to be done because of it. Pure.

The records, by kind (`head` has the fields, `body` what is said there):

=======  =======================================================================================
start    the workflow: ``uuid``, ``print`` (of the graph), ``owner``; body: the graph
resume   a process went on with it: ``owner``, ``over`` (who is known to do nothing any more)
begin    the intent of an attempt with an effect: ``t``, ``a``, ``in``, ``by`` (whose), ``r`` (it
         can be rolled back; body: the call), ``p`` (its value is a pair, with an exception)
done     an attempt has ended: ``t``, ``a``, ``in``, ``h`` (hash), ``nd`` (not deterministic),
         ``st`` (where the value is, below), ``s`` (seconds), ``c`` (code), and what only some have:
         ``f`` and ``sh`` (file and its record), ``w`` (contributors), ``e`` (event), ``l`` (the
         last of a loop), ``why`` (it ran again), ``x`` (an external effect), ``on`` (at which other
         rank), ``refs`` (those in it: key, who made it or ""), ``ses`` (whose memory they are in),
         ``rf`` (its file has their bytes), ``k`` (of reductions: given, taken); body: the value
more     an attempt has ended, and its graph goes on in its place: as done, ``o`` (of whose
         generation), ``g`` (which); body: the graph
kept     the value of a done attempt is durable now: ``t``, ``a``, ``f``, ``sh``
settled  what an iteration of a loop went on to has a durable value: ``t``
lost     what a done attempt put into the ranks' memory is gone: ``t``, ``a``
not      an effect was begun and is known not to have been done: ``t``, ``a``
undone   an attempt was rolled back: ``t``, ``a``
anew     what a task went on to is void: ``t``; or a loop, from iteration ``i`` on
fail     an attempt has failed: ``t``, ``a``, ``error``, ``late`` (its thread goes on)
note     what a task must be told again: ``t``, ``k``, ``v``
given    events that were given to tasks which are no more; ``of`` (who went on without them);
         body: which. Of compactions only
end      the workflow: ``status``, ``error``, ``output`` (which task has it)
=======  =======================================================================================

**Versions.** An attempt's number is the version of its value. ``in`` has the versions that it was
made from. A value is *valid* if those are still the versions of its inputs, and these valid. No
number is used twice: tasks of a continuation or a loop that begins anew count on from the highest.

**What is run** (`plan`): what the output needs and does not have. A task that ran already runs
again for one of three reasons only: it was cut off or has failed; its value was not kept and
somebody who runs needs it; or a version that it was made from is gone. A value that is computed
again by a deterministic task keeps its version; else it gets a new one, and all that was made from
the old one is void: it is undone, newest first, and runs again. (A task that can be rolled back
counts as not deterministic: to run again it is undone, and nothing made from it may stand then.)

**When an effect may be released** (`exposed`). Its arguments must be able to become no other
values: whatever crashes come, nothing that it was made from, however far back, may get another
version. That is: a crash now would not (what is done becomes no less durable later). It is derived
from the graph; no user lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hopcoll.errors import CheckpointCorruptError
from recovery.workflows.names import generation_prefix, iteration_name, iteration_of, owner_of

__all__ = [
    "Begun", "Done", "Ledger", "Plan", "Settled", "State", "Wants", "exposed", "generation_prefix",
    "iteration_name", "iteration_of", "owner_of", "plan",
]  # fmt: skip

#: Where a value is: nowhere, in the record, in a file, in memory on its way to a file; in the
#: record, but with refs to what is in the ranks' memory alone.
NOWHERE, INLINE, FILE, COMING, LIVE = range(5)
#: Of one task.
_FAILURES_MAX = 10
#: In one record.
_GIVEN_MAX = 100_000
#: Why a task runs for the first time.
FIRST = "it has not run yet"
_VOID = "what it was made from has become another value"


@dataclass
class Done:
    """An attempt that has ended, and counts."""

    attempt: int
    inputs: dict[str, int]
    hash: str | None
    deterministic: bool
    place: int
    seq: int
    head: dict[str, Any]
    body: bytes

    @property
    def durable(self) -> bool:
        return self.place in (INLINE, FILE)

    @property
    def lasting(self) -> bool:
        """Whether it is the same if it is made again; a gang may have fewer ranks then."""
        return self.deterministic and "w" not in self.head


@dataclass
class Begun:
    """An intent whose end is not known."""

    attempt: int
    inputs: dict[str, int]
    seq: int
    by: str
    head: dict[str, Any]
    body: bytes
    late: bool = False  # a thread may be about to do it still


@dataclass
class Settled:
    """What no crash can change any more: which tasks' values, and which tasks run no more."""

    values: set[str] = field(default_factory=set)
    runs: set[str] = field(default_factory=set)


@dataclass
class State:
    """What the journal says about a task."""

    attempt: int = 0  # the highest
    done: Done | None = None
    begun: Begun | None = None  # an external effect, or one that can be rolled back
    undoable: Begun | None = None  # what a rollback would undo
    notes: dict[int, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    runs: int = 0
    undone: int = 0
    life: int = 0  # how many processes went on with the workflow before it ended


class Ledger:
    """The sum of a journal's records.

    Attributes
    ----------
    start : dict or None
        The head of the record that began the workflow.
    graph : bytes
        Its body.
    status : str
        "empty", "running", "done", "failed" or "cancelled".
    error : str or None
    output : str or None
        The task that has the output of one that is done.
    states : dict of str to State
        By task.
    more : dict of str to (str, int)
        For each task whose graph goes on in another: the task that ended with it, and the
        generation.
    loops : dict of str to int
        The newest iteration of a loop whose value is durable.
    floor : int
        The highest attempt of tasks that were dropped as void.
    attic : dict of str to list of (str, Begun)
        What could still be rolled back of tasks that were dropped, by the loop or the task that
        went on without them.
    events : set of str
        Those that were given out.
    heard : dict of str to set of str
        Those of them that were given to tasks that were dropped, as in `attic`.
    dropped : list of str
        Files that nobody needs any more; the caller takes them from here.
    owners : dict of str to dict
        The processes that went on with it, by nonce.
    over : set of str
        Those of them that are known to do nothing any more.
    lives : int
        How many processes went on with it.
    records : int
        How many there were since the last compaction.
    """

    def __init__(self) -> None:
        self.start: dict[str, Any] | None = None
        self.graph = b""
        self.status = "empty"
        self.error: str | None = None
        self.output: str | None = None
        self.states: dict[str, State] = {}
        self.more: dict[str, tuple[str, int]] = {}
        self.loops: dict[str, int] = {}
        self.floor = 0
        self.iterations: dict[str, set[int]] = {}
        self.attic: dict[str, list[tuple[str, Begun]]] = {}
        self.events: set[str] = set()
        self.heard: dict[str, set[str]] = {}
        self.dropped: list[str] = []
        self.owners: dict[str, dict[str, Any]] = {}
        self.over: set[str] = set()
        self.lives = 0
        self.records = 0
        self._children: dict[str, set[str]] = {}

    def state(self, task: str) -> State:
        state = self.states.get(task)
        if state is None:
            state = self.states[task] = State()
            if (owner := owner_of(task)) is not None:
                self._children.setdefault(owner, set()).add(task)
                state.attempt = self.floor
            if (place := iteration_of(task)) is not None:
                self.iterations.setdefault(place[0], set()).add(place[1])
                state.attempt = self.floor
        return state

    def attempts(self, task: str) -> int:
        """The highest number that an attempt of a task has, or that its next one must exceed."""
        state = self.states.get(task)
        if state is not None:
            return state.attempt
        dynamic = owner_of(task) is not None or iteration_of(task) is not None
        return self.floor if dynamic else 0

    def done(self, task: str) -> Done | None:
        state = self.states.get(task)
        return None if state is None else state.done

    def apply(self, kind: str, head: dict[str, Any], body: bytes, seq: int) -> None:
        """Take one more record into account."""
        self.records += 1
        apply = getattr(self, f"_on_{kind}", None)
        if apply is None:
            raise CheckpointCorruptError(f"the journal has a record of an unknown kind, {kind!r}")
        apply(head, body, seq)

    def _on_start(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        self.start, self.graph, self.status = head, body, "running"
        self.floor = head.get("floor", 0)
        self.owners[head["owner"]["nonce"]] = head["owner"]

    def _on_resume(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        self.status, self.error = "running", None
        self.owners[head["owner"]["nonce"]] = head["owner"]
        self.over |= set(head["over"])
        self.lives += 1

    def _on_begin(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        if "of" in head:  # of one that was dropped: so a compaction writes it
            begun = Begun(head["a"], head["in"], seq, head["by"], head, body)
            self.attic.setdefault(head["of"], []).append((head["t"], begun))
            return
        state = self.state(head["t"])
        state.attempt = max(state.attempt, head["a"])
        state.begun = Begun(head["a"], head["in"], seq, head["by"], head, body)
        if head.get("r"):
            state.undoable = state.begun

    def _on_done(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        task = head["t"]
        state = self.state(task)
        state.attempt = max(state.attempt, head["a"])
        state.begun = None
        if state.done is not None:
            self._drop_file(state.done)
        state.done = Done(
            head["a"], head["in"], head.get("h"), not head["nd"], head["st"], seq, head, body
        )
        state.life, state.runs, state.undone = head.get(
            "was", (self.lives, state.runs + 1, state.undone)
        )
        if "e" in head:
            self.events.add(head["e"])
        if state.done.durable:
            self._settle_loop(task)

    def _on_kept(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        done = self.done(head["t"])
        if done is not None and done.attempt == head["a"] and not done.durable:
            done.place = FILE
            done.head = {**done.head, **head, "st": FILE}
            self._settle_loop(head["t"])
        else:  # it came too late, or twice: nobody needs it
            self.dropped.append(head["f"])

    def _on_settled(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        self._settle_loop(head["t"])

    def _on_lost(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        done = self.done(head["t"])
        if done is not None and done.attempt == head["a"] and not done.durable:
            done.place, done.body = NOWHERE, b""
            done.head = {**done.head, "st": NOWHERE, "lost": 1}

    def _on_more(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        self._on_done(head, body, seq)
        task, owner, generation = head["t"], head["o"], head["g"]
        self.more[owner] = (task, generation)
        if generation > 1:
            # The generation before is over: all of it was needed for this one only. What stays is
            # the task that ended it, as if it had been called by the first.
            done = self.states[task].done
            first = self.done(owner)
            assert done is not None
            done.inputs = {} if first is None else {owner: first.attempt}
            done.head = {**done.head, "in": done.inputs}
            for child in list(self._children.get(owner, ())):
                if child != task:
                    self.drop(child, owner)

    def _on_not(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        state = self.state(head["t"])
        if state.begun is not None and state.begun.attempt == head["a"]:
            state.begun = None

    def _on_undone(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        if "of" in head:  # the task itself is no more
            for one in list(self.attic[head["of"]]):
                if one[1].seq == head["seq"]:
                    self._drop_call(one[1])
                    self.attic[head["of"]].remove(one)
            return
        task, state = head["t"], self.state(head["t"])
        state.undone += 1
        if state.undoable is not None:
            self._drop_call(state.undoable)
        state.begun = state.undoable = None
        if (done := state.done) is not None:
            # Its version stays: a deterministic task gives the same value again.
            self._drop_file(done)
            done.place, done.body = NOWHERE, b""
            done.head = {**done.head, "st": NOWHERE}
        self.more.pop(task, None)

    def _on_fail(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        state = self.state(head["t"])
        state.attempt = max(state.attempt, head["a"])
        if head["error"]:
            state.failures = [*state.failures[1 - _FAILURES_MAX :], head["error"]]
        if head.get("late") and state.begun is not None:
            state.begun.late = True

    def _on_anew(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        task = head["t"]
        if "i" in head:
            for number in sorted(i for i in self.iterations.get(task, ()) if i >= head["i"]):
                self.drop(iteration_name(task, number))
            if not self.iterations.get(task):
                self.loops.pop(task, None)
            return
        for child in list(self._children.get(task, ())):
            self.drop(child)
        self.more.pop(task, None)
        self.events -= self.heard.pop(task, set())
        state = self.states.get(task)
        if state is not None and state.done is not None:
            self._drop_file(state.done)
            state.done = None

    def _on_given(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        events = set(body.decode().split())
        self.events |= events
        if "of" in head:
            self.heard.setdefault(head["of"], set()).update(events)

    def _on_note(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        self.state(head["t"]).notes[head["k"]] = head["v"]

    def _on_end(self, head: dict[str, Any], body: bytes, seq: int) -> None:
        self.status, self.error = head["status"], head.get("error")
        self.output = head.get("output", self.output)

    def _settle_loop(self, task: str) -> None:
        """Nobody needs the states of a loop before one that is durable."""
        place = iteration_of(task)
        if place is None or place[1] < self.loops.get(place[0], -1):
            return
        loop, newest = place
        self.loops[loop] = newest
        done = self.states[task].done
        assert done is not None
        # It counts as made from what the first one was made from.
        inputs: dict[str, int] = {}
        older = sorted(i for i in self.iterations[loop] if i < newest)
        for name in [*(iteration_name(loop, i) for i in older), task]:
            one = self.states[name].done
            if one is not None:
                inputs.update(
                    (i, version) for i, version in one.inputs.items()
                    if not i.startswith(f"{loop}[")
                )  # fmt: skip
        done.inputs = inputs
        done.head = {**done.head, "in": inputs}
        for i in older:
            self.drop(iteration_name(loop, i), task)

    def _drop_file(self, done: Done) -> None:
        if done.place != NOWHERE and "f" in done.head:
            self.dropped.append(done.head["f"])

    def _drop_call(self, begun: Begun) -> None:
        if "f" in begun.head:
            self.dropped.append(begun.head["f"])

    def drop(self, task: str, heir: str | None = None) -> None:
        """Forget a task, and all that it went on to. An heir keeps what could be rolled back, and
        the events; without one it begins anew: its numbers are not given again, its events are."""
        for child in list(self._children.pop(task, ())):
            self.drop(child, heir)
        self.more.pop(task, None)
        state = self.states.pop(task, None)
        inherited = self.attic.pop(task, [])
        heard = self.heard.pop(task, set())
        if state is not None and state.done is not None:
            self._drop_file(state.done)
            heard |= {state.done.head["e"]} if "e" in state.done.head else set()
        if heir is not None:
            if state is not None and state.undoable is not None:
                inherited = [*inherited, (task, state.undoable)]
            if inherited:
                self.attic.setdefault(heir, []).extend(inherited)
            if heard:
                self.heard.setdefault(heir, set()).update(heard)
        else:
            self.events -= heard
            if state is not None:
                self.floor = max(self.floor, state.attempt)
            for _, begun in inherited:
                self._drop_call(begun)
            if state is not None and state.undoable is not None:
                self._drop_call(state.undoable)
        if (owner := owner_of(task)) is not None and owner in self._children:
            self._children[owner].discard(task)
        if (place := iteration_of(task)) is not None:
            self.iterations[place[0]].discard(place[1])

    def keep(self) -> list[tuple[str, dict[str, Any], bytes]]:
        """Return the records that say all that this ledger knows, for a compaction."""
        kept: list[tuple[str, dict[str, Any], bytes]] = []
        if self.start is not None:
            kept.append(("start", {**self.start, "floor": self.floor}, self.graph))
            first = self.start["owner"]["nonce"]
            for nonce, owner in self.owners.items():
                if nonce != first:
                    kept.append(("resume", {"owner": owner, "over": sorted(self.over)}, b""))
        rows: list[tuple[int, tuple[str, dict[str, Any], bytes]]] = []
        # What is said of tasks that a row before would drop comes after all rows.
        last: list[tuple[str, dict[str, Any], bytes]] = []
        for task, state in self.states.items():
            for name, begun in self.attic.get(task, ()):
                head = {**begun.head, "of": task, "t": name}
                rows.append((begun.seq, ("begin", head, begun.body)))
            known = 0
            for begun in {id(b): b for b in (state.undoable, state.begun) if b}.values():
                rows.append((begun.seq, ("begin", begun.head, begun.body)))
                known = max(known, begun.attempt)
                if begun.late:
                    last.append(("fail", _fail(task, begun.attempt, late=1), b""))
            if (done := state.done) is not None:
                kind = "more" if "o" in done.head else "done"
                head = {**done.head, "was": (state.life, state.runs, state.undone)}
                rows.append((done.seq, (kind, head, done.body)))
                known = max(known, done.attempt)
            if state.attempt > known:
                error = state.failures[-1] if state.failures else ""
                last.append(("fail", _fail(task, state.attempt, error), b""))
            last += [
                ("note", {"t": task, "k": k, "v": v}, b"") for k, v in sorted(state.notes.items())
            ]
        for loop, newest in self.loops.items():
            done = self.done(name := iteration_name(loop, newest))
            if done is not None and not done.durable:
                last.append(("settled", {"t": name}, b""))
        kept += [row for _, row in sorted(rows, key=lambda row: row[0])]
        kept += last + self._given()
        if self.status not in ("empty", "running"):
            head = {"status": self.status, "error": self.error, "output": self.output}
            kept.append(("end", head, b""))
        return kept

    def _given(self) -> list[tuple[str, dict[str, Any], bytes]]:
        """What `keep` says of events that were given to tasks which are no more."""
        rest = self.events.difference(*self.heard.values()) - {
            state.done.head["e"]
            for state in self.states.values()
            if state.done is not None and "e" in state.done.head
        }
        kept: list[tuple[str, dict[str, Any], bytes]] = []
        for heir, events in [("", rest), *self.heard.items()]:
            names, head = sorted(events), {"of": heir} if heir else {}
            for i in range(0, len(names), _GIVEN_MAX):
                kept.append(("given", head, " ".join(names[i : i + _GIVEN_MAX]).encode()))
        return kept


def _fail(task: str, attempt: int, error: str = "", **more: int) -> dict[str, Any]:
    return {"t": task, "a": attempt, "error": error, **more}


# What has to be done


@dataclass(frozen=True)
class Plan:
    """What follows from a ledger.

    Attributes
    ----------
    run : dict of str to str
        The tasks that have to run, and why.
    undo : list of (str, Begun, str or None)
        What has to be rolled back first, in this order: the task, its intent, and the heir where
        the task itself was dropped.
    renewed : set of str
        Those that will give another value than before.
    """

    run: dict[str, str]
    undo: list[tuple[str, Begun, str | None]]
    renewed: set[str]


@dataclass(frozen=True)
class Wants:
    """What a task uses the values of, all (these as well) that has to end before it begins, and who
    made the objects whose refs stand in its arguments."""

    needs: Iterable[str]
    inputs: Iterable[str]
    makers: Iterable[str] = ()


def _nothing(task: str, done: Done) -> Iterable[str] | None:
    return None


def plan(
    order: Mapping[str, Wants],
    output: str,
    ledger: Ledger,
    at_hand: Callable[[str, Done], Iterable[str] | None] = _nothing,
) -> Plan:
    """Find what has to run.

    Parameters
    ----------
    order : dict of str to Wants
        All tasks, inputs before those who use them.
    output : str
    ledger : Ledger
    at_hand : callable
        Of a value that is not durable: None where it is gone, else who else's value has to be there
        for it to be of use.
    """
    renewed: set[str] = set()
    while True:
        valid: dict[str, bool] = {}
        for task in order:
            done = ledger.done(task)
            valid[task] = done is not None and all(
                valid.get(name, False)
                and name not in renewed
                and _version(ledger, name) == version
                for name, version in done.inputs.items()
            )
        run: dict[str, str] = {}
        stack = [(output, "")]
        while stack:
            task, user = stack.pop()
            if task in run:
                continue
            done = ledger.done(task)
            if done is not None and valid[task] and task not in renewed:
                if done.durable:
                    continue
                others = at_hand(task, done) if task != output else None
                if others is not None:
                    stack += [(name, task) for name in others if name != task]
                    continue
            run[task] = _reason(ledger, task, valid[task], user)
            stack += [(name, task) for name in order[task].makers]
            needs = set(order[task].needs)
            # What it only waits for has ended, though the value may be lost.
            stack += [
                (name, task)
                for name in order[task].inputs
                if name not in run and (name in needs or not valid[name] or name in renewed)
            ]
        again = {
            task
            for task in run
            if (done := ledger.done(task)) is not None and not (done.deterministic and valid[task])
        }
        if again <= renewed:
            break
        renewed |= again
    undo: list[tuple[str, Begun, str | None]] = []
    for task in run:
        state = ledger.states.get(task)
        if state is not None and state.undoable is not None:
            undo.append((task, state.undoable, None))
        if not valid[task]:  # a loop, or a task that went on, begins anew
            undo += [(name, begun, task) for name, begun in ledger.attic.get(task, ())]
    undo.sort(key=lambda one: -one[1].seq)
    return Plan(run, undo, renewed)


def _version(ledger: Ledger, task: str) -> int | None:
    done = ledger.done(task)
    return None if done is None else done.attempt


def _reason(ledger: Ledger, task: str, valid: bool, user: str) -> str:
    state = ledger.states.get(task)
    if state is None or (state.done is None and not state.attempt):
        return FIRST
    if state.done is None:
        if state.begun is not None:
            return "it was cut off"
        if state.failures:
            return "it failed"
        return "it was undone" if state.undone else _VOID
    if not valid:
        return _VOID
    if state.done.head.get("lost"):
        return f"its references were lost, and {user or 'the output'} needs them"
    return f"its value was not kept, and {user or 'the output'} needs it"


def exposed(
    task: str,
    inputs: Callable[[str], Iterable[str]],
    users: Callable[[str], Iterable[str]],
    done: Callable[[str], Done | None],
    settled: Settled,
    output: str,
) -> set[str]:
    """Return what `task` was made from that would get another version if all stopped now.

    Parameters
    ----------
    task : str
    inputs, users : callable
        The tasks that a task waits for, and those that use its value.
    done : callable
        How a task ended, None if it has not, or has to run again.
    settled : Settled
        What is known not to change; grows.
    output : str
        Is needed for ever.
    """
    found: set[str] = set()
    seen = {task}
    stack = list(inputs(task))
    while stack:
        one = stack.pop()
        if one in seen or one in settled.values:
            continue
        seen.add(one)
        ended = done(one)
        if ended is None or (
            not (ended.lasting or ended.durable)
            and _may_run(one, inputs, users, done, settled, output)
        ):
            found.add(one)
        stack += inputs(one)
    if not found:
        settled.values |= seen - {task}
    return found


def _may_run(
    task: str,
    inputs: Callable[[str], Iterable[str]],
    users: Callable[[str], Iterable[str]],
    done: Callable[[str], Done | None],
    settled: Settled,
    output: str,
) -> bool:
    """Whether a task would run again if all stopped now.

    It does where one that it was made from gets another value, or where its own is lost and one of
    its users runs. So this is a walk to a task that has not ended, over both kinds of steps.
    """
    seen_runs: set[str] = set()
    seen_values: set[str] = set()
    stack = [(task, True)]
    while stack:
        one, runs = stack.pop()
        seen, known = (seen_runs, settled.runs) if runs else (seen_values, settled.values)
        if one in seen or one in known:
            continue
        seen.add(one)
        ended = done(one)
        if ended is None:
            return True
        stack += [(name, False) for name in inputs(one)]
        if ended.durable:
            continue
        if runs:
            if one == output:
                return True
            stack += [(name, True) for name in users(one)]
        elif not ended.lasting:
            stack.append((one, True))
    settled.runs |= seen_runs
    settled.values |= seen_values
    return False
