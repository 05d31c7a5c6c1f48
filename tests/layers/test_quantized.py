"""Convolutions that compute with a few bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import supple
from supple.errors import SettingError
from supple.layers.choice import Choice
from supple.layers.quantized import FakeQuantizer, Precision, QuantizedConv2d


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_values_go_to_the_nearest_level_and_the_ends_clip() -> None:
    x = torch.tensor([-9.0, -1.3, -0.2, 0.3, 0.76, 9.0])
    signed = FakeQuantizer(3, torch.tensor(0.5))
    assert signed(x).tolist() == [-2.0, -1.5, -0.0, 0.5, 1.0, 1.5]
    positive = FakeQuantizer(2, torch.tensor(0.5), signed=False)
    assert positive(x).tolist() == [-0.0, -0.0, -0.0, 0.5, 1.0, 1.5]


def test_gradients_are_those_of_learned_step_sizes() -> None:
    layer = FakeQuantizer(3, torch.tensor(0.5))
    x = torch.tensor([-9.0, -1.3, 0.3, 9.0], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    # The ends give the level, others how far they were rounded: -4, -3 + 2.6, 1 - 0.6, 3.
    expected = (-4 - 0.4 + 0.4 + 3) / math.sqrt(3 * 4)
    assert layer.step.grad is not None
    assert layer.step.grad.item() == pytest.approx(expected)


def test_each_output_channel_has_a_step_of_its_own() -> None:
    weight = _drawn(3, 2, 5, 5) * torch.tensor([1.0, 10.0, 0.0])[:, None, None, None]
    precision = Precision(4, weight)
    first = 2 * weight.abs().mean((1, 2, 3)) / math.sqrt(7)
    torch.testing.assert_close(precision.weight.step[:2].flatten(), first[:2])
    _, rounded = precision(torch.ones(1), weight)
    ratio = rounded[1] / precision.weight.step[1]
    torch.testing.assert_close(ratio, ratio.round())
    assert rounded[2].abs().max() == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_first_step_suits_half_a_normal_distribution(bits: int) -> None:
    values = torch.linspace(0, 8, 4001)
    density = torch.exp(-(values**2) / 2)

    def lost(step: float) -> float:
        quantizer = FakeQuantizer(bits, torch.tensor(step), signed=False)
        return float((density * (values - quantizer(values).detach()) ** 2).sum())

    first = Precision(bits, torch.ones(1, 1)).input.step.item()
    best = min(lost(float(step)) for step in first * torch.linspace(0.5, 2.0, 61))
    assert lost(first) < 1.05 * best


def test_a_convolution_rounds_its_rectified_input_and_its_weight() -> None:
    layer = QuantizedConv2d(3, 4, 3, bits=(4,), bias=False)
    x = _drawn(2, 3, 5, 7)
    step = layer.precision.input.step
    rounded = (x.relu() / step).round().clamp(0, 15) * step
    own = layer.precision.weight.step
    weight = (layer.weight / own).round().clamp(-8, 7) * own
    torch.testing.assert_close(layer(x), F.conv2d(rounded, weight, padding=1))


def test_precisions_see_no_negative_input() -> None:
    class Seen(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert x.min() == 0
            assert weight.min() < 0
            return x, weight

    layer = QuantizedConv2d(3, 4, 3)
    layer.precision = Seen()
    layer(_drawn(2, 3, 5, 5))


def test_bits_are_elastic_and_extracted() -> None:
    layer = QuantizedConv2d(3, 4, 3)
    assert isinstance(layer.precision, Choice)
    net = supple.elastic(layer, _drawn(2, 3, 5, 5), axes=[supple.Operator()])
    assert net.space.size() == 2
    four = net.extract({"precision": 0})
    assert isinstance(four.precision, Precision)
    assert four.precision.bits == 4
    x = _drawn(2, 3, 5, 5)
    assert not torch.equal(four(x), layer(x))
    with net.at({"precision": 0}):
        torch.testing.assert_close(net.module(x), four(x))


def test_settings_are_checked() -> None:
    with pytest.raises(SettingError, match="bits must be from 2 to 16, got 1"):
        FakeQuantizer(1, torch.tensor(1.0))
    with pytest.raises(SettingError, match=r"ascending numbers, got \(8, 4\)"):
        QuantizedConv2d(3, 4, 3, bits=(8, 4))
