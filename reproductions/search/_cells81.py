"""A cell of four edges with three options each, on digits: all 81 cells trained alone.

`python -m reproductions.search._cells81` trains them and writes `_cells81.json` beside this
file, which is committed: what a search picks is then looked up, not trained again. Each cell
is trained from scratch with two seeds, for 400 steps at batch size 50, by AdamW with a peak
learning rate of 1e-2 and a cosine, on 2,000 images of MNIST that were shrunk to 8 x 8, and
tested on 5,000. A cell's true accuracy is the mean over both seeds.

The network is a convolution of 3 x 3 to eight channels, the cell, and a linear classifier on
the mean over all places. With its input $x$ the cell computes $d(b(x) + c(a(x)))$, where each
edge $a, b, c, d$ is one of: a skip, the mean over 3 x 3, and a separable convolution of 3 x 3
(ReLU, depthwise, pointwise, batch normalization). As in DARTS, normalizations in the cell have
no learned gain and bias while it is searched, and have them when it is trained alone.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from reproductions.supernet._mnist8 import DATA, accuracy, digits, loss
from supple.axes.operator import Operator
from supple.cost.measure import device_name
from supple.data.base import Dataset
from supple.errors import SuppleWarning
from supple.files import read_json, write_json
from supple.layers.choice import Choice
from supple.network import Elastic, elastic
from supple.search._relaxed import RelaxedRun, RelaxedSearch, paired
from supple.space import Config
from supple.testing.reproduce import across
from supple.training.loop import train
from supple.training.schedule import Cosine
from supple.training.seeds import generator, kept
from supple.training.step import StepOptions

__all__ = [
    "DATA",
    "EDGES",
    "Halves",
    "alpha_rate",
    "data",
    "loss",
    "searched",
    "sgd",
    "skips",
    "tested",
    "true_accuracy",
    "word",
]

TABLE = Path(__file__).parent / "_cells81.json"
EDGES = ("cell.a", "cell.b", "cell.c", "cell.d")
SKIP, MEAN, SEPARABLE = range(3)
CHANNELS, CLASSES = 8, 10
SEEDS = (0, 1)
STEPS, BATCH, RATE, IMAGES = 400, 50, 1e-2, 2000

SEARCH_RATE, MOMENTUM, DECAY, CLIP = 0.025, 0.9, 3e-4, 5.0
_WAY = 3e-4 * 20_000
"""DARTS' rate of the parameters times its steps: how far they can go."""


class Cell(nn.Module):
    """Four edges, each of which is a choice of three options."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            Choice(nn.Identity(), _mean(affine), _separable(affine)) for _ in EDGES
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.d(self.b(x) + self.c(self.a(x)))
        return out


class Network(nn.Module):
    """A stem, the cell, a classifier."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        convolution = nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False)
        self.stem = nn.Sequential(convolution, nn.BatchNorm2d(CHANNELS))
        self.cell = Cell(affine)
        self.classifier = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.cell(self.stem(x)).mean((2, 3)))
        return logits


def _mean(affine: bool) -> nn.Module:
    return nn.Sequential(
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
        nn.BatchNorm2d(CHANNELS, affine=affine),
    )


def _separable(affine: bool) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False),
        nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
        nn.BatchNorm2d(CHANNELS, affine=affine),
    )


def network(seed: int, *, affine: bool) -> Elastic:
    """Builds the elastic network, untrained.

    Args:
        seed: Of its weights.
        affine: Whether normalizations in the cell have a gain and a bias.
    """
    with kept(seed):
        model = Network(affine)
    return elastic(model, (torch.zeros(2, 1, 8, 8),), axes=[Operator()], verify=False)


class Halves(NamedTuple):
    """What is searched on: two sets of 1,000 images."""

    train: Dataset
    validation: Dataset


