"""Bits by layer: curvature, interactions, and a search that asks little."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from supple.errors import BudgetError, SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.quantize._bits import Trial, hessian_traces, interactions, lowered
from supple.quantize.hessian_interlayer import HessianInterlayer
from supple.testing.toys import copied, generator
from supple.transforms import Given


class Sums(nn.Module):
    """The sum of what three layers give, so that their errors meet in the loss."""

    def __init__(self) -> None:
        super().__init__()
        source = generator()
        self.a, self.b, self.c = (nn.Linear(4, 1, bias=False) for _ in range(3))
        with torch.no_grad():
            for scale, layer in zip((1.0, 0.01, 0.1), (self.a, self.b, self.c), strict=True):
                layer.weight.copy_(scale * torch.randn(1, 4, generator=source))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


def given() -> Given:
    """A quadratic loss whose minimum is at the network itself."""
    source = generator()
    x = torch.randn(64, 4, generator=source)
    y = Sums()(x).detach()

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (output - batch[1]).square().mean() + 1.0

    return Given(((x, y),), loss, source)


def test_traces_are_those_of_the_hessian() -> None:
    data = given()
    x = data.batches[0][0]
    model = Sums()
    before = copied(model)
    found = hessian_traces(model, data, ["a.weight", "c.weight"], 4000)
    # The Hessian in each is 2 X^T X / n.
    exact = 2 * float(x.square().sum()) / 64
    assert found["a.weight"] == pytest.approx(exact, rel=0.1)
    assert found["c.weight"] == pytest.approx(exact, rel=0.1)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_one_left_out_tells_what_all_pairs_do() -> None:
    errors = torch.randn(5, 7, generator=generator())

    def cost(bits: dict[str, int]) -> float:
        total = sum((errors[int(name)] for name in bits), torch.zeros(7))
        return float(total.square().sum())

    names = [str(place) for place in range(5)]
    pairs = interactions(cost, names, 4, pairs=True)
    assert interactions(cost, names, 4) == pytest.approx(pairs, rel=1e-4)
    by_hand = 2 * float(errors[1] @ (errors.sum(0) - errors[1]))
    assert pairs["1"] == pytest.approx(by_hand, rel=1e-4)


def test_sensitivities_are_the_change_of_the_loss() -> None:
    """For layers that read the same inputs with one Hessian, up to what signs leave out."""
    data, model = given(), Sums()
    method = HessianInterlayer(levels=(16, 3), bits=3, samples=500, scale_format="fp32")
    trial = Trial(model, method.rounded(model), lambda one: float(_loss(one, data)))
    minds = method.sensitivities(model, data, trial)[3]
    alone = HessianInterlayer(
        levels=(16, 3), bits=3, samples=500, scale_format="fp32", together="none"
    ).sensitivities(model, Given(data.batches, data.loss, generator()), trial)[3]
    together = interactions(trial, list(minds), 3, pairs=True)
    spec = QuantSpec("int3")
    for name, one in alone.items():
        weight = model.get_parameter(name).detach()
        lost = float((fake_quantize(weight, spec) - weight).square().sum())
        trace = 2 * float(data.batches[0][0].square().sum()) / 64
        assert one == pytest.approx(trace / 8 * lost, rel=0.2)
        assert minds[name] == pytest.approx(one + together[name], rel=0.2, abs=1e-5)


def _loss(model: nn.Module, data: Given) -> Tensor:
    return data.criterion(model(data.batches[0][0]), data.batches[0])


def test_layers_that_matter_little_get_few_bits() -> None:
    data, model = given(), Sums()
    method = HessianInterlayer(levels=(16, 4, 2), bits=2, rise=0.02)
    bits = method.allocate(model, data)
    assert bits["a.weight"] > bits["b.weight"] == 2
    small = method.apply(model, calibration=data.batches, loss=data.loss)
    assert float(_loss(small, data)) <= 1.02
    assert small.b.spec.bits == 2
    tight = HessianInterlayer(levels=(16, 4, 2), bits=2, rise=0.0)
    assert set(tight.allocate(model, data).values()) == {16}
    with pytest.raises(BudgetError):
        HessianInterlayer(levels=(3, 2), bits=2, rise=0.0).allocate(model, data)


def test_a_mean_of_bits_is_kept() -> None:
    data, model = given(), Sums()
    method = HessianInterlayer(levels=(8, 4, 2), bits=2, mean_bits=14 / 3, together="none")
    assert method.allocate(model, data) == {"a.weight": 8, "b.weight": 2, "c.weight": 4}


def test_bisection_asks_little_and_finds_the_most() -> None:
    count, asked = 50, []
    minds = {level: {str(i): float(i) for i in range(count)} for level in (8, 4)}

    def cost(bits: dict[str, int]) -> float:
        asked.append(bits)
        return sum((16 - b) * int(name) for name, b in bits.items())

    bits = lowered(cost, minds, (16, 8, 4), budget=3000.0)
    assert cost(bits) <= 3000 < cost(bits | {str(sum(b < 16 for b in bits.values())): 8})
    assert len(asked) - 2 <= 2 * math.log2(count) + 4
    ordered = [bits[str(i)] for i in range(count)]
    assert all(low <= high for low, high in itertools.pairwise(ordered))
    assert set(ordered) == {4, 8, 16} or 4 not in ordered


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"levels": (4, 8)}, "levels must fall"),
        ({"mean_bits": 3.0}, "mean_bits must be at least the fewest .*, 4, got 3.0"),
        ({"levels": (16, 8)}, "end with bits=4"),
        ({"rise": -0.1}, "rise must be at least 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"together": "pair"}, "together must be one of rest, pairs, none"),
        ({"format": "e2m1"}, "leave format=None"),
    ],
)
def test_settings_that_can_not_be_used_say_so(settings, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        HessianInterlayer(**settings)


def test_fixed_inputs_fold_norms_and_take_the_range_of_the_data() -> None:
    source = generator()
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    x = torch.rand(6, 2, 2, 2, generator=source)
    with torch.no_grad():
        model.eval()[1].running_mean.uniform_(generator=source)
    method = HessianInterlayer(
        levels=(16, 8, 4), mean_bits=8.0, samples=2, activations=8, granularity="tensor"
    )
    small = method.apply(
        model, calibration=[(x,)], loss=lambda output, _: output.square().mean()
    )
    assert not any(isinstance(one, nn.BatchNorm2d) for one in small.modules())
    first = small[0]
    assert first.fixed_input
    assert float(first.input_scale) == pytest.approx(float(x.max()) / 255, rel=1e-5)
    torch.testing.assert_close(small(x), model(x), rtol=0.05, atol=0.05)
