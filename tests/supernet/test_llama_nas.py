"""LLaMA-NAS: InstaTune of chosen sites, without the smallest size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.errors import SettingError
from supple.supernet.llama_nas import LlamaNas
from supple.training.losses import soft_cross_entropy
from supple.training.step import StepOptions

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
BATCH = (X, (X.sum(1) > 0).long())


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


@pytest.fixture
def net():
    model = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    return supple.elastic(model, X, axes=[supple.Width((0.5, 0.75, 1.0))], verify=False)


def started(net, method, steps):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    source = torch.Generator().manual_seed(3)
    options = StepOptions(steps=steps)
    return method.start(net, optimizer, loss=loss, generator=source, options=options)


def passes(net, method, step, steps=10):
    run = started(net, method, steps)
    while run.steps < step:
        run.step(BATCH)
    return run.sampler.sample(step, steps)


def test_the_full_network_is_tuned_alone_then_random_sizes_join_without_the_smallest(net):
    run = started(net, LlamaNas(tune=0.5, random=2), 4)
    roles = [sorted(run.step(BATCH)) for _ in range(4)]
    assert roles == [["largest"]] * 2 + [["largest", "random"]] * 2
    assert run.passes == 2 * 1 + 2 * 3


def test_only_sites_that_match_a_pattern_vary(net):
    first, second = net.space.names
    method = LlamaNas(tune=0.0, random=30, where=(f"*{second}",))
    largest, *others = passes(net, method, 0)
    assert largest.config == net.space.largest()
    assert {entry.role for entry in others} == {"random"}
    assert {entry.config[first] for entry in others} == {8}
    assert {entry.config[second] for entry in others} == {4, 6, 8}
    assert {e.config[first] for e in passes(net, LlamaNas(tune=0.0, random=30), 0)} == {4, 6, 8}


def test_one_step_sums_the_gradients_of_the_full_network_and_of_a_taught_random_size(net):
    method = LlamaNas(tune=0.0, labels=0.5, temperature=2.0, random=1, reorder=False)
    by_hand = copy.deepcopy(net)
    twin = started(copy.deepcopy(net), method, 1)
    config = twin.sampler.sample(0, 1)[1].config  # what the run will draw from the same seed
    assert config != net.space.largest()
    with torch.no_grad():
        taught = by_hand.module(X)
    loss(by_hand.module(X), BATCH).backward()
    with by_hand.at(config):
        output = by_hand.module(X)
    (soft_cross_entropy(output, taught, temperature=2.0) + 0.5 * loss(output, BATCH)).backward()
    started(net, method, 1).step(BATCH)
    for name, p in by_hand.module.named_parameters():
        expected = p.detach() - 0.1 * p.grad
        torch.testing.assert_close(net.module.get_parameter(name).detach(), expected)


def test_settings_are_checked(net):
    with pytest.raises(SettingError, match="random must be at least 1"):
        LlamaNas(random=0)
    with pytest.raises(SettingError, match="tune"):
        LlamaNas(tune=1.0)
    with pytest.raises(SettingError, match=r"'\*mlp\*', which matches no site"):
        started(net, LlamaNas(where=("*mlp*",)), 1)


def test_patterns_come_from_a_recipe():
    made = supple.technique("supernet/llama-nas")(where=["*depth", "*mlp*"])
    assert made == LlamaNas(where=("*depth", "*mlp*"))
