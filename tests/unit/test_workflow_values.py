"""Values, loops and continuations: what is kept, where, for how long, and changed by nobody."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import CheckpointCorruptError, TaskFailedError, WorkflowError
from recovery.disk import Disk
from recovery.journal import Journal
from recovery.workflows import Done, Workflow, attempts, engine, event, loop
from recovery.workflows import values as values_module
from recovery.workflows.values import fingerprint, freeze, pack, read, unpack, write
from tests import workflow_tasks as tasks
from tests.workflow_tasks import CALLS, SET, add, give, one, token

pytestmark = pytest.mark.usefixtures("fresh_tasks")

Run = Callable[..., Any]


def files(store: Path, name: str = "w") -> list[str]:
    folder = store / name / "values"
    return sorted(os.listdir(folder)) if folder.exists() else []


def records(store: Path) -> list[str]:
    return [record.kind for record in Journal.read(store / "w" / "journal").records]


# Packed


@pytest.mark.parametrize(
    "value",
    [
        None, 3, "x" * 100_000, b"y" * 100_000, np.arange(3), np.arange(100_000.0),
        {"a": [np.ones(50_000), np.zeros(0)], "b": (np.arange(60_000)[::2], "t")},
        np.asfortranarray(np.arange(40_000.0).reshape(200, 200)), bytearray(70_000),
    ],
)  # fmt: skip
def test_a_value_is_what_it_was(tmp_path: Path, value: Any) -> None:
    packed = pack(value, "it")
    large = packed.nbytes > values_module.INLINE_BYTES_MAX
    assert packed.is_small != large
    if packed.is_small:
        found = unpack(packed.data)
    else:
        found = read(tmp_path, "v.h5", write(Disk(), tmp_path / "v.h5", packed), "it")
    assert fingerprint(found) == fingerprint(value)


def test_nothing_is_shared_with_a_packed_value() -> None:
    array = np.zeros(100_000)
    packed = pack(array, "it")
    array[:] = 7
    assert not any(np.frombuffer(one).any() for one in packed.buffers)


def test_a_damaged_file_is_an_error(run: Run, store: Path) -> None:
    array = tasks.array.options(checkpoint="sync").bind(100_000)
    node = tasks.total.bind(array).after(tasks.fails.bind(1))
    with pytest.raises(TaskFailedError):
        run(node, workers=1)
    path = store / "w" / "values" / files(store)[0]
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match="values"):
        run(node)


def test_hashes_tell_what_a_value_is() -> None:
    def with_method(x: int) -> Any:
        return Done(x)

    alike = [
        ([1, [2]], [1, [2]]), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({3, 1, 2}, {2, 1, 3}),
        (np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3)), (with_method(1), with_method(1)),
        (np.arange(6)[::2], np.array([0, 2, 4])), (float("nan"), float("nan")),
    ]  # fmt: skip
    for a, b in alike:
        assert fingerprint(a) == fingerprint(b)
    different = [
        1, 1.0, True, "1", b"1", (1,), [1], {1}, frozenset({1}), {1: 1}, None, 1j, -0.0, 0.0,
        np.ones(1), np.ones(1, "f4"), np.ones((1, 1)), np.float64(1), with_method(1),
        with_method(2), int, float, len, add.function, np.add, np.ma.array([1.0], mask=[True]),
        np.ma.array([1.0], mask=[False]), np.array(["a", None], object), [].append, [1].append,
        bytearray(b"1"), range(1),
    ]  # fmt: skip
    assert len({fingerprint(value) for value in different}) == len(different)
    deep: list[Any] = []
    deep.append(deep)
    with pytest.raises(WorkflowError, match="nested too deeply to be hashed, or contains itself"):
        fingerprint(deep)
    with pytest.raises(WorkflowError, match="of type _thread.lock cannot be hashed"):
        fingerprint(threading.Lock())


def test_arrays_are_frozen_and_the_callers_are_not() -> None:
    array = np.zeros(3)
    value = {"a": [array, (array, 1)], "b": "text"}
    frozen = freeze(value)
    assert array.flags.writeable and not frozen["a"][0].flags.writeable
    assert not frozen["a"][1][0].flags.writeable and np.shares_memory(frozen["a"][0], array)
    assert freeze(frozen) is frozen


# What tasks must not change


def test_a_task_cannot_change_its_arguments(run: Run) -> None:
    with pytest.raises(TaskFailedError, match="ValueError: assignment destination is read-only"):
        run(tasks.changes_argument.bind(tasks.array.bind(3)))
    mine = {"ones": np.ones(3)}
    with pytest.raises(TaskFailedError, match="read-only"):
        run(tasks.changes_argument.bind(mine), "other")
    assert mine["ones"].flags.writeable and mine["ones"].sum() == 3


def test_outputs_cannot_be_changed_either(run: Run) -> None:
    node = give.bind({"x": np.zeros(3)})
    for _ in range(2):
        assert not run(node)["x"].flags.writeable


def test_values_that_nobody_uses_any_more_are_let_go(run: Run) -> None:
    alive: list[int] = []

    def count(task: str, reason: str, left: int) -> None:
        gc.collect()
        owner = SET["engine"]
        alive.append(sum(slot.value is not None for slot in owner.board.slots.values()))

    make = engine.Engine.__init__

    def keep(self: Any, *how: Any, **more: Any) -> None:
        make(self, *how, **more)
        SET["engine"] = self

    node = give.bind(0)
    for _ in range(20):
        node = add.options(checkpoint="none").bind(node, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, "__init__", keep)
        assert run(node, progress=count) == 20
    assert max(alive) <= 2


# How they are kept


def test_auto_keeps_what_is_dear_and_what_would_be_another(
    run: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SET["now_s"] = 0.0
    monkeypatch.setattr(attempts, "time", SimpleNamespace(perf_counter=lambda: SET["now_s"]))
    cheap = give.options(deterministic=True).bind(3)
    other = token.bind()
    run(tasks.join.bind(cheap, other, tasks.dear.bind()), workers=1)
    heads = {
        record.head["t"]: record.head["st"]
        for record in Journal.read(store / "w" / "journal").records
        if record.kind == "done"
    }
    assert heads == {"give": 0, "token": 1, "dear": 1, "join": 1}


@pytest.mark.parametrize("mode", ["sync", "async", "none"])
def test_large_values(run: Run, store: Path, mode: str) -> None:
    array = tasks.array.options(checkpoint=mode).bind(100_000)
    node = tasks.total.bind(array).after(tasks.fails.bind(1))
    with pytest.raises(TaskFailedError):
        run(tasks.join.bind(array, node), workers=1)
    assert len(files(store)) in {"sync": (1,), "async": (0, 1), "none": (0,)}[mode]
    assert run(None)[1] == 100_000
    assert CALLS.count("array") in {"sync": (1,), "async": (1, 2), "none": (2,)}[mode]


def test_a_large_output_is_a_file(run: Run, store: Path) -> None:
    assert run(tasks.array.options(checkpoint="none").bind(100_000))["ones"].sum() == 100_000
    assert run(tasks.array.options(checkpoint="none").bind(100_000))["ones"].sum() == 100_000
    assert CALLS == ["array"] and len(files(store)) == 1


def test_large_arguments_have_a_file(run: Run, store: Path) -> None:
    big = np.random.default_rng(0).random(300_000)
    assert run(tasks.total.bind({"ones": big})) == pytest.approx(big.sum())
    assert len(files(store)) == 1
    put = tasks.put.options(checkpoint="sync").bind("x", big)
    SET["put"] = "x"
    with pytest.raises(TaskFailedError):
        run(put, "other")
    SET.pop("put")
    assert run(put, "other") == "x"


# Loops


def test_loops(run: Run) -> None:
    assert run(loop(tasks.step, give.bind(5), 4)) == 11
    assert run(loop(tasks.step, 7, 0), "none") == 7
    assert run(loop(tasks.step, give.bind(7), 0), "none2") == 7
    assert run(add.bind(loop(tasks.step, give.bind(7), 0), 1), "none3") == 8
    assert run(loop(tasks.step_until, 1, 100), "stop") == 11
    assert run(loop(tasks.step_in_parts, 0, 5, every=2), "parts") == 10
    assert run(loop(tasks.step.options(checkpoint="none"), 0, 5), "lost") == 10
    assert run(tasks.chain_of.bind(4), "inside") == 6
    assert run(loop(tasks.step_until.options(checkpoint="none"), 1, 100, every=9), "rare") == 11


def test_a_loop_goes_on_from_the_newest_state_that_was_kept(run: Run, store: Path) -> None:
    SET["fails at"] = 7
    body = tasks.step_of_arrays.options(checkpoint="sync")
    node = loop(body, give.options(checkpoint="none").bind(np.zeros(20_000)), 10, every=3)
    with pytest.raises(TaskFailedError, match=r"step_of_arrays\[7\] failed"):
        run(node)
    assert len(files(store)) == 1
    del SET["fails at"]
    CALLS.clear()
    assert run(node)[0] == 10
    # From the state after 6; what it began with is lost, and nobody needs it.
    assert CALLS == ["step_of_arrays"] * 4
    assert SET["workflow"].ran[0] == (
        "step_of_arrays[6]", "its value was not kept, and step_of_arrays[7] needs it",
    )  # fmt: skip
    assert len(files(store)) == 1  # those before were removed


def test_a_long_loop_in_bounded_memory_and_journal(run: Run, store: Path) -> None:
    sizes: list[int] = []

    def watch(task: str, reason: str, left: int) -> None:
        if task.endswith("99]"):
            journal = store / "w" / "journal"
            sizes.append(sum(entry.stat().st_size for entry in journal.glob("*.seg")))

    node = loop(tasks.step.options(checkpoint="async"), 0, 10_000, every=50)
    assert run(node, workers=1, progress=watch) == sum(range(10_000))
    assert max(sizes) < 4 << 20
    assert len(records(store)) < 5_000 and len(CALLS) == 10_000
    assert Workflow("w", store).status().done <= 60


def test_files_of_a_long_loop_are_removed(run: Run, store: Path) -> None:
    seen: list[int] = []
    node = loop(
        tasks.step_of_arrays.options(checkpoint="async"), np.zeros(20_000), 40, every=2
    )
    run(node, progress=lambda *how: seen.append(len(files(store))))
    assert len(files(store)) == 1 and max(seen) <= 21


# Continuations


def test_continuations(run: Run) -> None:
    assert run(tasks.count_down.bind(5)) == 15
    assert run(tasks.in_parts.bind(3), "parts") == 8
    assert run(add.bind(tasks.in_parts.bind(2), tasks.count_down.bind(3)), "both") == 10


def test_a_workflow_that_calls_itself_two_thousand_times(run: Run, store: Path) -> None:
    most: list[int] = []

    def watch(task: str, reason: str, left: int) -> None:
        most.append(len(SET["engine"].board.slots))

    make = engine.Engine.__init__

    def keep(self: Any, *how: Any, **more: Any) -> None:
        make(self, *how, **more)
        SET["engine"] = self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, "__init__", keep)
        assert run(tasks.count_down.bind(2000), workers=1, progress=watch) == 2001 * 1000
    assert max(most, default=0) <= 4 and len(SET["engine"].board.slots) <= 4
    size = sum(one.stat().st_size for one in (store / "w" / "journal").glob("*.seg"))
    assert size < 4 << 20
    CALLS.clear()
    assert run(tasks.count_down.bind(2000)) == 2001 * 1000 and CALLS == []


def test_a_continuation_goes_on_where_it_was(run: Run, store: Path) -> None:
    one = tasks.count_down.bind(3)
    # What is under way elsewhere when a task fails is cut off, so this one waits for all.
    node = add.bind(one, tasks.fails.bind(1).after(tasks.count_down.bind(2), one))
    with pytest.raises(TaskFailedError):
        run(node)
    CALLS.clear()
    with pytest.raises(TaskFailedError):  # "well" is no number
        run(node)
    assert "count_down" not in CALLS


def test_large_graphs_of_generations_are_removed(run: Run, store: Path) -> None:
    text = "x" * 1_200_000
    node = tasks.count_down.options(checkpoint="sync").bind(6, 0)
    assert run(node) == 21
    big = tasks.listens.bind(3, (text,))
    with Workflow("big", store) as workflow:
        future = workflow.run_async(big)
        while not (store / "big" / "journal").exists():
            threading.Event().wait(0.01)
        for number in range(3):
            while True:
                try:
                    workflow.send("word", number)
                    break
                except WorkflowError:
                    threading.Event().wait(0.01)
        assert future.result(60) == (text, 0, 1, 2)
    assert len(files(store, "big")) <= 4


# Compaction


def test_events_are_not_given_twice_after_a_compaction(
    run: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who heard them are no more, and the journal has let go of them."""
    monkeypatch.setattr(engine, "_COMPACT_RECORDS", 10)
    node = tasks.join.bind(tasks.listens.bind(8), tasks.fails.bind(0))
    with Workflow("w", store) as workflow:
        future = workflow.run_async(node)
        sent = 0
        while sent < 8:
            try:
                workflow.send("word", sent, str(sent))
                sent += 1
            except WorkflowError:
                threading.Event().wait(0.01)
        assert future.result(60)[0] == tuple(range(8))
    ledger, _ = workflow._folder.look()
    assert len(ledger.events) == 8
    assert workflow.send("word", 0, "0") is False


