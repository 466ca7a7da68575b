"""An engine that only records what it is told, so that a communicator needs no MPI."""

from __future__ import annotations

OK = 0


class InPlaceType:
    """Stands for mpi4py's constant, which cannot be had without starting MPI."""


IN_PLACE = InPlaceType()


class FakeOperation:
    def __init__(self, seq):
        self.seq = seq
        self.status = OK
        self.contributors = (0, 1, 2, 3)
        self.epoch = 0
        self.failed = ()
        self.message = ""
        self.is_stable = False

    def stable(self):
        return self.is_stable


class FakeEngine:
    """Rank 1 of 4. Records what is started; operations complete when the test says so."""

    def __init__(self, comm, config):
        self.comm = comm
        self.config = config
        self.rank, self.size = 1, 4
        self.alive = (0, 1, 2, 3)
        self.epoch = 0
        self.fault_tolerant = True
        self.started = []
        self.lengths = []  # of the vector forms
        self.deadlines = []
        self.agreed = []
        self.waits = []
        self.finalized = []
        self.abandoned = False
        self.complete = True
        self.status = {}

    def start(
        self, kind, dtype, redop, root, count, send_address, recv_address, flags, keep,
        lengths=None, function=None, agreed=0, timeout_s=None,
        deadline_s=None,
    ):  # fmt: skip
        self.started.append(
            (kind, dtype, redop, root, count, send_address, recv_address, flags, keep)
        )
        self.deadlines.append(deadline_s)
        self.agreed.append(agreed)
        self.lengths.append(None if lengths is None else (*lengths, agreed))
        operation = FakeOperation(len(self.started) - 1)
        for name, value in self.status.items():
            setattr(operation, name, value)
        return operation

    def wait(self, operation, timeout_s):
        self.waits.append(timeout_s)
        if isinstance(self.complete, BaseException):
            raise self.complete
        return self.complete

    def test(self, operation):
        return self.complete

    def awaited(self, operation):
        return (3,)

    def describe(self):
        return "rank 1"

    def flight(self):
        return []

    def counters(self):
        return {"ballots": 2}

    def finalize(self, timeout_s):
        self.finalized.append(timeout_s)
        return self.complete

    def abandon(self):
        self.abandoned = True


def engine_of(comm):
    return comm._engine


def address_of(a):
    return a.__array_interface__["data"][0]
