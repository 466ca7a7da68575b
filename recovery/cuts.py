"""Arrays that are cut over ranks: which rank has what, and who needs what of whom. Pure.

An axis of a global array is cut into *spans*, (start, stop), one for each rank that has a piece.
Saved by N ranks and restored by M, along the same axis or another, it is cut anew: `portion` says
where a saved piece and a wanted one overlap.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Cut", "Span", "join_pieces", "overlap", "portion", "spans_evenly", "spans_from"]

#: The part of an axis from its first index to the one after its last.
Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Cut:
    """A rank's piece of an array that is cut over the ranks of a store's communicator.

    In a state it stands where the array would; a restore puts one in its place. Each rank gives a
    piece of the same dtype, as long as the others in all axes but one. The pieces are saved once
    and never joined; a checkpoint restores on any number of ranks.

    Parameters
    ----------
    array : ndarray
        The piece. May be empty.
    axis : int, default 0
        Along which the array is cut; alike at all ranks.
    offset : int, optional
        Where the piece begins on that axis; all ranks give one or none does. Without it the pieces
        follow one another in the order of ranks.
    length : int, optional
        How long the global axis is. With it, a save knows whether a piece is missing because its
        rank died after the array was cut. Without it, a save takes a rank that died since the last
        restore for one that had a piece, and does not commit. A Cut that was restored has one.
    """

    array: np.ndarray
    axis: int = 0
    offset: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.array, np.ndarray):
            raise TypeError(f"array of a Cut must be an ndarray, not {type(self.array).__name__}")
        if not self.array.ndim:
            raise ValueError("array of a Cut has no axis to be cut along")
        axis = operator.index(self.axis)
        if not -self.array.ndim <= axis < self.array.ndim:
            raise ValueError(f"axis of a Cut must be one of {self.array.ndim} axes, not {axis}")
        object.__setattr__(self, "axis", axis % self.array.ndim)
        if self.offset is not None and operator.index(self.offset) < 0:
            raise ValueError(f"offset of a Cut must be 0 or more, not {self.offset}")


def join_pieces(
    name: str, pieces: Sequence[tuple[int, tuple[int, ...], int | None, int | None]], axis: int
) -> tuple[tuple[int, ...], dict[int, Span]]:
    """Find the global shape of a cut array, and each rank's span.

    Parameters
    ----------
    name : str
        For the errors.
    pieces : sequence of (rank, shape, offset or None, length or None)
        In the order of ranks.
    axis : int

    Returns
    -------
    shape : tuple of int
    spans : dict of int to (int, int)

    Raises
    ------
    ValueError
        The pieces do not fit together; alike at all ranks, since all know all of them.
    """
    first = pieces[0]
    for rank, shape, _, length in pieces:
        if length != first[3]:
            raise ValueError(
                f"Cut {name}: ranks {first[0]} and {rank} give different lengths: {first[3]} and "
                f"{length}"
            )
        others = [extent for i, extent in enumerate(shape) if i != axis]
        if others != [extent for i, extent in enumerate(first[1]) if i != axis]:
            raise ValueError(
                f"Cut {name}: the pieces of ranks {first[0]} and {rank} differ in more than axis "
                f"{axis}: {first[1]} and {shape}"
            )
    given = [offset is not None for _, _, offset, _ in pieces]
    if any(given) and not all(given):
        missing = pieces[given.index(False)][0]
        raise ValueError(f"Cut {name}: rank {missing} gives no offset, but others do")
    spans: dict[int, Span] = {}
    end = 0
    for rank, shape, offset, _ in pieces:
        start = end if offset is None else offset
        spans[rank] = (start, start + shape[axis])
        end += shape[axis]
    end = 0
    for start, stop in sorted(span for span in spans.values() if span[0] < span[1]):
        if start != end:
            wrong = "overlap" if start < end else "leave a gap"
            raise ValueError(f"Cut {name}: the pieces {wrong} at {min(start, end)} of axis {axis}")
        end = stop
    if first[3] not in (None, end):
        raise ValueError(f"Cut {name}: the pieces end at {end} of {first[3]} on axis {axis}")
    shape = (*first[1][:axis], end, *first[1][axis + 1 :])
    return shape, spans


def spans_evenly(length: int, count: int) -> list[Span]:
    """Cut an axis into `count` spans that differ by one at the most, the longer ones first."""
    each, more = divmod(length, count)
    starts = [i * each + min(i, more) for i in range(count + 1)]
    return list(zip(starts, starts[1:], strict=False))


def spans_from(name: str, offsets: Sequence[int], length: int, count: int) -> list[Span]:
    """Return the spans that begin at `offsets`, each up to the next one, the last to the end.

    Raises
    ------
    ValueError
        They are not as many as the ranks, do not begin with 0, fall, or are past the end.
    """
    starts = [operator.index(offset) for offset in offsets]
    if len(starts) != count:
        raise ValueError(f"cut of {name} has {len(starts)} offsets for {count} ranks")
    ends = [*starts[1:], length]
    if starts[0] != 0 or any(a > b for a, b in zip(starts, ends, strict=True)):
        raise ValueError(f"cut of {name}: offsets must rise from 0 to {length} at most: {starts}")
    return list(zip(starts, ends, strict=True))


def overlap(one: Span, other: Span) -> Span:
    """Return what two spans have in common; empty where they have nothing."""
    start = max(one[0], other[0])
    return start, max(start, min(one[1], other[1]))


def portion(
    shape: tuple[int, ...], piece: tuple[int, Span], wanted: tuple[int, Span]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Find what a piece has of what is wanted.

    Parameters
    ----------
    shape : tuple of int
        Of the global array.
    piece, wanted : (axis, span)
        Both have all of the array in every other axis.

    Returns
    -------
    (tuple of slice, tuple of slice) or None
        Where it is in the piece, and where it goes in what is wanted; None where there is nothing.
    """
    source, target = [], []
    for axis, extent in enumerate(shape):
        held = piece[1] if axis == piece[0] else (0, extent)
        asked = wanted[1] if axis == wanted[0] else (0, extent)
        start, stop = overlap(held, asked)
        if start == stop:
            return None
        source.append(slice(start - held[0], stop - held[0]))
        target.append(slice(start - asked[0], stop - asked[0]))
    return tuple(source), tuple(target)


def piece_shape(shape: tuple[int, ...], axis: int, span: Span) -> tuple[int, ...]:
    """Return the shape of the piece of a global array that has this span of an axis."""
    return (*shape[:axis], span[1] - span[0], *shape[axis + 1 :])


def checked_target(name: str, target: Any, axes: int) -> tuple[int, Sequence[int] | None] | None:
    """Check how a caller wants an array: None for all of it, an axis, or (axis, offsets)."""
    if target is None:
        return None
    axis, offsets = target if isinstance(target, tuple) else (target, None)
    axis = operator.index(axis)
    if not -axes <= axis < axes:
        raise ValueError(f"cut of {name}: axis must be one of {axes} axes, not {axis}")
    return axis % axes, offsets
