"""Large operations of more ranks than a chain is for, and a death in the middle of one:
``many.py DEAD``."""

from __future__ import annotations

import json
import os
import signal
import sys

import numpy as np

import hopcoll
from hopcoll._shapes import twin_tree

COUNT = 150_001


def given(rank: int, k: int) -> np.ndarray:
    """Numbers whose sum depends on the brackets."""
    return np.random.default_rng([rank, k]).standard_normal(COUNT, np.float32)


def folded(k: int, contributors: list[int], outer: int) -> np.ndarray:
    """The sum in the brackets of the two trees, each of half of the items."""
    halves = slice(0, COUNT // 2), slice(COUNT // 2, COUNT)
    out = np.empty(COUNT, np.float32)
    for shift, half in enumerate(halves):
        tree = twin_tree(contributors, outer, shift)

        def below(rank: int, half: slice = half, tree: dict = tree) -> np.ndarray:
            _, left, right, _ = tree[rank]
            value = given(rank, k)[half]
            if left >= 0:
                value = below(left) + value
            return value + below(right) if right >= 0 else value

        out[half] = below(next(rank for rank in contributors if tree[rank][0] < 0))
    return out


def main(dead: int) -> None:
    comm = hopcoll.init()
    right, who = [], []
    for k in range(3):
        root = (5 * k + 2) % comm.size
        result = np.empty(COUNT, np.float32)
        if k == 1 and comm.rank == dead:
            comm.Iallreduce(given(comm.rank, k), result)
            os.kill(os.getpid(), signal.SIGKILL)
        outcome = comm.Allreduce(given(comm.rank, k), result)
        contributors = list(outcome.contributors)
        who.append(contributors)
        right.append(np.array_equal(result, folded(k, contributors, -1)))
        copy = given(root, k) if comm.rank == root else np.empty(COUNT, np.float32)
        comm.Bcast(copy, root=root)
        right.append(np.array_equal(copy, given(root, k)))
        total = np.empty(COUNT, np.float32) if comm.rank == root else None
        outcome = comm.Reduce(given(comm.rank, k), total, root=root)
        if comm.rank == root:
            right.append(np.array_equal(total, folded(k, list(outcome.contributors), root)))
    print(json.dumps({"rank": comm.rank, "right": all(right), "contributors": who}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
