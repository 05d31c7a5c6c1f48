"""Linear layers whose groups of columns have different numbers of bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import supple
from supple.errors import SettingError
from supple.formats import QuantSpec, quantize
from supple.layers.mixed_packed import MixedPackedLinear, MixedQuantized
from supple.rebuild import replace
from supple.testing.toys import generator
from supple.weights import as_matrix

LAYOUT = torch.tensor([2, 0, 1, 2, 0])
SPECS = (
    QuantSpec("uint1", "group", 3, symmetric=False, scale_format="fp16", zero_format="fp16"),
    QuantSpec("uint2", "group", 3, symmetric=False, scale_format="fp16"),
    QuantSpec("int3", "group", 3, scale_format="fp16"),
)


def mixed(matrix: torch.Tensor) -> tuple[MixedQuantized, torch.Tensor]:
    """Groups of three columns, the last one of two; and the matrix, each group by itself."""
    groups = matrix.split(3, 1)
    parts = tuple(
        quantize(
            torch.cat([groups[at] for at in range(5) if LAYOUT[at] == place], 1), SPECS[place]
        )
        for place in range(3)
    )
    expected = [
        quantize(group, SPECS[place]).dequantize()
        for group, place in zip(groups, LAYOUT.tolist(), strict=True)
    ]
    return MixedQuantized(parts, LAYOUT, 3), torch.cat(expected, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_groups_are_where_they_were(bias: bool) -> None:
    linear = nn.Linear(14, 7, bias=bias)
    found, expected = mixed(linear.weight.detach())
    assert torch.equal(found.dequantize(), expected)
    layer = MixedPackedLinear.from_quantized(linear, found)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.quantized().layout, LAYOUT.byte())
    x = torch.randn(2, 5, 14, generator=generator())
    wanted = nn.functional.linear(x, expected, linear.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        copy.deepcopy(layer).bfloat16()(x.bfloat16()).float(), wanted, rtol=0.05, atol=0.05
    )
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), wanted, rtol=1e-5, atol=1e-5)


def test_all_bits_are_counted() -> None:
    linear = nn.Linear(14, 7, bias=False)
    found, _ = mixed(linear.weight.detach())
    codes = 7 * (1 * 5 + 2 * 3 + 3 * 6)
    scales = 7 * 16 * 5
    zeros = 7 * (2 * 16 + 1 * 2)
    assert found.total_bits == codes + scales + zeros + 5 * 2
    layer = MixedPackedLinear.from_quantized(linear, found)
    padding = 8 * layer.nbytes - found.total_bits
    assert 0 <= padding < 8 * 8  # each of codes, zero points and layout ends with a byte


def test_files_hold_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(14, 7), nn.ReLU(), Conv1D(7, 7))
    found, _ = mixed(model[0].weight.detach())
    half = as_matrix(model[2], model[2].weight.detach())
    pair = MixedQuantized(
        (quantize(half[:, 4:], QuantSpec("int2")), quantize(half[:, :4], QuantSpec("e2m1"))),
        torch.tensor([1, 0]),
        4,
    )
    layers = {
        "0": MixedPackedLinear.from_quantized(model[0], found),
        "2": MixedPackedLinear.from_quantized(model[2], pair),
    }
    model = replace(model, dict(layers)).eval()
    x = torch.randn(5, 14, generator=generator())
    supple.save(model, tmp_path / "model")
    loaded = supple.load(
        tmp_path / "model", model=nn.Sequential(nn.Linear(14, 7), nn.ReLU(), Conv1D(7, 7))
    )
    assert torch.equal(loaded(x), model(x))


def test_what_does_not_fit_says_so() -> None:
    found, _ = mixed(torch.randn(7, 14, generator=generator()))
    with pytest.raises(SettingError, match=r"parts of .5, 3, 6. columns don't fit a layout"):
        MixedQuantized(found.parts, torch.tensor([2, 0, 1, 2, 1]), 3)
    with pytest.raises(SettingError, match=r"a matrix of shape \(6, 14\), got one"):
        MixedPackedLinear.from_quantized(nn.Linear(14, 6), found)
    with pytest.raises(SettingError, match="columns must give each of 3 parts"):
        MixedPackedLinear(14, 7, SPECS, [7, 7], 3)
