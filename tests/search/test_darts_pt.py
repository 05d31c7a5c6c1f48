"""DARTS-PT: what is kept is what can't be missed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.errors import SettingError
from supple.layers.choice import Choice
from supple.search._alphas import Gumbel
from supple.search._relaxed import RelaxedSearch
from supple.search.darts_pt import DARTSPT
from supple.search.sd_darts import SDDARTS
from supple.training.step import StepOptions

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
BATCHES = [(X[:20], Y[:20]), (X[20:], Y[20:])]


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


class Signal(nn.Module):
    """Gives the logits of the right answer."""

    def forward(self, x):
        return torch.stack([-x[:, 0], x[:, 0]], 1)


class Noise(nn.Module):
    """Gives logits that say nothing."""

    def forward(self, x):
        return torch.stack([x[:, 1], x[:, 2]], 1) * 0.01


class Two(nn.Module):
    """The sum of two places, at each of which one option knows the answer."""

    def __init__(self):
        super().__init__()
        self.one = Choice(Noise(), Signal())
        self.two = Choice(Signal(), Noise())
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * (self.one(x) + self.two(x))


@pytest.fixture
def net():
    return supple.elastic(Two(), X, axes=[supple.Operator()], verify=False)


def started(net, method, lr=0.1, **options):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=lr)
    source = torch.Generator().manual_seed(3)
    options = StepOptions(**options) if options else None
    return method.start(net, optimizer, loss=loss, generator=source, options=options)


@pytest.mark.parametrize("by", ["accuracy", "loss"])
def test_the_option_whose_removal_hurts_stays_against_a_larger_parameter(net, by):
    method = DARTSPT(by=by, epochs=0)
    run = started(net, method)
    with torch.no_grad():
        run.alphas["one"].copy_(torch.tensor([0.5, 0.0]))
        run.alphas["two"].copy_(torch.tensor([0.0, 0.5]))
    assert dict(run.derive()) == {"one": 0, "two": 1}
    config = method.derive(run, BATCHES, BATCHES)
    assert dict(config) == {"one": 1, "two": 0}
    assert torch.equal(net.extract(config)(X), net.module.one.options[1](X) * 2)


def test_removing_masks_one_option_and_leaves_the_others_weights(net):
    run = started(net, DARTSPT())
    found = DARTSPT(by="loss").removed(run, "one", 0, BATCHES)
    mixture = {name: each.detach() for name, each in run.mixture().items()}
    one, two = net.module.one.options, net.module.two.options
    first = mixture["one"][1] * one[1](X)
    second = mixture["two"][0] * two[0](X) + mixture["two"][1] * two[1](X)
    expected = F.cross_entropy((first + second).detach(), Y)
    assert found == pytest.approx((float(expected),))
    right = float(((first + second).argmax(1) == Y).float().mean())
    assert DARTSPT().removed(run, "one", 0, BATCHES) == pytest.approx((-right, float(expected)))


def test_equal_accuracies_are_told_apart_by_the_loss(net):
    run = started(net, DARTSPT())
    run.fix("two", 0)  # which alone knows all answers
    kept = [DARTSPT().removed(run, "one", index, BATCHES) for index in (0, 1)]
    assert kept[0][0] == kept[1][0] == -1.0
    assert kept[1] > kept[0]


def test_the_network_is_tuned_between_decisions_at_a_lower_rate(net):
    method = DARTSPT(epochs=3, rate=0.25)
    run = started(net, method, lr=0.4)
    steps, fixed = [], []
    renewed = run.renewed

    def spied(**settings):
        tuning = renewed(**settings)
        step = tuning.step

        def counted(batch):
            fixed.append(dict(tuning.fixed))
            told = step(batch)
            steps.append(tuning.lr)
            return told

        tuning.step = counted
        return tuning

    run.renewed = spied
    method.derive(run, BATCHES, BATCHES)
    assert steps == pytest.approx([0.1] * 3 * 2)  # three epochs of two batches, once
    assert all(len(each) == 1 for each in fixed)


def test_the_order_of_decisions_is_random_and_repeats():
    model = nn.Sequential(
        *(Choice(nn.Identity(), nn.Tanh()) for _ in range(6)), nn.Linear(5, 2)
    )
    net = supple.elastic(model, X, axes=[supple.Operator()], verify=False)
    orders = []
    for seed in (1, 1, 2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = DARTSPT(epochs=0)
        source = torch.Generator().manual_seed(seed)
        run = method.start(net, optimizer, loss=loss, generator=source)
        method.derive(run, BATCHES, BATCHES)
        orders.append(list(run.fixed))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == [site.name for site in run.sites]


def test_a_frozen_supernet_and_runs_of_other_searches_are_decided_alike(net):
    class Drawn(RelaxedSearch):
        def weighing(self):
            return Gumbel()

    for method in (DARTSPT(frozen=True), Drawn(), SDDARTS(interval=0.5)):
        run = started(net, method, steps=2)
        for batch in BATCHES:
            run.step((batch, batch))
        config = DARTSPT(epochs=1).derive(run, BATCHES, BATCHES)
        assert dict(config) == {"one": 1, "two": 0}


def test_decided_sites_stay_decided(net):
    run = started(net, DARTSPT())
    run.fix("one", 0)
    assert dict(DARTSPT(epochs=0).derive(run, BATCHES, BATCHES)) == {"one": 0, "two": 0}


def test_measuring_leaves_modes_and_running_statistics():
    model = nn.Sequential(Choice(nn.Identity(), nn.Tanh()), nn.BatchNorm1d(5), nn.Linear(5, 2))
    net = supple.elastic(model.train(), X, axes=[supple.Operator()], verify=False)
    net.eval()
    run = started(net, DARTSPT())
    DARTSPT(epochs=0).derive(run, BATCHES, BATCHES)
    assert not model[1].training
    assert torch.equal(model[1].running_mean, torch.zeros(5))


def test_labels_must_be_classes_to_decide_by_accuracy(net):
    def distance(output, batch):
        return (output - batch[1]).square().mean()

    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    run = DARTSPT().start(net, optimizer, loss=distance)
    numbers = [(X, torch.ones(40, 2))]
    with pytest.raises(SettingError, match="set by='loss'"):
        DARTSPT(epochs=0).derive(run, numbers, numbers)
    assert DARTSPT(by="loss", epochs=0).derive(run, numbers, numbers) in net.space
    with pytest.raises(SettingError, match="no batch to measure on"):
        DARTSPT(epochs=0).derive(DARTSPT().start(net, optimizer, loss=distance), numbers, [])


def test_settings_are_checked():
    with pytest.raises(SettingError, match="by must be 'accuracy' or 'loss', got 'luck'"):
        DARTSPT(by="luck")
    with pytest.raises(SettingError, match="epochs must be at least 0 and rate above 0"):
        DARTSPT(epochs=-1)
    with pytest.raises(SettingError, match="lr must be above 0"):
        DARTSPT(lr=-1.0)
