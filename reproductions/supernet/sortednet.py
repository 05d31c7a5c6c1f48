"""SortedNet: one network whose every prefix works, by training prefixes at random.

Claim of the paper: sampling nested sizes at random, one per share of the batch and with labels
alone, is enough: all of many nested sub-networks are usable without further training, and they
are about as good as under the sandwich rule with distillation.

Arms: a perceptron with two hidden layers of 128 units for 8 x 8 images, of which both layers
together keep the first 2, 4, ... or 128 units (64 nested sizes), 4,000 MNIST images, and 1,500
steps of AdamW with the same schedule. Every arm runs 128 examples forward and backward per
step: SortedNet four sizes with 32 each, the sandwich four sizes on the same 32, training alone
one size on all. With the idea switched off, the four shares all train the full network. Seeds
give initial weights, order and sizes to all arms alike. Each arm has the best of three learning
rates by validation accuracy on a seed of its own; `tune()` found the `CHOSEN` ones beforehand.

A data set on which tiny prefixes saturate shows nothing, and two units can't tell ten digits
apart whatever the training. So the first claim is about the prefixes from the smallest on that
reaches 96 % of the full network's accuracy when trained alone; the details report which.

Thresholds: 96 % of the accuracy of the full network trained alone, and within 1 point of the
sandwich on the mean over all 64 sizes, as set for scikit-learn's digits.

Result: the second claim holds, with as many examples per step and no distillation. The first
does not: a network of 12 or 16 units trained alone reaches 96 % of the full accuracy, and the
prefix of that size stays 1.7 to 5.3 points below that; prefixes from 24 of 128 units on do
reach it. A likely reason is that a chain of 64 sizes gives the smallest ones few turns (each is
drawn in one micro-step of 64), while the units that they consist of are shared by all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

from reproductions.supernet._mnist8 import DATA, Scores, accuracy, best_rate, digits, loss
from supple.axes.width import Width
from supple.network import Elastic, elastic
from supple.space import Space
from supple.supernet.base import SupernetRule, nested_chain
from supple.supernet.bignas import BigNAS
from supple.supernet.sortednet import SortedNet
from supple.testing.reproduce import Claim, across
from supple.training.loop import train
from supple.training.seeds import kept
from supple.training.step import Pass, Sampler

__all__ = ["DATA", "OFF", "ON", "claims"]

UNITS = tuple(range(2, 129, 2))
ALONE = (4, 8, 12, 16, 24, 32, 64, 128)
EXAMPLES, STEPS, PASSES = 128, 1500, 4
ENOUGH = 0.96
CHOSEN = {"SortedNet": 1e-2, "BigNAS": 1e-2, "FullOnly": 1e-2, "alone": 3e-2}


@dataclass(frozen=True)
class _Full(Sampler):
    space: Space

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        full = self.space.largest()
        return [Pass(full, "largest", part=i, parts=PASSES) for i in range(PASSES)]


@dataclass(frozen=True, kw_only=True)
class FullOnly(SupernetRule):
    """Trains the full network on every share of the batch: SortedNet without its idea."""

    aggregate: str = "mean"

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return _Full(space)


ON = SortedNet(micro_steps=PASSES)
OFF = FullOnly()
SANDWICH = BigNAS(random=PASSES - 2)


def claims(method: SupernetRule, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares all prefixes with training alone and with the sandwich."""
    ours, sandwich = (arm(which, tuple(seeds)) for which in (method, SANDWICH))
    lonely = alone_arm(tuple(seeds))
    needed = [ENOUGH * scores[-1] for scores in lonely]
    smallest = [
        next(units for units, score in zip(ALONE, scores, strict=True) if score >= least)
        for scores, least in zip(lonely, needed, strict=True)
    ]
    yield Claim(
        "every prefix that could do so alone reaches 96 % of the full network's accuracy",
        [min(s[UNITS.index(units) :]) for s, units in zip(ours, smallest, strict=True)],
        needed,
        unit="accuracy",
        details={
            "smallest_units_alone": smallest,
            "units_alone": ALONE,
            "alone": lonely,
            "units": UNITS,
            "ours": ours,
        },
    )
    yield Claim(
        "the mean over all prefixes is within 1 point of the sandwich",
        [sum(scores) / len(scores) for scores in ours],
        [sum(scores) / len(scores) for scores in sandwich],
        threshold=-0.01,
        unit="accuracy",
    )


@cache
def arm(method: SupernetRule, seeds: tuple[int, ...]) -> list[list[float]]:
    """Gives the test accuracies of all prefixes for each seed."""
    cases = [(CHOSEN[type(method).__name__], seed) for seed in seeds]
    return [list(test) for _, test in across(partial(supernet, method), cases)]


@cache
def alone_arm(seeds: tuple[int, ...]) -> list[list[float]]:
    """Gives the test accuracies of networks trained alone, by size, for each seed."""
    cases = [(units, seed) for seed in seeds for units in ALONE]
    flat = across(_alone, cases)
    return [flat[i : i + len(ALONE)] for i in range(0, len(flat), len(ALONE))]


def tune() -> dict[str, float]:
    """Finds the learning rates of all arms, `CHOSEN`; takes some minutes."""
    found = {
        type(method).__name__: best_rate(partial(supernet, method))
        for method in (ON, SANDWICH, OFF)
    }
    return {**found, "alone": best_rate(alone)}


def supernet(method: SupernetRule, case: tuple[float, int]) -> Scores:
    """Trains all prefixes together, and scores each."""
    rate, seed = case
    # The sandwich runs all its passes on the same examples.
    data = digits(EXAMPLES // PASSES if method == SANDWICH else EXAMPLES)
    model = perceptron(UNITS[-1], seed)
    net = elastic(model, data.train.example()[0], axes=[Width(UNITS)], verify=False)
    train(net, data.train, loss, method=method, **settings(rate, seed))
    sizes = nested_chain(net.space)
    assert [set(size.values()) for size in sizes] == [{units} for units in UNITS]
    net.eval()
    validation = [score(net, size, data.validation) for size in sizes]
    return validation, [score(net, size, data.test) for size in sizes]


def score(net: Elastic, size, data) -> float:
    """Gives the accuracy of one size."""
    with net.at(size):
        return accuracy(net.module, data)


def alone(case: tuple[float, int], sizes: Sequence[int] = ALONE) -> Scores:
    """Trains networks of the given sizes, each by itself."""
    rate, seed = case
    data = digits(EXAMPLES)
    found: tuple[list[float], list[float]] = ([], [])
    for units in sizes:
        model = perceptron(units, seed)
        train(model, data.train, loss, **settings(rate, seed))
        found[0].append(accuracy(model, data.validation))
        found[1].append(accuracy(model, data.test))
    return found


def perceptron(units: int, seed: int) -> nn.Module:
    """Builds the network of a size."""
    with kept(seed):
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, units),
            nn.ReLU(),
            nn.Linear(units, units),
            nn.ReLU(),
            nn.Linear(units, 10),
        )


def settings(rate: float, seed: int) -> dict:
    """Gives what all arms have in common."""
    return {
        "steps": STEPS,
        "lr": rate,
        "schedule": "cosine",
        "seed": seed,
        "log_every": STEPS,
        "progress": False,
    }


def _alone(case: tuple[int, int]) -> float:
    units, seed = case
    return alone((CHOSEN["alone"], seed), [units])[1][0]
