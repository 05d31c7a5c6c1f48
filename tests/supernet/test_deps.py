"""DepS: the full network first, then others with growing step sizes."""

from __future__ import annotations

import pytest
import torch

from supple.errors import SettingError
from supple.supernet.deps import DepS
from supple.testing.rules import network
from supple.training.schedule import Cosine
from supple.training.step import StepOptions
from tests.training import stub


def start(method, net, steps, *, momentum=0.0, schedule=None, seed=3):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1, momentum=momentum)
    return method.start(
        net,
        optimizer,
        loss=stub.loss,
        generator=torch.Generator().manual_seed(seed),
        options=StepOptions(steps=steps, schedule=schedule),
    )


def plan(method, steps, schedule=None):
    """The roles of each step, the weight of all but the largest, and the learning rate."""
    net = stub.mlp()
    run, rows = start(method, net, steps, schedule=schedule), []
    sample = run.sampler.sample

    def spy(*args):
        entries = list(sample(*args))
        assert entries[0].weight == 1.0
        (weight,) = {entry.weight for entry in entries[1:]} or {None}
        rows.append([tuple(entry.role for entry in entries), weight])
        return entries

    run.sampler.sample = spy
    for batch in stub.vectors(steps):
        run.step(batch)
        rows[-1].append(run.lr)
    return rows


def test_the_largest_trains_alone_until_the_ramp():
    rows = plan(DepS(delay=0.5, ramp=0.2, reorder=False), 20)
    roles = [row[0] for row in rows]
    assert roles[:6] == [("largest",)] * 6
    assert roles[6:] == [("largest", "smallest", "random", "random")] * 14
    assert [row[1] for row in rows[6:]] == pytest.approx([0.25, 0.5, 0.75] + 11 * [1.0])


def test_in_the_ramp_the_others_learning_rate_grows_to_that_at_the_switch():
    rows = plan(
        DepS(delay=0.5, ramp=0.2, rate=0.6, random=1, reorder=False), 20, Cosine(floor=0.1)
    )
    rates = [0.1 * Cosine(floor=0.1)(step, 20) for step in range(20)]
    assert [row[2] for row in rows] == pytest.approx(rates)  # the largest's never drops
    others = [weight * lr for _, weight, lr in rows[6:]]
    grown = [0.6 * rates[10] * k / 4 for k in (1, 2, 3, 4)]
    assert others == pytest.approx(grown + [0.6 * rate for rate in rates[10:]])


def test_without_a_delay_it_is_the_sandwich_from_the_first_step():
    rows = plan(DepS(delay=0.0, ramp=0.0, random=1, reorder=False), 3)
    assert [row[:2] for row in rows] == [[("largest", "smallest", "random"), 1.0]] * 3


def test_a_step_of_the_ramp_weighs_all_but_the_largest():
    net, batch = stub.mlp(), stub.vectors()[0]
    before = stub.weights(net.module)
    method = DepS(delay=0.5, ramp=0.5, random=1, temperature=2.0, rate=0.8, reorder=False)
    start(method, net, 4).step(batch)
    assert net.active[:2] == [net.space.largest(), net.space.smallest()]
    other = stub.mlp()
    teacher = other.module(batch[0])
    stub.loss(teacher, batch).backward()
    soft = (teacher.detach() / 2.0).softmax(-1)
    for config in net.active[1:]:
        with other.at(config):
            student = (other.module(batch[0]) / 2.0).log_softmax(-1)
            (0.8 / 2 * -4.0 * (soft * student).sum(-1).mean()).backward()
    assert len(net.active) == 3
    for name, p in other.module.named_parameters():
        expected = before[name] - 0.1 * p.grad
        torch.testing.assert_close(net.module.get_parameter(name).detach(), expected)


def test_units_and_their_moments_are_sorted_when_the_ramp_begins():
    net = network()
    run = start(DepS(delay=0.5, ramp=0.25), net, 8, momentum=0.9)
    x = torch.randn(17, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        run.step((x, torch.arange(17) % 3))
    first, function = net.module[0].weight, net.module(x).detach()
    rows = torch.cat([first, run.optimizer.state[first]["momentum_buffer"]], 1).detach()
    run.sampler.begin(run)
    now = torch.cat([first, run.optimizer.state[first]["momentum_buffer"]], 1).detach()
    torch.testing.assert_close(net.module(x), function)
    for scores in net.importance("read_l1").values():
        assert (scores.diff() <= 0).all()
    assert not torch.equal(rows, now)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, now.tolist()))


@pytest.mark.parametrize(
    ("name", "value"),
    [("delay", 1.0), ("delay", -0.1), ("ramp", 0.6), ("random", -1), ("rate", 0.0)],
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        DepS(**{name: value})
