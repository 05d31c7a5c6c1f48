"""A hyperspace of 216 spaces of small networks, and tables of its distilled blocks.

A network has three stages, each a convolution and one block or two. A space says for each stage
which of three kinds of block it has (residual, inverted residual, depthwise with a kernel of 5)
and which of two windows its width is from; within the window the width can be a half, three
quarters or all of the largest, and one block or two: 216 networks in each space.

`python -m reproductions.search._blocks` makes `blocks.json`, as the paper has it: for each
stage, kind and window, the elastic stage learns alone the output of a teacher's stage from that
stage's input (200 steps of `SortedNet` on 2,000 images, `noise_to_signal`). Per sub-block the
table has the loss on 2,000 other images and the milliseconds that it takes for 32 images, in
float32 on one thread, all timed in turn. The teacher is nb-mini's full network. It takes two
minutes on one core (AMD EPYC).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.nb_mini import data
from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.cost.measure import interleaved, without_drift
from supple.files import read_json, write_json
from supple.models.base import build
from supple.network import Elastic, elastic
from supple.search.spaceevo import BlockTables, noise_to_signal
from supple.space import Config, Site, Space
from supple.supernet.sortednet import SortedNet
from supple.testing.reproduce import across
from supple.training.loop import train
from supple.training.recalibrate import recalibrate
from supple.training.seeds import kept

TABLE = Path(__file__).with_name("blocks.json")
STAGES, KINDS, BLOCKS = 3, 3, 2
TEACHER = (16, 32, 48)
WINDOWS = ((8, 16), (16, 32), (24, 48))
FRACTIONS = (0.5, 0.75, 1.0)
SUB_BLOCKS = tuple(itertools.product(FRACTIONS, range(1, BLOCKS + 1)))
STEPS, RATE, BATCH = 200, 5e-3, 32
SITES = tuple((f"block{i}", f"window{i}") for i in range(STAGES))
SPACE = Space(
    [Site(block, "block", tuple(range(KINDS)), 0) for block, _ in SITES]
    + [Site(window, "window", (0, 1), 1) for _, window in SITES]
)


class Block(nn.Module):
    """Keeps the shape: residual, inverted residual, or depthwise with a large kernel."""

    def __init__(self, kind: int, width: int, inner: int) -> None:
        super().__init__()
        if kind == 0:
            layers = [*conv(width, inner, 3), nn.ReLU(), *conv(inner, width, 3)]
        elif kind == 1:
            middle = conv(2 * inner, 2 * inner, 3, groups=2 * inner)
            layers = [*conv(width, 2 * inner, 1), nn.ReLU(), *middle, nn.ReLU()]
            layers += conv(2 * inner, width, 1)
        else:
            layers = [*conv(width, width, 5, groups=width), *conv(width, width, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class Stage(nn.Module):
    """A convolution into the stage's width, and blocks."""

    def __init__(
        self, stage: int, kind: int, before: int, width: int, inner: int, blocks: int = BLOCKS
    ) -> None:
        super().__init__()
        stride = 2 if stage else 1
        self.entry = nn.Sequential(*conv(before, width, 3, stride=stride), nn.ReLU())
        self.blocks = nn.ModuleList(Block(kind, width, inner) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return x


class Distilled(nn.Module):
    """A stage, and a projection to as many channels as the teacher's stage has."""

    def __init__(self, stage: Stage, width: int, channels: int) -> None:
        super().__init__()
        self.stage = stage
        self.project = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.project(self.stage(x))
        return found


def conv(
    before: int, width: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Gives a convolution and its batch norm."""
    layer = nn.Conv2d(before, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(width)]


def tables() -> BlockTables:
    """Gives the tables: by stage, kind and window, loss and latency of each of `SUB_BLOCKS`."""
    found = read_json(TABLE)["stages"]
    return BlockTables(
        SITES,
        tuple(
            {(kind, window): np.array(stage[f"{kind}-{window}"]) for kind, window in _choices()}
            for stage in found
        ),
    )


def network(config: Config, sub_blocks: tuple[int, ...], seed: int) -> nn.Module:
    """Builds a network of a space from a sub-block of each stage, untrained."""
    stages: list[nn.Module] = []
    before = 1
    with kept(seed):
        for i, (block, window) in enumerate(SITES):
            inner = WINDOWS[i][config[window]]
            fraction, blocks = SUB_BLOCKS[sub_blocks[i]]
            width = int(fraction * inner)
            stages.append(Stage(i, config[block], before, width, inner, blocks))
            before = width
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)]
        return nn.Sequential(*stages, *pool)


def _choices() -> list[tuple[int, int]]:
    return list(itertools.product(range(KINDS), range(2)))


@cache
def teacher() -> nn.Module:
    """Trains the teacher."""
    with kept(0):
        net = build("digits-cnn", widths=TEACHER, blocks=(1, 1, 1))

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output, batch[1])

    train(
        net, data().train, loss, steps=400, lr=1e-2, schedule="cosine", log_every=400,
        progress=False,
    )  # fmt: skip
    return net.eval()


def shown(stage: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """Gives what goes into a stage of the teacher, and what comes out."""
    stages = teacher().get_submodule("stages")
    assert isinstance(stages, nn.ModuleList)
    x = before = images
    with torch.no_grad():
        for parts in stages[: stage + 1]:
            before = x
            for part in parts:
                x = part(x)
    return before, x


def elastic_stage(stage: int, kind: int, window: int) -> Elastic:
    """Builds an elastic stage with its projection, untrained."""
    before = ([1, *TEACHER])[stage]
    width = WINDOWS[stage][window]
    with kept(0):
        module = Distilled(Stage(stage, kind, before, width, width), width, TEACHER[stage])
    example = torch.zeros(2, before, *(([8, 8], [8, 8], [4, 4])[stage]))
    axes = [Width(FRACTIONS, divisor=1, where="stage.entry.0"), Depth(pattern="prefix")]
    return elastic(module, example, axes=axes, verify=False)


def distilled(case: tuple[int, int, int]) -> list[float]:
    """Trains one elastic stage; gives the loss of each of its sub-blocks."""
    stage = case[0]
    net = elastic_stage(*case)
    batches = [shown(stage, images) for images, _ in data().train.batches()]

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return noise_to_signal(output, batch[1])

    train(
        net, batches, loss, method=SortedNet(sizes="random"), steps=STEPS, lr=RATE,
        schedule="cosine", clip=1.0, log_every=STEPS, progress=False,
    )  # fmt: skip
    images = torch.cat([images for images, _ in data().validation.batches()])
    before, after = shown(stage, images)
    net.eval()
    found = []
    for config in sub_configs(net):
        recalibrate(net, config, batches, batches=10)
        with net.at(config), torch.no_grad():
            found.append(noise_to_signal(net.module(before), after).item())
    return found


def sub_configs(net: Elastic) -> list[Config]:
    """Gives the configs of an elastic stage in the order of `SUB_BLOCKS`."""
    width, depth = net.space.sites
    return [
        net.space.config({width.name: int(fraction * width.full), depth.name: blocks})
        for fraction, blocks in SUB_BLOCKS
    ]


def timed() -> np.ndarray:
    """Times every sub-block; milliseconds, by stage, kind, window and sub-block."""
    runs = []
    for stage, (kind, window) in itertools.product(range(STAGES), _choices()):
        net = elastic_stage(stage, kind, window)
        x = torch.randn(BATCH, ([1, *TEACHER])[stage], *(([8, 8], [8, 8], [4, 4])[stage]))
        for config in sub_configs(net):
            recalibrate(net, config, [(x,)], batches=1)
            runs.append((net.extract(config).stage.eval(), x))

    def prepare(number: int) -> Callable[[], Tensor]:
        module, x = runs[number]
        return lambda: module(x)

    with torch.inference_mode():
        seconds = without_drift(interleaved(len(runs), prepare, rounds=6))
    return 1000 * seconds.reshape(STAGES, KINDS, 2, len(SUB_BLOCKS))


def main() -> None:
    """Make the table."""
    torch.set_num_threads(1)
    cases = [(stage, *choice) for stage in range(STAGES) for choice in _choices()]
    losses = dict(zip(cases, across(distilled, cases), strict=True))
    latencies = timed()
    stages = [
        {
            f"{kind}-{window}": np.stack(
                [losses[stage, kind, window], latencies[stage, kind, window]], axis=1
            )
            .round(5)
            .tolist()
            for kind, window in _choices()
        }
        for stage in range(STAGES)
    ]
    write_json(TABLE, {"stages": stages, "columns": ["loss", "ms for 32 images"]})


if __name__ == "__main__":
    main()
