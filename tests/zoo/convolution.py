"""Convolution families by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.base import BATCH, CLASSES, Entry, family, image


class DenseBlock(nn.Module):
    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        widths = [channels + i * growth for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, growth, 3, padding=1, bias=False) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 18, 3, padding=1, bias=False)
        self.first = DenseBlock(18, 10, 3)  # 18 + 3 x 10 = 48
        self.norm = nn.BatchNorm2d(48)
        self.transition = nn.Conv2d(48, 26, 1, bias=False)
        self.second = DenseBlock(26, 14, 2)  # 26 + 2 x 14 = 54
        self.last = nn.BatchNorm2d(54)
        self.head = nn.Linear(54, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(F.relu(self.norm(self.first(self.stem(x)))))
        x = F.relu(self.last(self.second(F.avg_pool2d(x, 2))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@family()
def densenet() -> Entry:
    return DenseNet(), (image(16),), {}


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, squeezed)
        self.up = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.shape
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * gate.view(batch, channels, 1, 1)


class SqueezeExciteBlock(nn.Module):
    def __init__(self, channels: int, inner: int, squeezed: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.gate = SqueezeExcite(channels, squeezed)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.gate(self.norm2(self.conv2(inner))))


@family()
def squeeze_excite() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2, padding=1),
        SqueezeExciteBlock(24, 40, 6),
        SqueezeExciteBlock(24, 32, 10),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )
    return model, (image(16),), {}


class OptionABlock(nn.Module):
    """CIFAR residual block whose shortcut is a strided slice and zero padding."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(out + x)


@family()
def resnet_option_a() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        OptionABlock(16, 16, 1),
        OptionABlock(16, 16, 1),
        OptionABlock(16, 32, 2),
        OptionABlock(32, 32, 1),
        OptionABlock(32, 64, 2),
        OptionABlock(64, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )
    return model, (image(16),), {}


@family()
def mobilenet_v3() -> Entry:
    from supple.models.base import build

    stages = [
        {"channels": 16, "blocks": 2, "expansion": 3, "stride": 2, "squeeze": True},
        {"channels": 24, "blocks": 3, "expansion": 4, "kernel": 5, "stride": 2},
        {"channels": 40, "blocks": 2, "expansion": 3, "squeeze": True, "hard_swish": True},
    ]
    model = build("mobilenet-v3", stages=stages, hidden=88, image_size=32, classes=CLASSES)
    return model, (image(32),), {}


class ResNeXtBlock(nn.Module):
    def __init__(self, channels: int, inner: int, groups: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.grouped = nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.expand = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.reduce(x)))
        inner = F.relu(self.norm2(self.grouped(inner)))
        return F.relu(x + self.norm3(self.expand(inner)))


@family()
def resnext() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 28, 3, padding=1),
        ResNeXtBlock(28, 40, 5),
        ResNeXtBlock(28, 48, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(28, CLASSES),
    )
    return model, (image(16),), {}


class UNetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = UNetBlock(3, 20, 4)
        self.down2 = UNetBlock(20, 36, 4)
        self.middle = UNetBlock(36, 48, 6)
        self.up2 = UNetBlock(48 + 36, 32, 4)
        self.up1 = UNetBlock(32 + 20, 24, 4)
        self.head = nn.Conv2d(24, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2.0), second], 1))
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2.0), first], 1))
        return self.head(x)


@family()
def unet() -> Entry:
    return UNet(), (image(16),), {}


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleBlock(nn.Module):
    """ShuffleNetV2 unit: half of the channels pass, the others are transformed, then mixed."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        half = channels // 2
        self.expand = nn.Conv2d(half, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, half, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.norm1(self.expand(right)))
        right = self.norm2(self.depthwise(right))
        right = F.relu(self.norm3(self.project(right)))
        return channel_shuffle(torch.cat([left, right], 1), 2)


@family()
def shufflenet() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        ShuffleBlock(24, 20),
        ShuffleBlock(24, 28),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )
    return model, (image(16),), {}


@family()
def conv_transposed_decoder() -> Entry:
    model = nn.Sequential(
        nn.Linear(13, 40 * 4 * 4),
        nn.Unflatten(1, (40, 4, 4)),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.ConvTranspose2d(40, 24, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 18, 4, stride=2, padding=1, groups=2),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(18, 3, 3, padding=1),
        nn.Tanh(),
    )
    return model, (torch.randn(BATCH, 13),), {}
