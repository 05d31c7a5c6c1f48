"""SuperTickets: units and weights are removed while the network trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import supple
from supple.axes.width import Width
from supple.errors import SettingError, UnsupportedModelError
from supple.supernet.supertickets import SuperTickets, surviving
from supple.training.step import StepOptions
from tests.training import stub


def network(batch_norm=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(5, 8),
            nn.BatchNorm1d(8) if batch_norm else nn.Identity(),
            nn.ReLU(),
            nn.Linear(8, 3),
        )
    return supple.elastic(model, torch.zeros(4, 5), axes=[Width((0.25, 0.5, 0.75, 1.0))])


def started(net, method, steps, *, lr=0.05, optimizer=torch.optim.AdamW, **options):
    made = optimizer(net.module.parameters(), lr=lr)
    return method.start(net, made, loss=stub.loss, options=StepOptions(steps=steps, **options))


def test_one_step_adds_the_penalty_on_gains_to_the_loss():
    net, batch = network(), stub.vectors()[0]
    before = stub.weights(net.module)
    method = SuperTickets(sparsity=0, penalty=0.3, ramp=0, until=1, events=1)
    run = started(net, method, 9, optimizer=torch.optim.SGD)
    run.step(batch)
    after = stub.weights(net.module)
    net.module.load_state_dict(before)
    net.module.zero_grad()
    # one site: its unit costs as much as the mean unit
    (stub.loss(net.module(batch[0]), batch) + 0.3 * net.module[1].weight.sum()).backward()
    for name, p in net.module.named_parameters():
        torch.testing.assert_close(after[name], before[name] - 0.05 * p.grad)


def test_the_penalty_grows():
    net, run = (net := network()), started(net, SuperTickets(penalty=0.4, ramp=0.5), 8)
    seen = []
    for batch in stub.vectors(count=6):
        run.step(batch)
        seen.append(run.sampler.rho)
    assert seen == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_what_is_removed_stays_zero_with_its_moments_and_average(optimizer):
    net = network()
    method = SuperTickets(sparsity=0.75, events=3, until=0.6)
    run = started(net, method, 10, optimizer=optimizer, lr=1e-3, ema=0.9)
    weights = [net.module[0].weight, net.module[3].weight]
    shares = []
    for batch in stub.vectors(count=10):
        run.step(batch)
        average = run.average.state_dict()["average"]
        zero = 0
        for name, mask in run.sampler.masks.items():
            parameter = net.module.get_parameter(name)
            held = [parameter, average[name], *run.optimizer.state[parameter].values()]
            for tensor in held:
                if tensor.shape == parameter.shape:
                    assert not tensor[~mask].any()
            zero += int((parameter == 0).sum())
        shares.append(zero / sum(w.numel() for w in weights))
    assert shares == pytest.approx([0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75])


def test_masks_take_the_least_magnitudes_of_all_layers():
    net = network()
    with torch.no_grad():
        net.module[0].weight.fill_(1.0)
        net.module[3].weight.fill_(0.5)
    run = started(net, SuperTickets(sparsity=0.375, events=1, until=0.1), 3)
    run.step(stub.vectors()[0])  # the 24 of 64 weights that are smaller
    run.step(stub.vectors()[1])
    assert run.sampler.masks["0.weight"].all()
    assert not run.sampler.masks["3.weight"].any()


def test_ties_are_not_all_removed():
    net = network()
    with torch.no_grad():
        for layer in (net.module[0], net.module[3]):
            layer.weight.fill_(1.0)
    run = started(net, SuperTickets(sparsity=0.25, events=1, until=1), 1)
    run.step(stub.vectors()[0])  # the event after the last step comes before it
    assert sum(int((~mask).sum()) for mask in run.sampler.masks.values()) == 16


def test_what_was_removed_may_grow_again_until_the_last_event():
    net = network()
    run = started(net, SuperTickets(sparsity=0.5, events=2, until=0.6, regrow=True), 5)
    zeros = []
    for batch in stub.vectors(count=5):
        run.step(batch)
        zeros.append(sum(int((w == 0).sum()) for w in (net.module[0].weight,)))
    assert zeros[2] == 0
    assert zeros[4] > 0


def test_dead_units_are_cut_off_and_the_ticket_computes_the_same():
    net = network()
    with torch.no_grad():
        net.module[1].weight[[0, 2, 5]] = 1e-4
        net.module[1].bias.uniform_(-1, 1)
    method = SuperTickets(sparsity=0.4, threshold=1e-3, events=1, until=0.1, penalty=0)
    run = started(net, method, 5)
    for batch in stub.vectors(count=4):
        run.step(batch)
    gains = net.module[1].weight
    assert (gains == 0).nonzero().flatten().tolist() == [0, 2, 5]
    x = torch.randn(6, 5)
    net.eval()
    before = net.module(x)
    config = surviving(net)
    assert dict(config) == {"0": 6}  # five are left, and six is the choice above
    torch.testing.assert_close(net.module(x), before)
    supple.recalibrate(net, config, stub.vectors())
    ticket = net.extract(config).eval()
    with net.at(config):
        torch.testing.assert_close(ticket(x), net.module(x))
    zeros = sum(int((w == 0).sum()) for w in (ticket[0].weight, ticket[3].weight))
    assert zeros == round(0.4 * 8 * 5) + 8  # of five units' 8 weights, and the sixth's


def test_units_are_kept_down_to_the_least_macs():
    net = network()
    with torch.no_grad():
        net.module[1].weight.copy_(torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4]) * 1e-5)
    run = started(net, SuperTickets(least_macs=0.75, events=1, until=0.1, penalty=0), 5)
    run.step(stub.vectors()[0])
    run.step(stub.vectors()[1])
    assert (net.module[1].weight == 0).nonzero().flatten().tolist() == [1, 3]


def test_networks_without_batch_norm_and_open_ends_are_refused():
    with pytest.raises(UnsupportedModelError, match="batch norms"):
        started(network(batch_norm=False), SuperTickets(), 5)
    with pytest.raises(SettingError, match="elastic"):
        started(stub.mlp(), SuperTickets(), 5)
    with pytest.raises(SettingError, match="steps="):
        started(network(), SuperTickets(), None).step(stub.vectors()[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sparsity", 1.0),
        ("penalty", -1.0),
        ("threshold", 0.0),
        ("least_macs", 2.0),
        ("ramp", -0.1),
        ("events", 0),
        ("until", 0.0),
    ],
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        SuperTickets(**{name: value})
