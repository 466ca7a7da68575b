"""Every order of everything: deliveries, calls, deaths at every send, detections at every observer.

Three ranks of which two die are exhausted for every kind of operation, five ranks of which two die
in one order of deliveries.  Nothing is left out that could end differently; what makes two worlds
equal is in hopcoll/_digest.pyx, and is itself compared to telling them apart by all bytes.
"""

from __future__ import annotations

import pytest

from hopcoll._simulation import (
    ARRIVAL,
    CARRY,
    IN_PLACE,
    MIXED,
    PARTIAL,
    RAISE,
    VECTOR,
    explore_all,
)

SMALL = {"depth": 1, "ring": 4, "window": 1, "active": 1}
TWO = {**SMALL, "depth": 2, "active": 2}
#: Requests end long after their messages, in any order; the windows are wider.
LATE = {**SMALL, "window": 2, "sent": "late", "lost": "late"}
#: Every rank has a block for every other.
BLOCKS = {**SMALL, "outlets_max": 64}
LATE_BLOCKS = {**LATE, "outlets_max": 64}


def exhaust(size, script, deaths, **options):
    found = explore_all(size, script, deaths=deaths, **options)
    assert found["violation"] is None, (found["violation"], found["blamed"], found["trace"])
    assert found["complete"], f"stopped after {found['states']} states"
    assert found["ends"] > 0
    return found


@pytest.mark.parametrize("root", range(3))
@pytest.mark.parametrize("kind", ["bcast", "reduce"])
@pytest.mark.parametrize("count", [1, 6], ids=["small", "chunks"])
def test_rooted(kind, root, count):
    exhaust(3, [(kind, count, root, 0)], deaths=2, **SMALL)


@pytest.mark.parametrize("root", [0, 2])
@pytest.mark.parametrize("kind", ["bcast", "reduce"])
def test_rooted_with_late_requests(kind, root):
    exhaust(3, [(kind, 6, root, 0)], deaths=2, **LATE)


@pytest.mark.parametrize(
    "step",
    [("allreduce", 1, 0, 0), ("barrier", 0, 0, 0), ("allreduce", 0, 0, RAISE)],
    ids=["allreduce", "barrier", "empty"],
)
def test_all_to_all(step):
    exhaust(3, [step], deaths=2, **SMALL)


def test_allreduce_in_chunks():
    exhaust(3, [("allreduce", 6, 0, IN_PLACE)], deaths=2, **SMALL)


@pytest.mark.parametrize(
    "script",
    [
        [("bcast", 1, 0, 0), ("allreduce", 1, 0, 0)],
        [("bcast", 4, 1, 0), ("reduce", 3, 2, 0)],
        [("allreduce", 1, 0, RAISE), ("allreduce", 1, 0, RAISE)],
    ],
    ids=["small", "chunks", "raise"],
)
def test_two_operations(script):
    exhaust(3, script, deaths=2, **TWO)


def test_leaving():
    exhaust(3, [("allreduce", 1, 0, 0)], deaths=2, leaving=True, **SMALL)
    exhaust(3, [("bcast", 1, 1, 0)], deaths=2, leaving=True, exits=True, **SMALL)


def test_leaving_early():
    script = [("allreduce", 1, 0, 0), ("barrier", 0, 0, 0)]
    exhaust(3, script, deaths=1, leaving=True, early=(1, 1), **TWO)


@pytest.mark.parametrize(
    "odd",
    [("bcast", 3, 1, 0), ("bcast", 1, 1, 0), ("barrier", 0, 0, 0), ("allreduce", 3, 0, 0)],
    ids=lambda step: f"{step[0]}-{step[1]}",
)
def test_mismatch(odd):
    """One rank calls something else: all end, in whatever order they learn of it."""
    exhaust(3, [("allreduce", 1, 0, 0)], deaths=0, odd=(1, 0, odd), **SMALL)


