"""The small vision transformer in stages."""

from __future__ import annotations

import pytest
import torch

import supple
from supple.axes.depth import Depth
from supple.axes.heads import Heads
from supple.axes.width import Width
from supple.errors import SettingError
from supple.models.base import build

TINY = {"image_size": 8, "patch_size": 2, "dims": (12, 24), "channels": 1}


def test_a_later_stage_has_a_quarter_of_the_tokens():
    net = build("multi-stage-vit", **TINY)
    seen = []
    for stage in net.stages:
        inner = stage[0].forward
        stage[0].forward = lambda x, inner=inner: seen.append(tuple(x.shape)) or inner(x)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert seen == [(2, 17, 12), (2, 5, 24)]


def test_widths_heads_and_depth_of_every_stage_are_elastic():
    net = supple.elastic(
        build("multi-stage-vit", **TINY),
        torch.zeros(2, 1, 8, 8),
        axes=[Width((0.5, 1.0)), Heads(), Depth()],
    )
    axes = [site.axis for site in net.space.sites]
    # the first stage's width, what the second adds to it, and four inner widths
    assert {axis: axes.count(axis) for axis in axes} == {"width": 6, "heads": 4, "depth": 2}
    assert not any("verification" in fixed.reason for fixed in net.space.fixed)
    small = net.extract(net.space.smallest())
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dims": (12,)}, "blocks"),
        ({"dims": (12, 0)}, "above 0"),
        ({"image_size": 6}, "image_size"),
        ({"heads": (3, 5)}, "heads"),
        ({"dims": (24, 12)}, "out must be"),
    ],
)
def test_settings_are_checked(settings, named):
    with pytest.raises(SettingError, match=named):
        build("multi-stage-vit", **{**TINY, **settings})
