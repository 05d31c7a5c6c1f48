"""Beside: parameters that an objective needs beside the model's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from supple.axes.base import Sharing, Transform, added
from supple.errors import SettingError
from supple.space import Config

__all__ = ["Beside"]


@dataclass(frozen=True)
class Beside(Sharing):
    """Gives the module parameters that only training uses, such as the head of an objective.

    All sizes share all weights as before. The parameters are trained, kept in checkpoints and
    saved with the elastic network, and are no part of its sub-networks.

    Args:
        shapes: Names, which start with `supple_`, and shapes. Matrices begin as random numbers
            of variance 1 / columns, always the same; vectors begin as zero.

    Raises:
        SettingError: A name does not start with `supple_`.

    Example:
        >>> import torch, supple
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = supple.elastic(model, torch.ones(2, 4), axes=[supple.Width((0.5, 1.0))])
        >>> net.share(Beside((("supple_head", (3, 2)),)))
        >>> net.module.supple_head.shape
        torch.Size([3, 2])
    """

    name: ClassVar[str] = "beside"

    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        shapes = tuple((name, tuple(shape)) for name, shape in self.shapes)
        object.__setattr__(self, "shapes", shapes)
        wrong = [name for name, _ in shapes if not added(name)]
        if wrong:
            raise SettingError(f"names of shapes must start with 'supple_', got {wrong[0]!r}")

    def own(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: _begin(shape) for name, shape in self.shapes}

    def chosen(self, config: Config) -> None:
        """Gives None: all sizes have the same weights."""

    def weights(self, config: Config, model: nn.Module) -> Mapping[str, Transform]:
        """Gives nothing: no weight is changed."""
        return {}


def _begin(shape: tuple[int, ...]) -> Tensor:
    if len(shape) < 2:
        return torch.zeros(shape)
    source = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=source) / math.sqrt(shape[-1])
