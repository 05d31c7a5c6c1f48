"""Denoisers: a U-Net that is told the time, and a transformer that is modulated by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.base import BATCH, Entry, family, image


def sinusoids(time: Tensor, width: int) -> Tensor:
    """Sines and cosines of the time, shape (batch, width)."""
    half = width // 2
    rates = torch.exp(-math.log(1000.0) * torch.arange(half, device=time.device) / half)
    angles = time[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], -1)


class TimedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class ImageAttention(nn.Module):
    """Attention over all places, with 1 x 1 convolutions as projections."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        flat = x.reshape(batch, channels, -1)
        q, k, v = self.qkv(self.norm(flat)).chunk(3, dim=1)
        shape = (batch * self.heads, channels // self.heads, height * width)
        q, k, v = (part.reshape(shape) for part in (q, k, v))
        weights = torch.einsum("bct,bcs->bts", q, k) * shape[1] ** -0.5
        y = torch.einsum("bts,bcs->bct", weights.softmax(-1), v)
        return (flat + self.out(y.reshape(batch, channels, -1))).reshape(x.shape)


class DenoisingUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.embed = nn.Sequential(nn.Linear(12, 44), nn.SiLU(), nn.Linear(44, 38))
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.down1 = TimedBlock(20, 20, 38, 5)
        self.shrink = nn.Conv2d(20, 20, 3, stride=2, padding=1)
        self.down2 = TimedBlock(20, 36, 38, 4)
        self.attend = ImageAttention(36, 3, 4)
        self.middle = TimedBlock(36, 36, 38, 4)
        self.up2 = TimedBlock(36 + 36, 28, 38, 4)
        self.grow = nn.Conv2d(28, 28, 3, padding=1)
        self.up1 = TimedBlock(28 + 20, 24, 38, 4)
        self.norm = nn.GroupNorm(4, 24)
        self.head = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = self.embed(sinusoids(time, self.width))
        first = self.down1(self.stem(x), time)
        second = self.attend(self.down2(self.shrink(first), time))
        x = self.middle(second, time)
        x = self.up2(torch.cat([x, second], 1), time)
        x = self.grow(F.interpolate(x, scale_factor=2.0))
        x = self.up1(torch.cat([x, first], 1), time)
        return self.head(F.silu(self.norm(x)))


@family(
    sites={
        "width embed.*": 2,
        "width down1.conv1": 1,
        "width down1.conv1#2": 1,
        "width shrink": 1,
        "width shrink#2": 1,
        "width down2.conv1": 1,
        "width down2.conv1#2": 1,
        "width down2.conv2": 1,
        "width middle.conv1": 1,
        "width middle.conv1#2": 1,
        "width up2.conv1": 1,
        "width up2.conv1#2": 1,
        "width up2.conv2": 1,
        "width up1.conv1": 1,
        "width up1.conv1#2": 1,
        "width up1.conv2": 1,
        "width up1.conv2#2": 1,
    },
    fixed={
        "embed.0.weight[1]": "it counts positions",
        "attend.heads": "the code computes a size as 36",
        "stem.weight[0]": "two incompatible inner structures meet in a group norm",
        "grow.weight[0]": "two incompatible inner structures meet in a group norm",
        "stem.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "head.weight[0]": "output",
    },
)
def diffusion_unet() -> Entry:
    return DenoisingUNet(), (image(8), torch.tensor([3.0, 11.0])), {}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, 1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        y = self.fc2(F.gelu(self.fc1(modulate(self.norm2(x), shift2, scale2))))
        return x + gate2.unsqueeze(1) * y

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, 36, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(1, 16, 36))
        self.time = nn.Sequential(nn.Linear(10, 30), nn.SiLU(), nn.Linear(30, 36))
        self.label = nn.Embedding(11, 36)
        self.blocks = nn.ModuleList(DiTBlock(36, 3, 50) for _ in range(3))
        self.norm = nn.LayerNorm(36, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(36, 2 * 36))
        self.head = nn.Linear(36, 2 * 2 * 4)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(sinusoids(time, 10)) + self.label(label)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, 1)
        x = self.head(modulate(self.norm(x), shift, scale))
        x = x.reshape(x.shape[0], 4, 4, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], 4, 8, 8)


@family(
    sites={
        "width positions": 1,
        "width time.*": 2,
        "width blocks.*.fc1": 3,
        "depth blocks.depth": 1,
    },
    fixed={
        "positions[1]": "a spatial size",
        "patch.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "time.0.weight[1]": "it counts positions",
        "blocks.*.heads": "the code computes a size as 36",
        "label.weight[0]": "looked up by index",
        "head.weight[0]": "output",
    },
)
def dit() -> Entry:
    label = torch.randint(0, 11, (BATCH,))
    return DiT(), (image(8, 4), torch.tensor([3.0, 11.0]), label), {}
