"""Zero-cost proxies against hand-computed values, at sizes as in networks of that size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import supple
from supple import proxies
from supple.errors import SettingError
from supple.layers.choice import Choice
from supple.study.evaluate import Costs, Evaluator


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Choice(nn.Linear(6, 8), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8)))
        self.down = nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.blocks(self.norm(self.stem(x))))


def squared(output, batch):
    return output.square().mean()


PROXIES = {
    "params": proxies.params,
    "macs": proxies.macs,
    "gradient_norm": lambda model, batch: proxies.gradient_norm(model, batch, squared),
    "snip": lambda model, batch: proxies.snip(model, batch, squared),
    "synflow": proxies.synflow,
    "naswot": lambda model, batch: proxies.naswot(model, batch[[1, 2, 5]], "*.up"),
    "jacobian_covariance": proxies.jacobian_covariance,
    "w_pca": lambda model, batch: proxies.w_pca(model, batch, "*.down"),
}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Network().eval()
    axes = [supple.Width(), supple.Depth(), supple.Operator()]
    return supple.elastic(model, torch.ones(2, 3), axes=axes, verify=False)


@pytest.fixture(scope="module")
def batch():
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(0))


def test_params_and_macs_are_those_of_the_closed_forms_at_every_size(net, batch):
    configs = [net.space.decode(row) for row in net.space.random_many(12, 0)]
    costs = net.costs(configs)
    for place, config in enumerate(configs):
        with net.at(config):
            assert proxies.params(net.module, batch) == costs["params"][place]
            assert proxies.macs(net.module, batch) == costs["macs"][place] / 2 * 24


def test_what_an_axis_adds_is_no_parameter_of_a_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2))
    x = torch.ones(1, 3, 6, 6)
    net = supple.elastic(model, x, axes=[supple.Kernel(transform=True)], verify=False)
    for config in (net.space.smallest(), net.space.largest()):
        with net.at(config):
            assert proxies.params(model) == net.costs([config])["params"][0]


@pytest.mark.parametrize("name", PROXIES)
def test_at_a_size_it_is_that_of_the_extracted_network(net, batch, name):
    proxy = PROXIES[name]
    values = set()
    for row in net.space.random_many(4, 1):
        config = net.space.decode(row)
        with torch.no_grad(), net.at(config):
            at = proxy(net.module, batch)
        with pytest.warns(supple.errors.SuppleWarning):
            alone = net.extract(config)
        assert at == pytest.approx(proxy(alone, batch), rel=1e-4)
        values.add(at)
    assert len(values) > 1


@pytest.mark.parametrize("name", PROXIES)
def test_the_network_stays_as_it_was(batch, name):
    torch.manual_seed(0)
    model = Network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = [dict(vars(module)) for module in model.modules()]
    PROXIES[name](model, batch)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [list(vars(module)) for module in model.modules()] == [list(one) for one in seen]


def test_gradients_of_a_linear_layer_are_its_inputs():
    model = nn.Linear(2, 1)
    model.weight.data = torch.tensor([[2.0, -0.5]])
    batch = torch.tensor([[1.0, 3.0], [2.0, 1.0]])
    norm = proxies.gradient_norm(model, batch, lambda output, _: output.sum())
    assert norm == pytest.approx(5.0)  # of (3, 4)
    assert proxies.snip(model, batch, lambda output, _: output.sum()) == pytest.approx(8.0)


def test_weights_that_take_no_gradients_are_refused():
    model = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(SettingError, match="requires_grad"):
        proxies.gradient_norm(model, torch.ones(1, 2), squared)


def test_synflow_counts_the_flow_once_per_layer_whatever_signs_and_data():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
    model[2].weight.data = torch.tensor([[5.0, -6.0]])
    flow = 5 * (1 + 2) + 6 * (3 + 4)
    assert proxies.synflow(model, torch.randn(7, 2)) == 2 * flow


def test_naswot_is_the_determinant_of_how_many_codes_agree():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    batch = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])  # one of three places agrees
    assert proxies.naswot(model, batch, "0") == pytest.approx(math.log(3 * 3 - 1 * 1))
    assert proxies.naswot(model, batch[[0, 0]], "1") == -math.inf


def test_the_jacobian_tells_alike_reactions_from_different_ones():
    batch = torch.randn(3, 5)
    alike = proxies.jacobian_covariance(nn.Linear(5, 2), batch)
    k = 1e-5
    hand = -(math.log(3 + k) + 1 / (3 + k)) - 2 * (math.log(k) + 1 / k)
    assert alike == pytest.approx(hand, rel=1e-3)
    apart = proxies.jacobian_covariance(nn.Sequential(nn.Linear(5, 9), nn.Tanh()), batch * 9)
    assert alike < apart <= -3


def test_the_jacobian_of_tokens_is_taken_at_the_embedding():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 2))
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    embedded = model[0](tokens).detach()
    expected = proxies.jacobian_covariance(model[1:], embedded)
    assert proxies.jacobian_covariance(model, tokens, layer="0") == pytest.approx(expected)
    with pytest.raises(SettingError, match="layer="):
        proxies.jacobian_covariance(model, tokens)


def test_principal_components_against_known_variances():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(40, 4, generator=generator, dtype=torch.float64))
    basis = basis - basis.mean(0)
    basis, _ = torch.linalg.qr(basis)  # centred and orthogonal: variances are the squares
    tokens = basis * torch.tensor([0.60, 0.30, 0.09, 0.01]).sqrt() + 7.0
    shares = {0.5: 1, 0.65: 2, 0.85: 2, 0.95: 3, 0.995: 4}
    assert {eta: proxies.principal_components(tokens, eta) for eta in shares} == shares
    assert proxies.principal_components(torch.ones(9, 4)) == 0


def test_w_pca_is_the_parameters_times_the_components_of_all_layers():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 3), nn.Linear(3, 4))
    tokens = torch.randn(4, 10, 2, generator=generator)
    assert proxies.w_pca(model, tokens, "[01]", weighted=False) == 4.0
    assert proxies.w_pca(model, tokens, "*") == 6.0 * (15 + 18 + 16)
    padded = torch.cat([tokens, 1e3 * torch.randn(4, 10, 2, generator=generator)], dim=1)
    padded[..., 1] = 0.0
    mask = torch.arange(20).expand(4, 20) >= 10
    assert proxies.w_pca(model, padded, "0", weighted=False, mask=mask) == 1.0
    assert proxies.w_pca(model, padded, "0", weighted=False, mask=~mask) == 1.0


def test_too_few_tokens_and_wrong_settings_are_refused():
    model = nn.Sequential(nn.Linear(2, 5))
    with pytest.raises(SettingError, match="width 5 need more tokens than that, got 5"):
        proxies.w_pca(model, torch.randn(5, 2), "0")
    with pytest.raises(SettingError, match=r"layers must match .* \(there are: 0"):
        proxies.w_pca(model, torch.randn(9, 2), "fc1")
    with pytest.raises(SettingError, match="eta"):
        proxies.principal_components(torch.randn(9, 2), 1.0)


def test_a_proxy_is_what_a_search_may_evaluate(batch):
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    net = supple.elastic(model, batch, axes=[supple.Width()], verify=False)
    evaluator = Evaluator(net, lambda m: {"synflow": proxies.synflow(m, batch)}, Costs(net, ()))
    config = net.space.smallest()
    alone = proxies.synflow(net.extract(config), batch)
    assert evaluator(config).metrics == pytest.approx({"synflow": alone})
