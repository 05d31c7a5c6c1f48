"""QuantNAS: operators and bits, searched under noise, beat a fixed network of 4 bits.

Claims of the paper: the entropy leads to one operation per edge; the networks found upscale
better than a fixed one that is quantized uniformly, at no more bit operations; and a step of
the search with noise is faster than one that rounds.

The task is to upscale grey CIFAR-10 images from 14 to 28 pixels (averages of 2 x 2), 2,000 to
train, half of them for the architecture, and 1,000 test images, by their mean PSNR. The network
has a convolution in full precision, three residual bodies of 12 channels (normed and scaled by
the contrast), each with one of five convolutions (1 x 1; 3 x 3 and 5 x 5 in four groups; 3 x 1
and 1 x 3; 3 x 3), and one that gives four pixels each, added to the nearest pixel. All but the
first compute with 4 or 8 bits, each as it is decided: 3,456 networks.

Search: 200 steps of 16 + 16 images, L1, Adam (weights 2e-3 with cosine; architecture 0.1, as
there are few steps), clipped at 5. Then the network found, and the baseline (3 x 3 in all
bodies, 4 bits everywhere), are trained from scratch with rounding and trained steps: 500 steps
of 16 images, AdamW, 5e-3, cosine, alike, with the same seed.

Time: steps of the search with noise and with rounding (all else equal: the mixture of rounded
copies, each with its trained steps, is convolved once), in turns, one thread, three repeats.

Thresholds, from the catalogue of techniques (Fashion-MNIST there): entropy below 0.3 of that
of even choices; a better PSNR than the baseline's, by any amount; no more bit operations than
the baseline's with any seed, which keeps 8 bits everywhere from passing; less time, by any
amount.

Off: the search by rounding, with no pull to a decision.

History: `tune()` tried weights of bit operations with a seed of its own: with 0.003 what is
found costs 1.10 of the baseline, with 0.005 and 0.007 0.93, with 0.01 0.67. The larger of the
two nearest below was chosen, before any network found was trained. The weight of the entropy
was not varied; of the times there was one look.

Result: it decides, its steps are faster than rounding ones, and what it finds is better than 4
bits everywhere, but with these seeds it costs 3 % more bit operations than the baseline, where
the tuning seed said 7 % less: that claim fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

import supple
from supple.cost.measure import interleaved, quiet_threads, without_drift
from supple.data.base import Dataset, TensorSource, load
from supple.layers.adaptive_deviation_norm import AdaptiveDeviationNorm
from supple.layers.choice import Choice
from supple.layers.quantized import QuantizedConv2d
from supple.search._relaxed import OutputMixture, Relaxation, RelaxedRun, paired
from supple.search.quantnas_sr import BitOps, QuantNASSR, joint_entropy
from supple.space import Config
from supple.testing.reproduce import Claim, across
from supple.training.loop import train
from supple.training.recalibrate import recalibrate
from supple.training.schedule import Cosine
from supple.training.seeds import generator, kept
from supple.training.step import StepOptions

__all__ = ["DATA", "OFF", "ON", "claims"]

DATA = ("cifar10/train.parquet", "cifar10/test.parquet")
WIDTH, BLOCKS, SIDE = 12, 3, 28
IMAGES, TESTED = 2000, 1000
SEARCH_STEPS, SEARCH_RATE = 200, 2e-3
STEPS, RATE = 500, 5e-3
BATCH = 16
DECIDED = 0.3
ROUNDS = 2
TUNING_SEED = 1000
PRICES = (0.003, 0.005, 0.007, 0.01, 0.03, 0.1)
"""Weights of bit operations that are tried."""


@dataclass(frozen=True, kw_only=True)
class Rounding(QuantNASSR):
    """The same search with rounding in the place of noise."""

    def relaxation(self) -> Relaxation:
        return OutputMixture()


ON = QuantNASSR(lr=0.1, entropy=1e-2, bit_ops=0.007)
OFF = Rounding(lr=0.1, entropy=0.0, bit_ops=0.007)


# -------------------------------------------------------------------------------------- network


def operators() -> Choice:
    """Gives the convolutions that a body may have."""
    grouped = {"groups": 4, "bias": False}
    return Choice(
        QuantizedConv2d(WIDTH, WIDTH, 1, bias=False),
        QuantizedConv2d(WIDTH, WIDTH, 3, **grouped),
        QuantizedConv2d(WIDTH, WIDTH, 5, **grouped),
        nn.Sequential(
            QuantizedConv2d(WIDTH, WIDTH, (3, 1), bias=False),
            QuantizedConv2d(WIDTH, WIDTH, (1, 3), bias=False),
        ),
        QuantizedConv2d(WIDTH, WIDTH, 3, bias=False),
    )


class Upscaler(nn.Module):
    """Doubles height and width of grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.body = nn.Sequential(
            *(AdaptiveDeviationNorm(operators(), WIDTH) for _ in range(BLOCKS))
        )
        self.tail = nn.Sequential(nn.BatchNorm2d(WIDTH), QuantizedConv2d(WIDTH, 4, 3))
        self.up = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.tail(self.body(self.head(x))) + x)
        return out


