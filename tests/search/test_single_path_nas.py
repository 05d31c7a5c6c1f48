"""Single-Path NAS: costs, decisions, and what becomes of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.cost.count import count
from supple.errors import SettingError, UnsupportedModelError
from supple.layers.super_kernel import Decision, SuperKernelConv2d, deciding
from supple.search.single_path_nas import SinglePathNAS, decided_layers, runtime
from supple.training.step import StepOptions

AXES = (supple.Kernel((3, 5)), supple.Width((0.5, 1.0)), supple.Depth(pattern="any"))


class Block(nn.Module):
    """An inverted residual block without norms."""

    def __init__(self, inputs, outputs, stride=1, **settings):
        super().__init__()
        inner = 4 * inputs
        skip = stride == 1 and inputs == outputs
        self.expand = nn.Conv2d(inputs, inner, 1, bias=False)
        self.depthwise = SuperKernelConv2d(
            inner, inner, groups=inner, stride=stride, **{"skip": skip, **settings}
        )
        self.project = nn.Conv2d(inner, outputs, 1, bias=False)
        self.residual = skip

    def forward(self, x):
        out = self.project(self.depthwise(self.expand(x)).relu())
        return x + out if self.residual else out


def network(axes=AXES, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Sequential(Block(4, 4, **settings)),
            Block(4, 6, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        )
    return supple.elastic(model, torch.zeros(2, 1, 6, 6), axes=axes, verify=False)


NET = network()


@pytest.fixture
def net():
    """One network for all tests; its weights are as made."""
    before = {name: tensor.clone() for name, tensor in NET.module.state_dict().items()}
    yield NET
    NET.module.load_state_dict(before)


def batch():
    source = torch.Generator().manual_seed(1)
    return torch.randn(8, 1, 6, 6, generator=source), torch.arange(8) % 3


def loss(output, given):
    return F.cross_entropy(output, given[1])


def started(net, method, steps, lr=0.0, **more):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=lr)
    return method.start(net, optimizer, loss=loss, options=StepOptions(steps=steps), **more)


def forced(layer, kernels, widths):
    """Sets thresholds so that the layer decides so."""
    with torch.no_grad():
        layer.supple_kernel_thresholds.copy_(
            torch.tensor([-9.0 if k else 99.0 for k in kernels])
        )
        layer.supple_width_thresholds.copy_(torch.tensor([-9.0 if w else 99.0 for w in widths]))


def test_costs_are_composed_as_published():
    # of the first block of the authors' Pixel 1 table, in ms
    r3_50, r3_100, r5_50, r5_100 = 4.4905, 9.2015, 5.9248, 11.5892
    table = torch.tensor([[r3_50, r3_100], [r5_50, r5_100]])
    ratio = r3_100 / r5_100
    for d5 in (0.0, 1.0):
        for d50 in (0.0, 1.0):
            for d100 in (0.0, 1.0):
                by_width = d50 * (r5_50 + d100 * (r5_100 - r5_50))
                expected = by_width * ratio + by_width * (1 - ratio) * d5
                decision = Decision(torch.tensor([d5]), torch.tensor([d50, d100]))
                assert runtime(decision, table).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "first", [((1,), (1, 1)), ((0,), (1, 0)), ((0,), (1, 1)), ((1,), (0, 1))]
)
@pytest.mark.parametrize("second", [((1,), (1,)), ((0,), (0,))])
def test_the_decided_size_computes_and_costs_the_same(net, first, second):
    layers = decided_layers(net)
    for layer, decided in zip(layers, (first, second), strict=True):
        forced(layer.module, *decided)
    config = SinglePathNAS.derive(net)
    assert config["1.keep"] == first[1][0]
    run = started(net, SinglePathNAS(penalty=1.0, delay=0.0), 1)
    with torch.no_grad():
        given = run._forward(net.module, batch())
        small = net.extract(config)
        torch.testing.assert_close(given, small(batch()[0]))
    macs = count(small, (torch.zeros(2, 1, 6, 6),))["macs"]
    full = count(net.extract({}), (torch.zeros(2, 1, 6, 6),))["macs"]
    relative = run.sampler.costs.relative(run.sampler._decisions).item()
    assert relative == pytest.approx(macs / full, rel=1e-5)
    assert not [name for name, _ in small.named_parameters() if "threshold" in name]


def test_the_loss_has_the_logarithm_of_the_cost_after_the_delay(net):
    method = SinglePathNAS(penalty=3.0, delay=0.5, dropout=0.0)
    forced(net.module[1][0].depthwise, (0,), (1, 0))
    run = started(net, method, 4)
    seen = [run.step(batch())["superkernel"] for _ in range(4)]
    cost = run.sampler.costs.relative(run.sampler._decisions).log().item()
    assert cost < -0.1
    assert seen[:2] == pytest.approx([seen[0]] * 2)
    assert seen[2:] == pytest.approx([seen[0] + 3 * cost] * 2)


def test_a_cost_of_ones_own_counts(net):
    def price(rows):
        columns = [net.space.column(name) for name in ("2.depthwise.kernel", "2.expand")]
        kernel, width = np.asarray(net.space.choices_of(rows)[:, columns], dtype=float).T
        return 10 + kernel * width

    forced(net.module[2].depthwise, (0,), (0,))
    run = started(net, SinglePathNAS(delay=0.0), 1, price=price)
    run.step(batch())
    relative = run.sampler.costs.relative(run.sampler._decisions).item()
    assert relative == pytest.approx((10 + 3 * 8) / (10 + 5 * 16))


def test_a_penalty_raises_thresholds_and_lowers_norms(net):
    layer = net.module[1][0].depthwise
    before = layer.weight.norm().item()
    run = started(net, SinglePathNAS(penalty=50.0, delay=0.0), 5, lr=0.05)
    for _ in range(5):
        run.step(batch())
    assert layer.supple_kernel_thresholds.min() > 0
    assert layer.supple_width_thresholds.min() > 0
    assert layer.weight.norm().item() < before


def test_indicators_are_dropped_during_the_delay_only(net):
    run = started(net, SinglePathNAS(delay=0.9, dropout=0.5), 20)
    seen = []
    for _ in range(20):
        run.step(batch())
        seen.append(torch.cat([torch.cat(d) for d in run.sampler._decisions]).detach())
    warm = torch.stack(seen[:18])
    assert set(warm.unique().tolist()) == {0.0, 1.0, 2.0}  # 1: a layer that always stays
    assert torch.stack(seen[18:]).unique().tolist() == [1.0]


def test_recomputed_activations_are_of_the_decided_sizes(net):
    layers = [each.module for each in decided_layers(net)]
    forced(layers[0], (0,), (1, 0))

    def recomputed(model, given):
        return torch.utils.checkpoint.checkpoint(model, given[0], use_reentrant=False)

    plain = started(net, SinglePathNAS(), 1)
    again = started(net, SinglePathNAS(), 1, forward=recomputed)
    gradients = []
    for run in (plain, again):
        run._generator.manual_seed(0)
        run.step(batch())
        gradients.append([p.grad.clone() for p in net.module.parameters()])
    torch.testing.assert_close(*gradients)


def test_layers_run_whole_outside_a_step(net):
    x = batch()[0]
    before = net.module(x)
    decided = Decision(torch.zeros(1), torch.ones(2))
    with deciding([net.module[1][0].depthwise], [decided]):
        assert not torch.allclose(net.module(x), before)
    torch.testing.assert_close(net.module(x), before)


def test_a_network_must_have_the_sites_that_are_decided_about():
    with pytest.raises(SettingError, match=r"kernel sizes.*supple\.Kernel"):
        decided_layers(network(AXES[1:]))
    with pytest.raises(SettingError, match=r"being left out.*Depth"):
        decided_layers(network(AXES[:2]))
    with pytest.raises(SettingError, match=r"may decide on \[3\].*offers \[1, 5\]"):
        decided_layers(network((supple.Kernel((1, 5)), *AXES[1:])))
    two = (SuperKernelConv2d(4, 4, (3,), skip=False, groups=4) for _ in range(2))
    model = nn.Sequential(nn.Conv2d(1, 4, 1), *two, nn.Conv2d(4, 2, 1))
    coupled = supple.elastic(model, torch.zeros(2, 1, 6, 6), axes=[AXES[1]], verify=False)
    with pytest.raises(SettingError, match="one of them"):
        decided_layers(coupled)


def test_errors_name_what_is_missing(net):
    plain = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.raises(SettingError, match=r"supple\.elastic"):
        SinglePathNAS().start(plain, optimizer, loss=loss)
    with pytest.raises(SettingError, match=r"delay=0.625.*steps"):
        started(net, SinglePathNAS(), None)
    other = supple.elastic(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.zeros(2, 4))
    with pytest.raises(UnsupportedModelError, match="SuperKernelConv2d"):
        SinglePathNAS.derive(other)


@pytest.mark.parametrize("wrong", [{"penalty": -1.0}, {"delay": 1.0}, {"dropout": -0.1}])
def test_settings_are_checked(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        dataclasses.replace(SinglePathNAS(), **wrong)
