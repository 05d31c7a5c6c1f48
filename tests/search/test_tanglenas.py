"""TangleNAS: what its parameters learn, what sizes cost on average, and settings."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.errors import SettingError
from supple.search._relaxed import Halves
from supple.search.tanglenas import TangleNAS
from supple.training.step import StepOptions


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
        )  # fmt: skip
    axes = [supple.Kernel((1, 3)), supple.Width((1, 2, 3, 4))]
    return supple.elastic(model, torch.zeros(2, 1, 5, 5), axes=axes, verify=False)


def batch(seed):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(6, 1, 5, 5, generator=source), torch.arange(6) % 2


def loss(output, given):
    return F.cross_entropy(output, given[1])


def started(method, lr=0.1):
    net = network()
    optimizer = torch.optim.SGD(net.module.parameters(), lr=lr)
    return method.start(net, optimizer, loss=loss, options=StepOptions(steps=9))


def test_all_sites_are_searched_as_mixtures_of_weights():
    run = started(TangleNAS(sampling="softmax"), lr=0.0)
    assert [site.axis for site in run.sites] == ["kernel", "kernel", "width", "width"]
    before = {name: alpha.detach().clone() for name, alpha in run.alphas.items()}
    run.step(Halves(batch(0), batch(1)))
    # by hand: the gradient through the mixture of weights, on the validation half
    net = network()
    weights = {name: each.softmax(0).requires_grad_() for name, each in before.items()}
    kept = {name: each.flip(0).cumsum(0).flip(0) for name, each in weights.items()}
    first, second = net.module[0], net.module[2]
    out1 = kept[run.sites[2].name]
    out2 = kept[run.sites[3].name]

    def mixed(conv, kernel, outputs, inputs):
        ring = torch.ones(3, 3, dtype=torch.long)
        ring[1, 1] = 0
        weight = conv.weight * kept[kernel][ring] * outputs[:, None, None, None]
        weight = weight if inputs is None else weight * inputs[None, :, None, None]
        return weight, conv.bias * outputs

    x, y = batch(1)
    w1, b1 = mixed(first, run.sites[0].name, out1, None)
    w2, b2 = mixed(second, run.sites[1].name, out2, out1)
    hidden = F.conv2d(F.conv2d(x, w1, b1, padding=1).relu(), w2, b2, padding=1).relu()
    logits = F.linear(hidden.mean((2, 3)), net.module[6].weight * out2, net.module[6].bias)
    by_weight = torch.autograd.grad(F.cross_entropy(logits, y), list(weights.values()))
    for (name, alpha), gradient in zip(before.items(), by_weight, strict=True):
        alpha = alpha.requires_grad_()
        (expected,) = torch.autograd.grad(alpha.softmax(0), alpha, gradient)
        torch.testing.assert_close(run.alphas[name].grad, expected, atol=1e-6, rtol=1e-4)


def test_the_price_is_the_mean_cost_of_sizes_drawn():
    run = started(TangleNAS(price=2.0, sampling="softmax"))
    with torch.no_grad():
        for alpha in dict(run.alphas.items()).values():
            alpha.copy_(torch.randn(len(alpha), generator=torch.Generator().manual_seed(1)))
    weights = run.mixture()
    space = run.net.space
    picks = list(itertools.product(*(range(len(site.choices)) for site in space.sites)))
    macs = run.net.costs(torch.tensor(picks).numpy())["macs"]
    mean = 0.0
    for row, cost in zip(picks, macs, strict=True):
        parts = [weights[s.name][i].item() for s, i in zip(space.sites, row, strict=True)]
        mean += torch.tensor(parts).prod().item() * float(cost)
    expected = 2.0 * mean / macs.max()
    given = run.method.penalty(run, weights)
    assert given.item() == pytest.approx(expected, rel=1e-5)
    slopes = torch.autograd.grad(given, list(weights.values()))
    assert all(slope.min() > 0 for slope in slopes)
    assert TangleNAS().penalty(run, weights) is None


def test_sites_that_are_not_mixed_are_priced_full():
    run = started(TangleNAS(price=1.0))
    only = {run.sites[2].name: torch.tensor([0.0, 1.0, 0.0, 0.0])}
    config = run.net.space.config({run.sites[2].name: run.sites[2].choices[1]})
    both = run.net.costs([config, run.net.space.largest()])["macs"]
    assert run.method.penalty(run, only).item() == pytest.approx(both[0] / both[1], rel=1e-5)


def test_a_price_makes_what_is_found_small():
    found = {}
    for price in (0.0, 50.0):
        run = started(TangleNAS(price=price, lr=0.5, sampling="softmax"), lr=0.01)
        for step in range(6):
            run.step(Halves(batch(step), batch(step + 1)))
        found[price] = run.derive()
    assert found[50.0] == run.net.space.smallest()
    assert found[0.0] != found[50.0]
    assert run.net.extract(found[50.0])[0].weight.shape == (1, 1, 1, 1)


@pytest.mark.parametrize("sampling", ["softmax", "dirichlet", "gumbel"])
def test_every_way_of_drawing_gives_weights_that_sum_to_one(sampling):
    run = started(TangleNAS(sampling=sampling))
    first, second = run.mixture(draw=True), run.mixture(draw=True)
    for name, each in first.items():
        assert each.sum().item() == pytest.approx(1.0)
        hard = set(each.tolist()) <= {0.0, 1.0}
        assert hard == (sampling == "gumbel")
        assert each.requires_grad
        assert torch.equal(each, second[name]) == (sampling == "softmax") or hard


@pytest.mark.parametrize(
    "wrong",
    [{"sampling": "random"}, {"price": -1.0}, {"cost": "activation_bytes"}, {"lr": 0.0}],
)
def test_settings_are_checked(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        TangleNAS(**wrong)


def test_activations_have_no_mean():
    net = network()
    net.costs([net.space.largest()])
    with pytest.raises(SettingError, match="activation_bytes"):
        net._costs.expected([torch.ones(2)], "activation_bytes")
