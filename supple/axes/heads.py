"""Heads: how many attention heads a layer has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from supple.axes.base import GroupAxis, check_choices, group_sites, selected
from supple.graph.couple import Graph
from supple.space import Site

__all__ = ["Heads"]


@dataclass(frozen=True)
class Heads(GroupAxis):
    """Makes the count of attention heads elastic, fused and grouped-query projections included.

    With grouped queries a site is the number of key-value heads, each with its query heads,
    and with `queries` a second one the number of query heads per key-value head.

    Args:
        choices: Head counts on offer: fractions of the full count (floats in (0, 1]) or
            absolute counts (integers). None offers every possible count.
        queries: Also offer the number of query heads per key-value head. Give example inputs
            with a padding mask then: without one `transformers` takes a path on which the
            integer that repeats the keys is never used, and so cannot be found.
        where: Only sites whose name matches this shell-style pattern.

    Raises:
        SettingError: A choice is neither a fraction in (0, 1] nor a positive integer.

    Example:
        >>> Heads((1, 2, 4)).choices
        (1, 2, 4)
    """

    choices: tuple[int | float, ...] | None = (0.25, 0.5, 0.75, 1.0)
    queries: bool = False
    where: str | None = None
    name: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))
        check_choices(self.name, self.choices)

    def sites(self, graph: Graph) -> Sequence[Site]:
        kinds = {"heads", "queries"} if self.queries else {"heads"}
        groups = [g for g in graph.groups if g.kind in kinds and selected(g.name, self.where)]
        return group_sites(self.name, groups, self.choices, divisor=1)
