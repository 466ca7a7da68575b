"""How long collectives take on a network of given latency and bandwidth: the real engines of all
ranks, over a network with a clock (see `hopcoll._forecast` for its model).

Nothing of this machine goes into the figures: the same arguments give the same answer anywhere, to
the nanosecond. So schedules can be compared that differ by less than a noisy machine shows.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from hopcoll import _forecast

__all__ = ["Forecast", "command", "forecast", "size_of"]

#: The kinds of operations that can be timed.
KINDS = tuple(_forecast.KIND_NUMBERS)
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_RATES = {"bit": 1 / 8, "kbit": 125.0, "mbit": 125e3, "gbit": 125e6}
_TURNS_MAX = 2_000_000_000
_SIZE_MAX = _forecast.ranks_max()


@dataclass(frozen=True)
class Forecast:
    """What an operation costs on a network.

    Parameters
    ----------
    kind : str
    nbytes : int
        Bytes of one rank's contribution (of its block, where each rank has one).
    size : int
        Ranks.
    seconds : tuple of float
        Of each of the operations, one after the other: from the first call to the last return at
        the ranks that live.
    bound_seconds : float
        What the bandwidth alone costs, where that is known; else NaN. The ranks of one host count
        as one.
    latency_bound_seconds : float
        What the latency alone costs: the depth of a binary tree.
    ended_seconds : tuple of float
        When the last operation ended at each rank, from the first call; NaN at the dead.
    through : bool
        Whether all living ranks had all results.
    controls_most, messages_most : int
        Control messages that the busiest rank was sent, and messages that it sent, an operation.
    data_bytes : int
        Of all ranks together, an operation.
    resent_bytes : int
        Beyond what the operation needs without a death: what was sent twice.
    inbox_most, posted_most : int
        The longest queue of a rank: of events that it had not looked at, and of posted receives.
    events : int
        Steps of the simulation.
    """

    kind: str
    nbytes: int
    size: int
    seconds: tuple[float, ...]
    bound_seconds: float
    latency_bound_seconds: float
    ended_seconds: tuple[float, ...]
    through: bool
    controls_most: int
    handled_most: int
    rows_most: int
    messages_most: int
    data_bytes: int
    resent_bytes: int
    inbox_most: int
    posted_most: int
    events: int

    @property
    def multiple(self) -> float:
        """The last operation's time over the bandwidth bound."""
        return self.seconds[-1] / self.bound_seconds


def size_of(text: str) -> int:
    """Read a number of bytes with a unit: ``8``, ``64KiB``, ``32MiB``, ``1GiB``.

    Raises
    ------
    ValueError
        It is none.
    """
    found = re.fullmatch(r"(\d+)\s*([kmg]i)?b?", text.strip().lower())
    if found is None:
        raise ValueError(f"a size is a number of bytes, or 64KiB, 32MiB, 1GiB; not {text!r}")
    return int(found[1]) * _UNITS[(found[2] or "") + "b" if found[2] else ""]


