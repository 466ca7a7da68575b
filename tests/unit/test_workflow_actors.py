"""Actors as chains of versions, without ranks; and what is refused of them and of references."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import TaskFailedError, WorkflowError
from hopcoll.objects import ObjectRef
from recovery.workflows import Called, Node, TaskContext, Workflow, actor, actors, task
from recovery.workflows.references import arrays_for, key_of, refs_in

MADE: list[str] = []
BROKEN: set[int] = set()


@actor
class Adder:
    """Adds up."""

    def __init__(self, total: int) -> None:
        MADE.append("made")
        self.total = total

    def checkpoint(self) -> int:
        return self.total

    def restore(self, state: int) -> None:
        MADE.append("restored")
        self.total = state

    def add(self, number: int) -> int:
        self.total += number
        if number in BROKEN:
            raise ArithmeticError("broken")
        MADE.append(f"added {number}")
        return self.total


class Teller:
    def checkpoint(self) -> None: ...

    def restore(self, state: None) -> None: ...

    def tell(self, ctx: TaskContext) -> str:
        return ctx.task_id


Rare = Adder.options(every=3, deterministic=True)


@actor(retries=1, backoff_s=0.0)
class Sharer:
    """Gives its own list away, and takes the one that it is given for its own."""

    def __init__(self, total: int) -> None:
        self.total = [total]

    def checkpoint(self) -> list[int]:
        return self.total

    def restore(self, state: list[int]) -> None:
        self.total = state

    def add(self, number: int) -> int:
        self.total[0] += number
        if number in BROKEN:
            BROKEN.clear()
            raise ArithmeticError("broken")
        return self.total[0]

    def take(self, more: list[int]) -> int:
        more.append(self.total[0])
        self.total = more
        return sum(more)


class Tensor:
    """As those of torch that were computed: pickle writes them, and deepcopy refuses."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("only leaves support the deepcopy protocol")


@actor
class Network:
    """Has its number in a tensor that it goes on to change, and at times a lock."""

    def __init__(self, total: int) -> None:
        self.state: dict[str, Any] = {"layers": [Tensor(total)]}

    def checkpoint(self) -> Any:
        return self.state

    def restore(self, state: Any) -> None:
        MADE.append("restored")
        self.state = state

    def add(self, number: Any) -> int:
        if isinstance(number, Tensor):
            number = number.number
        self.state["layers"][0].number += number
        if number in BROKEN:
            self.state["layers"][0].guard = threading.Lock()
        return self.state["layers"][0].number


@task
def values(*called: Called) -> list[Any]:
    return [(one.value, one.actor.version) for one in called]


@task
def puts(ctx: TaskContext) -> Any:
    return ctx.put([1.0])


def chain(kind: Any, *numbers: int) -> list[Node]:
    nodes = [kind.bind(100)]
    for number in numbers:
        nodes.append(kind.call(nodes[-1], "add", number))
    return nodes[1:]


@pytest.fixture(autouse=True)
def _clean() -> None:
    MADE.clear()
    BROKEN.clear()
    actors._LIVE._objects.clear()


@pytest.mark.parametrize("kind", [Adder, Rare])
def test_calls_form_a_chain_and_the_object_stays(tmp_path: Path, kind: Any) -> None:
    found = Workflow("w", tmp_path).run(values.bind(*chain(kind, 1, 2, 3, 4)))
    assert found == [(101, 1), (103, 2), (106, 3), (110, 4)]
    assert MADE == ["made", "added 1", "added 2", "added 3", "added 4"]


def test_a_call_that_failed_begins_again_from_the_version_before(tmp_path: Path) -> None:
    BROKEN.add(4)
    kept = Rare.options(checkpoint="sync")
    with pytest.raises(TaskFailedError, match=r"Adder.add~4 failed: ArithmeticError"):
        Workflow("w", tmp_path).run(values.bind(*chain(kept, 1, 2, 3, 4, 5)))
    BROKEN.clear()
    MADE.clear()
    found = Workflow("w", tmp_path).run(values.bind(*chain(kept, 1, 2, 3, 4, 5)))
    assert found[-1] == (115, 5)
    assert MADE[-3:] == ["restored", "added 4", "added 5"]


def test_calls_since_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    nodes = chain(Rare, 1, 2)
    with Workflow("w", tmp_path) as workflow:
        version = workflow.run(nodes[-1]).actor
    assert version.version == 2 and version.state == 100
    assert version.calls == (("add", (1,), {}), ("add", (2,), {}))
    actors._LIVE._objects.clear()
    MADE.clear()
    assert Workflow("more", tmp_path).run(Rare.call(version, "add", 3)).value == 106
    assert MADE == ["restored", "added 1", "added 2", "added 3"]


