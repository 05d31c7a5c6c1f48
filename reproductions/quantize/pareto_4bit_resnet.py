"""Larger residual networks of 4 bits are better than smaller ones of 16 that cost as much.

Claims of the paper: where a MAC of 8 or 4 bits costs a half or a quarter of one of 16, networks
of 8 and 4 bits dominate those of 16; trained with rounding, 4 bits lose next to nothing, but 2
bits do, and cost no less on hardware that has units for 4.

Set-up: residual networks for scikit-learn's handwritten digits, with 8, 12, 16 or 24 channels
in the first stage and twice as many in the second, each trained at 16, 8, 4 and 2 bits for the
same 100 steps of 64 images (SGD with Nesterov momentum, 0.1, weight decay 5e-4, a cosine).
Quality is the share of 544 unseen images that is classified correctly. The first and the last
layer have 8 bits. A MAC costs in proportion to its bits, 2 counting as 4.

Thresholds, from the catalogue: for every network of 16 bits there is one of 8 or 4 that costs
no more and is at most 0.5 points worse (three test images; the catalogue asks for none); the
4-bit networks' hypervolume above 80 % is larger than the 16-bit ones'; 2 bits are worse than 4
at the same size; as in the paper, 4 bits lose at most 1 point on average; and at 2 bits
training with rounding is better by 10 points than rounding afterwards, which is the idea
switched off.

History: all thresholds but the last were set before any run. A trial with 40 steps, one seed
and 8 channels had 90.6, 92.5, 89.9 and 62.9 % at 16, 8, 4 and 2 bits, and 90.4, 90.3 and 23.3 %
at 8, 4 and 2 with rounding afterwards: at 4 bits that hardly loses here, so the last claim was
added. Not tried in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.data.base import load
from supple.models.base import build
from supple.quantize.pareto_4bit_resnet import Frontier, Pareto4bitResNet
from supple.testing.reproduce import Claim, across
from supple.training.loop import train
from supple.training.seeds import kept

__all__ = ["OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2)
WIDTHS, STEPS, FLOOR = (8, 12, 16, 24), 100, 0.8

ON = Pareto4bitResNet()
OFF = Pareto4bitResNet(qat=False)


def claims(method: Pareto4bitResNet, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares qualities at equal cost and at equal size."""
    tables = _all(method, tuple(seeds))
    points = {f"seed {seed}": _told(table) for seed, table in zip(seeds, tables, strict=True)}
    yield Claim(
        "every network of 16 bits has one of 8 or 4 that costs no more and is as good",
        [min(table.margins(16, 8, 4).values()) for table in tables],
        [0.0] * len(tables),
        threshold=-0.005,
        unit="accuracy",
        details=points,
    )
    yield Claim(
        "networks of 4 bits dominate more than those of 16",
        [table.hypervolume(4, FLOOR) for table in tables],
        [table.hypervolume(16, FLOOR) for table in tables],
        unit="accuracy times doublings of cost",
    )
    mean = {bits: [_mean(table, bits) for table in tables] for bits in (16, 4, 2)}
    yield Claim("2 bits are worse than 4 at the same size", mean[4], mean[2], unit="accuracy")
    yield Claim(
        "4 bits lose at most 1 point", mean[4], mean[16], threshold=-0.01, unit="accuracy"
    )
    yield Claim(
        "at 2 bits it takes training with rounding",
        mean[2],
        [_mean(table, 2) for table in _all(OFF, tuple(seeds))],
        threshold=0.1,
        unit="accuracy",
    )


def _mean(table: Frontier, bits: int) -> float:
    """Gives the mean quality of the networks of some bits."""
    found = [point.quality for point in table.of(bits)]
    return sum(found) / len(found)


def _told(table: Frontier) -> dict[str, Any]:
    return {f"{one.size} at {one.bits} bits": [one.cost, one.quality] for one in table.points}


@cache
def _all(method: Pareto4bitResNet, seeds: tuple[int, ...]) -> list[Frontier]:
    return across(partial(_table, method), seeds)


def _table(method: Pareto4bitResNet, seed: int) -> Frontier:
    data = load("digits", batch_size=64)

    def network(width: int) -> nn.Module:
        with kept(seed):
            return build("digits-cnn", widths=(width, 2 * width), blocks=(1, 1))

    def fit(net: nn.Module, rule: Any) -> None:
        train(
            net,
            data.train,
            _loss,
            method=rule,
            steps=STEPS,
            optimizer="sgd",
            lr=0.1,
            weight_decay=5e-4,
            schedule="cosine",
            seed=seed,
            log_every=STEPS,
            progress=False,
        )

    @torch.no_grad()
    def accuracy(net: nn.Module) -> float:
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in data.test.batches())
        return right / data.test.examples

    example, _ = next(iter(data.train.batches()))
    return method.run(network, WIDTHS, fit, accuracy, (example,))


def _loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])
