"""A layer that sees its input through a rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from supple.layers.rotations import Rotation

__all__ = ["RotatedInput"]


class RotatedInput(nn.Module):
    """Maps what a layer is given by a rotation, and may clip it.

    The layer's matrix is to be the rotation's counterpart of the one that it stands for
    (`Rotation.inverse_t`), so that without clipping the function is the same.

    Args:
        layer: A linear layer, or what stands for one.
        rotation: What maps the last dimension.
        clipped: Whether values beyond a share of a token's largest magnitude are clipped to
            it: `clip`, 1 at first.

    Attributes:
        clip: That share, float32 of shape (1,), or None.

    Shape:
        That of the layer.

    Example:
        >>> from supple.layers.rotations import BlockHadamard
        >>> linear, x = nn.Linear(8, 3), torch.ones(2, 8)
        >>> y = linear(x)
        >>> _ = linear.weight.data.copy_(BlockHadamard(8).inverse_t(linear.weight.data))
        >>> torch.allclose(RotatedInput(linear, BlockHadamard(8))(x), y, atol=1e-6)
        True
    """

    clip: Tensor | None

    def __init__(self, layer: nn.Module, rotation: Rotation, *, clipped: bool = False) -> None:
        super().__init__()
        self.layer, self.rotation = layer, rotation
        self.register_buffer("clip", torch.ones(1) if clipped else None)

    @property
    def weight(self) -> Any:
        """The layer's weight, which reads mapped inputs."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The layer's bias."""
        return self.layer.bias

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {
            "layer": self.layer,
            "rotation": self.rotation,
            "clipped": self.clip is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Maps the input and gives what the layer makes of it."""
        x = self.rotation(x)
        if self.clip is not None:
            reach = x.abs().amax(-1, keepdim=True) * self.clip.to(x.dtype)
            x = x.clamp(-reach, reach)
        result: Tensor = self.layer(x)
        return result
