"""`DESIGN.md`, section 4, Depth: what leaving a block out does to those that stay.

Cached decoding is compared in `tests/test_generation.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supple.axes.depth import Depth
from supple.cost.closed import COSTS
from supple.cost.count import count
from supple.network import Elastic, elastic
from supple.storage import load, save
from tests.graph.checks import assert_active_equals_extracted, shake
from tests.test_network import Residual, zoo_net


def test_skipping_renumbers_cache_slots_in_at_and_extract() -> None:
    net = zoo_net("llama", [Depth(pattern="any")])
    config = {"model.layers.1.keep": 0}
    with net.at(config):
        assert [b.self_attn.layer_idx for b in net.module.model.layers] == [0, 1]
    assert [b.self_attn.layer_idx for b in net.module.model.layers] == [0, 1, 2]
    assert [b.self_attn.layer_idx for b in net.extract(config).model.layers] == [0, 1]


def test_skipping_shortens_lists_with_an_entry_per_layer_in_at_and_extract() -> None:
    net = zoo_net("llama", [Depth(pattern="any")])
    kinds = ["first", "second", "third"]
    net.module.config.kinds = kinds
    config = {"model.layers.1.keep": 0}
    with net.at(config):
        assert net.module.config.kinds == ["first", "third"]
    assert net.module.config.kinds is kinds
    assert net.extract(config).config.kinds == ["first", "third"]


def test_a_block_whose_state_others_use_is_fixed_with_the_reason() -> None:
    net = zoo_net("t5", [Depth()])
    reasons = {fixed.name: fixed.reason for fixed in net.space.fixed}
    for stack in ("encoder", "decoder"):
        assert "is used later" in reasons[f"{stack}.block.0"]
        assert net.space.site(f"{stack}.block.depth").full == 2


class Repeated(nn.Module):
    """One block that is called three times, as ALBERT's is."""

    def __init__(self) -> None:
        super().__init__()
        block = Residual(12, 16)
        self.stem, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList([block, block, block])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_module_that_is_called_several_times_is_one_width_site() -> None:
    net = elastic(shake(Repeated()), torch.randn(4, 5), verify=False)
    widths = [site.name for site in net.space.sites if site.axis == "width"]
    assert widths == ["stem", "blocks.0.up"]
    assert_active_equals_extracted(net, net.space.smallest())


class Counted(nn.Module):
    """One block that is called as often as an attribute says."""

    def __init__(self, times: int = 4) -> None:
        super().__init__()
        self.times = times
        self.stem, self.block, self.head = nn.Linear(5, 12), Residual(12, 16), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.times):
            x = self.block(x)
        return self.head(x)


class Literal(Counted):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return self.head(x)


def counted() -> Elastic:
    return elastic(shake(Counted()), torch.randn(4, 5), verify=False)


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_depth_is_per_call(calls: int) -> None:
    net = counted()
    assert net.space.site("block.calls").choices == (1, 2, 3, 4)
    assert_active_equals_extracted(net, {"block.calls": calls})
    assert net.extract({"block.calls": calls}).times == calls
    assert net.module.times == 4


@pytest.mark.parametrize("make", [counted, lambda: zoo_net("albert")])
def test_costs_follow_the_number_of_calls(make: Callable[[], Elastic]) -> None:
    net = make()
    site = next(s for s in net.space.sites if s.name.endswith(".calls"))
    rng = np.random.default_rng(0)
    for calls in site.choices:
        config = {s.name: int(rng.choice(s.choices)) for s in net.space.sites}
        chosen = net.space.config({**config, site.name: calls})
        counted_ = count(net.extract(chosen), net.args, net.kwargs)
        assert {k: int(v[0]) for k, v in net.costs(chosen).items()} == {
            k: counted_[k] for k in COSTS
        }


def test_a_network_with_fewer_calls_comes_back(tmp_path: Path) -> None:
    extracted = counted().extract({"block.calls": 2})
    save(extracted, tmp_path / "small")
    loaded = load(tmp_path / "small", model=Counted())
    x = torch.randn(4, 5)
    assert loaded.times == 2
    assert torch.equal(loaded(x), extracted(x))


def test_a_literal_number_of_calls_is_fixed_with_the_reason() -> None:
    net = elastic(shake(Literal()), torch.randn(4, 5), verify=False)
    assert not [s for s in net.space.sites if s.axis == "depth"]
    reasons = {fixed.name: fixed.reason for fixed in net.space.fixed}
    assert reasons["block"] == "it is called 3 times, which no integer of the model says"


@pytest.mark.xfail(strict=True, reason="no integer says how long a list of one module is")
def test_depth_is_per_call_in_a_list_of_one_module() -> None:
    net = elastic(shake(Repeated()), torch.randn(4, 5), verify=False)
    assert net.space.site("blocks.depth").choices == (1, 2, 3)
    assert_active_equals_extracted(net, {"blocks.depth": 2})
