"""A MobileNetV3-like network: expand, depthwise, squeeze-and-excitation, project."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from supple.errors import SettingError, nearest
from supple.models.base import positive

__all__ = ["LARGE", "SMALL", "MobileNetV3", "Stage", "build"]


@dataclass(frozen=True)
class Stage:
    """A run of inverted residual blocks of one width.

    Args:
        channels: Width of the blocks' outputs.
        blocks: Number of blocks; all but the first have a residual connection.
        expansion: Inner width of a block over its input's width.
        kernel: Size of the depthwise kernels, odd.
        stride: Stride of the first block, 1 or 2.
        squeeze: Whether blocks rescale their inner channels by squeeze-and-excitation.
        hard_swish: Whether blocks use hard-swish instead of ReLU.
    """

    channels: int
    blocks: int = 1
    expansion: float = 4
    kernel: int = 3
    stride: int = 1
    squeeze: bool = False
    hard_swish: bool = False

    def __post_init__(self) -> None:
        positive(channels=self.channels, blocks=self.blocks, expansion=self.expansion)
        if self.kernel % 2 == 0 or self.stride not in (1, 2):
            raise SettingError(
                "a stage needs an odd kernel and a stride of 1 or 2, got "
                f"kernel={self.kernel}, stride={self.stride}"
            )


# Five stages as in the once-for-all network's full size, for 224 x 224 images.
LARGE = (
    Stage(16, 1, 1),
    Stage(24, 4, 6, stride=2),
    Stage(40, 4, 6, 5, 2, squeeze=True),
    Stage(80, 4, 6, 3, 2, hard_swish=True),
    Stage(112, 4, 6, 3, 1, squeeze=True, hard_swish=True),
    Stage(160, 4, 6, 5, 2, squeeze=True, hard_swish=True),
)
SMALL = (
    Stage(16, 2, 3, stride=2, squeeze=True),
    Stage(24, 3, 4, stride=2),
    Stage(40, 3, 4, 5, 2, squeeze=True, hard_swish=True),
    Stage(64, 3, 4, 5, 2, squeeze=True, hard_swish=True),
)
STAGES = {"small": SMALL, "large": LARGE}


def divisible(value: float, divisor: int = 8) -> int:
    """Rounds a width to a multiple of 8 that is at least 90 % of it, as MobileNets do."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def activation(hard_swish: bool) -> nn.Module:
    return nn.Hardswish() if hard_swish else nn.ReLU()


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, where asked for, an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: nn.Module | None = None,
    ) -> None:
        conv = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        layers: list[nn.Module] = [conv, nn.BatchNorm2d(outputs)]
        super().__init__(*layers, *([act] if act is not None else []))


class SqueezeExcite(nn.Module):
    """Rescales channels by a gate computed from their means. Shape (N, C, H, W) kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = divisible(channels / 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.expand(self.relu(self.reduce(self.pool(x)))))
        return x * gate


class InvertedResidual(nn.Module):
    """Expands, filters each channel, gates, projects; residual where the shape allows."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = divisible(inputs * stage.expansion)
        act = stage.hard_swish
        self.expand = ConvNorm(inputs, inner, act=activation(act))
        self.depthwise = ConvNorm(
            inner, inner, stage.kernel, stride, groups=inner, act=activation(act)
        )
        self.squeeze = SqueezeExcite(inner) if stage.squeeze else nn.Identity()
        self.project = ConvNorm(inner, stage.channels)
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + out if self.residual else out


