"""The tree of exceptions: its shape, its fields, and that it survives pickling."""

from __future__ import annotations

import pickle

import pytest

from hopcoll import errors

EXAMPLES = [
    (errors.HopcollError("text"), {}),
    (errors.MpiError("text", 75, 3), {"error_class": 75, "peer": 3}),
    (errors.RankFailedError("text", [2, 5], 4), {"ranks": (2, 5), "epoch": 4}),
    (errors.MinorityError("text", [1, 2], 3), {"ranks": (1, 2), "epoch": 3}),
    (errors.TooFewRanksError("text", [1, 2], 3), {"ranks": (1, 2), "epoch": 3}),
    (errors.ObjectLostError("text", [1], 3, "r"), {"ranks": (1,), "epoch": 3, "ref": "r"}),
    (errors.ObjectDeletedError("text", "r"), {"ref": "r"}),
    (errors.ObjectExistsError("text", "r"), {"ref": "r"}),
    (errors.ObjectStoreFullError("text", "r"), {"ref": "r"}),
    (errors.ReductionError("text", "r", ["a"]), {"ref": "r", "inputs": ("a",)}),
    (errors.MissedError("text", 7), {"seq": 7}),
    (errors.DivergedError("text", [[0, 1], [2]]), {"groups": ((0, 1), (2,))}),
    (errors.StaleEpochError("text", 3), {"epoch": 3}),
    (errors.TransferTimeoutError("text", 1, 4096), {"peer": 1, "watermark_bytes": 4096}),
    (errors.ClosedError("text"), {}),
    (errors.ProtocolError("text"), {}),
    (errors.CheckpointError("text", "a/b"), {"path": "a/b"}),
    (errors.CheckpointCorruptError("text", "a/b"), {"path": "a/b"}),
    (errors.CheckpointFencedError("text", "a/b"), {"path": "a/b"}),
    (errors.CheckpointMismatchError("text", "a/b"), {"path": "a/b"}),
    (errors.CheckpointNotFoundError("text", "a/b"), {"path": "a/b"}),
    (errors.WorkflowError("text"), {}),
    (errors.WorkflowFencedError("text"), {}),
    (errors.WorkflowRunningError("text"), {}),
    (errors.WorkflowMismatchError("text"), {}),
    (errors.WorkflowNotFoundError("text"), {}),
    (errors.WorkflowCancelledError("text"), {}),
    (errors.TaskFailedError("text", "a/b"), {"task": "a/b"}),
    (errors.EffectUnknownError("text", "a/b"), {"task": "a/b"}),
]


@pytest.mark.parametrize(("error", "fields"), EXAMPLES, ids=lambda item: type(item).__name__)
def test_fields_and_text_survive_pickling(error, fields):
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert type(copy) is type(error)
        assert str(copy) == "text"
        assert {name: getattr(copy, name) for name in fields} == fields


def test_everything_public_is_in_the_tree():
    assert {type(error).__name__ for error, _ in EXAMPLES} == set(errors.__all__)
    for error, _ in EXAMPLES:
        assert isinstance(error, errors.HopcollError)
        assert type(error).__doc__


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (errors.TransferTimeoutError, TimeoutError),
        (errors.CheckpointNotFoundError, FileNotFoundError),
        (errors.CheckpointCorruptError, errors.CheckpointError),
        (errors.CheckpointMismatchError, errors.CheckpointError),
        (errors.CheckpointNotFoundError, errors.CheckpointError),
        (errors.WorkflowFencedError, errors.WorkflowError),
        (errors.WorkflowRunningError, errors.WorkflowError),
        (errors.WorkflowMismatchError, errors.WorkflowError),
        (errors.WorkflowNotFoundError, FileNotFoundError),
        (errors.WorkflowNotFoundError, errors.WorkflowError),
        (errors.WorkflowCancelledError, errors.WorkflowError),
        (errors.TaskFailedError, errors.WorkflowError),
        (errors.EffectUnknownError, errors.WorkflowError),
    ],
)
def test_also_caught_by_the_class_that_python_programs_know(kind, base):
    with pytest.raises(base):
        raise kind("text")


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in errors.__all__])
def test_fields_have_defaults(kind):
    assert str(kind()) == ""
    assert pickle.loads(pickle.dumps(kind())).args == kind("").args
