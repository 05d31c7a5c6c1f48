"""A small residual network whose image is halved at places of one's choice."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.layers.choice import Choice
from supple.models.base import positive

__all__ = ["Block", "PoolingCNN", "build"]


class Block(nn.Module):
    """A 3 x 3 convolution beside the identity, or instead of it where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.residual = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H, W)."""
        out = self.bn(self.conv(x))
        return F.relu(x + out if self.residual else out)


class PoolingCNN(nn.Module):
    """Blocks, with a place for a pooling before each, the mean over the image, a classifier."""

    def __init__(
        self, widths: Sequence[int], pools: Sequence[int], classes: int, channels: int
    ) -> None:
        super().__init__()
        self.stem = Block(channels, widths[0])
        self.places = nn.ModuleList(
            Choice(nn.Identity(), nn.MaxPool2d(2), active=int(place in pools))
            for place in range(len(widths))
        )
        before = (widths[0], *widths[:-1])
        self.blocks = nn.ModuleList(map(Block, before, widths))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, channels, H, W) to logits (N, classes)."""
        x = self.stem(x)
        for place, block in zip(self.places, self.blocks, strict=True):
            x = block(place(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def build(
    *,
    widths: Sequence[int] = (16, 16, 16, 32, 32, 32),
    pools: Sequence[int] = (1, 3),
    classes: int = 10,
    channels: int = 3,
) -> nn.Module:
    """Builds a residual network with a place for a pooling before each of its blocks.

    The axis `supple.axes.placement.Placement` makes elastic which places pool.

    Args:
        widths: Channels of each block.
        pools: Numbers of the places, from 0, that halve the image.
        classes: Number of logits.
        channels: Number of image channels.

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> import torch
        >>> build()(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    positive(classes=classes, channels=channels)
    if not widths or min(widths) < 1:
        raise SettingError(f"widths must be numbers above 0, got {tuple(widths)}")
    if len(set(pools)) < len(pools) or not set(pools) <= set(range(len(widths))):
        raise SettingError(
            f"pools must be distinct numbers of the {len(widths)} places, from 0, got "
            f"{tuple(pools)}"
        )
    return PoolingCNN(widths, pools, classes, channels)
