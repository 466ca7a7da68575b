"""Train a small neural network on handwritten digits, on many ranks, whoever of them dies.

    hopcoll run -n 4 examples/sgd_digits.py --checkpoint-dir out --resume

Each rank computes the gradient over its own part of a batch, an Allreduce averages the gradients,
and every rank makes the same step with the same bytes. When a rank is killed, the average is that
of the others, and the next step cuts its batch among them; when the whole job is, it goes on behind
its last commit, and makes the very steps, bit for bit, that it would have made. For neither is
there a line in here: a `recovery.TrainingSession` does it. The loop only has to take what is random
from the session, and to do on all ranks what follows from the result of the Allreduce.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The ranks share the cores already. One thread also always adds in the same order.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np
from tqdm import tqdm

import hopcoll
import recovery

TEST_IMAGES = 360
MOMENTUM = 0.9

Layers = list[tuple[np.ndarray, np.ndarray]]


def main() -> None:
    """Train, report, and leave with the last state on disk."""
    options = parse_arguments()
    comm = hopcoll.init()
    train_x, train_y, test_x, test_y = load_data(options.seed)
    widths = [train_x.shape[1], options.hidden, options.hidden, 10]
    count = sum((rows + 1) * columns for rows, columns in itertools.pairwise(widths))

    parameters, velocity = np.zeros((2, count), np.float32)
    layers = cut_into_layers(parameters, widths)
    initialise(layers, options.seed)
    # The loss travels as the last number of the gradient, so that one Allreduce averages both.
    gradient, mean = np.empty((2, count + 1), np.float32)
    gradient_layers = cut_into_layers(gradient[:-1], widths)

    with recovery.TrainingSession(
        comm,
        {"parameters": parameters, "velocity": velocity},
        options.checkpoint_dir,
        interval=options.checkpoint_every,
        seed=options.seed,
        log=options.log,
        settings={name: getattr(options, name) for name in ("hidden", "batch", "rate")},
    ) as session:
        if session.first > 1 and not options.resume:
            if session.reports:
                print(f"{options.checkpoint_dir} has commits: --resume goes on", file=sys.stderr)
            sys.exit(2)
        bar = None
        for step in session.steps(options.steps):
            mine = session.batch(len(train_x), options.batch)
            gradient[-1] = backpropagate(layers, gradient_layers, train_x[mine], train_y[mine])

            session.Allreduce(gradient, mean)

            velocity *= MOMENTUM
            velocity -= np.float32(options.rate) * mean[:-1]
            parameters += velocity
            session.log(loss=float(mean[-1]), contributors=session.contributors)
            if step == options.steps:
                session.log(accuracy=accuracy(layers, test_x, test_y))
            session.commit(step)
            if session.reports:
                bar = show(bar, step, options.steps, float(mean[-1]), session.contributors)

        if session.reports:
            print(
                f"\n{session.history.last} steps, test accuracy "
                f"{accuracy(layers, test_x, test_y):.4f}, contributors {session.contributors}",
                file=sys.stderr,
            )


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=200, help="steps to make altogether (default: 200)")
    add("--batch", type=int, default=128, help="images of a step, of all ranks (default: 128)")
    add("--hidden", type=int, default=512, help="width of the two hidden layers (default: 512)")
    add("--rate", type=float, default=0.05, help="learning rate (default: 0.05)")
    add("--seed", type=int, default=0, help="decides all that is random (default: 0)")
    add("--checkpoint-dir", metavar="DIR", help="folder for commits; without it, none is saved")
    add(
        "--checkpoint-every",
        type=lambda text: text if text == "auto" else int(text),
        default=20,
        metavar="K",
        help="in steps, or 'auto' (default: 20)",
    )
    add("--resume", action="store_true", help="go on from the newest commit, if there is one")
    add("--log", metavar="FILE", help="one line of JSON a step")
    return parser.parse_args()


def show(
    bar: tqdm[Any] | None, step: int, steps: int, loss: float, ranks: tuple[int, ...]
) -> tqdm[Any]:
    """Move the progress bar; who reports first, or takes over from a dead rank, makes it."""
    bar = bar or tqdm(total=steps, initial=step - 1, unit="step", mininterval=0.5)
    bar.set_postfix(loss=f"{loss:.4f}", ranks=len(ranks), refresh=False)
    bar.update()
    return bar


def load_data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images (rows of 64 numbers from 0 to 1) and labels, for training and for the test."""
    # The file alone: to import scikit-learn for it would take each rank two seconds.
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the images come with scikit-learn: pip install scikit-learn")
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    digits = np.loadtxt(path, np.float32, delimiter=",")
    order = np.random.default_rng(seed).permutation(len(digits))
    images, labels = digits[order, :-1] / 16, digits[order, -1].astype(int)
    test, train = slice(TEST_IMAGES), slice(TEST_IMAGES, None)
    return images[train], labels[train], images[test], labels[test]


def cut_into_layers(flat: np.ndarray, widths: list[int]) -> Layers:
    """Return weights and biases of each layer, as views of one flat array."""
    layers, start = [], 0
    for rows, columns in itertools.pairwise(widths):
        middle, end = start + rows * columns, start + (rows + 1) * columns
        layers.append((flat[start:middle].reshape(rows, columns), flat[middle:end]))
        start = end
    return layers


def initialise(layers: Layers, seed: int) -> None:
    """Draw the weights after He et al.; biases start at 0."""
    random = np.random.default_rng([seed, 0])
    for weights, _ in layers:
        weights[:] = random.normal(0, np.sqrt(2 / len(weights)), weights.shape)


def backpropagate(layers: Layers, gradients: Layers, x: np.ndarray, y: np.ndarray) -> float:
    """Write the gradient of the mean cross-entropy over these images; return the loss."""
    inputs = [x]
    for weights, bias in layers[:-1]:
        inputs.append(np.maximum(inputs[-1] @ weights + bias, 0))
    scores = inputs[-1] @ layers[-1][0] + layers[-1][1]
    scores -= scores.max(axis=1, keepdims=True)
    log_odds = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    delta = np.exp(log_odds)
    delta[np.arange(len(y)), y] -= 1
    delta /= len(y)
    for k in reversed(range(len(layers))):
        np.matmul(inputs[k].T, delta, out=gradients[k][0])
        delta.sum(axis=0, out=gradients[k][1])
        if k > 0:
            delta = (delta @ layers[k][0].T) * (inputs[k] > 0)
    return float(-log_odds[np.arange(len(y)), y].mean())


def accuracy(layers: Layers, x: np.ndarray, y: np.ndarray) -> float:
    """Return the share of the images whose digit is found."""
    for weights, bias in layers[:-1]:
        x = np.maximum(x @ weights + bias, 0)
    return float(((x @ layers[-1][0] + layers[-1][1]).argmax(axis=1) == y).mean())


if __name__ == "__main__":
    main()
