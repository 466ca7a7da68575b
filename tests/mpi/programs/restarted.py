"""A job that counts its steps in the file argv[1], and goes on from there when it is restarted.

The first start goes on until it is ended from outside, a later one makes ten steps more. Rank 0
says where each began, where it ended, and which hosts were in it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import numpy as np

import hopcoll
from hopcoll.restarts import tell_progress

comm = hopcoll.init()
restart = int(os.environ["HOPCOLL_RESTART"])
file = Path(sys.argv[1])
began = int(file.read_text()) if file.exists() else 0
hosts = comm.allgather(socket.gethostname())
total, step, right = np.empty(1), began, True
while not restart or step < began + 10:
    step += 1
    outcome = comm.Allreduce(np.ones(1), total)
    right &= total[0] == len(outcome.contributors)
    if comm.rank == outcome.contributors[0]:
        file.with_suffix(".new").write_text(str(step))
        os.replace(file.with_suffix(".new"), file)
        tell_progress(step)
    if not restart and comm.rank == 0 and step == 20:
        print(json.dumps({"runs": True}), flush=True)
if comm.rank == 0:
    said = {"restart": restart, "began": began, "ended": step, "right": bool(right)}
    who = {"hosts": sorted(set(filter(None, hosts))), "ranks": comm.size}
    print(json.dumps({**said, **who}), flush=True)
