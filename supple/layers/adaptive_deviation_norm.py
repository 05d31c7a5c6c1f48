"""A residual branch whose strength follows the contrast of what it is added to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from supple.errors import SettingError

__all__ = ["AdaptiveDeviationNorm"]


class AdaptiveDeviationNorm(nn.Module):
    r"""Normalises what a residual branch sees, and scales what it gives by the contrast.

    $y = \phi(\sigma(x))\,f(\text{BN}(x)) + x$: $\sigma$ is the standard deviation over all
    channels and pixels of one image, $\phi(\sigma) = a \sigma + b$ with one trained $a$ (1.5 at
    first) and $b$ (0). Super-resolution suffers from batch norm, since it takes away how far
    images deviate; here the deviation is put back, while the branch sees values of one scale,
    which can be quantized well.

    Args:
        body: $f$, from (N, C, H, W) to the same shape.
        channels: $C$, at least 1.

    Shape:
        (N, C, H, W) to (N, C, H, W), of more than one value per image.

    Raises:
        SettingError: `channels` is not above 0.

    Example:
        >>> x = torch.randn(2, 4, 5, 5)
        >>> torch.equal(AdaptiveDeviationNorm(nn.Conv2d(4, 4, 3, padding=1), 4)(0 * x), 0 * x)
        True

    Source:
        Shvetsov et al. 2022, "QuantNAS for super resolution", arXiv:2208.14839 (there ADQ);
        On-Point-RND/QuantNAS, `sr_models/ADN.py`. After Liu, Tang and Wu 2021, "AdaDM: Enabling
        Normalization for Image Super-Resolution", arXiv:2111.13905.
    """

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise SettingError(f"channels must be at least 1, got {channels}")
        self.norm = nn.BatchNorm2d(channels)
        self.body = body
        self.slope = nn.Parameter(torch.tensor(1.5))
        self.offset = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        deviation = x.std(dim=(1, 2, 3), keepdim=True)
        result: Tensor = self.body(self.norm(x)) * (self.slope * deviation + self.offset) + x
        return result
