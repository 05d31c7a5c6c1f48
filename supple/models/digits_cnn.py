"""A small residual network for 8 x 8 images, made to be elastic in width and depth."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.models.base import positive

__all__ = ["DigitsCNN", "ResidualBlock", "build"]


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with an inner width of their own, and the identity."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (N, channels, H, W)."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(inner)))


class DigitsCNN(nn.Module):
    """Stages of residual blocks, each entered through a convolution, and a classifier."""

    def __init__(
        self, widths: Sequence[int], blocks: Sequence[int], classes: int, channels: int
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        previous = channels
        for i, (width, number) in enumerate(zip(widths, blocks, strict=True)):
            entry = nn.Sequential(
                nn.Conv2d(previous, width, 3, 1 if i == 0 else 2, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            # Blocks keep the shape, so that any of them can be skipped.
            inner = (ResidualBlock(width, width) for _ in range(number))
            self.stages.append(nn.ModuleList([entry, *inner]))
            previous = width
        self.head = nn.Linear(previous, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, channels, 8, 8) to logits (N, classes)."""
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for part in stage:
                x = part(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def build(
    *,
    widths: Sequence[int] = (16, 32, 48),
    blocks: Sequence[int] = (1, 2, 1),
    classes: int = 10,
    channels: int = 1,
) -> nn.Module:
    """Builds a residual network for 8 x 8 images; larger ones work, too.

    The default has 102,714 parameters; trained alone for 60 epochs on the digits (10 s on one
    CPU thread) it classifies 99 % of the test images.

    Args:
        widths: Channels of each stage; every stage but the first halves the image.
        blocks: Residual blocks in each stage, as many numbers as `widths`.
        classes: Number of logits.
        channels: Number of image channels.

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> import torch
        >>> build()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    positive(classes=classes, channels=channels)
    if not widths or len(widths) != len(blocks):
        raise SettingError(
            "widths and blocks need one number per stage each, got "
            f"{tuple(widths)} and {tuple(blocks)}"
        )
    if min(widths) < 1 or min(blocks) < 0:
        raise SettingError(
            f"widths must be above 0 and blocks not negative, got {tuple(widths)} and "
            f"{tuple(blocks)}"
        )
    return DigitsCNN(widths, blocks, classes, channels)
