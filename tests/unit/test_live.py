"""A state in use, saved and put back into the same objects."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recovery
from hopcoll.errors import CheckpointMismatchError
from recovery import live


class Module:
    """Has state as torch's modules have it."""

    def __init__(self) -> None:
        self.weight = np.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.weight = saved["weight"]


def make() -> dict[str, Any]:
    return {
        "weights": np.arange(6.0).reshape(2, 3),
        "parts": [np.zeros(2), {"scale": np.float32(2), "name": "a"}],
        "pair": (np.ones(2), 1),
        "generators": [np.random.default_rng(1), np.random.RandomState(1), random.Random(1)],
        "module": Module(),
        "epoch": 3,
        "nothing": None,
    }


def draw(state: dict[str, Any]) -> list[float]:
    new, old, python = state["generators"]
    return [new.normal(), old.normal(), python.random()]


def test_everything_is_as_it_was_and_where_it_was() -> None:
    state = make()
    saved = copy.deepcopy(live.take(state))
    expected = draw(state)
    weights, view = state["weights"], state["weights"][0]
    part, generators, module = state["parts"][0], list(state["generators"]), state["module"]
    weights += 1
    part += 1
    state["parts"][1].update(scale=np.float32(9), name="b")
    state.update(epoch=8, nothing=1)
    module.weight += 5
    assert live.put_back(state, saved) is state
    assert state["weights"] is weights
    assert view.tolist() == [0, 1, 2]
    assert state["parts"][0] is part
    assert part.tolist() == [0, 0]
    assert state["parts"][1] == {"scale": 2, "name": "a"}
    assert (state["epoch"], state["nothing"]) == (3, None)
    assert all(a is b for a, b in zip(state["generators"], generators, strict=True))
    assert draw(state) == expected
    assert state["module"] is module
    assert module.weight.tolist() == [0, 0, 0]


def test_a_list_may_have_grown_and_a_key_may_be_new() -> None:
    state: dict[str, Any] = {"losses": [1.0]}
    losses = state["losses"]
    live.put_back(state, {"losses": [1.0, 2.0], "best": 5})
    assert state == {"losses": [1.0, 2.0], "best": 5}
    assert losses == [1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.zeros(3)}, r"state/weights has shape \(2, 3\), and \(3,\) was saved"),
        ({"weights": np.zeros((2, 3), "f4")}, "state/weights has dtype float64, and float32"),
        ({"weights": 5}, "state/weights is of type ndarray, and int was saved"),
        ({"parts": [np.zeros(3), {}]}, r"state/parts/0 has shape"),
        ({"parts": [np.zeros(2), {}]}, "state/parts/1/scale was not saved"),
        ({"generators": [1, 2, 3]}, "state/generators/0 is of type Generator"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    saved = {**copy.deepcopy(live.take(make())), **change}
    with pytest.raises(CheckpointMismatchError, match=message):
        live.put_back(make(), saved)


def test_modules_and_generators_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(3)
    state = {"model": model, "optimiser": optimiser, "t": torch.arange(3.0), "g": generator}
    tensor = state["t"]

    def step() -> None:
        optimiser.zero_grad()
        model(torch.rand(4, 3, generator=generator)).sum().backward()
        optimiser.step()
        tensor.add_(1)

    step()
    with recovery.CheckpointStore(tmp_path) as store:
        store.save_sync(1, live.take(state))
        step()
        expected = [parameter.clone() for parameter in model.parameters()]
        step()
        assert live.put_back(state, store.restore().state) is state
    assert state["t"] is tensor
    assert tensor.tolist() == [1, 2, 3]
    step()
    assert all(map(torch.equal, expected, model.parameters()))
