"""Train a small neural network on handwritten digits, on many ranks, whoever of them dies.

    hopcoll run -n 4 examples/sgd_digits.py --checkpoint-dir out --resume

Each rank computes the gradient over its own share of a batch, an Allreduce averages the gradients,
and every rank makes the same step with the same bytes. When a rank is killed, the average is that
of the others, and the next step cuts its batch among them: there is no line in here for it.

Two rules keep the ranks alike. What a rank decides, it decides by the outcome of the last
operation, which is the same everywhere; `comm.alive` may already know more on one rank than on
another. And what is random comes from the seed and the step, so that a job that was resumed from a
checkpoint makes the very steps, bit for bit, that it would have made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
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
from hopcoll.errors import CheckpointError, CheckpointNotFoundError, RankFailedError

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

    # All that training changes is in one array: it is saved, sent and restored as a whole.
    state = np.zeros((2, count), np.float32)
    parameters, velocity = state
    layers = cut_into_layers(parameters, widths)
    initialise(layers, options.seed)

    job = {name: getattr(options, name) for name in ("seed", "hidden", "batch", "rate")}
    first, contributors = agree_on_start(comm, options.checkpoint_dir, state, job)
    if first > 0 and not options.resume:
        if comm.rank == contributors[0]:
            print(f"{options.checkpoint_dir} holds checkpoints: --resume goes on", file=sys.stderr)
        sys.exit(2)
    report = Report(options, first, state, job)

    # The loss travels as the last number of the gradient, so that one Allreduce averages both.
    gradient, mean = np.empty((2, count + 1), np.float32)
    gradient_layers = cut_into_layers(gradient[:-1], widths)
    for step in range(first + 1, options.steps + 1):
        share = draw_share(options, step, len(train_x), contributors.index(comm.rank), contributors)
        gradient[-1] = backpropagate(layers, gradient_layers, train_x[share], train_y[share])

        outcome = comm.Allreduce(gradient, mean, op=hopcoll.AVG)

        velocity *= MOMENTUM
        velocity -= np.float32(options.rate) * mean[:-1]
        parameters += velocity
        contributors = outcome.contributors
        if comm.rank == contributors[0]:
            report.step(step, float(mean[-1]), contributors)

    # Whoever reports may die over it; then the Barrier is without it, and the next one does it.
    accuracy = float((predict(layers, test_x) == test_y).mean())
    reporter = None
    while reporter not in contributors:
        reporter = contributors[0]
        if comm.rank == reporter:
            report.finish(max(first, options.steps), accuracy, contributors)
        contributors = comm.Barrier().contributors


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=200, help="steps to make altogether (default: 200)")
    add("--batch", type=int, default=32, help="images of a rank in a step (default: 32)")
    add("--hidden", type=int, default=512, help="width of the two hidden layers (default: 512)")
    add("--rate", type=float, default=0.05, help="learning rate (default: 0.05)")
    add("--seed", type=int, default=0, help="decides all that is random (default: 0)")
    add("--checkpoint-dir", metavar="DIR", help="folder for checkpoints; without it, none")
    add("--checkpoint-every", type=int, default=20, metavar="K", help="in steps (default: 20)")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--log", metavar="FILE", help="append one line of JSON a step")
    return parser.parse_args()


def agree_on_start(
    comm: hopcoll.Communicator, folder: str | None, state: np.ndarray, job: dict[str, Any]
) -> tuple[int, tuple[int, ...]]:
    """Give all ranks the newest state that one of them can read; return its step, and the ranks.

    The folder may be shared by all hosts or be another one on each.
    """
    found = None
    if folder is not None:
        try:
            like = {"parameters": state[0], "velocity": state[1]}
            found = recovery.load_latest(folder, like=like, attributes=job)
        except CheckpointNotFoundError:
            pass
    best = np.empty(1, np.int64)
    while True:
        # One number for the step, and among those who have it for the lowest rank.
        offer = -1 if found is None else found.step * comm.size + comm.size - 1 - comm.rank
        outcome = comm.Allreduce(np.array([offer]), best, op=hopcoll.MAX)
        if best[0] < 0:
            return 0, outcome.contributors
        root = comm.size - 1 - int(best[0]) % comm.size
        if comm.rank == root and found is not None:
            state[:] = found.arrays["parameters"], found.arrays["velocity"]
        try:
            outcome = comm.Bcast(state, root=root)
        except RankFailedError:
            continue  # it died with what only it had: what do the others have?
        return int(best[0]) // comm.size, outcome.contributors


class Report:
    """What one rank at a time does for all: progress bar, log and checkpoints."""

    def __init__(
        self, options: argparse.Namespace, first: int, state: np.ndarray, job: dict[str, Any]
    ) -> None:
        self.options = options
        self.job = job
        self.arrays = {"parameters": state[0], "velocity": state[1]}
        self.first = first
        self.bar: tqdm[Any] | None = None  # made when this rank has something to report
        self.writer: recovery.AsyncWriter | None = None

    def step(self, step: int, loss: float, contributors: tuple[int, ...]) -> None:
        """Report a step; nobody waits for the disk here."""
        options = self.options
        if self.bar is None:
            self.bar = tqdm(total=options.steps, initial=step - 1, unit="step", mininterval=0.5)
        self.bar.set_postfix(loss=f"{loss:.4f}", ranks=len(contributors), refresh=False)
        self.bar.update()
        self.log(step=step, loss=loss, contributors=contributors)
        if options.checkpoint_dir and step % options.checkpoint_every == 0 < options.steps - step:
            if self.writer is None:
                self.writer = recovery.AsyncWriter(options.checkpoint_dir)
            try:
                self.writer.submit(step, self.arrays, {**self.job, "contributors": contributors})
            except CheckpointError as error:
                tqdm.write(f"{error}; training goes on", file=sys.stderr)

    def finish(self, step: int, accuracy: float, contributors: tuple[int, ...]) -> None:
        """Report the end; returns when the last state is durable."""
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            try:
                self.writer.close()
            except CheckpointError as error:
                tqdm.write(f"{error}; the last state is still to come", file=sys.stderr)
        if folder := self.options.checkpoint_dir:
            recovery.save(folder, step, self.arrays, {**self.job, "contributors": contributors})
        self.log(finished=step, first=self.first, accuracy=accuracy, contributors=contributors)
        text = f"{step} steps, test accuracy {accuracy:.4f}, contributors {contributors}"
        print(text, file=sys.stderr)

    def log(self, **fields: Any) -> None:
        """Append a line to the log, in one write: half a line helps nobody."""
        if self.options.log:
            fields.update(monotonic_s=time.monotonic(), time_ns=time.time_ns())
            with open(self.options.log, "ab", buffering=0) as file:
                file.write(json.dumps(fields).encode() + b"\n")


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


def draw_share(
    options: argparse.Namespace, step: int, image_count: int, position: int, ranks: tuple[int, ...]
) -> np.ndarray:
    """Return the indices of the images that the rank at this position takes in this step."""
    batch = np.random.default_rng([options.seed, step]).permutation(image_count)
    size = min(options.batch, image_count // len(ranks))
    return batch[position * size : (position + 1) * size]


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


def predict(layers: Layers, x: np.ndarray) -> np.ndarray:
    """Return the most likely digit of each image."""
    for weights, bias in layers[:-1]:
        x = np.maximum(x @ weights + bias, 0)
    return (x @ layers[-1][0] + layers[-1][1]).argmax(axis=1)


if __name__ == "__main__":
    main()
