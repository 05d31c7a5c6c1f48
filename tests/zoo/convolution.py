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


@family(
    sites={
        "width stem": 1,
        "width first.norms.*": 2,
        "width first.convs.2": 1,
        "width transition": 1,
        "width second.norms.1": 1,
        "width second.convs.1": 1,
    },
    fixed={
        "stem.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "head.weight[0]": "output",
    },
)
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


@family(
    sites={
        "width 0": 1,
        "width *.conv1": 2,
        "width *.gate.down": 2,
        "depth depth": 1,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "5.weight[0]": "output",
        "*": "changes the shape",
    },
)
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


@family(
    sites={
        "width 0": 1,
        "width *.conv1": 6,
        "depth depth": 1,
        "depth depth#2": 1,
        "depth depth#3": 1,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "11.weight[0]": "output",
        "*": "changes the shape",
        "1": "computes nothing",
        "2": "computes nothing",
    },
)
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


@family(
    sites={
        "width stem.0": 1,
        "width stages.*.*.expand.*": 7,
        "width stages.*.*.squeeze.reduce": 4,
        "width stages.*.*.project.*": 3,
        "width last.0": 1,
        "width hidden": 1,
        "depth stages.*.depth": 3,
    },
    fixed={
        "stem.0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "head.weight[0]": "output",
        "stages.*.*": "changes the shape",
    },
)
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


@family(
    sites={
        "width 0": 1,
        "width *.reduce": 2,
        "width *.reduce#2": 2,
        "width *.grouped": 2,
        "depth depth": 1,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "5.weight[0]": "output",
        "*": "changes the shape",
    },
)
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


@family(
    sites={
        "width down1.conv": 1,
        "width down1.conv#2": 1,
        "width down2.conv": 1,
        "width down2.conv#2": 1,
        "width middle.conv": 1,
        "width middle.conv#2": 1,
        "width up2.conv": 1,
        "width up2.conv#2": 1,
        "width up1.conv": 1,
        "width up1.conv#2": 1,
    },
    fixed={
        "down1.conv.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "head.weight[0]": "output",
    },
)
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


@family(
    sites={
        "width 0": 1,
        "width *.expand": 2,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "7.weight[0]": "output",
    },
)
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


@family(
    sites={
        "width 0": 1,
        "width 4": 1,
        "width 4#2": 1,
        "width 7": 1,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "9.weight[1]": "output",
    },
)
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