def _rate_of(text: str) -> float:
    """Bytes a second of ``1gbit``, ``400mbit`` or a plain number of bytes a second."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[kmg]?bit)", text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"a rate is like 1gbit or 400mbit, or bytes a second; not {text!r}")
    return float(found[1]) * (_RATES[found[2]] if found[2] else 1.0)


def _needed_bytes(kind: str, nbytes: int, size: int) -> int | None:
    """Data that has to be moved in an operation that goes in chunks; None: not fixed."""
    others = size - 1
    return {
        "bcast": others * nbytes,
        "reduce": others * nbytes,
        "allreduce": 2 * others * nbytes,
        "gather": others * nbytes,
        "scatter": others * nbytes,
        "allgather": others * size * nbytes,
        "alltoall": others * size * nbytes,
        "reduce_scatter": others * size * nbytes,
    }.get(kind)


def _bound_bytes(kind: str, nbytes: int, hosts: int, per_host: int) -> float:
    """Bytes that have to cross the busiest link."""
    if hosts == 1:
        return float("nan")
    share = (hosts - 1) / hosts
    ranks = hosts * per_host
    return {
        "bcast": nbytes,
        "reduce": nbytes,
        "allreduce": 2 * share * nbytes,
        "gather": (ranks - per_host) * nbytes,
        "scatter": (ranks - per_host) * nbytes,
        "allgather": (ranks - per_host) * nbytes,
        "alltoall": per_host * (ranks - per_host) * nbytes,
        "reduce_scatter": (ranks - per_host) * nbytes,
    }.get(kind, float("nan"))


def forecast(
    kind: str,
    nbytes: int,
    size: int,
    *,
    per_host: int = 1,
    rate: float | Sequence[float] = 125e6,
    latency_us: float | Sequence[Sequence[float]] = 50.0,
    near_rate: float = 8e9,
    near_latency_us: float = 1.0,
    send_us: float | Sequence[float] = 0.0,
    event_us: float | Sequence[float] = 0.0,
    delays_s: Sequence[float] = (),
    kills: Iterable[tuple[int, float]] = (),
    detect_ms: float | Sequence[float] = 1.0,
    operations: int = 1,
    gap_us: float = 0.0,
    chunk_bytes: int = 65536,
    window_chunks: int = 16,
    eager_bytes: int = 4096,
    degree: int = 16,
    root: int = 0,
    order: str = "rank",
    events_max: int = _TURNS_MAX,
) -> Forecast:
    """Time operations on a network that has only a latency and a bandwidth. Local, no MPI.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    nbytes : int
        Bytes of one rank's contribution (of its block, where each rank has one).
    size : int
        Ranks, 1 to 256.
    per_host : int
        Ranks of one host; they share its two links (in and out).
    rate : float or sequence of float
        Bytes a second of each direction of a link; of each host's, where there are several.
    latency_us : float or sequence of sequences
        Microseconds between two hosts; of row a and column b from host a to host b.
    near_rate, near_latency_us : float
        The same between two ranks of one host.
    send_us, event_us : float or sequence of float
        Microseconds of a rank's processor for each message that it sends, and for each event (a
        message, or the end of a request) that it looks at; of each rank's, where some are slower.
    delays_s : sequence of float
        How late each rank makes its first call; ranks beyond its end come at once.
    kills : iterable of (int, float)
        Ranks that die, and when, in seconds.
    detect_ms : float or sequence of float
        Milliseconds until the others know of a death; of each rank's.
    operations : int
        How many, one after the other.
    gap_us : float
        Microseconds of the program between two of them.
    chunk_bytes, window_chunks, eager_bytes : int
        As for the communicator.
    degree : int
        Of the tree along which agreement goes, from 2 to 16; with no more than degree + 1 ranks all
        are children of one.
    root : int
        Of the operation, where it has one.
    order : {"rank", "arrival"}
        Of a reduction.
    events_max : int
        So many steps of the simulation at most; `Forecast.through` says whether they were enough.

    Returns
    -------
    Forecast

    Raises
    ------
    ValueError
        An argument is out of its range.
    """
    hosts = -(-size // max(per_host, 1))
    rates = _each("rate", rate, hosts, "hosts")
    if not isinstance(latency_us, Sequence):
        latencies_ns = [int(latency_us * 1e3)]
    elif [len(row) for row in latency_us] != [hosts] * hosts:
        raise ValueError(f"latency_us must have a row and a column for each of {hosts} hosts")
    else:
        latencies_ns = [int(one * 1e3) for row in latency_us for one in row]
    _check(kind, nbytes, size, per_host, rates, order, root, operations)
    moved = -(-nbytes // 8) * 8 if kind != "barrier" else 0
    late = [int(delay * 1e9) for delay in delays_s][:size]
    killed = [(int(rank), int(when * 1e9)) for rank, when in kills]
    for rank, _ in killed:
        if not 0 <= rank < size:
            raise ValueError(f"kills: there is no rank {rank} among {size}")
    found = _forecast.forecast(
        size,
        kind,
        moved,
        hosts=[rank // per_host for rank in range(size)],
        rates=[(1e9 / one, 1e9 / one) for one in rates],
        delays_ns=late + [0] * (size - len(late)),
        kills=killed,
        steps=operations,
        latency_ns=latencies_ns,
        near_latency_ns=int(near_latency_us * 1e3),
        near_ns=1e9 / near_rate,
        send_ns=[int(one * 1e3) for one in _each("send_us", send_us, size, "ranks")],
        event_ns=[int(one * 1e3) for one in _each("event_us", event_us, size, "ranks")],
        detect_ns=[int(one * 1e6) for one in _each("detect_ms", detect_ms, size, "ranks")],
        gap_ns=int(gap_us * 1e3),
        chunk_bytes=chunk_bytes,
        window=window_chunks,
        eager_bytes=eager_bytes,
        root=root,
        flags=64 if order == "arrival" else 0,
        degree=degree,
        turns_max=events_max,
    )
    nodes = found["nodes"]
    living = [node for node in nodes if not node["dead"]]
    seconds = [
        (
            max(node["ended_ns"][k] for node in living)
            - min(node["begun_ns"][k] for node in nodes if node["begun_ns"][k] >= 0)
        )
        / 1e9
        for k in range(operations)
        if all(node["ended_ns"][k] >= 0 for node in living)
    ]
    first_ns = min(node["begun_ns"][0] for node in nodes if node["begun_ns"][0] >= 0)
    data_bytes = sum(node["data_bytes"] for node in nodes) // operations
    small = kind == "barrier" or moved <= eager_bytes
    needed = None if small else _needed_bytes(kind, moved, size)
    depth = max(1, (size - 1).bit_length())
    return Forecast(
        kind=kind,
        nbytes=nbytes,
        size=size,
        seconds=tuple(seconds),
        bound_seconds=_bound_bytes(kind, moved, len(rates), per_host) / min(rates),
        latency_bound_seconds=depth * min(latencies_ns) * 1e-9 * (2 if kind == "allreduce" else 1),
        ended_seconds=tuple(
            float("nan") if node["dead"] else (node["ended_ns"][-1] - first_ns) / 1e9
            for node in nodes
        ),
        through=found["through"],
        controls_most=-(-max(node["controls"] for node in nodes) // operations),
        handled_most=-(
            -max(node["controls"] + node["controls_sent"] for node in nodes) // operations
        ),
        rows_most=max(node["rows"] for node in nodes),
        messages_most=-(-max(node["messages"] for node in nodes) // operations),
        data_bytes=data_bytes,
        resent_bytes=0 if needed is None else data_bytes - needed,
        inbox_most=max(node["inbox_most"] for node in nodes),
        posted_most=max(node["posted_most"] for node in nodes),
        events=found["events"],
    )


def _each(name: str, value: float | Sequence[float], count: int, what: str) -> list[float]:
    """One number for each of so many."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} numbers for {count} {what}")
    return list(value)


