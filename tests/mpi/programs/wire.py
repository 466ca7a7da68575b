"""A plain TCP transfer: `receive ADDRESS`, then `send ADDRESS PORT BYTES`. No MPI.

The receiver prints its port, and at the end how many bytes came in how many seconds: from the end
of the first MiB, which the buffers on the way swallow, to the last byte.
"""

from __future__ import annotations

import json
import socket
import sys
import time

SKIPPED_BYTES = 1 << 20

if sys.argv[1] == "send":
    with socket.create_connection((sys.argv[2], int(sys.argv[3])), timeout=20) as line:
        line.sendall(bytes(int(sys.argv[4])))
else:
    with socket.create_server((sys.argv[2], 0)) as server:
        server.settimeout(20)
        print(server.getsockname()[1], flush=True)
        line, _ = server.accept()
    line.settimeout(20)
    received = counted = 0
    begin_s = end_s = 0.0
    while block := line.recv(1 << 16):
        received += len(block)
        end_s = time.monotonic()
        if not begin_s and received >= SKIPPED_BYTES:
            begin_s, counted = end_s, received
    print(json.dumps({"bytes": received - counted, "seconds": end_s - begin_s}))
