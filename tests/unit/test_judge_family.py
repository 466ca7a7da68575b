"""The judge on operations in which ranks own different blocks: what is right passes, else not."""

import json

import numpy as np
import pytest

from hopcoll.chaos.judge import judge
from hopcoll.chaos.plan import Fault, Operation, Run, make_input, result_ranks
from hopcoll.chaos.shares import digest_of, lengths, received_items

SIZE, VICTIM = 4, 1
KINDS = ["gather", "allgather", "scatter", "alltoall", "reduce_scatter", "scan", "exscan"]


def run_of(kind, vector, victim=VICTIM):
    op = "SUM" if kind in ("reduce_scatter", "scan", "exscan") else ""
    root = 2 if kind in ("gather", "scatter") else 0
    return Run(
        seed=3,
        number=0,
        size=SIZE,
        operations=(Operation(kind, "float32", op, 9, root, vector=vector),),
        steps=(("call", 0),),
        faults=(Fault(victim, "chunk", 0, 1),),
        settings={"HOPCOLL_EAGER_BYTES": "0"},
    )


def result_of(run, rank, members):
    """The result of a rank, item by item, from nothing but what the operation means."""
    operation = run.operations[0]
    kind, counts = operation.kind, lengths(operation, SIZE)
    inputs = {other: make_input(run, 0, other, "") for other in range(SIZE)}

    def block(source, dest):
        if kind == "alltoall":
            begin = sum(counts[(source + other) % SIZE] for other in range(dest))
            return inputs[source][begin : begin + counts[(source + dest) % SIZE]]
        return inputs[source]

    def folded(order, items):
        total = None
        for other in order:
            if other in members:
                piece = inputs[other][items]
                total = piece.copy() if total is None else total + piece
        return total

    if kind in ("gather", "allgather", "alltoall"):
        return np.concatenate(
            [block(r, rank) if r in members else np.zeros_like(block(r, rank)) for r in range(SIZE)]
        )
    begin = sum(counts[:rank])
    if kind == "scatter":
        return inputs[2][begin : begin + counts[rank]]
    if kind == "reduce_scatter":
        order = [(rank + 1 + place) % SIZE for place in range(SIZE)]
        return folded(order, slice(begin, begin + counts[rank]))
    return folded(range(rank + 1 if kind == "scan" else rank), slice(None))


def write(folder, run, *, members=(0, 2, 3), spoil=None, said=None, victim=VICTIM, calls=True):
    """Logs in which all is well, but for what `spoil` makes of a rank's result."""
    run.save(folder / "run.json")
    launcher = {"returncode": 0, "timed_out": False, "seconds": 1.0, "left_behind": []}
    (folder / "launcher.json").write_text(json.dumps(launcher))
    (folder / "output").write_text("")
    record = {"rank": victim, "trigger": "chunk", "op": 0, "chunk": 1, "moved_bytes": 1,
              "total_bytes": 9, "repair": 0, "coordinator": 0, "epoch": 0, "stop_ms": -1}
    (folder / f"fault.{victim}").write_text(json.dumps(record))
    for rank in range(SIZE):
        lines = [{"event": "call", "op": 0, "time_s": 1.0}] if calls or rank != victim else []
        if rank != victim:
            result = result_of(run, rank, members)
            assert result is None or result.size == received_items(run.operations[0], SIZE, rank) \
                or rank not in result_ranks(run.operations[0], SIZE)
            if spoil is not None and result is not None:
                result = spoil(rank, result.copy())
            held = rank in result_ranks(run.operations[0], SIZE)
            digest = None if not held else "00" if result is None else digest_of(result)
            contributors = list(said(rank) if said is not None else members)
            lines.append({"event": "done", "op": 0, "status": "ok", "contributors": contributors,
                          "epoch": 1, "digest": digest, "intact": True, "time_s": 2.0})
            lines.append({"event": "finished", "counters": {}, "time_s": 3.0})
        (folder / f"log.{rank}").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return judge(folder)["problems"]


@pytest.mark.parametrize(
    ("kind", "vector"), [(kind, False) for kind in KINDS] + [(kind, True) for kind in KINDS[:5]]
)
def test_what_is_right_passes(tmp_path, kind, vector):
    assert write(tmp_path, run_of(kind, vector)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_item_is_caught(tmp_path, kind):
    def spoil(rank, result):
        if rank == 2:
            result[-1] *= 2
        return result

    assert any(text.startswith("wrong_value: op 0: rank 2")
               for text in write(tmp_path, run_of(kind, False), spoil=spoil))  # fmt: skip


@pytest.mark.parametrize("kind", ["gather", "allgather", "alltoall"])
def test_a_block_of_the_absent_that_is_not_zero_is_caught(tmp_path, kind):
    def spoil(rank, result):
        result[VICTIM * 9] = 1.0
        return result

    assert any("wrong_value" in text for text in write(tmp_path, run_of(kind, False), spoil=spoil))


@pytest.mark.parametrize("kind", KINDS)
def test_other_contributors_at_one_rank_are_caught(tmp_path, kind):
    problems = write(tmp_path, run_of(kind, False),
                     said=lambda rank: (0, 1, 2, 3) if rank == 3 else (0, 2, 3))  # fmt: skip
    assert any(text.startswith("disagreement") for text in problems)


@pytest.mark.parametrize("kind", ["reduce_scatter", "scan"])
def test_an_input_that_is_counted_twice_is_caught(tmp_path, kind):
    run = run_of(kind, False)
    mine = make_input(run, 0, 0, "")

    def spoil(rank, result):
        return result + mine[: result.size]

    assert any("wrong_value" in text for text in write(tmp_path, run, spoil=spoil))


@pytest.mark.parametrize("kind", ["scan", "exscan", "alltoall"])
@pytest.mark.parametrize("victim", [1, 3])
def test_a_contributor_must_have_called(tmp_path, kind, victim):
    """But one behind all survivors, in a scan: its input is in no result."""
    everyone = (0, 1, 2, 3)
    run = run_of(kind, False, victim)
    problems = write(tmp_path, run, members=everyone, victim=victim, calls=False)
    early = [text for text in problems if text.startswith("early")]
    assert bool(early) == (kind == "alltoall" or victim == 1)
