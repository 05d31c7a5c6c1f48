"""Experts: routers, stacked expert tensors and the number of visited experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import supple
from supple.cost.count import count
from supple.errors import SettingError
from supple.network import Elastic, elastic
from tests.zoo.experts import SoftMixture, qwen3_moe


def soft(visited: int = 2) -> Elastic:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), SoftMixture(12, 16, 6, visited), nn.Linear(12, 3))
    return elastic(model, torch.randn(4, 7, 5))


def names(net: Elastic) -> dict[str, tuple[int, ...]]:
    return {site.name: site.choices for site in net.space.sites if site.axis == "experts"}


def test_experts_and_visits_are_sites() -> None:
    assert names(soft()) == {"1.num_experts": (2, 3, 4, 6), "1.top_k": (1, 2)}


def test_a_layer_keeps_as_many_experts_as_are_visited() -> None:
    assert names(soft(visited=4))["1.num_experts"] == (4, 6)


def test_dropped_experts_have_no_rows_in_the_router_and_no_weights() -> None:
    net = soft()
    small = net.extract({"1.num_experts": 3, "1.top_k": 1})
    block = small[1]  # type: ignore[index]
    assert block.router.weight.shape == (3, 12)
    assert block.up.shape == (3, 12, 16)
    assert block.down.shape == (3, 16, 12)
    assert block.visited == 1


def test_sorting_experts_changes_nothing_at_full_size() -> None:
    net = soft()
    x = net.args[0]
    before = net(x)
    net.sort({"1.num_experts": torch.tensor([0.0, 5, 1, 4, 2, 3])})
    assert torch.allclose(net(x), before, atol=1e-5)
    net.sort()


def test_stacked_experts_behind_a_grouped_product_cost_what_is_counted() -> None:
    model, args, kwargs = qwen3_moe()
    net = elastic(model, args, kwargs)
    site = "model.layers.1.mlp"
    assert names(net) == {f"{site}.num_experts": (3, 4, 6), f"{site}.top_k": (1, 2, 3)}
    generator = np.random.default_rng(0)
    for _ in range(3):
        config = net.space.random(generator)
        counted = count(net.extract(config), args, kwargs)
        priced = net.costs(config)
        assert {name: int(priced[name][0]) for name in counted} == counted


def test_a_token_that_visits_fewer_experts_costs_in_proportion() -> None:
    model, args, kwargs = qwen3_moe()
    net = elastic(model, args, kwargs, axes=[supple.Experts()], verify=False)
    site = "model.layers.1.mlp.top_k"
    macs = [int(net.costs(net.space.config({site: visits}))["macs"][0]) for visits in (1, 2, 3)]
    tokens, width, inner = kwargs["input_ids"].numel(), 48, 36
    assert macs[1] - macs[0] == macs[2] - macs[1] == tokens * 3 * width * inner


class ByNumber(nn.Module):
    """Computes with the numbers of the experts themselves: they are no longer alike."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 6)
        self.weights = nn.Parameter(torch.randn(6, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        best = self.router(x).argmax(-1)
        return (x.unsqueeze(1) @ self.weights[best]).squeeze(1) * best.unsqueeze(-1)


def test_experts_whose_numbers_are_computed_with_are_fixed() -> None:
    net = supple.elastic(nn.Sequential(nn.Linear(4, 5), ByNumber()), torch.randn(8, 4))
    assert names(net) == {}
    assert any(
        f.name == "1.weights[0]" and "computes with positions" in f.reason
        for f in net.space.fixed
    )


class Codebook(nn.Module):
    """The nearest of some codes, looked up in the table that was compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        apart = (x.unsqueeze(1) - self.codes).pow(2).sum(-1)
        return self.codes[apart.argmin(-1)]


def test_what_is_compared_with_and_looked_up_is_one_dimension() -> None:
    net = supple.elastic(
        nn.Sequential(nn.Linear(4, 5), Codebook(), nn.Linear(5, 3)), torch.randn(9, 4)
    )
    assert net.verify().ok


@pytest.mark.parametrize("setting", [{"choices": (0,)}, {"top_k": (1.5,)}, {"top_k": ()}])
def test_bad_choices_are_refused(setting: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(SettingError, match="choices of experts"):
        supple.Experts(**setting)
