"""A layer whose input's channels are divided by numbers of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from supple.errors import SettingError

__all__ = ["ScaledInput"]


class ScaledInput(nn.Module):
    """Multiplies each channel of what a layer is given by a factor.

    It stands where nothing before the layer can take the factors. The layer's weight holds
    their inverse, so that both together compute what the layer did before.

    Args:
        layer: Any module of one tensor.
        size: Channels of the input.
        dim: The dimension of the channels: -1, or 1 in front of a convolution.

    Attributes:
        factor: The factors, (size,), in the type of the layer's weight; at first 1.

    Shape:
        That of the layer.

    Raises:
        SettingError: There are no channels.

    Example:
        >>> layer = ScaledInput(nn.Identity(), 2).set_factor(torch.tensor([2.0, 0.5]))
        >>> layer(torch.ones(1, 2)).tolist()
        [[2.0, 0.5]]
    """

    factor: Tensor

    def __init__(self, layer: nn.Module, size: int, dim: int = -1) -> None:
        super().__init__()
        if size < 1:
            raise SettingError(f"size must be at least 1, got {size}")
        self.layer, self.dim = layer, dim
        self.register_buffer("factor", torch.ones(size))

    def __getattr__(self, name: str) -> Any:
        """Gives what the layer tells of itself, such as `weight` or `stride`."""
        if name in ("layer", "factor") or name.startswith("_"):
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    @torch.no_grad()
    def set_factor(self, factor: Tensor) -> ScaledInput:
        """Sets the factors.

        Args:
            factor: (size,), finite.

        Returns:
            The layer itself.

        Raises:
            SettingError: The shape is another one.
        """
        if factor.shape != self.factor.shape:
            raise SettingError(
                f"factor must be of shape {tuple(self.factor.shape)}, got {tuple(factor.shape)}"
            )
        self.factor = factor.detach().clone()
        return self

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {"layer": self.layer, "size": len(self.factor), "dim": self.dim}

    def extra_repr(self) -> str:
        """Tells the size."""
        return f"{len(self.factor)}, dim={self.dim}"

    def forward(self, x: Tensor) -> Tensor:
        """Scales the input and gives what the layer makes of it."""
        behind = x.dim() - 1 - self.dim % x.dim()
        result: Tensor = self.layer(x * self.factor.reshape(-1, *(1,) * behind).to(x.dtype))
        return result
