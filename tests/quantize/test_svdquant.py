"""SVDQuant: factors, the product of low rank beside what is rounded, and its refinement."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.graph.feeds import feeds
from supple.layers.low_rank_branch import LowRankBranch
from supple.layers.packed import PackedLinear
from supple.layers.scaled_input import ScaledInput
from supple.quantize.svdquant import SVDQuant, _thin
from supple.testing.toys import generator
from supple.transforms import Given

METHOD = SVDQuant(group_size=4, rank=2, candidates=4)
SPEC = QuantSpec("int4", "group", 4, scale_format="fp16")
INPUT = QuantSpec("int4", "group", 4)


def network() -> nn.Sequential:
    """A norm with an outlier, and a layer behind an activation."""
    source = generator()
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 9)).eval()
    with torch.no_grad():
        for place in (1, 3):
            model[place].weight.normal_(generator=source)
        model[0].weight[3] = 30.0
        model[1].weight[:, 3] /= 30
    return model


def best_product(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).float()


def lost(matrix: Tensor, x: Tensor, low: Tensor) -> tuple[float, Tensor]:
    """By how much outputs change, and what the rest is rounded to."""
    rounded = fake_quantize(matrix - low, SPEC)
    y = x @ low.T + fake_quantize(x, INPUT) @ rounded.T
    return float((y - x @ matrix.T).square().sum()), rounded


def given(x: Tensor) -> Given:
    return Given(((x,),), None, generator())


def test_thin_matrices_are_those_of_the_largest_singular_values() -> None:
    source = generator()
    for shape in ((5, 11), (11, 5)):
        matrix = torch.randn(shape, generator=source)
        up, down = _thin(matrix, 2)
        assert up.dtype == down.dtype == torch.float16
        assert (up.shape, down.shape) == ((shape[0], 2), (2, shape[1]))
        expected = best_product(matrix, 2)
        torch.testing.assert_close(up.float() @ down.float(), expected, rtol=0.01, atol=0.01)
        up, down = _thin(matrix, 7)  # more than there are
        torch.testing.assert_close(up.float() @ down.float(), matrix, rtol=0.01, atol=0.01)
    assert not any(one.isnan().any() for one in _thin(torch.zeros(3, 4), 2))


def test_the_product_is_refined_as_long_as_outputs_get_better() -> None:
    source = generator(4)
    matrix, x = torch.randn(9, 12, generator=source), torch.randn(50, 12, generator=source)
    matrix[:, 0] *= 6
    errors, codes = [], torch.zeros_like(matrix)
    for _ in range(20):
        error, codes = lost(matrix, x, best_product(matrix - codes, 2))
        errors.append(error)
    first = next(i for i in range(1, 20) if errors[i] > errors[i - 1])
    for iterations, expected in ((1, errors[0]), (100, errors[first - 1])):
        method = SVDQuant(group_size=4, rank=2, iterations=iterations)
        found, error = method._split(matrix, SPEC, x, iterations)
        assert error == pytest.approx(expected, rel=0.05)
        assert found.total_bits == 9 * 12 * 4 + 9 * 3 * 16 + 2 * (9 + 12) * 16
    assert errors[first - 1] < 0.98 * errors[0]


def test_factors_are_those_of_the_best_pair_of_exponents() -> None:
    model, x = network(), torch.randn(60, 8, generator=generator(2))
    with torch.no_grad():
        h = model[0](x)
    weight = model[1].weight.detach()
    found = []
    shares = (0.25, 0.5, 0.75)
    for alpha, beta in [(0, 0), *((a, 0) for a in shares), *((a, 1 - a) for a in shares)]:
        scale = h.abs().amax(0) ** alpha / weight.abs().amax(0) ** beta
        low = best_product(weight * scale, 2)
        found.append((lost(weight * scale, h / scale, low)[0], scale))
    expected = min(found, key=lambda one: one[0])[1]
    ours = dict(METHOD.factors(model, feeds(model, (x,)), given(x)))
    first, second = ours.values()
    torch.testing.assert_close(first, expected)
    assert first.max() / first.min() > 3
    assert second.shape == (6,)
    assert not list(SVDQuant(candidates=1).factors(model, feeds(model, (x,)), given(x)))


def test_the_product_sees_inputs_that_are_scaled_and_not_rounded() -> None:
    model, x = network(), torch.randn(60, 8, generator=generator(2))
    small = METHOD.apply(model, calibration=[(x,)])
    layer = small[3]
    assert isinstance(layer, ScaledInput)
    branch = layer.layer
    assert isinstance(branch, LowRankBranch)
    assert isinstance(branch.layer, PackedLinear)
    with torch.no_grad():
        h = nn.functional.gelu(small[1](small[0](x)))
        scaled = h * layer.factor
        rounded = fake_quantize(scaled, INPUT) @ branch.layer.dense_weight().T
        product = scaled @ branch.down.float().T @ branch.up.float().T
        torch.testing.assert_close(small(x), rounded + product + model[3].bias)
        torch.testing.assert_close(
            branch.weight * layer.factor, model[3].weight, atol=0.3, rtol=0
        )


def test_product_and_factors_save_what_rounding_loses() -> None:
    model, x = network(), torch.randn(60, 8, generator=generator(2))
    new = torch.randn(60, 8, generator=generator(3))
    error = {}
    for rank, candidates in ((2, 4), (0, 4), (0, 1)):
        method = SVDQuant(group_size=4, rank=rank, candidates=candidates)
        small = method.apply(model, calibration=[(x,)])
        with torch.no_grad():
            error[rank, candidates] = float((small(new) - model(new)).square().mean())
    assert error[2, 4] < 0.8 * error[0, 4] < 0.8 * error[0, 1]


def test_convolutions_are_rounded_without_a_product() -> None:
    source = generator()
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 5)).eval()
    x = torch.randn(6, 3, 4, 4, generator=source)
    method = SVDQuant(group_size=4, rank=2, candidates=1)  # rows would take factors
    small = method.apply(copy.deepcopy(model), calibration=[(x,)])
    assert not any(isinstance(one, LowRankBranch) for one in small[0].modules())
    assert any(isinstance(one, LowRankBranch) for one in small[2].modules())
    expected = fake_quantize(model[0].weight.detach().flatten(1), SPEC)
    torch.testing.assert_close(small[0].weight.flatten(1), expected)


def test_a_product_needs_layers_that_keep_its_inputs_apart() -> None:
    with pytest.raises(SettingError, match="the product has to see inputs as they are"):
        SVDQuant(packed=False)
    model, x = network(), torch.randn(60, 8, generator=generator(2))
    for settings in ({"rank": 0}, {"activations": None, "rank": 2}):
        small = SVDQuant(group_size=4, packed=False, **settings).apply(
            model, calibration=[(x,)]
        )
        packed = SVDQuant(group_size=4, **settings).apply(model, calibration=[(x,)])
        torch.testing.assert_close(small(x), packed(x), rtol=1e-3, atol=1e-3)


def test_settings_that_can_not_be_used_say_so() -> None:
    for name, least in (("rank", 0), ("iterations", 1), ("candidates", 1), ("rows", 1)):
        with pytest.raises(SettingError, match=f"{name} must be at least {least}, got -1"):
            SVDQuant(**{name: -1})  # type: ignore[arg-type]
