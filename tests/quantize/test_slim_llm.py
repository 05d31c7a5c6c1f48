"""SliM-LLM: groups of columns with more and fewer bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from supple.calibrate import statistics
from supple.errors import SettingError
from supple.formats import Quantized, QuantSpec
from supple.layers.mixed_packed import MixedPackedLinear, MixedQuantized
from supple.quantize._sample import RowSample
from supple.quantize._solvers import gptq, inverse_factor
from supple.quantize.slim_llm import SliMLLM, _weights
from supple.testing.toys import generator
from supple.transforms import Given

METHOD = SliMLLM(group_size=4, steps=3, rows=16)


def problem(columns: int = 32) -> tuple[nn.Module, torch.Tensor]:
    """A layer of eight groups, and inputs of different size that depend on one another."""
    source = generator()
    model = nn.Sequential(nn.Linear(columns, 7))
    model[0].weight.data = torch.randn(7, columns, generator=source)
    x = torch.randn(61, columns, generator=source).cumsum(1)
    return model, x * (torch.arange(columns) % 3 + 1)


def solved(method: SliMLLM, columns: int = 32) -> Any:
    model, x = problem(columns)
    return method.quantized(model, Given(batches=((x,),)))["0.weight"]


@pytest.mark.parametrize("columns", [32, 34])
@pytest.mark.parametrize("bits", [2, 3])
def test_as_many_groups_gain_a_bit_as_lose_one(bits: int, columns: int) -> None:
    model, x = problem(columns)
    found = solved(dataclasses.replace(METHOD, bits=bits), columns)
    each = [part.spec.bits for part in found.parts]
    assert each == [bits - 1, bits, bits + 1]
    widths = [part.shape[1] for part in found.parts]
    assert sum(b * w for b, w in zip(each, widths, strict=True)) == bits * columns
    gram = statistics(model, [(x,)], ("gram",))["0.weight"].gram
    factor = inverse_factor(gram).diagonal().float()
    salience = (model[0].weight / factor).square().sum(0)[:32].reshape(8, 4).sum(1)
    many = widths[0] // 4
    ranks = salience.argsort()
    assert set(ranks[:many].tolist()) == set((found.layout == 0).nonzero()[:, 0].tolist())
    assert set(ranks[-many:].tolist()) == set((found.layout == 2).nonzero()[:, 0].tolist())


def test_the_split_is_the_one_whose_outputs_diverge_least() -> None:
    model, x = problem()
    matrix = model[0].weight.detach()
    gram = statistics(model, [(x,)], ("gram",))["0.weight"].gram
    salience = (matrix / inverse_factor(gram).diagonal().float()).square()
    chosen = METHOD.group_bits(matrix, salience, x)
    ranks = salience.sum(0).reshape(8, 4).sum(1).argsort()
    divergences = []
    for many in (1, 2, 3):
        bits = torch.full((8,), 2)
        bits[ranks[:many]], bits[ranks[-many:]] = 1, 3
        groups = []
        for group, each in zip(matrix.split(4, 1), bits.tolist(), strict=True):
            mean, size = group.mean(1, keepdim=True), group.abs().mean(1, keepdim=True)
            if each == 1:
                groups.append(torch.where(group > mean, mean + size, mean - size))
            else:
                least, most = (end(1, keepdim=True).values for end in (group.min, group.max))
                step = (most.clamp_min(0) - least.clamp_max(0)) / (2**each - 1)
                zero = (-least.clamp_max(0) / step).round()
                codes = (group / step + zero).round().clamp(0, 2**each - 1)
                groups.append((codes - zero) * step)
        after, before = (x @ one.T for one in (torch.cat(groups, 1), matrix))
        divergences.append(
            nn.functional.kl_div(before.log_softmax(1), after.softmax(1), reduction="batchmean")
        )
    many = int((chosen == 1).sum())
    assert many == 1 + min(range(3), key=lambda place: float(divergences[place]))


def test_with_equal_bits_and_the_full_range_it_is_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = problem()
    matrix = model[0].weight.detach().clone()
    gram = statistics(model, [(x,)], ("gram",))["0.weight"].gram
    monkeypatch.setattr("supple.quantize.slim_llm._REACH", 0.0)
    monkeypatch.setattr(SliMLLM, "group_bits", lambda *_: torch.full((8,), 3))
    found = solved(METHOD)
    assert isinstance(found, Quantized)
    spec = QuantSpec("uint3", "group", 4, symmetric=False, scale_format="fp16")
    torch.testing.assert_close(found.dequantize(), gptq(matrix, gram, spec).dequantize())


def test_layers_hold_what_was_solved_and_all_bits_are_counted() -> None:
    model, x = problem()
    small = METHOD.apply(model, calibration=[(x,)])
    assert isinstance(small[0], MixedPackedLinear)
    found = small[0].quantized()
    assert isinstance(solved(METHOD), MixedQuantized)
    rounded = dataclasses.replace(METHOD, packed=False).apply(model, calibration=[(x,)])
    torch.testing.assert_close(found.dequantize(), rounded[0].weight)
    torch.testing.assert_close(small(x), rounded(x), rtol=1e-5, atol=1e-3)
    ones = int((found.layout == 0).sum())
    zeros = 7 * (ones * 16 + (8 - 2 * ones) * 2 + ones * 3)
    assert found.total_bits == 2 * 7 * 32 + 7 * 8 * 16 + zeros + 8 * 2


def test_salient_weights_are_those_far_above_the_mean() -> None:
    salience = torch.ones(3, 7)
    salience[1, 4] = 50.0
    weights = _weights(salience, 5.0)
    assert weights[1, 4] == 5.0
    assert weights.sum() == 25.0
    assert (_weights(torch.ones(3, 7), 5.0) == 1).all()  # none is


def test_samples_are_evenly_spaced_however_many_come() -> None:
    for sizes in ((5, 5, 5), (1,) * 23, (100,), (3,)):
        sample = RowSample(4)
        start = 0
        for size in sizes:
            sample.see(torch.arange(start, start + size).reshape(1, size, 1))
            start += size
        kept = sample.result()
        assert kept is not None
        steps = kept.flatten().diff().unique()
        assert kept.shape[1] <= 4
        assert len(steps) == 1
        assert kept[0, -1, 0] + 2 * steps[0] >= start


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"group_size": None}, "give group_size"),
        ({"symmetric": True}, "leave symmetric=False"),
        ({"salient": 0.0}, "salient must be above 0"),
        ({"rows": 0}, "rows must be at least 1"),
    ):
        with pytest.raises(SettingError, match=match):
            SliMLLM(**settings)  # type: ignore[arg-type]
