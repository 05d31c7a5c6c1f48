"""QuantNAS: noise for rounding, bit operations, and the pull to a decision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import supple
from supple.errors import SettingError, UnsupportedModelError
from supple.layers.choice import Choice
from supple.layers.quantized import QuantizedConv2d
from supple.search._relaxed import Halves, RelaxedSearch
from supple.search.quantnas_sr import (
    BitOps,
    QuantNASSR,
    joint_entropy,
    noisy,
    presence,
    pull_to_decide,
)
from supple.training.seeds import generator
from supple.training.step import StepOptions

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
BATCH = Halves((X[:3], torch.tensor([0, 1, 2])), (X[3:], torch.tensor([2, 1, 0])))
COIN = torch.tensor([0.5, 0.5])


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def started(steps=4, **settings):
    net = QuantNASSR.toy()
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    return QuantNASSR(**settings).start(
        net, optimizer, loss=loss, generator=generator(3), options=StepOptions(steps=steps)
    )


# -------------------------------------------------------------------------------------- noise


def test_a_noisy_mixture_and_its_gradients_are_the_formulas():
    x = X.clone().requires_grad_()
    weights = torch.tensor([0.25, 0.75], requires_grad=True)
    given = noisy(x, weights, (2, 4), generator(5))
    source = generator(5)
    span = X.max() - X.min()
    copies = [
        X + span / (2**bits - 1) * torch.randn(X.shape, generator=source) / 2 for bits in (2, 4)
    ]
    expected = X / 3 + 2 / 3 * (0.25 * copies[0] + 0.75 * copies[1])
    torch.testing.assert_close(given, expected)
    given.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(X, 1 / 3))
    torch.testing.assert_close(weights.grad, 2 / 3 * torch.stack(copies).sum((1, 2)))


def test_constant_weights_get_the_sum_of_the_noises_in_one_draw():
    x = torch.linspace(0, 3, 5001, requires_grad=True)
    given = noisy(x, torch.tensor([0.4, 0.3]), (2, 3), generator(5))
    off = given.detach() - (1 / 3 + 2 / 3 * 0.7) * x.detach()
    size = 2 / 3 * math.hypot(0.4 * 3 / 3, 0.3 * 3 / 7) / 2
    assert off.std() == pytest.approx(size, rel=0.05)
    assert abs(off.mean()) < size / 20
    given.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 3))


def test_a_convolution_runs_once_on_its_rectified_input_with_noise():
    layer = QuantizedConv2d(3, 4, 3, bits=(4, 8), bias=False)
    x = torch.randn(2, 3, 5, 7, generator=generator(7))
    net = supple.elastic(layer, x, axes=[supple.Operator()], verify=False)
    mixture = QuantNASSR().relaxation()
    seen = []
    layer._conv_forward = lambda x, weight, bias: seen.append((x, weight)) or x
    with mixture.applied(net, {"precision": COIN}):
        layer(x)
        layer(x)
    del layer._conv_forward
    (given, weight), again = seen
    # Half of the noise of 4 bits outweighs that of 8: (range / 15) / 2, by half and two thirds.
    for noised, clean in ((given, x.relu()), (weight, layer.weight.detach())):
        off = noised.detach() - clean
        size = float((clean.max() - clean.min()) / 15 / 2 / 3 * math.hypot(1, 15 / 255))
        assert off.std() == pytest.approx(size, rel=0.25)
        assert abs(off.mean()) < size / 2
    assert torch.equal(given, again[0])
    assert torch.equal(weight, again[1])
    assert "forward" not in vars(layer.precision)


def test_noise_is_drawn_anew_for_each_forward():
    run = started()
    outputs = []
    for _ in range(2):
        with run.relaxed():
            outputs.append(run.net.module(X))
    assert not torch.equal(*outputs)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = QuantizedConv2d(3, 4, 3)
        self.again = True

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)


def test_what_backward_recomputes_has_the_same_noise():
    x = torch.randn(2, 3, 5, 5, generator=generator(2))
    net = supple.elastic(Checkpointed(), x, axes=[supple.Operator()], verify=False)
    weight = net.module.inner.weight
    gradients = []
    for again in (True, False):
        net.module.again, weight.grad = again, None
        mixture = QuantNASSR().relaxation().drawing_from(generator(3))
        with mixture.applied(net, {"inner.precision": COIN}):
            out = net.module(x)
        out.square().sum().backward()
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------------- BitOps


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = QuantizedConv2d(1, 4, 3, bits=(8,))
        self.cell = Choice(
            nn.Identity(),
            QuantizedConv2d(4, 4, 1),
            nn.Sequential(QuantizedConv2d(4, 4, (3, 1)), QuantizedConv2d(4, 4, (1, 3))),
        )

    def forward(self, x):
        return self.cell(self.stem(x))


@pytest.fixture(scope="module")
def mixed():
    x = torch.zeros(1, 1, 5, 7)
    return supple.elastic(Mixed(), x, axes=[supple.Operator()], verify=False)


def test_bit_operations_are_counted_by_hand(mixed):
    count = BitOps(mixed)
    stem = 35 * 36 * 64
    assert count({"cell": 0}) == stem
    assert count({"cell": 1, "cell.options.1.precision": 1}) == stem + 35 * 16 * 64
    config = {"cell": 2, "cell.options.2.0.precision": 0, "cell.options.2.1.precision": 1}
    assert count(config) == stem + 35 * 48 * (16 + 64)


def test_expected_bit_operations_are_the_mean_over_draws_and_differentiable(mixed):
    count = BitOps(mixed)
    weights = {
        site.name: torch.linspace(1, 2, len(site.choices)).softmax(0).requires_grad_()
        for site in mixed.space.sites
    }
    mean = 0.0
    for row in mixed.space.every():
        config = mixed.space.decode(row)
        shares = [weights[name][choice] for name, choice in config.items()]
        mean = mean + torch.stack(shares).prod() * count(config)
    expected = count.expected(weights)
    torch.testing.assert_close(expected, mean.double())
    names = ["cell", "cell.options.2.0.precision"]
    given = torch.autograd.grad(expected, [weights[n] for n in names])
    wanted = torch.autograd.grad(mean, [weights[n] for n in names])
    assert given[1][1] - given[1][0] == pytest.approx(float(wanted[1][1] - wanted[1][0]))
    even = {name: torch.full_like(w, 1 / len(w)) for name, w in weights.items()}
    assert float(count.relative(even)) == pytest.approx(1.0)


def test_what_cannot_be_counted_is_refused():
    net = RelaxedSearch.toy()
    with pytest.raises(UnsupportedModelError, match="has no convolution whose bits"):
        BitOps(net)


# -------------------------------------------------------------------------------- the decision


def test_the_joint_entropy_is_that_of_all_networks(mixed):
    weights = {
        site.name: torch.arange(1.0, len(site.choices) + 1).softmax(0)
        for site in mixed.space.sites
    }
    expected = 0.0
    for row in mixed.space.every():
        config = mixed.space.decode(row)
        share = torch.stack([weights[n][choice] for n, choice in config.items()]).prod()
        expected -= share * share.log()
    torch.testing.assert_close(joint_entropy(weights), expected)


def test_entropy_and_its_gradient_are_finite_where_all_is_decided():
    alpha = torch.tensor([500.0, -500.0], requires_grad=True)
    found = joint_entropy({"cell": alpha.softmax(0)})
    found.backward()
    assert found == 0
    assert alpha.grad.tolist() == [0.0, 0.0]


def test_a_module_inside_options_is_there_as_often_as_these_are():
    weights = {"a": torch.tensor([0.25, 0.75]), "a.options.1.b": COIN}
    assert presence("a.options.1.b.options.0.conv", weights) == 0.375
    assert presence("a.options.10", {"a": torch.arange(11.0)}) == 10
    assert presence("aa.options.1", weights) == 1


def test_the_pull_to_decide_is_linear_times_the_authors_logarithm():
    epochs, warm_up, quiet = 20, 9, 2
    for epoch in range(warm_up + quiet, epochs):
        authors = math.log(epoch - quiet - warm_up + 2, epochs - quiet - warm_up + 1)
        # They stay quiet for a quarter of the epochs, rounded down.
        time = 0.25 + 0.75 * (epoch - warm_up - quiet) / (epochs - 1 - warm_up - quiet)
        assert pull_to_decide(time) == pytest.approx(time * authors)
    assert pull_to_decide(0.24) == 0


def test_alphas_rest_until_the_delay_is_over():
    run = started(steps=4, delay=0.5, lr=0.1)
    before = {name: alpha.detach().clone() for name, alpha in run.alphas.items()}
    assert [sorted(run.step(BATCH)) for _ in range(2)] == [["weights"], ["weights"]]
    assert all(torch.equal(alpha, before[name]) for name, alpha in run.alphas.items())
    assert sorted(run.step(BATCH)) == ["alphas", "weights"]
    assert not any(torch.equal(alpha, before[name]) for name, alpha in run.alphas.items())


def test_the_penalties_are_weighed_as_set():
    run = started(steps=5, delay=0.0, entropy=0.5, bit_ops=3.0)
    run.weights.steps = 4
    weights = run.mixture()
    penalty = run.method.penalty(run, weights)
    expected = 0.5 * joint_entropy(weights) + 3.0 * BitOps(run.net).relative(weights)
    torch.testing.assert_close(penalty, expected)


def test_a_dear_search_takes_fewer_bits_and_decides():
    run = started(steps=40, delay=0.0, lr=0.2, bit_ops=100.0, entropy=10.0)
    for _ in range(40):
        run.step(BATCH)
    assert dict(run.derive()) == {"2": 0, "2.options.0.precision": 0}
    assert joint_entropy(run.mixture()) < 0.3 * 2 * math.log(2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"entropy": -1.0}, "entropy must be at least 0"),
        ({"bit_ops": -1.0}, "bit_ops must be at least 0"),
        ({"delay": 1.0}, r"delay must lie in \[0, 1\)"),
        ({"order": "second"}, "order must be 'first'"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(SettingError, match=message):
        QuantNASSR(**wrong)


def test_a_search_needs_to_know_its_length():
    with pytest.raises(SettingError, match="pass steps="):
        started(steps=None).step(BATCH)
