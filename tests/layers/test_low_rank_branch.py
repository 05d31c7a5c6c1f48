"""Layers of few bits beside a product of low rank."""

from __future__ import annotations

import torch
from torch import nn

import supple
from supple.formats import QuantSpec, quantize
from supple.layers.low_rank_branch import LowRankBranch, low_rank_corrected
from supple.layers.packed import PackedLinear
from supple.rebuild import replace
from supple.testing.toys import generator


def corrected(rank: int):  # type: ignore[no-untyped-def]
    linear = nn.Linear(11, 7)
    linear.weight.data = torch.randn(7, 11, generator=generator())
    matrix = linear.weight.detach()
    found = low_rank_corrected(matrix, quantize(matrix, QuantSpec("int3")), rank)
    packed = PackedLinear.from_quantized(linear, found.quantized)  # type: ignore[arg-type]
    return linear, found, LowRankBranch.of(packed, found.up, found.down)


def test_the_product_is_the_best_of_its_rank() -> None:
    for rank in (1, 3, 99):
        linear, found, _ = corrected(rank)
        error = linear.weight.detach() - found.quantized.dequantize()
        left = torch.linalg.svdvals(error)[min(rank, 7) :].square().sum().sqrt()
        got = (linear.weight - found.dequantize()).norm()
        torch.testing.assert_close(got, left, rtol=1e-2, atol=1e-2)
        assert found.total_bits == found.quantized.total_bits + 16 * (7 + 11) * min(rank, 7)


def test_the_layer_computes_and_holds_what_the_matrices_say(tmp_path) -> None:  # type: ignore[no-untyped-def]
    linear, found, layer = corrected(2)
    x = torch.randn(5, 11, generator=generator())
    wanted = nn.functional.linear(x, found.dequantize(), linear.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight, found.dequantize())
    assert layer.bias is layer.layer.bias
    model = replace(nn.Sequential(linear), {"0": layer}).eval()
    supple.save(model, tmp_path / "model")
    loaded = supple.load(tmp_path / "model", model=nn.Sequential(nn.Linear(11, 7)))
    assert loaded[0].down.dtype == torch.float16
    assert torch.equal(loaded(x), model(x))
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
