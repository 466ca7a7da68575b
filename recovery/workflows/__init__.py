"""Exactly-once workflows: tasks in plain Python, a journal, and what follows from it.

The layout, from the bottom up::

    values.py     values: written, read, hashed
    ledger.py     what a journal says, and what has to run because of it. Pure
    names.py      functions by their names
    graph.py      tasks, nodes, graphs
    stored.py     graphs and calls as bytes
    checks.py     what is checked of a graph before it runs
    context.py    what a task can ask for
    board.py      the tasks of a workflow that runs
    references.py objects in the ranks' memory, as an attempt has them
    attempts.py   one attempt of one task
    lineage.py    which objects there are, and who makes lost ones again
    elsewhere.py  tasks that the ranks are given
    engine.py     the threads, and the journal between them
    actors.py     objects that live on a rank
    post.py       letters between ranks
    gang.py       tasks that many ranks run together, or one of them
    folder.py     where workflows are kept
    workflow.py   what a program calls
    cli.py        hopcoll wf
"""

from recovery.workflows.actors import Actor, ActorClass, Called, actor
from recovery.workflows.context import Done, NotDoneError, TaskContext
from recovery.workflows.graph import Node, Stop, Task, event, loop, task
from recovery.workflows.workflow import Status, Workflow

__all__ = [
    "Actor",
    "ActorClass",
    "Called",
    "Done",
    "Node",
    "NotDoneError",
    "Status",
    "Stop",
    "Task",
    "TaskContext",
    "Workflow",
    "actor",
    "event",
    "loop",
    "task",
]
