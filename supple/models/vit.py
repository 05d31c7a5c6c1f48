"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.models.base import positive

__all__ = ["Attention", "Block", "ViT", "build"]


class Attention(nn.Module):
    """Multi-head self-attention over tokens, (N, tokens, dim) to the same."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and with a residual."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + hidden


class ViT(nn.Module):
    """Patches and a class token through blocks; the class token is classified."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        hidden: int,
        classes: int,
        channels: int,
    ) -> None:
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + 1
        self.patches = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        nn.init.trunc_normal_(self.token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, num_heads, hidden) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, channels, H, W) to logits (N, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def build(
    *,
    image_size: int = 32,
    patch_size: int = 4,
    dim: int = 96,
    num_layers: int = 6,
    num_heads: int = 4,
    hidden: int | None = None,
    classes: int = 10,
    channels: int = 3,
) -> nn.Module:
    """Builds a small vision transformer (pre-norm, class token, learned positions).

    Args:
        image_size: Height and width of the images in pixels, a multiple of `patch_size`.
        patch_size: Height and width of a patch in pixels.
        dim: Width of the tokens, a multiple of `num_heads`.
        num_layers: Number of blocks.
        num_heads: Attention heads per block.
        hidden: Inner width of the perceptrons; 4 x dim by default.
        classes: Number of logits.
        channels: Number of image channels.

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> import torch
        >>> build(image_size=8, patch_size=2, dim=24)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])

    Source:
        Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929.
    """
    hidden = 4 * dim if hidden is None else hidden
    positive(dim=dim, num_layers=num_layers, hidden=hidden, classes=classes, channels=channels)
    positive(image_size=image_size, patch_size=patch_size, num_heads=num_heads)
    if image_size % patch_size:
        raise SettingError(
            f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}"
        )
    if dim % num_heads:
        raise SettingError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
    return ViT(
        image_size=image_size,
        patch_size=patch_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden=hidden,
        classes=classes,
        channels=channels,
    )
