"""What has to run, and when an effect may be released: by hand, and against brute force."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopcoll.errors import CheckpointCorruptError
from recovery.workflows.ledger import (
    FIRST,
    INLINE,
    NOWHERE,
    Ledger,
    Settled,
    Wants,
    exposed,
    iteration_of,
    owner_of,
    plan,
)

OWNER = {"nonce": "one"}


class Story:
    """A ledger, told record by record."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.seq = 0
        self.put("start", {"uuid": "u", "print": "p", "owner": OWNER})

    def put(self, kind: str, head: dict[str, Any], body: bytes = b"") -> None:
        self.seq += 1
        self.ledger.apply(kind, head, body, self.seq)

    def done(
        self, task: str, attempt: int = 1, *, kept: bool = True, fixed: bool = False,
        made_from: dict[str, int] | None = None, kind: str = "done", **more: Any,
    ) -> None:  # fmt: skip
        self.put(
            kind,
            {"t": task, "a": attempt, "in": made_from or {}, "nd": not fixed, "h": "h",
             "st": INLINE if kept else NOWHERE, **more},
            b"value",
        )  # fmt: skip

    def begin(self, task: str, attempt: int = 1, **more: Any) -> None:
        self.put("begin", {"t": task, "a": attempt, "in": {}, "by": "one", **more})

    def compacted(self) -> Story:
        """What the next process would know after a compaction."""
        other = Story.__new__(Story)
        other.ledger, other.seq = Ledger(), 0
        for kind, head, body in self.ledger.keep():
            other.put(kind, head, body)
        return other


def order_of(edges: dict[str, Iterable[str]]) -> dict[str, Wants]:
    return {task: Wants(tuple(inputs), tuple(inputs)) for task, inputs in edges.items()}


CHAIN = order_of({"a": "", "b": "a", "c": "b"})


def test_all_that_never_ran_runs() -> None:
    found = plan(CHAIN, "c", Story().ledger)
    assert found.run == {"a": FIRST, "b": FIRST, "c": FIRST}
    assert not found.undo and not found.renewed


def test_what_is_durable_is_read_back_and_what_it_was_made_from_is_not_needed() -> None:
    story = Story()
    story.done("a", kept=False)
    story.done("b", made_from={"a": 1})
    assert list(plan(CHAIN, "c", story.ledger).run) == ["c"]


def test_a_lost_value_of_a_deterministic_task_is_the_same_again() -> None:
    story = Story()
    story.done("a", kept=False, fixed=True)
    found = plan(CHAIN, "c", story.ledger)
    assert found.run["a"] == "its value was not kept, and b needs it"
    assert not found.renewed


def test_a_lost_value_that_becomes_another_voids_what_was_made_from_it() -> None:
    order = order_of({"a": "", "b": "a", "c": "a", "d": "bc"})
    story = Story()
    story.done("a", kept=False)
    story.done("b", made_from={"a": 1})
    found = plan(order, "d", story.ledger)
    assert found.renewed == {"a", "b"}
    assert found.run["b"] == "what it was made from has become another value"
    assert found.run["a"] == "its value was not kept, and c needs it"


def test_what_a_task_only_waits_for_is_not_computed_again() -> None:
    story = Story()
    story.done("a", kept=False)
    order = {"a": Wants((), ()), "b": Wants((), ("a",))}
    assert list(plan(order, "b", story.ledger).run) == ["b"]
    order["b"] = Wants(("a",), ("a",))
    assert set(plan(order, "b", story.ledger).run) == {"a", "b"}


def test_what_was_cut_off_or_is_void_is_undone_the_newest_first() -> None:
    story = Story()
    story.done("a", kept=False)
    for task, inputs in (("b", {"a": 1}), ("c", {"b": 1})):
        story.begin(task, r=1)
        story.done(task, made_from=inputs)
    story.begin("d", r=1)
    order = order_of({"a": "", "b": "a", "c": "b", "d": "ca"})
    found = plan(order, "d", story.ledger)
    assert [task for task, _, _ in found.undo] == ["d", "c", "b"]
    assert found.run["d"] == "it was cut off"
    for task in ("d", "c"):
        story.put("undone", {"t": task, "a": 1})
    again = plan(order, "d", story.compacted().ledger)
    assert [task for task, _, _ in again.undo] == ["b"]


