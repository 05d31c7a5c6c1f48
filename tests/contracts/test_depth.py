"""`DESIGN.md`, section 4, Depth: what leaving a block out does to those that stay.

Cached decoding is compared in `tests/test_generation.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from supple.axes.depth import Depth
from supple.network import elastic
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


@pytest.mark.xfail(strict=True, reason="a block that is called several times must stay")
def test_depth_is_per_call() -> None:
    net = elastic(shake(Repeated()), torch.randn(4, 5), verify=False)
    assert net.space.site("blocks.depth").choices == (1, 2, 3)
    assert_active_equals_extracted(net, {"blocks.depth": 2})
