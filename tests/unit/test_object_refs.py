"""Refs of objects, and what the arguments of the store may be."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest

from hopcoll import communicator, errors
from hopcoll._metas import array_of, meta_of, view_of
from hopcoll.objects import ObjectRef
from tests.fake_engine import FakeEngine


def test_refs_of_a_name_are_equal():
    assert ObjectRef("a") == ObjectRef("a") != ObjectRef("b")
    assert len({ObjectRef("a"), ObjectRef("a"), ObjectRef("b")}) == 2
    assert ObjectRef("a") != "a"
    assert ObjectRef("a").name == "a"
    assert repr(ObjectRef("a")) == "<ObjectRef 'a'>"


def test_refs_without_a_name_are_new():
    assert ObjectRef() != ObjectRef()
    assert ObjectRef().name is None


def test_refs_can_be_pickled():
    for ref in (ObjectRef(), ObjectRef("a"), ObjectRef("a")._put(7)):
        copy = pickle.loads(pickle.dumps(ref))
        assert (copy, copy.name, copy._stamp) == (ref, ref.name, ref._stamp)


def test_refs_cannot_be_changed():
    with pytest.raises(AttributeError, match="ObjectRef is immutable"):
        ObjectRef().name = "b"


@pytest.mark.parametrize("name", [3, b"a"])
def test_names_are_text(name):
    with pytest.raises(TypeError, match="^name must be a str, not "):
        ObjectRef(name)


@pytest.mark.parametrize(
    "value",
    [3, 2.5, [[1, 2], [3, 4]], b"abc", np.zeros((2, 0)), np.arange(6)[::2], np.array("text")],
)
def test_arrays_come_back(value):
    array = array_of(value)
    assert array.flags.c_contiguous
    back = view_of(meta_of(array), array.tobytes())
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert (back == array).all()
    assert not back.flags.writeable


def test_bfloat16_comes_back():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.arange(5).astype(ml_dtypes.bfloat16)
    back = view_of(meta_of(array), array.tobytes())
    assert back.dtype == array.dtype
    assert (back == array).all()


@pytest.mark.parametrize("value", [object(), np.zeros(3, "i4,f8"), [None], np.array([{}])])
def test_what_cannot_be_an_object(value):
    with pytest.raises(TypeError, match="^value has dtype "):
        array_of(value)


def test_a_closed_communicator_has_no_objects(monkeypatch):
    monkeypatch.setattr(communicator, "_make_engine", FakeEngine)
    comm = communicator.Communicator(None)
    comm.close()
    with pytest.raises(errors.ClosedError):
        _ = comm.objects


class Keeper:
    """Where keys go to whose objects no ref is left."""

    def __init__(self):
        self.refs_left = []


def held(keeper, name=None, inputs=()):
    ref = ObjectRef(name)
    ref._held_by(keeper)
    return ref._put(7, inputs)


def test_the_last_ref_takes_its_object_along():
    keeper = Keeper()
    ref = held(keeper)
    more = [ref._put(8), copy.copy(ref), copy.deepcopy(ref)]
    key = ref._key
    del ref
    assert keeper.refs_left == []
    more.clear()
    assert keeper.refs_left == [key]


def test_the_ref_of_a_result_has_those_of_its_inputs():
    keeper = Keeper()
    first, second = held(keeper), held(keeper)
    keys = [first._key, second._key]
    result = held(keeper, inputs=(first, second))
    other = held(keeper, inputs=(second,))
    keys.append(result._key)
    del first, second
    del result
    assert keeper.refs_left == [keys[2], keys[0]]
    del other
    assert keys[1] in keeper.refs_left


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_was_pickled_or_has_a_name_stays(protocol):
    keeper = Keeper()
    inputs = (held(keeper), held(keeper))
    for ref in (held(keeper), held(keeper, "a"), held(keeper, inputs=inputs)):
        pickle.loads(pickle.dumps(ref, protocol))
    del ref, inputs
    assert keeper.refs_left == []


def test_a_ref_to_nothing_takes_nothing_along():
    keeper = Keeper()
    ObjectRef()
    deleted = held(keeper)
    deleted._held_by(None)
    del deleted
    assert keeper.refs_left == []


def test_refs_in_a_circle_of_garbage():
    keeper = Keeper()
    circle = [held(keeper)]
    circle.append(circle)
    del circle
    gc.collect()
    assert len(keeper.refs_left) == 1
