"""The study of sizes and bits, and the way to train that it uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.layers.delayed_rounding import DelayedRounding
from supple.layers.fake_quantize import FakeQuantized
from supple.layers.packed import PackedConv2d, PackedLinear
from supple.quantize._aqt import AQT
from supple.quantize._qat import wrapped
from supple.quantize.pareto_4bit_resnet import Frontier, Pareto4bitResNet, Point, compute_cost
from supple.testing.toys import generator
from supple.training.loop import train

POINTS = (
    Point(8, 16, 0.90, 16.0, 32.0),
    Point(8, 4, 0.88, 4.0, 8.0),
    Point(16, 16, 0.95, 64.0, 128.0),
    Point(16, 4, 0.94, 16.0, 32.0),
)


def network(width: int = 4) -> nn.Module:
    """Two convolutions and two linear layers, always the same."""
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(width, 2, 3, groups=2),
        nn.Flatten(),
        nn.Linear(8, width),
        nn.Linear(width, 3),
    )
    source = generator()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=source)
    return model.eval()


def images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 1, 6, 6, generator=generator())


def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return output.square().mean()


def test_first_and_last_layers_have_more_bits_and_inputs_a_sign_where_they_need_one() -> None:
    net = AQT(bits=4, activations=4).wrap(network(), (images(),))
    layers = wrapped(net)
    assert list(layers) == ["0", "2", "4", "5"]
    weights = [one.of_weight.spec.format.name for one in layers.values()]
    inputs = [one.of_input.spec.format.name for one in layers.values()]
    assert weights == ["int8-narrow", "int4-narrow", "int4-narrow", "int8-narrow"]
    assert inputs == ["uint8", "uint4", "int4-narrow", "int8-narrow"]
    assert all(isinstance(one, FakeQuantized) for one in layers.values())
    model = network()
    assert AQT(bits=16, activations=16).wrap(model, (images(),)) is model


def test_inputs_are_rounded_after_a_while_within_bounds_that_stay() -> None:
    rule = AQT(bits=3, activations=3, delay=0.5, decay=0.5)
    net = rule.wrap(network(), (images(),))
    rounding = wrapped(net)["0"].of_input
    assert isinstance(rounding, DelayedRounding)
    bounds, rounds = [float(rounding.most)], []
    # Four steps; the batches' largest numbers are 2, 4, 8 and 16 times that of the example.
    batches = [(images() * 2.0**power,) for power in range(1, 5)]

    def noting(output: torch.Tensor, batch: Any) -> torch.Tensor:
        bounds.append(float(rounding.most))
        rounds.append(rounding.rounds)
        return output.square().mean()

    train(net, batches, noting, method=rule, lr=1e-4, progress=False, log_every=9)
    assert rounds == [False, False, True, True]
    first = bounds[0]
    assert bounds == pytest.approx(
        [first, 1.5 * first, 2.75 * first, 2.75 * first, 2.75 * first]
    )
    small = rule.finished(net)
    assert [type(one) for one in (small[0], small[4])] == [PackedConv2d, PackedLinear]
    assert small[0].input_scale.item() == pytest.approx(2.75 * first / 255)
    x = 2 * images()
    torch.testing.assert_close(small(x), net.eval()(x))


def test_costs_are_macs_by_their_bits() -> None:
    # 16 places of 4 outputs that read 9 numbers; 4 of 2 that read 18; then 8 x 4 and 4 x 3.
    bits = {"0.weight": 8, "2.weight": 2, "4.weight": 3, "5.weight": 16}
    macs = [5 * 16 * 36, 5 * 4 * 36, 5 * 32, 5 * 12]
    shares = {"linear": (8, 4, 4, 16), "quadratic": (64 / 16, 4 / 16, 9 / 16, 16)}
    for cost, share in shares.items():
        wanted = sum(one * part / 16 for one, part in zip(macs, share, strict=True))
        got = compute_cost(network(), bits, cost, (images(),))  # type: ignore[arg-type]
        assert got == pytest.approx(wanted)


def test_all_networks_are_trained_alike_and_tested_as_packed() -> None:
    trained: list[tuple[float, int | None, bool]] = []
    tested: list[type] = []

    def fit(net: nn.Module, method: AQT | None) -> None:
        weight = next(net.parameters()).detach()
        rounds = bool(wrapped(net))
        trained.append((float(weight.sum()), None if method is None else method.bits, rounds))

    def look(net: nn.Module) -> float:
        assert not net.training
        tested.append(type(net[4]))
        return float(len(tested))

    study = Pareto4bitResNet(bits=(16, 4))
    table = study.run(network, [4, 2], fit, look, (images(),))
    assert [(one.size, one.bits, one.quality) for one in table.points] == [
        (4, 16, 1.0),
        (4, 4, 2.0),
        (2, 16, 3.0),
        (2, 4, 4.0),
    ]
    assert [one[1:] for one in trained] == [(None, False), (4, True)] * 2
    assert trained[0][0] == trained[1][0]
    assert tested == [nn.Linear, PackedLinear] * 2
    # Of width 4: 36 weights of 8 bits, 36 + 32 of 4, 12 of 8; 2 + 4 + 3 biases of 16.
    assert table.points[1].bytes == 36 + 68 / 2 + 12 + 18


def test_networks_can_be_rounded_afterwards() -> None:
    trained = []

    def fit(net: nn.Module, method: AQT | None) -> None:
        trained.append(method)
        with torch.no_grad():
            net[5].bias.fill_(7.0)

    def look(net: nn.Module) -> float:
        assert bool((net[5].bias == 7.0).all())
        return float(len(net[4].weight.unique()))

    study = Pareto4bitResNet(bits=(16, 2), qat=False)
    table = study.run(network, [4], fit, look, (images(),))
    assert trained == [None]
    assert table.of(16)[0].quality == 32.0
    assert table.of(2)[0].quality <= 9.0  # three numbers times four scales, and zero is one


def test_tables_tell_margins_fronts_and_volumes() -> None:
    table = Frontier(POINTS)
    assert table.margins(16, 4) == pytest.approx({8: 0.04, 16: -0.01})
    assert table.margins(4, 16) == pytest.approx({8: float("-inf"), 16: -0.04})
    assert [(one.size, one.bits) for one in table.front()] == [(8, 4), (16, 16), (16, 4)]
    # Costs of 4 and 16 are 5 and 3 doublings below twice 64.
    assert table.hypervolume(4, 0.8) == pytest.approx(0.08 * 5 + 0.06 * 3)
    assert table.hypervolume(16, 0.8) == pytest.approx(0.10 * 3 + 0.05 * 1)
    assert table.hypervolume(16, 0.95) == 0.0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": ()}, "bits must be different numbers"),
        ({"bits": (4, 4)}, "bits must be different numbers"),
        ({"bits": (1,)}, "bits must be from 2 to 16, got 1"),
        ({"cost": "cubic"}, "cost must be one of linear, quadratic"),
        ({"edges": 1}, "edges must be from 2 to 16, got 1"),
        ({"delay": 1.0}, r"delay must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_can_not_be_used_say_so(settings, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        Pareto4bitResNet(**settings)