def test_reasons() -> None:
    story = Story()
    story.put("fail", {"t": "a", "a": 1, "error": "E: no"})
    assert plan(CHAIN, "c", story.ledger).run["a"] == "it failed"
    story = Story()
    story.begin("a", r=1)
    story.put("undone", {"t": "a", "a": 1})
    assert plan(CHAIN, "c", story.ledger).run["a"] == "it was undone"


def test_an_unknown_record_is_corruption() -> None:
    with pytest.raises(CheckpointCorruptError, match="unknown kind, 'dream'"):
        Ledger().apply("dream", {}, b"", 1)


# Loops and continuations


def test_a_durable_iteration_lets_go_of_those_before_but_not_of_what_the_first_was_made_from() -> (
    None
):
    story = Story()
    story.done("a", kept=False)
    story.done("l[0]", kept=False, made_from={"a": 1})
    story.done("l[1]", kept=False, made_from={"l[0]": 1})
    story.begin("l[1]", 1, r=1)
    story.done("l[1]", kept=False, made_from={"l[0]": 1})
    story.done("l[2]", made_from={"l[1]": 1})
    ledger = story.ledger
    assert set(ledger.states) == {"a", "l[2]"}
    assert ledger.states["l[2]"].done.inputs == {"a": 1}  # type: ignore[union-attr]
    assert [name for name, _ in ledger.attic["l[2]"]] == ["l[1]"]
    # The state before the loop is lost, and nobody needs it.
    order = {"a": Wants((), ()), "l[2]": Wants(("a",), ("a",))}
    order["l"] = Wants(("l[2]",), ("a", "l[2]"))
    found = plan(order, "l", ledger)
    assert list(found.run) == ["l"] and not found.undo
    # Another user makes it another one: all is undone, and begins anew.
    order["b"] = Wants(("a", "l"), ("a", "l"))
    found = plan(order, "b", story.compacted().ledger)
    assert found.renewed == {"a", "l[2]"}
    assert [(task, heir) for task, _, heir in found.undo] == [("l[1]", "l[2]")]


def test_numbers_of_what_begins_anew_are_not_given_twice() -> None:
    story = Story()
    story.done("t", kind="more", o="t", g=1)
    story.done("t/x", 3, made_from={"t": 1}, e="event")
    story.done("l[0]", 2)
    story.put("anew", {"t": "t"})
    story.put("anew", {"t": "l", "i": 0})
    for ledger in (story.ledger, story.compacted().ledger):
        assert set(ledger.states) == {"t"} and ledger.done("t") is None
        assert ledger.attempts("t") == 1
        assert ledger.attempts("t/x") == ledger.attempts("l[0]") == 3
        assert ledger.attempts("u") == 0
        assert not ledger.more and not ledger.loops
        assert "event" not in ledger.events


def test_a_loop_that_begins_anew_in_the_middle() -> None:
    story = Story()
    for number in range(4):
        story.done(f"l[{number}]", kept=number == 0)
    story.put("anew", {"t": "l", "i": 2})
    assert sorted(story.ledger.iterations["l"]) == [0, 1]
    assert story.ledger.loops == {"l": 0}


def test_a_generation_lets_go_of_the_one_before() -> None:
    story = Story()
    story.done("t", kind="more", o="t", g=1)
    story.begin("t/x", r=1)
    story.done("t/x", made_from={"t": 1})
    story.done("t/y", made_from={"t/x": 1}, kind="more", o="t", g=2)
    story.put("note", {"t": "t/~2/x", "k": 0, "v": 7})
    story.put("fail", {"t": "t/~2/x", "a": 1, "error": "E"})
    for ledger in (story.ledger, story.compacted().ledger):
        assert set(ledger.states) == {"t", "t/y", "t/~2/x"}
        assert ledger.more == {"t": ("t/y", 2)}
        assert ledger.done("t/y").inputs == {"t": 1}  # type: ignore[union-attr]
        assert ledger.states["t/~2/x"].notes == {0: 7}
        assert ledger.states["t/~2/x"].failures == ["E"]
        assert [name for name, _ in ledger.attic["t"]] == ["t/x"]


