"""A mixture of supernets: who trains what, how probably, and what is learned of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.axes.base import added
from supple.axes.copies import Copies
from supple.axes.width import Width
from supple.errors import SettingError
from supple.network import elastic
from supple.supernet.balanced_supernets import BalancedSupernets, balance, configurations
from supple.training.step import StepOptions
from tests.training import stub

BATCH = stub.vectors()[0]


def network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    return elastic(model, (BATCH[0],), axes=[Width((0.5, 0.75, 1.0))], verify=False)


def start(method, net, steps=11):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    return method.start(net, optimizer, loss=stub.loss, options=StepOptions(steps=steps))


def doubles(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_balancing_scales_columns_then_rows():
    table = doubles([[0.8, 0.2], [0.6, 0.4]])
    once = table / table.mean(0)
    once = once / once.sum(1, keepdim=True)
    found = balance(table)
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(found.mean(0), doubles([0.5, 0.5]), atol=5e-3, rtol=0)
    # Scaling keeps the odds of the rows' odds.
    odds = [t[0, 0] * t[1, 1] / (t[0, 1] * t[1, 0]) for t in (table, once, found)]
    assert odds[1:] == pytest.approx([odds[0].item()] * 2)
    fair = doubles([[0.9, 0.1], [0.1, 0.9]])
    assert torch.equal(balance(fair), fair)


def test_probabilities_sharpen_with_the_steps_and_the_full_network_has_copy_zero():
    net = network()
    method = BalancedSupernets(copies=2, temperature=0.1, balanced=False)
    sampler = start(method, net).sampler
    sampler.losses[:] = doubles([0.2, 0.4])
    full = sampler._full
    for step, inverse in [(0, 1.0), (5, 5.5), (10, 10.0)]:
        found = sampler.probabilities(step, 11)
        first = torch.sigmoid(torch.tensor(0.2 * inverse)).item()
        assert found[full].tolist() == [1.0, 0.0]
        others = [row for row in range(len(found)) if row != full]
        assert found[others, 0].tolist() == pytest.approx([first] * len(others))


def test_balanced_copies_get_equal_shares_although_one_is_ahead():
    shares = {}
    for balanced in (True, False):
        method = BalancedSupernets(copies=2, balanced=balanced)
        sampler = start(method, network()).sampler
        sampler.losses[:, 1] = 1.0 + torch.arange(9) / 100
        shares[balanced] = sampler.probabilities(10, 11).mean(0)[0].item()
    assert shares[True] == pytest.approx(0.5, abs=0.01)
    assert shares[False] > 0.99


def test_one_step_trains_the_drawn_copy_and_averages_its_loss():
    net = network()
    run = start(BalancedSupernets(copies=3, random=2, decay=0.75), net)
    for _ in range(5):
        before, averages = stub.weights(net.module), run.sampler.losses.clone()
        seen = []
        observe = run.sampler.observe
        run.sampler.observe = lambda s, f=observe, at=seen: (
            at.append((s, s.net.sharing)),
            f(s),
        )
        run.step(BATCH)
        run.sampler.observe = observe
        expected = {name: torch.zeros_like(v) for name, v in before.items()}
        for one, sharing in seen:
            copy = int(one.entry.role.removeprefix("copy-"))
            assert sharing.chosen(one.entry.config) == copy
            other = network()
            other.share(sharing)
            other.module.load_state_dict(before)
            with other.at(one.entry.config):
                loss = stub.loss(other.module(BATCH[0]), BATCH)
            loss.backward()
            grads = {
                n: p.grad for n, p in other.module.named_parameters() if p.grad is not None
            }
            assert all(added(name) == (copy > 0) for name in grads)
            for name, grad in grads.items():
                expected[name] += grad
            row = run.sampler._rows.chosen(one.entry.config)
            averages[row, copy] = 0.75 * averages[row, copy] + 0.25 * loss.item()
        for name, value in net.module.named_parameters():
            torch.testing.assert_close(value.detach(), before[name] - 0.1 * expected[name])
        torch.testing.assert_close(run.sampler.losses, averages, atol=1e-6, rtol=0)


def test_after_a_step_sizes_have_their_likeliest_copies():
    net = network()
    run = start(BalancedSupernets(copies=3), net, steps=6)
    roles = set()
    for _ in range(6):
        roles |= set(run.step(BATCH))
    assert len(roles) > 1
    likely = run.sampler.state_dict()["likely"].argmax(1).tolist()
    assert net.sharing.copy == tuple(likely)
    assert len(set(likely)) > 1
    assert net.sharing.chosen(net.space.largest()) == 0


def test_a_configuration_has_one_copy_in_a_step():
    net = network()
    run = start(BalancedSupernets(copies=4, random=20), net)
    run.sampler.begin(run)
    entries = run.sampler.sample(0, 11)
    copies = {}
    for entry in entries:
        assert copies.setdefault(entry.config, entry.role) == entry.role
        assert entry.role == f"copy-{net.sharing.chosen(entry.config)}"
    assert len(copies) < len(entries)


def test_configurations_are_told_apart_at_the_named_sites_only():
    net = network()
    assert len(configurations(net.space)) == 9
    run = start(BalancedSupernets(copies=2, where="2"), net)
    assert run.sampler.parts == [{"2": (4,)}, {"2": (6,)}, {"2": (8,)}]
    with pytest.raises(SettingError, match="matches none"):
        start(BalancedSupernets(where="pool*"), network())


def test_too_many_configurations_are_refused():
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))
    net = elastic(model, (torch.zeros(2, 40),), axes=[Width(None)], verify=False)
    with pytest.raises(SettingError, match="64,000 configurations"):
        configurations(net.space)


def test_another_process_goes_on_with_the_assignment():
    net, other = network(), network()
    method = BalancedSupernets(copies=3)
    run, again = start(method, net), start(method, other)
    for _ in range(4):
        run.step(BATCH)
    other.module.load_state_dict(net.module.state_dict())
    again.load_state_dict(run.state_dict())
    assert isinstance(other.sharing, Copies)
    assert other.sharing == net.sharing
    run.step(BATCH)
    again.step(BATCH)
    assert stub.equal(stub.weights(net.module), stub.weights(other.module))


def test_the_number_of_steps_must_be_known():
    with pytest.raises(SettingError, match="pass steps="):
        start(BalancedSupernets(), network(), steps=None).step(BATCH)


@pytest.mark.parametrize(
    ("name", "value"),
    [("copies", 0), ("random", 0), ("decay", 1.0), ("temperature", 0.0), ("temperature", 2.0)],
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        BalancedSupernets(**{name: value})
