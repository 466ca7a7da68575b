"""Random workflows that are cut off again and again, and what must hold of them all the same.

A world outside (a SQLite database and a text file) survives every crash, as the real one does.
Values carry the *tokens* of all tasks that they were made from: a task that is not deterministic
draws a new one whenever it runs. So the last value tells which run of each task counts, and
whatever was done to the world must agree with it: each effect once, with a value made from those
tokens and no others.

A crash is a process that dies at its k-th call of the disk (or of the world), and a disk that keeps
of what was not synced what the model of `tests.powercut` allows. Its successor may die as well.

``python -m tests.crash.workflow_corpus --points 10000 --json FILE`` runs many more than the tests
do.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import sqlite3
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from tqdm import tqdm

from hopcoll.errors import EffectUnknownError, TaskFailedError, WorkflowError
from recovery.journal import Journal
from recovery.workflows import Done, Node, Stop, TaskContext, Workflow, event, loop, task
from recovery.workflows import engine as engines
from recovery.workflows import folder as folders
from recovery.workflows.checks import check_graph
from recovery.workflows.graph import Graph
from recovery.workflows.ledger import Ledger
from tests.powercut import Killed, Log, Medium, RecordingDisk, choices

_CRASHES_MAX = 3
_PAD_BYTES = 100_000
#: A process number that nobody has.
_DEAD_PID = 2**22 + 1


class WrongError(AssertionError):
    """What must hold does not."""


class Contradiction(Exception):
    """An effect that is found to be one that can never be released, while the workflow runs."""


class World:
    """What is outside of a workflow, and what it saw."""

    def __init__(self, path: Path) -> None:
        self.database = sqlite3.connect(path / "world.db", check_same_thread=False)
        self.database.executescript(
            "pragma synchronous = off; pragma journal_mode = memory;"
            "create table keyed (key text primary key, task text, tokens text);"
            "create table plain (task text, tokens text);"
            "create table things (task text, token text, tokens text);"
        )
        self.file = path / "world.txt"
        self.file.touch()
        self.disk: RecordingDisk | None = None
        self.executed: list[str] = []
        self.undone: list[tuple[str, dict[str, str]]] = []
        self.tries: collections.Counter[str] = collections.Counter()

    def moment(self) -> None:
        """A moment in which the process may die."""
        if self.disk is not None:
            with self.disk._call():
                pass

    @contextlib.contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """Change the database, between two moments. Nobody who is dead can."""
        self.moment()
        assert self.disk is not None
        with self.disk.log.lock:
            if self.disk.left == 0:
                raise Killed
            with self.database:
                yield self.database
        self.moment()

    def rows(self, query: str, *values: Any) -> list[Any]:
        assert self.disk is not None
        with self.disk.log.lock:
            return self.database.execute(query, values).fetchall()


WORLD: World


# Tasks


def _merge(inputs: Any) -> dict[str, str]:
    """The tokens of all inputs; no task may be there with two."""
    tokens: dict[str, str] = {}
    for value in inputs:
        for name, token in value["tokens"].items():
            if tokens.setdefault(name, token) != token:
                raise Killed(f"mixed: two values of {name}")  # no try is worth a second one
    return tokens


def _value(ctx: TaskContext, inputs: Any, token: str, pad: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"tokens": {**_merge(inputs), ctx.task_id: token}}
    if pad:
        value["pad"] = np.full(_PAD_BYTES, len(token), np.uint8)
    return value


def _fixed_token(ctx: TaskContext, inputs: Any, clock: bool) -> str:
    parts = [ctx.task_id, sorted(_merge(inputs).items()), int(ctx.rng.integers(1 << 30))]
    if clock:
        parts.append(ctx.now())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@task
def plain(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Gives a value; or a graph that goes on; or fails at first."""
    WORLD.executed.append(ctx.task_id)
    WORLD.moment()
    WORLD.tries[ctx.task_id] += 1
    if how.get("fails", 0) >= WORLD.tries[ctx.task_id]:
        raise ArithmeticError("not yet")
    if how["fixed"]:
        token = _fixed_token(ctx, inputs, how.get("clock", False))
    else:
        token = uuid.uuid4().hex[:12]
    value = _value(ctx, inputs, token, how.get("pad", False))
    if (depth := how.get("goes_on", 0)) > 0:
        rest = {**how, "goes_on": depth - 1}
        one = plain.options(**how["options"]).bind({**rest, "goes_on": 0}, value)
        if how.get("effect"):
            one = keyed.bind({}, one)
        return plain.options(**how["options"]).bind(rest, one, value)
    return value


