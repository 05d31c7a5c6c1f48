"""What the reproductions of this room share: real digits at 8 x 8, scores, fair tuning.

MNIST's first 4,000 training images and all 5,000 test images, shrunk to 8 x 8. They cost as
little as scikit-learn's digits, with nine times as many to test on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.data.base import Dataset, Splits, load
from supple.testing.reproduce import across

DATA = ("mnist/train.parquet", "mnist/test.parquet")
RATES = (3e-3, 1e-2, 3e-2)
"""Learning rates that every arm chooses from."""
_TUNING_SEED = 1000


@cache
def digits(batch_size: int) -> Splits:
    """Loads the images: 4,000 to train, 2,000 to choose by, 5,000 to report on."""
    found = load(
        "images",
        path="mnist",
        size=8,
        mean=(0.13,) * 3,
        std=(0.31,) * 3,
        augment=False,
        batch_size=batch_size,
    )
    return Splits(
        train=found.train.first(4000),
        validation=found.validation.first(2000),
        test=found.test,
        classes=10,
    )


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Gives the cross-entropy to the labels."""
    return F.cross_entropy(output, batch[1])


@torch.no_grad()
def accuracy(module: nn.Module, data: Dataset) -> float:
    """Gives the share of a set that a network classifies correctly."""
    module.eval()
    right = sum(int((module(x).argmax(1) == y).sum()) for x, y in data.batches())
    return right / data.examples


Scores = tuple[Sequence[float], Sequence[float]]
"""Validation and test accuracies of a run, by size."""


def best_rate(run: Callable[[tuple[float, int]], Scores]) -> float:
    """Finds the learning rate with the best validation accuracy, on a seed not reported.

    Args:
        run: What an arm does with a learning rate and a seed.

    Returns:
        One of `RATES`.
    """
    scores = across(run, [(rate, _TUNING_SEED) for rate in RATES])
    validation = [sum(each) for each, _ in scores]
    return RATES[validation.index(max(validation))]
