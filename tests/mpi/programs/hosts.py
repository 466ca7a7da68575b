"""Allreduces over several hosts, in which the ranks of argv[1] die: at step 5, one step apart."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

import numpy as np

import hopcoll

COUNT = 1 << 18

comm = hopcoll.init()
victims = [int(word) for word in sys.argv[1].split(",") if word]
total = np.empty(COUNT)
right = True
for step in range(12):
    if comm.rank in victims and step == 5 + victims.index(comm.rank):
        os.kill(os.getpid(), signal.SIGKILL)
    outcome = comm.Allreduce(np.full(COUNT, comm.rank + 1.0), total)
    right &= bool((total == sum(rank + 1 for rank in outcome.contributors)).all())
report = {"rank": comm.rank, "host": socket.gethostname(), "right": right}
print(json.dumps({**report, "who": outcome.contributors}), flush=True)
