"""Width: how many channels, features or neurons a place of the network has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from supple.axes.base import GroupAxis, check_choices, group_sites, selected
from supple.errors import SettingError, nearest
from supple.graph.couple import Graph, Group
from supple.space import Site

__all__ = ["Width"]

_DIVISOR, _KINDS = 8, ("conv", "linear")


@dataclass(frozen=True)
class Width(GroupAxis):
    """Makes channel counts elastic: residual streams, inner channels, FFN and embedding width.

    Args:
        choices: Sizes on offer at every site: fractions of the full size (floats in (0, 1])
            or absolute sizes (integers; those above a site's full size are left out there).
            The full size is always on offer. None offers every possible size.
        divisor: Fractions are rounded to multiples of this at sites that are at least eight
            times as wide; kernels run at full speed only at such sizes. One for each kind of
            layer is given as `{"conv": 16, "linear": 8}`. None takes what the device profile
            says (`supple.elastic(..., profile=...)`), and 8 without one.
        head_dim: Also offer the width of single attention heads.
        where: Only sites whose name matches this shell-style pattern.

    Raises:
        SettingError: A choice is neither a fraction in (0, 1] nor a positive integer, or a
            divisor is not a positive integer.

    Example:
        >>> Width((0.5, 1.0)).choices
        (0.5, 1.0)
    """

    choices: tuple[int | float, ...] | None = (0.25, 0.5, 0.75, 1.0)
    divisor: int | Mapping[str, int] | tuple[tuple[str, int], ...] | None = None
    head_dim: bool = False
    where: str | None = None
    name: ClassVar[str] = "width"
    general: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))
        if isinstance(self.divisor, Mapping):
            object.__setattr__(self, "divisor", tuple(sorted(self.divisor.items())))
        check_choices(self.name, self.choices)
        self._check_divisor()

    def on_device(self, divisors: Mapping[str, int]) -> Width:
        if self.divisor is not None:
            return self
        return dataclasses.replace(self, divisor=dict(divisors))

    def sites(self, graph: Graph) -> Sequence[Site]:
        kinds = {"width", "head_dim"} if self.head_dim else {"width"}
        groups = [g for g in graph.groups if g.kind in kinds and selected(g.name, self.where)]
        return [
            site
            for group in groups
            for site in group_sites(
                self.name, [group], self.choices, self._divisor_of(graph, group)
            )
        ]

    def _divisor_of(self, graph: Graph, group: Group) -> int:
        if self.divisor is None:
            return _DIVISOR
        if isinstance(self.divisor, int):
            return self.divisor
        conv = any(len(graph.tensors[name]) > 2 for name, _ in group.members)
        return dict(self.divisor).get("conv" if conv else "linear", 1)

    def _check_divisor(self) -> None:
        given = self.divisor
        by_kind = dict(given) if isinstance(given, tuple) else {}
        for kind in by_kind:
            if kind not in _KINDS:
                raise SettingError(
                    f"divisor of width is for {' and '.join(_KINDS)}, got "
                    f"{kind!r}{nearest(kind, _KINDS)}"
                )
        values: list[object] = [given] if given is not None and not by_kind else []
        for divisor in (*values, *by_kind.values()):
            if not isinstance(divisor, int) or isinstance(divisor, bool) or divisor < 1:
                raise SettingError(
                    f"divisor of width must be a whole number of at least 1, got {divisor!r}"
                )
