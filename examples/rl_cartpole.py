"""Balance a pole: actors on ranks play, a gang learns from what they saw, whoever dies.

    hopcoll run -n 4 examples/rl_cartpole.py out --resume

The cross-entropy method (Szita and Lorincz, 2006) with a linear policy: each actor, an object that
lives on a rank with its environment and its random numbers, plays with policies drawn around the
mean; the gang of all ranks makes the next mean and spread of the best. The policies travel as
references. A loop goes on until the means of five turns balanced the pole for 475 steps on average.
An actor whose rank dies moves to another, at the version that counts; so does who leads; and if all
die, the loop goes on from its last state.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the ranks share the cores already

import gymnasium
import numpy as np

import hopcoll
from recovery.workflows import Called, Node, Stop, TaskContext, Workflow, actor, loop, task

SOLVED, TURNS, EPISODES, TRIES, ELITES, SPREAD_MIN = 475.0, 5, 5, 12, 0.2, 0.1
State = dict[str, Any]


@actor
class Player:
    """Plays with policies around a mean."""

    def __init__(self, seed: int) -> None:
        self.restore((seed, None))

    def checkpoint(self) -> Any:
        return self.episodes, self.random.bit_generator.state

    def restore(self, state: Any) -> None:
        self.episodes, numbers = state
        self.random = np.random.default_rng(self.episodes)
        if numbers is not None:
            self.random.bit_generator.state = numbers
        self.game = gymnasium.make("CartPole-v1")

    def play(self, policy: np.ndarray) -> float:
        """One episode: how many steps the pole stood."""
        self.episodes += 1
        seen, steps, over = self.game.reset(seed=self.episodes)[0], 0, False
        while not over:
            seen, _, fell, late, _ = self.game.step(int(seen @ policy > 0))
            steps, over = steps + 1, fell or late
        return float(steps)

    def sample(self, policy: np.ndarray, tries: int, ctx: TaskContext) -> State:
        """Try policies around the mean, and the mean itself; returns a reference to them."""
        mean, spread = policy
        tried = mean + spread * self.random.normal(size=(tries, len(mean)))
        steps = [self.play(one) for one in tried]
        reached = [self.play(mean) for _ in range(EPISODES)]
        return {"tried": ctx.put(tried), "steps": steps, "mean": reached}


@task(deterministic=True, on="any")
def begin(players: list[Any], ctx: TaskContext) -> State:
    """The first state: a mean of zeros."""
    policy = ctx.put(np.array([np.zeros(4), np.ones(4)]))
    return {"policy": policy, "players": players, "averages": []}


@task(ranks="all", checkpoint="async")
def learn(state: State, calls: list[Called], ctx: TaskContext) -> State:
    """All ranks together: the mean and the spread of the best policies."""
    comm: Any = ctx.comm
    everything = np.sort([steps for call in calls for steps in call.value["steps"]])
    enough = everything[-max(2, int(ELITES * len(everything)))]
    sums, total = np.zeros((3, 4)), np.zeros((3, 4))  # of ones, of the best, of their squares
    for call in calls[comm.rank :: comm.size]:
        best = ctx.get(call.value["tried"])[np.array(call.value["steps"]) >= enough]
        sums += [np.full(4, len(best)), best.sum(axis=0), (best**2).sum(axis=0)]
    comm.Allreduce(sums, total)
    count, mean = max(total[0, 0], 1), total[1] / max(total[0, 0], 1)
    spread = np.sqrt(np.maximum(total[2] / count - mean**2, 0)) + SPREAD_MIN
    policy = ctx.put(np.array([mean, spread])) if comm.rank == 0 else None
    average = float(np.mean([steps for call in calls for steps in call.value["mean"]]))
    averages = [*state["averages"], average]
    return {"policy": policy, "players": [call.actor for call in calls], "averages": averages}


@task(deterministic=True)
def turn(state: State, i: int) -> Any:
    """The body of the loop: what is played, and what is learnt from it."""
    if i >= TURNS and np.mean(state["averages"][-TURNS:]) >= SOLVED:
        return Stop(state)
    calls = [Player.call(one, "sample", state["policy"], TRIES) for one in state["players"]]
    return learn.bind(state, calls)


@task(deterministic=True)
def result(state: State) -> list[float]:
    """What the mean of each turn reached."""
    return list(state["averages"])


def graph(players: int, turns: int) -> Node:
    """The whole job."""
    first = begin.bind([Player.bind(1000 * number) for number in range(players)])
    return result.bind(loop(turn, first, turns))


def main() -> None:
    """Run the workflow, or go on with it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the workflow and the plot")
    parser.add_argument("--players", type=int, default=4, help="actors (default: 4)")
    parser.add_argument("--turns", type=int, default=60, help="at the most (default: 60)")
    parser.add_argument("--resume", action="store_true", help="go on with one that was begun")
    options = parser.parse_args()
    if ((folder := options.folder.absolute()) / "workflows").exists() and not options.resume:
        sys.exit(f"{folder} has a workflow already: --resume goes on with it")
    with hopcoll.init() as comm:
        with Workflow("rl", folder / "workflows", comm=comm, progress=True) as workflow:
            averages = workflow.run(graph(options.players, options.turns))
        if comm.rank == min(comm.alive):
            from matplotlib.figure import Figure  # here: it takes a second

            (axes := (figure := Figure()).subplots()).plot(averages, "o-")
            axes.axhline(SOLVED, linestyle="--")
            axes.set(xlabel="turn", ylabel="steps, on average", ylim=(0, 520))
            figure.savefig(folder / "steps.png")
            reached = np.mean(averages[-TURNS:])
            print(f"{len(averages)} turns, the pole stood for {reached:.1f} steps on average")


if __name__ == "__main__":
    main()
