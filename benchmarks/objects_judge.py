"""Judges what `benchmarks.objects_chaos_job` logged: did ``comm.objects`` keep its word?

The ranks of a job are processes of one host, so their clocks agree. From what was answered before a
moment the judge knows who had what then. A version is *surely held* throughout a time if

* a rank had it before: its put of it, or a get of it, had returned there;
* that rank did not die before the time was over;
* no deletion of the key, begun before the time was over, ended after that version was put: such a
  deletion may have been about it. (One that was under way when its rank died counts for a while
  longer, one that ran out of time for ever.)

While a version is surely held, every get of its key ends with it, and soon. Where nothing is surely
held the judge believes what follows from no death and no deletion alone.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["judge"]

_NOT_PUT = ("exists", "full")
_CRASH_SIGNS = ("Segmentation fault", "double free", "corrupted", "Assertion", "Traceback")


@dataclass
class Call:
    """One call of one rank; `end_s` is infinite, and `end` empty, if it did not return."""

    rank: int
    what: str
    begin_s: float
    told: dict[str, Any]
    end_s: float = math.inf
    end: str = ""

    @property
    def key(self) -> str:
        return self.told["key"]

    def __str__(self) -> str:
        about = self.told.get("key", self.told.get("keys"))
        return (
            f"rank {self.rank}: {self.what} of {about!r}, {self.begin_s:.6f} to {self.end_s:.6f}, "
            f"{self.end or 'no end'}"
        )


@dataclass
class Log:
    """What one rank logged."""

    calls: list[Call] = field(default_factory=list)
    dying: dict[str, Any] | None = None
    finished: dict[str, Any] | None = None
    exception: str = ""
    last_s: float = 0.0
    resumed: int = 0

    @classmethod
    def read(cls, path: Path, rank: int) -> Log:
        log = cls()
        by_number: dict[int, Call] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines[:-1]:  # behind the last newline is nothing, or half a line
            entry = json.loads(line)
            event = entry.pop("event")
            log.last_s = max(log.last_s, entry["time_s"])
            if event == "call":
                call = Call(rank, entry["what"], entry["time_s"], entry)
                by_number[entry["number"]] = call
                log.calls.append(call)
            elif event == "done":
                call = by_number[entry["number"]]
                call.end_s, call.end = entry["time_s"], entry["end"]
                log.resumed = entry.get("resumed", 0)
                call.told = {**entry, **call.told, "version": _version(entry, call)}
            elif event == "dying":
                log.dying = log.dying or entry
            elif event == "finished":
                log.finished = entry
            elif event == "exception":
                log.exception = entry["text"]
        return log


def _version(done: dict[str, Any], call: Call) -> tuple[int, ...] | None:
    version = done.get("version", call.told.get("version"))
    return None if version is None else tuple(version)


@dataclass
class _Case:
    """One job under judgement."""

    plan: dict[str, Any]
    logs: dict[int, Log]
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    calls: dict[str, dict[str, list[Call]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.patience_s = self.plan["patience_s"]
        self.calls = defaultdict(lambda: defaultdict(list))
        for call in self.all():
            if "key" in call.told:
                self.calls[call.key][call.what].append(call)

    def all(self) -> list[Call]:
        return [call for log in self.logs.values() for call in log.calls]

    def problem(self, kind: str, text: object) -> None:
        self.problems.append(f"{kind}: {text}")

    def death_s(self, rank: int) -> float:
        """When a rank was dead at the earliest."""
        log = self.logs[rank]
        if log.dying is not None:
            return log.dying["time_s"]
        return math.inf if log.finished else log.last_s

    def any_death(self, before_s: float) -> bool:
        return any(self.death_s(rank) <= before_s for rank in self.logs)

    # ---- who had what ----

    def versions(self, key: str) -> dict[tuple[int, ...], Call]:
        """The puts of a key that may have been accepted."""
        puts = self.calls[key]["put"]
        return {tuple(one.told["version"]): one for one in puts if one.end not in _NOT_PUT}

    def holds(self, key: str) -> list[tuple[int, tuple[int, ...], float]]:
        """Rank, version, and since when it surely had it."""
        calls = self.calls[key]["put"] + self.calls[key]["get"]
        return [(c.rank, tuple(c.told["version"]), c.end_s) for c in calls if c.end == "ok"]

    def deletion_end_s(self, call: Call) -> float:
        """Until when it may delete something."""
        if call.end:
            return math.inf if call.end == "timeout" else call.end_s
        return self.death_s(call.rank) + self.patience_s

    def may_be_deleted(self, key: str, put: Call, before_s: float) -> bool:
        return any(
            one.begin_s < before_s and self.deletion_end_s(one) > put.begin_s
            for one in self.calls[key]["delete"]
        )

    def held_s(self, key: str, begin_s: float, end_s: float) -> tuple[float, Any]:
        """For how long of this time a version was surely held, by one rank; and which one."""
        best: tuple[float, Any] = (0.0, None)
        puts = self.versions(key)
        for rank, version, since_s in self.holds(key):
            from_s, until_s = max(since_s, begin_s), min(self.death_s(rank), end_s)
            if until_s - from_s <= best[0] or version not in puts:
                continue
            if not self.may_be_deleted(key, puts[version], until_s):
                best = until_s - from_s, version
        return best

    def surely_held(self, call: Call) -> Any:
        """A version that was surely held throughout a call, or None."""
        puts = self.versions(call.key)
        for rank, version, since_s in self.holds(call.key):
            if since_s > call.begin_s or self.death_s(rank) <= call.end_s or version not in puts:
                continue
            if not self.may_be_deleted(call.key, puts[version], call.end_s):
                return version
        return None

    def surely_deleted(self, key: str, version: tuple[int, ...], before_s: float) -> bool:
        """Whether a deletion, begun when this version was there, had returned by then."""
        seen_s = min((since for _, one, since in self.holds(key) if one == version), default=None)
        return seen_s is not None and any(
            one.end == "ok" and one.begin_s > seen_s and one.end_s < before_s
            for one in self.calls[key]["delete"]
        )


def judge(folder: Path) -> dict[str, Any]:
    """Judge the job in a folder.

    Parameters
    ----------
    folder : Path
        Holds plan.json, log.RANK, launcher.json and output.

    Returns
    -------
    dict
        ``problems``: a list of texts, each "kind: what"; the counts that the report adds up.
    """
    plan = json.loads((folder / "plan.json").read_text())
    logs = {rank: Log.read(folder / f"log.{rank}", rank) for rank in range(plan["ranks"])}
    case = _Case(plan, logs)
    _check_end(case, folder)
    for call in case.all():
        if call.end and not call.told.get("names", True):
            case.problem("names", f"the error has another ref; {call}")
        if call.end == "full":
            case.problem("full", call)
        if call.what == "wait":
            _check_wait(case, call)
    for key in list(case.calls):
        if key.startswith("result"):
            _check_result(case, key)
            continue
        _check_puts(case, key)
        for call in case.calls[key]["get"]:
            _check_get(case, call)
    for what in ("put", "delete"):
        for call in case.all():
            if call.what == what and call.end == "timeout":
                case.problem("hang", call)
    return {
        "number": plan["number"],
        "problems": case.problems,
        "deaths": sum(log.dying is not None for log in logs.values()),
        "survivors": sum(log.finished is not None for log in logs.values()),
        **_figures(case),
    }


def _figures(case: _Case) -> dict[str, Any]:
    """What happened, for the report."""
    answers: Counter[str] = Counter()
    for call in case.all():
        if call.end:
            answers[f"{call.what} {call.end}"] += 1
    dead = [log for log in case.logs.values() if log.dying is not None]
    # Who ended itself by a thread may have had an answer between its last line and its end.
    in_call = Counter(call.what for log in dead for call in log.calls[-1:] if not call.end)
    stats = [log.finished["stats"] for log in case.logs.values() if log.finished]
    names = ("pulls", "registered", "settled", "lost")
    return {
        "calls": sum(answers.values()),
        "answers": dict(sorted(answers.items())),
        "deaths_in_a_call": dict(in_call),
        "deaths_by_kind": dict(Counter(log.dying["how"] for log in dead if log.dying)),
        "pulls_resumed": sum(log.resumed for log in case.logs.values()),
        "gets_for_nothing": case.counts["for nothing"],
        "gets_cut_short": case.counts["short"],
        "lost_that_were_deleted": case.counts["deleted"],
        "results_without_a_ref": case.counts["unnamed"],
        "stats_of_survivors": {name: sum(one.get(name, 0) for one in stats) for name in names},
    }


# ---- how it ended --------------------------------------------------------------------------


def _check_end(case: _Case, folder: Path) -> None:
    launcher = json.loads((folder / "launcher.json").read_text())
    output = (folder / "output").read_text(errors="replace")
    if launcher["timed_out"]:
        left = [r for r, log in case.logs.items() if not log.finished and log.dying is None]
        case.problem("hang", f"ranks {left} had not finished at the deadline")
    elif launcher["code"] != 0:
        case.problem("exit_code", f"the launcher ended with {launcher['code']}")
    case.problems += [f"crash: {sign!r} in the output" for sign in _CRASH_SIGNS if sign in output]
    planned = {int(rank) for rank in case.plan["deaths"]}
    # Results of ranks that died in the call: nobody has their refs, to delete them.
    unnamed = sum(
        call.what == "reduce" and not call.end
        for log in case.logs.values()
        if log.dying is not None
        for call in log.calls
    )
    for rank, log in case.logs.items():
        if log.exception:
            case.problem("exception", f"rank {rank}: {log.exception.strip().splitlines()[-1]}")
        elif log.dying is None and log.finished is None and not launcher["timed_out"]:
            case.problem("lost_rank", f"rank {rank} ended, and was not to")
        if log.finished is None:
            continue
        if rank in planned:
            case.problem("not_fired", f"rank {rank} was to die, and did not")
        left = log.finished["left"]
        if any(left.values()) and not (0 < left["objects"] <= unnamed and not left["streams"]):
            case.problem("memory", f"rank {rank} has {left} at its end")
        elif left["objects"]:
            unnamed -= left["objects"]
            case.counts["unnamed"] += left["objects"]
        if log.finished["views_wrong"]:
            case.problem("view", f"{log.finished['views_wrong']} of rank {rank} changed")
        case.problems += [f"hang: {one}" for one in log.calls if not one.end]


# ---- one call ------------------------------------------------------------------------------


def _check_puts(case: _Case, key: str) -> None:
    """One version at a time."""
    puts = case.calls[key]["put"]
    accepted = [put for put in puts if put.end == "ok"]
    for put in puts:
        others = [one for one in puts if one is not put and one.begin_s < put.end_s]
        if put.end == "exists" and not any(
            one.end not in _NOT_PUT
            and not case.surely_deleted(key, tuple(one.told["version"]), put.begin_s)
            for one in others
        ):
            case.problem("exists", f"nothing was there; {put}")
        for one in others if put.end == "ok" else []:
            if one not in accepted or one.begin_s > put.begin_s:
                continue
            # Whichever was first was there when the other one was accepted.
            end_s = max(one.end_s, put.end_s)
            alive = all(case.death_s(rank) > end_s for rank in (one.rank, put.rank))
            if alive and not case.may_be_deleted(key, one, end_s):
                case.problem("two_versions", f"{put}; {one}")


def _check_get(case: _Case, call: Call) -> None:
    held = case.surely_held(call) if call.end in ("ok", "lost", "deleted") else None
    if call.end == "ok":
        _check_bytes(case, call, held)
    elif call.end == "lost":
        if held is not None:
            case.problem("not_lost", f"version {held} lives; {call}")
        elif not _may_be_lost(case, call):
            case.problem("not_lost", f"nobody died who had put it; {call}")
    elif call.end == "deleted":
        if held is not None:
            case.problem("not_deleted", f"version {held} lives; {call}")
        elif not any(one.begin_s < call.end_s for one in case.calls[call.key]["delete"]):
            case.problem("not_deleted", f"nobody had deleted it; {call}")
    elif call.end == "timeout":
        waited_s, version = case.held_s(call.key, call.begin_s, call.end_s)
        if waited_s >= case.patience_s:
            case.problem("hang", f"version {version} was there for {waited_s:.1f} s; {call}")
        elif call.told["limit_s"] < case.patience_s:
            case.counts["short"] += 1
        elif call.told["known"]:
            case.problem("hang", f"its ref knows that it existed; {call}")
        else:
            case.counts["for nothing"] += 1


def _check_bytes(case: _Case, call: Call, held: Any) -> None:
    version = call.told["version"]
    put = case.versions(call.key).get(version)
    if not call.told["right"]:
        case.problem("bytes", f"they are not those of version {version}; {call}")
    elif put is None or put.begin_s > call.end_s:
        case.problem("version", f"nobody had put version {version}; {call}")
    elif case.surely_deleted(call.key, version, call.begin_s):
        case.problem("stale", f"version {version} had been deleted; {call}")
    elif held is not None and held != version:
        case.problem("two_versions", f"{version}, but {held} is there; {call}")


def _may_be_lost(case: _Case, call: Call) -> bool:
    """Whether a death may have taken a version; or it was deleted, and who knew that died."""
    if any(
        put.begin_s < call.end_s and case.death_s(put.rank) <= call.end_s
        for put in case.versions(call.key).values()
    ):
        return True
    # A new owner does not know what was deleted: a ref that knows better makes it lost for all.
    before = case.calls[call.key]
    deleted = any(one.begin_s < call.end_s for one in before["delete"])
    known = any(one.told["known"] and one.begin_s < call.end_s for one in before["get"])
    case.counts["deleted"] += deleted and known
    return deleted and known and case.any_death(call.end_s)


def _check_wait(case: _Case, call: Call) -> None:
    if call.end != "ok":
        if call.end:
            case.problem("wait", call)
        return
    ready, pending = call.told["ready"], call.told["pending"]
    if sorted(ready + pending) != sorted(call.told["keys"]):
        case.problem("wait", f"other refs came back; {call}")
    if len(ready) < call.told["count"] and call.end_s - call.begin_s < call.told["limit_s"] - 1e-3:
        case.problem("wait", f"it ended early; {call}")
    for key in ready:
        before = case.calls[key]["put"] + case.calls[key]["delete"]
        if not any(one.begin_s < call.end_s for one in before):
            case.problem("wait", f"{key!r} never was; {call}")
    if len(ready) >= call.told["count"]:
        return
    for key in pending:
        waited_s, version = case.held_s(key, call.begin_s, call.end_s)
        if waited_s >= case.patience_s:
            case.problem("hang", f"{key!r} was there for {waited_s:.1f} s; {call}")


# ---- reductions ----------------------------------------------------------------------------


def _check_result(case: _Case, key: str) -> None:
    """All gets of one result have the same contributors and bytes."""
    (made,) = case.calls[key]["reduce"]
    gets = case.calls[key]["get"]
    right = [call for call in gets if call.end == "ok"]
    if len({(tuple(sorted(c.told["contributors"])), c.told["digest"]) for c in right}) > 1:
        case.problem("two_versions", f"{[str(call) for call in right]}")
    for call in right:
        told = call.told["contributors"]
        if not call.told["right"]:
            case.problem("bytes", f"they are not those of {told}; {call}")
        if len(set(told)) != made.told["count"] or len(told) != len(set(told)):
            case.problem("contributors", f"{told}, but {made.told['count']} were wanted; {call}")
        for name in told:
            puts = case.versions(name).values()
            if name.split()[:2] != ["part", str(made.told["group"])] or not any(
                put.begin_s < call.end_s for put in puts
            ):
                case.problem("contributors", f"{name!r} was never put, or not asked for; {call}")
    for call in gets:
        if call.end == "lost" and not case.any_death(call.end_s):
            case.problem("not_lost", f"nobody had died; {call}")
        elif call.end == "deleted" and not any(
            one.begin_s < call.end_s for one in case.calls[key]["delete"]
        ):
            case.problem("not_deleted", f"nobody had deleted it; {call}")
        elif call.end == "timeout":
            parts = [name for name in case.calls if name.split()[:2] == _parts_of(made)]
            spans = [case.held_s(name, call.begin_s, call.end_s)[0] for name in parts]
            if sum(span >= case.patience_s for span in spans) >= made.told["count"]:
                case.problem("hang", f"its contributors were there; {call}")
            else:
                short = call.told["limit_s"] < case.patience_s
                case.counts["short" if short else "for nothing"] += 1


def _parts_of(made: Call) -> list[str]:
    return ["part", str(made.told["group"])]
