"""TangleNAS: mixing weights finds good networks at less than half the memory of outputs.

Claim of the paper: where options share their weights, a search by gradients may mix the weights
instead of the outputs; it then needs the memory of one network, and finds networks as good.

Three convolutions (kernel 1, 3 or 5 and 4, 8 or 16 channels each: 729 networks) with batch
normalization, ReLU and one pooling in between, on MNIST's images, shrunk to 8 x 8. A search is
200 steps; weights learn from 2,000 training images, architecture parameters from the 2,000 of
the validation set, both in batches of 50 (weights by SGD with momentum, learning rate 0.05 and
cosine; parameters by Adam, 0.02). Both arms draw from a Dirichlet distribution, as the authors
recommend. The larger a network, the better it is here, so both arms minimise the cross-entropy
plus `PRICE` times the relative mean cost in multiply-accumulates, and what they find is judged
by just that: test cross-entropy of the network trained from scratch (100 steps of AdamW,
learning rate 1e-2, cosine), plus `PRICE` times its relative cost. So a search can't win by
taking the largest network, nor the smallest.

Off: outputs are mixed, of nine convolutions per layer with weights of their own, zero-padded to
16 channels; they read all 16 channels of the layer before, and are priced so.

Memory is the peak of everything allocated, networks and optimizers included, over two steps.

Thresholds, from the catalogue of techniques (28 x 28 Fashion-MNIST, kernels of 3, 5 and 7 and
up to 32 channels there): less than half the memory of the mixture of outputs; in the top
quarter of 40 random networks, trained alike. Ours: worth no less than what the mixture of
outputs finds, within 0.05.

History: each search was tried with one seed that is not reported, and what both found trained
from scratch; no random network was looked at.

Result: holds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import supple
from reproductions.supernet._mnist8 import DATA, digits, loss
from supple.data.base import Dataset
from supple.layers.choice import Choice
from supple.search._relaxed import Halves, OutputMixture, Relaxation, paired
from supple.search.tanglenas import TangleNAS
from supple.space import Config
from supple.testing.reproduce import Claim, across
from supple.training.loop import train
from supple.training.recalibrate import recalibrate
from supple.training.schedule import schedule_of
from supple.training.seeds import kept
from supple.training.step import StepOptions

__all__ = ["DATA", "OFF", "ON", "claims"]

KERNELS, CHANNELS = (1, 3, 5), (4, 8, 16)
OPTIONS = tuple(itertools.product(KERNELS, CHANNELS))
BATCH, SEARCH_STEPS, SEARCH_RATE, STEPS, RATE = 50, 200, 0.05, 100, 1e-2
PRICE, SAMPLES = 0.5, 40


@dataclass(frozen=True, kw_only=True)
class Outputs(TangleNAS):
    """The same search with mixtures of outputs."""

    def relaxation(self) -> Relaxation:
        return OutputMixture()


ON = TangleNAS(lr=0.02, price=PRICE)
OFF = Outputs(lr=0.02, price=PRICE)


def claims(method: TangleNAS, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares memory, and what is found, with mixtures of outputs and random networks."""
    yield Claim(
        "it needs less than half the memory of a mixture of outputs",
        [peak(method) / 2**20],
        [peak(OFF) / 2**20 / 2],
        better="lower",
        exact=True,
        unit="MiB (half of the other's)",
    )
    random = sampled()
    found = {arm: searched(arm, tuple(seeds)) for arm in (method, OFF)}
    values = {
        arm: judged([(config, seed) for config, seed in zip(each, seeds, strict=True)])
        for arm, each in found.items()
    }
    yield Claim(
        "it finds a network in the top quarter of random ones",
        [statistics.fmean(other < value for other in random) for value in values[method]],
        [0.25] * len(seeds),
        better="lower",
        unit="share of 40 that are better",
        details={
            "values": values[method],
            "random": random,
            "sizes": [dict(config) for config in found[method]],
            "costs": [cost(config) for config in found[method]],
        },
    )
    yield Claim(
        "what it finds is no worse than what a mixture of outputs does",
        values[method],
        values[OFF],
        threshold=-0.05,
        better="lower",
        unit="cross-entropy and price",
        details={"sizes of outputs": [dict(config) for config in found[OFF]]},
    )


# ---------------------------------------------------------------------------------- networks


