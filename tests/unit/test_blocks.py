"""Blocks: how a caller's argument is cut into one block for each rank, and what is refused."""

from __future__ import annotations

import array
import re

import ml_dtypes
import numpy as np
import pytest

from cython_kernels import reduction
from hopcoll import buffers
from hopcoll.buffers import parse, parse_blocks

TWELVE = np.arange(12.0)


def blocks_of(spec, ranks, *, equal, writable=True):
    return parse_blocks(spec, "buf", ranks, writable=writable, equal=equal)


def address_of(a):
    return a.__array_interface__["data"][0]


def where(blocks):
    """(first item, number of items) of each block, in items of the datatype."""
    item_bytes = blocks.buffer.dtype.itemsize
    assert not (blocks.at % item_bytes).any()
    assert not (blocks.nbytes % item_bytes).any()
    return list(
        zip((blocks.at // item_bytes).tolist(), (blocks.nbytes // item_bytes).tolist(), strict=True)
    )


def test_the_fields():
    blocks = blocks_of(TWELVE, 3, equal=True)
    assert blocks.buffer == parse(TWELVE, "buf", writable=True)
    assert blocks.buffer.array is TWELVE
    assert blocks.at.dtype == blocks.nbytes.dtype == np.int64
    assert blocks.at.tolist() == [0, 32, 64]
    assert blocks.nbytes.tolist() == [32, 32, 32]
    assert blocks.item_bytes == 8


# ---- blocks of equal length -------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (12, 1)])
def test_an_array_in_equal_blocks(ranks, shape):
    a = np.zeros(shape, "f4")
    items = 12 // ranks
    assert where(blocks_of(a, ranks, equal=True)) == [(i * items, items) for i in range(ranks)]


@pytest.mark.parametrize(
    ("spec", "ranks", "blocks"),
    [
        ([TWELVE], 2, [(0, 6), (6, 6)]),
        ([TWELVE, None], 2, [(0, 6), (6, 6)]),
        ([TWELVE, 4], 3, [(0, 4), (4, 4), (8, 4)]),
        ((TWELVE, 4), 3, [(0, 4), (4, 4), (8, 4)]),
        ([TWELVE, np.int64(2)], 3, [(0, 2), (2, 2), (4, 2)]),
        ([TWELVE, 0], 3, [(0, 0), (0, 0), (0, 0)]),
        ([TWELVE, (2, 6)], 3, [(6, 2), (8, 2), (10, 2)]),
        ([TWELVE, [2, 6]], 3, [(6, 2), (8, 2), (10, 2)]),
        ([TWELVE, (2, None)], 3, [(0, 2), (2, 2), (4, 2)]),
        ([TWELVE, (None, 3)], 3, [(3, 3), (6, 3), (9, 3)]),
        ([TWELVE, (None, 12)], 3, [(12, 0), (12, 0), (12, 0)]),
        ([TWELVE, (0, 12)], 3, [(12, 0), (12, 0), (12, 0)]),
        ([TWELVE, "f8"], 2, [(0, 6), (6, 6)]),
        ([TWELVE, "f4"], 2, [(0, 12), (12, 12)]),
        ([TWELVE, 3, "f8"], 2, [(0, 3), (3, 3)]),
        ([TWELVE, (3, 1), "f8"], 2, [(1, 3), (4, 3)]),
        ([TWELVE, [3, 1], None], 2, [(1, 3), (4, 3)]),
        ([TWELVE, 3, 1, "f8"], 2, [(1, 3), (4, 3)]),
        ([TWELVE, 3, None, "f8"], 2, [(0, 3), (3, 3)]),
        ([TWELVE, None, 2, "f8"], 2, [(2, 5), (7, 5)]),
        ([TWELVE, None, None, None], 1, [(0, 12)]),
        ([bytearray(50), 3, "f8"], 2, [(0, 3), (3, 3)]),
        ([bytearray(50), (1, 2), "f8"], 4, [(2, 1), (3, 1), (4, 1), (5, 1)]),
    ],
)
def test_specifications_of_equal_blocks(spec, ranks, blocks):
    found = blocks_of(spec, ranks, equal=True)
    assert where(found) == blocks
    whole = parse(spec[0], "buf", writable=True)
    assert found.buffer.address == whole.address
    assert found.buffer.nbytes == whole.nbytes


@pytest.mark.parametrize(
    "buf", [np.zeros(0), np.zeros((3, 0), "f4"), bytearray(), np.zeros(0, "S3")]
)
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("equal", [False, True])
def test_an_empty_buffer_has_empty_blocks(buf, ranks, equal):
    assert where(blocks_of(buf, ranks, equal=equal)) == [(0, 0)] * ranks
    assert where(blocks_of([buf, 0], ranks, equal=equal)) == [(0, 0)] * ranks


@pytest.mark.parametrize("equal", [False, True])
def test_one_rank_has_it_all(equal):
    assert where(blocks_of(TWELVE, 1, equal=equal)) == [(0, 12)]
    assert where(blocks_of(np.zeros(()), 1, equal=equal)) == [(0, 1)]
    assert where(blocks_of([TWELVE, 5], 1, equal=equal)) == [(0, 5)]


@pytest.mark.parametrize("spec", [np.zeros(3, "V0"), [np.zeros(3, "V0"), 5]])
@pytest.mark.parametrize("equal", [False, True])
def test_items_of_no_length(spec, equal):
    blocks = blocks_of(spec, 2, equal=equal)
    assert blocks.at.tolist() == blocks.nbytes.tolist() == [0, 0]
    assert blocks.item_bytes == 1


def test_any_number_of_items_of_no_length():
    assert blocks_of([np.zeros(3, "V0"), 2**70], 2, equal=True).nbytes.tolist() == [0, 0]


# ---- datatypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in reduction.DTYPE_NAMES if n != "bytes"])
@pytest.mark.parametrize("equal", [False, True])
def test_every_dtype(name, equal):
    a = np.zeros(6, ml_dtypes.bfloat16 if name == "bfloat16" else name)
    blocks = blocks_of(a, 3, equal=equal)
    assert reduction.DTYPE_NAMES[blocks.buffer.code] == name
    assert blocks.item_bytes == a.itemsize
    assert where(blocks) == [(0, 2), (2, 2), (4, 2)]
    assert where(blocks_of([a, [1, 2, 3]], 3, equal=False)) == [(0, 1), (1, 2), (3, 3)]


@pytest.mark.parametrize("dtype", [">f4", "M8[s]", "S5", [("a", "i4"), ("b", "f8")]])
def test_other_dtypes_are_cut_between_items_and_counted_in_bytes(dtype):
    a = np.zeros(6, dtype)
    for spec, equal in [(a, True), (a, False), ([a, 2], True), ([a, [2, 2, 2]], False)]:
        blocks = blocks_of(spec, 3, equal=equal)
        assert (blocks.buffer.code, blocks.buffer.items) == (reduction.BYTES, a.nbytes)
        assert blocks.item_bytes == 1
        assert where(blocks) == [(0, 2), (2, 2), (4, 2)]
    # 60 bytes could be divided by 4, but no block may end inside an item.
    with pytest.raises(ValueError, match="^buf has 6 items"):
        blocks_of(a, 4, equal=True)
    assert where(blocks_of(a, 4, equal=False)) == [(0, 2), (2, 2), (4, 1), (5, 1)]


@pytest.mark.parametrize("equal", [False, True])
def test_the_buffer_is_counted_in_items_of_the_datatype_that_was_asked_for(equal):
    blocks = blocks_of([bytearray(83), 2, "f8"], 3, equal=equal)
    assert blocks.buffer.nbytes == 83
    assert blocks.buffer.items == 10
    assert blocks.buffer.dtype == np.float64
    assert reduction.DTYPE_NAMES[blocks.buffer.code] == "float64"
    opaque = blocks_of([bytearray(83), 2, ">f8"], 3, equal=equal).buffer
    assert (opaque.code, opaque.items) == (reduction.BYTES, 83)


# ---- vector forms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "ranks", "blocks"),
    [
        (TWELVE, 3, [(0, 4), (4, 4), (8, 4)]),
        (TWELVE, 5, [(0, 3), (3, 3), (6, 2), (8, 2), (10, 2)]),
        (TWELVE[:2], 4, [(0, 1), (1, 1), (2, 0), (2, 0)]),
        (bytearray(5), 2, [(0, 3), (3, 2)]),
        ([TWELVE], 5, [(0, 3), (3, 3), (6, 2), (8, 2), (10, 2)]),
        ([TWELVE, None], 5, [(0, 3), (3, 3), (6, 2), (8, 2), (10, 2)]),
        ([TWELVE, "f4"], 5, [(0, 5), (5, 5), (10, 5), (15, 5), (20, 4)]),
        ([TWELVE, [1, 0, 5]], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, [0, 0, 0]], 3, [(0, 0), (0, 0), (0, 0)]),
        ([TWELVE, [12, 0]], 2, [(0, 12), (12, 0)]),
        ([TWELVE, [12]], 1, [(0, 12)]),
        ([TWELVE, np.array([1, 0, 5])], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, np.array([1, 0, 5], "u1")], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, np.array([1, 0, 5], "u8")], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, np.array([1, 0, 5], ">i4")], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, np.array([1, 0, 5], object)], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, np.arange(6)[::2]], 3, [(0, 0), (0, 2), (2, 4)]),
        ([TWELVE, array.array("i", [1, 0, 5])], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, range(3)], 3, [(0, 0), (0, 1), (1, 2)]),
        ([TWELVE, [np.int32(1), np.array(0), True]], 3, [(0, 1), (1, 0), (1, 1)]),
        ([TWELVE, 4], 3, [(0, 4), (4, 4), (8, 4)]),
        ([TWELVE, np.int32(2)], 3, [(0, 2), (2, 2), (4, 2)]),
        ([TWELVE, np.array(2)], 3, [(0, 2), (2, 2), (4, 2)]),
        ([TWELVE, np.array([2])], 1, [(0, 2)]),
        # A pair is what mpi4py takes for counts and displacements together: only a tuple.
        ([TWELVE, ([1, 0, 5], [11, 3, 2])], 3, [(11, 1), (3, 0), (2, 5)]),
        ([TWELVE, ((1, 0, 5), (11, 3, 2))], 3, [(11, 1), (3, 0), (2, 5)]),
        ([TWELVE, (np.array([1, 5]), np.array([11, 2]))], 2, [(11, 1), (2, 5)]),
        ([TWELVE, ([1, 0, 5], None)], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, (3, None)], 3, [(0, 3), (3, 3), (6, 3)]),
        ([TWELVE, (2, 3)], 2, [(0, 2), (3, 2)]),
        ([TWELVE, [2, 3]], 2, [(0, 2), (2, 3)]),
        ([TWELVE, (2, 5)], 3, [(0, 2), (5, 2), (10, 2)]),
        ([TWELVE, ([1, 5, 2], 5)], 3, [(0, 1), (5, 5), (10, 2)]),
        ([TWELVE, (2, [10, 0, 4])], 3, [(10, 2), (0, 2), (4, 2)]),
        ([TWELVE, (None, [8, 4, 0])], 3, [(8, 4), (4, 4), (0, 4)]),
        ([TWELVE, (None, None)], 5, [(0, 3), (3, 3), (6, 2), (8, 2), (10, 2)]),
        ([TWELVE, [1, 0, 5], "f8"], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, [1, 0, 5], None], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, [20, 4], "f4"], 2, [(0, 20), (20, 4)]),
        ([TWELVE, None, "f8"], 5, [(0, 3), (3, 3), (6, 2), (8, 2), (10, 2)]),
        ([TWELVE, ([1, 0, 5], [11, 3, 2]), "f8"], 3, [(11, 1), (3, 0), (2, 5)]),
        ([TWELVE, [1, 0, 5], [11, 3, 2], "f8"], 3, [(11, 1), (3, 0), (2, 5)]),
        ([TWELVE, (1, 0, 5), (11, 3, 2), "f8"], 3, [(11, 1), (3, 0), (2, 5)]),
        ([TWELVE, (1, 0, 5), (11, 3, 2), None], 3, [(11, 1), (3, 0), (2, 5)]),
        ([TWELVE, [1, 0, 5], None, "f8"], 3, [(0, 1), (1, 0), (1, 5)]),
        ([TWELVE, None, [8, 4, 0], "f8"], 3, [(8, 4), (4, 4), (0, 4)]),
        ([TWELVE, 2, 3, "f8"], 3, [(0, 2), (3, 2), (6, 2)]),
        ([bytearray(50), [2, 3], [1, 3], "f8"], 2, [(1, 2), (3, 3)]),
    ],
)
def test_vector_forms(spec, ranks, blocks):
    found = blocks_of(spec, ranks, equal=False)
    assert where(found) == blocks
    assert found.at.dtype == found.nbytes.dtype == np.int64
    whole = parse(spec[0] if isinstance(spec, list) else spec, "buf", writable=True)
    assert found.buffer.address == whole.address
    assert found.buffer.nbytes == whole.nbytes


