"""Workflows that are cut off at any moment, and owners that wake up: a bounded part of the corpora,
and the rules left out one at a time, each of which must be noticed."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from recovery.journal import Journal
from recovery.workflows import Node
from recovery.workflows import folder as folders
from tests.crash import workflow_graphs as graphs
from tests.crash import workflow_zombies as zombies
from tests.crash.workflow_corpus import Counts, WrongError, seeds, try_seed
from tests.crash.workflow_living import FIRST
from tests.crash.workflow_mutants import MUTANTS

_POINTS = 150
#: Of trials of the corpus, in which what is wrong must be found.
_TRIALS_MAX = 60


def test_cut_off_at_any_moment() -> None:
    counts = Counts()
    for seed in seeds(first=500):
        try_seed(seed, counts)
        if counts.points >= _POINTS:
            break
    assert counts.workflows >= 50 and counts.rerun > 50 and counts.undone > 10
    assert counts.unknown < counts.workflows / 10


def _at_each_call(node: Callable[[], Node], first: int, last: int) -> None:
    for k in range(first, last):
        try_seed(0, Counts(), [k], node())


#: Found by graphs in which nothing else helps.
_SPECIAL = {
    "effects_are_released_at_once": (graphs.used_later, 28, 44),
    "a_durable_user_is_taken_to_need_nothing_any_more": (graphs.used_again, 30, 46),
}
#: Alike: the graph, the tasks that its lives end in, one after the other, and what is noticed.
_IN_TASKS: dict[str, tuple[Callable[[], Node], list[str], str]] = {
    "what_has_to_run_again_is_taken_for_done": (
        graphs.used_by_one_that_is_void, ["late_user", "user"], "an effect was done twice",
    ),
    "versions_are_given_twice": (
        graphs.used_after_it_went_on, ["late_user", "user"], "mixed: two values of lost",
    ),
    "what_can_be_rolled_back_counts_as_deterministic": (
        graphs.a_thing_of_a_thing, ["late_user"], "thing runs while thing~2 is not undone",
    ),
    "loops_go_on_after_they_would_have_ended": (
        graphs.a_loop_that_ends_earlier, ["late_user"], "runs after the end",
    ),
    "events_of_what_begins_anew_are_lost": (
        graphs.of_an_event, ["late_user"], "an event a is lost",
    ),
    "events_of_generations_that_are_over_are_lost": (
        graphs.of_events, ["late_user"], "an event a is lost",
    ),
}  # fmt: skip
_OF_THE_CORPUS = [
    "durability_is_not_waited_for",
    "effects_come_before_their_intent_is_durable",
    "rollbacks_are_left_out",
    "rollbacks_come_in_the_wrong_order",
    "random_numbers_are_others_each_time",
    "what_was_recalled_is_asked_again",
    "versions_are_not_compared",
]


def test_living_things_are_cut_off_at_any_moment() -> None:
    counts = Counts()
    for seed in seeds(first=700 + FIRST):
        try_seed(seed, counts)
        if counts.points >= _POINTS // 2:
            break
    assert counts.workflows >= 20 and counts.rerun > 20
    assert counts.reasons["its references were lost"] + counts.reasons["rank 1 is gone"] > 0


def _living(count: int = 5 * _TRIALS_MAX) -> Iterable[int]:
    """Seeds of graphs with living things. Their threads are not the seed's: what comes of one may
    be another thing next time."""
    return ((FIRST + number % (100 - FIRST)) * 1000 + number for number in range(count))


#: What goes wrong with living things, and what is noticed. All else that does is noticed in cases
#: that were made for it (`test_workflow_living`): by random ones too seldom.
_OF_THE_LIVING = {
    "a_value_counts_as_kept_without_what_it_refers_to": "is lost",
    "objects_have_other_names_each_time": "is annotated as deterministic, but gave another value",
}


@pytest.mark.parametrize("name", _OF_THE_LIVING)
def test_what_goes_wrong_with_living_things_is_noticed(name: str) -> None:
    with pytest.raises(WrongError, match=_OF_THE_LIVING[name]), MUTANTS[name]():
        for seed in _living():
            try_seed(seed, Counts())


@pytest.mark.parametrize("name", _OF_THE_CORPUS)
def test_a_rule_that_is_left_out_is_noticed(name: str) -> None:
    with pytest.raises(WrongError), MUTANTS[name]():
        for seed in itertools.islice(seeds(), _TRIALS_MAX):
            try_seed(seed, Counts())


@pytest.mark.parametrize("name", _SPECIAL)
def test_an_effect_that_is_released_too_early_is_noticed(name: str) -> None:
    _at_each_call(*_SPECIAL[name])
    with pytest.raises(WrongError, match="an effect was done twice"), MUTANTS[name]():
        _at_each_call(*_SPECIAL[name])


@pytest.mark.parametrize("name", _IN_TASKS)
def test_a_rule_that_helps_after_these_crashes_is_noticed(name: str) -> None:
    node, lives, what = _IN_TASKS[name]
    counts = Counts()
    for seed in range(2):
        try_seed(seed, counts, lives, node())
    assert counts.points == 2 * len(lives)
    for k in range(15, 60, 15):
        try_seed(k, counts, [k, k // 2], node())
    with pytest.raises(WrongError, match=what), MUTANTS[name]():
        for seed in range(_TRIALS_MAX // 6):
            try_seed(seed, counts, lives, node())


def test_a_no_that_is_believed_too_early_is_noticed() -> None:
    """Of owners that nobody can prove to be dead, and that wake up."""
    strangers = [seed for seed in range(100) if random.Random(seed).random() < 0.15][:6]

    def trials() -> None:
        for seed, k in itertools.product(strangers, range(20, 32)):
            try_seed(seed, Counts(), [k], graphs.of_a_stranger())

    with (
        pytest.raises(WrongError, match="an effect was done twice"),
        MUTANTS["a_no_is_believed_though_the_old_owner_may_live"](),
    ):
        trials()


# Real owners


@pytest.mark.parametrize("moment", ["keyed", "asked", 4])
def test_an_owner_wakes_up_after_it_was_succeeded(tmp_path: Path, moment: Any) -> None:
    zombies.once(tmp_path, moment, collections.Counter())


def test_an_owner_that_does_not_look_is_noticed(tmp_path: Path) -> None:
    with (
        mock.patch.object(Journal, "_look", lambda self, own: None),
        pytest.raises(AssertionError, match="the owner that was succeeded ended with|the effects"),
    ):
        zombies.once(tmp_path, 3, collections.Counter())


def test_two_owners_at_once_are_noticed(tmp_path: Path) -> None:
    """Without the lease, an owner that lives is taken for dead."""
    with (
        mock.patch.object(folders, "observe", lambda *how, **more: "dead"),
        pytest.raises(AssertionError, match=r"the effects are \['asked', 'asked'"),
    ):
        zombies.once(tmp_path, "asked", collections.Counter())
