"""The tasks of a workflow that runs, and how they hang together; grows while it runs. No threads.

A task whose graph goes on in another (a *continuation*) has that graph's output as its *alias*: who
uses the task uses the alias's value. If that output goes on once more, the graph before is over: it
leaves the board, but for the task that ended it. So a workflow that calls itself ten thousand times
has one generation on the board. A loop's alias is its last iteration; iterations before one whose
value is durable leave the board as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from hopcoll.objects import ObjectRef
from recovery.workflows import ledger as ledgers
from recovery.workflows.graph import Graph, Loop, Node, Vertex
from recovery.workflows.ledger import Done, Ledger, Plan, Wants
from recovery.workflows.references import refs_in
from recovery.workflows.stored import load_graph

__all__ = [
    "AVAILABLE", "DELAYED", "FLUSHING", "HELD", "READY", "RUNNING", "WAITING", "Board", "Slot",
    "refs_of",
]  # fmt: skip

WAITING, READY, HELD, FLUSHING, RUNNING, DELAYED, AVAILABLE = range(7)


class Slot:
    """A task on the board."""

    __slots__ = (
        "alias_of", "announced", "attempt", "checkpoint", "debt_s", "id", "loose", "missing",
        "number", "parent", "phase", "reason", "refs", "tries", "users", "users_left", "uses",
        "value", "valued", "vertex",
    )  # fmt: skip

    def __init__(self, vertex: Vertex, parent: str | None, number: int | None = None) -> None:
        self.vertex = vertex
        self.id = vertex.id
        self.parent = parent  # the task that this one's graph came from
        self.number = number  # of an iteration
        self.alias_of: str | None = None  # whose value this one's value is
        self.missing = 0
        self.users: list[Slot] = []
        self.users_left = 0
        self.uses: tuple[str, ...] = ()  # whose `users_left` it is among
        self.phase = WAITING
        self.value: Any = None
        self.valued = False
        self.attempt = 0
        self.announced = False  # its intent is durable
        self.tries = 0
        self.reason = ""
        self.loose = False  # its value is not kept, and may become another
        self.debt_s = 0.0  # what it would take to compute its value again
        self.refs: tuple[ObjectRef, ...] = ()  # that stand in its arguments
        self.checkpoint = vertex.node.task.annotations.checkpoint

    @property
    def is_loop(self) -> bool:
        return self.number is None and isinstance(self.vertex.node.task, Loop)


def refs_of(vertex: Vertex) -> tuple[ObjectRef, ...]:
    """The refs that stand in a task's arguments."""
    node, found = vertex.node, []
    for one in [*node.arguments, *node.keywords.values()]:
        found += refs_in(_without_nodes(one))
    return tuple(dict.fromkeys(found))


def _without_nodes(value: Any) -> Any:
    """The part of an argument that is no node."""
    if isinstance(value, Node):
        return None
    if isinstance(value, (list, tuple)):
        return [_without_nodes(one) for one in value]
    if isinstance(value, dict):
        return [_without_nodes(one) for one in value.values()]
    return value


class Iteration(Vertex):
    """What an iteration of a loop is called with."""

    def __init__(
        self, loop: Vertex, number: int, inputs: tuple[str, ...], needs: tuple[str, ...]
    ) -> None:
        body = loop.node.task
        assert isinstance(body, Loop)
        super().__init__(
            f"{loop.id}[{number}]", Node(body.body, (), {}, (), body.body.name), inputs, needs
        )
        self.loop = loop
        self.number = number

    def call(self, value_of: Callable[[str], Any]) -> tuple[list[Any], dict[str, Any]]:
        if self.number == 0:
            return [self.loop.call(value_of)[0][0], 0], {}
        return [value_of(self.inputs[0]), self.number], {}


