"""`hopcoll wf`: look at workflows, resume and cancel them, settle what only a person can.

Exit codes: 0 if all is well; 1 if a workflow failed or something is wrong; 2 for a wrong call, and
where there is no such workflow.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from hopcoll.errors import HopcollError, WorkflowNotFoundError
from recovery.workflows.ledger import COMING, FILE, INLINE, LIVE, NOWHERE, Ledger
from recovery.workflows.workflow import Workflow

__all__ = ["wf"]

_PLACES = {
    NOWHERE: "not kept", INLINE: "in the journal", FILE: "in a file", COMING: "being written",
    LIVE: "in the ranks' memory",
}  # fmt: skip


class _Failed(click.ClickException):
    exit_code = 1


class _NotThere(click.ClickException):
    exit_code = 2


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except WorkflowNotFoundError as error:
        raise _NotThere(str(error)) from error
    except (HopcollError, OSError) as error:
        raise _Failed(str(error)) from error
    except ValueError as error:
        raise _NotThere(str(error)) from error


def _workflow(identifier: str, store: Path | None, **settings: Any) -> Workflow:
    """The workflow that a person names: by its folder, or by its name in a store."""
    path = Path(identifier)
    if store is None and (os.sep in identifier or (path / "journal").is_dir()):
        path = path.absolute()
        return Workflow(path.name, path.parent, **settings)
    if store is None:
        raise _NotThere(
            f"{identifier} is no folder of a workflow: give its path, or the store with --store "
            "(or HOPCOLL_STORE)"
        )
    return Workflow(identifier, store, **settings)


_store = click.option(
    "--store",
    envvar="HOPCOLL_STORE",
    type=click.Path(path_type=Path),
    help="The store that ID is in (or HOPCOLL_STORE); without it, ID is the workflow's folder.",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")


@click.group(short_help="Look at workflows; resume, cancel and settle them.")
def wf() -> None:
    """Look at workflows; resume, cancel and settle them.

    A workflow is named by its folder (STORE/ID), or by its ID and --store.
    """


@wf.command("ls", short_help="The workflows of a store, and what they do.")
@click.argument("store", envvar="HOPCOLL_STORE", type=click.Path(path_type=Path))
@_as_json
def ls(store: Path, as_json: bool) -> None:
    """List the workflows of a store.

    "interrupted": its process is gone, and `hopcoll wf resume` goes on with it.
    """
    with _explained():
        found = Workflow.list(store)
    if as_json:
        click.echo(json.dumps([one.__dict__ for one in found], indent=1))
        return
    rows = [["id", "state", "tasks done", "by", "since", ""]]
    for one in found:
        owner = one.owner or {}
        rows.append(
            [
                one.id,
                one.state,
                str(one.done),
                f"{owner.get('host', '?')}:{owner.get('pid', '?')}",
                owner.get("since", "?"),
                (one.error or "")[:100],
            ]
        )
    _table(rows)


def _table(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _rows(ledger: Ledger) -> list[dict[str, Any]]:
    """What is to be told of each task, in the order in which they ended."""
    rows = []
    for task, state in ledger.states.items():
        done = state.done
        row: dict[str, Any] = {
            "task": task,
            "state": _state_of(state),
            "runs": state.runs,
            "rolled_back": state.undone,
            "attempt": state.attempt,
            "failures": state.failures,
        }
        if done is not None:
            row.update(
                seconds=done.head.get("s"),
                value=_PLACES[done.place],
                deterministic=done.deterministic,
                contributors=done.head.get("w"),
                reductions=done.head.get("k"),
                why=done.head.get("why"),
                read_back=state.life < ledger.lives and done.durable,
                inputs=sorted(done.inputs),
            )
        rows.append((done.seq if done is not None else 1 << 60, row))
    return [row for _, row in sorted(rows, key=lambda one: one[0])]


def _state_of(state: Any) -> str:
    if state.done is not None:
        return "went on" if "o" in state.done.head else "done"
    if state.begun is not None:
        return "begun, end unknown"
    if state.failures:
        return "failed"
    return "rolled back" if state.undone else "waiting"


@wf.command("show", short_help="One workflow: its tasks, and why they ran again.")
@click.argument("identifier", metavar="ID")
@_store
@_as_json
@click.option("--follow", is_flag=True, help="Go on until it ends, with a progress bar.")
def show(identifier: str, store: Path | None, as_json: bool, follow: bool) -> None:
    """Show what a workflow's journal says: each task, where its value is, and why it ran again."""
    with _explained():
        workflow = _workflow(identifier, store)
        if follow:
            _follow(workflow)
        status = workflow.status()
        ledger, _ = workflow._folder.look()
    rows = _rows(ledger)
    if as_json:
        click.echo(json.dumps({**status.__dict__, "tasks": rows}, indent=1))
        return
    told = f"{status.state}, {status.done} tasks done, {ledger.lives} times resumed"
    click.echo(f"{status.id}: {told}")
    if status.error:
        click.echo(status.error)
    table = [["task", "state", "runs", "seconds", "value", "why it ran again"]]
    for row in rows:
        value = row.get("value", "")
        if row.get("read_back"):
            value += ", read back"
        why = row.get("why") or ""
        if row["rolled_back"]:
            why = f"{why}; rolled back {row['rolled_back']} times".lstrip("; ")
        seconds = row.get("seconds")
        table.append(
            [
                row["task"],
                row["state"],
                str(row["runs"]),
                "" if seconds is None else f"{seconds:.3f}",
                value,
                why or (row["failures"][-1] if row["failures"] else ""),
            ]
        )
    _table(table)


