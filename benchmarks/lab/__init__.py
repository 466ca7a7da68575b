"""A lab: several hosts on one machine, as network namespaces with rate-limited links.

::

    python -m benchmarks.lab up --hosts 8 --rate 1gbit       build it
    python -m benchmarks.lab run -n 8 train.py               `hopcoll run` over its hosts
    python -m benchmarks.lab cable 3 pull                    pull a cable, plug it again
    python -m benchmarks.lab lose 3                          lose all processes of a host
    python -m benchmarks.lab down                            take it down
    python -m benchmarks.lab.collectives --hosts 8           a benchmark, in a lab of its own
    python -m benchmarks.lab.objects --hosts 8               another one, of objects
    python -m benchmarks.lab.peers --hosts 8                 both beside mpi4py, Gloo and Ray

A host is a network namespace with a name and an address of its own; its cable is a veth pair into
one bridge, and each end lets out so much by a token bucket (tbf), so a link is full duplex::

    hoplab-1  eth0 ---- hoplabv1 |
    hoplab-2  eth0 ---- hoplabv2 | hoplab (bridge; this machine itself has no address on it)
    hoplab-3  eth0 ---- hoplabv3 |

The hosts share this machine's processors, memory, files and clock. It needs root, iproute2 and a
kernel with tbf. The modules: `network` makes and removes the hosts, `state` remembers them between
two commands, `cluster` has `Lab`, which is what tests use.
"""

from benchmarks.lab.cluster import Lab
from benchmarks.lab.network import LabError

__all__ = ["Lab", "LabError"]
