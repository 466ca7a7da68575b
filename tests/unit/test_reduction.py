"""The reduction kernels against their NumPy twins: all dtypes, operations and instruction sets."""

from __future__ import annotations

import sys
import threading
from itertools import product

import numpy as np
import pytest
from tests.reference import (
    ALLREDUCE,
    BCAST,
    DTYPES,
    REDUCE,
    divide_twin,
    reduce_twin,
    same_bits,
    supported_twin,
    value_tree,
)

from cython_kernels import reduction

CODES = range(len(reduction.DTYPE_NAMES))
OPS = range(len(reduction.OP_NAMES))
PAIRS = [pair for pair in product(CODES, OPS) if supported_twin(*pair)]
REFUSED = [pair for pair in product(CODES, OPS) if not supported_twin(*pair)]
DIVIDED = [code for code in CODES if supported_twin(code, reduction.AVG)]
LENGTHS = (0, 1, 7, 8, 63, 1000, 4097)
SHORT_FLOATS = (reduction.FLOAT16, reduction.BFLOAT16)

each_variant = pytest.mark.parametrize("variant", reduction.VARIANTS)


def _name(code: int) -> str:
    return reduction.DTYPE_NAMES[code]


def _pair_name(pair: tuple[int, int]) -> str:
    return f"{reduction.DTYPE_NAMES[pair[0]]}-{reduction.OP_NAMES[pair[1]]}"


def _specials(dtype: np.dtype) -> np.ndarray:
    """Values at which arithmetic changes its ways."""
    if dtype.kind == "b":
        return np.array([False, True])
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        values = [0, 1, 2, 3, info.min, info.min + 1, info.max, info.max - 1, info.max // 2]
        return np.array([*values, -1, -2] if dtype.kind == "i" else values, dtype)
    real = dtype.type(0).real.dtype
    if real.itemsize == 2:
        # Both 16-bit floats at once: zeros, subnormals, the smallest and largest normal ones,
        # one and its neighbours, infinities, NaNs.
        bits = [0x0000, 0x0001, 0x0002, 0x03FF, 0x0400, 0x0401, 0x007F, 0x0080, 0x3BFF, 0x3C00]
        bits += [0x3C01, 0x3F80, 0x3F81, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7F7F, 0x7F80, 0x7FC0]
        return np.array(bits + [bit | 0x8000 for bit in bits], np.uint16).view(dtype)
    info = np.finfo(real)
    values = [0, 1, 1 + info.eps, 3, info.tiny, info.smallest_subnormal, info.max, np.inf, np.nan]
    values = np.array(values, real)
    values = np.concatenate([values, -values])
    if dtype.kind == "f":
        return values
    out = np.empty(len(values) ** 2, dtype)
    out.real, out.imag = np.repeat(values, len(values)), np.tile(values, len(values))
    return out


def _draw(dtype: np.dtype, count: int, seed: int) -> np.ndarray:
    """Half of the items are any bits at all (infinities, NaNs, subnormals), half near one."""
    random = np.random.default_rng([seed, count, dtype.itemsize])
    if dtype.kind == "b":
        return random.random(count) < 0.5
    out = random.integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype)
    if dtype.kind not in "iu":
        tame = (1 + random.random(count)).astype(dtype)
        if dtype.kind == "c":
            tame.imag = random.random(count) - 0.5
        out = np.where(random.random(count) < 0.5, out, tame)
    return out


def _inputs(dtype: np.dtype, count: int) -> tuple[np.ndarray, np.ndarray]:
    return _draw(dtype, count, 1), _draw(dtype, count, 2)


@pytest.mark.parametrize("pair", PAIRS, ids=_pair_name)
@each_variant
def test_reduce_computes_what_its_twin_does(pair: tuple[int, int], variant: str) -> None:
    for count in LENGTHS:
        left, right = _inputs(DTYPES[pair[0]], count)
        dest = np.zeros_like(left)
        before = left.tobytes(), right.tobytes()
        reduction.reduce(*pair, left, right, dest, variant=variant)
        assert same_bits(dest, reduce_twin(*pair, left, right)), count
        assert (left.tobytes(), right.tobytes()) == before


@pytest.mark.parametrize("pair", PAIRS, ids=_pair_name)
@each_variant
def test_reduce_of_special_values(pair: tuple[int, int], variant: str) -> None:
    values = _specials(DTYPES[pair[0]])
    left, right = np.repeat(values, len(values)), np.tile(values, len(values))
    dest = np.zeros_like(left)
    reduction.reduce(*pair, left, right, dest, variant=variant)
    assert same_bits(dest, reduce_twin(*pair, left, right))


