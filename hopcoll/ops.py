"""The reduction operations, and which dtype each of them takes.

``hopcoll.SUM`` and the others name an operation; mpi4py's ``MPI.SUM`` and the others are accepted
in their place. `AVG` is ours: the sum divided by the number of ranks that contributed, so that a
mean stays a mean when a rank is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

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


#: The code of all operations of the user's.
USER_OP: Final = 12


class Op:
    """A reduction operation: a name and the engine's code for it. Immutable; one object each.

    Attributes
    ----------
    name : str
        ``"SUM"``, ``"AVG"``, ...; of an operation of the user's the name of its function.
    code : int
        The code of `cython_kernels.reduction`, or that of the user's operations.
    function : callable or None
        What combines two arrays, in an operation of the user's.
    commute : bool
        Whether ``a op b`` is ``b op a``.
    """

    __slots__ = ("code", "commute", "function", "name")

    name: str
    code: int
    function: Callable[[Any, Any], Any] | None
    commute: bool

    def __init__(
        self,
        name: str,
        code: int,
        function: Callable[[Any, Any], Any] | None = None,
        commute: bool = True,
    ) -> None:
        store = object.__setattr__
        store(self, "name", name)
        store(self, "code", code)
        store(self, "function", function)
        store(self, "commute", commute)

    @staticmethod
    def Create(function: Callable[[Any, Any], Any], commute: bool = False) -> Op:
        """Make an operation of a function over arrays. Local.

        Parameters
        ----------
        function : callable
            Takes two arrays of one dimension and equal length, of the dtype of the operation, and
            gives their combination, item by item; the first holds lower ranks. It must be
            associative, give equal bits for equal items wherever an array is cut, and leave its
            arguments alone: they are read-only. A `numpy.ufunc` writes to its place at once;
            anything else makes a new array for each chunk (64 KiB) of each partial sum. It is
            called with the GIL, so a rank that keeps the GIL holds up those behind it.
        commute : bool, default False
            Whether the operands can be swapped. If not, the fold goes in the order of the ranks,
            one block from end to end instead of several side by side.

        Returns
        -------
        Op
            Ranks have to use functions of the same qualified name in one operation. A function
            that raises makes the call at that rank raise the same, and the rank leave the
            communicator: the others go on without it.

        Raises
        ------
        TypeError
            `function` cannot be called.

        References
        ----------
        MPI 4.1, section 6.9.5.

        Examples
        --------
        >>> hypot = hopcoll.Op.Create(np.hypot, commute=True)  # doctest: +SKIP
        """
        if not callable(function):
            raise TypeError(f"function must be callable, not {function!r}")
        name = getattr(function, "__qualname__", None) or getattr(
            function, "__name__", type(function).__name__
        )
        return Op(str(name), USER_OP, function, bool(commute))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Op is immutable: {name} cannot be set")

    def __repr__(self) -> str:
        return f"hopcoll.{self.name}" if self.function is None else f"<hopcoll.Op {self.name}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        if self.function is not None:
            return Op.Create, (self.function, self.commute)
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
        REPLACE, NO_OP, or one made by ``MPI.Op.Create``: use `Op.Create`).
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
