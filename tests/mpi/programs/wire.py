"""A plain TCP transfer: `receive ADDRESS`, then `send ADDRESS PORT BYTES`. No MPI.

The receiver prints its port, and at the end how many bytes came in how many seconds, counted from
when they began to be sent (all hosts have one clock): a receiver that looks late makes none faster.
The first MiB does not count, as the buffers on the way swallow it.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time

SKIPPED_BYTES = 1 << 20

if sys.argv[1] == "send":
    with socket.create_connection((sys.argv[2], int(sys.argv[3])), timeout=20) as line:
        line.sendall(bytes(SKIPPED_BYTES))
        line.sendall(struct.pack("d", time.monotonic()) + bytes(int(sys.argv[4]) - SKIPPED_BYTES))
else:
    with socket.create_server((sys.argv[2], 0)) as server:
        server.settimeout(20)
        print(server.getsockname()[1], flush=True)
        line, _ = server.accept()
    line.settimeout(20)
    head = bytearray()
    received, end_s = 0, 0.0
    while block := line.recv(1 << 16):
        received += len(block)
        end_s = time.monotonic()
        if len(head) < SKIPPED_BYTES + 8:
            head += block
    (begin_s,) = struct.unpack_from("d", head, SKIPPED_BYTES)
    print(json.dumps({"bytes": received - SKIPPED_BYTES, "seconds": end_s - begin_s}))
