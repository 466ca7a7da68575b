"""A program for jobs of Slurm's: it trains, then publishes what it made, exactly once.

    hopcoll run -n 3 tests/slurm/job.py --folder DIR [--steps 60] [--step-s 0.1] ...

Its state depends on every bit of all that came before. At its end ``DIR/model`` has a digest of it,
and ``DIR/world`` a file for each effect that was done, and one for each time that it was asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import hopcoll
import recovery
from recovery.workflows import Workflow, task

SAMPLES, BATCH, COUNT = 30, 8, 4000


def main() -> None:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--folder", type=Path, required=True)
    add("--steps", type=int, default=60)
    add("--step-s", type=float, default=0.1, help="how long a step takes at least")
    add("--interval", type=int, default=5)
    add("--effects", type=int, default=1, help="how many, one after the other")
    add("--effect-s", type=float, default=0, help="how long an effect takes at least")
    add("--replay", action="store_true", help="make the job of this folder again, undisturbed")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if (options.folder / "fails").exists():
        sys.exit(3)

    comm = hopcoll.init()
    digest = train(comm, options)
    if options.replay:
        if comm.rank == 0:
            (options.folder / "replayed").write_text(digest)
        return
    world = str(options.folder / "world")
    with Workflow("publish", store=options.folder / "workflows", comm=comm) as workflow:
        node: Any = start.bind(digest)
        for number in range(options.effects):
            node = effect.bind(node, number, world, options.effect_s)
        workflow.run(node)
    if comm.rank == min(comm.alive):
        (options.folder / "model").write_text(digest)


def train(comm: hopcoll.Communicator, options: argparse.Namespace) -> str:
    """Make the steps, and return a digest of the state."""
    history = recovery.History.read(options.folder / "store") if options.replay else None
    state = {"w": np.zeros(COUNT, np.float32), "drawn": np.random.default_rng(5)}
    samples = np.random.default_rng(1).normal(size=(SAMPLES, COUNT)).astype(np.float32)
    mean = np.empty(COUNT, np.float32)
    with recovery.TrainingSession(
        comm,
        state,
        None if options.replay else options.folder / "store",
        interval=options.interval,
        seed=3,
        log=None if options.replay else options.folder / "log.jsonl",
        replay=history,
    ) as session:
        for step in session.steps(options.steps):
            mine = session.batch(SAMPLES, BATCH)
            gradient = samples[mine].sum(axis=0) + np.float32(session.rng.normal())
            if not options.replay:
                threading.Event().wait(options.step_s)
            session.Allreduce(gradient, mean)
            state["w"] += mean * np.float32(state["drawn"].normal())
            session.log(ranks=session.contributors, start=start_count())
            session.commit(step)
    digest = xxhash.xxh3_64(state["w"].tobytes())
    digest.update(repr(state["drawn"].bit_generator.state).encode())
    return digest.hexdigest()


def start_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


@task(checkpoint="sync")
def start(digest: str) -> str:
    """Return what the effects tell of."""
    return digest


@task(checkpoint="sync", external=True, idempotency_key=True)
def effect(before: str, number: int, world: str, wait_s: float, ctx: Any) -> str:
    """Do something outside, where the same key counts once."""
    folder = Path(world)
    folder.mkdir(exist_ok=True)
    said = {"number": number, "model": before, "start": start_count(), "time": time.time()}
    said["host"] = socket.gethostname()
    key = ctx.idempotency_key.replace("/", ".")
    asked = folder / f"asked.{secrets.token_hex(8)}"
    asked.write_text(json.dumps(said))
    with suppress(FileExistsError):
        os.link(asked, folder / f"done.{number}.{key}")
    threading.Event().wait(wait_s)
    return before


if __name__ == "__main__":
    main()
