"""The job that `benchmarks.objects_chaos` kills ranks of: random calls of ``comm.objects``.

    hopcoll run -n RANKS -m benchmarks.objects_chaos_job FOLDER

FOLDER holds ``plan.json``. Each rank appends two lines to ``log.RANK`` for each call, before and
after it, each with one system call: what was logged outlives a SIGKILL. What an object must be
follows from its key and its version (who put it, the how manieth put of that rank it was), and
every object says its version; so any reader knows whether it got the right bytes.

There are three sorts of keys: ``own R I`` is put by rank R alone, which deletes it now and then and
puts another version; ``any I`` is put and deleted by all; ``part G R`` is put once, by rank R, and
stays: parts of a group are alike in dtype and shape, and are reduced.
"""

from __future__ import annotations

import asyncio
import collections
import faulthandler
import gc
import hashlib
import json
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hopcoll
from hopcoll import errors
from hopcoll.objects import ObjectRef

OWN_COUNT, ANY_COUNT = 2, 8
#: Items of a part, for each group.
PART_ITEMS = (1, 3_000, 200_000)
BYTES_MIN, BYTES_MAX = 32, 4 << 20
DTYPES = ("u1", "i2", "f4", "f8", "i8", "c16")
#: After so long a put or a deletion hangs.
LIMIT_S = 20.0
#: Of a get that waits for what may never come.
BLIND_S = 0.3
#: Between two calls.
PAUSE_S = 0.01
VIEWS_MAX = 5
#: A transfer that never comes is not waited for longer before a death.
_TRANSFER_S = 2.0
_LOOK_S = 0.0002
_MOVED = {"sender": "chunks_sent", "receiver": "chunks_received"}
_HEADER = np.dtype([("key", "u8"), ("rank", "u8"), ("count", "u8")])
ENDS = {
    errors.ObjectExistsError: "exists",
    errors.ObjectLostError: "lost",
    errors.ObjectDeletedError: "deleted",
    errors.ObjectStoreFullError: "full",
    TimeoutError: "timeout",
}

Version = tuple[int, int]


# ---- what objects are ----------------------------------------------------------------------


def keys_of(size: int) -> list[str]:
    """All keys of a job, but for results of reductions."""
    return [
        *(f"own {rank} {i}" for rank in range(size) for i in range(OWN_COUNT)),
        *(f"any {i}" for i in range(ANY_COUNT)),
        *(f"part {group} {rank}" for group in range(len(PART_ITEMS)) for rank in range(size)),
    ]


def _number_of(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=5).digest(), "little")


def part(group: int, rank: int) -> np.ndarray:
    """What a rank puts in for a reduction; sums of them are exact."""
    return (np.arange(PART_ITEMS[group], dtype=np.int64) * 7919 + 104_729 * rank) % 1_000_003


