"""Workflows over objects where the world is in the way: full disks, states that are not copied."""

from __future__ import annotations

import collections
import errno
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import HopcollError
from recovery.workflows import TaskContext, Workflow, task
from tests.crash import workflow_memory
from tests.crash.workflow_memory import Memory, OneRank
from tests.store_faults import FailingDisk

COUNTS: collections.Counter[str] = collections.Counter()
#: Larger than what the journal has in itself.
COUNT = 20_000


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow_memory, "_LOSS", 0.0)
    COUNTS.clear()


@task(deterministic=True, checkpoint="none", on=1)
def make(number: int, ctx: TaskContext) -> Any:
    COUNTS["make"] += 1
    return ctx.put(np.full(COUNT, float(number)))


@task(checkpoint="sync")
def adds(*refs: Any, ctx: TaskContext) -> Any:
    COUNTS["adds"] += 1
    return ctx.put(sum(ctx.get(ref) for ref in refs))


@task(external=True, idempotency_key=True)
def sends(ref: Any, ctx: TaskContext) -> float:
    """The outside enforces the key."""
    COUNTS[f"sent {ctx.idempotency_key}"] = 1
    return float(ctx.get(ref)[0])


@task(checkpoint="none")
def both(*values: Any) -> Any:
    return list(values)


def job(store: Path, disk: FailingDisk | None = None) -> tuple[float, float]:
    """Run it in a session of its own, as after a crash."""
    memory = Memory(random.Random(1))
    with Workflow("w", store, disk=disk, workers=1) as workflow:
        workflow._gang = OneRank(workflow, memory)
        workflow._gang._unsent = []
        total = adds.bind(make.bind(1), make.bind(2))
        ref, sent = workflow.run(both.bind(total, sends.bind(total)))
        return float(memory.get(ref).sum()), sent


class FullDisk(FailingDisk):
    """Has no room for the values of tasks, but for their first bytes."""

    def __init__(self) -> None:
        super().__init__(0, 0)
        self.values: set[int] = set()

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        if path.parent.name == "values":
            self.values.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        self.values.discard(descriptor)
        super().close(descriptor)

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor in self.values and offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write_some(descriptor, data, offset)


def test_a_value_with_objects_that_finds_no_room_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the value of adds could not be written: No space") as told:
        job(tmp_path, FullDisk())
    assert told.value.errno == errno.ENOSPC
    assert str(told.value.filename).startswith(str(tmp_path / "w" / "values"))
    assert not list((tmp_path / "w" / "values").iterdir()), "half a file takes room"
    assert Workflow("w", tmp_path).status().state == "interrupted"
    assert job(tmp_path) == (3.0 * COUNT, 3.0)
    assert COUNTS["make"] == 4 and COUNTS["adds"] == 2
    assert sum(COUNTS[name] for name in COUNTS if name.startswith("sent")) == 1
    # And what it had stored before stays as it is.
    assert job(tmp_path) == (3.0 * COUNT, 3.0) and COUNTS["adds"] == 2


@pytest.mark.parametrize("for_good", [False, True])
def test_a_disk_that_is_full_at_any_call(tmp_path: Path, for_good: bool) -> None:
    """What is told names what was to be written; room is made; each effect is there once."""
    failures = 0
    for k in range(1, 1000, 3):
        COUNTS.clear()
        disk = FailingDisk(k, errno.ENOSPC, for_good=for_good)
        store = tmp_path / str(k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                job(store, disk)
            except (OSError, HopcollError) as error:
                failures += 1
                assert "No space left" in f"{error} {error.__cause__}", repr(error)
                assert str(store) in str(error), repr(error)
        assert job(store) == (3.0 * COUNT, 3.0)
        assert sum(COUNTS[name] for name in COUNTS if name.startswith("sent")) == 1
        if disk.calls < k:
            break
    assert failures > 5 and disk.calls < k
