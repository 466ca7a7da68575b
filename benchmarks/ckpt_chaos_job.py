"""The job that `benchmarks.ckpt_chaos` loses ranks and hosts of: saves steps until something dies.

Each rank prints one JSON object: what it restored, whether every byte was right, and how it ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

import hopcoll
from hopcoll.errors import CheckpointNotFoundError, RankFailedError
from recovery import CheckpointStore, Cut, Disk, Level

ROWS, COLUMNS = 197, 61
_CALLS = ("create", "write", "fsync", "close", "link", "unlink", "fsync_folder")


class MortalDisk(Disk):
    """Ends this rank, and what goes with it, before or after one of its calls.

    Once it is armed, `at` counts them, two for each; or it says (when, call, part of the path).
    """

    def __init__(self) -> None:
        self.at: Any = None
        self.count = 0
        self.end: Any = None
        self.lock = threading.Lock()

    def around(self, name: str, arguments: tuple[Any, ...]) -> Any:
        with self.lock:
            self.count += self.at is not None
            called = [name, _path_of(name, arguments) if isinstance(self.at, list) else ""]
            if self.at == 2 * self.count - 1 or self._is_at("before", *called):
                self.end(f"before {name}")
            result = getattr(Disk, name)(self, *arguments)
            if self.at is not None and (
                self.at == 2 * self.count or self._is_at("after", *called)
            ):
                self.end(f"after {name}")
            return result

    def _is_at(self, when: str, name: str, path: str) -> bool:
        return isinstance(self.at, list) and self.at[:2] == [when, name] and self.at[2] in path


def _path_of(name: str, arguments: tuple[Any, ...]) -> str:
    path = arguments[1] if name == "link" else arguments[0]
    return os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)


def _mortal(name: str) -> Any:
    return lambda self, *arguments: self.around(name, arguments)


for _name in _CALLS:
    setattr(MortalDisk, _name, _mortal(_name))


def weights(step: int) -> np.ndarray:
    return np.random.default_rng(step).random(30_000)


def table(step: int) -> np.ndarray:
    return np.arange(ROWS * COLUMNS, dtype=np.int64).reshape(ROWS, COLUMNS) * 1009 + step


def state_of(step: int, rank: int, ranks: list[int]) -> dict[str, Any]:
    place, count = ranks.index(rank), len(ranks)
    part = table(step)[ROWS * place // count : ROWS * (place + 1) // count]
    cut = Cut(part, length=ROWS)
    return {"step": step, "weights": weights(step), "fixed": table(0), "table": cut}


def is_right(step: int, state: dict[str, Any], rank: int, ranks: list[int]) -> bool:
    cut = state["table"]
    expected = table(step)[cut.offset : cut.offset + len(cut.array)]
    return bool(
        state["step"] == step
        and np.array_equal(state["weights"], weights(step))
        and np.array_equal(state["fixed"], table(0))
        and np.array_equal(cut.array, expected)
    )


class Job:
    """One rank of it. `plan` is what the supervisor decided."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.root = Path(plan["root"])
        self.comm = hopcoll.init()
        self.rank = self.comm.rank
        self.host = plan["hosts"][self.rank]
        self.told: dict[str, Any] = {"rank": self.rank, "host": self.host, "restored": []}
        self.disk = MortalDisk()
        self.disk.end = self.end
        (self.root / "pids" / str(self.rank)).write_text(str(os.getpid()))
        self.comm.barrier()

    def run(self) -> None:
        levels = [
            Level(self.root / "{host}" / "fast", kind="host"),
            Level(self.root / "shared", every=self.plan["every"]),
        ]
        with CheckpointStore(
            levels, self.comm, host=self.host, disk=self.disk, timeout_s=60.0
        ) as store:
            store.on_durable(self.acknowledge)
            step = self.restore(store)
            first = step + 1
            while step < first + self.plan["steps"]:
                try:
                    step += 1
                    if step == first + self.plan["after"] and self.rank == self.plan["victim"]:
                        store.wait()
                        self.disk.at = self.plan["at"]
                    store.save(step, state_of(step, self.rank, self.ranks()))
                    if self.plan["sabotage"] == "early":
                        self.acknowledge(step)
                except RankFailedError:
                    step = self.restore(store)
            try:
                store.wait()
            except RankFailedError:
                step = self.restore(store)
            self.told["ended"] = step

    def ranks(self) -> list[int]:
        """The ranks that are there, alike at all: who takes part in a barrier."""
        return list(self.comm.Barrier().contributors)

    def restore(self, store: CheckpointStore) -> int:
        try:
            step, state = store.restore()
        except CheckpointNotFoundError:
            self.told["restored"].append(None)
            return 0
        self.told["restored"].append(step)
        self.told["right"] = self.told.get("right", True) and is_right(
            step, state, self.rank, self.ranks()
        )
        return step

    def acknowledge(self, step: int) -> None:
        descriptor = os.open(self.root / "acknowledged", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b"%d\n" % step)
        os.close(descriptor)

    def end(self, where: str) -> None:
        """Die here, with all that goes down at once."""
        plan = self.plan
        (self.root / "firing").write_text(where)
        (self.root / "firing").rename(self.root / "fired")
        if plan["loss"] == "lab":
            while True:
                signal.pause()  # until the supervisor takes the host away
        hosts = plan["hosts"]
        doomed = [r for r in range(len(hosts)) if plan["loss"] == "host" and hosts[r] == self.host]
        if plan["all"]:
            doomed = list(range(len(hosts)))
        for rank in doomed:
            if rank != self.rank:
                os.kill(int((self.root / "pids" / str(rank)).read_text()), signal.SIGKILL)
        if plan["loss"] == "host":
            shutil.rmtree(self.root / self.host)
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    job = Job(json.loads(Path(sys.argv[1]).read_text()))
    job.run()
    print(json.dumps(job.told), flush=True)


if __name__ == "__main__":
    main()
