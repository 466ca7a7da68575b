"""The transport contract on real MPI, with real deaths, and the transport's beginning and end."""

from __future__ import annotations

import pytest

from tests import launch
from tests.transport_contract import SCENARIOS

PROGRAM = "tests.mpi.programs.transport"
#: The transport itself, and a context over it.
KINDS = pytest.mark.parametrize("kind", [(), ("context",)], ids=["mpi", "context"])


def play(size: int, names: list[str], deaths: int, kind: tuple[str, ...]) -> None:
    ended = launch.run(size, "-m", PROGRAM, *kind, *names, timeout_s=120)
    assert ended.code == 0, str(ended)
    played = [line for line in ended.lines if line.endswith(" ".join(names))]
    # A survivor only gets to its end when it has seen every death of the scenario.
    assert len(played) == size - deaths, str(ended)


@KINDS
@pytest.mark.parametrize("size", [2, 3, 5])
def test_contract(size, kind):
    names = [name for name, one in SCENARIOS.items() if one.size == size and not one.deaths]
    assert names
    play(size, names, 0, kind)


@KINDS
@pytest.mark.parametrize("name", [name for name, one in SCENARIOS.items() if one.deaths])
def test_contract_with_deaths(name, kind):
    scenario = SCENARIOS[name]
    play(scenario.size, [name], scenario.deaths, kind)


def test_connect_and_leave():
    ended = launch.run(3, "-m", "tests.mpi.programs.connect", timeout_s=120)
    assert ended.code == 0, str(ended)
    assert len(ended.lines) == 3, str(ended)
