"""One rank's part in scenarios of the transport contract, over MPI: argv names them. With
``context`` first, over a context whose ranks are numbered the other way round.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from mpi4py import MPI

from cython_kernels._probe import Probe
from cython_kernels.mpi_transport import MpiTransport
from hopcoll._contexts import ContextPort
from tests.transport_contract import DIE, SCENARIOS, Rank

TIMEOUT_S = 60.0


def play(rank: Rank, name: str) -> None:
    until_s = time.monotonic() + TIMEOUT_S
    for action in SCENARIOS[name].program(rank):
        if action == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        assert time.monotonic() < until_s, f"rank {rank.rank} waits in {name} for ever"
        os.sched_yield()


def main() -> None:
    hello = b"hello of rank %d" % MPI.COMM_WORLD.rank
    transport = MpiTransport(MPI.COMM_WORLD, 8192, TIMEOUT_S, hello)
    assert transport.hellos == [b"hello of rank %d" % peer for peer in range(transport.size)]
    assert transport.fault_tolerant
    names = sys.argv[1:]
    port: ContextPort | MpiTransport = transport
    if names[0] == "context":
        port = ContextPort(transport, list(range(transport.size))[::-1])
        names = names[1:]
        assert Probe(port).rank == transport.size - 1 - transport.rank
    probe = Probe(port)
    rank = Rank(probe)
    for name in names:
        play(rank, name)
    assert (transport.error_class, transport.error_peer) == (0, -1)
    assert probe.poll() is None
    assert transport.close(5.0)
    assert transport.close(0.0)
    # Closed, the table does nothing, and a data request is lost.
    for peer in rank.peers:
        probe.send_control(peer, b"late")
    assert probe.poll() is None
    os.write(1, f"rank {rank.rank} played {' '.join(names)}\n".encode())


main()
