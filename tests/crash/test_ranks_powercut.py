"""Power cuts while four ranks of two hosts save together: the old state or the new one, for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import CheckpointNotFoundError
from recovery import CheckpointStore, Cut, saving
from tests.crash.store_runs import same_every_time, scratch_folder
from tests.fake_comm import FakeComm, World, run
from tests.powercut import Examiner, Log, RecordingDisk, Violation

RANKS = 4
TABLE = np.arange(11 * 300.0).reshape(11, 300)


def state_of(step: int, rank: int) -> dict[str, Any]:
    part = np.array_split(TABLE + step, RANKS)[rank]
    fixed = np.arange(3000.0)
    return {"step": step, "fixed": fixed, "w": np.full(900, step), "table": Cut(part)}


def look(folder: Path) -> int | None:
    """What one process, and then two ranks, find after a cut; that they can go on."""
    with CheckpointStore(folder / "store") as store:
        try:
            step, state = store.restore(cut={"table": None})
        except CheckpointNotFoundError:
            step = None
        else:
            assert state["step"] == step and np.all(state["w"] == step)
            assert np.array_equal(state["table"], TABLE + step)
        assert list(store.verify()) == []

    def program(comm: FakeComm) -> int | None:
        with CheckpointStore(folder / "store", comm, timeout_s=20) as store:
            seen = store.durable_step
            store.save_sync((seen or 0) + 1, {"table": Cut(TABLE[comm.rank :: 2])})
            assert store.steps()[-1] == (seen or 0) + 1
            return seen

    assert run(2, program) == [step] * 2
    return step


def four_ranks(log: Log, *, victim: int | None = None) -> int:
    """Three saves. The victim dies at the third's link, and the others go on; how many calls had
    been recorded by then."""
    world = World(RANKS)
    died_at = 0

    class Mortal(RecordingDisk):
        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            nonlocal died_at
            if "0000000004" in target.name:  # the third save
                died_at = len(log.calls)
                world.kill(self.rank)
                raise SystemExit

    def program(comm: FakeComm) -> None:
        disk = (Mortal if comm.rank == victim else RecordingDisk)(log)
        disk.rank = comm.rank
        path, host = log.root / "store", f"h{comm.rank // 2}"
        with CheckpointStore(path, comm, disk=disk, host=host, timeout_s=20) as store:
            store.on_durable(lambda step: log.note(("durable", step)))
            for step in (1, 2, 3):
                if comm.rank == 0:
                    log.note(("begin", step))
                comm.allgather(None, timeout_s=20)
                store.save_sync(step, state_of(step, comm.rank))

    for rank, ended in enumerate(run(RANKS, program, world)):
        assert rank == victim or ended is None, ended
    return died_at


@pytest.mark.parametrize("victim", [None, 0])
def test_a_power_cut_leaves_the_old_state_or_the_new_one(victim: int | None) -> None:
    """With a victim: the committer dies between its link and its fsync, and the next one adopts."""
    assert examine(victim) >= {None, 1, 2, 3}


def examine(victim: int | None, after_death: bool = False) -> set[int | None]:
    """Look at what each power cut, or each after the victim's death, leaves; what is found."""
    with scratch_folder() as scratch:
        (scratch / "disk").mkdir()
        with same_every_time(), Log(scratch / "disk") as log:
            died_at = four_ranks(log, victim=victim)
            examiner = Examiner(look, scratch)
            examiner.examine(log, randoms=1, seed=0, first=died_at if after_death else 0)
    return set(examiner.seen.values())


def test_a_slot_that_is_adopted_unsynced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    adopted = saving._Save._adopted

    def unsynced(self: saving._Save) -> int | None:
        self.place.disk.fsync_folder = lambda path: None
        try:
            return adopted(self)
        finally:
            del self.place.disk.fsync_folder

    monkeypatch.setattr(saving._Save, "_adopted", unsynced)
    with pytest.raises(Violation):
        examine(0, after_death=True)
