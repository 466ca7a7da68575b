"""Times of checkpoints: ``python -m benchmarks.checkpoint --json FILE [--png FILE]``.

256 MiB of state are saved by hopcoll's store, by plain h5py, by NumPy and by torch's distributed
checkpoints, each followed by an fsync of what it wrote, and read back; side by side in one process,
in turns A B C ... C B A, because a disk is never alone. What a save is timed for is the moment from
which a power cut does no harm; torch syncs its files itself.
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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class Hopcoll:
    """One store, used again and again, as a program does."""

    def __init__(self, folder: Path, state: dict[str, np.ndarray]) -> None:
        self._store = CheckpointStore(folder)
        self._state = state
        self._step = 0

    def save(self) -> float:
        self._step += 1
        start_s = time.perf_counter()
        self._store.save_sync(self._step, self._state)
        taken_s = time.perf_counter() - start_s
        self._store.wait()  # the older commit is removed behind it
        return taken_s

    def save_async(self) -> tuple[float, float]:
        self._step += 1
        start_s = time.perf_counter()
        ticket = self._store.save(self._step, self._state)
        stall_s = time.perf_counter() - start_s
        ticket.wait()
        taken_s = time.perf_counter() - start_s
        self._store.wait()
        return stall_s, taken_s

    def restore(self) -> float:
        start_s = time.perf_counter()
        restored = self._store.restore()
        taken_s = time.perf_counter() - start_s
        assert restored.step == self._step
        return taken_s

    def read_plainly(self) -> float:
        """Read the same bytes of the same file into new memory, with no check."""
        record = self._store._all.highest.base
        assert record is not None
        shards = {}
        start_s = time.perf_counter()
        for entry in record.body["arrays"]:
            name, index = entry["piece"]
            if name not in shards:
                shards[name] = os.open(self._store.path / "shards" / name, os.O_RDONLY)
            array = np.empty(entry["shape"], np.dtype(entry["dtype"]))
            start = record.body["shards"][name]["ranges"][index]["extents"][0][0]
            view, done = memoryview(array).cast("B"), 0
            while done < len(view):
                done += os.preadv(shards[name], [view[done:]], start + done)
        taken_s = time.perf_counter() - start_s
        for descriptor in shards.values():
            os.close(descriptor)
        return taken_s

    def close(self) -> None:
        self._store.close()


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _h5py(folder: Path, state: dict[str, np.ndarray]) -> float:
    path = _fresh(folder) / "state.h5"
    start_s = time.perf_counter()
    with h5py.File(path, "w") as file:
        for name, array in state.items():
            file[name] = array
    _fsync(path)
    _fsync(folder)
    return time.perf_counter() - start_s


def _numpy(folder: Path, state: dict[str, np.ndarray]) -> float:
    path = _fresh(folder) / "state.npz"
    start_s = time.perf_counter()
    np.savez(path, **state)  # type: ignore[arg-type]
    _fsync(path)
    _fsync(folder)
    return time.perf_counter() - start_s


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

    def save(self) -> float:
        path = _fresh(self._folder)
        start_s = time.perf_counter()
        self._dcp.save(self._state, storage_writer=self._writer(path, sync_files=True))
        return time.perf_counter() - start_s

    def save_async(self) -> tuple[float, float]:
        path = _fresh(self._folder)
        start_s = time.perf_counter()
        answer = self._dcp.async_save(
            self._state,
            storage_writer=self._writer(path, sync_files=True),
            async_stager=self._stager,
        )
        stall_s = time.perf_counter() - start_s
        getattr(answer, "upload_completion", answer).result()
        return stall_s, time.perf_counter() - start_s

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

    def note(name: str, call: Callable[[], float | tuple[float, float]]) -> Callable[[], None]:
        def run() -> None:
            for array in state.values():  # nothing may be found unchanged
                array[:: count // 7] += 1.0
            answer = call()
            if isinstance(answer, tuple):
                times.setdefault(f"{name} stall", []).append(answer[0])
                times.setdefault(name, []).append(answer[1])
            else:
                times.setdefault(name, []).append(answer)

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
    ratios = {
        "save_sync, throughput over h5py + fsync": (
            medians["h5py + fsync"] / medians["hopcoll save_sync"]
        ),
        "restore, throughput over a plain read": (
            medians["plain read"] / medians["hopcoll restore"]
        ),
    }
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