@pytest.mark.parametrize("pair", PAIRS, ids=_pair_name)
@each_variant
def test_reduce_into_one_of_its_inputs(pair: tuple[int, int], variant: str) -> None:
    for count in LENGTHS:
        left, right = _inputs(DTYPES[pair[0]], count)
        expected = reduce_twin(*pair, left, right)
        dest = left.copy()
        reduction.reduce(*pair, dest, right, dest, variant=variant)
        assert same_bits(dest, expected), count
        dest = right.copy()
        reduction.reduce(*pair, left, dest, dest, variant=variant)
        assert same_bits(dest, expected), count
        both = left.copy()
        reduction.reduce(*pair, both, both, both, variant=variant)
        assert same_bits(both, reduce_twin(*pair, left, left)), count


@pytest.mark.parametrize("pair", PAIRS, ids=_pair_name)
@each_variant
def test_reduce_takes_any_alignment_and_touches_nothing_else(
    pair: tuple[int, int], variant: str
) -> None:
    count, margin = 131, 64
    left, right = _inputs(DTYPES[pair[0]], count)
    expected = reduce_twin(*pair, left, right)
    for shifts in ((1, 0, 0), (0, 3, 0), (0, 0, 5), (1, 2, 3), (7, 7, 7), (15, 1, 31)):
        memory = [bytearray(b"\xa5" * (left.nbytes + 2 * margin)) for _ in range(3)]
        views = [
            memoryview(block)[shift : shift + left.nbytes]
            for block, shift in zip(memory, shifts, strict=True)
        ]
        views[0][:], views[1][:] = left.tobytes(), right.tobytes()
        reduction.reduce(*pair, *views, variant=variant)
        assert same_bits(np.frombuffer(bytes(views[2]), left.dtype), expected), shifts
        rest = memory[2][: shifts[2]] + memory[2][shifts[2] + left.nbytes :]
        assert set(rest) == {0xA5}


@pytest.mark.parametrize("code", SHORT_FLOATS, ids=_name)
@each_variant
def test_16_bit_floats_exhaustively(code: int, variant: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[code])
    random = np.random.default_rng(7)
    partners = [every, *(random.permutation(every) for _ in range(12))]
    partners += [np.full_like(every, value) for value in _specials(DTYPES[code])]
    for right in partners:
        for op in (reduction.SUM, reduction.PROD, reduction.MIN, reduction.MAX, reduction.LXOR):
            dest = np.zeros_like(every)
            reduction.reduce(code, op, every, right, dest, variant=variant)
            assert same_bits(dest, reduce_twin(code, op, every, right)), (op, right)
    for divisor in (*range(1, 33), 1000, 4097, 1 << 20):
        dest = every.copy()
        reduction.divide_array(code, dest, divisor, variant=variant)
        assert same_bits(dest, divide_twin(code, every, divisor)), divisor


@pytest.mark.parametrize("code", DIVIDED, ids=_name)
@each_variant
def test_divide_computes_what_its_twin_does(code: int, variant: str) -> None:
    for count, divisor in product(LENGTHS, (1, 2, 3, 7, 64, 1001)):
        array = _draw(DTYPES[code], count, 3)
        dest = array.copy()
        reduction.divide_array(code, dest, divisor, variant=variant)
        assert same_bits(dest, divide_twin(code, array, divisor)), (count, divisor)


@each_variant
def test_divide_takes_any_alignment(variant: str) -> None:
    for code in DIVIDED:
        array = _draw(DTYPES[code], 67, 4)
        memory = bytearray(array.nbytes + 3)
        memory[3:] = array.tobytes()
        reduction.divide_array(code, memoryview(memory)[3:], 3, variant=variant)
        got = np.frombuffer(bytes(memory[3:]), array.dtype)
        assert same_bits(got, divide_twin(code, array, 3))
        assert memory[:3] == bytes(3)


@pytest.mark.parametrize("pair", PAIRS, ids=_pair_name)
def test_twin_agrees_with_numpys_own_function(pair: tuple[int, int]) -> None:
    """The twins say what they mean; here they meet the functions that users know."""
    names = {
        reduction.SUM: "add",
        reduction.AVG: "add",
        reduction.PROD: "multiply",
        reduction.MIN: "minimum",
        reduction.MAX: "maximum",
        reduction.LAND: "logical_and",
        reduction.LOR: "logical_or",
        reduction.LXOR: "logical_xor",
        reduction.BAND: "bitwise_and",
        reduction.BOR: "bitwise_or",
        reduction.BXOR: "bitwise_xor",
    }
    left, right = _inputs(DTYPES[pair[0]], 1000)
    with np.errstate(all="ignore"):
        theirs = getattr(np, names[pair[1]])(left, right).astype(left.dtype)
    ours = reduce_twin(*pair, left, right)
    if left.dtype.kind == "c" and pair[1] == reduction.PROD:
        tame = (np.abs(left) < 3) & (np.abs(right) < 3)  # NumPy's may be a fused multiply-add
        eps = np.finfo(left.dtype).eps
        np.testing.assert_allclose(ours[tame], theirs[tame], rtol=8 * eps, atol=8 * eps)
    else:
        with np.errstate(invalid="ignore"):
            equal = (ours == theirs) | ((ours != ours) & (theirs != theirs))
        assert equal.all()  # equal values: -0.0 is 0.0, NaN is NaN


