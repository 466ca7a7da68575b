"""What a chaos run does and where it is hurt, all of it decided by one seed.

`make_run` is a pure function of (seed, number): the size of the job, its operations, the order in
which they are called and waited for, the settings of the engine, and the faults. `make_input` gives
the bytes that a rank puts into an operation. The job and the judge call the same two functions and
share nothing else, so the judge needs no word from the job to know what a result must be.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from hopcoll.chaos.shares import FOLDS, contribution_bytes, received_items, sent_items

__all__ = ["Fault", "Operation", "Run", "chunks_moved", "make_input", "make_run", "result_ranks"]

MIB = 1 << 20
#: An operation of at least this many bytes is one that the in-flight quota is counted on.
BIG_BYTES = 8 * MIB
SIZE_MAX = 8
#: Silence after which a rank is killed; a stop that is continued is shorter by a second.
DETECT_S = 3
#: An Allreduce is cut into at most so many blocks (part of the documented value order).
BLOCKS_MAX = 8

_FLOAT_OPS = ("SUM", "SUM", "AVG", "PROD", "MIN", "MAX")
_INT_OPS = ("SUM", "SUM", "PROD", "MIN", "MAX", "BAND", "BOR", "BXOR", "LAND", "LOR", "LXOR")
_OPS_OF_DTYPE = {
    "float32": _FLOAT_OPS,
    "float64": _FLOAT_OPS,
    "float16": _FLOAT_OPS,
    "complex64": ("SUM",),
    "int64": _INT_OPS,
    "int32": _INT_OPS,
    "int16": _INT_OPS,
    "uint8": _INT_OPS,
    "uint64": _INT_OPS,
    "bool": ("LAND", "LOR", "LXOR"),
}
# float32 is what training jobs send, so half of the work is in it.
_DTYPES = ("float32",) * 9 + tuple(_OPS_OF_DTYPE)
_SMALL_BYTES = (0, 8, 8, 40, 1000, 4096, 4104, 20_000, 65_536, 65_600, 300_000, 1_000_000)


#: As often as they shall come: what training sends most of all.
_KINDS = (
    *(("allreduce",) * 8 + ("bcast",) * 4 + ("reduce",) * 3),
    *("gather", "scatter", "scan", "exscan") * 2,
    *("allgather", "alltoall", "reduce_scatter") * 3,
)
_BLOCKS = ("gather", "allgather", "scatter", "alltoall", "reduce_scatter")
_ROOTED = ("bcast", "reduce", "gather", "scatter")
_IN_PLACE = ("allreduce", "reduce", "gather", "allgather", "alltoall", "scan", "exscan")


@dataclass(frozen=True)
class Operation:
    """One collective call, as every rank makes it.

    Parameters
    ----------
    kind : str
        "allreduce", "reduce", "bcast", "barrier", "gather", "allgather", "scatter", "alltoall",
        "reduce_scatter", "scan" or "exscan".
    dtype : str
        NumPy's name of it.
    op : str
        Name in `hopcoll` ("SUM", ...); empty where nothing is combined.
    count : int
        Items; of one block, where each rank has its own.
    root : int
        Rank, numbered as at the start; 0 where there is no root.
    in_place : bool
        Whether the input lies in the receive buffer (where there is a root, at the root only).
    vector : bool
        Whether blocks have lengths of their own (see `hopcoll.chaos.shares.lengths`).
    chained_to : int or None
        Number of an earlier operation whose result goes into the inputs of this one.
    quorum : int
        Of an allreduce: how many contributors are enough; 0: all.
    arrival : bool
        Of an allreduce or reduce: ``order="arrival"``. Only where every order gives the same bits.
    """

    kind: str
    dtype: str = "uint8"
    op: str = ""
    count: int = 0
    root: int = 0
    in_place: bool = False
    vector: bool = False
    chained_to: int | None = None
    quorum: int = 0
    arrival: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of one rank's buffer, or block."""
        return self.count * np.dtype(self.dtype).itemsize

    @property
    def rooted(self) -> bool:
        """Whether the operation has a root."""
        return self.kind in ("bcast", "reduce", "gather", "scatter")

    @property
    def shared(self) -> bool:
        """Whether all ranks that have a result have the same one."""
        return self.kind in ("bcast", "reduce", "allreduce", "gather", "allgather")