def network(seed: int) -> supple.Elastic:
    """Builds the elastic network, untrained."""
    with kept(seed):
        model = Upscaler()
    x = torch.zeros(2, 1, SIDE // 2, SIDE // 2)
    return supple.elastic(model, x, axes=[supple.Operator()], verify=False)


def baseline(net: supple.Elastic) -> Config:
    """Gives the config of the fixed network: 3 x 3 in all bodies, 4 bits everywhere."""
    last = {site.name: site.choices[-1] for site in net.space.sites}
    return net.space.config({n: 0 if n.endswith("precision") else c for n, c in last.items()})


# --------------------------------------------------------------------------------------- claims


def claims(method: QuantNASSR, seeds: Sequence[int]) -> Iterator[Claim]:
    """Looks at the search, at what it found, and at the time of a step."""
    found = across(search, [(method, seed) for seed in seeds])
    configs = [config for config, _ in found]
    yield Claim(
        "the search comes to a decision",
        [share for _, share in found],
        [DECIDED for _ in found],
        better="lower",
        unit="share of the entropy of even choices",
        details={"found": [dict(config) for config in configs]},
    )
    fixed = baseline(network(0))
    yield Claim(
        "the networks found upscale better than the fixed one of 4 bits",
        across(alone, list(zip(configs, seeds, strict=True))),
        list(fixed_scores(tuple(seeds))),
        unit="dB",
    )
    count = BitOps(network(0))
    shares = [count(config) / count(fixed) for config in configs]
    yield Claim(
        "none of them costs more bit operations",
        [max(shares)],
        [1.0],
        threshold=-1e-9,
        better="lower",
        exact=True,
        unit="share of the fixed network's",
        details={"shares": shares},
    )
    times = [seconds(method, seed) for seed in seeds]
    yield Claim(
        "a step with noise is faster than one that rounds",
        [ours / rounding for ours, rounding in times],
        [1.0 for _ in times],
        better="lower",
        unit="relative time",
        details={"seconds": times},
    )


@cache
def fixed_scores(seeds: tuple[int, ...]) -> list[float]:
    """Trains the baseline with each seed."""
    fixed = baseline(network(0))
    return across(alone, [(fixed, seed) for seed in seeds])


# --------------------------------------------------------------------------------------- search


@cache
def images(part: str, number: int) -> tuple[Tensor, Tensor]:
    """Loads the first images of a part, small and large."""
    every = load(
        "images", path="cifar10", size=SIDE, mean=(0.0,) * 3, std=(1.0,) * 3, augment=False
    )
    colours, _ = getattr(every, part).source.take(torch.arange(number))
    large = torch.einsum("nchw,c->nhw", colours, torch.tensor([0.299, 0.587, 0.114]))[:, None]
    return F.avg_pool2d(large, 2), large


def batches(first: int, last: int) -> Dataset:
    """Gives training images as pairs of small and large ones."""
    pairs = tuple(each[first:last] for each in images("train", IMAGES))
    return Dataset(source=TensorSource(pairs), batch_size=BATCH)


def halves() -> tuple[Dataset, Dataset]:
    """Gives what the weights learn from, and what the architecture does."""
    middle = IMAGES // 2
    return batches(0, middle), batches(middle, IMAGES)


def loss(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """Gives the mean absolute error."""
    return F.l1_loss(output, batch[1])


def started(method: QuantNASSR, seed: int, steps: int = SEARCH_STEPS) -> RelaxedRun:
    """Begins a search."""
    net = network(seed)
    return method.start(
        net.train(),
        Adam(net.module.parameters(), lr=SEARCH_RATE),
        loss=loss,
        generator=generator(seed, "search"),
        options=StepOptions(steps=steps, clip=5.0, schedule=Cosine()),
    )


def search(case: tuple[QuantNASSR, int]) -> tuple[Config, float]:
    """Searches; gives what was found, and the entropy relative to even choices."""
    method, seed = case
    run, (first, second) = started(method, seed), halves()
    for epoch in range(-(-SEARCH_STEPS // len(first))):
        for batch in paired(first, second, epoch=epoch, seed=seed):
            if run.weights.steps < SEARCH_STEPS:
                run.step(batch)
    weights = {name: each.detach() for name, each in run.mixture().items()}
    even = {name: torch.full_like(each, 1 / len(each)) for name, each in weights.items()}
    return run.derive(), float(joint_entropy(weights) / joint_entropy(even))


def alone(case: tuple[Config, int]) -> float:
    """Trains a network from scratch and gives its mean PSNR of the test images."""
    config, seed = case
    data, whole = batches(0, IMAGES), network(seed)
    recalibrate(whole, config, data, batches=1)
    size = whole.extract(config)
    train(
        size,
        data,
        loss,
        steps=STEPS,
        lr=RATE,
        schedule="cosine",
        seed=seed,
        log_every=STEPS,
        progress=False,
    )
    return psnr(size)


@torch.no_grad()
def psnr(module: nn.Module) -> float:
    """Gives the mean PSNR of the test images."""
    module.eval()
    small, large = images("test", TESTED)
    errors = (module(small).clamp(0, 1) - large).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())


def seconds(method: QuantNASSR, seed: int) -> list[float]:
    """Times a step of the search, and one of the search by rounding."""
    rounding = Rounding(lr=ON.lr, entropy=ON.entropy, bit_ops=ON.bit_ops, delay=0.0)
    runs = [started(type(method)(lr=ON.lr, delay=0.0), seed), started(rounding, seed)]
    batch = next(paired(*halves(), epoch=0))

    def step(index: int) -> Callable[[], Any]:
        return lambda: runs[index].step(batch)

    with quiet_threads(1):
        times = interleaved(len(runs), step, rounds=ROUNDS, seconds=0.3, seed=seed)
    return without_drift(times).tolist()


def tune() -> None:
    """Prints what a search finds by the weight of bit operations."""
    net = network(0)
    count = BitOps(net)
    fixed = count(baseline(net))
    for bit_ops in PRICES:
        method = dataclasses.replace(ON, bit_ops=bit_ops)
        config, share = search((method, TUNING_SEED))
        print(bit_ops, share, count(config) / fixed, dict(config), flush=True)


if __name__ == "__main__":
    tune()
