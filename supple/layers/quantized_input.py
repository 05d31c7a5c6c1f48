"""A layer that sees its input with a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize

__all__ = ["QuantizedInput"]


class QuantizedInput(nn.Module):
    """Rounds what a layer is given to numbers of a few bits, which stay in floating point.

    The gradient passes the rounding unchanged.

    Args:
        layer: Any module of one tensor.
        spec: How the input is quantized, or what `QuantSpec.settings` gave.
        static: Whether one scale, and zero point, holds for all inputs; set them with
            `set_scale`. Else each input's own values give the scales.

    Attributes:
        scale: The static scale, (1, 1), or None.
        zero: The static zero point, (1, 1), or None.

    Shape:
        That of the layer.

    Raises:
        SettingError: A static scale is to hold for more than a whole tensor.

    Example:
        >>> layer = QuantizedInput(nn.Identity(), QuantSpec("int3", "token"))
        >>> layer(torch.tensor([[3.5, 1.2], [35.0, 12.0]])).tolist()
        [[3.0, 1.0], [30.0, 10.0]]
    """

    scale: Tensor | None
    zero: Tensor | None

    def __init__(
        self, layer: nn.Module, spec: QuantSpec | Mapping[str, Any], *, static: bool = False
    ) -> None:
        super().__init__()
        self.layer = layer
        self.spec = spec if isinstance(spec, QuantSpec) else QuantSpec(**spec)
        if static and self.spec.granularity != "tensor":
            raise SettingError(
                "a static scale holds for whole tensors: set granularity='tensor', got "
                f"{self.spec.granularity!r}"
            )
        self.register_buffer("scale", torch.ones(1, 1) if static else None)
        shifted = static and not self.spec.symmetric
        self.register_buffer("zero", torch.zeros(1, 1) if shifted else None)

    @property
    def static(self) -> bool:
        """Whether one scale holds for all inputs."""
        return self.scale is not None

    @property
    def weight(self) -> Any:
        """The layer's weight."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The layer's bias."""
        return self.layer.bias

    @torch.no_grad()
    def set_scale(self, scale: Tensor, zero: Tensor | None = None) -> QuantizedInput:
        """Sets the static scale and zero point.

        Args:
            scale: One number, above 0.
            zero: One number, where the spec is not symmetric.

        Returns:
            The layer itself.

        Raises:
            SettingError: The layer has no static scale, or the zero point is one too many or
                missing.
        """
        if self.scale is None or (zero is None) != (self.zero is None):
            raise SettingError(
                f"this layer takes {'a' if self.static else 'no'} static scale and "
                f"{'no' if self.zero is None else 'a'} zero point"
            )
        self.scale.copy_(scale.reshape(1, 1))
        if self.zero is not None and zero is not None:
            self.zero.copy_(zero.reshape(1, 1))
        return self

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {"layer": self.layer, "spec": self.spec.settings(), "static": self.static}

    def forward(self, x: Tensor) -> Tensor:
        """Rounds the input and gives what the layer makes of it."""
        rounded = fake_quantize(x.detach(), self.spec, self.scale, self.zero)
        if x.requires_grad:
            rounded = x + (rounded - x).detach()
        result: Tensor = self.layer(rounded)
        return result
