"""A training session on real ranks: a walk that depends on every bit of what came before.

    hopcoll run -n 4 -m tests.mpi.programs.training [--store DIR] [--die RANK:STEP,...] ...

Each rank that gets to the end prints a line of JSON with a digest of its state.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

import numpy as np
import xxhash

import hopcoll
import recovery

SAMPLES, BATCH = 30, 8
COUNT = 40_000  # large enough for the chunked path, where the order of the sum shows


def main() -> None:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--steps", type=int, default=12)
    add("--store")
    add("--interval", type=lambda text: text if text == "auto" else int(text), default=3)
    add("--log")
    add("--min-ranks", type=int, default=1)
    add("--die", default="", help="RANK:STEP, before the first Allreduce of the step")
    add("--die-once", default="", help="as --die, in the first of several starts")
    add("--die-between", default="", help="RANK:STEP, before the second one")
    add("--die-committing", default="", help="RANK:STEP, when the others commit")
    add("--poison", type=int, help="a sample that kills who has it")
    add("--history", help="written at the end")
    add("--replay", help="a history, or a store that has one")
    add("--cut", action="store_true", help="a part of the state is cut over the ranks")
    options = parser.parse_args()

    comm = hopcoll.init()
    replay = None if options.replay is None else recovery.History.read(options.replay)
    state = {"w": np.zeros(COUNT, np.float32), "norm": 1.0, "drawn": np.random.default_rng(5)}
    if options.cut:
        pieces = np.array_split(np.arange(100.0).reshape(50, 2), comm.size)
        state["rows"] = recovery.Cut(pieces[comm.rank].copy())
    samples = np.random.default_rng(1).normal(size=(SAMPLES, COUNT)).astype(np.float32)
    mean, norm = np.empty(COUNT, np.float32), np.empty(1)
    with recovery.TrainingSession(
        comm,
        state,
        options.store,
        min_ranks=options.min_ranks,
        interval=options.interval,
        seed=3,
        log=options.log,
        replay=replay,
    ) as session:
        first = session.first
        made = []
        for step in session.steps(options.steps):
            made.append(step)
            mine = session.batch(SAMPLES, BATCH)
            if options.poison in mine:
                os.kill(os.getpid(), signal.SIGKILL)
            gradient = samples[mine].sum(axis=0) * state["norm"] + session.rng.normal()
            die(session, step, options.die)
            if os.environ.get("HOPCOLL_RESTART", "0") == "0":
                die(session, step, options.die_once)
            session.Allreduce(gradient.astype(np.float32), mean)
            state["w"] += mean * state["drawn"].normal()
            if options.cut:
                state["rows"].array[:] += mean[0]
            die(session, step, options.die_between)
            session.Allreduce(np.array([float(np.abs(gradient).mean())]), norm)
            state["norm"] = 1 / float(norm[0])
            session.log(norm=state["norm"], ranks=session.contributors)
            die(session, step, options.die_committing)
            session.commit(step)
        if options.history and session.reports:
            session.history.write(options.history)
        digest = xxhash.xxh3_64(state["w"].tobytes())
        digest.update(repr((state["norm"], state["drawn"].bit_generator.state)).encode())
        said = {
            "rank": comm.rank,
            "digest": digest.hexdigest(),
            "first": first,
            "made": made,
            "last": session.history.contributors(session.history.last),
        }
        if options.cut:
            rows = comm.allgather(state["rows"].array.tolist())
            said["rows"] = [row for piece in rows if piece is not None for row in piece]
    os.write(1, (json.dumps(said) + "\n").encode())


def die(session: recovery.TrainingSession, step: int, deaths: str) -> None:
    """Die where it was asked for, when what was saved before is durable."""
    if f"{session.comm.rank}:{step}" in deaths.split(","):
        if session.store is not None:
            session.store.wait()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