class DilatedPyramid(nn.Module):
    """DeepLab's pyramid: the same features at several dilations and over the whole image."""

    def __init__(self, channels: int, branch: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, branch, 3, padding=rate, dilation=rate, bias=False),
                nn.BatchNorm2d(branch),
                nn.ReLU(),
            )
            for rate in (1, 2, 3)
        )
        self.pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 12, 1, bias=False), nn.ReLU()
        )
        self.project = nn.Conv2d(3 * branch + 12, 26, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        whole = F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear")
        return self.project(torch.cat([*(branch(x) for branch in self.branches), whole], 1))


class DeepLab(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.high = nn.Sequential(
            nn.Conv2d(16, 30, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(30), nn.ReLU()
        )
        self.pyramid = DilatedPyramid(30, 18)
        self.reduce = nn.Conv2d(16, 10, 1, bias=False)
        self.head = nn.Sequential(
            nn.Conv2d(26 + 10, 22, 3, padding=1), nn.ReLU(), nn.Conv2d(22, CLASSES, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        deep = self.pyramid(self.high(low))
        deep = F.interpolate(deep, size=low.shape[-2:], mode="bilinear", align_corners=False)
        out = self.head(torch.cat([deep, self.reduce(low)], 1))
        return F.interpolate(out, size=x.shape[-2:], mode="bilinear", align_corners=False)


@family(
    sites={
        "width low.0": 1,
        "width high.0": 1,
        "width pyramid.branches.*.*": 3,
        "width pyramid.pool.1": 1,
        "width pyramid.project": 1,
        "width reduce": 1,
        "width head.0": 1,
    },
    fixed={
        "low.0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "head.2.weight[0]": "output",
    },
)
def deeplab() -> Entry:
    return DeepLab(), (image(16),), {}


class ConvMixerBlock(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, groups=channels, padding="same")
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(F.gelu(self.depthwise(x)))
        return self.norm2(F.gelu(self.pointwise(x)))


@family(
    sites={
        "width 0": 1,
        "width *.pointwise": 3,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "8.weight[0]": "output",
    },
)
def conv_mixer() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 28, 4, stride=4),
        nn.GELU(),
        nn.BatchNorm2d(28),
        *(ConvMixerBlock(28, 3) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(28, CLASSES),
    )
    return model, (image(16),), {}


class LayerNorm2d(nn.Module):
    """Normalizes over channels, written with mean and variance (as in ConvNeXt and SAM)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scale = torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * (centred / scale) + self.bias[:, None, None]


class PermutedLayerNorm(nn.LayerNorm):
    """The same by moving the channels to the end and back (as in torchvision)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, inner)
        self.down = nn.Linear(inner, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@family(
    sites={
        "width 0": 1,
        "width *.up": 4,
        "width 5": 1,
        "depth depth": 1,
        "depth depth#2": 1,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "11.weight[0]": "output",
        "*": "changes the shape",
        "1": "computes nothing",
        "4": "computes nothing",
        "10": "computes nothing",
    },
)
def convnext_by_hand() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 20, 4, stride=4),
        LayerNorm2d(20),
        ConvNeXtBlock(20, 52),
        ConvNeXtBlock(20, 52),
        PermutedLayerNorm(20),
        nn.Conv2d(20, 34, 2, stride=2),
        ConvNeXtBlock(34, 74),
        ConvNeXtBlock(34, 74),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(34),
        nn.Linear(34, CLASSES),
    )
    return model, (image(16),), {}


class ResidualConv(nn.Module):
    """EDSR's block: no normalization, a constant scale."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.conv2(F.relu(self.conv1(x)))


class SuperResolution(nn.Module):
    """Residual blocks between two convolutions, then channels that become pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 22, 3, padding=1)
        self.body = nn.ModuleList(ResidualConv(22, 26) for _ in range(3))
        self.last = nn.Conv2d(22, 22, 3, padding=1)
        self.up1 = nn.Conv2d(22, 18 * 4, 3, padding=1)
        self.up2 = nn.Conv2d(18, 3 * 4, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.first(x)
        for block in self.body:
            x = block(x)
        x = first + self.last(x)
        x = F.leaky_relu(self.shuffle(self.up1(x)), 0.1)
        return self.shuffle(self.up2(x))


@family(
    sites={
        "width first": 1,
        "width body.*.conv1": 3,
        "width up1": 1,
        "depth body.depth": 1,
    },
    fixed={
        "first.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "up2.weight[0]": "output",
    },
)
def super_resolution() -> Entry:
    return SuperResolution(), (image(8),), {}


class Focus(nn.Module):
    """Pixels become channels, by hand: four strided slices side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., i::2, j::2] for j in range(2) for i in range(2)]
        return self.conv(torch.cat(corners, 1))


@family(
    sites={
        "width 0.conv": 1,
        "width 3": 1,
        "width 6": 1,
    },
    fixed={
        "0.conv.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "10.weight[0]": "output",
    },
)
def space_to_depth() -> Entry:
    model = nn.Sequential(
        Focus(3, 14),
        nn.PReLU(14),
        nn.PixelUnshuffle(2),
        nn.Conv2d(56, 30, 1),
        nn.InstanceNorm2d(30, affine=True),
        nn.PReLU(),
        nn.Conv2d(30, 26, 3, padding=1),
        nn.SELU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(26, CLASSES),
    )
    return model, (image(16),), {}


class Stage3d(nn.Module):
    """X3D-like: a depthwise kernel over time and space, squeeze-excitation, swish."""

    def __init__(self, channels: int, inner: int, squeezed: int) -> None:
        super().__init__()
        self.expand = nn.Conv3d(channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm3d(inner)
        self.depthwise = nn.Conv3d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm3d(inner)
        self.down = nn.Conv3d(inner, squeezed, 1)
        self.up = nn.Conv3d(squeezed, inner, 1)
        self.project = nn.Conv3d(inner, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.expand(x)))
        y = self.norm2(self.depthwise(y))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool3d(y, 1)))))
        return F.relu(x + self.norm3(self.project(F.silu(y * gate))))


@family(
    sites={
        "width 0": 1,
        "width *.*.expand": 4,
        "width *.*.down": 4,
        "width 5": 1,
        "depth *.depth": 2,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "*[3, 4]": "kernel size",
        "*[2]": "kernel size",
        "*[2, 3, 4]": "kernel size",
        "9.weight[0]": "output",
    },
)
def x3d() -> Entry:
    model = nn.Sequential(
        nn.Conv3d(3, 18, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False),
        nn.Conv3d(18, 18, (3, 1, 1), padding=(1, 0, 0), groups=18, bias=False),
        nn.BatchNorm3d(18),
        nn.ReLU(),
        nn.Sequential(*(Stage3d(18, 30, 8) for _ in range(2))),
        nn.Conv3d(18, 26, 3, stride=2, padding=1),
        nn.Sequential(*(Stage3d(26, 34, 10) for _ in range(2))),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(26, CLASSES),
    )
    return model, (torch.randn(BATCH, 3, 4, 8, 8),), {}


class FactorizedBlock(nn.Module):
    """R(2+1)D: space first, then time, with a projected shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, middle: int, stride: int = 1) -> None:
        super().__init__()
        self.space = nn.Conv3d(
            inputs, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False
        )
        self.norm1 = nn.BatchNorm3d(middle)
        self.time = nn.Conv3d(middle, outputs, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)
        self.norm2 = nn.BatchNorm3d(outputs)
        self.shortcut = nn.Conv3d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.space(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.time(y)))