@dataclass(frozen=True)
class Fault:
    """One death, or stop, that the engine brings upon itself.

    Parameters
    ----------
    rank : int
        The victim.
    trigger : {"chunk", "ballot", "time"}
    first : int or float
        The operation's number, the ballot's number from 1, or seconds after init.
    second : int
        Chunks moved in that operation, or messages sent for ballots; unused by "time".
    stop_ms : int
        -1: SIGKILL. Else SIGSTOP, and after so many milliseconds SIGCONT; 0: never, so that the
        others have it killed when it is silent for too long.
    """

    rank: int
    trigger: str
    first: float
    second: int = 0
    stop_ms: int = -1

    @property
    def kills(self) -> bool:
        """Whether the rank is gone after it."""
        return self.stop_ms <= 0

    def text(self) -> str:
        """Return it as HOPCOLL_FAULT spells it."""
        what = f"time={self.first}"
        if self.trigger == "chunk":
            what = f"op={self.first},chunk={self.second}"
        elif self.trigger == "ballot":
            what = f"ballot={self.first},send={self.second}"
        stop = "" if self.stop_ms < 0 else f",stop={self.stop_ms}"
        return f"rank={self.rank},{what}{stop}"


@dataclass(frozen=True)
class Run:
    """One job: what its ranks do, and which of them die where.

    Parameters
    ----------
    seed, number : int
        What `make_run` made it from.
    size : int
        Ranks at the start.
    operations : tuple of Operation
    steps : tuple of (str, int)
        What each rank does in turn: "call" an operation and block, "start" it (the I-form) or
        "wait" for it.
    faults : tuple of Fault
        At most one for each rank, and for fewer ranks than there are.
    on_failure : {"survivors", "raise"}
    settings : dict of str to str
        HOPCOLL_* variables of the job.
    """

    seed: int
    number: int
    size: int
    operations: tuple[Operation, ...]
    steps: tuple[tuple[str, int], ...]
    faults: tuple[Fault, ...] = ()
    on_failure: str = "survivors"
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def eager_bytes(self) -> int:
        """Bytes up to which a reduction takes the short path, whose value order is another."""
        return int(self.settings.get("HOPCOLL_EAGER_BYTES", 4096))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what `save` wrote."""
        data = json.loads(path.read_text())
        data["operations"] = tuple(Operation(**entry) for entry in data["operations"])
        data["steps"] = tuple((verb, number) for verb, number in data["steps"])
        data["faults"] = tuple(Fault(**entry) for entry in data["faults"])
        return cls(**data)


def result_ranks(operation: Operation, size: int) -> tuple[int, ...]:
    """Return the ranks whose receive buffer holds the operation's result."""
    if operation.kind == "barrier":
        return ()
    if operation.kind in ("reduce", "gather"):
        return (operation.root,)
    return tuple(range(size))