def content(key: str, version: Version) -> np.ndarray:
    """The object of a key and a version: it decides dtype, shape and every byte."""
    words = key.split()
    if words[0] == "part":
        return part(int(words[1]), int(words[2]))
    rank, count = version
    draw = random.Random(f"{key}/{rank}/{count}")
    dtype, sort = np.dtype(draw.choice(DTYPES)), draw.random()
    if sort < 0.1:
        return np.zeros((0, rank, count), dtype)
    if sort < 0.2:
        return np.array(_number_of(key) << 22 | rank << 14 | count, np.int64)
    nbytes = int(BYTES_MIN * (BYTES_MAX / BYTES_MIN) ** draw.random())
    if sort > 0.7:
        nbytes = draw.randint(BYTES_MAX // 4, BYTES_MAX)
    nbytes -= nbytes % 16
    words = np.arange(nbytes // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(draw.getrandbits(64))
    words[:3].view(_HEADER)[0] = (_number_of(key), rank, count)
    array = words.view(dtype)
    return array.reshape(1, -1, 1) if draw.random() < 0.2 else array


def version_of(key: str, array: np.ndarray) -> Version:
    """What an object says that its version is; (-1, -1) if that is nonsense."""
    if key.startswith("part"):
        return int(key.split()[2]), 0
    if array.size == 0:
        version = tuple(array.shape[1:])
    elif array.ndim == 0:
        version = int(array) >> 14 & 0xFF, int(array) & 0x3FFF
    else:
        header = np.frombuffer(array.tobytes()[: _HEADER.itemsize], _HEADER)[0]
        version = int(header["rank"]), int(header["count"])
    return version if len(version) == 2 and max(version) < 1 << 14 else (-1, -1)


def is_right(key: str, version: Version, array: np.ndarray) -> bool:
    if version == (-1, -1):
        return False
    want = content(key, version)
    same = array.dtype == want.dtype and array.shape == want.shape
    return bool(same and array.tobytes() == want.tobytes())


# ---- how a rank dies -----------------------------------------------------------------------


class Death:
    """Kills this rank: before a call, or by a thread in the middle of one.

    Parameters
    ----------
    how : dict
        ``at``: the number of the call; ``how``: "between", "call" (after ``delay_s``), "sender" or
        "receiver" (when so many ``chunks`` of objects have gone or come since).
    """

    def __init__(self, how: dict[str, Any], comm: hopcoll.Communicator, log: Any) -> None:
        self.how, self.comm, self.log = how, comm, log
        self.thread: threading.Thread | None = None

    def at(self, number: int) -> None:
        if number != self.how["at"]:
            return
        if self.how["how"] == "between":
            self.end()
        self.thread = threading.Thread(target=self._later, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def end(self) -> None:
        self.log("dying", how=self.how["how"])
        os.kill(os.getpid(), signal.SIGKILL)

    def _later(self) -> None:
        if self.how["how"] in _MOVED:
            until_s, goal = time.monotonic() + _TRANSFER_S, self._moved() + self.how["chunks"]
            while time.monotonic() < until_s and self._moved() < goal:
                time.sleep(_LOOK_S)
        else:
            time.sleep(self.how["delay_s"])
        self.end()

    def _moved(self) -> int:
        return self.comm.objects.stats()[_MOVED[self.how["how"]]]


# ---- the calls -----------------------------------------------------------------------------


class Job:
    """One rank of it."""

    def __init__(self, folder: Path, plan: dict[str, Any], comm: hopcoll.Communicator) -> None:
        self.folder, self.plan, self.comm = folder, plan, comm
        self.rank, self.objects = comm.rank, comm.objects
        self.draw = random.Random(f"{plan['seed']}/{plan['number']}/{self.rank}")
        self.keys = keys_of(comm.size)
        self.file = os.open(
            folder / f"log.{self.rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
        )
        how = plan["deaths"].get(str(self.rank), {"at": -1})
        self.death = Death(how, comm, self.log)
        self.called = self.puts = 0
        self.views: collections.deque[tuple[str, Version, np.ndarray]] = collections.deque()
        self.views_wrong = 0

    def log(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "time_s": time.monotonic(), **fields})
        os.write(self.file, line.encode() + b"\n")

    def make(self, what: str, call: Callable[[], dict[str, Any]], ref: Any = None, **fields: Any):
        """Make a call, and log it and its end; whether it was answered as it should be."""
        self.log("call", number=self.called, what=what, **fields)
        try:
            told = {"end": "ok", **call()}
        except tuple(ENDS) as error:
            end = next(word for kind, word in ENDS.items() if isinstance(error, kind))
            told = {"end": end}
            if end != "timeout":
                told["names"] = error.ref == ref
        resumed = self.objects.stats()["resumed"]
        self.log("done", number=self.called, resumed=resumed, **told)
        self.called += 1
        return told["end"] == "ok"

    # ---- calls ----

    def put(self, key: str) -> None:
        ref = ObjectRef(key)
        self.puts += 1
        version = (self.rank, 0 if key.startswith("part") else self.puts)
        array = content(key, version)

        def call() -> dict[str, Any]:
            self.publish(f"ref.{key}", self.objects.put(array, ref, timeout_s=LIMIT_S))
            return {}

        self.make("put", call, ref, key=key, version=version)

    def get(self, key: str, limit_s: float, known: bool = False, tasks: bool = False) -> None:
        ref = self.published(f"ref.{key}") if known else None
        known = ref is not None
        ref = ref or ObjectRef(key)

        def call() -> dict[str, Any]:
            if tasks:
                array = asyncio.run(asyncio.wait_for(self.objects.get_async(ref), limit_s))
            else:
                array = self.objects.get(ref, timeout_s=limit_s)
            version = version_of(key, array)
            self.see(key, version, array)
            return {"version": version, "right": is_right(key, version, array)}

        self.make("get", call, ref, key=key, known=known, limit_s=limit_s)

    def wait(self, keys: list[str], count: int, limit_s: float) -> list[str]:
        """Which of them are there."""
        names: list[str] = []

        def call() -> dict[str, Any]:
            ready, pending = self.objects.wait(keys, count, timeout_s=limit_s)
            names.extend(ref.name for ref in ready)
            return {"ready": names, "pending": [ref.name for ref in pending]}

        self.make("wait", call, keys=keys, count=count, limit_s=limit_s)
        return names

    def delete(self, key: str) -> None:
        self.delete_ref(key, ObjectRef(key))

    def delete_ref(self, key: str, ref: ObjectRef) -> None:
        def call() -> dict[str, Any]:
            self.objects.delete(ref, timeout_s=LIMIT_S)
            return {}

        self.make("delete", call, ref, key=key)

    def reduce(self, group: int, count: int) -> None:
        key = f"result {self.rank} {self.called}"
        refs = [ObjectRef(f"part {group} {rank}") for rank in range(self.comm.size)]

        def call() -> dict[str, Any]:
            self.publish(key, self.objects.reduce(refs, hopcoll.SUM, count=count))
            return {}

        self.make("reduce", call, None, key=key, group=group, count=count)

    def get_result(self, key: str, limit_s: float) -> None:
        ref = self.published(key)

        def call() -> dict[str, Any]:
            array = self.objects.get(ref, timeout_s=limit_s)
            names = {ObjectRef(name): name for name in self.keys}
            told = [names.get(one, "?") for one in self.objects.contributors(ref)]
            parts = [part(*map(int, name.split()[1:])) for name in told if name != "?"]
            want = np.sum(parts, axis=0) if parts else np.zeros(0)
            right = array.shape == want.shape and bool((array == want).all())
            digest = hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()
            return {"contributors": told, "digest": digest, "right": right}

        self.make("get", call, ref, key=key, known=True, limit_s=limit_s)

    # ---- refs that ranks hand each other ----

    def publish(self, name: str, ref: ObjectRef) -> None:
        made = self.folder / f"making.{self.rank}"
        made.write_bytes(pickle.dumps(ref))
        made.rename(self.folder / name)

    def published(self, name: str) -> Any:
        path = self.folder / name
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def results(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("result *"))

    # ---- views ----

    def see(self, key: str, version: Version, array: np.ndarray) -> None:
        """Keep a view for a while: it stays as it was, also when its object is deleted."""
        self.views.append((key, version, array))
        while len(self.views) > VIEWS_MAX:
            self.views_wrong += not is_right(*self.views.popleft())

    # ---- the phases ----

    def run(self) -> None:
        calls = self.plan["calls"]
        parts = {
            self.draw.randrange(calls // 2): f"part {group} {self.rank}"
            for group in range(len(PART_ITEMS))
        }
        for step in range(calls):
            self.death.at(step)
            if step in parts:
                self.put(parts[step])
            else:
                self.random_call()
            time.sleep(self.draw.uniform(0, PAUSE_S))
        self.death.wait()
        self.comm.Barrier()
        self.audit()
        self.settle()

    def random_call(self) -> None:
        draw, what = self.draw, self.draw.random()
        if what < 0.25:
            own = f"own {self.rank} {draw.randrange(OWN_COUNT)}"
            self.put(draw.choice([own, own, f"any {draw.randrange(ANY_COUNT)}"]))
        elif what < 0.35:
            own = f"own {self.rank} {draw.randrange(OWN_COUNT)}"
            self.delete(draw.choice([own, f"any {draw.randrange(ANY_COUNT)}"]))
        elif what < 0.45:
            keys = draw.sample(self.keys, draw.randint(1, 6))
            self.wait(keys, draw.randint(0, len(keys)), draw.uniform(0, 0.1))
        elif what < 0.53 and hasattr(self.objects, "reduce"):
            if draw.random() < 0.4:
                self.reduce(draw.randrange(len(PART_ITEMS)), draw.randint(1, self.comm.size // 2))
            elif results := self.results():
                self.get_result(draw.choice(results), draw.choice([BLIND_S, self.patient_s]))
        else:
            self.random_get(draw.choice(self.keys))

    def random_get(self, key: str) -> None:
        """Without knowledge only for a short time; else until it is there, or hangs."""
        way = self.draw.random()
        if way < 0.4:
            self.get(key, self.draw.uniform(0, BLIND_S), tasks=way < 0.1)
        elif way < 0.7:
            known = (self.folder / f"ref.{key}").exists()
            self.get(key, self.patient_s if known else BLIND_S, known=known)
        elif key in self.wait([key], 1, BLIND_S / 3):
            self.get(key, self.patient_s, tasks=way > 0.95)

    @property
    def patient_s(self) -> float:
        """Twice what a get may take whose object is there all the time."""
        return 2 * self.plan["patience_s"]

    def audit(self) -> None:
        """All deaths are over: whoever is left looks for everything."""
        for key in self.wait(self.keys, len(self.keys), 1.1 * self.plan["patience_s"]):
            self.get(key, self.patient_s)
        for key in self.results():
            self.get_result(key, self.patient_s)

    def settle(self) -> None:
        """One rank deletes all; nothing is left then."""
        self.comm.Barrier()
        if self.rank == min(self.comm.alive):
            for key in self.keys:
                self.delete(key)
            for key in self.results():
                self.delete_ref(key, self.published(key))
        while self.views:
            self.views_wrong += not is_right(*self.views.popleft())
        gc.collect()
        self.comm.Barrier()
        until_s = time.monotonic() + self.plan["patience_s"]
        while True:  # the last voids may be under way
            stats = self.objects.stats()
            left = {name: stats[name] for name in ("used_bytes", "objects", "streams")}
            if not any(left.values()) or time.monotonic() > until_s:
                break
            time.sleep(_LOOK_S)
            self.objects._keeper.turn()
        self.log("finished", left=left, views_wrong=self.views_wrong, stats=stats)
        self.comm.Barrier()


def main(folder: Path) -> None:
    """Do the job of a folder, as one of its ranks; collective over the world."""
    plan = json.loads((folder / "plan.json").read_text())
    stacks = open(folder / f"stacks.{os.getpid()}", "w")  # noqa: SIM115 - open until the end
    faulthandler.dump_traceback_later(plan["deadline_s"] * 0.8, file=stacks)
    comm = hopcoll.init()
    job = Job(folder, plan, comm)
    job.log("start", pid=os.getpid())
    comm.Barrier()
    try:
        job.run()
    except BaseException:
        job.log("exception", text=traceback.format_exc())
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
