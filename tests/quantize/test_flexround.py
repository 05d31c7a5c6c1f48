"""FlexRound: rounding after division by learned numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.layers.packed import PackedConv2d, PackedLinear
from supple.observers import RANGES
from supple.quantize._learned import AdditiveRounding, LearnedRounding, _parts, rounded
from supple.quantize.flexround import DivisiveRounding, FlexRound
from supple.testing.toys import generator, mlp
from supple.weights import as_matrix, matrices


def normal(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


class Net(nn.Module):
    """Two blocks with norms, between two layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=groups), nn.BatchNorm2d(4))
            for groups in (1, 2)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x.mean((2, 3)))


def network() -> Net:
    model = Net()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.4, generator=generator())
    return model.eval()


def test_values_and_gradients_are_those_of_the_formula() -> None:
    matrix = torch.tensor([[0.9, -2.0, 0.2, 5.0]])
    spec = QuantSpec("int3", scale_format="fp32")
    one = DivisiveRounding(matrix, spec, torch.tensor([[1.0]]), None, places=2)
    with torch.no_grad():
        one.by_weight.copy_(torch.tensor([[2.0, 1.0, 1.0, 1.0]]).log())
        one.by_output.fill_(torch.tensor(0.5).log())
        one.by_input.copy_(torch.tensor([1.0, 0.5]).log())
        one.step.fill_(torch.tensor(0.8).log())
    # Over 0.8 and the divisors 1, 0.5, 0.25 and 0.25: 1.125, -5, 1 and 25; from -4 to 3.
    found = one()
    torch.testing.assert_close(found, 0.8 * torch.tensor([[1.0, -4.0, 1.0, 3.0]]))
    found.backward(torch.ones(1, 4))
    # What is clipped has none; else it is minus step times what is rounded.
    expected = -0.8 * torch.tensor([[1.125, 0.0, 1.0, 0.0]])
    torch.testing.assert_close(one.by_weight.grad, expected)
    torch.testing.assert_close(one.by_output.grad, expected.sum(1, keepdim=True))
    torch.testing.assert_close(one.by_input.grad, expected.reshape(2, 2).sum(1))
    # The step multiplies codes, and divides what is rounded.
    torch.testing.assert_close(one.step.grad, found.sum().reshape(1, 1) + expected.sum())
    assert one.result().codes.tolist() == [[5, 0, 5, 7]]


def test_large_weights_may_travel_several_steps() -> None:
    # All inputs but the first are alike: twelve times 0.25 is lost, which 4 can make up for.
    layer = nn.Linear(14, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[7.0, 4.0] + [0.25] * 12]))
    x = torch.cat((normal(32, 1), normal(32, 1, seed=8).expand(-1, 13)), 1)
    codes = {}
    for kind in (FlexRound, LearnedRounding):
        method = kind(steps=25, lr=0.04, symmetric=True, observer="minmax")
        codes[kind] = method.apply(layer, calibration=[(x,)]).quantized().codes[0] - 8.0
    assert codes[FlexRound][1] >= 6
    assert (codes[LearnedRounding] - layer.weight).abs().max() < 1


def test_without_steps_it_rounds_to_nearest() -> None:
    model, x = network(), normal(5, 3, 6, 6)
    method = FlexRound(bits=3, steps=0, packed=False, scale_format="fp32")
    found = method.apply(model, calibration=[(x,)])
    for name, layer in matrices(model).items():
        matrix = as_matrix(layer, layer.weight.detach())
        expected = fake_quantize(matrix, method.spec(), observer=RANGES["mse"])
        now = as_matrix(layer, found.get_parameter(name).detach())
        torch.testing.assert_close(now, expected)


def test_each_block_learns_what_it_gave_before_from_what_it_is_given_now() -> None:
    model, x = network(), normal(5, 3, 6, 6)
    small = copy.deepcopy(model)
    with torch.no_grad():
        first = model.stem(x)
        second = first + model.blocks[0](first).relu()
        after = [model.blocks[0](first), model.blocks[1](second)]
        for index, part in enumerate(_parts(small, ((x,),), "*", learns=True)):
            (example,) = part.examples
            if index < 2:
                assert part.path == f"blocks.{index}"
                torch.testing.assert_close(example.target, after[index])
                given = first if index == 0 else first + small.blocks[0](first).relu()
                torch.testing.assert_close(example.args[0], given)
            else:
                torch.testing.assert_close(example.target, part.module(*example.args))
            for layer in part.layers.values():
                layer.weight.mul_(0.9)
    assert index == 3
    assert not torch.allclose(given, second)


def test_learning_lessens_what_is_lost() -> None:
    # Inputs that go along: where they don't, the nearest values are the best.
    x = normal(32, 3) @ normal(3, 24)
    layer = nn.Linear(24, 8)
    layer.weight.data.copy_(normal(8, 24, seed=3))
    lost = []
    for steps in (0, 40):
        small = FlexRound(bits=3, steps=steps, lr=0.03).apply(layer, calibration=[(x,)])
        assert isinstance(small, PackedLinear)
        lost.append((small(x) - layer(x)).square().sum().item())
    assert lost[1] < 0.6 * lost[0]


def test_convolutions_and_linear_layers_hold_codes() -> None:
    x = normal(5, 3, 6, 6)
    settings: dict[str, Any] = {"bits": 3, "steps": 1, "observer": "minmax"}
    small = FlexRound(**settings).apply(network(), calibration=[(x,)])
    kinds = [type(one) for one in small.modules() if hasattr(one, "spec")]
    assert kinds == [PackedConv2d] * 3 + [PackedLinear]
    open_ = FlexRound(**settings, packed=False).apply(network(), calibration=[(x,)])
    torch.testing.assert_close(small(x), open_(x))


def test_the_model_keeps_weights_and_has_no_gradients() -> None:
    model = mlp().eval()
    batches = [(normal(13, 5),), (normal(13, 5, seed=8),)]
    before = {name: one.clone() for name, one in model.state_dict().items()}
    FlexRound(bits=3, steps=2, observer="minmax").apply(model, calibration=batches)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.grad is None for one in model.parameters())


def test_the_additive_rounding_goes_up_or_down_only() -> None:
    matrix = torch.tensor([[0.2, 1.6, -0.5]])
    one = AdditiveRounding(matrix, QuantSpec("int4"), torch.tensor([[1.0]]), None)
    with torch.no_grad():
        one.fraction.copy_(torch.tensor([[3.0, -1.0, 0.7]]))
    assert one().tolist() == [[1.0, 1.0, 0.0]]


def test_the_gradient_stops_where_codes_are_clipped() -> None:
    codes = torch.tensor([-3.0, 0.2, 9.0], requires_grad=True)
    rounded(codes, QuantSpec("int3").format).sum().backward()
    assert codes.grad is not None
    assert codes.grad.tolist() == [1.0, 1.0, 0.0]


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"steps": -1}, "steps must be 0 or more, got -1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"observer": "msee"}, "there is no observer 'msee', did you mean 'mse'"),
        ({"format": "e2m1"}, "set symmetric=True"),
    ):
        with pytest.raises(SettingError, match=match):
            FlexRound(**settings)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="needs calibration"):
        FlexRound().apply(mlp())
