"""References in workflows, over a memory that loses what it is told to; gangs."""

from __future__ import annotations

import collections
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import (
    EffectUnknownError,
    TaskFailedError,
    TransferTimeoutError,
    WorkflowError,
)
from hopcoll.objects import ObjectRef
from recovery.workflows import TaskContext, Workflow, loop, task
from recovery.workflows.attempts import Attempts
from recovery.workflows.board import Slot
from recovery.workflows.checks import check_graph
from recovery.workflows.engine import Engine
from recovery.workflows.graph import Graph
from recovery.workflows.ledger import COMING, FILE, LIVE, NOWHERE, Done, Settled, exposed
from recovery.workflows.lineage import Lineage
from recovery.workflows.post import RankGoneError
from recovery.workflows.references import References, key_of
from recovery.workflows.values import Packed
from tests.crash import workflow_memory
from tests.crash.workflow_memory import Memory, OneRank
from tests.crash.workflow_mutants import MUTANTS

COUNTS: collections.Counter[str] = collections.Counter()
LOSE: list[Any] = []
CAME = threading.Event()
_PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow_memory, "_LOSS", 0.0)
    COUNTS.clear()
    LOSE.clear()
    CAME.clear()


@pytest.fixture
def memory() -> Memory:
    return Memory(random.Random(1))


def workflow_over(memory: Memory, store: Path, kind: type[OneRank] = OneRank) -> Workflow:
    workflow = Workflow("w", store)
    workflow._gang = kind(workflow, memory)
    workflow._gang._unsent = []
    return workflow


@task(deterministic=True, checkpoint="none", on=1)
def make(number: int, ctx: TaskContext) -> Any:
    COUNTS["make"] += 1
    return ctx.put(np.full(1000, float(number)))


@task(checkpoint="sync")
def passes(ref: Any, *before: Any, ctx: TaskContext) -> Any:
    COUNTS["passes"] += 1
    while LOSE:
        LOSE.pop()()
    return {"ref": ref, "data": np.zeros(20_000)}


effect = passes.options(external=True, idempotency_key=True, checkpoint="auto")


@pytest.mark.parametrize("kind", [passes, effect])
def test_a_lost_object_of_a_value_that_is_written_is_made_again(
    memory: Memory, tmp_path: Path, kind: Any
) -> None:
    LOSE.append(lambda: memory.lose(1))
    with workflow_over(memory, tmp_path) as workflow:
        value = workflow.run(kind.bind(make.bind(3)))
        assert memory.get(value["ref"]).sum() == 3000.0
    assert COUNTS == {"make": 2, "passes": 1}


def test_a_value_is_written_when_a_lost_object_of_it_was_made_again(
    memory: Memory, tmp_path: Path
) -> None:
    """An effect waits for the file of what was made once and only carries the object."""
    LOSE.append(lambda: memory.lose(1))
    node = effect.bind(None, passes.options(checkpoint="async").bind(make.bind(3)))
    with workflow_over(memory, tmp_path) as workflow:
        workflow.run(node)
        ledger, _ = workflow._folder.look()
    assert COUNTS == {"make": 2, "passes": 2}
    assert ledger.done("passes").place == FILE and ledger.done("passes").attempt == 1


def test_a_value_that_is_taken_for_at_hand_without_its_objects_is_noticed(
    memory: Memory, tmp_path: Path
) -> None:
    """Nobody makes them then, and all begins anew for the effect."""
    with (
        pytest.raises(AssertionError, match="'passes': 3"),
        MUTANTS["what_only_carries_a_ref_is_at_hand_without_its_maker"](),
    ):
        test_a_value_is_written_when_a_lost_object_of_it_was_made_again(memory, tmp_path)


def test_values_with_objects_may_have_equal_sizes(memory: Memory, tmp_path: Path) -> None:
    """What was written with objects is read-only, and no memory for the next value."""
    ref = make.bind(3)
    with workflow_over(memory, tmp_path) as workflow:
        value = workflow.run(passes.bind(ref, passes.bind(ref, passes.bind(ref))))
        assert memory.get(value["ref"]).sum() == 3000.0
    assert COUNTS == {"make": 1, "passes": 3}


# Another session


@task(deterministic=True, checkpoint="none")
def see(ref: Any, number: int, ctx: TaskContext) -> float:
    COUNTS["see"] += 1
    if number == 1 and LOSE:
        LOSE.pop()()
    return float(ctx.get(ref)[0])


@task(checkpoint="async")
def learn(seen: float, ctx: TaskContext) -> Any:
    COUNTS["learn"] += 1
    return ctx.put(np.full(1000, seen + 1.0))


@task(deterministic=True)
def turn(state: Any, number: int) -> Any:
    return learn.bind(see.bind(state, number))


