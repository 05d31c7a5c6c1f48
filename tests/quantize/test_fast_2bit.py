"""Fast 2-bit: the widest groups of each output have more bits, equally many in each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.formats import QuantSpec, quantize
from supple.layers.aligned_packed import AlignedPackedLinear, align
from supple.layers.packed import PackedLinear
from supple.quantize.base import bits_per_weight
from supple.quantize.fast_2bit import Fast2Bit
from supple.testing.toys import generator
from supple.transforms import Given

FEW = QuantSpec("uint2", "group", 4, False, scale_format="int4")
MANY = QuantSpec("uint4", "group", 4, False, scale_format="int4")


def matrix(rows: int = 5, columns: int = 23) -> Tensor:
    found = torch.randn(rows, columns, generator=generator())
    found[0, 9] = 30.0
    found[1, 1] = -20.0
    found[2, 22] = 40.0  # in no group
    return found


def by_hand(weights: Tensor, taken: list[list[int]], outliers: list[list[int]]) -> Tensor:
    """Rounds row by row, group by group; the scales of either kind share a factor."""
    result = torch.empty_like(weights)
    for row, (groups, apart) in enumerate(zip(taken, outliers, strict=True)):
        rest = weights[row : row + 1].clone()
        rest[:, apart] = 0
        for spec, chosen in ((MANY, True), (FEW, False)):
            places = [c for c in range(weights.shape[1]) if (c // 4 in groups) == chosen]
            result[row, places] = quantize(rest[:, places], spec).dequantize()[0]
        result[row, apart] = weights[row, apart].half().float()
    return result


def test_the_widest_groups_of_each_row_have_more_bits() -> None:
    weights = matrix()
    layer = nn.Linear(23, 5)
    layer.weight.data.copy_(weights)
    ranges = torch.stack([part.amax(1) - part.amin(1) for part in weights.split(4, 1)[:5]], 1)
    best = ranges.argsort(1, descending=True)[:, :2]
    assert best[0, 0] == 2
    assert best[1, 0] == 0
    method = Fast2Bit(group_size=4, share=0.4)
    small = method.apply(layer)
    assert isinstance(small, AlignedPackedLinear)
    assert small.quantized().taken.sum(1).tolist() == [2] * 5
    expected = by_hand(weights, best.tolist(), [[]] * 5)
    assert torch.equal(small.weight, expected)
    x = torch.randn(3, 23, generator=generator())
    torch.testing.assert_close(small(x), x @ expected.T + layer.bias)


def test_outliers_are_the_largest_weights_of_few_bits() -> None:
    weights = matrix()
    scores = torch.zeros(5, 5)
    scores[:, 2] = 1.0
    found = align(weights, scores, FEW, MANY, 1, outliers=2)
    inside = weights.abs()
    inside[:, 8:12] = -1
    places = inside.argsort(1, descending=True)[:, :2]
    assert sorted(found.places[2].tolist()) == sorted(places[2].tolist())
    assert 22 in found.places[2]
    assert 9 not in found.places[0]
    assert torch.equal(found.dequantize(), by_hand(weights, [[2]] * 5, places.tolist()))


def test_inputs_that_are_large_draw_bits() -> None:
    layer = nn.Linear(16, 3, bias=False)
    x = torch.randn(50, 16, generator=generator())
    x[:, 4:8] *= 40
    method = Fast2Bit(group_size=4, share=0.25, score="sensitivity")
    small = method.apply(layer, calibration=[(x,)])
    assert small.quantized().taken.int().tolist() == [[0, 1, 0, 0]] * 3
    with pytest.raises(SettingError):
        method.apply(layer)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_what_a_file_takes_is_counted(share: float, outliers: float) -> None:
    layer = nn.Linear(64, 8, bias=False)
    method = Fast2Bit(group_size=4, share=share, outliers=outliers)
    small = method.apply(layer)
    found = method.quantized(nn.Sequential(layer), Given())
    assert found["0.weight"].total_bits == 8 * small.nbytes
    count = {0.0: 1, 0.5: 8, 0.99: 15}[share]
    apart = min(round(outliers * 64), 64 - 4 * count)
    # Codes, scale and zero point of each group, two factors, which groups, and outliers.
    bits = 8 * (count * (4 * 4 + 4 + 4) + (16 - count) * (4 * 2 + 4 + 2) + 64 + 16)
    assert bits_per_weight(found) == (bits + 8 * apart * 32) / 512
    again = small.quantized()
    assert torch.equal(again.dequantize(), found["0.weight"].dequantize())


def test_matrices_without_a_choice_have_few_bits() -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.Conv2d(2, 3, 3), nn.Linear(18, 4))
    small = Fast2Bit().apply(model)
    assert isinstance(small[0], PackedLinear)
    assert isinstance(small[1], nn.Conv2d)
    assert not torch.equal(small[1].weight, model[1].weight)
    assert isinstance(small[2], AlignedPackedLinear)  # its last two columns fill no group


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"share": 1.0}, r"share must be in \[0, 1\), got 1.0"),
        ({"outliers": -0.1}, "outliers must be in"),
        ({"more_bits": 1}, "more_bits must be from bits=2"),
        ({"group_size": None}, "give group_size"),
        ({"score": "rang"}, "score must be one of range, sensitivity, got 'rang'"),
    ],
)
def test_settings_that_can_not_be_used_say_so(settings, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        Fast2Bit(**settings)
    with pytest.raises(SettingError, match="one size"):
        align(matrix(), torch.ones(5, 5), FEW, QuantSpec("uint4", "group", 2, False), 1)
    with pytest.raises(SettingError, match="some columns must be left"):
        align(matrix(), torch.ones(5, 4), FEW, MANY, 1)
