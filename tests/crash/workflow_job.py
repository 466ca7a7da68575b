"""One workflow of the corpus on real ranks: ``-m tests.crash.workflow_job SEED FOLDER``.

Says "begun" when it runs, and its output as JSON when it is done. An effect of which nobody knows
whether it was done is told by the exit code 3, and its task.
"""

from __future__ import annotations

import collections
import contextlib
import json
import random
import sqlite3
import sys
import threading
import warnings
from pathlib import Path

import hopcoll
from hopcoll.errors import EffectUnknownError, HopcollError
from recovery.workflows import Workflow
from tests.crash import workflow_graphs as graphs
from tests.crash.workflow_living import corpus

UNKNOWN = 3
_MOMENT_S = 0.01


class RealWorld(graphs.World):
    """The world outside, as processes see it that may be killed at any moment."""

    ranks_are_lost_at_will = False

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "world.db").exists():
            super().__init__(path)
        else:
            self.database = sqlite3.connect(path / "world.db", check_same_thread=False)
            self.file = path / "world.txt"
            self.file.touch()
            self.disk = None
            self.executed, self.asked, self.undone, self.zombies = [], [], [], []
            self.tries, self.happens = collections.Counter(), {}

    def moment(self) -> None:
        threading.Event().wait(random.random() * _MOMENT_S)

    def do(self, act: graphs.Act, may_wake: bool = True) -> None:
        self.moment()
        with contextlib.closing(self._connect()) as database:
            with database:
                act(database)
        self.moment()

    def rows(self, query: str, *values: object) -> list:
        with contextlib.closing(self._connect()) as database:
            return database.execute(query, values).fetchall()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path / "world.db", timeout=30.0, check_same_thread=False)


def main() -> None:
    seed, folder = int(sys.argv[1]), Path(sys.argv[2])
    graphs.WORLD = RealWorld(folder)
    comm = hopcoll.init()
    code = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workflow = Workflow("w", folder / "store", comm=comm, patience_s=0.5)
        print("begun", flush=True)
        try:
            value = workflow.run(corpus(seed))
            if comm.rank == min(comm.alive):
                print(json.dumps(value["tokens"]), flush=True)
        except EffectUnknownError as error:
            if comm.rank == min(comm.alive):
                print(json.dumps({"unknown": error.task, "why": str(error)}), flush=True)
            code = UNKNOWN
        except HopcollError as error:
            if "cannot be released" not in str(error):
                raise
            print(json.dumps({"contradiction": str(error)}), flush=True)
        workflow.close()
    comm.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
