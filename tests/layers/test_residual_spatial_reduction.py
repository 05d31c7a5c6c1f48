"""The reduction of tokens between stages of a vision transformer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from supple.errors import SettingError
from supple.layers.residual_spatial_reduction import ResidualSpatialReduction


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_it_is_a_convolution_beside_an_average_padded_with_zeros(tokens):
    torch.manual_seed(0)
    layer = ResidualSpatialReduction(3, 5, side=4, tokens=tokens)
    x = torch.randn(2, tokens + 16, 3)
    given = layer(x)
    assert given.shape == (2, tokens + 4, 5)
    normed = F.layer_norm(x, (3,))
    for row in range(2):
        for column in range(2):
            place = tokens + 2 * row + column
            four = [tokens + 4 * (2 * row + i) + 2 * column + j for i in (0, 1) for j in (0, 1)]
            around = torch.cat([x[:, four].mean(1), torch.zeros(2, 2)], dim=1)
            expected = layer.reduce.bias + layer.position[0, place - tokens] + around
            for i in range(3):
                for j in range(3):
                    y, z = 2 * row + i - 1, 2 * column + j - 1
                    if 0 <= y < 4 and 0 <= z < 4:
                        token = normed[:, tokens + 4 * y + z]
                        expected = expected + token @ layer.reduce.weight[:, :, i, j].T
            torch.testing.assert_close(given[:, place], expected)
    for place in range(tokens):
        around = F.pad(x[:, place], (0, 2))
        torch.testing.assert_close(given[:, place], layer.token(normed[:, place]) + around)


@pytest.mark.parametrize(("out", "side", "named"), [(2, 4, "out"), (4, 3, "side")])
def test_settings_are_checked(out, side, named):
    with pytest.raises(SettingError, match=named):
        ResidualSpatialReduction(3, out, side=side)
