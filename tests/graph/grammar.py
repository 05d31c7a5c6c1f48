"""A grammar of networks: words such as `("conv", 12)` become blocks, sentences networks.

Each word is a kind of block and a number that the block makes its sizes of. A block says which
shape of tensor it takes (an image, a sequence or a vector) and which it gives, so that every
sentence is a network that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.checks import shake

Word = tuple[str, int]

NUMBERS = (6, 8, 10, 12, 14, 16, 18, 20)
IMAGE = 8  # pixels a side of the example input


@dataclass(frozen=True)
class Shape:
    """What flows between two blocks.

    Attributes:
        kind: "image" (batch, width, side, side), "sequence" (batch, length, width) or
            "vector" (batch, width).
        width: Channels.
        space: Pixels a side, or the length of the sequence; 1 for vectors.
    """

    kind: str
    width: int
    space: int


Made = tuple[nn.Module, Shape]
BLOCKS: dict[str, dict[str, Callable[[Shape, int], Made | None]]] = {
    "image": {},
    "sequence": {},
    "vector": {},
}


def word(kind: str, name: str) -> Callable[[Callable], Callable]:
    """Registers a block for one kind of shape; it returns None where it does not apply."""

    def register(make: Callable[[Shape, int], Made | None]) -> Callable:
        BLOCKS[kind][name] = make
        return make

    return register


# ------------------------------------------------------------------------------- plumbing


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.shortcut = inner, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.shortcut is None else self.shortcut(x)) + self.inner(x)


class Scaled(nn.Module):
    """A residual branch under a learned gain for each channel (LayerScale)."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.inner(x)


class Joined(nn.Module):
    """Several layers on the same input, concatenated."""

    def __init__(self, dim: int, *parts: nn.Module) -> None:
        super().__init__()
        self.dim, self.parts = dim, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], self.dim)


class Product(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x).sigmoid()


class Chain(nn.Module):
    """Blocks of a list one after the other, then a classifier."""

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if x.dim() == 4:
            x = x.mean((2, 3))
        elif x.dim() == 3:
            x = x.mean(1)
        return self.head(x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def conv_block(width: int, inner: int, outputs: int | None = None) -> nn.Module:
    return nn.Sequential(
        conv(width, inner), nn.BatchNorm2d(inner), nn.ReLU(), conv(inner, outputs or width)
    )


def mlp(width: int, inner: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)
    )


# --------------------------------------------------------------------------------- images


class Halves(nn.Module):
    """One half passes, the other is transformed (ShuffleNet), the channels are mixed."""

    def __init__(self, inner: nn.Module, shuffle: bool) -> None:
        super().__init__()
        self.inner, self.shuffle = inner, shuffle

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, self.inner(right)], 1)
        if not self.shuffle:
            return x
        batch, channels, *space = x.shape
        return x.view(batch, 2, channels // 2, *space).transpose(1, 2).reshape(x.shape)


class UnevenSplit(nn.Module):
    """A stem gives two unequal parts (CSP); one is transformed, both are joined."""

    def __init__(self, width: int, first: int, second: int) -> None:
        super().__init__()
        self.sizes = (first, second)
        self.stem, self.inner = conv(width, first + second, 1), conv(second, second)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).split(self.sizes, dim=1)
        return torch.cat([left, F.silu(self.inner(right))], 1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class ChannelNorm(nn.Module):
    """Layer normalization over the channels of an image, by permuting."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HandNorm(nn.Module):
    """The same by hand, from means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / (var + 1e-5).sqrt()
        return self.gain[:, None, None] * x + self.shift[:, None, None]


class DownUp(nn.Module):
    """A small U-Net: down, up again, joined with what came in."""

    def __init__(self, width: int, inner: int, upsample: bool) -> None:
        super().__init__()
        self.down = conv(width, inner, stride=2)
        self.up = None if upsample else nn.ConvTranspose2d(inner, inner, 2, stride=2)
        self.fuse = conv(width + inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.down(x))
        y = F.interpolate(y, scale_factor=2) if self.up is None else self.up(y)
        return self.fuse(torch.cat([x, y], dim=1))


class GlobalContext(nn.Module):
    """A softmax over positions pools the image; what it gives is added everywhere."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.score, self.down, self.up = conv(width, 1, 1), conv(width, inner, 1), None
        self.up = conv(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.score(x).flatten(2).softmax(-1)  # (batch, 1, positions)
        pooled = x.flatten(2) @ weight.transpose(1, 2)  # (batch, channels, 1)
        return x + self.up(F.relu(self.down(pooled.unsqueeze(-1))))


class SelectiveKernel(nn.Module):
    """Two branches, stacked and mixed by a softmax over branches for each channel."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.small, self.large = conv(width, outputs, 1), conv(width, outputs)
        self.choose = nn.Linear(outputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.small(x), self.large(x)], dim=1)
        weight = self.choose(both.sum(1).mean((2, 3)))
        weight = weight.view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return (both * weight).sum(1)


