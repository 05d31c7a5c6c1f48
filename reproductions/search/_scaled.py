"""What the reproductions of scaling rules share: networks of a spec, their cost, training.

The network of a spec is `digits-cnn` on colour images: each stage is a convolution and residual
blocks of two. The data are CIFAR-10's first training images, resized to the spec's resolution,
and all 5,000 test images.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.cost.count import macs
from supple.data.base import Dataset, Splits, load
from supple.models.base import build
from supple.search._scaling import Spec
from supple.training.loop import train
from supple.training.seeds import kept

DATA = ("cifar10/train.parquet", "cifar10/test.parquet")
BATCH = 50


def network(spec: Spec, seed: int = 0) -> nn.Module:
    """Builds the network of a spec."""
    with kept(seed):
        return build("digits-cnn", widths=spec.width, blocks=spec.depth, channels=3)


@cache
def cost(spec: Spec) -> int:
    """Counts its multiply-accumulates for one image."""
    return macs(network(spec), (torch.zeros(1, 3, spec.resolution, spec.resolution),))


@cache
def images(resolution: int, number: int, augment: bool) -> Splits:
    """Loads the images at a resolution, the first `number` of them to train."""
    found = load(
        "images",
        path="cifar10",
        size=resolution,
        mean=(0.49, 0.48, 0.45),
        std=(0.25, 0.24, 0.26),
        augment=augment,
        batch_size=BATCH,
    )
    return Splits(
        train=found.train.first(number),
        validation=found.validation,
        test=found.test,
        classes=10,
    )


def accuracy(
    spec: Spec,
    seed: int,
    *,
    examples: int,
    epochs: int,
    smoothing: float = 0.0,
    augment: bool = False,
    lr: float = 1e-2,
    weight_decay: float = 0.01,
    part: Literal["validation", "test"] = "test",
) -> float:
    """Trains the network of a spec from scratch with AdamW and gives its accuracy."""
    data = images(spec.resolution, examples, augment)
    net = network(spec, seed)

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output, batch[1], label_smoothing=smoothing)

    steps = epochs * len(data.train)
    train(
        net,
        data.train,
        loss,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        schedule="cosine",
        seed=seed,
        log_every=steps,
        progress=False,
    )
    return right(net, getattr(data, part))


@torch.no_grad()
def right(net: nn.Module, data: Dataset) -> float:
    """Gives the share of a set that a network classifies correctly."""
    net.eval()
    return sum(int((net(x).argmax(1) == y).sum()) for x, y in data.batches()) / data.examples