class Board:
    """All tasks that are known of a workflow.

    Parameters
    ----------
    ledger : Ledger
    read_graph : callable
        Returns the pickled graph that a record's body stands for.
    begin_anew : callable
        Told what is void of a loop or of what a task went on to (the head of a record); the ledger
        knows of it then.
    at_hand : callable
        As `ledger.plan` wants it.
    maker_of : callable
        The task that has to run for a ref to have an object; None where there is one.
    """

    def __init__(
        self,
        ledger: Ledger,
        read_graph: Callable[[bytes, dict[str, Any]], bytes],
        begin_anew: Callable[[dict[str, Any]], None],
        at_hand: Callable[[str, Done], Iterable[str] | None],
        maker_of: Callable[[ObjectRef], str | None],
    ) -> None:
        self.ledger = ledger
        self.slots: dict[str, Slot] = {}
        self.alias: dict[str, str] = {}
        self.plan = Plan({}, [], set())
        self.output = ""
        self.changed: set[str] = set()  # tasks whose code is not what it was
        self._parts: dict[str, list[str]] = {}  # what a task went on to
        self.stale: set[str] = set()  # tasks that run again and have not ended yet
        self._reasons: dict[str, str] = {}  # of those that begin anew
        self._settled = ledgers.Settled()
        self._read_graph = read_graph
        self._begin_anew = begin_anew
        self._at_hand = at_hand
        self._maker_of = maker_of

    def load(self) -> None:
        """Put up what the ledger knows, and plan what has to run."""
        assert self.ledger.start is not None
        data = self._read_graph(self.ledger.graph, self.ledger.start)
        root = Graph.of(load_graph(data))
        has_refs = ObjectRef.__module__.encode() in data  # to look for them takes its time
        self.output = root.output
        while True:
            self.slots.clear()
            self.alias.clear()
            self._parts.clear()
            self._add(root, None, has_refs=has_refs)
            self._expand(list(root.vertices))
            self.plan = self.plan_now()
            self._note_changes()
            # What can be rolled back is known as long as nothing is dropped.
            if self.plan.undo or not (void := self._void()):
                break
            for head in void:
                self._begin_anew(head)
        self.stale = set(self.plan.run)
        for slot in self.slots.values():
            slot.reason = self.reason_of(slot.id, self.plan.run.get(slot.id, ""))

    def plan_now(self) -> Plan:
        """Find what has to run as things are now."""
        return ledgers.plan(
            self._order(), self.resolve(self.output), self.ledger, self._at_hand
        )

    def reason_of(self, task: str, reason: str = ledgers.FIRST) -> str:
        """Why a task runs that was put up now."""
        return self._reasons.get(task, reason)

    def _note_changes(self) -> None:
        for slot in self.slots.values():
            done = self.ledger.done(slot.id)
            if done is None or "by_hand" in done.head or done.head.get("o", slot.id) != slot.id:
                continue
            if done.head.get("c", "") != slot.vertex.node.task.code:
                self.changed.add(slot.id)

    def _void(self) -> list[dict[str, Any]]:
        """Where another value may lead elsewhere: all iterations of a loop from one that gives
        another on, and what a task went on to."""
        found: list[dict[str, Any]] = []
        loops: dict[str, int] = {}
        for task in self.plan.run:
            done = self.ledger.done(task)
            if task not in self.plan.renewed or done is None:
                continue
            if (place := ledgers.iteration_of(task)) is not None:
                loops[place[0]] = min(place[1], loops.get(place[0], place[1]))
            elif done.head.get("o", "") == task or task in self.ledger.more:
                found.append({"t": task})
            self._reasons[task] = self.plan.run[task]
        return found + [{"t": loop, "i": number} for loop, number in loops.items()]

    def _add(
        self, graph: Graph, parent: str | None, owner: str | None = None, has_refs: bool = False
    ) -> list[Slot]:
        added = [Slot(vertex, parent) for vertex in graph.vertices.values()]
        if has_refs:
            for slot in added:
                slot.refs = refs_of(slot.vertex)
        self.slots.update((slot.id, slot) for slot in added)
        if owner is not None:
            self._parts.setdefault(owner, []).extend(slot.id for slot in added)
        return added

    def _expand(self, tasks: list[str]) -> None:
        """Add the graphs that tasks went on to, and the iterations of loops."""
        while tasks:
            task = tasks.pop()
            slot = self.slots[task]
            if slot.is_loop:
                numbers = sorted(self.ledger.iterations.get(task, ()))
                for number in numbers:
                    tasks.append(self.add_iteration(slot, number, first=numbers[0]).id)
                if numbers and self._is_last(tasks[-1]):
                    self.set_alias(task, tasks[-1])
            elif task in self.ledger.more:
                last, generation = self.ledger.more[task]
                done = self.ledger.done(last)
                assert done is not None
                if last not in self.slots:
                    # The task that ended the generation before; the rest of that is gone.
                    self.slots[last] = Slot(Vertex(last, slot.vertex.node, ()), task)
                    self._parts.setdefault(task, []).append(last)
                graph = Graph.of(
                    load_graph(self._read_graph(done.body, done.head)),
                    ledgers.generation_prefix(task, generation),
                )
                self._add(graph, last, task, "refs" in done.head)
                self.set_alias(task, graph.output)
                tasks += graph.vertices

    def _is_last(self, iteration: str) -> bool:
        done = self.ledger.done(iteration)
        return done is not None and bool(done.head.get("l"))

    # While it runs

    def go_on(
        self, task: str, owner: str, generation: int, graph: Graph, has_refs: bool
    ) -> list[Slot]:
        """A task has ended with a graph in its place, whose tasks are returned."""
        slot = self.slots[task]
        if generation > 1:
            for part in [part for part in self._parts.pop(owner, ()) if part != task]:
                self.remove(part)
            slot.vertex = Vertex(task, slot.vertex.node, ())
            slot.parent = owner
            self._parts[owner] = [task]
        added = self._add(graph, task, owner, has_refs)
        self.set_alias(owner, graph.output)
        return added

    def owner_of(self, slot: Slot) -> tuple[str, int]:
        """Whose generation a task's continuation is, and which."""
        owner = slot.alias_of
        if owner is not None and owner in self.ledger.more:
            return owner, self.ledger.more[owner][1] + 1
        return slot.id, 1

    def add_iteration(self, loop: Slot, number: int, first: int = 0) -> Slot:
        """Put up an iteration; `first` is the first that is on the board."""
        body = loop.vertex.node.task
        assert isinstance(body, Loop)
        inputs, needs = loop.vertex.inputs, loop.vertex.needs
        if number != first:
            inputs = needs = (ledgers.iteration_name(loop.id, number - 1),)
        vertex = Iteration(loop.vertex, number, inputs, needs)
        slot = self.slots[vertex.id] = Slot(vertex, loop.parent, number)
        slot.refs = () if number else loop.refs
        self._parts.setdefault(loop.id, []).append(vertex.id)
        if (number + 1) % body.every and number + 1 < body.times and not body.annotations.external:
            slot.checkpoint = "none"
        return slot

    def newest_iteration(self, loop: Slot) -> Slot | None:
        parts = self._parts.get(loop.id)
        return self.slots[parts[-1]] if parts else None

    def settle_loop(self, task: str) -> None:
        """Take the iterations down that the ledger has dropped."""
        place = ledgers.iteration_of(task)
        if place is None or (newest := self.ledger.loops.get(place[0])) is None:
            return
        kept = []
        for part in self._parts.get(place[0], ()):
            number = self.slots[part].number
            if number is not None and number < newest:
                self.remove(part)
            else:
                kept.append(part)
                if number == newest:
                    vertex = self.slots[part].vertex
                    assert isinstance(vertex, Iteration)
                    vertex.inputs, vertex.needs = vertex.loop.inputs, vertex.loop.needs
        self._parts[place[0]] = kept

    def remove(self, task: str) -> None:
        """Take a task down, and all that it went on to."""
        for part in self._parts.pop(task, ()):
            self.remove(part)
        self.alias.pop(task, None)
        self.slots.pop(task, None)

    def set_alias(self, task: str, target: str) -> None:
        old = self.alias.get(task)
        if old is not None and old in self.slots:
            self.slots[old].alias_of = None
        self.alias[task] = target
        self.slots[target].alias_of = task

    # Who uses what

    def resolve(self, task: str) -> str:
        """The task whose value is that of `task`."""
        while task in self.alias:
            task = self.alias[task]
        return task

    def is_output(self, slot: Slot) -> bool:
        """Whether a task's value is that of the workflow."""
        name: str | None = slot.id
        while name is not None:
            if name == self.output:
                return True
            name = self.slots[name].alias_of
        return False

    def inputs(self, task: str) -> list[str]:
        """What a task was, or is to be, made from: resolved; and where its graph came from."""
        slot = self.slots.get(task)
        if slot is None:
            return []
        found = [self.resolve(name) for name in slot.vertex.inputs]
        if slot.parent is not None:
            found.append(slot.parent)
        return list(dict.fromkeys(found))

    def users(self, task: str) -> list[str]:
        """Who was, or is to be, made from a task: has it among its `inputs`, and needs its value.

        Not the tasks of a second graph, or a later one, that a task went on to: such graphs have no
        refs in them, so they last as the journal does. A loop stands as its first iteration.
        """
        if task in self.alias:  # what it went on to is; who uses its value is made from that
            parts = self._parts.get(task, ())
            return [part for part in parts if self.slots[part].parent == task]
        found = []
        name: str | None = task
        while name is not None and name in self.slots:
            for user in self.slots[name].users:
                if name not in user.vertex.needs:
                    continue  # it only waits
                if user.is_loop:  # the first iteration that is left uses what the loop does
                    parts = self._parts.get(user.id)
                    found.append(parts[0] if parts else user.id)
                elif self.slots.get(user.id) is user:
                    found.append(user.id)
            name = self.slots[name].alias_of
        return found

    def exposed(self, slot: Slot) -> set[str]:
        """What an effect was made from that may still become another value."""
        return ledgers.exposed(
            slot.id, self.inputs, self.users, self._done, self._settled, self.resolve(self.output)
        )

    def _done(self, task: str) -> ledgers.Done | None:
        done = None if task in self.stale else self.ledger.done(task)
        if done is not None and "o" in done.head and not done.durable:
            # A graph with refs in it is in its record; it lasts as long as what these refer to.
            makers = [self.ledger.done(maker) for _, maker in done.head["refs"] if maker]
            if all(maker is not None and maker.durable for maker in makers):
                return replace(done, place=ledgers.INLINE)
        return done

    def iteration_of(self, task: str) -> Slot | None:
        """The iteration of a loop whose value is that of `task`."""
        slot = self.slots.get(task)
        while slot is not None and slot.number is None:
            slot = None if slot.alias_of is None else self.slots[slot.alias_of]
        return slot

    def _order(self) -> dict[str, Wants]:
        """All tasks, inputs first, with what they need, and what they wait for."""
        order: dict[str, Wants] = {}
        for root in self.slots:
            stack = [root]
            while stack:
                task = stack[-1]
                if task in order:
                    stack.pop()
                    continue
                slot, inputs = self.slots[task], self.inputs(task)
                needs = [self.resolve(name) for name in slot.vertex.needs]
                if slot.is_loop and task not in self.alias and self._parts.get(task):
                    # It goes on from the last iteration, and what that was made from is its own.
                    needs = [self.resolve(self._parts[task][-1])]
                    inputs += needs
                if rest := [name for name in inputs if name not in order]:
                    stack += rest
                else:
                    makers = {self._maker_of(ref) for ref in slot.refs}
                    order[task] = Wants(needs, inputs, [m for m in makers if m in self.slots])
                    stack.pop()
        return order