@pytest.mark.parametrize("far", [13, -1, 2**62, -(2**62), 2**63 - 1])
def test_where_an_empty_block_lies_does_not_matter(far):
    blocks = blocks_of([TWELVE, ([0, 12, 0], [far, 0, far])], 3, equal=False)
    assert blocks.nbytes.tolist() == [0, 96, 0]
    assert blocks.at[1] == 0
    assert 0 <= blocks.at.min() <= blocks.at.max() <= 96


def test_what_is_sent_may_be_the_same_for_several_ranks():
    spec = [TWELVE, ([3, 3, 8], [0, 0, 2])]
    assert where(blocks_of(spec, 3, equal=False, writable=False)) == [(0, 3), (0, 3), (2, 8)]
    assert where(blocks_of([TWELVE, (12, 0)], 2, equal=False, writable=False)) == [(0, 12)] * 2


def test_blocks_do_not_change_with_what_they_were_made_from():
    counts, displs = np.array([1, 2, 3]), np.array([0, 4, 8])
    blocks = blocks_of([bytearray(12), (counts, displs)], 3, equal=False)
    counts[:] = displs[:] = 0
    assert where(blocks) == [(0, 1), (4, 2), (8, 3)]


@pytest.mark.parametrize(
    ("spec", "equal"),
    [
        (TWELVE, True),
        (TWELVE, False),
        ([TWELVE, 2], True),
        ([TWELVE, 2], False),
        ([TWELVE, [1, 2, 3]], False),
        ([TWELVE, ([1, 2, 3], [0, 1, 3])], False),
        ([TWELVE, (None, [0, 4, 8])], False),
    ],
)
def test_blocks_may_be_shared_between_calls_so_nobody_can_write_to_them(spec, equal):
    blocks = blocks_of(spec, 3, equal=equal)
    for numbers in (blocks.at, blocks.nbytes):
        with pytest.raises(ValueError, match="read-only"):
            numbers[0] = 1


