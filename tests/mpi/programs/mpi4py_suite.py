"""mpi4py's own tests of its collectives, with hopcoll's communicators in the place of mpi4py's.

    hopcoll run -n 3 -m tests.mpi.programs.mpi4py_suite PATH/TO/mpi4py-VERSION/test

Each rank prints a line of JSON: how many cases ran, and the names of those that failed. What does
not apply is left out by name, with its reason.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import unittest
from collections.abc import Iterator
from typing import Any

from mpi4py import MPI

import hopcoll

MODULES = ("test_cco_buf", "test_cco_vec", "test_cco_nb_buf", "test_cco_nb_vec", "test_cco_obj")

#: Cases that do not apply, by name: why.
NOT_APPLICABLE = {
    "testBcastTypeIndexed": "derived datatypes are refused: buffers are contiguous",
    "testAlltoallw": "Alltoallw takes a datatype for each block, and is not part of the family",
    "testAlltoallw2": "Alltoallw takes a datatype for each block, and is not part of the family",
    "testAlltoallwBottom": "Alltoallw takes a datatype for each block, and addresses from BOTTOM",
    **{
        f"TestCCOObj{of}.testReduce": "asks for MPI.Exception where the root is out of range"
        for of in ("Self", "World", "SelfDup", "WorldDup")
    },
}
#: Arrays that do not apply: why.
ARRAYS = ("ArrayArray", "ArrayNumPy")  # the others stand for memory of a GPU, and for DLPack
TYPECODES_LEFT_OUT = "gG"  # long double is not among the dtypes of the kernels


def applicable(arrayimpl: Any) -> Any:
    every = arrayimpl.loop

    def loop(*args: Any) -> Iterator[Any]:
        for item in every(*args):
            if item[0].__name__ in ARRAYS and item[1] not in TYPECODES_LEFT_OUT:
                yield item

    return loop


def main() -> int:
    sys.path.insert(0, sys.argv[1])
    arrayimpl = importlib.import_module("arrayimpl")
    arrayimpl.loop = applicable(arrayimpl)
    world = hopcoll.init(timeout_s=60)
    alone = hopcoll.Communicator(MPI.COMM_SELF, timeout_s=60)
    suite = unittest.TestSuite()
    left_out = 0
    for name in MODULES:
        module = importlib.import_module(name)
        for case in vars(module).values():
            if not (isinstance(case, type) and issubclass(case, unittest.TestCase)):
                continue
            if not hasattr(case, "COMM"):
                continue
            of = alone if "Self" in case.__name__ else world
            case.COMM = of
            if "Dup" in case.__name__:  # these duplicate one of mpi4py's; their tearDown frees it
                case.setUp = lambda self, of=of: setattr(self, "COMM", of.Dup())
            for test in unittest.TestLoader().loadTestsFromTestCase(case):
                method = test.id().rsplit(".", 1)[1]
                if {method, f"{case.__name__}.{method}"} & NOT_APPLICABLE.keys():
                    left_out += 1
                else:
                    suite.addTest(test)
    result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    failed = [test.id() for test, _ in result.failures + result.errors]
    seen = {"rank": world.rank, "ran": result.testsRun, "failed": failed, "left_out": left_out}
    seen["skipped"] = len(result.skipped)
    os.write(1, (json.dumps(seen) + "\n").encode())
    for _, text in (result.failures + result.errors)[:3]:
        print(text, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