def test_what_begins_anew_gives_back_the_events_of_those_that_are_no_more() -> None:
    story = Story()
    story.done("t", kind="more", o="t", g=1)
    story.done("t/x", made_from={"t": 1}, e="first")
    story.done("t/y", made_from={"t/x": 1}, kind="more", o="t", g=2)
    story.done("l[0]", kind="more", kept=False, o="l[0]", g=1)
    story.done("l[0]/x", kept=False, made_from={"l[0]": 1}, e="second")
    story.done("l[1]", made_from={"l[0]/x": 1})
    assert set(story.ledger.states) == {"t", "t/y", "l[1]"}
    for told in (story, story.compacted().compacted()):
        ledger = told.ledger
        assert ledger.events == {"first", "second"}
        told.put("anew", {"t": "t"})
        assert ledger.events == {"second"}
        told.put("anew", {"t": "l", "i": 1})
        assert not ledger.events and not ledger.heard


def test_names() -> None:
    assert owner_of("a") is None
    assert owner_of("a/b") == owner_of("a/~3/b") == "a"
    assert owner_of("a/b/~2/c") == "a/b"
    assert iteration_of("a/l~2[17]") == ("a/l~2", 17)
    assert iteration_of("a") is None


def test_a_compaction_tells_all() -> None:
    story = Story()
    story.put("resume", {"owner": {"nonce": "two"}, "over": ["one"]})
    story.done("a", kept=False, e="first")
    story.put("kept", {"t": "a", "a": 1, "f": "file", "sh": {}})
    story.put("kept", {"t": "a", "a": 7, "f": "late file", "sh": {}})
    story.begin("b")
    story.put("fail", {"t": "b", "a": 1, "error": "E", "late": 1})
    story.put("fail", {"t": "c", "a": 4, "error": "E"})
    story.ledger.events.add("of-one-that-is-no-more")
    story.put("end", {"status": "failed", "error": "E", "output": None})
    assert story.ledger.dropped == ["late file"]
    other = story.compacted().ledger
    assert other.keep() == story.ledger.keep()
    assert other.events == {"first", "of-one-that-is-no-more"}
    assert other.status == "failed" and other.error == "E"
    assert other.lives == 1 and other.over == {"one"} and set(other.owners) == {"one", "two"}
    assert other.states["b"].begun is not None and other.states["b"].begun.late
    assert other.attempts("c") == 4
    assert other.states["a"].runs == 1 and other.states["a"].life == 1


def test_files_that_nobody_needs_are_named() -> None:
    story = Story()
    story.begin("a", r=1, f="call", sh={})
    story.done("a", kept=False)
    story.put("kept", {"t": "a", "a": 1, "f": "value", "sh": {}})
    story.put("undone", {"t": "a", "a": 1})
    assert sorted(story.ledger.dropped) == ["call", "value"]
    story.ledger.dropped.clear()
    story.done("t", kind="more", o="t", g=1, f="graph", sh={})
    story.done("t/x", f="graph 2", sh={}, kind="more", o="t", g=2)
    story.done("t/~2/x", kind="more", o="t", g=3)
    assert story.ledger.dropped == ["graph 2"]


# Against brute force


@st.composite
def histories(draw: st.DrawFn) -> tuple[dict[str, Wants], Ledger]:
    """A random graph, and a ledger that several lives may have left."""
    names = [chr(ord("a") + i) for i in range(draw(st.integers(2, 7)))]
    order: dict[str, Wants] = {}
    for i, name in enumerate(names):
        inputs = [one for one in names[:i] if draw(st.booleans())]
        if i and not inputs:
            inputs = [names[i - 1]]
        order[name] = Wants([one for one in inputs if draw(st.integers(0, 4))], inputs)
    fixed = {name: draw(st.booleans()) for name in names}
    kept = {name: draw(st.booleans()) for name in names}
    story = Story()
    for _ in range(draw(st.integers(1, 3))):
        found = plan(order, names[-1], story.ledger)
        left = draw(st.integers(0, len(names)))
        for name in names:
            if name not in found.run:
                continue
            if left == 0:
                break
            left -= 1
            done = story.ledger.done(name)
            attempt = 1 if done is None else done.attempt + (name in found.renewed)
            made_from = {
                one: story.ledger.done(one).attempt  # type: ignore[union-attr]
                for one in order[name].inputs
            }
            story.done(
                name, attempt, made_from=made_from, fixed=fixed[name], kept=kept[name]
            )
    return order, story.ledger


