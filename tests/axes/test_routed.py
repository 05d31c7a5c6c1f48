"""Routed: experts that a router mixes for each size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.axes.routed import Routed
from supple.axes.width import Width
from supple.errors import SettingError

X = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))
FORMS = ("layer", "neuron")


def network(by="layer", experts=3, where=None, noise=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv1d(4, 8, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        )
    net = supple.elastic(model, X, axes=[Width((0.25, 0.5, 1.0))], verify=False)
    routed = Routed.of(net.space, experts=experts, hidden=5, by=by, where=where, noise=noise)
    net.share(routed)
    return net.eval()


def sharpen(net):
    """Lets routers prefer another expert for each size."""
    with torch.no_grad():
        for name, parameter in net.added_parameters().items():
            if "_out_weight" in name or "_hidden_weight" in name:
                parameter.mul_(6)


def mixture(net, config, path, by):
    """The definition: experts weighed by the softmax of a perceptron of the size."""
    p = dict(net.module.named_parameters())

    def routed(size):
        part = f"{path}.supple_"
        inside = F.linear(size, p[part + "hidden_weight"], p[part + "hidden_bias_weight"])
        out = F.linear(inside.relu(), p[part + "out_weight"], p[part + "out_bias_weight"])
        return out.view(-1, 3).softmax(1)  # (1 or outputs, experts)

    own, full = routed(torch.tensor([config["0"] / 8])), routed(torch.ones(1))
    found = {}
    for leaf in ("weight", "bias"):
        weight = p[f"{path}.{leaf}"]
        apart = [p[f"{path}.supple_expert_{j}_{leaf}"] for j in (1, 2)]

        def by_row(r, like):
            return r.view(-1, *[1] * (like.dim() - 1))

        first = weight - sum(
            by_row(full[:, j], d) * d for j, d in zip((1, 2), apart, strict=True)
        )
        experts = [first, *(first + d for d in apart)]
        found[leaf] = sum(by_row(own[:, j], e) * e for j, e in enumerate(experts))
    assert len(own) == (1 if by == "layer" else len(weight))
    return found


@pytest.mark.parametrize("by", FORMS)
def test_weights_are_the_mixture_of_experts_then_sliced(by):
    net = network(by)
    sharpen(net)
    config = {"0": 4}
    conv, linear = (mixture(net, config, path, by) for path in ("0", "4"))
    hidden = F.conv1d(X, conv["weight"][:4], conv["bias"][:4]).relu().mean(2)
    expected = F.linear(hidden, linear["weight"][:, :4], linear["bias"])
    with net.at(config):
        torch.testing.assert_close(net(X), expected)
    with net.sharing_all(), net.at(config):
        assert not torch.allclose(net(X), expected, atol=1e-3)


@pytest.mark.parametrize("by", FORMS)
def test_the_full_network_is_the_module(by):
    net = network(by)
    sharpen(net)
    with net.at({"0": 8}):
        inside = net(X)
    assert torch.equal(inside, net.module(X))
    with net.sharing_all(), net.at({"0": 8}):
        assert torch.equal(net(X), inside)


@pytest.mark.parametrize("by", FORMS)
@pytest.mark.parametrize("width", [2, 4, 8])
def test_extracted_sizes_hold_plain_tensors_and_compute_the_same(by, width):
    net = network(by)
    sharpen(net)
    alone = net.extract({"0": width})
    assert not any("supple_" in name for name in alone.state_dict())
    with net.at({"0": width}):
        torch.testing.assert_close(alone(X), net(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", FORMS)
def test_routers_tell_sizes_apart(by):
    net = network(by)
    routing = [net.sharing.routing({"0": width}, net.module)["0"] for width in (2, 4, 8)]
    assert routing[0].shape == ((3,) if by == "layer" else (8, 3))
    for each in routing:
        torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:-1]))
    assert torch.stack(routing).var(0).max() > 1e-5


def test_gradients_reach_experts_routers_and_the_module():
    net = network()
    with net.at({"0": 4}):
        net(X).square().sum().backward()
    for name, parameter in net.module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_only_named_layers_are_mixed():
    net = network(where="4")
    assert {name.partition(".")[0] for name in net.added_parameters()} == {"4"}


def test_a_mixture_is_saved_and_loaded(tmp_path):
    net = network("neuron")
    sharpen(net)
    net.save(tmp_path / "net")
    again = supple.load(tmp_path / "net", model=copy.deepcopy(net.module))
    assert again.sharing == net.sharing
    with net.at({"0": 2}), again.eval().at({"0": 2}):
        assert torch.equal(again(X), net(X))


def test_noise_depends_on_the_name_only():
    one, two = network().added_parameters(), network().added_parameters()
    assert all(torch.equal(one[name], two[name]) for name in one)
    experts = [one[f"0.supple_expert_{j}_weight"] for j in (1, 2)]
    assert not torch.equal(*experts)
    torch.testing.assert_close(
        experts[0].std(), network().module[0].weight.std(), rtol=0.25, atol=0
    )


@pytest.mark.parametrize(
    ("name", "value"), [("experts", 1), ("hidden", 0), ("by", "token"), ("noise", 0.0)]
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        Routed(**{name: value})
