"""The bell on which an idle progress thread sleeps."""

from __future__ import annotations

import threading

import pytest

from cython_kernels.doorbell import Doorbell

SOON_S, LONG_S = 0.01, 30.0


def connected(*names: bytes) -> Doorbell:
    bell = Doorbell()
    bell.connect([bell.name, *names])
    return bell


@pytest.fixture
def pair():
    bells = [Doorbell(), Doorbell()]
    for bell in bells:
        bell.connect([one.name for one in bells])
    return bells


def test_a_ring_ends_the_wait(pair):
    one, other = pair
    assert not one.wait(SOON_S)
    other.ring(0)
    assert one.wait(LONG_S)
    assert not one.wait(SOON_S)
    assert not other.wait(SOON_S)


def test_a_ring_wakes_who_sleeps_already(pair):
    one, other = pair
    woken = []
    thread = threading.Thread(target=lambda: woken.append(one.wait(LONG_S)))
    thread.start()
    other.ring(0)
    thread.join(LONG_S)
    assert woken == [True]


def test_one_rings_oneself(pair):
    pair[1].ring(1)
    assert pair[1].wait(LONG_S)


def test_many_rings_are_one_and_never_block(pair):
    one, other = pair
    for _ in range(10_000):
        other.ring(0)
    assert one.wait(LONG_S)
    assert not one.wait(SOON_S)


def test_nobody_there():
    gone = Doorbell()
    name = gone.name
    del gone
    bell = connected(name, b"", b"x" * 200)
    for peer in range(1, 4):
        bell.ring(peer)
    assert not bell.wait(SOON_S)


def test_peers_out_of_range(pair):
    for peer in (-1, 2):
        with pytest.raises(IndexError, match="peer must be from 0 to 1"):
            pair[0].ring(peer)
    with pytest.raises(IndexError):
        Doorbell().ring(0)


def test_it_is_connected_once(pair):
    with pytest.raises(RuntimeError, match="connected already"):
        pair[0].connect([])


def test_names_differ_and_the_host_is_the_same(pair):
    assert pair[0].name != pair[1].name
    assert pair[0].host == pair[1].host != b""