def make_input(run: Run, number: int, rank: int, chained: str) -> np.ndarray:
    """Return what a rank puts into an operation.

    Parameters
    ----------
    run : Run
    number : int
        The operation's.
    rank : int
        Numbered as at the start.
    chained : str
        Digest (hexadecimal) of the result that the input depends on; empty if there is none. A
        rank that took another result for it puts entirely different bytes in.

    Returns
    -------
    numpy.ndarray
        One dimension: random bits, without NaN, infinity, zero or a denormal
        number in floating point, and such that no product of eight of them has one.
    """
    operation = run.operations[number]
    dtype = np.dtype(operation.dtype)
    nbytes = sent_items(operation, run.size, rank) * dtype.itemsize
    words = -(-nbytes // 8)
    entropy = [run.seed, run.number, number, rank, int(chained or "0", 16)]
    bits = np.random.SFC64(np.random.SeedSequence(entropy)).random_raw(words)
    bits = bits.view(np.uint8)[:nbytes]
    # The sign, the mantissa and a few bits of the exponent are random, its upper bits are fixed:
    # 2^-15 to 2 (float16: 0.5 to 2), wide enough that another order of summation shows.
    if dtype == np.float64:
        words64 = bits.view(np.uint64)
        words64 &= np.uint64(0x80FFFFFFFFFFFFFF)
        words64 |= np.uint64(0x3F00000000000000)
    elif dtype in (np.float32, np.complex64):
        words32 = bits.view(np.uint32)
        words32 &= np.uint32(0x87FFFFFF)
        words32 |= np.uint32(0x38000000)
    elif dtype == np.float16:
        words16 = bits.view(np.uint16)
        words16 &= np.uint16(0x87FF)
        words16 |= np.uint16(0x3800)
    elif dtype == np.bool_:
        bits &= np.uint8(1)
    return bits.view(dtype)


def chunks_moved(operation: Operation, size: int, rank: int, chunk_bytes: int) -> int:
    """Estimate the chunks that a rank receives and sends in an operation without a death.

    The faults of a plan are placed by it; that they fell where they should is taken from the
    victims' own records.
    """
    if operation.kind == "barrier" or size == 1:
        return 0

    def chunks(nbytes: int) -> int:
        return -(-nbytes // chunk_bytes)

    if operation.kind == "allreduce":
        blocks = min(size, BLOCKS_MAX)
        total = 0
        for block in range(blocks):
            start = block * size // blocks
            in_block = chunks(operation.nbytes // blocks)
            place = (rank - start) % size  # in the chain that folds; finals go back along it
            total += 2 * in_block * ((place > 0) + (place < size - 1))
        return total
    item_bytes = np.dtype(operation.dtype).itemsize
    if operation.kind in ("gather", "scatter", "alltoall"):
        own = sent_items(operation, size, rank) + received_items(operation, size, rank)
        return chunks(own * item_bytes)
    if operation.kind == "allgather":
        return 2 * chunks(received_items(operation, size, rank) * item_bytes)
    if operation.kind == "reduce_scatter":
        return 2 * chunks(sent_items(operation, size, rank) * item_bytes)
    if operation.kind in ("scan", "exscan"):
        return chunks(operation.nbytes) * ((rank > 0) + (rank < size - 1))
    start = operation.root if operation.kind == "bcast" else operation.root + 1
    place = (rank - start) % size
    return chunks(operation.nbytes) * ((place > 0) + (place < size - 1))


def make_run(seed: int, number: int) -> Run:
    """Draw run `number` of the plan of `seed`."""
    draw = random.Random(f"hopcoll-chaos/{seed}/{number}")
    size = draw.randint(2, SIZE_MAX)
    big = sorted(draw.sample(range(5), draw.choice((1, 2, 2, 3))))
    count = draw.randint(max(6, big[-1] + 2), 12)
    operations = [_draw_operation(draw, size, number in big) for number in range(count)]
    steps = _draw_steps(draw, count)
    operations = _chain(draw, operations, steps)
    chunk_bytes = draw.choice((16_384, 65_536, 65_536, 131_072))
    settings = {
        "HOPCOLL_DETECT_S": str(DETECT_S),
        "HOPCOLL_CHUNK_BYTES": str(chunk_bytes),
        "HOPCOLL_WINDOW": str(draw.choice((4, 16, 16))),
        "HOPCOLL_EAGER_BYTES": str(draw.choice((0, 4096, 4096, 32_768))),
        "HOPCOLL_PROGRESS": draw.choice(("thread", "thread", "thread", "inline")),
    }
    faults = _draw_faults(draw, operations, big, size, chunk_bytes)
    beats = settings["HOPCOLL_PROGRESS"] == "thread"
    faults = [_draw_stop(draw, fault, beats) for fault in faults]
    return Run(
        seed=seed,
        number=number,
        size=size,
        operations=tuple(operations),
        steps=tuple(steps),
        faults=tuple(faults),
        on_failure=draw.choice(("survivors",) * 6 + ("raise",)),
        settings=settings,
    )


def over_hosts(run: Run) -> Run:
    """The same run where ranks are on several hosts: a rank that is stopped for ever is killed.

    Nobody can kill it from another host, and whoever is left may be too few to go on without it.
    """
    faults = [replace(fault, stop_ms=-1) if fault.stop_ms == 0 else fault for fault in run.faults]
    return replace(run, faults=tuple(faults))


def _draw_operation(draw: random.Random, size: int, big: bool) -> Operation:
    kind = draw.choice(_KINDS if big else (*_KINDS, "barrier"))
    if kind == "barrier":
        return Operation("barrier")
    dtype = draw.choice(_DTYPES)
    nbytes = draw.choice(_SMALL_BYTES)
    if big:
        nbytes = draw.randint(BIG_BYTES, (16 if size <= 4 else 10) * MIB)
        if kind in _BLOCKS:
            nbytes = -(-nbytes // size) + 4096
    elif kind in _BLOCKS:
        nbytes = min(nbytes, 300_000)
    count = -(-nbytes // np.dtype(dtype).itemsize)
    root = draw.randrange(size) if kind in _ROOTED else 0
    op = draw.choice(_OPS_OF_DTYPE[dtype]) if kind in FOLDS else ""
    if kind in ("scan", "exscan") and op == "AVG":
        op = "SUM"
    vector = kind in _BLOCKS and draw.random() < 0.4
    in_place = kind in _IN_PLACE and not vector and draw.random() < 0.3
    quorum = draw.randint(1, size) if kind == "allreduce" and draw.random() < 0.2 else 0
    exact = np.dtype(dtype).kind in "iub" or op in ("MIN", "MAX")
    arrival = (
        kind in ("allreduce", "reduce") and exact and op != "AVG" and not quorum
        and draw.random() < 0.4
    )
    return Operation(
        kind, dtype, op, count, root,
        in_place=in_place, vector=vector, quorum=quorum, arrival=arrival,
    )


def _draw_steps(draw: random.Random, count: int) -> list[tuple[str, int]]:
    """Mix blocking calls with batches of outstanding ones, waited for in any order."""
    steps: list[tuple[str, int]] = []
    number = 0
    while number < count:
        batch = list(range(number, min(count, number + draw.choice((1, 1, 1, 2, 3, 4)))))
        number += len(batch)
        if len(batch) == 1 and draw.random() < 0.7:
            steps.append(("call", batch[0]))
            continue
        steps += [("start", member) for member in batch]
        if number < count and draw.random() < 0.3:
            steps.append(("call", number))
            number += 1
        draw.shuffle(batch)
        steps += [("wait", member) for member in batch]
    return steps


def _chain(
    draw: random.Random, operations: Sequence[Operation], steps: Sequence[tuple[str, int]]
) -> list[Operation]:
    """Let some inputs depend on the latest result that every rank holds when it makes them."""
    chained = list(operations)
    source: int | None = None
    for verb, number in steps:
        if verb in ("call", "start") and source is not None and draw.random() < 0.6:
            chained[number] = Operation(**{**asdict(operations[number]), "chained_to": source})
        for_all = operations[number].shared and operations[number].kind not in ("reduce", "gather")
        for_all = for_all and not operations[number].quorum  # a late rank may have missed it
        if verb in ("call", "wait") and for_all:
            source = number
    return chained


def _draw_faults(
    draw: random.Random,
    operations: Sequence[Operation],
    big: Sequence[int],
    size: int,
    chunk_bytes: int,
) -> list[Fault]:
    kills = size - 1 if draw.random() < 0.2 else min(size - 1, draw.choice((1, 1, 2, 2, 3, 4)))
    living = list(range(size))
    faults: list[Fault] = []
    target = draw.choice(big)
    for place in range(kills):
        # Some of the later victims die in the operation that the first death is being repaired
        # in, the others in one that comes after it.
        if place and draw.random() < 0.4:
            target = draw.choice([number for number in big if number >= target])
        operation = operations[target]
        victim = draw.choice(living)
        if draw.random() < 0.3:
            victim = living[0]  # the coordinator
        elif operation.root in living and operation.rooted and draw.random() < 0.5:
            victim = operation.root
        living.remove(victim)
        what = draw.random()
        if place and what < 0.35:
            # A coordinator sends to everybody, twice; the others answer.
            sends_max = 2 * len(living) if victim < living[0] else 1
            ballot = draw.randint(1, min(place, 2))
            faults.append(Fault(victim, "ballot", ballot, draw.randint(0, sends_max)))
        elif what < 0.82:
            total = chunks_moved(operation, size, victim, chunk_bytes)
            chunk = max(1, round(draw.uniform(0.08, 0.92) * total))
            faults.append(Fault(victim, "chunk", target, chunk))
        elif what < 0.91:
            number = draw.randrange(len(operations))
            total = chunks_moved(operations[number], size, victim, chunk_bytes)
            faults.append(Fault(victim, "chunk", number, draw.randint(0, min(2, total))))
        else:
            moved_bytes = size * sum(contribution_bytes(one, size) for one in operations)
            seconds = draw.uniform(0, 0.02 + moved_bytes / 500e6)
            faults.append(Fault(victim, "time", round(seconds, 4)))
    return faults


def _draw_stop(draw: random.Random, fault: Fault, beats: bool) -> Fault:
    """Make a stop of some deaths. Without the progress thread nobody would notice a long one."""
    if draw.random() >= 0.25:
        return fault
    if beats and draw.random() < 0.35:
        return replace(fault, stop_ms=0)
    return replace(fault, stop_ms=draw.choice((50, 200, 500, 1000, 2000)))
