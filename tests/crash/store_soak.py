"""Small saves and prunes, very many: ``python -m tests.crash.store_soak [SAVES] [FOLDER]``.

Nothing may be left behind on the disk, and memory may not grow.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from recovery import CheckpointStore


def traced_bytes() -> int:
    """Return what is allocated, but for what pathlib has interned: Python's table of such names is
    made anew now and then, all of it at once."""
    snapshot = tracemalloc.take_snapshot()
    others = [tracemalloc.Filter(False, module.__file__) for module in (pathlib, tracemalloc)]
    return sum(trace.size for trace in snapshot.filter_traces(others).traces)


def soak(path: Path, saves: int) -> dict[str, Any]:
    """Save and prune, check what is there, and return what was measured.

    Memory is compared between two thirds of the saves and all of them.
    """
    generator = np.random.default_rng(0)
    every = saves // 3
    kept_bytes = 0
    start_s = time.perf_counter()
    with CheckpointStore(path, keep_last=2, keep_every=every) as store:
        for step in range(saves):
            store.save(step, {"a": generator.random(20), "b": np.ones(200), "step": step})
            if step % 10 == 5:
                store.prune(keep_last=2, keep_every=every)
            if step == 2 * every:
                store.wait()
                gc.collect()
                tracemalloc.start()
            if step == 2 * every + min(60, every // 2):
                store.wait()
                gc.collect()
                kept_bytes = traced_bytes()
        store.wait()
        gc.collect()
        grown_bytes = traced_bytes() - kept_bytes
        tracemalloc.stop()
        expected = sorted({*range(0, saves, every), saves - 2, saves - 1})
        assert store.steps() == expected
        counts = {name: len(os.listdir(path / name)) for name in ("shards", "slots", "tmp")}
        assert counts["shards"] <= len(expected), counts
        assert counts["slots"] <= 16 + len(expected), counts
        assert counts["tmp"] == 0, counts
        assert not list(store.verify())
    return {
        "saves": saves,
        "grown_bytes": grown_bytes,
        "files": counts,
        "seconds": time.perf_counter() - start_s,
    }


if __name__ == "__main__":
    saves, folder = (*sys.argv[1:], *("10000", None)[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        print(json.dumps(soak(Path(scratch) / "store", int(saves))))
