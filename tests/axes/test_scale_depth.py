"""Scale depth: late positions run through evenly spaced blocks, early ones through all."""

from __future__ import annotations

import pytest
import torch

import supple
from supple.axes.scale_depth import ScaleDepth, ScaleDepthSite
from supple.cost.count import count
from supple.errors import SettingError
from supple.models.base import build

SITE = "blocks.scale_depth"


def net(num_layers: int = 8, early: int = 5, **settings):
    torch.manual_seed(0)
    model = build("var", dim=10, num_layers=num_layers, num_heads=2, hidden=11)
    inputs = (torch.randint(16, (3, 85)), torch.arange(3))
    axis = ScaleDepth(early=early, **settings)
    return supple.elastic(model, inputs, axes=[axis], verify=False), inputs


@pytest.mark.parametrize(
    ("layers", "depth", "kept"),
    [
        (8, 2, [0, 7]),
        (8, 4, [0, 2, 4, 7]),
        (8, 5, [0, 1, 3, 5, 7]),
        (30, 8, [0, 4, 8, 12, 16, 20, 24, 29]),
    ],
)
def test_blocks_of_late_scales_are_evenly_spaced_with_the_ends(layers, depth, kept):
    site = ScaleDepthSite(SITE, "scale_depth", (depth, layers), layers, stack="blocks")
    attributes = ScaleDepth(early=5).patch(site, depth).attributes
    assert set(attributes.values()) == {5}
    without = {f"blocks.{i}" for i in range(layers) if i not in kept}
    assert {key.module for key in attributes} == without


def test_blocks_say_how_many_positions_they_take_at_a_size_only():
    elastic, _ = net(4, choices=(2,))
    with elastic.at({SITE: 2}):
        assert [block.tokens for block in elastic.module.blocks] == [85, 5, 5, 85]
    assert [block.tokens for block in elastic.module.blocks] == [85] * 4


def test_a_size_is_the_extracted_network_and_costs_what_it_computes():
    elastic, inputs = net(choices=(2, 4))
    assert elastic.verify().ok
    counted = []
    for depth in (2, 4, 8):
        small = elastic.extract({SITE: depth})
        config = elastic.space.config({SITE: depth})
        counted.append(count(small, inputs)["macs"])
        assert elastic.costs(config)["macs"][0] == counted[-1]
        with elastic.at(config):
            torch.testing.assert_close(elastic.module(*inputs), small(*inputs))
    assert counted[0] < counted[1] < counted[2]


def test_early_logits_are_the_full_networks_and_late_ones_are_not():
    elastic, inputs = net(choices=(2, 4))
    whole = elastic.module(*inputs)
    with elastic.at({SITE: 4}):
        part = elastic.module(*inputs)
    torch.testing.assert_close(part[:, :5], whole[:, :5])
    assert ((part - whole)[:, 5:].abs().amax((0, 2)) > 1e-5).all()


def test_it_goes_together_with_other_axes():
    model = build("var", dim=12, num_layers=4, num_heads=2, hidden=16)
    inputs = (torch.randint(16, (3, 85)), torch.arange(3))
    axes = [ScaleDepth(early=5, choices=(2,)), supple.Width((0.5, 1.0)), supple.Depth((2, 4))]
    elastic = supple.elastic(model, inputs, axes=axes)
    assert {"scale_depth", "width", "depth"} == {site.axis for site in elastic.space.sites}


def test_fractions_are_of_all_blocks_and_all_are_on_offer():
    assert net(choices=(0.25, 0.5))[0].space.site(SITE).choices == (2, 4, 8)


def test_what_cannot_be_used_is_refused():
    with pytest.raises(SettingError, match="2 of the 3"):
        net(3, choices=(1,))
    with pytest.raises(SettingError, match="stack must be"):
        net(3, stack="layers")
    with pytest.raises(SettingError, match="integer 'count'"):
        net(3, attribute="count")
    with pytest.raises(SettingError, match="early must be"):
        ScaleDepth(early=0)
    with pytest.raises(SettingError, match="above early"):
        net(2, early=85)
