"""SD-DARTS: the mixture learns from its own snapshots."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from supple.errors import SettingError
from supple.search._relaxed import RelaxedSearch
from supple.search.sd_darts import SDDARTS, Voting
from supple.training.step import StepOptions

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
BATCH = ((X[:3], Y[:3]), (X[3:], Y[3:]))
RATE = 0.1


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


@pytest.fixture
def net():
    return RelaxedSearch.toy()


def started(net, method, steps, seed=3):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=RATE)
    source = torch.Generator().manual_seed(seed)
    options = StepOptions(steps=steps)
    return method.start(net, optimizer, loss=loss, generator=source, options=options)


def mixed(run, net, x):
    weights = {name: each.detach() for name, each in run.mixture().items()}
    with run.relaxation.applied(net, weights):
        return net.module(x)


@pytest.mark.parametrize(("memory", "ramp", "grown"), [(1, 0.0, 1.0), (2, 1.0, 0.75)])
def test_one_step_adds_the_distance_to_the_mean_of_the_snapshots(net, memory, ramp, grown):
    method = SDDARTS(
        memory=memory, interval=0.25, ramp=ramp, soft=0.7, temperature=2.0, frozen=True
    )
    run = started(net, method, 4)
    votes = []
    for _ in range(3):
        run.step(BATCH)
        snapshot = copy.deepcopy(net)
        with torch.no_grad():
            votes.append(torch.softmax(mixed(run, snapshot, X[:3]) / 2.0, -1))
    mean = torch.stack(votes[-memory:]).mean(0)
    twin = copy.deepcopy(net)
    output = mixed(run, twin, X[:3])
    student = F.log_softmax(output / 2.0, -1)
    distance = F.kl_div(student, mean, reduction="batchmean")
    total = F.cross_entropy(output, Y[:3]) + 0.7 * grown * 2.0**2 * distance
    total.backward()
    assert run.step(BATCH)["weights"] == pytest.approx(float(total.detach()), rel=1e-5)
    for name, p in twin.module.named_parameters():
        moved = p.detach() - RATE * p.grad
        torch.testing.assert_close(net.module.get_parameter(name).detach(), moved)


def test_snapshots_hold_the_parameters_that_they_had(net):
    run = started(net, SDDARTS(memory=1, interval=0.25, lr=0.5), 4)
    run.step(BATCH)
    run.step(BATCH)
    ((_, weights),) = run.sampler.voting.members
    before = {name: each.clone() for name, each in weights.items()}
    with torch.no_grad():
        for _, alpha in run.alphas.items():
            alpha.add_(torch.tensor([3.0, 0.0]))
    ((snapshot, weights),) = run.sampler.voting.members
    assert all(torch.equal(each, before[name]) for name, each in weights.items())
    assert not torch.allclose(weights["1"], run.mixture()["1"])
    assert not any(p.requires_grad for p in snapshot.module.parameters())
    assert snapshot.module[0].weight is not net.module[0].weight


def test_snapshots_are_taken_at_shares_of_the_run_and_the_latest_are_kept(net):
    run = started(net, SDDARTS(memory=2, interval=0.25), 8)
    kept, latest = [], []
    for _ in range(8):
        weight = net.module[0].weight.detach().clone()
        run.step(BATCH)
        members = run.sampler.voting.members
        kept.append(len(members))
        if members:
            latest.append(torch.equal(members[-1][0].module[0].weight, weight))
    assert kept == [0, 0, 1, 1, 2, 2, 2, 2]
    assert latest == [True, False] * 3


def test_distillation_grows_over_the_ramp(net):
    method = SDDARTS(interval=0.1, ramp=0.4, soft=1.0, frozen=True)
    run = started(net, method, 10)
    grown = []
    for _ in range(7):
        grown.append(run.weights.criterion._grown())
        run.step(BATCH)
    assert grown == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1])


def test_without_distillation_it_trains_as_darts_does(net):
    twin = copy.deepcopy(net)
    method = SDDARTS(soft=0.0, interval=0.25)
    run, plain = started(net, method, 4), started(twin, RelaxedSearch(), 4)
    for _ in range(4):
        assert run.step(BATCH) == plain.step(BATCH)


def test_a_resumed_run_has_the_same_teachers(net):
    method = SDDARTS(memory=2, interval=0.25, ramp=0.0)
    run = started(net, method, 8)
    for _ in range(5):
        run.step(BATCH)
    twin = copy.deepcopy(net)
    again = started(twin, method, 8, seed=9)
    again.load_state_dict(copy.deepcopy(run.state_dict()))
    for _ in range(3):
        assert run.step(BATCH) == again.step(BATCH)


def test_a_vote_of_zero_is_no_infinity():
    class Sure:
        module = staticmethod(lambda x: torch.tensor([[0.0, 500.0]]))

    voting = Voting(_Anything(), 1.0)
    assert voting(X) is None
    voting.members.append((Sure(), {}))
    assert torch.isfinite(voting(X)).all()


class _Anything:
    def applied(self, net, weights):
        return torch.no_grad()


def test_settings_are_checked(net):
    with pytest.raises(SettingError, match="soft must be at least 0 and temperature above 0"):
        SDDARTS(temperature=0.0)
    with pytest.raises(SettingError, match=r"memory must be at least 1, interval lie in \(0"):
        SDDARTS(interval=0.0)
    optimizer = torch.optim.SGD(net.module.parameters(), lr=RATE)
    with pytest.raises(SettingError, match="needs to know the number of steps"):
        SDDARTS().start(net, optimizer, loss=loss)
