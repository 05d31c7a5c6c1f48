"""The vision transformer is the published design."""

from __future__ import annotations

import math

import pytest
import torch

from supple.errors import SettingError
from supple.models.vit import Attention, build


def test_attention_equals_its_definition():
    layer = Attention(12, 3)
    x = torch.randn(2, 5, 12)
    heads = []
    for head in range(3):
        rows = slice(4 * head, 4 * head + 4)
        query, key, value = (
            x @ part.weight[rows].T + part.bias[rows]
            for part in (layer.query, layer.key, layer.value)
        )
        weights = (query @ key.transpose(1, 2) / math.sqrt(4)).softmax(-1)
        heads.append(weights @ value)
    torch.testing.assert_close(layer(x), layer.out(torch.cat(heads, 2)))


def test_a_position_of_its_own_tells_patches_apart():
    net = build(image_size=8, patch_size=4, dim=12, num_layers=1, num_heads=3).eval()
    image = torch.randn(1, 3, 8, 8)
    swapped = image.roll(4, 3)
    assert not torch.allclose(net(image), net(swapped))
    torch.nn.init.zeros_(net.position)
    torch.testing.assert_close(net(image), net(swapped))


def test_the_hidden_width_is_four_times_the_tokens_by_default():
    assert build(dim=24).blocks[0].up.out_features == 96
    assert build(dim=24, hidden=40).blocks[0].up.out_features == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30}, "multiple of patch_size"),
        ({"dim": 30, "num_heads": 4}, "multiple of num_heads"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        build(**settings)