@task(deterministic=True)
def seen(ref: Any, ctx: TaskContext) -> float:
    return float(ctx.get(ref)[0])


def test_a_loop_goes_on_in_another_session_without_what_was_not_written(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second turn went on to a graph with the first state's ref, whose file never came."""

    def stop() -> None:
        raise ArithmeticError("the job ends")

    node = seen.bind(loop(turn, make.bind(3), 3))
    LOSE.append(stop)
    with monkeypatch.context() as patch, workflow_over(memory, tmp_path) as workflow:
        patch.setattr(Attempts, "write", lambda *what: None)
        with pytest.raises(TaskFailedError, match="the job ends"):
            workflow.run(node)
        ledger, _ = workflow._folder.look()
    assert ledger.done("turn[0]/learn").place == COMING and ledger.done("turn[1]").place == LIVE
    assert COUNTS == {"make": 1, "see": 2, "learn": 1}
    with workflow_over(Memory(random.Random(2)), tmp_path) as workflow:
        assert workflow.run(node) == 6.0
    assert COUNTS["learn"] == 4


@task(deterministic=True, checkpoint="none")
def twice(ref: Any, number: int, ctx: TaskContext) -> Any:
    COUNTS["twice"] += 1
    return ctx.put(2 * ctx.get(ref))


@task(deterministic=True, checkpoint="none")
def go_on(ref: Any) -> Any:
    return twice.bind(ref, 0)


@pytest.mark.parametrize("kind", ["loop", "graph"])
def test_who_leads_next_has_objects_of_loops_and_of_what_tasks_went_on_to_made_again(
    memory: Memory, tmp_path: Path, kind: str
) -> None:
    """Their values are those of other tasks."""

    def stop() -> None:
        raise ArithmeticError("who leads is killed")

    made = make.bind(1)
    node = see.bind(loop(twice, made, 2) if kind == "loop" else go_on.bind(made), 1)
    LOSE.append(stop)
    with workflow_over(memory, tmp_path) as workflow:
        with pytest.raises(TaskFailedError, match="is killed"):
            workflow.run(node)
    memory.lose(0)
    with workflow_over(memory, tmp_path) as workflow:
        assert workflow.run(node) == (4.0 if kind == "loop" else 2.0)
    assert COUNTS["make"] == 2


@task(checkpoint="async")
def number(ctx: TaskContext) -> Any:
    return {"number": 2, "ref": ctx.put(np.ones(3))}


@task(deterministic=True, checkpoint="none")
def makes(given: Any, ctx: TaskContext) -> Any:
    return ctx.put(np.full(3, float(given["number"])))


@task(deterministic=True, checkpoint="none")
def looks_on(ref: Any, turn: int) -> Any:
    return see.bind(ref, 1)


@task(checkpoint="sync")
def keeps(given: Any) -> Any:
    return {"number": given["number"]}


@task(external=True, idempotency_key=True)
def announces(value: Any) -> Any:
    CAME.set()
    return value["number"]


def test_an_effect_waits_for_what_a_ref_in_the_graph_of_a_turn_may_need_again(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost with its file still to come, `number` would be another one, also for the effect."""
    go, write = threading.Event(), Attempts.write
    early: list[bool] = []

    def late(*what: Any) -> None:
        go.wait(_PATIENCE_S)
        write(*what)

    def look() -> None:
        early.append(CAME.wait(0.5))
        go.set()

    LOSE.append(look)
    monkeypatch.setattr(Attempts, "write", late)
    drawn = number.bind()
    effect = announces.bind(keeps.bind(drawn))
    with workflow_over(memory, tmp_path) as workflow:
        assert workflow.run(both.bind(loop(looks_on, makes.bind(drawn), 1), effect)) == [2.0, 2]
    assert early == [False]


def test_a_value_that_who_led_before_was_to_write_is_made_anew_for_an_effect(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody needs it any more: what was made from it is there, in the memory of a rank."""

    def stop() -> None:
        raise ArithmeticError("who leads is killed")

    drawn = number.bind()
    kept = keeps.bind(drawn)
    look = see.bind(makes.options(on=1).bind(drawn), 1).after(kept)
    node = both.bind(look, announces.bind(kept).after(look))
    LOSE.append(stop)
    with monkeypatch.context() as patch, workflow_over(memory, tmp_path) as workflow:
        patch.setattr(Attempts, "write", lambda *what: None)
        with pytest.raises(TaskFailedError, match="is killed"):
            workflow.run(node)
        ledger, _ = workflow._folder.look()
    assert ledger.done("number").place == COMING and ledger.done("makes").place == LIVE
    with workflow_over(memory, tmp_path) as workflow:
        assert workflow.run(node) == [2.0, 2]
        ledger, _ = workflow._folder.look()
    assert ledger.done("number").attempt == 2 and ledger.done("announces").attempt == 1


@task(deterministic=True)
def goes_on_with_its_own(ctx: TaskContext) -> Any:
    return see.bind(ctx.put(np.ones(3)), 0)


@task(deterministic=True)
def goes_on_twice(ref: Any, times: int) -> Any:
    return goes_on_twice.bind(ref, times - 1) if times else see.bind(ref, 0)


def test_refs_that_a_graph_may_not_have(memory: Memory, tmp_path: Path) -> None:
    with workflow_over(memory, tmp_path / "own") as workflow:
        with pytest.raises(WorkflowError, match="graph with a ref of its own in it.* or before"):
            workflow.run(goes_on_with_its_own.bind())
    with workflow_over(memory, tmp_path / "once") as workflow:
        assert workflow.run(goes_on_twice.bind(make.bind(3), 0)) == 3.0
    text = "whose graph goes on from that of goes_on_twice, .*of who made them nothing is kept: use"
    with workflow_over(memory, tmp_path / "twice") as workflow:
        with pytest.raises(WorkflowError, match=text):
            workflow.run(goes_on_twice.bind(make.bind(3), 2))


# Effects


def is_done(ref: Any, ctx: TaskContext) -> bool:
    COUNTS["asked"] += 1
    return COUNTS["sent"] > 0


@task(external=True, idempotency_key=True)
def sends(ref: Any, ctx: TaskContext) -> float:
    COUNTS["called"] += 1
    while LOSE:
        LOSE.pop()()
    found = float(ctx.get(ref)[0])
    COUNTS["sent"] += 1
    return found


asks = sends.options(idempotency_key=False, verify=is_done)
blind = sends.options(idempotency_key=False)


@pytest.mark.parametrize("kind", [sends, asks, blind])
def test_the_object_that_an_effect_is_called_with_is_made_again_beside_it(
    memory: Memory, tmp_path: Path, kind: Any
) -> None:
    LOSE.append(lambda: memory.lose(1))
    with workflow_over(memory, tmp_path) as workflow:
        assert workflow.run(kind.bind(make.bind(3))) == 3.0
    assert COUNTS == {"make": 2, "called": 1, "sent": 1}


@pytest.mark.parametrize("kind", [sends, asks])
def test_an_effect_that_loses_what_it_was_called_with_begins_again(
    memory: Memory, tmp_path: Path, kind: Any
) -> None:
    """What makes the object again is a turn of a loop: all that runs ends first."""
    LOSE.extend((lambda: memory.lose(0), lambda: memory.lose(1)))
    with workflow_over(memory, tmp_path) as workflow:
        assert workflow.run(kind.bind(loop(twice, make.bind(3), 1))) == 6.0
        ledger, _ = workflow._folder.look()
    assert COUNTS["sent"] == 1 and COUNTS["called"] == 2 and COUNTS["asked"] == (kind is asks)


def test_an_effect_that_loses_what_it_was_called_with_may_be_unknown(
    memory: Memory, tmp_path: Path
) -> None:
    LOSE.extend((lambda: memory.lose(0), lambda: memory.lose(1)))
    with workflow_over(memory, tmp_path) as workflow:
        with pytest.raises(EffectUnknownError, match=r"sends raised .*VoidError: .* is lost"):
            workflow.run(blind.bind(loop(twice, make.bind(3), 1)))


def test_an_effect_that_was_announced_and_not_called_yet_is_known_not_to_be_done(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All begins anew between its intent and its call."""
    after_flush = Engine.after_flush
    begun: list[Slot] = []

    def then_anew(self: Engine, seq: int, slot: Slot | None, phase: int) -> None:
        after_flush(self, seq, slot, phase)
        if slot is not None and slot.announced and not begun:
            begun.append(slot)
            self.begin_anew()

    monkeypatch.setattr(Engine, "after_flush", then_anew)
    with workflow_over(memory, tmp_path) as workflow:
        assert workflow.run(blind.bind(make.bind(3))) == 3.0
        ledger, _ = workflow._folder.look()
    assert [slot.id for slot in begun] == ["sends"] and ledger.done("sends").attempt == 2
    assert COUNTS == {"make": 1, "called": 1, "sent": 1}


# The objects, as an attempt has them


class Attempt(References):
    """With inputs that rank 1 has, and that are put again when they are lost."""

    def __init__(self, memory: Memory) -> None:
        self.rebuilt: list[str] = []
        workflow_memory._HERE.rank = 1
        self.inputs = [memory.put(np.full(4, float(i)), ObjectRef(f"in {i}")) for i in range(3)]
        workflow_memory._HERE.rank = 0

        def rebuild(keys: list[str], era: int) -> int:
            self.rebuilt += keys
            for number, ref in enumerate(self.inputs):
                if key_of(ref) in keys:
                    memory.put(np.full(4, float(number)), ref)
            return era + 1

        super().__init__(memory, 0, "name", rebuild, memory.delete)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [(0,), (0, 1)])
def test_a_lost_reduction_of_a_reduction_is_made_again(
    memory: Memory, ranks: tuple[int, ...]
) -> None:
    attempt = Attempt(memory)
    one, two, three = attempt.inputs
    inner = attempt.reduce([one, two])
    for rank in ranks:
        memory.lose(rank)
    outer = attempt.reduce([inner, three])
    assert attempt.get(outer).tolist() == [3.0] * 4
    lost = set(attempt.rebuilt)
    assert lost == ({key_of(ref) for ref in attempt.inputs} if 1 in ranks else set())
    assert attempt.void is None


@pytest.mark.parametrize("count", [2, 3, None])
def test_what_came_of_the_first_of_many_is_another_next_time(
    memory: Memory, count: int | None
) -> None:
    attempt = Attempt(memory)
    total = float(attempt.get(attempt.reduce(attempt.inputs, count=count)).sum())
    assert attempt.finish(total)[1].new == (count == 2)


def test_a_writer_waits_for_an_object_until_the_workflow_ends() -> None:
    calls = []

    def get(ref: ObjectRef, timeout_s: float) -> np.ndarray:
        calls.append(timeout_s)
        if len(calls) in (1, 3, 4):
            raise TransferTimeoutError("late", timeout_s)
        return np.ones(3)

    engine: Any = SimpleNamespace(
        gang=SimpleNamespace(objects=SimpleNamespace(get=get)), cancelled=threading.Event()
    )
    packed = Packed(b"", [], [ObjectRef("one")])
    assert Lineage(engine).with_objects(packed).data and len(calls) == 2
    engine.cancelled.set()
    with pytest.raises(TransferTimeoutError):
        Lineage(engine).with_objects(packed)


# Gangs


@task(ranks="all", deterministic=True, checkpoint="none")
def gang(how: dict[str, Any], ctx: TaskContext) -> Any:
    return 7


@task(external=True, idempotency_key=True)
def publish(value: Any) -> Any:
    return value


def test_a_gang_does_not_last_until_it_is_durable(memory: Memory, tmp_path: Path) -> None:
    def of(head: dict[str, Any]) -> set[str]:
        done = {"gang": Done(1, {}, None, True, NOWHERE, 0, head, b"")}
        inputs = {"effect": ["gang"], "gang": []}
        users = {"effect": [], "gang": ["effect"]}
        return exposed(
            "effect", inputs.__getitem__, users.__getitem__, done.get, Settled(), "effect"
        )

    assert of({}) == set() and of({"w": [0, 1]}) == {"gang"}
    node = publish.bind(gang.bind({"loses": False}))
    check_graph(Graph.of(node))
    with workflow_over(memory, tmp_path) as workflow:
        assert workflow.run(node) == 7
        ledger, _ = workflow._folder.look()
    done = ledger.done("gang")
    assert done is not None and done.durable and done.deterministic and not done.lasting


class Waiting(OneRank):
    """Its gang waits for what another rank makes, and that is gone when it is first asked."""

    def call(self, task_: Any, arguments: Any, keywords: Any, context: TaskContext) -> Any:
        assert CAME.wait(_PATIENCE_S), "nobody ran what the gang waits for"
        return super().call(task_, arguments, keywords, context)

    def dispatch(
        self, rank: int, call: bytes, context: TaskContext, fixed: bool, answered: Any
    ) -> None:
        COUNTS["dispatch"] += 1
        if COUNTS["dispatch"] == 1:
            answered(None, RankGoneError(f"rank {rank} is gone"))
        else:
            super().dispatch(rank, call, context, fixed, answered)


@task
def comes() -> int:
    COUNTS["comes"] += 1
    CAME.set()
    return 1


@task(retries=1, backoff_s=0.01)
def comes_late() -> int:
    COUNTS["comes"] += 1
    if COUNTS["comes"] == 1:
        raise ArithmeticError("once")
    CAME.set()
    return 1


@task
def both(*values: Any) -> Any:
    return list(values)


@pytest.mark.parametrize("kind", [comes.options(on=1), comes_late])
def test_what_a_gang_waits_for_begins_again_beside_it(
    memory: Memory, tmp_path: Path, kind: Any
) -> None:
    node = both.bind(gang.bind({"loses": False}), kind.bind())
    with workflow_over(memory, tmp_path, Waiting) as workflow:
        assert workflow.run(node) == [7, 1]
