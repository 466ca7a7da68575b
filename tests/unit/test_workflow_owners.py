"""Workflows and the processes that run them: others, Ctrl-C, forks, disks that fail."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hopcoll.errors import (
    EffectUnknownError,
    HopcollError,
    TaskFailedError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowFencedError,
    WorkflowRunningError,
)
from recovery.journal import Journal
from recovery.workflows import Node, Workflow, event, loop
from tests import launch
from tests import workflow_tasks as tasks
from tests.store_faults import FailingDisk
from tests.workflow_tasks import CALLS, DONE, SET, add, give, one

pytestmark = pytest.mark.usefixtures("fresh_tasks")

Run = Callable[..., Any]

#: A process with a workflow of its own: what it prints, and when it goes on, is up to its code.
HEAD = """
import os, signal, sys, threading
from recovery.workflows import Workflow, event
from tests import workflow_tasks as tasks
tasks.SET.update(begun=threading.Event(), waits=threading.Event())
store = sys.argv[1]
def say(what):
    print(what, flush=True)
def tell():
    tasks.SET["begun"].wait()
    say("begun")
    sys.stdin.readline()
    tasks.SET["waits"].set()
threading.Thread(target=tell, daemon=True).start()
"""


@contextlib.contextmanager
def process(store: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", HEAD + code, str(store)],
        env=launch.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def heard(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


RUNS = """
try:
    say(Workflow("w", store).run(tasks.join.bind(tasks.waits.bind())))
except BaseException as error:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that comes late
    say(f"{type(error).__name__}: {error}")
"""


def test_another_process_runs_it(run: Run, store: Path) -> None:
    with process(store, RUNS) as child:
        assert heard(child) == "begun"
        with pytest.raises(WorkflowRunningError, match=f"runs in process {child.pid} of "):
            run(tasks.join.bind(tasks.waits.bind()))
        with pytest.raises(WorkflowRunningError):
            Workflow("w", store).resolve("waits", done=True)
        assert Workflow("w", store).status().state == "running"
        assert child.stdin is not None
        child.stdin.write("go on\n")
        child.stdin.flush()
        assert heard(child) == "('waited',)"
    assert Workflow("w", store).output() == ("waited",)
    assert CALLS == []


def test_a_killed_process_is_succeeded_at_once(run: Run, store: Path) -> None:
    SET["waits"].set()
    with process(store, RUNS) as child:
        assert heard(child) == "begun"
        child.kill()
        child.wait()
        assert Workflow("w", store).status().state == "interrupted"
        found = Workflow.resume_all(store)
    assert found == {"w": ("waited",)}


def test_cancelled_from_another_process(run: Run, store: Path) -> None:
    code = RUNS.replace("tasks.waits.bind()", "tasks.stubborn.bind()")
    with process(store, code) as child:
        assert heard(child) == "begun"
        Workflow("w", store).cancel()
        assert heard(child) == "WorkflowCancelledError: workflow w was cancelled"
        child.communicate("\n")
    assert Workflow("w", store).status().state == "cancelled"
    SET["begun"].set()
    assert run(None) == ("stopped",)


def test_unlocked_while_it_runs(run: Run, store: Path) -> None:
    """Its process can record nothing any more."""
    SET["waits"].set()
    with process(store, RUNS) as child:
        assert heard(child) == "begun"
        Workflow("w", store).unlock()
        assert run(None) == ("waited",)
        child.communicate("go on\n")[0].startswith("WorkflowFencedError")
    assert Workflow("w", store).output() == ("waited",)


def test_events_from_another_process(run: Run, store: Path) -> None:
    code = """
import time
from hopcoll.errors import WorkflowNotFoundError
while True:
    try:
        say(Workflow("w", store).send("word", "heard", "1"))
        say(Workflow("w", store).send("word", "heard", "1"))
        break
    except WorkflowNotFoundError:
        threading.Event().wait(0.02)