def test_bool_takes_any_byte_but_zero_as_true() -> None:
    left = np.repeat(np.array([0, 1, 2, 128, 255], np.uint8), 5)
    right = np.tile(np.array([0, 1, 2, 128, 255], np.uint8), 5)
    for op in OPS:
        if supported_twin(reduction.BOOL, op):
            dest = np.full_like(left, 7)
            reduction.reduce(reduction.BOOL, op, left, right, dest)
            expected = reduce_twin(reduction.BOOL, op, left != 0, right != 0)
            assert dest.tolist() == expected.view(np.uint8).tolist()


def test_integers_wrap() -> None:
    left = np.array([127, -128, -128, 100], np.int8)
    right = np.array([1, -1, -128, 3], np.int8)
    dest = np.zeros_like(left)
    reduction.reduce(reduction.INT8, reduction.SUM, left, right, dest)
    assert dest.tolist() == [-128, 127, 0, 103]
    reduction.reduce(reduction.INT8, reduction.PROD, left, right, dest)
    assert dest.tolist() == [127, -128, 0, 44]
    squares = np.full(9, 0xFFFF, np.uint16)  # as int the product would overflow
    reduction.reduce(reduction.UINT16, reduction.PROD, squares, squares, squares)
    assert set(squares.tolist()) == {1}


@pytest.mark.parametrize("op", [reduction.MIN, reduction.MAX])
def test_nan_stays(op: int) -> None:
    for code in (*SHORT_FLOATS, reduction.FLOAT32, reduction.FLOAT64):
        dtype = DTYPES[code]
        left = np.array([np.nan, 1, np.nan, -np.inf] * 5).astype(dtype)
        right = np.array([2, np.nan, np.nan, np.inf] * 5).astype(dtype)
        dest = np.zeros_like(left)
        reduction.reduce(code, op, left, right, dest)
        assert np.isnan(dest.astype(float)).tolist() == [True, True, True, False] * 5


@pytest.mark.parametrize("pair", REFUSED, ids=_pair_name)
def test_unsupported_pair_is_refused(pair: tuple[int, int]) -> None:
    assert not reduction.supported(*pair)
    dest = bytearray(b"\x5a" * 64)
    name, op = reduction.DTYPE_NAMES[pair[0]], reduction.OP_NAMES[pair[1]]
    with pytest.raises(ValueError, match=rf"^op {op} is not supported for {name}$"):
        reduction.reduce(*pair, bytes(64), bytes(64), dest)
    assert dest == b"\x5a" * 64


def test_codes_names_and_sizes() -> None:
    for code, dtype in enumerate(DTYPES):
        assert getattr(reduction, reduction.DTYPE_NAMES[code].upper()) == code
        assert reduction.itemsize_of(code) == dtype.itemsize
        if code != reduction.BYTES:
            assert dtype.name == reduction.DTYPE_NAMES[code]
    for code, name in enumerate(reduction.OP_NAMES):
        assert getattr(reduction, name) == code
    assert all(reduction.supported(*pair) for pair in PAIRS)
    for unknown in (-1, 16, 1000):
        assert reduction.itemsize_of(unknown) == -1
        assert not reduction.supported(unknown, reduction.SUM)
        assert not reduction.supported(reduction.INT8, unknown)


