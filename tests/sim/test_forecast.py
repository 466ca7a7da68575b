"""What the schedules cost on a network with a clock: the same figures on any machine."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

from hopcoll.forecast import KINDS, command, forecast, size_of

MIB = 1 << 20


@pytest.mark.parametrize("size", [2, 3, 8, 24])
@pytest.mark.parametrize(
    "kind", ["bcast", "reduce", "allreduce", "gather", "scatter", "allgather", "alltoall"]
)
def test_nothing_is_sent_twice(kind, size):
    found = forecast(kind, 512 * 1024, size)
    assert found.through
    assert found.resent_bytes == 0


@pytest.mark.parametrize(
    ("kind", "nbytes", "multiple"),
    [
        ("bcast", 32 * MIB, 1.03),
        ("reduce", 32 * MIB, 1.03),
        ("allreduce", 32 * MIB, 1.01),
        ("bcast", MIB, 1.25),
        ("reduce", MIB, 1.25),
        ("allreduce", MIB, 1.05),
        ("allgather", MIB, 1.05),
        ("gather", MIB, 1.02),
    ],
)
def test_eight_hosts_are_near_what_the_wire_allows(kind, nbytes, multiple):
    found = forecast(kind, nbytes, 8, latency_us=50)
    assert 1 <= found.multiple <= multiple


@pytest.mark.parametrize(
    ("kind", "nbytes", "multiple"),
    [
        ("bcast", 64 * MIB, 1.05),
        ("reduce", 64 * MIB, 1.09),
        ("allreduce", 64 * MIB, 1.1),
        ("bcast", MIB, 1.5),
        ("reduce", MIB, 1.7),
        ("allreduce", MIB, 1.4),
    ],
)
@pytest.mark.parametrize("size", [18, 64, 200])
def test_many_hosts_are_near_what_the_wire_allows(kind, nbytes, multiple, size):
    """Along two trees; a chain through 64 would be at 1.9 with a message of 1 MiB."""
    found = forecast(kind, nbytes, size)
    assert found.through
    assert 1 <= found.multiple <= multiple
    assert found.resent_bytes == 0


@pytest.mark.parametrize("kind", ["barrier", "bcast", "reduce", "allreduce"])
def test_no_rank_of_many_handles_many_messages(kind):
    """Neither in an operation nor in a death that cuts the tree do they grow with the ranks."""
    nbytes = 0 if kind == "barrier" else 8
    few, many = (
        forecast(kind, nbytes, size, rate=25e9, latency_us=2, kills=[(1, 1e-6)], detect_ms=0.1)
        for size in (64, 256)
    )
    calm = forecast(kind, nbytes, 256, rate=25e9, latency_us=2)
    assert few.through
    assert many.through
    assert calm.handled_most <= 34
    assert many.handled_most <= few.handled_most + 16 < 256
    assert many.rows_most <= 33
    # The root's links are the bound of a flat one: 255 messages, one after the other.
    assert calm.seconds[0] < (5e-6 if kind == "bcast" else 10e-6)


def test_the_same_call_gives_the_same_figures():
    one = forecast("allreduce", 3 * MIB, 7, kills=[(3, 0.02)], event_us=3.0)
    assert one == forecast("allreduce", 3 * MIB, 7, kills=[(3, 0.02)], event_us=3.0) or (
        # The dead have no end: NaN is not equal to itself.
        dataclasses.replace(one, ended_seconds=()).seconds == one.seconds
    )


@pytest.mark.parametrize(
    ("kind", "victim"),
    [("allreduce", 0), ("allreduce", 3), ("allreduce", 7), ("bcast", 3), ("bcast", 7)],
)
def test_a_death_half_way_costs_less_than_twice(kind, victim):
    without = forecast(kind, 32 * MIB, 8)
    with_one = forecast(kind, 32 * MIB, 8, kills=[(victim, without.seconds[0] / 2)])
    assert with_one.through
    assert with_one.seconds[0] < 2 * without.seconds[0]
    assert with_one.resent_bytes < without.data_bytes


def test_deaths_one_after_the_other_and_observers_that_know_at_different_times():
    kills = [(5, 0.05), (0, 0.06), (2, 0.0605), (6, 0.3)]
    found = forecast(
        "allreduce", 8 * MIB, 8, kills=kills, detect_ms=[1, 9, 3, 7, 2, 8, 4, 6], operations=3
    )
    assert found.through
    assert len(found.seconds) == 3


def test_a_slow_link_a_far_host_and_a_slow_rank_are_seen():
    alike = forecast("bcast", 8 * MIB, 4)
    rates = [125e6, 125e6, 12.5e6, 125e6]
    assert forecast("bcast", 8 * MIB, 4, rate=rates).seconds[0] > 9 * alike.seconds[0]
    far = [[0 if a == b else 50_000 if 3 in (a, b) else 50 for b in range(4)] for a in range(4)]
    assert forecast("bcast", 8 * MIB, 4, latency_us=far).seconds[0] > alike.seconds[0] + 0.09
    slow = forecast("bcast", 8 * MIB, 4, event_us=[1, 1, 2000, 1])
    assert slow.seconds[0] > 2 * alike.seconds[0]


def test_a_late_rank_delays_nobody_who_does_not_need_it():
    """It is the last of the chain, or it is gone around."""
    found = forecast("bcast", 4 * MIB, 6, delays_s=[0, 0, 0, 0.5])
    others = [found.ended_seconds[rank] for rank in (0, 1, 2, 4, 5)]
    assert max(others) < 0.2
    assert found.ended_seconds[3] > 0.5
    late = [0.0, 0.3, 0.0, 0.0, 0.0, 0.0]
    by_rank = forecast("reduce", 4 * MIB, 6, delays_s=late)
    by_arrival = forecast("reduce", 4 * MIB, 6, delays_s=late, order="arrival")
    assert by_arrival.seconds[0] <= by_rank.seconds[0]


@pytest.mark.parametrize(
    ("delays_s", "multiple"),
    [([0, 0, 0, 0.005], 1.1), ([0, 0.005, 0.004, 0, 0, 0.006], 1.2), ([0, 0.1, 0.05], 1.5)],
)
def test_who_comes_late_is_served_by_who_serves_nobody(delays_s, multiple):
    """By the rank that the others pass it by, the bytes would leave that one twice."""
    found = forecast("bcast", 32 * MIB, 8, delays_s=delays_s)
    assert found.through
    assert found.multiple < multiple
    assert found.resent_bytes == 0


@pytest.mark.parametrize("late", [[13], [12], [13, 6], [5, 6, 7], list(range(1, 12))], ids=str)
def test_who_is_late_in_a_tree_is_gone_around(late):
    """Who takes its place gives half as much again; nothing is sent twice."""
    size = 24
    delays_s = [0.1 if rank in late else 0.0 for rank in range(size)]
    found = forecast("bcast", 32 * MIB, size, delays_s=delays_s)
    assert found.through
    assert found.multiple < 2
    assert found.resent_bytes == 0


@pytest.mark.parametrize(
    ("kind", "victim"),
    [("allreduce", 0), ("allreduce", 15), ("reduce", 15), ("reduce", 3), ("bcast", 16)],
)
def test_a_death_in_a_tree_costs_less_than_twice(kind, victim):
    without = forecast(kind, 32 * MIB, 24)
    with_one = forecast(kind, 32 * MIB, 24, kills=[(victim, without.seconds[0] / 2)], operations=2)
    assert with_one.through
    assert with_one.seconds[0] < 2 * without.seconds[0]
    # The next one is as fast as ever.
    assert with_one.seconds[1] < 1.05 * without.seconds[0]


def test_queues_are_bounded():
    """By the window, whatever the message's length."""
    short, long = (forecast("allreduce", nbytes, 8) for nbytes in (32 * MIB, 256 * MIB))
    assert long.posted_most <= short.posted_most <= 2 * 8 * 16
    assert long.inbox_most <= 2 * short.inbox_most + 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("nbytes", "size"), [(0, 3), (8, 1), (8, 5), (20_000, 3)])