def test_a_version_may_be_called_twice(tmp_path: Path) -> None:
    """Each call goes on from it, and knows nothing of the other."""
    (first,) = chain(Adder, 1)
    found = values.bind(Adder.call(first, "add", 10), Adder.call(first, "add", 20))
    assert Workflow("w", tmp_path).run(found) == [(111, 2), (121, 2)]


def test_nothing_of_a_version_is_shared_with_the_object(tmp_path: Path) -> None:
    """The class may well give away what it goes on to change."""
    (first,) = chain(Sharer, 1)
    found = values.bind(Sharer.call(first, "add", 10), Sharer.call(first, "add", 20))
    assert Workflow("twice", tmp_path).run(found) == [(111, 2), (121, 2)]
    BROKEN.add(4)
    assert Workflow("again", tmp_path).run(values.bind(Sharer.call(first, "add", 4))) == [(105, 2)]


def test_a_state_that_only_pickle_can_copy(tmp_path: Path) -> None:
    """Nothing of it is shared either, and it comes back in another process."""
    rare = Network.options(every=2, deterministic=True)
    for name, kind in (("each", Network), ("rare", rare)):
        (first,) = chain(kind, 1)
        more = [kind.call(first, "add", one) for one in (10, Tensor(20))]
        found = values.bind(*more, kind.call(more[1], "add", 300))
        assert Workflow(name, tmp_path).run(found) == [(111, 2), (121, 2), (421, 3)]
    version = Workflow("version", tmp_path).run(chain(rare, 1, 2, 3)[-1]).actor
    actors._LIVE._objects.clear()
    MADE.clear()
    assert Workflow("more", tmp_path).run(rare.call(version, "add", 4)).value == 110
    assert MADE == ["restored"]


def test_a_state_that_nothing_can_copy_is_named(tmp_path: Path) -> None:
    BROKEN.add(2)
    text = (
        r"Network.add~2 failed: .*WorkflowError: the state of actor Network cannot be copied: "
        r"\['layers'\]\[0\]\.guard is a _thread\.lock: cannot pickle '_thread\.lock' object; leave"
    )
    with pytest.raises(TaskFailedError, match=text):
        Workflow("w", tmp_path).run(values.bind(*chain(Network, 1, 2)))
    assert Workflow("w", tmp_path).status().state == "failed"


class Branch:
    """One of a tree, that knows who it is of; how often any was asked how it is made is counted."""

    asked = 0

    def __init__(self, *parents: Branch) -> None:
        self.parents = parents
        self.children: list[Any] = []
        for parent in parents:
            parent.children.append(self)

    def __getstate__(self) -> dict[str, Any]:
        Branch.asked += 1
        return self.__dict__