def test_two_roots():
    """The root of a broadcast needs nothing of others, and yet two of them notice each other."""
    script = [("bcast", 3, 0, 0), ("barrier", 0, 0, 0)]
    for odd in (("bcast", 3, 1, 0), ("bcast", 5, 1, 0)):
        exhaust(2, script, deaths=1, odd=(1, 0, odd), **TWO)
        exhaust(3, script[:1], deaths=0, odd=(1, 0, odd), **SMALL)
    found = explore_all(2, script, deaths=0, odd=(1, 0, odd), sabotage=("asked",), **TWO)
    assert found["violation"] == "different calls went unnoticed"


@pytest.mark.parametrize(
    "step",
    [("bcast", 1, 1, 0), ("bcast", 4, 0, 0), ("reduce", 4, 2, 0), ("allreduce", 1, 0, 0)],
    ids=lambda step: f"{step[0]}-{step[1]}",
)
def test_five_ranks_in_one_order(step):
    exhaust(
        5, [step], deaths=2, order="lowest", outlets_max=32, states_max=5_000_000, **SMALL
    )


def test_allreduce_in_chunks_of_five_ranks_in_one_order():
    """One death: with two it takes half an hour."""
    exhaust(5, [("allreduce", 5, 0, 0)], deaths=1, order="lowest", outlets_max=32, **SMALL)


@pytest.mark.parametrize(
    ("size", "step", "deaths"),
    [
        (4, ("bcast", 4, 1, 0), 2),
        (4, ("reduce", 4, 1, MIXED), 2),
        (4, ("allreduce", 4, 0, MIXED), 1),
        (5, ("bcast", 4, 0, 0), 1),
        (5, ("allreduce", 2, 0, MIXED | IN_PLACE), 1),
    ],
    ids=lambda value: f"{value[0]}-{value[1]}" if isinstance(value, tuple) else str(value),
)
def test_two_trees_in_one_order(size, step, deaths):
    """With a control tree of degree 2 four ranks are many."""
    exhaust(size, [step], deaths=deaths, order="lowest", degree=2, outlets_max=32, **SMALL)


@pytest.mark.parametrize("root", range(3))
@pytest.mark.parametrize("kind", ["gather", "scatter"])
@pytest.mark.parametrize("count", [1, 2], ids=["one", "chunks"])
def test_blocks_of_a_root(kind, root, count):
    exhaust(3, [(kind, count, root, 0)], deaths=2, **BLOCKS)


@pytest.mark.parametrize(
    "step",
    [
        ("gather", 3, 1, VECTOR),
        ("scatter", 3, 1, VECTOR),
        *[(kind, 1, 0, 0) for kind in ("allgather", "alltoall", "reduce_scatter")],
        *[(kind, 2, 0, VECTOR) for kind in ("allgather", "alltoall", "reduce_scatter")],
        *[(kind, count, 0, 0) for kind in ("scan", "exscan") for count in (1, 2)],
        ("allgather", 2, 0, IN_PLACE),
        ("alltoall", 2, 0, IN_PLACE),
        ("reduce_scatter", 2, 0, IN_PLACE),
        ("exscan", 4, 0, IN_PLACE),
    ],
    ids=lambda step: f"{step[0]}-{step[1]}-{step[3]}",
)
def test_blocks_of_all(step):
    exhaust(3, [step], deaths=2, **BLOCKS)


@pytest.mark.parametrize("kind", ["gather", "scatter", "scan"])
def test_blocks_with_late_requests(kind):
    exhaust(3, [(kind, 2, 0, 0)], deaths=2 if kind in ("gather", "scatter") else 1, **LATE_BLOCKS)


@pytest.mark.parametrize(
    "script",
    [
        [("scan", 2, 0, 0), ("allreduce", 1, 0, 0)],
        [("scatter", 2, 1, 0), ("gather", 2, 2, 0)],
        [("exscan", 1, 0, RAISE), ("scatter", 2, 0, RAISE)],
    ],
    ids=["scan", "root", "raise"],
)
def test_two_operations_with_blocks(script):
    exhaust(3, script, deaths=1, **{**TWO, "outlets_max": 64})


