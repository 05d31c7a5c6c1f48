"""Feeds: what layers see, and what can take a factor of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.graph.feeds import Feed, compared, feeds
from supple.testing.toys import generator


class Gain(nn.Module):
    """A norm without a shift, as Llama has it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size, generator=generator()) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Attention whose pairs of query heads share keys and values, and a gated network."""

    def __init__(self, *, fused: bool = False, plain: bool = False) -> None:
        super().__init__()
        self.fused, self.plain = fused, plain
        self.norm, self.norm_2 = Gain(12), nn.LayerNorm(12)
        if fused:
            self.qkv = nn.Linear(12, 24)
        else:
            self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.o = nn.Linear(12, 12)
        self.gate, self.up, self.down = nn.Linear(12, 7), nn.Linear(12, 7), nn.Linear(7, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        split = self.fused and self.qkv(h).split((12, 6, 6), -1)
        q, k, v = split or (self.q(h), self.k(h), self.v(h))
        q, k, v = (one.unflatten(-1, (-1, 3)).transpose(1, 2) for one in (q, k, v))
        k, v = (one.repeat_interleave(2, 1) for one in (k, v))
        if self.plain:
            mixed = torch.softmax(q @ k.mT / 2, -1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        result: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return result


def conv_net() -> nn.Sequential:
    """Convolutions with all that may lie between them."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 1),
        nn.LeakyReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.GELU(),
        nn.Linear(5, 2),
    )


def told(found: list[Feed]) -> list[tuple[Any, ...]]:
    return [(feed.consumers, feed.producer) for feed in found]


def changed(model: nn.Module, feed: Feed) -> nn.Module:
    """Divides the producer, and multiplies what reads it, by hand."""
    model = copy.deepcopy(model)
    source = generator(3)
    rows = int(feed.units.max()) + 1
    factor = torch.rand(rows, generator=source) * 3 + 0.2
    assert feed.producer is not None
    with torch.no_grad():
        for name, dim in feed.producer:
            tensor = model.get_parameter(name)
            whole = torch.ones(tensor.shape[dim])
            whole[:rows] = factor
            whole[[r for r in range(rows) if r not in feed.units.tolist()]] = 1.0
            shape = [1] * tensor.dim()
            shape[dim] = -1
            tensor.div_(whole.reshape(shape))
        for name in feed.consumers:
            weight = model.get_parameter(name)
            shape = [1] * weight.dim()
            shape[1] = -1
            weight.mul_(factor[feed.units].reshape(shape))
    return model


@pytest.mark.parametrize("plain", [False, True])
def test_norms_values_and_gated_units_take_factors(plain: bool) -> None:
    model, x = Block(plain=plain).eval(), torch.randn(2, 5, 12, generator=generator())
    found = feeds(model, (x,))
    assert told(found) == [
        (("q.weight", "k.weight", "v.weight"), (("norm.weight", 0),)),
        (("o.weight",), (("v.weight", 0), ("v.bias", 0))),
        (("gate.weight", "up.weight"), (("norm_2.weight", 0), ("norm_2.bias", 0))),
        (("down.weight",), (("up.weight", 0), ("up.bias", 0))),
    ]
    assert found[1].units.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    for feed in found:
        torch.testing.assert_close(changed(model, feed)(x), model(x))


def test_rows_of_a_fused_layer_take_factors_where_nothing_else_reads_them() -> None:
    model, x = Block(fused=True).eval(), torch.randn(2, 5, 12, generator=generator())
    found = feeds(model, (x,))
    assert told(found)[1] == (("o.weight",), (("qkv.weight", 0), ("qkv.bias", 0)))
    assert found[1].units.tolist()[:6] == [18, 19, 20, 18, 19, 20]
    torch.testing.assert_close(changed(model, found[1])(x), model(x))
    assert compared(model, (x,)) == {"qkv.weight"}


def test_convolutions_are_followed_through_norms_and_pools() -> None:
    model, x = conv_net().eval(), torch.randn(2, 3, 8, 8, generator=generator())
    found = feeds(model, (x,))
    assert told(found) == [
        (("0.weight",), None),
        (("4.weight",), (("1.weight", 0), ("1.bias", 0))),
        (("8.weight",), (("4.weight", 0), ("4.bias", 0))),
        (("10.weight",), None),  # GELU lets no factor through
    ]
    assert [feed.size for feed in found] == [3, 4, 6, 5]
    for feed in found[1:3]:
        torch.testing.assert_close(changed(model, feed)(x), model(x))


def test_queries_and_keys_are_what_attention_compares() -> None:
    x = torch.randn(2, 5, 12, generator=generator())
    for plain in (False, True):
        assert compared(Block(plain=plain), (x,)) == {"q.weight", "k.weight"}


def test_layers_that_are_left_out_leave_no_producer() -> None:
    model, x = Block(), torch.randn(2, 5, 12, generator=generator())
    first = told(feeds(model, (x,), layers="*, !k, !down"))[0]
    assert first == (("q.weight", "v.weight"), None)
    assert told(feeds(model, (x,), layers="o")) == [
        (("o.weight",), (("v.weight", 0), ("v.bias", 0)))
    ]


def test_what_something_else_reads_takes_no_factors() -> None:
    class Read(nn.Module):
        def __init__(self, reads: str) -> None:
            super().__init__()
            self.a, self.b, self.reads = nn.Linear(3, 4), nn.Linear(4, 3), reads

        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            if self.reads == "write":
                h[:, 1:2].fill_(1.0)
            y = self.b(h)
            if self.reads == "again":
                return self.b(self.a(y))
            if self.reads == "sum":
                return y + h[:, :3]
            return (y, h) if self.reads == "output" else y

    x = torch.randn(2, 3, generator=generator())
    for reads in ("sum", "output", "write", "again"):
        assert feeds(Read(reads), (x,))[1].producer is None, reads
    assert feeds(Read("none"), (x,))[1].producer == (("a.weight", 0), ("a.bias", 0))


def test_layers_that_share_a_weight_are_in_no_feed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    found = feeds(model, (torch.ones(2, 3),))
    assert told(found) == [(("3.weight",), None)]
