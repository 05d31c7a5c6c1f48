"""BigNAS: the sandwich rule with in-place distillation."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from supple.errors import SettingError, UnsupportedModelError
from supple.supernet.bignas import BigNAS
from supple.training.loop import train
from tests.training import stub


def test_one_step_sums_the_largests_labels_and_the_others_soft_targets():
    net, batch = stub.mlp(), stub.vectors()[0]
    before = stub.weights(net.module)
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    run = BigNAS(random=2, temperature=2.0).start(
        net, optimizer, loss=stub.loss, generator=torch.Generator().manual_seed(3)
    )
    losses = run.step(batch)
    _, smallest, *randoms = net.active
    assert net.active[:2] == [net.space.largest(), net.space.smallest()]

    other = stub.mlp()
    teacher = other.module(batch[0])
    stub.loss(teacher, batch).backward()
    soft = (teacher.detach() / 2.0).softmax(-1)
    for config in (smallest, *randoms):
        with other.at(config):
            student = (other.module(batch[0]) / 2.0).log_softmax(-1)
            (-4.0 * (soft * student).sum(-1).mean()).backward()
    assert len(randoms) == 2
    assert losses["largest"] == pytest.approx(stub.loss(teacher, batch).item(), rel=1e-6)
    for name, p in other.module.named_parameters():
        expected = before[name] - 0.1 * p.grad
        torch.testing.assert_close(net.module.get_parameter(name).detach(), expected)


def test_dropout_is_on_for_the_largest_only():
    net, modes = stub.mlp(dropout=0.5), []

    def forward(model, batch):
        modes.append(model.drop.training)
        return model(batch[0])

    for method in (BigNAS(), BigNAS(regularise_all=True)):
        train(net, stub.vectors(1), stub.loss, method=method, forward=forward, progress=False)
    assert modes == [True, False, False, False, True, True, True, True]


def test_the_suggested_rate_falls_to_a_floor_of_5_percent():
    schedule = BigNAS().schedule()
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[0] == 1.0
    assert factors[1] / factors[0] == pytest.approx(factors[41] / factors[40])
    assert min(factors) == factors[-1] == pytest.approx(0.05)


class Residual(stub.Stub):
    """Knows where its residual branches end."""

    asked = 0

    def residual_gains(self) -> list[nn.Parameter]:
        self.asked += 1
        return [self.module.bn.weight]


def test_gains_of_residual_branches_start_at_zero_only_if_asked():
    plain = Residual(stub.CNN())
    BigNAS().prepare(plain)
    assert (plain.module.bn.weight == 1.0).all()
    BigNAS(zero_gains=True).prepare(plain)
    assert (plain.module.bn.weight == 0.0).all()
    assert plain.module.bn.weight.requires_grad


def test_a_resumed_run_is_not_prepared_again(tmp_path):
    def run(stop):
        net, calls = Residual(stub.cnn().module), []

        def loss(output, batch):
            calls.append(1)
            if len(calls) == stop:
                raise ZeroDivisionError
            return stub.loss(output, batch)

        method = BigNAS(zero_gains=True)
        settings = {"checkpoint": tmp_path / "a", "checkpoint_every": 1, "lr": 0.1}
        train(net, stub.images(3), loss, method=method, progress=False, **settings)
        return net

    with pytest.raises(ZeroDivisionError):
        run(3)
    assert run(None).asked == 0
    shutil.rmtree(tmp_path / "a")
    assert run(None).asked == 1


def test_zero_gains_without_known_branches_is_refused():
    with pytest.raises(UnsupportedModelError, match="leave zero_gains off"):
        BigNAS(zero_gains=True).prepare(stub.cnn())


@pytest.mark.parametrize(
    ("name", "value"), [("random", -1), ("temperature", 0.0), ("labels", -1.0), ("floor", 0.0)]
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        BigNAS(**{name: value})
