"""Between the stages of a vision transformer: a quarter of the tokens, and wider ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError

__all__ = ["ResidualSpatialReduction"]


class ResidualSpatialReduction(nn.Module):
    r"""Halves the grid of tokens in both directions and widens them, with a way around it.

    $y = \text{Conv}(\text{LN}(x)) + p + [\text{AvgPool}(x); 0]$: a convolution of stride 2 on
    the grid of tokens, plus a new position embedding $p$, plus the average of each 2 x 2 tokens
    with zeros for the channels that are new. Tokens before the grid (a class token) go through
    a linear layer instead, and around it unchanged. The way around keeps gradients alive
    through all stages.

    Args:
        dim: Channels of the tokens that come in.
        out: Channels that go out, at least `dim`.
        side: Height and width of the grid that comes in, in tokens; even.
        tokens: How many tokens come before the grid.

    Raises:
        SettingError: `out` is below `dim`, or `side` is not even.

    Example:
        >>> layer = ResidualSpatialReduction(8, 16, side=4, tokens=1)
        >>> layer(torch.zeros(2, 1 + 4 * 4, 8)).shape
        torch.Size([2, 5, 16])

    Source:
        Liao et al. 2021, "Searching for Efficient Multi-Stage Vision Transformers",
        arXiv:2109.00642; yilunliao/vit-search.
    """

    def __init__(self, dim: int, out: int, *, side: int, tokens: int = 0) -> None:
        super().__init__()
        if out < dim:
            raise SettingError(f"out must be at least dim, got {out} and {dim}")
        if side < 2 or side % 2:
            raise SettingError(f"side must be an even number of tokens, got {side}")
        self.side = side
        self.tokens = tokens
        self.norm = nn.LayerNorm(dim)
        self.reduce = nn.Conv2d(dim, out, 3, stride=2, padding=1)
        self.token = nn.Linear(dim, out) if tokens else None
        self.position = nn.Parameter(torch.zeros(1, (side // 2) ** 2, out))
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, tokens + side^2, dim) to (N, tokens + side^2 / 4, out)."""
        normed = self.norm(x)
        changed = _sequence(self.reduce(self._grid(normed))) + self.position
        around = _sequence(F.avg_pool2d(self._grid(x), 2))
        if self.token is not None:
            changed = torch.cat([self.token(normed[:, : self.tokens]), changed], dim=1)
            around = torch.cat([x[:, : self.tokens], around], dim=1)
        return changed + F.pad(around, (0, changed.shape[2] - around.shape[2]))

    def _grid(self, x: Tensor) -> Tensor:
        """The tokens of the grid, (N, channels, side, side)."""
        return torch.unflatten(x[:, self.tokens :].transpose(1, 2), 2, (self.side, self.side))


def _sequence(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)