def test_wrong_use_is_refused_by_name() -> None:
    def check(kind: type[Exception], match: str, *arguments: object, **options: object) -> None:
        with pytest.raises(kind, match=match):
            reduction.reduce(*arguments, **options)

    f32, add = reduction.FLOAT32, reduction.SUM
    four = np.zeros(4, np.float32)
    check(TypeError, "^left must offer the buffer protocol", f32, add, [1.0], four, four)
    check(TypeError, "^right must offer the buffer protocol", f32, add, four, None, four)
    check(BufferError, "^dest must be contiguous and writable", f32, add, four, four, bytes(16))
    strided = np.zeros(8, np.float32)[::2]
    check(BufferError, "^left must be contiguous", f32, add, strided, four, four)
    check(BufferError, "^dest must be contiguous", f32, add, four, four, strided)
    check(ValueError, "^left, right and dest must have the", f32, add, four, four[1:], four)
    check(ValueError, "^dest has 3 bytes", f32, add, b"abc", b"abc", bytearray(3))
    check(ValueError, "^dtype code must be", 16, add, four, four, four)
    check(ValueError, "^dtype code must be", -1, add, four, four, four)
    check(ValueError, "^op code must be", f32, 12, four, four, four)
    check(ValueError, "^variant must be one of", f32, add, four, four, four, variant="mmx")
    line = np.zeros(9, np.float32)
    check(ValueError, "^dest must be left, right, or apart", f32, add, line[:8], line[:8], line[1:])
    check(ValueError, "^dest must be left, right, or apart", f32, add, four, line[1:5], line[:4])

    with pytest.raises(ValueError, match="^divisor must be at least 1"):
        reduction.divide_array(f32, four, 0)
    with pytest.raises(ValueError, match="^op AVG is not supported for int32"):
        reduction.divide_array(reduction.INT32, np.zeros(4, np.int32), 2)
    with pytest.raises(BufferError, match="^dest must be contiguous and writable"):
        reduction.divide_array(f32, bytes(16), 2)
    assert not four.any()


def test_a_failed_call_lets_go_of_the_buffers() -> None:
    dest = bytearray(8)
    with pytest.raises(ValueError, match="^left, right and dest"):
        reduction.reduce(reduction.INT8, reduction.SUM, dest, bytes(8), bytearray(7))
    dest.append(0)  # BufferError, were it still exported


def test_reduce_runs_without_the_gil() -> None:
    """With threads never preempted, another thread gets on only when the kernel lets it."""
    array = np.ones(1 << 22, np.float32)
    dest = np.empty_like(array)
    during = False
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        for _ in range(100):  # on a busy machine this thread may not wake up in time
            events: list[str] = []

            def work(events: list[str] = events) -> None:
                reduction.reduce(reduction.FLOAT32, reduction.SUM, array, array, dest)
                events.append("reduced")

            thread = threading.Thread(target=work)
            thread.start()
            events.append("woke")
            thread.join()
            during = events == ["woke", "reduced"]
            if during:
                break
    finally:
        sys.setswitchinterval(interval)
    assert during


def _tree_inputs(size: int, count: int) -> dict[int, np.ndarray]:
    random = np.random.default_rng(size)
    return {rank: random.standard_normal(count).astype(np.float32) for rank in range(size)}


def test_value_tree_of_small_results_goes_up_from_rank_0() -> None:
    x = _tree_inputs(4, 5)
    for kind in (REDUCE, ALLREDUCE):
        got = value_tree(
            x, (3, 0, 2), kind=kind, root=1, size=4, eager_bytes=20, redop=reduction.SUM
        )
        assert same_bits(got, (x[0] + x[2]) + x[3])


def test_value_tree_of_a_large_reduce_ends_at_the_root() -> None:
    x = _tree_inputs(4, 6)
    common = {"kind": REDUCE, "size": 4, "eager_bytes": 20}
    got = value_tree(x, range(4), root=1, redop=reduction.SUM, **common)
    assert same_bits(got, ((x[2] + x[3]) + x[0]) + x[1])
    got = value_tree(x, {0, 1, 3}, root=3, redop=reduction.AVG, **common)
    assert same_bits(got, ((x[0] + x[1]) + x[3]) / np.float32(3))


def test_value_tree_of_a_large_allreduce_rotates_by_block() -> None:
    x = _tree_inputs(3, 8)
    got = value_tree(x, range(3), kind=ALLREDUCE, size=3, eager_bytes=20, redop=reduction.SUM)
    blocks = [slice(0, 2), slice(2, 5), slice(5, 8)]
    for start, items in enumerate(blocks):
        a, b, c = (x[(start + place) % 3][items] for place in range(3))
        assert same_bits(got[items], (a + b) + c)

    x = _tree_inputs(10, 16)  # more ranks than blocks: the starts are spread
    got = value_tree(x, {0, 1, 5}, kind=ALLREDUCE, size=10, eager_bytes=0, redop=reduction.SUM)
    for block, start in enumerate((0, 1, 2, 3, 5, 6, 7, 8)):
        items = slice(2 * block, 2 * block + 2)
        a, b, c = (x[rank][items] for rank in sorted((0, 1, 5), key=lambda r: (r - start) % 10))
        assert same_bits(got[items], (a + b) + c)


def test_value_tree_of_a_broadcast_is_the_roots_input() -> None:
    x = _tree_inputs(3, 4)
    got = value_tree(x, range(3), kind=BCAST, root=2, size=3, eager_bytes=4096)
    assert same_bits(got, x[2])
    assert got is not x[2]
