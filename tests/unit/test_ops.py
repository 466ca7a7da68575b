"""Operations: their codes, how they are named, and what is not one."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import hopcoll
from cython_kernels import reduction
from hopcoll import ops

NAMES = ("SUM", "PROD", "MIN", "MAX", "LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR", "AVG")


@pytest.mark.parametrize("name", NAMES)
def test_each_is_public_and_has_the_kernels_code(name):
    op = getattr(hopcoll, name)
    assert op is getattr(ops, name)
    assert op.code == reduction.OP_NAMES.index(name)
    assert repr(op) == f"hopcoll.{name}"
    assert ops.resolve(op) is op
    assert pickle.loads(pickle.dumps(op)) is op


def test_immutable():
    with pytest.raises(AttributeError):
        ops.SUM.code = 3


@pytest.mark.parametrize("wrong", [None, "SUM", 0, sum, ops.Op])
def test_anything_else_is_refused(wrong):
    with pytest.raises(TypeError, match="^op must be one of SUM, .*AVG"):
        ops.resolve(wrong)


def test_an_operation_of_the_users():
    op = hopcoll.Op.Create(np.hypot, commute=True)
    assert (op.name, op.function, op.commute) == ("hypot", np.hypot, True)
    assert repr(op) == "<hopcoll.Op hypot>"
    assert not hopcoll.Op.Create(max).commute
    copy = pickle.loads(pickle.dumps(op))
    assert (copy.function, copy.commute) == (np.hypot, True)
    with pytest.raises(TypeError, match="^function must be callable"):
        hopcoll.Op.Create("SUM")
