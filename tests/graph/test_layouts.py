"""Layouts of fused projections, each as some library writes it, in their smallest form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

import supple
from supple.network import elastic

WIDTH, HEADS, SIZE = 15, 4, 6


class Config:
    def __init__(self) -> None:
        self.heads = HEADS


class Attention(nn.Module):
    """`rows` of fused heads; a subclass takes queries, keys and values out of them."""

    rows = 3 * HEADS

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.heads, self.kv_heads, self.size = HEADS, HEADS, SIZE
        self.qkv = nn.Linear(WIDTH, self.rows * SIZE)
        self.out = nn.Linear(HEADS * SIZE, WIDTH)

    def parts(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.parts(self.qkv(x)))
        return x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class SharedKeys(Attention):
    """Falcon: the last two heads, by positions written out, are key and value of all."""

    rows = HEADS + 2

    def parts(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grid = fused.unflatten(-1, (self.heads + 2, self.size))
        key, value = grid[..., [-2], :], grid[..., [-1], :]
        return (
            grid[..., :-2, :],
            key.expand(*grid.shape[:2], self.heads, self.size),
            value.expand(*grid.shape[:2], self.heads, self.size),
        )


class ByOffsets(Attention):
    """Phi-3: cuts at products and sums of attributes that nothing else defines."""

    def parts(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.config.heads * self.size
        second = first + self.kv_heads * self.size
        cut = (fused[..., :first], fused[..., first:second], fused[..., second:])
        q, k, v = (t.view(*t.shape[:2], -1, self.size) for t in cut)
        return q, k, v


class TurnedWhole(ByOffsets):
    """A rotary part that is the whole leaves nothing behind it."""

    def parts(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(fused)
        turned, rest = q[..., : self.size], q[..., self.size :]
        return torch.cat([-turned, rest], dim=-1), k, v


class HeadsOutside(Attention):
    """GPT-NeoX and Bloom: heads outside, the three parts inside."""

    def parts(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grid = fused.view(*fused.shape[:2], self.heads, 3, self.size)
        return grid[..., 0, :], grid[..., 1, :], grid[..., 2, :]


@pytest.mark.parametrize("kind", [SharedKeys, ByOffsets, TurnedWhole, HeadsOutside])
def test_heads_of_every_layout_are_elastic(kind: type[Attention]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, WIDTH), kind(), nn.Linear(WIDTH, 3))
    net = elastic(model, torch.randn(2, 7, 5))
    heads = [site for site in net.space.sites if site.axis == "heads"]
    assert [site.choices for site in heads] == [(1, 2, 3, 4)]
    assert net.verify().ok


class EveryOther(nn.Module):
    """Gate and value are interleaved, as in GPT-OSS."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(5, 24)
        self.down = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        return self.down(both[..., ::2].sigmoid() * both[..., 1::2])


class ShapeOnly(nn.Module):
    """One channel is selected for nothing but its shape, as in BART."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 12)
        self.down = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.up(x)
        return self.down(y) + torch.ones(y[..., -1].shape).unsqueeze(-1)


@pytest.mark.parametrize("model", [EveryOther(), ShapeOnly()])
def test_inner_width_is_elastic(model: nn.Module) -> None:
    net = elastic(model, torch.randn(2, 7, 5))
    assert [site.full for site in net.space.sites] == [12]
    assert net.verify().ok


def test_nothing_behind_a_rotary_part_leaves_the_head_width_elastic() -> None:
    model = nn.Sequential(nn.Linear(5, WIDTH), TurnedWhole(), nn.Linear(WIDTH, 3))
    net = elastic(model, torch.randn(2, 7, 5), axes=[supple.Width(head_dim=True)])
    assert SIZE in [site.full for site in net.space.sites]
    assert net.verify().ok
