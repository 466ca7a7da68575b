"""Random workflows that are cut off again and again, and what must hold of them all the same.

A crash is a process that dies at its k-th call of the disk (or of the world outside), and a disk
that keeps of what was not synced what the model of `tests.powercut` allows. Its successor may die
as well. Some that die are only taken for silent: what they were about to do to the world they do
later. In the end the world must be as if nothing had happened (`tests.crash.workflow_graphs` tells
how that is seen), and nothing may have run again that no rule required.

``python -m tests.crash.workflow_corpus --points 10000 --json FILE`` runs many more than the tests
do. A seed that fails is printed with its crashes, and tried again by ``--only SEED --lives K,K``.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import click
from tqdm import tqdm

from hopcoll.errors import EffectUnknownError, HopcollError, WorkflowError
from recovery.journal import Journal, Record
from recovery.workflows import Node, Workflow, actors
from recovery.workflows import engine as engines
from recovery.workflows import folder as folders
from recovery.workflows.graph import Graph, Loop
from recovery.workflows.ledger import Done, Ledger
from tests.crash import workflow_graphs as graphs
from tests.crash.workflow_graphs import EFFECTS, World, kind_of
from tests.crash.workflow_living import corpus
from tests.crash.workflow_memory import EVENTS, Memory, OneRank
from tests.powercut import Killed, Log, Medium, RecordingDisk, choices

_CRASHES_MAX = 3
#: A process number that nobody has.
_DEAD_PID = 2**22 + 1


class WrongError(AssertionError):
    """What must hold does not."""


# Crashes


@dataclass
class Counts:
    """What happened."""

    points: int = 0  # crashes
    workflows: int = 0
    unknown: int = 0
    zombies: int = 0
    undone: int = 0
    rerun: int = 0
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)

    def add(self, other: Counts) -> None:
        for name, value in other.__dict__.items():
            setattr(self, name, getattr(self, name) + value)


def facts(path: Path) -> Ledger:
    """What is in the journal."""
    ledger = Ledger()
    if (path / "w" / "journal").is_dir():
        for record in Journal.read(path / "w" / "journal").records:
            ledger.apply(record.kind, record.head, record.body, record.seq)
    return ledger


def _makers_in(ledger: Ledger, done: Done) -> Iterator[str]:
    """Who made the values that a task was called with, and the objects that they refer to."""
    for name in done.inputs:
        yield name
        if (one := ledger.done(name)) is not None:
            yield from (maker for _, maker in one.head.get("refs", ()))


class Trial:
    """One workflow from its begin to its end, with crashes in between."""

    value: dict[str, Any]

    def __init__(
        self, seed: int, scratch: Path, counts: Counts, node: Node | None = None
    ) -> None:
        self.seed = seed
        self.draw = random.Random(seed)
        self.scratch = scratch
        self.counts = counts
        self.node: Node = corpus(seed // 1000) if node is None else node
        self.world: World | None = None
        self.memory = Memory(self.draw)
        self.incarnation = 0

    def run(self, lives: Sequence[int | str]) -> None:
        """Run it; its n-th life ends at the call, or in the task, that is given, and the one after
        the last goes on to the end."""
        outside = self.scratch / "world"
        outside.mkdir()
        graphs.WORLD = self.world = World(outside)
        path = self.scratch / "disk-0"
        path.mkdir()
        for number in itertools.count():
            log = self._live(path, lives[number] if number < len(lives) else None)
            if log is None:
                break
            # The power goes: of what was not synced, some is there.
            medium = log.start.copy()
            for call in log.calls:
                medium.apply(call)
            log.close()
            state = self._left(medium)
            shutil.rmtree(path)
            path = self.scratch / f"disk-{number + 1}"
            state.make(path)
        self.world.wake()
        self.check(path)
        self.world.database.close()

    def _left(self, medium: Medium) -> Any:
        found = list(itertools.islice(choices(medium, self.draw, 6), 60))
        return medium.state(self.draw.choice(found))

    def _begin_life(self) -> int:
        """See what the next life has of the one before; returns how many threads it has."""
        world = self.world
        assert world is not None
        # Another rank leads, and that of the one that died is gone; or it is another job.
        lost = self.memory.lost_count
        if self.draw.random() < 0.5:
            self.memory.lose(0)
        else:
            self.memory = Memory(self.draw)
        self.memory.lost_count = lost
        world.elsewhere = self.draw.random() < 0.15
        world.moments_to_wake = self.draw.randint(1, 20)
        return self.draw.choice((1, 1, 4))

    def _ranks(self, workflow: Workflow) -> OneRank:
        return OneRank(workflow, self.memory)

    def _live(self, path: Path, life: int | str | None) -> Log | None:
        """One process; None where the workflow is done."""
        world = self.world
        assert world is not None
        self.incarnation += 1
        workers = self._begin_life()
        before = facts(path)
        world.executed.clear()
        world.asked.clear()
        world.undone.clear()
        log = Log(path)
        world.dies_in = life if isinstance(life, str) else None
        world.disk = disk = RecordingDisk(log, None if isinstance(life, str) else life)
        owner = {
            "nonce": secrets.token_hex(12), "pid": _DEAD_PID + self.incarnation,
            "host": "elsewhere" if world.elsewhere else "here", "since": "then",
        }  # fmt: skip
        try:
            with (
                mock.patch.object(folders, "describe_owner", lambda: owner),
                mock.patch.object(folders, "observe", self._observe),
                mock.patch.object(folders, "Lease", mock.MagicMock()),
                mock.patch.object(engines, "_POLL_S", 0.002),
                mock.patch.object(actors, "_LIVE", self.memory.live),
            ):
                workflow = Workflow("w", path, workers=workers, disk=disk)
                workflow._gang = self._ranks(workflow)
                completed = False
                try:
                    self.value = workflow.run(self.node)
                    completed = True
                finally:
                    self._judge(before, facts(path), workflow, completed)
            log.close()
            return None
        except Killed as error:
            if str(error).startswith("mixed"):
                raise WrongError(str(error)) from error
            self.counts.points += 1
            return log
        except WorkflowError as error:
            if disk.left == 0:
                self.counts.points += 1
                return log  # a thread that met the others' death
            if not isinstance(error, EffectUnknownError):
                raise
            self._settle(path, error, disk)
            return log

    @staticmethod
    def _observe(folder: Path, owner: Any, patience_s: float, **how: Any) -> str:
        if owner is None:
            return "free"
        return "dead" if owner["host"] == "here" else "silent"

    def _settle(self, path: Path, error: EffectUnknownError, disk: RecordingDisk) -> None:
        """A person sees to it that nobody is about to do it, looks at the world, and says what is
        true."""
        world = self.world
        assert world is not None
        now = facts(path)
        state = now.states[error.task]
        kind = kind_of(error.task)
        if state.begun is None or kind not in ("blind", "asked"):
            raise WrongError(f"{error.task} is known, and was said to be unknown") from error
        if kind == "asked" and now.owners[state.begun.by]["host"] == "here":
            raise WrongError(f"{error.task} could be asked about") from error
        self.counts.unknown += 1
        disk.left = None
        self.counts.zombies += len(world.zombies)
        world.wake()
        rows = world.rows("select tokens from plain where task = ?", error.task)
        rows += [(tokens,) for name, tokens in world.lines() if name == error.task]
        with (
            mock.patch.object(folders, "observe", self._observe),
            mock.patch.object(folders, "Lease", mock.MagicMock()),
        ):
            workflow = Workflow("w", path, disk=disk)
            value = {"tokens": json.loads(rows[0][0]), "by": error.task} if rows else None
            workflow.resolve(error.task, done=bool(rows), value=value)

    # What must hold

    def _judge(self, before: Ledger, now: Ledger, workflow: Workflow, completed: bool) -> None:
        """Whether what ran in this life, and was undone, had to."""
        world = self.world
        assert world is not None
        executed = dict(world.executed)
        self.counts.undone += len(world.undone)
        for _, reason in workflow.ran:
            self.counts.reasons[re.sub(r"<.*>", "an object", reason.split(",")[0])] += 1

        def is_void(name: str) -> bool:
            done = before.done(name)
            return done is not None and any(
                one in renewed or (made := before.done(one)) is None or made.attempt != version
                for one, version in done.inputs.items()
            )

        def is_another(name: str, done: Done) -> bool:
            """Whether it gives another value, also a gang that has lost a rank only now."""
            if not done.deterministic:
                return True
            again = now.done(name)
            return "w" in done.head and again is not None and again.attempt != done.attempt

        renewed = {
            name for name in executed
            if (done := before.done(name)) is not None and is_another(name, done)
        }  # fmt: skip
        while more := {name for name in set(before.states) - renewed if is_void(name)}:
            renewed |= more
        users: dict[str, list[str]] = {}
        for name, makers in [*world.executed, *world.asked]:
            for maker in makers:
                users.setdefault(maker, []).append(name)
        for name, _ in workflow.ran:
            if kind_of(name).startswith("Steady") and (done := now.done(name)) is not None:
                for maker in _makers_in(now, done):  # it does not say itself who called it
                    users.setdefault(maker, []).append(name)
        for name in executed:
            done = before.done(name)
            if done is None:
                continue
            self.counts.rerun += 1
            if is_void(name):
                continue
            if done.durable:
                raise WrongError(f"{name} ran again, though its value was there")
            if completed and name not in users and kind_of(name) != "output":
                raise WrongError(f"{name} ran again, though nobody who ran used its value")
        order = [name for name, _, at_once in world.undone if at_once]
        for i, (name, tokens, at_once) in enumerate(world.undone):
            if not at_once:
                continue  # it failed in this life
            if early := [one for one in order[:i] if one in tokens and name not in order[:i]]:
                raise WrongError(f"{early[0]} was undone before {name}, which was made from it")
            # What was cut off, or has failed, had to be; what had ended only to run again.
            done = before.done(name)
            if completed and done is not None and name not in executed and "[" not in name:
                raise WrongError(f"{name} was undone, and did not run again")

    def check(self, path: Path) -> None:
        """Raise where the world does not agree with the output, or the journal."""
        world = self.world
        assert world is not None
        tokens = self.value["tokens"]
        rows = [
            *world.database.execute("select task, tokens from keyed"),
            *world.database.execute("select task, tokens from plain"),
            *world.lines(),
        ]
        names = [name for name, _ in rows]
        if len(set(names)) != len(names):
            raise WrongError(f"an effect was done twice: {sorted(names)}")
        # A control edge carries no tokens; what was done with before it, the journal knows.
        ledger = facts(path)
        records = Journal.read(path / "w" / "journal").records
        loops = {
            vertex.id
            for vertex in Graph.of(self.node).vertices.values()
            if isinstance(vertex.node.task, Loop)
        }
        effects = {name for name in tokens if kind_of(name) in EFFECTS} | {
            record.head["t"]
            for record in records
            if record.kind == "done" and "x" in record.head
        }
        if set(names) != effects:
            raise WrongError(f"effects: {sorted(names)} instead of {sorted(effects)}")
        things = world.database.execute("select task, tokens, token from things").fetchall()
        done = {n for n, one in ledger.states.items() if one.done is not None and n not in loops}
        done |= {name for rows in ledger.attic.values() for name, _ in rows}
        wanted = {name for name in done | set(tokens) if kind_of(name) == "thing"}
        if sorted(name for name, *_ in things) != sorted(wanted):
            raise WrongError(f"things: {sorted(n for n, *_ in things)} instead of {sorted(wanted)}")
        for name, text, *_ in [*rows, *things]:
            for one, token in json.loads(text).items():
                if tokens.get(one, token) != token:
                    raise WrongError(f"{name} was done with another value of {one}")
        self._check_events(records, ledger)
        self.counts.workflows += 1
        again = Workflow("w", path)
        world.executed.clear()
        if again.run(self.node)["tokens"] != tokens or world.executed:
            raise WrongError("the stored output is another one")

    @staticmethod
    def _check_events(records: Iterable[Record], ledger: Ledger) -> None:
        """Each was given to one task, in the order in which they came, and none is lost: what was
        given to tasks that are void is given again."""
        given: dict[str, str] = {}
        for record in records:
            task = record.head.get("t", "")
            if "e" in record.head and given.setdefault(record.head["e"], task) != task:
                raise WrongError("an event was given to two tasks")
            if record.kind == "anew":
                void = f"{task}/"
                given = {one: to for one, to in given.items() if not to.startswith(void)}
        for key in "ab":
            names = [
                hashlib.sha256(f"{key}\n{number}".encode()).hexdigest()[:32]
                for number in range(EVENTS)
            ]
            count = sum(one in given for one in names)
            if any(one not in given for one in names[:count]):
                raise WrongError(f"an event {key} is lost")
        if ledger.events != set(given):
            raise WrongError("the events that were given are others than the journal says")


def crashes_of(seed: int) -> list[int]:
    """At which calls the lives of a trial end."""
    draw = random.Random(f"lives {seed}")
    lives = [int(draw.triangular(0, 90, 25))]
    lives += [int(draw.triangular(0, 60, 15)) for _ in range(draw.randint(0, _CRASHES_MAX - 1))]
    return lives


def try_seed(
    seed: int,
    counts: Counts,
    lives: Sequence[int | str] | None = None,
    node: Node | None = None,
) -> None:
    """Run one workflow, of the corpus or another, with crashes that the seed says, or others;
    raises `WrongError`."""
    lives = crashes_of(seed) if lives is None else lives
    command = f"--only {seed} --lives {','.join(map(str, lives))}"
    try_it(lambda scratch: Trial(seed, scratch, counts, node).run(lives), command)


def try_it(run: Callable[[Path], None], what: str) -> None:
    """Call `run` with a folder that is gone then; raises `WrongError`."""
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    scratch = Path(tempfile.mkdtemp(prefix="hopcoll-workflow-", dir=memory))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(scratch)
    except (HopcollError, KeyError, AssertionError) as error:
        raise WrongError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def seeds(first: int = 0) -> Iterable[int]:
    """The seeds of trials: of each of 100 graphs in turn."""
    for number in itertools.count(first):
        yield number % 100 * 1000 + number // 100


def _parse(lives: str) -> list[int | str]:
    return [int(one) if one.isdigit() else one for one in lives.split(",")]


def _try(seed: int) -> tuple[Counts, str]:
    counts = Counts()
    try:
        try_seed(seed, counts)
    except WrongError as error:
        return counts, str(error)
    return counts, ""


@click.command()
@click.option("--points", default=10_000, show_default=True, help="Crashes, at the least.")
@click.option("--first", default=0, show_default=True, help="Of the trials.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--only", type=int, help="Try this seed alone.")
@click.option("--lives", help="With --only: the calls, or tasks, its lives end in (K,K,...).")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    points: int, first: int, jobs: int, only: int | None, lives: str | None, json_path: Path | None
) -> None:
    """Cut off random workflows, and see that they end as if nothing had happened."""
    counts = Counts()
    begin_s = time.monotonic()
    if only is not None:
        try_seed(only, counts, _parse(lives) if lives else None)
    failures: list[str] = []
    if only is None:
        with (
            multiprocessing.Pool(jobs) as pool,
            tqdm(total=points, unit=" crashes", disable=None) as bar,
        ):
            for one, failure in pool.imap_unordered(_try, seeds(first), chunksize=4):
                counts.add(one)
                bar.update(one.points)
                if failure:
                    click.echo(failure, err=True)
                    failures.append(failure)
                if counts.points >= points or len(failures) >= 20:
                    break
    report = {
        **counts.__dict__, "reasons": dict(counts.reasons), "failures": failures,
        "seconds": round(time.monotonic() - begin_s, 1),
    }  # fmt: skip
    click.echo(json.dumps(report, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
