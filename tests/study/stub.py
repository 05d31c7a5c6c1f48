"""A network whose quality and costs are known functions of its size, for tests of searches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from supple.space import Config, Site, Space


class Toy(nn.Module):
    """Carries the active config, so that an evaluation can be a formula."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(7.0))
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.config = Config({})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


class Net:
    """An elastic network of four widths and a block that may be skipped."""

    args = ()
    kwargs: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, norm: bool = False, widths: int = 4) -> None:
        self.module = Toy(norm)
        choices = tuple(range(1, widths + 1))
        inside = (("depth", frozenset({1})),)
        self.space = Space(
            [
                Site("depth", "depth", (0, 1), 1),
                Site("a", "width", choices, widths),
                Site("b", "width", choices, widths, inside),
                Site("c", "width", choices, widths, inside),
            ]
        )
        self.statistics: dict[Config, dict[str, Tensor]] = {}
        self.entered: list[Config] = []

    @contextlib.contextmanager
    def at(self, config: Config) -> Iterator[None]:
        self.entered.append(config)
        self.module.config = config
        try:
            yield
        finally:
            self.module.config = Config({})

    def extract(self, config: Config) -> nn.Module:
        small = Toy()
        small.config = config
        return small

    def costs(self, configs: list[Config] | np.ndarray) -> dict[str, np.ndarray]:
        if isinstance(configs, np.ndarray):
            configs = self.space.decode_many(configs)
        params = np.array([sum(config.values()) for config in configs])
        return {"params": params, "macs": params**2}

    def has_running_statistics(self) -> bool:
        return isinstance(self.module.norm, nn.BatchNorm1d)

    def drop_statistics(self) -> None:
        self.statistics.clear()


def accuracy(module: nn.Module) -> float:
    """Grows with every width, less and less; a skipped block gives nothing."""
    assert isinstance(module, Toy)
    weights = {"a": 0.5, "b": 0.3, "c": 0.1, "depth": 0.0}
    return sum(weights[name] * (1 - 0.5**size) for name, size in module.config.items())
