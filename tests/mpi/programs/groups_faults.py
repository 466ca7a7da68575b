"""Deaths in communicators that are split off others; one scene a job.

    hopcoll run -n 5 -m tests.mpi.programs.groups_faults SCENE VICTIM

Each rank that gets so far prints a line of JSON with what it saw.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import hopcoll
from hopcoll import _branches, _groups, errors
from hopcoll.outcome import ALLGATHER
from tests.mpi.programs.collectives import CHUNK_BYTES
from tests.mpi.programs.groups import (
    ALL,
    LARGE,
    OTHERS,
    RANK,
    SCENES,
    SIZE,
    TIMEOUT_S,
    VICTIM,
    WORLD,
    begin_total,
    init,
    report,
    scene,
    split,
    total,
    until_among,
    world_ranks,
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@scene
def after_a_death() -> None:
    """What is split off later has the survivors, numbered without gaps."""
    world = init()
    before = world.Dup()
    total(before)
    if RANK == VICTIM:
        die()
    until_among(world, OTHERS)
    again = world.Dup()
    assert again.parent_ranks == OTHERS
    assert (again.rank, again.size) == (OTHERS.index(RANK), len(OTHERS))
    assert again.epoch == 0
    assert total(again) == again.alive == tuple(range(len(OTHERS)))
    parts = split(again, again.rank % 2, -again.rank)
    assert parts.parent_ranks == tuple(range(again.rank % 2, again.size, 2))[::-1]
    assert total(parts, LARGE) == tuple(range(parts.size))
    until_among(before, OTHERS)
    report(alive=again.alive, world=world.alive, epoch=world.epoch)


@scene
def deaths_everywhere() -> None:
    """A death is noticed in several at once, with operations under way in each."""
    world = init(chunk_bytes=CHUNK_BYTES)
    middle = split(world, 0, (RANK - VICTIM) % SIZE)
    comms = {
        "world": world,
        "dup": world.Dup(),
        "reversed": split(world, 0, -RANK),
        "parity": split(world, RANK % 2),
        "middle": middle.Dup(),
        "nested": split(middle, 0, -middle.rank),
    }
    for comm in comms.values():
        total(comm)
    requests, results = {}, {}
    for name, comm in comms.items():
        for i, count in enumerate((LARGE, 3, 50_000)):
            results[name, i] = np.zeros(count)
            mine = np.full(count, 2.0**comm.rank)
            requests[name, i] = comm.Iallreduce(mine, results[name, i])
            if RANK == VICTIM and (name, i) == ("reversed", 1):
                requests["world", 0].test()
                die()
    outcomes: dict[str, list[tuple[int, ...]]] = {}
    for (name, i), request in requests.items():
        outcome = request.wait()
        want = sum(2**rank for rank in outcome.contributors)
        assert (results[name, i] == want).all(), (name, i, outcome)
        line = [comms["world"], comms[name]]
        if name in ("middle", "nested"):
            line.insert(1, middle)
        ranks = world_ranks(*line)
        living = {ranks[rank] for rank in outcome.contributors} - {VICTIM}
        assert living == set(ranks) - {VICTIM}, (name, i, outcome)
        outcomes.setdefault(name, []).append(tuple(ranks[rank] for rank in outcome.contributors))
    outcomes.pop("parity")  # the other part's are others
    for name, comm in comms.items():
        ranks = comm.parent_ranks if name not in ("middle", "nested") else None
        gone = () if ranks is None else tuple(i for i, rank in enumerate(ranks) if rank == VICTIM)
        if ranks is not None:
            until_among(comm, tuple(i for i in range(comm.size) if i not in gone))
    report(outcomes=outcomes, alive=world.alive)


@scene
def dies_in_split() -> None:
    """The victim dies by a planted fault in the middle of the third split."""
    world = init()
    for _ in range(2):
        assert total(world.Dup()) == ALL
    comm = split(world, RANK % 2, -RANK)
    assert set(comm.parent_ranks) | {VICTIM} == set(range(RANK % 2, SIZE, 2)) | {VICTIM}
    living = tuple(i for i, rank in enumerate(comm.parent_ranks) if rank != VICTIM)
    members = world.allgather(comm.parent_ranks)
    until_among(comm, living)
    again = comm.Dup()
    assert again.parent_ranks == living
    assert total(again, LARGE) == tuple(range(len(living)))
    until_among(world, OTHERS)
    report(members=members, alive=world.alive)


def between_the_steps(act: Callable[[], None]) -> None:
    """Have every rank act inside its next Split, when it knows who has come. The limit of that call
    is for what comes then."""
    step = _groups.Groups._step

    def stepped(self: Any, engine: Any, kind: int, *more: Any) -> Any:
        if kind == ALLGATHER:
            more = (*more[:-1], TIMEOUT_S)
        outcome = step(self, engine, kind, *more)
        if kind == ALLGATHER:
            _groups.Groups._step = step
            assert outcome.contributors == ALL
            act()
        return outcome

    _groups.Groups._step = stepped


def victim_waits_for_others() -> None:
    if RANK == VICTIM:
        for _ in OTHERS:
            WORLD.recv()
    else:
        WORLD.send(None, VICTIM)


@scene
def dies_between() -> None:
    """A rank that all know to be a member dies before it has made its end."""
    world = init()

    def act() -> None:
        victim_waits_for_others()
        if RANK == VICTIM:
            die()

    between_the_steps(act)
    comm = split(world, 0, -RANK)
    assert comm.parent_ranks == ALL[::-1]
    until_among(comm, tuple(sorted(SIZE - 1 - rank for rank in OTHERS)))
    until_among(world, OTHERS)
    report(alive=world.alive)


@scene
def leaves_between() -> None:
    """The same, but it leaves with an exception, and its process stays."""
    world = init()

    def act() -> None:
        victim_waits_for_others()
        if RANK == VICTIM:
            raise RuntimeError("this rank has had enough")

    between_the_steps(act)
    try:
        with world:
            comm = split(world, 0, -RANK)
            assert comm.parent_ranks == ALL[::-1]
            until_among(comm, tuple(sorted(SIZE - 1 - rank for rank in OTHERS)))
    except RuntimeError:
        assert RANK == VICTIM
        for _ in OTHERS:
            WORLD.recv()
    else:
        WORLD.send(None, VICTIM)
    report()


@scene
def impatient_between() -> None:
    """A rank gives up waiting when the others have not made their ends yet: it has left the new
    communicator before that is there."""
    world = init()

    def act() -> None:
        if RANK != VICTIM:
            WORLD.recv(source=VICTIM)

    between_the_steps(act)
    if RANK == VICTIM:
        said = ""
        try:
            world.Split(0, timeout_s=0.3)
        except errors.TransferTimeoutError as error:
            said = str(error)
        assert "Allreduce" in said
        for rank in OTHERS:
            WORLD.send(None, rank)
    else:
        comm = split(world, 0)
        assert comm.parent_ranks == ALL
        until_among(comm, OTHERS)
    # Both of its steps were taken: the parent is as it should be.
    assert total(world.Dup()) == ALL
    report(epoch=world.epoch)


@scene
def no_memory() -> None:
    """Where one rank cannot make its end, nobody has one."""
    world = init()
    grow, reserve = _branches.grow, _branches.reserve
    messages = []
    for name, lacking in (("grow", lambda *_: None), ("reserve", lambda _: -2)):
        if RANK == VICTIM:
            setattr(_branches, name, lacking)
        try:
            world.Dup()
        except MemoryError as error:
            messages.append(str(error))
        _branches.grow, _branches.reserve = grow, reserve
    for _ in range(70):
        world.Dup().close()
    comms = [world.Dup() for _ in range(64)]
    for comm in comms:
        assert total(comm) == ALL
    report(messages=messages)


@scene
def raises() -> None:
    """With on_failure="raise" a Split raises alike at all, once; then it works."""
    world = hopcoll.Communicator(WORLD, on_failure="raise", timeout_s=TIMEOUT_S)
    before = world.Dup()
    if RANK == VICTIM:
        die()
    raised = []
    made = []
    while not raised:
        try:
            made.append(world.Dup())
        except errors.RankFailedError as error:
            raised.append(error.ranks)
        if len(made) > 50:
            made.pop(0).close()
    after = world.Dup()
    raised.append(after.parent_ranks)
    assert total(after) == tuple(range(after.size))
    for _ in range(2):  # the setting is inherited
        try:
            raised.append(before.Barrier().contributors)
        except errors.RankFailedError as error:
            raised.append(error.ranks)
    report(raised=raised)


@scene
def all_but_one() -> None:
    """They die one after the other, each in the middle of work; the last one goes on alone."""
    world = init()
    comm = world.Split(0, -RANK)
    assert comm is not None
    for dying in range(SIZE - 1):
        if dying == RANK:
            begin_total(comm)
            die()
        living = tuple(range(dying + 1, SIZE))
        until_among(comm, tuple(sorted(SIZE - 1 - rank for rank in living)), LARGE)
        sub = world.Dup()
        until_among(world, living)
        sub.close()
    report(alive=comm.alive)


@scene
def deaths_and_splits() -> None:
    """Splits without a pause while ranks die by planted faults at chosen times."""
    world = init()
    died = 0
    for number in range(300):
        comm = split(world, number % 2 and RANK % 2, -RANK)
        contributors = total(comm, 1 if number % 5 else 30_000)
        assert comm.rank in contributors
        comm.close()
        died = SIZE - len(world.alive)
    members = split(world, 0).parent_ranks
    report(alive=members, died=died > 0)


if __name__ == "__main__":
    SCENES[sys.argv[1]]()