@task
def turn(state: Any, i: int, ctx: TaskContext) -> Any:
    """The body of a loop."""
    WORLD.executed.append(ctx.task_id)
    WORLD.moment()
    value = _value(ctx, [state], uuid.uuid4().hex[:12], False)
    value["how"] = state.get("how")
    return Stop(value) if i == (state.get("how") or 99) else value


@task(external=True, idempotency_key=True)
def keyed(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """An effect that the outside does once for a key."""
    WORLD.executed.append(ctx.task_id)
    value = _value(ctx, inputs, uuid.uuid4().hex[:12], False)
    with WORLD.change() as database:
        database.execute(
            "insert or ignore into keyed values (?, ?, ?)",
            (ctx.idempotency_key, ctx.task_id, json.dumps(value["tokens"])),
        )
    found = WORLD.rows("select tokens from keyed where key = ?", ctx.idempotency_key)
    return {"tokens": json.loads(found[0][0])}


def look_up(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Whether `asked` or `line` was done."""
    if how.get("file"):
        for text in WORLD.file.read_text().splitlines():
            name, tokens = text.split(" ", 1)
            if name == ctx.task_id:
                return Done({"tokens": json.loads(tokens)})
        return False
    rows = WORLD.rows("select tokens from plain where task = ?", ctx.task_id)
    return Done({"tokens": json.loads(rows[0][0])}) if rows else False


@task(external=True, verify=look_up)
def asked(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """An effect that the outside would do twice, and can be asked about."""
    WORLD.executed.append(ctx.task_id)
    value = _value(ctx, inputs, uuid.uuid4().hex[:12], False)
    text = json.dumps(value["tokens"])
    with WORLD.change() as database:
        if how.get("file"):
            with WORLD.file.open("a") as file:
                file.write(f"{ctx.task_id} {text}\n")
        else:
            database.execute("insert into plain values (?, ?)", (ctx.task_id, text))
    return value


@task(external=True)
def blind(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """An effect that nobody can be asked about."""
    WORLD.executed.append(ctx.task_id)
    value = _value(ctx, inputs, uuid.uuid4().hex[:12], False)
    with WORLD.change() as database:
        database.execute(
            "insert into plain values (?, ?)", (ctx.task_id, json.dumps(value["tokens"]))
        )
    return value


def take_away(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> None:
    """Undo `thing`."""
    WORLD.undone.append((ctx.task_id, _merge(inputs)))
    with WORLD.change() as database:
        database.execute("delete from things where task = ?", (ctx.task_id,))


@task(rollback=take_away)
def thing(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """An effect that can be undone."""
    WORLD.executed.append(ctx.task_id)
    token = _fixed_token(ctx, inputs, False) if how["fixed"] else uuid.uuid4().hex[:12]
    value = _value(ctx, inputs, token, False)
    rows = WORLD.rows("select task, tokens from things")
    for name, text in rows:
        if name == ctx.task_id or json.loads(text).get(ctx.task_id, token) != token:
            raise Killed(f"mixed: {ctx.task_id} runs while {name} is not undone")
    with WORLD.change() as database:
        row = (ctx.task_id, token, json.dumps(value["tokens"]))
        database.execute("insert into things values (?, ?, ?)", row)
    return value


@task(ranks="all")
def gang(how: dict[str, Any], *inputs: Any, ctx: TaskContext) -> Any:
    """Runs on ranks; may lose one, and is another value then."""
    WORLD.executed.append(ctx.task_id)
    WORLD.moment()
    if how["loses"]:
        return _value(ctx, inputs, uuid.uuid4().hex[:12], False)
    return _value(ctx, inputs, _fixed_token(ctx, inputs, False), False)


class OneRank:
    """In the place of the ranks of a gang; `tests/mpi/test_workflows.py` has real ones.

    It is also who sends events: all of them, until it was told that each was heard.
    """

    def __init__(self, workflow: Workflow) -> None:
        self._workflow = workflow
        self._unsent = [(key, number) for key in "ab" for number in range(12)]

    def run(self, lead: Any) -> Any:
        return lead()

    def is_lost(self, owner: Any) -> bool:
        return False

    def idle(self) -> None:
        if self._unsent:
            key, number = self._unsent[0]
            payload = {"tokens": {f"sent {key} {number}": "once"}}
            self._workflow.send(key, payload, str(number))
            self._unsent.pop(0)

    def close(self) -> None:
        pass

    def call(self, task_: Any, arguments: Any, keywords: Any, context: TaskContext) -> Any:
        value = task_.function(*arguments, **keywords, ctx=context)
        return value, (0,), not arguments[0]["loses"]


def corpus(seed: int) -> Node:
    """Return a random graph that can run."""
    for attempt in itertools.count():
        draw = random.Random(f"{seed} {attempt}")
        node = _random_graph(draw)
        try:
            check_graph(Graph.of(node))
            return node
        except WorkflowError:
            continue
    raise AssertionError


def _random_graph(draw: random.Random) -> Node:
    nodes: list[Node] = []
    used: set[int] = set()
    for _ in range(draw.randint(3, 12)):
        count = min(len(nodes), draw.choice((0, 1, 1, 2, 2, 3)))
        picks = draw.sample(range(len(nodes)), count)
        used.update(picks)
        inputs = [nodes[i] for i in picks]
        fixed = draw.random() < 0.5
        checkpoint = draw.choice(("sync", "async", "none", "none", "auto"))
        options = {"deterministic": fixed, "checkpoint": checkpoint}
        how: dict[str, Any] = {"fixed": fixed, "pad": draw.random() < 0.15}
        kind = draw.choice(
            ("plain",) * 6 + ("thing",) * 3 + ("keyed", "asked", "line", "blind")
            + ("gang", "loop", "event", "fails", "goes_on", "goes_on")
        )  # fmt: skip
        if kind == "plain":
            how["clock"] = draw.random() < 0.3
            node = plain.options(**options).bind(how, *inputs)
        elif kind == "thing":
            node = thing.options(**options).bind(how, *inputs)
        elif kind == "keyed":
            node = keyed.bind({}, *inputs)
        elif kind in ("asked", "line"):
            node = asked.bind({"file": kind == "line"}, *inputs)
        elif kind == "blind":
            node = blind.bind({}, *inputs)
        elif kind == "gang":
            options["deterministic"] = True
            node = gang.options(**options).bind({"loses": draw.random() < 0.5}, *inputs)
        elif kind == "loop":
            body = turn.options(checkpoint=checkpoint)
            first = plain.options(**options).bind(how, *inputs)
            node = loop(body, first, draw.randint(0, 6), every=draw.randint(1, 3))
        elif kind == "event":
            node = event(draw.choice(("a", "b")))
            for one in inputs[:1]:
                node = node.after(one)
        elif kind == "fails":
            how["fails"] = draw.randint(1, 2)
            node = plain.options(**options, retries=2, backoff_s=0.0).bind(how, *inputs)
        else:
            how.update(goes_on=draw.randint(1, 3), options=options, effect=draw.random() < 0.3)
            if checkpoint == "none" and not fixed:
                how["effect"] = False
            node = plain.options(**options).bind(how, *inputs)
        if nodes and draw.random() < 0.15:
            i = draw.randrange(len(nodes))
            used.add(i)
            node = node.after(nodes[i])
        nodes.append(node)
    rest = [node for i, node in enumerate(nodes) if i not in used]
    last = {"fixed": True, "pad": False}
    return plain.options(deterministic=True, checkpoint="none", name="output").bind(last, *rest)


# Crashes


@dataclass
class Counts:
    """What happened."""

    points: int = 0
    workflows: int = 0
    crashes: int = 0
    unknown: int = 0
    undone: int = 0
    rerun: int = 0
    contradictory: int = 0
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)


def facts(path: Path) -> Ledger:
    """What is in the journal."""
    ledger = Ledger()
    with contextlib.suppress(Exception):
        for record in Journal.read(path / "w" / "journal").records:
            ledger.apply(record.kind, record.head, record.body, record.seq)
    return ledger


class Trial:
    """One workflow from its begin to its end, with crashes in between."""

    def __init__(self, seed: int, scratch: Path, counts: Counts) -> None:
        self.seed = seed
        self.draw = random.Random(seed)
        self.scratch = scratch
        self.counts = counts
        self.node: Node = corpus(seed // 1000)
        self.incarnation = 0
        self.calls = 0

    def run(self, lives: list[int]) -> int:
        """Run with these crashes; return how many calls the first life had (or would have had)."""
        global WORLD
        outside = self.scratch / "world"
        outside.mkdir()
        WORLD = World(outside)
        path = self.scratch / "disk-0"
        path.mkdir()
        first = 0
        for number in itertools.count():
            life = lives[number] if number < len(lives) else None
            try:
                log = self._live(path, life)
            finally:
                first = first or self.calls
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
            self.counts.crashes += 1
        self._check(path)
        WORLD.database.close()
        return first

    def _left(self, medium: Medium) -> Any:
        found = list(itertools.islice(choices(medium, self.draw, 6), 60))
        return medium.state(self.draw.choice(found))

    def _live(self, path: Path, life: int | None) -> Log | None:
        """One process; None where the workflow is done."""
        self.incarnation += 1
        before = facts(path)
        WORLD.executed.clear()
        WORLD.undone.clear()
        elsewhere = self.draw.random() < 0.15
        log = Log(path)
        WORLD.disk = disk = RecordingDisk(log, life)
        calls_before = 0 if life is None else life
        owner = {
            "nonce": f"{self.incarnation:024x}", "host": "elsewhere" if elsewhere else "here",
            "pid": _DEAD_PID + self.incarnation, "since": "then",
        }  # fmt: skip
        try:
            with (
                mock.patch.object(folders, "describe_owner", lambda: owner),
                mock.patch.object(folders, "observe", self._observe),
                mock.patch.object(folders, "Lease", mock.MagicMock()),
                mock.patch.object(engines, "_POLL_S", 0.002),
            ):
                workflow = Workflow("w", path, workers=self.draw.choice((1, 1, 4)), disk=disk)
                workflow._gang = OneRank(workflow)  # type: ignore[assignment]
                try:
                    self.value = workflow.run(self.node)
                finally:
                    self.calls = calls_before - (disk.left or 0)
                    self._judge(before, workflow)
            log.close()
            return None
        except Killed as error:
            if str(error).startswith("mixed"):
                raise WrongError(str(error)) from error
            return log
        except WorkflowError as error:
            if disk.left == 0:
                return log  # a thread that met the others' death
            if "cannot be released" in str(error):
                raise Contradiction from error
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
        """A person looks at the world, and says what is true."""
        now = facts(path)
        state = now.states[error.task]
        kind = error.task.rpartition("/")[2].split("~")[0]
        if state.begun is None or state.done is not None or kind not in ("blind", "asked"):
            raise WrongError(f"{error.task} is known, and was said to be unknown") from error
        if kind == "asked":
            begun_by = now.owners[state.begun.by]
            if begun_by["host"] == "here":
                raise WrongError(f"{error.task} could be asked about") from error
        self.counts.unknown += 1
        rows = WORLD.rows("select tokens from plain where task = ?", error.task)
        for text in WORLD.file.read_text().splitlines():
            name, tokens = text.split(" ", 1)
            if name == error.task:
                rows.append((tokens,))
        disk.left = None
        with (
            mock.patch.object(folders, "observe", self._observe),
            mock.patch.object(folders, "Lease", mock.MagicMock()),
        ):
            workflow = Workflow("w", path, disk=disk)
            value = {"tokens": json.loads(rows[0][0])} if rows else None
            workflow.resolve(error.task, done=bool(rows), value=value)

    def _judge(self, before: Ledger, workflow: Workflow) -> None:
        """Whether what ran in this life had to."""
        executed = set(WORLD.executed)
        renewed = {
            name for name in executed
            if (done := before.done(name)) is not None and not done.deterministic
        }  # fmt: skip
        while more := {
            name for name in executed - renewed
            if (done := before.done(name)) is not None
            and any(i in renewed or before.done(i) is None
                    or before.done(i).attempt != version  # type: ignore[union-attr]
                    for i, version in done.inputs.items())
        }:  # fmt: skip
            renewed |= more
        for name in executed:
            done = before.done(name)
            if done is None:
                continue
            self.counts.rerun += 1
            void = any(
                i in renewed or before.done(i) is None
                or before.done(i).attempt != version  # type: ignore[union-attr]
                for i, version in done.inputs.items()
            )  # fmt: skip
            if done.durable and not void:
                raise WrongError(f"{name} ran again, though its value was there")
        for _, reason in workflow.ran:
            self.counts.reasons[reason.split(",")[0]] += 1
        self.counts.undone += len(WORLD.undone)
        order = [name for name, _ in WORLD.undone]
        for i, (name, tokens) in enumerate(WORLD.undone):
            for earlier in order[:i]:
                if earlier in tokens and earlier != name and name not in order[:i]:
                    raise WrongError(f"{earlier} was undone before {name}, which was made from it")

    def _check(self, path: Path) -> None:
        """What must hold at the end."""
        tokens = self.value["tokens"]
        rows = [
            *WORLD.database.execute("select task, tokens from keyed"),
            *WORLD.database.execute("select task, tokens from plain"),
            *(line.split(" ", 1) for line in WORLD.file.read_text().splitlines()),
        ]
        names = [name for name, _ in rows]
        if len(set(names)) != len(names):
            raise WrongError(f"an effect was done twice: {sorted(names)}")
        # A control edge carries no tokens; what was done with before it, the journal knows.
        done = set(tokens) | {n for n, one in facts(path).states.items() if one.done is not None}
        effects = {
            name for name in done
            if name.rpartition("/")[2].split("~")[0] in ("keyed", "asked", "blind")
        }  # fmt: skip
        if set(names) != effects:
            raise WrongError(f"effects: {sorted(names)} instead of {sorted(effects)}")
        things = WORLD.database.execute("select task, tokens, token from things").fetchall()
        wanted = {n for n in done if n.rpartition("/")[2].split("~")[0] == "thing"}
        if sorted(name for name, *_ in things) != sorted(wanted):
            raise WrongError(f"things: {sorted(n for n, *_ in things)} instead of {sorted(wanted)}")
        for name, text, *_ in [*rows, *things]:
            for one, token in json.loads(text).items():
                if tokens.get(one, token) != token:
                    raise WrongError(f"{name} was done with another value of {one}")
        given = [
            state.done.head["e"]
            for state in facts(path).states.values()
            if state.done is not None and "e" in state.done.head
        ]
        if len(set(given)) != len(given):
            raise WrongError("an event was given to two tasks")
        again = Workflow("w", path)
        WORLD.executed.clear()
        if again.run(self.node)["tokens"] != tokens or WORLD.executed:
            raise WrongError("the stored output is another one")


def try_seed(seed: int, counts: Counts, lives: list[int] | None = None) -> None:
    """Run one workflow with crashes that the seed says; raises `WrongError`."""
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    scratch = Path(tempfile.mkdtemp(prefix="hopcoll-workflow-", dir=memory))
    draw = random.Random(f"lives {seed}")
    if lives is None:
        lives = [draw.randint(0, 60)]
        lives += [draw.randint(0, 40) for _ in range(draw.randint(0, _CRASHES_MAX - 1))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trial(seed, scratch, counts).run(lives)
        counts.workflows += 1
        counts.points += len(lives)
    except Contradiction:
        counts.contradictory += 1
    except (WrongError, TaskFailedError, WorkflowError, KeyError, AssertionError) as error:
        raise WrongError(f"seed {seed}, lives {lives}: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@click.command()
@click.option("--points", default=10_000, show_default=True, help="Crashes, at the least.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(points: int, seed: int, json_path: Path | None) -> None:
    """Cut off random workflows, and see that they end as if nothing had happened."""
    counts = Counts()
    begin_s = time.monotonic()
    with tqdm(total=points, unit=" crashes", disable=None) as bar:
        number = seed * 1_000_000
        while counts.points < points:
            before = counts.points
            try_seed(number % 100_000 * 1 + seed, counts)
            number += 37
            bar.update(counts.points - before)
    report = {**counts.__dict__, "reasons": dict(counts.reasons),
              "seconds": round(time.monotonic() - begin_s, 1)}  # fmt: skip
    click.echo(json.dumps(report, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
