"""MR-GPTQ: microscaling floats behind rotations."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.layers.rotations import BlockHadamard
from supple.observers import least_error
from supple.quantize._solvers import gptq
from supple.quantize.mr_gptq import MRGPTQ
from supple.testing.toys import generator

METHOD = MRGPTQ(group_size=8, activations=None, packed=False)


def problem() -> tuple[nn.Module, torch.Tensor]:
    """Layers with 24, 12 and an odd number of inputs; the inputs depend on one another."""
    source = generator()
    model = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 7), nn.Linear(7, 5))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source)
    return model, torch.randn(41, 24, generator=source).cumsum(1)


@pytest.mark.parametrize("scale_format", ["e8m0-wide", "e4m3"])
def test_columns_are_rounded_in_the_rotated_basis(scale_format: str) -> None:
    model, x = problem()
    method = dataclasses.replace(METHOD, scale_format=scale_format)
    small = method.apply(model, calibration=[(x,)])
    spec = QuantSpec("e2m1", "group", 8, scale_format=scale_format)  # type: ignore[arg-type]
    search = partial(least_error, steps=100)
    for place, size in ((0, 8), (2, 4), (3, 1)):
        rotation = BlockHadamard(size)
        matrix, inputs = rotation(model[place].weight.detach()), rotation(x)
        expected = gptq(
            matrix, inputs.T @ inputs, spec, order="activation", observer=search
        ).dequantize()
        torch.testing.assert_close(small[place].weight, expected)
        x = small[: place + 1](x) if place == 0 else small[place](x)
        x = x.relu() if place == 0 else x


def test_without_rounding_the_function_stays() -> None:
    model, x = problem()
    fine = MRGPTQ(bits=12, format=None, scale_format="fp32", activations=None)
    torch.testing.assert_close(
        fine.apply(model, calibration=[(x,)])(x), model(x), rtol=2e-2, atol=2e-1
    )


def test_rotated_inputs_have_the_weights_format_and_groups() -> None:
    model, x = problem()
    alone = METHOD.apply(model[:1], calibration=[(x,)])
    spec = QuantSpec("e2m1", "group", 8, scale_format="e8m0-wide")
    rounded = fake_quantize(BlockHadamard(8)(x), spec)
    expected = nn.functional.linear(rounded, alone[0].weight, alone[0].bias)
    for packed in (True, False):
        both = dataclasses.replace(METHOD, activations=4, packed=packed)
        small = both.apply(model[:1], calibration=[(x,)])
        torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)


def test_heavy_tails_lose_less_behind_a_rotation_with_powers_of_two_only() -> None:
    normal = torch.randn(4, 128, 256, generator=generator())
    matrix = normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t of 3 degrees
    lost = {}
    for name, size, held in (("mx", 32, "e8m0-wide"), ("nv", 16, "e4m3")):
        spec = QuantSpec("e2m1", "group", size, scale_format=held)  # type: ignore[arg-type]
        lost[name] = [
            float((fake_quantize(one, spec) - one).square().sum() / one.square().sum())
            for one in (matrix, BlockHadamard(128)(matrix))
        ]
    assert lost["mx"][1] < 0.85 * lost["mx"][0]
    assert lost["nv"][1] > 0.9 * lost["nv"][0]


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"diagonal": 12}, "diagonal must be a power of two"),
        ({"activations": 8}, "as many bits as weights have, 4, or None"),
        ({"observer": "msee"}, "no observer 'msee', did you mean 'mse'"),
    ):
        with pytest.raises(SettingError, match=match):
            MRGPTQ(**settings)  # type: ignore[arg-type]
