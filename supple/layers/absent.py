"""What stands in the place of a block whose output others are joined with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Absent"]


class Absent(nn.Module):
    """Gives nothing: its input without any positions along one dimension.

    Joined with the outputs of other blocks it adds nothing to them, and another `Absent` behind
    it gives the same.

    Args:
        dim: The dimension along which outputs are joined.

    Example:
        >>> import torch
        >>> Absent(1)(torch.ones(2, 3, 4)).shape
        torch.Size([2, 0, 4])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.narrow(self.dim, 0, 0)
