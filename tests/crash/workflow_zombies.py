"""Owners of a workflow that are stopped, succeeded, and woken.

Two real processes. The owner stops itself (SIGSTOP) between its durable intent and its effect, or
between the fsync of a flush and the look that follows. Its successor waits until it takes it for
silent, takes the workflow over, and finishes it, or finds an effect of which nobody can know. Then
the owner is woken. In the end each effect was done once.

``python -m tests.crash.workflow_zombies --times 100 --json FILE`` does it often.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from hopcoll.errors import EffectUnknownError, HopcollError, WorkflowFencedError
from recovery.disk import Disk
from recovery.workflows import Done, Node, TaskContext, Workflow, task

#: How long an owner gives no sign of life before it is taken for silent, in seconds.
_PATIENCE_S = 0.1
FENCED = 3
EFFECTS = ("keyed", "asked", "blind")
#: Where an owner stops: before an effect, or in its n-th flush.
MOMENTS = (*EFFECTS, *range(2, 12))

Moment = int | str

#: Where this process stops, and the file that is there when it may go on; None for a successor.
STOPS_AT: tuple[Moment, Path] | None = None


def _stop_at(moment: Moment) -> None:
    global STOPS_AT
    if STOPS_AT is not None and STOPS_AT[0] == moment:
        go_on = STOPS_AT[1]
        STOPS_AT = None
        os.kill(os.getpid(), signal.SIGSTOP)
        # Of several threads, this one may come a little further before it is stopped.
        while not go_on.exists():
            threading.Event().wait(0.001)


class StoppingDisk(Disk):
    """Stops its process after an fsync of the journal, before that is known to be reported."""

    def __init__(self) -> None:
        self._flushes = 0

    def fdatasync(self, descriptor: int) -> None:
        super().fdatasync(descriptor)
        self._flushes += 1
        _stop_at(self._flushes)


@contextlib.contextmanager
def _world(path: str) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as database, database:
        database.execute("create table if not exists keyed (key text primary key, token text)")
        database.execute("create table if not exists plain (task text, token text)")
        yield database


@task(checkpoint="none")
def lost() -> str:
    return uuid.uuid4().hex


@task(checkpoint="sync")
def kept(*tokens: str) -> str:
    return "-".join(tokens)


@task(external=True, idempotency_key=True)
def keyed(path: str, token: str, ctx: TaskContext) -> str:
    _stop_at("keyed")
    with _world(path) as database:
        database.execute(
            "insert or ignore into keyed values (?, ?)", (ctx.idempotency_key, token)
        )
        return str(database.execute("select token from keyed").fetchone()[0])


def look_up(path: str, token: str) -> Done | bool:
    with _world(path) as database:
        found = database.execute("select token from plain where task = 'asked'").fetchall()
    return Done(found[0][0]) if found else False


def _do(path: str, name: str, token: str) -> str:
    _stop_at(name)
    with _world(path) as database:
        database.execute("insert into plain values (?, ?)", (name, token))
    return token


@task(external=True, verify=look_up)
def asked(path: str, token: str) -> str:
    return _do(path, "asked", token)


@task(external=True)
def blind(path: str, token: str) -> str:
    return _do(path, "blind", token)


def graph(path: Path) -> Node:
    """Three effects in a row, of a value that may become another."""
    world, token = str(path / "world.db"), kept.bind(lost.bind())
    first = keyed.bind(world, token)
    second = asked.bind(world, kept.bind(first))
    return kept.bind(first, second, blind.bind(world, kept.bind(second)))


def _own(path: Path, moment: Moment) -> None:
    """The owner, in a process of its own; never returns."""
    global STOPS_AT
    STOPS_AT = (moment, path / "go on")
    code = 1
    try:
        warnings.simplefilter("ignore")
        Workflow("w", path / "store", workers=1, disk=StoppingDisk()).run(graph(path))
        code = 0
    except WorkflowFencedError:
        code = FENCED
    finally:
        os._exit(code)


def _settle(path: Path, error: EffectUnknownError) -> None:
    """A person looks at the world, when the owner is surely gone."""
    with _world(str(path / "world.db")) as database:
        found = database.execute("select token from plain where task = ?", (error.task,)).fetchall()
    Workflow("w", path / "store", patience_s=_PATIENCE_S).resolve(
        error.task, done=bool(found), value=found[0][0] if found else None
    )


def once(path: Path, moment: Moment, counts: collections.Counter[str]) -> None:
    """Stop an owner, succeed it, wake it; raises AssertionError where what must hold does not."""
    owner = os.fork()
    if owner == 0:
        _own(path, moment)
    try:
        _, status = os.waitpid(owner, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the owner ended with {os.waitstatus_to_exitcode(status)}"
        counts["stopped"] += 1

        def run() -> Any:
            with Workflow("w", path / "store", workers=1, patience_s=_PATIENCE_S) as workflow:
                return workflow.run(graph(path))

        unknown: EffectUnknownError | None = None
        value = None
        try:
            value = run()
        except EffectUnknownError as error:
            unknown = error
        (path / "go on").touch()
        os.kill(owner, signal.SIGCONT)
        _, status = os.waitpid(owner, 0)
        owner = 0
        code = os.waitstatus_to_exitcode(status)
        assert code == FENCED, f"{moment}: the owner that was succeeded ended with {code}"
        if unknown is not None:
            counts["unknown"] += 1
            assert unknown.task in ("asked", "blind"), f"{unknown.task} has a key"
            if isinstance(moment, str):
                assert unknown.task == moment, f"{unknown.task} was not begun"
            _settle(path, unknown)
            value = run()
    finally:
        if owner:
            os.kill(owner, signal.SIGKILL)
            os.waitpid(owner, 0)
    with _world(str(path / "world.db")) as database:
        rows = database.execute("select 'keyed', token from keyed").fetchall()
        rows += database.execute("select task, token from plain").fetchall()
    names = sorted(name for name, _ in rows)
    assert names == sorted(EFFECTS), f"{moment}: the effects are {names}"
    tokens = {token for _, token in rows}
    assert len(tokens) == 1 and value == "-".join([*tokens] * 3), f"{moment}: {rows}, {value}"


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder in memory, where there is room."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="hopcoll-zombie-", dir=memory))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@click.command()
@click.option("--times", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(times: int, seed: int, json_path: Path | None) -> None:
    """Stop owners, succeed them, wake them."""
    draw = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    begin_s = time.monotonic()
    for number in tqdm(range(times), unit=" owners", disable=None):
        moment = MOMENTS[number] if number < len(MOMENTS) else draw.choice(MOMENTS)
        with folder() as path:
            try:
                once(path, moment, counts)
            except (AssertionError, HopcollError) as error:
                raise SystemExit(f"moment {moment}: {type(error).__name__}: {error}") from error
    report = {**counts, "seconds": round(time.monotonic() - begin_s, 1)}
    click.echo(json.dumps(report, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
