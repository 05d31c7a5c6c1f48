"""A small elastic network by hand, for tests of training that need not trust the real one.

Its `at` puts prefix views of the owners into the modules' `__dict__`, where they hide the
parameters, as the real one does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from supple.space import Config, Site, Space


class MLP(nn.Module):
    """Two hidden layers; the second is a residual block that can be skipped."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 8)
        self.drop = nn.Dropout(dropout)
        self.block = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 3)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.fc1(x).relu())
        if not self.skip:
            x = x + self.block(x).tanh()
        return self.fc2(x)


class CNN(nn.Module):
    """Dropout, a convolution with batch normalization, and a classifier."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(2, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.fc1(self.drop(x))).relu()
        return self.fc2(x.mean((2, 3)))


class Stub:
    """An elastic network: `width` cuts the hidden units, `depth` skips the block."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        sites = [Site("width", "width", (2, 4, 6, 8), 8)]
        if hasattr(module, "block"):
            sites.append(Site("depth", "depth", (0, 1), 1))
        self.space = Space(sites)
        self.statistics: dict[Config, dict[str, Tensor]] = {}
        self.active: list[Config] = []  # every size that was active, in order

    def drop_statistics(self) -> None:
        self.statistics.clear()

    def has_running_statistics(self) -> bool:
        return hasattr(self.module, "bn")

    @contextlib.contextmanager
    def at(self, config: Mapping[str, int]) -> Iterator[None]:
        config = self.space.config(config)
        self.active.append(config)
        parts = dict(self.module.named_modules())
        before = {name: dict(part.__dict__) for name, part in parts.items()}
        try:
            for name, views in self._views(config).items():
                part, kind = parts[name.rpartition(".")[0]], name.rpartition(".")[2]
                part.__dict__[kind] = views
            if "bn" in parts and parts["bn"].training and config != self.space.largest():
                parts["bn"].__dict__["track_running_stats"] = False
            if config.get("depth") == 0:
                self.module.__dict__["skip"] = True
            yield
        finally:
            for name, part in parts.items():
                for key in set(part.__dict__) - set(before[name]):
                    del part.__dict__[key]
                for key in ("skip", "track_running_stats"):
                    if key in before[name]:
                        part.__dict__[key] = before[name][key]

    def _views(self, config: Config) -> dict[str, Tensor]:
        width = config["width"]
        if width == 8:
            return dict(self.statistics.get(config, {}))
        views = {
            "fc1.weight": self.module.fc1.weight[:width],
            "fc1.bias": self.module.fc1.bias[:width],
            "fc2.weight": self.module.fc2.weight[:, :width],
        }
        if hasattr(self.module, "block"):
            views["block.weight"] = self.module.block.weight[:width, :width]
            views["block.bias"] = self.module.block.bias[:width]
        if hasattr(self.module, "bn"):
            for kind in ("weight", "bias", "running_mean", "running_var"):
                views[f"bn.{kind}"] = getattr(self.module.bn, kind)[:width]
            if not self.module.bn.training:
                views.update(self.statistics.get(config, {}))
        return views


def mlp(seed: int = 0, dropout: float = 0.0) -> Stub:
    """An elastic MLP with fixed weights."""
    return _made(MLP, seed, dropout)


def cnn(seed: int = 0, dropout: float = 0.0) -> Stub:
    """An elastic CNN with batch normalization and fixed weights."""
    return _made(CNN, seed, dropout)


def _made(cls: type[nn.Module], seed: int, dropout: float) -> Stub:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Stub(cls(dropout))


def vectors(count: int = 4, size: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches for the MLP."""
    return _batches((size, 5), count, seed)


def images(count: int = 4, size: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches for the CNN."""
    return _batches((size, 2, 5, 5), count, seed)


def _batches(shape: tuple[int, ...], count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(shape, generator=source),
            torch.randint(3, (shape[0],), generator=source),
        )
        for _ in range(count)
    ]


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy to the labels."""
    return nn.functional.cross_entropy(output, batch[1])


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a module holds."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
