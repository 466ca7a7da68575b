"""A rank that comes late to the first contacts, several transports at once, and bad arguments."""

from __future__ import annotations

import os
import time

import pytest
from mpi4py import MPI

from cython_kernels._probe import Probe
from cython_kernels.mpi_transport import MpiTransport

comm = MPI.COMM_WORLD

with pytest.raises(ValueError, match="control_bytes_max"):
    MpiTransport(comm, 4, 10.0, b"hello")
with pytest.raises(TypeError, match="comm"):
    MpiTransport(None, 64, 10.0, b"hello")

# Two transports live side by side; also on a communicator of some of the ranks, and of one.
pair = comm.Split(comm.rank // 2, comm.rank)
transports = [MpiTransport(comm, 64, 60.0, b"1"), MpiTransport(pair, 64, 60.0, b"22")]
for transport, other in zip(transports, (comm, pair)):
    assert (transport.rank, transport.size) == (other.rank, other.size)
    probe = Probe(transport)
    dest = (other.rank + 1) % other.size
    if dest != other.rank:
        probe.send_control(dest, b"to %d" % dest, b" of %d" % other.size)
        until_s = time.monotonic() + 60
        while (event := probe.poll()) is None:
            assert time.monotonic() < until_s
        source = (other.rank - 1) % other.size
        assert event == ("control", source, b"to %d of %d" % (other.rank, other.size))
    else:
        assert probe.poll() is None
    probe.send_control(dest, b"x" * 65) if dest != other.rank else None
    assert (transport.error_class != 0) == (dest != other.rank)
assert all(transport.close(5.0) for transport in transports)

# The last rank does not come within the time; the others say so and go on.
late = comm.size - 1
if comm.rank != late:
    begin_s = time.monotonic()
    with pytest.raises(TimeoutError, match="within 0.3 s"):
        MpiTransport(comm, 64, 0.3, b"")
    assert 0.3 <= time.monotonic() - begin_s < 10
    comm.send(None, dest=late, tag=1)
else:
    for source in range(late):
        comm.recv(source=source, tag=1)
os.write(1, f"rank {comm.rank} left\n".encode())
