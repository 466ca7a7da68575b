"""`hopcoll ckpt`: look into a checkpoint store, check it, compare, tidy up, repair.

Only prune and repair change it.

Exit codes: 0 if all is well; 1 if something is wrong or differs; 2 for a wrong call, and where
there is no store.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from hopcoll.errors import CheckpointError, CheckpointNotFoundError
from recovery import repairs, shards
from recovery.disk import Disk
from recovery.level import Level, retention
from recovery.log import Record
from recovery.state import dtype_from_json

__all__ = ["ckpt"]

_STORE = click.Path(path_type=Path)


class _Failed(click.ClickException):
    """There is a store, and something is wrong with it."""

    exit_code = 1


class _NoStore(click.ClickException):
    exit_code = 2


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except CheckpointNotFoundError as error:
        raise _NoStore(str(error)) from error
    except (CheckpointError, OSError) as error:
        raise _Failed(str(error)) from error


@dataclass(frozen=True)
class _Store:
    """A directory, and what its log said when it was opened."""

    path: Path
    level: Level
    head: Record
    commits: dict[int, Record]  # those whose slots are there, dead ones too; by slot
    broken: dict[int, str]  # slots that cannot be read, and why

    @classmethod
    def open(cls, path: Path) -> _Store:
        level = Level(path, Disk())
        with _explained():
            if not path.exists():
                raise CheckpointNotFoundError(f"{path} does not exist", path)
            head = level.look()
            if head is None:
                raise CheckpointNotFoundError(f"{path} holds no checkpoint yet", path)
            commits, broken = {}, {}
            for number in level.log.numbers():
                try:
                    record = level.log.read(number)
                except FileNotFoundError:
                    continue  # pruned meanwhile
                except CheckpointError as error:
                    if head.counts(number):
                        broken[number] = str(error)
                    continue
                if record.kind == "commit":
                    commits[number] = record
            return cls(path, level, head, commits, broken)

    @property
    def alive(self) -> list[int]:
        return [commit.slot for commit in self.head.alive]

    def fate(self, slot: int) -> str:
        """Tell what a commit is: newest, alive, pruned, or on a branch that was given up."""
        if slot in self.alive:
            return "newest" if slot == self.alive[-1] else "alive"
        ancestor = self.alive[-1] if self.alive else None
        while ancestor is not None and ancestor in self.commits:
            ancestor = self.commits[ancestor].body["parent"]
            if ancestor == slot:
                return "pruned"
        return "dead branch"

    def chain(self, record: Record) -> list[Record]:
        """Return a commit and its parents, as far as their slots are still there."""
        found = [record]
        while (parent := found[-1].body["parent"]) in self.commits:
            found.append(self.commits[parent])
        return found

    def commit(self, step: int | None) -> Record:
        """Return the living commit of a step, the newest if None."""
        alive = {commit.step: commit.slot for commit in self.head.alive}
        if not alive:
            raise _NoStore(f"{self.path} holds no checkpoint")
        if step is None:
            step = self.head.alive[-1].step
        if step not in alive:
            raise _NoStore(f"{self.path} holds no step {step}; there are {_listed(alive)}")
        if alive[step] not in self.commits:
            slot = self.level.log.path(alive[step])
            raise _Failed(self.broken.get(alive[step], f"{slot} is missing"))
        return self.commits[alive[step]]


def _listed(numbers: Any) -> str:
    return ", ".join(map(str, numbers))


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def _table(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _bar(total: int, what: str) -> tqdm[Any]:
    """A progress bar in bytes, which a pipe does not see."""
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
        delay=0.5,
        disable=None,
        file=sys.stderr,
    )


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=1))


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")


@click.group(short_help="Look into a checkpoint store, check it, compare, tidy up, repair.")
def ckpt() -> None:
    """Look into a checkpoint store, check it, compare, tidy up, repair.

    PATH is the directory of a store, or of one of its levels. Nothing is changed but by prune and
    repair, and all but repair may be done beside a job that goes on saving.
    """


# Sizes and owners


def _entry_bytes(entry: dict[str, Any], path: Path) -> int:
    return math.prod(entry["shape"]) * dtype_from_json(entry["dtype"], path).itemsize


def _summary(store: _Store, record: Record) -> dict[str, Any]:
    body = record.body
    own = {n: s for n, s in body["shards"].items() if _is_own(n, record)}
    return {
        "step": body["step"],
        "slot": record.number,
        "fate": store.fate(record.number),
        "parent": body["parent"],
        "time": body["time"],
        "by": body["by"],
        "incarnation": record.owner,
        "arrays": len(body["arrays"]),
        "bytes": sum(_entry_bytes(entry, store.path) for entry in body["arrays"]),
        "written_bytes": sum(shard["nbytes"] for shard in own.values()),
        "shards": len(body["shards"]),
        "own_shards": len(own),
    }


def _is_own(shard: str, record: Record) -> bool:
    """Whether a shard was written for this commit, and not referred to."""
    return shard.startswith(f"{record.owner}-{record.save}-")


@ckpt.command("ls", short_help="The commits: steps, sizes, who wrote them.")
@click.argument("path", type=_STORE)
@_as_json
def ls(path: Path, as_json: bool) -> None:
    """List the commits of a store, newest first, with dead ones whose slots are still there.

    "dead branch": the job went back to an older commit, and went on from there. "pruned": it was
    let go, and its shards with it, unless newer commits refer to them.
    """
    store = _Store.open(path)
    with _explained():
        rows = [_summary(store, record) for _, record in sorted(store.commits.items())][::-1]
        files = [file for file in path.rglob("*") if file.is_file()]
        disk_bytes = sum(file.stat().st_size for file in files)
    if as_json:
        _print_json(
            {
                "path": str(path),
                "owner": store.head.owner,
                "newest": store.head.newest and store.head.newest.step,
                "steps": [commit.step for commit in store.head.alive],
                "disk_bytes": disk_bytes,
                "commits": rows,
                "unreadable": store.broken,
            }
        )
    else:
        header = ["step", "slot", "parent", "arrays", "size", "written", "time", "by", ""]
        _table(
            [header]
            + [
                [
                    str(row["step"]),
                    str(row["slot"]),
                    "-" if row["parent"] is None else str(row["parent"]),
                    str(row["arrays"]),
                    _size(row["bytes"]),
                    _size(row["written_bytes"]),
                    row["time"],
                    f"{row['by']['host']}:{row['by']['pid']}",
                    row["fate"],
                ]
                for row in rows
            ]
        )
        click.echo(f"{len(files)} files, {_size(disk_bytes)}, owner {store.head.owner}")
        for text in store.broken.values():
            click.echo(text, err=True)
    if store.broken:
        sys.exit(1)


@ckpt.command("show", short_help="One commit: its arrays, shards, checksums and parents.")
@click.argument("path", type=_STORE)
@click.option("--step", type=int, help="Which; the newest where it is left out.")
@_as_json
def show(path: Path, step: int | None, as_json: bool) -> None:
    """Show a commit: what is in it, in which files, with their checksums, and its parents."""
    store = _Store.open(path)
    record = store.commit(step)
    body = record.body
    with _explained():
        arrays = [
            {
                "name": entry["name"],
                "dtype": dtype_from_json(entry["dtype"], path).name,
                "shape": entry["shape"],
                "bytes": _entry_bytes(entry, path),
                "cut": entry.get("cut"),
                "pieces": [
                    {"shard": name, "xxh3_128": _hashes(body["shards"][name]["ranges"][index])}
                    for _, _, name, index in _pieces(entry)
                ],
            }
            for entry in body["arrays"]
        ]
        files = [
            {
                "shard": name,
                "bytes": shard["nbytes"],
                "own": _is_own(name, record),
                "rest_xxh3_128": shard["rest"],
            }
            for name, shard in body["shards"].items()
        ]
        values = _values(body)
        chain = [
            {"step": one.body["step"], "slot": one.number, "fate": store.fate(one.number)}
            for one in store.chain(record)
        ]
        summary = _summary(store, record)
    if as_json:
        _print_json(
            {
                **summary,
                "arrays": arrays,
                "shards": files,
                "values": {name: json.loads(text) for name, text in values.items()},
                "chain": chain,
            }
        )
        return
    click.echo(
        f"step {summary['step']}, slot {record.number} ({summary['fate']}), by "
        f"{body['by']['host']}:{body['by']['pid']} (incarnation {record.owner}) at {body['time']}"
    )
    click.echo(
        f"{_size(summary['bytes'])} in {len(arrays)} arrays, {_size(summary['written_bytes'])} "
        "of it written for this commit"
    )
    click.echo("parents: " + (" <- ".join(f"{c['step']} ({c['fate']})" for c in chain[1:]) or "-"))
    if arrays:
        click.echo()
        rows = [["array", "dtype", "shape", "size", "pieces", "XXH3-128", "shard"]]
        for array in arrays:
            hashes = [hash for piece in array["pieces"] for hash in piece["xxh3_128"]]
            count = len(array["pieces"])
            rows.append(
                [
                    array["name"],
                    array["dtype"],
                    "x".join(map(str, array["shape"])) or "scalar",
                    _size(array["bytes"]),
                    f"{count}" if array["cut"] is None else f"{count}, axis {array['cut']}",
                    (hashes[0] + (" ..." if len(hashes) > 1 else "")) if hashes else "-",
                    (array["pieces"][0]["shard"] + (" ..." if count > 1 else ""))
                    if array["pieces"]
                    else "-",
                ]
            )
        _table(rows)
    if files:
        click.echo()
        rows = [["shard", "size", "XXH3-128 of what is no array", ""]]
        for file in files:
            note = "" if file["own"] else "of an older commit"
            rows.append([file["shard"], _size(file["bytes"]), file["rest_xxh3_128"], note])
        _table(rows)
    if values:
        click.echo()
        for name, text in values.items():
            click.echo(f"{name} = {_short(text, 100)}")


def _hashes(entry: dict[str, Any]) -> list[str]:
    return shards.content_of(entry)


def _pieces(entry: dict[str, Any]) -> list[tuple[int, int, str, int]]:
    """Return the pieces of an array: where each begins and ends along the cut, shard and range."""
    if "cut" in entry:
        return [tuple(piece) for piece in entry["pieces"] if len(piece) == 4]
    if not entry["piece"]:
        return []
    return [(0, entry["shape"][0] if entry["shape"] else 1, *entry["piece"])]


def _values(body: dict[str, Any]) -> dict[str, str]:
    """Return what the state has besides arrays, as JSON, by where it is."""
    found: dict[str, str] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict) and "dict" in node:
            for key, value in node["dict"].items():
                walk(value, f"{path}/{key}" if path else key)
        elif isinstance(node, list):
            for i, value in enumerate(node):
                walk(value, f"{path}/{i}" if path else str(i))
        elif '"array":' not in (text := json.dumps(node)):
            found[path] = text

    walk(body["tree"], "")
    return found


# Checking


@ckpt.command("verify", short_help="Read every byte that counts, and check it.")
@click.argument("path", type=_STORE)
@click.option("--partial", is_flag=True, help="Shards may be missing: other hosts have them.")
@_as_json
def verify(path: Path, partial: bool, as_json: bool) -> None:
    """Read every byte that counts, and check it; exit code 1 if something is wrong.

    Each problem is named by its file, and by the dataset where the byte belongs to one. Of a level
    that each host has a part of, use --partial.
    """
    level = Level(path, Disk())
    if not path.is_dir() or not (path / "slots").is_dir():
        raise _NoStore(f"{path} holds no checkpoint store")
    problems = []
    with _explained(), _bar(sum(p.stat().st_size for p in path.glob("shards/*")), "verify") as bar:
        for problem in level.verify(partial=partial, progress=bar.update):
            problems.append(problem)
            if not as_json:
                tqdm.write(str(problem))
    if as_json:
        _print_json(
            {
                "path": str(path),
                "problems": [
                    {"file": str(one.path), "dataset": one.dataset, "text": one.text}
                    for one in problems
                ],
            }
        )
    elif not problems:
        click.echo("all is well")
    if problems:
        sys.exit(1)


# Comparing


@ckpt.command("diff", short_help="What differs between two steps, or two stores.")
@click.argument("path", type=_STORE)
@click.argument("other", type=_STORE, required=False)
@click.option(
    "--steps",
    type=int,
    nargs=2,
    metavar="A B",
    help="Which. Without it: the newest of each store, or the newest two of one.",
)
@_as_json
def diff(path: Path, other: Path | None, steps: tuple[int, int] | None, as_json: bool) -> None:
    """Compare two commits of a store, or those of two stores; exit code 1 if they differ.

    Says for each array how many elements differ, and by how much at the most. What has the same
    checksums is not read.
    """
    left = _Store.open(path)
    right = left if other is None else _Store.open(other)
    if steps is None and other is None:
        alive = left.head.alive
        if len(alive) < 2:
            raise click.UsageError(f"{path} holds one step; name another store to compare with")
        steps = alive[-2].step, alive[-1].step
    a, b = left.commit(steps and steps[0]), right.commit(steps and steps[1])
    with _explained():
        found = list(_differences(left, a, right, b))
    if as_json:
        _print_json(
            {
                "a": {"path": str(left.path), "step": a.body["step"]},
                "b": {"path": str(right.path), "step": b.body["step"]},
                "differences": found,
            }
        )
    else:
        for one in found:
            click.echo(f"{one['name']}: {one['text']}")
        if not found:
            count = len(a.body["arrays"])
            click.echo(f"no difference in {count} array{'' if count == 1 else 's'}")
    if found:
        sys.exit(1)


def _differences(
    left: _Store, a: Record, right: _Store, b: Record
) -> Iterator[dict[str, Any]]:
    ours = {entry["name"]: entry for entry in a.body["arrays"]}
    theirs = {entry["name"]: entry for entry in b.body["arrays"]}
    read = [
        name
        for name in ours
        if name in theirs and _identity(a, ours[name]) != _identity(b, theirs[name])
    ]
    total = sum(_entry_bytes(ours[name], left.path) for name in read)
    with _bar(total, "diff") as bar:
        for name in {**ours, **theirs}:
            if name not in theirs:
                yield {"name": name, "text": "only in the first"}
            elif name not in ours:
                yield {"name": name, "text": "only in the second"}
            elif name in read:
                yield from _array_difference(
                    name, _read(left, a, ours[name]), _read(right, b, theirs[name])
                )
                bar.update(_entry_bytes(ours[name], left.path))
    one, two = _values(a.body), _values(b.body)
    for name in {**one, **two}:
        if name not in two:
            yield {"name": name, "text": "only in the first"}
        elif name not in one:
            yield {"name": name, "text": "only in the second"}
        elif one[name] != two[name]:
            yield {"name": name, "text": f"{_short(one[name])} and {_short(two[name])}"}


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _identity(record: Record, entry: dict[str, Any]) -> Any:
    """Return what is equal only where the arrays are."""
    return entry["dtype"], entry["shape"], entry.get("cut"), [
        (start, stop, shards.content_of(record.body["shards"][name]["ranges"][index]))
        for start, stop, name, index in _pieces(entry)
    ]


def _read(store: _Store, record: Record, entry: dict[str, Any]) -> np.ndarray:
    """Read an array as a whole, and check it."""
    array = np.empty(tuple(entry["shape"]), dtype_from_json(entry["dtype"], store.path))
    for start, stop, name, index in _pieces(entry):
        range_ = record.body["shards"][name]["ranges"][index]
        path = store.path / "shards" / name
        if "cut" not in entry:
            shards.read_range(path, range_, array)
        else:
            place = (slice(None),) * entry["cut"] + (slice(start, stop),)
            piece = np.empty(array[place].shape, array.dtype)
            shards.read_range(path, range_, piece)
            array[place] = piece
    return array


def _array_difference(name: str, a: np.ndarray, b: np.ndarray) -> Iterator[dict[str, Any]]:
    if a.shape != b.shape or a.dtype != b.dtype:
        text = f"{a.dtype.name} {a.shape} and {b.dtype.name} {b.shape}"
        yield {"name": name, "text": text}
        return
    # By their bytes: two NaNs of the same bits are the same, and 0.0 is not -0.0.
    bits = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    each = (next(bits) != next(bits)).reshape(a.size, a.dtype.itemsize).any(axis=1)
    count = int(each.sum())
    if not count:
        return
    found: dict[str, Any] = {"name": name, "count": count, "size": a.size}
    text = f"{count} of {a.size} elements differ"
    if a.dtype.kind in "biufcV" and a.dtype.names is None:
        try:
            kind = np.complex128 if a.dtype.kind == "c" else np.float64
            with np.errstate(all="ignore"):
                gap = np.abs(a.reshape(-1)[each].astype(kind) - b.reshape(-1)[each].astype(kind))
        except TypeError:  # raw bytes
            pass
        else:
            found["largest"] = float(np.nanmax(gap)) if not np.isnan(gap).all() else math.nan
            text += f", by {found['largest']:.6g} at the most"
            if (count_nan := int(np.isnan(gap).sum())) > 0:
                text += f" ({count_nan} of them with a NaN)"
    yield {**found, "text": text}


# Tidying up


@ckpt.command("prune", short_help="Remove all but some commits, and what nobody needs.")
@click.argument("path", type=_STORE)
@click.option("--keep-last", type=click.IntRange(min=1), required=True, metavar="N",
              help="How many of the newest stay.")  # fmt: skip
@click.option("--keep-every", type=click.IntRange(min=1), metavar="N",
              help="Steps that are multiples of it stay too.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_as_json
def prune(
    path: Path, keep_last: int, keep_every: int | None, dry_run: bool, as_json: bool
) -> None:
    """Remove all but some commits, and all files that nobody needs.

    May be done beside a job that goes on saving: it is a slot of the log as any other, and a commit
    never refers to what was removed.
    """
    store = _Store.open(path)
    retain = retention(keep_last, keep_every)
    alive = [commit.step for commit in store.head.alive]
    if dry_run:
        kept = [commit.step for commit in retain(list(store.head.alive))]
    else:
        with _explained():
            record = store.level.prune(retain)
        kept = [commit.step for commit in record.alive] if record is not None else []
    gone = [step for step in alive if step not in kept]
    if as_json:
        _print_json({"path": str(path), "removed": gone, "kept": kept, "dry_run": dry_run})
        return
    verb = "would go" if dry_run else "removed"
    click.echo(f"{verb}: {_listed(gone) or 'none'}; kept: {_listed(kept) or 'none'}")


@ckpt.command("repair", short_help="Go on from the slot before one that is corrupt.")
@click.argument("path", type=_STORE)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@_as_json
def repair(path: Path, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Let a store whose newest slot is corrupt go on from the newest one that can be read.

    What the corrupt slot said is given up: mostly the newest checkpoint, whose arrays stay in
    PATH/shards, as plain HDF5, until a job opens the store. Before that, try to get the file back
    from where it came from. A job that has the store open can commit nothing more.
    """
    if as_json and not (yes or dry_run):
        raise click.UsageError("--json asks nothing: add --yes or --dry-run")
    if not (path / "slots").is_dir():
        raise _NoStore(f"{path} holds no checkpoint store")
    with _explained():
        finding = repairs.examine(path)
    kept = [commit.step for commit in finding.kept]
    if not as_json:
        for slot in finding.corrupt:
            click.echo(f"{slot} is corrupt")
        for commit in finding.gone if finding.corrupt else ():
            click.echo(f"step {commit.step} is not whole any more")
    if finding.corrupt and not dry_run:
        if not yes:
            where = f"step {kept[-1]}" if kept else "no checkpoint at all"
            click.confirm(f"Go on from {where}?", abort=True)
        with _explained():
            repairs.repair(path, finding)
    if as_json:
        _print_json(
            {
                "path": str(path),
                "corrupt": [str(slot) for slot in finding.corrupt],
                "kept": kept,
                "gone": [commit.step for commit in finding.gone] if finding.corrupt else [],
                "dry_run": dry_run,
            }
        )
    elif not finding.corrupt:
        click.echo("nothing to repair: the newest slot can be read")
    else:
        verb = "would go on from" if dry_run else "goes on from"
        click.echo(f"{verb} slot {finding.base.number}; steps: {_listed(kept) or 'none'}")
