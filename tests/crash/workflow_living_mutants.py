"""Rules of living things (objects, refs, actors) left out, one at a time; as in
`tests.crash.workflow_mutants`, and found by the cases of `tests.crash.workflow_directed`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hopcoll.objects import ObjectRef
from recovery.workflows import actors, ledger
from recovery.workflows.actors import Actor
from recovery.workflows.attempts import Attempts, VoidError
from recovery.workflows.board import Board
from recovery.workflows.lineage import Lineage, gone
from recovery.workflows.post import RankGoneError
from recovery.workflows.references import Found, References
from recovery.workflows.values import Packed
from tests.crash.workflow_mutants import mutant

# Effects


@mutant
def what_a_task_went_on_to_is_no_user_of_it() -> Iterator[None]:
    users = Board.users

    def blind(self: Board, task: str) -> list[str]:
        return [] if task in self.alias else users(self, task)

    with mock.patch.object(Board, "users", blind):
        yield


@mutant
def a_graph_lasts_without_what_its_refs_refer_to() -> Iterator[None]:
    done = Board._done

    def careless(self: Board, task: str) -> ledger.Done | None:
        found = done(self, task)
        if found is not None and "o" in found.head:
            return replace(found, place=ledger.INLINE)
        return found

    with mock.patch.object(Board, "_done", careless):
        yield


@mutant
def effects_that_lost_what_they_were_called_with_begin_again() -> Iterator[None]:
    failed = Attempts.failed

    def careless(self: Attempts, slot: Any, task: Any, error: Exception, *how: Any) -> None:
        if isinstance(error, VoidError) and task.annotations.external:
            with self._engine.lock:
                self._engine.append("not", {"t": slot.id, "a": slot.attempt})
            self._engine.void(slot)
        else:
            failed(self, slot, task, error, *how)

    with mock.patch.object(Attempts, "failed", careless):
        yield


# Who makes objects, and which are there


@mutant
def objects_of_another_session_count_as_there() -> Iterator[None]:
    load = Lineage.load

    def credulous(self: Lineage) -> None:
        known = set(self._objects)
        load(self)
        for key in self._objects.keys() - known:
            self._objects[key].lost = False

    with mock.patch.object(Lineage, "load", credulous):
        yield


@mutant
def objects_of_who_led_before_count_as_lost() -> Iterator[None]:
    load = Lineage.load

    def timid(self: Lineage) -> None:
        known = set(self._objects)
        load(self)
        for key in self._objects.keys() - known:
            self._objects[key].lost = True

    with mock.patch.object(Lineage, "load", timid):
        yield


@mutant
def refs_in_graphs_have_no_makers() -> Iterator[None]:
    with mock.patch.object(Lineage, "maker_of", lambda self, ref: None):
        yield


@mutant
def what_the_program_gave_was_made_by_who_passes_it_on() -> Iterator[None]:
    with mock.patch.object(Lineage, "_maker", lambda self, slot, key, found: slot.id):
        yield


@mutant
def all_begins_anew_for_what_is_lost() -> Iterator[None]:
    with mock.patch.object(
        Lineage, "_make_again", lambda self, makers: self._engine.begin_anew()
    ):
        yield


@mutant
def what_was_made_again_since_is_taken_for_lost() -> Iterator[None]:
    report = Lineage.report

    def careless(self: Lineage, keys: Any, era: Any = None, *how: Any) -> None:
        report(self, keys, None, *how)

    with mock.patch.object(Lineage, "report", careless):
        yield


@mutant
def hashes_leave_out_what_was_put() -> Iterator[None]:
    def short(self: Found, value: Any) -> str | None:
        return repr(value) if isinstance(value, ObjectRef) else None

    with mock.patch.object(Found, "text_of", short):
        yield


# How long they are there


@mutant
def objects_are_deleted_that_a_task_is_to_be_called_with() -> Iterator[None]:
    hold = Lineage.hold

    def careless(self: Lineage, holder: str, refs: Any) -> None:
        if not holder.startswith("call of "):
            hold(self, holder, refs)

    with mock.patch.object(Lineage, "hold", careless):
        yield


@mutant
def objects_are_deleted_before_they_are_stored() -> Iterator[None]:
    hold = Lineage.hold

    def careless(self: Lineage, holder: str, refs: Any) -> None:
        if not holder.startswith("file of "):
            hold(self, holder, refs)

    with mock.patch.object(Lineage, "hold", careless):
        yield


@mutant
def objects_are_deleted_that_values_of_before_refer_to() -> Iterator[None]:
    with mock.patch.object(Lineage, "_hold_all", lambda self, task, done: None):
        yield


@mutant
def what_was_read_back_is_never_deleted() -> Iterator[None]:
    delete = Lineage._delete

    def careless(self: Lineage, key: str) -> None:
        self._objects[key].read = False
        delete(self, key)

    with mock.patch.object(Lineage, "_delete", careless):
        yield


@mutant
def objects_are_never_deleted() -> Iterator[None]:
    with mock.patch.object(Lineage, "_delete", lambda self, key: self._objects.pop(key)):
        yield


@mutant
def values_are_stored_without_what_they_refer_to() -> Iterator[None]:
    write = Attempts._write

    def careless(self: Attempts, task: str, packed: Packed) -> dict[str, Any]:
        return write(self, task, replace(packed, refs=[]))

    with mock.patch.object(Attempts, "_write", careless):
        yield


@mutant
def a_value_that_cannot_be_written_for_what_is_lost_has_failed() -> Iterator[None]:
    def strict(self: Lineage, task: str, attempt: int, packed: Any, error: Any, era: int) -> None:
        self._engine.stop(gone(task, error))

    with mock.patch.object(Lineage, "put_off", strict):
        yield


@mutant
def effects_wait_for_ever_for_what_nobody_will_write() -> Iterator[None]:
    with mock.patch.object(Lineage, "give_up_lost", lambda self, tasks: False):
        yield


@mutant
def attempts_of_a_dead_leader_go_on() -> Iterator[None]:
    begin = References.__init__

    def careless(self: References, *how: Any, **more: Any) -> None:
        begin(self, *how, **more)
        self._is_over = lambda: False

    with mock.patch.object(References, "__init__", careless):
        yield


@mutant
def attempts_of_a_dead_leader_put() -> Iterator[None]:
    put = References.put

    def careless(self: References, value: Any) -> ObjectRef:
        is_over, self._is_over = self._is_over, lambda: False
        try:
            return put(self, value)
        finally:
            self._is_over = is_over

    with mock.patch.object(References, "put", careless):
        yield


# Reductions of the first of many


@mutant
def all_that_a_reduction_was_given_counts_as_taken() -> Iterator[None]:
    head_of = Lineage.head_of

    def careless(self: Lineage, slot: Any, found: Found) -> dict[str, Any]:
        head = head_of(self, slot, found)
        if "k" in head:
            head["k"] = [[given, given] for given, _ in head["k"]]
        return head

    with mock.patch.object(Lineage, "head_of", careless):
        yield


@mutant
def what_came_of_the_first_counts_as_deterministic() -> Iterator[None]:
    find = References._find_firsts

    def trusting(self: References, value: Any, found: Found) -> None:
        find(self, value, found)
        found.new = False

    with mock.patch.object(References, "_find_firsts", trusting):
        yield


@mutant
def nobody_looks_at_reductions_within_others() -> Iterator[None]:
    find = References._find_firsts

    def shallow(self: References, value: Any, found: Found) -> None:
        full, self._full = self._full, {}
        try:
            find(self, value, found)
        finally:
            self._full = full

    with mock.patch.object(References, "_find_firsts", shallow):
        yield


@mutant
def who_asked_what_was_taken_is_forgotten() -> Iterator[None]:
    with mock.patch.object(References, "contributors", References._contributors):
        yield


@mutant
def a_result_that_was_got_is_made_again() -> Iterator[None]:
    class Empty(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            return False

    begin = References.__init__

    def forgetful(self: References, *how: Any, **more: Any) -> None:
        begin(self, *how, **more)
        self._results = Empty()

    with mock.patch.object(References, "__init__", forgetful):
        yield


# Actors


@mutant
def versions_share_with_the_object() -> Iterator[None]:
    shared = SimpleNamespace(deepcopy=lambda value: value)
    with mock.patch.object(actors, "copy", shared):
        yield


@mutant
def an_object_is_used_of_an_attempt_that_does_not_count() -> Iterator[None]:
    with mock.patch.object(actors, "_digest", lambda version: ""):
        yield


@mutant
def an_object_stays_at_the_version_that_was_called() -> Iterator[None]:
    def take(self: Any, version: Actor) -> Any:
        return self._objects.get(version.name, (None, None))[0]

    with mock.patch.object(actors._Live, "take", take):
        yield


@mutant
def calls_since_the_checkpoint_are_not_made_again() -> Iterator[None]:
    bring = actors._bring

    def forgetful(version: Actor, ctx: Any) -> Any:
        thing = actors._LIVE.take(version)
        return bring(replace(version, calls=()), ctx) if thing is None else thing

    with mock.patch.object(actors, "_bring", forgetful):
        yield


@mutant
def calls_whose_rank_is_gone_have_failed() -> Iterator[None]:
    answered = Attempts.answered

    def strict(self: Attempts, *how: Any) -> None:
        *what, error = how
        if isinstance(error, RankGoneError):
            error = ArithmeticError(str(error))
        answered(self, *what, error)

    with mock.patch.object(Attempts, "answered", strict):
        yield


# Gangs


@mutant
def gangs_that_lost_a_rank_count_as_deterministic() -> Iterator[None]:
    succeeded = Attempts.succeeded

    def trusting(self: Attempts, *how: Any, **more: Any) -> None:
        succeeded(self, *how, **{**more, "whole": True})

    with mock.patch.object(Attempts, "succeeded", trusting):
        yield


@mutant
def what_a_gang_gave_lasts_before_it_is_durable() -> Iterator[None]:
    with mock.patch.object(ledger.Done, "lasting", property(lambda self: self.deterministic)):
        yield