def _check(
    kind: str, nbytes: int, size: int, per_host: int, rates: list[float], order: str, root: int,
    operations: int,
) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if not 1 <= size <= _SIZE_MAX:
        raise ValueError(f"size must be from 1 to {_SIZE_MAX} ranks, not {size}")
    if nbytes < 0:
        raise ValueError(f"nbytes must be 0 or more, not {nbytes}")
    if per_host < 1:
        raise ValueError(f"per_host must be at least 1, not {per_host}")
    if min(rates) <= 0:
        raise ValueError("rate must be above 0 bytes a second")
    if order not in ("rank", "arrival"):
        raise ValueError(f"order must be 'rank' or 'arrival', not {order!r}")
    if order == "arrival" and kind not in ("reduce", "allreduce"):
        raise ValueError(f"order: only a reduce or an allreduce has one, not a {kind}")
    if not 0 <= root < size:
        raise ValueError(f"root must be from 0 to {size - 1}, not {root}")
    if operations < 1:
        raise ValueError(f"operations must be at least 1, not {operations}")


def report(one: Forecast) -> str:
    """Words for people."""
    if not one.through:
        return f"{one.kind}: not through after {one.events} steps"
    times = ", ".join(f"{seconds * 1e3:.4g}" for seconds in one.seconds)
    lines = [f"{one.kind} of {one.nbytes} bytes on {one.size} ranks: {times} ms"]
    if one.bound_seconds > 0:
        lines.append(
            f"  the bandwidth alone: {one.bound_seconds * 1e3:.4g} ms ({one.multiple:.3f} times "
            f"that); the latency alone: {one.latency_bound_seconds * 1e3:.4g} ms"
        )
    lines.append(
        f"  {one.data_bytes} bytes moved, {one.resent_bytes} of them more than needed; at most "
        f"{one.controls_most} control messages to a rank; longest queues: {one.inbox_most} events, "
        f"{one.posted_most} receives"
    )
    return "\n".join(lines)


