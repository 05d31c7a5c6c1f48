"""Random networks: whatever is offered runs, and the full network stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from supple.axes.depth import Depth
from supple.axes.heads import Heads
from supple.axes.width import Width
from supple.errors import UnsupportedModelError
from supple.network import elastic
from tests.graph.checks import (
    assert_active_equals_extracted,
    assert_same,
    assert_untouched,
    run,
    shake,
    state_of,
)

WIDTHS = (6, 8, 10, 12, 14, 16, 18, 20)


class Branches(nn.Module):
    """Two layers on the same input, concatenated."""

    def __init__(self, left: nn.Module, right: nn.Module, dim: int) -> None:
        super().__init__()
        self.left, self.right, self.dim = left, right, dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), F.relu(self.right(x))], self.dim)


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


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class Attention(nn.Module):
    """Self-attention, its projections fused or apart, heads by reshaping."""

    def __init__(self, width: int, heads: int, head_dim: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.fused = heads, head_dim, fused
        inner = heads * head_dim
        if fused:
            self.qkv = nn.Linear(width, 3 * inner)
        else:
            self.q, self.k = nn.Linear(width, inner), nn.Linear(width, inner)
            self.v = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, self.heads, self.head_dim)
        if self.fused:
            q, k, v = self.qkv(x).split(self.heads * self.head_dim, dim=2)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class GLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * gate.sigmoid())


class ToSequence(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


class Chain(nn.Module):
    """Blocks of a list one after the other, then a classifier."""

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.pool, self.head = Pooled(), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x))


def conv(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


def conv_block(width: int, inner: int) -> nn.Module:
    return nn.Sequential(
        conv(width, inner), nn.BatchNorm2d(inner), nn.ReLU(), conv(inner, width)
    )


Made = tuple[nn.Module, int]  # a block and the width it gives

IMAGES: dict[str, Callable[[int, int], Made]] = {
    "conv": lambda w, n: (conv(w, n), n),
    "grouped": lambda w, n: (conv(w, n, 2), n),
    "depthwise": lambda w, n: (conv(w, w, w), w),
    "batch norm": lambda w, n: (nn.Sequential(nn.BatchNorm2d(w), nn.ReLU()), w),
    "group norm": lambda w, n: (nn.GroupNorm(2, w), w),
    "residual": lambda w, n: (Residual(conv_block(w, n)), w),
    "branches": lambda w, n: (Branches(conv(w, n), conv(w, w), 1), w + n),
    "dense": lambda w, n: (Branches(nn.Identity(), conv(w, n), 1), w + n),
    "halves": lambda w, n: (Halves(conv_block(w // 2, n), n % 4 == 0), w),
    "gate": lambda w, n: (Gate(w, n // 2), w),
    "pool": lambda w, n: (nn.AvgPool2d(3, 1, 1), w),
}
SEQUENCES: dict[str, Callable[[int, int], Made]] = {
    "linear": lambda w, n: (nn.Linear(w, n), n),
    "layer norm": lambda w, n: (nn.LayerNorm(w), w),
    "mlp": lambda w, n: (
        Residual(nn.Sequential(nn.Linear(w, n), nn.GELU(), nn.Linear(n, w))),
        w,
    ),
    "attention": lambda w, n: (Residual(Attention(w, 2 + n % 3, 4, n % 4 == 0)), w),
    "glu": lambda w, n: (Residual(GLU(w, n)), w),
    "branches": lambda w, n: (Branches(nn.Linear(w, n), nn.Linear(w, w), 2), w + n),
}

steps = st.lists(
    st.tuples(st.sampled_from(sorted(IMAGES)), st.sampled_from(WIDTHS)), min_size=1, max_size=4
)
later = st.lists(
    st.tuples(st.sampled_from(sorted(SEQUENCES)), st.sampled_from(WIDTHS)), max_size=4
)
Steps = list[tuple[str, int]]


def build(images: Steps, sequences: Steps) -> nn.Module:
    width = images[0][1]
    blocks: list[nn.Module] = [conv(3, width)]
    for kind, number in images:
        block, width = IMAGES[kind](width, number)
        blocks.append(block)
    if sequences:
        blocks.append(ToSequence())
    for kind, number in sequences:
        block, width = SEQUENCES[kind](width, number)
        blocks.append(block)
    return shake(Chain(blocks, width)).eval()


@given(steps, later, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_size_of_a_random_network_is_the_same_active_and_extracted(
    images: Steps, sequences: Steps, seed: int
) -> None:
    model = build(images, sequences)
    inputs = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)),)
    full = run(model, inputs, {})
    axes = [Width(None, head_dim=True), Heads(None), Depth(pattern="any")]
    try:
        net = elastic(model, inputs, axes=axes, verify=False)
    except UnsupportedModelError:
        return
    before = state_of(model)
    for config in (net.space.smallest(), *(net.space.random(seed + i) for i in range(3))):
        assert_active_equals_extracted(net, config)
    assert_untouched(model, before)
    assert_same(run(model, inputs, {}), full)


@given(steps, later, st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_reordering_units_of_a_random_network_changes_nothing(
    images: Steps, sequences: Steps, seed: int
) -> None:
    model = build(images, sequences)
    generator = torch.Generator().manual_seed(seed)
    inputs = (torch.randn(2, 3, 4, 4, generator=generator),)
    full = run(model, inputs, {})
    try:
        net = elastic(
            model, inputs, axes=[Width(None, head_dim=True), Heads(None)], verify=False
        )
    except UnsupportedModelError:
        return
    net.sort({s.name: torch.rand(s.full, generator=generator) for s in net.space.sites})
    assert_same(run(model, inputs, {}), full)


def test_the_grammar_makes_elastic_networks() -> None:
    """The property above is not met by networks in which nothing varies."""
    for images, sequences in (
        ([("conv", 8), ("halves", 12), ("residual", 10)], [("attention", 8), ("glu", 6)]),
        ([("conv", 12), ("grouped", 8), ("gate", 8)], [("mlp", 10), ("branches", 6)]),
        ([("dense", 6), ("dense", 8), ("batch norm", 6)], []),
    ):
        net = elastic(build(images, sequences), torch.randn(2, 3, 4, 4), verify=False)
        assert len(net.space.sites) >= 2, (images, sequences)
