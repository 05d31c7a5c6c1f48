"""InstaTune: fine-tuning that makes a network elastic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.errors import SettingError
from supple.supernet.instatune import InstaTune
from supple.training.losses import soft_cross_entropy
from supple.training.step import StepOptions

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
BATCH = (X, (X.sum(1) > 0).long())


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


@pytest.fixture
def net():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    return supple.elastic(model, X, axes=[supple.Width((0.5, 0.75, 1.0))], verify=False)


def started(net, method, steps):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    source = torch.Generator().manual_seed(3)
    options = StepOptions(steps=steps)
    return method.start(net, optimizer, loss=loss, generator=source, options=options)


def test_the_full_network_is_tuned_alone_before_sizes_join(net):
    run = started(net, InstaTune(tune=0.5), 4)
    roles = [sorted(run.step(BATCH)) for _ in range(4)]
    assert roles == [["largest"]] * 2 + [["largest", "random", "smallest"]] * 2
    assert run.passes == 2 * 1 + 2 * 3


def test_one_step_sums_the_gradients_of_labels_and_of_the_teacher(net):
    method = InstaTune(tune=0.0, labels=0.5, temperature=2.0, random=0, reorder=False)
    by_hand = copy.deepcopy(net)
    with torch.no_grad():
        taught = by_hand.module(X)
    loss(by_hand.module(X), BATCH).backward()
    with by_hand.at(by_hand.space.smallest()):
        output = by_hand.module(X)
    (soft_cross_entropy(output, taught, temperature=2.0) + 0.5 * loss(output, BATCH)).backward()
    started(net, method, 1).step(BATCH)
    for name, p in by_hand.module.named_parameters():
        expected = p.detach() - 0.1 * p.grad
        torch.testing.assert_close(net.module.get_parameter(name).detach(), expected)


def test_the_teacher_is_the_network_at_the_switch_with_its_units_sorted(net):
    run = started(net, InstaTune(tune=0.5), 4)
    for _ in range(2):
        run.step(BATCH)
    tuned = copy.deepcopy(net.module)
    run.step(BATCH)
    teacher = run.state_dict()["teachers"]["teacher"]
    assert not torch.equal(teacher["0.weight"], tuned[0].weight)
    hidden = F.linear(X, teacher["0.weight"], teacher["0.bias"]).relu()
    torch.testing.assert_close(
        F.linear(hidden, teacher["2.weight"], teacher["2.bias"]), tuned(X)
    )
    kept = {tuple(row.tolist()) for row in teacher["0.weight"]}
    assert kept == {tuple(row.tolist()) for row in tuned[0].weight}


def test_without_sorting_units_stay_in_place(net):
    before = net.module[0].weight.detach().clone()
    run = started(net, InstaTune(tune=0.0, reorder=False), 2)
    run.step(BATCH)
    assert torch.equal(run.state_dict()["teachers"]["teacher"]["0.weight"], before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tune", 1.0), ("tune", -0.1), ("random", -1), ("labels", -1.0), ("temperature", 0.0)],
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        InstaTune(**{name: value})