@family(
    sites={
        "width 0": 1,
        "width *.space": 3,
        "width 3.time": 1,
        "depth depth": 1,
        "depth depth#2": 1,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "*[2, 3, 4]": "kernel size",
        "*[3, 4]": "kernel size",
        "*[2]": "kernel size",
        "7.weight[0]": "output",
        "*": "changes the shape",
    },
)
def r2plus1d() -> Entry:
    model = nn.Sequential(
        nn.Conv3d(3, 14, 3, padding=1),
        nn.MaxPool3d((1, 2, 2)),
        FactorizedBlock(14, 14, 22),
        FactorizedBlock(14, 28, 34, stride=2),
        FactorizedBlock(28, 28, 38),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(28, CLASSES),
    )
    return model, (torch.randn(BATCH, 3, 4, 8, 8),), {}


class VariationalAutoencoder(nn.Module):
    """The latent is read as its mean, so that a run says the same twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 14, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(14, 26, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.moments = nn.Linear(26 * 4 * 4, 2 * 10)
        self.expand = nn.Linear(10, 22 * 4 * 4)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(22, 18, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(18, 1, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.moments(self.encoder(x)).chunk(2, dim=1)
        z = mean if not self.training else mean + torch.randn_like(mean) * log_variance.exp()
        z = F.relu(self.expand(z))
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
        return self.decoder(z.view(z.shape[0], -1, 4, 4)), divergence


@family(
    sites={
        "width encoder.*": 2,
        "width moments": 1,
        "width expand": 1,
        "width decoder.0": 1,
    },
    fixed={
        "*[2, 3]": "kernel size",
    },
)
def vae() -> Entry:
    return VariationalAutoencoder(), (image(16, 1),), {}


class Siamese(nn.Module):
    """One encoder for two images; what it says of both is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 14, 3, stride=2, padding=1),
            nn.BatchNorm2d(14),
            nn.ReLU(),
            nn.Conv2d(14, 26, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(26, 18),
        )
        self.head = nn.Linear(2 * 18, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.encoder(left), self.encoder(right)
        return self.head(torch.cat([(a - b).abs(), a * b], 1))


@family(
    sites={
        "width encoder.*": 3,
    },
    fixed={
        "encoder.0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "head.weight[0]": "output",
    },
)
def siamese() -> Entry:
    return Siamese(), (image(8), image(8)), {}


class SeveralInputs(nn.Module):
    """An image, a table row and a category come in by name; two answers go out by name."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 14, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(14, 22, 3)
        )
        self.row = nn.Sequential(nn.Linear(9, 30), nn.ReLU(), nn.Linear(30, 22))
        self.category = nn.Embedding(12, 10)
        self.join = nn.Linear(22 + 10, 34)
        self.label = nn.Linear(34, CLASSES)
        self.value = nn.Linear(34, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = self.image(batch["image"]).mean((2, 3)) + self.row(batch["row"])
        joined = torch.cat([seen, self.category(batch["category"])], 1)
        features = F.elu(self.join(joined))
        return {"label": self.label(features), "value": self.value(features).squeeze(1)}


@family(
    sites={
        "width image.*": 2,
        "width row.0": 1,
        "width category": 1,
        "width join": 1,
    },
    fixed={
        "image.0.weight[1]": "input dimension",
        "row.0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "category.weight[0]": "looked up by index",
        "label.weight[0]": "output",
    },
)
def several_inputs() -> Entry:
    category = torch.randint(0, 12, (BATCH,))
    batch = {"image": image(8), "row": torch.randn(BATCH, 9), "category": category}
    return SeveralInputs(), (batch,), {}


@family(
    sites={
        "width *": 2,
    },
    fixed={
        "0.parametrizations.weight.original1[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "6.weight[0]": "output",
    },
)
def weight_normed() -> Entry:
    normed = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(
        normed(nn.Conv2d(3, 18, 3, padding=1)),
        nn.ReLU(),
        normed(nn.Conv2d(18, 26, 3, padding=1)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(26, CLASSES),
    )
    return model, (image(8),), {}
