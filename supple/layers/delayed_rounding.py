"""Rounding of inputs that watches their range first, then holds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from supple.errors import SettingError
from supple.layers.fake_quantize import FakeQuantize

__all__ = ["DelayedRounding"]


class DelayedRounding(FakeQuantize):
    """Lets a tensor through and watches its range; from some time on rounds within that range.

    Args:
        spec: As for `supple.layers.fake_quantize.FakeQuantize`.
        **settings: As there; the observer is `"ema"`.

    Attributes:
        rounds: Whether it rounds; ranges stay then.

    Shape:
        Any, and the same.

    Raises:
        SettingError: As there, or the observer is another one.

    Example:
        >>> from supple.formats import QuantSpec
        >>> layer = DelayedRounding(QuantSpec("int3", "tensor"), decay=0.0)
        >>> layer(torch.tensor([3.5, 1.2])).tolist()
        [3.5, 1.2000000476837158]
        >>> layer.rounds = True
        >>> layer(torch.tensor([9.0, 1.2])).tolist()
        [3.0, 1.0]
    """

    def __init__(self, spec: Any, *, observer: str = "ema", **settings: Any) -> None:
        super().__init__(spec, observer=observer, **settings)
        if observer != "ema":
            raise SettingError(
                f"ranges that are watched first need observer='ema', got {observer!r}"
            )
        self.rounds = False

    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        if not self.rounds:
            super()._watch(x)

    def forward(self, x: Tensor) -> Tensor:
        """Watches a tensor, or rounds it."""
        if self.rounds:
            return super().forward(x)
        if self.training:
            self._watch(self._mapped(x.detach()))
        return x