def test_a_compaction_keeps_open_intents(
    run: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_COMPACT_RECORDS", 5)
    waits = tasks.waits.options(external=True, idempotency_key=True)
    node = tasks.join.bind(waits.bind(), loop(tasks.step, 0, 60), tasks.fails.bind(1))
    with Workflow("w", store, workers=3) as workflow:
        future = workflow.run_async(node)
        while "waits" not in CALLS or CALLS.count("step") < 60:
            if future.done():
                break
            threading.Event().wait(0.01)
        assert "begin" in records(store)
        SET["waits"].set()
        with pytest.raises(TaskFailedError):
            future.result(60)
    assert run(node) == ("waited", sum(range(60)), "well")
    assert CALLS.count("waits") == 1


def test_an_event_that_came_before(run: Run, store: Path) -> None:
    with pytest.raises(TaskFailedError):
        run(tasks.join.bind(event("word"), tasks.fails.bind(1)))
    workflow = Workflow("w", store)
    assert workflow.send("word", {"x": 1}, "id 7") and workflow.send("other", 2)
    assert not workflow.send("word", {"x": 2}, "id 7")
    assert run(None) == ({"x": 1}, "well")
    with pytest.raises(WorkflowError, match="the event .* has .* bytes, and 1048576 is the most"):
        workflow.send("word", "x" * 2_000_000)
    with pytest.raises(WorkflowError, match="the event x cannot be stored: TypeError"):
        workflow.send("word", threading.Lock(), "x")
    with pytest.raises(ValueError, match="key of an event must be a text, not 3"):
        workflow.send(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="event_id must be a text, not 7"):
        workflow.send("word", None, 7)  # type: ignore[arg-type]


def test_an_event_stays_with_the_task_that_was_given_it(run: Run, store: Path) -> None:
    """Also where the task has to begin anew: the event came once."""
    lost = token.options(checkpoint="none").bind()
    waits = event("word").after(lost)
    kept = give.options(checkpoint="sync").bind(waits)
    node = tasks.join.bind(kept, lost, tasks.fails.bind(1).after(kept))
    with Workflow("w", store) as workflow:
        future = workflow.run_async(tasks.join.bind(one.bind(), node.after(waits)))
        while not future.done():
            try:
                workflow.send("word", "once", "1")
            except WorkflowError:
                pass
            threading.Event().wait(0.01)
        with pytest.raises(TaskFailedError):
            future.result()
    found = run(None)
    assert found[1][0] == "once" and found[1][2] == "well"


def test_a_wait_for_a_gang_that_is_over_at_once_ends(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SimpleQueue takes what is left of its timeout, and is less than nothing, for for ever."""
    make = engine.Engine.__init__

    def keep(self: Any, *how: Any, **more: Any) -> None:
        make(self, *how, **more)
        SET["engine"] = self

    def wait() -> None:
        for _ in range(20_000):
            elsewhere = SET["engine"].elsewhere
            elsewhere._next_gang(1e-6)
            elsewhere._gangs.put(1)
            assert elsewhere._next_gang(1e-6) == 1
        SET["ended"] = True

    monkeypatch.setattr(engine.Engine, "__init__", keep)
    run(give.bind(0))
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(60)
    assert SET.get("ended")
