"""The transport contract on the simulated network, whose every death is detected late."""

from __future__ import annotations

import itertools

import pytest

from cython_kernels._probe import Probe
from hopcoll._contexts import ContextPort
from hopcoll._network import SimulatedNetwork
from tests.transport_contract import DIE, SCENARIOS, Rank

ROUNDS_MAX = 100_000


def plain(port, size):
    return port


def context(port, size):
    """A context for all, which numbers them the other way round than the network does."""
    return ContextPort(port, list(range(size))[::-1])


def play(scenario, lag, kind):
    """Runs all ranks in turns; observer i learns of a death `lag` * (i + 1) rounds later."""
    network = SimulatedNetwork(scenario.size)
    ports = [kind(network.port(rank), scenario.size) for rank in range(scenario.size)]
    probes = [Probe(port) for port in ports]
    programs = {rank: scenario.program(Rank(probes[rank])) for rank in range(scenario.size)}
    told = []  # (round, observer, victim)
    died = set()
    for now in itertools.count():
        assert now < ROUNDS_MAX, f"ranks {sorted(programs)} do not end"
        for rank in list(programs):
            try:
                said = next(programs[rank])
            except StopIteration:
                del programs[rank]
                continue
            if said == DIE:
                del programs[rank]
                died.add(rank)
                network.kill(rank)
                told += [
                    (now + lag * (observer + 1), observer, rank)
                    for observer in range(scenario.size)
                    if observer != rank
                ]
        network.deliver_all()
        for item in [item for item in told if item[0] <= now]:
            told.remove(item)
            if item[1] not in died:
                network.detect(*item[1:])
        if not programs:
            break
    assert network.error is None
    assert len(died) == scenario.deaths
    for rank in range(scenario.size):
        assert network.port(rank).live_bytes == 0


@pytest.mark.parametrize("kind", [plain, context])
@pytest.mark.parametrize("lag", [0, 7])
@pytest.mark.parametrize("name", SCENARIOS)
def test_contract(name, lag, kind):
    play(SCENARIOS[name], lag, kind)


def test_detection_of_the_living_is_refused():
    network = SimulatedNetwork(2)
    with pytest.raises(ValueError, match="^rank: 1 is alive"):
        network.detect(0, 1)
    with pytest.raises(ValueError, match="^rank: 2 "):
        network.port(2)


def test_what_is_late_for_a_context_is_dropped():
    network = SimulatedNetwork(2)
    first = [Probe(ContextPort(network.port(rank), [1, 0])) for rank in range(2)]
    later = [Probe(ContextPort(network.port(rank), [1, 0], 10)) for rank in range(2)]
    first[0].send_control(0, b"late")
    later[0].send_control(0, b"of ", b"now")
    network.deliver_all()
    # Rank 1 of the network has the later one alone: it is rank 0 there.
    assert later[1].poll() == ("control", 1, b"of now")
    assert later[1].poll() is None
    assert network.error is None