def brute_force(
    order: dict[str, Wants], output: str, ledger: Ledger
) -> tuple[set[str], set[str]]:
    """The smallest sets (what runs, what gets another version) that are closed under the rules."""
    run: set[str] = set()
    renewed: set[str] = set()
    while True:
        before = (len(run), len(renewed))
        for task, wants in order.items():
            done = ledger.done(task)
            void = done is None or any(
                one in renewed
                or (made := ledger.done(one)) is None
                or made.attempt != version
                or _is_void(one, renewed, ledger)
                for one, version in done.inputs.items()
            )
            used = task == output or any(task in order[user].needs for user in run)
            if void or (used and not (done is not None and done.durable)):
                run.add(task)
            if done is not None and (void or (task in run and not done.deterministic)):
                renewed.add(task)
        if before == (len(run), len(renewed)):
            return run, renewed


def _is_void(task: str, renewed: set[str], ledger: Ledger) -> bool:
    done = ledger.done(task)
    return done is None or any(
        one in renewed
        or (made := ledger.done(one)) is None
        or made.attempt != version
        or _is_void(one, renewed, ledger)
        for one, version in done.inputs.items()
    )


@settings(max_examples=300, deadline=None)
@given(histories())
def test_the_plan_is_the_smallest_that_the_rules_allow(
    history: tuple[dict[str, Wants], Ledger],
) -> None:
    order, ledger = history
    output = list(order)[-1]
    needed = _cone(order, output)
    order = {task: wants for task, wants in order.items() if task in needed}
    run, renewed = brute_force(order, output, ledger)
    found = plan(order, output, ledger)
    assert set(found.run) == run
    assert found.renewed == renewed


@settings(max_examples=300, deadline=None)
@given(histories())
def test_an_effect_waits_for_what_a_crash_now_would_change(
    history: tuple[dict[str, Wants], Ledger],
) -> None:
    order, ledger = history
    output = list(order)[-1]
    needed = _cone(order, output)
    order = {task: wants for task, wants in order.items() if task in needed}
    run, renewed = brute_force(order, output, ledger)
    users = {
        task: [user for user, wants in order.items() if task in wants.needs] for task in order
    }

    def done(task: str) -> Any:
        found = ledger.done(task)
        # An engine that goes on from here takes what has to run again for not done.
        return None if found is None or _is_void(task, set(), ledger) else found

    settled = Settled()
    for effect in order:
        if ledger.done(effect) is not None:
            continue
        above = _cone(order, effect) - {effect}
        # Those where it begins: not what is void only because they are.
        expected = {
            one
            for one in above
            if (ended := done(one)) is None
            or (one in renewed and not ended.durable and not ended.deterministic)
        }
        assert bool(expected) == bool(above & renewed or any(done(one) is None for one in above))
        found = exposed(
            effect, lambda task: order[task].inputs, users.__getitem__, done, settled, output
        )
        assert found == expected


def _cone(order: dict[str, Wants], task: str) -> set[str]:
    """A task, and all that it was made from or waits for."""
    found, stack = {task}, [task]
    while stack:
        for one in order[stack.pop()].inputs:
            if one not in found:
                found.add(one)
                stack.append(one)
    return found


def test_an_effect_is_not_released_while_a_user_of_what_it_was_made_from_may_run_again() -> None:
    """a is lost and nobody needs it, unless y runs again; and y does, should c become another."""
    order = order_of({"a": "", "c": "", "x": "a", "y": "ac", "e": "x", "z": "c", "o": "eyz"})
    users = {task: [u for u, w in order.items() if task in w.needs] for task in order}
    story = Story()
    for task in "ac":
        story.done(task, kept=False)
    story.done("x", made_from={"a": 1})
    story.done("y", made_from={"a": 1, "c": 1})

    def found() -> set[str]:
        return exposed(
            "e", lambda task: order[task].inputs, users.__getitem__, story.ledger.done, Settled(),
            "o",
        )  # fmt: skip

    assert found() == {"a"}
    story.done("z", made_from={"c": 1})
    assert found() == set()
