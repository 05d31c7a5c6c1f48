"""ZeroQuant-FP: floating-point weights and inputs, scales that shift, a product of low rank."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from supple.calibrate import statistics
from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize, number_format
from supple.layers.low_rank_branch import low_rank_corrected
from supple.quantize._solvers import gptq
from supple.quantize.base import bits_per_weight
from supple.quantize.zeroquant_fp import ZeroQuantFP
from supple.testing.toys import generator
from supple.transforms import Given

METHOD = ZeroQuantFP(group_size=4, rank=2)


def problem() -> tuple[nn.Module, torch.Tensor]:
    source = generator()
    model = nn.Sequential(nn.Linear(13, 7))
    model[0].weight.data = torch.randn(7, 13, generator=source) ** 3
    return model, torch.randn(29, 13, generator=source).cumsum(1)


def test_weights_are_gptqs_with_what_they_lost_at_low_rank() -> None:
    model, x = problem()
    spec = QuantSpec("e2m1", "group", 4, scale_format="shift4")
    matrix = model[0].weight.detach().clone()
    gram = statistics(model, [(x,)], ("gram",))["0.weight"].gram
    found = METHOD.quantized(model, Given(batches=((x,),)))["0.weight"]
    expected = low_rank_corrected(matrix, gptq(matrix, gram, spec), 2)
    assert torch.equal(found.dequantize(), expected.dequantize())
    scales = 7 * (4 * 4 + 32)
    assert found.total_bits == 4 * 7 * 13 + scales + 16 * 2 * (7 + 13)
    assert bits_per_weight({"": found}) == found.total_bits / (7 * 13)


def test_inputs_are_rounded_token_by_token() -> None:
    model, x = problem()
    x[3] *= 1000
    for rank in (0, 2):
        method = dataclasses.replace(METHOD, rank=rank)
        small = method.apply(model, calibration=[(x,)])
        rounded = fake_quantize(x, QuantSpec("e4m3", "token"))
        alone = dataclasses.replace(method, activations=None).apply(model, calibration=[(x,)])
        torch.testing.assert_close(small(x), alone(rounded), rtol=1e-5, atol=1e-4)


def test_large_channels_harm_floating_point_inputs_less() -> None:
    model, x = problem()
    x[:, 5] *= 300
    model[0].weight.data[:, 5] /= 300
    errors = []
    for form in ("e4m3", "int8-narrow"):
        method = dataclasses.replace(METHOD, bits=16, format=None, activation_format=form)
        errors.append((method.apply(model, calibration=[(x,)])(x) - model(x)).norm())
    assert errors[0] < 0.5 * errors[1]


def test_shifted_scales_are_nearer_than_powers_of_two() -> None:
    weight = torch.randn(64, 128, generator=generator())
    lost = []
    for held in ("fp32", "shift4", "e8m0-up"):
        spec = QuantSpec("e2m1", "group", 16, scale_format=held)  # type: ignore[arg-type]
        lost.append((fake_quantize(weight, spec) - weight).square().mean())
    assert lost[0] < lost[1] < lost[2]


def test_four_bits_become_eight_without_loss() -> None:
    model, x = problem()
    small = dataclasses.replace(METHOD, rank=0, activations=None).apply(
        model, calibration=[(x,)]
    )
    codes = small[0].quantized()
    levels, factor = codes.spec.scale_levels(codes.scale)
    values = number_format("e2m1").decode(codes.codes) * codes.spec.spread(levels, (7, 13))
    assert torch.equal(number_format("e4m3").round(values * 64), values * 64)
    torch.testing.assert_close(values * factor, small[0].weight)


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"rank": -1}, "rank must be at least 0"),
        ({"activation_format": "e2m1"}, "has 4 bits, and activations is 8"),
        ({"format": "e2m2"}, "has 5 bits, and bits is 4"),
    ):
        with pytest.raises(SettingError, match=match):
            ZeroQuantFP(**settings)  # type: ignore[arg-type]