def test_every_kind(kind, nbytes, size):
    found = forecast(kind, nbytes, size, operations=2, gap_us=5)
    assert found.through
    assert len(found.seconds) == 2
    assert found.seconds[-1] >= 0


def test_ranks_of_one_host_share_its_links():
    spread = forecast("alltoall", MIB, 4)
    shared = forecast("alltoall", MIB, 4, per_host=2)
    assert shared.bound_seconds > spread.bound_seconds
    assert shared.multiple >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sort"}, "kind must be one of"),
        ({"size": 0}, "size must be from 1 to 256 ranks, not 0"),
        ({"nbytes": -1}, "nbytes must be 0 or more"),
        ({"per_host": 0}, "per_host must be at least 1"),
        ({"rate": [1e9]}, "rate has 1 numbers for 4 hosts"),
        ({"rate": -1.0}, "rate must be above 0"),
        ({"latency_us": [[1.0]]}, "a row and a column for each of 4 hosts"),
        ({"event_us": [1.0]}, "event_us has 1 numbers for 4 ranks"),
        ({"order": "size"}, "order must be 'rank' or 'arrival'"),
        ({"order": "arrival"}, "only a reduce or an allreduce"),
        ({"root": 4}, "root must be from 0 to 3"),
        ({"operations": 0}, "operations must be at least 1"),
        ({"kills": [(4, 0.1)]}, "there is no rank 4 among 4"),
    ],
)
def test_wrong_use(arguments, message):
    words = {"kind": "bcast", "nbytes": 8, "size": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        forecast(words.pop("kind"), words.pop("nbytes"), words.pop("size"), **words)


def test_the_command(tmp_path):
    words = ["allreduce", "1MiB", "-n", "4", "--rate", "400mbit", "--kill", "3@0.01"]
    done = CliRunner().invoke(command, [*words, "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert "the bandwidth alone: 31.46 ms" in done.output
    assert json.loads((tmp_path / "out.json").read_text())["through"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bcast", "many"], "a size is a number of bytes"),
        (["bcast", "8", "--rate", "fast"], "a rate is like 1gbit"),
        (["bcast", "8", "--kill", "3"], "is not like 3@0.2"),
        (["bcast", "8", "--kill", "9@0.1"], "there is no rank 9 among 8"),
        (["sort", "8"], "Invalid value"),
    ],
)
def test_wrong_words(words, message):
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("text", "nbytes"), [("8", 8), ("64KiB", 65536), ("32 MiB", 32 * MIB), ("1gib", 1 << 30)]
)
def test_sizes(text, nbytes):
    assert size_of(text) == nbytes
