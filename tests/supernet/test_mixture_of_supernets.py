"""Mixture-of-supernets: what a step trains, and what the network gains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.axes.copies import Copies
from supple.axes.routed import Routed
from supple.axes.width import Width
from supple.errors import SettingError
from supple.network import elastic
from supple.supernet.mixture_of_supernets import MixtureOfSupernets
from supple.training.step import StepOptions
from tests.training import stub

BATCH = stub.vectors()[0]


def network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return elastic(model, (BATCH[0],), axes=[Width((0.25, 0.5, 1.0))], verify=False)


def start(method, net, rate=0.1):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=rate)
    return method.start(net, optimizer, loss=stub.loss, options=StepOptions(steps=50))


@pytest.mark.parametrize("by", ["layer", "neuron"])
def test_one_step_trains_module_experts_and_routers_at_the_sandwich(by):
    method = MixtureOfSupernets(by=by, hidden=4, noise=1.0, sampling="sandwich", random=0)
    net, twin = network(), network()
    method.adapt(twin)
    total = 0.0
    for config in (twin.space.largest(), twin.space.smallest()):
        with twin.at(config):
            total = total + stub.loss(twin.module(BATCH[0]), BATCH)
    names = dict(twin.module.named_parameters())
    gradients = torch.autograd.grad(total, list(names.values()))
    start(method, net).step(BATCH)
    for (name, before), gradient in zip(names.items(), gradients, strict=True):
        now = net.module.get_parameter(name)
        torch.testing.assert_close(now, before - 0.1 * gradient, msg=name)
        assert gradient.any(), name


def test_routers_learn():
    net = network()
    run = start(MixtureOfSupernets(hidden=8, noise=1.0, random=4), net, rate=0.3)

    def routing():
        sizes = [net.space.decode(row) for row in net.space.every()]
        found = [net.sharing.routing(size, net.module)["0"] for size in sizes]
        return torch.stack(found).detach()

    before = routing()
    for _ in range(20):
        run.step(BATCH)
    assert (routing() - before).abs().max() > 1e-3
    assert routing().var(0).max() > 1e-4  # still no constant


@pytest.mark.parametrize(
    ("sampling", "roles"),
    [("random", {"random"}), ("sandwich", {"largest", "smallest", "random"})],
)
def test_sampling(sampling, roles):
    run = start(MixtureOfSupernets(sampling=sampling, random=2), network())
    assert set(run.step(BATCH)) == roles
    assert run.passes == (2 if sampling == "random" else 4)


def test_adapting_again_keeps_what_was_learned():
    net, method = network(), MixtureOfSupernets()
    start(method, net).step(BATCH)
    held = {name: p.clone() for name, p in net.added_parameters().items()}
    method.adapt(net)
    assert isinstance(net.sharing, Routed)
    assert all(torch.equal(p, held[name]) for name, p in net.added_parameters().items())


def test_another_sharing_is_not_replaced():
    net = network()
    net.share(Copies(({},), count=2))
    with pytest.raises(SettingError, match="weights of their own"):
        MixtureOfSupernets().adapt(net)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("experts", 1),
        ("hidden", 0),
        ("by", "x"),
        ("noise", 0),
        ("sampling", "x"),
        ("random", 0),
    ],
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        MixtureOfSupernets(**{name: value})
