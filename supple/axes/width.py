"""Width: how many channels, features or neurons a place of the network has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from supple.axes.base import GroupAxis, check_choices, group_sites, selected
from supple.graph.couple import Graph
from supple.space import Site

__all__ = ["Width"]


@dataclass(frozen=True)
class Width(GroupAxis):
    """Makes channel counts elastic: residual streams, inner channels, FFN and embedding width.

    Args:
        choices: Sizes on offer at every site: fractions of the full size (floats in (0, 1])
            or absolute sizes (integers; those above a site's full size are left out there).
            The full size is always on offer. None offers every possible size.
        divisor: Fractions are rounded to multiples of this at sites that are at least eight
            times as wide; kernels run at full speed only at such sizes.
        head_dim: Also offer the width of single attention heads.
        where: Only sites whose name matches this shell-style pattern.

    Raises:
        SettingError: A choice is neither a fraction in (0, 1] nor a positive integer.

    Example:
        >>> Width((0.5, 1.0)).choices
        (0.5, 1.0)
    """

    choices: tuple[int | float, ...] | None = (0.25, 0.5, 0.75, 1.0)
    divisor: int = 8
    head_dim: bool = False
    where: str | None = None
    name: ClassVar[str] = "width"
    general: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))
        check_choices(self.name, self.choices)

    def sites(self, graph: Graph) -> Sequence[Site]:
        kinds = {"width", "head_dim"} if self.head_dim else {"width"}
        groups = [g for g in graph.groups if g.kind in kinds and selected(g.name, self.where)]
        return group_sites(self.name, groups, self.choices, self.divisor)
