"""Replays what real ranks wrote down (``HOPCOLL_TRACE=FOLDER``) through the pure protocol.

Of each rank an engine without MPI is told the same in the same order, and has to do the same. Then
the ranks are compared with each other: who went on has the same outcomes, and what came from a rank
is what that rank sent. So a trace proves that a job behaved as the simulated one would, and shows
where it did not.
"""

from __future__ import annotations

import json
import mmap
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from hopcoll import simulate
from hopcoll._retrace import TraceReader

__all__ = ["Replayed", "command", "replay"]

_NAME = re.compile(r"rank-(\d+)(?:\.(\d+))?\.trace")
_COMPARED = ("what", "status", "epoch", "contributors", "failed")


@dataclass
class Replayed:
    """What became of the traces of one communicator.

    Parameters
    ----------
    name : str
        Which one: the folder, with its number where a process made several.
    size : int
        Ranks of the communicator.
    ranks : dict of int to dict
        By rank of which there is a trace: ``records``, ``operations``, ``complete`` (operations),
        ``epoch``, ``dead`` (whom MPI reported to it), ``full`` (the trace ends before the rank
        did) and ``counters``.
    wrong : list of str
        What is not as it has to be; empty if all is well.
    """

    name: str
    size: int
    ranks: dict[int, dict[str, Any]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def replay(folder: str | Path, sabotage: Iterable[str] = ()) -> list[Replayed]:
    """Replay all traces of a folder. Local.

    Parameters
    ----------
    folder : path
        Where ``rank-N.trace`` are.
    sabotage : iterable of str
        Rules of the protocol to switch off in the replay: it must be noticed.

    Returns
    -------
    list of Replayed
        One for each communicator of which there are traces, in the order of their making.

    Raises
    ------
    FileNotFoundError
        There is no trace.
    ValueError
        A file is no trace, is damaged, or was written by another build.
    """
    folder = Path(folder)
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("*.trace")):
        name = _NAME.fullmatch(path.name)
        if name is not None:
            found.setdefault(int(name[2] or 1), []).append(path)
    if not found:
        raise FileNotFoundError(f"{folder}: no traces (rank-0.trace, ...) in this folder")
    mask = simulate.sabotage_mask(sabotage)
    return [
        _replay_one(folder.name if number == 1 else f"{folder.name} ({number})", paths, mask)
        for number, paths in sorted(found.items())
    ]


def _replay_one(name: str, paths: list[Path], mask: int) -> Replayed:
    readers = [_reader_of(path) for path in paths]
    sizes = {reader.size for reader in readers}
    if len(sizes) > 1:
        raise ValueError(f"{paths[0].parent}: traces of jobs of {sorted(sizes)} ranks")
    out = Replayed(name, sizes.pop())
    for reader in readers:
        wrong = reader.replay(mask)
        if wrong is not None:
            out.wrong.append(wrong)
        outcomes = reader.outcomes
        out.ranks[reader.rank] = {
            "records": reader.records,
            "operations": len(outcomes),
            "complete": sum(one["complete"] for one in outcomes),
            "epoch": reader.counts["epoch"],
            "dead": reader.dead,
            "full": reader.full,
            "counters": reader.counts,
        }
    if not out.wrong:
        out.wrong += _compare(readers)
    return out


def _reader_of(path: Path) -> TraceReader:
    if path.stat().st_size == 0:  # there is nothing to map
        raise ValueError(f"{path}: this is no trace of a rank")
    # The trace of a rank that was killed has all its room, of which most was never written.
    with open(path, "rb") as file:
        return TraceReader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))


def _compare(readers: list[TraceReader]) -> list[str]:
    """What the ranks have to have in common."""
    wrong = []
    for reader in readers:
        for other in readers:
            if other is not reader:
                found = reader.compare_messages(other)
                if found is not None:
                    wrong.append(found)
    # A rank that is no member any more may have had another outcome, before that was stable.
    judges = [reader for reader in readers if reader.in_force]
    judges = [
        reader for reader in judges if not any(reader.rank in other.dead for other in readers)
    ]
    outcomes = {reader.rank: reader.outcomes for reader in readers}
    for reader in readers:
        for seq, one in enumerate(outcomes[reader.rank]):
            settled = reader in judges or seq < reader.stable
            for judge in judges if settled and one["complete"] else ():
                if judge is reader or seq >= len(outcomes[judge.rank]):
                    continue
                other = outcomes[judge.rank][seq]
                if other["complete"] and _differ(one, other):
                    wrong.append(
                        f"{one['what']}: rank {reader.rank} has {_words(one)}, "
                        f"rank {judge.rank} has {_words(other)}"
                    )
    return wrong


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one["own"] or other["own"]:
        return False
    return any(one[key] != other[key] for key in _COMPARED)


def _words(outcome: dict[str, Any]) -> str:
    return ", ".join(f"{key} {outcome[key]}" for key in _COMPARED[1:])


def report(one: Replayed) -> str:
    """Words for people."""
    lines = [f"{one.name}: {len(one.ranks)} of {one.size} ranks"]
    for rank, found in sorted(one.ranks.items()):
        dead = f", saw die {', '.join(map(str, found['dead']))}" if found["dead"] else ""
        full = ", then the file was full" if found["full"] else ""
        lines.append(
            f"  rank {rank}: {found['records']} records, {found['complete']} of "
            f"{found['operations']} operations complete, epoch {found['epoch']}{dead}{full}"
        )
    lines += [f"  WRONG: {text}" for text in one.wrong]
    if not one.wrong:
        lines.append("  all did what the protocol does, and agree")
    return "\n".join(lines)


@click.command(
    short_help="Tell the protocol again what real ranks were told.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--sabotage",
    type=click.Choice(sorted(simulate.sabotages())),
    multiple=True,
    help="Switch a rule off in the replay: it must be noticed.",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write it here."
)
def command(folder: Path, sabotage: tuple[str, ...], json_path: Path | None) -> None:
    """Tell the protocol again what the ranks of a real job were told, and compare.

    FOLDER has the traces that a job wrote with HOPCOLL_TRACE=FOLDER. Exit code: 0 if every rank
    did what the protocol does and all agree, 1 if not, 2 if there is nothing to replay.
    """
    try:
        found = replay(folder, sabotage)
    except (FileNotFoundError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    for one in found:
        click.echo(report(one))
    if json_path is not None:
        json_path.write_text(json.dumps([vars(one) for one in found], indent=1) + "\n")
    sys.exit(1 if any(one.wrong for one in found) else 0)