class MobileNetV3(nn.Module):
    """Stem, stages of inverted residual blocks, a wide 1 x 1 convolution, a classifier."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        stem: int,
        stem_stride: int,
        hidden: int,
        classes: int,
        channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = ConvNorm(channels, stem, 3, stem_stride, act=nn.Hardswish())
        self.stages = nn.ModuleList()
        width = stem
        for stage in stages:
            blocks = nn.Sequential()
            for i in range(stage.blocks):
                blocks.append(InvertedResidual(width, stage, stage.stride if i == 0 else 1))
                width = stage.channels
            self.stages.append(blocks)
        inner = divisible(4 * width)
        self.last = ConvNorm(width, inner, act=nn.Hardswish())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(inner, hidden)
        self.act = nn.Hardswish()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, channels, H, W) to logits (N, classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = self.pool(self.last(x)).flatten(1)
        logits: Tensor = self.head(self.dropout(self.act(self.hidden(x))))
        return logits


def build(
    *,
    variant: str = "small",
    stages: Sequence[Stage | Mapping[str, Any]] | None = None,
    width: float = 1.0,
    stem: int = 16,
    hidden: int = 128,
    image_size: int = 32,
    classes: int = 10,
    channels: int = 3,
    dropout: float = 0.0,
) -> nn.Module:
    """Builds a MobileNetV3-like network.

    The strides suit the image: of the network's halvings (the stem's first, then the stages')
    only the last ones are kept, as many as leave a final map of at least 4 x 4.

    Args:
        variant: `"small"` (4 stages) or `"large"` (6 stages, as in once-for-all).
        stages: Stages of your own, `Stage`s or mappings of their fields, instead of `variant`.
        width: Multiplies every stage's width and the stem's, then rounds to multiples of 8.
        stem: Width of the first convolution.
        hidden: Width of the classifier's hidden layer.
        image_size: Height and width of the images in pixels, 8 or more.
        classes: Number of logits.
        channels: Number of image channels.
        dropout: Dropout before the last layer, in [0, 1).

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> import torch
        >>> net = build(image_size=8, channels=1).eval()
        >>> net(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Source:
        Howard et al. 2019, "Searching for MobileNetV3", arXiv:1905.02244; stages of `large` as
        in Cai et al. 2020, "Once-for-All", arXiv:1908.09791.
    Differs:
        Stages are regular (one width, kernel and activation each), the head is narrower.
    """
    positive(width=width, stem=stem, hidden=hidden, classes=classes, channels=channels)
    if image_size < 8:
        raise SettingError(f"image_size must be at least 8 pixels, got {image_size}")
    if variant not in STAGES:
        raise SettingError(
            f"variant must be 'small' or 'large', got '{variant}'{nearest(variant, STAGES)}"
        )
    chosen = [_stage(stage) for stage in stages] if stages is not None else STAGES[variant]
    scaled = [_scaled(stage, width) for stage in chosen]
    stem_stride, fitted = _fit_strides(scaled, image_size)
    return MobileNetV3(
        fitted,
        stem=stem if width == 1 else divisible(stem * width),
        stem_stride=stem_stride,
        hidden=hidden,
        classes=classes,
        channels=channels,
        dropout=dropout,
    )


def _scaled(stage: Stage, width: float) -> Stage:
    if width == 1:
        return stage
    return dataclasses.replace(stage, channels=divisible(stage.channels * width))


def _stage(stage: Stage | Mapping[str, Any]) -> Stage:
    if isinstance(stage, Stage):
        return stage
    names = [field.name for field in dataclasses.fields(Stage)]
    for name in stage:
        if name not in names:
            raise SettingError(f"a stage has no setting '{name}'{nearest(name, names)}")
    if "channels" not in stage:
        raise SettingError(f"a stage needs 'channels', got {dict(stage)}")
    return Stage(**stage)


def _fit_strides(stages: Sequence[Stage], image_size: int) -> tuple[int, list[Stage]]:
    allowed = (image_size // 4).bit_length() - 1
    fitted: list[Stage] = []
    for stage in reversed(stages):
        halves = stage.stride == 2 and allowed > 0
        allowed -= halves
        fitted.insert(0, dataclasses.replace(stage, stride=2 if halves else 1))
    return (2 if allowed > 0 else 1), fitted