class _Size(click.ParamType):
    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, context: click.Context | None
    ) -> int:
        try:
            return value if isinstance(value, int) else size_of(value)
        except ValueError as error:
            self.fail(str(error), param, context)


class _Rate(click.ParamType):
    name = "rate"

    def convert(
        self, value: str | float, param: click.Parameter | None, context: click.Context | None
    ) -> float:
        try:
            return value if isinstance(value, float) else _rate_of(value)
        except ValueError as error:
            self.fail(str(error), param, context)


class _Kill(click.ParamType):
    name = "rank@seconds"

    def convert(
        self, value: str | tuple[int, float], param: click.Parameter | None,
        context: click.Context | None,
    ) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        rank, _, when = value.partition("@")
        try:
            return int(rank), float(when)
        except ValueError:
            self.fail(f"{value!r} is not like 3@0.2 (rank 3 after 0.2 s)", param, context)


@click.command(
    short_help="Time a collective on a network of given latency and bandwidth.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("nbytes", type=_Size(), metavar="SIZE")
@click.option("-n", "size", type=click.IntRange(1, _SIZE_MAX), default=8, show_default=True,
              help="Ranks.")
@click.option("--per-host", type=click.IntRange(1), default=1, show_default=True,
              help="Ranks of one host, which share its links.")
@click.option("--rate", "rates", type=_Rate(), multiple=True, default=("1gbit",),
              show_default=True, help="Of each direction of a link; once for each host, or once.")
@click.option("--latency-us", type=click.FloatRange(0), default=50.0, show_default=True,
              help="Between two hosts.")
@click.option("--send-us", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Of a rank's processor, for each message that it sends.")
@click.option("--event-us", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Of a rank's processor, for each event that it looks at.")
@click.option("--kill", "kills", type=_Kill(), multiple=True, help="A death: RANK@SECONDS.")
@click.option("--detect-ms", type=click.FloatRange(0), default=1.0, show_default=True,
              help="Until the others know of a death.")
@click.option("--operations", type=click.IntRange(1), default=1, show_default=True,
              help="One after the other.")
@click.option("--chunk-bytes", type=_Size(), default="64KiB", show_default=True)
@click.option("--window", type=click.IntRange(1, 1024), default=16, show_default=True)
@click.option("--eager-bytes", type=_Size(), default="4KiB", show_default=True)
@click.option("--degree", type=click.IntRange(2, 16), default=16, show_default=True,
              help="Of the tree along which agreement goes.")  # fmt: skip
@click.option("--order", type=click.Choice(["rank", "arrival"]), default="rank", show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path),
              help="Write it here.")
def command(
    kind: str,
    nbytes: int,
    size: int,
    per_host: int,
    rates: tuple[float, ...],
    latency_us: float,
    send_us: float,
    event_us: float,
    kills: tuple[tuple[int, float], ...],
    detect_ms: float,
    operations: int,
    chunk_bytes: int,
    window: int,
    eager_bytes: int,
    degree: int,
    order: str,
    json_path: Path | None,
) -> None:
    """Time a collective on a network that has only a latency and a bandwidth.

    The engines of all ranks run as they do on MPI, over a network with a clock; the same arguments
    give the same figures anywhere.

    \b
    hopcoll forecast allreduce 32MiB -n 8 --rate 1gbit --latency-us 30
    hopcoll forecast bcast 32MiB -n 8 --kill 3@0.1
    """
    try:
        found = forecast(
            kind,
            nbytes,
            size,
            per_host=per_host,
            rate=rates[0] if len(rates) == 1 else rates,
            latency_us=latency_us,
            send_us=send_us,
            event_us=event_us,
            kills=kills,
            detect_ms=detect_ms,
            operations=operations,
            chunk_bytes=chunk_bytes,
            window_chunks=window,
            eager_bytes=eager_bytes,
            degree=degree,
            order=order,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(report(found))
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(found), indent=1) + "\n")
    sys.exit(0 if found.through else 1)
