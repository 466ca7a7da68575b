"""A state that a program works with: taken for a save, and put back into the same objects.

Arrays, tensors and generators are filled where they are, so that views of them, and whoever else
holds them, see what was restored; a `Cut` is replaced. Objects with ``state_dict`` and
``load_state_dict`` (modules and optimisers of torch) are saved and restored by these.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np

from hopcoll.errors import CheckpointMismatchError
from recovery.cuts import Cut

__all__ = ["has_cut", "put_back", "take"]


def has_cut(node: Any) -> bool:
    """Tell whether an array in a state is cut over the ranks."""
    if type(node) is dict:
        return any(map(has_cut, node.values()))
    return any(map(has_cut, node)) if type(node) in (list, tuple) else isinstance(node, Cut)


def take(node: Any) -> Any:
    """Return a state as a store saves it; arrays are not copied."""
    if _has_state_dict(node):
        return take(node.state_dict())
    if type(node) is dict:
        return {key: take(value) for key, value in node.items()}
    if type(node) in (list, tuple):
        return type(node)(take(value) for value in node)
    return node


def put_back(node: Any, saved: Any, path: str = "state") -> Any:
    """Fill a state with what was saved.

    Parameters
    ----------
    node : object
        The state, or a part of it.
    saved : object
        What `take` returned, after a save and a restore.
    path : str
        Where `node` is, for errors.

    Returns
    -------
    object
        What takes the place of `node`: itself where it could be filled.

    Raises
    ------
    CheckpointMismatchError
        Something that is to be filled has another shape, dtype or type, or was not saved.
    """
    if _has_state_dict(node):
        node.load_state_dict(saved)
        return node
    if isinstance(node, np.ndarray):
        _check(node, saved, path, "shape", "dtype")
        np.copyto(node, saved)
        return node
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(node, torch.Tensor):
        _check(node, saved, path, "shape", "dtype")
        with torch.no_grad():
            node.copy_(saved)
        return node
    if torch is not None and isinstance(node, torch.Generator):
        _check(node, saved, path)
        node.set_state(saved.get_state())
        return node
    if isinstance(node, np.random.Generator):
        _check(node, saved, path)
        node.bit_generator.state = saved.bit_generator.state
        return node
    if isinstance(node, np.random.RandomState):
        _check(node, saved, path)
        node.set_state(saved.get_state())
        return node
    if isinstance(node, random.Random):
        _check(node, saved, path)
        node.setstate(saved.getstate())
        return node
    if type(node) is dict:
        _check(node, saved, path)
        if missing := [key for key in node if key not in saved]:
            raise CheckpointMismatchError(f"{path}/{missing[0]} was not saved")
        for key, value in saved.items():
            node[key] = put_back(node[key], value, f"{path}/{key}") if key in node else value
        return node
    if type(node) is list and type(saved) is list and len(node) == len(saved):
        node[:] = [
            put_back(*both, f"{path}/{i}") for i, both in enumerate(zip(node, saved, strict=True))
        ]
        return node
    return saved


def _has_state_dict(node: Any) -> bool:
    # Not of a class, which has the functions and no state.
    return not isinstance(node, type) and (
        callable(getattr(node, "state_dict", None))
        and callable(getattr(node, "load_state_dict", None))
    )


def _check(node: Any, saved: Any, path: str, *attributes: str) -> None:
    if not isinstance(saved, type(node)):
        raise CheckpointMismatchError(
            f"{path} is of type {type(node).__name__}, and {type(saved).__name__} was saved"
        )
    for name in attributes:
        ours, theirs = getattr(node, name), getattr(saved, name)
        if ours != theirs:
            raise CheckpointMismatchError(f"{path} has {name} {ours}, and {theirs} was saved")
