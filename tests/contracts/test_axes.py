"""`DESIGN.md`, section 4, Axis and Patch: one patch, read by `at`, `extract` and the costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from supple.axes.base import GroupAxis, Patch
from supple.axes.width import Width
from supple.network import elastic
from supple.space import Site
from tests.graph.checks import quietly_extracted, run, shake
from tests.test_network import Tower


def test_at_extract_and_costs_follow_the_same_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An axis that patches another size than was chosen is followed by all three."""
    patch = GroupAxis.patch

    def half(self: GroupAxis, site: Site, choice: int) -> Patch:
        return patch(self, site, choice if choice == site.full else choice // 2)

    net = elastic(shake(Tower(1)), torch.randn(4, 5), axes=[Width((0.5,))], verify=False)
    right = net.costs(net.space.config({"stem": 6}))["params"][0]
    monkeypatch.setattr(GroupAxis, "patch", half)
    net = elastic(shake(Tower(1)), torch.randn(4, 5), axes=[Width((0.5,))], verify=False)
    config = net.space.config({"stem": 6})
    with net.at(config):
        assert net.module.stem.weight.shape == (3, 5)
    small: Any = quietly_extracted(net, config)
    assert small.stem.weight.shape == (3, 5)
    params = net.costs(config)["params"][0]
    assert params == sum(p.numel() for p in small.parameters())
    assert params < right


def test_choices_are_absolute_and_a_prefix() -> None:
    net = elastic(shake(Tower(1)), torch.randn(4, 5), axes=[Width((0.25, 0.5))], verify=False)
    site = net.space.site("stem")
    assert site.choices == (3, 6, 12)
    for choice in site.choices:
        small: Any = net.extract({"stem": choice})
        assert torch.equal(small.stem.weight, net.module.stem.weight[:choice])
    before = run(net.module, net.args, {})[0]
    kept = torch.tensor([1.0, 0.0] * 6)
    chosen = net.module.stem.weight[kept.bool()].clone()
    net.sort({"stem": kept})
    assert torch.allclose(run(net.module, net.args, {})[0], before, atol=1e-5)
    assert torch.equal(net.extract({"stem": 6}).stem.weight, chosen)
