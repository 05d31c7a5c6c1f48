"""What quantizers have in common, and the baselines."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from supple.calibrate import statistics
from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize, quantize
from supple.observers import least_error
from supple.quantize._half_quadratic import half_quadratic
from supple.quantize._solvers import gptq, output_error
from supple.quantize.base import BASELINES, Quantizer, Weights, baseline, bits_per_weight
from supple.testing.toys import generator, mlp
from supple.transforms import Given


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator())


# What is rotated has other weights: see test_rotations.
@pytest.mark.parametrize("name", [one for one in BASELINES if one != "quarot"])
def test_baselines_are_what_their_settings_say(name: str) -> None:
    settings = BASELINES[name]
    model = nn.Sequential(nn.Linear(128, 5), nn.Conv2d(6, 4, 3, groups=2))
    x = normal(17, 128)
    calibration = [(x,)] if baseline(name).needs else None
    small = baseline(name, layers="0" if calibration else "*").apply(
        model[:1] if calibration else model, calibration=calibration
    )
    spec = baseline(name).spec()
    for before, after in zip(model, small, strict=False):
        matrix = before.weight.detach().flatten(1)
        if settings.get("solver") == "gptq":
            expected = gptq(matrix, x.T @ x, spec).dequantize()
        elif settings.get("solver"):
            expected = half_quadratic(matrix, spec).dequantize()
        else:
            observer = least_error if settings.get("observer") == "mse" else None
            expected = fake_quantize(matrix, spec, observer=observer)
        assert torch.equal(after.weight.flatten(1), expected)
        assert not torch.equal(after.weight, before.weight)
        assert torch.equal(after.bias, before.bias)


def test_moved_zero_points_make_the_mean_error_smaller() -> None:
    weight = normal(7, 64) ** 3
    spec = QuantSpec("uint3", "group", 32, symmetric=False, zero_format="fp16")
    plain = quantize(weight, spec)
    moved = half_quadratic(weight, spec)
    assert torch.equal(moved.scale, plain.scale)
    errors = [(one.dequantize() - weight).abs().mean() for one in (plain, moved)]
    assert errors[1] < 0.95 * errors[0]


def test_zero_stays_zero_where_an_outlier_sets_the_steps() -> None:
    weight = 0.01 * normal(7, 32)
    weight[torch.arange(7), torch.arange(7)] = 5 + normal(7).abs()
    spec = QuantSpec("uint3", "group", 32, symmetric=False, zero_format="fp16")
    found = half_quadratic(weight, spec).dequantize()
    near = weight.abs() < 1
    assert (found[near].abs() < 0.01).all()
    # Between whole numbers they would all be off, and by the same.
    assert (quantize(weight, spec).dequantize()[near].abs() > 0.01).any()


def test_gptq_sees_the_inputs_of_layers_and_of_groups() -> None:
    model = nn.Sequential(nn.Conv2d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 5))
    batches = [(normal(7, 6, 4, 4).cumsum(2),), (normal(5, 6, 4, 4),)]
    seen = statistics(model, batches, ("gram",))["0.weight"].gram
    errors = [
        output_error(
            one.apply(model, calibration=batches)[0].weight.flatten(1)
            - model[0].weight.flatten(1),
            seen,
        )
        for one in (baseline("gptq", bits=3), baseline("rtn-asymmetric", bits=3))
    ]
    assert errors[0] < 0.8 * errors[1]
    with pytest.raises(SettingError, match="Weights needs calibration"):
        baseline("gptq").apply(model)
    assert torch.equal(baseline("gptq", bits=16).apply(model)[2].weight, model[2].weight)


def test_what_is_quantized_tells_its_size() -> None:
    model = mlp()
    quantizer = Weights(bits=4, group_size=4)
    found = quantizer.quantized(model, Given())
    assert list(found) == ["0.weight", "2.weight", "4.weight"]
    for name, one in found.items():
        assert torch.equal(model.get_parameter(name), one.dequantize())
    scales = 11 * 2 + 7 * 3 + 3 * 2
    weights = 55 + 77 + 21
    assert bits_per_weight(found) == pytest.approx(4 + 16 * scales / weights)
    assert sum(one.nbytes for one in found.values()) == 28 + 39 + 11 + 2 * scales


def test_solvers_see_what_the_rounded_blocks_before_them_give() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Seeing(Quantizer):
        want: ClassVar[tuple[str, ...]] = ("input_sum",)

        def solve(self, matrix, spec, seen):  # type: ignore[no-untyped-def]
            sums.append(seen.input_sum)
            return super().solve(matrix, spec, seen)

    sums: list[torch.Tensor] = []
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    x = normal(11, 5)
    small = Seeing(bits=2).apply(model, calibration=[(x,)])
    torch.testing.assert_close(sums[0], x.sum(0).double())
    torch.testing.assert_close(sums[1], small[0](x).sum(0).double())


def test_activations_are_rounded_by_token_and_by_example() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(2), nn.Linear(4, 2))
    x = normal(5, 2, 2, 2)
    x[0] *= 100
    small = Weights(bits=16, activations=4).apply(model, calibration=[(x,)])
    spec = QuantSpec("int4", "channel")
    middle = model[0](fake_quantize(x, spec)).flatten(2)
    by_token = QuantSpec("int4", "token")
    torch.testing.assert_close(small(x), model[2](fake_quantize(middle, by_token)))


def test_layers_hold_codes_where_packed_layers_do_the_same() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.Flatten(2), nn.Conv1d(3, 5, 1), nn.Linear(4, 2), nn.Linear(2, 2)
    )
    x = normal(5, 2, 2, 2)
    for activations in (None, 8):
        small, plain = (
            Weights(activations=activations, packed=packed, layers="*, !4").apply(model)
            for packed in (True, False)
        )
        torch.testing.assert_close(small(x), plain(x), rtol=1e-5, atol=1e-5)
        kinds = [type(small[place]).__name__ for place in (0, 2, 3, 4)]
        rounds = "QuantizedInput"
        if activations is None:
            assert kinds == ["PackedConv2d", "Conv1d", "PackedLinear", "Linear"]
        else:
            assert kinds == [rounds, rounds, "PackedLinear", "Linear"]
            assert type(small[0].layer).__name__ == "PackedConv2d"
        assert small[3].spec == Weights().spec()


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"bits": 1}, "bits must be from 2 to 16, got 1"),
        ({"activations": 17}, "activations must be from 2 to 16 bits"),
        ({"format": "e4m3"}, "format 'e4m3' has 8 bits, and bits is 4"),
        ({"format": "e2m1", "symmetric": False}, "zero points need whole numbers"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"scale_format": "fp17"}, "scale_format must be one of .* did you mean 'fp1"),
        ({"observer": "mze"}, "no observer 'mze', did you mean 'mse'"),
        ({"solver": "gptqq"}, "solver must be one of nearest"),
        (
            {"order": "activations"},
            "order must be one of none, activation, .* mean 'activation'",
        ),
        ({"solver": "half_quadratic"}, "set symmetric=False"),
    ):
        with pytest.raises(SettingError, match=match):
            Weights(**settings)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="no baseline 'nf5', did you mean 'nf4'"):
        baseline("nf5")


@pytest.mark.parametrize("name", ["rtn", "gptq", "hqq"])
@pytest.mark.parametrize("activations", [None, 8])
def test_no_more_than_two_blocks_are_held_twice(name, activations, monkeypatch) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(5)))
    method = baseline(name, activations=activations)
    weights = [weakref.ref(block[0].weight) for block in model]
    left, by_block = [], Weights.by_block

    def watching(self, model, given):
        for part in by_block(self, model, given):
            yield part
            gc.collect()
            left.append(sum(one() is not None for one in weights))

    whole, given = copy.deepcopy(model), Given(((normal(70, 64),),))
    whole = method.install(whole, method.quantized(whole, given), given)
    monkeypatch.setattr(Weights, "by_block", watching)
    small = method.apply(model, calibration=given.batches, inplace=True)
    assert small is model
    assert left == [5, 4, 3, 2, 1]
    for one, other in zip(small, whole, strict=True):
        assert torch.equal(one[0].codes, other[0].codes)
    x = normal(3, 64)
    torch.testing.assert_close(small(x), whole(x))
