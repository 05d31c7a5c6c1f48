"""A small vision transformer in stages, each with fewer and wider tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.layers.residual_spatial_reduction import ResidualSpatialReduction
from supple.models.base import positive
from supple.models.vit import Block

__all__ = ["MultiStageViT", "build"]


class MultiStageViT(nn.Module):
    """Patches and a class token through stages of blocks; the class token is classified."""

    def __init__(
        self,
        *,
        side: int,
        patch_size: int,
        dims: Sequence[int],
        blocks: Sequence[int],
        heads: Sequence[int],
        expansion: int,
        classes: int,
        channels: int,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dims[0], patch_size, patch_size)
        self.token = nn.Parameter(torch.zeros(1, 1, dims[0]))
        self.position = nn.Parameter(torch.zeros(1, side**2 + 1, dims[0]))
        nn.init.trunc_normal_(self.token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)
        self.reductions = nn.ModuleList(
            ResidualSpatialReduction(dim, out, side=side // 2**i, tokens=1)
            for i, (dim, out) in enumerate(itertools.pairwise(dims))
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, heads[i], expansion * dim) for _ in range(blocks[i]))
            for i, dim in enumerate(dims)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, channels, H, W) to logits (N, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for i, stage in enumerate(self.stages):
            if i:
                x = self.reductions[i - 1](x)
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def build(
    *,
    image_size: int = 32,
    patch_size: int = 4,
    dims: Sequence[int] = (48, 96),
    blocks: Sequence[int] = (2, 2),
    heads: Sequence[int] = (3, 6),
    expansion: int = 2,
    classes: int = 10,
    channels: int = 3,
) -> nn.Module:
    """Builds a small vision transformer in stages (pre-norm, class token, learned positions).

    Args:
        image_size: Height and width of the images in pixels.
        patch_size: Height and width of a patch in pixels.
        dims: Width of the tokens in each stage, not falling; every stage but the first has a
            quarter of the tokens of the one before.
        blocks: Blocks in each stage, as many numbers as `dims`.
        heads: Attention heads in each stage; each divides the stage's width.
        expansion: Inner width of the perceptrons in multiples of the stage's.
        classes: Number of logits.
        channels: Number of image channels.

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> import torch
        >>> build(image_size=8, patch_size=2, dims=(12, 24))(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])

    Source:
        Liao et al. 2021, "Searching for Efficient Multi-Stage Vision Transformers",
        arXiv:2109.00642; far smaller than theirs.
    """
    positive(image_size=image_size, patch_size=patch_size, expansion=expansion)
    positive(classes=classes, channels=channels)
    if not dims or not len(dims) == len(blocks) == len(heads):
        raise SettingError(
            "dims, blocks and heads need one number per stage each, got "
            f"{tuple(dims)}, {tuple(blocks)} and {tuple(heads)}"
        )
    if min(*dims, *heads) < 1 or min(blocks) < 0:
        raise SettingError(
            "dims and heads must be above 0 and blocks not negative, got "
            f"{tuple(dims)}, {tuple(heads)} and {tuple(blocks)}"
        )
    if image_size % (patch_size * 2 ** (len(dims) - 1)):
        raise SettingError(
            f"image_size must be a multiple of patch_size x 2^(stages - 1), got {image_size} "
            f"and {patch_size} with {len(dims)} stages"
        )
    if any(dim % number for dim, number in zip(dims, heads, strict=True)):
        raise SettingError(f"heads must divide dims, got {tuple(heads)} and {tuple(dims)}")
    return MultiStageViT(
        side=image_size // patch_size,
        patch_size=patch_size,
        dims=dims,
        blocks=blocks,
        heads=heads,
        expansion=expansion,
        classes=classes,
        channels=channels,
    )
