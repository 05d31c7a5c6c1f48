"""EQ-Net: which sizes a step trains, what each learns, and steps that fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from supple.axes.bits import Bits
from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.network import Elastic, elastic
from supple.quantize._supernet import fit_steps
from supple.quantize.eq_net import EQNet, distribution_penalty
from supple.testing.toys import generator
from supple.training.step import Pass

X = torch.randn(11, 5, generator=generator(3))


def network(**settings) -> Elastic:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(5)))
    axis = Bits(**{"choices": (2, 4, 8), "inputs": (2, 8), "learned": True, **settings})
    return elastic(model, X, axes=[axis], verify=False)


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def test_a_step_goes_from_the_most_bits_to_the_fewest() -> None:
    net = network(modes=("channel", "tensor"))
    axis = net.axes[0]
    modes = set()
    for ends in (True, False):
        sampler = EQNet(random=2, ends=ends).sampler(net, generator())
        for _ in range(8):
            passes = sampler.sample(0, None)
            assert [one.role for one in passes] == ["largest", "random", "random", "smallest"]
            largest, *drawn, smallest = [
                {n: axis.told(c, "input" in n) for n, c in one.config.items()} for one in passes
            ]
            assert {bits for bits, _ in largest.values()} == {8}
            assert {b for n, (b, _) in smallest.items() if n.startswith("1.")} == {2}
            for size in (smallest, *drawn):
                assert max(bits for bits, _ in size.values()) <= 8
                kept = {b for n, (b, _) in size.items() if not n.startswith("1.")}
                assert not ends or kept == {8}
            modes |= {largest["1.bits"][1], smallest["1.bits"][1]}
        assert ends or {b for n, (b, _) in smallest.items()} == {2}
    assert modes == {"channel", "tensor"}


def test_sizes_learn_from_labels_and_from_the_one_before() -> None:
    net = network()
    y = torch.arange(11) % 3
    criterion = EQNet(kurtosis=0.0, skewness=0.0).criterion(net, loss)
    first, second, third = (torch.randn(11, 3, generator=generator(i)) for i in range(3))
    batch, seen = (X, y), {"largest": [first]}

    def taught(by, student):
        soft = -(by.softmax(1) * student.log_softmax(1)).sum(1).mean()
        return 0.5 * F.cross_entropy(student, y) + 0.5 * soft

    pass_ = {role: Pass(None, role) for role in ("largest", "random", "smallest")}
    torch.testing.assert_close(
        criterion(pass_["largest"], first, batch, {}), F.cross_entropy(first, y)
    )
    got = criterion(pass_["random"], second, batch, seen)
    torch.testing.assert_close(got, taught(first, second))
    seen["random"] = [third, second]
    got = criterion(pass_["smallest"], third, batch, seen)
    torch.testing.assert_close(got, taught(second, third))


def test_the_first_pass_flattens_all_weights_but_the_first() -> None:
    net = network()
    criterion = EQNet(kurtosis=0.2, skewness=0.7).criterion(net, loss)
    output, batch = torch.zeros(11, 3), (X, torch.zeros(11, dtype=torch.long))
    each = []
    for layer in net.module[1:]:
        w = layer.weight.detach().double()
        z = (w - w.mean()) / w.std()
        each.append(0.2 * ((z**4).mean() - 1.8) ** 2 + 0.7 * (z**3).mean() ** 2)
        torch.testing.assert_close(
            distribution_penalty(layer.weight, 0.2, 0.7).double(), each[-1], rtol=1e-5, atol=0
        )
    got = criterion(Pass(None, "largest"), output, batch, {}) - F.cross_entropy(
        *(output, batch[1])
    )
    torch.testing.assert_close(got.double(), sum(each) / 2, rtol=1e-4, atol=0)


def test_steps_are_fitted_to_weights_and_inputs() -> None:
    net = network(modes=("channel", "tensor-asymmetric"), input_modes=("tensor-asymmetric",))
    x = torch.cat([X, X.abs() + 2])

    @torch.no_grad()
    def errors() -> list[float]:
        found = []
        for config in ({"1.bits": 20}, {"1.bits": 21}):
            with net.at(config):
                shown = net.module[1].weight
            found.append(float((shown - net.module[1].weight).abs().pow(2.4).sum()))
        with net.at({"0.input_bits": 2}):
            rounded = net.module[0](x)
        return [*found, float((rounded - net.module[0](x)).square().sum())]

    before = errors()
    fit_steps(net, [(x,)])
    after = errors()
    assert all(new < old for old, new in zip(before, after, strict=True)), (before, after)
    fitted = QuantSpec("int2", scale_format="fp16")
    with net.at({"1.bits": 20}):
        shown = net.module[1].weight
    owner = net.module[1].weight.detach()
    assert (shown - owner).norm() < (fake_quantize(owner, fitted) - owner).norm()


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"random": -1}, "random must be at least 0, got -1"),
        ({"soft": 0.0, "labels": 0.0}, "both 0"),
    ):
        with pytest.raises(SettingError, match=match):
            EQNet(**settings)
    plain = nn.Linear(5, 3)
    with pytest.raises(SettingError, match="has no bits that vary"):
        EQNet().start(plain, torch.optim.SGD(plain.parameters(), lr=0.1), loss=loss)