def _follow(workflow: Workflow, poll_s: float = 0.5) -> None:
    with tqdm(desc=workflow.id, unit=" tasks", disable=None) as bar:
        while True:
            status = workflow.status()
            bar.update(status.done - bar.n)
            if status.state != "running":
                return
            time.sleep(poll_s)


@wf.command("graph", short_help="The graph of a workflow as a picture.")
@click.argument("identifier", metavar="ID")
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@_store
def graph(identifier: str, output: Path, store: Path | None) -> None:
    """Draw the graph of a workflow: OUTPUT is .png, .svg or .pdf (matplotlib), or .dot (Graphviz).

    Coloured by what became of each task: done, read back, run again, rolled back, failed, waiting.
    """
    from recovery.workflows.picture import draw

    with _explained():
        workflow = _workflow(identifier, store)
        ledger, _ = workflow._folder.look()
        draw(output, workflow.id, workflow.graph(), ledger)
    click.echo(f"wrote {output}")


@wf.command("resume", short_help="Go on with workflows that were interrupted or failed.")
@click.argument("identifier", metavar="ID")
@_store
@click.option("--all", "everything", is_flag=True, help="ID is a store: all of its workflows.")
def resume(identifier: str, store: Path | None, everything: bool) -> None:
    """Go on with a workflow, in this process. The modules of its tasks have to be importable.

    One with gangs: hopcoll run -n 4 -m hopcoll.cli wf resume ID
    """
    sys.path.insert(0, os.getcwd())
    with _explained():
        if os.environ.get("OMPI_COMM_WORLD_SIZE"):
            import hopcoll

            with hopcoll.init() as comm, _workflow(identifier, store, comm=comm) as workflow:
                value = workflow.resume()
                if comm.rank == min(comm.alive):
                    click.echo(repr(value))
            return
        if everything:
            results = Workflow.resume_all(identifier, progress=True)
            failed = {name: one for name, one in results.items() if isinstance(one, Exception)}
            for name in results:
                click.echo(f"{name}: {failed.get(name, 'done')}")
            if failed:
                sys.exit(1)
            return
        with _workflow(identifier, store, progress=True) as workflow:
            click.echo(repr(workflow.resume()))


@wf.command("cancel", short_help="Ask a workflow to end.")
@click.argument("identifier", metavar="ID")
@_store
def cancel(identifier: str, store: Path | None) -> None:
    """Let no more tasks of a workflow begin, wherever it runs. It can be resumed."""
    with _explained():
        _workflow(identifier, store).cancel()


@wf.command("resolve", short_help="Say whether an effect was done that nobody knows of.")
@click.argument("identifier", metavar="ID")
@click.argument("task")
@_store
@click.option("--done/--not-done", "done", default=None, help="What is true.")
@click.option("--value", help="With --done: what the task would have returned, as JSON.")
def resolve(
    identifier: str, task: str, store: Path | None, done: bool | None, value: str | None
) -> None:
    """Say whether the effect of TASK was done, after looking at the world outside.

    Then the workflow can be resumed. "--not-done" lets it be done (again).
    """
    if done is None:
        raise click.UsageError("say --done or --not-done: nobody else knows")
    if value is not None and not done:
        raise click.UsageError("--value goes with --done")
    try:
        parsed = None if value is None else json.loads(value)
    except ValueError as error:
        raise click.UsageError(f"--value must be JSON: {error}") from error
    with _explained():
        _workflow(identifier, store).resolve(task, done=done, value=parsed)


@wf.command("unlock", short_help="Take a workflow from a process that is gone, or should be.")
@click.argument("identifier", metavar="ID")
@_store
@click.confirmation_option(prompt="Is the process that runs it surely gone, or of no concern?")
def unlock(identifier: str, store: Path | None) -> None:
    """Take a workflow over from a process that seems to run, so that it can be resumed here.

    What that process records from now on does not count. What it does to the world outside nobody
    prevents: make sure that it is gone.
    """
    with _explained():
        _workflow(identifier, store).unlock()


@wf.command("send", short_help="Send an event.")
@click.argument("identifier", metavar="ID")
@click.argument("key")
@click.argument("payload", default="null")
@_store
@click.option("--id", "event_id", help="One that was sent before with this is not sent again.")
def send(
    identifier: str, key: str, payload: str, store: Path | None, event_id: str | None
) -> None:
    """Send an event with a PAYLOAD (JSON) to a workflow; it is durable when this returns."""
    try:
        parsed = json.loads(payload)
    except ValueError as error:
        raise click.UsageError(f"PAYLOAD must be JSON: {error}") from error
    with _explained():
        new = _workflow(identifier, store).send(key, parsed, event_id)
    click.echo("sent" if new else "was sent before")


@wf.command("delete", short_help="Remove a workflow, with all its values.")
@click.argument("identifier", metavar="ID")
@_store
@click.confirmation_option(prompt="Remove it, with all its values?")
def delete(identifier: str, store: Path | None) -> None:
    """Remove a workflow that does not run."""
    with _explained():
        _workflow(identifier, store).delete()
