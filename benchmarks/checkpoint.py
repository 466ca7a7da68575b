"""Times of checkpoints: ``python -m benchmarks.checkpoint --json FILE [--png FILE]``.

256 MiB of state are saved by hopcoll's store, by plain h5py, by NumPy and by torch's distributed
checkpoints, each followed by an fsync of what it wrote, and read back; side by side in one process,
in turns A B C ... C B A, because a disk is never alone. What a save is timed for is the moment from
which a power cut does no harm; torch syncs its files itself.

All cases begin alike. All is written back, and the disk has come to rest: a file system that
discards what was removed would else have one of them wait for what another one left. And free
memory is warm: a virtual machine may give what is free for two seconds back to its host, and takes
0.2 s to get 256 MiB of it again, which whoever has just removed an old file would be spared. What
removes the checkpoint before (hopcoll behind a save, the others ahead of it) is counted apart, as
"and removal".
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
from tqdm import tqdm

from recovery import CheckpointStore

_ARRAYS = 16
_PEERS = ("h5py + fsync", "np.savez + fsync", "torch save")
#: A disk is at rest when its counters have stood still for so many looks.
_SETTLE_LOOKS, _SETTLE_TICK_S, _SETTLE_S_MAX = 4, 0.05, 5.0
#: How many states' worth of free memory is warmed up: a file's pages, what is read, and some more.
_WARM = 3


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def settle(folder: Path, nbytes: int) -> None:
    """Wait until the disk of a folder is at rest, and warm so much free memory up."""
    os.sync()
    _wait_for_disk(folder)
    np.empty(nbytes, np.uint8)[:] = 1


def _wait_for_disk(folder: Path) -> None:
    """Wait until all is written and discarded that was left to a disk."""
    device = os.stat(folder).st_dev
    counters = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    if not counters.exists():
        return
    deadline_s = time.monotonic() + _SETTLE_S_MAX
    before, quiet = "", 0
    while quiet < _SETTLE_LOOKS and time.monotonic() < deadline_s:
        now = counters.read_text()
        quiet = quiet + 1 if now == before else 0
        before = now
        time.sleep(_SETTLE_TICK_S)


class Hopcoll:
    """One store, used again and again, as a program does."""

    def __init__(self, folder: Path, state: dict[str, np.ndarray]) -> None:
        self._store = CheckpointStore(folder)
        self._state = state
        self._step = 0

    def save(self) -> dict[str, float]:
        self._step += 1
        start_s = time.perf_counter()
        self._store.save_sync(self._step, self._state)
        taken_s = time.perf_counter() - start_s
        self._store.wait()  # the older commit is removed behind it
        return {"": taken_s, " and removal": time.perf_counter() - start_s}

    def save_async(self) -> dict[str, float]:
        self._step += 1
        start_s = time.perf_counter()
        ticket = self._store.save(self._step, self._state)
        stall_s = time.perf_counter() - start_s
        ticket.wait()
        taken_s = time.perf_counter() - start_s
        self._store.wait()
        return {" stall": stall_s, "": taken_s}

    def restore(self) -> dict[str, float]:
        start_s = time.perf_counter()
        restored = self._store.restore()
        taken_s = time.perf_counter() - start_s
        assert restored.step == self._step
        return {"": taken_s}

    def read_plainly(self) -> dict[str, float]:
        """Read the same bytes of the same file into new memory, with no check."""
        record = self._store._all.highest.base
        assert record is not None
        shards, arrays = {}, []
        start_s = time.perf_counter()
        for entry in record.body["arrays"]:
            name, index = entry["piece"]
            if name not in shards:
                shards[name] = os.open(self._store.path / "shards" / name, os.O_RDONLY)
            array = np.empty(entry["shape"], np.dtype(entry["dtype"]))
            arrays.append(array)  # else the next one takes its memory, which is not new any more
            start = record.body["shards"][name]["ranges"][index]["extents"][0][0]
            view, done = memoryview(array).cast("B"), 0
            while done < len(view):
                done += os.preadv(shards[name], [view[done:]], start + done)
        taken_s = time.perf_counter() - start_s
        assert len(arrays) == len(self._state)
        for descriptor in shards.values():
            os.close(descriptor)
        return {"": taken_s}

    def close(self) -> None:
        self._store.close()


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _written(
    folder: Path, name: str, write: Callable[[Path], Any]
) -> dict[str, float]:
    """Time one who writes a file and forgets about fsync."""
    begun_s = time.perf_counter()
    path = _fresh(folder) / name
    start_s = time.perf_counter()
    write(path)
    _fsync(path)
    _fsync(folder)
    end_s = time.perf_counter()
    return {"": end_s - start_s, " and removal": end_s - begun_s}


def _h5py(folder: Path, state: dict[str, np.ndarray]) -> dict[str, float]:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name, array in state.items():
                file[name] = array

    return _written(folder, "state.h5", write)


def _numpy(folder: Path, state: dict[str, np.ndarray]) -> dict[str, float]:
    def write(path: Path) -> None:
        np.savez(path, **state)  # type: ignore[arg-type]

    return _written(folder, "state.npz", write)


class Torch:
    """torch.distributed.checkpoint in one process, with the staging that its own guide names."""

    def __init__(self, folder: Path, state: dict[str, np.ndarray]) -> None:
        import torch
        import torch.distributed as distributed
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._dcp, self._distributed, self._writer = dcp, distributed, FileSystemWriter
        rendezvous = folder.parent / "rendezvous"
        rendezvous.unlink(missing_ok=True)
        distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1
        )
        self._state = {name: torch.from_numpy(array) for name, array in state.items()}
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)
        self._folder = folder

    def save(self) -> dict[str, float]:
        begun_s = time.perf_counter()
        path = _fresh(self._folder)
        start_s = time.perf_counter()
        self._dcp.save(self._state, storage_writer=self._writer(path, sync_files=True))
        end_s = time.perf_counter()
        return {"": end_s - start_s, " and removal": end_s - begun_s}

    def save_async(self) -> dict[str, float]:
        path = _fresh(self._folder)
        start_s = time.perf_counter()
        answer = self._dcp.async_save(
            self._state,
            storage_writer=self._writer(path, sync_files=True),
            async_stager=self._stager,
        )
        stall_s = time.perf_counter() - start_s
        getattr(answer, "upload_completion", answer).result()
        return {" stall": stall_s, "": time.perf_counter() - start_s}

    def close(self) -> None:
        self._stager.close()
        self._distributed.destroy_process_group()


def measure(folder: Path, mib: int, turns: int, *, with_torch: bool) -> dict[str, Any]:
    """Return the report: medians of seconds, and what the targets compare."""
    generator = np.random.default_rng(0)
    count = (mib << 20) // 8 // _ARRAYS
    state = {f"layer{i}": generator.random(count) for i in range(_ARRAYS)}
    times: dict[str, list[float]] = {}
    hopcoll = Hopcoll(folder / "hopcoll", state)
    torch = Torch(folder / "torch", state) if with_torch else None

    def note(name: str, call: Callable[[], dict[str, float]]) -> Callable[[], None]:
        def run() -> None:
            for array in state.values():  # nothing may be found unchanged
                array[:: count // 7] += 1.0
            settle(folder, _WARM * (mib << 20))
            for part, taken_s in call().items():
                times.setdefault(name + part, []).append(taken_s)

        return run

    cases = [
        note("hopcoll save_sync", hopcoll.save),
        note("h5py + fsync", lambda: _h5py(folder / "h5py", state)),
        note("np.savez + fsync", lambda: _numpy(folder / "numpy", state)),
        note("hopcoll save", hopcoll.save_async),
        note("hopcoll restore", hopcoll.restore),
        note("plain read", hopcoll.read_plainly),
    ]
    if torch is not None:
        cases[3:3] = [note("torch save", torch.save), note("torch async_save", torch.save_async)]
    for turn in tqdm(range(turns + 1), desc="turns", disable=None):
        for case in [*cases, *reversed(cases)]:
            case()
        if turn == 0:  # the first saves of each take fresh memory; that turn is not counted
            times.clear()
    hopcoll.close()
    if torch is not None:
        torch.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    others = [name for name in _PEERS if name in medians]
    ratios = {
        f"save_sync{part}, throughput over {name}": (
            medians[name + part] / medians["hopcoll save_sync" + part]
        )
        for part in ("", " and removal")
        for name in others
    }
    ratios["restore, throughput over a plain read"] = (
        medians["plain read"] / medians["hopcoll restore"]
    )
    return {
        "benchmark": "checkpoint",
        "nbytes": mib << 20,
        "arrays": _ARRAYS,
        "turns": turns,
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
        "versions": _versions(with_torch),
        "medians_s": medians,
        "ratios": ratios,
        "times_s": times,
    }


def _versions(with_torch: bool) -> dict[str, str]:
    from importlib.metadata import version

    names = ("numpy", "h5py", *(("torch",) if with_torch else ()))
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), required=True)
@click.option("--png", "png_path", type=click.Path(path_type=Path))
@click.option("--mib", default=256, show_default=True, help="Size of the state.")
@click.option("--turns", default=8, show_default=True, help="Each runs every case twice.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write; a temporary one.")
@click.option("--torch/--no-torch", "with_torch", default=True, help="Needs the extra [torch].")
def main(
    json_path: Path, png_path: Path | None, mib: int, turns: int, folder: Path | None,
    with_torch: bool,
) -> None:
    """Time saves and restores side by side."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        report = measure(Path(scratch), mib, turns, with_torch=with_torch)
    json_path.write_text(json.dumps(report, indent=1) + "\n")
    for name, seconds in report["medians_s"].items():
        click.echo(f"{name:24} {seconds * 1000:8.1f} ms")
    for name, ratio in report["ratios"].items():
        click.echo(f"{name}: {ratio:.2f}")
    if png_path is not None:
        from benchmarks.plotting import plot_checkpoints

        plot_checkpoints(report, png_path)


if __name__ == "__main__":
    main()
