"""Recompute every result of a run from its seed, and hold the logs of its ranks against that.

A process of its own: ``python -m hopcoll.chaos.judge FOLDER...`` prints one JSON line for each
folder; without an argument it reads the folders' names from standard input. It runs no MPI, and
nothing of the engine goes into a result: the value order below is written down a second time, from
the documentation.

What it demands of the ranks that were not killed:

- they end, and their job ends with exit code 0 and leaves no process behind (else: ``hang``,
  ``exit_code``, ``crash``, ``lost_rank``, ``left_behind``);
- they made and finished all operations (``unfinished``, ``exception``), with the same status,
  contributors, epoch and bytes at all of them (``disagreement``);
- every result is, to the last bit, the one that its contributors' inputs give (``wrong_value``);
- contributors are ranks of the start, hold every survivor, never grow again (``contributors``),
  and have made the call before anybody had its result (``early``);
- an operation fails only if its root died or its caller asked for that (``status``); of one with a
  quorum a late rank may have missed the result, and enough contributed (``contributors``);
- no input was changed and nothing written beside the result (``buffer``).

And of what the dead had logged before they died: a result of the same epoch is the survivors'
result (``dead_disagrees``), what was called stable is what the survivors have (``unstable``), and
it was right in itself (``wrong_value``).

Where the ranks wrote traces, each is replayed through the protocol without MPI, which has to do the
same (``trace``: `hopcoll.replay`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hopcoll.chaos.plan import (
    BIG_BYTES,
    BLOCKS_MAX,
    Operation,
    Run,
    make_input,
    result_ranks,
)
from hopcoll.chaos.shares import (
    contribution_bytes,
    digest_of,
    expected_share,
    whole_bytes,
)
from hopcoll.replay import replay

__all__ = ["expected_result", "judge"]

_UFUNCS = {
    "SUM": np.add,
    "AVG": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "LAND": np.logical_and,
    "LOR": np.logical_or,
    "LXOR": np.logical_xor,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}
_IN_FLIGHT = (0.05, 0.95)
_CRASH_SIGNS = (
    "Process received signal",
    "Traceback (most recent call last)",
    "Fatal Python error",
)


def _fold(operation: Operation, pieces: list[np.ndarray]) -> np.ndarray:
    """Reduce from left to right, in the dtype."""
    total = pieces[0].copy()
    ufunc = _UFUNCS[operation.op]
    for piece in pieces[1:]:
        total = ufunc(total, piece).astype(operation.dtype, copy=False)
    if operation.op == "AVG":
        total = (total / total.dtype.type(len(pieces))).astype(operation.dtype, copy=False)
    return total


def expected_result(
    run: Run, number: int, contributors: Iterable[int], chained: str, rank: int = 0
) -> np.ndarray | None:
    """Return what an operation must give at a rank that has a result; None: anything.

    The value order, as ARCHITECTURE.md documents it: a fold from the left over the contributors in
    the order of their ranks at the start, beginning with rank s and wrapping around. s is 0 for at
    most eager_bytes; root + 1 for a larger Reduce; in a larger Allreduce each of min(size, 8)
    blocks begins with a rank of its own.
    """
    operation = run.operations[number]
    if operation.kind == "bcast":
        return make_input(run, number, operation.root, chained)
    givers = (operation.root,) if operation.kind == "scatter" else contributors
    inputs = {giver: make_input(run, number, giver, chained) for giver in givers}
    small = contribution_bytes(operation, run.size) <= run.eager_bytes
    if operation.kind not in ("reduce", "allreduce"):
        return expected_share(
            operation, run.size, rank, small, inputs, lambda pieces: _fold(operation, pieces)
        )

    def fold(start: int, items: slice) -> np.ndarray:
        order = [(start + place) % run.size for place in range(run.size)]
        return _fold(operation, [inputs[rank][items] for rank in order if rank in inputs])

    everything = slice(0, operation.count)
    if small:
        return fold(0, everything)
    if operation.kind == "reduce":
        return fold(operation.root + 1, everything)
    blocks = min(run.size, BLOCKS_MAX)
    bounds = [block * operation.count // blocks for block in range(blocks + 1)]
    return np.concatenate(
        [
            fold(block * run.size // blocks, slice(bounds[block], bounds[block + 1]))
            for block in range(blocks)
        ]
    )


@dataclass
class _Log:
    """What one rank wrote down."""

    calls: dict[int, float] = field(default_factory=dict)  # number: time of the call
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    stable: set[int] = field(default_factory=set)
    finished: dict[str, Any] | None = None
    exception: str = ""

    @classmethod
    def read(cls, path: Path) -> _Log:
        log = cls()
        text = path.read_text() if path.exists() else ""
        # The last line of a rank that was killed in the middle of a write has no end.
        for line in text.split("\n")[:-1]:
            entry = json.loads(line)
            event = entry["event"]
            if event == "call":
                log.calls[entry["op"]] = entry["time_s"]
            elif event == "done":
                log.done[entry["op"]] = entry
            elif event == "stable":
                log.stable.add(entry["op"])
            elif event == "finished":
                log.finished = entry
            elif event == "exception":
                log.exception = entry["text"]
        return log


@dataclass
class _Case:
    """One run under judgement."""

    run: Run
    logs: dict[int, _Log]
    records: dict[int, dict[str, Any]]  # of the victims
    problems: list[str] = field(default_factory=list)
    digests: dict[tuple[Any, ...], str | None] = field(default_factory=dict)

    @property
    def dead(self) -> list[int]:
        return sorted(self.records)

    @property
    def survivors(self) -> list[int]:
        return [rank for rank in range(self.run.size) if rank not in self.records]

    def problem(self, kind: str, text: str) -> None:
        self.problems.append(f"{kind}: {text}")

    def digest(
        self, number: int, contributors: Iterable[int], chained: str, rank: int
    ) -> str | None:
        """Of the result that a rank must have; None where it is undefined."""
        shared = self.run.operations[number].shared
        key = (number, tuple(contributors), chained, 0 if shared else rank)
        if key not in self.digests:
            result = expected_result(self.run, *key)
            self.digests[key] = None if result is None else digest_of(result)
        return self.digests[key]


def judge(folder: Path) -> dict[str, Any]:
    """Judge the run in a folder.

    Parameters
    ----------
    folder : Path
        Holds run.json, log.RANK, fault.RANK of each victim, launcher.json and output.

    Returns
    -------
    dict
        ``problems``: a list of texts, each "kind: what"; the counts that the report adds up.
    """
    run = Run.load(folder / "run.json")
    records, paused = {}, {}
    for path in folder.glob("fault.*"):
        record = json.loads(path.read_text())
        # Who was stopped for a while is none of the dead.
        (paused if record.get("stop_ms", -1) > 0 else records)[int(record["rank"])] = record
    logs = {rank: _Log.read(folder / f"log.{rank}") for rank in range(run.size)}
    launcher = json.loads((folder / "launcher.json").read_text())
    launcher["output"] = (folder / "output").read_text(errors="replace")
    case = _Case(run, logs, records)
    _check_end(case, launcher)
    agreed = _check_agreement(case)
    _check_contributors(case, agreed)
    _check_values(case, agreed)
    _check_dead(case, agreed)
    traces = _check_traces(case, folder / "traces")
    return {
        "run": run.number,
        "size": run.size,
        "faults_planned": len(run.faults),
        "faults_fired": len(records) + len(paused),
        "kills": sum(record.get("stop_ms", -1) < 0 for record in records.values()),
        "stops": sum(record.get("stop_ms", -1) == 0 for record in records.values()),
        "pauses": len(paused),
        "by_kind": _by_kind(run, [*records.values(), *paused.values()]),
        "last_one": len(records) == run.size - 1,
        "hang": bool(launcher["timed_out"]),
        "seconds": launcher["seconds"],
        "problems": case.problems,
        "traces": traces,
        **_figures(case),
    }


def _check_end(case: _Case, launcher: dict[str, Any]) -> None:
    if launcher["timed_out"]:
        unfinished = [rank for rank in case.survivors if case.logs[rank].finished is None]
        case.problem("hang", f"ranks {unfinished} had not finished at the deadline")
    elif launcher["returncode"] != 0:
        case.problem("exit_code", f"the launcher ended with {launcher['returncode']}")
    if launcher["left_behind"]:
        case.problem("left_behind", f"processes {launcher['left_behind']} outlived the launcher")
    # A rank may crash after its last line, and its job still end with 0: a death is survived.
    for sign in _CRASH_SIGNS:
        if sign in launcher["output"]:
            case.problem("crash", f"{sign!r} in the output of the job")
    planned = {fault.rank for fault in case.run.faults}
    for rank in case.dead:
        if rank not in planned:
            case.problem("lost_rank", f"rank {rank} died of a fault that was not planned")
    if not case.survivors:
        case.problem("lost_rank", "nobody survived")
    for rank in case.survivors:
        log = case.logs[rank]
        if log.exception:
            case.problem("exception", f"rank {rank}: {log.exception.strip().splitlines()[-1]}")
        elif log.finished is None and not launcher["timed_out"]:
            case.problem("lost_rank", f"rank {rank} vanished, and no fault of ours fired in it")


def _check_agreement(case: _Case) -> dict[int, dict[str, Any]]:
    """Return what the survivors agree on for each operation."""
    agreed = {}
    for number in range(len(case.run.operations)):
        views: dict[tuple[Any, ...], list[int]] = {}
        entries = {}
        for rank in case.survivors:
            entry = case.logs[rank].done.get(number)
            if entry is None:
                if case.logs[rank].finished is not None:
                    case.problem("unfinished", f"op {number}: rank {rank} has no result")
                continue
            if not entry["intact"]:
                case.problem("buffer", f"op {number}: rank {rank}: bytes beside the result changed")
            if entry["status"] == "missed" and case.run.operations[number].quorum:
                continue  # of this rank alone
            entries[rank] = entry
            views.setdefault(_view(entry), []).append(rank)
        if len(views) > 1:
            text = "; ".join(f"ranks {ranks} have {view}" for view, ranks in views.items())
            case.problem("disagreement", f"op {number}: {text}")
        holders = {}  # digest: ranks
        for rank, entry in entries.items():
            if entry.get("digest") is not None and case.run.operations[number].shared:
                holders.setdefault(entry["digest"], []).append(rank)
        if len(holders) > 1:
            case.problem("disagreement", f"op {number}: results differ: {holders}")
        if entries:
            agreed[number] = next(iter(entries.values()))
            _check_status(case, number, agreed[number])
    return agreed


def _view(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return the part of an entry that must be alike at all ranks."""
    parts = (entry["status"], entry.get("contributors"), entry.get("failed"), entry["epoch"])
    return tuple(tuple(part) if isinstance(part, list) else part for part in parts)