class SpaceToDepth(nn.Module):
    """Patches of 2 x 2 become channels (Swin's and YOLO's way down)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.mix = conv(4 * width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.mix(torch.cat(parts, dim=1))


@word("image", "conv")
def _(s: Shape, n: int) -> Made:
    return conv(s.width, n), replace(s, width=n)


@word("image", "pointwise")
def _(s: Shape, n: int) -> Made:
    return conv(s.width, n, 1), replace(s, width=n)


@word("image", "dilated")
def _(s: Shape, n: int) -> Made:
    return nn.Conv2d(s.width, n, 3, padding=2, dilation=2), replace(s, width=n)


@word("image", "strided")
def _(s: Shape, n: int) -> Made | None:
    if s.space < 4:
        return None
    return conv(s.width, n, stride=2), replace(s, width=n, space=s.space // 2)


@word("image", "grouped")
def _(s: Shape, n: int) -> Made:
    return conv(s.width, n, groups=2), replace(s, width=n)


@word("image", "depthwise")
def _(s: Shape, n: int) -> Made:
    return nn.Sequential(conv(s.width, s.width, groups=s.width), nn.Hardswish()), s


@word("image", "depth multiplier")
def _(s: Shape, n: int) -> Made:
    return conv(s.width, 2 * s.width, groups=s.width), replace(s, width=2 * s.width)


@word("image", "transposed")
def _(s: Shape, n: int) -> Made:
    return nn.ConvTranspose2d(s.width, n, 3, padding=1), replace(s, width=n)


@word("image", "batch norm")
def _(s: Shape, n: int) -> Made:
    return nn.Sequential(nn.BatchNorm2d(s.width), nn.ReLU()), s


@word("image", "group norm")
def _(s: Shape, n: int) -> Made:
    return nn.GroupNorm(2, s.width), s


@word("image", "instance norm")
def _(s: Shape, n: int) -> Made:
    return nn.Sequential(nn.InstanceNorm2d(s.width, affine=True), nn.PReLU(s.width)), s


@word("image", "channel norm")
def _(s: Shape, n: int) -> Made:
    return ChannelNorm(s.width) if n % 4 else HandNorm(s.width), s


@word("image", "residual")
def _(s: Shape, n: int) -> Made:
    return Residual(conv_block(s.width, n)), s


@word("image", "projected residual")
def _(s: Shape, n: int) -> Made:
    return (
        Residual(conv_block(s.width, n + 2, n), conv(s.width, n, 1)),
        replace(s, width=n),
    )


@word("image", "stage")
def _(s: Shape, n: int) -> Made:
    return nn.Sequential(*(Residual(conv_block(s.width, n + 2 * i)) for i in range(2))), s


@word("image", "inverted residual")
def _(s: Shape, n: int) -> Made:
    inner = nn.Sequential(
        conv(s.width, 2 * n, 1),
        nn.BatchNorm2d(2 * n),
        nn.ReLU6(),
        conv(2 * n, 2 * n, groups=2 * n),
        nn.ReLU6(),
        Gate(2 * n, 4),
        conv(2 * n, s.width, 1),
    )
    return Residual(inner), s


@word("image", "branches")
def _(s: Shape, n: int) -> Made:
    parts = [conv(s.width, n), conv(s.width, s.width, 1), nn.AvgPool2d(3, 1, 1)]
    return Joined(1, *parts), replace(s, width=n + 2 * s.width)


@word("image", "dense")
def _(s: Shape, n: int) -> Made:
    return Joined(1, nn.Identity(), conv(s.width, n)), replace(s, width=s.width + n)


@word("image", "halves")
def _(s: Shape, n: int) -> Made:
    return Halves(conv_block(s.width // 2, n), n % 4 == 0), s


@word("image", "uneven split")
def _(s: Shape, n: int) -> Made:
    return UnevenSplit(s.width, n, n + 4), replace(s, width=2 * n + 4)


@word("image", "gate")
def _(s: Shape, n: int) -> Made:
    return Gate(s.width, n // 2), s


@word("image", "product")
def _(s: Shape, n: int) -> Made:
    return Product(conv(s.width, n), conv(s.width, n, 1)), replace(s, width=n)


@word("image", "down and up")
def _(s: Shape, n: int) -> Made | None:
    return (DownUp(s.width, n, n % 4 == 0), s) if s.space % 2 == 0 else None


@word("image", "global context")
def _(s: Shape, n: int) -> Made:
    return GlobalContext(s.width, n), s


@word("image", "selective kernel")
def _(s: Shape, n: int) -> Made:
    return SelectiveKernel(s.width, n), replace(s, width=n)


@word("image", "space to depth")
def _(s: Shape, n: int) -> Made | None:
    if s.space % 2:
        return None
    return SpaceToDepth(s.width, n), replace(s, width=n, space=s.space // 2)


@word("image", "pool")
def _(s: Shape, n: int) -> Made:
    return nn.MaxPool2d(3, 1, 1) if n % 4 else nn.AvgPool2d(3, 1, 1), s


# ------------------------------------------------------------------------------ sequences


class ToSequence(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention; `layout` says how the projections are laid out and multiplied."""

    def __init__(self, width: int, heads: int, head_dim: int, layout: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.layout = heads, head_dim, layout
        inner = heads * head_dim
        if layout in ("apart", "einsum", "products"):
            self.q, self.k = nn.Linear(width, inner), nn.Linear(width, inner)
            self.v = nn.Linear(width, inner)
        else:
            self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each of shape (batch, heads, length, head_dim)."""
        batch, length, _ = x.shape
        shape = (batch, length, self.heads, self.head_dim)
        if self.layout == "3 heads dim":
            q, k, v = self.qkv(x).view(batch, length, 3, *shape[2:]).permute(2, 0, 3, 1, 4)
            return q, k, v
        if self.layout == "heads 3 dim":
            qkv = self.qkv(x).view(batch, length, self.heads, 3 * self.head_dim)
            q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)
            return q, k, v
        if self.layout == "split":
            parts = self.qkv(x).split(self.heads * self.head_dim, dim=2)
        else:
            parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.view(shape).transpose(1, 2) for t in parts)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.projected(x)
        if self.layout == "einsum":
            score = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.head_dim**-0.5
            y = torch.einsum("bhqk,bhkd->bhqd", score.softmax(-1), v)
        elif self.layout == "products":
            score = torch.matmul(q, k.transpose(-1, -2)) / self.head_dim**0.5
            y = torch.matmul(score.softmax(-1), v)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))


class GroupedQueries(nn.Module):
    """Attention in which two query heads share one key-value head."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(width, 2 * heads * head_dim)
        self.k, self.v = (nn.Linear(width, heads * head_dim) for _ in range(2))
        self.out = nn.Linear(2 * heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class LinearAttention(nn.Module):
    """Attention without a softmax over positions: a feature map and two products."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, inner), nn.Linear(width, inner)
        self.v, self.out = nn.Linear(width, inner + 2), nn.Linear(inner + 2, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1
        context = k.transpose(1, 2) @ self.v(x)
        norm = q @ k.sum(1).unsqueeze(-1)
        return self.out(q @ context / norm)


class LearnedQueries(nn.Module):
    """Cross-attention from a few learned queries (Perceiver, DETR's decoder)."""

    def __init__(self, width: int, inner: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, inner))
        self.k, self.v = nn.Linear(width, inner), nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.expand(x.shape[0], -1, -1)
        score = q @ self.k(x).transpose(1, 2)
        return q + score.softmax(-1) @ self.v(x)


class GLU(nn.Module):
    """A gated MLP, its two projections in one layer."""

    def __init__(self, width: int, inner: int, halves: bool) -> None:
        super().__init__()
        self.inner, self.halves = inner, halves
        self.up, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.halves:
            value, gate = y.chunk(2, dim=-1)
        else:
            value, gate = y[..., : self.inner], y[..., self.inner :]
        return self.down(value * F.silu(gate))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Positions(nn.Module):
    """Learned positions and a class token in front."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, length + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1)
        return torch.cat([token, x], dim=1) + self.position


class AlongLength(nn.Module):
    """A layer on (batch, width, length)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Modulated(nn.Module):
    """Shift, scale and gate from the mean of the sequence (adaptive layer norm)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation, self.up = nn.Linear(width, 3 * width), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(x.mean(1))).chunk(3, dim=1)
        y = self.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return x + gate.unsqueeze(1) * self.down(F.gelu(self.up(y)))


class SoftMixture(nn.Module):
    """Experts as one stacked tensor, all of them mixed by a softmax."""

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, inner))
        self.down = nn.Parameter(torch.randn(experts, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.router(x).softmax(-1)
        hidden = F.relu(torch.einsum("bld,edh->bleh", x, self.up))
        return x + torch.einsum("bleh,ehd,ble->bld", hidden, self.down, weight)


@word("sequence", "linear")
def _(s: Shape, n: int) -> Made:
    return nn.Linear(s.width, n), replace(s, width=n)


@word("sequence", "layer norm")
def _(s: Shape, n: int) -> Made:
    return nn.LayerNorm(s.width) if n % 4 else RMSNorm(s.width), s


@word("sequence", "mlp")
def _(s: Shape, n: int) -> Made:
    return Residual(mlp(s.width, n)), s


@word("sequence", "scaled mlp")
def _(s: Shape, n: int) -> Made:
    return Scaled(mlp(s.width, n), s.width), s


LAYOUTS = ("apart", "split", "3 heads dim", "heads 3 dim", "einsum", "products")


@word("sequence", "attention")
def _(s: Shape, n: int) -> Made:
    layout = LAYOUTS[n // 2 % len(LAYOUTS)]
    return Residual(Attention(s.width, 2 + n % 3, 4, layout)), s


@word("sequence", "encoder")
def _(s: Shape, n: int) -> Made:
    layout = LAYOUTS[n // 2 % len(LAYOUTS)]
    blocks = []
    for _ in range(2):
        attention = nn.Sequential(nn.LayerNorm(s.width), Attention(s.width, 3, 4, layout))
        blocks.append(nn.Sequential(Residual(attention), Residual(mlp(s.width, n))))
    return nn.Sequential(*blocks), s


@word("sequence", "grouped queries")
def _(s: Shape, n: int) -> Made:
    return Residual(GroupedQueries(s.width, 2 + n % 3, 4)), s


@word("sequence", "linear attention")
def _(s: Shape, n: int) -> Made:
    return Residual(nn.Sequential(nn.LayerNorm(s.width), LinearAttention(s.width, n))), s


@word("sequence", "learned queries")
def _(s: Shape, n: int) -> Made:
    return LearnedQueries(s.width, n, 5), replace(s, width=n, space=5)


@word("sequence", "glu")
def _(s: Shape, n: int) -> Made:
    return Residual(GLU(s.width, n, n % 4 == 0)), s


@word("sequence", "branches")
def _(s: Shape, n: int) -> Made:
    parts = [nn.Linear(s.width, n), nn.Linear(s.width, s.width)]
    return Joined(2, *parts), replace(s, width=n + s.width)


@word("sequence", "product")
def _(s: Shape, n: int) -> Made:
    return Product(nn.Linear(s.width, n), nn.Linear(s.width, n)), replace(s, width=n)


@word("sequence", "positions")
def _(s: Shape, n: int) -> Made:
    return Positions(s.width, s.space), replace(s, space=s.space + 1)


@word("sequence", "token mixing")
def _(s: Shape, n: int) -> Made:
    mixing = nn.Sequential(nn.Linear(s.space, n), nn.GELU(), nn.Linear(n, s.space))
    return Residual(AlongLength(mixing)), s


@word("sequence", "convolution")
def _(s: Shape, n: int) -> Made:
    layer = nn.Conv1d(s.width, s.width, 3, padding=1, groups=s.width)
    return AlongLength(nn.Sequential(layer, nn.BatchNorm1d(s.width), nn.SiLU())), s


@word("sequence", "modulated")
def _(s: Shape, n: int) -> Made:
    return Modulated(s.width, n), s


@word("sequence", "soft mixture")
def _(s: Shape, n: int) -> Made:
    return SoftMixture(s.width, n, 3), s


# -------------------------------------------------------------------------------- vectors


class Statistics(nn.Module):
    """Mean and maximum over positions, side by side."""

    def forward(self, x: Tensor) -> Tensor:
        dims = (2, 3) if x.dim() == 4 else (1,)
        return torch.cat([x.mean(dims), x.amax(dims)], dim=1)


class Flat(nn.Module):
    """All positions of all channels in one vector, as in AlexNet."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, 1)


@word("vector", "linear")
def _(s: Shape, n: int) -> Made:
    return nn.Sequential(nn.Linear(s.width, n), nn.Tanh()), replace(s, width=n)


@word("vector", "batch norm")
def _(s: Shape, n: int) -> Made:
    return nn.Sequential(nn.BatchNorm1d(s.width), nn.LeakyReLU()), s


@word("vector", "residual")
def _(s: Shape, n: int) -> Made:
    return Residual(nn.Sequential(nn.Linear(s.width, n), nn.ReLU(), nn.Linear(n, s.width))), s


@word("vector", "dense")
def _(s: Shape, n: int) -> Made:
    return Joined(1, nn.Identity(), nn.Linear(s.width, n)), replace(s, width=s.width + n)


@word("vector", "bilinear")
def _(s: Shape, n: int) -> Made:
    return Product(nn.Linear(s.width, n), nn.Linear(s.width, n)), replace(s, width=n)


# ------------------------------------------------------------------------------ sentences


def sentences(kind: str, most: int) -> st.SearchStrategy[list[Word]]:
    """Up to `most` words that take this kind of shape."""
    return st.lists(
        st.tuples(st.sampled_from(sorted(BLOCKS[kind])), st.sampled_from(NUMBERS)),
        max_size=most,
    )


#: A network: words for images, for sequences and for vectors, and how vectors are made.
programs = st.tuples(
    sentences("image", 4),
    sentences("sequence", 4),
    sentences("vector", 2),
    st.sampled_from(["flat", "mean", "statistics"]),
)
Program = tuple[list[Word], list[Word], list[Word], str]


def build(program: Program) -> nn.Module:
    """The network of a program on images of 3 x 8 x 8, in eval mode, weights shaken."""
    images, sequences, vectors, pooled = program
    shape = Shape("image", 8, IMAGE)
    blocks: list[nn.Module] = [conv(3, shape.width)]

    def add(words: list[Word]) -> None:
        nonlocal shape
        for name, number in words:
            made = BLOCKS[shape.kind][name](shape, number)
            if made is not None:
                blocks.append(made[0])
                shape = made[1]

    add(images)
    if sequences:
        blocks.append(ToSequence())
        shape = Shape("sequence", shape.width, shape.space**2)
        add(sequences)
    if vectors or pooled != "mean":
        positions = shape.space**2 if shape.kind == "image" else shape.space
        times = positions if pooled == "flat" else 2
        blocks.append(Flat() if pooled == "flat" else Statistics())
        shape = Shape("vector", shape.width * times, 1)
        add(vectors)
    return shake(Chain(blocks, shape.width)).eval()


def image(seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
