"""Truths about training with rounded weights and inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import supple
from supple.errors import SettingError, UnsupportedModelError
from supple.formats import fake_quantize
from supple.layers.fake_quantize import FakeQuantize
from supple.layers.packed import PackedConv2d, PackedLinear
from supple.quantize._qat import BASELINES, baseline, wrapped
from supple.testing.toys import generator, mlp


def network() -> nn.Sequential:
    source = generator(3)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Conv1d(5, 4, 1),
        nn.Flatten(),
        Conv1D(6, 36),
        nn.Linear(6, 3),
    )
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(-0.3, 0.5, generator=source)
        model[1].running_var.uniform_(0.5, 1.5, generator=source)
    return model


X = torch.randn(7, 2, 3, 3, generator=generator())


def trained(rule, net: nn.Module, steps: int = 3, x: Tensor = X) -> list[float]:  # type: ignore[no-untyped-def]
    batches = [(x, torch.arange(len(x)) % 3)] * steps
    losses: list[float] = []

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        found = F.cross_entropy(output, batch[1])
        losses.append(found.item())
        return found

    supple.train(
        net, batches, loss, method=rule, steps=steps, optimizer="sgd", lr=0.05, progress=False
    )
    return losses


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_finished_computes_what_was_trained(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, rule = network(), baseline(name, bits=3)
    before = copy.deepcopy(model.state_dict())
    net = rule.wrap(model.train(), (X,))
    losses = trained(rule, net, steps=12)
    assert losses[-1] < losses[0]
    small = rule.finished(net).eval()
    expected = net.eval()(X)
    torch.testing.assert_close(small(X), expected, rtol=1e-4, atol=1e-4)
    kinds = {type(module) for module in small.modules()}
    assert {PackedConv2d, PackedLinear} <= kinds
    assert not any(isinstance(module, FakeQuantize) for module in small.modules())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    supple.save(small, tmp_path / "small")
    loaded = supple.load(tmp_path / "small", model=network())
    assert torch.equal(loaded(X), small(X))
    levels = small.get_submodule("7").dense_weight().unique()
    assert len(levels) <= (8 if rule.granularity == "tensor" else 8 * 3)


def test_sixteen_bits_change_nothing_and_either_half_stands_alone() -> None:
    model = mlp()
    neutral = baseline("lsq", bits=16, activations=None)
    assert neutral.wrap(model) is model
    x = torch.randn(5, 5, generator=generator())
    assert torch.equal(neutral.finished(model)(x), model(x))
    weights = baseline("max", activations=None).wrap(model)
    linear = weights[0]
    assert torch.equal(linear.rounded(), fake_quantize(model[0].weight, linear.of_weight.spec))
    inputs = baseline("lsq", bits=16).wrap(model, (x,))
    assert inputs[0].of_weight is None
    small = baseline("lsq", bits=16).finished(inputs)
    assert torch.equal(small(x), inputs(x))
    assert torch.equal(small[0].layer.weight, model[0].weight)


def test_weights_that_stay_in_floating_point_are_the_rounded_ones() -> None:
    rule = baseline("lsq", packed=False, activations=None)
    net = rule.wrap(mlp())
    plain = rule.finished(net)
    assert [type(one) for one in plain] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    assert torch.equal(plain[2].weight, net[2].rounded())


def test_inputs_without_negative_numbers_have_formats_without_them() -> None:
    net = baseline("lsq").wrap(network(), (X,))
    names = [layer.of_input.spec.format.name for layer in wrapped(net).values()]
    assert names[:2] == ["int4", "uint4"]
    net = baseline("pact").wrap(network(), (X,))
    names = [layer.of_input.spec.format.name for layer in wrapped(net).values()]
    assert names[:2] == ["int4-narrow", "uint4"]


def test_norms_are_folded_and_their_statistics_stay_in_the_end() -> None:
    rule = baseline("int8", until=0.5)
    model = network()
    net = rule.wrap(model.train(), (X,))
    assert isinstance(net[1], nn.Identity)
    torch.testing.assert_close(net.eval()(X), model.eval()(X), rtol=0.1, atol=0.05)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    companion = rule.attach(net, optimizer, steps=4)
    means = []
    for _ in range(4):
        net(X).sum().backward()
        optimizer.step()
        means.append(net[0].norm.running_mean.clone())
    assert not torch.equal(means[0], means[1])
    assert torch.equal(means[1], means[3])
    state = companion.state_dict()
    companion.load_state_dict({**state, "step": 1})
    assert not net[0].frozen
    companion.load_state_dict(state)
    assert net[0].frozen
    assert companion.state_dict() == state


def test_learned_scales_are_learned() -> None:
    rule = baseline("lsq-channel", bits=2, activations=2)
    net = rule.wrap(network(), (X,))
    before = [layer.of_weight.scale.detach().clone() for layer in wrapped(net).values()]
    trained(rule, net)
    for layer, old in zip(wrapped(net).values(), before, strict=True):
        assert (layer.of_weight.scale != old).any()
        assert layer.of_weight.scale.numel() == len(layer.matrix())
        assert layer.of_input.scale.grad is not None


def test_what_can_not_be_done_says_so() -> None:
    with pytest.raises(SettingError, match="no baseline 'lsk', did you mean 'lsq'"):
        baseline("lsk")
    for settings, match in (
        ({"bits": 1}, "bits must be from 2 to 16, got 1"),
        ({"activations": 17}, "activations must be from 2 to 16, got 17"),
        ({"granularity": "group"}, "granularity must be channel or tensor"),
        ({"until": 2.0}, "until must be in"),
        ({"estimator": "ste"}, "observer='learned' goes with"),
        ({"input_observer": "emma"}, "no observer 'emma'"),
    ):
        with pytest.raises(SettingError, match=match):
            baseline("lsq", **settings)
    model = mlp()
    rule = baseline("lsq", activations=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SettingError, match="give what wrap"):
        rule.attach(model, optimizer, steps=3)
    with pytest.raises(SettingError, match=r"does not hold '0\.of_weight\.scale'"):
        rule.attach(rule.wrap(model), optimizer, steps=3)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(UnsupportedModelError, match=r"several modules share '0\.weight'"):
        rule.wrap(tied)
    with torch.no_grad():
        tied[0].weight[0, 0] = torch.nan
    with pytest.raises(SettingError, match="not finite"):
        rule.wrap(tied)
