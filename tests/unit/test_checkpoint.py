"""Checkpoints: what is saved comes back, and what is damaged is never taken for sound."""

from __future__ import annotations

import errno
import os
import traceback
import random
import threading
import warnings
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest

from hopcoll.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from recovery import AsyncWriter, load, load_latest, save
from recovery.checkpoint import Disk


def state(step: int) -> dict[str, np.ndarray]:
    return {"weights": np.arange(600.0) * step, "count": np.array(step)}


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


class RecordingDisk(Disk):
    """Notes what it is asked for, and fails, or writes little at a time, where it is told to."""

    def __init__(self, fail_at: int = -1, error: int = errno.ENOSPC, write_bytes: int = 1 << 30):
        super().__init__(piece_bytes=1024)
        self.calls: list[str] = []
        self.fail_at = fail_at
        self.error = error
        self.write_bytes = write_bytes

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if len(self.calls) == self.fail_at:
            raise OSError(self.error, os.strerror(self.error))

    def write(self, descriptor: int, data: bytes) -> int:
        self._note("write")
        return super().write(descriptor, data[: self.write_bytes])

    def fsync(self, descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        self._note(f"fsync {kind}")
        super().fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._note("rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._note("unlink")
        super().unlink(path)


class GatedDisk(Disk):
    """A disk on which every fsync hangs until the gate is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.reached = threading.Event()

    def fsync(self, descriptor: int) -> None:
        self.reached.set()
        assert self.gate.wait(30)
        super().fsync(descriptor)


ARRAYS = {
    "float16": np.array([1.5, np.nan, np.inf], np.float16),
    "float32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "float64": np.array(-0.0),
    "complex": np.array([1 + 2j], np.complex64),
    "int8": np.array([-128, 127], np.int8),
    "uint64": np.array([2**64 - 1], np.uint64),
    "bool": np.array([True, False]),
    "bytes": np.array([b"ab", b"c"]),
    "big_endian": np.arange(3, dtype=">i4"),
    "structure": np.array([(1, 2.0)], "i4,f8"),
    "empty": np.empty((0, 3)),
    "strided": np.arange(24).reshape(4, 6)[::2, ::-1],
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
}


def test_wrong_steps_attributes_and_folders(tmp_path):
    with pytest.raises(TypeError, match="^step must be an integer, not float"):
        save(tmp_path, 2.0, {})
    with pytest.raises(TypeError, match="^attributes: 1 is no string"):
        save(tmp_path, 2, {}, {1: "one"})
    path = save(tmp_path, 2, {}, {"loss": float("nan")})
    assert load(path, attributes={"loss": float("nan")}).step == 2
    with pytest.raises(CheckpointError, match="is no folder"):
        load_latest(path)


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    save(tmp_path, 7, ARRAYS)
    found = load_latest(tmp_path)
    assert found.step == 7
    assert found.path == tmp_path / "step-00000007.h5"
    assert found.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        restored = found.arrays[name]
        assert (restored.dtype, restored.shape) == (array.dtype, array.shape), name
        assert restored.tobytes() == array.tobytes(), name
        assert restored.flags.writeable


def test_attributes_come_back_as_they_were(tmp_path: Path) -> None:
    attributes = {"seed": 2**80, "rate": 0.1, "text": "grün", "ranks": [0, 2], "none": None}
    save(tmp_path, 0, {}, attributes)
    assert load_latest(tmp_path).attributes == attributes


def test_a_file_is_plain_hdf5_behind_a_readable_header(tmp_path: Path) -> None:
    path = save(tmp_path, 3, state(3), {"seed": 1})
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["weights"][()], state(3)["weights"])
        assert file.attrs["step"] == 3
    assert path.read_bytes().startswith(b"hopcoll checkpoint\nbytes ")


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, 3, state(3), {"b": 1, "a": 2}) for name in ("x", "y")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, state(step), keep=keep)
    assert files(tmp_path) == [f"step-000000{step}.h5" for step in (10, 20, 30, 40)][-keep:]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, state(step))
    assert load_latest(tmp_path).step == 100_000_000


def test_what_is_saved_last_is_the_latest(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, state(step))
    save(tmp_path, 25, state(25))
    assert load_latest(tmp_path).step == 25
    assert files(tmp_path) == ["step-00000020.h5", "step-00000025.h5"]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 5, state(1))
    save(tmp_path, 5, state(2))
    assert load_latest(tmp_path).arrays["count"] == 2
    assert files(tmp_path) == ["step-00000005.h5"]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "step-1.h5", "step-00000001.h5.old", ".step-00000001.h5.zz.tmp"):
        (tmp_path / name).write_text("not a checkpoint")
    before = files(tmp_path)
    save(tmp_path, 5, state(5))
    save(tmp_path, 6, state(6), keep=1)
    assert files(tmp_path) == sorted([*before, "step-00000006.h5"])


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".step-00000005.h5.0123456789abcdef.tmp"
    left.write_bytes(b"half a checkpoint")
    save(tmp_path, 6, state(6))
    assert not left.exists()


@pytest.mark.parametrize("folder", ["", "missing/folder"])
def test_nothing_there_is_an_error_of_its_own(tmp_path: Path, folder: str) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        load_latest(tmp_path / folder)
    assert caught.value.path == tmp_path / folder
    with pytest.raises(CheckpointNotFoundError):
        load(tmp_path / folder / "step-00000001.h5")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state(1))
    good = path.read_bytes()
    draw = random.Random(1)
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointCorruptError, match=r"step-00000001\.h5"):
            load(path)


def test_every_torn_file_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state(1))
    good = path.read_bytes()
    for length in [*range(0, 700), *range(700, len(good), 97), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointCorruptError):
            load(path)
        path.write_bytes(good[:length] + bytes(len(good) - length))
        if path.read_bytes() != good:  # the last bytes may have been zeros
            with pytest.raises(CheckpointCorruptError):
                load(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(CheckpointCorruptError):
        load(path)


def test_a_corrupt_file_is_passed_over_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1))
    newest = save(tmp_path, 2, state(2))
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=r"step-00000002\.h5 is corrupt"):
        found = load_latest(tmp_path)
    assert found.step == 1
    np.testing.assert_array_equal(found.arrays["weights"], state(1)["weights"])


def test_an_unreadable_file_is_passed_over_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1))
    (tmp_path / "step-00000002.h5").mkdir()  # even root cannot read this one
    with pytest.warns(RuntimeWarning, match=r"step-00000002\.h5 could not be read"):
        assert load_latest(tmp_path).step == 1


def test_nothing_but_corrupt_files_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, state(step)).write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointCorruptError) as caught:
        load_latest(tmp_path)
    assert caught.value.path == tmp_path / "step-00000002.h5"


@pytest.mark.parametrize(
    ("like", "complaint"),
    [
        ({"weights": np.zeros((600, 1)), "count": np.array(0)}, r"float64\(600,\), wanted"),
        ({"weights": np.zeros(600, np.float32), "count": np.array(0)}, "wanted float32"),
        ({"weights": np.zeros(600)}, "'count' is int64.*not wanted"),
        ({**state(1), "bias": np.zeros(3)}, "'bias' is missing"),
    ],
)
def test_arrays_of_another_job_are_refused(
    tmp_path: Path, like: dict[str, np.ndarray], complaint: str
) -> None:
    save(tmp_path, 1, state(1))
    path = save(tmp_path, 2, state(2))
    with pytest.raises(CheckpointMismatchError, match=complaint) as caught:
        load_latest(tmp_path, like=like)
    assert caught.value.path == path


def test_attributes_of_another_job_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1), {"seed": 1, "shape": (2, 3)})
    assert load_latest(tmp_path, like=state(0), attributes={"seed": 1, "shape": (2, 3)}).step == 1
    with pytest.raises(CheckpointMismatchError, match="'seed' is 1, wanted 2"):
        load_latest(tmp_path, attributes={"seed": 2})
    with pytest.raises(CheckpointMismatchError, match="'rate' is None, wanted"):
        load_latest(tmp_path, attributes={"rate": 0.1})


def test_another_version_of_the_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recovery.checkpoint._VERSION", 2)
    save(tmp_path, 1, state(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointMismatchError, match="version 2 of the format, not 1"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    ("error", "complaint", "arguments"),
    [
        (ValueError, "^step ", {"step": -1}),
        (ValueError, "^keep ", {"keep": 0}),
        (ValueError, "^arrays: 'a/b'", {"arrays": {"a/b": np.zeros(1)}}),
        (ValueError, "^arrays: ''", {"arrays": {"": np.zeros(1)}}),
        (TypeError, "^arrays: 'x' has dtype object", {"arrays": {"x": np.array([None])}}),
        (TypeError, "^arrays: 'x' has dtype <U1", {"arrays": {"x": np.array(["a"])}}),
        (
            TypeError,
            "^arrays: 'x' has dtype bfloat16",
            {"arrays": {"x": np.zeros(2, ml_dtypes.bfloat16)}},
        ),
        (TypeError, "JSON", {"attributes": {"x": object()}}),
        (ValueError, "^attributes ", {"attributes": {"x": "y" * 70_000}}),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    tmp_path: Path, error: type[Exception], complaint: str, arguments: dict[str, object]
) -> None:
    with pytest.raises(error, match=complaint):
        save(tmp_path / "new", **{"step": 1, "arrays": {}, **arguments})  # type: ignore[arg-type]
    assert files(tmp_path) == []


def test_the_order_on_disk(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1))
    save(tmp_path, 2, state(2))
    disk = RecordingDisk()
    save(tmp_path, 3, state(3), disk=disk)
    writes = disk.calls.count("write")
    assert writes > 3
    expected = ["write"] * writes + ["fsync file", "rename", "fsync folder", "unlink"]
    assert disk.calls == expected


def test_a_new_folder_is_made_durable_in_its_parent(tmp_path: Path) -> None:
    disk = RecordingDisk()
    save(tmp_path / "a" / "b", 1, state(1), disk=disk)
    assert disk.calls[:3] == ["fsync folder", "fsync folder", "write"]
    assert load_latest(tmp_path / "a" / "b").step == 1


def test_short_writes_are_continued(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1), disk=RecordingDisk(write_bytes=100))
    assert load_latest(tmp_path, like=state(1)).step == 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_call(tmp_path: Path, error: int) -> None:
    counting = RecordingDisk()
    (tmp_path / "counting").mkdir()
    for step in (1, 2, 3):
        save(tmp_path / "counting", step, state(step), disk=counting)
    assert counting.calls[-1] == "unlink"
    for fail_at in range(1, len(counting.calls) + 1):
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        disk = RecordingDisk(fail_at, error)
        durable = 0
        for step in (1, 2, 3):
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    save(folder, step, state(step), disk=disk)
            except CheckpointError as raised:
                assert isinstance(raised.__cause__, OSError)
                assert raised.__cause__.errno == error
                assert os.strerror(error) in str(raised)
                assert raised.path == folder / f"step-0000000{step}.h5"
                break
            durable = step
            # Where only the removal of an older file fails, the new one is durable all the same.
            fired = len(disk.calls) == fail_at
            assert ["could not be removed" in str(w.message) for w in caught] == [True] * fired
        assert len(disk.calls) >= fail_at, "the fault did not fire"
        if durable:
            assert load_latest(folder, like=state(0)).step in (durable, durable + 1)
        assert not [name for name in files(folder) if name.endswith(".tmp")]
        save(folder, 9, state(9))
        assert load_latest(folder).step == 9


def test_the_traceback_of_an_error_keeps_no_view_of_memory(tmp_path: Path) -> None:
    """CPython 3.12 can crash when it collects a cycle of an exception and a view of a stream."""
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 1, state(1), disk=RecordingDisk(fail_at=1))
    frames = list(traceback.walk_tb(caught.value.__traceback__))
    assert len(frames) > 1
    for frame, _ in frames:
        assert not [name for name, it in frame.f_locals.items() if isinstance(it, memoryview)]


def test_the_writer_saves_what_the_arrays_were(tmp_path: Path) -> None:
    disk = GatedDisk()
    array = np.zeros(1000)
    attributes = {"ranks": [0, 1]}
    with AsyncWriter(tmp_path, disk=disk) as writer:
        writer.submit(1, {"array": array}, attributes)
        # It returned though the disk hangs, so what comes now is after it and before the write.
        array += 1
        attributes["ranks"].append(2)
        assert writer.durable_step is None
        disk.gate.set()
    assert writer.durable_step == 1
    found = load_latest(tmp_path)
    assert not found.arrays["array"].any()
    assert found.attributes == {"ranks": [0, 1]}


def test_a_slow_disk_makes_checkpoints_rarer(tmp_path: Path) -> None:
    disk = GatedDisk()
    with AsyncWriter(tmp_path, keep=9, disk=disk) as writer:
        writer.submit(1, state(1))
        assert disk.reached.wait(30)
        for step in (2, 3, 4):
            writer.submit(step, state(step))
        disk.gate.set()
    assert files(tmp_path) == ["step-00000001.h5", "step-00000004.h5"]


def test_waiting_for_a_disk_that_hangs_is_bounded(tmp_path: Path) -> None:
    disk = GatedDisk()
    writer = AsyncWriter(tmp_path, disk=disk)
    writer.submit(1, state(1))
    with pytest.raises(CheckpointError, match="not durable after") as caught:
        writer.wait(0.01)
    assert caught.value.path == tmp_path
    disk.gate.set()
    writer.wait()
    assert writer.durable_step == 1
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match=r"^AsyncWriter is closed"):
        writer.submit(2, state(2))


def test_an_error_of_the_thread_is_raised_once_at_the_next_call(tmp_path: Path) -> None:
    disk = RecordingDisk(fail_at=1)
    writer = AsyncWriter(tmp_path, disk=disk)
    writer.submit(1, state(1))
    with pytest.raises(CheckpointError, match="No space left"):
        writer.wait()
    writer.submit(2, state(2))
    writer.wait()
    assert writer.durable_step == 2
    disk.fail_at = len(disk.calls) + 1
    writer.submit(3, state(3))
    with pytest.raises(CheckpointError, match="No space left"):
        writer.close()
    assert load_latest(tmp_path).step == 2


def test_what_cannot_be_saved_comes_back_from_the_thread(tmp_path: Path) -> None:
    writer = AsyncWriter(tmp_path)
    writer.submit(1, {"x": np.array([None])})
    with pytest.raises(TypeError, match="dtype object"):
        writer.close()
