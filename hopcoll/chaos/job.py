"""The program that every rank of a chaos run executes: ``python job.py FOLDER DEADLINE_S``.

It does what ``FOLDER/run.json`` says and appends one JSON line for each thing that it did to
``FOLDER/log.RANK``. A line is one unbuffered write, so that what a rank has logged outlives its
SIGKILL. It judges nothing but what only it can see: whether its buffers were left alone.
"""

from __future__ import annotations

import faulthandler
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
from hopcoll.chaos.plan import Operation, Run, make_input, result_ranks
from hopcoll.chaos.shares import digest_of, lengths, pairs, received_items

__all__ = ["main"]

#: Bytes before and behind each receive buffer that nobody may write to.
_GUARD_BYTES = 64
_JUNK = 0xA5


def _name_of(operation: Operation) -> str:
    """The method of a communicator that makes a call."""
    if operation.kind == "reduce_scatter":
        return "Reduce_scatter" if operation.vector else "Reduce_scatter_block"
    return operation.kind.capitalize() + ("v" if operation.vector else "")


class _Buffers:
    """The memory of one operation at one rank, and whether only the result was written to."""

    def __init__(self, run: Run, number: int, rank: int, chained: str) -> None:
        operation = run.operations[number]
        self.operation = operation
        self.rank, self.size = rank, run.size
        at_root = rank == operation.root
        self.in_place = operation.in_place and (at_root or not operation.rooted)
        self.input = make_input(run, number, rank, chained)
        self.send = self.input.copy()  # what the library is handed; the original is for comparison
        items = received_items(operation, run.size, rank)
        nbytes = items * np.dtype(operation.dtype).itemsize
        self.guarded = np.full(nbytes + 2 * _GUARD_BYTES, _JUNK, np.uint8)
        inner = self.guarded[_GUARD_BYTES : _GUARD_BYTES + nbytes]
        self.receive = inner.view(operation.dtype)
        if self.in_place or (operation.kind == "bcast" and at_root):
            self.own[:] = self.input
        self.has_result = rank in result_ranks(operation, run.size)

    @property
    def own(self) -> np.ndarray:
        """Where the input lies in the receive buffer, IN_PLACE."""
        if self.operation.kind in ("gather", "allgather"):
            count = self.operation.count
            return self.receive[self.rank * count : (self.rank + 1) * count]
        return self.receive

    def start(self, comm: hopcoll.Communicator, prefix: str) -> Any:
        """Make the call; `prefix` is "I" for the nonblocking form."""
        operation = self.operation
        name = _name_of(operation)
        call = getattr(comm, prefix + (name.lower() if prefix else name))
        if operation.kind == "barrier":
            return call()
        if operation.kind == "bcast":
            return call(self.receive, root=operation.root)
        send: Any = hopcoll.IN_PLACE if self.in_place else self.send
        receive: Any = self.receive
        more: dict[str, Any] = {"root": operation.root} if operation.rooted else {}
        if operation.op:
            more["op"] = getattr(hopcoll, operation.op)
        if operation.quorum:
            more["quorum"] = operation.quorum
        if operation.arrival:
            more["order"] = "arrival"
        if operation.kind in ("reduce", "gather") and not self.has_result:
            receive = None
        if operation.kind == "scatter" and self.rank != operation.root:
            send = None
        if operation.vector:
            counts = lengths(operation, self.size)
            if operation.kind in ("gather", "allgather") and receive is not None:
                receive = [receive, counts]
            elif operation.kind == "scatter" and send is not None:
                send = [send, counts]
            elif operation.kind == "alltoall":
                counts = pairs(operation, self.size, self.rank)
                send, receive = [send, counts], [receive, counts]
            elif operation.kind == "reduce_scatter":
                more["recvcounts"] = counts
        return call(send, receive, **more)

    def intact(self, failed: bool) -> bool:
        """Whether the input is as it was, and nothing beside the result was written."""
        same = np.array_equal(self.send.view(np.uint8), self.input.view(np.uint8))
        edges = (self.guarded[:_GUARD_BYTES], self.guarded[len(self.guarded) - _GUARD_BYTES :])
        same = same and all((edge == _JUNK).all() for edge in edges)
        if failed and self.in_place:
            same = same and np.array_equal(self.own.view(np.uint8), self.input.view(np.uint8))
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
        except hopcoll.errors.MissedError:
            self.log("done", op=number, status="missed", epoch=-1, intact=buffers.intact(True))
            return
        digest = None
        if buffers.has_result and not outcome.root_lost:
            digest = digest_of(buffers.receive)
            if buffers.operation.shared:
                self.digests[number] = digest
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