# ---- in plain Python --------------------------------------------------------------------------


def plainly(nbytes, item_bytes, counts, displs, ranks):
    """mpi4py's rules for the vector forms, one rank after the other: (first item, items) each."""
    if counts is None:
        items, rest = divmod(nbytes, item_bytes)
        assert not rest
        counts = [items // ranks + (1 if rank < items % ranks else 0) for rank in range(ranks)]
    elif isinstance(counts, int):
        counts = [counts] * ranks
    if displs is None:
        displs = [sum(counts[:rank]) for rank in range(ranks)]
    elif isinstance(displs, int):
        displs = [displs * rank for rank in range(ranks)]
    found = list(zip(displs, counts, strict=True))
    for first, count in found:
        if count and not 0 <= first <= first + count <= nbytes // item_bytes:
            raise ValueError("beyond")
    return found


def clashing(blocks):
    """Whether two blocks share an item, by marking every item."""
    marked = set()
    for first, count in blocks:
        mine = set(range(first, first + count))
        if mine & marked:
            return True
        marked |= mine
    return False


@pytest.mark.parametrize("seed", range(300))
def test_vector_forms_against_plain_python(seed):
    random = np.random.default_rng(seed)
    ranks = int(random.choice([1, 2, 3, 5, 8]))
    items = int(random.integers(0, 30))
    a = np.zeros(items, random.choice(["u1", "f8"]))

    def some(high):
        kind = random.integers(4)
        if kind == 0:
            return None
        if kind == 1:
            return int(random.integers(0, high))
        numbers = random.integers(0, high, ranks)
        return numbers.tolist() if kind == 2 else numbers

    counts, displs = some(2 * items // ranks + 2), some(items + 1)
    typed = random.choice([None, "B", a.dtype.str])
    item_bytes = 1 if typed == "B" else a.itemsize
    spelling = [a, (counts, displs), typed] if random.integers(2) else [a, counts, displs, typed]
    plain = [x.tolist() if isinstance(x, np.ndarray) else x for x in (counts, displs)]
    try:
        expected = plainly(a.nbytes, item_bytes, *plain, ranks)
    except ValueError:
        with pytest.raises(ValueError, match="^buf has .* bytes, and the block of rank"):
            blocks_of(spelling, ranks, equal=False)
        return
    found = where(blocks_of(spelling, ranks, equal=False, writable=False))
    assert [count for _, count in found] == [count for _, count in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == other or not one[1]
    if clashing(expected):
        with pytest.raises(ValueError, match="^buf has blocks that overlap"):
            blocks_of(spelling, ranks, equal=False)
    else:
        assert where(blocks_of(spelling, ranks, equal=False)) == found


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "ranks", "kind", "text"),
    [
        (TWELVE, 5, ValueError, "12 items of float64, which cannot be divided into 5 equal blocks"),
        (bytearray(3), 2, ValueError, "3 items of uint8, which cannot be divided into 2"),
        (np.zeros(()), 2, ValueError, "1 items of float64, which cannot be divided into 2"),
        ([TWELVE], 5, ValueError, "12 items of float64, which cannot be divided into 5"),
        ([TWELVE, "f4"], 5, ValueError, "24 items of float32, which cannot be divided into 5"),
        ([TWELVE, (None, 1)], 3, ValueError, "11 items of float64, which cannot be divided into 3"),
        ([TWELVE, 5], 3, ValueError, "96 bytes, too few for 3 blocks of 5 items of float64 at"),
        ([TWELVE, (4, 1)], 3, ValueError, "too few for 3 blocks of 4 items of float64 at displ"),
        ([TWELVE, 4, 1, "d"], 3, ValueError, "too few for 3 blocks of 4 items of float64 at displ"),
        ([TWELVE, 2**62], 3, ValueError, "too few for 3 blocks"),
        ([TWELVE, (0, 13)], 3, ValueError, "too few for displacement 13 in items of float64"),
        ([TWELVE, (None, 13)], 3, ValueError, "too few for displacement 13 in items of float64"),
        ([TWELVE, -1], 3, ValueError, "negative count: -1"),
        ([TWELVE, (1, -1)], 3, ValueError, "negative displacement: -1"),
        ([TWELVE, (1, 2, 3)], 3, ValueError, "(count, displacement), not 3 numbers"),
        ([TWELVE, [1, 2, 3]], 3, ValueError, "(count, displacement), not 3 numbers"),
        ([TWELVE, np.array([1, 2, 3])], 3, TypeError, "count that is no integer but ndarray"),
        ([TWELVE, 2.0], 3, TypeError, "count that is no integer but float"),
        ([TWELVE, (1, 2), 0, "d"], 3, TypeError, "count that is no integer but tuple"),
        ([bytearray(7), "f8"], 1, ValueError, "no multiple of the 8 bytes"),
    ],
)
def test_wrong_specifications_of_equal_blocks(spec, ranks, kind, text):
    for writable in (False, True):
        with pytest.raises(kind, match="^recvbuf .*" + re.escape(text)):
            parse_blocks(spec, "recvbuf", ranks, writable=writable, equal=True)


def test_what_cannot_be_divided_names_the_cure():
    with pytest.raises(ValueError, match=r"pass a multiple of 5 items, or \[recvbuf, count\]"):
        parse_blocks(TWELVE, "recvbuf", 5, writable=True, equal=True)


@pytest.mark.parametrize(
    ("spec", "ranks", "kind", "text"),
    [
        ([TWELVE, [1, 2]], 3, ValueError, "2 counts for 3 ranks"),
        ([TWELVE, []], 3, ValueError, "0 counts for 3 ranks"),
        ([TWELVE, np.ones(4, int)], 3, ValueError, "4 counts for 3 ranks"),
        ([TWELVE, ([1, 2, 3], [0, 1])], 3, ValueError, "2 displacements for 3 ranks"),
        ([TWELVE, 1, [0, 1, 2, 3], "d"], 3, ValueError, "4 displacements for 3 ranks"),
        ([TWELVE, (1, 2, 3)], 3, ValueError, "pass a list if these are the counts"),
        ([TWELVE, (1,)], 1, ValueError, "pass a list if these are the counts"),
        ([TWELVE, [1, -2, 3]], 3, ValueError, "negative count for rank 1: -2"),
        ([TWELVE, np.array([1, 2, -3])], 3, ValueError, "negative count for rank 2: -3"),
        ([TWELVE, -1], 3, ValueError, "negative count: -1"),
        ([TWELVE, (1, -1)], 3, ValueError, "negative displacement: -1"),
        ([TWELVE, [4, 4, 5]], 3, ValueError, "rank 2 does not lie in them: 5 items of float64 at"),
        ([TWELVE, [13, 0, 0]], 3, ValueError, "96 bytes, and the block of rank 0 does not lie in"),
        ([TWELVE, 5], 3, ValueError, "rank 2 does not lie in them: 5 items of float64 at displace"),
        ([TWELVE, 13], 3, ValueError, "rank 0 does not lie in them: 13 items of float64 at displ"),
        ([TWELVE, (5, 4)], 3, ValueError, "rank 2 does not lie in them: 5 items of float64 at dis"),
        ([TWELVE, ([1, 2], [0, 11])], 2, ValueError, "rank 1 does not lie in them: 2 items of flo"),
        ([TWELVE, ([1, 1], [0, 12])], 2, ValueError, "1 items of float64 at displacement 12"),
        ([TWELVE, ([1, 1], [0, -1])], 2, ValueError, "1 items of float64 at displacement -1"),
        ([TWELVE, [6, 7], "f8"], 2, ValueError, "rank 1 does not lie in them: 7 items of float64"),
        ([TWELVE, [12, 13], "f4"], 2, ValueError, "rank 1 does not lie in them: 13 items of float"),
        ([TWELVE, [2**62, 2**62]], 2, ValueError, "the block of rank 0 does not lie in them"),
        ([TWELVE, ([2**63 - 1, 1], [1, 0])], 2, ValueError, "the block of rank 0 does not lie"),
        ([TWELVE, ([1, 1], [2**63 - 1, 0])], 2, ValueError, "the block of rank 0 does not lie"),
        ([TWELVE, [1, 2**63]], 2, ValueError, "count for rank 1 that is too large"),
        ([TWELVE, np.array([1, 2**63], "u8")], 2, ValueError, "count for rank 1 that is too large"),
        ([TWELVE, ([1, 1], [0, -(2**70)])], 2, ValueError, "displacement for rank 1 that is too"),
        ([TWELVE, 2**63], 2, ValueError, "count that is too large"),
        ([TWELVE, (1, 2**62)], 2, ValueError, "displacement that is too large"),
        ([TWELVE, [1, 2.0]], 2, TypeError, "count for rank 1 that is no integer but float"),
        ([TWELVE, [None, 1]], 2, TypeError, "count for rank 0 that is no integer but NoneType"),
        ([TWELVE, [[1], [1]]], 2, TypeError, "count for rank 0 that is no integer but list"),
        ([TWELVE, np.ones(2)], 2, TypeError, "count for rank 0 that is no integer but float64"),
        ([TWELVE, np.ones(2, bool)], 2, TypeError, "count for rank 0 that is no integer but bool"),
        (
            [TWELVE, np.ones((2, 2), int)],
            2,
            TypeError,
            "count for rank 0 that is no integer but nd",
        ),
        ([TWELVE, ([1, 1], ["0", 1])], 2, TypeError, "displacement for rank 0 that is no integer"),
        ([TWELVE, 2.0], 2, TypeError, "count that is no integer but float"),
        ([TWELVE, (1, 2.0)], 2, TypeError, "displacement that is no integer but float"),
        ([TWELVE, {1, 2}], 2, TypeError, "counts in a set, which is no sequence"),
        ([TWELVE, {"a": 1, "b": 2}], 2, TypeError, "counts in a dict, which is no sequence"),
        ([TWELVE, [1, 1], [0, 1]], 2, TypeError, "where a datatype of MPI is expected"),
        ([bytearray(7), "f8"], 2, ValueError, "no multiple of the 8 bytes"),
        ([bytearray(7), (None, [0, 0]), "f8"], 2, ValueError, "no multiple of the 8 bytes"),
    ],
)
def test_wrong_vector_forms(spec, ranks, kind, text):
    for writable in (False, True):
        with pytest.raises(kind, match="^recvbuf .*" + re.escape(text)):
            parse_blocks(spec, "recvbuf", ranks, writable=writable, equal=False)


@pytest.mark.parametrize(
    ("spec", "first", "second"),
    [
        ([TWELVE, ([3, 3, 3], [0, 2, 6])], 0, 1),
        ([TWELVE, ([3, 3, 3], [6, 0, 2])], 1, 2),
        ([TWELVE, ([3, 3, 3], [4, 8, 4])], 0, 2),
        ([TWELVE, ([1, 0, 12], [11, 5, 0])], 0, 2),
        ([TWELVE, ([12, 1, 0], [0, 5, 5])], 0, 1),
        ([TWELVE, (4, 3)], 0, 1),
        ([TWELVE, (4, 0)], 0, 1),
        ([TWELVE, (None, [0, 8, 5])], 1, 2),
        ([TWELVE, 4, [0, 0, 4], "d"], 0, 1),
    ],
)
def test_blocks_to_be_received_must_not_overlap(spec, first, second):
    text = f"^recvbuf has blocks that overlap: that of rank {first} .* that of rank {second} "
    with pytest.raises(ValueError, match=text):
        parse_blocks(spec, "recvbuf", 3, writable=True, equal=False)
    parse_blocks(spec, "sendbuf", 3, writable=False, equal=False)


@pytest.mark.parametrize(
    "displs", [[0, 4, 8], [8, 4, 0], [4, 0, 8], [0, 0, 4], [4, 6, 0], [4, 4, 0], [4, 8, 0]]
)
def test_empty_blocks_and_neighbours_do_not_overlap(displs):
    counts = [4, 0, 4]
    assert len(where(blocks_of([TWELVE, (counts, displs)], 3, equal=False))) == 3


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("wrap", [lambda buf: buf, lambda buf: [buf, 1], lambda buf: [buf, "f8"]])
def test_all_that_parse_refuses(equal, wrap):
    def refused(buf, kind, text):
        with pytest.raises(kind, match="^recvbuf " + text):
            parse_blocks(wrap(buf), "recvbuf", 2, writable=True, equal=equal)

    frozen = np.zeros(4)
    frozen.flags.writeable = False
    refused(frozen, BufferError, "is read-only")
    refused(b"12345678", BufferError, "is read-only")
    refused(np.zeros(8)[::2], BufferError, "is not contiguous")
    refused(np.zeros(4, object), TypeError, "has dtype object")
    refused(None, TypeError, "must be a NumPy array or offer the buffer protocol")
    refused(3.5, TypeError, "must be a NumPy array or offer the buffer protocol")


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(
    ("spec", "kind", "text"),
    [
        ([], ValueError, "not 0 items"),
        ([TWELVE, 1, 0, "d", 0], ValueError, "not 5 items"),
        ([TWELVE, 1, 7], TypeError, "where a datatype of MPI is expected"),
        ([TWELVE, "no such type"], TypeError, "no predefined basic one"),
        ([[TWELVE], 1], TypeError, "must start with a buffer"),
        ([1.0, 2.0], TypeError, "must be a NumPy array or offer the buffer protocol"),
    ],
)
def test_what_is_no_list_of_the_known_kinds(spec, kind, text, equal):
    with pytest.raises(kind, match="^sendbuf .*" + re.escape(text)):
        parse_blocks(spec, "sendbuf", 2, writable=False, equal=equal)


@pytest.mark.parametrize("equal", [False, True])
def test_read_only_buffers_can_be_sent(equal):
    assert where(blocks_of(b"abcd", 2, equal=equal, writable=False)) == [(0, 2), (2, 2)]


@pytest.mark.parametrize("spec", [0, 1, 2])
def test_the_buffer_stays_exported_as_long_as_the_blocks_are_kept(spec):
    source = bytearray(8)
    blocks = blocks_of([source, [source, 4], [source, [4, 4]]][spec], 2, equal=spec < 2)
    with pytest.raises(BufferError):
        source.extend(b"more")
    del blocks
    source.extend(b"more")


# ---- apart from each other --------------------------------------------------------------------


def cut(spec, *, writable, ranks=3):
    return parse_blocks(spec, "buf", ranks, writable=writable, equal=False)


def test_blocks_in_different_arrays_are_apart():
    send, recv = parse(np.zeros(4), "sendbuf", writable=False), cut(np.zeros(12), writable=True)
    buffers.check_disjoint(send, recv)
    buffers.check_disjoint(recv, send)
    buffers.check_disjoint(cut(np.zeros(12), writable=False), recv)


def test_blocks_may_lie_in_between_those_of_the_other_buffer():
    a = np.zeros(12)
    send = cut([a, (2, [0, 4, 8])], writable=False)
    recv = cut([a, (2, [10, 6, 2])], writable=True)
    buffers.check_disjoint(send, recv)
    buffers.check_disjoint(send, parse(a[2:4], "recvbuf", writable=True))
    buffers.check_disjoint(parse(a[:2], "sendbuf", writable=False), recv)


def test_overlaps_name_the_blocks():
    a = np.zeros(12)
    send = cut([a, (2, [0, 4, 8])], writable=False)
    recv = cut([a, (2, [10, 5, 2])], writable=True)
    with pytest.raises(
        ValueError,
        match=r"^recvbuf \(block of rank 1\) overlaps sendbuf \(block of rank 1\); pass IN_PLACE",
    ):
        buffers.check_disjoint(send, recv)
    with pytest.raises(ValueError, match=r"^recvbuf overlaps sendbuf \(block of rank 2\); pass"):
        buffers.check_disjoint(send, parse(a[9:10], "recvbuf", writable=True))
    with pytest.raises(ValueError, match=r"^recvbuf \(block of rank 2\) overlaps sendbuf; pass"):
        buffers.check_disjoint(parse(a[3:5], "sendbuf", writable=False), recv)


def test_empty_blocks_overlap_with_nothing():
    a = np.zeros(12)
    empty = parse([a, (0, 5)], "sendbuf", writable=False)
    assert empty.address == address_of(a) + 40
    buffers.check_disjoint(empty, cut(a, writable=True))
    buffers.check_disjoint(empty, parse(a, "recvbuf", writable=True))
    none = cut([a, (0, [0, 5, 11])], writable=True)
    buffers.check_disjoint(parse(a, "sendbuf", writable=False), none)
    buffers.check_disjoint(none, none)


@pytest.mark.parametrize("seed", range(100))
def test_overlaps_against_plain_python(seed):
    random = np.random.default_rng(seed)
    a = np.zeros(40, "u1")
    one = cut([a, ([*random.integers(0, 4, 3)], [*random.integers(0, 36, 3)])], writable=False)
    if seed % 3:
        other = cut([a, (2, [*random.permutation(20)[:3] * 2])], writable=True)
        spans = where(other)
    else:
        first, count = random.integers(0, 20), random.integers(0, 10)
        other, spans = parse([a, (count, first)], "buf", writable=True), [(first, count)]
    marked = {i for first, count in spans for i in range(first, first + count)}
    shared = any(i in marked for first, count in where(one) for i in range(first, first + count))
    for send, recv in ((one, other), (other, one)):
        if shared:
            with pytest.raises(ValueError, match="^recvbuf .*overlaps sendbuf"):
                buffers.check_disjoint(send, recv)
        else:
            buffers.check_disjoint(send, recv)
