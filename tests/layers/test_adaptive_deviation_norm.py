"""The residual branch that follows the contrast of images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.layers.adaptive_deviation_norm import AdaptiveDeviationNorm


def test_the_branch_is_normalised_and_scaled_by_each_images_own_deviation() -> None:
    layer = AdaptiveDeviationNorm(nn.Tanh(), 3)
    with torch.no_grad():
        layer.offset.fill_(0.25)
    x = torch.randn(5, 3, 7, 2, generator=torch.Generator().manual_seed(0))
    x = x * torch.arange(1.0, 6.0)[:, None, None, None]
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    normed = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    given = layer(x)
    for image in range(5):
        deviation = ((x[image] - x[image].mean()) ** 2).sum().div(3 * 7 * 2 - 1).sqrt()
        expected = normed[image].tanh() * (1.5 * deviation + 0.25) + x[image]
        torch.testing.assert_close(given[image], expected)


def test_channels_are_checked() -> None:
    with pytest.raises(SettingError, match="channels must be at least 1, got 0"):
        AdaptiveDeviationNorm(nn.Identity(), 0)