"""
    with process(store, code) as child:
        assert run(tasks.join.bind(event("word"))) == ("heard",)
        assert heard(child) == "True" and heard(child) == "False"


@pytest.mark.parametrize("task", ["waits", "stubborn"])
def test_ctrl_c_leaves_a_workflow_that_goes_on(run: Run, store: Path, task: str) -> None:
    """The task that runs is waited for; no other begins."""
    code = RUNS.replace("tasks.waits.bind()", f"tasks.{task}.bind()")
    with process(store, code) as child:
        assert heard(child) == "begun"
        child.send_signal(signal.SIGINT)
        assert child.stdin is not None
        child.stdin.write("go on\n")
        child.stdin.flush()
        assert heard(child) == "KeyboardInterrupt:"
    assert Workflow("w", store).status().state == "interrupted"
    SET["waits"].set()
    value = run(None)
    # What the task returned after the signal counts.
    assert value in (("waited",), ("stopped",)) and task not in CALLS


def test_ctrl_c_twice_does_not_wait_and_lets_nobody_in(run: Run, store: Path) -> None:
    """The task goes on in its thread, and nobody takes it for over as long as it may."""
    code = RUNS + "\nsay('still here')\nthreading.Event().wait()\n"
    SET["waits"].set()
    with process(store, code) as child:
        assert heard(child) == "begun"
        child.send_signal(signal.SIGINT)
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(heard(child)))
        reader.start()
        while reader.is_alive():
            reader.join(0.2)
            if reader.is_alive():
                child.send_signal(signal.SIGINT)
        assert said == ["KeyboardInterrupt:"]
        with pytest.raises(WorkflowRunningError):
            run(None)
        child.kill()
        child.wait()
        assert run(None) == ("waited",)


def test_a_fork_is_not_the_owner(store: Path) -> None:
    with Workflow("w", store) as workflow:
        future = workflow.run_async(tasks.join.bind(tasks.waits.bind()))
        assert SET["begun"].wait(30)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forks in processes with threads
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                try:
                    workflow._folder.journal.append("note", {})
                except WorkflowError as error:
                    code = 2 if "belongs to the parent of this forked process" in str(error) else 3
                if code == 2:
                    try:
                        Workflow("w", store, patience_s=0).resume()
                    except WorkflowRunningError:
                        code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        SET["waits"].set()
        assert future.result(30) == ("waited",)


def test_fenced(store: Path) -> None:
    """Whoever is told that it was taken over does not say that the workflow failed."""
    with Workflow("w", store) as workflow:
        future = workflow.run_async(tasks.join.bind(tasks.waits.bind()))
        assert SET["begun"].wait(30)
        Workflow("w", store).unlock()
        SET["waits"].set()
        with pytest.raises(WorkflowFencedError, match="was taken over by another process"):
            future.result(30)
    assert Workflow("w", store).status().state == "interrupted"


# Disks that fail


def everything() -> Node:
    """A graph with all that a workflow writes."""
    array = tasks.array.options(checkpoint="sync").bind(20_000)
    return tasks.join.bind(
        tasks.total.bind(array), tasks.array.bind(20_000), tasks.put.bind("x"),
        tasks.effect.bind(3).after(array), tasks.count_down.bind(2), loop(tasks.step, 0, 3),
    )  # fmt: skip


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("for_good", [False, True])
def test_a_disk_that_fails_at_any_call(tmp_path: Path, code: int, for_good: bool) -> None:
    """A clear error, and afterwards it goes on, with each effect once."""
    unknown = failures = 0
    step = 3 if for_good else 2
    for k in itertools.count(1 + (code == errno.EIO), step):
        for what in (CALLS, DONE):
            what.clear()
        store = tmp_path / str(k)
        disk = FailingDisk(k, code, for_good=for_good)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Workflow("w", store, disk=disk, workers=1) as workflow:
                    value = workflow.run(everything())
            except (OSError, HopcollError) as error:
                failures += 1
                text = f"{error} {error.__cause__}"
                assert os.strerror(code) in text or "was interrupted" in text, repr(error)
            try:
                with Workflow("w", store) as workflow:
                    value = workflow.run(everything())
            except EffectUnknownError:
                unknown += 1
                workflow.resolve("effect", done="effect" in DONE, value=3)
                with Workflow("w", store) as workflow:
                    value = workflow.run(everything())
        assert value[0] == 20_000 and value[2:] == ("x", 3, 3, 3)
        assert DONE.count("effect") == 1 and DONE.count("x") == 1, (k, DONE)
        if disk.calls < k:
            break
    assert failures > 5 and unknown <= 4


def test_a_value_that_finds_no_room_is_an_error_and_the_rest_counts(
    store: Path, tmp_path: Path
) -> None:
    class Full(FailingDisk):
        def create(self, path: Path) -> int:
            if path.suffix == ".h5":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().create(path)

    node = tasks.total.bind(tasks.array.options(checkpoint="sync").bind(20_000)).after(one.bind())
    with pytest.raises(OSError, match="No space left"), Workflow(
        "w", store, disk=Full(0, 0), workers=1
    ) as workflow:
        workflow.run(node)
    status = Workflow("w", store).status()
    assert status.state in ("failed", "interrupted")
    with Workflow("w", store) as workflow:
        assert workflow.run(node) == 20_000
    assert CALLS.count("one") == 1


def test_the_error_of_a_task_is_not_hidden_by_the_journals(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = Journal.flush

    def broken(self: Journal, upto: int | None = None) -> None:
        if CALLS:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(self, upto)

    monkeypatch.setattr(Journal, "flush", broken)
    with (
        pytest.warns(RuntimeWarning, match="workflow w: .*Input/output error"),
        pytest.raises(TaskFailedError, match="fails failed"),
        Workflow("w", store) as workflow,
    ):
        workflow.run(tasks.fails.bind(1))


def test_an_older_start_of_a_batch_job_does_not_go_on(
    run: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the later one has closed it in good order."""
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(TaskFailedError):
        run(tasks.fails.bind(1))
    segments = sorted((store / "w" / "journal").glob("*"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(WorkflowFencedError, match="workflow w belongs to start 2 of job 123"):
        run(None)
    assert sorted((store / "w" / "journal").glob("*")) == segments
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    run(None)


def test_no_thread_is_left_behind(run: Run) -> None:
    before = set(threading.enumerate())
    run(add.bind(give.bind(1), give.bind(np.float64(2)), one.bind()))
    with contextlib.suppress(WorkflowCancelledError, TaskFailedError):
        run(tasks.fails.bind(1), "other")
    left = {thread for thread in set(threading.enumerate()) - before if "hopcoll" in thread.name}
    assert not left
