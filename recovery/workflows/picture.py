"""The graph of a workflow as a picture."""

from __future__ import annotations

from pathlib import Path

from hopcoll.errors import WorkflowError
from recovery.workflows.graph import Graph, Node
from recovery.workflows.ledger import Ledger, iteration_of

__all__ = ["draw"]

#: What became of a task, and its colour (Okabe and Ito's, which the colour-blind can tell apart).
COLOURS = {
    "done": "#56B4E9",
    "read back": "#009E73",
    "run again": "#E69F00",
    "rolled back": "#CC79A7",
    "failed": "#D55E00",
    "begun, end unknown": "#F0E442",
    "waiting": "#DDDDDD",
}
_TASKS_MAX = 500


def draw(path: Path, title: str, node: Node, ledger: Ledger) -> None:
    """Write the graph to a file: .dot as text, everything else by matplotlib.

    Raises
    ------
    WorkflowError
        matplotlib is not installed, or does not know the kind of file.
    """
    graph = Graph.of(node)
    edges = [(name, vertex.id) for vertex in graph.vertices.values() for name in vertex.inputs]
    tasks = list(graph.vertices)
    for task in ledger.states:
        if task in graph.vertices:
            continue
        done = ledger.done(task)
        if done is not None:
            edges += [(name, task) for name in done.inputs if name != task]
        place = iteration_of(task)
        owner = place[0] if place is not None else task.rpartition("/")[0]
        if owner in graph.vertices and (done is None or not done.inputs):
            edges.append((owner, task))
        tasks.append(task)
    known = set(tasks)
    edges = [edge for edge in dict.fromkeys(edges) if edge[0] in known]
    fates = {task: fate(ledger, task) for task in tasks}
    if path.suffix == ".dot":
        path.write_text(_dot(title, fates, edges))
        return
    if len(tasks) > _TASKS_MAX:
        raise WorkflowError(
            f"{len(tasks)} tasks are too many for a picture; write a .dot file instead"
        )
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise WorkflowError(
            "pictures need matplotlib: pip install hopcoll[bench]; or write a .dot file"
        ) from None
    places = _layers(tasks, edges)
    width = max(x for x, _ in places.values()) + 1
    height = max(y for _, y in places.values()) + 1
    figure, axes = pyplot.subplots(figsize=(2.4 + 2.2 * width, 1.6 + 0.8 * height))
    for source, target in edges:
        axes.annotate(
            "",
            xy=places[target],
            xytext=places[source],
            arrowprops={"arrowstyle": "-|>", "color": "#888888", "shrinkA": 22, "shrinkB": 26},
        )
    for task, (x, y) in places.items():
        label = task if len(task) <= 24 else f"...{task[-22:]}"
        axes.text(
            x, y, label, ha="center", va="center", fontsize=8,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": COLOURS[fates[task]],
                  "edgecolor": "#444444"},
        )  # fmt: skip
    used = [one for one in COLOURS if one in fates.values()]
    handles = [pyplot.Line2D([], [], marker="s", ls="", ms=9, color=COLOURS[one]) for one in used]
    axes.legend(
        handles, used, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=len(used),
        frameon=False, fontsize=8,
    )  # fmt: skip
    axes.set_xlim(-0.7, width - 0.3)
    axes.set_ylim(-0.7, height - 0.3)
    axes.set_title(f"{title}: {ledger.status}", fontsize=10)
    axes.axis("off")
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    except ValueError as error:
        raise WorkflowError(f"{path} cannot be drawn: {error}") from error
    finally:
        pyplot.close(figure)


def fate(ledger: Ledger, task: str) -> str:
    """What became of a task, in a word."""
    state = ledger.states.get(task)
    if state is None:
        return "waiting"
    if state.done is None:
        if state.begun is not None:
            return "begun, end unknown"
        return "failed" if state.failures else ("rolled back" if state.undone else "waiting")
    if state.undone:
        return "rolled back"
    if state.runs > 1 or state.done.head.get("why"):
        return "run again"
    return "read back" if state.life < ledger.lives else "done"


def _layers(tasks: list[str], edges: list[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Columns by the longest way from a source; rows by where the inputs are."""
    inputs: dict[str, list[str]] = {task: [] for task in tasks}
    for source, target in edges:
        inputs[target].append(source)
    column: dict[str, int] = {}
    for root in tasks:
        stack = [root]
        open_tasks: set[str] = set()
        while stack:
            task = stack[-1]
            open_tasks.add(task)
            rest = [one for one in inputs[task] if one not in column and one not in open_tasks]
            if rest:
                stack += rest
            else:
                column[task] = 1 + max((column.get(one, -1) for one in inputs[task]), default=-1)
                stack.pop()
    rows: dict[str, float] = {}
    for number in range(max(column.values(), default=0) + 1):
        here = [task for task in tasks if column[task] == number]

        def wanted(task: str) -> float:
            above = [rows[one] for one in inputs[task] if one in rows]
            return sum(above) / len(above) if above else 0.0

        for row, task in enumerate(sorted(here, key=wanted)):
            rows[task] = row
    return {task: (float(column[task]), rows[task]) for task in tasks}


def _dot(title: str, fates: dict[str, str], edges: list[tuple[str, str]]) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = [f"digraph {quoted(title)} {{", "  rankdir=LR;", "  node [shape=box, style=filled];"]
    lines += [
        f"  {quoted(task)} [fillcolor={quoted(COLOURS[one])}, tooltip={quoted(one)}];"
        for task, one in fates.items()
    ]
    lines += [f"  {quoted(source)} -> {quoted(target)};" for source, target in edges]
    return "\n".join([*lines, "}", ""])