def _check_status(case: _Case, number: int, entry: dict[str, Any]) -> None:
    operation = case.run.operations[number]
    status = entry["status"]
    root_died = operation.rooted and operation.root in case.records
    allowed = {"ok"}
    if operation.kind in ("reduce", "gather") and root_died:
        allowed.add("root_lost")
    if (operation.kind in ("bcast", "scatter") and root_died) or (
        case.run.on_failure == "raise" and case.records
    ):
        allowed.add("rank_failed")
    if status not in allowed:
        case.problem("status", f"op {number}: {status}, where only {sorted(allowed)} can be")
    living = set(entry.get("failed", ())) - set(case.records)
    if living:
        case.problem("status", f"op {number}: ranks {sorted(living)} live and are called failed")


def _check_contributors(case: _Case, agreed: dict[int, dict[str, Any]]) -> None:
    before: set[int] = set(range(case.run.size))
    epoch_before = epoch = 0
    for number, entry in agreed.items():
        if entry["epoch"] < epoch:
            case.problem("contributors", f"op {number}: the epoch went back from {epoch}")
        epoch = max(epoch, entry["epoch"])
        if entry["status"] != "ok":
            continue
        contributors = set(entry["contributors"])
        if len(contributors) != len(entry["contributors"]):
            case.problem("contributors", f"op {number}: one rank twice")
        quorum = case.run.operations[number].quorum
        if quorum:
            if strangers := contributors - before:
                case.problem("contributors", f"op {number}: {sorted(strangers)} came back")
            if len(contributors) < min(quorum, len(case.survivors)):
                case.problem("contributors", f"op {number}: {len(contributors)} of {quorum}")
            _check_causality(case, number, entry)
            continue
        if missing := set(case.survivors) - contributors:
            case.problem("contributors", f"op {number}: survivors {sorted(missing)} left out")
        if grown := contributors - before:
            case.problem("contributors", f"op {number}: {sorted(grown)} came back")
        elif contributors != before and entry["epoch"] <= epoch_before:
            case.problem("contributors", f"op {number}: others than before, in the same epoch")
        before, epoch_before = contributors, entry["epoch"]
        _check_causality(case, number, entry)


