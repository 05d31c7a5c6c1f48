"""Number formats, and how tensors are scaled to them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from supple.errors import SettingError
from supple.formats import (
    Codebook,
    Float,
    Int,
    Power,
    QuantSpec,
    fake_quantize,
    number_format,
    quantize,
)
from supple.testing.toys import generator

FORMATS = [
    "int2",
    "int8-narrow",
    "uint3",
    "int12",
    "midrise1",
    "midrise3",
    "e2m1",
    "e3m0",
    "e2m3",
    "e3m2",
    "e4m3",
    "e5m2",
    "nf4",
    "power5^0.4",
    "levels(-2.0,0.5,3.0)",
]


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_comes_back_from_its_code_and_its_format_from_its_name(name: str) -> None:
    form = number_format(name)
    assert form.name == name
    assert number_format(form.name) == form
    levels, codes = form.levels, form.encode(form.levels)
    assert (levels.diff() > 0).all()
    assert len(set(codes.tolist())) == len(levels) <= 2**form.bits
    assert int(codes.max()) < 2**form.bits
    torch.testing.assert_close(form.decode(codes), levels)
    assert [form.least, form.most] == pytest.approx(levels[[0, -1]].tolist())
    outside = form.round(torch.tensor([-1e9, 1e9]))
    torch.testing.assert_close(outside, levels[[0, -1]])


@pytest.mark.parametrize("name", [name for name in FORMATS if "power" not in name])
def test_rounding_gives_the_nearest_value(name: str) -> None:
    form = number_format(name)
    x = torch.randn(997, generator=generator()) * form.most / 2
    nearest = form.levels[(x[:, None] - form.levels).abs().argmin(1)]
    assert torch.equal(form.round(x), nearest)


def test_floats_are_those_that_torch_has() -> None:
    x = torch.randn(4999, generator=generator()) * 100
    x = torch.cat(
        [x, x / 1e4, torch.tensor([0.0, 0.5, 1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10])]
    )
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        form = number_format(name)
        theirs = x.to(dtype)
        assert torch.equal(form.round(x), theirs.float())
        same = theirs.view(torch.uint8)
        plain = same.masked_fill(theirs.float() == 0, 0)  # minus zero is zero here
        assert torch.equal(form.encode(x), plain)


def test_ties_go_to_the_even_code() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(Float(2, 1).round(x), expected)
    assert torch.equal(Float(2, 1).round(-x), -expected)


def test_powers_round_in_the_power() -> None:
    form = Power(4, 0.5)
    x = torch.tensor([0.2, -0.01, 1.0])  # 7 times their roots: 3.13, -0.7, 7
    assert form.encode(x).tolist() == [3 + 8, -1 + 8, 7 + 8]
    torch.testing.assert_close(form.round(x), torch.tensor([9 / 49, -1 / 49, 1.0]))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 11), (3, 5, 7), (2, 3, 3, 3)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "token", "group"])
def test_any_shape_comes_back_nearly_and_fake_quantized_is_the_same(shape, granularity) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(shape, generator=generator())
    size = 4 if granularity == "group" else None
    for symmetric, held in itertools.product((True, False), ("fp32", "fp16", "e4m3", "int8")):
        spec = QuantSpec("int8", granularity, size, symmetric, held)
        found = quantize(x, spec)
        assert found.scale.shape == spec.scale_shape(shape)
        back = found.dequantize()
        assert back.shape == x.shape
        assert (back - x).abs().max() <= x.abs().max() * (0.2 if held == "e4m3" else 0.02)
        assert torch.equal(back, fake_quantize(x, spec))


def test_groups_run_along_inputs_and_the_last_is_smaller() -> None:
    x = torch.tensor([[1.0, 7.5, 0.5, 3.75, 75.0], [15.0, 1.0, 20.0, 30.0, 0.0]])
    found = quantize(x, QuantSpec("int4", "group", 2))
    assert found.scale.tolist() == [[1.0, 0.5, 10.0], [2.0, 4.0, 10.0]]
    torch.testing.assert_close(
        found.dequantize(),
        torch.tensor([[1.0, 7.0, 0.5, 3.5, 70.0], [14.0, 0.0, 20.0, 28.0, 0.0]]),
    )


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_whole_numbers_are_all_used_and_off_by_half_a_step_at_most(bits: int) -> None:
    x = torch.randn(20, 37, generator=generator(bits))
    x[0], x[1] = x[0].abs(), -x[1].abs()
    found = quantize(x, QuantSpec(f"int{bits}"))
    off = (found.dequantize() - x).abs() / found.scale
    torch.testing.assert_close(off.amax(1).clamp_min(0.5), torch.full((20,), 0.5))
    # With less than that somewhere a smaller scale would do.
    ends = torch.stack((x.amin(1) / -found.scale[:, 0], x.amax(1) / found.scale[:, 0]), 1)
    most = torch.tensor([2.0 ** (bits - 1) + 0.5, 2.0 ** (bits - 1) - 0.5])
    torch.testing.assert_close((ends / most).amax(1), torch.ones(20))
    if bits == 2:
        assert found.codes.unique().tolist() == [0, 1, 2, 3]
    exact = quantize(x, QuantSpec(f"int{bits}-narrow")).dequantize()
    torch.testing.assert_close(exact.abs().amax(1), x.abs().amax(1))


def test_powers_of_two_follow_the_largest_magnitude_whatever_its_sign() -> None:
    for value in (1.01, 1.99):
        x = torch.tensor([[-value, 0.3, 0.1]])
        spec = QuantSpec("int8", scale_format="e8m0")
        assert spec.scales(x)[0].item() == spec.scales(-x)[0].item() == 2.0**-6
        torch.testing.assert_close(fake_quantize(x, spec), x, rtol=0, atol=2.0**-6)


def test_zero_points_make_zero_exact() -> None:
    x = torch.tensor([[0.0, 3.0, 2.0], [0.0, -1.0, 2.0], [5.0, 5.0, 5.0], [-2.0, -2.0, -2.0]])
    for name in ("uint4", "int4"):
        spec = QuantSpec(name, symmetric=False)
        found = quantize(x, spec)
        assert torch.equal(found.zero, found.zero.round())
        assert (found.dequantize()[:2, 0] == 0).all()
        torch.testing.assert_close(found.dequantize(), x)
        assert (fake_quantize(torch.zeros_like(x), spec, found.scale, found.zero) == 0).all()


@pytest.mark.parametrize(
    "held",
    ["fp32", "fp16", "bf16", "e4m3", "e8m0", "e8m0-up", "e8m0-wide", "int4", "shift4"],
)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1e30])
def test_zeros_and_extremes_stay_finite(held, value) -> None:  # type: ignore[no-untyped-def]
    x = torch.zeros(3, 7)
    x[1] = value
    for symmetric in (True, False):
        spec = QuantSpec("int4", "group", 5, symmetric, held)
        back = fake_quantize(x, spec)
        assert back.isfinite().all()
        assert (back[[0, 2]] == 0).all()
        if value == 0:
            assert torch.equal(back, x)


def test_power_of_two_scales_follow_the_microscaling_rule_or_stay_above() -> None:
    x = torch.tensor([[8.0, 1.0], [7.0, 1.0], [6.0, 1.0], [3.0, 1.0]])
    floor = QuantSpec("e2m1", "group", 2, scale_format="e8m0")
    assert floor.scales(x)[0].flatten().tolist() == [2.0, 1.0, 1.0, 0.5]
    above = dataclasses.replace(floor, scale_format="e8m0-up")
    assert above.scales(x)[0].flatten().tolist() == [2.0, 2.0, 1.0, 0.5]
    many = 2.0 ** torch.arange(-20, 20)[:, None]
    assert torch.equal(floor.scales(many)[0], many / 4)
    wide = dataclasses.replace(floor, scale_format="e8m0-wide")
    torch.testing.assert_close(wide.scales(x)[0], floor.scales(x)[0] * 4 / 3)
    reach = many.cumsum(0).log10()  # of any size
    assert bool((6 * wide.scales(reach)[0] >= reach.abs() * (1 - 1e-6)).all())


def test_scales_of_few_bits_come_apart_without_loss() -> None:
    x = torch.randn(5, 64, generator=generator()).exp()
    for held, most in (("e4m3", 448.0), ("int8", 255.0), ("int4", 15.0)):
        spec = QuantSpec("e2m1", "group", 16, scale_format=held)
        scale, _ = spec.scales(x)
        levels, factor = spec.scale_levels(scale)
        assert float(levels.max()) == most
        torch.testing.assert_close(levels * factor, scale, rtol=1e-6, atol=0)
        assert torch.equal(
            levels, number_format("e4m3" if most > 400 else "uint8").round(levels)
        )


def test_shifted_scales_are_the_rows_largest_over_a_power_of_two() -> None:
    x = torch.tensor([[12.0, 6.0, 5.9, 3.0, 1.6, 0.0], [6e-5, 6.0, 6.0, 6.0, 6.0, 6.0]])
    spec = QuantSpec("e2m1", "group", 1, scale_format="shift4")
    scale, _ = spec.scales(x)
    assert scale[0, :5].tolist() == [2.0, 1.0, 1.0, 0.5, 0.5]
    assert scale[1].tolist() == [2.0**-14, *[1.0] * 5]
    levels, factor = spec.scale_levels(scale)
    assert torch.equal(levels * factor, scale)
    assert factor.tolist() == [[2.0], [1.0]]
    assert spec.total_bits(x.shape) == 12 * (4 + 4) + 2 * 32
    # What four bits stand for then has an exact counterpart in eight, but for one factor.
    eight = number_format("e4m3")
    values = number_format("e2m1").levels[:, None] * 64 * 2.0 ** -torch.arange(14)
    assert torch.equal(eight.round(values), values)


def test_bits_count_everything() -> None:
    shape = (6, 40)  # groups of 16 and a rest: 3 a row
    codes, groups = 240 * 4, 18
    assert QuantSpec("int4", "tensor").bits_per_weight(shape) == (codes + 32) / 240
    assert QuantSpec("int4", "channel").bits_per_weight(shape) == (codes + 6 * 32) / 240
    spec = QuantSpec("e2m1", "group", 16, scale_format="e4m3")
    assert spec.bits_per_weight(shape) == (codes + groups * 8 + 32) / 240
    assert spec.nbytes(shape) == 120 + 18 + 4
    spec = QuantSpec("uint4", "group", 16, False, "fp16")
    assert spec.bits_per_weight(shape) == (codes + groups * (16 + 4)) / 240
    spec = dataclasses.replace(spec, scale_format="int8", zero_format="fp16")
    assert spec.bits_per_weight(shape) == (codes + groups * (8 + 16) + 6 * 32) / 240
    assert QuantSpec(Codebook((-1.0, 1.0)), "tensor").nbytes(shape) == 30 + 4 + 8


def test_specs_are_json_and_come_back() -> None:
    for name in FORMATS:
        spec = QuantSpec(name, "group", 16, scale_format="fp16")
        again = QuantSpec(**json.loads(json.dumps(spec.settings())))
        assert again == spec
        assert hash(again) == hash(spec)


def test_what_can_not_be_used_says_so() -> None:
    for make, match in (
        (lambda: number_format("e2m2x"), "no number format 'e2m2x'"),
        (lambda: Int(1), "bits must be from 2 to 16, got 1"),
        (lambda: Int(4, symmetric=False, narrow=True), "needs symmetric"),
        (lambda: Float(5, 4), "3 to 8 bits"),
        (lambda: Codebook((1.0, 1.0)), "must ascend"),
        (lambda: Power(4, 0.0), "above 0"),
        (lambda: QuantSpec("int4", "row"), "granularity must be one of"),  # type: ignore[arg-type]
        (lambda: QuantSpec("int4", "group"), "group_size goes with"),
        (lambda: QuantSpec("int4", "group", 0), "at least 1"),
        (lambda: QuantSpec("e2m1", symmetric=False), "zero points need whole numbers"),
        (lambda: quantize(torch.ones(0, 3), QuantSpec("int4")), "nothing to quantize"),
        (
            lambda: quantize(torch.ones(2, 3), QuantSpec("int4"), torch.ones(2)),
            r"scale must be of shape \(2, 1\)",
        ),
        (
            lambda: quantize(
                torch.ones(2, 3), QuantSpec("int4", symmetric=False), torch.ones(2, 1)
            ),
            "zero points go with",
        ),
    ):
        with pytest.raises(SettingError, match=match):
            make()


def test_types_stay() -> None:
    x = torch.randn(3, 5, generator=generator()).bfloat16()
    assert fake_quantize(x, QuantSpec("int8")).dtype == torch.bfloat16
    assert quantize(x, QuantSpec("int8")).dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert math.isclose(QuantSpec("int8").bits_per_weight((4, 32)), 9.0)