@cache
def data() -> Halves:
    """Gives the two halves of the 2,000 images."""
    images = digits(BATCH).train.first(IMAGES)
    places = torch.arange(IMAGES)
    return Halves(images.select(places[: IMAGES // 2]), images.select(places[IMAGES // 2 :]))


def tested() -> Iterator[Any]:
    """Gives batches of 2,000 images that no search sees."""
    return digits(BATCH).test.first(IMAGES).batches()


def alpha_rate(epochs: int) -> float:
    """Gives the rate at which the parameters can go as far as in DARTS, in fewer steps."""
    return round(_WAY / (epochs * IMAGES // 2 // BATCH), 6)


def sgd(net: Elastic) -> torch.optim.Optimizer:
    """Makes the optimizer of a mixture's weights."""
    parameters = net.module.parameters()
    return torch.optim.SGD(parameters, SEARCH_RATE, momentum=MOMENTUM, weight_decay=DECAY)


def searched(method: RelaxedSearch, seed: int, epochs: int) -> RelaxedRun:
    """Trains a mixture: SGD with a cosine from 0.025, clipped at 5.

    Args:
        method: How.
        seed: Of the weights, the parameters and the order of the data.
        epochs: Passes through the training half.
    """
    halves = data()
    net = network(seed, affine=False)
    optimizer = sgd(net)
    options = StepOptions(schedule=Cosine(), clip=CLIP, steps=epochs * len(halves.train))
    run = method.start(
        net, optimizer, loss=loss, generator=generator(seed, "search"), options=options
    )
    net.train()
    for epoch in range(epochs):
        for batch in paired(*halves, epoch=epoch, seed=seed):
            run.step(batch)
    return run


def skips(config: Config) -> int:
    """Counts the skips of a cell."""
    return sum(config[edge] == SKIP for edge in EDGES)


def true_accuracy(config: Config) -> float:
    """Looks up the test accuracy of a cell that was trained alone, the mean over seeds."""
    return statistics.fmean(_read()["accuracies"][word(config)])


@cache
def _read() -> dict[str, Any]:
    found: dict[str, Any] = read_json(TABLE)
    return found


def word(config: Config) -> str:
    """Names a cell by the option of each edge, such as `0212`."""
    return "".join(str(config[edge]) for edge in EDGES)


def alone(case: tuple[tuple[int, ...], int]) -> float:
    """Trains one cell from scratch; gives its test accuracy.

    Args:
        case: The option of each edge, and the seed of weights and of the order of the data.
    """
    options, seed = case
    whole = network(seed, affine=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuppleWarning)  # nothing was trained yet
        net = whole.extract(dict(zip(EDGES, options, strict=True)))
    images = digits(BATCH).train.first(IMAGES)
    train(
        net,
        images,
        loss,
        steps=STEPS,
        lr=RATE,
        schedule="cosine",
        seed=seed,
        log_every=STEPS,
        progress=False,
    )
    return accuracy(net, digits(BATCH).test)


def main() -> None:
    """Train all cells with all seeds and write the table."""
    started = time.perf_counter()
    cells = list(itertools.product(range(3), repeat=len(EDGES)))
    found = across(alone, [(cell, seed) for seed in SEEDS for cell in cells])
    by_seed = [found[i * len(cells) : (i + 1) * len(cells)] for i in range(len(SEEDS))]
    seconds = time.perf_counter() - started
    words = ["".join(map(str, cell)) for cell in cells]
    tau = float(kendalltau(*by_seed).statistic)
    write_json(
        TABLE,
        {
            "command": "python -m reproductions.search._cells81",
            "options": ["skip", "mean", "separable"],
            "edges": list(EDGES),
            "accuracies": dict(zip(words, map(list, zip(*by_seed, strict=True)), strict=True)),
            "seed_to_seed_tau": tau,
            "seconds": round(seconds, 1),
            "device": device_name(),
            "versions": f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        },
    )
    means = sorted(statistics.fmean(each) for each in zip(*by_seed, strict=True))
    print(
        f"81 cells, accuracy {means[0]:.3f} to {means[-1]:.3f}, tau between seeds {tau:.3f}, "
        f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