def _check_causality(case: _Case, number: int, entry: dict[str, Any]) -> None:
    """Nobody can have a result before all contributors have made the call."""
    operation = case.run.operations[number]
    if operation.kind in ("bcast", "scatter") or (
        operation.kind != "barrier" and (operation.count == 0 or operation.vector)
    ):
        return  # the only input is the root's, or there is none, or some are empty
    needed = entry["contributors"]
    if operation.kind in ("scan", "exscan"):
        # What is behind the last survivor goes into nobody's result.
        needed = [rank for rank in needed if rank <= max(case.survivors)]
    called = [case.logs[rank].calls.get(number) for rank in needed]
    if not called:
        case.problem("contributors", f"op {number}: nobody's input is in it")
        return
    if None in called:
        rank = needed[called.index(None)]
        case.problem("early", f"op {number}: rank {rank} contributed without a call")
        return
    for rank in case.survivors:
        if operation.kind in ("reduce", "gather") and rank != operation.root:
            continue
        done = case.logs[rank].done.get(number)
        if done is not None and done["status"] == "ok" and done["time_s"] < max(called):
            case.problem("early", f"op {number}: rank {rank} returned before the last call")


def _chained(case: _Case, number: int, digests: dict[int, str]) -> str:
    source = case.run.operations[number].chained_to
    return "" if source is None else digests.get(source, "")


