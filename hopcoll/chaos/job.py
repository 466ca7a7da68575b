"""The program that every rank of a chaos run executes: ``python job.py FOLDER DEADLINE_S``.

It does what ``FOLDER/run.json`` says and appends one JSON line for each thing that it did to
``FOLDER/log.RANK``. A line is one unbuffered write, so that what a rank has logged outlives its
SIGKILL. It judges nothing but what only it can see: whether its buffers were left alone.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import numpy as np

import hopcoll
from hopcoll.chaos.plan import Run, make_input, result_ranks

__all__ = ["digest_of", "main"]

#: Bytes before and behind each receive buffer that nobody may write to.
_GUARD_BYTES = 64
_JUNK = 0xA5


def digest_of(array: np.ndarray) -> str:
    """Return 128 bits of the SHA-256 of an array's bytes, in hexadecimal."""
    return hashlib.sha256(array.view(np.uint8)).hexdigest()[:32]


class _Buffers:
    """The memory of one operation at one rank, and whether only the result was written to."""

    def __init__(self, run: Run, number: int, rank: int, chained: str) -> None:
        operation = run.operations[number]
        self.operation = operation
        at_root = rank == operation.root
        self.in_place = operation.in_place and (at_root or operation.kind == "allreduce")
        self.input = make_input(run, number, rank, chained)
        self.send = self.input.copy()  # what the library is handed; the original is for comparison
        self.guarded = np.full(operation.nbytes + 2 * _GUARD_BYTES, _JUNK, np.uint8)
        inner = self.guarded[_GUARD_BYTES : _GUARD_BYTES + operation.nbytes]
        self.receive = inner.view(operation.dtype)
        if self.in_place or (operation.kind == "bcast" and at_root):
            self.receive[:] = self.input
        self.has_result = rank in result_ranks(operation, run.size)

    def start(self, comm: hopcoll.Communicator, prefix: str) -> Any:
        """Make the call; `prefix` is "I" for the nonblocking form."""
        operation = self.operation
        name = operation.kind if prefix else operation.kind.capitalize()
        call = getattr(comm, prefix + name)
        if operation.kind == "barrier":
            return call()
        if operation.kind == "bcast":
            return call(self.receive, root=operation.root)
        send = hopcoll.IN_PLACE if self.in_place else self.send
        op = getattr(hopcoll, operation.op)
        if operation.kind == "reduce":
            receive = self.receive if self.has_result else None
            return call(send, receive, op=op, root=operation.root)
        return call(send, self.receive, op=op)

    def intact(self, failed: bool) -> bool:
        """Whether the input is as it was, and nothing beside the result was written."""
        same = np.array_equal(self.send.view(np.uint8), self.input.view(np.uint8))
        edges = (self.guarded[:_GUARD_BYTES], self.guarded[len(self.guarded) - _GUARD_BYTES :])
        same = same and all((edge == _JUNK).all() for edge in edges)
        if failed and self.in_place:
            same = same and np.array_equal(self.receive.view(np.uint8), self.input.view(np.uint8))
        return bool(same)


class _Job:
    def __init__(self, run: Run, comm: hopcoll.Communicator, folder: Path) -> None:
        self.run = run
        self.comm = comm
        self.rank = comm.rank
        # Unbuffered: what was logged must not be lost with the process.
        self.log_file = open(folder / f"log.{self.rank}", "ab", buffering=0)  # noqa: SIM115
        self.under_way: dict[int, tuple[_Buffers, Any]] = {}
        self.digests: dict[int, str] = {}
        self.not_yet_stable: dict[int, Any] = {}

    def log(self, event: str, **fields: Any) -> None:
        fields = {"event": event, "time_s": time.monotonic(), **fields}
        self.log_file.write(json.dumps(fields).encode() + b"\n")

    def step(self, verb: str, number: int) -> None:
        if verb == "wait":
            buffers, request = self.under_way.pop(number)
            self.finish(number, buffers, request.wait)
            return
        self.compute(number)
        source = self.run.operations[number].chained_to
        chained = "" if source is None else self.digests.get(source, "")
        buffers = _Buffers(self.run, number, self.rank, chained)
        self.log("call", op=number)
        if verb == "start":
            self.under_way[number] = buffers, buffers.start(self.comm, "I")
        else:
            self.finish(number, buffers, lambda: buffers.start(self.comm, ""))

    def compute(self, number: int) -> None:
        """Hold the GIL for some milliseconds, now and then, as a user's code would."""
        draw = random.Random(f"{self.run.seed}/{self.run.number}/{number}/{self.rank}")
        if draw.random() < 0.3:
            until_s = time.monotonic() + draw.uniform(0, 0.004)
            while time.monotonic() < until_s:
                pass

    def finish(self, number: int, buffers: _Buffers, wait: Any) -> None:
        try:
            outcome = wait()
        except hopcoll.errors.RankFailedError as error:
            self.log(
                "done",
                op=number,
                status="rank_failed",
                failed=sorted(error.ranks),
                epoch=error.epoch,
                intact=buffers.intact(failed=True),
            )
            return
        digest = None
        if buffers.has_result and not outcome.root_lost:
            digest = self.digests[number] = digest_of(buffers.receive)
        self.log(
            "done",
            op=number,
            status="root_lost" if outcome.root_lost else "ok",
            contributors=list(outcome.contributors),
            epoch=outcome.epoch,
            digest=digest,
            intact=buffers.intact(failed=False),
        )
        self.not_yet_stable[number] = outcome
        for other, candidate in list(self.not_yet_stable.items()):
            if candidate.stable():
                del self.not_yet_stable[other]
                self.log("stable", op=other)


def _describe(comm: hopcoll.Communicator, stacks: TextIO) -> None:
    stacks.write(comm._engine.describe() + "\n")
    stacks.flush()


def main(folder: Path, deadline_s: float) -> None:
    """Do the run of a folder, as one of its ranks; collective over the world."""
    stacks = open(folder / f"stacks.{os.getpid()}", "w")  # noqa: SIM115 - open until the end
    # Well before the harness loses its patience, so that a hang says where it is.
    faulthandler.dump_traceback_later(deadline_s * 0.5, file=stacks)
    run = Run.load(folder / "run.json")
    comm = hopcoll.init(on_failure=run.on_failure)
    watchdog = threading.Timer(deadline_s * 0.55, _describe, (comm, stacks))
    watchdog.daemon = True
    watchdog.start()
    job = _Job(run, comm, folder)
    job.log("start", pid=os.getpid(), size=comm.size)
    try:
        for verb, number in run.steps:
            job.step(verb, number)
    except BaseException:
        job.log("exception", text=traceback.format_exc())
        raise
    job.log("finished", alive=list(comm.alive), epoch=comm.epoch, counters=comm.counters())
    # Both stay armed: the end of the process, too, can hang.


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
