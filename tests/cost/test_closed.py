"""Closed forms equal the count on the extracted network."""

import time
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import supple
from supple.axes.base import Axis, Patch
from supple.cost.closed import COSTS
from supple.cost.count import count
from supple.layers.choice import Choice
from supple.models.base import build
from supple.network import Elastic, elastic
from supple.space import Site
from tests.zoo import ZOO

FAMILIES = ["bert", "llama", "mobilenet_v3", "resnet_option_a", "densenet"]


def counted(net: Elastic, config: supple.Config) -> dict[str, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statistics do not matter to costs
        return count(net.extract(config), net.args, net.kwargs)


def assert_exact(net: Elastic, configs: list[supple.Config]) -> None:
    priced = net.costs(configs)
    for position, config in enumerate(configs):
        got = {name: int(priced[name][position]) for name in COSTS}
        assert got == counted(net, config), config.to_json()


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_forms_equal_the_count_on_random_sizes(family: str) -> None:
    model, args, kwargs = ZOO[family]()
    net = elastic(model, args, kwargs, verify=False)
    drawn = [net.space.random(seed) for seed in range(10)]
    assert_exact(net, [net.space.smallest(), net.space.largest(), *drawn])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_closed_forms_equal_the_count_on_200_random_sizes(family: str) -> None:
    model, args, kwargs = ZOO[family]()
    net = elastic(model, args, kwargs, verify=False)
    assert_exact(net, [net.space.random(seed) for seed in range(200)])


@pytest.mark.parametrize("family", ["gpt2", "t5", "transformer_encoder", "mixtral", "lstm"])
def test_closed_forms_equal_the_count_on_other_families(family: str) -> None:
    model, args, kwargs = ZOO[family]()
    net = elastic(model, args, kwargs, verify=False)
    assert_exact(net, [net.space.smallest(), net.space.random(1)])


class WideValues(nn.Module):
    """Attention whose values are wider than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 6), nn.Linear(8, 6)
        self.value, self.head = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x)[:, None] for part in (self.query, self.key, self.value))
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


def test_attention_with_values_of_another_width_is_priced() -> None:
    net = elastic(WideValues(), (torch.randn(2, 5, 8),), axes=[supple.Width()], verify=False)
    narrow = net.space.smallest()["query"]
    # at equal widths PyTorch takes its fused kernel, which needs other memory
    assert_exact(net, [net.space.largest(), net.space.config(query=narrow)])


def test_every_way_to_skip_blocks_is_priced() -> None:
    model, args, kwargs = ZOO["bert"]()
    net = elastic(model, args, kwargs, axes=[supple.Depth(pattern="any")], verify=False)
    configs = [net.space.config({site.name: 0}) for site in net.space.sites]
    assert_exact(net, configs)


def test_resolution_is_priced() -> None:
    model = build("cifar-resnet", depth=8, widths=(8, 12, 16))
    axes = [supple.Resolution((16, 24, 32)), supple.Width((0.5, 1.0))]
    net = elastic(model, (torch.randn(2, 3, 32, 32),), axes=axes)
    assert "resolution" in {site.axis for site in net.space.sites}
    sizes = [net.space.config(resolution=r) for r in (16, 24, 32)]
    macs = net.costs(sizes)["macs"]
    assert macs[0] < macs[1] < macs[2]
    assert macs.tolist() == [counted(net, config)["macs"] for config in sizes]


@dataclass(frozen=True)
class Operator(Axis):
    """Two activations or a parametrised operator at one place."""

    path: str
    options: tuple[nn.Module, ...]
    name: ClassVar[str] = "operator"

    def sites(self, graph: object) -> list[Site]:
        full = len(self.options)
        return [Site(f"{self.path}.operator", self.name, tuple(range(full + 1)), full)]

    def patch(self, site: Site, choice: int) -> Patch:
        return Patch(modules={self.path: self.options[choice]})


def test_an_operator_axis_is_priced_without_touching_the_core() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    axes = [Operator("1", (nn.Identity(), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))))]
    net = elastic(model, (torch.randn(4, 6),), axes=axes)
    configs = [net.space.config({"1.operator": choice}) for choice in (0, 1, 2)]
    priced = net.costs(configs)
    for name in ("params", "macs", "weight_bytes"):
        assert priced[name].tolist() == [counted(net, c)[name] for c in configs]


def test_options_inside_blocks_that_can_be_skipped_are_priced() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Choice(
                nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inside(x)

    model = nn.Sequential(nn.Linear(3, 6), nn.Sequential(Block(), Block()), nn.Linear(6, 2))
    axes = [supple.Depth(), supple.Operator()]
    net = elastic(model, (torch.ones(2, 3),), axes=axes, verify=False)
    for config in map(net.space.decode, net.space.every()):
        counted = count(net.extract(config), (torch.ones(2, 3),))
        priced = {name: values[0] for name, values in net.costs([config]).items()}
        assert {name: priced[name] for name in ("params", "macs", "weight_bytes")} == {
            name: counted[name] for name in ("params", "macs", "weight_bytes")
        }


def test_encoded_configs_and_configs_give_the_same() -> None:
    model, args, kwargs = ZOO["squeeze_excite"]()
    net = elastic(model, args, kwargs, verify=False)
    configs = [net.space.random(seed) for seed in range(20)]
    rows = net.space.encode_many(configs)
    for name, values in net.costs(rows).items():
        assert np.array_equal(values, net.costs(configs)[name])


@pytest.mark.slow
def test_a_million_configs_a_second() -> None:
    net = elastic(build("mobilenet-v3"), (torch.randn(1, 3, 32, 32),), verify=False)
    rows = net.space.random_many(1_000_000, 0)
    net.costs(rows[:10])
    start = time.process_time()
    net.costs(rows)
    assert time.process_time() - start < 1.0


def test_a_choice_inside_an_option_of_a_choice_counts_what_runs() -> None:
    inner = Choice(nn.Identity(), nn.Linear(4, 4))
    model = nn.Sequential(
        nn.Linear(4, 4),
        Choice(nn.Linear(4, 4), nn.Sequential(inner, nn.Linear(4, 4))),
        nn.Linear(4, 2),
    )
    net = supple.elastic(model, (torch.zeros(1, 4),), axes=[supple.Operator()])
    configs = net.space.decode_many(net.space.every())
    assert len(configs) == 3
    for config in configs:
        priced = {name: int(values[0]) for name, values in net.costs([config]).items()}
        part = net.extract(config)
        assert priced["params"] == sum(p.numel() for p in part.parameters())
        assert priced["weight_bytes"] == 4 * priced["params"]
