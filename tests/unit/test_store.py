"""The checkpoint store in one process: saves, restores, errors, retention, damage, fencing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from hopcoll.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFencedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from recovery import CheckpointStore, Disk
from recovery.log import Log, seal
from tests.crash.store_soak import soak
from tests.store_faults import (
    CountingDisk,
    FailingDisk,
    assert_is_state,
    state,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def files(path: Path, folder: str) -> list[str]:
    return sorted(os.listdir(path / folder))


class GateDisk(Disk):
    """Waits inside a call until it is let go."""

    def __init__(self, name: str) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self.armed = False
        inner = getattr(self, name)

        def call(*arguments):
            if self.armed:
                self.armed = False
                self.reached.set()
                assert self.go_on.wait(60)
            return inner(*arguments)

        setattr(self, name, call)


def test_steps_come_back(path):
    with CheckpointStore(path) as store:
        with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
            store.restore()
        told = []
        store.on_durable(told.append)
        tickets = [store.save(step, state(step)) for step in range(4)]
        store.wait()
        assert [ticket.durable for ticket in tickets] == [True] * 4
        assert told == [0, 1, 2, 3]
        assert store.durable_step == 3
        assert store.steps() == [2, 3]
        assert_is_state(store.restore(2).state, 2)
    with CheckpointStore(path) as store:
        assert store.durable_step == 3
        step, found = store.restore()
        assert_is_state(found, step)
        with pytest.raises(CheckpointNotFoundError, match=r"of step 9; there are \[2, 3\]"):
            store.restore(9)


def test_an_older_step_begins_a_new_timeline(path):
    with CheckpointStore(path, keep_last=5) as store:
        for step in (1, 2, 3):
            store.save_sync(step, state(step))
        store.restore(1)
        assert store.steps() == [1, 2, 3]
        store.save_sync(2, {"branch": 2})
        assert store.steps() == [1, 2]
        assert store.restore() == (2, {"branch": 2})


def test_what_changes_after_save_is_not_saved(path):
    arrays = [np.zeros(100_000), np.zeros((300, 300), order="F"), np.zeros(1000)[::3]]
    with CheckpointStore(path, keep_last=50) as store:
        for step in range(30):
            for array in arrays:
                array[...] = step
            store.save(step, {"arrays": arrays, "step": step})
            for array in arrays:
                array[...] = -1
        store.wait()
        for step in range(30):
            found = store.restore(step).state
            assert found["step"] == step
            assert all((array == step).all() for array in found["arrays"])


def test_save_returns_while_the_disk_is_slow_and_the_next_one_waits(path):
    disk = GateDisk("write")
    with CheckpointStore(path, disk=disk) as store:
        disk.armed = True
        ticket = store.save(0, state(0))
        assert disk.reached.wait(60)
        assert not ticket.done
        with pytest.raises(CheckpointError, match="did not answer in time"):
            ticket.wait(0.01)
        second = threading.Thread(target=store.save, args=(1, state(1)))
        second.start()
        assert store.durable_step is None
        disk.go_on.set()
        second.join(60)
        store.wait()
        assert store.steps() == [0, 1]


def test_a_synchronous_save_that_was_given_up_is_not_committed(path):
    disk = GateDisk("fsync")
    with CheckpointStore(path, disk=disk) as store:
        store.save_sync(0, state(0))
        disk.armed = True
        store._timeout_s = 0.01
        changing = state(1)
        with pytest.raises(CheckpointError, match="did not answer in time"):
            store.save_sync(1, changing)
        changing["weights"][:] = -1
        store._timeout_s = 60
        disk.go_on.set()
        with pytest.raises(CheckpointError, match="step 1 was given up"):
            store.wait()
        assert_is_state(store.restore().state, 0)
        store.wait()
        assert len(files(path, "shards")) == 1


def test_arrays_that_did_not_change_are_not_written_again(path):
    with CheckpointStore(path, keep_last=1) as store:
        store.save_sync(0, state(0))
        for step in (1, 2, 3):
            store.save_sync(step, state(step))
            store.wait()  # for the cleaning
            shards = files(path, "shards")
            assert len(shards) == 2
            assert os.path.getsize(path / "shards" / shards[1]) < 1.2 * 160_000 + 8192
            assert_is_state(store.restore().state, step)
        assert not list(store.verify())
        # A shard of which little is left in use is not kept for that.
        store.save_sync(4, {"frozen": np.arange(20_000.0)[:1000], "weights": np.ones(20_000)})
        store.save_sync(5, {"frozen": np.arange(20_000.0)[:1000], "weights": np.zeros(20_000)})
        store.wait()
        assert len(files(path, "shards")) == 1


def test_retention(path):
    with CheckpointStore(path, keep_last=2, keep_every=10) as store:
        for step in range(1, 36):
            store.save_sync(step, {"step": step})
        store.wait()
        assert store.steps() == [10, 20, 30, 34, 35]
        assert store.restore(10) == (10, {"step": 10})
        store.prune(keep_last=1, keep_every=20)
        assert store.steps() == [20, 35]
        assert len(files(path, "slots")) <= 20
        assert not list(store.verify())


def test_a_prune_between_restore_and_save_takes_referred_shards_away(path):
    """The next commit loses its number to the prune, and writes the arrays anew."""
    with CheckpointStore(path, keep_last=9) as store:
        store.save_sync(1, state(1))
        store.save_sync(2, {"other": 2})
        store.restore(1)
        shards = files(path, "shards")
        CheckpointStore(path, readonly=True).prune(keep_last=1)
        assert files(path, "shards") == []
        store.save_sync(2, state(1) | {"step": 2})
        store.wait()
        assert len(files(path, "shards")) == len(shards)
        assert store.restore().state["step"] == 2
        assert not list(store.verify())


def test_the_owner_is_who_opened_last(path):
    first = CheckpointStore(path)
    first.save_sync(1, state(1))
    second = CheckpointStore(path)
    for call in (lambda: first.save_sync(2, state(2)), first.restore):
        with pytest.raises(CheckpointFencedError, match="taken over by another process"):
            call()
    assert_is_state(second.restore().state, 1)
    second.save_sync(2, state(2))
    with pytest.raises(CheckpointFencedError):
        first.save_sync(2, state(2))
    assert len(files(path, "shards")) == 2
    first.close()
    second.close()


def test_an_older_start_of_a_batch_job_cannot_take_the_store_back(path, monkeypatch):
    """It may be started again on a node that is out of reach, beside the requeued job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with CheckpointStore(path) as later:
        later.save_sync(1, state(1))
        monkeypatch.setenv("SLURM_JOB_ID", "9")  # somebody who prunes knows of no start
        assert not list(later.verify())
        later.prune(keep_last=1)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        slots = files(path, "slots")
        with pytest.raises(CheckpointFencedError, match="start 1 of job 7, and this process is of"):
            CheckpointStore(path)
        assert files(path, "slots") == slots
        later.save_sync(2, state(2))
    # The next start may, and so may any other job, and whoever is in none.
    for job, count in (("7", "2"), ("8", "0"), ("", "")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        with CheckpointStore(path) as store:
            assert_is_state(store.restore().state, 2)


@pytest.mark.parametrize("commits", [0, 1, 60])
@pytest.mark.parametrize("call", ["link", "fsync_folder"])
def test_an_owner_that_slept_beside_its_link(path, call, commits):
    """Held before it, or before the look behind it, while its successor commits."""
    disk = GateDisk(call)
    sleeper = CheckpointStore(path, disk=disk)
    sleeper.save_sync(1, {"by": "sleeper", "step": 1})
    if call == "fsync_folder":  # the shard's folder comes first where there is a shard
        asleep = {"by": "sleeper", "step": 2}
    else:
        asleep = state(2)
    disk.armed = True
    ticket = sleeper.save(2, asleep)
    assert disk.reached.wait(60)
    successor = CheckpointStore(path)
    adopted = successor.restore().step
    assert adopted == (1 if call == "link" else 2)
    for step in range(3, 3 + commits):
        successor.save_sync(step, {"by": "successor", "step": step})
    slots, head = files(path, "slots"), successor.restore()
    disk.go_on.set()
    if call == "link" or commits > 20:
        with pytest.raises(CheckpointFencedError):
            ticket.wait()
    else:
        ticket.wait()
    assert set(files(path, "slots")) == set(slots)
    assert successor.restore() == head
    with pytest.raises(CheckpointFencedError):
        sleeper.save_sync(1000, {})
    assert not list(successor.verify())
    successor.save_sync(1001, state(1001))
    assert_is_state(successor.restore().state, 1001)
    sleeper.close()
    successor.close()


@pytest.mark.parametrize("last", [6, 24])
def test_a_prune_that_slept_removes_nothing_that_is_in_use(path, last):
    """A prune is held before its link, or after it; takeovers and commits pass it by, few enough
    that the prune still counts, or so many that its slot is void."""
    for call in ("link", "fsync_folder", "unlink"):
        shutil.rmtree(path, ignore_errors=True)
        first = CheckpointStore(path, keep_last=4)
        for step in range(1, 5):
            first.save_sync(step, state(step))
        disk = GateDisk(call)
        outside = CheckpointStore(path, readonly=True, disk=disk)
        disk.armed = True
        thread = threading.Thread(target=outside.prune, args=(2,))
        thread.start()
        assert disk.reached.wait(60)
        owner = CheckpointStore(path, keep_last=4)
        for step in range(5, last + 1):
            owner.save_sync(step, state(step))
        disk.go_on.set()
        thread.join(60)
        assert not thread.is_alive()
        assert not list(owner.verify())
        assert_is_state(owner.restore().state, last)
        owner.save_sync(last + 1, state(last + 1))
        owner.wait()
        assert not list(owner.verify())
        for store in (first, outside, owner):
            store.close()


@pytest.mark.parametrize(
    ("code", "for_good"),
    [(errno.ENOSPC, False), (errno.EIO, False), (errno.EROFS, True)],
    ids=["full once", "broken once", "read-only from then on"],
)
def test_the_disk_fails_at_every_call(tmp_path, code, for_good):
    """A clear error, once; the last commit restores; and the next save works."""
    base = tmp_path / "base"
    with CheckpointStore(base, keep_last=1) as store:
        store.save_sync(1, state(1))
    failed = set()
    for k in range(1, 1000):
        path = tmp_path / str(k)
        shutil.copytree(base, path)
        disk = FailingDisk(k, code, for_good=for_good)
        durable, raised = 1, []
        try:
            store = CheckpointStore(path, keep_last=1, disk=disk)
        except CheckpointError as error:
            raised.append(error)
        else:
            for step in (2, 3):
                try:
                    ticket = store.save(step, state(step))
                    ticket.wait()
                except CheckpointError as error:
                    raised.append(error)
                else:
                    assert ticket.durable
                    durable = step
            try:
                store.close()
            except CheckpointError as error:
                raised.append(error)
        if disk.calls < k:
            break
        for error in raised:
            assert str(path) in str(error)
            assert os.strerror(code) in str(error)
        # Only what removes a temporary may fail without a word.
        assert raised or set(disk.failed) <= {"unlink"}
        assert disk.failed or disk.names[k - 1] == "close"
        failed |= set(disk.failed)
        with CheckpointStore(path, keep_last=1) as store:
            step, found = store.restore()
            assert durable <= step <= 3
            assert_is_state(found, step)
            store.save_sync(4, state(4))
            store.wait()
            assert not list(store.verify())
        assert not files(path, "tmp")
        assert len(files(path, "shards")) <= 2
        shutil.rmtree(path)
    assert {"create", "write", "fsync", "link", "fsync_folder", "unlink"} <= failed


def test_an_error_is_raised_once_and_the_step_can_be_saved_again(path):
    disk = CountingDisk()
    with CheckpointStore(path, disk=disk) as store:
        store.save_sync(1, state(1))
        disk._before = fail_fsync
        store.save(2, state(2))
        with pytest.raises(CheckpointError, match="step 2 cannot be saved.*Input/output"):
            store.wait()
        store.wait()
        disk._before = lambda *_: None
        assert store.durable_step == 1
        store.save_sync(2, state(2))
        assert_is_state(store.restore().state, 2)


def fail_fsync(k, name, arguments):
    if name == "fsync":
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_failed_fsync_is_not_tried_again(path):
    disk = CountingDisk()
    with CheckpointStore(path, disk=disk) as store:
        store.save_sync(1, state(1))
        disk._before = fail_fsync
        disk.names.clear()
        with pytest.raises(CheckpointError):
            store.save_sync(2, state(2))
        assert disk.names.count("fsync") == 1


def test_an_error_of_a_callback_is_not_lost(path):
    def callback(step):
        raise RuntimeError(f"told of {step}")

    store = CheckpointStore(path)
    store.on_durable(callback)
    assert store.save(1, {}).wait() is None
    with pytest.raises(RuntimeError, match="told of 1"):
        store.close()
    store.close()
    with pytest.raises(ValueError, match="^store is closed"):
        store.save(2, {})


def test_wrong_use(path, tmp_path):
    for options in ({"keep_last": 0}, {"keep_every": 0}, {"compression": "lzma"}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
            CheckpointStore(path, **options)
    with CheckpointStore(path) as store:
        with pytest.raises(TypeError, match="^step must be an integer, not str"):
            store.save("1", {})
        with pytest.raises(ValueError, match="^step must be 0 or more"):
            store.save(-1, {})
        store.save_sync(5, {})
        for step in (5, 4):
            with pytest.raises(ValueError, match="^step must be higher than 5"):
                store.save(step, {})
    with CheckpointStore(path, readonly=True) as store:
        assert store.restore() == (5, {})
        with pytest.raises(ValueError, match="^store is open for reading only"):
            store.save(6, {})
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint store"):
        CheckpointStore(tmp_path / "nowhere", readonly=True)


def test_directories_that_are_no_store(path, tmp_path):
    path.mkdir()
    (path / "thesis.tex").write_text("")
    with pytest.raises(CheckpointMismatchError, match=r"holds something else \(thesis.tex\)"):
        CheckpointStore(path)
    with pytest.raises(CheckpointMismatchError, match="is no directory"):
        CheckpointStore(path / "thesis.tex")
    with pytest.raises(CheckpointError, match="cannot be opened for writing"):
        CheckpointStore(path / "thesis.tex" / "below")
    assert os.listdir(path) == ["thesis.tex"]


def test_a_newer_version_is_refused(path):
    CheckpointStore(path).close()
    document = json.loads((path / "STORE.json").read_bytes())
    del document["xxh3_128"]
    (path / "STORE.json").write_bytes(seal(document | {"version": 2}))
    for readonly in (False, True):
        with pytest.raises(CheckpointMismatchError, match="version 2.*reads up to 1"):
            CheckpointStore(path, readonly=readonly)


def test_a_file_system_without_exclusive_links_is_refused(path):
    class Overwriting(Disk):
        def link(self, source, target):
            target.unlink(missing_ok=True)
            super().link(source, target)

    class Without(Disk):
        def link(self, source, target):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    CheckpointStore(path).close()
    with pytest.raises(CheckpointError, match="links that are exclusive"):
        CheckpointStore(path, disk=Overwriting())
    with pytest.raises(CheckpointError, match="Operation not permitted"):
        CheckpointStore(path, disk=Without())


def test_h5py_and_h5dump_see_the_arrays(path):
    with CheckpointStore(path, keep_last=1) as store:
        store.save_sync(7, {"model": {"weight": np.arange(12.0).reshape(3, 4)}, "n": np.array(3)})
    (shard,) = (path / "shards").iterdir()
    with h5py.File(shard) as file:
        assert file.attrs["step"] == 7
        assert file["model/weight"][1].tolist() == [4, 5, 6, 7]
        assert file["n"][()] == 3


@pytest.mark.parametrize(("compression", "bits"), [(None, 1000), ("blosc2", 200)])
def test_every_flipped_bit_is_found(path, compression, bits):
    """1,000 bits over all files: each named by file, and by dataset where it belongs to one."""
    generator = np.random.default_rng(1)
    with CheckpointStore(path, keep_last=3, compression=compression) as store:
        for step in range(1, 6):
            changing = np.repeat(generator.random(300), 40) + step
            arrays = {"x": changing, "b": np.full(50, step), "c": np.ones(9000)}
            store.save_sync(step, {"a": arrays})
        store.wait()
        record = store._all.highest.base
        places = {}
        for name, entry in record.body["shards"].items():
            for piece in entry["ranges"]:
                for offset, nbytes, _ in piece["extents"]:
                    places.setdefault(name, []).append((offset, offset + nbytes, piece["dataset"]))
        everything = [file for file in path.rglob("*") if file.is_file()]
        assert {file.parent.name for file in everything} == {"store", "slots", "shards"}
        found_datasets = 0
        for turn in range(bits):
            file = everything[turn % len(everything)]
            data = file.read_bytes()
            offset = int(generator.integers(len(data)))
            flipped = bytearray(data)
            flipped[offset] ^= 1 << int(generator.integers(8))
            file.write_bytes(flipped)
            problems = list(store.verify())
            assert {problem.path for problem in problems} == {file}, (file, offset)
            if file.parent.name == "shards" and file.name in places:
                expected = [d for start, stop, d in places[file.name] if start <= offset < stop]
                assert [problem.dataset for problem in problems] == (expected or [None])
                found_datasets += bool(expected)
            file.write_bytes(data)
        assert found_datasets > bits / 20
        assert not list(store.verify())


def test_a_corrupt_shard_is_never_restored(path):
    with CheckpointStore(path, keep_last=2) as store:
        store.save_sync(1, state(1))
        store.save_sync(2, {"weights": np.arange(5000.0)})
        name, _ = store._all.highest.base.body["arrays"][0]["piece"]
        shard = path / "shards" / name
        data = shard.read_bytes()
        shard.write_bytes(data.replace(np.float64(4321).tobytes(), np.float64(4322).tobytes()))
        with pytest.raises(CheckpointCorruptError, match=f"{name} is corrupt in the dataset weig"):
            store.restore()
        shard.write_bytes(data[:-3000])
        with pytest.raises(CheckpointCorruptError, match="weights"):
            store.restore()
        shard.unlink()
        with pytest.raises(CheckpointCorruptError, match=f"{name} is missing"):
            store.restore()
        assert_is_state(store.restore(1).state, 1)


def test_a_corrupt_slot_is_named(path):
    with CheckpointStore(path) as store:
        store.save_sync(1, {})
    newest = path / "slots" / files(path, "slots")[-1]
    newest.write_bytes(newest.read_bytes().replace(b'"save":1', b'"save":2'))
    with pytest.raises(CheckpointCorruptError, match=f"{newest.name} is corrupt"):
        CheckpointStore(path)
    newest.unlink()
    with CheckpointStore(path) as store:
        assert store.steps() == []


def test_a_reader_beside_an_owner_that_prunes(path):
    with CheckpointStore(path, keep_last=1) as store:
        store.save_sync(0, state(0))
        over = threading.Event()
        found = []

        def read():
            with CheckpointStore(path, readonly=True) as reader:
                while not over.is_set():
                    step, copy = reader.restore()
                    assert_is_state(copy, step)
                    found.append(step)

        thread = threading.Thread(target=read)
        thread.start()
        for step in range(1, 4000):
            if step >= 40 and found:  # a busy machine may let the reader begin late
                break
            store.save_sync(step, state(step))
        over.set()
        thread.join(60)
        assert found == sorted(found)
        assert found


def test_many_saves_leave_nothing_behind(path):
    """`python -m tests.crash.store_soak` does ten thousand."""
    report = soak(path, 120)
    assert report["grown_bytes"] < 100_000


def test_the_process_ends_while_a_save_is_under_way(path):
    """Nothing hangs, and what was acknowledged is there."""
    program = (
        "import sys, numpy as np; from recovery import CheckpointStore\n"
        "store = CheckpointStore(sys.argv[1])\n"
        "store.save(1, {'a': np.ones(10)}).wait()\n"
        "store.save(2, {'a': np.zeros(3_000_000)})\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=60)
    with CheckpointStore(path) as store:
        assert store.restore().step in (1, 2)


# Broken variants: each rule that the tests above lean on is taken out, and one of them must see it.


def broken_commit_without_look(monkeypatch):
    monkeypatch.setattr(Log, "_counts", lambda self, number: True)


def broken_fence(monkeypatch):
    monkeypatch.setattr(Log, "_check_owner", lambda self: None)


def broken_link(monkeypatch):
    monkeypatch.setattr(Disk, "link", lambda self, source, target: os.replace(source, target))


def broken_listing_after_the_slot(monkeypatch):
    from recovery.level import Level

    clean = Level.clean

    def list_late(self, record):
        self._list()
        clean(self, record)

    monkeypatch.setattr(Level, "clean", list_late)


def broken_reference(monkeypatch):
    from recovery.level import Level

    in_use = Level._in_use
    monkeypatch.setattr(
        Level, "_in_use", lambda self, record, needed=None: needed or in_use(self, record)
    )


def broken_hash(monkeypatch):
    from recovery import shards

    monkeypatch.setattr(shards, "hash_pieces", lambda array: iter(()))
    monkeypatch.setattr(shards, "probe", lambda array: "")


def broken_staging(monkeypatch):
    from recovery.store import _Staging

    monkeypatch.setattr(
        _Staging, "copy", lambda self, arrays: [np.asarray(one, order="C") for one in arrays]
    )


def broken_raising_of_errors(monkeypatch):
    monkeypatch.setattr(CheckpointStore, "_raise_error", lambda self, ticket=None: None)


@pytest.mark.parametrize(
    ("broken", "caught_by"),
    [
        (
            broken_commit_without_look,
            lambda path: test_an_owner_that_slept_beside_its_link(path, "link", 60),
        ),
        (broken_fence, lambda path: test_the_owner_is_who_opened_last(path)),
        (
            broken_link,
            lambda path: test_an_owner_that_slept_beside_its_link(path, "link", 1),
        ),
        (
            broken_listing_after_the_slot,
            lambda path: test_a_prune_that_slept_removes_nothing_that_is_in_use(path, 6),
        ),
        (
            broken_reference,
            lambda path: test_a_prune_between_restore_and_save_takes_referred_shards_away(path),
        ),
        (broken_hash, lambda path: test_arrays_that_did_not_change_are_not_written_again(path)),
        (broken_staging, lambda path: test_what_changes_after_save_is_not_saved(path)),
        (
            broken_raising_of_errors,
            lambda path: test_an_error_is_raised_once_and_the_step_can_be_saved_again(path),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_tests_are_awake(path, monkeypatch, broken, caught_by):
    caught_by(path)
    shutil.rmtree(path)
    broken(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, CheckpointError, OSError)):
        caught_by(path)
