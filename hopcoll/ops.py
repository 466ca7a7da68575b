"""The reduction operations, and which dtype each of them takes.

``hopcoll.SUM`` and the others name an operation; mpi4py's ``MPI.SUM`` and the others are accepted
in their place. `AVG` is ours: the sum divided by the number of ranks that contributed, so that a
mean stays a mean when a rank is lost.
"""

from __future__ import annotations

from typing import Any

from cython_kernels import reduction

__all__ = [
    "AVG",
    "BAND",
    "BOR",
    "BXOR",
    "LAND",
    "LOR",
    "LXOR",
    "MAX",
    "MIN",
    "PROD",
    "SUM",
    "Op",
    "resolve",
]


class Op:
    """A reduction operation: a name and the kernels' code for it. Immutable; one object each.

    Attributes
    ----------
    name : str
        ``"SUM"``, ``"AVG"``, ...
    code : int
        The code of `cython_kernels.reduction`.
    """

    __slots__ = ("code", "name")

    name: str
    code: int

    def __init__(self, name: str, code: int) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "code", code)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Op is immutable: {name} cannot be set")

    def __repr__(self) -> str:
        return f"hopcoll.{self.name}"

    def __reduce__(self) -> str:
        return self.name  # pickles as the module's own object, so that `is` holds after a trip


SUM = Op("SUM", reduction.SUM)
PROD = Op("PROD", reduction.PROD)
MIN = Op("MIN", reduction.MIN)
MAX = Op("MAX", reduction.MAX)
LAND = Op("LAND", reduction.LAND)
LOR = Op("LOR", reduction.LOR)
LXOR = Op("LXOR", reduction.LXOR)
BAND = Op("BAND", reduction.BAND)
BOR = Op("BOR", reduction.BOR)
BXOR = Op("BXOR", reduction.BXOR)
AVG = Op("AVG", reduction.AVG)

_MPI_NAMES = ("SUM", "PROD", "MIN", "MAX", "LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR")
_ALL_NAMES = ", ".join((*_MPI_NAMES, "AVG"))


def resolve(op: Any) -> Op:
    """Turn what a caller passed as ``op`` into one of this module's operations.

    Local.

    Parameters
    ----------
    op : Op or mpi4py.MPI.Op
        An operation of this module or its predefined counterpart of MPI.

    Returns
    -------
    Op

    Raises
    ------
    TypeError
        It is neither, or an operation of MPI that has no counterpart here (MINLOC, MAXLOC,
        REPLACE, NO_OP, or one made by ``MPI.Op.Create``).
    """
    if type(op) is Op:
        return op
    # An operation of mpi4py can only be here if mpi4py.MPI is loaded already.
    kind = type(op)
    if kind.__name__ == "Op" and kind.__module__ == "mpi4py.MPI":
        from mpi4py import MPI

        for name in _MPI_NAMES:
            if op == getattr(MPI, name):
                ours: Op = globals()[name]
                return ours
        raise TypeError(f"op {op!r} of MPI is not supported; there are {_ALL_NAMES}")
    raise TypeError(f"op must be one of {_ALL_NAMES} of hopcoll or of MPI, not {op!r}")
