"""NUPES: powers whose exponent is searched for or learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.formats import Power, QuantSpec, fake_quantize
from supple.layers.packed import PackedLinear
from supple.quantize.nupes import NUPES, PowerRounding, search, signed_power, soft_step
from supple.testing.toys import generator, mlp
from supple.weights import matrices


def normal(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def test_codes_are_rounded_powers() -> None:
    layer = nn.Linear(5, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[-2.0, 0.5, 0.08, -0.02, 0.0]]))
    small = NUPES(bits=4, exponent=0.5, steps=0, scale_format="fp32").apply(layer)
    assert isinstance(small, PackedLinear)
    # 7 sqrt(w / 2): -7, 3.5 (to even), 1.4, -0.7, 0.
    assert (small.quantized().codes.int() - 8).tolist() == [[-7, 4, 1, -1, 0]]
    expected = 2 * torch.tensor([[-1.0, (4 / 7) ** 2, 1 / 49, -1 / 49, 0.0]])
    torch.testing.assert_close(small.weight, expected)


def test_the_search_finds_the_best_exponent_of_the_grid() -> None:
    weights = [normal(6, 40), normal(3, 25, seed=8)]

    def lost(exponent: float) -> float:
        spec = QuantSpec(Power(4, exponent))
        return sum(float((fake_quantize(one, spec) - one).norm()) for one in weights)

    found = search(weights, 4)
    assert 0.5 < found < 1
    nearby = [found + step / 100 for step in range(-4, 5)]
    assert lost(found) == min(map(lost, nearby))
    assert lost(found) <= min(lost(0.05 * step) for step in range(1, 21))
    assert search([torch.tensor([[1.0, -1.0, 0.0]])], 4) == 1.0


def test_one_exponent_for_all_or_one_for_each_layer() -> None:
    model = mlp().eval()
    model[2].weight.data.pow_(3)  # far more small weights
    weights = {name: one.weight.detach() for name, one in matrices(model).items()}
    shared = NUPES(bits=4, steps=0).apply(model)
    expected = search(list(weights.values()), 4)
    assert {one.spec.format.exponent for one in packed(shared)} == {expected}
    single = NUPES(bits=4, steps=0, scope="layer").apply(model)
    found = [one.spec.format.exponent for one in packed(single)]
    assert found == [search([one], 4) for one in weights.values()]
    assert len(set(found)) > 1


def packed(model: nn.Module) -> list[Any]:
    return [one for one in model.modules() if isinstance(one, PackedLinear)]


def test_inputs_are_powers_of_the_same_exponent() -> None:
    model = mlp().eval()
    small = NUPES(bits=4, steps=0, activations=5, scope="layer").apply(model)
    for layer in packed(small):
        assert layer.input.format == Power(5, layer.spec.format.exponent)
        x = normal(3, layer.in_features)
        expected = nn.functional.linear(fake_quantize(x, layer.input), layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected)


def test_gradients_of_powers_are_bounded_and_right() -> None:
    x = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: signed_power(x, a, 0.01), (x, a))
    # At zero, where the slope has no bound, that of the least magnitude stands for it.
    zero = torch.zeros(2, requires_grad=True)
    exponent = torch.tensor(0.5, requires_grad=True)
    signed_power(zero, exponent, 0.25).sum().backward()
    assert zero.grad is not None
    assert zero.grad.tolist() == [1.0, 1.0]
    assert exponent.grad == 0


def test_the_soft_step_grows_hard() -> None:
    places = torch.linspace(-2, 2, 81)
    soft, hard = soft_step(places, 0.05), soft_step(places, 200.0)
    torch.testing.assert_close(soft, places, atol=1e-3, rtol=0)
    apart = (places - places.floor() - 0.5).abs() > 0.01
    torch.testing.assert_close(hard[apart], places[apart].round(), atol=0.02, rtol=0)


def test_codes_and_the_exponent_are_learned() -> None:
    # Inputs that go along: where they don't, the nearest values are the best.
    x = normal(32, 3) @ normal(3, 24)
    layer = nn.Linear(24, 8)
    layer.weight.data.copy_(normal(8, 24, seed=3))
    lost, codes, exponents = [], [], []
    for steps in (0, 30):
        small = NUPES(bits=3, steps=steps).apply(layer, calibration=[(x,)])
        assert isinstance(small, PackedLinear)
        lost.append(float((small(x) - layer(x)).detach().norm()))
        codes.append(small.quantized().codes.int())
        form = small.spec.format
        assert isinstance(form, Power)
        exponents.append(form.exponent)
    assert lost[1] < 0.7 * lost[0]
    assert (codes[1] != codes[0]).sum() > 10
    assert exponents[0] != exponents[1]
    kept = NUPES(bits=3, steps=2, rate=0.0, exponent=0.7).apply(layer, calibration=[(x,)])
    assert kept.spec.format == Power(3, 0.7)


def test_places_shift_over_all_codes() -> None:
    one = PowerRounding(torch.tensor([[1.0, 0.25]]), QuantSpec(Power(3, 0.5)))
    with torch.no_grad():
        one.shift.copy_(torch.tensor([[-9.0, 1.6]]))
    # From 3 and 1.5: below the lowest, and 3.1.
    assert (one.result().codes.int() - 4).tolist() == [[-3, 3]]
    one().sum().backward()
    assert one.shift.grad is not None
    assert one.shift.grad[0, 0] == 0


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"exponent": 0.0}, "exponent must be above 0"),
        ({"scope": "row"}, "scope must be one of all, layer, got 'row'"),
        ({"rate": -1.0}, "rate must be 0 or more"),
        ({"group_size": 32}, "leave format, symmetric and group_size"),
        ({"observer": "mse"}, "leave observer='minmax'"),
    ):
        with pytest.raises(SettingError, match=match):
            NUPES(**settings)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="pass calibration=, or set steps=0"):
        NUPES().apply(mlp())
