"""Workflows with one rule left out: what the corpus must notice.

Each mutant is a context in which `recovery.workflows` is broken in one way. Some are
caught by random workflows, the others by small graphs that were made for them
(`tests.crash.workflow_graphs`); `tests/crash/test_workflows.py` says which.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from recovery.workflows import TaskContext, attempts, ledger
from recovery.workflows.attempts import Attempts
from recovery.workflows.board import READY, Board
from recovery.workflows.engine import Engine
from recovery.workflows.ledger import Ledger, Plan, Wants
from recovery.workflows.lineage import Lineage
from recovery.workflows.references import References
from tests.powercut import RecordingDisk

Mutant = Callable[[], contextlib.AbstractContextManager[Any]]
MUTANTS: dict[str, Mutant] = {}


def mutant(make: Callable[[], Iterator[None]]) -> Mutant:
    made = contextlib.contextmanager(make)
    MUTANTS[make.__name__] = made
    return made


@mutant
def durability_is_not_waited_for() -> Iterator[None]:
    with mock.patch.object(RecordingDisk, "fdatasync", lambda self, descriptor: None):
        yield


@mutant
def effects_come_before_their_intent_is_durable() -> Iterator[None]:
    after_flush = Engine.after_flush

    def hasty(self: Engine, seq: int, slot: Any, phase: int) -> None:
        if slot is None or phase != READY:
            after_flush(self, seq, slot, phase)
            return
        slot.phase = READY
        self._ready.append(slot)
        self.employ()

    with mock.patch.object(Engine, "after_flush", hasty):
        yield


def _with_plan(change: Callable[[Plan], Plan]) -> Any:
    plan = ledger.plan
    return mock.patch.object(ledger, "plan", lambda *how: change(plan(*how)))


@mutant
def rollbacks_are_left_out() -> Iterator[None]:
    with _with_plan(lambda plan: replace(plan, undo=[])):
        yield


@mutant
def rollbacks_come_in_the_wrong_order() -> Iterator[None]:
    with _with_plan(lambda plan: replace(plan, undo=plan.undo[::-1])):
        yield


@mutant
def a_no_is_believed_though_the_old_owner_may_live() -> Iterator[None]:
    with mock.patch.object(Attempts, "_is_over", lambda self, begun: True):
        yield


@mutant
def random_numbers_are_others_each_time() -> Iterator[None]:
    with mock.patch.object(TaskContext, "rng", property(lambda self: np.random.default_rng())):
        yield


@mutant
def what_was_recalled_is_asked_again() -> Iterator[None]:
    with mock.patch.object(TaskContext, "recall", lambda self, ask: ask()):
        yield


@mutant
def effects_are_released_at_once() -> Iterator[None]:
    with mock.patch.object(ledger, "exposed", lambda *how: set()):
        yield


@mutant
def a_durable_user_is_taken_to_need_nothing_any_more() -> Iterator[None]:
    def simple(task: str, inputs: Any, users: Any, done: Any, settled: Any, output: str) -> bool:
        stack, seen = [task], set()
        while stack:
            one = stack.pop()
            if one in seen:
                continue
            seen.add(one)
            ended = done(one)
            if ended is None or (one == output and not ended.durable):
                return True
            if not ended.durable:
                stack += users(one)
        return False

    with mock.patch.object(ledger, "_may_run", simple):
        yield


@mutant
def what_has_to_run_again_is_taken_for_done() -> Iterator[None]:
    with mock.patch.object(Board, "_done", lambda self, task: self.ledger.done(task)):
        yield


@mutant
def versions_are_not_compared() -> Iterator[None]:
    plan = ledger.plan

    class Trusting(Ledger):
        def __init__(self, of: Ledger) -> None:
            self.__dict__ = dict(of.__dict__)

        def done(self, task: str) -> Any:
            found = super().done(task)
            return None if found is None else replace(found, inputs={})

    def trusting(
        order: Mapping[str, Wants], output: str, of: Ledger, at_hand: Callable[..., Any]
    ) -> Plan:
        return plan(order, output, Trusting(of), at_hand)

    with mock.patch.object(ledger, "plan", trusting):
        yield


@mutant
def versions_are_given_twice() -> Iterator[None]:
    drop = Ledger.drop

    def forgetful(self: Ledger, task: str, heir: str | None = None) -> None:
        drop(self, task, heir)
        self.floor = 0

    with mock.patch.object(Ledger, "drop", forgetful):
        yield


@mutant
def what_can_be_rolled_back_counts_as_deterministic() -> Iterator[None]:
    finish = Engine.finish

    def trusting(self: Engine, slot: Any, value: Any, head: dict[str, Any], *how: Any, **more: Any):
        options = slot.vertex.node.task.annotations
        if options.rollback is not None and options.deterministic:
            head = {**head, "nd": False}
        finish(self, slot, value, head, *how, **more)

    with mock.patch.object(Engine, "finish", trusting):
        yield


@mutant
def loops_go_on_after_they_would_have_ended() -> Iterator[None]:
    void = Board._void

    def blind(self: Board) -> list[dict[str, Any]]:
        return [head for head in void(self) if "i" not in head]

    with mock.patch.object(Board, "_void", blind):
        yield


@mutant
def events_of_what_begins_anew_are_lost() -> Iterator[None]:
    drop = Ledger.drop

    def careless(self: Ledger, task: str, heir: str | None = None) -> None:
        events = set(self.events)
        drop(self, task, heir)
        self.events |= events

    with mock.patch.object(Ledger, "drop", careless):
        yield


@mutant
def events_of_generations_that_are_over_are_lost() -> Iterator[None]:
    drop = Ledger.drop

    def careless(self: Ledger, task: str, heir: str | None = None) -> None:
        drop(self, task, heir)
        self.heard.clear()

    with mock.patch.object(Ledger, "drop", careless):
        yield


@mutant
def a_value_counts_as_kept_without_what_it_refers_to() -> Iterator[None]:
    with mock.patch.object(attempts, "LIVE", ledger.INLINE):
        yield


# Of living things


@mutant
def losses_are_not_recorded() -> Iterator[None]:
    append = Engine.append

    def silent(self: Engine, kind: str, head: dict[str, Any], body: bytes = b"") -> int:
        return self._appended if kind == "lost" else append(self, kind, head, body)

    with mock.patch.object(Engine, "append", silent):
        yield


@mutant
def objects_have_other_names_each_time() -> Iterator[None]:
    begin = References.__init__

    def careless(
        self: References, objects: Any, rank: int, name: str | None, *how: Any, **more: Any
    ) -> None:
        begin(self, objects, rank, name and f"{name} {secrets.token_hex(4)}", *how, **more)

    with mock.patch.object(References, "__init__", careless):
        yield


@mutant
def what_only_carries_a_ref_is_at_hand_without_its_maker() -> Iterator[None]:
    at_hand = Lineage.at_hand

    def careless(self: Lineage, task: str, done: Any) -> Any:
        return None if at_hand(self, task, done) is None else []

    with mock.patch.object(Lineage, "at_hand", careless):
        yield


@mutant
def calls_whose_refs_become_others_have_failed() -> Iterator[None]:
    never = property(lambda self: None, lambda self, error: None)
    with mock.patch.object(References, "void", never, create=True):
        yield


@mutant
def objects_of_another_session_are_unknown() -> Iterator[None]:
    load = Lineage.load

    def forgetful(self: Lineage) -> None:
        load(self)
        self._objects = {key: one for key, one in self._objects.items() if not one.lost}

    with (
        mock.patch.object(Lineage, "load", forgetful),
        mock.patch.object(Lineage, "_recall", lambda self, key: None),
    ):
        yield
