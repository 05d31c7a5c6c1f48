"""Running statistics of one size."""

from __future__ import annotations

import copy

import pytest
import torch

from supple.errors import SettingError
from supple.training.recalibrate import recalibrate
from tests.training import stub


def expected(net: stub.Stub, width: int, batches: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over batches of their means and unbiased variances, by hand."""
    conv, means, variances = net.module.fc1, [], []
    for x, _ in batches:
        y = torch.nn.functional.conv2d(x, conv.weight[:width], conv.bias[:width])
        y = y.transpose(0, 1).flatten(1)
        means.append(y.mean(1))
        variances.append(y.var(1, unbiased=True))
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize("width", [4, 8])
def test_statistics_are_the_plain_mean_over_batches(width):
    net, data = stub.cnn(dropout=0.9), stub.images(3)
    net.module.train()
    measured = recalibrate(net, {"width": width}, data)
    mean, var = expected(net, width, data)
    torch.testing.assert_close(measured["bn.running_mean"], mean.detach())
    torch.testing.assert_close(measured["bn.running_var"], var.detach())
    assert net.statistics == {net.space.config(width=width): measured}


def test_the_largest_sizes_statistics_are_the_modules_own():
    net = stub.cnn()
    measured = recalibrate(net, net.space.largest(), stub.images())
    assert torch.equal(net.module.bn.running_mean, measured["bn.running_mean"])
    assert torch.equal(net.module.bn.running_var, measured["bn.running_var"])


def test_instance_normalization_has_running_statistics_too():
    net = stub.cnn()
    net.module.bn = torch.nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    measured = recalibrate(net, net.space.largest(), stub.images(3))
    outputs = [net.module.fc1(x).detach() for x, _ in stub.images(3)]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs])
    variances = torch.stack([y.flatten(2).var(2).mean(0) for y in outputs])
    torch.testing.assert_close(measured["bn.running_mean"], means.mean(0))
    torch.testing.assert_close(measured["bn.running_var"], variances.mean(0))


def test_only_as_many_batches_as_asked_for_are_used():
    net, data = stub.cnn(), stub.images(4)
    mean, _ = expected(net, 8, data[:2])
    measured = recalibrate(net, net.space.largest(), data, batches=2)
    torch.testing.assert_close(measured["bn.running_mean"], mean.detach())


def test_the_active_size_uses_them_in_eval_mode():
    net, data = stub.cnn(), stub.images(1, size=50)
    recalibrate(net, net.space.smallest(), data)
    x = data[0][0]
    net.module.train()
    with torch.no_grad(), net.at(net.space.smallest()):
        on_the_batch = net.module(x)
    net.module.eval()
    with torch.no_grad(), net.at(net.space.smallest()):
        torch.testing.assert_close(net.module(x), on_the_batch, rtol=2e-3, atol=2e-3)
    net.drop_statistics()
    with torch.no_grad(), net.at(net.space.smallest()):
        assert (net.module(x) - on_the_batch).abs().max() > 0.02


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_and_global_randomness_are_left_as_they_were(fails):
    net = stub.cnn(dropout=0.5)
    net.module.train()
    net.module.drop.eval()
    before, attributes = stub.weights(net.module), copy.deepcopy(net.module.bn.__dict__)
    state = torch.get_rng_state()

    def forward(model, batch):
        torch.rand(1)
        if fails:
            raise ZeroDivisionError
        return model(batch[0])

    if fails:
        with pytest.raises(ZeroDivisionError):
            recalibrate(net, net.space.smallest(), stub.images(), forward=forward)
        assert not net.statistics
    else:
        recalibrate(net, net.space.smallest(), stub.images(), forward=forward)
    assert stub.equal(stub.weights(net.module), before)
    assert net.module.bn.__dict__.keys() == attributes.keys()
    assert net.module.bn.momentum == 0.1
    assert [net.module.training, net.module.bn.training, net.module.drop.training] == [
        True,
        True,
        False,
    ]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_without_batch_norm_needs_nothing():
    net = stub.mlp()
    assert recalibrate(net, net.space.smallest(), stub.vectors()) == {}
    assert net.statistics == {}


def test_configs_are_kept_in_canonical_form():
    net = stub.cnn()
    recalibrate(net, {}, stub.images(1))
    assert list(net.statistics) == [net.space.largest()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batches": 0}, "batches must be at least 1"), ({"data": []}, "gave no batch")],
)
def test_settings_are_checked(settings, message):
    net = stub.cnn()
    with pytest.raises(SettingError, match=message):
        recalibrate(net, {}, settings.pop("data", stub.images(1)), **settings)
