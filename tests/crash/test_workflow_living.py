"""Rules of objects, refs and actors in workflows, each in a case in which nothing else helps; and
the same cases without the rule, which must be noticed."""

from __future__ import annotations

import pytest

from tests.crash import workflow_living_mutants  # noqa: F401
from tests.crash.workflow_cases import CASES, used_in_what_goes_on
from tests.crash.workflow_corpus import WrongError
from tests.crash.workflow_directed import Case, try_case
from tests.crash.workflow_mutants import MUTANTS

#: Of a task that gives another object each time: this one has to fail.
_LIAR = "of a liar"
_GAVE_ANOTHER = "is annotated as deterministic, but gave another value than before"


@pytest.mark.parametrize("name", sorted(CASES.keys() - {_LIAR}))
def test_the_rules_hold(name: str) -> None:
    try_case(CASES[name])


def test_a_task_that_puts_another_object_each_time_is_noticed() -> None:
    with pytest.raises(WrongError, match=f"liar {_GAVE_ANOTHER}"):
        try_case(CASES[_LIAR])
    with MUTANTS["hashes_leave_out_what_was_put"]():
        try_case(CASES[_LIAR])


@pytest.mark.parametrize("kind", ["turn", "task"])
def test_an_effect_is_released_when_the_graph_with_the_ref_has_ended(kind: str) -> None:
    try_case(Case(used_in_what_goes_on(kind), runs={"blind": 1}))


#: A rule that is left out, the case, and what is noticed.
_NOTICED = [
    # Effects
    (
        "what_a_task_went_on_to_is_no_user_of_it", "used in a turn",
        "an effect was done twice",
    ),
    (
        "a_graph_lasts_without_what_its_refs_refer_to", "used in a turn",
        "an effect was done twice",
    ),
    (
        "effects_that_lost_what_they_were_called_with_begin_again", "told, and then lost",
        "an effect was done twice",
    ),
    # Who makes objects, and which are there
    (
        "objects_of_another_session_count_as_there", "told of a loop",
        "blind is unknown, though no life ended in it",
    ),
    (
        "objects_of_another_session_count_as_there", "used in another session",
        "late_user was called before made, whose value it was given",
    ),
    (
        "objects_of_who_led_before_count_as_lost", "used by another leader",
        "made ran 2 times, not 1",
    ),
    (
        "refs_in_graphs_have_no_makers", "used by what went on",
        "late_onward/late_user ran twice, though nothing was lost",
    ),
    (
        "what_the_program_gave_was_made_by_who_passes_it_on", "of before",
        "were deleted, and were there before",
    ),
    (
        "all_begins_anew_for_what_is_lost", "lost beside its user",
        "late_user ran 2 times, not 1",
    ),
    (
        "calls_whose_refs_become_others_have_failed", "lost, and made another",
        "late_user failed: .* is lost",
    ),
    ("losses_are_not_recorded", "lost as its leader dies", "late_user was called before made"),
    (
        "what_only_carries_a_ref_is_at_hand_without_its_maker", "lost before it is written",
        "carrier ran 2 times, not 1",
    ),
    (
        "a_value_counts_as_kept_without_what_it_refers_to", "lost beside its user",
        "late_user failed: .* is lost",
    ),
    (
        "objects_have_other_names_each_time", "used in another session",
        f"made {_GAVE_ANOTHER}",
    ),
    (
        "objects_of_another_session_are_unknown", "used by what went on",
        "late_onward/late_user failed: .* is lost",
    ),
    (
        "what_was_made_again_since_is_taken_for_lost", "reported twice",
        "made ran 3 times, not 2",
    ),
    # How long they are there
    (
        "objects_are_deleted_that_a_task_is_to_be_called_with", "used by what goes on",
        "made ran twice, though nothing was lost",
    ),
    (
        "objects_are_deleted_before_they_are_stored", "used before it is stored",
        "made ran twice, though nothing was lost",
    ),
    (
        "objects_are_deleted_that_values_of_before_refer_to", "used by another leader",
        "late_user was called before made, whose value it was given",
    ),
    ("what_was_read_back_is_never_deleted", "of before, from a file", "are left in memory"),
    ("objects_are_never_deleted", "used by what goes on", "are left in memory"),
    (
        "values_are_stored_without_what_they_refer_to", "given to the world",
        "the output was stored without the object that output made",
    ),
    (
        "values_are_stored_without_what_they_refer_to", "used from a file",
        "late_user ran twice, though nothing was lost",
    ),
    (
        "a_value_that_cannot_be_written_for_what_is_lost_has_failed",
        "lost before it is written", "carrier returned a ref whose object is gone",
    ),
    (
        "effects_wait_for_ever_for_what_nobody_will_write", "still to be written",
        "blind has an effect that cannot be released",
    ),
    (
        "attempts_of_a_dead_leader_go_on", "an attempt goes on late",
        "made ran twice, though nothing was lost",
    ),
    ("attempts_of_a_dead_leader_put", "an attempt goes on late", "made/1 1'>} are left in memory"),
    # Reductions of the first of many
    (
        "all_that_a_reduction_was_given_counts_as_taken", "of the first: its value",
        "the journal says of a reduction",
    ),
    *(
        ("what_came_of_the_first_counts_as_deterministic", f"of the first: {way}", _GAVE_ANOTHER)
        for way in ("its value", "its contributors", "within another")
    ),
    ("nobody_looks_at_reductions_within_others", "of the first: within another", _GAVE_ANOTHER),
    ("who_asked_what_was_taken_is_forgotten", "of the first: its contributors", _GAVE_ANOTHER),
    (
        "a_result_that_was_got_is_made_again", "got, and then lost",
        "mixed: first had another result than it was told of",
    ),
    # Actors
    ("versions_share_with_the_object", "called again", "mixed: Sharer.count goes on from what"),
    (
        "an_object_is_used_of_an_attempt_that_does_not_count", "called, and nobody heard of it",
        "mixed: two values of Counter.count",
    ),
    (
        "an_object_stays_at_the_version_that_was_called", "called twice",
        "mixed: Sharer.count~2 goes on from what {'Sharer.count'} left",
    ),
    (
        "calls_since_the_checkpoint_are_not_made_again", "called since",
        "mixed: two values of steady 1",
    ),
    (
        "calls_whose_rank_is_gone_have_failed", "called, and its rank dies",
        "Counter.count failed: ArithmeticError: rank 1 is gone",
    ),
    # Gangs
    (
        "gangs_that_lost_a_rank_count_as_deterministic", "of a gang", f"fewer {_GAVE_ANOTHER}",
    ),
    (
        "what_a_gang_gave_lasts_before_it_is_durable", "of a gang", "an effect was done twice",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("mutant", "name", "what"), _NOTICED)
def test_a_rule_that_is_left_out_is_noticed(mutant: str, name: str, what: str) -> None:
    with pytest.raises(WrongError, match=what), MUTANTS[mutant]():
        try_case(CASES[name])