@pytest.mark.parametrize("odd_rank", range(3))
@pytest.mark.parametrize("kind", ["gather", "scatter", "alltoall"])
def test_lengths_that_two_ranks_disagree_on(kind, odd_rank):
    """In a vector form two ranks alone know the length of the block between them."""
    odd = (odd_rank, 0, (kind, 5, 1, VECTOR))
    # With blocks from all to all there are too many orders for a test.
    order = "turns" if kind == "alltoall" else "every"
    exhaust(3, [(kind, 3, 1, VECTOR)], deaths=0, odd=odd, order=order, **BLOCKS)


@pytest.mark.parametrize("kind", ["allgather", "scatter", "alltoall", "reduce_scatter", "exscan"])
def test_blocks_of_five_ranks_in_one_order(kind):
    exhaust(5, [(kind, 2, 0, 0)], deaths=1, order="lowest", **{**BLOCKS, "outlets_max": 128})


@pytest.mark.parametrize(
    ("script", "deaths"),
    [
        ([("scan", 2, 0, 0)], 1),
        ([("scatter", 1, 0, 0)], 1),
        ([("bcast", 1, 0, 0)], 1),
        ([("bcast", 3, 1, 0)], 1),
        ([("reduce", 3, 1, 0)], 1),
        ([("allreduce", 1, 0, 0)], 0),
    ],
    ids=["scan", "scatter", "small-bcast", "bcast", "reduce", "allreduce"],
)
def test_equal_digests_mean_equal_outcomes(script, deaths):
    """Telling worlds apart by all their bytes finds more worlds, and the same set of outcomes."""
    raw = exhaust(3, script, deaths, raw=True, **SMALL)
    short = exhaust(3, script, deaths, **SMALL)
    assert raw["verdicts"] == short["verdicts"]
    assert raw["states"] > short["states"]


@pytest.mark.parametrize(
    ("rule", "script"),
    [
        ("freeze", [("allreduce", 1, 0, 0)]),
        ("retention", [("bcast", 8, 0, 0)]),  # longer than what is kept
        ("voids", [("reduce", 6, 0, 0)]),
        ("taint", [("allreduce", 6, 0, 0)]),
        ("seal", [("scatter", 2, 0, 0)]),
    ],
)
def test_a_broken_rule_is_found(rule, script):
    found = explore_all(3, script, deaths=2, sabotage=(rule,), **SMALL)
    assert found["violation"] is not None


@pytest.mark.parametrize("kind", ["allreduce", "reduce"])
def test_the_order_of_arrival(kind):
    exhaust(3, [(kind, 2, 0, ARRIVAL)], deaths=1, **SMALL)
    exhaust(4, [(kind, 2, 1, ARRIVAL)], deaths=2, order="lowest", **BLOCKS)


@pytest.mark.parametrize("quorum", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2], ids=["small", "chunks"])
def test_partial(quorum, count):
    """The first to arrive, in every order of arrival; two die at any moment."""
    exhaust(3, [("allreduce", count, quorum, PARTIAL)], deaths=2, **SMALL)


def test_partial_in_one_order():
    exhaust(4, [("allreduce", 2, 2, PARTIAL)], deaths=2, order="lowest", **BLOCKS)


def test_partial_in_time():
    exhaust(2, [("allreduce", 2, 0, PARTIAL, 100_000)], deaths=1, **TWO)


@pytest.mark.parametrize("count", [1, 2], ids=["small", "chunks"])
def test_carried(count):
    """What is late is in the second operation, or in the third, which is of all."""
    first = ("allreduce", count, 1, PARTIAL | CARRY)
    exhaust(2, [first, first, ("allreduce", count, 0, CARRY)], deaths=1, **TWO)