def _check_values(case: _Case, agreed: dict[int, dict[str, Any]]) -> None:
    digests: dict[int, str] = {}  # of the results, as they must be
    for number, entry in agreed.items():
        operation = case.run.operations[number]
        if entry["status"] != "ok" or operation.kind == "barrier" or not entry["contributors"]:
            continue
        holders = [
            rank for rank in result_ranks(operation, case.run.size) if rank in case.survivors
        ]
        if not holders:
            continue
        chained = _chained(case, number, digests)
        for rank in holders:
            must = case.digest(number, entry["contributors"], chained, rank)
            if operation.shared and must is not None:
                digests[number] = must
            done = case.logs[rank].done.get(number)
            if done is None or must is None or done["status"] == "missed":
                continue
            if done.get("digest") != must:
                case.problem("wrong_value", f"op {number}: rank {rank}: {_name(operation)}")


def _name(operation: Operation) -> str:
    return f"{operation.kind} {operation.op} of {operation.count} {operation.dtype}"


def _check_dead(case: _Case, agreed: dict[int, dict[str, Any]]) -> None:
    for rank in case.dead:
        log = case.logs[rank]
        digests = {
            number: entry.get("digest") or ""
            for number, entry in log.done.items()
            if case.run.operations[number].shared
        }
        for number, entry in sorted(log.done.items()):
            operation = case.run.operations[number]
            theirs = agreed.get(number)
            if entry["status"] == "missed":
                theirs = None
            if theirs is not None and (number in log.stable or entry["epoch"] >= theirs["epoch"]):
                kind = "unstable" if number in log.stable else "dead_disagrees"
                if _view(entry) != _view(theirs):
                    case.problem(
                        kind,
                        f"op {number}: rank {rank} had {_view(entry)} before it died, "
                        f"the survivors {_view(theirs)}",
                    )
            if not entry["intact"]:
                case.problem("buffer", f"op {number}: rank {rank}: bytes beside the result changed")
            if entry["status"] == "ok" and entry.get("digest") is not None:
                chained = _chained(case, number, digests)
                must = case.digest(number, entry["contributors"], chained, rank)
                if must is not None and entry["digest"] != must:
                    case.problem(
                        "wrong_value", f"op {number}: rank {rank}, dead since: {_name(operation)}"
                    )


