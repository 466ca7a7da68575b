"""What a program calls: `Workflow`."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hopcoll.errors import (
    HopcollError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowFencedError,
    WorkflowMismatchError,
    WorkflowNotFoundError,
)
from recovery.disk import Disk
from recovery.workflows import values
from recovery.workflows.checks import check_graph, describe
from recovery.workflows.engine import Engine
from recovery.workflows.folder import Store
from recovery.workflows.gang import Gang
from recovery.workflows.graph import Graph, Node
from recovery.workflows.ledger import FILE, INLINE, Ledger
from recovery.workflows.stored import dump_graph, load_graph
from recovery.workflows.telling import telling

if TYPE_CHECKING:
    from hopcoll import Communicator

__all__ = ["Status", "Workflow"]

_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Status:
    """What a workflow does, as its journal and its owner's lease say.

    Attributes
    ----------
    id : str
    state : str
        "running", "done", "failed", "cancelled", or "interrupted": its process is gone.
    error : str or None
        Of one that failed.
    owner : dict or None
        The process that ran it last.
    done : int
        Tasks that have ended.
    """

    id: str
    state: str
    error: str | None
    owner: dict[str, Any] | None
    done: int


class Workflow:
    """A graph of tasks that runs exactly once, whatever is killed meanwhile.

    Local where there is no communicator; else all ranks make it, and call its methods, alike.

    Parameters
    ----------
    id : str
        Its name in the store: letters, digits, ``_ . = + -``.
    store : path
        A directory, on a local or a shared file system; made if it is missing.
    comm : Communicator, optional
        The ranks for gangs. One of them runs all else; if it dies, the next does.
    workers : int, default 8
        How many tasks may run at once.
    patience_s : float, default 10
        How long the process that ran it before must give no sign of life before it is taken over
        from another host, in seconds.
    proven_dead : callable, optional
        Told the description of a process that ran it, whether that can do nothing any more; for
        those that know more than this host does (Slurm).
    progress : bool or callable, default False
        A progress bar, or ``progress(task, reason, left)``.

    Examples
    --------
    >>> with Workflow("report-7", store="/shared/workflows") as wf:      # doctest: +SKIP
    ...     wf.run(publish.bind(train.bind(load.bind("data.csv"))))
    """

    def __init__(
        self,
        id: str,
        store: str | os.PathLike[str],
        *,
        comm: Communicator | None = None,
        workers: int = 8,
        patience_s: float = _PATIENCE_S,
        proven_dead: Callable[[dict[str, Any]], bool] | None = None,
        progress: bool | Callable[[str, str, int], None] = False,
        disk: Disk | None = None,
    ) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers must be 1 or more, not {workers!r}")
        if not patience_s >= 0:
            raise ValueError(f"patience_s must be 0 or more, not {patience_s!r}")
        self._store = Store(store, disk)
        self._folder = self._store.folder(id)
        self._workers = workers
        self._patience_s = patience_s
        self._proven_dead = proven_dead
        self._progress = progress
        self._comm = comm
        self._gang = None if comm is None else Gang(comm)
        self._busy = threading.Lock()
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        #: The last engine's counts, for `hopcoll wf` and for tests: what ran, and why.
        self.ran: list[tuple[str, str]] = []
        self.undone: list[str] = []

    @property
    def id(self) -> str:
        return self._folder.id

    def __enter__(self) -> Workflow:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and self._thread is not None and self._thread.is_alive():
            self._folder.request_cancel()  # else what waits for an event would be waited for
        self.close()

    def close(self) -> None:
        """Wait for what runs in the background, and let go of the ranks."""
        if self._thread is not None:
            self._thread.join()
        if self._gang is not None and not self._closed:
            self._gang.close()
        self._closed = True

    # Running

    def run(self, node: Node) -> Any:
        """Run a graph and return its output. Blocks.

        A workflow of this name that is done gives the stored output; one that was cut off, has
        failed or was cancelled goes on. Where the output has refs in it, their objects stay in the
        ranks' memory, for the program to get and to delete.

        Raises
        ------
        WorkflowRunningError
            Another process runs it.
        WorkflowMismatchError
            The name is that of another graph, or of one with other arguments.
        TaskFailedError
            A task failed; its exception is the cause.
        EffectUnknownError
            Whether an effect was done has to be settled by a person.
        WorkflowFencedError
            Another process took it over.
        WorkflowError
            The graph cannot run.
        """
        graph = Graph.of(node)
        check_graph(graph)
        return self._everywhere(lambda: self._run(graph))

    def run_async(self, node: Node) -> Future[Any]:
        """Begin to run a graph; the future has its output, or what `run` would raise. Local."""
        if self._closed:
            raise WorkflowError(f"workflow {self.id} is closed")
        if self._gang is not None:
            raise WorkflowError("run_async has no ranks: run gangs by run()")
        graph = Graph.of(node)
        check_graph(graph)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                future.set_result(self._run(graph))
            except BaseException as error:
                future.set_exception(error)

        self._thread = threading.Thread(target=work, name=f"hopcoll-{self.id}")
        self._thread.start()
        return future

    def resume(self) -> Any:
        """Go on with a workflow that was begun, and return its output. Blocks.

        The modules of its tasks are imported by their names.

        Raises
        ------
        WorkflowNotFoundError
            There is none of this name.
        HopcollError
            As for `run`.
        """
        return self._everywhere(lambda: self._run(None))

    def _everywhere(self, lead: Callable[[], Any]) -> Any:
        if self._closed:
            raise WorkflowError(f"workflow {self.id} is closed")
        return lead() if self._gang is None else self._gang.run(lead)

    def _open(self) -> Ledger:
        """Take the folder over, also from a rank of this job that is no more."""
        gang = self._gang
        return self._folder.open(
            self._patience_s,
            proven_dead=self._proven_dead,
            lost=None if gang is None else gang.is_lost,
        )

    def _run(self, graph: Graph | None) -> Any:
        if not self._busy.acquire(blocking=False):
            raise WorkflowError(f"workflow {self.id} runs in this process already")
        try:
            fingerprint, written = "", b""
            if graph is not None:
                fingerprint = describe(graph)
                self._store.create()
            try:
                ledger, _ = self._folder.look()
            except WorkflowNotFoundError:
                if graph is None:
                    raise
                self._check_ranks(graph)
                written = dump_graph(graph)
            else:
                self._check_same(ledger, graph, fingerprint)
                if ledger.status == "done":
                    return self._stored(ledger)
            ledger = self._open()
            try:
                return self._run_open(ledger, graph, fingerprint, written)
            finally:
                self._close_folder()
        finally:
            self._busy.release()

    def _close_folder(self) -> None:
        """Close it, without hiding what went wrong before."""
        engine, self._engine = self._engine, None
        if engine is not None and not engine.over:
            # Ctrl-C, and once more while tasks that run were waited for: they may have effects
            # still. So it is left as by a process that was killed, and nobody takes it for over
            # before this one has ended.
            return
        with self._beside_the_error(), contextlib.suppress(WorkflowFencedError):
            self._folder.close()  # whoever took it over has it; that was told, or all had ended

    @contextlib.contextmanager
    def _beside_the_error(self) -> Iterator[None]:
        """Warn of what else goes wrong."""
        try:
            yield
        except (HopcollError, OSError, ValueError) as error:
            warnings.warn(f"workflow {self.id}: {error}", RuntimeWarning, stacklevel=4)

    def _check_same(self, ledger: Ledger, graph: Graph | None, fingerprint: str) -> None:
        assert ledger.start is not None
        if graph is not None and ledger.start["print"] != fingerprint:
            raise WorkflowMismatchError(
                f"{self._folder.path} is a workflow with another graph or other arguments; run "
                f"this one under another name, or first: hopcoll wf delete {self._folder.path}"
            )

    def _run_open(
        self, ledger: Ledger, graph: Graph | None, fingerprint: str, written: bytes
    ) -> Any:
        if ledger.start is None:
            if graph is None:
                raise WorkflowNotFoundError(f"workflow {self.id} was deleted")
            self._folder.start(ledger, fingerprint, written or dump_graph(graph))
        else:
            self._check_same(ledger, graph, fingerprint)  # it may have been begun meanwhile
            if ledger.status == "done":
                return self._stored(ledger)
            self._folder.resume(ledger)
        with telling(self._folder.journal, self._comm), self._reporting() as report:
            gang = self._gang
            engine = self._engine = Engine(
                self._folder,
                ledger,
                workers=self._workers,
                gang=gang,
                progress=report,
                begin=self._begin,
            )
            try:
                engine.run()
            except (WorkflowFencedError, OSError):
                raise  # the journal takes nothing any more
            except Exception as error:
                status = "cancelled" if isinstance(error, WorkflowCancelledError) else "failed"
                text = str(error) if status == "cancelled" else f"{type(error).__name__}: {error}"
                with self._beside_the_error():
                    self._folder.end(ledger, status, text)
                    engine.sweep()
                raise
            finally:
                self.ran, self.undone = engine.ran, engine.undone
                self._warn_of_changes(engine, graph)
            output = engine.value_of(engine.board.output)
            engine.lineage.end(output)
            self._folder.end(ledger, "done", output=engine.board.resolve(engine.board.output))
            engine.sweep()
            return output

    def _warn_of_changes(self, engine: Engine, graph: Graph | None) -> None:
        """Tell what is not as it was when the workflow was begun."""
        texts = []
        if names := sorted(engine.board.changed):
            texts.append(
                f"the code of {', '.join(names)} has changed since it ran; what it gave then was "
                "used as it is"
            )
        slots = engine.board.slots
        if names := [
            name
            for name, vertex in (graph.vertices.items() if graph is not None else ())
            if name in slots
            and slots[name].vertex.node.task.annotations != vertex.node.task.annotations
        ]:
            texts.append(
                f"the annotations of {', '.join(names)} have changed since it was begun; those of "
                "then hold. For others run it under another name, or delete it first"
            )
        for text in texts:
            warnings.warn(f"workflow {self.id}: {text}", RuntimeWarning, stacklevel=6)

    def _check_ranks(self, graph: Graph) -> None:
        if self._gang is None:
            for vertex in graph.vertices.values():
                if vertex.node.task.annotations.ranks is not None:
                    raise WorkflowError(
                        f"{vertex.id} runs on ranks, and the workflow has none: give Workflow a "
                        "communicator (comm=)"
                    )

    def _begin(self, name: str) -> Workflow:
        return Workflow(
            name,
            self._store.path,
            workers=self._workers,
            patience_s=self._patience_s,
            proven_dead=self._proven_dead,
            disk=self._store.disk,
        )

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[Callable[[str, str, int], None] | None]:
        if callable(self._progress):
            yield self._progress
        elif self._progress:
            from tqdm import tqdm

            with tqdm(desc=self.id, unit=" tasks", delay=0.5, disable=None) as bar:

                def report(task: str, reason: str, left: int) -> None:
                    bar.total = bar.n + 1 + left
                    bar.set_postfix_str(task, refresh=False)
                    bar.update()

                yield report
        else:
            yield None

    def _stored(self, ledger: Ledger) -> Any:
        assert ledger.output is not None
        done = ledger.done(ledger.output)
        assert done is not None
        put = None if self._gang is None else self._gang.put_again
        value = self._folder.read_value(done.head, done.body, ledger.output, put)
        return values.freeze(value)

    # Others

    def cancel(self) -> None:
        """Let no more of its tasks begin, in whichever process it runs; it can be resumed.

        Does not wait. Effects that are under way end.

        Raises
        ------
        WorkflowNotFoundError
        """
        self._folder.look()
        self._folder.request_cancel()

    def send(self, key: str, payload: Any = None, event_id: str | None = None) -> bool:
        """Send an event; when this returns, it is durable.

        Parameters
        ----------
        key : str
        payload : object
            The value of the node that waits for it.
        event_id : str, optional
            Tells it apart from others of its key; one that was sent before is not sent again.

        Returns
        -------
        bool
            False where it was sent before.
        """
        if not isinstance(key, str) or not key:
            raise ValueError(f"key of an event must be a text, not {key!r}")
        self._folder.look()
        return self._folder.send(key, payload, event_id or secrets.token_hex(16))

    def status(self) -> Status:
        """Tell what it does; whoever runs it goes on.

        Raises
        ------
        WorkflowNotFoundError
        """
        ledger, owner = self._folder.look()
        state = ledger.status
        if state == "running" and self._folder.watch(owner, 0.0) not in ("running", "silent"):
            state = "interrupted"
        done = sum(one.done is not None for one in ledger.states.values())
        return Status(self.id, state, ledger.error, owner, done)

    def output(self) -> Any:
        """Return the stored output of a workflow that is done.

        Without ranks, arrays stand in the place of refs.

        Raises
        ------
        WorkflowNotFoundError
            There is none of this name.
        WorkflowError
            It is not done.
        """
        ledger, _ = self._folder.look()
        if ledger.status != "done":
            raise WorkflowError(f"workflow {self.id} is not done, but {self.status().state}")
        return self._stored(ledger)

    def resolve(self, task: str, *, done: bool, value: Any = None) -> None:
        """Say whether an effect was done of which it is not known.

        Parameters
        ----------
        task : str
            Its identifier, as in the error.
        done : bool
        value : object, optional
            What its function would have returned.

        Raises
        ------
        WorkflowRunningError, WorkflowNotFoundError
        WorkflowError
            The task has no such effect.
        """
        self._folder.look()
        ledger = self._folder.open(self._patience_s, proven_dead=self._proven_dead)
        try:
            state = ledger.states.get(task)
            if state is None or state.begun is None or state.begun.head.get("r"):
                raise WorkflowError(
                    f"{task} of workflow {self.id} has no effect of which it is not known whether "
                    "it was done"
                )
            begun = state.begun
            if done:
                head = {"t": task, "a": begun.attempt, "in": begun.inputs, "nd": True, "s": 0.0,
                        "c": "", "st": INLINE, "x": 1, "by_hand": 1}  # fmt: skip
                if begun.head.get("p"):
                    value = (value, None)  # as catch_exceptions gives it
                what = f"the value of {task}"
                packed = values.pack(value, what)
                body = packed.data
                if not packed.is_small:
                    head.update(self._folder.write_value(packed, what), st=FILE)
                    body = b""
                seq = self._folder.journal.append("done", head, body)
                ledger.apply("done", head, body, seq)
            else:
                head = {"t": task, "a": begun.attempt}
                seq = self._folder.journal.append("not", head)
                ledger.apply("not", head, b"", seq)
            self._folder.journal.flush()
        finally:
            self._close_folder()

    def unlock(self) -> None:
        """Take it over from a process that is silent or seems to run; for a person who knows.

        What that process does to the outside afterwards is not prevented; in the journal it can
        record nothing more.
        """
        self._folder.look()
        self._folder.open(0.0, force=True)
        self._close_folder()

    def delete(self) -> None:
        """Remove it, with all its values.

        Raises
        ------
        WorkflowRunningError, WorkflowNotFoundError
        """
        if not self._folder.is_left():
            self._folder.look()
        self._folder.open(self._patience_s, proven_dead=self._proven_dead)
        try:
            self._folder.delete()
        except BaseException:
            self._close_folder()
            raise

    def graph(self) -> Node:
        """Return the graph that it was begun with. Imports the modules of its tasks."""
        ledger, _ = self._folder.look()
        assert ledger.start is not None
        return load_graph(self._folder.unspool(ledger.graph, ledger.start))

    @staticmethod
    def list(store: str | os.PathLike[str]) -> list[Status]:
        """Return the status of all workflows of a store."""
        found = []
        for identifier in Store(store).ids():
            with contextlib.suppress(WorkflowNotFoundError):
                found.append(Workflow(identifier, store).status())
        return found

    @staticmethod
    def resume_all(store: str | os.PathLike[str], **settings: Any) -> dict[str, Any]:
        """Resume, one after the other, what was interrupted or has failed.

        Returns
        -------
        dict
            By name: the output, or the exception that ended it again.
        """
        results: dict[str, Any] = {}
        for status in Workflow.list(store):
            if status.state in ("interrupted", "failed"):
                with Workflow(status.id, store, **settings) as workflow:
                    try:
                        results[status.id] = workflow.resume()
                    except (HopcollError, OSError) as error:
                        results[status.id] = error
        return results
