"""Resolution: the height and width at which images enter the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from supple.axes.base import Axis, Inputs, Patch, check_choices, choices_of
from supple.graph.couple import Graph
from supple.space import Site

__all__ = ["Resolution"]


@dataclass(frozen=True)
class _Resize:
    """Scales every image tensor of shape (batch, channels, full, full) to `size`."""

    full: int
    size: int

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        resized = tree_map(self._tensor, (args, kwargs))
        return tuple(resized[0]), dict(resized[1])

    def _tensor(self, value: Any) -> Any:
        is_image = isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
        if not is_image or tuple(value.shape[-2:]) != (self.full, self.full):
            return value
        return F.interpolate(
            value, size=(self.size, self.size), mode="bilinear", align_corners=False
        )


@dataclass(frozen=True)
class ResolutionSite(Site):
    """The one site of the axis."""


@dataclass(frozen=True)
class Resolution(Axis):
    """Makes the input resolution elastic: square images are scaled before they enter.

    Args:
        choices: Heights (and widths) in pixels, or fractions of the example input's.

    Raises:
        SettingError: A choice is neither a fraction in (0, 1] nor a positive integer.

    Example:
        >>> Resolution((160, 192, 224)).choices
        (160, 192, 224)
    """

    choices: tuple[int | float, ...] = (0.5, 0.75, 1.0)
    name: ClassVar[str] = "resolution"

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        check_choices(self.name, self.choices)

    def sites(self, graph: Graph) -> Sequence[Site]:
        images = [
            ref.shape
            for ref in graph.recording.inputs
            if len(ref.shape) == 4 and ref.dtype.is_floating_point
        ]
        if not images or images[0][-1] != images[0][-2]:
            return []
        full = images[0][-1]
        offered = choices_of(full, 1, self.choices, 1)
        return [ResolutionSite("resolution", self.name, offered, full)] if offered[1:] else []

    def patch(self, site: Site, choice: int) -> Patch:
        return (
            Patch() if choice == site.full else Patch(inputs={"": _Resize(site.full, choice)})
        )
