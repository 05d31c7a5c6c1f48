"""DGQ: fine scales that are whole multiples, so that products are of whole numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize, quantize
from supple.layers.dual_grained import DualGrained, DualGrainedLinear
from supple.quantize.dgq import DGQ
from supple.testing.toys import generator

SIZE = 4


def layer_and_inputs() -> tuple[nn.Linear, Tensor]:
    source = generator()
    layer = nn.Linear(10, 3)
    layer.weight.data.copy_(torch.randn(3, 10, generator=source))
    layer.weight.data[1, 2] = 9.0
    return layer, torch.randn(40, 10, generator=source)


def searched(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both searches as loops over rows, groups and ratios, by outputs on the inputs."""
    rounded, factors = torch.empty_like(weight), torch.empty(len(weight))
    for row, own in enumerate(weight):
        pairs = []
        for start in range(0, 10, SIZE):
            part, seen = own[start : start + SIZE], x[:, start : start + SIZE]
            tried = []
            for step in range(1, 21):
                ratio = 1.02 - step / 20 * 0.22
                low, high = ratio * min(part.min(), 0.0), ratio * max(part.max(), 0.0)
                scale = (high - low) / 15
                zero = (-low / scale).round()
                back = scale * ((part / scale).round() + zero).clamp(0, 15) - scale * zero
                tried.append((float((seen @ (back - part)).square().sum()), scale, zero))
            pairs.append(min(tried, key=lambda one: one[0])[1:])
        tried = []
        for step in range(1, 81):
            factor = (1.02 - step / 80 * 0.82) * own.abs().max() / 127
            new = torch.empty(10)
            for start, (scale, zero) in zip(range(0, 10, SIZE), pairs, strict=True):
                k = (scale / factor).round().clamp(min=1)
                reach = (127 / k).floor()
                part = own[start : start + SIZE].clamp(-127 * factor, 127 * factor)
                low, high = max(zero - reach, 0), min(zero + reach, 15)
                codes = ((part / (k * factor)).round() + zero).clamp(low, high)
                new[start : start + SIZE] = k * factor * (codes - zero)
            tried.append((float((x @ (new - own)).square().sum()), factor, new))
        _, factors[row], rounded[row] = min(tried, key=lambda one: one[0])
    return rounded, factors


def test_groups_then_rows_are_searched_by_outputs() -> None:
    layer, x = layer_and_inputs()
    rounded, factors = searched(layer.weight.detach(), x)
    small = DGQ(group_size=SIZE, percentile=1.0, activations=None).apply(layer, calibration=[x])
    torch.testing.assert_close(small.quantized().factor[:, 0], factors)
    torch.testing.assert_close(small.weight, rounded)


def test_nothing_needs_more_than_eight_bits() -> None:
    layer, x = layer_and_inputs()
    layer.weight.data[0] *= torch.tensor([1e-3] * 4 + [1.0] * 6)
    small = DGQ(group_size=SIZE).apply(layer, calibration=[x])
    found = small.quantized()
    times = found.times
    assert torch.equal(times, times.round())
    assert times.min() >= 1
    whole = found.whole()
    assert whole.dtype == torch.int8
    torch.testing.assert_close(whole * found.factor, small.weight)
    assert small.nbytes == found.nbytes + layer.bias.nbytes
    spec = QuantSpec("uint4", "group", 2, False, scale_format="int8")
    codes, ones = torch.full((1, 2), 15, dtype=torch.uint8), torch.ones(1, 1)
    beyond = DualGrained(codes, 9 * ones, 0 * ones, spec, codes.shape, ones)
    with pytest.raises(SettingError, match="from -127 to 127, got 135"):
        beyond.whole()


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_products_are_of_whole_numbers(granularity: str) -> None:
    layer, x = layer_and_inputs()
    small = DGQ(group_size=SIZE, granularity=granularity).apply(layer, calibration=[x])
    assert isinstance(small, DualGrainedLinear)
    assert small.fixed_input == (granularity == "tensor")
    assert small.engine_for(x) == "integer"
    spec = small.input
    scale = small.input_scale if small.fixed_input else spec.scales(x)[0]
    codes = quantize(x, spec, scale).codes.long() - 128
    product = codes @ small.quantized().whole().long().T
    exact = product * (scale * small.factor.T) + layer.bias
    torch.testing.assert_close(small(x), exact)
    rounded = fake_quantize(x, spec, scale) @ small.weight.T + layer.bias
    torch.testing.assert_close(small(x), rounded)


def test_channels_above_the_percentile_are_divided_down() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].weight.data[2] = 50.0
    x = torch.randn(60, 8, generator=generator())
    method = DGQ(bits=16, activations=None, percentile=0.9)
    smooth = method.apply(model, calibration=[x])
    torch.testing.assert_close(smooth(x), model(x))
    seen = [net[0](x).abs().amax(0) for net in (model, smooth)]
    # Of 8 channels int(0.8 + 1.5) = 2 count: the largest comes down to the second largest.
    ordered = seen[0].sort().values
    torch.testing.assert_close(seen[1][2], ordered[-2])
    others = [0, 1, 3, 4, 5, 6, 7]
    torch.testing.assert_close(seen[1][others], seen[0][others])
    assert not torch.equal(smooth[1].weight, model[1].weight)
    far = method.apply(nn.Linear(8, 2), calibration=[x])  # nothing before it takes factors
    assert isinstance(far, nn.Linear)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 8}, "bits must be from 2 to 7, or 16"),
        ({"granularity": "channel"}, "granularity must be token or tensor"),
        ({"percentile": 0.0}, "percentile must be above 0"),
        ({"symmetric": True}, "leave symmetric"),
        ({"group_size": None}, "give group_size"),
    ],
)
def test_settings_that_can_not_be_used_say_so(settings, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        DGQ(**settings)
    with pytest.raises(SettingError, match="scale_format='int8'"):
        DualGrainedLinear(4, 2, QuantSpec("uint4", "group", 2, False))
