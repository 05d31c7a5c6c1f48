"""Mixtures of weights: against sums of padded slices, and against sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

import supple
from supple.errors import SettingError, UnsupportedModelError
from supple.search._entangled import EntangledMixture

MIXTURE = EntangledMixture()


class Residual(nn.Module):
    """Convolutions that keep the width: one site slices two dimensions of the first."""

    def __init__(self, channels):
        super().__init__()
        self.same = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.norm(self.same(x).relu())


class Attention(nn.Module):
    """Self-attention with a fused projection, and a feed-forward part."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        parts = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_dim)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(*x.shape[:2], self.heads * self.head_dim))
        return x + self.down(self.up(x).relu())


class Adds(nn.Module):
    """A residual block that adds a number times its input, and gives something beside."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))
        self.inner = nn.Linear(2, 2, bias=False)

    def forward(self, beside, x):
        return x + self.factor * x + 0 * self.inner(x), beside


class Stacked(nn.Module):
    def __init__(self, factors):
        super().__init__()
        self.blocks = nn.ModuleList(map(Adds, factors))

    def forward(self, x):
        beside = torch.zeros(1)
        for block in self.blocks:
            x, beside = block(beside, x)
        return x


def seeded(build, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args)


def conv_model():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        Residual(6),
        nn.Conv2d(6, 5, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def elastic(model, x, *axes):
    return supple.elastic(model, x, axes=list(axes), verify=False)


def conv_net(transform=False):
    axes = supple.Kernel((1, 3, 5), transform=transform), supple.Width((2, 3, 5, 6))
    net = elastic(seeded(conv_model), torch.zeros(2, 1, 6, 6), *axes)
    if transform:
        with torch.no_grad():
            for parameter in net.added_parameters().values():
                parameter += torch.randn(parameter.shape, generator=generator())
    return net


CONV = conv_net()


def generator():
    return torch.Generator().manual_seed(3)


def drawn(net, grad=False):
    source = generator()
    return {
        site.name: torch.rand(len(site.choices), generator=source)
        .softmax(0)
        .requires_grad_(grad)
        for site in MIXTURE.sites(net)
    }


def hot(net, config):
    return {
        site.name: torch.tensor(
            [float(config.get(site.name, site.full) == c) for c in site.choices]
        )
        for site in MIXTURE.sites(net)
    }


def padded(small, like):
    """Zeros behind along widths, and on both sides along kernels."""
    edges = []
    for dim in reversed(range(like.dim())):
        missing = like.shape[dim] - small.shape[dim]
        edges += [missing // 2, missing // 2] if dim > 1 else [0, missing]
    return F.pad(small, edges)


def summed(net, weights, name):
    """The sum over all combinations of choices of the sites that concern a tensor."""
    tensor = dict(net.module.named_parameters())[name].detach()
    sites = [
        site
        for site in MIXTURE.sites(net)
        if any(
            net.plan(net.space.config({site.name: c})).sliced(name, tensor).shape
            != tensor.shape
            for c in site.choices
        )
    ]
    total = torch.zeros_like(tensor)
    for picks in itertools.product(*(range(len(site.choices)) for site in sites)):
        config = {s.name: s.choices[i] for s, i in zip(sites, picks, strict=True)}
        product = torch.tensor(1.0)
        for site, i in zip(sites, picks, strict=True):
            product = product * weights[site.name][i]
        small = net.plan(net.space.config(config)).sliced(name, tensor)
        total += product.detach() * padded(small.detach(), tensor)
    return total, len(sites)


@pytest.mark.parametrize("net", [CONV, conv_net(transform=True)], ids=["centres", "transforms"])
def test_it_is_the_sum_of_all_padded_slices(net):
    weights = drawn(net)
    concerned = {}
    with MIXTURE.applied(net, weights):
        for name, _ in net.module.named_parameters():
            if "supple_" not in name:
                expected, concerned[name] = summed(net, weights, name)
                path, _, leaf = name.rpartition(".")
                given = getattr(net.module.get_submodule(path), leaf)
                torch.testing.assert_close(
                    given, expected, msg=lambda text, n=name: f"{n} {text}"
                )
    # kernel and width; the residual's width once, though it slices two dimensions; two widths
    assert concerned["0.weight"] == 2
    assert concerned["3.same.weight"] == 2
    assert concerned["4.weight"] == 3
    assert concerned["3.norm.weight"] == concerned["8.weight"] == 1
    assert concerned["8.bias"] == 0


def test_a_square_matrix_of_one_site_is_no_product():
    # by hand: choices 1 and 2 of 2 with weights 0.3 and 0.7
    model = nn.Sequential(nn.Linear(1, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 1))
    block = type("Block", (nn.Module,), {"forward": lambda self, x: x + self.f(x)})()
    block.f = model[1]
    net = elastic(
        nn.Sequential(model[0], block, model[2]), torch.zeros(3, 1), supple.Width(None)
    )
    (site,) = MIXTURE.sites(net)
    with torch.no_grad():
        block.f[0].weight.fill_(1.0)
    with MIXTURE.applied(net, {site.name: torch.tensor([0.3, 0.7])}):
        given = block.f[0].weight
    torch.testing.assert_close(given, torch.tensor([[1.0, 0.7], [0.7, 0.7]]))


@pytest.mark.parametrize("seed", range(3))
def test_one_choice_alone_computes_what_the_size_does(seed):
    net = CONV
    x = torch.randn(4, 1, 6, 6, generator=generator())
    config = net.space.random(seed)
    with net.at(config):
        expected = net.module(x)
    with MIXTURE.applied(net, hot(net, config)):
        torch.testing.assert_close(net.module(x), expected)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_and_widths_of_attention_are_mixed(heads):
    model = seeded(lambda: nn.Sequential(Attention(8, 4), Attention(8, 4), nn.Linear(8, 2)))
    axes = supple.Heads(None), supple.Width((3, 12), where="*.up"), supple.Depth(pattern="any")
    net = elastic(model, torch.zeros(2, 5, 8), *axes)
    sites = {site.axis: site for site in MIXTURE.sites(net)}
    assert set(sites) == {"heads", "width", "depth"}
    x = torch.randn(2, 5, 8, generator=generator())
    config = net.space.config({sites["heads"].name: heads, sites["width"].name: 3})
    with net.at(config):
        expected = net.module(x)
    with MIXTURE.applied(net, hot(net, config)):
        torch.testing.assert_close(net.module(x), expected)


def test_depths_add_up_what_stands_after_each_number_of_blocks():
    net = elastic(Stacked((1, 2, 3)), torch.ones(1, 2), supple.Depth())
    (site,) = MIXTURE.sites(net)
    assert site.choices == (1, 2, 3)
    x = torch.tensor([[1.0, -2.0]])
    weights = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    with MIXTURE.applied(net, {site.name: weights}):
        output = net.module(x)
    # after one, two and three blocks the input is multiplied by 2, 6 and 24
    torch.testing.assert_close(output, (0.2 * 2 + 0.3 * 6 + 0.5 * 24) * x)
    output[0, 0].backward()
    torch.testing.assert_close(weights.grad, torch.tensor([2.0, 6.0, 24.0]))
    torch.testing.assert_close(net.module(x), 24 * x)


def test_a_block_of_its_own_adds_up_output_and_input():
    net = elastic(Stacked((1, 2)), torch.ones(1, 2), supple.Depth(pattern="any"))
    first, second = MIXTURE.sites(net)
    x = torch.tensor([[1.0, -2.0]])
    weights = {first.name: torch.tensor([0.25, 0.75]), second.name: torch.tensor([1.0, 0.0])}
    with MIXTURE.applied(net, weights):
        torch.testing.assert_close(net.module(x), (0.25 + 0.75 * 2) * x)


def test_what_can_not_be_mixed_is_no_site():
    even = elastic(Stacked((1, 2, 3, 4)), torch.ones(1, 2), supple.Depth(pattern="even"))
    assert not MIXTURE.sites(even)
    assert {site.axis for site in MIXTURE.sites(CONV)} == {"width", "kernel"}
    with (
        pytest.raises(SettingError, match="can't be mixed"),
        MIXTURE.applied(even, {even.space.names[0]: torch.ones(4)}),
    ):
        pass


def test_gradients_reach_owners_and_weights_after_the_block():
    net = conv_net()
    weights = drawn(net, grad=True)
    x = torch.randn(4, 1, 6, 6, generator=generator())
    with MIXTURE.applied(net, weights):
        loss = net.module(x).square().sum()
    loss.backward()
    assert all(each.grad.abs().min() > 0 for each in weights.values())
    assert all(p.grad is not None for p in net.module.parameters())
    kept = {name: each.grad[1].item() for name, each in weights.items()}
    for name in kept:
        moved = []
        for step in (1e-3, -1e-3):
            there = {key: each.detach().double() for key, each in weights.items()}
            there[name][1] += step
            double = net.on(net.module)
            double.module.double()
            with torch.no_grad(), MIXTURE.applied(double, there):
                moved.append(double.module(x.double()).square().sum().item())
        net.module.float()
        assert kept[name] == pytest.approx((moved[0] - moved[1]) / 2e-3, rel=1e-3)


def test_it_leaves_nothing_behind_and_may_be_entered_twice():
    net = elastic(Stacked((1, 2, 3)), torch.ones(1, 2), supple.Depth())
    (site,) = MIXTURE.sites(net)
    x = torch.ones(1, 2)
    last, first = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    with MIXTURE.applied(net, {site.name: first}):
        with MIXTURE.applied(net, {site.name: last}):
            torch.testing.assert_close(net.module(x), 24 * x)
        torch.testing.assert_close(net.module(x), 2 * x)
    with pytest.raises(ZeroDivisionError), MIXTURE.applied(CONV, drawn(CONV)):
        raise ZeroDivisionError
    for module in (*net.module.modules(), *CONV.module.modules()):
        assert not {"forward", "weight", "bias"} & set(vars(module))


def test_running_statistics_stay_as_they_are():
    net = conv_net()
    before = net.module[1].running_mean.clone()
    with MIXTURE.applied(net, drawn(net)):
        net.module(torch.ones(4, 1, 6, 6))
    torch.testing.assert_close(net.module[1].running_mean, before)


def test_blocks_that_are_computed_again_one_by_one_are_refused():
    class Checkpointed(Stacked):
        def forward(self, x):
            beside = torch.zeros(1)
            for block in self.blocks:
                x, beside = checkpoint.checkpoint(block, beside, x, use_reentrant=False)
            return x

    net = elastic(Checkpointed((1, 2, 3)), torch.ones(1, 2), supple.Depth())
    (site,) = MIXTURE.sites(net)
    with MIXTURE.applied(net, {site.name: torch.ones(3) / 3}):
        output = net.module(torch.ones(1, 2))
    with pytest.raises(UnsupportedModelError, match="checkpointing"):
        output.sum().backward()
