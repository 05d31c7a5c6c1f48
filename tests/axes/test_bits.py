"""Bits: weights and inputs are rounded at a size, and packed once it is extracted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import supple
from supple.axes.bits import Bits, learned_round
from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.cost.count import count
from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.layers.packed import PackedConv2d, PackedLinear
from supple.layers.quantized_input import QuantizedInput
from supple.network import Elastic, elastic
from tests.axes.test_own_axis import Model
from tests.graph.checks import assert_active_equals_extracted, quietly_extracted, shake

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
ASYMMETRIC = "tensor-asymmetric"
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def net(*axes) -> Elastic:
    return elastic(shake(Model()), X, axes=axes, verify=False)


def two() -> nn.Module:
    return shake(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))).eval()


def cnn() -> nn.Module:
    return shake(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
            nn.Flatten(),
            nn.Linear(288, 5),
        )
    ).eval()


def test_a_size_rounds_the_weight_and_passes_the_gradient() -> None:
    found = net(Bits((2, 4)))
    owner, spec = found.module.head.weight, QuantSpec("int4", scale_format="fp16")
    with found.at({"head.bits": 4}):
        shown = found.module.head.weight
        assert torch.equal(shown, fake_quantize(owner.detach(), spec))
        assert dict(found.module.named_parameters())["head.weight"] is owner
        found(*found.args).square().sum().backward()
    assert owner.grad.abs().min() > 0


@pytest.mark.parametrize(
    "axis",
    [
        Bits((2, 4), inputs=(4, 8)),
        Bits(
            (3,), modes=("tensor-asymmetric",), inputs=(4,), input_modes=("tensor-asymmetric",)
        ),
        Bits((4,), group_size=5, observer="mse", scale_format="fp32"),
        Bits((2,), inputs=(3,), modes=("channel", ASYMMETRIC), learned=True),
        Bits((), inputs=(5,)),
    ],
)
def test_what_is_extracted_holds_codes_and_computes_the_same(axis: Bits) -> None:
    for model, x in ((two(), X), (cnn(), IMAGES)):
        found = elastic(model, x, axes=[axis])
        assert not [f for f in found.space.fixed if "verification" in f.reason]
        small = quietly_extracted(found, found.space.smallest())
        kinds = (PackedLinear, PackedConv2d, QuantizedInput)
        plain = [m for m in small.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert any(isinstance(m, kinds) for m in small.modules())
        assert not axis.choices or not plain
        for config in (found.space.smallest(), found.space.random(3)):
            assert_active_equals_extracted(found, config)
            alone = quietly_extracted(found, config)
            priced, counted = found.costs(config), count(alone, found.args)
            for name in ("params", "macs", "weight_bytes"):
                assert int(priced[name][0]) == counted[name], name


def test_bits_combine_with_widths_and_depths() -> None:
    found = net(Width((0.5,)), Depth(), Bits((2, 3), inputs=(4,)))
    for seed in range(5):
        config = found.space.random(seed)
        assert_active_equals_extracted(found, config)
        priced = found.costs(config)["weight_bytes"][0]
        assert priced == count(found.extract(config), found.args)["weight_bytes"]
    config = found.space.config({"blocks.depth": 1})
    assert "blocks.2.up.bits" not in config


def test_extracted_networks_come_back_from_a_file(tmp_path) -> None:
    for number, (config, kind) in enumerate(
        (
            ({"head.bits": 2, "stem.bits": 4, "stem.input_bits": 4}, PackedLinear),
            ({"blocks.depth": 2, "head.input_bits": 4, "blocks.1.up.bits": 2}, QuantizedInput),
        )
    ):
        found = net(Depth(), Bits((2, 4), inputs=(4,)))
        small = found.extract(config)
        assert type(small.head) is kind
        supple.save(small, tmp_path / str(number))
        again = supple.load(tmp_path / str(number), model=Model())
        assert torch.equal(again(X), small(X))
        assert sum(t.nbytes for t in again.state_dict().values()) == int(
            found.costs(found.space.config(config))["weight_bytes"][0]
        )


def test_an_elastic_network_comes_back_with_its_steps(tmp_path) -> None:
    found = net(Bits((2, 4), inputs=(4,), learned=True))
    with torch.no_grad():
        for value in found.added_parameters().values():
            value.mul_(1.5)
    found.save(tmp_path / "net")
    again = supple.load(tmp_path / "net", model=Model())
    for config in (found.space.smallest(), found.space.random(1)):
        with found.at(config), again.at(config):
            assert torch.equal(found(X), again(X))


def test_learned_steps_have_the_gradient_of_lsq() -> None:
    spec, step = QuantSpec("int3", "tensor"), torch.tensor([0.5], requires_grad=True)
    x = torch.tensor([[0.3, 0.9, 9.0, -9.0]], requires_grad=True)
    learned_round(x, spec, step).sum().backward()
    # 0.6 is rounded to 1 and 1.8 to 2, which adds 0.4 and 0.2; what is clipped adds 3 and -4.
    slow = (3 * 4) ** -0.5
    torch.testing.assert_close(step.grad, torch.tensor([(0.4 + 0.2 + 3 - 4) * slow]))
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_what_is_clipped_gets_no_gradient() -> None:
    wide = elastic(
        nn.Sequential(nn.Linear(40, 1)), torch.ones(1, 40), axes=[Bits((2,), observer="rms")]
    )
    with torch.no_grad():  # three times the root mean square is below the largest
        wide.module[0].weight.fill_(0.1)[0, 7] = 9.0
    with wide.at({"0.bits": 2}):
        wide(torch.ones(1, 40)).sum().backward()
    gradient = wide.module[0].weight.grad[0]
    assert gradient[7] == 0
    assert gradient.sum() == 39


def test_a_front_trades_bits_for_error() -> None:
    found = elastic(two(), X, axes=[Bits((2, 8))], verify=False)
    full = found.module(X).detach()
    front = supple.pareto(
        found,
        lambda module: {"error": float((module(X) - full).square().mean())},
        objectives={"error": "min"},
        costs="weight_bytes",
        evaluations=9,
        progress=False,
    )
    found_at = {int(p.values["weight_bytes"]): p.values["error"] for p in front.evaluated}
    assert len(found_at) == 9
    best = {int(p.values["weight_bytes"]): p.values["error"] for p in front.points}
    assert len(best) > 2
    assert [best[size] for size in sorted(best)] == sorted(best.values(), reverse=True)


def test_layers_that_can_not_be_packed_are_fixed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = (
                nn.Embedding(7, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 7),
            )
            self.odd = nn.Conv1d(1, 1, 1)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.odd(self.inner(self.table(x))))

    found = elastic(Tied(), torch.tensor([[1]]), axes=[Bits()], verify=False)
    assert found.space.names == ("inner.bits",)
    reasons = {fixed.name: fixed.reason for fixed in found.space.fixed}
    assert "another module's" in reasons["head.bits"]
    assert "Conv1d can't hold" in reasons["odd.bits"]


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"choices": (1,)}, "choices must be whole numbers from 2 to 8, got 1"),
        ({"inputs": (16,)}, "inputs must be whole numbers from 2 to 8, got 16"),
        ({"choices": ()}, "choices or inputs must name"),
        ({"modes": ("chanel",)}, "did you mean 'channel'"),
        ({"input_modes": ("channel",)}, "input_modes must be some of tensor"),
        ({"observer": "mean"}, "no observer 'mean'"),
        ({"scale_format": "int8"}, "scale_format must be one of"),
        ({"group_size": 4, "learned": True}, "None where scales are learned"),
        ({"group_size": 4, "modes": ("tensor",)}, "groups lie within rows"),
    ):
        with pytest.raises(SettingError, match=match):
            Bits(**settings)


def test_learned_steps_by_row_refuse_widths() -> None:
    found = net(Width((0.5,)), Bits((2,), learned=True))
    config = found.space.config({**found.space.smallest()})
    with pytest.raises(SettingError, match="widths can't vary"), found.at(config):
        pass
