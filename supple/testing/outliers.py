"""A network with outliers that computes the same: small networks have none of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from supple.errors import SettingError
from supple.graph.feeds import feeds
from supple.quantize._equivalent import scaled

__all__ = ["outlier_twin"]


@torch.no_grad()
def outlier_twin(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    channels: int = 4,
    factor: float = 30.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Copies a network such that a few channels of what its norms give are far larger.

    Of each norm whose output only layers read, the gain (and shift) of a few channels is
    multiplied by a factor, and the weights that read these channels are divided by it.

    Args:
        model: The network; it is left as it is.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        channels: How many of each norm, drawn.
        factor: How much larger they become, above 0.
        generator: Draws the channels; by default seeded with 0.

    Returns:
        The twin, which computes the same but for rounding.

    Raises:
        SettingError: There is no such norm, or one has too few channels.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))
        >>> twin = outlier_twin(model, (torch.ones(1, 8),), channels=2)
        >>> sorted(twin[0].weight.tolist())
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 30.0, 30.0]
    """
    source = torch.Generator().manual_seed(0) if generator is None else generator
    twin = copy.deepcopy(model)
    found = [
        feed
        for feed in feeds(twin, args, kwargs)
        if feed.producer is not None and twin.get_parameter(feed.producer[0][0]).dim() == 1
    ]
    if not found:
        raise SettingError(
            f"{type(model).__name__} has no norm with a gain whose output layers alone read"
        )
    for feed in found:
        if channels > feed.size:
            raise SettingError(
                f"channels must be at most {feed.size}, the size of what "
                f"'{feed.consumers[0]}' reads, got {channels}"
            )
        drawn = torch.randperm(feed.size, generator=source)[:channels]
        scale = torch.ones(feed.size, dtype=torch.float64)
        scale[drawn] = 1 / factor
        twin = scaled(twin, feed, scale)
    return twin