def test_a_part_that_nothing_can_copy_is_found_where_all_refer_to_each_other() -> None:
    nodes = [Branch()]
    for number in range(1, 1000):
        nodes.append(Branch(nodes[(number - 1) // 2]))
    nodes[-1].guard = threading.Lock()  # type: ignore[attr-defined]
    Branch.asked = 0
    with pytest.raises(WorkflowError) as caught:
        actors._copied({"first": nodes[3], "size": 1000}, "the tree")
    text = str(caught.value)
    path = re.match(r"the tree cannot be copied: \['first'\](\S+) is a _thread\.lock: ", text)
    assert path is not None and path[1].count(".children") + path[1].count(".parents") == 11
    assert path[1].endswith(".guard") and len(text) < 400
    assert Branch.asked <= 3 * len(nodes)  # by deepcopy, by pickle, and for the error


class Endless:
    """Is of more parts the longer one looks."""

    made = 0

    def __init__(self) -> None:
        Endless.made += 1

    def __getstate__(self) -> dict[str, Any]:
        return {"one": Endless(), "other": Endless()}


@pytest.mark.parametrize("parts_max", [50, 100_000])
def test_a_part_that_cannot_be_found_is_not_looked_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, parts_max: int
) -> None:
    monkeypatch.setattr(actors, "_PARTS_MAX", parts_max)
    found: Any = threading.Lock()
    for _ in range(300):
        found = [found]
    for value in (found, Endless()):
        with pytest.raises(WorkflowError) as caught:
            actors._copied(value, "the state")
        text = str(caught.value)
        assert "which part of it that is could not be found" in text and len(text) < 400
    before = Endless.made
    assert actors._culprit(Endless()) is None
    assert Endless.made - before <= parts_max + 1


class Careful:
    """Can be copied, as it knows how, and not be written."""

    def __deepcopy__(self, memo: Any) -> Careful:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("not to be written")


class Slots:
    __slots__ = ("guard", "more")

    def __init__(self, guard: Any) -> None:
        self.guard = guard


class Mine(dict[str, Any]):
    pass


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"one": Careful(), "two": Slots(threading.Lock())}, "['two'].guard"),
        ([Tensor(1), Careful()], "[1]"),
        (Mine(a=np.array([1, threading.Lock()], object)), "['a'][1]"),
        ({"f": lambda: 3, "in": {1: (x for x in ())}}, "['in'][1]"),
        (threading.Lock(), "it"),
        ({"k" * 1000: threading.Lock()}, "['kkkkkkkkkkkk...kkkkkkkkkkkkk']"),
    ],
    ids=["slots", "as a last resort", "array of objects", "function", "itself", "long key"],
)
def test_where_it_is_that_nothing_can_copy(value: Any, path: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        actors._copied(value, "this")
    assert str(caught.value).startswith(f"this cannot be copied: {path} is a ")


def test_calls_that_are_made_again_are_given_what_they_were_given(tmp_path: Path) -> None:
    rare = Sharer.options(every=5, deterministic=True, retries=0)
    node = rare.call(rare.call(chain(rare, 1)[0], "take", [5]), "add", 1)
    version = Workflow("w", tmp_path).run(node).actor
    assert version.state == [100]
    assert version.calls == (("add", (1,), {}), ("take", ([5],), {}), ("add", (1,), {}))
    for number in range(2):
        actors._LIVE._objects.clear()
        again = Workflow(f"more{number}", tmp_path).run(rare.call(version, "add", 1))
        assert again.value == 7 and again.actor.calls[:3] == version.calls


def test_an_object_of_an_attempt_that_does_not_count_is_not_used(tmp_path: Path) -> None:
    version = Workflow("w", tmp_path).run(Adder.bind(5))
    thing, known = actors._LIVE._objects[version.name]
    thing.total = 7
    actors._LIVE._objects[version.name] = thing, "another"
    assert Workflow("more", tmp_path).run(Adder.call(version, "add", 1)).value == 6
    assert known != "another"


def test_what_is_refused_of_actors() -> None:
    with pytest.raises(TypeError, match="actor must be given a class, not 3"):
        actor(3)
    with pytest.raises(TypeError, match="actor Path has no method checkpoint"):
        actor(Path)
    with pytest.raises(ValueError, match="every of actor Adder must be 1 or more, not 0"):
        Adder.options(every=0)
    with pytest.raises(ValueError, match="annotate it with deterministic=True"):
        Adder.options(every=2)
    with pytest.raises(ValueError, match="every=2 makes lost calls again, .* and tell has a param"):
        actor(deterministic=True, every=2)(Teller)
    with pytest.raises(TypeError, match="actor Adder has no method 'take'"):
        Adder.call(Adder.bind(1), "take")
    with pytest.raises(TypeError, match=r"Adder\.add is called on 7, which is no actor"):
        Adder.call(7, "add", 1)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"on": -1}, "on of task must be 'any' or a rank, not -1"),
        ({"on": True}, "on of task must be 'any' or a rank, not True"),
        ({"on": 1, "ranks": "all"}, "ranks contradicts on=1"),
        ({"on": 1, "external": True}, "external contradicts on=1"),
        ({"on": "any", "rollback": print}, "rollback contradicts on='any'"),
        ({"on": 1, "timeout_s": 1.0}, "timeout_s contradicts on=1"),
    ],
)
def test_what_is_refused_of_places(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        task(**options)


def test_references_want_ranks(tmp_path: Path) -> None:
    with pytest.raises(TaskFailedError, match="give Workflow a communicator") as caught:
        Workflow("w", tmp_path).run(puts.bind())
    assert isinstance(caught.value.__cause__, WorkflowError)


def test_refs_are_found_in_what_pickle_goes_through() -> None:
    one, two = ObjectRef("one"), ObjectRef("two")
    version = actors.Actor(("m", "n", None), 0, "x", 1, {"in": [one]})
    assert refs_in(Called([two], version)) == [two, one]
    assert refs_in([one, one]) == [one] and refs_in(3) == [] and refs_in(lambda: one) == []
    assert arrays_for({"a": [one, (two,)]}, {key_of(one): 1}) == {"a": [1, (two,)]}  # type: ignore