def _check_traces(case: _Case, folder: Path) -> int:
    """Replay what the ranks wrote down; returns of how many there was something."""
    if not folder.is_dir():
        return 0
    found = replay(folder)
    for one in found:
        for text in one.wrong:
            case.problem("trace", text)
    return sum(len(one.ranks) for one in found)


def _figures(case: _Case) -> dict[str, Any]:
    """Count what the report adds up over the runs."""
    counters: dict[str, int] = {}
    for rank in case.survivors:
        finished = case.logs[rank].finished
        for name, value in (finished["counters"] if finished else {}).items():
            counters[name] = max(counters.get(name, 0), value)
    return {
        "in_flight": sum(_is_in_flight(case, record) for record in case.records.values()),
        "during_repair": sum(bool(record["repair"]) for record in case.records.values()),
        "coordinators_killed": sum(bool(r["coordinator"]) for r in case.records.values()),
        "roots_killed": sum(_is_open_root(case, rank) for rank in case.dead),
        "by_trigger": {
            trigger: sum(record["trigger"] == trigger for record in case.records.values())
            for trigger in ("chunk", "ballot", "time")
        },
        "ballots": counters.get("ballots", 0),
        "stands": counters.get("stands", 0),
        "reruns": counters.get("reruns", 0),
        "records": [case.records[rank] for rank in case.dead],
    }


def _by_kind(run: Run, records: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many operations of each kind there were, and faults that fell while one was open."""
    kinds: dict[str, dict[str, int]] = {}
    for operation in run.operations:
        kinds.setdefault(operation.kind, {"operations": 0, "faults": 0})["operations"] += 1
    for record in records:
        if 0 <= record["op"] < len(run.operations):
            kinds[run.operations[record["op"]].kind]["faults"] += 1
    return kinds


def _is_in_flight(case: _Case, record: dict[str, Any]) -> bool:
    """Whether 5 to 95% of the bytes of an operation of 8 MiB or more had moved on the victim."""
    number, total_bytes = record["op"], record["total_bytes"]
    if not 0 <= number < len(case.run.operations) or total_bytes <= 0:
        return False
    big = whole_bytes(case.run.operations[number], case.run.size) >= BIG_BYTES
    return big and _IN_FLIGHT[0] <= record["moved_bytes"] / total_bytes <= _IN_FLIGHT[1]


def _is_open_root(case: _Case, rank: int) -> bool:
    """Whether the victim was the root of an operation that it was in."""
    log = case.logs[rank]
    return any(
        case.run.operations[number].rooted and case.run.operations[number].root == rank
        for number in log.calls
        if number not in log.done
    )


def _folders() -> Iterator[str]:
    yield from sys.argv[1:] or (line.rstrip("\n") for line in sys.stdin)


if __name__ == "__main__":
    for name in _folders():
        print(json.dumps(judge(Path(name))), flush=True)
