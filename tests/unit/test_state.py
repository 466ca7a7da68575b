"""A state through the codec and through a whole store: what comes back is what went in."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hopcoll.errors import CheckpointError, CheckpointMismatchError
from recovery import CheckpointStore
from recovery.shards import name_datasets
from recovery.state import decode, encode


def round_trip(state, **options):
    tree, leaves = encode(state, **options)
    copies = [np.array(leaf.array, order="K") for leaf in leaves]
    return decode(json.loads(json.dumps(tree)), copies.__getitem__, **options)


def assert_same(a, b):
    """Types, bits, shapes and orders, all the way down."""
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
        assert a.flags.f_contiguous == b.flags.f_contiguous
    elif isinstance(a, np.generic):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, dict):
        assert len(a) == len(b)
        for (key, value), (other, copy) in zip(a.items(), b.items(), strict=True):
            assert_same(key, other)
            assert_same(value, copy)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for value, copy in zip(a, b, strict=True):
            assert_same(value, copy)
    else:
        assert repr(a) == repr(b)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**300), max_value=2**300)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(), max_size=8)
    | st.binary(max_size=8)
    | st.binary(max_size=8).map(bytearray)
    | st.sampled_from([np.float32(1.5), np.int8(-3), np.bool_(True), np.str_("ä"), np.str_("")])
)
ARRAYS = hnp.arrays(
    hnp.scalar_dtypes() | hnp.array_dtypes(max_size=3),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
) | hnp.arrays(np.float32, (3, 4)).map(np.asfortranarray)
KEYS = st.text(st.characters(), max_size=6) | st.integers() | st.tuples(st.integers(), st.text())
STATES = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(STATES)
def test_what_comes_back_is_what_went_in(state):
    assert_same(state, round_trip(state))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(STATES, min_size=1, max_size=3), st.sampled_from([None, "zstd", "blosc2"]))
def test_also_through_a_store(tmp_path_factory, states, compression):
    folder = tmp_path_factory.mktemp("store")
    with CheckpointStore(folder, compression=compression) as store:
        for step, state in enumerate(states):
            store.save(step, state)
        store.wait()
        assert_same(states[-1], store.restore().state)
        assert not list(store.verify())


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.arange(4).astype(ml_dtypes.bfloat16),
        np.arange(4).astype(ml_dtypes.float8_e4m3fn).reshape(2, 2),
        np.array(["a", "äö"]),
        np.array(["2026-01-01", "NaT"], "M8[D]"),
        np.zeros(3, [("a", "i4"), ("b", "f8", (2, 2)), ("c", [("d", "S3")])]),
        np.zeros(3, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
        np.array(b"bytes", "V5"),
        np.array(1.5, np.longdouble),
        np.empty((0, 3)),
        np.empty((), "f4"),
        np.zeros((1,) * 40),
        np.arange(20.0)[::2],
        np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
        np.zeros(4, "S0"),
        np.array([True, False]),
        np.array([1 + 2j], "c8"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}"[:30],
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_arrays_of_every_kind(tmp_path, array, compression):
    with CheckpointStore(tmp_path / "store", compression=compression) as store:
        store.save_sync(0, {"array": array, "large": np.full(20_000, array.itemsize)})
        copy = store.restore().state["array"]
    assert (copy.dtype, copy.shape) == (array.dtype, array.shape)
    assert copy.tobytes() == array.tobytes()
    assert copy.flags.writeable


@pytest.mark.parametrize("kind", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_generators_go_on_where_they_were(kind):
    generator = np.random.Generator(getattr(np.random, kind)(5))
    generator.integers(10, size=3, dtype=np.uint32)  # leaves half a word behind
    copy = round_trip(generator)
    assert copy.bit_generator.state["bit_generator"] == kind
    assert generator.random(100).tolist() == copy.random(100).tolist()
    assert generator.integers(9, size=5).tolist() == copy.integers(9, size=5).tolist()


def test_older_generators_go_on_where_they_were():
    for generator, draw in (
        (np.random.RandomState(3), lambda one: one.standard_normal(3).tolist()),
        (random.Random(3), lambda one: [one.gauss(0, 1), one.random()]),
    ):
        draw(generator)
        assert draw(round_trip(generator)) == draw(generator)


def test_the_same_array_twice_is_stored_once_and_comes_back_as_two():
    array = np.arange(4)
    tree, leaves = encode([array, array])
    assert len(leaves) == 1
    first, second = round_trip([array, array])
    first[0] = 9
    assert leaves[0].array is array
    assert first.tolist() == [9, 1, 2, 3]
    del tree, second


def test_a_restored_array_is_nobody_elses(tmp_path):
    array = np.arange(4)
    with CheckpointStore(tmp_path / "store") as store:
        store.save_sync(0, [array, array])
        first, second = store.restore().state
    first[0] = 9
    assert second.tolist() == [0, 1, 2, 3]


class Own:
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value == other.value


def test_other_objects_only_by_pickle_and_only_where_allowed(tmp_path):
    state = {"own": Own(3), "objects": np.array([Own(1), None], object)}
    with pytest.raises(TypeError, match=r"state has a .*Own at own.*allow_pickle"):
        encode(state)
    with CheckpointStore(tmp_path / "store", allow_pickle=True) as store:
        store.save_sync(0, state)
        copy = store.restore().state
        assert copy["own"] == state["own"]
        assert copy["objects"][0] == Own(1)
    with CheckpointStore(tmp_path / "store", readonly=True) as store:
        with pytest.raises(CheckpointError, match="run any code.*allow_pickle=True"):
            store.restore()


def test_states_that_cannot_be_saved_say_where():
    cyclic = {"a": [1]}
    cyclic["a"].append(cyclic)
    with pytest.raises(ValueError, match=r"^state contains itself at a/1"):
        encode(cyclic)
    deep = []
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(ValueError, match="^state is nested"):
        encode(deep)
    with pytest.raises(TypeError, match=r"^state has a key of type object in a"):
        encode({"a": {object(): 1}})
    with pytest.raises(TypeError, match=r"^state has a .*set at a/0"):
        encode({"a": [{1}]})
    with pytest.raises(TypeError, match=r"^state has an array of Python objects at a"):
        encode({"a": np.array([None])})
    with pytest.raises(TypeError, match=r"^state has a .*Lambda|^state has a .*function"):
        encode(lambda: 0, allow_pickle=True)


def test_a_node_of_a_newer_kind_is_refused():
    with pytest.raises(CheckpointMismatchError, match="'quaternion'"):
        decode({"quaternion": 3}, [].__getitem__, path=Path("x"))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.text(st.characters(), max_size=4), min_size=1, max_size=4).map(tuple),
        max_size=8,
    )
)
def test_names_of_datasets_are_valid_and_no_two_alike(paths):
    names = name_datasets(paths)
    assert len(set(names)) == len(names)
    for name in names:
        assert all(part not in ("", ".") for part in name.split("/"))
        assert name.isprintable()
        # No dataset is a group on the way to another.
        assert not any(other.startswith(f"{name}/") for other in names)


def test_tensors_come_back(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(4)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator,
        "half": torch.arange(5).to(torch.bfloat16).reshape(5, 1),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5, requires_grad=True),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "view": torch.arange(12).reshape(3, 4).T,
        "complex": torch.tensor([1 + 2j]).conj(),
    }
    with CheckpointStore(tmp_path / "store") as store:
        store.save(0, state)
        copy = store.restore().state
    for key in ("half", "bool", "scalar", "empty", "parameter", "view", "complex"):
        assert type(copy[key]) is type(state[key])
        assert copy[key].dtype == state[key].dtype
        assert copy[key].requires_grad == state[key].requires_grad
        assert torch.equal(copy[key], state[key])
    assert torch.equal(
        torch.rand(5, generator=copy["generator"]), torch.rand(5, generator=generator)
    )
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(copy["model"])
    torch.optim.Adam(other.parameters()).load_state_dict(copy["optimizer"])
    assert torch.equal(other.weight, model.weight)