def network(seed: int) -> supple.Elastic:
    """Builds the network whose sizes share their weights."""
    convs = [
        nn.Conv2d(inputs, CHANNELS[-1], KERNELS[-1], padding=KERNELS[-1] // 2, bias=False)
        for inputs in (1, CHANNELS[-1], CHANNELS[-1])
    ]
    with kept(seed):
        for conv in convs:
            conv.reset_parameters()
        model = around(convs)
    return supple.elastic(
        model,
        torch.zeros(2, 1, 8, 8),
        axes=[supple.Kernel(KERNELS), supple.Width(CHANNELS)],
        verify=False,
    )


class Padded(nn.Module):
    """A convolution whose output gets channels of zeros."""

    def __init__(self, inputs: int, kernel: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return F.pad(out, (0, 0, 0, 0, 0, CHANNELS[-1] - out.shape[1]))


def of_options(seed: int) -> supple.Elastic:
    """Builds the network whose options have weights of their own."""
    with kept(seed):
        layers = [
            Choice(*(Padded(inputs, *option) for option in OPTIONS))
            for inputs in (1, CHANNELS[-1], CHANNELS[-1])
        ]
        model = around(layers)
    return supple.elastic(
        model, torch.zeros(2, 1, 8, 8), axes=[supple.Operator()], verify=False
    )


def around(layers: Sequence[nn.Module]) -> nn.Module:
    """Puts what both networks have in common around the layers."""
    first, second, third = layers
    norms = [nn.BatchNorm2d(CHANNELS[-1]) for _ in layers]
    return nn.Sequential(
        *(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.MaxPool2d(2)),
        *(third, norms[2], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(CHANNELS[-1], 10),
    )


LAYERS = ("0", "3", "7")


def translated(config: Config) -> Config:
    """Gives the network that options stand for, as a size of `network`."""
    chosen = {}
    for path in LAYERS:
        kernel, channels = OPTIONS[config[path]]
        chosen |= {f"{path}.kernel": kernel, path: channels}
    return priced().space.config(chosen)


# ---------------------------------------------------------------------------------- searches


@cache
def searched(method: TangleNAS, seeds: tuple[int, ...]) -> list[Config]:
    """Gives the network that each seed finds."""
    return across(search, [(method, seed) for seed in seeds])


def search(case: tuple[TangleNAS, int]) -> Config:
    """Searches once."""
    method, seed = case
    run = begun(method, seed)
    for batch in batches(seed, SEARCH_STEPS):
        run.step(batch)
    config = run.derive()
    return translated(config) if isinstance(method, Outputs) else config


def begun(method: TangleNAS, seed: int):
    """Begins a search."""
    net = (of_options if isinstance(method, Outputs) else network)(seed)
    net.train()
    optimizer = torch.optim.SGD(
        net.module.parameters(), lr=SEARCH_RATE, momentum=0.9, weight_decay=3e-4
    )
    return method.start(
        net,
        optimizer,
        loss=loss,
        generator=torch.Generator().manual_seed(seed),
        options=StepOptions(steps=SEARCH_STEPS, schedule=schedule_of("cosine", 0)),
    )


def batches(seed: int, steps: int) -> Iterator[Halves]:
    """Gives so many pairs of batches."""
    found = digits(BATCH)
    epochs = (
        paired(training(), found.validation, epoch=epoch, seed=seed)
        for epoch in itertools.count()
    )
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


def training() -> Dataset:
    """The images that weights learn from."""
    return digits(BATCH).train.first(2000)


@cache
def peak(method: TangleNAS) -> int:
    """Gives the most bytes that two steps of a search hold at once, from its beginning on."""
    pairs = list(batches(0, 2))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run = begun(method, 0)
        for batch in pairs:
            run.step(batch)
    # each allocation by itself; `seen.events()` adds them up by operator
    raw = seen.profiler.kineto_results.events()
    events = sorted((e for e in raw if e.name() == "[memory]"), key=lambda e: e.start_ns())
    changes = (event.nbytes() for event in events)
    return int(max(itertools.accumulate(changes)))


# ------------------------------------------------------------------------ trained from scratch


@cache
def priced() -> supple.Elastic:
    """The network that sizes are priced by."""
    return network(0)


def cost(config: Config) -> float:
    """Gives the cost of a network relative to the largest."""
    net = priced()
    own, full = net.costs([config, net.space.largest()])["macs"]
    return float(own / full)


@cache
def sampled() -> list[float]:
    """Gives the values of random networks."""
    rows = priced().space.random_many(SAMPLES, np.random.default_rng(0))
    return judged(
        [(config, i % 3) for i, config in enumerate(priced().space.decode_many(rows))]
    )


def judged(cases: Sequence[tuple[Config, int]]) -> list[float]:
    """Gives test cross-entropy of networks trained from scratch, and their price."""
    found = across(alone, cases)
    return [
        value + PRICE * cost(config) for value, (config, _) in zip(found, cases, strict=True)
    ]


def alone(case: tuple[Config, int]) -> float:
    """Trains one network from scratch and gives its cross-entropy on the test images."""
    config, seed = case
    whole = network(seed)
    recalibrate(whole, config, training(), batches=1)  # its statistics are reset below
    size = whole.extract(config)
    with kept(seed):
        for part in size.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()  # slices would start at the full network's scale
    train(
        size,
        training(),
        loss,
        steps=STEPS,
        lr=RATE,
        schedule="cosine",
        seed=seed,
        log_every=STEPS,
        progress=False,
    )
    return _cross_entropy(size, digits(BATCH).test)


@torch.no_grad()
def _cross_entropy(module: nn.Module, data: Dataset) -> float:
    module.eval()
    total = sum(F.cross_entropy(module(x), y, reduction="sum") for x, y in data.batches())
    return float(total) / data.examples
