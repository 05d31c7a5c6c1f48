"""The network halves its image where it is told to."""

from __future__ import annotations

import pytest
import torch

from supple.errors import SettingError
from supple.models.base import build


@pytest.mark.parametrize(("pools", "sides"), [((0, 2), (8, 8, 4)), ((), (16, 16, 16))])
def test_images_are_halved_at_the_named_places(pools, sides):
    net = build("pooling-cnn", widths=(5, 5, 7), pools=pools)
    seen = []
    x = net.stem(torch.zeros(2, 3, 16, 16))
    for place, block in zip(net.places, net.blocks, strict=True):
        x = block(place(x))
        seen.append(x.shape[-1])
    assert tuple(seen) == sides
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_a_block_of_one_width_adds_to_its_input():
    block = build("pooling-cnn", widths=(5, 7, 7), pools=(1,)).blocks
    assert [each.residual for each in block] == [True, False, True]
    x = torch.rand(2, 7, 4, 4)
    torch.nn.init.zeros_(block[2].bn.weight)
    torch.testing.assert_close(block[2](x), x)


@pytest.mark.parametrize(
    "settings",
    [{"widths": ()}, {"widths": (5, 0)}, {"pools": (1, 1)}, {"pools": (6,)}, {"classes": 0}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        build("pooling-cnn", **settings)
